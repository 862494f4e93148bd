"""Tables print what was measured, set off the best, and never mix it with what was published."""

import csv
import io
import re
import shutil
import subprocess

import pytest
from made_up import EPS, found, paper_columns, run

from bench.errors import UnknownName, UsageError
from bench.long import HEADER, groups
from bench.published import Printed, doubts, published_dir, rows
from bench.record import ColumnRecord, read_all
from bench.table import render, render_groups
from bench.typeset import _latex

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


def test_reduced_precision_is_said(tmp_path):
    run(tmp_path, precision="bf16")
    assert "Gradients in bf16: dwf." in render(tmp_path)


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
