"""MoRE: the limits in which it is something known, what its two stages show to whom, and what stays frozen."""

import copy

import pytest
import torch
from learnable import dataset
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.pgd import pgd
from bench.config import replaced
from bench.errors import UsageError
from bench.model import Normalized
from bench.moe import as_mixture
from bench.rng import Rng
from bench.threat import L2, Linf
from bench.train import initial, train
from defenses.more import Config, Mixture, MoRE, behind_frozen, own_images, trained_last

DATA = dataset()
SMALL = {
    "l2": (0.3, 0.4),
    "linf": (0.05,),
    "steps": 2,
    "width": 4,
    "gate_width": 4,
    "expert_epochs": 1,
    "gate_epochs": 1,
    "batch_size": 18,
}
EXPERTS = 4
BALLS = [L2(0.3), L2(0.4), Linf(0.05)]


def more(**settings) -> MoRE:
    return MoRE(Config(**SMALL | settings))


def mixture(seed=0, **settings) -> Mixture:
    """A mixture in float64 whose BatchNorm statistics are not the initial ones and whose gate prefers something."""
    made = initial(more(**settings), DATA, seed).double()
    made.train()(batch(30)[0])
    with torch.no_grad():
        made.gating.linear.weight.mul_(20)
        made.experts.net.linear.weight.mul_(5)
    return made.eval()


def batch(n=6):
    x, y = DATA.train.batch(slice(0, n))
    return x.double(), y


def alone(model: Mixture, i: int) -> Normalized:
    """The `i`-th expert as a network of its own."""
    net = resnet18(channels=1, classes=3, width=4).double()
    net.load_state_dict({name: value.clone() for name, value in model.experts.state_of(i, i + 1).items()})
    return Normalized(net, DATA.mean, DATA.std).double().train(model.training)


def sgd(parameters, lr=0.05):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


# ---------------------------------------------------------------------------------------------------------------------
# the mixture


def test_the_paper_recipe_has_five_resnet18_and_another_for_a_gate():
    c = MoRE.recipes["paper"]
    assert (c.clean, c.l2, c.linf) == (1, (60 / 255, 80 / 255), (6 / 255, 8 / 255))
    made = MoRE(c).build(dataset(channels=3, classes=10))
    assert made.experts_count == 5
    assert sum(p.numel() for p in made.experts.parameters()) == 5 * 11_173_962
    assert sum(p.numel() for p in made.gating.parameters()) == 11_173_962 - 5 * 513


def test_weights_are_positive_sum_to_one_and_follow_the_image():
    weights = mixture().gate(batch(30)[0]).softmax(1)
    assert weights.shape == (30, EXPERTS) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(30).double())
    assert weights.std(0).max() > 0.01


def test_the_output_is_the_weighted_sum_of_the_experts_logits():
    model, (x, _) = mixture(), batch()
    logits, weights = torch.stack([alone(model, i)(x) for i in range(EXPERTS)], 1), model.gate(x).softmax(1)
    torch.testing.assert_close(model(x), sum(weights[:, i, None] * logits[:, i] for i in range(EXPERTS)))
    torch.testing.assert_close(model.all_outputs(x), logits)
    assert as_mixture(model) is model and torch.equal(model.selected(x), weights.argmax(1))


def test_of_identical_experts_the_mixture_is_the_expert():
    model, (x, _) = mixture(), batch()
    one = alone(model, 2)
    with torch.no_grad():
        for i in range(EXPERTS):
            for name, tensor in model.experts.state_of(i, i + 1).items():
                tensor.copy_(one.net.state_dict()[name])
    torch.testing.assert_close(model(x), one(x))


@pytest.mark.parametrize("chosen", range(EXPERTS))
def test_with_a_gate_that_is_sure_the_mixture_is_that_expert(chosen):
    model, (x, _) = mixture(), batch()
    with torch.no_grad():
        model.gating.linear.weight.zero_()
        model.gating.linear.bias.copy_(200 * F.one_hot(torch.tensor(chosen), EXPERTS))
    torch.testing.assert_close(model(x), alone(model, chosen)(x))


def test_the_gradient_of_the_image_flows_through_the_gate_too():
    model, (x, y) = mixture(), batch()
    x.requires_grad_()
    weights = model.gate(x).softmax(1)
    for held in (False, True):
        parts = weights.detach() if held else weights, model.all_outputs(x)
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(torch.einsum("be,bek->bk", *parts), y), x, retain_graph=True
        )
        (whole,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        assert torch.allclose(gradient, whole) != held


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"clean": 0, "l2": (), "linf": ()}, "needs an expert")],
)
def test_a_mixture_of_nobody_is_a_users_error(settings, said):
    with pytest.raises(UsageError, match=said):
        more(**settings).build(DATA)


@pytest.mark.parametrize("wrong", ["l2=[0]", "linf=[2]", "clean=-1", "clean_weight=0", "steps=0"])
def test_a_setting_out_of_range_is_a_users_error(wrong):
    name, value = wrong.split("=")
    with pytest.raises(UsageError, match=name):
        replaced(Config(), {name: value})


# ---------------------------------------------------------------------------------------------------------------------
# stage 1, the experts apart


def own(model, rng=None):
    c, (x, y) = Config(**SMALL), batch()
    images = own_images(model, x, y, c, BALLS, rng or Rng(0))
    return images.unflatten(1, (-1, 1)).transpose(0, 1), x, y


