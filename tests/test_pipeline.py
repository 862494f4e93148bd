"""From a name to a record, end to end: run once, found again, gone on with after any stop, never falsified."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from bench import checkpoint as checkpoints
from bench import data as datasets
from bench import pipeline, provenance, registry
from bench.errors import CheckpointError, Interrupted, PluginError, UsageError, VoidRun
from bench.evaluate import Evaluator
from bench.long import HEADER
from bench.record import read, read_all

ROOT = Path(__file__).parent.parent
PROTOCOL = """
name = "two"
success = "last"
footnotes = ["a footnote"]
[[column]]
attack = "fgsm"
eps = 0.05
[[column]]
attack = "pgd"
steps = 3
"""
PLUGIN = '''
"""A linear model."""
import torch.nn.functional as F
from torch import nn
import bench
from bench.config import config

@config
class Config:
    epochs: int = 2
    lr: float = 0.5

@bench.register("mine")
class Mine(bench.Defense[Config]):
    """A linear model on clean images."""
    recipes = {"tiny": Config(), "fast": Config(epochs=3)}

    def build(self, data):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def stages(self, data):
        def loss(model, x, y, rng):
            return F.cross_entropy(model(x), y)
        c = self.config
        return [bench.Stage(name="clean", loss=loss, epochs=c.epochs, batch_size=128, lr=c.lr)]
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "two.toml").write_text(PROTOCOL)
    return tmp_path


def asked(folder, **changes):
    return {
        "defense": "mine",
        "dataset": "digits",
        "protocol": str(folder / "two.toml"),
        "plugin": folder / "mine.py",
        "results": folder / "results",
        "samples": 60,
        "batch_size": 20,
        "quiet": True,
        **changes,
    }


def run(folder, **changes):
    return bench.run(**asked(folder, **changes))


def records(folder):
    return list(read_all(folder / "results"))


def state(folder):
    """Everything in the results folder: path, time of writing, content."""
    files = sorted(file for file in (folder / "results").rglob("*") if file.is_file())
    return {file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}


def with_plugin(folder, old, new):
    assert old in PLUGIN
    (folder / "mine.py").write_text(PLUGIN.replace(old, new))


# --- a run


def test_a_run_gives_the_long_table_of_the_contract(folder):
    frame = run(folder)
    assert tuple(frame.columns) == HEADER
    assert frame[["dataset", "defense", "protocol", "n", "seeds"]].drop_duplicates().values.tolist() == [
        ["digits", "mine", "two", 60, 1]
    ]
    assert frame.attack.tolist() == ["clean", "fgsm", "pgd", "worst-case"]
    assert frame.epsilon[1:].tolist() == [0.05, 0.1, 0.1] and np.isnan(frame.epsilon[0])
    assert frame.step_size[2] == pytest.approx(0.025) and frame.steps[2] == 3
    clean, *attacked = frame.accuracy
    assert clean > 60 and all(value < clean for value in attacked) and frame.accuracy[3] == min(attacked)


def test_a_finished_run_is_found_and_nothing_is_written_again(folder, monkeypatch):
    first, before = run(folder), state(folder)
    monkeypatch.setattr(Evaluator, "run", None)
    monkeypatch.setattr("bench.weights.train", None)
    second = run(folder)
    assert first.equals(second) and state(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"eps": "8/255"},
        {"protocol": "quick"},
        {"samples": 40},
        {"settings": {"lr": "0.4"}},
        {"precision": "bf16"},
        {"recipe": "fast"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_that_was_asked_otherwise_lies_beside(folder, change):
    run(folder)
    before = state(folder)
    run(folder, **change)
    after = state(folder)
    assert len(records(folder)) == 2
    assert {file: after[file] for file in before} == before


@pytest.mark.parametrize("change", [{"batch_size": 7}, {"quiet": False}, {"device": "cpu"}])
def test_what_cannot_change_an_outcome_is_no_part_of_the_question(folder, change):
    run(folder)
    before = state(folder)
    run(folder, **change)
    assert state(folder) == before


def test_seeds_are_averaged_with_their_deviation(folder):
    frame = run(folder, seeds=2)
    single = [run(folder, seed=seed) for seed in (0, 1)]
    assert frame.seeds.tolist() == [2] * 4
    for row in range(4):
        values = [one.accuracy[row] for one in single]
        assert frame.accuracy[row] == pytest.approx(np.mean(values))
        assert frame["std"][row] == pytest.approx(np.std(values, ddof=1))
    assert frame["std"].notna().all() and single[0]["std"].isna().all()


def test_seeds_count_from_the_seed_that_was_given(folder):
    run(folder, seed=3, seeds=2)
    assert [record.asked.seed for record in records(folder)] in ([3, 4], [4, 3])


def test_a_protocol_that_is_named_twice_is_run_once(folder):
    twice = asked(folder, protocol=[str(folder / "two.toml")] * 2)
    assert len(pipeline.run_session(pipeline.prepare(**twice))) == 1


def test_a_record_says_what_was_asked_what_was_run_and_where(folder):
    run(folder, seed=2)
    (record,) = records(folder)
    data = datasets.load("digits")
    assert record.asked.model_dump(exclude={"model_hash", "code", "protocol", "harness", "weights"}) == {
        "dataset": "digits",
        "data_hash": data.test.hash,
        "defense": "mine",
        "config": {"epochs": 2, "lr": 0.5},
        "recipe": "tiny",
        "seed": 2,
        "samples": 60,
        "precision": "fp32",
    }
    assert [c["name"] for c in record.asked.protocol["columns"]] == ["clean", "fgsm-0.05", "pgd-3"]
    assert record.asked.protocol["eps"] == data.eps and record.footnotes == ["a footnote"]
    assert len(record.asked.model_hash) == 64 and len(record.asked.code) == 16
    training = record.training
    assert (training.source, training.seed, training.parameters) == ("trained", 2, 650)
    assert [(row["stage"], row["epoch"]) for row in training.stages] == [("clean", 1), ("clean", 2)]
    where = record.where
    assert where.bench == bench.__version__ and where.device.startswith("cpu") and where.threads == 1
    assert where.versions["torch"] == torch.__version__ and {"python", "torchvision", "numpy"} <= set(
        where.versions
    )
    assert where.started.endswith("+00:00") and where.seconds > 0


def test_a_record_says_what_every_program_cost(folder):
    run(folder)
    (record,) = records(folder)
    held = record.outcomes().groupby("column", observed=True).robust.sum()
    clean, fgsm, pgd = record.programs
    assert (clean.columns, clean.gradients, clean.forwards) == (["clean"], 0, 60)
    assert (fgsm.columns, fgsm.gradients, fgsm.forwards) == (["fgsm-0.05"], held["clean"], held["clean"])
    assert (pgd.columns, pgd.gradients, pgd.forwards) == (["pgd-3"], 3 * held["clean"], held["clean"])


def test_what_was_not_trained_has_no_recipe(folder):
    (folder / "mine.py").write_text(
        "import bench\nfrom torch import nn\n@bench.register('mine')\ndef mine(data):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    run(folder)
    before = state(folder)
    run(folder, recipe="paper")
    assert state(folder) == before
    (record,) = records(folder)
    assert record.asked.recipe is None and record.training.source == "as built"


def test_weights_read_back_give_the_outcomes_of_the_network_just_trained(folder):
    network = {"defense": "resnet20", "settings": {"width": 4, "epochs": 1}, "plugin": None, "samples": 40}
    run(folder, **network)
    (first,) = records(folder)
    outcomes = (first._folder / "outcomes.parquet").read_bytes()
    for file in first._folder.iterdir():
        file.unlink()
    run(folder, **network)
    assert (first._folder / "outcomes.parquet").read_bytes() == outcomes


def test_an_explanation_computes_and_writes_nothing(folder):
    text = pipeline.explain_session(pipeline.prepare(**asked(folder)))
    assert "mine on digits, 60 images, protocol two" in text and "fgsm-0.05" in text
    assert not (folder / "results").exists()


@pytest.mark.parametrize("name", ["pgd_at", "trades", "soe", "immunity"])
def test_what_is_not_trained_yet_can_be_explained(name, folder):
    text = pipeline.explain_session(
        pipeline.prepare(**asked(folder, defense=name, plugin=None, recipe="tiny"))
    )
    assert "about " in text


def test_a_loss_that_raises_is_charged_to_its_line_by_an_explanation_too(folder):
    file = folder / "mine.py"
    file.write_text(file.read_text().replace("return F.cross_entropy(model(x), y)", "return [][0]"))
    with pytest.raises(UsageError, match=r"'mine' \(mine.py, line 23\) raises IndexError"):
        pipeline.explain_training(pipeline.prepare(**asked(folder)), "tiny")


def test_a_run_in_another_thread_leaves_signals_alone(folder):
    frames = []
    thread = threading.Thread(target=lambda: frames.append(run(folder)))
    thread.start()
    thread.join()
    assert len(frames) == 1 and len(frames[0]) == 4


# --- the code is part of the question


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("return nn.Sequential", "# a comment\n        return nn.Sequential", True),
        ('"""A linear model on clean images."""', '"""Another docstring."""', True),
        ("nn.Linear(64, 10))", "nn.Linear(64, 10), nn.Identity())", False),
        ("return F.cross_entropy(model(x), y)", "return 2 * F.cross_entropy(model(x), y)", False),
    ],
    ids=["comment", "docstring", "network", "loss"],
)
def test_a_plugin_that_was_edited_is_run_anew_unless_nothing_can_have_changed(folder, old, new, same):
    run(folder)
    before = state(folder)
    with_plugin(folder, old, new)
    run(folder)
    after = state(folder)
    assert {file: after[file] for file in before} == before
    assert len(records(folder)) == (1 if same else 2)
    assert len(list((folder / "results").rglob("model.safetensors"))) == (1 if same else 2)


def test_a_network_in_another_file_of_the_users_is_part_of_the_code(folder, monkeypatch):
    network = "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        return {}super().forward(x)\n"
    with_plugin(folder, "nn.Linear(64, 10)", "__import__('made_up_network').Net(64, 10)")
    file = folder / "made_up_network.py"
    codes = []
    for sign in ("", "-", ""):
        file.write_text(network.format(sign))
        sys.modules.pop("made_up_network", None)
        # Python would take the edited file for the compiled one, within the second
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        (job,) = (session := pipeline.prepare(**asked(folder))).jobs
        codes.append(provenance.code_hash(job.kind, job.defense.build(session.data)))
    assert codes[0] == codes[2] != codes[1]


def test_what_a_defense_inherits_is_part_of_its_code():
    kind = registry.get("resnet20")
    data = datasets.load("digits")
    model = kind(kind.recipes["tiny"]).build(data)
    parts = {part for part in kind.__mro__ if provenance._is_local(part)}
    assert {part.__module__ for part in parts} == {"baselines.resnet_cifar", "baselines.plain"}
    assert provenance.code_hash(kind, model) != provenance.code_hash(registry.get("resnet18"), model)


def test_a_library_is_no_part_of_the_code():
    assert not provenance._is_local(torch.nn.Linear) and not provenance._is_local(bench.Defense)


def test_a_file_that_is_edited_while_it_is_in_use_is_hashed_as_it_was(folder):
    (job,) = (session := pipeline.prepare(**asked(folder))).jobs
    model = job.defense.build(session.data)
    before = provenance.code_hash(job.kind, model)
    with_plugin(folder, "nn.Linear(64, 10))", "nn.Linear(64, 10), nn.ReLU())")
    assert provenance.code_hash(job.kind, model) == before


@pytest.mark.parametrize(
    ("bodies", "same"),
    [
        (("Linear(64, 10)", "Linear( 64,10 )"), True),
        (("Linear(64, 10)", "Linear(64, 10, bias=False)"), False),
        (("Linear(64, 10)", "Bilinear(64, 10)"), False),
        (("Linear(64, 10) if 1 in {'a', 'b'} else 0", "Linear(64, 10) if 1 in {'a', 'c'} else 0"), False),
    ],
)
def test_a_function_of_a_notebook_is_told_from_another_by_what_it_does(bodies, same):
    codes = []
    for body in bodies:
        names = {"__name__": "__main__"}
        exec(compile(f"from torch import nn\ndef mine(data):\n    return nn.{body}", "<cell>", "exec"), names)
        kind = bench.defense.FunctionDefense.of("mine", names["mine"])
        codes.append(provenance.code_hash(kind, torch.nn.Linear(1, 1)))
    assert (codes[0] == codes[1]) is same


@pytest.mark.slow
def test_a_plugin_edited_between_two_processes_is_run_anew(folder):
    command = [sys.executable, "-m", "bench", "run", "--plugin", "mine.py", "--defense", "mine"]
    command += ["--protocol", "two.toml", "--samples", "20", "--quiet"]
    for old, new in (("", ""), ("nn.Linear(64, 10)", "nn.Linear(64, 10, bias=False)")):
        with_plugin(folder, old, new)
        subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True
        )
    assert len(records(folder)) == 2


# --- interruptions


def stop_after(batches, monkeypatch, how):
    """Lets the evaluator do so many batches; then something happens."""
    original, seen = Evaluator.run, []

    def counted(self, programs, index):
        if len(seen) == batches:
            how()
        seen.append(index)
        return original(self, programs, index)

    monkeypatch.setattr(Evaluator, "run", counted)
    return seen


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)


@pytest.mark.parametrize("how", [interrupt, terminate])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_stopped_evaluation_keeps_its_batches_and_the_next_run_does_only_the_rest(
    folder, monkeypatch, how, done
):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_after(done, patch, how)
        with pytest.raises(Interrupted, match=f"stopped with {20 * done} of 60 images done; they are kept"):
            run(folder)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert records(folder) == []
    with monkeypatch.context() as patch:
        seen = stop_after(-1, patch, interrupt)
        run(folder)
    assert [index.tolist() for index in seen] == [list(range(i, i + 20)) for i in range(20 * done, 60, 20)]
    (record,) = records(folder)
    assert not (record._folder / "parts").exists()
    assert record.programs[0].forwards == 60
    uninterrupted = asked(folder) | {"results": folder / "other"}
    bench.run(**uninterrupted)
    (other,) = read_all(folder / "other")
    assert (record._folder / "outcomes.parquet").read_bytes() == (
        other._folder / "outcomes.parquet"
    ).read_bytes()


def test_the_rest_may_be_done_with_another_batch_size(folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, patch, interrupt)
        with pytest.raises(Interrupted):
            run(folder)
    run(folder, batch_size=7)
    (record,) = records(folder)
    bench.run(**asked(folder, results=folder / "other"))
    (other,) = read_all(folder / "other")
    assert record.outcomes_sha256 == other.outcomes_sha256


def unfinished(folder, monkeypatch):
    """The folder of a run that was stopped after two batches."""
    with monkeypatch.context() as patch:
        stop_after(2, patch, interrupt)
        with pytest.raises(Interrupted):
            run(folder)
    (parts,) = (folder / "results").rglob("parts")
    return parts.parent


def test_a_part_that_was_cut_short_is_done_again(folder, monkeypatch):
    place = unfinished(folder, monkeypatch)
    first, _ = sorted((place / "parts").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    seen = stop_after(-1, monkeypatch, interrupt)
    run(folder)
    assert np.concatenate(seen).tolist() == [*range(20), *range(40, 60)]


@pytest.mark.parametrize(
    "left", [["parts"], ["parts", "outcomes.parquet"], ["outcomes.parquet"], [".record.json.k3j2"]]
)
def test_a_folder_without_a_record_is_no_result(folder, monkeypatch, left):
    place = unfinished(folder, monkeypatch)
    for name in {"outcomes.parquet", ".record.json.k3j2"} & set(left):
        (place / name).write_bytes(b"{}")
    assert read(place) is None and bench.load_results(folder / "results").empty
    assert len(run(folder)) == 4


def test_a_record_that_was_cut_short_is_an_error_and_stays(folder):
    run(folder)
    (file,) = (folder / "results").rglob("record.json")
    file.write_text(file.read_text()[:500])
    before = state(folder)
    with pytest.raises(
        UsageError, match=r"record.json is no record .*delete its folder and run again"
    ) as raised:
        run(folder)
    assert "\n" not in str(raised.value) and state(folder) == before


def test_outcomes_that_were_changed_are_no_result(folder):
    run(folder)
    (file,) = (folder / "results").rglob("outcomes.parquet")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UsageError, match="is not what its record was written with; delete the folder and run again"
    ):
        run(folder)


def started(folder, *words):
    """`bench` in a process of its own, on its way."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *words, "--plugin", "mine.py", "--defense", "mine", "--quiet"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, folder, pattern, count=1):
    while len(list(folder.rglob(pattern))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_evaluation_that_was_killed_goes_on_where_it_stopped(folder, monkeypatch, how):
    words = ["run", "--protocol", "two.toml", "--samples", "60", "--batch-size", "1"]
    run(folder, results=folder / "other", batch_size=1)
    with_plugin(folder, "return nn.Sequential(", "return nn.Sequential(Slow(), ")
    with (folder / "mine.py").open("a") as file:
        file.write(
            "import os, time\nclass Slow(nn.Module):\n    def forward(self, x):\n"
            "        if os.environ.get('SLOW'): time.sleep(0.01)\n        return x\n"
        )
    monkeypatch.setenv("SLOW", "1")
    process = started(folder, *words)
    wait_for(process, folder, "results/runs/**/parts/*.parquet", 5)
    process.send_signal(how)
    _, said = process.communicate()
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert said.splitlines()[-1].startswith("bench: stopped with ")
    assert records(folder) == []
    monkeypatch.delenv("SLOW")
    seen = stop_after(-1, monkeypatch, interrupt)
    run(folder, batch_size=1)
    assert 0 < len(seen) <= 55
    (record,), (other,) = records(folder), read_all(folder / "other")
    assert record.outcomes_sha256 == other.outcomes_sha256


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(folder, how):
    with_plugin(folder, "epochs: int = 2", "epochs: int = 60")
    (whole,) = pipeline.train_session(pipeline.prepare(**asked(folder, results=folder / "other")))
    process = started(folder, "train")
    wait_for(process, folder, "results/checkpoints/**/state.pt")
    process.send_signal(how)
    _, said = process.communicate()
    assert not list((folder / "results").rglob("model.safetensors"))
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        (line,) = said.splitlines()
        assert line.startswith("bench: stopped ") and "the same command goes on from there" in line
    (path,) = pipeline.train_session(pipeline.prepare(**asked(folder)))
    assert torch.equal(weights(path), weights(whole))
    assert not list((folder / "results").rglob("state.pt"))


def weights(path):
    from safetensors.torch import load_file

    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())])


