"""TRADES, MART, Free-AT, AWP and FRL: each step for step against a few lines written apart, and in its limits."""

import copy

import pytest
import torch
from learnable import dataset
from torch.nn import functional as F
from torch.optim import SGD

from bench import registry
from bench.config import replaced
from bench.divergence import furthest
from bench.held_out import HeldOut
from bench.rng import Rng
from bench.threat import Linf
from bench.train import initial, train
from defenses import awp, frl
from defenses.mart import boosted_cross_entropy

EPS = 0.08
DATA = dataset(eps=EPS)


def made(name, **settings):
    kind = registry.get(name)
    sizes = {"width": 4, "batch_size": 18, "epochs": 1} | (
        {} if name in ("free_at", "fgsm_at") else {"steps": 2}
    )
    return kind(replaced(kind.recipes["tiny"], sizes | settings))


def network(seed=0):
    """A ResNet-18 in float64 whose BatchNorm statistics are not the initial ones."""
    model = initial(made("pgd_at"), DATA, seed).double().train()
    model(batch(0)[0])
    return model


def batch(step, n=12):
    # up to black and white, so that the box binds
    x, y = DATA.train.batch(slice(4 * step, 4 * step + n))
    return ((x.double() - 0.5) * 1.4 + 0.5).clamp(0, 1), y


def grey(step):
    """Images that no perturbation of 0.05 takes out of the box."""
    x, y = batch(step)
    return 0.8 * x + 0.1, y


def optimiser(model):
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def stepped(name, steps=3, memory=None, batch=batch, **settings):
    """The network after some steps of a defense's last stage, and their losses."""
    model, part = network(), made(name, **settings).stages(DATA)[-1]
    part.memory.update(memory or {})
    moved = optimiser(model)
    return model, [part.step(model, *batch(step), Rng(step), [moved]).item() for step in range(steps)]


def by_hand(step_loss, steps=3, batch=batch):
    """The network after some steps of SGD on `step_loss(model, x, y, rng)`, and their losses."""
    model = network()
    moved, losses = optimiser(model), []
    for step in range(steps):
        loss = step_loss(model, *batch(step), Rng(step))
        moved.zero_grad()
        loss.backward()
        moved.step()
        losses.append(loss.item())
    return model, losses


def assert_same(one, two, buffers=True):
    (model, losses), (other, others) = one, two
    assert losses == pytest.approx(others, rel=1e-9)
    states = (
        (model.state_dict(), other.state_dict())
        if buffers
        else (
            dict(model.named_parameters()),
            dict(other.named_parameters()),
        )
    )
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-8, atol=1e-10, msg=key)


def ascended(model, x, start, gain, eps=EPS, steps=2, step_size=None):
    """Projected sign ascent of `gain(logits)` on a copy of the model in eval mode."""
    model = copy.deepcopy(model).eval()
    x_adv = torch.minimum(torch.maximum(start, x - eps), x + eps).clamp(0, 1)
    for _ in range(steps):
        point = x_adv.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(gain(model(point)), point)
        moved = x_adv + (step_size or EPS / 4) * gradient.sign()
        x_adv = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
    return x_adv


def divergence(p, q):
    p, q = p.softmax(1), q.softmax(1)
    return (p * (p / q).log()).sum(1)


def noisy(x, rng):
    return x + 0.001 * rng.at("start").normal(x)


def trades_images(model, x, rng, **how):
    with torch.no_grad():
        clean = copy.deepcopy(model).eval()(x)
    return ascended(model, x, noisy(x, rng), lambda logits: divergence(clean, logits).sum(), **how)


def pgd_images(model, x, y, rng):
    start = x + EPS * (2 * rng.at("start").uniform(x) - 1)
    return ascended(model, x, start, lambda logits: F.cross_entropy(logits, y, reduction="sum"))


def trades_loss(beta):
    def loss(model, x, y, rng):
        x_adv = trades_images(model, x, rng)
        clean, attacked = model(x), model(x_adv)
        return F.cross_entropy(clean, y) + beta * divergence(clean, attacked).mean()

    return loss


# ---------------------------------------------------------------------------------------------------------------------
# TRADES


def test_trades_is_cross_entropy_and_beta_times_the_divergence_at_the_furthest_image():
    assert_same(stepped("trades", beta=6.0), by_hand(trades_loss(6.0)))


def test_the_furthest_image_is_so_from_the_clean_answer_to_the_attacked_one():
    # far enough out for the two directions of the divergence to part
    model, (x, _) = network(), batch(0)
    found = furthest(model, x, Linf(0.4), rng=Rng(3), steps=5, step_size=0.1)
    expected = trades_images(model, x, Rng(3), eps=0.4, steps=5, step_size=0.1)
    torch.testing.assert_close(found, expected)
    assert model.training


