"""DWF: the limits in which it is something known, and what its two phases show to whom."""

import copy

import pytest
import torch
from learnable import dataset
from torch import nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.fgsm import fgsm
from bench.attacks.pgd import pgd
from bench.config import replaced
from bench.errors import UsageError
from bench.model import Normalized
from bench.rng import Rng
from bench.threat import Linf
from bench.train import initial, train
from defenses.dwf import DWF, Config, Mixture, own_images

DATA = dataset()
SMALL = {
    "benign": 1,
    "fgsm": 2,
    "pgd": 2,
    "width": 4,
    "gate_width": 8,
    "fgsm_eps": (0.02, 0.05, 0.09),
    "pgd_steps": (1, 2, 3),
    "eps": 0.06,
    "step_size": 0.02,
    "expert_epochs": 1,
    "joint_epochs": 1,
    "expert_lr": 0.05,
    "joint_lr": 0.05,
    "batch_size": 18,
}
EXPERTS = 5
HERE = Rng(0)


def dwf(**settings) -> DWF:
    return DWF(Config(**SMALL | settings))


def mixture(seed=0, **settings) -> Mixture:
    """A mixture in float64 whose BatchNorm statistics are not the initial ones and whose gate prefers something."""
    made = initial(dwf(**settings), DATA, seed).double()
    made.train()(batch(30)[0])
    with torch.no_grad():
        made.gating[-1].weight.mul_(20)
    return made.eval()


def batch(n=6, data=DATA):
    x, y = data.train.batch(slice(0, n))
    # up to black and white, so that the box binds
    return ((x.double() - 0.5) * 1.4 + 0.5).clamp(0, 1), y


def alone(model: Mixture, i: int) -> Normalized:
    """The `i`-th expert as a network of its own."""
    net = resnet18(channels=1, classes=3, width=4).double()
    net.load_state_dict({name: value.clone() for name, value in model.experts.state_of(i, i + 1).items()})
    return Normalized(net, DATA.mean, DATA.std).double().train(model.training)


# ---------------------------------------------------------------------------------------------------------------------
# the mixture


def test_the_recipes_of_the_paper_and_for_one_gpu_have_nine_experts_of_full_width():
    for recipe in ("paper", "fast"):
        c = DWF.recipes[recipe]
        assert (c.benign, c.fgsm, c.pgd, c.width, c.gate_width) == (1, 4, 4, 64, 128)
        assert c.fgsm_eps == (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    paper = DWF.recipes["paper"]
    assert paper.pgd_steps == (10, 20, 30, 40, 50)
    assert (paper.expert_epochs, paper.joint_epochs, paper.batch_size) == (200, 100, 128)
    assert (paper.expert_lr, paper.joint_lr, paper.weight_decay) == (0.1, 0.01, 5e-4)


def test_the_experts_are_resnet18_of_the_stated_size_and_the_gate_a_small_mlp():
    with torch.device("meta"):
        made = Mixture(Config(), dataset(channels=3, classes=10))
    assert sum(p.numel() for p in made.experts.parameters()) == 9 * 11_173_962
    assert [tuple(p.shape) for p in made.gating.parameters()] == [(128, 192), (128,), (9, 128), (9,)]


def test_weights_are_positive_and_sum_to_one():
    weights = mixture().gate(batch(30)[0]).softmax(1)
    assert weights.shape == (30, EXPERTS)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(30).double())
    assert weights.std(0).max() > 0.01, "the gate of this test looks at its input"


def test_the_output_is_the_weighted_sum_of_the_experts_logits():
    model, (x, _) = mixture(), batch()
    logits, weights = torch.stack([alone(model, i)(x) for i in range(EXPERTS)], 1), model.gate(x).softmax(1)
    torch.testing.assert_close(model.all_outputs(x), logits)
    torch.testing.assert_close(model(x), sum(weights[:, i, None] * logits[:, i] for i in range(EXPERTS)))
    assert torch.equal(model.selected(x), weights.argmax(1))