# --- training


def test_training_alone_gives_the_checkpoints_that_a_run_then_uses(folder, monkeypatch):
    paths = pipeline.train_session(pipeline.prepare(**asked(folder, seeds=2)))
    assert [path.name for path in paths] == ["model.safetensors"] * 2 and paths[0] != paths[1]
    assert not list(folder.rglob("state.pt")) and not (folder / "results" / "runs").exists()
    monkeypatch.setattr("bench.weights.train", None)
    assert run(folder, seeds=2).seeds.tolist() == [2] * 4


def test_a_defense_with_nothing_to_train_says_so(folder):
    with pytest.raises(UsageError, match=r"'torchvision.models:resnet18' has nothing to train"):
        pipeline.train_session(pipeline.prepare(**asked(folder, defense="torchvision.models:resnet18")))


@pytest.mark.parametrize("answer", [None, True, False])
def test_a_long_training_is_announced_and_asked_about_where_there_is_somebody_to_ask(
    folder, monkeypatch, answer
):
    monkeypatch.setattr("bench.weights.estimate", lambda *args, **options: 7300.0)
    said, questions = [], []

    def ask(question):
        questions.append(question)
        return answer

    request = asked(folder, recipe="fast", say=said.append, ask=None if answer is None else ask)
    if answer is False:
        with pytest.raises(Interrupted, match="nothing was trained"):
            bench.run(**request)
        assert not list(folder.rglob("*.safetensors"))
    else:
        bench.run(**request)
    assert said[0] == (
        "training mine (fast) on digits will take about 2.0 h on this machine; quicker: --recipe tiny, or a GPU"
    )
    assert len(questions) == (answer is not None)


