"""How a table is shown: which columns, which way it lies, and what a cell says."""

import csv
import io

import pytest
from made_up import paper_columns, run

from bench.cli import commands
from bench.errors import UnknownName, UsageError
from bench.stats import wilson
from bench.table import Look, render


@pytest.fixture
def results(tmp_path):
    """Two defenses of one seed, of which the first is better everywhere, and one of two seeds."""
    for name, lost in (("dwf", 0), ("resnet18", 80)):
        held = {column.name: 200 - 5 * i - lost * (i > 0) for i, column in enumerate(paper_columns())}
        run(tmp_path, held, defense=name)
    return tmp_path


def shown(results, format="csv", **look):
    return render(results, format=format, look=Look(**look))


def table(results, **look):
    return list(csv.DictReader(io.StringIO(shown(results, **look))))


@pytest.mark.parametrize(
    ("asked", "headings"),
    [
        (("SA",), ["SA"]),
        (("ra-pgd 50", "clean"), ["RA-PGD 50", "SA"]),
        (("ms-pgd-100", "fgsm-0.03"), ["RA-PGD 100 (MS)", "RA-FGSM 0.03"]),
        (("pgd",), [f"RA-PGD {k}" for k in (10, 20, 30, 40, 50)]),
    ],
)
def test_columns_are_chosen_by_heading_name_or_attack_in_the_order_given(asked, headings, results):
    rows = table(results, columns=asked)
    assert list(rows[0])[4:] == headings
    every = table(results)
    assert [[row[heading] for heading in headings] for row in rows] == [
        [row[heading] for heading in headings] for row in every
    ]


def test_a_column_that_no_table_has_is_refused_with_the_nearest(results):
    with pytest.raises(UnknownName, match="no column named 'fgms-0.03'.*did you mean 'fgsm-0.03'"):
        shown(results, columns=("SA", "fgms-0.03"))


def test_fewer_columns_are_fewer_tests(results):
    text = render(results, compare_to="resnet18", look=Look(columns=("SA", "pgd-10")))
    assert "SA" in text and "RA-FGSM" not in text
    assert "Holm over all comparisons" in text
    assert text.count("†") == 2  # the cell and its legend


def test_attacks_stand_down_the_side_and_the_words_turn_with_them(results):
    plain, turned = table(results), table(results, transpose=True)
    assert [row["attack"] for row in turned] == list(plain[0])[4:]
    for row in plain:
        assert [line[row["defense"]] for line in turned] == list(row.values())[4:]
    text = shown(results, "markdown", transpose=True)
    assert "the best measured value of a row" in text and "lead over every other column" in text
    assert "| attack | dwf" in text and "| RA-PGD 100 (A) | **" in text


def test_intervals_stand_in_brackets_if_they_are_asked_for(results):
    low, high = wilson(150, 200)
    (row, _) = table(results, ci=True, columns=("pgd-10",))
    assert row["RA-PGD 10"] == f"75.00 [{100 * low:.1f}, {100 * high:.1f}]"
    assert "; they stand in brackets." in shown(results, "text", ci=True)
    assert "[" not in table(results)[0]["RA-PGD 10"]


def test_the_std_over_seeds_can_be_left_out(results):
    run(results, {"clean": 180}, defense="dwf", seed=1)
    assert "±" in table(results)[0]["SA"]
    assert table(results, std=False)[0]["SA"] == "95.00"


def test_nothing_is_set_off_if_that_is_not_wanted(results):
    assert "**100.00**" in shown(results, "markdown") and "Bold:" in shown(results, "markdown")
    text = shown(results, "markdown", best=False)
    assert "**" not in text and "Bold:" not in text


@pytest.mark.parametrize("look", [{"ci": True}, {"transpose": True}, {"columns": ("SA",)}])
def test_the_long_layout_is_always_the_same(look, results):
    with pytest.raises(UsageError, match="the long one is always the same"):
        render(results, layout="long", look=Look(**look))


def test_a_table_of_classes_can_be_transposed_and_no_more(results):
    assert "| attack | dwf" in render(results, format="markdown", per_class=True, look=Look(transpose=True))
    with pytest.raises(UsageError, match="can be transposed alone"):
        render(results, per_class=True, look=Look(ci=True))


def test_the_command_hands_all_of_it_on(results, capsys):
    words = ["--columns", "SA,pgd-10", "--transpose", "--no-best", "--no-std", "--ci", "--format", "markdown"]
    commands.main(["table", "--results", str(results), *words], standalone_mode=False)
    look = Look(columns=("SA", "pgd-10"), transpose=True, best=False, std=False, ci=True)
    assert capsys.readouterr().out == render(results, format="markdown", look=look)
