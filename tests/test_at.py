"""FGSM-AT and PGD-AT: the batch they learn from, and the limits in which they are something known."""

import copy

import pytest
import torch
from learnable import dataset
from torch import nn
from torch.nn import functional as F

from bench.attacks.pgd import pgd
from bench.config import replaced
from bench.errors import UsageError
from bench.held_out import HeldOut, pgd10
from bench.rng import Rng
from bench.threat import Linf
from bench.train import initial, train
from defenses import fgsm_at, pgd_at
from defenses.fgsm_at import FGSMAT, collapsed
from defenses.pgd_at import PGDAT

DATA = dataset(eps=0.08)
BOTH = pytest.mark.parametrize("kind", [FGSMAT, PGDAT])
WHOLE = {"width": 4, "half_batch": False}


def made(kind, **settings):
    module = {FGSMAT: fgsm_at, PGDAT: pgd_at}[kind]
    return kind(module.Config(**{"width": 4} | settings))


def network(seed=0):
    """A ResNet-18 in float64 whose BatchNorm statistics are not the initial ones."""
    model = initial(made(FGSMAT), DATA, seed).double().train()
    model(batch(30)[0])
    return model


def batch(n=7, data=DATA):
    x, y = data.train.batch(slice(0, n))
    # up to black and white, so that the box binds
    return ((x.double() - 0.5) * 1.4 + 0.5).clamp(0, 1), y


class Spy(nn.Module):
    """Notes what a model is shown in train mode, and how often in eval mode."""

    def __init__(self, model):
        super().__init__()
        self.model, self.learnt, self.crafting = model, [], []

    def forward(self, x):
        (self.learnt if self.training else self.crafting).append(x.detach().clone())
        return self.model(x)


def learnt_from(kind, n=7, rng=None, model=None, **settings):
    """What one step learns from, what it was made of, and the loss."""
    (stage,) = made(kind, **settings).stages(DATA)
    spy, (x, y) = Spy(model or network()).train(), batch(n)
    given = x.clone(), y.clone()
    loss = stage.loss(spy, x, y, rng or Rng(0))
    assert torch.equal(given[0], x) and torch.equal(given[1], y), "the batch itself was changed"
    (shown,) = spy.learnt
    return shown, x, y, loss, spy


def by_hand(model, x, y, start, eps, steps, step_size):
    """PGD on a copy of the model in eval mode, written out."""
    model = copy.deepcopy(model).eval()
    x_adv = start
    for _ in range(steps):
        point = x_adv.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        x_adv = torch.clamp(x_adv + step_size * gradient.sign(), x - eps, x + eps).clamp(0, 1)
    return x_adv


@BOTH
def test_recipes_say_which_share_of_the_batch_is_attacked(kind):
    assert {name: config.half_batch for name, config in kind.recipes.items()} == {
        "tiny": False,
        "fast": False,
        "paper": True,
    }


def test_the_recipe_of_the_paper_is_the_papers():
    paper = PGDAT.recipes["paper"]
    assert (paper.steps, paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (
        10,
        200,
        128,
        0.1,
        5e-4,
    )


@BOTH
def test_the_network_is_a_resnet18_behind_the_datasets_normalisation(kind):
    with torch.device("meta"):
        model = kind(kind.recipes["paper"]).build(dataset(channels=3, classes=10))
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    small = made(kind).build(DATA).eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(small(x), small.net((x - 0.5) / 0.25))


@BOTH
def test_at_a_vanishing_radius_it_is_standard_training(kind):
    settings = {"eps": 1e-13} if kind is FGSMAT else {"eps": 1e-13, "step_size": 1e-13}
    (stage,) = made(kind, **WHOLE | settings).stages(DATA)
    model = network()
    plain, (x, y) = copy.deepcopy(model), batch(18)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, plain))
    for step in range(3):
        loss = stage.step(model, x, y, Rng(step), [mine])
        clean = F.cross_entropy(plain(x), y)
        torch.testing.assert_close(loss, clean)
        theirs.zero_grad()
        clean.backward()
        theirs.step()
        for (name, one), two in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8, msg=name)