def test_a_training_of_less_than_an_hour_is_not_announced(folder, monkeypatch):
    monkeypatch.setattr("bench.weights.estimate", lambda *args, **options: 3599.0)
    said = []
    bench.run(**asked(folder, say=said.append, ask=lambda question: pytest.fail(question)))
    assert all("will take" not in line for line in said)


# --- a stranger's code


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        (
            "return F.cross_entropy(model(x), y)",
            "return [][0]",
            UsageError,
            r"'mine' \(mine.py, line 23\) raises IndexError",
        ),
        (
            "c = self.config\n",
            "c = 1 / 0\n",
            UsageError,
            r"'mine' \(mine.py, line 24\) raises ZeroDivisionError",
        ),
        (
            "return nn.Sequential",
            "nothing()\n        return nn.Sequential",
            UsageError,
            r"'mine' \(mine.py, line 19\) raises NameError",
        ),
        (
            "return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))",
            "return None",
            UsageError,
            "'mine': build must return an nn.Module, not a NoneType",
        ),
        ("nn.Linear(64, 10)", "nn.LazyLinear(10)", UsageError, "'mine' has lazy layers; give them the sizes"),
        (
            "nn.Linear(64, 10)",
            "nn.Linear(64, 11)",
            VoidRun,
            r"mine: this model cannot .*\(2, 10\) for 10 classes, but returned \(2, 11\)",
        ),
        (
            "nn.Linear(64, 10)",
            "nn.Linear(65, 10)",
            VoidRun,
            "mine: this model cannot be evaluated: the model raised RuntimeError",
        ),
        ("nn.Linear(64, 10)", "nn.Linear(64, 10), nn.Flatten(0)", VoidRun, r"mine: .*returned \(20,\)"),
        ("lr=c.lr", "lr=-1", UsageError, "lr"),
        (
            "F.cross_entropy(model(x), y)",
            "F.cross_entropy(model(x), y) * float('nan')",
            VoidRun,
            "training void: the loss of clean is nan",
        ),
    ],
    ids=[
        "loss",
        "stages",
        "build",
        "nothing built",
        "lazy",
        "classes",
        "forward",
        "shape",
        "settings",
        "nan",
    ],
)
def test_what_is_wrong_with_a_defense_is_said_in_a_line_and_trains_nothing(folder, old, new, error, said):
    with_plugin(folder, old, new)
    with pytest.raises(error, match=said):
        run(folder)
    assert (
        not list((folder / "results").rglob("*.safetensors")) and not (folder / "results" / "runs").exists()
    )


