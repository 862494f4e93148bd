"""Both networks of a training are kept, and either can be asked for."""

import dataclasses

import pytest
import safetensors.torch
import torch

import bench.weights
from bench.errors import CheckpointError, UsageError
from bench.session import prepare
from bench.train import train
from bench.weights import weigh


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A small defense trained for three epochs, of which the last is not the best."""
    settings = {"width": 2, "epochs": 3, "steps": 1, "batch_size": 256}
    said = []
    session = prepare(
        "pgd_at",
        "digits",
        settings=settings,
        results=tmp_path_factory.mktemp("r"),
        quiet=True,
        say=said.append,
    )
    with pytest.MonkeyPatch.context() as patched:
        scores = iter([0.2, 0.6, 0.4])
        patched.setattr("bench.train.score", lambda *given: next(scores))
        weigh(session, session.jobs[0], 0)
    return session


def weighed(session, which):
    return weigh(dataclasses.replace(session, weights=which), session.jobs[0], 0)


@pytest.mark.parametrize(("which", "epoch", "file"), [("best", 2, "model"), ("last", 3, "last")])
def test_the_best_and_the_last_network_are_kept_and_say_which_they_are(which, epoch, file, session):
    found = weighed(session, which)
    made = found.training
    assert found.path.name == f"{file}.safetensors"
    assert (made.weights, made.epoch, made.source) == (which, epoch, "trained")
    assert [row["held_out"] for row in made.stages] == [0.2, 0.6, 0.4]
    assert made.passes == pytest.approx(2 * 3 * 5 * 256 / 1295, abs=1e-3) and made.forwards == 0
    assert made.multiply_adds > 10_000
    stored = safetensors.torch.load_file(found.path)
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, stored[key])


def test_the_two_networks_differ_and_nothing_is_trained_twice(session, monkeypatch):
    monkeypatch.setattr(bench.weights, "train", lambda *given, **more: pytest.fail("trained again"))
    best, last = (weighed(session, which).model.state_dict() for which in ("best", "last"))
    assert any(not torch.equal(best[key], last[key]) for key in best)


def test_the_last_network_of_a_training_that_kept_the_best_alone_is_refused(session):
    path = weighed(session, "last").path
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match="keeps the best epoch alone; delete it to train again"):
        weighed(session, "last")
    path.write_bytes(content)


def test_a_collapse_is_said_when_training_is_over(tmp_path, monkeypatch):
    said = []
    session = prepare(
        "fgsm_at",
        "digits",
        settings={"width": 2, "epochs": 2, "batch_size": 256},
        results=tmp_path,
        quiet=True,
        say=said.append,
    )

    def collapsing(*given, **more):
        trained = train(*given, **more)
        trained.history[1].update(held_out=0.03, collapsed=True)
        return trained

    monkeypatch.setattr(bench.weights, "train", collapsing)
    weigh(session, session.jobs[0], 0)
    (line,) = [line for line in said if "collapsed" in line]
    assert (
        line
        == "fgsm_at: its robustness collapsed in epoch 2 of fgsm-at: 3 % of the held-out images are left under PGD-10"
    )


def test_a_field_that_only_the_deployed_model_reads_asks_for_no_other_training(session, monkeypatch):
    """Any field serves; the deployed model of this one does not read it, and the class says so."""
    job = session.jobs[0]
    kind = type("Declared", (job.kind,), {"evaluation_only": frozenset({"steps"})})
    jobs = [
        dataclasses.replace(job, kind=kind, config=dataclasses.replace(job.config, steps=steps))
        for steps in (1, 2)
    ]
    one, two = (bench.weights._training_folder(session, each, 0, "code") for each in jobs)
    assert one == two
    undeclared = [dataclasses.replace(each, kind=job.kind) for each in jobs]
    one, two = (bench.weights._training_folder(session, each, 0, "code") for each in undeclared)
    assert one != two


def test_a_checkpoint_is_one_network_and_has_no_best_and_last():
    with pytest.raises(UsageError, match="a checkpoint is one"):
        prepare("resnet18", "digits", checkpoint="w.pt", weights="last")
