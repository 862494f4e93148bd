import copy
import csv
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import dataset, points
from routed_toys import RouteToy
from torch import nn
from torch.nn import functional as F

from baselines.resnet import BasicBlock, resnet18
from bench import registry
from bench.attacks.fgsm import fgsm
from bench.attacks.losses import LOSSES
from bench.attacks.mixture import runs
from bench.attacks.pgd import pgd
from bench.config import as_json, from_json, replaced
from bench.divergence import kl
from bench.errors import NonFinite, UsageError, VoidRun
from bench.evaluate import Evaluator
from bench.fast import fast
from bench.moe import as_mixture
from bench.protocol import HARD
from bench.rng import Rng
from bench.threat import Linf
from bench.train import train
from defenses.advmoe import (
    ADVMoE,
    Config,
    RoutedConv,
    crafted,
    experts_loss,
    load_loss,
    mixture_loss,
    moved,
    router_loss,
)

SMALL = Config(width=8, router_width=4, epochs=1, batch_size=8)
each_variant = pytest.mark.parametrize("variant", ["code", "paper"])


def untrained(data=None, **settings):
    return ADVMoE(replace(SMALL, **settings)).build(data or dataset())


def routed(experts=2, **settings):
    """A model in double precision and eval mode, with statistics of its own, and images on all of its routes."""
    model = untrained(experts=experts, **settings).double()
    with torch.no_grad():
        for _ in range(3):
            model.routed(torch.rand(16, 3, 4, 4).double(), torch.rand(16, experts).double())
            model.gate(torch.rand(16, 3, 4, 4).double())
        model.eval()
        model.backbone.linear.weight *= 30
        x = points(12).double()
        model.router.linear.bias -= model.gate(x).mean(0)
    assert len(model.selected(x).unique()) == experts
    return model, x


def all_to(model, expert):
    """The model with a router that sends every image to one expert."""
    with torch.no_grad():
        model.router.linear.bias[expert] += 1e4
    return model


class Thin(nn.Module):
    """The pathway of one expert, put together from the blocks of a plain ResNet-18."""

    def __init__(self, model, expert):
        super().__init__()
        backbone = model.backbone
        self.stem, self.linear, self.normalize = map(
            copy.deepcopy, (backbone.stem, backbone.linear, model.normalize)
        )
        blocks = []
        for block in backbone.blocks:
            width_in, width = block.conv1.weight.shape[1], block.conv2.weight.shape[1]
            blocks.append(BasicBlock(width_in, width, block.conv1.stride, 1).to(block.conv1.weight.dtype))
            rows = slice(expert * width, (expert + 1) * width)
            state = block.state_dict()
            for conv in ("conv1.weight", "conv2.weight"):
                state[conv] = state[conv][rows]
            blocks[-1].load_state_dict(state)
        self.blocks = nn.Sequential(*blocks)
        self.train(model.training)

    def forward(self, x):
        return self.linear(self.blocks(self.stem(self.normalize(x))).mean((2, 3)))