def test_what_is_wrong_with_the_second_defense_is_found_before_the_first_is_trained(folder, monkeypatch):
    with (folder / "mine.py").open("a") as file:
        file.write("\n@bench.register('second')\ndef second(data):\n    return nn.Linear(1, 1)\n")
    monkeypatch.setattr("bench.weights.train", None)
    with pytest.raises(VoidRun, match="second: this model cannot be evaluated"):
        run(folder, defense="mine,second")


def test_what_is_wrong_with_the_test_images_is_found_before_anything_is_trained(folder, monkeypatch):
    data = folder / "data"
    data.mkdir()
    images = np.zeros((40, 8, 8), np.uint8)
    for which in ("train", "test"):
        np.savez(data / f"{which}.npz", images=images, labels=np.arange(40) % 10)
    prepared = pipeline.prepare(**asked(folder, dataset=f"npz:{data}", samples=None, recipe="tiny"))
    (data / "test.npz").write_bytes(b"no archive")
    monkeypatch.setattr("bench.weights.train", None)
    with pytest.raises(UsageError, match=r"test.npz"):
        pipeline.run_session(prepared)


def test_a_crash_in_our_own_training_is_not_charged_to_the_plugin(folder, monkeypatch):
    def broken(*args, **options):
        raise KeyError("ours")

    monkeypatch.setattr("bench.weights.train", broken)
    with pytest.raises(KeyError, match="ours"):
        run(folder)