def test_of_identical_experts_the_mixture_is_the_expert_whatever_the_gate():
    model, (x, _) = mixture(), batch()
    one = alone(model, 2)
    with torch.no_grad():
        for i in range(EXPERTS):
            for name, tensor in model.experts.state_of(i, i + 1).items():
                tensor.copy_(one.net.state_dict()[name])
    for scale in (0.0, 1.0, 30.0):
        with torch.no_grad():
            model.gating[-1].weight.mul_(scale).add_(torch.randn_like(model.gating[-1].weight))
        torch.testing.assert_close(model(x), one(x))


@pytest.mark.parametrize("chosen", range(EXPERTS))
def test_with_a_gate_that_is_sure_the_mixture_is_that_expert(chosen):
    model, (x, _) = mixture(), batch()
    with torch.no_grad():
        model.gating[-1].weight.zero_()
        model.gating[-1].bias.copy_(200 * F.one_hot(torch.tensor(chosen), EXPERTS))
    torch.testing.assert_close(model(x), alone(model, chosen)(x))
    assert (model.selected(x) == chosen).all()


def test_the_input_gradient_is_the_numerical_one_and_the_gates_path_is_part_of_it():
    model, (x, y) = mixture(), batch(4)

    def loss(x):
        return F.cross_entropy(model(x), y, reduction="sum")

    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    for _ in range(5):
        direction, step = torch.randn_like(x), 1e-7
        with torch.no_grad():
            numerical = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(numerical), rel=1e-5)

    fixed = torch.einsum("be,bek->bk", model.gate(x).softmax(1).detach(), model.all_outputs(point))
    (without_gate,) = torch.autograd.grad(F.cross_entropy(fixed, y, reduction="sum"), point)
    assert (gradient - without_gate).abs().max() > 0.01 * gradient.abs().max()


def test_images_of_other_sizes_and_channels_have_a_mixture_too():
    data = dataset(channels=3, side=32, classes=7)
    x = torch.rand(2, 3, 32, 32)
    assert dwf().build(data).eval()(x).shape == (2, 7)


def test_a_mixture_of_nobody_is_refused():
    with pytest.raises(UsageError, match="a mixture needs an expert"):
        dwf(benign=0, fgsm=0, pgd=0).build(DATA)


def test_with_a_uniform_gate_the_mixture_is_the_mean_of_its_experts():
    model, (x, _) = initial(dwf(gate="uniform"), DATA, 0).double().eval(), batch()
    torch.testing.assert_close(model(x), model.all_outputs(x).mean(1))
    assert not any(name.startswith("gating") for name, _ in model.named_parameters())


def test_over_frozen_experts_only_the_gate_learns_end_to_end(tmp_path):
    def trained(epochs, folder):
        return train(
            dwf(frozen_experts=True, joint_epochs=epochs), DATA, seed=0, folder=folder, quiet=True
        ).last

    before, after = trained(0, tmp_path / "apart"), trained(1, tmp_path / "whole")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if name.startswith("gating.")}


def test_a_uniform_gate_over_frozen_experts_is_refused():
    with pytest.raises(UsageError, match="leaves nothing to train"):
        dwf(gate="uniform", frozen_experts=True).build(DATA)


@pytest.mark.parametrize("empty", ["fgsm_eps", "pgd_steps"])
def test_an_empty_set_to_draw_from_is_refused(empty):
    with pytest.raises(UsageError, match=f"{empty}: Tuple should have at least 1 item"):
        replaced(Config(), {empty: "[]"})


# ---------------------------------------------------------------------------------------------------------------------
# phase 1, the experts apart


def own(model, rng=HERE, n=6, **settings):
    """The images of every expert, `(e, n, 1, 8, 8)`, and what they were made of."""
    c = Config(**SMALL | settings)
    x, y = batch(n)
    images = own_images(model, x, y, c, Linf(c.eps), rng)
    return images.unflatten(1, (-1, 1)).transpose(0, 1), x, y


def test_the_benign_expert_is_shown_clean_images_and_the_others_what_fools_them():
    images, x, _ = own(mixture())
    assert images.shape == (EXPERTS, 6, 1, 8, 8)
    assert torch.equal(images[0], x)
    assert all(not torch.equal(images[i], x) for i in range(1, EXPERTS))