def test_every_expert_is_shown_what_pgd_finds_against_itself_in_its_own_ball():
    model = mixture()
    images, x, y = own(model)
    assert images.shape == (EXPERTS, *x.shape) and torch.equal(images[0], x)
    for i, threat in enumerate(BALLS, 1):
        expected = pgd(alone(model, i), x, y, threat, rng=Rng(0).at(i), steps=2)
        torch.testing.assert_close(images[i], expected)
        assert threat.contains(images[i], x).all() and not torch.equal(images[i], x)
        assert not torch.allclose(images[i], pgd(model, x, y, threat, rng=Rng(0).at(i), steps=2))


def test_stage_one_trains_every_expert_as_it_would_be_alone_and_leaves_the_gate():
    model, (stage, _) = mixture().train(), more().stages(DATA)
    gate = copy.deepcopy(model.gating.state_dict())
    singles = [alone(model, i) for i in range(EXPERTS)]
    images, _, y = own(model)
    (group,) = stage.groups(model)
    loss = stage.step(model, *batch(), Rng(0), [sgd(group)])
    losses = [F.cross_entropy(one(x), y) for one, x in zip(singles, images, strict=True)]
    torch.testing.assert_close(loss, sum(losses))
    for i, (one, own_loss) in enumerate(zip(singles, losses, strict=True)):
        optimiser = sgd(one.parameters())
        own_loss.backward()
        optimiser.step()
        for name, tensor in model.experts.state_of(i, i + 1).items():
            torch.testing.assert_close(tensor, one.net.state_dict()[name], msg=name)
    assert all(torch.equal(gate[name], value) for name, value in model.gating.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# stage 2, the gate and the heads


def test_stage_two_moves_the_gate_and_the_heads_and_nothing_else_not_even_statistics():
    model, (_, stage) = mixture().train(), more().stages(DATA)
    before = copy.deepcopy(model.state_dict())
    for step in range(2):
        stage.step(model, *batch(), Rng(step), [sgd(*stage.groups(model))])
    for name, value in model.state_dict().items():
        free = name.startswith(("gating.", "experts.net.linear."))
        assert torch.equal(before[name], value) != free, name
    assert all(part.training for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_in_stage_two_the_experts_say_what_they_say_deployed_and_their_backbones_get_no_gradient():
    model, (x, _) = mixture(), batch()
    model.gating.eval()
    expected = model(x)
    model.experts.train()
    found = behind_frozen(model, x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    moved = {id(parameter) for parameter in trained_last(model)}
    assert all((parameter.grad is not None) == (id(parameter) in moved) for parameter in model.parameters())


@pytest.mark.parametrize("side", [8, 20])
def test_backbones_stay_frozen_whether_experts_run_together_or_apart(side):
    data = dataset(side=side)
    model = initial(more(), data, 0).train()
    before = copy.deepcopy(model.experts.state_dict())
    behind_frozen(model, torch.rand(3, *data.shape)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.experts.state_dict().items())
    assert model.experts.net.conv1.weight.grad is None and model.experts.net.linear.weight.grad.any()


def test_the_loss_weighs_clean_images_twice_and_each_ball_once_crafted_against_the_whole():
    model, (x, y) = mixture(), batch()
    (_, stage) = more().stages(DATA)
    parts = [x, *(pgd(model, x, y, t, rng=Rng(0).at(i), steps=2) for i, t in enumerate(BALLS))]
    losses = [F.cross_entropy(model(part), y) for part in parts]
    expected = (2 * losses[0] + sum(losses[1:])) / 5
    torch.testing.assert_close(stage.loss(model, x, y, Rng(0)), expected)


def test_with_one_clean_expert_stage_one_is_standard_training():
    settings = {"l2": (), "linf": ()}
    model, (stage, _) = mixture(**settings).train(), more(**settings).stages(DATA)
    one, (x, y) = alone(model, 0), batch()
    torch.testing.assert_close(stage.loss(model, x, y, Rng(0)), F.cross_entropy(one(x), y))


def test_before_stage_two_every_expert_answers_in_the_mixture_as_it_was_trained_alone(tmp_path):
    model = train(more(gate_epochs=0), DATA, seed=0, folder=tmp_path, quiet=True).model.double()
    x, y = batch(60)
    right = [float((alone(model, i)(x).argmax(1) == y).double().mean()) for i in range(EXPERTS)]
    found = (model.all_outputs(x).argmax(2) == y[:, None]).double().mean(0)
    assert found.tolist() == pytest.approx(right) and len(set(found.tolist())) > 1
    for i in range(EXPERTS):
        torch.testing.assert_close(model.all_outputs(x)[:, i], alone(model, i)(x))


def test_trained_by_the_harness_stage_two_keeps_what_stage_one_made_of_the_backbones(tmp_path):
    first = train(more(gate_epochs=0), DATA, seed=0, folder=tmp_path / "a", quiet=True).model
    whole = train(more(), DATA, seed=0, folder=tmp_path / "b", quiet=True)
    assert [row["stage"] for row in whole.history] == ["experts", "gate and heads"]
    for name, value in whole.model.experts.state_dict().items():
        assert torch.equal(value, first.experts.state_dict()[name]) != name.startswith("net.linear"), name
    untrained = initial(more(), DATA, 0)
    assert torch.equal(first.gating.linear.weight, untrained.gating.linear.weight)
