"""The pages that mkdocs makes as it builds are what the code has."""

import csv
import importlib.util
from pathlib import Path

import pytest

from bench import protocol, registry

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_protocol_is_there_with_its_file(pages):
    page = pages.protocols()
    for name, about in protocol.names().items():
        assert f"## {name}\n\n{about}\n" in page
    assert (ROOT / "bench" / "protocols" / "standard.toml").read_text() in page


def test_every_defense_is_there_with_what_its_file_says(pages):
    page = pages.defenses()
    for name, one in registry.entries().items():
        assert f"| `{name}" in page and one.cost in page
    assert "Reported: CIFAR-10, ResNet-18 experts" in page


def test_rows_that_a_paper_prints_are_those_of_the_file(pages):
    marked = "before\n<!-- published: fgsm of ADVMoE on cifar10 -->\nafter"
    head, _, row = pages.on_page_markdown(marked, None, None, None).splitlines()[1:4]
    lines = csv.DictReader((pages.PUBLISHED / "paper_table_fgsm.csv").read_text().splitlines())
    printed = [r for r in lines if (r["dataset"], r["model"], r["attack"]) == ("cifar10", "ADVMoE", "fgsm")]
    assert head == f"| cifar10, fgsm | {' | '.join(r['setting'] for r in printed)} |"
    assert row == f"| ADVMoE | {' | '.join(r['accuracy_mean'] for r in printed)} |"
    assert len(printed) == 9


def test_a_row_that_no_paper_prints_stops_the_build(pages):
    with pytest.raises(ValueError, match="no fgsm of NoSuch on cifar10"):
        pages.published("fgsm", "ADVMoE, NoSuch", "cifar10")
