"""JTDMoE: two mixtures that answer together, whose limits are either of them, and who moves when."""

import copy
import itertools

import pytest
import torch
from learnable import dataset
from torch.nn import functional as F

from bench import registry
from bench.attacks.mixture import runs
from bench.attacks.pgd import pgd
from bench.config import as_json, replaced
from bench.errors import UsageError
from bench.moe import as_mixture
from bench.protocol import HARD
from bench.rng import Rng
from bench.threat import Linf
from bench.train import initial, train
from defenses import pgd_at
from defenses.jtdmoe import Config, Dual, JTDMoE, lower_loss, upper_loss

DATA = dataset()
HERE = Rng(0)
THREAT = Linf(0.1)
SMALL = Config(width=4, steps=2, epochs=1, batch_size=18, experts=3)
each_mix = pytest.mark.parametrize("mix", ["logits", "probabilities"])
each_kind = pytest.mark.parametrize("router", ["st", "soft"])


def config(**settings) -> Config:
    return replaced(SMALL, settings)


def dual(seed=0, data=DATA, **settings) -> Dual:
    """In float64 and eval mode, with statistics of its own and all routes of both mixtures taken."""
    model = initial(JTDMoE(config(**settings)), data, seed).double()
    x, _ = batch(30, data)
    with torch.no_grad():
        model.train()(x)
        model.eval()
        for part in (model.standard, model.robust):
            part.router.weight *= 3
            part.router.bias -= part.gate(x).mean(0)
    return model


def batch(n=6, data=DATA):
    x, y = data.train.batch(slice(0, n))
    return x.double(), y


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# what they answer together


@each_kind
def test_at_alpha_zero_it_is_the_standard_model_and_at_one_the_robust_one(router):
    x, _ = batch(12)
    model = dual(router=router, alpha=0)
    assert torch.equal(model(x), model.standard(x))
    model = dual(router=router, alpha=1)
    assert torch.equal(model(x), model.robust(x))


@pytest.mark.parametrize(("alpha", "part"), [(0, "standard"), (1, "robust")])
def test_of_probabilities_too_its_limits_are_either_model_with_finite_gradients(alpha, part):
    (x, y), model = batch(12), dual(alpha=alpha, mix="probabilities")
    torch.testing.assert_close(model(x).softmax(1), getattr(model, part)(x).softmax(1))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    assert gradient.isfinite().all() and gradient.any()


@each_kind
def test_in_between_it_is_their_mean_weighed_by_alpha(router):
    x, _ = batch(12)
    model = dual(router=router, alpha=0.3)
    torch.testing.assert_close(model(x), 0.7 * model.standard(x) + 0.3 * model.robust(x))
    model = dual(router=router, alpha=0.3, mix="probabilities")
    expected = 0.7 * model.standard(x).softmax(1) + 0.3 * model.robust(x).softmax(1)
    torch.testing.assert_close(model(x).exp(), expected)


@each_mix
def test_two_hard_mixtures_are_one_of_all_pairs(mix):
    model, (x, _) = dual(mix=mix), batch(30)
    assert model.experts_count == 9 and not model.soft and as_mixture(model) is model
    assert len(model.selected(x).unique()) > 3
    scores, outputs, pair = model.gate(x), model.all_outputs(x), model.selected(x)
    assert scores.shape == (30, 9) and outputs.shape == (30, 9, 3)
    assert torch.equal(pair, 3 * model.standard.selected(x) + model.robust.selected(x))
    torch.testing.assert_close(outputs[torch.arange(30), pair], model(x))
    for i, j in itertools.product(range(3), repeat=2):
        one = model.mixed(model.standard.all_outputs(x)[:, i], model.robust.all_outputs(x)[:, j])
        torch.testing.assert_close(outputs[:, 3 * i + j], one)


def test_every_attack_on_hard_mixtures_applies_to_the_pairs():
    model, (x, y) = dual(experts=2).requires_grad_(False), batch(6)
    for name in HARD:
        for aim in (aim for run in runs(name, model) for aim in run.aims):
            assert aim.loss(aim.output(x), y).shape == (6,)