def test_fgsm_experts_may_be_shown_the_second_half_of_a_batch_clean():
    images, x, _ = own(mixture(), mix_clean=True)
    for i in (1, 2):
        assert torch.equal(images[i][3:], x[3:])
        assert all(
            not torch.equal(crafted, clean) for crafted, clean in zip(images[i][:3], x[:3], strict=True)
        )
    assert all(not torch.equal(images[i][3:], x[3:]) for i in (3, 4))


def test_every_experts_images_lie_in_its_ball_and_in_the_box():
    images, x, _ = own(mixture())
    for i in (1, 2):
        radius = (images[i] - x).abs().max().item()
        assert min(abs(radius - eps) for eps in SMALL["fgsm_eps"]) < 1e-6
    for i in (3, 4):
        assert Linf(SMALL["eps"]).contains(images[i], x).all()
    assert images.min() >= 0 and images.max() <= 1


def test_fgsm_experts_are_shown_fgsm_against_themselves():
    model = mixture()
    images, x, y = own(model)
    for i in (1, 2):
        eps = min(SMALL["fgsm_eps"], key=lambda e: abs(e - (images[i] - x).abs().max().item()))
        torch.testing.assert_close(images[i], fgsm(alone(model, i), x, y, Linf(eps)))
        assert not torch.allclose(images[i], fgsm(model, x, y, Linf(eps)))


def test_all_channels_of_an_image_are_moved_by_one_radius():
    data = dataset(channels=3)
    model, (x, y) = initial(dwf(), data, 0).double().eval(), batch(data=data)
    x = 0.25 + x / 2
    seen = set()
    for step in range(5):
        images = own_images(model, x, y, dwf(pgd=0, benign=0).config, Linf(0.1), Rng(step))
        for one in images.split(3, 1):
            moved = (one - x).abs().amax((0, 2, 3))
            torch.testing.assert_close(moved, moved[:1].expand(3))
            seen.add(round(moved[0].item(), 4))
    assert len(seen) > 1


def test_pgd_experts_are_shown_pgd_against_themselves():
    model = mixture()
    images, x, y = own(model, pgd_steps=(2,))
    start = Linf(SMALL["eps"]).random_start(x.repeat(1, 2, 1, 1), Rng(0).at("pgd").at("start")).chunk(2, 1)
    for i in (3, 4):
        one, threat = alone(model, i), Linf(SMALL["eps"])
        x_adv = start[i - 3]
        for _ in range(2):
            point = x_adv.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(one(point), y), point)
            x_adv = threat.project(x_adv + SMALL["step_size"] * gradient.sign(), x)
        torch.testing.assert_close(images[i], x_adv)
    assert not torch.equal(start[0], start[1]), "each expert has a start of its own"


def test_drawn_radii_cover_their_set_and_experts_draw_apart():
    model, seen, apart = mixture(), set(), False
    for step in range(25):
        images, x, _ = own(model, Rng(step), n=3, pgd=0)
        radii = [round((images[i] - x).abs().max().item(), 4) for i in (1, 2)]
        seen |= set(radii)
        apart |= radii[0] != radii[1]
    assert seen == set(SMALL["fgsm_eps"]) and apart


def steps_taken(monkeypatch, loss_of):
    """The step numbers that PGD was asked for in 30 batches."""
    asked = []

    def spy(*args, steps, **kwargs):
        asked.append(steps)
        return pgd(*args, steps=1, **kwargs)

    monkeypatch.setattr("defenses.dwf.pgd", spy)
    for step in range(30):
        loss_of(Rng(step))
    return asked


def test_drawn_step_numbers_of_pgd_experts_cover_their_set(monkeypatch):
    model, wanted = mixture(benign=0, fgsm=0, pgd=1), (10, 20, 30, 40, 50)
    settings = {"benign": 0, "fgsm": 0, "pgd": 1, "pgd_steps": wanted}
    assert set(steps_taken(monkeypatch, lambda rng: own(model, rng, n=2, **settings))) == set(wanted)


