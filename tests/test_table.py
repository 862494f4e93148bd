"""Tables print what was measured, set off the best, and never mix it with what was published."""

import csv
import importlib
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from click.testing import CliRunner
from made_up import EPS, found, paper_columns, run

from bench import registry
from bench.cli import commands
from bench.errors import UnknownName, UsageError
from bench.long import HEADER, groups
from bench.protocol import ATTACKS, DIAGNOSTIC
from bench.published import Printed, doubts, published_dir, reports, rows
from bench.record import ColumnRecord, Facts, finish, folder, read_all, void
from bench.table import FORMATS, render, render_groups
from bench.typeset import tex as _latex

PAPER_HEADINGS = [
    "SA",
    *(f"RA-FGSM 0.0{i}" for i in range(1, 10)),
    *(f"RA-PGD {k}" for k in (10, 20, 30, 40, 50)),
    "RA-PGD 100 (MS)",
    "RA-PGD 100 (A)",
]
STANDARD = [
    ColumnRecord(name="clean", attack="clean"),
    ColumnRecord(
        **{"name": "pgd-100x5", "attack": "pgd", "norm": "Linf", "epsilon": EPS, "step_size": EPS / 4},
        **{"steps": 100, "restarts": 5, "eot": 1},
    ),
    ColumnRecord(name="autoattack", attack="autoattack", norm="Linf", epsilon=EPS),
]


def table(results, **options):
    return list(csv.DictReader(io.StringIO(render(results, format="csv", **options))))


def markdown_rows(results, **options):
    lines = render(results, format="markdown", **options).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {label: row for label, *row in cells}


@pytest.fixture
def two(tmp_path):
    """Two defenses on CIFAR-10: one leads on clean images, one under attack; they tie at FGSM 0.09."""
    run(tmp_path, {"clean": 160}, dataset="cifar10", defense="dwf", published_as="DWF")
    weak = {column.name: 20 for column in paper_columns()} | {"clean": 190, "fgsm-0.09": 200}
    run(tmp_path, weak, dataset="cifar10", defense="resnet_18", published_as="ResNet-18")
    return tmp_path


def test_the_paper_layout_has_the_columns_of_its_table_3(two):
    header = render(two, format="csv").splitlines()[0].split(",")
    assert header == ["dataset", "protocol", "defense", "source", *PAPER_HEADINGS]


def test_a_cell_is_the_accuracy_in_percent(two):
    first, second = table(two)
    assert (first["defense"], first["SA"], first["RA-PGD 100 (A)"]) == ("dwf", "80.00", "100.00")
    assert (second["defense"], second["SA"], second["RA-FGSM 0.01"]) == ("resnet_18", "95.00", "10.00")


def test_the_best_of_a_column_is_set_off_and_ties_are_shared(two):
    found = markdown_rows(two)
    best = {label: [cell.startswith("**") for cell in row] for label, row in found.items()}
    assert best["dwf"] == [False] + [True] * 16
    assert best["resnet_18"] == [True] + [False] * 8 + [True] + [False] * 7


def test_text_sets_off_the_best_with_a_star_and_in_colour_with_bold(two):
    text = render(two)
    assert re.search(r"^dwf +80\.00 +100\.00\* ", text, re.MULTILINE)
    assert "*: the best measured value of a column" in " ".join(text.split())
    coloured = render(two, color=True)
    assert "100.00*" not in coloured
    assert re.search(r"\x1b\[1m *95\.00 *\x1b\[0m", coloured)
    assert re.sub(r"\x1b\[\d*m", "", coloured).splitlines()[-2] == text.splitlines()[-2].replace("*", " ")


def test_one_defense_alone_is_the_best_of_nothing(tmp_path):
    run(tmp_path)
    assert "*" not in render(tmp_path, format="markdown")
    assert "best" not in render(tmp_path)


def test_the_caption_says_how_sure_the_leads_are(two):
    caption = render(two, format="markdown").splitlines()[0]
    assert "its lead over every other row is significant in every column but RA-FGSM 0.09" in caption
    assert "exact McNemar test on the same images" in caption


@pytest.mark.parametrize(("ahead", "where"), [(6, "no column"), (7, "every column")])
def test_leads_are_tested_per_image_and_for_all_columns_together(tmp_path, ahead, where):
    # two columns, clean and worst case: the p-value 2 / 2**ahead of each is doubled, 0.0625 or 0.03125
    run(tmp_path, {"clean": 50 + ahead}, defense="a", columns=STANDARD[:1], protocol="p")
    run(tmp_path, {"clean": 50}, defense="b", columns=STANDARD[:1], protocol="p")
    assert f"significant in {where} (" in " ".join(render(tmp_path).split())


def test_the_caption_names_radius_step_images_and_interval(two):
    caption = " ".join(render(two).split())
    assert (
        "cifar10, protocol dwf-paper: accuracy in % on n = 200 images (fewer than 1000; data dddddddd)"
        in caption
    )
    assert "PGD: Linf, eps 8/255, step size 2/255." in caption
    # Wilson at 160 of 200 reaches from 73.91 to 84.96
    assert "95 % Wilson intervals reach at most 6.09 points to either side" in caption


def test_published_rows_stand_below_their_measured_ones_and_the_others_after_all(two):
    found = table(two, published=True)
    order = [(row["defense"], row["source"]) for row in found]
    assert order[:4] == [
        ("dwf", "measured"),
        ("DWF, published", "published"),
        ("resnet_18", "measured"),
        ("ResNet-18, published", "published"),
    ]
    assert {source for _, source in order[4:]} == {"published"}
    assert len(order) == 2 + 13
    assert found[1]["SA"] == "91.19 ± 0.43"
    assert found[3]["RA-PGD 100 (MS)"] == "37.07"


def test_published_rows_are_never_set_off_and_take_no_part(two):
    with_them, without = markdown_rows(two, published=True), markdown_rows(two)
    printed = {label: row for label, row in with_them.items() if "published" in label}
    assert len(printed) == 13
    assert not any("**" in cell for row in printed.values() for cell in row)
    assert {label: row for label, row in with_them.items() if label not in printed} == without
    assert not re.search(r"textbf.*published|published.*textbf", render(two, format="latex", published=True))


def test_published_rows_are_for_the_papers_datasets_and_protocol_alone(tmp_path):
    run(tmp_path, dataset="digits", published_as="DWF")
    run(tmp_path, dataset="cifar10", published_as="DWF", columns=STANDARD, protocol="standard")
    assert {row["source"] for row in table(tmp_path, published=True)} == {"measured"}


