"""Radii that are proved: against what exhaustive and random search finds."""

import itertools

import pytest
import torch
from torch import nn

from bench.certify import (
    NOT_APPLICABLE,
    Certificate,
    dual_radius,
    gate_slopes,
    layer_slope,
    margin,
    pixel_rows,
    route_radius,
    soft_radius,
    told,
)
from bench.errors import UsageError

E, D, K, N = 3, 4, 3, 40
CORNERS = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=D)), dtype=torch.float64)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Soft:
    """A soft mixture of linear experts in the plane of `D` numbers."""

    def __init__(self, seed=0, size=1.0):
        self.rows, self.bias = drawn(E, D, seed=seed), drawn(E, seed=seed + 1)
        self.experts = size * drawn(E, K, D, seed=seed + 2)

    def scores(self, x):
        return x @ self.rows.T + self.bias

    def outputs(self, x):
        return torch.einsum("ekd,bd->bek", self.experts, x).softmax(2)

    def __call__(self, x):
        return torch.einsum("be,bek->bk", self.scores(x).softmax(1), self.outputs(x))

    def slopes(self):
        """Lᵢ: a difference of two probabilities follows the logit that moves most, and logits follow their rows."""
        return self.experts.abs().sum(2).amax(1)

    def parts(self, x):
        return margin(self(x)), self.scores(x).softmax(1), gate_slopes(self.rows), self.slopes()


def around(x, radius, seed):
    """A point of each ball: at a corner of it for even seeds, anywhere for odd ones."""
    step = drawn(*x.shape, seed=seed).sign() if seed % 2 == 0 else drawn(*x.shape, seed=seed).tanh()
    return x + radius[:, None] * step


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_no_search_finds_a_soft_mixture_to_change_its_answer_within_the_radius(size):
    for seed in range(6):
        model, x = Soft(10 * seed, size), drawn(N, D, seed=seed)
        radius = soft_radius(*model.parts(x))
        assert (radius > 0).all()
        for step in [*CORNERS, *drawn(20, D, seed=seed).tanh()]:
            assert torch.equal(model(x + 0.999 * radius[:, None] * step).argmax(1), model(x).argmax(1))


def test_the_margin_moves_by_no_more_than_the_bound_says():
    model, x = Soft(), drawn(N, D)
    _, weights, gate, experts = model.parts(x)
    answers = model(x).argmax(1)
    for seed in range(40):
        moved = around(x, torch.full((N,), 0.3, dtype=torch.float64), seed)
        for k in range(K):
            m, m_moved = (p.gather(1, answers[:, None])[:, 0] - p[:, k] for p in (model(x), model(moved)))
            length = (moved - x).abs().amax(1)
            assert ((m_moved - m).abs() <= (gate.sum() + weights @ experts) * length + 1e-12).all()


