"""What finished runs say beyond their accuracies: differences, routing, published numbers, and the audit in hindsight."""

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_up import EPS, found, gate, paper_columns, run

from bench.cli import commands
from bench.errors import UnknownName, UsageError
from bench.long import groups
from bench.reading import QUESTIONS, read
from bench.reading.differences import difference
from bench.record import ColumnRecord, read_all
from bench.sheet import written
from bench.usage import ATTACKED, CLEAN

COLUMNS = [
    ColumnRecord(name="clean", attack="clean"),
    ColumnRecord(name="pgd-20", attack="pgd", norm="Linf", epsilon=EPS, steps=20),
    ColumnRecord(name="per-route", attack="per-route", norm="Linf", epsilon=EPS, steps=20),
]


def asked(results, question, **how):
    return read(question, groups(read_all(results)), **how)


def rows(results, question, **how):
    """The cells of a question's only table, by the first cell of each row."""
    (sheet,) = asked(results, question, **how)
    return {row[0]: dict(zip(sheet.headings, row, strict=True)) for row in sheet.rows}


@pytest.mark.parametrize(("b", "c", "n"), [(30, 10, 200), (0, 0, 50), (5, 60, 100), (3, 3, 1000)])
def test_the_interval_is_bonett_and_prices(b, c, n):
    first = np.r_[np.ones(b), np.zeros(c), np.ones(n - b - c)]
    second = np.r_[np.zeros(b), np.ones(c), np.ones(n - b - c)]
    p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
    reach = 1.959964 * ((p + q - (p - q) ** 2) / (n + 2)) ** 0.5
    value, low, high = difference(first, second)
    assert (value, low, high) == pytest.approx(((b - c) / n, p - q - reach, p - q + reach))


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    rng, n, b, c = np.random.default_rng(0), 100, 0.15, 0.05
    inside = 0
    for _ in range(2000):
        only = rng.random(n)
        value, low, high = difference(only < b, (only >= b) & (only < b + c))
        inside += low <= b - c <= high
        assert low <= value <= high
    # three standard errors of 2,000 trials below 95 %
    assert inside / 2000 > 0.935


def test_a_difference_is_the_first_less_the_row_and_bears_a_mark_where_it_is_no_chance(tmp_path):
    run(tmp_path, {"pgd-20": 120}, defense="dwf", columns=COLUMNS)
    run(tmp_path, {"pgd-20": 60}, defense="pgd_at", columns=COLUMNS)
    run(tmp_path, {"pgd-20": 119}, defense="trades", columns=COLUMNS)
    found = rows(tmp_path, "differences", compare_to="dwf")
    assert found["pgd_at"]["RA worst-case"].startswith("+30.0 [+23.") and found["pgd_at"][
        "RA worst-case"
    ].endswith("†")
    assert (
        found["trades"]["RA worst-case"].startswith("+0.5 [") and "†" not in found["trades"]["RA worst-case"]
    )
    assert found["trades"]["SA"].startswith("+0.0 [") and "dwf" not in found


def test_the_worst_case_of_several_radii_is_compared_with_nothing(tmp_path):
    run(tmp_path, {"ms-pgd-100": 90}, defense="dwf")
    run(tmp_path, {"ms-pgd-100": 50}, defense="pgd_at")
    found = rows(tmp_path, "differences", compare_to="pgd_at")
    assert list(found["dwf"]) == ["less", "SA", "RA ms-pgd-100"] and found["dwf"]["RA ms-pgd-100"].startswith(
        "-20.0"
    )