def test_published_rows_bear_what_they_contradict(two):
    text = render(two, published=True)
    mark = re.search(r"ADVMoE, published \[(\w)\]", text)[1]
    assert f"[{mark}] as printed, accuracy rises with the radius of FGSM" in text
    assert doubts(rows("cifar10")["DWF"]) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({("fgsm", 0.01): 50, ("fgsm", 0.02): 50, ("pgd", 10): 40, ("pgd", 20): 40, ("ms-pgd", 100): 40}, 0),
        ({("fgsm", 0.02): 50, ("fgsm", 0.01): 49}, 1),
        ({("fgsm", 0.02): 49, ("fgsm", 0.01): 50}, 0),
        ({("pgd", 10): 40, ("pgd", 20): 41, ("a-pgd", 100): 42}, 2),
        ({("pgd", 10): 40, ("ms-pgd", 100): 41, ("a-pgd", 100): 42}, 1),
    ],
)
def test_only_accuracy_that_rises_with_the_attack_is_doubted(row, expected):
    assert len(doubts({asked: Printed(accuracy, None) for asked, accuracy in row.items()})) == expected


def test_every_published_cell_is_in_the_table():
    assert published_dir().name == "published"
    cells = {dataset: rows(dataset) for dataset in ("cifar10", "svhn")}
    assert sum(len(row) for found in cells.values() for row in found.values()) == 323
    assert {len(row) for found in cells.values() for row in found.values()} == {17}
    with_std = {
        name for found in cells.values() for name, row in found.items() for c in row.values() if c.std
    }
    assert with_std == {"DWF"}
    assert rows("digits") == {}


ADAPTIVE_ASKED = {"steps": 50, "restarts": 1, "norm": "Linf", "epsilon": EPS}
ASKED_OF_MIXTURES = [
    ColumnRecord(name="clean", attack="clean"),
    ColumnRecord(name="pgd-50", attack="pgd", loss="ce", **ADAPTIVE_ASKED),
    ColumnRecord(name="pgd-50-margin", attack="pgd-margin", loss="margin", **ADAPTIVE_ASKED),
    ColumnRecord(name="expert-attacked", attack="expert-attacked", diagnostic=True, **ADAPTIVE_ASKED),
    ColumnRecord(name="router-attacked", attack="router-attacked", diagnostic=True, **ADAPTIVE_ASKED),
    ColumnRecord(name="autoattack", attack="autoattack", norm="Linf", epsilon=EPS),
]


def reported(results, columns=ASKED_OF_MIXTURES, dataset="cifar10", **said):
    """Rows that are reported elsewhere beside a measured one, by label; what they say of themselves is in `notes`."""
    run(results, columns=columns, dataset=dataset, **{"protocol": "mine", **said})
    found = table(results, published=True)
    return {row["defense"]: row for row in found if row["defense"].endswith("reported")}


def test_what_is_reported_of_a_defense_stands_below_it_where_the_attack_is_the_same(tmp_path):
    found = reported(tmp_path, defense="rter")
    assert list(found) == [
        "RT-ER (four ResNet-18), reported",
        "RT-ER, run again by others, seed 0 (four ResNet-18), reported",
        "RT-ER, run again by others, seed 1 (four ResNet-18), reported",
    ]
    printed, again, _ = found.values()
    assert {k: v for k, v in printed.items() if v} == {
        "dataset": "cifar10",
        "protocol": "mine",
        "defense": "RT-ER (four ResNet-18), reported",
        "source": "published",
        "SA": "77.81",
        "pgd 50": "69.09",
        "expert-attacked 50": "75.71",
        "router-attacked 50": "72.28",
        "autoattack": "54.36",
    }
    assert (again["SA"], again["pgd 50"], again["autoattack"]) == ("34.22", "32.70", "")
    assert [row["defense"] for row in table(tmp_path, published=True)] == ["rter", *found]


def test_a_reported_number_that_others_could_not_reproduce_says_so(tmp_path):
    reported(tmp_path, defense="rter")
    told = " ".join(render(tmp_path, published=True).split())
    assert (
        "PGD-50 could not be reproduced: its authors' code run again by others gave 32.70 and 30.51 %" in told
    )
    assert "clean accuracy could not be reproduced: its authors' code run again by others gave 34.22" in told
    assert "Linf, eps 8/255; arXiv 2502.06832" in told and "for display only" in told
    (label,) = re.findall(r"RT-ER \(four ResNet-18\), reported((?: \[\w\])+)", told)
    assert len(label.split()) == 4, "its source, and what is known against three of its numbers"


def test_a_reported_number_of_another_network_or_radius_names_it(tmp_path):
    assert set(reported(tmp_path, defense="trades")) == {
        "TRADES (WRN-34-10), reported",
        "TRADES in MAIR (ResNet-18), reported",
    }
    told = " ".join(render(tmp_path, published=True).split())
    assert "Linf, eps 0.031; RobustBench Zhang2019Theoretically" in told
    assert "Linf, eps 8/255; Harry24k/MAIR" in told


@pytest.mark.parametrize(
    "otherwise",
    [
        {"dataset": "digits"},
        {"defense": "jtdmoe"},
        {"columns": [c.model_copy(update={"epsilon": 2 / 255}) for c in ASKED_OF_MIXTURES]},
        {"columns": [c.model_copy(update={"norm": "L2"}) for c in ASKED_OF_MIXTURES]},
        {"columns": [ASKED_OF_MIXTURES[0], ASKED_OF_MIXTURES[2]]},
        {"columns": [ASKED_OF_MIXTURES[0], ASKED_OF_MIXTURES[1].model_copy(update={"steps": 49})]},
        {"columns": [ASKED_OF_MIXTURES[0], ASKED_OF_MIXTURES[1].model_copy(update={"restarts": 5})]},
    ],
    ids=["dataset", "defense", "radius", "norm", "loss", "steps", "restarts"],
)
def test_what_was_asked_otherwise_has_nothing_reported_beside_it(tmp_path, otherwise):
    assert reported(tmp_path / "same", defense="rter")
    assert reported(tmp_path / "other", **{"defense": "rter", **otherwise}) == {}
    assert "reported" not in render(tmp_path / "other", published=True)


def test_reported_rows_take_no_part_and_are_asked_for(tmp_path):
    run(tmp_path, {"pgd-10": 40}, dataset="cifar10", defense="awp")
    run(tmp_path, {"pgd-10": 10}, dataset="cifar10", defense="mart")
    with_them, without = markdown_rows(tmp_path, published=True), markdown_rows(tmp_path)
    assert not any("reported" in label for label in without)
    told = {label: row for label, row in with_them.items() if "reported" in label}
    # AT-AWP's log, best and last, under PGD-20, and MAIR's three networks under PGD-10
    assert len(told) == 5 and not any("**" in cell for row in told.values() for cell in row)
    assert without.items() <= with_them.items()
    costs = table(tmp_path, published=True, cost=True)
    assert not any(row["training passes"] for row in costs if "reported" in row["defense"])


