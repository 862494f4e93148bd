import itertools
import sys

import pytest
import torch
from oracles import Hyperplane, points, small_net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.attacks.autoattack import autoattack
from bench.attacks.fgsm import fgsm, sweep
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import LOSSES, cross_entropy, margin
from bench.attacks.pgd import pgd, trajectory
from bench.attacks.torchattacks import from_torchattacks
from bench.errors import NonFinite, UsageError, VoidRun
from bench.rng import Rng
from bench.threat import L2, Linf, threat_model


def aa(model, x, y, threat, *, rng):
    return autoattack(model, x, y, threat, rng=rng, attacks=["apgd-ce"])


def ta(model, x, y, threat, *, rng):
    pytest.importorskip("torchattacks")
    if threat.norm == "L2":
        return from_torchattacks(model, x, y, threat, rng=rng, name="PGDL2", alpha=threat.eps / 4, steps=10)
    return from_torchattacks(model, x, y, threat, rng=rng, name="PGD", alpha=threat.eps / 4, steps=10)


def pgd_margin(model, x, y, threat, *, rng):
    return pgd(model, x, y, threat, rng=rng, loss=margin)


ATTACKS = {"fgsm": fgsm, "pgd": pgd, "pgd-margin": pgd_margin, "autoattack": aa, "torchattacks": ta}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])


def scene(n=24):
    model, x = Hyperplane().eval().requires_grad_(False), points(n)
    return model, x, model.labels(x), Rng(0, images=range(n))


@each_attack
@each_norm
def test_it_stays_in_ball_and_box(attack, norm):
    model, x, y, rng = scene()
    x[0, 0], x[1, 1] = 0, 1
    y = model.labels(x)
    threat = threat_model(norm, 0.3)
    assert threat.contains(attack(model, x, y, threat, rng=rng), x).all()


@each_attack
@each_norm
def test_it_breaks_what_can_be_broken(attack, norm):
    model, x, y, _ = scene()
    for i in range(0, len(x), 6):
        threat = threat_model(norm, 1.25 * float(model.margin(x[i : i + 6], norm).max()))
        x_adv = attack(model, x[i : i + 6], y[i : i + 6], threat, rng=Rng(0, images=range(6)))
        assert (model(x_adv).argmax(1) != y[i : i + 6]).all()


@each_attack
@each_norm
def test_it_never_breaks_what_cannot_be_broken(attack, norm):
    model, x, y, rng = scene()
    threat = threat_model(norm, 0.99 * float(model.margin(x, norm).min()))
    assert (model(attack(model, x, y, threat, rng=rng)).argmax(1) == y).all()


@each_attack
def test_it_draws_only_from_the_generator_it_is_given(attack):
    model, x, y, _ = scene(8)
    before = torch.random.get_rng_state()
    first = attack(model, x, y, Linf(0.05), rng=Rng(0, images=range(8)))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, attack(model, x, y, Linf(0.05), rng=Rng(0, images=range(8))))


@each_attack
def test_it_leaves_the_model_as_it_found_it(attack):
    model = small_net()
    model.requires_grad_(True)
    model[1].train()
    x = points(8)
    y = model(x).argmax(1)
    model.eval()
    model[2].train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    attack(model, x, y, Linf(0.05), rng=Rng(0, images=range(8)))
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@each_attack
def test_it_leaves_the_images_as_it_found_them(attack):
    model, x, y, rng = scene(8)
    before = x.clone()
    attack(model, x, y, Linf(0.05), rng=rng)
    assert torch.equal(x, before)


def test_fgsm_on_a_hyperplane_is_exact():
    model, x, y, _ = scene()
    for factor, broken in ((0.999, False), (1.001, True)):
        for i in range(len(x)):
            threat = Linf(factor * float(model.margin(x[i : i + 1])))
            x_adv = fgsm(model, x[i : i + 1], y[i : i + 1], threat)
            assert bool(model(x_adv).argmax(1) != y[i]) == broken


