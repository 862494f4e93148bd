"""Every probe fires on a model that deserves it, and none on an honest one."""

import dataclasses
from functools import cache

import broken_models as zoo
import numpy as np
import pandas as pd
import pytest
import torch
from oracles import Hyperplane, points

from bench.attacks.losses import cross_entropy, margin
from bench.attacks.random_search import random_search
from bench.audit import probes
from bench.audit.outcomes import MATRICES, Outcomes
from bench.audit.probes import Ascent, Probe, Subject, probe
from bench.finding import verdict
from bench.judge import Cost
from bench.record import ColumnRecord, Facts
from bench.rng import Rng
from bench.threat import L2, Linf

HONEST = ("undefended", "linear", "adversarially trained", "soft mixture", "log-probabilities")
STEPS = 12
LAST = [one for one in probes.PROBES if probes.twice_the_samples in one.checks]


class GradientOnGrid(zoo.Wrapper):
    """Its gradient is true for stored images and zero for those that an attack has touched."""

    def before(self, x):
        off = ((255 * x - (255 * x).round()).abs() > 1e-3).flatten(1).any(1)[:, None, None, None]
        return torch.where(off, x.detach() + 0 * x, x)


class EdgeBlind(zoo.Wrapper):
    """No gradient for pixels that are black or white, which most are: an attack that gets there is stuck there."""

    def before(self, x):
        return torch.where((x <= 0) | (x >= 1), x.detach(), x)


class RareGradient(zoo.Wrapper):
    """Random in its gradient alone: four of five images have none."""

    def before(self, x):
        return torch.where(torch.rand(len(x), 1, 1, 1) < 0.2, x, x.detach())


def subject(model, *, n=64, steps=STEPS, random=False, eps=zoo.EPS, losses=(cross_entropy, margin)):
    """Images that the model has right, and what PGD with these losses leaves of them."""
    x, y = zoo.images(n)
    with torch.no_grad():
        right = model(x.clone()).argmax(1) == y
    x, y = x[right], y[right]
    everything = torch.ones(len(y), dtype=torch.bool)
    whole = Subject(
        model=model,
        gradient_model=model,
        x=x,
        y=y,
        standing=everything,
        pgd_standing=everything,
        threat=Linf(eps),
        classes=10,
        random=random,
        rng=Rng(0, images=range(len(y))),
        cost=Cost(),
        steps=steps,
        eot=1,
    )
    standing = everything.clone()
    for loss in losses:
        fell = whole.ascend(
            whole.differentiable,
            whole.threat,
            steps=steps,
            step_size=eps / 4,
            loss=loss,
            rng=whole.rng.at(loss.__name__),
        )
        standing &= ~fell
    return dataclasses.replace(whole, standing=standing, pgd_standing=standing, cost=Cost())


@cache
def honest(name):
    return subject(zoo.ZOO[name].build())


def codes(found):
    return {finding.code for finding in found if finding.severity != "informs"}


@pytest.mark.parametrize("name", HONEST)
def test_nothing_is_found_against_an_honest_model(name):
    assert verdict(probes.run(honest(name), budget=20_000)) == "credible"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quantised", {"unbounded-survives", "black-box-beats-white-box", "loss-stuck"}),
        ("tanh saturated", {"unbounded-survives", "black-box-beats-white-box", "loss-stuck"}),
        ("negated gradient", {"unbounded-survives", "black-box-beats-white-box", "loss-stuck"}),
        ("zeroing hook", {"unbounded-survives", "black-box-beats-white-box", "loss-stuck"}),
    ],
)
def test_a_broken_model_is_found_out(name, expected):
    found = probes.run(subject(zoo.ZOO[name].build(), steps=5), budget=20_000)
    assert expected <= codes(found) and verdict(found) == "void"


def test_one_step_is_tried_where_many_were():
    model = GradientOnGrid(zoo.undefended())
    found = probes.run(subject(model, n=96), budget=20_000)
    assert "one-step-beats-many" in codes(found)


def test_gradients_are_averaged_where_they_vanish():
    found = probes.run(subject(EdgeBlind(zoo.undefended())), budget=20_000)
    assert "masked-gradient" in codes(found)


def test_an_attack_that_was_too_short_has_not_converged():
    found = probes.run(subject(zoo.undefended(), n=96, steps=1), budget=20_000)
    assert "not-converged" in codes(found)


@pytest.mark.parametrize(("model", "fires"), [(RareGradient, True), (zoo.GaussianNoise, False)])
def test_a_random_model_is_attacked_with_twice_the_samples(model, fires):
    found = probes.run(subject(model(zoo.undefended()), random=True, steps=1, eps=0.2), 50_000, LAST)
    (one,) = (finding for finding in found if finding.code == "random-forward")
    assert "in place of" in one.evidence and one.severity == ("warns" if fires else "informs")