def test_two_rows_of_a_defense_have_what_is_reported_once(tmp_path):
    for recipe in ("sgd", "paper"):
        run(
            tmp_path,
            columns=ASKED_OF_MIXTURES,
            dataset="cifar10",
            defense="rter",
            protocol="mine",
            recipe=recipe,
        )
    labels = [row["defense"] for row in table(tmp_path, published=True)]
    assert labels[0] == "rter [paper]" and labels[-1] == "rter [sgd]" and len(labels) == 5


def reported_lines():
    with (published_dir() / "reported.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_every_reported_number_is_read_and_says_what_it_is_and_where_it_is_from():
    lines = reported_lines()
    assert {line["dataset"] for line in lines} == {"cifar10", "cifar100"}
    asked = sorted({(line["dataset"], line["defense"]) for line in lines})
    read = {defense: list(reports(dataset, defense)) for dataset, defense in asked}
    assert sum(len(report.numbers) for all_of in read.values() for report in all_of) == len(lines)
    for defense, all_of in read.items():
        assert registry.get(defense)
        assert len({(report.name, report.architecture) for report in all_of}) == len(all_of)
        for report in all_of:
            clean = [one.accuracy for one in report.numbers if one.attack == "clean"]
            assert len(clean) < len(report.numbers) and report.architecture
            for one in report.numbers:
                assert 0 < one.accuracy <= min(clean, default=100) and one.norm == "Linf" and one.source
                assert one.attack in (*ATTACKS, *DIAGNOSTIC) and one.eps == pytest.approx(8 / 255, rel=0.02)
                assert (
                    (one.steps is None) == (one.restarts is None) == (one.attack in ("clean", "autoattack"))
                )


@pytest.mark.parametrize("defense", ["rter", "fgsm_at", "trades", "mart", "awp", "sparse_moe"])
def test_the_file_of_a_defense_says_what_is_reported_of_it(defense):
    text = importlib.import_module(f"defenses.{defense}").__doc__
    said = text[text.index("\nReported:") : text.index("\nExpect:")]
    for line in reported_lines():
        assert line["defense"] != defense or line["accuracy"].removesuffix("0") in said, line


@pytest.mark.parametrize("format", ["text", "markdown", "csv"])
def test_several_seeds_are_mean_and_std(tmp_path, format):
    for seed, count in enumerate([100, 110, 126]):
        run(tmp_path, {"clean": count}, seed=seed)
    run(tmp_path, defense="soe")
    text = render(tmp_path, format=format)
    assert "56.00 ± 6.56" in text
    if format != "csv":
        assert "sample standard deviation over seeds (dwf 3); rows without it are one seed" in " ".join(
            text.split()
        )


def test_several_seeds_in_latex(tmp_path):
    for seed, count in enumerate([100, 110, 126]):
        run(tmp_path, {"clean": count}, seed=seed)
    assert r"56.00 $\pm$ 6.56" in render(tmp_path, format="latex")


def test_a_wide_table_is_written_in_parts(tmp_path):
    for seed in range(2):
        run(tmp_path, {"clean": 100 + seed}, seed=seed, defense="a_defense_with_a_rather_long_name")
    text = render(tmp_path)
    assert max(map(len, text.splitlines())) <= 201
    assert sum(not line.strip("-") for line in text.splitlines()) == 2 * 3  # rules


def test_other_protocols_have_a_table_of_their_own_with_the_worst_case_last(tmp_path):
    run(tmp_path)
    run(
        tmp_path,
        {"pgd-100x5": [1, 0], "autoattack": [0, 1], "clean": [1, 1]},
        columns=STANDARD,
        protocol="standard",
    )
    text = render(tmp_path)
    assert text.count("protocol dwf-paper") == text.count("protocol standard") == 1
    row = next(row for row in table(tmp_path) if row["protocol"] == "standard")
    filled = {name: value for name, value in row.items() if value}
    assert list(filled)[4:] == ["SA", "pgd 100×5", "autoattack", "worst case"]
    assert list(filled.values())[4:] == ["100.00", "50.00", "50.00", "0.00"]


def test_no_column_hides_behind_another_of_the_same_steps(tmp_path):
    other = paper_columns(1 / 255)[10].model_copy(update={"name": "pgd-small"})
    run(tmp_path, {"pgd-10": 20, "pgd-small": 60}, columns=[*paper_columns(), other])
    (row,) = table(tmp_path)
    assert (row["RA-PGD 10"], row["pgd 10"]) == ("10.00", "30.00")


def test_columns_at_several_radii_name_theirs(tmp_path):
    columns = [
        ColumnRecord(name=f"pgd-{k}", attack="pgd", norm="Linf", epsilon=k / 255, step_size=0.001, steps=10)
        for k in (4, 8)
    ]
    run(tmp_path, columns=columns, protocol="curve")
    assert list(table(tmp_path)[0])[4:] == ["pgd 4/255, 10", "pgd 8/255, 10", "worst case"]


def test_columns_that_would_look_alike_bear_their_own_names(tmp_path):
    columns = [ColumnRecord(name=name, attack="aa", norm="Linf", epsilon=EPS) for name in ("aa-x", "aa-y")]
    run(tmp_path, columns=columns, protocol="mine")
    assert list(table(tmp_path)[0])[4:] == ["aa-x", "aa-y", "worst case"]


def test_a_missing_cell_is_a_dash(tmp_path):
    run(tmp_path, columns=STANDARD, protocol="standard", defense="a")
    run(tmp_path, columns=STANDARD[:2], protocol="standard", defense="b")
    assert markdown_rows(tmp_path)["b"][2] == "–"
    assert re.search(r"^b .* – ", render(tmp_path), re.MULTILINE)
    assert re.search(r"^b & .* & -- & ", render(tmp_path, format="latex"), re.MULTILINE)
    assert table(tmp_path)[1]["autoattack"] == ""


def test_defenses_that_were_asked_otherwise_are_not_compared(tmp_path):
    run(tmp_path, n=100)
    run(tmp_path, n=50)
    run(tmp_path, protocol={"name": "dwf-paper", "eps": 0.5}, defense="soe", n=50)
    text = render(tmp_path)
    assert text.count("protocol dwf-paper") == 3
    assert "best" not in text
    assert "dwf [n=100]" in text


def test_footnotes_of_all_mark_the_caption_and_those_of_one_its_row(tmp_path):
    run(tmp_path, defense="a", footnotes=["for all"])
    run(tmp_path, defense="b", footnotes=["for all", "for b"], findings=[found("gradients\n vanish")])
    lines = render(tmp_path).splitlines()
    assert lines[0].endswith("[a].")
    assert any(line.startswith("b (suspect) [b] [c] ") for line in lines)
    assert any(re.match(r"a +100", line) for line in lines)
    assert lines[-3:] == ["[a] for all", "[b] for b", "[c] zero-gradient: gradients vanish"]


def test_a_finding_of_some_seeds_names_them(tmp_path):
    for seed in (0, 1, 2):
        odd = found("odd", code="not-logits")
        own = found(f"{seed} images", code="stateful") if seed else found("none", "informs", code="stateful")
        run(tmp_path, seed=seed, findings=[found("all"), *[odd] * (seed == 1), own])
    assert render(tmp_path).splitlines()[-3:] == [
        "[a] zero-gradient: all",
        "[b] stateful: 1 images (seed 1; also seed 0, 2)",
        "[c] not-logits: odd (seed 1)",
    ]


def test_more_notes_than_letters_go_on_with_two(tmp_path):
    run(tmp_path, findings=[found("it", code=f"code-{i}") for i in range(28)])
    assert render(tmp_path).splitlines()[-3:] == ["[z] code-25: it", "[aa] code-26: it", "[ab] code-27: it"]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_reduced_precision_is_said(precision, tmp_path):
    run(tmp_path, precision=precision)
    assert f"Gradients in {precision}: dwf." in render(tmp_path)


def test_the_long_csv_is_exactly_the_long_table(tmp_path):
    run(tmp_path, {"clean": 1}, n=3, columns=STANDARD, protocol="standard", defense="a,b")
    text = render(tmp_path, format="csv", layout="long")
    assert text.splitlines() == [
        ",".join(HEADER),
        '"a,b",'.join(["digits,", "standard,clean,,,,,,33.3333,6.1492,79.234,3,1,"]),
        '"a,b",'.join(
            [
                "digits,",
                "standard,pgd,0.03137254901960784,0.00784313725490196,100,5,1,100.0,43.8503,100.0,3,1,",
            ]
        ),
        '"a,b",'.join(["digits,", "standard,autoattack,0.03137254901960784,,,,,100.0,43.8503,100.0,3,1,"]),
        '"a,b",'.join(["digits,", "standard,worst-case,0.03137254901960784,,,,,33.3333,6.1492,79.234,3,1,"]),
    ]
    assert text.endswith("\n")
    assert "\r" not in text


@pytest.mark.parametrize("format", ["text", "markdown", "latex"])
def test_the_long_layout_for_people_has_every_row(tmp_path, format):
    run(tmp_path, defense="a_b")
    text = render(tmp_path, format=format, layout="long")
    assert sum("digits" in line for line in text.splitlines()) == 18
    assert "8/255" in text


def latex_rows(text):
    body = re.sub(r"\\multicolumn\{(\d+)\}", lambda match: "&" * (int(match[1]) - 1), text)
    lines = [line for line in body.splitlines() if line.endswith(r" \\") and " & " in line]
    return [len(re.findall(r"(?<!\\)&", line)) for line in lines]


@pytest.fixture
def awkward(two):
    """Every character that LaTeX reads as its own, in what users may name."""
    name = r"50%_#1&{x}$~^\ [y] <é> 8×8 ≤ ε"
    doubt = found(f"∞ {name} “q” … 雪")
    run(two, dataset="cifar10", defense=name, findings=[doubt], footnotes=["95 % & more"])
    run(two, dataset=r"npz:/a_b/c%d", defense="dwf", columns=STANDARD, protocol="mine")
    return two


@pytest.mark.parametrize("layout", ["paper", "long"])
def test_latex_is_well_formed(awkward, layout):
    text = render(awkward, format="latex", layout=layout, published=True)
    assert re.findall(r"\\begin\{(\w+\*?)\}", text)
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    for part in re.split(r"(?=\\begin\{table\*\})", text):
        assert len(set(latex_rows(part))) <= 1, part
    bare = text.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    code = "\n".join(line for line in text.splitlines() if not line.startswith("% needs"))
    assert not re.search(r"(?<!\\)[%#]", code.replace("{!}{%", ""))
    assert not re.search(r"(?<!\\)_(?!\d\$)", re.sub(r"\\(label|begin)\{.*", "", code))
    assert len(re.findall(r"(?<!\\)\$", code)) % 2 == 0
    assert re.sub(r"[éÉ]", "", text).isascii()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 5 %", r"a\_b \& 5 \%"),
        (r"\{x}$^~", r"\textbackslash{}\{x\}\$\textasciicircum{}\textasciitilde{}"),
        ("--eps 8/255", "-{}-eps 8/255"),
        ("a – b", "a -- b"),
        ("dwf-paper [n=5]", "dwf-paper {[}n=5]"),
        ("ε ≤ λ × ∞", r"$\epsilon$ $\leq$ $\lambda$ $\times$ $\infty$"),
        ("Zoë Åström Łódź e\u0301", "Zoë Åström Łódź é"),
        ("雪 Ａ ο ð", "U+96EA U+FF21 U+03BF U+00F0"),
    ],
)
def test_text_for_latex(text, expected):
    assert _latex(text) == expected