class Gather(nn.Module):
    """A routed convolution that computes all experts for all images and keeps what was chosen."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, h, routes):
        of_all = F.conv2d(h, self.conv.weight, stride=self.conv.stride, padding=1)
        of_all = of_all.unflatten(1, (self.conv.experts, -1))
        chosen = torch.repeat_interleave(torch.arange(self.conv.experts), torch.tensor(routes.sizes))
        return of_all[torch.arange(len(h)), chosen]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def one_update(model, data, x, y, lr=0.1, **settings):
    """One update of experts and router; the loss it returns."""
    (stage,) = ADVMoE(replace(SMALL, **settings)).stages(data)
    optimisers = [torch.optim.SGD(group, lr=lr) for group in stage.groups(model)]
    return stage.step(model.train(), x, y, Rng(0, "step"), optimisers)


# architecture


def test_it_is_registered_as_the_published_tables_name_it():
    published = Path(__file__).parent.parent / "results" / "published"
    names = {
        row["model"]
        for file in published.glob("paper_table_pgd.csv")
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    }
    assert registry.get("advmoe") is ADVMoE and ADVMoE.published_as in names


@pytest.mark.parametrize(
    "settings, of_backbone, of_router",
    [
        ({}, 5_565_450, 269_202),
        ({"experts": 1}, 2_809_866, 269_137),
        ({"experts": 1, "ratio": 1.0}, 11_173_962, 269_137),
    ],
)
def test_it_has_as_many_parameters_as_the_released_model(settings, of_backbone, of_router):
    model = ADVMoE(replace(ADVMoE.recipes["paper"], **settings)).build(dataset())
    assert (parameters(model.backbone), parameters(model.router)) == (of_backbone, of_router)
    assert parameters(model) == of_backbone + of_router


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_a_route_is_the_thin_network_of_its_filters(experts):
    model, x = routed(experts)
    thin = torch.stack([Thin(model, expert)(x) for expert in range(experts)], 1)
    assert torch.allclose(model.all_outputs(x), thin, rtol=0, atol=1e-12)
    assert torch.allclose(model(x), thin[range(len(x)), model.selected(x)], rtol=0, atol=1e-12)


def test_routes_differ():
    model, x = routed()
    outputs = model.all_outputs(x)
    assert (outputs[:, 0] - outputs[:, 1]).abs().amax(1).min() > 1e-3


def test_one_expert_of_full_width_is_a_resnet18():
    model, x = routed(experts=1, ratio=1.0)
    dense = resnet18(channels=3, classes=10, width=8).double().eval()
    names = {"stem.0": "conv1", "stem.1": "bn1", "linear": "linear"}
    names |= {f"blocks.{i}": f"layer{1 + i // 2}.{i % 2}" for i in range(8)}
    state = {}
    for key, value in model.backbone.state_dict().items():
        (part,) = (name for name in names if key.startswith(f"{name}."))
        state[names[part] + key.removeprefix(part)] = value
    dense.load_state_dict(state)
    assert torch.allclose(model(x), dense(model.normalize(x)), rtol=0, atol=1e-12)


def test_a_pathway_is_scaled_and_its_stem_is_not():
    backbone = untrained(width=16, ratio=0.3, experts=3).backbone
    assert backbone.stem[0].weight.shape[0] == 16
    widths = [tuple(block.conv2.weight.shape[:2]) for block in backbone.blocks]
    assert widths[::2] == widths[1::2] == [(3 * w, w) for w in (4, 9, 19, 38)]


def test_filters_start_as_those_of_all_experts_together():
    conv = untrained(width=32, experts=4).backbone.blocks[5].conv2
    fan_out = conv.weight.shape[0] * 9
    assert float(conv.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


def test_a_pathway_without_channels_is_a_users_error():
    with pytest.raises(UsageError, match=r"int\(0\.1 · 8\) = 0 channels"):
        untrained(ratio=0.1)


@pytest.mark.parametrize("wrong", ["experts=0", "ratio=0", "routing=layer", "variant=released"])
def test_a_setting_out_of_range_is_a_users_error(wrong):
    name, value = wrong.split("=")
    with pytest.raises(UsageError, match=name):
        replaced(SMALL, {name: value})


@pytest.mark.parametrize("recipe", ADVMoE.recipes)
def test_a_recipe_survives_json(recipe):
    config = ADVMoE.recipes[recipe]
    assert from_json(Config, as_json(config)) == config


# routing


def test_what_an_image_is_told_does_not_depend_on_its_batch():
    model, x = routed(3)
    together, order = model(x), torch.randperm(len(x))
    assert torch.allclose(together[order], model(x[order]), rtol=0, atol=1e-12)
    alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)


def test_no_image_is_no_logits():
    model, x = routed()
    assert model(x[:0]).shape == (0, 10) and model.all_outputs(x[:0]).shape == (0, 2, 10)


def test_only_the_differences_of_scores_count():
    model, x = routed(3)
    y = torch.arange(len(x)) % 10
    x_adv = x + 0.01
    before = [model(x), router_loss(model, x, x_adv, y, replace(SMALL, experts=3))]
    with torch.no_grad():
        model.router.linear.bias += 5
    after = [model(x), router_loss(model, x, x_adv, y, replace(SMALL, experts=3))]
    assert torch.equal(before[0], after[0])
    assert torch.allclose(before[1], after[1], atol=1e-10)


def test_a_tie_goes_to_the_lowest_index():
    model, x = routed(3)
    with torch.no_grad():
        model.router.linear.weight.zero_()
        model.router.linear.bias.copy_(torch.tensor([1.0, 2.0, 2.0]))
    assert model.selected(x).tolist() == [1] * len(x)
    assert torch.allclose(model(x), model.all_outputs(x)[:, 1])


def test_filters_that_no_image_took_get_no_gradient():
    model, x = routed(3)
    all_to(model, 1)
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
    for part in model.backbone.modules():
        if isinstance(part, RoutedConv):
            sizes = [float(rows.abs().sum()) for rows in part.weight.grad.chunk(3)]
            assert sizes[0] == sizes[2] == 0 and sizes[1] > 0
        elif isinstance(part, (nn.Conv2d, nn.Linear)):
            assert float(part.weight.grad.abs().sum()) > 0


def test_the_chosen_score_gets_the_gradient_of_speaking_louder_and_no_other_score_any():
    model, x = routed(3)
    y = torch.arange(len(x)) % 10
    scores = model.gate(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.routed(x, scores), y), scores)
    chosen = scores.argmax(1)
    others = gradient.scatter(1, chosen[:, None], 0)
    assert torch.equal(others, torch.zeros_like(others))

    def louder(by):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for part in copied.modules():
                if isinstance(part, RoutedConv):
                    part.weight *= 1 + by
            logits = copied.routed(x, scores)
        return F.cross_entropy(logits, y, reduction="none") / len(x)

    numeric = (louder(1e-6) - louder(-1e-6)) / 2e-6
    assert torch.allclose(gradient.gather(1, chosen[:, None]).squeeze(1), numeric, rtol=1e-5, atol=1e-9)


def test_the_straight_through_factor_changes_no_logit():
    model, x = routed()
    scores = model.gate(x)
    assert scores.requires_grad and torch.equal(
        model.routed(x, scores), model.routed(x, scores.detach())
    )  # fmt: skip


def test_batchnorm_learns_from_the_batch_as_a_whole():
    model, x = routed(3)
    model.router.linear.requires_grad_(False)
    scores = model.gate(x).detach()
    model.train()
    whole = copy.deepcopy(model)
    for block in whole.backbone.blocks:
        block.conv1, block.conv2 = Gather(block.conv1), Gather(block.conv2)
    assert torch.allclose(model.routed(x, scores), whole.routed(x, scores), atol=1e-10)
    for (name, ours), theirs in zip(model.named_buffers(), whole.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), atol=1e-12), name


def test_weights_survive_their_state_dict_and_the_router_is_in_it_once():
    model, x = routed()
    other = untrained().double().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))
    router = [key for key in model.state_dict() if "router" in key]
    assert len(router) == len(model.router.state_dict())


def test_memory_layout_and_autocast_keep_the_answer():
    model, x = routed()
    model, x = model.float(), x.float()
    scores, logits = model.gate(x), model(x)
    lying = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert torch.allclose(lying(x.contiguous(memory_format=torch.channels_last)), logits, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.routed(x, scores)
    assert torch.allclose(rounded.float(), logits, atol=0.05 * float(logits.detach().abs().max()))


def test_the_fast_copy_takes_both_routes():
    model, x = routed()
    model, x = model.float().requires_grad_(False), x.float()
    copied = fast(model, x, model.selected(x))
    assert copied.about.startswith("folded")
    assert torch.allclose(copied.model(x), model(x), atol=1e-4)


# losses


@pytest.mark.parametrize("gap", [0.0, 1.0, 20.0, 79.0])
def test_kl_is_the_textbook_form_where_that_is_finite(gap):
    p = torch.tensor([[0.3, -gap, 0.1]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[-0.2, 0.4, gap / 2]], dtype=torch.float64, requires_grad=True)
    naive = (p.softmax(1) * (p.softmax(1).log() - q.softmax(1).log())).sum(1)
    assert torch.allclose(kl(p, q), naive, atol=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(kl(p, q), (p, q)), torch.autograd.grad(naive, (p, q)), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_kl_is_finite_where_the_textbook_form_poisons_the_router():
    """At this gap one probability is exactly 0 in float32, and the gradient of 0 · log 0 is NaN."""
    p = torch.tensor([[110.0, 0.0]], requires_grad=True)
    q = torch.tensor([[1.0, 0.0]])
    naive = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)
    assert torch.autograd.grad(naive, p)[0].isnan().any()
    assert torch.autograd.grad(kl(p, q).sum(), p)[0].isfinite().all()


def test_kl_of_scores_a_thousand_apart_is_finite_and_flat():
    p, q = (torch.tensor([[1e3, 0.0, -1e3]], requires_grad=True) for _ in range(2))
    value = kl(p, q)
    assert float(value.detach()) == 0
    for gradient in torch.autograd.grad(value, (p, q)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_the_load_loss_is_one_when_balanced_and_knows_no_size_of_scores(share, size):
    scores = torch.zeros(8, 2)
    scores[: int(8 * share), 0] = scores[int(8 * share) :, 1] = size
    sure = float(torch.tensor(2.0).sigmoid())  # scores ±1 once they are brought to one size
    mean = share * sure + (1 - share) * (1 - sure)
    assert float(load_loss(scores)) == pytest.approx(2 * (share * mean + (1 - share) * (1 - mean)))
    assert (float(load_loss(scores)) == pytest.approx(1)) == (share == 0.5)


@pytest.mark.parametrize("gap", [0.1, 1e4])
def test_the_load_loss_draws_the_router_from_the_expert_that_gets_most_however_sure_it_is(gap):
    scores = torch.tensor([[gap, 0.0]] * 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(load_loss(scores), scores)
    assert (gap * gradient[:, 0] > 0.01).all() and gradient.sum(1).abs().max() < 1e-6


def test_one_expert_has_no_load_to_share():
    assert float(load_loss(torch.rand(5, 1))) == 1


def textbook_kl(p, q):
    return (p.softmax(1) * (p.softmax(1) / q.softmax(1)).log()).sum(1).mean()


def the_same(loss, expected, parameters):
    """Both in value and in every gradient."""
    parameters = list(parameters)
    assert torch.allclose(loss, expected)
    pairs = zip(
        *(torch.autograd.grad(value, parameters, materialize_grads=True) for value in (loss, expected)),
        strict=True,
    )
    return all(torch.allclose(ours, theirs, atol=1e-9) for ours, theirs in pairs)


def test_the_experts_loss_is_the_equation():
    model, x = routed()
    x_adv, y = x + 0.05, torch.arange(len(x)) % 10
    logits, logits_adv = (model.routed(z, model.gate(z).detach()) for z in (x, x_adv))
    expected = F.cross_entropy(logits, y) + 5 * textbook_kl(logits, logits_adv)
    assert the_same(
        experts_loss(model, x, x_adv, y, replace(SMALL, beta=5.0)), expected, model.backbone.parameters()
    )


def test_the_routers_loss_of_the_code_is_the_equation_and_has_no_backbone_in_it():
    model, x = routed()
    x_adv, y = x + 0.05, torch.arange(len(x)) % 10
    scores, scores_adv = model.gate(x), model.gate(x_adv)
    expected = 4 * F.cross_entropy(scores, y % 2) + 5 * textbook_kl(scores, scores_adv)
    loss = router_loss(model, x, x_adv, y, replace(SMALL, alpha=4.0, beta=5.0))
    assert the_same(loss, expected, model.parameters())
    found = torch.autograd.grad(
        router_loss(model, x, x_adv, y, SMALL), list(model.backbone.parameters()), allow_unused=True
    )
    assert all(gradient is None for gradient in found)


def test_the_routers_loss_of_the_paper_is_the_equation():
    model, x = routed()
    x_adv, y = x + 0.05, torch.arange(len(x)) % 10
    scores = model.gate(x)
    logits, logits_adv = model.routed(x, scores.softmax(1)), model.routed(x_adv, model.gate(x_adv).softmax(1))
    expected = F.cross_entropy(logits, y) + 5 * textbook_kl(logits, logits_adv) + 3 * load_loss(scores)
    loss = mixture_loss(model, x, x_adv, y, replace(SMALL, beta=5.0, balance=3.0))
    assert the_same(loss, expected, model.router.parameters())


def test_the_mixtures_loss_moves_the_router_through_its_straight_through_scores():
    model, x = routed()
    y = torch.arange(len(x)) % 10
    loss = mixture_loss(model, x, x, y, replace(SMALL, balance=0.0))
    assert torch.allclose(loss, F.cross_entropy(model(x), y))
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in model.backbone.parameters())
    assert sum(float(p.grad.abs().sum()) for p in model.router.parameters()) > 0


# the attack of training


def test_one_step_of_the_attack_is_the_equation():
    model, x = routed()
    threat, rng = Linf(0.1), Rng(3)
    found = crafted(model, x, threat, replace(SMALL, steps=1, step_size=0.05), rng)

    def naive(p, q):
        return (p.softmax(1) * (p.softmax(1) / q.softmax(1)).log()).sum()

    start = x + 0.001 * rng.at("noise").normal(x)
    z = start.clone().requires_grad_()
    loss = naive(model(x).detach(), model(z)) + naive(model.gate(x).detach(), model.gate(z))
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.allclose(found, start + 0.05 * gradient.sign(), atol=1e-12)


def test_its_step_is_five_eighths_of_the_radius_by_default():
    model, x = routed()
    default = crafted(model, x, Linf(8 / 255), SMALL, Rng(0))
    assert torch.equal(default, crafted(model, x, Linf(8 / 255), replace(SMALL, step_size=5 / 255), Rng(0)))


@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.2])
def test_it_stays_in_ball_and_box(eps):
    model, x = routed()
    x[0], x[1] = 0, 1
    x_adv = crafted(model, x, Linf(eps), SMALL, Rng(0))
    assert float((x_adv - x).abs().max()) <= eps + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(x_adv, x) == (eps == 0)


def test_it_leaves_the_model_as_it_found_it():
    model, x = routed()
    model.train()
    model.router.layer1.eval()
    before, modes = snapshot(model), [part.training for part in model.modules()]
    crafted(model, x, Linf(0.1), SMALL, Rng(0))
    assert unchanged(model, before) and [part.training for part in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# a router that is NaN


def poisoned(model):
    with torch.no_grad():
        model.router.linear.bias[0] = float("nan")
    return model


@pytest.mark.parametrize("ask", ["forward", "gate", "selected"])
def test_a_router_that_is_nan_is_an_error(ask):
    model, x = routed()
    with pytest.raises(NonFinite, match=r"the router's scores are NaN or infinite for 12 image"):
        getattr(poisoned(model), ask)(x)


def test_an_error_of_the_router_names_its_images():
    model, x = routed()
    x[3] = float("inf")
    with pytest.raises(NonFinite) as caught:
        model.gate(x)
    assert caught.value.rows == [3]


def test_a_router_that_is_nan_stops_training_and_attack():
    model, x = routed()
    model, x, y = poisoned(model).float(), x.float(), torch.zeros(len(x), dtype=torch.long)
    with pytest.raises(NonFinite):
        crafted(model, x, Linf(0.1), SMALL, Rng(0))
    with pytest.raises(NonFinite):
        one_update(model, dataset(), x, y)


def test_a_router_that_is_nan_voids_the_evaluation():
    data = dataset(12)
    model = poisoned(untrained(data))
    with pytest.raises(VoidRun, match="router's scores are NaN"):
        Evaluator(model, classes=10, split=data.test, seed=0, success="last")


class StraightThrough(torch.autograd.Function):
    """The released code's choice: forwards one-hot, backwards the identity."""

    @staticmethod
    def forward(ctx, scores):
        return F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_without_that_guard_a_nan_router_answers_like_one_expert_and_the_attack_stands_still():
    """What was published as 91 % robust: now the attack finds a NaN in its gradient, and says so."""
    model, x = routed()
    with torch.no_grad():
        model.router.linear.weight.fill_(float("nan"))

    def unguarded(z):
        weights = StraightThrough.apply(model.router(model.normalize(z)))
        return torch.einsum("be,bek->bk", weights, model.all_outputs(z))

    logits = unguarded(x)
    assert torch.equal(logits, model.all_outputs(x)[:, 0]) and logits.isfinite().all()
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(unguarded(z).sum(), z)
    assert torch.equal(gradient.sign().nan_to_num(0), torch.zeros_like(x))
    with pytest.raises(NonFinite, match="gradients are NaN"):
        pgd(unguarded, x, logits.argmax(1), Linf(0.1), rng=Rng(0))