def test_trades_at_beta_zero_is_standard_training():
    plain = by_hand(lambda model, x, y, rng: F.cross_entropy(model(x), y))
    # BatchNorm also sees the attacked images, which decides nothing while training
    assert_same(stepped("trades", beta=0.0), plain, buffers=False)


def test_trades_lets_gradients_through_the_clean_answer_too():
    model, (x, y) = network(), batch(0)
    loss = made("trades", beta=6.0).stages(DATA)[0].loss(model, x, y, Rng(0))
    found = torch.autograd.grad(loss, model.net.conv1.weight)[0]
    other, x_adv = network(), trades_images(network(), x, Rng(0))
    clean, attacked = other(x), other(x_adv)
    halved = F.cross_entropy(clean, y) + 6 * divergence(clean.detach(), attacked).mean()
    assert not torch.allclose(found, torch.autograd.grad(halved, other.net.conv1.weight)[0], rtol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# MART


def mart_loss(beta):
    def loss(model, x, y, rng):
        x_adv = ascended(model, x, noisy(x, rng), lambda logits: F.cross_entropy(logits, y, reduction="sum"))
        clean, attacked = model(x), model(x_adv)
        total = 0.0
        for z, z_adv, label in zip(clean, attacked, y, strict=True):
            p, p_adv = z.softmax(0), z_adv.softmax(0)
            best_wrong = max(p_adv[k] for k in range(len(p)) if k != label)
            total = total - p_adv[label].log() - (1 - best_wrong).log()
            total = total + beta * (p * (p / p_adv).log()).sum() * (1 - p[label])
        return total / len(y)

    return loss


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_mart_is_the_boosted_cross_entropy_and_at_beta_zero_that_alone(beta):
    assert_same(stepped("mart", beta=beta), by_hand(mart_loss(beta)))


def test_the_boosted_cross_entropy_is_finite_however_sure_a_wrong_answer_is():
    logits = torch.tensor([[0.0, 500.0, -20.0], [300.0, 0.0, 0.0]], requires_grad=True)
    loss = boosted_cross_entropy(logits, torch.tensor([0, 0]))
    loss.sum().backward()
    # -log p_y = 500 and -log(1 - p_wrong) = 500 where the answer is wrong; log(1 - e^-300) where it is right
    assert loss.tolist() == pytest.approx([1000.0, 0.0], abs=1e-3)
    assert logits.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Free-AT


def free_by_hand(replays, sizes, step=EPS):
    """Algorithm 1, written out, on batches of these sizes; the network, the perturbation and the losses."""
    model, d = network(), torch.zeros(18, *DATA.shape, dtype=torch.float64)
    moved, losses = optimiser(model), []
    for number, size in enumerate(sizes):
        x, y = batch(number, size)
        for _ in range(replays):
            mine = torch.maximum(torch.minimum(d[:size], 1 - x), -x).requires_grad_()
            loss = F.cross_entropy(model(x + mine), y)
            moved.zero_grad()
            loss.backward()
            moved.step()
            d = d.clone()
            d[:size] = (mine.detach() + step * mine.grad.sign()).clamp(-EPS, EPS)
            d[:size] = torch.maximum(torch.minimum(d[:size], 1 - x), -x)
        losses.append(loss.item())
    return model, losses, d


@pytest.mark.parametrize(("replays", "sizes"), [(1, (12, 12)), (3, (18, 12, 18))])
def test_free_at_moves_weights_and_images_by_one_backward_pass_and_carries_the_perturbation(replays, sizes):
    model, (stage,) = network(), made("free_at", replays=replays).stages(DATA)
    moved = optimiser(model)
    losses = [stage.step(model, *batch(n, size), Rng(n), [moved]).item() for n, size in enumerate(sizes)]
    expected, others, d = free_by_hand(replays, sizes)
    assert_same((model, losses), (expected, others))
    torch.testing.assert_close(stage.memory["d"], d)
    assert d.abs().amax() == pytest.approx(EPS)


def test_free_at_replayed_once_under_a_fixed_perturbation_is_standard_training_on_it():
    d = 0.05 * torch.randn(18, *DATA.shape, dtype=torch.float64).sign()
    fixed = stepped("free_at", replays=1, step_size=1e-14, memory={"d": d}, batch=grey)
    plain = by_hand(lambda model, x, y, rng: F.cross_entropy(model(x + d[: len(x)]), y), batch=grey)
    assert_same(fixed, plain)


def test_free_at_steps_as_often_as_it_replays(monkeypatch):
    taken, real = [], SGD.step
    monkeypatch.setattr(SGD, "step", lambda self: (taken.append(1), real(self)))
    stepped("free_at", steps=2, replays=4)
    assert len(taken) == 8


# ---------------------------------------------------------------------------------------------------------------------
# AWP


def identical(one, two):
    assert one[1] == two[1]
    for key, value in one[0].state_dict().items():
        assert torch.equal(value, two[0].state_dict()[key]), key


@pytest.mark.parametrize(("base", "known"), [("pgd", "pgd_at"), ("trades", "trades")])
def test_awp_at_gamma_zero_is_what_it_is_based_on_bit_for_bit(base, known):
    identical(stepped("awp", base=base, gamma=0.0, warmup=0), stepped(known))


def awp_by_hand(base, gamma, steps=3):
    """As the authors do it: a copy of the network, moved by SGD, says where the worst weights lie."""
    model = network()
    moved, losses = optimiser(model), []
    for step in range(steps):
        x, y = batch(step)
        rng = Rng(step)
        x_adv = pgd_images(model, x, y, rng) if base == "pgd" else trades_images(model, x, rng)

        def objective(net, x=x, y=y, x_adv=x_adv):
            if base == "pgd":
                return F.cross_entropy(net(x_adv), y)
            clean, attacked = net(x), net(x_adv)
            return F.cross_entropy(clean, y) + 6 * divergence(clean, attacked).mean()

        proxy = copy.deepcopy(model)
        away = SGD(proxy.parameters(), lr=0.01)
        away.zero_grad()
        (-objective(proxy)).backward()
        away.step()
        change = {}
        for (name, w), p in zip(model.named_parameters(), proxy.parameters(), strict=True):
            if w.dim() > 1:
                diff = (p - w).detach()
                change[name] = gamma * w.detach().norm() / diff.norm() * diff
        with torch.no_grad():
            for name, w in model.named_parameters():
                w.add_(change.get(name, 0))
        loss = objective(model)
        moved.zero_grad()
        loss.backward()
        moved.step()
        with torch.no_grad():
            for name, w in model.named_parameters():
                w.sub_(change.get(name, 0))
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize(("base", "gamma"), [("pgd", None), ("trades", None), ("pgd", 0.1)])
def test_awp_follows_the_gradient_at_the_worst_weights_nearby(base, gamma):
    used = {"pgd": 0.01, "trades": 0.005}[base] if gamma is None else gamma
    found = stepped("awp", base=base, gamma=gamma, warmup=0)
    assert_same(found, awp_by_hand(base, used))


def test_each_layer_is_moved_by_its_share_of_its_own_length_uphill_and_no_statistics_are_learnt():
    model, (x, y) = network(), batch(0)
    before = copy.deepcopy(model.state_dict())

    def objective(net):
        return F.cross_entropy(net(x), y)

    away = awp.worst_weights(model, objective, 0.02)
    assert [w.dim() > 1 for w in model.parameters()].count(True) == len(away)
    for weight, v in away.items():
        torch.testing.assert_close(v.norm(), 0.02 * weight.detach().norm())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    at = objective(model).item()
    with torch.no_grad():
        for weight, v in away.items():
            weight.add_(v)
    assert objective(model).item() > at


def test_awp_puts_the_weights_back_after_its_step():
    model, (stage,) = network(), made("awp").stages(DATA)
    before = copy.deepcopy(dict(model.named_parameters()))
    stage.step(model, *batch(0), Rng(0), [SGD(model.parameters(), lr=0.0)])
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name], rtol=1e-12, atol=1e-14)