def test_latex_has_a_caption_and_labels_that_differ(awkward):
    run(awkward, dataset="cifar10", n=20)
    text = render(awkward, format="latex")
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(labels) == len(set(labels)) == text.count(r"\caption{") == 3
    assert all(re.fullmatch(r"tab:[A-Za-z0-9.-]+", label) for label in labels)
    assert r"resnet\_18" in text
    assert r"\textbf{100.00}" in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
@pytest.mark.parametrize("layout", ["paper", "long"])
def test_latex_compiles(awkward, tmp_path, layout):
    body = render(awkward, format="latex", layout=layout, published=True)
    packages = "\\usepackage{booktabs,graphicx,longtable}"
    source = f"\\documentclass[twocolumn]{{article}}{packages}\\begin{{document}}{body}\\end{{document}}"
    if layout == "long":
        source = source.replace("[twocolumn]", "")
    (tmp_path / "table.tex").write_text(source, encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_markdown_rows_have_as_many_cells_as_the_header(awkward):
    for block in render(awkward, format="markdown", published=True).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "html"}, "no format named 'html'; choose from text, markdown, latex, csv"),
        ({"layout": "wide"}, "no layout named 'wide'; choose from paper, long"),
    ],
)
def test_an_unknown_format_or_layout_names_the_known_ones(tmp_path, options, message):
    run(tmp_path)
    with pytest.raises(UsageError, match=message):
        render(tmp_path, **options)