def test_the_radius_is_exact_for_two_experts_that_differ_and_a_gate_on_its_steepest_point():
    # experts say nothing of x, and the gate is a logistic of slope 1/4 at equal scores
    rows = torch.tensor([[2.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert gate_slopes(rows).tolist() == [1.0, 1.0]
    point = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((rows @ point).softmax(0)[0], point)
    assert gradient.abs().sum() == pytest.approx(1.0)


def test_no_gate_is_steeper_than_its_slope():
    rows = drawn(E, D)
    slopes = gate_slopes(rows)
    for point in drawn(200, D, seed=3):
        jacobian = torch.autograd.functional.jacobian(lambda x: (rows @ x).softmax(0), point)
        assert (jacobian.abs().sum(1) <= slopes + 1e-12).all()


@pytest.mark.parametrize("alpha", [0.6, 0.7, 0.9])
def test_no_standard_model_changes_the_answer_of_both_within_the_radius(alpha):
    model, x = Soft(size=4.0), drawn(200, D, seed=7)
    radius = dual_radius(*model.parts(x), alpha)
    some = radius > 0
    assert 10 < some.sum() < 200
    answer = model(x).argmax(1)
    for step in CORNERS:
        moved = x + 0.999 * radius[:, None] * step
        for k in range(K):
            other = torch.nn.functional.one_hot(torch.full((200,), k), K).double()
            both = (1 - alpha) * other + alpha * model(moved)
            assert torch.equal(both.argmax(1)[some], answer[some])


def test_the_radius_of_both_grows_with_alpha_up_to_the_robust_models_own():
    parts = Soft(size=4.0).parts(drawn(N, D, seed=7))
    radii = [dual_radius(*parts, alpha) for alpha in (0.51, 0.6, 0.7, 0.8, 0.9, 1.0)]
    for less, more in itertools.pairwise(radii):
        assert (more >= less).all() and (more[less > 0] > less[less > 0]).all()
    assert torch.equal(radii[-1], soft_radius(*parts))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.7, 0.8])
def test_the_radius_of_both_is_zero_where_the_margin_is_too_small(alpha):
    margins = torch.arange(100, dtype=torch.float64) / 100 + 0.005
    weights = torch.full((100, 2), 0.5, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    radius = dual_radius(margins, weights, ones, ones, alpha)
    needed = (1 - alpha) / alpha if alpha > 0 else float("inf")
    assert torch.equal(radius > 0, margins > needed)


def test_a_route_turns_at_its_radius_and_at_no_corner_before_it():
    rows, bias, x = drawn(E, D, seed=4), drawn(E, seed=5), drawn(N, D, seed=6)
    radius = route_radius(rows, x @ rows.T + bias)
    route = (x @ rows.T + bias).argmax(1)

    def turned(scale):
        # a linear function is largest at a corner of the ball, so corners are all there is to try
        points = x + scale * radius[:, None] * CORNERS[:, None]
        return ((points @ rows.T + bias).argmax(2) != route).any(0)

    assert not turned(0.9999).any() and turned(1.0001).all()


def test_the_point_where_the_route_turns_lies_along_the_sign_of_the_rows_difference():
    rows = torch.tensor([[3.0, -1.0], [1.0, 2.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    radius = route_radius(rows, x @ rows.T)
    assert radius.item() == pytest.approx((2.8 - 1.4) / 5)
    scores = (x - radius * (rows[0] - rows[1]).sign()) @ rows.T
    assert scores[0, 0].item() == pytest.approx(scores[0, 1].item())


def test_equal_rows_never_turn():
    rows = torch.ones(2, 3)
    assert route_radius(rows, torch.tensor([[1.0, 0.5]])).tolist() == [float("inf")]


def test_the_rows_of_a_gate_are_found_in_pixel_units_whatever_it_does_before():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2 * 36, 3)

        def forward(self, x):
            z = (x - 0.5) / torch.tensor([0.25, 0.5]).view(1, 2, 1, 1)
            return self.linear(nn.functional.interpolate(z, (6, 6), mode="bilinear").flatten(1))

    gate, x = Gate(), torch.rand(5, 2, 3, 3)
    rows = pixel_rows(gate, x)
    assert rows.shape == (3, 18)
    with torch.no_grad():
        change = torch.rand(5, 2, 3, 3)
        torch.testing.assert_close(gate(x + change) - gate(x), change.flatten(1) @ rows.T)


def test_a_gate_that_is_not_linear_is_refused():
    gate = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(UsageError, match="not linear in the pixels"):
        pixel_rows(gate, 5 * torch.randn(6, 1, 2, 2))


def some_norm():
    norm = nn.BatchNorm2d(2).eval()
    nn.init.normal_(norm.weight)
    norm.running_var.uniform_(0.1, 4)
    return norm


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1, stride=2), some_norm(), nn.Sequential()],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layers_slope_is_reached_and_never_exceeded(layer):
    if isinstance(layer, nn.Sequential):
        with pytest.raises(UsageError, match="no Lipschitz constant is known of a Sequential"):
            layer_slope(layer)
        return
    slope, found = layer_slope(layer), 0.0
    with torch.no_grad():
        zero = layer(torch.zeros(1, 2, 5, 5))
        for pixel in itertools.product(range(zero.shape[1]), [2], [2] if zero.shape[2] == 5 else [1]):
            x = torch.zeros(1, 2, 5, 5, requires_grad=True)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(layer(x)[0][pixel], x)
            found = max(found, (layer(gradient.sign()) - zero).abs().max().item())
    assert found == pytest.approx(slope, rel=1e-5)


def test_what_cannot_be_certified_says_so():
    none = Certificate.none("it is a rock")
    assert none.radius is None and none.about == f"{NOT_APPLICABLE}: it is a rock"


class Told(nn.Module):
    """A mixture with a linear gate whose route turns at a known distance: a quarter of what the score grows by."""

    def __init__(self, about, linear=True):
        super().__init__()
        self.about, self.linear = about, linear

    def certificate(self, x):
        return self.about

    def gate(self, x):
        score = x.flatten(1).sum(1) if self.linear else x.flatten(1).square().sum(1)
        return torch.stack([score, torch.zeros_like(score)], 1)


@pytest.mark.parametrize(
    ("about", "linear", "said"),
    [
        (Certificate.none("it jumps"), True, "NOT APPLICABLE: it jumps; the route of a linear router turns at 0.5 "),
        (Certificate.none("it jumps"), False, "NOT APPLICABLE: it jumps"),
        (Certificate(torch.tensor([0.1, 0.2, 0.3]), "proof"), False, "0.2 (median of 3 images; 0.1 to 0.3) certified; proof"),
    ],
)  # fmt: skip
def test_what_is_proved_of_a_run_is_told_in_its_notes(about, linear, said):
    x = torch.stack([torch.full((1, 2, 2), value) for value in (0.25, 0.5, 0.75)])
    (note,) = told(Told(about, linear), x)
    assert note.severity == "informs" and note.evidence.startswith(said)
    assert ("turns at" in note.evidence) == linear
    assert told(nn.Linear(4, 2), x) == []
