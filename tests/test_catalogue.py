"""The tables of what there is say what the registry, the protocols and the recipes say."""

import csv
import io

import pytest

from bench import catalogue, data, published, registry, sheet
from bench.cli import commands
from bench.errors import UnknownName, UsageError
from bench.moe import as_mixture
from bench.provenance import _source
from bench.sheet import Sheet, chosen, transposed, written
from bench.train import initial

SMALL = Sheet(
    "some", "A caption.", ("name", "a", "b"), (("x", "1", ""), ("y", "2", "p|q & 50 %")), ("A note.",)
)


def lines(made):
    return list(csv.DictReader(io.StringIO(written(made, "csv"))))


def names():
    return [name for name in registry.entries() if not name.endswith(":")]


def test_the_taxonomy_has_a_row_for_every_name_and_mixtures_first():
    found = lines(catalogue.taxonomy())
    assert sorted(row["defense"] for row in found) == sorted(names())
    gated = [row["gating"] != "none" for row in found]
    assert gated == sorted(gated, reverse=True) and sum(gated) >= 8


@pytest.mark.parametrize(
    "name", [name for name in names() if registry.entries()[name].module.startswith("defenses")]
)
def test_the_taxonomy_agrees_with_the_network_that_is_built(name):
    kind = registry.get(name)
    model = as_mixture(initial(kind(kind.recipes["tiny"]), data.load("digits"), 0))
    gating = kind.taxonomy["gating"]
    assert gating == ("none" if model is None else "soft" if model.soft else "hard")
    assert (kind.taxonomy["activation"] == "whole") == (gating == "none")
    assert (kind.taxonomy["activation"] == "fractional") == (gating == "soft")


def test_the_papers_own_row_stands_below_ours_where_it_says_something_else():
    found = lines(catalogue.taxonomy(beside=True))
    theirs = {row["defense"] for row in found if row["defense"].endswith(", published")}
    printed = published.taxonomy()
    for kind in registry.kinds().values():
        if kind.published_as in printed:
            same = list(printed[kind.published_as].values()) == list(kind.taxonomy.values())
            assert (f"{kind.published_as}, published" in theirs) == (not same)
    assert "DWF, published" not in theirs and "ADVMoE, published" in theirs


def test_saying_where_a_method_stands_is_no_other_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "class Thing:\n    {}width = {}\n"
    found = []
    for name, taxonomy, width in (
        ("a", "", 1),
        ("b", 'taxonomy = {"gating": "soft"}\n    ', 1),
        ("c", "", 2),
    ):
        (tmp_path / f"thing_{name}.py").write_text(text.format(taxonomy, width))
        found.append(_source(__import__(f"thing_{name}").Thing))
    assert found[0] == found[1] != found[2]


def test_the_protocols_say_what_is_asked():
    found = [row for row in lines(catalogue.attacks()) if row["protocol"] == "dwf-paper"]
    assert [row["attack"] for row in found] == ["fgsm", "pgd", "ms-pgd", "a-pgd"]
    assert [row["steps"] for row in found] == ["", "10, 20, 30, 40, 50", "100", "100"]
    assert [row["restarts"] for row in found] == ["", "1", "3", "1"]
    assert found[0]["eps"] == "0.01, 0.02, …, 0.09 (9)" and found[1]["eps"] == "the dataset's"
    assert {row["decides"] for row in found} == {"final iterate"}
    assert any("dwf-paper: eps, step_size, random_start" in note for note in catalogue.attacks().notes)


def test_the_recipes_say_how_each_stage_is_trained():
    found = [row for row in lines(catalogue.recipes("paper")) if row["defense"] == "dwf"]
    assert [(row["stage"], row["epochs"], row["batch"], row["lr"]) for row in found] == [
        ("experts", "200", "128", "0.1"),
        ("end to end", "100", "128", "0.01"),
    ]
    assert "pgd_steps=(10, 20, 30, 40, 50)" in found[0]["settings"] and found[1]["settings"] == ""


def test_recipes_have_a_row_for_every_stage_and_those_trained_alike_share_it():
    every, paper = lines(catalogue.recipes()), lines(catalogue.recipes("paper"))
    assert [row for row in every if row["recipe"] == "paper"] == paper
    said = {name for row in paper for name in row["defense"].split(", ")}
    assert said == set(names())
    (plain,) = [row for row in paper if "resnet18" in row["defense"]]
    assert plain["defense"] == "resnet18, resnet34, resnet50"


def test_a_recipe_that_nobody_has_is_refused():
    with pytest.raises(UsageError, match="no defense has a recipe 'papper'; there are tiny, fast, paper"):
        catalogue.recipes("papper")


def test_columns_are_chosen_by_heading_and_the_first_stays():
    assert chosen(SMALL, ["B"]).headings == ("name", "b")
    with pytest.raises(UnknownName, match="no column named 'c'"):
        chosen(SMALL, ["c"])


def test_transposing_twice_changes_nothing():
    assert transposed(SMALL).rows == (("a", "1", "2"), ("b", "", "p|q & 50 %"))
    assert transposed(transposed(SMALL)) == SMALL


def test_every_form_holds_every_cell():
    assert "x     1  –" in written(SMALL, "text")
    assert "| y | 2 | p\\|q & 50 % |" in written(SMALL, "markdown")
    assert "y & 2 & p\\textbar{}q \\& 50 \\%" in written(SMALL, "latex")
    assert lines(SMALL)[1] == {"name": "y", "a": "2", "b": "p|q & 50 %"}


def test_what_is_long_is_broken_over_lines():
    long = Sheet("some", "A caption.", ("name", "a"), (("x", "word " * 30),))
    assert max(map(len, written(long, "text").splitlines())) < 60
    assert "p{" in written(long, "latex")


def said(capsys, *words):
    commands.main(["table", *words], standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_prints_them_without_any_results(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "--taxonomy", "--format", "csv").startswith(
        "defense,gating,routing,training,activation\n"
    )
    assert "| protocol | steps |" in said(capsys, "--protocols", "--columns", "steps", "--format", "markdown")
    assert "\ndefense,advmoe," in "\n" + said(capsys, "--recipes", "paper", "--transpose", "--format", "csv")
    assert sheet.written(catalogue.recipes(), "csv") == said(capsys, "--recipes", "--format", "csv")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--taxonomy", "--ci"], "--ci is of what was measured"),
        (["--taxonomy", "--protocols"], "ask for one at a time"),
        (["--recipes", "paper", "--json"], "--json is of what was measured"),
        (["--standalone"], "add --format latex"),
    ],
)
def test_what_does_not_go_together_is_refused(words, why, capsys):
    with pytest.raises(UsageError, match=why):
        said(capsys, *words)