def test_crafting_leaves_the_mode_and_the_statistics_of_a_model_in_training_alone():
    model = mixture().train()
    model.experts.net.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    own(model)
    assert model.training and model.experts.net.layer1.training and not model.experts.net.bn1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def sgd(parameters, lr=0.05):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def test_phase_one_leaves_the_gate_alone_and_trains_every_expert_as_it_would_be_alone():
    model, (stage, _) = mixture().train(), dwf().stages(DATA)
    singles = [alone(model, i) for i in range(EXPERTS)]
    gate = copy.deepcopy(model.gating.state_dict())
    (group,) = stage.groups(model)
    assert {id(p) for p in group} == {id(p) for p in model.experts.parameters()}
    optimiser, optimisers = sgd(group), [sgd(one.parameters()) for one in singles]
    for step in range(2):
        rng = Rng(step)
        images, _, y = own(model, rng)
        loss = stage.step(model, *batch(), rng, [optimiser])
        losses = [F.cross_entropy(one(x), y) for one, x in zip(singles, images, strict=True)]
        torch.testing.assert_close(loss, sum(losses))
        for one_loss, one_optimiser in zip(losses, optimisers, strict=True):
            one_optimiser.zero_grad()
            one_loss.backward()
            one_optimiser.step()
    for i, one in enumerate(singles):
        for name, tensor in model.experts.state_of(i, i + 1).items():
            torch.testing.assert_close(tensor, one.net.state_dict()[name], msg=name)
    assert all(torch.equal(gate[key], value) for key, value in model.gating.state_dict().items())