def test_a_loss_of_the_router_that_is_nan_is_shown(monkeypatch):
    model, x = routed()
    made = router_loss
    monkeypatch.setattr("defenses.advmoe.router_loss", lambda *given: made(*given) * float("nan"))
    assert one_update(model, dataset(), x, torch.arange(len(x)) % 10).isnan()


@each_variant
def test_a_training_that_diverges_is_void(variant, tmp_path):
    data = dataset(64)
    defense = ADVMoE(replace(SMALL, variant=variant, lr=1e30, epochs=2))
    with pytest.raises(VoidRun):
        train(defense, data, seed=0, folder=tmp_path, quiet=True)


# updates


def test_the_experts_step_leaves_the_router_alone_and_the_routers_step_the_experts():
    model, x = routed()
    model.train()
    y = torch.arange(len(x)) % 10
    (stage,) = ADVMoE(SMALL).stages(dataset())
    of_experts, of_router = (torch.optim.SGD(group, lr=0.1) for group in stage.groups(model))
    router, backbone = snapshot(model.router), snapshot(model.backbone)
    moved(experts_loss(model, x, x + 0.01, y, SMALL), of_experts)
    assert unchanged(model.router, router) and not unchanged(model.backbone, backbone)
    for loss in (router_loss, mixture_loss):
        router, backbone = snapshot(model.router), snapshot(model.backbone)
        moved(loss(model, x, x + 0.01, y, SMALL), of_router)
        assert unchanged(model.backbone, backbone) and not unchanged(model.router, router)


