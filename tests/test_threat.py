import pytest
import torch
from oracles import points

from bench.errors import UsageError
from bench.rng import Rng
from bench.threat import L2, Linf, threat_model

THREATS = [Linf(8 / 255), Linf(0.6), L2(0.5), L2(3.0)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_projections_and_starts_are_contained(threat):
    x = points()
    assert threat.contains(threat.project(x + 5 * Rng(0).normal(x), x), x).all()
    start = threat.random_start(x, Rng(1, images=range(len(x))))
    assert threat.contains(start, x).all()
    assert not torch.equal(start, x)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_projecting_what_is_allowed_changes_nothing_much(threat):
    x = points()
    inside = threat.project(x + 0.01 * Rng(0).normal(x), x)
    assert torch.allclose(threat.project(inside, x), inside, atol=1e-6)


@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.5)], ids=str)
@pytest.mark.parametrize("fault", ["too far", "below the box", "above the box", "nan", "infinite"])
def test_what_is_not_allowed_is_found(threat, fault):
    x = points(3)
    bad = x.clone()
    if fault == "too far":
        bad[1] += threat.ascent(torch.ones_like(x))[1] * (threat.eps * 1.001)
    elif fault == "below the box":
        x[1, 0, 0, 0] = bad[1, 0, 0, 0] = 0
        bad[1, 0, 0, 0] -= 1e-4
    elif fault == "above the box":
        x[1, 0, 0, 0] = bad[1, 0, 0, 0] = 1
        bad[1, 0, 0, 0] += 1e-4
    else:
        bad[1, 0, 0, 0] = float(fault[:3])
    assert threat.contains(bad, x).tolist() == [True, False, True]


def test_the_linf_projection_is_the_nearest_allowed_image():
    x, threat = points(4), Linf(0.1)
    far = x + Rng(0).normal(x)
    near = threat.project(far, x)
    brute = torch.stack([x - 0.1, x + 0.1, far]).median(0).values.clamp(0, 1)
    assert torch.allclose(near, brute)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
def test_the_ascent_direction_gains_the_most_of_all_directions_of_its_length(threat):
    gradient = Rng(0).normal(torch.empty(2, 3, 4, 4))
    gain = (gradient * threat.ascent(gradient)).flatten(1).sum(1)
    dual = gradient.flatten(1).abs().sum(1) if threat.norm == "Linf" else gradient.flatten(1).norm(dim=1)
    assert torch.allclose(gain, dual, rtol=1e-5)


@pytest.mark.parametrize("eps", [0, -0.1, 1.5, float("nan")])
def test_a_radius_outside_the_unit_interval_is_refused(eps):
    with pytest.raises(UsageError, match="eps must be more than 0 and at most 1"):
        threat_model("Linf", eps)


def test_an_unknown_norm_is_refused():
    with pytest.raises(UsageError, match="no norm named 'L7'"):
        threat_model("L7", 0.1)