def test_a_benign_expert_without_company_is_standard_training_step_for_step():
    model = mixture(benign=1, fgsm=0, pgd=0).train()
    stage, _ = dwf(benign=1, fgsm=0, pgd=0).stages(DATA)
    one = alone(model, 0)
    mine, theirs = sgd(*stage.groups(model)), sgd(one.parameters())
    for step in range(3):
        x, y = (part[6 * step : 6 * step + 6] for part in batch(18))
        loss = stage.step(model, x, y, Rng(step), [mine])
        plain = F.cross_entropy(one(x), y)
        torch.testing.assert_close(loss, plain)
        theirs.zero_grad()
        plain.backward()
        theirs.step()
        for name, tensor in model.experts.state_of(0, 1).items():
            torch.testing.assert_close(tensor, one.net.state_dict()[name], msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# phase 2, all of it together


class Spy(nn.Module):
    """Notes what a model is shown in train mode."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shown = model, []

    def forward(self, x):
        if self.training:
            self.shown.append(x.detach().clone())
        return self.model(x)


def end_to_end(rng=HERE, n=6, model=None, **settings):
    """The batch that phase 2 learns from, in its three parts, and what it was made of."""
    _, stage = dwf(**settings).stages(DATA)
    spy, (x, y) = Spy(mixture() if model is None else model).train(), batch(n)
    loss = stage.loss(spy, x, y, rng)
    (shown,) = spy.shown
    return shown.split(n), x, y, loss, spy.model


def test_the_batch_is_three_times_the_clean_one_and_its_parts_lie_in_their_balls():
    for step in range(5):
        parts, x, _, _, _ = end_to_end(Rng(step))
        assert [len(part) for part in parts] == [6, 6, 6]
        clean, by_fgsm, by_pgd = parts
        assert torch.equal(clean, x)
        radius = (by_fgsm - x).abs().max().item()
        assert min(abs(radius - eps) for eps in SMALL["fgsm_eps"]) < 1e-6
        assert Linf(SMALL["eps"]).contains(by_pgd, x).all() and not torch.equal(by_pgd, x)
        assert min(part.min() for part in parts) >= 0 and max(part.max() for part in parts) <= 1


def test_both_copies_are_crafted_against_the_whole_mixture():
    model = mixture()
    (_, by_fgsm, by_pgd), x, y, _, _ = end_to_end(
        model=copy.deepcopy(model), fgsm_eps=(0.05,), pgd_steps=(2,)
    )
    torch.testing.assert_close(by_fgsm, fgsm(model, x, y, Linf(0.05)))
    threat = Linf(SMALL["eps"])
    expected = pgd(model, x, y, threat, rng=Rng(0).at("pgd"), steps=2, step_size=SMALL["step_size"])
    torch.testing.assert_close(by_pgd, expected)
    for i in range(EXPERTS):
        one = alone(model, i)
        assert not torch.allclose(by_fgsm, fgsm(one, x, y, Linf(0.05)))
        assert not torch.allclose(
            by_pgd, pgd(one, x, y, threat, rng=Rng(0).at("pgd"), steps=2, step_size=SMALL["step_size"])
        )


def test_the_loss_is_plain_cross_entropy_over_the_three_parts():
    model = mixture()
    parts, _, y, loss, _ = end_to_end(model=copy.deepcopy(model))
    model.train()
    torch.testing.assert_close(loss, F.cross_entropy(model(torch.cat(parts)), torch.cat([y, y, y])))


def test_drawn_radii_and_step_numbers_cover_their_sets_end_to_end(monkeypatch):
    radii = set()

    def loss_of(rng):
        (_, by_fgsm, _), x, _, _, _ = end_to_end(rng, n=3, pgd_steps=(10, 20, 30, 40, 50))
        radii.add(round((by_fgsm - x).abs().max().item(), 4))

    assert set(steps_taken(monkeypatch, loss_of)) == {10, 20, 30, 40, 50}
    assert radii == set(SMALL["fgsm_eps"])


def test_the_radius_and_the_step_of_pgd_are_the_datasets_by_default(monkeypatch):
    asked = []

    def spy(model, x, y, threat, *, step_size, **kwargs):
        asked.append((threat.eps, step_size))
        return x

    monkeypatch.setattr("defenses.dwf.pgd", spy)
    end_to_end(eps=None, step_size=None)
    assert asked == [(DATA.eps, None)]


def test_every_expert_and_the_gate_move_end_to_end_and_modes_are_put_back():
    model, (_, stage) = mixture().train(), dwf().stages(DATA)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    experts = [
        {name: t.clone() for name, t in model.experts.state_of(i, i + 1).items()} for i in range(EXPERTS)
    ]
    assert stage.groups is None, "nothing is frozen"
    stage.step(model, *batch(), Rng(0), [sgd(model.parameters())])
    assert all(part.training for part in model.modules())
    assert all(not torch.equal(before[name], p) for name, p in model.gating.named_parameters(prefix="gating"))
    for i, state in enumerate(experts):
        moved = model.experts.state_of(i, i + 1)
        for name, parameter in model.experts.net.named_parameters():
            assert not torch.equal(moved[name], state[name]), (i, name)
            assert parameter.grad.chunk(EXPERTS)[i].any(), (i, name)


def test_with_one_expert_end_to_end_is_a_step_of_that_network_on_the_three_parts():
    settings = {"benign": 1, "fgsm": 0, "pgd": 0}
    model, (_, stage) = mixture(**settings).train(), dwf(**settings).stages(DATA)
    one, frozen = alone(model, 0), copy.deepcopy(model)
    parts, _, y, _, _ = end_to_end(model=frozen, **settings)
    stage.step(model, *batch(), Rng(0), [sgd(model.parameters())])
    theirs = sgd(one.parameters())
    F.cross_entropy(one(torch.cat(parts)), y.repeat(3)).backward()
    theirs.step()
    for name, tensor in model.experts.state_of(0, 1).items():
        torch.testing.assert_close(tensor, one.net.state_dict()[name], msg=name)


def test_trained_by_the_harness_phase_two_begins_with_the_experts_and_an_untouched_gate(tmp_path):
    only_experts = train(dwf(joint_epochs=0), DATA, seed=0, folder=tmp_path / "a", quiet=True).model
    untrained = initial(dwf(), DATA, 0)
    assert torch.equal(only_experts.gating[2].weight, untrained.gating[2].weight)
    assert not torch.equal(only_experts.experts.net.linear.weight, untrained.experts.net.linear.weight)
    result = train(dwf(), DATA, seed=0, folder=tmp_path / "b", quiet=True)
    assert [row["stage"] for row in result.history] == ["experts", "end to end"]
    assert not torch.equal(result.model.gating[2].weight, untrained.gating[2].weight)
