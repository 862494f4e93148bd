"""The shell completes names, quickly: no torch is imported for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class
from click.testing import CliRunner

from bench import registry
from bench.cli import commands
from bench.completion import _CHANGED, ASKED

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "pandas", "pyarrow", "matplotlib", "scipy", "sklearn")


def asked(words, kind="bash"):
    """What a shell is answered to these words, the last of which is incomplete."""
    code = "from bench.cli import main\ntry: main()\nfinally:\n import sys\n"
    code += f" print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    environment = {
        **os.environ,
        "_BENCH_COMPLETE": f"{kind}_complete",
        "COMP_WORDS": f"bench {words}",
        "COMP_CWORD": str(len(words.split(" "))) if kind != "fish" else words.split(" ")[-1],
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=True,
    )
    assert done.stderr == "[]\n"
    return done.stdout.splitlines()


def offered(words):
    """The same, answered in this process."""
    *before, last = words.split(" ")
    return [item.value for item in ShellComplete(commands, {}, "bench", "").get_completions(before, last)]


def test_a_defense_is_completed_without_torch():
    assert asked("run --defense dw") == ["plain,dwf"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("tr", ["train"]),
        ("run --defense dwf,ad", ["dwf,advmoe"]),
        ("run --defense resnet18,dw", ["resnet18,dwf"]),
        ("run --defense dwf,dw", []),
        ("run --defense tim", ["timm:"]),
        ("run --dataset ci", ["cifar10", "cifar100"]),
        ("run --dataset np", ["npz:"]),
        ("run --protocol sta", ["standard-l2", "standard"]),
        ("run --attack 8", ["8-bit"]),
        ("run --prec", ["--precision"]),
        ("run --precision b", ["bf16"]),
        ("check dw", ["dwf"]),
        ("train --defense dw", ["dwf"]),
        ("speed --defense dw", ["dwf"]),
        ("power --defense soe,dw", ["soe,dwf"]),
        ("power --protocol qu", ["quick"]),
        ("table --compare-to pgd", ["pgd_at"]),
        ("plot --heatmaps imm", ["immunity"]),
        ("list def", ["defenses"]),
        ("completion f", ["fish"]),
    ],
)
def test_what_is_begun_is_completed(words, names):
    assert offered(words) == names


def test_every_defense_is_offered_where_nothing_is_typed_yet():
    assert offered("run --defense ") == list(registry.entries())


def test_a_protocol_of_ones_own_is_offered(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert offered("run --protocol mi") == ["mine.toml"]


def test_zsh_and_fish_are_told_a_line_about_each_name():
    summary = registry.entries()["dwf"].summary
    assert asked("run --defense dw", "zsh") == ["plain", "dwf", summary]
    assert asked("run --defense dw", "fish") == [f"plain,dwf\t{summary}"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_asks_bench_for_what_fits(shell):
    done = CliRunner().invoke(commands, ["completion", shell])
    assert done.exit_code == 0 and f"_BENCH_COMPLETE={shell}_complete" in done.output


@pytest.mark.parametrize(
    ("shell", "kept", "gone"),
    [
        ("fish", 'string split --max 1 ","', 'split ","'),
        ("bash", "[[ $value == *: ]] && compopt -o nospace", None),
        ("zsh", "_describe -V unsorted begun -U -S ''", None),
    ],
)
def test_lists_with_commas_stay_whole_and_no_blank_follows_what_is_only_begun(shell, kept, gone):
    script = CliRunner().invoke(commands, ["completion", shell]).output
    assert kept in script and (gone is None or gone not in script)


@pytest.mark.parametrize(
    ("shell", "of_click"), [(shell, old) for shell, changes in _CHANGED.items() for old, _ in changes]
)
def test_what_is_changed_stands_in_clicks_script_once(shell, of_click):
    assert get_completion_class(shell)(commands, {}, "bench", ASKED).source().count(of_click) == 1


def test_bash_completes_by_its_script(tmp_path):
    (tmp_path / "bench").write_text(f'#!/bin/sh\nexec {sys.executable} -m bench "$@"\n')
    (tmp_path / "bench").chmod(0o755)
    script = (
        'eval "$(bench completion bash)"; COMP_WORDS=(bench run --defense dw); COMP_CWORD=3;'
        " _bench_completion bench; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == "dwf\n"