def test_every_parameter_belongs_to_one_player():
    model = untrained()
    (stage,) = ADVMoE(SMALL).stages(dataset())
    players = [{id(p) for p in group} for group in stage.groups(model)]
    assert not players[0] & players[1]
    assert players[0] | players[1] == {id(p) for p in model.parameters()}


@each_variant
def test_each_player_steps_once_on_its_own_images(variant, monkeypatch):
    model, x = routed()
    seen = []
    made = crafted

    def watched(model, images, *rest):
        seen.append(images)
        return made(model, images, *rest)

    monkeypatch.setattr("defenses.advmoe.crafted", watched)
    one_update(model, dataset(), x, torch.arange(len(x)) % 10, variant=variant)
    first, last = seen
    assert torch.equal(torch.cat(seen), x) if variant == "paper" else torch.equal(first, last)


def test_the_variants_take_as_many_steps():
    data = dataset(64)
    of = {variant: ADVMoE(replace(SMALL, variant=variant)).stages(data)[0] for variant in ("code", "paper")}
    assert of["paper"].epochs * of["code"].batch_size == of["code"].epochs * of["paper"].batch_size


def test_the_router_is_attacked_with_the_experts_as_they_are_now(monkeypatch):
    model, x = routed()
    weights = []
    made = crafted

    def watched(model, *rest):
        weights.append(model.backbone.linear.weight.detach().clone())
        return made(model, *rest)

    monkeypatch.setattr("defenses.advmoe.crafted", watched)
    one_update(model, dataset(), x, torch.arange(len(x)) % 10)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_cast_for_a_pass_is_cast_again_after_a_step(precision):
    model, x = routed()
    model, x, y = model.float(), x.float(), torch.zeros(len(x), dtype=torch.long)
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    scores = model.gate(x).detach()
    with cast:
        loss = F.cross_entropy(model.routed(x, scores), y)
        moved(loss, torch.optim.SGD(model.backbone.parameters(), lr=1.0))
        now = model.routed(x, scores)
    with cast:
        assert torch.equal(now, model.routed(x, scores))


