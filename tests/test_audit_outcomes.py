"""What outcomes alone say: every check fires on a run that deserves it, and none on an honest one."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.audit.best import best, read
from bench.audit.outcomes import CHECKS, MATRICES, Outcomes, exceeds, outcome_findings, outnumber
from bench.finding import verdict
from bench.record import Asked, ColumnRecord, Facts, Record

EPS = 8 / 255
CLEAN = ColumnRecord(name="clean", attack="clean")


def pgd(steps=50, *, eps=EPS, loss="ce", restarts=1, eot=1, step_size=None, attack="pgd", **more):
    name = f"{attack}-{steps}x{restarts}-{loss}-{eps:.4g}-eot{eot}"
    attack = attack if loss == "ce" else f"{attack}-{loss}"
    size = eps / 4 if step_size is None else step_size
    given = {
        "steps": steps,
        "epsilon": eps,
        "loss": loss,
        "restarts": restarts,
        "eot": eot,
        "step_size": size,
    }
    return ColumnRecord(name=name, attack=attack, norm="Linf", **given, **more)


def fgsm(eps=EPS):
    return ColumnRecord(name=f"fgsm-{eps:.4g}", attack="fgsm", norm="Linf", epsilon=eps, eot=1, loss="ce")


def other(attack, eps=EPS, **more):
    return ColumnRecord(name=attack, attack=attack, norm="Linf", epsilon=eps, **more)


def run(*columns, n=1000, clean=None, success="any", classes=10, dataset="made-up", eps=EPS, **facts):
    """A run of columns, each `(record, held)` or `(record, held, restart, step)`; `held` may be the number of the first images that hold.

    An image that is wrong from the start falls everywhere; a column says of each other image that it broke it, at start 0 and
    after one step, unless told otherwise.
    """
    clean = np.ones(n, bool) if clean is None else first(clean, n)
    labels = np.arange(n) % classes
    told = [(CLEAN, clean, 0, 0), *((*column, 0, 1)[:2] + ((*column, 0, 1)[2:4]) for column in columns)]
    frames = {name: {} for name in MATRICES}
    for record, held, restart, step in told:
        held = first(held, n) & clean
        frames["robust"][record.name] = held
        frames["share"][record.name] = frames["selected"][record.name] = held * 1.0
        frames["restart"][record.name] = np.where(held, -1, np.where(clean, restart, 0))
        frames["step"][record.name] = np.where(held, -1, np.where(clean, step, 0))
        frames["prediction"][record.name] = np.where(held, labels, (labels + 1) % classes)
    index = pd.Index(3 * np.arange(n), name="index")
    return Outcomes(
        columns=tuple(record for record, *_ in told),
        labels=pd.Series(labels, index),
        **{name: pd.DataFrame(values, index) for name, values in frames.items()},
        dataset=dataset,
        protocol="p",
        norm="Linf",
        eps=eps,
        success=success,
        facts=Facts(classes=classes, **facts),
    )


def first(held, n):
    return np.arange(n) < held if isinstance(held, (int, np.integer)) else np.asarray(held, bool)


def but(held, n, also):
    """The first `held` images, with the last `also` of those swapped for as many others."""
    kept = first(held, n)
    kept[held - also : held], kept[held : held + also] = False, True
    return kept


def found(outcomes, code):
    """The severity of the finding of that code, None without one."""
    return next((one.severity for one in outcome_findings(outcomes) if one.code == code), None)


# --- honest runs ------------------------------------------------------------------------------------------------------


def honest(n, seed, success):
    """Every image has a distance to its nearest wrong answer, and every attack overestimates it a little, each in its own way."""
    rng = np.random.default_rng(seed)
    distance = rng.exponential(0.05, n)
    clean = rng.random(n) < 0.95

    def held(eps, effort):
        return distance * (1 + np.abs(rng.normal(0, 0.03 / effort, n)) + 0.3 * (effort < 1)) > eps

    long = [pgd(k) for k in (10, 20, 30, 40, 50)]
    last = held(EPS, 2)
    kept = [(column, last | (rng.random(n) < 0.02 / (place + 1) ** 2)) for place, column in enumerate(long)]
    restarted = [(pgd(100, restarts=3, attack="ms-pgd"), last & held(EPS, 2), rng.integers(0, 2, n), 30)]
    margins = [(pgd(50, loss="margin"), held(EPS, 2), 0, rng.integers(0, 30, n))]
    sweep = [(fgsm(i / 100), held(i / 100, 0.5)) for i in range(1, 10)]
    square = [(other("square"), last & held(EPS, 3) | (rng.random(n) < 0.2))]
    return run(
        *sweep, *kept, *restarted, *margins, *square, n=n, clean=clean, success=success, dataset="cifar10"
    )


@pytest.mark.parametrize("success", ["last", "any"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [200, 1000, 10_000])
def test_an_honest_run_is_credible(n, seed, success):
    outcomes = honest(n, seed, success)
    assert verdict(outcome_findings(outcomes)) == "credible", outcome_findings(outcomes)


# --- one table for the checks that count images -----------------------------------------------------------------------


def one_step(only):
    """FGSM and PGD each break so many images that the other leaves."""
    return run((fgsm(), but(500, 1000, only)), (pgd(), 500))


def guessed(only, n=1000):
    """Square breaks so many of the images that PGD left standing."""
    return run((pgd(), n // 2), (other("square", survivors=True), n // 2 - only), n=n)


@pytest.mark.parametrize(
    ("code", "severity", "outcomes"),
    [
        ("one-step-beats-many", "warns", lambda: run((fgsm(), 300), (pgd(), 330))),
        ("one-step-beats-many", "warns", lambda: one_step(30)),
        ("one-step-beats-many", None, lambda: one_step(5)),
        ("one-step-beats-many", None, lambda: run((fgsm(2 * EPS), 300), (pgd(), 330))),
        ("one-step-beats-many", "warns", lambda: run((fgsm(EPS / 2), 300), (pgd(), 330))),
        ("black-box-beats-white-box", "warns", lambda: guessed(10)),
        ("black-box-beats-white-box", None, lambda: guessed(2)),
        ("black-box-beats-white-box", None, lambda: guessed(1, n=200)),
        ("black-box-beats-white-box", "warns", lambda: guessed(6, n=200)),
        ("black-box-beats-white-box", "warns", lambda: run((pgd(), 500), (other("transfer:soe"), 480))),
        ("black-box-beats-white-box", None, lambda: run((pgd(eps=EPS / 2), 500), (other("square"), 400))),
        ("black-box-beats-white-box", None, lambda: run((pgd(), 500), (other("apgd-t"), 480), (other("square"), 480))),
        # what it was never shown it did not break
        ("black-box-beats-white-box", None, lambda: run((pgd(), 500), (other("square", survivors=True), 480, -1, -1))),
        # what fell before the clean image was classified is nobody's
        ("black-box-beats-white-box", None, lambda: run((pgd(), 500), (other("square"), 500), clean=500)),
        ("saturated-loss", "warns", lambda: run((pgd(), 600), (pgd(loss="margin"), 500))),
        ("saturated-loss", None, lambda: run((pgd(), 540), (pgd(loss="margin"), 500))),
        ("saturated-loss", "warns", lambda: run((pgd(), 540), (pgd(loss="margin"), 500), zero_loss=0.02)),
        ("saturated-loss", None, lambda: run((pgd(), 515), (pgd(loss="margin"), 500), zero_loss=0.02)),
        ("saturated-loss", None, lambda: run((pgd(10), 600), (pgd(50, loss="margin"), 500))),
        ("saturated-loss", None, lambda: run((pgd(), 500), (pgd(loss="margin"), 600))),
        ("not-converged", "warns", lambda: run((pgd(), 500, 0, np.arange(1000) // 25))),
        ("not-converged", "informs", lambda: run((pgd(), 992, 0, 40))),
        ("not-converged", None, lambda: run((pgd(), 500, 0, 37))),
        ("not-converged", None, lambda: run((pgd(), 995, 0, 40))),
        ("not-converged", "warns", lambda: run((pgd(restarts=3), 900, np.arange(1000) % 3, 5))),
        ("not-converged", None, lambda: run((pgd(restarts=3), 900, np.arange(1000) % 2, 45))),
        ("not-converged", "warns", lambda: run((pgd(10), 600), (pgd(40), 580), success="last")),
        ("not-converged", None, lambda: run((pgd(30), 600), (pgd(40), 580), success="last")),
        # where the worst iterate decides, the steps themselves say when it was found
        ("not-converged", None, lambda: run((pgd(10), 600), (pgd(40), 580), success="any")),
        ("not-monotone", "warns", lambda: run((pgd(10), 500), (pgd(20), 520))),
        ("not-monotone", None, lambda: run((pgd(10), 500), (pgd(20), but(500, 1000, 20)))),
        ("not-monotone", None, lambda: run((pgd(10), 500), (pgd(20), 503))),
        ("not-monotone", "warns", lambda: run((pgd(eps=0.01), 500), (pgd(eps=0.02), 520))),
        ("not-monotone", "warns", lambda: run((pgd(restarts=1), 500), (pgd(restarts=3), 520))),
        ("not-monotone", "informs", lambda: run((fgsm(0.01), 500), (fgsm(0.02), 520))),
        ("not-monotone", None, lambda: run((pgd(10, loss="margin"), 500), (pgd(20), 520))),
        ("rounding-matters", "warns", lambda: run((pgd(), 500), (other("8-bit"), 530))),
        ("rounding-matters", None, lambda: run((pgd(), 500), (other("8-bit"), 505))),
        ("unbounded-survives", "blocks", lambda: run((pgd(eps=0.5), 600))),
        ("unbounded-survives", "warns", lambda: run((pgd(eps=0.5), 200))),
        ("unbounded-survives", None, lambda: run((pgd(eps=0.5), 110))),
        ("unbounded-survives", None, lambda: run((pgd(eps=0.2), 600))),
        ("at-chance", "blocks", lambda: run((pgd(), 50), clean=110)),
        ("at-chance", None, lambda: run((pgd(), 50), clean=140)),
        ("at-chance", "informs", lambda: run((pgd(), 1), clean=2, n=12)),
        ("few-images", "informs", lambda: run((pgd(), 50), n=999)),
        ("few-images", None, lambda: run((pgd(), 50), n=1000)),
        ("untargeted-only", "informs", lambda: run((pgd(), 500))),
        ("untargeted-only", None, lambda: run((pgd(), 500), success="last")),
        ("untargeted-only", None, lambda: run((pgd(), 500), (other("apgd-t"), 490))),
        ("untargeted-only", None, lambda: run((pgd(), 0))),
        ("single-loss", "informs", lambda: run((fgsm(), 600), (pgd(), 500))),
        ("single-loss", None, lambda: run((pgd(), 500), (pgd(loss="margin"), 490))),
        ("few-draws", "informs", lambda: run((pgd(), 500), randomness="stochastic", draws=20)),
        ("few-draws", None, lambda: run((pgd(), 500), randomness="stochastic", draws=100)),
        ("few-draws", None, lambda: run((pgd(), 500))),
    ],
)  # fmt: skip
def test_a_check_fires_where_it_should_and_only_there(code, severity, outcomes):
    assert found(outcomes(), code) == severity


@pytest.mark.parametrize(
    ("column", "facts", "severity"),
    [
        (pgd(10, step_size=EPS / 20), {}, "warns"),
        (pgd(10, step_size=EPS / 10), {}, None),
        (pgd(10, step_size=2 * EPS), {}, "warns"),
        (pgd(eps=2.0), {}, "warns"),
        (pgd(eot=5), {}, "informs"),
        (pgd(eot=5), {"randomness": "stochastic"}, None),
        (pgd(eot=1), {"randomness": "stochastic"}, "warns"),
        (pgd(eot=1), {"randomness": "noisy"}, None),
    ],
)
def test_settings_that_cannot_work_are_named(column, facts, severity):
    assert found(run((column, 500), **facts), "degenerate-settings") == severity


def test_a_constant_prediction_blocks_whatever_its_accuracy():
    outcomes = run((pgd(), 500))
    constant = outcomes.prediction.assign(clean=3)
    assert found(dataclasses.replace(outcomes, prediction=constant), "at-chance") == "blocks"


# --- mixtures ---------------------------------------------------------------------------------------------------------

FROZEN, ROUTE = (
    other("frozen-gate", steps=50, step_size=EPS / 4),
    other("per-route", steps=50, step_size=EPS / 4),
)
BOUND = other("every-expert", diagnostic=True)


@pytest.mark.parametrize(
    ("columns", "mixture", "severity"),
    [
        ([(pgd(), 600), (FROZEN, 600), (ROUTE, 500)], "hard", "warns"),
        ([(pgd(), 600), (FROZEN, 600), (ROUTE, 595)], "hard", None),
        # a soft gate is no secret to plain PGD
        ([(pgd(), 500), (FROZEN, 600), (other("all-experts"), 500)], "soft", None),
        ([(pgd(), 500), (FROZEN, 600), (other("all-experts"), 450)], "soft", "warns"),
        ([(pgd(), 500), (FROZEN, 600), (ROUTE, 500)], "hard", "warns"),
        ([(FROZEN, 600), (ROUTE, 600), (BOUND, 590)], "hard", None),
        ([(FROZEN, 600), (ROUTE, 600), (BOUND, 620)], "hard", "warns"),
        ([(FROZEN, 600), (ROUTE, 600), (BOUND, 601)], "hard", "informs"),
        ([(FROZEN, 600), (ROUTE, 600), (BOUND, 605)], "hard", "informs"),
    ],
)
def test_what_a_gate_hides_is_told(columns, mixture, severity):
    assert found(run(*columns, mixture=mixture), "gate-masks") == severity


def test_one_image_alone_is_no_violation_however_few_there_are():
    outcomes = run((FROZEN, 60), (ROUTE, 60), (BOUND, 61), n=100, mixture="hard")
    assert found(outcomes, "gate-masks") == "informs"


@pytest.mark.parametrize(("mixture", "severity"), [("hard", "warns"), ("soft", None), (None, None)])
def test_a_hard_gate_asks_for_attacks_that_know_of_it(mixture, severity):
    outcomes = run((pgd(), 500), (FROZEN, 500), mixture=mixture)
    assert found(outcomes, "no-adaptive-attack") == severity
    assert found(run((pgd(), 500), (ROUTE, 500), mixture=mixture), "no-adaptive-attack") is None


# --- too good ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "more", "severity"),
    [
        (900, {}, "warns"),
        (760, {}, None),
        (900, {"eps": EPS / 2}, None),
        (900, {"dataset": "digits"}, None),
        (90, {"n": 99}, None),
        (98, {"n": 100}, "warns"),
        (10, {"stated_clean": 96.0}, "warns"),
        (10, {"stated_clean": 99.5}, None),
        (0, {"stated_clean": 90.0, "n": 20}, None),
    ],
)
def test_what_nobody_has_reached_is_too_good(held, more, severity):
    columns = [(pgd(eps=more.get("eps", EPS)), held)]
    assert found(run(*columns, **{"dataset": "cifar10", **more}), "too-good") == severity


def test_a_sweep_is_compared_at_the_radius_that_was_published():
    columns = [(pgd(eps=0.01), 950), (pgd(eps=0.04), 900), (pgd(eps=0.5), 0)]
    assert found(run(*columns, dataset="cifar10", eps=0.5), "too-good") == "warns"


def test_published_numbers_are_whole_and_say_where_they_are_from():
    rows = read()
    assert {(one.dataset, one.norm) for one in rows} >= {
        ("cifar10", "Linf"),
        ("cifar10", "L2"),
        ("imagenet", "Linf"),
    }
    for one in rows:
        assert 0 < one.accuracy < 100 and 0 < one.eps <= 1 and 2017 < one.year < 2030
        assert re.search(r"\((arXiv \d{4}\.\d{5}|doi .+)\)$", one.source), one.source


def test_the_best_is_the_highest_at_the_largest_radius_that_is_not_larger():
    assert best("cifar10", "Linf", 8 / 255).accuracy == best("cifar10", "Linf", 0.1).accuracy == 75.28
    assert best("cifar10", "Linf", 4 / 255) is None and best("digits", "Linf", 0.1) is None


# --- tests of chance, worst case, reading -----------------------------------------------------------------------------


def test_chance_is_that_of_exact_tests():
    # 1 - 0.9^5 = 0.41; 0.1^2 alone = 0.01
    assert not exceeds(1, 5, 0.1) and exceeds(2, 2, 0.09) and not exceeds(2, 2, 0.11)
    # seven heads of seven: 1/128
    assert outnumber(7, 0) and not outnumber(6, 0) and not outnumber(0, 0) and not outnumber(0, 50)


def test_the_worst_column_is_chosen_by_one_set_of_draws_and_worth_what_the_other_says():
    outcomes = run((pgd(10), 500), (pgd(20), 500), randomness="stochastic")
    names = [column.name for column in outcomes.attacks]
    selected, share = outcomes.selected.copy(), outcomes.share.copy()
    selected[names], share[names] = [0.2, 0.4], [0.7, 0.1]
    assert set(dataclasses.replace(outcomes, selected=selected, share=share).worst()) == {0.7}


def test_what_counts_for_nothing_is_no_attack():
    assert run((pgd(), 500), (BOUND, 100)).worst().mean() == 0.5


def test_outcomes_are_read_from_a_record_and_its_table_in_any_order():
    columns = [CLEAN, pgd()]
    names = [column.name for column in columns]
    rows = [
        {
            "index": i, "label": i % 3, "column": name, "prediction": 1, "robust": place == 0, "restart": place - 1,
            "step": 4 * place - 1, "share": 1.0 - place, "selected": 1.0 - place,
        }
        for i in (9, 2, 5) for place, name in enumerate(names)
    ]  # fmt: skip
    asked = Asked.model_construct(
        dataset="d", protocol={"name": "p", "norm": "L2", "success": "last", "eps": 0.5}
    )
    record = Record.model_construct(columns=columns, asked=asked, model=Facts(classes=3))
    outcomes = Outcomes.read(pd.DataFrame(rows).sample(frac=1, random_state=0), record)
    assert list(outcomes.labels.index) == [2, 5, 9] and list(outcomes.labels) == [2, 2, 0]
    assert (outcomes.norm, outcomes.success, outcomes.eps, outcomes.facts.classes) == ("L2", "last", 0.5, 3)
    assert outcomes.right.all() and outcomes.broke(columns[1]).all() and (outcomes.step[names[1]] == 3).all()
    some = outcomes.at(np.array([9, 2]))
    assert list(some.labels) == [0, 2] and list(some.robust.index) == [9, 2]
    assert outcomes.with_zero_loss(0.25).facts.zero_loss == 0.25


@pytest.mark.parametrize(
    ("attack", "black"), [("square", True), ("transfer:soe", True), ("pgd", False), ("apgd-ce", False)]
)
def test_an_attack_without_gradients_is_known(attack, black):
    assert run((other(attack), 500)).black_box == black


# --- where a run claims something -------------------------------------------------------------------------------------


def test_a_run_claims_something_at_its_own_radius_whatever_falls_at_larger_ones():
    swept = [(pgd(20, eps=eps), held) for eps, held in ((0.01, 600), (EPS, 300), (0.1, 0))]
    assert run(*swept).claimed == EPS
    assert run(*swept, eps=0.1).claimed == EPS and run(*swept, eps=0.01).claimed == 0.01
    assert [column.epsilon for column in run(*swept).attacks_at("Linf", EPS)] == [EPS]


def test_where_nothing_is_left_the_claim_is_that_of_the_next_smaller_radius_of_pgd():
    # 110 of 1000 are not above chance
    swept = [(pgd(20, eps=eps), held) for eps, held in ((0.005, 900), (0.01, 600), (0.02, 110))]
    assert run(*swept, (pgd(20, eps=0.05), 0), eps=0.05).claimed == 0.01
    assert run((pgd(20), 0), (fgsm(0.01), 900)).claimed is None, "one step claims nothing for PGD"
    assert run((pgd(20), 110)).claimed is None and run().claimed is None


def test_a_radius_that_nothing_was_run_at_is_spoken_for_by_larger_ones():
    larger = run((pgd(20, eps=0.1), 300), eps=0.05)
    assert larger.claimed == 0.05 and [one.epsilon for one in larger.attacks_at("Linf", 0.05)] == [0.1]
    assert larger.attacks_at("L2", 0.05) == [] == larger.attacks_at("Linf", 0.2)


def test_every_attack_of_a_radius_counts_for_what_is_claimed_there():
    both = [(pgd(20, eps=0.01), 500), (other("square", eps=0.01), 0), (pgd(20, eps=0.001), 800)]
    assert run(*both, (pgd(20), 0)).claimed == 0.001


def test_one_loss_is_told_where_only_a_smaller_radius_claims_something():
    swept = [(pgd(20, eps=eps), held) for eps, held in ((0.01, 600), (0.2, 0))]
    assert found(run(*swept, eps=0.2), "single-loss") == "informs"
    assert found(run((pgd(20, eps=0.2), 0), eps=0.2), "single-loss") is None


def test_every_code_is_tried_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{check.code}"' in source for check in CHECKS)
