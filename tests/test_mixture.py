"""Adaptive attacks on mixtures: what gradients alone do not see, they find; and they claim nothing that is not so."""

import numpy as np
import pytest
import torch
from oracles import points, small_net
from routed_toys import RouteToy
from selection_toys import SelectionToy
from torch import nn

from bench import protocol as protocols
from bench.attacks import mixture as mixtures
from bench.certify import Certificate
from bench.data import Split
from bench.evaluate import Evaluator
from bench.moe import as_mixture
from bench.plan import plan
from bench.protocol import BOUND, HARD, SOFT, Protocol


class Blend(nn.Module):
    """A small mixture of convolutional experts, hard or soft."""

    experts_count = 3

    def __init__(self, soft):
        super().__init__()
        self.soft = soft
        self.experts = nn.ModuleList(small_net(seed=seed) for seed in range(3))
        self.gating = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))

    def gate(self, x):
        return 5 * self.gating(x - 0.5)

    def all_outputs(self, x):
        return torch.stack([expert(x) for expert in self.experts], 1)

    def selected(self, x):
        return self.gate(x).argmax(1)

    def forward(self, x):
        return torch.einsum("be,bek->bk", mixtures.deployed_weights(self, x), self.all_outputs(x))


def scene(model, x, eps, steps=20, restarts=1):
    y = model(x).argmax(1)
    split = Split((x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(), y.numpy())
    protocol = Protocol.model_validate(
        {
            "name": "t",
            "column": [
                {"attack": "pgd", "steps": steps, "restarts": restarts},
                {"attack": "pgd", "steps": steps, "loss": "margin"},
                {"attack": "adaptive", "steps": steps},
            ],
        }
    )
    columns = protocol.columns(eps, "soft" if model.soft else "hard")
    evaluator = Evaluator(model, classes=model(x).shape[1], split=split, seed=0, success="any")
    batch = evaluator.run(plan(columns), np.arange(len(x)))
    return {c.name: batch.outcomes[c.name].robust for c in columns}, columns, evaluator


def test_on_the_selection_toy_pgd_reports_all_and_the_route_attack_none():
    robust, _, _ = scene(SelectionToy(), SelectionToy.images(), 0.05)
    assert robust["pgd-20"].all() and robust["pgd-20-margin"].all() and robust["frozen-gate"].all()
    assert not robust["per-route"].any()
    assert not robust[BOUND].any()


def test_no_attack_breaks_what_cannot_be_broken():
    toy, x = SelectionToy(guard=0.02), SelectionToy.images()
    robust, columns, _ = scene(toy, x, 0.9 * float(toy.margin(x).min()))
    assert all(robust[c.name].all() for c in columns if not c.diagnostic)
    # expert 1 is wrong as it stands, so the bound says nothing here
    assert not robust[BOUND].any()


def test_the_route_attack_breaks_what_lies_beyond_the_known_margin():
    toy, x = SelectionToy(guard=0.02), SelectionToy.images()
    robust, _, _ = scene(toy, x, 1.25 * float(toy.margin(x).max()), steps=40)
    assert not robust["per-route"].any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("eps", [0.005, 0.02, 0.05])
def test_where_the_mixture_falls_an_expert_has_fallen(soft, eps):
    model = Blend(soft).eval()
    robust, columns, _ = scene(model, points(48), eps, steps=30)
    worst = torch.stack([robust[c.name] for c in columns if not c.diagnostic]).all(0)
    assert (robust[BOUND] <= worst).all()
    assert (worst <= robust["frozen-gate"]).all()


@pytest.mark.parametrize("soft", [False, True])
def test_a_mixture_is_asked_what_fits_its_gate(soft):
    model = Blend(soft)
    for name in HARD:
        assert bool(mixtures.runs(name, model)) == (name in (SOFT if soft else HARD))
    assert mixtures.runs("legacy", model) == []


def test_a_plain_network_is_asked_nothing_more():
    assert as_mixture(small_net()) is None and as_mixture(Blend(True)) is not None
    protocol = Protocol.model_validate({"name": "t", "column": [{"attack": "adaptive", "steps": 3}]})
    assert [c.name for c in protocol.columns(0.1)] == ["clean"]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("soft", [False, True])
def test_every_aim_has_a_gradient_and_believes_what_the_model_says(name, soft):
    model, x = Blend(soft).eval(), points(12)
    y = torch.arange(12) % 4
    for run in mixtures.runs(name, model):
        for aim in run.aims:
            z = x.clone().requires_grad_(True)
            found = aim.output(z)
            (gradient,) = torch.autograd.grad(aim.loss(found, y).sum(), z)
            assert gradient.isfinite().all() and (gradient.flatten(1).abs().sum(1) > 0).all(), run.name
            wrong = aim.wrong(found, y)
            if name in ("frozen-gate", "soft-gate", "all-experts"):
                assert torch.equal(wrong, model(x).argmax(1) != y)
            elif name == "per-route":
                assert not (wrong & (model(x).argmax(1) == y)).any()


def test_the_frozen_gate_is_the_gradient_of_the_chosen_expert():
    model, x = Blend(False).eval(), points(6)
    y = torch.arange(6) % 4
    (run, _) = mixtures.runs("frozen-gate", model)
    z = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(run.aims[0].loss(run.aims[0].output(z), y).sum(), z)
    for row in range(6):
        w = x[row : row + 1].clone().requires_grad_(True)
        expert = model.experts[int(model.selected(x)[row])]
        (alone,) = torch.autograd.grad(nn.functional.cross_entropy(expert(w), y[row : row + 1]), w)
        assert torch.allclose(found[row : row + 1], alone, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_soft_gate_does_not_saturate_whatever_the_scores_scale(scale):
    scores = scale * torch.tensor([[1.0, 3.0, 0.0], [5.0, 4.9, 0.0]])
    weights = (scores / (1.0 * mixtures.gap(scores))[:, None]).softmax(1)
    assert (weights.topk(2, dim=1).values[:, 1] > 0.2).all()


def test_the_gates_margin_is_positive_exactly_for_the_chosen():
    scores = torch.tensor([[1.0, 3.0, 0.0], [5.0, 4.0, 7.0]])
    assert torch.stack([mixtures.gate_margin(scores, k) for k in range(3)], 1).tolist() == [
        [-2.0, 2.0, -3.0],
        [-2.0, -3.0, 2.0],
    ]


def test_outcomes_do_not_depend_on_the_batch():
    toy, x = SelectionToy(), SelectionToy.images(12)
    whole, columns, evaluator = scene(toy, x, 0.021)
    parts = [evaluator.run(plan(columns), np.array(index)) for index in ([3], [0, 7, 5])]
    for column in columns:
        assert torch.equal(parts[0].outcomes[column.name].robust, whole[column.name][[3]])
        assert torch.equal(parts[1].outcomes[column.name].robust, whole[column.name][[0, 7, 5]])


def test_on_the_route_toy_pgd_reports_all_and_the_route_attack_none():
    toy = RouteToy()
    robust, _, _ = scene(toy, toy.images(), 0.1, steps=40)
    assert robust["pgd-40"].all() and robust["pgd-40-margin"].all() and robust["frozen-gate"].all()
    assert not robust["per-route"].any() and not robust["soft-gate"].any()
    assert not robust[BOUND].any()


def test_an_attacked_expert_and_an_attacked_router_are_told_apart_and_count_for_no_worst_case():
    """On the toy the expert that runs is right by far, and whoever turns the route finds one that is always wrong."""
    toy = RouteToy(gain=10)
    for eps, router_holds in ((0.05, True), (0.1, False)):
        robust, columns, _ = scene(toy, toy.images(), eps, steps=40)
        assert robust["expert-attacked"].all()
        assert (
            robust["router-attacked"].all() == router_holds
            and robust["router-attacked"].any() == router_holds
        )
    assert all(c.diagnostic for c in columns if c.name in ("expert-attacked", "router-attacked"))


def test_a_soft_mixture_is_asked_neither():
    names = [c.name for c in protocols.load("adaptive").columns(0.1, "soft")]
    assert "expert-attacked" not in names and "router-attacked" not in names and "every-expert" in names


def test_a_certificate_covers_the_images_that_lie_deeper_than_the_radius():
    class Certified(Blend):
        def certificate(self, x):
            return Certificate(torch.linspace(0.0, 0.1, len(x)), "made up")

    model = Certified(True).eval()
    columns = Protocol.model_validate({"name": "t", "column": [{"attack": "adaptive", "steps": 2}]}).columns(
        0.05, "soft", certified=True
    )
    x = points(24)
    split = Split(
        (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(), model(x).argmax(1).numpy()
    )
    one = Evaluator(model, classes=model(x).shape[1], split=split, seed=0, success="any")
    found = one.run(plan(columns), np.arange(24)).outcomes["certified"]
    assert torch.equal(found.robust, torch.linspace(0.0, 0.1, 24) >= 0.05)


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_frozen_gate_attack_sees_what_the_mixture_answers(probabilities):
    model, x = Blend(True).eval(), points(6)
    model.mixes_probabilities = probabilities
    weights, outputs = model.gate(x).softmax(1), model.all_outputs(x)
    mean = torch.einsum("be,bek->bk", weights, outputs.softmax(2)).log() if probabilities else model(x)
    found = mixtures.frozen_gate(model, mixtures.margin).output(x)
    torch.testing.assert_close(found, mean, atol=1e-4, rtol=1e-4)