def test_a_sweep_is_fgsm_at_each_radius_for_one_gradient():
    model, x = small_net(), points(8)
    y = model(x).argmax(1)
    calls = []

    def counted(z):
        calls.append(len(z))
        return model(z)

    threats = [Linf(0.01 * i) for i in range(1, 10)]
    found = dict(sweep(counted, x, y, threats))
    assert calls == [8]
    for threat in threats:
        assert torch.equal(found[threat], fgsm(model, x, y, threat))


def test_fgsm_reaches_the_corner_that_brute_force_finds():
    """On a linear model the worst corner of the ball is known by trying all of them."""
    w = torch.tensor([[1.0, -2.0], [0.5, 3.0]])

    def model(x):
        z = (x * w).flatten(1).sum(1)
        return torch.stack([z, -z], 1)

    x, threat = torch.full((1, 1, 2, 2), 0.5), Linf(0.1)
    corners = [x + 0.1 * torch.tensor(s).view(1, 1, 2, 2) for s in itertools.product((-1.0, 1.0), repeat=4)]
    y = model(x).argmax(1)
    worst = max(float(cross_entropy(model(c), y)) for c in corners)
    assert float(cross_entropy(model(fgsm(model, x, y, threat)), y)) == pytest.approx(worst, rel=1e-6)


def test_one_step_of_pgd_is_the_equation():
    model, x = small_net(), points(4)
    y = model(x).argmax(1)
    threat, rng = Linf(0.1), Rng(5, images=range(4))
    start = threat.random_start(x, rng.at("start"))
    z = start.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
    expected = torch.clamp(start + 0.02 * g.sign(), x - 0.1, x + 0.1).clamp(0, 1)
    found = pgd(model, x, y, threat, rng=rng, steps=1, step_size=0.02)
    assert torch.allclose(found, expected, atol=1e-7)


def test_a_start_that_is_given_replaces_the_random_one_and_is_projected_first():
    model, x, y, rng = scene(4)
    threat = Linf(0.1)
    begun = pgd(model, x, y, threat, rng=rng, start=threat.random_start(x, rng.at("start")), steps=2)
    assert torch.equal(begun, pgd(model, x, y, threat, rng=rng, steps=2))
    outside = x + 0.3
    still = pgd(model, x, y, threat, rng=rng, start=outside, steps=1, step_size=0.0)
    assert torch.equal(still, threat.project(outside, x)) and torch.equal(outside, x + 0.3)


def test_a_trajectory_read_at_its_milestones_is_pgd_of_that_many_steps():
    model, x = small_net(), points(6)
    y = model(x).argmax(1)
    rng = Rng(0, images=range(6))
    read = dict(trajectory(model, x, y, Linf(0.1), rng=rng, milestones=[1, 3, 7]))
    assert list(read) == [1, 3, 7]
    for steps, x_adv in read.items():
        assert torch.equal(x_adv, pgd(model, x, y, Linf(0.1), rng=rng, steps=steps))


def test_another_seed_starts_elsewhere():
    model, x = small_net(), points(6)
    y = model(x).argmax(1)
    one, two = (
        pgd(model, x, y, Linf(0.1), rng=Rng(s, images=range(6)), steps=1, step_size=1e-3) for s in (0, 1)
    )
    assert not torch.allclose(one, two, atol=1e-3)


def test_an_image_is_attacked_alike_in_any_batch():
    model, x, y, _ = scene(6)
    together = pgd(model, x, y, Linf(0.1), rng=Rng(0, images=range(6)), steps=3)
    alone = pgd(model, x[4:5], y[4:5], Linf(0.1), rng=Rng(0, images=[4]), steps=3)
    assert torch.equal(together[4:5], alone)


@pytest.mark.parametrize("steps, eps", [(0, 0.1), (5, 1e-12)])
def test_no_step_or_no_radius_is_no_attack(steps, eps):
    model, x, y, rng = scene(6)
    read = list(trajectory(model, x, y, Linf(eps), rng=rng, milestones=[steps], random_start=steps > 0))
    x_adv = read[-1][1] if read else x
    assert torch.allclose(x_adv, x, atol=1e-6)


