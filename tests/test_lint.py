"""Anybody's table is read for what it says, and every rule fires on the table that breaks it and on no honest one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_up import paper_columns, run

from bench import lint
from bench.accuracies import Cell, Row, Table, question, read
from bench.cli import commands
from bench.errors import UnknownName, UsageError
from bench.finding import verdict
from bench.published import published_dir
from bench.table import render

PUBLISHED = [published_dir() / name for name in ("paper_table_fgsm.csv", "paper_table_pgd.csv")]

#: a table that nothing speaks against: an undefended network falls, a defense falls slowly
HONEST = """Dataset,Method,Clean,FGSM 2/255,FGSM 8/255,PGD-20 (8/255),PGD-50 (8/255),PGD-50 8/255 5 restarts,AA (8/255)
cifar10,ResNet-18,95.1,40.3,25.0,0.3,0.1,0.0,0.0
cifar10,ResNet-18 (PGD-AT),83.2,76.1,56.2,52.1,51.9,51.7,48.3
svhn,ResNet-18 (PGD-AT),89.9,80.2,61.0,53.4,53.2,52.8,46.6
"""


def table(tmp_path, *texts):
    files = []
    for place, text in enumerate(texts):
        files.append(tmp_path / f"table{place}.csv")
        files[-1].write_text(text, encoding="utf-8")
    return read(files)


def found(tmp_path, *texts):
    return {(f.code, f.severity): f.evidence for f in lint.findings(table(tmp_path, *texts))}


def codes(tmp_path, *texts):
    return {code for code, _ in found(tmp_path, *texts)}


@pytest.fixture(scope="module")
def papers():
    by_code = {}
    for finding in lint.findings(read(PUBLISHED)):
        by_code.setdefault(finding.code, []).append(finding)
    return by_code


def test_an_honest_table_is_credible(tmp_path):
    assert found(tmp_path, HONEST) == {}


# the table of the paper


def test_the_papers_adaptive_column_is_weaker_than_restarts_in_18_of_19_rows(papers):
    (finding,) = papers["adaptive-adds-nothing"]
    assert "weaker than multi-restart PGD in 18 of 19 rows, by 0.05 (GoogLeNet (cifar10)) to 1.02 points" in (
        finding.evidence
    )
    assert finding.severity == "warns"


def test_more_steps_raise_accuracy_in_7_of_the_papers_rows_by_little(papers):
    eps, steps = papers["not-monotone"]
    assert "rises with the number of steps in 7 of 19 rows, by 0.01–0.12 points" in steps.evidence
    assert steps.severity == "informs"
    assert eps.evidence.endswith(
        "1 of 19 rows, by 0.09–0.51 points: ADVMoE (cifar10) 3 times in a row, 15.47 → 16.40 (FGSM 0.06 to FGSM 0.09)"
    )
    assert eps.severity == "warns"


def test_restarts_help_the_papers_plain_network(papers):
    restarts, adaptive = papers["stronger-is-higher"]
    assert (
        "1 of 19 rows, by up to 0.12 points: ResNet-18 (cifar10) 37.07 (PGD-100 MS) above 36.95 (PGD-50)"
        in (restarts.evidence)
    )
    assert "in 4 of 19 rows" in adaptive.evidence


def test_the_papers_undefended_networks_survive(papers):
    (finding,) = papers["undefended-survives"]
    assert "12 undefended rows keep 36.95–48.52 % under PGD-50 (its radius is not printed" in finding.evidence


def test_the_papers_mixture_looks_like_a_network_fitted_to_single_steps(papers):
    (finding,) = papers["fgsm-far-above-pgd"]
    assert (
        "DWF (cifar10) keeps 41.24 under FGSM 0.09, where the other rows have a median of 11.94"
        in finding.evidence
    )
    assert (
        "FGSM 0.02 stands 15.29 points above PGD-50, whose radius is not printed: a symptom"
        in finding.evidence
    )
    assert "ADVMoE (cifar10) rises" in finding.evidence
    assert "SoE" not in finding.evidence


def test_the_papers_datasets_coincide_and_one_method_alone_has_a_deviation(papers):
    (copied,), (std,), (radius,) = (papers[c] for c in ("copied-rows", "one-row-has-std", "missing-radius"))
    assert "DWF: 17 of 17 cells agree within 2 points on cifar10 and svhn" in copied.evidence
    assert std.evidence == "only DWF has a standard deviation, of 15 methods"
    assert radius.evidence.endswith("PGD-10, PGD-20, PGD-30, PGD-40, PGD-50, PGD-100 MS, PGD-100 A")
    assert "at-chance" not in papers


# the rules, each on the honest table with one thing changed


@pytest.mark.parametrize(
    ("old", "new", "code", "severity", "said"),
    [
        (
            "83.2,76.1,56.2",
            "83.2,56.1,58.2",
            "not-monotone",
            "warns",
            "56.10 → 58.20 (FGSM 2/255 to FGSM 8/255)",
        ),
        ("52.1,51.9", "51.9,52.1", "not-monotone", "informs", "in 1 of 3 rows, by 0.20 points"),
        (
            "76.1,56.2,52.1",
            "76.1,50.2,52.1",
            "stronger-is-higher",
            "warns",
            "52.10 (PGD-20 at 8/255) above 50.20",
        ),
        ("51.9,51.7", "51.9,52.0", "stronger-is-higher", "informs", "52.00 (PGD-50×5 at 8/255) above 51.90"),
        (
            "51.9,51.7",
            "51.9,53.0",
            "stronger-is-higher",
            "warns",
            "PGD from several starts leaves more than PGD from one in 1",
        ),
        ("48.3", "52.9", "stronger-is-higher", "warns", "52.90 (AutoAttack at 8/255) above 51.70"),
        ("83.2,76.1", "76.0,76.1", "stronger-is-higher", "warns", "76.10 (FGSM 2/255) above 76.00 (clean)"),
        (
            "0.3,0.1,0.0,0.0",
            "7.3,5.3,5.1,0.0",
            "undefended-survives",
            "warns",
            "one undefended row keeps 5.10 % under PGD-50×5",
        ),
        (
            "83.2,76.1,56.2",
            "83.2,76.1,66.8",
            "fgsm-far-above-pgd",
            "warns",
            "stands 15.10 points above PGD-50×5",
        ),
        (
            "51.9,51.7,48.3",
            "51.9,51.7,10.00",
            "at-chance",
            "informs",
            "exactly 10.00 % under AutoAttack at 8/255",
        ),
        (
            "51.9,51.7,48.3",
            "51.9,10.00,10.00",
            "at-chance",
            "warns",
            "10.00 % under PGD-50×5 at 8/255, AutoAttack",
        ),
        ("51.9", "51.9 ± 0.2", "one-row-has-std", "warns", ""),
        ("AA (8/255)", "AA", "missing-radius", "warns", "no radius stated for AutoAttack"),
    ],
)
def test_one_changed_number_is_found(tmp_path, old, new, code, severity, said):
    assert HONEST.count(old) == 1
    text = HONEST.replace(old, new)
    if code == "one-row-has-std":
        text = text.replace("svhn,ResNet-18 (PGD-AT)", "svhn,ResNet-18")
        text = text.replace("53.4,53.2,52.8,46.6", "0,0,0,0")
    evidence = found(tmp_path, text)
    assert said in evidence[code, severity]
    # a rise with FGSM's radius, or a PGD column that falls far, is a symptom of single-step noise too
    assert {other for other, _ in evidence} <= {code, "fgsm-far-above-pgd"}


@pytest.mark.parametrize(
    ("row", "fires"),
    [
        ("ResNet-18,90,6.0", True),
        ("ResNet-18,90,4.9", False),
        ("TRADES,90,50.0", False),
        ("WRN-34-10 (standard),90,6.0", True),
    ],
)
@pytest.mark.parametrize(
    ("heading", "strong"),
    [("PGD-10 0.01", True), ("PGD-9 0.01", False), ("PGD-10 0.009", False), ("PGD-10 (L2, 0.5)", False)],
)
def test_only_undefended_networks_under_real_attacks_must_fall(tmp_path, row, fires, heading, strong):
    assert ("undefended-survives" in codes(tmp_path, f'Method,Clean,"{heading}"\n{row}\n')) == (
        fires and strong
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, True)
            for name in ("resnet18", "VGG-19", "PreAct ResNet-18", "No defense", "vit_b_16", "Standard")
        ),
        *((name, False) for name in ("ResNet-18 (PGD-AT)", "dwf", "Model 1", "Ours", "ResNet-50 + TRADES")),
    ],
)
def test_which_rows_name_an_undefended_network(name, expected):
    assert lint.undefended(name) == expected


@pytest.mark.parametrize("share", [2, 3])
def test_an_adaptive_attack_that_adds_nothing_in_most_rows_warns(tmp_path, share):
    rows = "".join(f"M{i},80,50,{51 if i < share else 49}\n" for i in range(4))
    evidence = found(tmp_path, f"Method,Clean,PGD-100 MS 8/255,A-PGD 8/255\n{rows}")
    assert evidence == {
        ("adaptive-adds-nothing", "warns" if share == 3 else "informs"): (
            f"the adaptive column is weaker than multi-restart PGD in {share} of 4 rows, by 1.00 (M0) to 1.00 points (M0)"
        )
    }


def sweep(defense, values, pgd):
    eps = [("fgsm", f"0.0{i}", v) for i, v in enumerate(values, 1)]
    return "".join(f"{defense},{a},{s},{v}\n" for a, s, v in [("clean", 0, 90), *eps, ("pgd", 50, pgd)])


def test_without_a_radius_fgsm_is_held_against_the_other_rows(tmp_path):
    head = "defense,attack,setting,accuracy\n"
    rest = "".join(sweep(name, (70, 40, 12), 50) for name in ("A-AT", "B-AT"))
    far, near = sweep("C-AT", (80, 70, 41), 50), sweep("C-AT", (80, 70, 26), 50)
    assert "fgsm-far-above-pgd" not in codes(tmp_path, head + rest + near + sweep("D-AT", (70, 40, 12), 50))
    assert "fgsm-far-above-pgd" not in codes(
        tmp_path, head + rest + far
    )  # two others have no median to speak of
    evidence = found(tmp_path, head + rest + far + sweep("D-AT", (70, 40, 12), 50))[
        "fgsm-far-above-pgd", "warns"
    ]
    assert evidence.startswith(
        "C-AT keeps 41.00 under FGSM 0.03, where the other rows have a median of 12.00"
    )
    assert "FGSM 0.02 stands 20.00 points above PGD-50" in evidence


@pytest.mark.parametrize(("size", "steps", "rises"), [("0.02", 10, True), ("0.01", 20, False)])
def test_a_sweep_over_radii_is_one_attack_whose_step_size_may_follow(tmp_path, size, steps, rises):
    head = "defense,attack,epsilon,step_size,steps,accuracy\n"
    text = f"{head}M,pgd,0.03,0.01,10,40\nM,pgd,0.06,{size},{steps},45\n"
    assert ("not-monotone" in codes(tmp_path, text)) == rises


def twins(first, second, cells=11, a="M", b="M"):
    head = "dataset,method," + ",".join(f"FGSM 0.{i:02}" for i in range(1, cells + 1))
    lines = (",".join(map(str, [*key, *values])) for key, values in ((("x", a), first), (("y", b), second)))
    return "\n".join([head, *lines])


def test_two_datasets_that_agree_in_more_than_ten_cells_are_suspicious(tmp_path):
    values = [50 - i for i in range(11)]
    assert "copied-rows" in codes(tmp_path, twins(values, [v + 2 for v in values]))
    assert "copied-rows" not in codes(tmp_path, twins(values, [*values[:10], values[10] - 2.1]))
    assert "copied-rows" not in codes(tmp_path, twins(values, values[:10], cells=11))
    # both broken: that says nothing
    assert "copied-rows" not in codes(tmp_path, twins([*values[:10], 1], [*values[:10], 0]))


def test_two_defenses_with_the_same_row_are_suspicious(tmp_path):
    values = [50, 40, 30, 20, 15]
    assert "A (x) and B (y) are the same in all 5 cells" in str(
        found(tmp_path, twins(values, values, 5, "A", "B"))
    )
    assert "copied-rows" not in codes(tmp_path, twins(values, [50, 40, 30, 20, 15.01], 5, "A", "B"))
    assert "copied-rows" not in codes(tmp_path, twins([50, 0, 0, 0, 0], [50, 0, 0, 0, 0], 5, "A", "B"))


@pytest.mark.parametrize(
    ("dataset", "level", "fires"), [("CIFAR-100", 1.0, True), ("CIFAR-100", 10, False), ("", 10, True)]
)
def test_chance_is_that_of_the_dataset(tmp_path, dataset, level, fires):
    text = f"dataset,method,clean,FGSM 0.1\n{dataset},M,50,{level}\n"
    assert ("at-chance" in codes(tmp_path, text)) == fires


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("8,2,10", ""),
        ("0.03,0.002,10", "cannot reach its border with 10 steps of 0.002"),
        ("0.03,0.003,10", None),
        ("0.03,0.06,10", "jumps across the ball with steps of 0.06"),
        ("8,2,10", "has a radius above 1: meant in pixels of 0 to 255?"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path, cells, said):
    text = f"defense,attack,epsilon,step_size,steps,accuracy\nM,clean,,,,80\nM,pgd,{cells},40\n"
    evidence = found(tmp_path, text).get(("degenerate-settings", "warns"))
    assert evidence is None if said is None else said in evidence


@pytest.mark.parametrize(
    ("n", "second", "said"),
    [
        (999, 30, "4 of 4 cells are of fewer than 1000 images, the fewest 999"),
        (1000, 30, None),
        # Wilson reaches 3.1 points from 50 % of 1,000
        (1000, 47, "in 1 of 2 columns the best row leads by less than its 95 % interval"),
        (1000, 46, None),
        (1000, 50, None),
    ],
)
def test_few_images_are_said(tmp_path, n, second, said):
    text = f"method,n,clean,FGSM 0.1\nA,{n},90,50\nB,{n},70,{second}\n"
    assert found(tmp_path, text).get(("few-images", "informs")) == said or said in str(found(tmp_path, text))


def test_every_rule_has_a_sentence_of_advice_and_a_test_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    for rule in lint.CHECKS:
        assert rule.code in tests
        assert len(rule.advice.split()) > 5


# reading


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        *(
            (text, Cell(attack="clean"))
            for text in ("clean", "SA", "Standard", "Natural accuracy (%)", "Nat. acc")
        ),
        *(
            (text, Cell(attack="fgsm", eps=0.01))
            for text in ("FGSM 0.01", "fgsm_0.01", "RA-FGSM 0.01", "FGSM-.01")
        ),
        *(
            (text, Cell(attack="fgsm", eps=8 / 255))
            for text in ("FGSM eps=8/255", "FGSM (8/255)", "FGSM-8", "FGSM ε = 8")
        ),
        *(
            (text, Cell(attack="pgd", steps=10))
            for text in ("PGD-10", "PGD10", "PGD 10", "RA-PGD 10", "PGD (10 steps)")
        ),
        *(
            (text, Cell(attack="ms-pgd", steps=100))
            for text in ("PGD-100 MS", "RA-PGD 100 (MS)", "multi-restart PGD-100")
        ),
        ("ms-pgd", Cell(attack="ms-pgd")),
        *((text, Cell(attack="a-pgd")) for text in ("A-PGD", "adaptive")),
        ("RA-PGD 100 (A)", Cell(attack="a-pgd", steps=100)),
        ("PGD-100, EoT 10", Cell(attack="a-pgd", steps=100)),
        *((text, Cell(attack="autoattack")) for text in ("AA", "AutoAttack", "Auto-Attack", "+ autoattack")),
        ("AA (8/255)", Cell(attack="autoattack", eps=8 / 255)),
        ("CW", Cell(attack="cw")),
        ("C&W", Cell(attack="cw")),
        ("Square", Cell(attack="square")),
        ("APGD-CE", Cell(attack="apgd-ce")),
        ("pgd 100×5", Cell(attack="pgd", steps=100, restarts=5)),
        ("pgd 8/255, 10", Cell(attack="pgd", eps=8 / 255, steps=10)),
        ("PGD-20 (L2, eps=0.5)", Cell(attack="pgd", norm="L2", eps=0.5, steps=20)),
        ("PGD-20 L2 eps=2", Cell(attack="pgd", norm="L2", eps=2.0, steps=20)),
        ("PGD-20 L∞ 8/255 5 restarts", Cell(attack="pgd", norm="Linf", eps=8 / 255, steps=20, restarts=5)),
        ("worst case", Cell(attack="worst-case")),
        *(
            (text, None)
            for text in ("Time (h)", "PGD-10 std", "ResNet-18", "Accuracy", "frozen-gate 50", "PGD 10 20", "")
        ),
    ],
)
def test_what_a_heading_says(heading, expected):
    asked = question(heading)
    if expected is None or asked is None:
        assert asked is expected
    else:
        assert asked.asked == expected.asked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("37.07", (37.07, None)),
        ("37.07 ± 0.12", (37.07, 0.12)),
        ("37.07±0.12", (37.07, 0.12)),
        ("37.07 +/- .1", (37.07, 0.1)),
        ("37.07 (0.1)", (37.07, 0.1)),
        ("**37.07†** %", (37.07, None)),
        (r"\textbf{37.07 $\pm$ 0.12}", (37.07, 0.12)),
        *((text, None) for text in ("-", "–", "", "n/a", "void", "101", "abc", "-3")),
    ],
)
def test_what_a_cell_says(tmp_path, text, expected):
    cells = [
        c for row in table(tmp_path, f"Method;Clean;AA\nM;90;{text}\n").rows for c in row.of("autoattack")
    ]
    assert [(cell.accuracy, cell.std) for cell in cells] == ([] if expected is None else [expected])


def test_what_is_not_understood_is_named_in_one_line(tmp_path):
    read_ = table(tmp_path, "Method,Clean,Time,AA\nM,90,3,abc\nN,80,3,-\n")
    assert read_.notes == (
        "table0.csv: headings not understood: 'Time'",
        "table0.csv: M, AA: 'abc' is not understood",
    )
    assert [str(row) for row in read_.rows] == ["M", "N"]


@pytest.mark.parametrize("text", ["", "a,b\n", "gating,topology\nhard,flat\n", "# just words\nand more\n"])
def test_a_file_without_accuracies_is_refused_with_what_was_expected(tmp_path, text):
    with pytest.raises(
        UsageError, match=r"no accuracies in table0.csv; expected columns defense, attack, accuracy"
    ):
        table(tmp_path, text)


def test_beside_another_table_it_is_only_noted(tmp_path):
    assert "table1.csv: no accuracies found" in table(tmp_path, HONEST, "a,b\nc,d\n").notes


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x81")
    for name, why in (("none.csv", "No such file"), ("bytes.csv", "not UTF-8")):
        with pytest.raises(UsageError, match=f"cannot read .*{name}.*{why}"):
            read([tmp_path / name])


def test_files_are_joined_by_dataset_and_defense(tmp_path):
    first, second = "method,clean\nM,90\nN,80\n", "Model;AA\nM;40\nO;30\n"
    rows = table(tmp_path, first, second).rows
    assert [(row.defense, len(row.cells)) for row in rows] == [("M", 2), ("N", 1), ("O", 1)]


def test_two_values_of_one_cell_are_noted_and_the_first_is_used(tmp_path):
    read_ = table(tmp_path, "method,clean\nM,90\n", "method,clean\nM,80\n")
    assert read_.rows == (Row("", "M", "", (Cell(attack="clean", accuracy=90.0),)),)
    assert read_.notes == ("M has two values under clean, 90 and 80; the first is used",)


def test_fractions_are_read_as_such(tmp_path):
    read_ = table(tmp_path, "method,clean,AA\nM,0.9 ± 0.01,0.4\n")
    assert [(cell.accuracy, cell.std) for cell in read_.rows[0].cells] == [(90.0, 1.0), (40.0, None)]
    assert read_.notes == ("table0.csv: no accuracy above 1, read as fractions",)


def test_parts_of_an_ensemble_do_not_pass_for_it(tmp_path):
    read_ = table(tmp_path, "defense,attack,accuracy\nM,aa:square,40\nM,transfer:pgd,50\n")
    assert [cell.attack for cell in read_.rows[0].cells] == ["aa:square", "transfer:pgd"]


def test_our_own_tables_are_read_in_both_layouts(tmp_path):
    held = {column.name: 100 - 5 * place for place, column in enumerate(paper_columns())}
    run(tmp_path, held, defense="a")
    run(tmp_path, dict.fromkeys(held, 200), defense="b")
    texts = [render(tmp_path, format="csv", layout=layout) for layout in ("long", "paper")]
    long, paper = (table(tmp_path, text) for text in texts)
    assert long.notes == paper.notes == ()
    for read_, columns in ((long, 18), (paper, 17)):
        (row, _) = read_.rows
        assert str(row) == "a (digits, dwf-paper)"
        assert len(row.cells) == columns
        assert {str(cell).split(" at ")[0]: cell.accuracy for cell in row.cells}["PGD-100 A"] == 10
    assert long.rows[0].of("pgd")[0].eps == 8 / 255
    assert "few-images" in {finding.code for finding in lint.findings(long)}


def test_tables_without_rows_or_cells_are_no_fault_of_the_rules():
    assert lint.findings(Table(())) == []
    assert lint.findings(Table((Row("", "M", "", ()),))) == []


# the command line


@pytest.mark.parametrize("module", ["bench.cli", "bench.lint", "bench.compare"])
def test_the_small_commands_start_without_the_heavy_libraries(module):
    heavy = "{'torch', 'scipy', 'statsmodels', 'pandas'}"
    program = f"import sys, {module}; sys.exit(str({heavy} & set(sys.modules)).replace('set()', '') or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def bench(*words):
    done = CliRunner().invoke(commands, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, (UsageError, SystemExit)), done.exception
    return done


def test_the_command_prints_verdict_evidence_and_advice(tmp_path):
    done = bench("lint", *PUBLISHED)
    lines = done.stdout.splitlines()
    assert lines[0] == "suspect: 10 finding(s) in 19 rows, 323 accuracies"
    assert lines[1].startswith("  warns   not-monotone: accuracy rises")
    assert lines[2].startswith("          a larger ball")
    assert done.exit_code == 0
    with pytest.raises(UsageError, match="--strict: the table is suspect"):
        bench_error("lint", "--strict", *PUBLISHED)
    (tmp_path / "honest.csv").write_text(HONEST)
    assert bench("lint", "--strict", tmp_path / "honest.csv").exit_code == 0


def bench_error(*words):
    raise bench(*words).exception


def test_the_command_in_json():
    said = json.loads(bench("lint", "--json", *PUBLISHED).stdout)
    assert list(said) == ["verdict", "findings"]
    assert said["verdict"] == "suspect" == verdict(lint.findings(read(PUBLISHED)))
    assert set(said["findings"][0]) == {"code", "severity", "evidence", "advice"}


# bench power


def test_two_accuracies_need_between_so_and_so_many_images():
    text = bench("power", 50.1, 52).stdout
    assert (
        "50.1 % and 52 %: 415 images if the better one is right wherever the other is, 10,971 images if"
        in text
    )
    assert "McNemar's exact test, two-sided, alpha 0.05, power 0.8" in text


def test_a_stated_discordance_needs_one_number():
    said = json.loads(bench("power", 52, 50.1, "--discordant", 12, "--power", 0.9, "--json").stdout)
    (case,) = said["needed"]
    assert (case["p10"], case["p01"]) == pytest.approx((0.0695, 0.0505))
    assert said["power"] == 0.9
    assert case["images"] > 2697


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((50,), "give two accuracies in percent"),
        ((50, 60, 70), "give two accuracies in percent"),
        ((50, 60, "--defense", "a,b"), "give two accuracies in percent"),
        ((50, 500), "500 is no accuracy"),
        ((50, 50), "both are 50 %"),
        ((50, 52, "--discordant", 1), "differ on 2 to 98 % of the images, not on 1 %"),
        (("--defense", "a,b", "--discordant", 5), "two runs say themselves where they differ"),
    ],
)
def test_power_says_what_is_wrong(words, message):
    with pytest.raises(UsageError, match=message):
        bench_error("power", *words)


def test_two_runs_say_themselves_where_they_differ(tmp_path):
    run(tmp_path, {"clean": 10}, defense="a", recipe="fast", n=20)
    run(tmp_path, {"clean": 60}, defense="a", recipe="tiny")
    run(tmp_path, {"clean": [False] * 20 + [True] * 80 + [False] * 100}, defense="b")
    options = ("--results", tmp_path, "--column", "clean")
    text = bench("power", "--defense", "a [tiny],b", *options).stdout
    # 20 of 200 for the one, 40 for the other
    assert text.startswith("a [tiny] 30.00 % and b 40.00 % under clean (digits, dwf-paper): 249 images where")
    assert "only the first is right on 10.00 % and only the second on 20.00 %; there are 200" in text
    for words, error, message in (
        (("a,b",), UsageError, "several rows of 'a'"),
        (("b",), UsageError, "1 defense"),
        (("b,c",), UnknownName, "no defense named 'c'"),
        (("b,a [tiny]", "--column", "fgsm"), UnknownName, "no column named 'fgsm'"),
        (("b,a [fast]",), UsageError, "have no paired test: other images"),
        (
            ("b,a [tiny]", "--dataset", "svhn"),
            UsageError,
            "no runs of dwf-paper on svhn; there are --dataset digits",
        ),
    ):
        with pytest.raises(error, match=message):
            bench_error("power", *options, "--defense", *words)
