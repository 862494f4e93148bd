"""The model contract: every model of the zoo gets the findings it is owed and no others, and is left as it was."""

import random

import numpy as np
import pytest
import torch
from broken_models import (
    BROKEN,
    HONEST,
    ZOO,
    BatchStatistics,
    ChangesBuffer,
    CountsCalls,
    GaussianNoise,
    GradientDetector,
    KeepsFeatures,
    MutatesInput,
    NumpyNoise,
    PythonNoise,
    Reseeded,
    SubtractsBatchMean,
    TrainsAgain,
    Wrapper,
    images,
    undefended,
)
from test_baselines import dataset
from torch import nn
from torch.nn import functional as F

from bench import registry
from bench.audit.contract import CHECKS, contract
from bench.audit.untouched import State
from bench.audit.watch import watching
from bench.moe import as_mixture
from bench.train import initial


def look(model, n=64, **asked):
    x, y = images(n)
    return contract(model, x, y, classes=10, **asked)


def against(findings):
    """The codes of what does more than inform."""
    return {finding.code for finding in findings if finding.severity != "informs"}


def evidence(result, code):
    (found,) = [finding for finding in result.findings if finding.code == code]
    return found.evidence


def wrapped(make, *arguments):
    return make(undefended(), *arguments).eval()


# ---------------------------------------------------------------------------------------------------------------------
# the zoo


@pytest.mark.parametrize("name", ZOO)
def test_every_model_gets_the_findings_it_is_owed_and_no_others(name):
    assert against(look(ZOO[name].build()).findings) == ZOO[name].contract


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_gets_no_finding_at_all(name):
    result = look(HONEST[name].build())
    assert result.findings == []
    assert result.facts.randomness == "deterministic" and result.facts.passes == 1


def test_every_check_has_a_model_on_which_it_fires():
    owed = set().union(*(specimen.contract for specimen in BROKEN.values()))
    assert {one.code for one in CHECKS} == owed | {"classes"}


def test_it_takes_about_fifteen_passes():
    assert look(undefended()).forwards <= 15 * 64


def test_no_more_than_64_images_are_looked_at():
    assert look(undefended(), 200).forwards == look(undefended(), 64).forwards


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "resnet20", "mobilenet_v2", "timm:test_vit", "timm:test_convnext"),
        *("fgsm_at", "dwf", "advmoe", "soe"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("vgg19", "densenet121", "googlenet", "xception")
        ),
    ],
)
def test_a_registered_network_gets_no_finding(name):
    kind = registry.get(name)
    data = dataset(3, 32) if name.startswith("timm") else dataset(1, 8)
    model = initial(kind(kind.recipes["tiny"]), data, 0)
    x = (255 * torch.rand(12, *data.shape)).round() / 255
    result = contract(model, x, torch.arange(12) % 10, classes=10, adaptive=as_mixture(model) is not None)
    assert result.findings == []


# ---------------------------------------------------------------------------------------------------------------------
# facts


@pytest.mark.parametrize(
    ("name", "randomness"),
    [
        ("gaussian noise", "stochastic"),
        ("tiny noise", "noisy"),
        ("re-seeded noise", "re-seeded"),
        ("rare misroute", "stochastic"),
        ("private rare misroute", "stochastic"),
        ("private numpy noise", "stochastic"),
        ("clock", "stochastic"),
        ("counts calls", "deterministic"),
    ],
)
def test_kinds_of_randomness_are_told_apart(name, randomness):
    assert look(ZOO[name].build()).facts.randomness == randomness


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("undefended", "logits"),
        ("sigmoid", "logits"),
        ("log-probabilities", "log-probabilities"),
        ("probabilities", "probabilities"),
        ("half-precision probabilities", "probabilities"),
    ],
)
def test_kinds_of_output_are_told_apart(name, output):
    assert look(ZOO[name].build()).facts.output == output