def test_more_eps_or_more_steps_change_the_perturbation():
    model, x = small_net(), points(6)
    y = model(x).argmax(1)
    found = [
        pgd(model, x, y, Linf(eps), rng=Rng(0, images=range(6)), steps=steps, step_size=0.004)
        for eps, steps in ((0.03, 5), (0.06, 5), (0.03, 10))
    ]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_confirmed_images_leave_the_trajectory_and_cost_no_more():
    model, x, y, rng = scene()
    sizes = []

    def counted(z):
        sizes.append(len(z))
        return model(z)

    def witness(step, rows, x_adv):
        return model(x_adv).argmax(1) != y[rows]

    eps = 1.5 * float(model.margin(x).median())
    for _, x_adv in trajectory(
        counted, x, y, Linf(eps), rng=rng, milestones=[20], step_size=eps / 10, witness=witness
    ):
        broken = model(x_adv).argmax(1) != y
    breakable = model.margin(x) < eps
    assert torch.equal(broken, breakable)
    assert (
        sizes[0] == len(x) and sizes[-1] == int((~breakable).sum()) and sizes == sorted(sizes, reverse=True)
    )


def test_an_image_that_the_witness_does_not_confirm_is_attacked_on():
    model, x, y, rng = scene(6)
    sizes = []

    def counted(z):
        sizes.append(len(z))
        return model(z)

    nobody = lambda step, rows, x_adv: torch.zeros(len(rows), dtype=torch.bool)  # noqa: E731
    list(trajectory(counted, x, y, Linf(0.5), rng=rng, milestones=[4], witness=nobody))
    assert sizes == [6, 6, 6, 6]


class Asked:
    """A model that counts the images it is asked about."""

    def __init__(self, model):
        self.model, self.images, self.calls = model, 0, 0

    def __call__(self, x):
        self.images += len(x)
        self.calls += 1
        return self.model(x)


@pytest.mark.parametrize("period", [1, 2, 4])
@pytest.mark.parametrize("norm, every", [("Linf", 1), ("Linf", 3), ("L2", 1)])
def test_iterates_that_go_round_are_known_without_asking(period, norm, every):
    # the slope of each pixel turns as the pixel crosses a grid line, so that the iterates go back and forth
    def model(x):
        z = (torch.cos(1.7 * period * torch.pi * x) * (period > 1) + 0.3 * x).flatten(1).sum(1)
        return torch.stack([-z, z], 1)

    x, rng = points(12), Rng(0, images=range(12))
    y, milestones = torch.zeros(12, dtype=torch.long), [1, 2, 3, 31, 38, 60]
    ask = {"rng": rng, "milestones": milestones, "loss": margin}
    patient, quick = Asked(model), Asked(model)
    threat = threat_model(norm, 0.2)
    expected = list(trajectory(patient, x, y, threat, **ask))
    found = list(trajectory(quick, x, y, threat, **ask, rounds=True, every=every))
    assert patient.images == 12 * 60
    assert quick.images < patient.images / 2 or norm == "L2"
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_rounds_of_a_network_are_found_whatever_their_images_do():
    model, x = small_net(), points(16)
    y = model(x).argmax(1)
    ask = {"rng": Rng(0, images=range(16)), "milestones": [5, 40, 77, 100]}
    patient, quick = Asked(model), Asked(model)
    expected = list(trajectory(patient, x, y, Linf(0.02), **ask))
    found = list(trajectory(quick, x, y, Linf(0.02), **ask, rounds=True))
    assert quick.images < patient.images / 2
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_nothing_goes_round_where_nobody_said_that_it_may():
    model, x, y, rng = scene(6)
    noisy = Asked(model)
    list(trajectory(noisy, x, y, Linf(0.01), rng=rng, milestones=[30]))
    assert noisy.images == 6 * 30


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("every", [2, 3, 50])
def test_waiting_for_the_device_less_often_breaks_the_same_images_at_the_same_step(every, rounds):
    model, x, y, rng = scene()
    eps = 1.5 * float(model.margin(x).median())

    def attacked(every):
        broke = {}

        def witness(step, rows, x_adv):
            confirmed = model(x_adv).argmax(1) != y[rows]
            broke.update({int(row): step for row in rows[confirmed]})
            return confirmed

        ask = {"rng": rng, "milestones": [4, 20], "step_size": eps / 10, "witness": witness}
        return broke, list(trajectory(model, x, y, Linf(eps), **ask, every=every, rounds=rounds))

    (broke, images), (broke_later, images_later) = attacked(1), attacked(every)
    assert broke and broke == broke_later and len(set(broke.values())) > 2
    for (_, one), (_, other) in zip(images, images_later, strict=True):
        assert torch.equal(one, other)


