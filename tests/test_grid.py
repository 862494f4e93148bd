"""The grid behind results/README.md: every row is what a defense accepts, and a stage is done once."""

import grid
import pytest
from click.testing import CliRunner
from made_up import run

from bench import registry

SMALL = grid.Scale(
    dataset="digits",
    device="cpu",
    precision="fp32",
    samples={"adaptive": 20},
    rows=(grid.Row("small", "fgsm_at", {"width": 4, "epochs": 1}, ("adaptive",)),),
)


@pytest.mark.parametrize(
    ("scale", "row"), [(name, row) for name, one in grid.SCALES.items() for row in one.rows]
)
def test_every_row_is_what_its_defense_accepts(scale, row):
    config = grid.asked_of(row)
    assert set(row.settings) <= set(config) and set(row.protocols) <= set(grid.SCALES[scale].samples)


@pytest.mark.parametrize("scale", grid.SCALES)
def test_what_is_refused_of_a_random_model_is_not_asked(scale):
    for row in grid.SCALES[scale].rows:
        assert not registry.get(row.defense).random or set(row.protocols) <= {"adaptive", "standard"}


@pytest.mark.parametrize("scale", grid.SCALES)
def test_rows_differ_in_name_and_in_what_is_trained(scale):
    rows = grid.SCALES[scale].rows
    assert len({row.name for row in rows}) == len(rows)
    assert all(
        (a.defense, grid.asked_of(a)) != (b.defense, grid.asked_of(b))
        for a in rows
        for b in rows
        if a is not b
    )


def test_all_trainings_come_before_any_evaluation_and_the_dearest_protocol_last():
    found = list(grid.stages(grid.CPU))
    first = next(i for i, stage in enumerate(found) if stage.protocol)
    assert all(stage.protocol for stage in found[first:]) and found[-1].protocol == "standard"
    assert [str(stage) for stage in found[:2]] == ["train:dwf", "train:pgd_at"]


def test_a_record_is_known_by_its_settings(tmp_path):
    row = next(row for row in grid.CPU.rows if row.name == "dwf-3-frozen")
    assert grid.name_of(run(tmp_path, defense="dwf", config=grid.asked_of(row))) == "dwf-3-frozen"
    assert grid.name_of(run(tmp_path, defense="dwf", config={"width": 1})) == "dwf"


def test_stages_train_attack_are_found_again_and_their_records_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(grid.SCALES, "cpu", SMALL)
    results = tmp_path / "results"

    def asked(*arguments):
        done = CliRunner().invoke(grid.main, ["--results", str(results), *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    assert asked("--list").split() == ["train:small", "small:adaptive"]
    assert asked("--minutes", "-1") == "-1 minutes are over; the same command goes on with train:small\n"
    assert "parameters" in asked("train:*")
    said = asked("*:adaptive")
    assert said.startswith("small:adaptive: worst-case ")
    assert "done before" in asked("small:adaptive")
    assert asked("--keep", str(tmp_path / "kept")) == f"1 records are in {tmp_path / 'kept'}\n"
    kept = sorted(
        p.relative_to(tmp_path / "kept").parts[-1] for p in (tmp_path / "kept").rglob("*") if p.is_file()
    )
    assert kept == ["outcomes.parquet", "record.json"]


def test_a_stage_that_is_not_there_is_named():
    done = CliRunner().invoke(grid.main, ["nothing:*"])
    assert done.exit_code == 2 and "no stage is called nothing:*" in done.output