def test_rows_that_were_asked_about_fewer_images_are_compared_on_those(tmp_path):
    held = np.arange(200) % 2 == 0
    run(tmp_path, {"pgd-20": held}, defense="dwf", columns=COLUMNS)
    run(tmp_path, {"pgd-20": held[:50]}, defense="dwf", columns=COLUMNS, n=50)
    run(tmp_path, {"pgd-20": 80}, defense="pgd_at", columns=COLUMNS)
    run(tmp_path, {"pgd-20": 50}, defense="soe", columns=COLUMNS, n=50)
    (of_all, of_few) = asked(tmp_path, "differences", compare_to="dwf")
    assert "on the n images that both were asked about" in of_all.caption
    told = {row[0]: row[1:] for row in of_all.rows}
    assert set(told) == {"pgd_at", "soe"} and (told["pgd_at"][0], told["soe"][0]) == ("200", "50")
    assert told["pgd_at"][2].startswith("+10.0 [") and told["soe"][2].startswith("-50.0 [")
    assert "on the same 50 images" in of_few.caption and {row[0] for row in of_few.rows} == {"pgd_at", "soe"}
    assert {row[0]: row[2] for row in of_few.rows}["pgd_at"].startswith("-50.0 [")


def test_differences_need_a_defense_that_is_there(tmp_path):
    run(tmp_path, defense="dwf")
    with pytest.raises(UnknownName, match="pgd_at"):
        asked(tmp_path, "differences", compare_to="pgd_at")
    with pytest.raises(UsageError, match="beside one of dwf"):
        asked(tmp_path, "differences", compare_to="dwf")
    with pytest.raises(UsageError, match="--compare-to"):
        asked(tmp_path, "differences")


def mixture(results, **how):
    """A run of two experts, weights 1/4 and 3/4, of which the first is right on even images; 200 images, 100 attacked."""
    weights = np.tile([0.25, 0.75], (200, 1))
    even = np.stack([np.arange(200) % 2 == 0, np.ones(200, dtype=bool)], 1)
    experts = pd.concat([gate({CLEAN: weights}, even), gate({ATTACKED: weights[:100]}, even[:100])])
    run(results, defense="dwf", experts=experts, **{"columns": COLUMNS} | how)


def test_what_routing_hides_is_what_held_under_pgd_and_fell_to_another_attack(tmp_path):
    mixture(tmp_path, held={"pgd-20": 120, "per-route": 80})
    told = rows(tmp_path, "routing")["dwf"]
    assert (told["PGD alone"], told["worst case"]) == ("60.0", "40.0")
    assert told["hidden from PGD"].startswith("20.0 [15.")
    assert (told["best expert alone"], told["mean expert alone"]) == ("100.0", "75.0")
    assert told["load of each expert"] == "25 75"


def test_pgd_alone_is_pgd_with_every_loss_and_hides_nothing_where_nothing_else_was_asked(tmp_path):
    margin = ColumnRecord(
        name="pgd-20-margin", attack="pgd", norm="Linf", epsilon=EPS, steps=20, loss="margin"
    )
    mixture(tmp_path, held={"pgd-20": 120, margin.name: 100}, columns=[*COLUMNS[:2], margin])
    told = rows(tmp_path, "routing")["dwf"]
    assert (told["PGD alone"], told["worst case"], told["hidden from PGD"]) == ("50.0", "50.0", "")


def test_a_run_without_a_mixture_has_no_routing(tmp_path):
    run(tmp_path, defense="pgd_at")
    with pytest.raises(UsageError, match="no run of a mixture"):
        asked(tmp_path, "routing")


def test_a_published_number_outside_the_interval_is_marked(tmp_path):
    run(tmp_path, {"pgd-50": 100}, defense="resnet18", published_as="ResNet-18", dataset="npz:some")
    with pytest.raises(UsageError, match="--lines cifar10"):
        asked(tmp_path, "published")
    told = rows(tmp_path, "published", lines="cifar10")["resnet18"]
    # 50 % of 200 images; the paper prints 36.9
    assert told["pgd-50"].endswith("†") and float(told["pgd-50"].rstrip("†")) == pytest.approx(13.1, abs=0.3)