def test_a_table_of_some_groups_alone(two):
    first, second = groups(read_all(two))
    assert render_groups([first, second], published=True) == render(two, published=True)
    assert "resnet" not in render_groups([first])


def test_no_runs_are_no_table(tmp_path):
    with pytest.raises(UsageError, match=r"no finished runs in .*; `bench run` makes some"):
        render(tmp_path)


def test_the_same_records_give_the_same_bytes(awkward):
    for format in ("text", "markdown", "latex", "csv"):
        assert render(awkward, format=format) == render(awkward, format=format)


def test_a_mixture_that_is_asked_more_stands_beside_a_plain_network(tmp_path):
    plain = [
        ColumnRecord(name="clean", attack="clean"),
        ColumnRecord(name="pgd-5", attack="pgd", epsilon=0.1, steps=5),
    ]
    more = [*plain, ColumnRecord(name="per-route", attack="per-route", epsilon=0.1, steps=5)]
    for defense, columns in (("a", plain), ("b", more)):
        protocol = {"name": "adaptive", "columns": [column.model_dump(mode="json") for column in columns]}
        run(
            tmp_path,
            {"per-route": 30} if columns is more else {},
            defense=defense,
            columns=columns,
            protocol=protocol,
            n=100,
        )
    text = render(tmp_path, format="csv")
    header, a, b = csv.reader(io.StringIO(text))
    place = next(i for i, name in enumerate(header) if "per-route" in name)
    assert (a[place], b[place]) == ("", "30.00")
    assert (a[-1], b[-1]) == ("100.00", "30.00")


def test_a_suspect_row_is_marked_in_every_format_and_wins_nothing(tmp_path):
    for defense, held in (("a", 190), ("b", 150), ("c", 100)):
        doubt = [found("too flat")] * (defense == "a")
        run(tmp_path, {"clean": held}, defense=defense, columns=STANDARD[:1], protocol="p", findings=doubt)
    text = render(tmp_path)
    assert re.search(r"^a \(suspect\) \[a\] +95\.00 +95\.00$", text, re.MULTILINE)
    assert re.search(r"^b +75\.00\* +75\.00\*$", text, re.MULTILINE)
    assert "[a] zero-gradient: too flat" in text
    assert "*: the best measured value of a column in a credible row" in " ".join(text.split())
    assert "| a (suspect) [a] | 95.00 | 95.00 |" in render(tmp_path, format="markdown")
    assert r"a (suspect)\textsuperscript{a} & 95.00 & 95.00" in render(tmp_path, format="latex")
    assert [row["source"] for row in table(tmp_path)] == ["measured, suspect", "measured", "measured"]


def test_a_void_row_has_no_numbers_anywhere(tmp_path):
    run(
        tmp_path, {"clean": 190}, defense="a", columns=STANDARD, protocol="p", findings=[found("x", "blocks")]
    )
    run(tmp_path, {"clean": 100}, defense="b", columns=STANDARD, protocol="p")
    text = render(tmp_path, compare_to="b")
    assert re.search(r"^a \(void\) \[a\] +void +void +void +void$", text, re.MULTILINE)
    assert "not tested: a (void)" in " ".join(text.split())
    # that of 100 of 200
    assert "intervals reach at most 6.86 points" in " ".join(text.split())
    assert [row["SA"] for row in table(tmp_path)] == ["void", "50.00"]
    assert "| void | void | void | void |" in render(tmp_path, format="markdown")
    assert "& void & void & void & void" in render(tmp_path, format="latex")
    long = list(csv.DictReader(io.StringIO(render(tmp_path, format="csv", layout="long"))))
    assert {(row["accuracy"], row["ci_low"]) for row in long if row["defense"] == "a"} == {("", "")}
    alone = [group for group in groups(read_all(tmp_path)) if group.label == "a"]
    assert "Wilson" not in render_groups(alone)


def test_a_finding_that_only_informs_doubts_nothing_and_is_shortened(tmp_path):
    run(tmp_path, findings=[found("word " * 40, "informs")])
    last = render(tmp_path).splitlines()[-1]
    assert "(suspect)" not in render(tmp_path)
    assert last.startswith("[a] zero-gradient: word word") and last.endswith(" …")
    assert len(last) <= 104


def lead(tmp_path, held):
    for defense, clean in zip("abc", held, strict=False):
        run(tmp_path, {"clean": clean}, defense=defense, columns=STANDARD[:2], protocol="p")
    return " ".join(render(tmp_path).split())


@pytest.mark.parametrize(("held", "few"), [((100, 114), False), ((100, 113), True), ((120, 120), False)])
def test_a_lead_within_the_interval_is_noted(tmp_path, held, few):
    # Wilson reaches 6.93 points from 113 and from 114 of 200; the leads are 6.5 and 7
    text = lead(tmp_path, held)
    assert ("[a] few-images: n = 200; the best row leads the next by less than" in text) == few
    assert ("interval reaches in SA, worst case" in text) == few


def test_differences_from_one_row_are_marked_after_holm(tmp_path):
    columns = STANDARD[:2]
    run(tmp_path, {"clean": 100, "pgd-100x5": 50}, defense="a", columns=columns, protocol="p")
    # 6 and 9 images ahead: 2 / 2^6 = 0.031 and 2 / 2^9 = 0.0039; with the worst case, which is the 9 again,
    # Holm multiplies by 3, 2 and 1, and by 6, 5, 4, … with a third row that is the first
    run(tmp_path, {"clean": 106, "pgd-100x5": 59}, defense="b", columns=columns, protocol="p")
    found_ = markdown_rows(tmp_path, compare_to="a")
    assert found_["a"] == ["50.00", "25.00", "25.00"]
    assert found_["b"] == ["**53.00†**", "**29.50†**", "**29.50†**"]
    run(tmp_path, {"clean": 100, "pgd-100x5": 50}, defense="c", columns=columns, protocol="p")
    found_ = markdown_rows(tmp_path, compare_to="a")
    assert found_["b"] == ["**53.00**", "**29.50†**", "**29.50†**"]
    assert found_["c"] == ["50.00", "25.00", "25.00"]
    caption = " ".join(render(tmp_path, compare_to="a").split())
    assert "†: differs from a (exact McNemar test on the same images, Holm over all comparisons" in caption
    assert r"\textbf{29.50$\dagger$}" in render(tmp_path, format="latex", compare_to="a")
    assert table(tmp_path, compare_to="a")[1]["worst case"] == "29.50†"
    assert "†" not in render(tmp_path)