def test_passes_are_the_calls_of_the_layer_that_is_called_most():
    assert look(ZOO["loop"].build()).facts.passes == 5


class Small(Wrapper):
    """Logits that hardly depend on the image, as an untrained network's."""

    def after(self, logits):
        return torch.full_like(logits, 0.1) + 1e-4 * logits


def test_small_logits_are_no_probabilities():
    assert look(wrapped(Small)).facts.output == "logits"


# ---------------------------------------------------------------------------------------------------------------------
# what a finding says


def test_the_generator_that_is_drawn_from_is_named():
    for make, name in ((GaussianNoise, "torch"), (NumpyNoise, "numpy"), (PythonNoise, "random")):
        assert f"draws from or seeds {name}" in evidence(look(wrapped(make)), "random-forward")
    assert "a generator of its own" in evidence(look(ZOO["private rare misroute"].build()), "random-forward")


class Switching(nn.Module):
    """Answers with one of two networks, drawn anew for every image, and tells how that comes out on average."""

    def __init__(self, share):
        super().__init__()
        self.one, self.other, self.share = undefended(), undefended(), share

    def forward(self, x):
        first = torch.rand(len(x), 1) < 0.5
        return torch.where(first, self.one(x), self.other(0.2 * x))

    def expected_log_probabilities(self, x):
        one, other = self.one(x).softmax(1), self.other(0.2 * x).softmax(1)
        return (self.share * one + (1 - self.share) * other).log()


@pytest.mark.parametrize(("share", "severity"), [(0.5, "informs"), (0.7, "warns")])
def test_chance_is_no_fault_where_its_mean_is_told_and_true(share, severity):
    found = look(Switching(share).eval())
    (one,) = (finding for finding in found.findings if finding.code == "random-forward")
    assert one.severity == severity and "exact expectation" in one.evidence


def test_the_buffer_that_changes_is_named():
    assert evidence(look(wrapped(ChangesBuffer)), "stateful") == "a forward pass changes seen"


def test_what_hides_a_choice_is_named():
    assert "argmax, detach" in evidence(look(ZOO["straight-through mixture"].build()), "hidden-choice")


def test_adaptive_attacks_on_a_mixture_make_its_choice_no_finding():
    assert look(ZOO["argmax mixture"].build(), adaptive=True).findings == []


@pytest.mark.parametrize("name", ["tuple", "whole numbers", "eleven classes", "always nan", "crashes"])
def test_what_is_no_function_to_logits_is_looked_at_no_further(name):
    result = look(ZOO[name].build())
    assert len(result.findings) == 1 and result.forwards == 64


class OneRow(Wrapper):
    def after(self, logits):
        return logits[:1]


def test_one_row_for_all_images_is_not_spread_over_them():
    assert "(1, 10) float32, expected floats (64, 10)" in evidence(look(wrapped(OneRow)), "signature")


class FixedBatch(Wrapper):
    def before(self, x):
        assert len(x) in (3, 64), "wrong batch size"
        return x


def test_a_model_that_fails_on_another_batch_has_failed_that_check():
    result = look(wrapped(FixedBatch))
    assert against(result.findings) == {"batch-dependent"}
    assert "wrong batch size" in evidence(result, "batch-dependent")


class TiresOut(Wrapper):
    def __init__(self, net):
        super().__init__(net)
        self.left = 2

    def before(self, x):
        self.left -= 1
        return x if self.left >= 0 else x / 0 - x / 0


def test_a_model_that_fails_later_is_not_taken_for_one_that_passes():
    assert against(look(wrapped(TiresOut)).findings) == {"non-finite"}


@pytest.mark.parametrize("make", [SubtractsBatchMean, BatchStatistics])
def test_one_image_is_enough_to_see_the_batch(make):
    assert "batch-dependent" in against(look(wrapped(make), 1).findings)