def test_an_unstable_landscape_only_informs():
    found = probes.run(subject(zoo.ZOO["tanh saturated"].build(), steps=2, eps=0.4), budget=20_000)
    (one,) = (finding for finding in found if finding.code == "unstable-landscape")
    assert one.severity == "informs"


def test_a_network_between_plateaus_is_found_out_and_no_honest_one():
    (one,) = [one for one in probes.PROBES if probes.cliff in one.checks]
    for name in ("decoy", "draws together", *HONEST):
        whole = subject(zoo.ZOO[name].build(), steps=1)
        found = codes(probes.run(dataclasses.replace(whole, cost=Cost()), 20_000, [one]))
        assert ("cliff" in found) == (name not in HONEST), name


def test_a_quick_copy_that_attacks_less_well_is_found_out():
    (one,) = [one for one in probes.PROBES if probes.weaker_gradients in one.checks]
    whole = subject(zoo.undefended(), steps=1)
    for quick, expected in ((zoo.ZOO["negated gradient"].build(), True), (zoo.undefended(), False)):
        copied = dataclasses.replace(whole, gradient_model=quick, cost=Cost())
        assert ("weaker-gradients" in codes(probes.run(copied, 20_000, [one]))) == expected
    same = dataclasses.replace(whole, cost=Cost())
    assert probes.run(same, 20_000, [one]) == [] and same.cost.gradients == 0


def test_a_handful_of_images_voids_no_run():
    stuck = subject(zoo.ZOO["tanh saturated"].build(), steps=5)
    for count, expected in ((probes.FEW - 1, False), (probes.FEW, True)):
        few = dataclasses.replace(stuck.take(torch.arange(count)), cost=Cost())
        assert ("unbounded-survives" in codes(probes.run(few, budget=200_000))) == expected


def test_a_model_that_fails_away_from_the_data_is_reported_and_not_raised():
    class Fails(zoo.Wrapper):
        def before(self, x):
            # the first pixel of every digit is black
            return x / (x[:, :1, :1, :1] < 0.09)

    found = probes.run(subject(Fails(zoo.undefended()), losses=()), budget=20_000)
    assert codes(found) == {"non-finite"} and "unbounded-survives" in str(found[0])


def test_the_few_images_that_stand_prove_nothing():
    few = dataclasses.replace(subject(zoo.undefended(), n=96, steps=1), cost=Cost())
    weak = dataclasses.replace(few, standing=few.standing & (torch.arange(len(few)) < 8))
    assert "not-converged" not in codes(probes.run(weak, budget=20_000))


def test_an_ascent_says_whose_loss_is_stuck_and_whose_still_climbs():
    t = torch.linspace(0, 1, 40)
    losses = torch.stack([t, (5 * t).clamp_max(1), -t, 0 * t, 1 - (2 * t - 1).abs()], 1)
    ascent = Ascent(losses, torch.zeros(5, dtype=torch.bool))
    assert ascent.climbing.tolist() == [True, False, False, False, False]
    assert ascent.stuck.tolist() == [False, False, True, True, False]