def test_awp_warms_up_without_moved_weights(tmp_path):
    def losses(folder, **settings):
        trained = train(made("awp", epochs=2, **settings), DATA, seed=0, folder=tmp_path / folder, quiet=True)
        return [row["loss"] for row in trained.history]

    plain, warmed, never = (
        losses("plain", gamma=0.0),
        losses("warmed", gamma=0.1, warmup=1),
        losses("never", gamma=0.1, warmup=2),
    )
    assert warmed[0] == plain[0] and warmed[1] != plain[1] and never == plain


# ---------------------------------------------------------------------------------------------------------------------
# FRL


ZERO = {name: torch.zeros(3) for name in ("clean", "added", "margin")}


def test_frl_with_zero_multipliers_is_trades():
    assert_same(stepped("frl", memory=ZERO), by_hand(trades_loss(1.5)))
    assert_same(stepped("frl", memory=ZERO), stepped("trades", beta=1.5))


def test_frl_weighs_classes_and_gives_each_a_ball_of_its_own():
    memory = {
        "clean": torch.tensor([0.2, 0.0, 0.1], dtype=torch.float64),
        "added": torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64),
        "margin": torch.tensor([-1.0, 0.1, 2.0], dtype=torch.float64),
    }
    # 1/3 + λ - Σλ/3, and clip(exp 2λ, 0.98, 3)
    of_clean = torch.tensor([1 / 3 + 0.2 - 0.1, 1 / 3 - 0.1, 1 / 3 + 0.1 - 0.1], dtype=torch.float64)
    of_added = torch.tensor([1 / 6, 1 / 6 + 0.5, 1 / 6], dtype=torch.float64)
    radii = EPS * torch.tensor([0.98, 1.2214027581601699, 3.0], dtype=torch.float64)

    def loss(model, x, y, rng):
        x_adv = trades_images(model, x, rng, eps=radii[y][:, None, None, None], step_size=3 * EPS / 4)
        clean, attacked = model(x), model(x_adv)
        errors, added = F.cross_entropy(clean, y, reduction="none"), divergence(clean, attacked)
        return (of_clean[y] * errors).sum() / of_clean[y].sum() + 1.5 * (
            of_added[y] * added
        ).sum() / of_added[y].sum()

    assert_same(stepped("frl", memory=memory), by_hand(loss))


