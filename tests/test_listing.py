"""`bench list defenses`: one line each, with kind, paper, cost and whether it is trained here."""

import pytest
import torch
from costs import cost, said

from bench import listing, registry
from bench.data import load
from bench.moe import as_mixture

OURS = [name for name in registry.entries() if not name.endswith(":")]


@pytest.fixture
def results(tmp_path):
    """A results folder with trainings that are finished, and one that was stopped."""
    for folder in ("digits/dwf/tiny-0a", "digits/dwf/tiny-0b", "cifar10/dwf/fast-0c"):
        (tmp_path / "checkpoints" / folder).mkdir(parents=True)
        (tmp_path / "checkpoints" / folder / "model.safetensors").touch()
    (tmp_path / "checkpoints" / "digits" / "soe" / "tiny-0d").mkdir(parents=True)
    (tmp_path / "checkpoints" / "digits" / "soe" / "tiny-0d" / "state.pt").touch()
    return tmp_path


@pytest.mark.parametrize("name", OURS)
def test_every_defense_says_its_kind_its_paper_and_its_cost(name):
    entry = registry.entries()[name]
    assert entry.kind and entry.paper and entry.cost


@pytest.mark.parametrize("name", [name for name in OURS if registry.entries()[name].kind != "plain network"])
def test_a_kind_is_what_the_network_is(name):
    kind = registry.get(name)
    defense = kind(kind.recipes["tiny"])
    mixture = as_mixture(defense.build(load("digits")))
    words = (
        "adversarial training"
        if mixture is None
        else f"{'random' if kind.random else 'soft' if mixture.soft else 'hard'} mixture"
    )
    assert registry.entries()[name].kind == words


def test_a_cost_is_what_training_takes():
    assert registry.entries()["fgsm_at"].cost == said(*cost("fgsm_at"))


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_every_cost_is_what_training_takes(name):
    torch.set_num_threads(1)
    assert registry.entries()[name].cost == said(*cost(name))


def test_trained_is_what_has_a_finished_checkpoint(results):
    assert listing.trained(results) == {"dwf": ["cifar10 (fast)", "digits (tiny)"]}
    assert listing.trained(results / "nowhere") == {}


def test_a_line_has_everything_under_its_heading(results):
    known = listing.everything("defenses", results)
    head, *lines = listing.as_text("defenses", known).splitlines()
    (line,) = (line for line in lines if line.startswith("  dwf "))
    at = {heading: head.index(heading) for heading in listing.HEADINGS.values()}
    assert line[at["kind"] :].startswith("soft mixture  ")
    assert line[at["paper"] :].startswith("arXiv 2512.20821  ")
    assert line[at["trained here"] :] == "cifar10 (fast), digits (tiny)"
    assert len(lines) == len(registry.entries())


def test_what_is_not_known_is_a_dash(results, monkeypatch):
    def mine(data):
        """Mine."""

    monkeypatch.setitem(registry._registered, "mine", registry._Registered(mine, "nowhere"))
    line = listing.as_text("defenses", listing.everything("defenses", results)).splitlines()[-1]
    assert line.split() == ["mine", "-", "-", "-", "-"]


def test_a_plugin_tells_in_its_docstring_what_ours_tell(results, monkeypatch):
    def mine(data):
        """Mine (arXiv 1234.56789).

        Kind: soft mixture.
        Cost: next to nothing
        """

    monkeypatch.setitem(registry._registered, "mine", registry._Registered(mine, "nowhere"))
    entry = registry.entries()["mine"]
    assert (entry.kind, entry.paper, entry.cost) == ("soft mixture", "arXiv 1234.56789", "next to nothing")