def test_two_soft_mixtures_of_probabilities_are_one_of_all_their_experts():
    model, (x, _) = dual(router="soft", mix="probabilities"), batch(12)
    assert model.experts_count == 6 and model.soft
    weights, outputs = model.gate(x).softmax(1), model.all_outputs(x)
    torch.testing.assert_close(weights[:, :3].sum(1), torch.full((12,), 0.3).double())
    expected = (weights[:, :, None] * outputs.softmax(2)).sum(1)
    torch.testing.assert_close(model(x).exp(), expected)


# ---------------------------------------------------------------------------------------------------------------------
# who moves when


@each_kind
def test_the_lower_step_moves_the_robust_model_alone_and_the_upper_one_the_standard_alone(
    router, monkeypatch
):
    model = dual(router=router).train()
    (stage,) = JTDMoE(config(router=router)).stages(DATA)
    optimisers = [sgd(group) for group in stage.groups(model)]
    x, y = batch(12)
    moved, before = [], {}
    real = torch.optim.SGD.step

    def step(self):
        # what lies between two steps includes the passes, in which BatchNorm learns
        real(self)
        moved.append({part: not unchanged(getattr(model, part), before[part]) for part in before})
        before.update(standard=snapshot(model.standard), robust=snapshot(model.robust))

    before.update(standard=snapshot(model.standard), robust=snapshot(model.robust))
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    stage.step(model, x, y, HERE, optimisers)
    assert moved == [{"standard": False, "robust": True}, {"standard": True, "robust": False}]


def test_each_player_has_an_optimiser_and_takes_one_step_with_its_own_gradient_alone():
    model = dual().train()
    (stage,) = JTDMoE(config()).stages(DATA)
    x, y = batch(12)
    robust, frozen = copy.deepcopy(model.robust), copy.deepcopy(model)
    stage.step(model, x, y, HERE, [sgd(group) for group in stage.groups(model)])

    theirs = sgd(robust.parameters())
    lower_loss(robust, x, y, config(), THREAT, HERE).backward()
    theirs.step()
    frozen.robust.load_state_dict(robust.state_dict())
    other = sgd(frozen.standard.parameters())
    upper_loss(frozen, x, y).backward()
    other.step()
    for part, expected in ((model.robust, robust), (model.standard, frozen.standard)):
        for (name, one), two in zip(part.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, msg=name)