class LoudRounding(Wrapper):
    """Adds its rounding errors, much enlarged, if pixels do not lie in memory as usual."""

    def forward(self, x):
        flat = x.flatten(1) / 3
        rounding = ((flat + 1000) - 1000 - flat).sum(1, keepdim=True)
        return self.net(x) + (0 if x.is_contiguous() else 1e4) * rounding * torch.arange(10).to(x)


def test_what_float64_does_not_confirm_is_rounding():
    model = wrapped(LoudRounding)
    x, _ = images(64)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert (model(turned) - model(x)).abs().max() > 0.1
    assert look(model).findings == []


@pytest.mark.parametrize(
    ("classes", "left"), [(2, "cross-entropy and margin"), (3, "untargeted DLR"), (4, None)]
)
def test_fewer_than_four_classes_are_mentioned(classes, left):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval()
    x, y = images(20)
    found = contract(net, x, y % classes, classes=classes).findings
    assert [finding.code for finding in found] == ([] if left is None else ["classes"])
    assert left is None or (left in found[0].evidence and found[0].severity == "informs")


@pytest.mark.parametrize(("n", "labels", "fires"), [(64, 10, True), (31, 10, False), (64, 1, False)])
def test_one_class_for_many_images_of_several_classes_is_no_classifier(n, labels, fires):
    x, y = images(n)
    found = contract(ZOO["constant"].build(), x, y % labels, classes=10).findings
    assert ("constant-prediction" in against(found)) == fires


# ---------------------------------------------------------------------------------------------------------------------
# the world is left as it was found


class LearnsAtTest(Wrapper):
    """Leaves gradients, new attributes, a longer list and other modes behind."""

    def __init__(self, net):
        super().__init__(net)
        self.history = []
        self.weight = nn.Parameter(torch.ones(()))

    def before(self, x):
        self.history.append(1)
        self.note = "was here"
        self.net[0].weight.requires_grad_(True)
        with torch.enable_grad():
            (self.net[0].weight.sum() * 1.0).backward()
        with torch.no_grad():
            self.weight.mul_(1.5)
        torch.set_grad_enabled(True)
        return x


def held(model):
    """All that can be seen of a module."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    plain = [
        {k: v for k, v in vars(part).items() if not isinstance(v, (dict, nn.Module))}
        for part in model.modules()
    ]
    return tensors, flags, repr(plain)


@pytest.mark.parametrize(
    "make",
    [
        LearnsAtTest,
        Reseeded,
        TrainsAgain,
        ChangesBuffer,
        CountsCalls,
        MutatesInput,
        KeepsFeatures,
        NumpyNoise,
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_model_generators_and_images_are_left_as_they_were(make, training):
    model = make(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)))
    nn.Module.train(model, training)
    model.net[3].weight.requires_grad_(False)
    x, y = images(8)
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before, x_before = held(model), x.clone()
    with torch.enable_grad():
        contract(model, x, y, classes=10)
        assert torch.is_grad_enabled()
    after = held(model)
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:] == before[1:]
    assert torch.equal(x, x_before)
    drawn = torch.rand(()), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert drawn == (torch.rand(()), np.random.rand(), random.random())


def test_a_model_in_training_mode_is_looked_at_in_eval_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).train()
    assert "random-forward" not in against(look(model, 8).findings)
    assert model.training and model[1].training


def test_a_state_tells_what_changed_and_nan_stays_nan():
    model = wrapped(ChangesBuffer)
    model.seen += float("nan")
    state = State.of(model)
    assert state.changed() == []
    model.seen = torch.zeros(())
    assert state.changed() == ["seen"]
    state.restore()
    assert state.changed() == [] and model.seen.isnan()


# ---------------------------------------------------------------------------------------------------------------------
# watching a pass


class Does(nn.Module):
    """A model that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def watched_in(function, grad=True):
    model = Does(function)
    with torch.set_grad_enabled(grad), watching(model) as watched:
        out = model((torch.arange(6.0) / 6).view(2, 3).requires_grad_(grad))
        return watched, watched.hidden_in(out) | watched.escaped


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def assigned(x):
    out = torch.zeros_like(x)
    out[:, 0] = x.argmax(1).to(x)
    return out