def test_a_calibration_run_tells_the_radius_that_would_explain_the_paper(tmp_path):
    def column(eps):
        return ColumnRecord(name=f"pgd-20-{eps}", attack="pgd", norm="Linf", epsilon=eps, steps=20)

    columns = [ColumnRecord(name="clean", attack="clean"), column(0.01), column(0.02)]
    run(
        tmp_path,
        {"pgd-20-0.01": 100, "pgd-20-0.02": 0},
        columns=columns,
        defense="resnet18",
        published_as="ResNet-18",
        dataset="cifar10",
        protocol="calibration",
    )
    told = rows(tmp_path, "published")["resnet18"]
    printed = float(told["RA, printed"])
    assert told["radius that would explain it"].startswith(f"{0.01 + 0.01 * (50 - printed) / 50:.4f}")


def audit_of(tmp_path, later, findings=()):
    """The verdict in hindsight on a run of 200 images that PGD left 120 of, where another run left so many."""
    same = {"defense": "dwf", "columns": COLUMNS, "model_hash": "same"}
    run(tmp_path, {"pgd-20": 120, "per-route": 120}, protocol="dwf-paper", findings=findings, **same)
    run(tmp_path, {"pgd-20": 120, "per-route": later}, protocol="adaptive", **same)
    (sheet,) = asked(tmp_path, "audit")
    told = {row[1]: dict(zip(sheet.headings, row, strict=True)) for row in sheet.rows}
    return told["dwf-paper"]


@pytest.mark.parametrize(
    ("later", "warned", "right"),
    [(120, False, "yes"), (60, False, "no"), (60, True, "yes"), (120, True, "open")],
    ids=["held", "fell, unwarned", "fell, warned", "warned, held"],
)
def test_a_verdict_is_held_against_every_attack_on_the_same_weights(tmp_path, later, warned, right):
    told = audit_of(tmp_path, later, [found("gradients vanish")] if warned else [])
    assert told["was the verdict right?"] == right
    assert told["overlooked"].startswith(f"{120 - later} of 200")


def test_a_run_that_nothing_else_looked_at_is_open(tmp_path):
    run(tmp_path, defense="dwf")
    assert rows(tmp_path, "audit")["dwf"]["was the verdict right?"] == "open"


def test_a_larger_ball_refutes_nothing(tmp_path):
    larger = [c.model_copy(update={"epsilon": 2 * EPS}) if c.epsilon else c for c in COLUMNS]
    run(tmp_path, columns=COLUMNS, protocol="dwf-paper", defense="dwf", model_hash="same")
    run(tmp_path, {"pgd-20": 0}, columns=larger, protocol="sweep", defense="dwf", model_hash="same")
    (sheet,) = asked(tmp_path, "audit")
    assert {row[1]: row[6][:8] for row in sheet.rows} == {"dwf-paper": "0 of 200", "sweep": "0 of 200"}


@pytest.mark.parametrize("format", ["text", "markdown", "latex", "csv"])
def test_bench_read_prints_what_was_read(tmp_path, format):
    mixture(tmp_path)
    done = CliRunner().invoke(commands, ["read", "routing", "--results", str(tmp_path), "--format", format])
    assert (
        done.exit_code == 0 and done.output.strip() == written(asked(tmp_path, "routing")[0], format).strip()
    )


@pytest.mark.parametrize(
    ("question", "how", "said"),
    [
        ("nonsense", {}, "differences, routing, published, audit"),
        ("differences", {}, "--compare-to"),
        ("audit", {"compare_to": "dwf"}, "--compare-to"),
        ("routing", {"lines": "cifar10"}, "--lines"),
    ],
)
def test_a_bad_question_gets_one_line(tmp_path, question, how, said):
    run(tmp_path, columns=paper_columns())
    with pytest.raises(UsageError, match=said) as error:
        asked(tmp_path, question, **how)
    assert "\n" not in str(error.value) and set(QUESTIONS) == {"differences", "routing", "published", "audit"}