def test_a_witness_that_disagrees_now_and_then_is_shown_the_same_however_often_the_device_is_waited_for():
    model, x, y, rng = scene()
    eps = 2 * float(model.margin(x).median())

    def attacked(every):
        shown = []

        def witness(step, rows, x_adv):
            shown.extend((step, int(row), float(one.sum())) for row, one in zip(rows, x_adv, strict=True))
            # the model that judges is not the one that gradients come from
            return (model(x_adv).argmax(1) != y[rows]) & ((rows + step) % 3 == 0)

        ask = {"rng": rng, "milestones": [12, 40], "step_size": eps / 10, "witness": witness, "rounds": True}
        return list(trajectory(model, x, y, Linf(eps), **ask, every=every)), sorted(shown)

    images, shown = attacked(1)
    assert len(shown) > len({row for _, row, _ in shown})
    for every in (5, 10):
        images_later, shown_later = attacked(every)
        assert shown_later == shown
        for (_, one), (_, other) in zip(images, images_later, strict=True):
            assert torch.equal(one, other)


#: what waits for the device: a number is read, or how many there are
WAITING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique_dim",
    "_unique2",
}


class Waits(TorchDispatchMode):
    """Notes the number of gradients that had been taken whenever something waits for the device."""

    def __init__(self, gradients):
        super().__init__()
        self.gradients, self.at = gradients, []

    def __torch_dispatch__(self, called, types, args=(), kwargs=None):
        name = called._schema.name.split("::")[1]
        masks = args[1] if name in ("index", "index_put_", "index_put") else ()
        if name in WAITING or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.at.append((self.gradients(), name))
        return called(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_between_compactions_nothing_waits_for_the_device(norm, loss, monkeypatch):
    model, x, y, rng = scene()
    # what a CPU does otherwise, because there waiting costs nothing
    for name in ("gradient", "pgd"):
        monkeypatch.setattr(sys.modules[f"bench.attacks.{name}"], "waits", lambda values: True)
    threat = threat_model(norm, 1.5 * float(model.margin(x).median()))
    ask = {"rng": rng, "milestones": [10, 20], "step_size": threat.eps / 10, "rounds": True, "loss": loss}
    witness = lambda step, rows, x_adv: model(x_adv).argmax(1) != y[rows]  # noqa: E731
    steps = Asked(model)
    with Waits(lambda: steps.calls) as waits:
        list(trajectory(steps, x, y, threat, **ask, every=5, witness=witness))
    assert steps.calls == 20
    assert {at for at, _ in waits.at} == {5, 10, 15, 20}


@pytest.mark.parametrize("every", [1, 4])
def test_a_nan_on_the_way_is_an_error_that_knows_its_row(every):
    net, x = small_net(), points(5)
    calls = []

    def model(z):
        calls.append(len(z))
        # only in one call, so that nobody who looks later sees it in an iterate
        return (
            net(z)
            * torch.where(torch.arange(len(z)) == 3, float("inf") if len(calls) == 2 else 1, 1)[:, None]
        )

    with pytest.raises(NonFinite, match="logits are NaN") as caught:
        list(trajectory(model, x, net(x).argmax(1), Linf(0.1), rng=Rng(0), milestones=[8], every=every))
    assert caught.value.rows == [3] and len(calls) == max(2, every)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_input_gradient_is_the_numerical_one(loss):
    model = small_net().double()
    x = points(3).double()
    y = torch.tensor([0, 1, 2])
    gradient, logits = input_gradient(model, x, y, loss)
    assert torch.allclose(logits, model(x))
    direction = Rng(0).normal(x)
    h = 1e-6
    numeric = (loss(model(x + h * direction), y) - loss(model(x - h * direction), y)) / (2 * h)
    assert torch.allclose((gradient * direction).flatten(1).sum(1), numeric, rtol=1e-5, atol=1e-9)


def test_the_loss_is_summed_so_an_image_does_not_weaken_its_neighbours():
    model, x = small_net(), points(6)
    y = model(x).argmax(1)
    whole, _ = input_gradient(model, x, y, cross_entropy)
    alone, _ = input_gradient(model, x[2:3], y[2:3], cross_entropy)
    assert torch.allclose(whole[2:3], alone, atol=1e-6)


def test_eot_averages_over_the_models_own_draws():
    def noisy(x):
        return torch.stack([x.flatten(1).sum(1) * torch.rand(()), torch.zeros(len(x))], 1)

    x, y = points(2), torch.tensor([1, 1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        singles = torch.stack([input_gradient(noisy, x, y, margin)[0] for _ in range(50)])
        torch.manual_seed(0)
        mean, _ = input_gradient(noisy, x, y, margin, eot=50)
    assert torch.allclose(mean, singles.mean(0), atol=1e-6)


def test_margin_is_positive_exactly_where_the_model_errs():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.5, 1.2]])
    y = torch.tensor([0, 0, 1])
    assert torch.allclose(margin(logits, y), torch.tensor([-1.0, 3.0, -0.3]))