def test_a_plugin_that_fails_is_no_run(folder):
    with_plugin(folder, "import bench\n", "import bench\n1 / 0\n")
    with pytest.raises(PluginError, match="plugin mine.py, line 6, raises ZeroDivisionError"):
        run(folder)
    assert not (folder / "results").exists()


# --- checkpoints


@pytest.fixture
def weights_that_state(folder):
    """A checkpoint of a linear model that states an accuracy; and the one it has on all test images, in percent."""

    def make(**metadata):
        session = pipeline.prepare(**asked(folder))
        (path,) = pipeline.train_session(session)
        model = session.jobs[0].defense.build(session.data)
        checkpoints.load(str(path), model, defense=session.jobs[0].defense, data=session.data)
        checkpoints.save(
            folder / "weights.safetensors", model.state_dict(), {k: str(v) for k, v in metadata.items()}
        )
        x, y = session.data.test.batch(slice(None))
        return 100 * float((model(x).argmax(1) == y).float().mean())

    return make


def test_a_stated_accuracy_is_compared_on_all_test_images_whatever_the_samples(
    folder, weights_that_state, monkeypatch
):
    true = weights_that_state()
    weights_that_state(clean=true)
    measured = []
    monkeypatch.setattr(checkpoints, "check_clean", lambda loaded, percent, n: measured.append((percent, n)))
    frame = run(folder, checkpoint=str(folder / "weights.safetensors"), samples=10)
    assert measured == [(pytest.approx(true), 360)]
    assert frame.n.tolist() == [10] * 4


