"""The gradient checks: surrogates, jumps, nothing and saturation are found, honest gradients are left alone."""

import pytest
import torch
from broken_models import (
    BROKEN,
    CLASSES,
    HONEST,
    NEEDS_PROBES,
    ZOO,
    Clamps,
    Detaching,
    GaussianNoise,
    NegatedGradient,
    Quantised,
    Wrapper,
    images,
    undefended,
)
from torch import nn

from bench.audit.contract import contract
from bench.audit.gradients import CHECKS, Agreement, Subject, gradient_checks, saturation
from bench.finding import verdict

#: what cannot even be asked for a gradient
NO_FUNCTION = {"model-crash", "signature", "non-finite"}


def rightly_classified(model, n=16):
    x, y = images(64)
    with torch.no_grad():
        right = (model(x.clone()).argmax(1) == y).nonzero().flatten()[:n]
    return x[right], y[right]


def looked(model, n=16, **asked):
    return gradient_checks(model, *rightly_classified(model, n), **asked)


def severities(findings):
    return {finding.code: finding.severity for finding in findings}


def evidence(findings, code):
    (found,) = [finding for finding in findings if finding.code == code]
    return found.evidence


def wrapped(make, *arguments):
    return make(undefended(), *arguments).eval()


# ---------------------------------------------------------------------------------------------------------------------
# the zoo


@pytest.mark.parametrize("name", HONEST)
def test_honest_gradients_are_left_alone(name):
    assert looked(HONEST[name].build()) == []


@pytest.mark.parametrize("name", [name for name in BROKEN if not BROKEN[name].contract & NO_FUNCTION])
def test_a_broken_model_gets_what_it_is_owed(name):
    found = severities(looked(BROKEN[name].build()))
    assert BROKEN[name].gradients <= {code for code, severity in found.items() if severity != "informs"}


@pytest.mark.parametrize("name", sorted(set(ZOO) - NEEDS_PROBES))
def test_contract_and_gradient_checks_come_to_the_verdict_that_is_known(name):
    model = ZOO[name].build()
    x, y = images(48)
    found = contract(model, x, y, classes=CLASSES).findings
    if not {finding.code for finding in found} & NO_FUNCTION:
        found += looked(model, directions=2)
    assert verdict(found) == ZOO[name].verdict


def test_every_check_has_a_model_on_which_it_fires():
    owed = set().union(*(specimen.gradients for specimen in BROKEN.values()))
    assert {one.code for one in CHECKS} == owed | {"non-finite"}


# ---------------------------------------------------------------------------------------------------------------------
# derivatives against differences


def test_a_linear_models_derivatives_are_exact():
    x, y = rightly_classified(HONEST["linear"].build())
    short = Subject(HONEST["linear"].build(), x, y).short
    assert short.signs == 1 and short.error < 1e-8 and short.count == 8 * len(x)


def test_no_difference_leaves_the_box():
    x, y = torch.tensor([0.0, 1.0]).repeat(32).view(1, 1, 8, 8), torch.tensor([0])
    inside = Subject(wrapped(Clamps), x, y).inside
    assert inside.min() >= 0.03 and inside.max() <= 0.97


def test_adaptive_attacks_make_a_surrogate_information():
    assert severities(looked(wrapped(NegatedGradient), adaptive=True)) == {"wrong-direction": "informs"}


@pytest.mark.parametrize(
    ("short", "long", "error", "codes"),
    [
        (1.0, 0.99, 1e-9, set()),
        (0.95, 0.85, 1e-9, {"shattered-gradient"}),
        (0.8, 0.6, 1e-9, {"shattered-gradient"}),
        (0.66, 0.66, 1e-9, {"wrong-direction"}),
        (1.0, 0.99, 0.3, {"wrong-direction"}),
        (0.95, 0.6, 0.3, {"wrong-direction"}),
    ],
)
def test_jumps_are_told_from_surrogates_by_what_a_longer_step_loses(short, long, error, codes):
    subject = Subject(undefended(), *rightly_classified(undefended(), 2))
    subject.short, subject.long = Agreement(short, error, 1e-4, 99), Agreement(long, 1.0, 1e-3, 99)
    assert {one.code for one in CHECKS if one(subject)} == codes


class OnlySingle(Wrapper):
    """Cannot run in float64."""

    def before(self, x):
        assert x.dtype == torch.float32
        return x


def test_a_model_that_runs_in_float32_alone_is_looked_at_in_float32():
    model = wrapped(OnlySingle)
    assert looked(model) == []
    negated = OnlySingle(wrapped(NegatedGradient)).eval()
    assert "over 0.001," in evidence(looked(negated), "wrong-direction")


class WrongForSome(Wrapper):
    """Reversed gradients for the third of the digits that have a dark pixel there."""

    def before(self, x):
        turn = (x[:, :, 3:4, 3:4] <= 0.5).to(x)
        return turn * NegatedGradient.before(self, x) + (1 - turn) * x


