"""SoE against what its equations promise, and the toy on which following its gradient finds nothing."""

import inspect
import math

import pytest
import torch
from oracles import SHAPE, dataset
from selection_toys import SelectionToy
from torch import nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench import data as datasets
from bench.attacks import mixture as mixtures
from bench.attacks.losses import LOSSES
from bench.attacks.pgd import pgd
from bench.config import as_json, from_json, replaced
from bench.errors import NonFinite, UsageError
from bench.model import Normalized, evaluating
from bench.moe import as_mixture, each_loss
from bench.rng import Rng
from bench.threat import Linf
from defenses.soe import (
    Collaboration,
    Config,
    SoE,
    collaboration_weights,
    lead,
    log_confidence,
    objective,
    observe,
    one_by_one,
    predictor_loss,
    sub_model_weights,
    together,
)

SMALL = Config(width=4, steps=2)
THREAT = Linf(8 / 255)
VARIANTS = ("soe-sub", "soe-col", "soe-full")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def network(config: Config = SMALL, seed: int = 0) -> Collaboration:
    """A small SoE of which every sub-model answers some images, in eval mode."""
    torch.manual_seed(seed)
    model = Collaboration(config, dataset(4))
    for _ in range(5):
        model.train()(torch.rand(64, *SHAPE))
    model.eval()
    with torch.no_grad():
        # untrained sub-models say much the same of every image
        layer, outputs = model.experts.net.linear, 11
        layer.weight *= 20
        layer.bias -= (
            model.experts(model.normalize(torch.rand(256, *SHAPE))).mean(0).flatten()[: len(layer.bias)]
        )
        assert len(layer.bias) == config.experts * outputs
    assert config.experts == 1 or model.selected(torch.rand(64, *SHAPE)).unique().numel() == config.experts
    return model


def batch(model: Collaboration, n: int = 16, seed: int = 3):
    """Images and labels, about half of which each sub-model gets right."""
    torch.manual_seed(seed)
    x = torch.rand(n, *SHAPE)
    with torch.no_grad():
        said = model(x).argmax(1)
    return x, torch.where(torch.arange(n) % 2 == 0, said, (said + 1) % 10)


def some_outputs(n: int = 12, experts: int = 3, dtype: torch.dtype = torch.float64):
    """Logits and predictor outputs of sub-models that are right on some images and wrong on others, with labels."""
    torch.manual_seed(1)
    logits = (3 * torch.randn(n, experts, 5, dtype=dtype)).requires_grad_(True)
    return logits, torch.randn(n, experts, dtype=dtype).requires_grad_(True), torch.randint(5, (n,))


def permuted(model: Collaboration, order: list[int]) -> Collaboration:
    """The same sub-models in another order."""
    other = network(Config(width=4, experts=len(order)))
    experts = len(order)
    other.load_state_dict(
        {
            name: value if value.dim() == 0 else value.unflatten(0, (experts, -1))[order].flatten(0, 1)
            for name, value in model.state_dict().items()
        }
    )
    return other


# --- the losses


def test_the_weighted_losses_have_the_gradient_of_the_soft_minimum():
    losses = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)
    (weighted,) = torch.autograd.grad((sub_model_weights(losses) * losses).sum(), losses)
    (soft_minimum,) = torch.autograd.grad(-(-losses).logsumexp(1).sum(), losses)
    torch.testing.assert_close(weighted, soft_minimum)


def test_the_soft_minimum_of_one_sub_model_is_its_cross_entropy():
    logits, _, y = some_outputs(experts=1)
    losses = each_loss(logits, y)
    (found,) = torch.autograd.grad((sub_model_weights(losses) * losses).sum(), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits[:, 0], y, reduction="sum"), logits)
    torch.testing.assert_close(found, expected)


def test_confidence_is_the_largest_probability_times_the_predictors():
    logits, trust, _ = some_outputs()
    expected = logits.softmax(-1).amax(-1) * trust.sigmoid()
    torch.testing.assert_close(log_confidence(logits, trust).exp(), expected)


