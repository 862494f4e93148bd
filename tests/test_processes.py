"""Several processes at one command: the outcomes of one, one voice, one line for a failure, and no waiting for the dead."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from teams import command, together

from bench import data as datasets
from bench import processes
from bench.errors import Elsewhere, Interrupted, UsageError
from bench.pipeline import run_session
from bench.session import prepare

# torch has threads of its own; the children use none of them
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

ROOT = Path(__file__).parent.parent
PROTOCOL = """
name = "two"
success = "any"
[[column]]
attack = "fgsm"
eps = 0.05
[[column]]
attack = "pgd"
steps = 5
restarts = 2
"""
PLUGIN = '''
"""Small models, and some that fail."""
import os, signal
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
import bench
from bench.config import config

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))

class Noisy(Linear):
    def forward(self, x):
        return super().forward(x + 0.05 * torch.randn_like(x))

class Breaks(Linear):
    """Breaks at one image, which is known by its sum."""
    def forward(self, x):
        logits = super().forward(x)
        it = (x.flatten(1).sum(1, keepdim=True) - float(os.environ["BREAKS_AT"])).abs() < 1e-4
        return torch.where(it, torch.nan, logits)

class Killed(Linear):
    """Kills the process that comes to one image, the first time."""
    def forward(self, x):
        once = Path(os.environ.get("ONCE", "."))
        if not once.exists() and ((x.flatten(1).sum(1) - float(os.environ["BREAKS_AT"])).abs() < 1e-4).any():
            once.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

@bench.register("fixed")
def fixed(data):
    return Linear()

@bench.register("noisy")
def noisy(data):
    return Noisy()

@bench.register("breaks")
def breaks(data):
    return Breaks()

@bench.register("killed")
def killed(data):
    return Killed()

@config
class Config:
    epochs: int = 1
    width: int = 4
    dies: bool = False

@bench.register("trained")
class Trained(bench.Defense[Config]):
    """Two layers on clean images."""
    recipes = {"tiny": Config()}

    def build(self, data):
        w = self.config.width
        return nn.Sequential(nn.Conv2d(1, w, 3), nn.BatchNorm2d(w), nn.ReLU(), nn.Flatten(), nn.Linear(36 * w, 10))

    def stages(self, data):
        def loss(model, x, y, rng):
            once = Path(os.environ.get("ONCE", "."))
            if rng.address[3:] == (1, 2) and os.environ.get("RANK") == "1" and not once.exists():
                once.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            return F.cross_entropy(model(x), y)
        return [bench.Stage(name="clean", loss=loss, epochs=self.config.epochs, batch_size=256, lr=0.1, select="clean")]
'''


@pytest.fixture
def place(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "two.toml").write_text(PROTOCOL)
    return tmp_path


def asked(place, results, *more, verb="run"):
    run = ["--protocol", f"{place / 'two.toml'}", "--samples", "50", "--batch-size", "16"]
    return [
        verb,
        *("--plugin", f"{place / 'plugin.py'}", "--results", f"{place / results}", "--device", "cpu"),
        *(run if verb == "run" else []),
        *more,
    ]


def outcomes(results):
    """The hash of every run's outcomes, by its place."""
    files = results.glob("runs/*/*/*/outcomes.parquet")
    return {str(file.relative_to(results)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def networks(results):
    """The hash of every trained network's tensors, by its place: beside them the file has the seconds it took."""

    def digest(file):
        return hashlib.sha256(safetensors.torch.save(safetensors.torch.load_file(file))).hexdigest()

    files = results.glob("checkpoints/*/*/*/model.safetensors")
    return {file.parent.name: digest(file) for file in files}


def sum_of_image_40():
    """None of the images that a model is examined with beforehand."""
    return str(float(datasets.load("digits", None).test.batch(slice(40, 41), "cpu")[0].sum()))


def said(found):
    """What all processes wrote to standard error."""
    return "".join(one.err for one in found)


def run(count, place, results, **more):
    """The run's records in so many processes: how many, and what each cost."""

    def work():
        settings = {"defense": "fixed", "batch_size": 16, "samples": 50, "quiet": True} | more
        session = prepare(
            protocol=str(place / "two.toml"),
            plugin=place / "plugin.py",
            results=place / results,
            device="cpu",
            **settings,
        )
        return [
            [(program.name, program.gradients, program.forwards) for program in one.programs]
            for one in run_session(session)
        ]

    return together(count, work, place / "work")


@pytest.mark.parametrize("defense", ["fixed", "noisy"])
def test_one_two_and_four_processes_give_identical_outcomes_at_the_same_cost(defense, place):
    costs, found = {}, {}
    for count in (1, 2, 4):
        costs[count] = run(count, place, str(count), defense=defense, insist=defense == "noisy")
        found[count] = outcomes(place / str(count))
        assert not list((place / str(count)).glob("runs/*/*/*/parts"))
    assert len(found[1]) == 1
    assert found[1] == found[2] == found[4]
    assert costs[2] == costs[1] * 2 and costs[4] == costs[1] * 4


def test_only_the_first_process_speaks(place):
    first, *others = command(3, asked(place, "results", "--defense", "fixed"), place / "said")
    assert "SA" in first.out and "audit:" in first.err
    assert [(one.out, one.err) for one in others] == [("", ""), ("", "")]


def test_a_mistake_is_one_line_and_every_process_ends_with_its_exit_code(place):
    found = command(3, asked(place, "results", "--defense", "fixde"), place / "said")
    assert [one.code for one in found] == [2, 2, 2]
    assert said(found).count("\n") == 1 and "did you mean 'fixed'" in said(found)


def test_a_run_that_is_void_in_one_process_is_void_in_all_and_one_line_says_why(place, monkeypatch):
    monkeypatch.setenv("BREAKS_AT", sum_of_image_40())
    found = command(2, asked(place, "results", "--defense", "breaks"), place / "said")
    assert [one.code for one in found] == [2, 2]
    assert said(found).count("\n") == 1 and "run void" in said(found) and "image 40" in said(found)
    assert len(list((place / "results").glob("runs/*/*/*/void.json"))) == 1
    assert not outcomes(place / "results")


def test_seeds_spread_and_each_network_trained_apart_is_that_of_one_process(place):
    asked = {"defense": "trained", "seeds": 3, "samples": 20, "batch_size": 10}
    for count in (1, 2):
        run(count, place, str(count), **asked)
    one, two = networks(place / "1"), networks(place / "2")
    # the first two have a process each; the third, trained by both, is another by rounding
    assert one.keys() == two.keys() and len(one) == 3
    assert sum(one[key] == two[key] for key in one) >= 2
    assert len(outcomes(place / "2")) == 3
    # of the same networks the outcomes are the same
    before = outcomes(place / "1")
    for file in (place / "1").glob("runs/*/*/*/record.json"):
        file.unlink()
    run(2, place, "1", **asked)
    assert outcomes(place / "1") == before


def test_pieces_go_to_whoever_asks_and_each_is_done_once(tmp_path):
    def work():
        with processes.joined():
            return [piece for _, piece in processes.share(list(range(20)))]

    found = together(3, work, tmp_path)
    assert sorted(piece for one in found for piece in one) == list(range(20))


def test_all_take_the_word_of_the_first_to_come(tmp_path):
    def work():
        with processes.joined():
            return processes.agreed({"rank": processes.rank()}), processes.agreed([processes.rank()])

    one, two, three = together(3, work, tmp_path)
    assert one == two == three


def test_whoever_waits_for_a_process_that_failed_is_told(tmp_path):
    def work():
        try:
            with processes.joined():
                if processes.rank() == 1:
                    raise UsageError("no")
                processes.barrier()
        except (UsageError, Elsewhere) as error:
            return type(error).__name__, error.exit_code

    assert together(2, work, tmp_path) == [("Elsewhere", 2), ("UsageError", 2)]


def test_a_process_that_dies_in_a_step_ends_the_others_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LINGER", 0)

    def work():
        with pytest.raises(Interrupted, match="has gone"), processes.joined():
            if processes.rank() == 1:
                # as SIGKILL would: without a word
                (tmp_path / "1.pickle").write_bytes(b"N.")
                os._exit(0)
            while True:
                processes.anyone(False)

    assert together(2, work, tmp_path) == [None, None]


def test_hosts_that_do_not_share_the_results_folder_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SEEN_WITHIN", 0.3)

    def work():
        try:
            with processes.joined():
                folder = tmp_path / os.environ["RANK"]
                folder.mkdir()
                processes.shared(folder)
        except (UsageError, Elsewhere) as error:
            return str(error)

    first, second = together(2, work, tmp_path)
    assert first == "" and "must share the folder" in second


def test_alone_every_function_is_that_of_one_process(tmp_path):
    with processes.joined():
        assert (processes.rank(), processes.count()) == (0, 1)
        assert list(processes.share("ab")) == [(0, "a"), (1, "b")]
        assert processes.agreed("x") == "x" and not processes.anyone(False)
        processes.barrier()
        processes.shared(tmp_path)
    assert not list(tmp_path.iterdir())


def torchrun(place, *arguments, processes, restarts=0, **environment):
    """`bench` under torchrun on this machine, as one types it."""
    started = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{processes}"),
            *("--max-restarts", f"{restarts}", "-m", "bench", *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return started.returncode, started.stdout, started.stderr


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_torchrun_gives_the_outcomes_of_one_process_and_prints_one_table(count, place):
    run(1, place, "1")
    code, out, err = torchrun(place, *asked(place, "many", "--defense", "fixed"), processes=count)
    assert code == 0, err
    assert out.count("protocol two") == 1
    assert outcomes(place / "many") == outcomes(place / "1")


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_is_restarted_and_the_run_ends_with_the_same_outcomes(place):
    run(1, place, "1", defense="killed")
    once = place / "once"
    arguments = asked(place, "2", "--defense", "killed", "--batch-size", "5")
    settings = {"ONCE": f"{once}", "BREAKS_AT": sum_of_image_40()}
    code, _, err = torchrun(place, *arguments, processes=2, restarts=1, **settings)
    assert code == 0 and once.exists(), err
    assert "exitcode: -9" in err
    assert outcomes(place / "2") == outcomes(place / "1")


@pytest.mark.slow
def test_a_training_whose_worker_is_killed_is_restarted_and_ends_with_the_same_weights(place):
    arguments = ["--defense", "trained", "--set", "epochs=3"]
    code, _, err = torchrun(place, *asked(place, "1", *arguments, verb="train"), processes=2)
    assert code == 0, err
    once = place / "once"
    code, _, err = torchrun(
        place, *asked(place, "2", *arguments, verb="train"), processes=2, restarts=1, ONCE=f"{once}"
    )
    assert code == 0 and once.exists(), err
    assert networks(place / "1") == networks(place / "2")
    assert not list((place / "2").glob("checkpoints/*/*/*/state.pt"))


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    """Two hosts, each a network namespace, with a cable between them: their names, and the address of the first."""
    names = [f"bench{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    try:
        ends = [f"v{os.getpid()}{end}" for end in "ab"]
        ip(
            "link",
            "add",
            ends[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            ends[1],
            "netns",
            names[1],
        )
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names, ends, "10.77.0.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.slow
def test_two_hosts_with_a_network_between_them_give_the_outcomes_of_one(hosts, place):
    names, ends, address = hosts
    run(1, place, "1")
    started = [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "bench"),
                *("--rdzv-endpoint", f"{address}:29400", "--local-addr", f"10.77.0.{number}"),
                *("--rdzv-conf", f"is_host={str(number == 1).lower()},join_timeout=300"),
                *("-m", "bench", *asked(place, "2", "--defense", "fixed")),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}", "GLOO_SOCKET_IFNAME": end},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1)
    ]
    try:
        said = [one.communicate(timeout=500) for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    assert [one.returncode for one in started] == [0, 0], said
    assert sum(out.count("protocol two") for out, _ in said) == 1
    assert outcomes(place / "2") == outcomes(place / "1")