def viewed(x):
    out = torch.zeros_like(x)
    out[0].copy_(x.detach()[0])
    return out


def blind(x):
    with torch.no_grad():
        weights = x.softmax(1)
    return weights * x


def bystander(x):
    x.detach().argmax(1)
    with torch.no_grad():
        x.mean()
    return 2 * x


@pytest.mark.parametrize(
    ("function", "hidden"),
    [
        (lambda x: x.relu().softmax(1), set()),
        (bystander, set()),
        (_Straight.apply, set()),
        (lambda x: x.max(1).values, set()),
        (lambda x: torch.where(x > 0.5, x, 0.1 * x), set()),
        (lambda x: x.round(), {"round"}),
        (lambda x: torch.div(x, 0.1, rounding_mode="floor"), {"div"}),
        (lambda x: x.clone().sign_(), {"sign"}),
        (lambda x: x * (x.max(1).indices[:, None] == 1), {"max"}),
        (lambda x: x * F.one_hot(x.argmax(1), 3), {"argmax"}),
        (lambda x: x * (4 * x).long(), {"long"}),
        (lambda x: x * x.data, {"detach"}),
        (lambda x: x * x.detach().sum().item(), {"detach"}),
        (lambda x: x if x.argmax() > 3 else -x, {"argmax"}),
        (assigned, {"argmax"}),
        (viewed, {"detach"}),
        (blind, {"no_grad"}),
    ],
)
def test_what_a_gradient_cannot_see_is_followed_to_the_output(function, hidden):
    assert watched_in(function)[1] == hidden


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_number_that_is_read_off_the_images_is_followed():
    assert watched_in(lambda x: x * float(x.floor().sum()))[1] == {"floor"}


def with_grad(x):
    with torch.enable_grad():
        z = x.detach().requires_grad_(True)
        return torch.autograd.grad((z * z).sum(), z)[0]


def with_backward(x):
    with torch.enable_grad():
        z = x.detach().requires_grad_(True)
        (z * z).sum().backward()
    return z.grad


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (lambda x: x.exp(), set()),
        (blind, set()),
        (with_grad, {"enable_grad", "grad"}),
        (with_backward, {"enable_grad", "backward"}),
        (lambda x: torch.func.grad(lambda z: (z * z).sum())(x), {"grad"}),
    ],
)
def test_gradients_taken_inside_a_pass_are_seen(function, how):
    assert how <= watched_in(function, grad=False)[0].optimises <= how | {"enable_grad"}
    assert bool(watched_in(function, grad=False)[0].optimises) == bool(how)


@pytest.mark.parametrize(
    ("function", "draws"),
    [
        (lambda x: x + torch.randn_like(x), 1),
        (lambda x: x + torch.rand(3, generator=torch.Generator().manual_seed(0)), 1),
        (lambda x: F.dropout(x, 0.5, training=True), 1),
        (lambda x: F.dropout(x, 0.5, training=False), 0),
        (lambda x: F.rrelu(x, training=False), 0),
        (lambda x: F.scaled_dot_product_attention(*(x[None, None],) * 3), 0),
    ],
)
def test_draws_are_seen_and_attention_is_none(function, draws):
    assert len(watched_in(function, grad=False)[0].draws) == draws


def test_looking_on_leaves_no_hook():
    model = undefended()
    with watching(model):
        model(images(2)[0])
    assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("wanted", [True, False])
def test_a_gradient_detector_answers_as_its_test_expects(wanted):
    x, y = images(64)
    right = (wrapped(GradientDetector)(x.requires_grad_(wanted)).argmax(1) == y).float().mean()
    assert (right < 0.1) == wanted