def test_the_predictor_loss_and_its_gradients_are_those_of_the_plain_formula():
    logits, trust, y = some_outputs()
    p = logits.softmax(-1)
    peak = p.amax(-1)
    right = p.argmax(-1) == y[:, None]
    assert 0 < right.sum() < right.numel()
    target = p.gather(2, y[:, None, None].expand(-1, 3, 1)).squeeze(2).detach()
    c = torch.where(right, peak.detach(), peak) * trust.sigmoid()
    plain = F.binary_cross_entropy(c, target, reduction="none")
    torch.testing.assert_close(predictor_loss(logits, trust, y), plain)
    for found, expected in zip(
        torch.autograd.grad(predictor_loss(logits, trust, y).sum(), (logits, trust)),
        torch.autograd.grad(plain.sum(), (logits, trust)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_the_predictor_loss_is_least_where_confidence_is_the_true_classs_probability():
    logits, _, y = some_outputs()
    p = logits.detach().softmax(-1)
    true = p.gather(2, y[:, None, None].expand(-1, 3, 1)).squeeze(2)
    wrong = p.argmax(-1) != y[:, None]
    best = (true / p.amax(-1)).logit(eps=1e-12)[wrong]
    f, labels = logits.detach()[wrong][:, None], y[:, None].expand(-1, 3)[wrong]
    at = [predictor_loss(f, (best + shift)[:, None], labels) for shift in (-0.01, 0.0, 0.01)]
    assert (at[1] < at[0]).all() and (at[1] < at[2]).all()


def test_classifiers_that_are_right_learn_nothing_from_the_predictor_loss():
    logits, trust, y = some_outputs()
    (gradient,) = torch.autograd.grad(predictor_loss(logits, trust, y).sum(), logits)
    right = logits.argmax(-1) == y[:, None]
    assert (gradient[right] == 0).all()
    assert (gradient[~right].abs().amax(-1) > 0).all()


def test_weights_carry_no_gradient():
    logits, trust, y = some_outputs()
    assert not sub_model_weights(each_loss(logits, y)).requires_grad
    assert not collaboration_weights(logits, trust, 1.0).requires_grad


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 20.0, 1e6])
def test_collaboration_weights_run_from_equal_shares_to_the_one_that_answers(sharpness):
    logits, trust, _ = some_outputs()
    weights = collaboration_weights(logits, trust, sharpness)
    torch.testing.assert_close(weights.sum(1), torch.ones(12, dtype=torch.float64))
    if sharpness == 0:
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))
    if sharpness == 1e6:
        chosen = log_confidence(logits, trust).argmax(1)
        torch.testing.assert_close(weights, F.one_hot(chosen, 3).double())


def test_collaboration_weights_are_the_softmax_of_confidences_not_of_their_logarithms():
    c = torch.tensor([[0.9, 0.3, 0.1]])
    logits = torch.tensor([200.0, 0, 0]).expand(1, 3, 3)
    found = collaboration_weights(logits, c.logit(), 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.50, 0.27, 0.22]]), atol=0.006, rtol=0)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("sure", [1e4, 0.0, -1e4])
def test_enormous_outputs_have_finite_confidences_losses_and_gradients(size, sure):
    logits = torch.tensor([[[size, 0.0, -size]], [[0.0, 0.0, size]]], requires_grad=True)
    trust = torch.tensor([[sure], [-sure]], requires_grad=True)
    confidence = log_confidence(logits, trust)
    assert confidence.isfinite().all() and (confidence <= 0).all()
    for y in range(3):
        loss = predictor_loss(logits, trust, torch.full((2,), y))
        gradients = torch.autograd.grad(loss.sum(), (logits, trust))
        assert all(value.isfinite().all() for value in (loss, *gradients))


def test_confidence_lies_strictly_between_0_and_1_and_saturates_late():
    trust = torch.linspace(-30, 15, 10)[:, None]
    logits = torch.tensor([[15.0, 0, 0]]).expand(10, 1, 3)
    confidence = log_confidence(logits, trust).exp()
    assert ((confidence > 0) & (confidence < 1)).all()
    # as 1 - softmax this lead would be lost to rounding
    assert (-F.logsigmoid(lead(torch.tensor([30.0, 0.0])))).item() == pytest.approx(math.exp(-30))


