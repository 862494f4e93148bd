"""Names for the shell to complete, with a line about each where the shell shows it. Needs no torch.

The scripts are click's: `bench completion bash` prints one, which calls `bench` with `_BENCH_COMPLETE` set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

#: the environment variable by which the shell asks
ASKED = "_BENCH_COMPLETE"


def answer(commands: click.Command, instruction: str) -> int:
    """Answers the shell; the exit code."""
    return shell_complete(commands, {}, "bench", ASKED, instruction)


#: what is changed in click's scripts, and to what: a name that ends in a colon is only begun, so that no blank follows it, which
#: fish knows by itself; and fish must not cut at every comma, since what is completed may be a list with commas
_CHANGED = {
    "bash": [
        (
            "COMPREPLY+=($value)\n",
            "COMPREPLY+=($value)\n            [[ $value == *: ]] && compopt -o nospace\n",
        )
    ],
    "zsh": [
        ("local -a response\n", "local -a response\n    local -a begun\n"),
        (
            'if [[ "$descr" == "_" ]]; then\n',
            'if [[ "$key" == *: ]]; then\n                begun+=("$key":"$descr")\n            elif [[ "$descr" == "_" ]]; then\n',
        ),
        (
            '    if [ -n "$completions" ]; then\n',
            "    if [ -n \"$begun\" ]; then\n        _describe -V unsorted begun -U -S ''\n    fi\n\n"
            '    if [ -n "$completions" ]; then\n',
        ),
    ],
    "fish": [('string split ","', 'string split --max 1 ","')],
}


def script(commands: click.Command, shell: str) -> str:
    """What makes a shell complete names: to be evaluated by bash or zsh, to be kept where fish looks."""
    kind = get_completion_class(shell)
    assert kind is not None
    source = kind(commands, {}, "bench", ASKED).source()
    for of_click, ours in _CHANGED[shell]:
        source = source.replace(of_click, ours)
    return source


def defense(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """One defense."""
    from bench import registry

    return _items({name: entry.summary for name, entry in registry.entries().items()}, incomplete)


def defenses(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Defenses that commas separate; those that stand there already are not offered again."""
    before, comma, last = incomplete.rpartition(",")
    there = before.split(",")
    return [
        CompletionItem(before + comma + item.value, help=item.help)
        for item in defense(context, parameter, last)
        if item.value not in there
    ]


def dataset(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A dataset."""
    from bench import data

    return _items({name.removesuffix("DIR"): about for name, about in data.names().items()}, incomplete)


def protocol(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A protocol that comes with the harness, or a file here."""
    from bench import protocol as protocols

    files = {str(file): "a protocol of yours" for file in sorted(Path().glob("*.toml"))}
    return _items({**protocols.names(), **files}, incomplete)


def attack(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """An attack."""
    from bench.protocol import ATTACKS

    return _items(ATTACKS, incomplete)


def _items(names: Mapping[str, str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=about) for name, about in names.items() if name.startswith(incomplete)]