@pytest.mark.parametrize(
    "spoil, what", [(lambda z: z * float("nan"), "logits"), (lambda z: (z * 0).sqrt() + z, "gradients")]
)
def test_a_nan_is_an_error_that_knows_its_rows(spoil, what):
    def model(x):
        z = x.flatten(1)[:, :3]
        return torch.cat([z[:2], spoil(z[2:3]), z[3:]])

    with pytest.raises(NonFinite, match=f"{what} are NaN or infinite") as caught:
        input_gradient(model, points(5), torch.zeros(5, dtype=torch.long), cross_entropy)
    assert caught.value.rows == [2]


@pytest.mark.parametrize(
    "cut", [lambda m, x: m(x).detach(), lambda m, x: m(x * 0 + 0.5).detach().requires_grad_()]
)
def test_a_model_that_hides_its_gradient_is_an_error(cut):
    model = small_net()
    with pytest.raises(VoidRun, match="no gradient|do not depend"):
        input_gradient(lambda x: cut(model, x), points(2), torch.tensor([0, 1]), cross_entropy)


def test_an_unknown_autoattack_component_is_named():
    model, x, y, rng = scene(2)
    with pytest.raises(UsageError, match="no AutoAttack component named 'apgd-x'"):
        autoattack(model, x, y, Linf(0.1), rng=rng, attacks=["apgd-x"])


def test_an_unknown_torchattacks_attack_is_named():
    pytest.importorskip("torchattacks")
    model, x, y, rng = scene(2)
    with pytest.raises(UsageError, match="no attack named 'PDG'"):
        from_torchattacks(model, x, y, Linf(0.1), rng=rng, name="PDG")


def test_settings_that_torchattacks_refuses_are_named():
    pytest.importorskip("torchattacks")
    model, x, y, rng = scene(2)
    with pytest.raises(UsageError, match="refuses its settings"):
        from_torchattacks(model, x, y, Linf(0.1), rng=rng, name="PGD", iterations=3)


def test_a_minimum_norm_attack_is_projected_into_the_ball():
    pytest.importorskip("torchattacks")
    model, x, y, rng = scene(4)
    threat = L2(0.05)
    x_adv = from_torchattacks(model, x, y, threat, rng=rng, name="CW", steps=5)
    assert threat.contains(x_adv, x).all()
