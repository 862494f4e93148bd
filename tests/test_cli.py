"""The command line: results on standard output, one line for every mistake, the right exit code, nothing lost."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bench
from bench import pipeline
from bench.cli import main
from bench.evaluate import Evaluator
from bench.long import HEADER

ROOT = Path(__file__).parent.parent
PLUGIN = """
import torch
from torch import nn
import bench

@bench.register("fine")
def fine(data):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
PROTOCOL = 'name = "one"\n[[column]]\nattack = "fgsm"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a plugin, a protocol, and results of a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "one.toml").write_text(PROTOCOL)
    bench.run(
        defense="fine",
        protocol=str(folder / "one.toml"),
        plugin=folder / "plugin.py",
        results=folder / "results",
        samples=20,
        quiet=True,
    )
    (folder / "results" / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Runs `bench` here: exit code, standard output, standard error."""

    def run(*words):
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def lying_in(folder):
    return {
        file.relative_to(folder): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def refused(place, call):
    """Runs `bench`, which must say this in one line, exit with this code and change no result."""

    def run(words, said, code=2):
        before = lying_in(place / "results")
        found, out, err = call(*words)
        after = lying_in(place / "results")
        assert (found, out) == (code, ""), err
        assert re.fullmatch(r"bench: [^\n]+\n", err), err
        assert re.search(said, err), err
        assert {file: after.get(file) for file in before} == before
        assert not [
            file for file in set(after) - set(before) if file.name in ("record.json", "outcomes.parquet")
        ]

    return run


FINE = [
    "run",
    "--plugin",
    "plugin.py",
    "--defense",
    "fine",
    "--protocol",
    "one.toml",
    "--samples",
    "20",
    "--quiet",
]


# --- what is printed


def test_help_is_one_page_with_every_command(call):
    for words in (["--help"], ["-h"]):
        code, out, err = call(*words)
        assert code == 0 and err == ""
        for command in ("run", "train", "table", "plot", "list"):
            assert re.search(rf"^  {command} ", out, re.MULTILINE)


def test_bench_alone_says_five_lines_each_with_a_command_that_exists(call):
    code, out, err = call()
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 5)
    for line in lines:
        command, _ = re.split("  +", line)
        assert call(*command.split()[1:], "--help")[0] == 0, command


def test_the_version_is_the_packages(call):
    assert call("--version") == (0, f"bench, version {bench.__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["list"],
        ["list", "defenses"],
        ["list", "--json"],
        ["completion", "bash"],
    ],
)
def test_what_needs_no_model_imports_no_torch(words):
    heavy = ("torch", "torchvision", "timm", "pandas", "pyarrow", "matplotlib", "scipy", "sklearn")
    code = (
        f"import sys; sys.argv = {['bench', *words]!r}\n"
        "from bench.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_list_prints_every_name_with_a_line_about_it(call):
    code, out, err = call("list")
    assert (code, err) == (0, "")
    for heading, name in (
        ("defenses", "dwf"),
        ("defenses", "timm:NAME"),
        ("datasets", "digits"),
        ("protocols", "dwf-paper"),
        ("attacks", "pgd"),
    ):
        assert re.search(rf"^{heading}:\n(  .*\n)*  {name} +\S", out, re.MULTILINE), name


def test_list_of_one_kind_has_no_headings(call):
    _, out, _ = call("list", "datasets")
    assert out.startswith("  digits ") and ":\n" not in out


def test_list_shows_what_a_plugin_registers(call):
    _, out, _ = call("list", "defenses", "--plugin", "plugin.py", "--json")
    assert "fine" in json.loads(out)["defenses"]


def test_a_list_of_defenses_says_what_is_trained_here(call, place):
    folder = place / "results" / "checkpoints" / "digits" / "dwf" / "tiny-0a"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    try:
        assert re.search(r"^  dwf  .*  digits \(tiny\)$", call("list", "defenses")[1], re.MULTILINE)
        assert json.loads(call("list", "--json")[1])["defenses"]["dwf"]["trained"] == ["digits (tiny)"]
        assert "digits (tiny)" not in call("list", "defenses", "--results", "elsewhere")[1]
    finally:
        shutil.rmtree(place / "results" / "checkpoints")


def test_the_doctor_speaks_in_words_or_in_json(call):
    code, out, err = call("doctor")
    assert (code, err) == (0, "") and out.startswith("machine ") and "what would help:" in out
    assert json.loads(call("doctor", "--json")[1])["runs"]["there"]


def test_a_run_prints_its_table_and_nothing_else(call):
    code, out, err = call(*FINE)
    assert code == 0 and "fine" in out and not out.endswith("\n\n")
    assert [line.split(",")[0].split(":")[0] for line in err.splitlines()] == ["fine", "records", "audit"]


def test_a_run_as_json_is_the_long_table(call):
    code, out, _ = call(*FINE, "--json")
    rows = json.loads(out)
    assert code == 0 and [list(row) for row in rows] == [list(HEADER)] * 3
    assert [row["attack"] for row in rows] == ["clean", "fgsm", "worst-case"] and rows[0]["std"] is None


def test_the_long_table_as_csv_has_the_columns_of_the_contract(call):
    code, out, err = call("table", "--layout", "long", "--format", "csv")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == (
        "dataset,defense,protocol,attack,epsilon,step_size,steps,restarts,eot,accuracy,ci_low,ci_high,n,seeds,std"
    )
    assert out.splitlines()[1].startswith("digits,fine,one,clean,")


def test_an_explanation_is_printed_and_nothing_is_done(call, place):
    before = lying_in(place / "results")
    code, out, err = call(*FINE, "--samples", "7", "--explain", "--results", "elsewhere")
    assert (code, err) == (0, "") and "7 images" in out and "fgsm" in out
    assert lying_in(place / "results") == before and not (place / "elsewhere").exists()


def test_settings_reach_the_config(call, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "train_session", lambda session: seen.extend(session.jobs) or [])
    code, _, _ = call(
        "train", "--defense", "resnet18", "--set", "width=4", "--set", "lr=0.05", "--set", "mean=[0.5]"
    )
    (job,) = seen
    assert (
        code == 0
        and (job.config.width, job.config.mean) == (4, (0.5,))
        and job.config.lr == pytest.approx(0.05)
    )


def test_training_prints_where_the_weights_are(call, monkeypatch):
    monkeypatch.setattr(pipeline, "train_session", lambda session: [Path("a/model.safetensors")])
    assert call("train", "--defense", "resnet18")[:2] == (0, "a/model.safetensors\n")


# --- what is asked wrongly


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--defense", "fien"], "no defense named 'fien'; did you mean 'fine'"),
        (["--defense", "fine,,dwf"], "no defense named ''"),
        (["--defense", "timm:"], "'timm:' stands for many"),
        (["--defense", "nowhere:f"], "no module named 'nowhere'"),
        (["--dataset", "digit"], "no dataset named 'digit'; did you mean 'digits'"),
        (["--dataset", "npz:nowhere"], "no folder 'nowhere'"),
        (["--protocol", "dwf-papre"], "no protocol named 'dwf-papre'; did you mean 'dwf-paper'"),
        (["--protocol", "nowhere.toml"], "cannot read the protocol 'nowhere.toml': No such file"),
        (["--attack", "pdg"], "no attack named 'pdg'; did you mean 'pgd'"),
        (["--attack", "pgd"], "pgd needs steps"),
        (["--recipe", "huge"], "'fine' has no recipe 'huge'; it has tiny, fast, paper"),
        (["--recipe", "tyni"], "'fine' has no recipe 'tyni'; .*; did you mean 'tiny'"),
        (["--device", "cdua"], "no device 'cdua'; .*; did you mean 'cuda'"),
        (["--precision", "pf16"], "'pf16' is not one of .*; did you mean 'bf16'"),
        (["--protocl", "quick"], "No such option.*--protocl.*--protocol"),
        (["--defense", "timm:resnet81"], "timm has no model named 'resnet81'; did you mean 'timm:resnet18'"),
        (["--defense", "os:getcdw"], "module 'os' has no 'getcdw'; did you mean 'getcwd'"),
        (["--recipe", ""], "'fine' has no recipe ''; it has tiny, fast, paper"),
        (
            ["--defense", "rter", "--recipe", "huge"],
            "'rter' has no recipe 'huge'; it has tiny, fast, sgd, paper",
        ),
        (["--defense", "rter,dwf", "--recipe", "sgd"], "'dwf' has no recipe 'sgd'; it has tiny, fast, paper"),
        (["--set", "width=3"], "no setting named 'width'"),
        (["--set", "width"], "--set 'width' is not KEY=VALUE"),
        (["--set", "=3"], "--set '=3' is not KEY=VALUE"),
        (["--device", "gpu"], "no device 'gpu'; choose auto, cpu"),
        (["--device", "meta"], "no device 'meta'"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--precision", "fp16"], "'fp16' is not one of 'fp32', 'tf32', 'bf16'"),
        (
            ["--precision", "tf32", "--device", "cpu"],
            "tf32 is how NVIDIA GPUs .* choose fp32 or bf16, or --device cuda",
        ),
        (["--eps", "0"], "eps must be more than 0 and at most 1.*got 0"),
        (["--eps", "-1"], "eps must be more than 0.*got -1"),
        (["--eps", "2"], "at most 1, in pixel units.*got 2"),
        (["--eps", "abc"], "eps: 'abc' is not a number; write 0.03 or 8/255"),
        (["--eps", "8/0"], "eps: '8/0' is not a number"),
        (["--eps", "nan"], "eps: 'nan' is not a finite number"),
        (["--eps", "inf"], "eps: 'inf' is not a finite number"),
        (["--samples", "0"], "digits has 360 test images; --samples must be from 1 to 360, not 0"),
        (["--samples", "361"], "--samples must be from 1 to 360, not 361"),
        (["--samples", "many"], "'many' is not a valid integer"),
        (["--seeds", "0"], "seeds at least 1, not 0 and 0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--batch-size", "0"], "batch size must be at least 1, not 0"),
        (["--checkpoint", "nowhere.pt"], "no checkpoint file 'nowhere.pt'"),
        (
            ["--checkpoint", "x.pt", "--defense", "fine,dwf"],
            "one checkpoint for 2 defenses; give --defense one name",
        ),
        (["--plugin", "nowhere.py"], "no plugin file 'nowhere.py'"),
        (["--plugin", "plugins.py"], "no plugin file 'plugins.py'.*; did you mean 'plugin.py'"),
        (["--defense", "tim:resnet18"], "no module named 'tim'.*; did you mean 'timm:'"),
        (["--results", "one.toml"], "cannot write the results folder 'one.toml': File exists"),
        (["--results", "one.toml/x"], "cannot write the results folder 'one.toml/x': Not a directory"),
        (["--nonsense"], r"No such option.*--nonsense.*try `bench run --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_asked_wrongly_is_one_line(refused, words, said):
    refused([*FINE, *words], said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["table", "--format", "docx"], "'docx' is not one of 'text', 'markdown', 'latex', 'csv'"),
        (["table", "--layout", "wide"], "'wide' is not one of 'paper', 'long'"),
        (["table", "--results", "nowhere"], "no results folder 'nowhere'; `bench run` makes one"),
        (["table", "--results", "one.toml/x"], "no results folder 'one.toml/x'"),
        (["plot", "--results", "nowhere"], "no results folder 'nowhere'"),
        (["plot"], "no finished dwf-paper or sweep runs in 'results'"),
        (["list", "models"], "'models' is not one of 'defenses'"),
        (["list", "defense"], "'defense' is not one of .*; did you mean 'defenses'"),
        (["table", "--format", "latx"], "'latx' is not one of .*; did you mean 'latex'"),
        (["completion", "bsh"], "'bsh' is not one of .*; did you mean 'bash'"),
        (["rnu"], "did you mean 'run'|Did you mean 'run'"),
        (
            ["power", "--defense", "fine,fine", "--protocol", "oen"],
            "no runs of oen on digits; .*; did you mean 'one'",
        ),
        (["audit", "fien"], "no run fits 'fien' .*; did you mean 'fine'"),
        (["table", "--compare-to", "fien"], "no defense named 'fien'; did you mean 'fine'"),
        (
            ["train", "--defense", "resnet18", "--set", "epoch=1"],
            "no setting named 'epoch'.*; did you mean 'epochs'",
        ),
        (["list", "--plugin", "nowhere.py"], "no plugin file 'nowhere.py'"),
        (
            ["train", "--plugin", "plugin.py", "--defense", "fine"],
            "'fine' has nothing to train; `bench run` evaluates it",
        ),
        (["train", "--defense", "resnet18", "--set", "lr=-1"], "resnet18: bad setting: lr|lr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_say_in_one_line_what_is_wrong(refused, words, said):
    refused(words, said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'name = "one\n', "bad.toml is not TOML: .*line 1"),
        (b"\xff\xfe", "cannot read the protocol 'bad.toml'"),
        (PROTOCOL.replace("fgsm", "fgms").encode(), "bad.toml, line 3: .*did you mean 'fgsm'"),
        (b'name = "one"\n', "bad.toml: column: Field required"),
        (PROTOCOL.encode() + b"eps = 2\n", "bad.toml, line 4: .*less than or equal to 1"),
    ],
    ids=["cut short", "bytes", "unknown attack", "no column", "radius"],
)
def test_a_protocol_that_cannot_be_read_is_one_line(refused, place, content, said):
    (place / "bad.toml").write_bytes(content)
    refused([*FINE, "--protocol", "bad.toml"], said)


def test_a_radius_that_the_protocol_does_not_use_must_be_one_all_the_same(refused, place):
    (place / "fixed.toml").write_text(PROTOCOL + "eps = 0.1\n")
    words = ["run", "--plugin", "plugin.py", "--defense", "fine", "--protocol", "fixed.toml", "--eps", "2"]
    refused(words, "eps must be more than 0 and at most 1")


# --- files that are damaged


def linear(features=64):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 10)).state_dict()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: torch.save(linear(32), file), r"1\.weight \(10, 32\) instead of \(10, 64\)"),
        (
            lambda file: torch.save({"conv.weight": torch.zeros(3)}, file),
            "does not fit .*missing 1.weight, 1.bias",
        ),
        (lambda file: (torch.save(linear(), file), os.truncate(file, 600)), "is damaged or no checkpoint"),
        (lambda file: file.write_bytes(b"no weights at all"), "is damaged or no checkpoint"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes((9999).to_bytes(8, "little") + b"{}"), "is damaged"),
        (lambda file: torch.save(nn.Linear(1, 1), file), "not tensors alone; refused"),
        (
            lambda file: torch.save({k: v * float("nan") for k, v in linear().items()}, file),
            "has NaN or infinite values",
        ),
    ],
    ids=["shapes", "keys", "truncated", "text", "empty", "safetensors", "pickle", "nan"],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(refused, tmp_path, make, said):
    make(tmp_path / "weights.pt")
    refused([*FINE, "--checkpoint", tmp_path / "weights.pt"], said)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (
            {"x": np.zeros((4, 8, 8), np.uint8)},
            "has no `images`; it needs `images` and `labels`, and holds x",
        ),
        (
            {"images": np.zeros((4, 8, 8)), "labels": np.arange(4)},
            "`images` are float64; store them as uint8",
        ),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(3)}, "has 4 images and 3 labels"),
        (
            {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4) - 1},
            "has the label -1; labels count from 0",
        ),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_line(refused, tmp_path, arrays, said):
    np.savez(tmp_path / "test.npz", **arrays)
    refused([*FINE, "--dataset", f"npz:{tmp_path}"], said)


def test_a_record_that_was_cut_short_is_one_line_and_stays(place, call):
    (file,) = (place / "results").rglob("record.json")
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:300])
        for words in (FINE, ["table"]):
            code, out, err = call(*words)
            assert (code, out) == (2, "") and re.fullmatch(
                r"bench: [^\n]*record.json is no record [^\n]*\n", err
            )
            assert file.read_bytes() == whole[:300]
    finally:
        file.write_bytes(whole)


# --- plugins


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n1 / 0\n", "plugin bad.py, line 2, raises ZeroDivisionError: division by zero"),
        ("def f(:\n", r"plugin bad.py raises SyntaxError: .*\(bad.py, line 1\)"),
        ("raise ValueError('one\\n\\ntwo')\n", "plugin bad.py, line 1, raises ValueError: one two"),
        (PLUGIN.replace('"fine"', '"dwf"'), "'dwf' is registered by defenses.dwf already"),
    ],
)
def test_a_plugin_that_fails_at_import_is_one_line(refused, tmp_path, content, said):
    (tmp_path / "bad.py").write_text(content)
    refused([*FINE, "--plugin", tmp_path / "bad.py"], said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "return self.net(x) * float('nan')",
            "bad: this model cannot be evaluated: logits are NaN or infinite for 32",
        ),
        ("return self.net(x)[:, :9]", r"float logits \(32, 10\) for 10 classes, but returned \(32, 9\)"),
        ("return self.net(x), 1", "for 10 classes, but returned a tuple"),
        ("return self.net(x).softmax(1)[0]", r"but returned \(10,\)"),
        ("return self.net(x).argmax(1)", r"but returned \(32,\) torch.int64"),
        ("raise KeyError('first\\nsecond')", "the model raised KeyError: 'first"),
        ("return self.net(x).detach()", "the model's logits carry no gradient to its input"),
        (
            "return self.net(x) if not x.requires_grad else missing",
            "the model raised NameError: name 'missing'",
        ),
        (
            "return torch.where(x.sum((1, 2, 3), keepdim=True)[:, :, 0, 0] > 24.5, float('nan'), 1.) * self.net(x)",
            r"logits are NaN or infinite for \d+",
        ),
    ],
    ids=["nan", "classes", "tuple", "shape", "labels", "raises", "detached", "in backward", "nan for some"],
)
def test_a_model_that_cannot_be_evaluated_is_one_line_and_no_result(refused, tmp_path, body, said):
    (tmp_path / "bad.py").write_text(
        "import bench\nimport torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        f"    def forward(self, x):\n        {body}\n"
        "@bench.register('bad')\ndef bad(data):\n    return Net()\n"
    )
    refused([*FINE, "--plugin", tmp_path / "bad.py", "--defense", "bad", "--samples", "360"], said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no\\nroom')", r"'bad' \(bad.py, line 5\) raises RuntimeError: no room"),
        ("return None", "'bad' returned a NoneType; a registered function must return an nn.Module"),
        ("return nn.Linear(data.nonsense, 1)", r"'bad' \(bad.py, line 5\) raises AttributeError"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(refused, tmp_path, body, said):
    content = f"import bench\nfrom torch import nn\n@bench.register('bad')\ndef bad(data):\n    {body}\n"
    (tmp_path / "bad.py").write_text(content)
    refused([*FINE, "--plugin", tmp_path / "bad.py", "--defense", "bad"], said)


# --- how it ends


def test_an_interruption_is_one_line_and_says_how_to_go_on(refused, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "run", stop)
    refused(
        [*FINE, "--seed", "7"],
        "stopped with 0 of 20 images done; .*the same command goes on from there",
        code=130,
    )


def test_an_interruption_anywhere_else_is_one_line_too(refused, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.session.prepare", stop)
    refused(FINE, "interrupted; what was finished is kept, the same command goes on from there", code=130)


def test_a_crash_of_an_attack_is_a_bug_and_still_one_line(refused, monkeypatch):
    def crash(*args, **options):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("bench.trial.sweep", crash)
    refused([*FINE, "--seed", "8"], "run void: the attack raised ZeroDivisionError: inside", code=1)


def test_a_bug_of_ours_shows_where_and_asks_for_a_report(call, monkeypatch):
    monkeypatch.setattr("bench.session.prepare", lambda **options: {}["ours"])
    code, out, err = call(*FINE)
    assert (code, out) == (1, "") and "Traceback" in err and "KeyError: 'ours'" in err
    assert err.splitlines()[-1] == "bench: this is a bug of ours; please report it with the lines above"


def test_a_reader_who_has_heard_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    # with a buffer, as in a shell, where what was not written comes up again at exit
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "list"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_traceback_of_a_mistake_is_shown_when_it_is_asked_for(call, monkeypatch):
    monkeypatch.setenv("BENCH_DEBUG", "1")
    code, _, err = call(*FINE, "--eps", "0")
    assert code == 2 and err.startswith("Traceback") and err.splitlines()[-1].startswith("bench: eps must be")


@pytest.mark.parametrize("yes", [False, True])
def test_a_question_is_asked_on_a_terminal_unless_yes_was_said(monkeypatch, yes):
    from bench.cli import _arguments

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert (_arguments(defense=None, settings=(), yes=yes)["ask"] is None) is yes


@pytest.mark.slow
def test_a_mistake_is_one_line_in_a_process_of_its_own_too(place):
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", "--defense", "rsenet18"],
        capture_output=True,
        text=True,
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"bench: no defense named 'rsenet18'; did you mean 'resnet18'\?[^\n]*\n", done.stderr)