def test_daggers_and_stars_leave_the_digits_of_text_in_line(tmp_path):
    run(tmp_path, {"clean": 100}, defense="a", columns=STANDARD[:1], protocol="p")
    run(tmp_path, {"clean": 150}, defense="b", columns=STANDARD[:1], protocol="p")
    rows = [line for line in render(tmp_path, compare_to="a").splitlines() if re.match("[ab] ", line)]
    assert [row.split() for row in rows] == [["a", "50.00", "50.00"], ["b", "75.00†*", "75.00†*"]]
    assert rows[0].index("50.00") == rows[1].index("75.00")
    assert rows[0].rindex("50.00") == rows[1].rindex("75.00")


def test_several_seeds_and_blocks_without_the_row_are_said_to_be_untested(tmp_path):
    run(tmp_path, defense="a")
    for seed in (0, 1):
        run(tmp_path, defense="b", seed=seed)
    run(tmp_path, defense="b", protocol="other")
    text = " ".join(render(tmp_path, compare_to="a").split())
    assert "not tested: b (several seeds)" in text
    assert "†: nothing is marked, for a has no row here" in text


def test_comparing_needs_one_row_and_the_papers_layout(tmp_path):
    run(tmp_path, defense="pgd_at", recipe="fast")
    with pytest.raises(UnknownName, match="no defense named 'pgd'; did you mean 'pgd_at'"):
        render(tmp_path, compare_to="pgd")
    with pytest.raises(UsageError, match="the long layout has no place for a comparison"):
        render(tmp_path, compare_to="pgd_at", layout="long")
    run(tmp_path, defense="pgd_at", recipe="tiny")
    assert "†" in render(tmp_path, compare_to="pgd_at [tiny]")
    with pytest.raises(UsageError, match=r"several rows of 'pgd_at': pgd_at \[fast\], pgd_at \[tiny\]"):
        render(tmp_path, compare_to="pgd_at")


def test_components_are_for_the_long_layout_and_survivors_are_headed_by_a_plus(tmp_path):
    columns = [
        *STANDARD,
        ColumnRecord(name="apgd-ce", attack="apgd-ce", epsilon=EPS, part_of="autoattack"),
        ColumnRecord(name="square", attack="square", epsilon=EPS, survivors=True),
        ColumnRecord(name="pgd-7", attack="pgd", epsilon=EPS, steps=7, survivors=True),
    ]
    run(tmp_path, columns=columns, protocol="standard")
    headings = list(table(tmp_path)[0])[4:]
    assert headings == ["SA", "pgd 100×5", "autoattack", "+ square", "+ pgd 7", "worst case"]
    assert " ".join(render(tmp_path).split()).count("+: attacks only what the columns to its left") == 1
    attacks = [
        row["attack"] for row in csv.DictReader(io.StringIO(render(tmp_path, format="csv", layout="long")))
    ]
    assert "apgd-ce" in attacks
    run(tmp_path, columns=STANDARD, protocol="other")
    assert "+:" not in render(tmp_path).split("protocol standard")[0]


def retold(record, results, weights="best", **training):
    """The same run with another account of its training."""
    old = folder(results, record.asked)
    outcomes = (old / "outcomes.parquet").read_bytes()
    shutil.rmtree(old)
    asked = record.asked.model_copy(update={"weights": weights})
    said = record.training.model_copy(update=training)
    finish(folder(results, asked), record.model_copy(update={"asked": asked, "training": said}), outcomes)


CLEAN, ATTACKED = STANDARD[0], ColumnRecord(name="pgd-5", attack="pgd", epsilon=0.1, steps=5)
#: of ten images a class: class 0 loses five under attack and one clean, class 1 one under attack and two clean
BY_CLASS = {
    "clean": [i not in (10, 1, 11) for i in range(100)],
    "pgd-5": [i not in (0, 10, 20, 30, 40, 1) for i in range(100)],
}


def by_class(results, held=BY_CLASS, **options):
    run(results, held, **{"columns": [CLEAN, ATTACKED], "protocol": "p", "defense": "a", "n": 100, **options})
    return table(results, per_class=True)


def test_each_class_has_its_robust_and_clean_accuracy_and_the_worst_of_each_is_told(tmp_path):
    (row, images) = by_class(tmp_path)
    # image 1 falls in both, image 11 on clean ones alone: under the worst case class 1 has lost two
    assert {name: row[f"RA {name}"] for name in ("all", "worst class", "0", "1", "2")} == {
        **{"all": "93.00", "worst class": "50.00", "0": "50.00", "1": "80.00", "2": "100.00"},
    }
    assert {name: row[f"SA {name}"] for name in ("all", "worst class", "0", "1", "2")} == {
        **{"all": "97.00", "worst class": "80.00", "0": "90.00", "1": "80.00", "2": "100.00"},
    }
    assert (images["source"], images["RA 0"], images["SA all"], images["RA worst class"]) == (
        *("images", "10", "100", ""),
    )


def test_images_are_told_apart_by_their_own_labels_however_the_rows_lie(tmp_path):
    (first, _) = by_class(tmp_path / "in order")
    (second, _) = by_class(tmp_path / "shuffled", shuffle=True)
    assert first == second


def test_classes_have_their_names_where_no_file_need_be_read_and_else_their_numbers(tmp_path):
    (row, _) = by_class(tmp_path, dataset="cifar10")
    assert (row["RA airplane"], row["RA automobile"], row["SA truck"]) == ("50.00", "80.00", "100.00")
    (row, _) = by_class(tmp_path / "own", dataset="npz:nowhere")
    assert (row["RA 0"], row["SA 9"]) == ("50.00", "100.00")


def test_classes_without_images_have_no_column(tmp_path):
    (row, images) = by_class(tmp_path, {}, n=3, columns=[CLEAN])
    assert [name for name in row if name.startswith("RA")] == [
        "RA all",
        "RA worst class",
        "RA 0",
        "RA 1",
        "RA 2",
    ]
    assert images["RA 2"] == "1"


def test_over_seeds_a_class_is_a_mean_and_each_seed_has_its_own_worst(tmp_path):
    all_but = {lost: {"pgd-5": [i % 10 != lost for i in range(100)]} for lost in (3, 4)}
    by_class(tmp_path, all_but[3], seed=0)
    (row, _) = by_class(tmp_path, all_but[4], seed=1)
    assert (row["RA 3"], row["RA 4"], row["RA 5"]) == ("50.00 ± 70.71", "50.00 ± 70.71", "100.00 ± 0.00")
    assert (row["RA worst class"], row["SA worst class"]) == ("0.00 ± 0.00", "100.00 ± 0.00")
    text = " ".join(render(tmp_path, per_class=True).split())
    assert "the mean over seeds of each one's own. " in text
    assert "±: sample standard deviation over seeds (a 2)." in text