def test_one_expert_without_penalties_is_plain_training():
    model, x = routed(experts=1)
    model.train()
    thin, y = Thin(model, 0), torch.arange(len(x)) % 10
    one_update(model, dataset(), x, y, lr=0.1, experts=1, alpha=0.0, beta=0.0)
    optimiser = torch.optim.SGD(thin.parameters(), lr=0.1)
    F.cross_entropy(thin(x), y).backward()
    optimiser.step()
    theirs = dict(thin.named_parameters())
    for name, ours in model.backbone.named_parameters():
        assert torch.allclose(ours, theirs[name], rtol=0, atol=1e-12), name


@each_variant
def test_a_few_steps_lower_the_loss(variant):
    torch.manual_seed(0)
    model, x = untrained(), points(16)
    y = torch.arange(16) % 4
    (stage,) = ADVMoE(replace(SMALL, variant=variant)).stages(dataset())
    optimisers = [torch.optim.SGD(group, lr=0.02) for group in stage.groups(model)]
    losses = [float(stage.step(model.train(), x, y, Rng(0), optimisers)) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_the_router_learns_to_tell_two_clusters_apart_and_shares_the_load():
    torch.manual_seed(0)
    y = torch.arange(64) % 2
    x = (points(64) - 0.5) / 4 + 0.3 + 0.4 * y[:, None, None, None]
    model = untrained().train()
    optimiser = torch.optim.SGD(model.router.parameters(), lr=0.002, momentum=0.9)
    for step in range(20):
        x_adv = crafted(model, x, Linf(8 / 255), SMALL, Rng(step))
        moved(router_loss(model, x, x_adv, y, SMALL), optimiser)
    chosen = model.eval().selected(x)
    assert float((chosen == y).float().mean()) > 0.95
    assert 0.4 <= float(chosen.float().mean()) <= 0.6


# attacks


def test_it_is_a_hard_mixture_for_every_adaptive_attack():
    model = untrained(experts=3)
    assert as_mixture(model) is model and not model.soft and model.experts_count == 3
    assert all(runs(name, model) for name in (*HARD, "legacy"))


def test_the_authors_own_attack_ascends_both_cross_entropies():
    model, x = routed()
    y = torch.arange(len(x)) % 10
    (run,) = runs("legacy", model)
    (aim,) = run.aims
    found = aim.output(x)
    expected = F.cross_entropy(model(x), y) + 6 * F.cross_entropy(model.gate(x), y % 2)
    assert torch.allclose(aim.loss(found, y).mean(), expected)
    assert torch.equal(aim.wrong(found, y), model(x).argmax(1) != y)


# a routed model that gradients find robust


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("eps", [0.09, 0.1, 0.16])
def test_whoever_follows_the_gradient_finds_the_toy_entirely_robust(eps, loss):
    model, x = RouteToy(), RouteToy.images()
    y = model.labels(x)
    assert y.unique(return_counts=True)[1].tolist() == [12, 12]
    for x_adv in (
        fgsm(model, x, y, Linf(eps), loss=LOSSES[loss]),
        pgd(model, x, y, Linf(eps), rng=Rng(0, images=range(24)), loss=LOSSES[loss], steps=50),
    ):
        assert (model(x_adv).argmax(1) == y).all()


def test_whoever_moves_its_route_finds_the_toy_broken_to_the_last_image():
    model, x = RouteToy(), RouteToy.images()
    y = model.labels(x)
    for factor, broken in ((0.99, False), (1.01, True)):
        x_adv = x.clone()
        x_adv[:, 0] += factor * model.margin(x)[:, None, None]
        assert Linf(0.09).contains(x_adv, x).all()
        assert ((model(x_adv).argmax(1) != y) == broken).all()


def test_the_toys_pathways_keep_their_answers_in_the_ball():
    model, x = RouteToy(), RouteToy.images()
    y = model.labels(x)
    for expert, right in ((0, True), (1, False)):
        for sign in (-1, 1):
            outputs = model.all_outputs((x + 0.16 * sign).clamp(0, 1))
            assert ((outputs[:, expert].argmax(1) == y) == right).all()
