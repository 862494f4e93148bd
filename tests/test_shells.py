"""Completion in the shells themselves: their script is sourced, a line is typed at a terminal, and Tab is pressed."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from bench.data import names

pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed: pip install -e '.[dev]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
#: Ctrl-X S: has the shell write the line as it stands, and empty it
WRITE = "\x18s"
#: how each shell starts with nothing of the user's, and what it is told before it is asked
SHELLS = {
    "bash": (
        ["--noprofile", "--norc", "-i"],
        """
        eval "$(bench completion bash)"
        told() { printf '%s' "$READLINE_LINE" > line; READLINE_LINE=; READLINE_POINT=0; echo tol''d; }
        bind -x '"\\C-xs": told'
        """,
    ),
    "zsh": (
        ["-f", "-i"],
        """
        autoload -Uz compinit; compinit -D
        eval "$(bench completion zsh)"
        told() { print -rn -- "$BUFFER" > line; BUFFER=; zle -I; echo tol''d; }
        zle -N told; bindkey '^xs' told
        """,
    ),
    "fish": (
        ["--no-config", "-i"],
        """
        bench completion fish | source
        function told; commandline > line; commandline ''; echo tol''d; end
        bind \\cxs told
        """,
    ),
}


@pytest.fixture(scope="module", params=SHELLS)
def shell(request, tmp_path_factory):
    """A terminal with this shell in it, which knows our completion."""
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} is installed: apt-get install {request.param}")
    place = tmp_path_factory.mktemp(request.param)
    (place / "bench").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m bench "$@"\n')
    (place / "bench").chmod(0o755)
    (place / "mine.toml").touch()
    environment = {
        **os.environ,
        **{
            "PATH": f"{place}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(place),
            "TERM": "xterm",
        },
    }
    options, told = SHELLS[request.param]
    terminal = pexpect.spawn(
        request.param,
        options,
        cwd=str(place),
        env=environment,
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 120),
    )
    for line in told.strip().splitlines():
        terminal.sendline(line.strip())
    terminal.sendline("echo rea''dy")
    terminal.expect("ready")
    yield Terminal(terminal, place)
    terminal.close(force=True)


class Terminal:
    def __init__(self, terminal, place):
        self.terminal, self.place = terminal, place

    def typed(self, words):
        """The line after these words and Tab."""
        self.terminal.send(f"{words}\t{WRITE}")
        self.terminal.expect("told")
        return (self.place / "line").read_text().rstrip("\n")


# a blank after it says that a word is complete
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("bench ru", "bench run "),
        ("bench run --def", "bench run --defense "),
        ("bench run --defense dw", "bench run --defense dwf "),
        ("bench run --defense resnet18,dw", "bench run --defense resnet18,dwf "),
        ("bench run --dataset dig", "bench run --dataset digits "),
        ("bench run --dataset ci", "bench run --dataset cifar10"),
        ("bench run --dataset np", "bench run --dataset npz:"),
        ("bench run --defense tim", "bench run --defense timm:"),
        ("bench run --defense dwf,tim", "bench run --defense dwf,timm:"),
        ("bench run --protocol mi", "bench run --protocol mine.toml "),
        ("bench run --precision b", "bench run --precision bf16 "),
        ("bench table --compare-to pgd_", "bench table --compare-to pgd_at "),
        ("bench list def", "bench list defenses "),
        ("bench run --defense zz", "bench run --defense zz"),
    ],
)
def test_tab_completes_what_is_begun(shell, words, completed):
    assert shell.typed(words) == completed


def test_names_are_listed_with_a_line_about_each_where_the_shell_shows_it(shell):
    if Path(shell.terminal.command).name == "bash":
        pytest.skip("bash shows names alone")
    shell.terminal.send("bench run --dataset cifar10\t")
    shell.terminal.expect(names()["cifar100"][:20])
    shell.typed("")