def test_two_trainings_of_one_seed_count_as_one_in_a_class_too(tmp_path):
    lost = {"pgd-5": [i % 10 != 3 for i in range(100)]}
    by_class(tmp_path, lost, model_hash="one")
    by_class(tmp_path, {}, model_hash="other")
    (row, _) = by_class(tmp_path, {}, seed=1)
    assert row["RA 3"] == "75.00 ± 35.36"


def test_a_class_of_a_random_model_counts_by_the_share_of_right_draws(tmp_path):
    def drawn(table):
        attacked = table.column == "pgd-5"
        for kind in ("share", "selected"):
            table.loc[attacked & (table.label == 0), kind] = np.float32(0.25)
        return table

    (row, _) = by_class(tmp_path, {}, n=20, damage=drawn, model=Facts(randomness="stochastic", draws=100))
    assert (row["RA 0"], row["RA worst class"], row["RA 1"], row["SA 0"]) == (
        "25.00",
        "25.00",
        "100.00",
        "100.00",
    )


def test_classes_of_a_void_run_have_no_numbers_and_wins_are_for_the_credible(tmp_path):
    by_class(tmp_path, {}, findings=[found("x", "blocks")])
    by_class(tmp_path, defense="b")
    void, b, _ = by_class(tmp_path, {"pgd-5": 50}, defense="c")[:3]
    assert {value for name, value in void.items() if name[:3] in ("RA ", "SA ")} == {"void"}
    assert (void["source"], b["RA 0"]) == ("measured, void", "50.00")
    rows = markdown_rows(tmp_path, per_class=True)
    assert (rows["b"][0], rows["c"][0], rows["c"][2]) == ("**93.00**", "50.00", "**50.00**")
    assert "[a] zero-gradient: x" in render(tmp_path, per_class=True)


def test_a_run_without_clean_images_has_no_clean_accuracy_of_a_class(tmp_path):
    (row, _) = by_class(tmp_path, columns=[ATTACKED])
    assert (row["RA 0"], row["SA 0"], row["SA worst class"]) == ("50.00", "", "")


def test_the_caption_of_classes_says_how_sure_one_of_them_is(tmp_path):
    by_class(tmp_path)
    text = " ".join(render(tmp_path, per_class=True).split())
    assert "digits, protocol p: accuracy of each class in % on n = 100 images" in text
    # Wilson at 8 of 10 reaches down to 49.02
    assert "95 % Wilson intervals of a class reach at most 30.98 points" in text


def test_other_images_are_not_mixed_into_one_table_of_classes(tmp_path):
    by_class(tmp_path)
    run(
        tmp_path,
        columns=[CLEAN],
        protocol="p",
        defense="b",
        n=100,
        damage=lambda t: t.assign(index=t["index"] + 1),
    )
    with pytest.raises(UsageError, match="has other images than .*; delete both"):
        render(tmp_path, per_class=True)


def test_more_classes_than_a_line_has_room_for_go_on_below(tmp_path):
    def hundred(table):
        return table.assign(label=table["index"] // 3)

    run(tmp_path, {"clean": 99}, columns=[CLEAN], protocol="p", dataset="cifar100", n=100, damage=hundred)
    text = render(tmp_path, per_class=True)
    assert max(map(len, text.splitlines())) <= 201
    headings = [name for line in text.splitlines() for name in line.split()]
    assert headings.count("caterpillar") == headings.count("worm") == 2


@pytest.mark.parametrize("format", ["text", "markdown", "latex", "csv"])
def test_classes_and_costs_can_be_written_in_every_format(tmp_path, format):
    record = run(tmp_path, BY_CLASS, columns=[CLEAN, ATTACKED], protocol="p", defense="a")
    assert "worst class" in render(tmp_path, per_class=True, format=format)
    retold(record, tmp_path, passes=12.5, multiply_adds=2_000_000)
    text = render(tmp_path, cost=True, format=format)
    assert "U+" not in text
    assert "G multiply-adds" in text and re.search(r"12\.5\b", text) and re.search(r"0\.025\b", text)


def costly(results):
    """Three trainings and a checkpoint: b and c cost the same, though b's network is the larger one."""
    costs = {"a": (330.0, 10**9), "b": (11.0, 20 * 10**6), "c": (110.0, 2 * 10**6), "d": (None, None)}
    for defense, (passes, multiply_adds) in costs.items():
        record = run(results, columns=STANDARD[:2], protocol="p", defense=defense)
        known = {"seconds": 90.0} if passes else {}
        retold(record, results, passes=passes, multiply_adds=multiply_adds, parameters=7, **known)


def test_costs_are_columns_and_rows_stand_in_their_order(tmp_path):
    costly(tmp_path)
    rows = table(tmp_path, cost=True)
    told = ("defense", "training passes", "training G multiply-adds", "training seconds", "parameters")
    assert [tuple(row[name] for name in told) for row in rows] == [
        ("b", "11", "0.22", "90", "7"),
        ("c", "110", "0.22", "90", "7"),
        ("a", "330", "330", "90", "7"),
        ("d", "", "", "", "7"),
    ]
    assert {row["SA"] for row in rows} == {"100.00"}
    assert re.search(r"^d .* –  +–  +–  +7$", render(tmp_path, cost=True), re.MULTILINE)
    caption = " ".join(render(tmp_path, cost=True).split())
    assert (
        "G multiply-adds: passes × multiply-adds of one forward pass, in billions (1e9) per image learnt from"
        in caption
    )
    assert "passes" not in render(tmp_path)


def test_costs_of_several_seeds_are_means_and_unknown_where_one_is(tmp_path):
    for seed, passes in enumerate([10.0, 20.0]):
        retold(run(tmp_path, seed=seed), tmp_path, passes=passes, multiply_adds=10**12, seconds=123_456.0)
    (row,) = table(tmp_path, cost=True)
    assert (row["training passes"], row["training G multiply-adds"]) == ("15", "15000")
    assert row["training seconds"] == "123456"
    run(tmp_path, seed=2)
    (row,) = table(tmp_path, cost=True)
    assert (row["training passes"], row["training G multiply-adds"]) == ("", "")


def test_published_rows_have_no_costs_and_stay_below_their_own(two):
    assert [row["defense"] for row in table(two, cost=True, published=True)][:3] == [
        *("dwf", "DWF, published", "resnet_18"),
    ]
    rows = markdown_rows(two, cost=True, published=True)
    assert {len(row) for row in rows.values()} == {17 + 4}
    assert rows["*DWF, published*"][-1] == "–"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "long", "per_class": True}, "the long layout has no place for classes"),
        ({"layout": "long", "cost": True}, "the long layout has no place for costs"),
        ({"per_class": True, "cost": True}, "a table of classes has no place for costs"),
        ({"per_class": True, "compare_to": "dwf"}, "a table of classes has no place for a comparison"),
    ],
)
def test_what_cannot_be_asked_together_is_refused(tmp_path, options, message):
    run(tmp_path)
    with pytest.raises(UsageError, match=message):
        render(tmp_path, **options)


