"""A random model is worth the probability of its right answers: no more, and no less."""

import numpy as np
import pytest
import torch
from oracles import Hyperplane, dataset, points

from bench.draws import DRAWS
from bench.evaluate import Evaluator
from bench.plan import plan
from bench.protocol import Protocol


class Slips(Hyperplane):
    """Right in nine of ten draws, whatever is done to the image: nobody can attack it."""

    def forward(self, x):
        right = torch.nn.functional.one_hot(Hyperplane().labels(points(len(x))), 10).float()
        slips = (torch.rand(len(x), 1) < 0.1).float()
        return 5 * (right * (1 - slips) + (1 - right) * slips) + 0 * super().forward(x)


class Noisy(Hyperplane):
    """The hyperplane under noise along its normal: right with a probability that is known."""

    spread = 2.0

    def forward(self, x):
        z = self.z(x) + self.spread * torch.randn(len(x))
        return torch.cat([torch.stack([z, -z], 1), z.new_full((len(z), 8), -1e3)], 1)

    @torch.no_grad()
    def probability(self, x, y, eps):
        """Of a right answer under the worst perturbation of radius eps."""
        sign = 1 - 2 * y.float()
        worst = sign * self.z(x) - eps * self.w.abs().sum()
        return torch.distributions.Normal(0, self.spread).cdf(worst)


def run(model, specs, eps, **fields):
    data = dataset()
    asked = Protocol.model_validate({"name": "t", "column": specs, **fields}).columns(eps, random=True)
    one = Evaluator(model, classes=10, split=data.test, seed=0, success="any")
    return one.run(plan(asked, random=one.random), np.arange(24)).outcomes, one


def test_a_model_that_slips_in_a_tenth_of_its_draws_loses_a_tenth():
    specs = [{"attack": "pgd", "steps": 5, "restarts": 3}, {"attack": "fgsm"}]
    found, one = run(Slips(), specs, 0.1, random_eot=2)
    assert one.random and one.facts.draws == DRAWS
    for outcome in found.values():
        # the standard error over 24 images and 100 draws is 0.6 points
        assert outcome.share.mean() == pytest.approx(0.9, abs=0.025)
    # scored on the draws that chose the image, the worst of four candidates would read several points lower
    assert found["pgd-5x3"].selected.mean() < found["pgd-5x3"].share.mean() - 0.03


def test_the_worst_of_the_draws_is_kept_as_the_pessimistic_outcome():
    found, _ = run(Slips(), [{"attack": "fgsm"}], 0.1, random_eot=1)
    outcome = found["fgsm"]
    assert torch.equal(outcome.robust, outcome.share == 1)
    assert outcome.robust.float().mean() < 0.1


def test_the_share_found_is_that_of_the_worst_perturbation():
    eps = float(Hyperplane().margin(points()).median()) / 2
    found, _ = run(Noisy(), [{"attack": "pgd", "steps": 10}], eps, random_eot=8)
    expected = Noisy().probability(points(), Hyperplane().labels(points()), eps)
    assert found["pgd-10"].share.mean() == pytest.approx(float(expected.mean()), abs=0.03)
    clean = Noisy().probability(points(), Hyperplane().labels(points()), 0.0)
    assert found["clean"].share.mean() == pytest.approx(float(clean.mean()), abs=0.03)


def test_an_exact_expectation_is_attacked_in_one_pass():
    class Exact(Noisy):
        def expected_log_probabilities(self, x):
            p = torch.distributions.Normal(0, self.spread).cdf(self.z(x)).clamp(1e-6, 1 - 1e-6)
            return torch.cat([torch.stack([p, 1 - p], 1).log(), p.new_full((len(p), 8), -1e3)], 1)

    specs = [{"attack": "pgd", "steps": 10, "random_start": False}]
    data = dataset()
    asked = Protocol.model_validate({"name": "t", "column": specs}).columns(0.01, random=True)
    one = Evaluator(Exact(), classes=10, split=data.test, seed=0, success="any")
    batch = one.run(plan(asked, random=True), np.arange(24))
    assert batch.costs["pgd"].gradients == 24 * 10


def test_outcomes_of_a_random_model_are_the_same_twice():
    specs = [{"attack": "pgd", "steps": 3}]
    one, _ = run(Noisy(), specs, 0.02, random_eot=2)
    torch.manual_seed(99)
    two, _ = run(Noisy(), specs, 0.02, random_eot=2)
    assert torch.equal(one["pgd-3"].share, two["pgd-3"].share)