class Told(HeldOut):
    """Held-out images whose answers are given: four of each class."""

    @property
    def labels(self):
        return torch.arange(3).repeat_interleave(4)

    def right(self, model, attack=None):
        clean, robust = [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0]
        return torch.tensor(clean if attack is None else robust).bool()


def test_multipliers_follow_the_classes_that_err_more_than_the_mean():
    (_, stage) = made("frl", reweight=0.4, remargin=0.3, delta=0.05).stages(DATA)
    for _ in range(2):
        found = stage.observe(None, Told(DATA.train), [])
    # errors: 0, 1/4 and 1/2, mean 1/4; added under attack: 1/4, 1/2 and 0, mean 1/4
    assert found == {"worst_clean": 0.5, "worst_robust": 0.25}
    clean, added = [-0.3, -0.05, 0.2], [-0.05, 0.2, -0.3]
    assert stage.memory["clean"].tolist() == pytest.approx([0, 0, 2 * 0.4 * clean[2]])
    assert stage.memory["added"].tolist() == pytest.approx([0, 2 * 0.8 * added[1], 0])
    assert stage.memory["margin"].tolist() == pytest.approx([2 * 0.3 * value for value in added])


@pytest.mark.parametrize(
    ("given", "kept"),
    [([-1.0, 0.2, 0.1], [0, 0.2, 0.1]), ([0.6, -1.0, 0.4], [0.3, 0, 0.2]), ([0.0, 0.0, 0.0], [0, 0, 0])],
)
def test_multipliers_are_never_negative_and_leave_half_of_the_weight_to_all(given, kept):
    multipliers = frl.shared(torch.tensor(given))
    assert multipliers.tolist() == pytest.approx(kept)
    weights = frl.weights(multipliers)
    assert float(weights.sum()) == pytest.approx(1) and weights.min() >= 1 / 6


def test_a_class_without_held_out_images_is_as_fair_as_the_mean():
    y, errors = torch.tensor([0, 0, 2, 2]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert frl.excess(errors, y, 4).tolist() == [0.25, 0, -0.25, 0]
    assert frl.worst(torch.tensor([True, False, True, True]), y, 4) == 0.5


def test_frl_logs_its_worst_class_in_its_second_stage(tmp_path):
    history = train(made("frl", fair_epochs=2), DATA, seed=0, folder=tmp_path, quiet=True).history
    assert ["worst_robust" in row for row in history] == [False, True, True]
    assert all(0 <= row["worst_robust"] <= row["worst_clean"] <= 1 for row in history[1:])


# ---------------------------------------------------------------------------------------------------------------------
# what they cost


@pytest.mark.parametrize(
    ("name", "settings", "passes", "forwards"),
    [
        ("fgsm_at", {}, 2, 0),
        ("fgsm_at", {"half_batch": True}, 1.5, 0),
        ("fgsm_at", {"variant": "rs", "clean_weight": 0.5}, 3, 0),
        ("pgd_at", {"steps": 10}, 11, 0),
        ("trades", {"steps": 10}, 12, 1),
        ("mart", {"steps": 10}, 12, 0),
        ("free_at", {"replays": 5}, 5, 0),
        ("awp", {"steps": 10}, 12, 0),
        ("awp", {"steps": 10, "base": "trades", "warmup": 0}, 14, 1),
        ("frl", {"steps": 3, "fair_epochs": 2}, 15, 3),
    ],
)
def test_passes_are_counted_as_the_equations_say(name, settings, passes, forwards, tmp_path):
    trained = train(made(name, **settings), DATA, seed=0, folder=tmp_path, quiet=True)
    assert (trained.passes, trained.forwards) == (passes, forwards)