@each_kind
def test_the_lower_loss_is_the_equation_over_all_experts(router):
    c = config(router=router, beta=2.5)
    model, (x, y) = dual(router=router).robust, batch(12)
    x_adv = pgd(model, x, y, THREAT, rng=HERE.at("mixture"), steps=2)
    start = THREAT.random_start(x.repeat(1, 3, 1, 1), HERE.at("experts").at("start")).chunk(3, 1)
    own = [
        pgd(lambda z, i=i: model.all_outputs(z)[:, i], x, y, THREAT, rng=HERE, steps=2, start=start[i])
        for i in range(3)
    ]
    model.train()
    other = copy.deepcopy(model)
    found = lower_loss(other, x, y, c, THREAT, HERE)
    stability = 0
    for i in range(3):
        of_adv, of_clean, of_own = model.all_outputs(torch.cat([x_adv, x, own[i]])).split(12)
        p, q = of_clean[:, i].softmax(1), of_own[:, i].softmax(1)
        stability = stability + (p * (p.log() - q.log())).sum(1)
        if i == 0:
            answers = torch.zeros_like(model.all_outputs(x))
        answers[:, i] = of_adv[:, i]
    expected = F.cross_entropy(model.answer(model.gate(x_adv), answers), y) + 2.5 * stability.mean()
    torch.testing.assert_close(found, expected)
    found.backward(), expected.backward()
    for one, two in zip(other.experts.parameters(), model.experts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_without_beta_the_robust_model_is_trained_by_pgd_at():
    model, (x, y) = dual().robust.train(), batch(12)
    (known,) = pgd_at.PGDAT(pgd_at.Config(steps=2)).stages(DATA)
    expected = known.loss(copy.deepcopy(model), x, y, HERE.at("mixture"))
    torch.testing.assert_close(lower_loss(model, x, y, config(beta=0), THREAT, HERE), expected)


def test_at_alpha_zero_the_standard_model_is_trained_as_it_would_be_alone():
    model, (x, y) = dual(alpha=0).train(), batch(12)
    alone = copy.deepcopy(model.standard)
    loss, expected = upper_loss(model, x, y), F.cross_entropy(alone(x), y)
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    for one, two in zip(model.standard.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@each_mix
def test_at_alpha_one_the_standard_model_has_nothing_to_learn(mix):
    model, (x, y) = dual(alpha=1, mix=mix).train(), batch(12)
    upper_loss(model, x, y).backward()
    gradients = [parameter.grad for parameter in model.standard.parameters()]
    assert not any(gradient.any() for gradient in gradients if gradient is not None)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@each_mix
def test_the_upper_loss_is_the_cross_entropy_of_both_on_clean_images(mix):
    model, (x, y) = dual(mix=mix), batch(12)
    robust = model.robust(x)
    model.train()
    found = upper_loss(model, x, y)
    assert model.robust.training
    torch.testing.assert_close(found, F.cross_entropy(model.mixed(model.standard(x), robust), y))


def test_a_released_router_of_either_model_is_in_no_group():
    (stage,) = JTDMoE(config(router="released")).stages(DATA)
    model = dual(router="released")
    moved = {id(parameter) for group in stage.groups(model) for parameter in group}
    assert len(stage.groups(model)) == 2
    still = {name for name, parameter in model.named_parameters() if id(parameter) not in moved}
    assert still == {
        f"{part}.router.{kind}" for part in ("standard", "robust") for kind in ("weight", "bias")
    }


# ---------------------------------------------------------------------------------------------------------------------
# alpha as a knob


def test_the_alpha_it_is_deployed_with_changes_its_answers_and_no_weight(tmp_path):
    trained = {}
    for deployed in (None, 1.0):
        defense = JTDMoE(config(deployed_alpha=deployed, epochs=2, experts=2, beta=0))
        result = train(defense, DATA, seed=0, folder=tmp_path / str(deployed), quiet=True)
        assert initial(defense, DATA, 0).alpha == (0.7 if deployed is None else deployed)
        trained[deployed] = result.model.state_dict(), result.history
    (weights, history), (other_weights, other_history) = trained.values()
    assert other_history == history
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())


def test_settings_that_change_no_weight_are_settings():
    kind = registry.get("jtdmoe")
    assert kind.evaluation_only == {"deployed_alpha"} <= set(as_json(kind.recipes["tiny"]))


@pytest.mark.parametrize("field", ["alpha", "deployed_alpha"])
@pytest.mark.parametrize("value", [-0.1, 1.1, "nan"])
def test_a_share_is_a_number_from_zero_to_one(field, value):
    with pytest.raises(UsageError, match=f"bad setting: {field}"):
        config(**{field: value})


# ---------------------------------------------------------------------------------------------------------------------
# what is proved


def test_its_certificate_is_the_robust_models_at_alpha_one_and_grows_up_to_it():
    x, _ = batch(12)
    radii = []
    for alpha in (0.5, 0.8, 0.9, 1.0):
        model = dual(router="soft", mix="probabilities", alpha=alpha)
        # untrained experts are sure of nothing, and a bound needs a margin
        with torch.no_grad():
            model.robust.experts.net.linear.weight *= 1000
        radii.append(model.certificate(x).radius)
    assert not radii[0].any() and radii[1].any()
    assert all((less <= more).all() for less, more in itertools.pairwise(radii))
    assert torch.equal(radii[-1], model.robust.certificate(x).radius)
    margins = model.robust(x).softmax(1).topk(2, 1).values
    assert torch.equal(radii[1] > 0, margins[:, 0] - margins[:, 1] > 0.25)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"router": "soft", "mix": "logits"}, "NOT APPLICABLE: the bound is for a mix of probabilities"),
        ({"router": "st", "mix": "probabilities"}, "NOT APPLICABLE: the answer jumps"),
    ],
)
def test_without_probabilities_or_with_a_hard_route_there_is_none(settings, says):
    none = dual(**settings).certificate(batch()[0])
    assert none.radius is None and none.about.startswith(says)


def test_its_route_turns_where_the_first_of_the_two_does():
    model, (x, _) = dual(), batch(12)
    expected = torch.minimum(model.standard.route_radius(x), model.robust.route_radius(x))
    assert torch.equal(model.route_radius(x), expected)
    for seed in range(20):
        corner = Rng(seed).normal(x).sign() * expected[:, None, None, None]
        assert torch.equal(model.selected(x + 0.999 * corner), model.selected(x))