def test_a_stated_accuracy_is_compared_once_for_all_protocols(folder, weights_that_state, monkeypatch):
    weights_that_state(clean=weights_that_state())
    measured = []
    monkeypatch.setattr(checkpoints, "check_clean", lambda *args: measured.append(args))
    run(
        folder,
        checkpoint=str(folder / "weights.safetensors"),
        samples=10,
        protocol=[str(folder / "two.toml"), "quick"],
    )
    assert len(measured) == 1


def test_a_stated_accuracy_that_is_not_reached_voids_the_run(folder, weights_that_state):
    weights_that_state(clean=99.9 - weights_that_state() / 2)
    with pytest.raises(CheckpointError, match=r"states .* % clean accuracy, measured .* % on 360 images"):
        run(folder, checkpoint=str(folder / "weights.safetensors"), samples=10)
    assert not (folder / "results" / "runs").exists()


def test_nothing_is_compared_where_nothing_is_stated(folder, weights_that_state, monkeypatch):
    weights_that_state()
    monkeypatch.setattr(Evaluator, "clean_accuracy", None)
    run(folder, checkpoint=str(folder / "weights.safetensors"))
    (record,) = records(folder)
    assert record.training.source == str(folder / "weights.safetensors") and record.asked.recipe is None


def test_other_weights_are_another_run(folder, weights_that_state):
    weights_that_state()
    run(folder, checkpoint=str(folder / "weights.safetensors"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    checkpoints.save(folder / "weights.safetensors", model.state_dict(), {})
    run(folder, checkpoint=str(folder / "weights.safetensors"))
    first, second = records(folder)
    assert first.asked.model_hash != second.asked.model_hash


# --- what is asked, from Python


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eps": [0.1]}, r"eps: \[0.1\] is not a number; write 0.03 or 8/255"),
        ({"eps": float("inf")}, "eps: inf is not a finite number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"precision": "fp16"}, "no precision 'fp16'; choose fp32, tf32 or bf16"),
        ({"precision": "tf32", "device": "cpu"}, "precision tf32 is how NVIDIA GPUs .*, and cpu is none"),
        ({"recipe": "huge"}, "'mine' has no recipe 'huge'; it has tiny, fast"),
        (
            {"defense": ["mine", "dwf"], "checkpoint": "x.pt"},
            "one checkpoint for 2 defenses; give --defense one name",
        ),
        ({"samples": 361}, "digits has 360 test images; --samples must be from 1 to 360, not 361"),
    ],
)
def test_what_is_asked_wrongly_is_found_before_anything_is_done(folder, change, said):
    with pytest.raises(UsageError, match=said):
        run(folder, **change)
    assert not (folder / "results").exists()


@pytest.mark.parametrize("eps", [0.05, "0.05", np.float32(0.05), "1/20"])
def test_a_radius_may_be_written_in_any_way(folder, eps):
    assert pipeline.prepare(**asked(folder, eps=eps)).eps == pytest.approx(0.05)


def test_a_protocols_own_norm_decides_how_large_a_radius_may_be(folder):
    (folder / "two.toml").write_text('norm = "L2"\n' + PROTOCOL)
    assert pipeline.prepare(**asked(folder, eps=2)).eps == 2


def test_records_are_json_that_others_can_read(folder):
    run(folder)
    (file,) = (folder / "results").rglob("record.json")
    assert json.loads(file.read_text())["asked"]["defense"] == "mine"
