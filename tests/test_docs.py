"""What the documents say is tried."""

import re

import pytest
import tables

import bench
from bench import registry
from bench.protocol import Protocol, tomllib

README = (tables.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", tables.tables(), ids=lambda path: path.name)
def test_every_table_is_byte_for_byte_what_its_records_give(path):
    assert path.read_text(encoding="utf-8") == tables.tables()[path]


def test_every_network_of_the_grid_has_a_name_of_its_own():
    named = {}
    for group in tables.named():
        named.setdefault((group.label, group.protocol), []).append(group)
    assert [name for name, found in named.items() if len(found) > 1] == []
    assert {one.label.removesuffix(tables.AGAIN) for one in tables.named()} <= {
        row.name for row in tables.grid.CPU.rows
    }


@pytest.mark.parametrize("root", [tables.MEASURED, tables.CIFAR], ids=lambda root: root.name)
def test_the_kept_figures_show_what_the_records_give(root):
    assert tables.stale_figures(root) == []


def test_the_readmes_defense_is_registered_trained_and_evaluated(tmp_path):
    (example,) = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    plugin = tmp_path / "my_defense.py"
    plugin.write_text(example)
    frame = bench.run(
        defense="mine",
        dataset="digits",
        protocol="quick",
        plugin=plugin,
        results=tmp_path / "results",
        samples=100,
        quiet=True,
    )
    clean, *attacked = frame.accuracy
    assert clean > 60 and all(value < clean for value in attacked)
    assert registry.entries()["mine"].summary == "A small network trained on PGD images."


def test_the_readmes_protocol_is_valid():
    (example,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    columns = Protocol.model_validate(tomllib.loads(example)).columns(0.1)
    whole = [c.name for c in columns if c.part_of is None]
    assert whole == ["clean", "pgd-20x5-margin", "pgd-100x5-margin", "autoattack"]


def test_the_readmes_test_command_is_what_ci_runs():
    (command,) = re.findall(r"^tox run -e .*$", (tables.ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert f"\n{command}\n" in README


def test_every_command_of_the_readme_parses():
    from click.testing import CliRunner

    from bench.cli import commands

    lines = [line.split("#")[0].split() for line in README.split("\n") if line.startswith("bench ")]
    assert len(lines) >= 10
    for words in lines:
        done = CliRunner().invoke(commands, [*words[1:], "--help"])
        assert done.exit_code == 0, words
        for option in (word for word in words if word.startswith("--")):
            assert option in done.output, option


def test_exported_names_exist():
    for name in bench.__all__:
        assert getattr(bench, name) is not None