def test_gradients_that_are_wrong_for_some_images_are_found():
    model = wrapped(WrongForSome)
    short = Subject(model, *rightly_classified(model, 32)).short
    assert short.error < 0.1 and 0.6 < short.signs < 0.8
    assert severities(looked(model, 32)) == {"wrong-direction": "warns"}


def test_a_random_model_is_asked_under_one_seed():
    model = wrapped(GaussianNoise)
    x, y = rightly_classified(wrapped(Clamps))
    torch.manual_seed(5)
    assert gradient_checks(model, x, y) == []
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert drawn == torch.rand(())


def test_where_one_seed_does_not_repeat_the_answers_nothing_is_claimed():
    found = looked(ZOO["private numpy noise"].build())
    assert severities(found) == {"wrong-direction": "informs"}
    assert "not looked at" in evidence(found, "wrong-direction")


# ---------------------------------------------------------------------------------------------------------------------
# zero and non-finite gradients


class FlatForFirst(nn.Module):
    """A linear model that the first images of a batch have no gradient in, or one as small as `factor`."""

    def __init__(self, flat, factor=0.0):
        super().__init__()
        self.flat, self.factor = flat, factor
        self.weight = nn.Parameter(torch.randn(CLASSES, 64), requires_grad=False)

    def forward(self, x):
        x = x.flatten(1)
        scale = torch.ones(len(x), 1).to(x)
        scale[: self.flat] = self.factor
        return (scale * x + ((1 - scale) * x).detach()) @ self.weight.T


@pytest.mark.parametrize("factor", [0.0, 1e-14])
@pytest.mark.parametrize(
    ("flat", "black_box", "severity"),
    [
        (1, False, None),
        (2, False, "warns"),
        (5, False, "warns"),
        (6, False, "blocks"),
        (6, True, "warns"),
    ],
)
def test_images_without_a_gradient_are_counted(flat, black_box, severity, factor):
    torch.manual_seed(0)
    model, x = FlatForFirst(flat, factor), torch.rand(100, 1, 8, 8)
    found = gradient_checks(model, x, model(x).argmax(1), black_box=black_box, directions=1)
    assert severities(found).get("zero-gradient") == severity
    if severity:
        assert f"zero for {flat}.0 % of 100 images, in float64 for {flat}.0 %" in evidence(
            found, "zero-gradient"
        )


def test_a_gradient_that_float32_loses_is_told_from_one_that_there_never_was():
    said = evidence(looked(ZOO["tanh saturated"].build()), "zero-gradient")
    single, double = (
        float(part.split(" for ")[1].split(" %")[0]) for part in said.split(";")[0].split(", in")
    )
    assert single > double > 0


@pytest.mark.parametrize("black_box", [False, True])
def test_logits_without_any_gradient_block_whatever_else_attacks(black_box):
    found = looked(wrapped(Detaching), black_box=black_box)
    assert severities(found) == {"zero-gradient": "blocks"}
    assert "carry no gradient" in evidence(found, "zero-gradient")


def test_a_black_box_attack_makes_a_flat_model_suspect_and_not_void():
    assert severities(looked(wrapped(Quantised), black_box=True))["zero-gradient"] == "warns"


class FlatOffGrid(Wrapper):
    """A gradient at stored pixels alone."""

    def before(self, x):
        off = ((255 * x - (255 * x).round()).abs() > 1e-2).flatten(1).any(1)[:, None, None, None]
        return torch.where(off, x.detach(), x)


def test_a_gradient_at_stored_pixels_alone_is_none():
    assert severities(looked(wrapped(FlatOffGrid)))["zero-gradient"] == "blocks"


class RootOfZero(Wrapper):
    def after(self, logits):
        return logits + (0 * logits).sqrt()


def test_a_gradient_that_is_nan_blocks():
    found = looked(wrapped(RootOfZero))
    assert severities(found) == {"non-finite": "blocks"}
    assert "gradients are NaN or infinite for 16 image(s)" in evidence(found, "non-finite")


def test_nothing_is_found_without_images():
    assert gradient_checks(wrapped(Quantised), torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)) == []


# ---------------------------------------------------------------------------------------------------------------------
# saturation


def test_saturation_counts_gaps_above_80_and_losses_that_are_exactly_0():
    gaps = torch.tensor([0.0, 10.0, 79.0, 81.0])
    logits = torch.stack([gaps, torch.zeros(4), torch.full((4,), -500.0)], 1)
    y = torch.tensor([0, 0, 0, 0])
    assert saturation(logits, y) == (0.25, 0.5)
    # a wrong answer loses nothing of its loss, however sure it is
    assert saturation(logits, y + 1) == (0.25, 0.0)
    assert saturation(logits[:0], y[:0]) == (0.0, 0.0)


@pytest.mark.parametrize(("factor", "trusted"), [(1.0, True), (-1.0, False)])
def test_a_copy_in_float64_that_answers_otherwise_is_not_trusted(factor, trusted):
    class Twin(Wrapper):
        def after(self, logits):
            return logits * (factor if logits.dtype == torch.float64 else 1.0)

    x, y = images(8)
    assert (Subject(Twin(undefended()).eval(), x, y).exact is not None) == trusted