# --- the network


@pytest.mark.parametrize("expert", range(3))
def test_predictors_that_favour_one_sub_model_make_it_answer(expert):
    model, x = network(), torch.rand(9, *SHAPE)
    with torch.no_grad():
        model.experts.net.linear.bias.view(3, 11)[:, -1] = -1e3
        model.experts.net.linear.bias.view(3, 11)[expert, -1] = 1e3
    assert (model.selected(x) == expert).all()
    assert torch.equal(model(x), model.all_outputs(x)[:, expert])


def test_the_sub_model_of_the_highest_score_answers():
    model, x = network(), torch.rand(32, *SHAPE)
    chosen = model.gate(x).argmax(1)
    assert torch.equal(chosen, model.selected(x))
    assert torch.equal(model(x), model.all_outputs(x)[torch.arange(32), chosen])


def test_a_sub_model_is_a_network_of_its_own():
    model, x = network(), torch.rand(5, *SHAPE)
    for i in range(3):
        net = resnet18(channels=3, classes=11, width=4)
        net.load_state_dict(model.experts.state_of(i, i + 1))
        alone = Normalized(net, (0.5,) * 3, (0.25,) * 3).eval()
        torch.testing.assert_close(model.all_outputs(x)[:, i], alone(x)[:, :10], atol=1e-4, rtol=1e-4)


def test_each_sub_model_on_the_same_images_says_what_it_says_of_its_own():
    model, x = network(), torch.rand(5, *SHAPE)
    torch.testing.assert_close(model.own_outputs(x.repeat(1, 3, 1, 1)), model.all_outputs(x))


def test_the_order_of_the_sub_models_does_not_matter():
    model, x, order = network(), torch.rand(16, *SHAPE), [2, 0, 1]
    other = permuted(model, order)
    torch.testing.assert_close(other.gate(x), model.gate(x)[:, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other(x), model(x), atol=1e-4, rtol=1e-4)


def test_identical_sub_models_share_equally_and_learn_the_same():
    model = permuted(network(), [1, 1, 1])
    x, y = batch(model)
    logits, trust = model.heads(x)
    for weights in (sub_model_weights(each_loss(logits, y)), collaboration_weights(logits, trust, 20.0)):
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3), atol=1e-3, rtol=0)
    objective(model, x, y, SMALL, THREAT, Rng(0)).backward()
    for name, parameter in model.named_parameters():
        first, *others = parameter.grad.chunk(3)
        scale = first.abs().max().item()
        for other in others:
            torch.testing.assert_close(other, first, atol=1e-3 * scale, rtol=1e-2, msg=name)


def test_three_sub_models_have_three_times_the_parameters_of_one():
    data = dataset(4)
    with torch.device("meta"):
        model = SoE(Config()).build(data)
    resnet, predictor = 11_173_962, 512 + 1
    assert sum(p.numel() for p in model.parameters()) == 3 * (resnet + predictor)


def test_its_state_goes_to_disk_and_back_strictly():
    model, other, x = network(), network(seed=1), torch.rand(4, *SHAPE)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))


