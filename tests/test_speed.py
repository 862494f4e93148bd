"""`bench speed`: what is counted is exact, what is told follows from it, and nothing is left behind."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import TwoLayer, dataset, small_net
from routed_toys import RouteToy

from bench import protocol as protocols
from bench import registry, session, speed
from bench.cli import main
from bench.data import Split, load
from bench.draws import DRAWS
from bench.evaluate import Evaluator
from bench.moe import as_mixture
from bench.plan import plan
from bench.session import BATCH_SIZE, prepare

ROOT = Path(__file__).parent.parent
PLUGIN = """
import torch
from torch import nn
import bench

@bench.register("known")
def known(data):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))

@bench.register("noisy")
def noisy(data):
    return Noisy()

class Hidden(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)[:, :10]

@bench.register("hidden")
def hidden(data):
    return Hidden()

class Short(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :7]

@bench.register("short")
def short(data):
    return Short()
"""
#: a 3×3 convolution of 8×8 pixels to 4 channels, and a linear layer
MULTIPLY_ADDS = 8 * 8 * 4 * 9 + 256 * 10
SECONDS = 0.25


@pytest.fixture(autouse=True)
def has_bf16(monkeypatch):
    """A processor that has it not is told of on stderr; what is said there is tested elsewhere."""
    monkeypatch.setattr("bench.session.emulates_bf16", lambda device: False)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs `bench speed` here on a clock that says a quarter of a second to everything: exit code, output, errors."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(speed, "SIDE", {"cpu": 128})
    monkeypatch.setitem(BATCH_SIZE, "cpu", 128)

    def once(work, device):
        work()
        return SECONDS

    monkeypatch.setattr(speed, "fastest", once)

    def run(*words, plugged=True):
        plugged = ["--plugin", str(plugin)] if plugged else []
        monkeypatch.setattr(sys, "argv", ["bench", "speed", *plugged, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert list(place.iterdir()) == [], "nothing is written"
        return stop.value.code or 0, *capsys.readouterr()

    yield run
    for name, one in list(registry._registered.items()):
        if one.owner.split(".")[0] not in registry.PACKAGES:
            del registry._registered[name]
    registry._plugins.clear()
    for module in [module for module in sys.modules if module.startswith("bench_plugin_")]:
        del sys.modules[module]


def told(call, *words):
    code, out, err = call("--json", *words)
    assert (code, err) == (0, "")
    return json.loads(out)


# --- what is counted ------------------------------------------------------------------------------------------------


def test_multiply_adds_parameters_and_shares_of_a_known_network_are_exact(call):
    found = told(call, "--defense", "known", "--precision", "bf16")
    (model,) = found["models"]
    assert (model["multiply_adds"], model["parameters"]) == (MULTIPLY_ADDS, 4 * 9 + 4 + 2570)
    assert found["machine"]["flops"] == dict.fromkeys(["fp32", "bf16"], 2 * 128**3 / SECONDS)
    assert [(rate["what"], rate["precision"]) for rate in model["rates"]] == [
        ("forward", "fp32"),
        ("gradient", "fp32"),
        ("fast gradient", "bf16"),
    ]
    # 128 images at once, each two operations a multiply-add, a gradient twice a forward pass
    for rate, passes in zip(model["rates"], (1, 2, 2), strict=True):
        assert rate["images_per_second"] == 128 / SECONDS
        assert rate["flops"] == pytest.approx(2 * passes * MULTIPLY_ADDS * 128 / SECONDS)
        assert rate["share"] == pytest.approx(passes * MULTIPLY_ADDS * 128 / 128**3)


def test_a_share_is_of_the_rate_in_the_same_precision(monkeypatch, call):
    rates = {"fp32": 1e6, "bf16": 4e6}
    monkeypatch.setattr(speed, "matrix_rate", lambda device, precision: rates[precision])
    (model,) = told(call, "--defense", "known", "--precision", "bf16")["models"]
    _, plain, quick = model["rates"]
    assert plain["share"] == pytest.approx(4 * quick["share"])


def test_a_gpu_that_has_tf32_is_told_of_in_every_precision(monkeypatch, call):
    for module in (speed, session):
        monkeypatch.setattr(module, "multiplies_in_tf32", lambda device: True)
    products, multiplied = torch.backends.cuda.matmul, []

    def once(work, device):
        work()
        multiplied.append(products.fp32_precision)
        return {"ieee": 1.0, "tf32": 0.5}[products.fp32_precision]

    monkeypatch.setattr(speed, "fastest", once)
    found = told(call, "--defense", "known", "--precision", "tf32")
    # bf16 is a type of its own
    assert multiplied[:3] == ["ieee", "tf32", "ieee"]
    flops = found["machine"]["flops"]
    assert list(flops) == ["fp32", "tf32", "bf16"] and flops["tf32"] == 2 * flops["fp32"]
    (model,) = found["models"]
    gradients = [
        (rate["precision"], rate["share"]) for rate in model["rates"] if rate["what"] == "fast gradient"
    ]
    assert [precision for precision, _ in gradients] == ["fp32", "tf32", "bf16"]
    assert gradients[1][1] == pytest.approx(gradients[0][1] / 2)
    assert ", tf32" in next(rate["how"] for rate in model["rates"] if rate["precision"] == "tf32")


def test_the_times_of_the_papers_protocol_are_its_passes_times_theirs(call):
    (model,) = told(call, "--defense", "known", "--samples", "1000")["models"]
    span = next(span for span in model["protocols"] if span["protocol"] == "dwf-paper")
    # FGSM's gradient and nine passes, PGD's 100 steps with six milestones, two more starts of 100; the clean pass
    second = 1000 * SECONDS / 128
    assert span["at_least"] == pytest.approx((1 + 100 + 1 + 9 + 6) * second)
    assert span["at_most"] == pytest.approx((1 + 300 + 1 + 9 + 8) * second)
    assert {span["protocol"] for span in model["protocols"]} == set(protocols.names())
    for span in model["protocols"]:
        # one start, of which the last iterate decides: there is no more and no less
        fixed = span["protocol"] == "calibration"
        assert span["at_least"] > 0 and (span["at_least"] == span["at_most"]) == fixed, span
        assert span["at_least"] <= span["at_most"], span


def test_the_whole_test_set_is_told_of_unless_samples_are_given(call):
    whole, ten = (told(call, "--defense", "known", *words) for words in ([], ["--samples", "36"]))
    assert (whole["models"][0]["samples"], ten["models"][0]["samples"]) == (360, 36)
    for a, b in zip(whole["models"][0]["protocols"], ten["models"][0]["protocols"], strict=True):
        assert a["at_most"] == pytest.approx(10 * b["at_most"])


PGD = '[[column]]\nattack="pgd"\nsteps=[7,20]\nrestarts=3\nstep_size="eps/400"\n'
AUTOATTACK = '[[column]]\nattack="autoattack"\nsettings={steps=12,targets=30,queries=40%s}\n'
# no more steps than it takes a trajectory to go round, which would end it
ADAPTIVE = '[[column]]\nattack="adaptive"\nsteps=4\nstep_size="eps/100"\n'
FGSM = '[[column]]\nattack="fgsm"\neps=[1e-5,2e-5]\n'


@pytest.mark.parametrize(
    ("model", "x", "asked"),
    [
        (small_net(10), None, FGSM + PGD),
        (TwoLayer(), None, AUTOATTACK % ""),
        (TwoLayer(), None, AUTOATTACK % ',attacks=["apgd-dlr","square"]'),
        (TwoLayer(), None, AUTOATTACK % ',attacks=["fab-t"]'),
        (RouteToy(guard=0.4), RouteToy.images(), ADAPTIVE),
    ],
    ids=["fgsm-pgd", "autoattack", "dlr-square", "fab", "adaptive"],
)
def test_no_image_costs_more_than_the_most_that_is_told_and_one_that_nothing_breaks_costs_it(
    tmp_path, model, x, asked
):
    data, n = dataset(), 4
    x = data.test.batch(slice(None))[0] if x is None else x
    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    classes = model(x).shape[1]
    split = Split(images, model(x).argmax(1).numpy())
    (tmp_path / "p.toml").write_text(f'name="p"\nsuccess="last"\n{asked}')
    kind = "hard" if as_mixture(model) else None
    columns = protocols.load(str(tmp_path / "p.toml")).columns(1e-5, kind, classes=classes)
    programs = plan(columns)
    evaluator = Evaluator(model, classes=classes, split=split, seed=0, success="last")
    costs = evaluator.run(programs, np.arange(n)).costs
    for program in programs:
        gradients, forwards = speed.most(program, as_mixture(model), classes)
        cost = costs[program.name]
        assert cost.forwards <= n * forwards
        if program.name.startswith(("sticky", "per-expert")):
            # an image starts at one expert, which alone is attacked; and the toy's second expert is wrong before it is
            assert 0 < cost.gradients <= n * gradients
        else:
            assert cost.gradients == n * gradients, program.name


def test_attacks_on_a_mixtures_parts_are_told_at_the_pace_of_the_model_itself():
    session = dataclasses.replace(prepare("resnet18"), data=dataset())
    model = RouteToy()
    span = speed._span(session, model, "adaptive", False, speed.Seconds(0.0, 1.0, 0.0), 1)
    columns = protocols.load("adaptive").columns(0.1, "hard")
    parts = [program for program in plan(columns) if program.first.family == "mixture"]
    assert span.at_most == sum(speed.most(program, model, 10)[0] for program in parts) > 0


def test_a_random_model_is_judged_by_many_draws_and_followed_as_it_is(call):
    (model,) = told(call, "--defense", "noisy", "--samples", "128")["models"]
    assert model["rates"][2]["how"] == "as it is (random)"
    quick = next(span for span in model["protocols"] if span["protocol"] == "quick")
    assert quick["at_least"] == pytest.approx(DRAWS * SECONDS)


# --- how it is timed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each", "tried"), [(0.0, [8, 32, 100]), (0.02, [8, 32]), (0.1, [8])], ids=["quick", "slow", "very slow"]
)
def test_batches_grow_until_a_pass_takes_long_enough(monkeypatch, each, tried):
    seen = []

    def clock(work, device):
        work()
        return each * seen[-1] or 1e-3

    monkeypatch.setattr(speed, "fastest", clock)
    x, y = torch.zeros(100, 1, 2, 2), torch.zeros(100, dtype=torch.int64)
    rate = speed.images_per_second(lambda x, y: seen.append(len(x)), x, y)
    assert seen == tried
    assert rate == pytest.approx(1 / each if each else 100 / 1e-3)


def test_the_fastest_run_counts_and_the_first_does_not(monkeypatch):
    ticks = iter([0, 0.01, 1, 1.3, 2, 2.2, 3, 3.9])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    assert speed.fastest(lambda: None, torch.device("cpu")) == pytest.approx(0.2)


@pytest.mark.parametrize(("asked", "passed"), [([], 64), (["--batch-size", "16"], 16)])
def test_no_more_images_pass_at_once_than_an_evaluation_passes(call, asked, passed):
    words = ["--defense", "resnet18", "--dataset", "cifar10", "--set", "width=4", "--set", "epochs=1", *asked]
    (model,) = told(call, *words)["models"]
    assert model["batch"] == passed


# --- whose images ---------------------------------------------------------------------------------------------------


def test_noise_stands_for_images_that_are_not_there(tmp_path):
    data = load("cifar10", tmp_path)
    made = speed.noise(data, 50_000, 10_000)
    assert (len(made.train), len(made.test), made.shape) == (50_000, 10_000, data.shape)
    assert len({image.tobytes() for image in made.train.images[:500]}) == 500
    assert set(made.test.labels.tolist()) == set(range(10))
    assert list(tmp_path.iterdir()) == []


def test_no_dataset_file_is_asked_for(call):
    words = ["--defense", "resnet18", "--dataset", "svhn", "--set", "width=4", "--set", "epochs=1"]
    (model,) = told(call, *words, "--data-dir", "nowhere")["models"]
    assert model["samples"] == 26_032
    (training,) = model["training"]
    assert (training["recipe"], training["stages"][0]["epochs"]) == ("fast", 1)


def test_images_without_training_images_have_no_training_time(call, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    (tmp_path / "own").mkdir()
    np.savez(tmp_path / "own" / "test.npz", images=images, labels=np.arange(20) % 10)
    words = ["--defense", "resnet18", "--recipe", "tiny", "--dataset", f"npz:{tmp_path / 'own'}"]
    (model,) = told(call, *words)["models"]
    assert (model["samples"], model["training"]) == (20, [])


# --- what is printed ------------------------------------------------------------------------------------------------


def test_the_text_says_what_the_json_says(call):
    words = ["--defense", "known,resnet18", "--recipe", "tiny"]
    found = told(call, *words)
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    assert found["machine"]["name"] in out and found["machine"]["torch"] in out
    for model in found["models"]:
        assert f"{model['defense']} (tiny) on digits: {model['parameters']:,} parameters" in out
        for rate in model["rates"]:
            assert f"{100 * rate['share']:.1f} %" in out and rate["how"] in out
    assert len(re.findall(r"^  standard +at least .*, at most ", out, re.MULTILINE)) == 2
    beyond = [model for model in found["models"] if any(rate["share"] > 1 for rate in model["rates"])]
    assert out.count("above 100 %") == len(beyond) == 1
    assert re.search(r"^training:\nresnet18 \(tiny\) on digits", out, re.MULTILINE)


def test_all_trainings_are_told_of_where_all_are_asked_for(call, monkeypatch):
    from bench import pipeline

    monkeypatch.setattr(pipeline, "paces", lambda *arguments, **settings: [])
    (model,) = told(call, "--defense", "resnet18", "--recipe", "all", "--set", "width=4")["models"]
    assert model["recipe"] == "tiny"
    assert [row["recipe"] for row in model["training"]] == list(registry.get("resnet18").recipes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--defense", "nope"], "no defense named 'nope'"),
        (["--dataset", "cifar11"], "no dataset named 'cifar11'; did you mean 'cifar10'"),
        (["--recipe", "huge"], "has no recipe 'huge'; it has tiny, fast, paper"),
        (["--samples", "0"], "Invalid value for '--samples': 0 is not in the range"),
        (["--batch-size", "0"], "batch size must be at least 1, not 0"),
        (["--precision", "fp16"], "'fp16' is not one of 'fp32', 'tf32', 'bf16'"),
        (["--device", "gpu"], "no device 'gpu'; choose auto, cpu"),
        (["--dataset", "npz:nowhere"], "nowhere"),
        (["--defense", "hidden"], "hidden: .*carry no gradient"),
        (["--defense", "short"], r"short: this model cannot be evaluated: .*float logits \(8, 10\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_asked_wrongly_is_one_line(call, words, said):
    code, _, err = call("--json", *words)
    assert code == 2
    assert re.fullmatch(r"bench: [^\n]+\n", err), err
    assert re.search(said, err), err


@pytest.mark.parametrize("words", [["--help"], ["speed", "--help"]])
def test_help_imports_no_torch(words):
    code = (
        f"import sys; sys.argv = {['bench', *words]!r}\n"
        "from bench.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert "speed" in done.stdout