@BOTH
@pytest.mark.parametrize(("n", "attacked"), [(6, 3), (7, 3)])
def test_half_a_batch_is_attacked_and_the_other_half_stays_as_it_is(kind, n, attacked):
    shown, x, y, loss, spy = learnt_from(kind, n, half_batch=True)
    assert torch.equal(shown[attacked:], x[attacked:])
    assert (shown[:attacked] != x[:attacked]).flatten(1).any(1).all()
    assert Linf(DATA.eps).contains(shown, x).all()
    assert all(len(crafted) == attacked for crafted in spy.crafting)
    torch.testing.assert_close(loss, F.cross_entropy(network()(shown), y))


@BOTH
def test_half_of_a_single_image_is_none(kind):
    (stage,), model, (x, y) = made(kind, half_batch=True).stages(DATA), network().eval(), batch(1)
    torch.testing.assert_close(stage.loss(model, x, y, Rng(0)), F.cross_entropy(model(x), y))


@BOTH
def test_all_of_a_batch_is_attacked_where_that_is_asked(kind):
    shown, x, _, _, _ = learnt_from(kind, **WHOLE)
    assert (shown != x).flatten(1).any(1).all()
    assert Linf(DATA.eps).contains(shown, x).all()


@pytest.mark.parametrize(("settings", "eps"), [({}, 0.08), ({"eps": 0.03}, 0.03)])
def test_fgsm_is_the_sign_of_the_gradient_at_the_datasets_radius_or_the_one_set(settings, eps):
    shown, x, y, loss, _ = learnt_from(FGSMAT, **WHOLE | settings)
    expected = by_hand(network(), x, y, x, eps, 1, eps)
    torch.testing.assert_close(shown, expected)
    torch.testing.assert_close(loss, F.cross_entropy(network()(expected), y))


@pytest.mark.parametrize(
    ("settings", "eps", "step_size"),
    [({}, 0.08, 0.1), ({"eps": 0.04}, 0.04, 0.05), ({"eps": 0.04, "step_size": 0.03}, 0.04, 0.03)],
)
def test_rs_fgsm_is_one_step_from_a_uniform_start_projected_into_the_ball(settings, eps, step_size):
    shown, x, y, loss, _ = learnt_from(FGSMAT, **WHOLE | {"variant": "rs"} | settings)
    start = Linf(eps).random_start(x, Rng(0).at("start"))
    expected = by_hand(network(), x, y, start, eps, 1, step_size)
    torch.testing.assert_close(shown, expected)
    torch.testing.assert_close(loss, F.cross_entropy(network()(expected), y))


def test_the_mixture_of_2015_weighs_the_losses_of_both_images():
    (stage,), model, (x, y) = made(FGSMAT, clean_weight=0.3).stages(DATA), network(), batch()
    x_adv = by_hand(model, x, y, x, 0.08, 1, 0.08)
    expected = 0.3 * F.cross_entropy(model(x), y) + 0.7 * F.cross_entropy(model(x_adv), y)
    torch.testing.assert_close(stage.loss(network(), x, y, Rng(0)), expected)


def test_a_clean_weight_that_leaves_no_attack_is_refused():
    with pytest.raises(UsageError, match="clean_weight"):
        replaced(FGSMAT.recipes["tiny"], {"clean_weight": "1"})


@pytest.mark.parametrize(
    ("under_pgd", "under_fgsm", "said"),
    [
        ([0.4, 0.0], 0.8, True),
        ([0.4, 0.1], 0.31, True),
        ([0.4, 0.1], 0.29, False),
        ([0.4, 0.21], 0.9, False),
        ([0.4, 0.0, 0.0], 0.9, False),
        ([0.0, 0.4], 0.9, False),
        ([0.1], 0.9, False),
    ],
)
def test_a_collapse_is_a_fall_under_pgd_within_an_epoch_that_fgsm_does_not_see(under_pgd, under_fgsm, said):
    assert collapsed(under_pgd, under_fgsm) is said


def test_the_epoch_of_a_collapse_is_marked_in_the_history():
    data = dataset(eps=0.08)
    (stage,) = made(FGSMAT).stages(data)
    model, held = Templates(data), HeldOut(data.train)
    assert held.accuracy(model) == 1
    found = held.accuracy(model, lambda m, x, y, rng: by_hand(m, x, y, x, 0.08, 1, 0.08))
    assert 0.2 < found <= 1
    for now, said in ((0.0, True), (found, False)):
        rows = [{"held_out": 0.9, "held_out_pgd": 0.9}] * 2 + [{"held_out": now}]
        seen = {"held_out_fgsm": found, "held_out_pgd": now, "collapsed": said}
        assert stage.observe(model, held, rows) == seen