def test_eval_mode_reaches_every_batch_norm():
    norms = [part for part in network().train().eval().modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert not any(part.training for part in norms)


def test_an_image_is_answered_alike_alone_and_in_any_batch():
    model, x = network(), torch.rand(12, *SHAPE)
    whole = model(x)
    order = torch.randperm(12)
    torch.testing.assert_close(model(x[order]), whole[order], atol=1e-4, rtol=1e-4)
    for i in range(12):
        torch.testing.assert_close(model(x[i : i + 1]), whole[i : i + 1], atol=1e-4, rtol=1e-4)


def test_it_is_a_hard_mixture():
    model = as_mixture(network())
    assert model is not None and not model.soft and model.experts_count == 3


@pytest.mark.parametrize("ask", ["__call__", "gate", "selected"])
def test_a_predictor_that_is_nan_is_an_error_and_no_answer(ask):
    model, x = network(), torch.rand(4, *SHAPE)
    with torch.no_grad():
        model.experts.net.linear.bias.view(3, 11)[1, -1] = float("nan")
    # argmax would choose it, and its logits are finite
    assert model.all_outputs(x).isfinite().all()
    with pytest.raises(NonFinite, match="confidences"):
        getattr(model, ask)(x)


def test_the_authors_attack_ascends_error_and_doubt_of_the_sub_model_that_answers():
    model = network()
    x, y = batch(model)
    c = model.gate(x).exp().amax(1)
    for name, aim in model.legacy_aims().items():
        w = float(name.removeprefix("weight"))
        found = aim.output(x)
        doubt = F.binary_cross_entropy(c, torch.ones(16), reduction="none")
        expected = F.cross_entropy(model(x), y, reduction="none") + w * doubt
        torch.testing.assert_close(aim.loss(found, y), expected)
        assert torch.equal(aim.wrong(found, y), model(x).argmax(1) != y)
    assert [run.name for run in mixtures.runs("legacy", model)] == list(model.legacy_aims())


@pytest.mark.parametrize("method", ["forward", "gate", "all_outputs", "selected"])
def test_the_network_is_given_images_and_nothing_else(method):
    assert list(inspect.signature(getattr(Collaboration, method)).parameters) == ["self", "x"]


# --- the images it is trained on


def test_one_by_one_finds_for_each_sub_model_what_pgd_finds_against_it_alone():
    model = network()
    x, y = batch(model)
    found = one_by_one(model, x, y, SMALL, THREAT, Rng(0))
    assert found.shape == (3 * len(x), *SHAPE)
    for i, images in enumerate(found.chunk(3)):
        alone = pgd(
            lambda z, i=i: model.all_outputs(z)[:, i],
            x,
            y,
            THREAT,
            rng=Rng(0),
            steps=2,
            step_size=THREAT.eps / 3,
            random_start=False,
        )
        assert (images - alone).abs().gt(1e-6).float().mean() < 0.01
        assert THREAT.contains(images, x).all()


def test_together_follows_the_sub_model_that_answers():
    model = network()
    x, y = batch(model)
    found = together(model, x, y, Config(width=4, steps=1, step_size=0.01), THREAT, Rng(0))
    z = x.clone().requires_grad_(True)
    answer = model.all_outputs(z)[torch.arange(len(x)), model.selected(x)]
    (gradient,) = torch.autograd.grad(F.cross_entropy(answer, y, reduction="sum"), z)
    torch.testing.assert_close(found, (x + 0.01 * gradient.sign()).clamp(0, 1))
    assert found.shape == x.shape and THREAT.contains(found, x).all()


@pytest.mark.parametrize("craft", [one_by_one, together])
def test_crafting_leaves_the_network_as_it_found_it(craft):
    model = network()
    x, y = batch(model)
    model.train().experts.net.bn1.eval()
    modes = [part.training for part in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    craft(model, x, y, SMALL, THREAT, Rng(0))
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("craft", [one_by_one, together])
def test_crafting_does_not_depend_on_train_mode(craft):
    model = network()
    x, y = batch(model)
    images = [craft(model.train(mode), x, y, SMALL, THREAT, Rng(0)) for mode in (True, False)]
    assert torch.equal(*images)


@each_variant
def test_a_network_that_is_nan_cannot_be_trained(variant):
    model = network()
    x, y = batch(model)
    with torch.no_grad():
        model.experts.net.linear.bias[0] = float("nan")
    with pytest.raises(NonFinite):
        objective(model, x, y, Config(width=4, steps=1, variant=variant), THREAT, Rng(0))


# --- training


@each_variant
def test_a_variant_minimises_its_equation(variant):
    model = network()
    x, y = batch(model)
    c = Config(width=4, steps=2, variant=variant, sharpness=5.0, predictor=0.7)
    own, joint = (craft(model, x, y, c, THREAT, Rng(0)) for craft in (one_by_one, together))
    with evaluating(model):
        found = objective(model, x, y, c, THREAT, Rng(0))

        def l_sub(images):
            losses = each_loss(model.all_outputs(images), y)
            return ((-losses).softmax(1) * losses).sum(1).mean()

        def l_col(images):
            losses = each_loss(model.all_outputs(images), y)
            return ((5.0 * model.gate(images).exp()).softmax(1) * losses).sum(1).mean()

        def l_pred(images):
            return 0.7 * predictor_loss(*model.heads(images), y).mean()

        def each_own(loss):
            return sum(loss(images) for images in own.chunk(3)) / 3

        sub = l_sub(x) + each_own(l_sub)
        col = l_col(x) + l_col(joint)
        expected = {
            "soe-sub": sub + l_pred(x) + each_own(l_pred),
            "soe-col": col + l_pred(x) + l_pred(joint),
            "soe-full": sub + col + l_pred(x) + each_own(l_pred) + l_pred(joint),
        }[variant]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["soe-sub", "soe-col"])
def test_one_sub_model_without_a_predictor_loss_is_adversarial_training_with_clean_images(variant):
    c = Config(width=4, steps=2, variant=variant, experts=1, predictor=0.0)
    model = network(c)
    x, y = batch(model)
    x_adv = pgd(model, x, y, THREAT, rng=Rng(0), steps=2, step_size=THREAT.eps / 3, random_start=False)
    model.train()
    found = objective(model, x, y, c, THREAT, Rng(0))
    logits = model(torch.cat([x, x_adv]))
    expected = F.cross_entropy(logits[:16], y) + F.cross_entropy(logits[16:], y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@each_variant
def test_batch_norm_learns_from_each_batch_once(variant):
    model = network().train()
    x, y = batch(model)
    before = int(model.experts.net.bn1.num_batches_tracked)
    objective(model, x, y, Config(width=4, steps=3, variant=variant), THREAT, Rng(0))
    assert int(model.experts.net.bn1.num_batches_tracked) == before + 1


@each_variant
def test_crafted_images_are_part_of_the_loss(variant):
    model, x = network(), torch.rand(16, *SHAPE)
    y = model(x).argmax(1)
    c = Config(width=4, steps=3, variant=variant)
    gentle, harsh = (objective(model, x, y, c, Linf(eps), Rng(0)).item() for eps in (1e-6, 0.3))
    assert harsh > gentle + 0.1


@each_variant
def test_every_parameter_learns(variant):
    model = network().train()
    x, y = batch(model)
    objective(model, x, y, Config(width=4, steps=1, variant=variant), THREAT, Rng(0)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_loss_is_float32_and_finite_under_autocast():
    model = network().train()
    x, y = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(part.dtype == torch.float32 for part in model.heads(x))
        loss = objective(model, x, y, SMALL, THREAT, Rng(0))
    assert loss.dtype == torch.float32 and loss.isfinite()


@each_variant
def test_training_lowers_the_loss_and_teaches_which_sub_model_to_ask(variant):
    data = datasets.load("digits", None)
    torch.manual_seed(0)
    defense = SoE(Config(width=4, steps=1, eps=0.01, variant=variant))
    model, (stage,) = defense.build(data), defense.stages(data)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = data.train.batch(slice(0, 256))
    losses = []
    for step in range(48):
        rows = torch.arange(64) + 64 * (step % 4)
        losses.append(stage.step(model.train(), x[rows], y[rows], Rng(0, step), [optimiser]).item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert observe(model, x, y).hit_rate > 2 / 3


@pytest.mark.parametrize("recipe", ["tiny", "fast", "paper"])
def test_a_recipe_survives_json(recipe):
    settings = SoE.recipes[recipe]
    assert from_json(Config, as_json(settings)) == settings
    assert settings.variant == "soe-full"


@pytest.mark.parametrize(
    ("field", "value"), [("variant", "soe"), ("experts", "0"), ("sharpness", "-1"), ("eps", "8")]
)
def test_settings_that_make_no_sense_are_refused(field, value):
    with pytest.raises(UsageError, match=field):
        replaced(Config(), {field: value})


# --- what is observed


class Said(nn.Module):
    """Sub-models that have said certain things."""

    def __init__(self, logits, trust) -> None:
        super().__init__()
        self.said = logits, trust

    def heads(self, x):
        return self.said


def test_what_is_observed_is_what_happened():
    right, wrong = [9.0, 0.0], [0.0, 9.0]
    logits = torch.tensor([[right, wrong], [right, wrong], [wrong, right], [wrong, wrong]])
    trust = torch.tensor([[0.75, 0.1], [0.1, 0.75], [0.1, 0.95], [0.95, 0.1]]).logit()
    seen = observe(Said(logits, trust), torch.zeros(4, *SHAPE), torch.zeros(4, dtype=torch.long), sharpness=0)
    assert seen.accuracy == 0.5
    assert seen.expert_accuracy == (0.5, 0.25)
    assert seen.oracle == 0.75
    assert seen.load == (0.5, 0.5)
    # on the last image the losses are equal, and the first of equals is the best
    assert seen.hit_rate == 0.75
    assert seen.effective_experts == pytest.approx(2)
    # at confidence 0.75, and at 0.95, one of two is right
    assert seen.calibration_error == pytest.approx((0.25 + 0.45) / 2, abs=1e-3)


def test_the_oracle_is_never_below_what_answers_nor_below_any_sub_model():
    model = network()
    x, y = batch(model, 64)
    x_adv = together(model, x, y, SMALL, Linf(0.03), Rng(0))
    for images in (x, x_adv):
        seen = observe(model, images, y)
        assert seen.oracle >= max(seen.accuracy, *seen.expert_accuracy)
        assert seen.accuracy == pytest.approx(float((model(images).argmax(1) == y).float().mean()))
        assert sum(seen.load) == pytest.approx(1)
    assert seen.oracle > seen.accuracy


# --- the toy on which a gradient finds nothing

EPS = 8 / 255


def toy():
    model, x = SelectionToy(), SelectionToy.images()
    return model, x, model.labels(x)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("restart", range(3))
def test_pgd_finds_the_toy_fully_robust(loss, restart):
    model, x, y = toy()

    def none_falls(step, rows, images):
        assert (model(images).argmax(1) == y[rows]).all()

    rng = Rng(restart, images=range(len(x)))
    x_adv = pgd(model, x, y, Linf(EPS), rng=rng, loss=LOSSES[loss], steps=50)
    assert (model(x_adv).argmax(1) == y).all()
    # it is led away from the other expert
    assert (model.margin(x_adv) > model.margin(x)).all()


def test_no_image_of_the_toy_is_robust():
    model, x, y = toy()
    x_adv = x.clone()
    x_adv[..., 4:] += EPS
    assert Linf(EPS).contains(x_adv, x).all()
    assert (model(x).argmax(1) == y).all()
    assert (model(x_adv).argmax(1) != y).all()


def test_an_attack_on_the_toys_selection_breaks_what_lies_within_its_margin_and_no_more():
    model, x, y = toy()
    for factor, survives in ((0.99, True), (1.01, False)):
        for i in range(len(x)):
            threat = Linf(factor * float(model.margin(x[i : i + 1])))
            x_adv = pgd(
                model.gate,
                x[i : i + 1],
                y[i : i + 1],
                threat,
                rng=Rng(0, images=[i]),
                loss=lambda gate, y: gate[:, 1] - gate[:, 0],
            )
            assert bool(model(x_adv).argmax(1) == y[i]) == survives


@pytest.mark.parametrize("expert", range(2))
def test_what_breaks_one_expert_of_the_toy_alone_does_not_break_the_toy(expert):
    model, x, y = toy()
    x_adv = pgd(
        lambda z: model.all_outputs(z)[:, expert], x, y, Linf(EPS), rng=Rng(0, images=range(len(x))), steps=50
    )
    assert (model(x_adv).argmax(1) == y).all()