class Band(torch.nn.Module):
    """Right but for images whose mean lies in a narrow band; every gradient makes them brighter."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        inside = ((mean - 0.55).abs() < 0.012).float()
        return torch.stack([torch.ones_like(mean), mean + 2 * inside], 1)


def between(mean):
    """Grey images of this mean, attacked in a ball that holds the band in its middle."""
    x = torch.full((4, 1, 8, 8), mean)
    return dataclasses.replace(
        honest("linear"), model=Band(), gradient_model=Band(), x=x, y=torch.zeros(4, dtype=torch.long), classes=2,
        standing=torch.ones(4, dtype=torch.bool), threat=Linf(0.1), rng=Rng(0, images=range(4)), cost=Cost(),
    )  # fmt: skip


@pytest.mark.parametrize("leave", [True, False])
def test_an_image_is_broken_if_any_step_broke_it(leave):
    grey = between(0.5)
    broken = grey.ascend(grey.differentiable, grey.threat, steps=8, step_size=0.01, leave=leave)
    assert broken.all()


@pytest.mark.parametrize(("rng", "expected"), [(None, False), (Rng(0, images=range(4)), True)])
def test_an_ascent_begins_at_the_image_unless_it_is_given_streams(rng, expected):
    # no step: the band is met by a random start, or not at all
    grey = dataclasses.replace(between(0.5), threat=Linf(0.5))
    grey = dataclasses.replace(grey, x=torch.full((4, 1, 1, 1), 0.5))
    streams = [rng and rng.at("draw", draw) for draw in range(40)]
    ends = [
        grey.ascend(grey.differentiable, grey.threat, steps=1, step_size=1e-6, rng=one).any()
        for one in streams
    ]
    assert any(ends) == expected


def looked_at(budget, passes=100, n=64):
    seen = []
    base = honest("linear")
    watch = dataclasses.replace(probes.unstable_landscape, look=lambda s, _: seen.append(len(s)))
    one = Probe((watch,), lambda s: passes, lambda s: torch.ones_like(s.standing))
    probes.run(dataclasses.replace(base, cost=Cost()), budget, [one])
    return seen[0] if seen else 0


def test_the_budget_says_how_many_images_are_looked_at():
    n = len(honest("linear"))
    assert [looked_at(b) for b in (0, 1600, 3000, 10**6)] == [0, 16, 30, n]


def test_a_probe_costs_no_more_than_it_states():
    for one in probes.PROBES:
        whole = dataclasses.replace(honest("adversarially trained"), cost=Cost())
        if not one.among(whole).any():
            continue
        probes.run(whole, 16 * one.passes(whole), [one])
        cost = probes.GRADIENT * whole.cost.gradients + whole.cost.forwards
        # judging what a step seems to have broken comes on top
        assert 0 < cost <= 1.1 * 16 * one.passes(whole)


def test_probes_draw_alike_whatever_came_before():
    whole = honest("linear")
    first = probes.run(dataclasses.replace(whole, cost=Cost()), 10**5)
    torch.rand(7)
    assert probes.run(dataclasses.replace(whole, cost=Cost()), 10**5) == first


def outcomes(held):
    """Of two columns, PGD at the radius and FGSM at half of it."""
    columns = (
        ColumnRecord(name="clean", attack="clean"),
        ColumnRecord(
            name="pgd-7",
            attack="pgd",
            norm="Linf",
            epsilon=0.1,
            step_size=0.025,
            steps=7,
            restarts=1,
            eot=1,
            loss="ce",
        ),
        ColumnRecord(name="fgsm", attack="fgsm", norm="Linf", epsilon=0.05, eot=1, loss="ce"),
    )
    robust = pd.DataFrame({c.name: held.get(c.name, np.ones(20, bool)) for c in columns})
    parts = dict.fromkeys(MATRICES, robust * 1) | {"robust": robust}
    return Outcomes(
        columns=columns, labels=pd.Series(range(20)), **parts, dataset="d", protocol="p", norm="Linf", eps=0.1,
        success="any", facts=Facts(),
    )  # fmt: skip


def test_the_run_says_which_images_stand(monkeypatch):
    seen = []
    monkeypatch.setattr(probes, "run", lambda subject, budget: seen.append(subject) or [])
    held = {"pgd-7": np.arange(20) < 12, "fgsm": np.arange(20) < 5}
    x, y = zoo.images(20)
    found, cost = probe(
        zoo.undefended(), zoo.undefended(), x, y, threat=Linf(0.1), outcomes=outcomes(held), classes=10, random=False,
        seed=0, budget=0,
    )  # fmt: skip
    # FGSM at half the radius says nothing of the radius itself
    assert int(seen[0].standing.sum()) == int(seen[0].pgd_standing.sum()) == 12
    assert seen[0].steps == 7 and found == [] and cost.forwards == 0


# --- random search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [Linf(0.012), L2(0.066)])
def test_random_search_stays_in_the_ball_and_breaks_what_can_be_broken(threat):
    model, x = Hyperplane(), points()
    y = model.labels(x)
    rng = Rng(0, images=range(len(x)))
    x_adv = random_search(model, x, y, threat, rng=rng, queries=150)
    assert threat.contains(x_adv, x).all()
    broken = model(x_adv).argmax(1) != y
    length = model.margin(x, threat.norm)
    assert not broken[length > threat.eps].any() and broken[length < 0.2 * threat.eps].all()
    assert broken.any() and not broken.all()


def test_random_search_ends_with_its_best_guess():
    model, x = Hyperplane(), points()
    y, seen = model.labels(x), []

    def ask(guess):
        seen.append(margin(model(guess), y))
        return model(guess)

    # so small a ball breaks nothing, so that every image is asked every time
    x_adv = random_search(ask, x, y, Linf(1e-3), rng=Rng(0, images=range(len(x))), queries=20)
    assert torch.equal(margin(model(x_adv), y), torch.stack(seen).amax(0)) and len(seen) == 20


def test_random_search_gives_an_image_the_same_whatever_its_batch():
    model, x = Hyperplane(), points()
    y, rng = model.labels(x), Rng(0, images=range(len(x)))
    whole = random_search(model, x, y, Linf(0.02), rng=rng, queries=30)
    rows = torch.tensor([3, 9])
    assert torch.equal(
        random_search(model, x[rows], y[rows], Linf(0.02), rng=rng.take(rows), queries=30), whole[rows]
    )


def test_random_search_asks_no_more_than_it_may():
    model, x = Hyperplane(), points()
    calls = []
    random_search(
        lambda z: calls.append(len(z)) or model(z), x, model.labels(x), Linf(1e-4), rng=Rng(0), queries=9
    )
    assert calls == [len(x)] * 9