def test_a_collapse_is_looked_for_at_the_radius_that_is_trained_at():
    data = dataset(eps=0.08)
    (stage,) = made(FGSMAT, eps=0.3).stages(data)
    model, held = Templates(data), HeldOut(data.train)
    seen = stage.observe(model, held, [{"held_out": 0.9, "held_out_pgd": 1.0}, {"held_out": 0.9}])
    for name, steps in (("held_out_fgsm", 1), ("held_out_pgd", 10)):
        within = held.accuracy(
            model,
            lambda m, x, y, rng, k=steps: pgd(
                m, x, y, Linf(0.3), rng=rng, steps=k, step_size=0.3 if k == 1 else None, random_start=k > 1
            ),
        )
        assert seen[name] == within < held.accuracy(model, pgd10(0.08))
    assert seen["collapsed"] is (
        seen["held_out_pgd"] < 0.8 and seen["held_out_fgsm"] - seen["held_out_pgd"] > 0.2
    )


class Templates(nn.Module):
    """Answers with the class whose mean training image is nearest."""

    def __init__(self, data):
        super().__init__()
        x, y = data.train.batch(slice(None))
        self.means = torch.stack([x[y == label].mean(0).flatten() for label in range(3)])

    def forward(self, x):
        return -((x.flatten(1)[:, None] - self.means) ** 2).sum(2)


def test_each_epoch_is_logged_under_fgsm_beside_pgd10(tmp_path):
    defense = made(FGSMAT, epochs=2, batch_size=18, half_batch=False)
    history = train(defense, DATA, seed=0, folder=tmp_path, quiet=True).history
    assert [set(row) for row in history] == [
        {"stage", "epoch", "loss", "held_out", "held_out_fgsm", "held_out_pgd", "collapsed"}
    ] * 2


@pytest.mark.parametrize(
    ("settings", "eps", "steps", "step_size"),
    [
        ({}, 0.08, 10, 0.02),
        ({"steps": 3}, 0.08, 3, 0.02),
        ({"eps": 0.04, "steps": 2}, 0.04, 2, 0.01),
        ({"eps": 0.04, "steps": 2, "step_size": 0.03}, 0.04, 2, 0.03),
    ],
)
def test_pgd_is_projected_ascent_from_a_uniform_start(settings, eps, steps, step_size):
    shown, x, y, loss, _ = learnt_from(PGDAT, **WHOLE | settings)
    start = Linf(eps).random_start(x, Rng(0).at("start"))
    expected = by_hand(network(), x, y, start, eps, steps, step_size)
    torch.testing.assert_close(shown, expected)
    torch.testing.assert_close(loss, F.cross_entropy(network()(expected), y))


def test_the_start_is_another_in_another_step():
    one, two = (learnt_from(PGDAT, rng=Rng(step), **WHOLE, steps=1)[0] for step in (0, 1))
    assert not torch.equal(one, two)


class TwoClasses(nn.Module):
    """A linear model of two classes: its gradient's sign is the same at every point."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2).double()

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_on_a_linear_model_one_step_across_the_ball_is_fgsm_whatever_the_start():
    data = dataset(classes=2, eps=0.08)
    model, (x, y) = TwoClasses(), batch(data=data)
    (by_fgsm,) = made(FGSMAT, **WHOLE).stages(data)
    (by_pgd,) = made(PGDAT, **WHOLE, steps=1, step_size=0.16).stages(data)
    expected = by_fgsm.loss(model, x, y, Rng(0))
    for step in range(3):
        torch.testing.assert_close(by_pgd.loss(model, x, y, Rng(step)), expected)
    assert expected > F.cross_entropy(model(x), y)


@BOTH
def test_crafting_puts_every_parts_mode_back_and_learns_no_statistics(kind):
    model = network()
    model.net.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    (stage,) = made(kind).stages(DATA)
    stage.loss(model, *batch(), Rng(0))
    assert model.training and model.net.layer1.training and not model.net.bn1.training
    after = model.state_dict()
    assert torch.equal(before["net.bn1.running_mean"], after["net.bn1.running_mean"])
    assert after["net.layer1.0.bn1.num_batches_tracked"] == before["net.layer1.0.bn1.num_batches_tracked"] + 1


@BOTH
def test_crafting_leaves_no_gradient_in_the_weights(kind):
    model = network()
    learnt_from(kind, model=model)
    assert all(parameter.grad is None for parameter in model.parameters())