@pytest.mark.parametrize("option", ["--per-class", "--cost"])
def test_the_command_passes_its_options_on_and_has_none_of_them_in_json(tmp_path, option):
    run(tmp_path)
    words = ["table", "--results", str(tmp_path), "--format", "csv"]
    heading = {"--per-class": "RA worst class", "--cost": "training passes"}[option]
    done = CliRunner().invoke(commands, [*words, option])
    assert heading in done.output.splitlines()[0]
    assert heading not in CliRunner().invoke(commands, words).output
    with pytest.raises(UsageError, match=f"--json has no place for {option}"):
        CliRunner().invoke(commands, [*words, option, "--json"], catch_exceptions=False)


FELL = [
    {
        "stage": "fgsm-at",
        "epoch": 1,
        "held_out": 0.3,
        "held_out_pgd": 0.4,
        "held_out_fgsm": 0.5,
        "collapsed": False,
    },
    {
        "stage": "fgsm-at",
        "epoch": 2,
        "held_out": 0.3,
        "held_out_pgd": 0.421,
        "held_out_fgsm": 0.5,
        "collapsed": False,
    },
    {
        "stage": "fgsm-at",
        "epoch": 3,
        "held_out": 0.3,
        "held_out_pgd": 0.03,
        "held_out_fgsm": 0.8,
        "collapsed": True,
    },
    {
        "stage": "fgsm-at",
        "epoch": 4,
        "held_out": 0.3,
        "held_out_pgd": 0.02,
        "held_out_fgsm": 0.9,
        "collapsed": True,
    },
]
SAID = (
    "collapsed: training fell into catastrophic overfitting at epoch 3 "
    "(PGD-10 on held-out images fell from 42.1% to 3.0% while FGSM stood at 80.0%)"
)


def notes(results, **options):
    """The notes below a table, each on one line."""
    text = render(results, **options).splitlines()
    last = max(place for place, line in enumerate(text) if line and not line.strip("-"))
    return " ".join(" ".join(text[last + 1 :]).split())


@pytest.mark.parametrize("options", [{}, {"per_class": True}])
def test_a_training_that_collapsed_is_noted_with_the_epoch_of_its_weights(tmp_path, options):
    retold(run(tmp_path, defense="fgsm_at"), tmp_path, stages=FELL, epoch=2)
    run(tmp_path, defense="pgd_at")
    assert notes(tmp_path, **options) == f"[a] {SAID}; these weights are of epoch 2"
    lines = render(tmp_path, **options).splitlines()
    assert any(line.startswith("fgsm_at [a] ") for line in lines)
    assert any(re.match(r"pgd_at +\d", line) for line in lines)


def test_a_collapse_of_some_seeds_names_them_and_a_training_without_one_is_not_noted(tmp_path):
    retold(run(tmp_path, seed=0), tmp_path, stages=FELL[:2])
    assert "collapsed" not in render(tmp_path)
    retold(run(tmp_path, seed=1), tmp_path, stages=FELL)
    assert notes(tmp_path) == f"[a] {SAID} (seed 1)"
    retold(run(tmp_path, seed=2), tmp_path, stages=[FELL[0], FELL[3]])
    assert notes(tmp_path) == f"[a] {SAID} (seed 1; also seed 2)"


def test_a_collapse_that_observed_less_says_less(tmp_path):
    retold(run(tmp_path), tmp_path, stages=[{"epoch": 1, "held_out": 0.03, "collapsed": True}])
    assert notes(tmp_path).endswith("at epoch 1 (PGD-10 on held-out images fell to 3.0%)")


def test_the_networks_of_the_best_and_of_the_last_epoch_are_two_rows(tmp_path):
    retold(run(tmp_path, {"clean": 40}, defense="fgsm_at"), tmp_path, weights="last", epoch=4)
    assert notes(tmp_path) == "[a] the weights of the last epoch, not of the one selected on held-out images"
    run(tmp_path, {"clean": 160}, defense="fgsm_at")
    assert [(row["defense"], row["SA"]) for row in table(tmp_path)] == [
        ("fgsm_at [best epoch]", "80.00"),
        ("fgsm_at [last epoch]", "20.00"),
    ]


def made_void(results, asked, defense, evidence):
    asked = asked.model_copy(update={"defense": defense})
    path = folder(results, asked)
    void(path, asked, [found("first", "informs", code="odd"), found(evidence, "blocks", code="stateful")])
    return f"void: digits/{defense}/{path.name}: stateful: {evidence}"


@pytest.mark.parametrize("layout", ["paper", "long"])
def test_void_runs_without_a_record_are_listed_below_the_tables(tmp_path, layout):
    record = run(tmp_path)
    before = {format: render(tmp_path, format=format, layout=layout) for format in FORMATS}
    b, a = (made_void(tmp_path, record.asked, name, "answers move") for name in ("mine", "his"))
    assert render(tmp_path, layout=layout) == f"{before['text']}\n{a}\n{b}\n"
    assert render(tmp_path, layout=layout, format="markdown") == f"{before['markdown']}\n{a}  \n{b}  \n"
    for format in ("latex", "csv"):
        assert render(tmp_path, layout=layout, format=format) == before[format]


def test_a_void_run_is_one_line_and_is_none_where_its_record_was_written(tmp_path):
    record = run(tmp_path)
    void(folder(tmp_path, record.asked), record.asked, [found("x", "blocks")])
    assert "void" not in render(tmp_path)
    made_void(tmp_path, record.asked, "mine", "two\nlines|")
    assert render(tmp_path).splitlines()[-1].endswith("stateful: two lines|")
    assert render(tmp_path, format="markdown").splitlines()[-1].endswith("stateful: two lines\\|  ")


def test_a_folder_with_void_runs_alone_lists_them(tmp_path):
    record = run(tmp_path / "elsewhere")
    line = made_void(tmp_path, record.asked, "mine", "answers move")
    assert render(tmp_path) == f"{line}\n"
    assert render(tmp_path, format="markdown") == f"{line}  \n"
    for format in ("latex", "csv"):
        with pytest.raises(UsageError, match=r"no finished runs in .* but 1 void, which `bench table` lists"):
            render(tmp_path, format=format)
