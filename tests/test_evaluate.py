import copy

import numpy as np
import pytest
import torch
from oracles import Hyperplane, dataset, points, small_net
from torch import nn

from bench import protocol as protocols
from bench.attacks.losses import LOSSES
from bench.attacks.pgd import pgd, trajectory
from bench.errors import AttackCrash, VoidRun
from bench.evaluate import Evaluator
from bench.judge import Cost, Judge
from bench.plan import plan
from bench.protocol import Protocol
from bench.rng import Rng
from bench.threat import Linf


def columns(*specs, eps=0.1, **fields):
    return Protocol.model_validate({"name": "t", "column": list(specs), **fields}).columns(eps)


def evaluate(model, data, asked, *, success="last", seed=0, batch_size=None, precision="fp32", index=None):
    evaluator = Evaluator(
        model, classes=len(data.classes), split=data.test, seed=seed, success=success, precision=precision
    )
    index = np.arange(len(data.test)) if index is None else np.asarray(index)
    size = batch_size or len(index)
    batches = [
        evaluator.run(plan(asked, random=evaluator.random), index[i : i + size])
        for i in range(0, len(index), size)
    ]
    robust = {c.name: torch.cat([b.outcomes[c.name].robust for b in batches]) for c in asked}
    return robust, batches


PAPER = protocols.load("dwf-paper")


@pytest.mark.parametrize("success", ["last", "any"])
@pytest.mark.parametrize("loss", LOSSES)
def test_outcomes_equal_the_certified_truth(success, loss):
    model, data = Hyperplane(), dataset()
    margin = model.margin(points())
    eps = float(margin.median()) * 1.001
    asked = columns(
        {"attack": "fgsm", "loss": loss},
        {"attack": "pgd", "steps": [20, 40], "loss": loss},
        {"attack": "ms-pgd", "steps": 40, "restarts": 2, "loss": loss},
        eps=eps,
    )
    robust, _ = evaluate(model, data, asked, success=success)
    assert robust["clean"].all()
    for column in asked[1:]:
        assert torch.equal(robust[column.name], margin > eps), column.name


def test_a_misclassified_image_is_not_robust_and_is_not_attacked():
    model = Hyperplane()
    labels = model.labels(points())
    labels[::3] = 1 - labels[::3]
    asked = columns({"attack": "fgsm"}, {"attack": "pgd", "steps": 3}, eps=1e-4)
    robust, (batch,) = evaluate(model, dataset(labels=labels), asked)
    assert not robust["fgsm"][::3].any() and not robust["pgd-3"][::3].any()
    assert robust["fgsm"][1::3].all()
    assert batch.costs["fgsm"].gradients == 16 and batch.costs["pgd"].gradients == 48
    assert (batch.outcomes["pgd-3"].restart[::3] == 0).all() and (
        batch.outcomes["pgd-3"].restart[1::3] == -1
    ).all()


def test_later_restarts_see_only_survivors():
    model, data = Hyperplane(), dataset()
    eps = float(model.margin(points()).median()) * 1.001
    asked = columns({"attack": "ms-pgd", "steps": 20, "restarts": 3}, eps=eps)
    _, (batch,) = evaluate(model, data, asked)
    # eight steps of a quarter reach the far corner of the ball, and four more show that it stays there
    assert batch.costs["ms-pgd"].gradients == 12 * (24 + 12 + 12)


def test_an_image_is_charged_to_the_first_start_that_breaks_it():
    model, data = bumpy(), dataset(labels=bumpy()(points()).argmax(1))
    eps = 0.05
    asked = columns({"attack": "ms-pgd", "steps": 2, "restarts": 6, "step_size": 0.01}, eps=eps)
    _, (batch,) = evaluate(model, data, asked)
    found = batch.outcomes["ms-pgd-2"]
    x, y = data.test.batch(slice(None))
    first = torch.full_like(y, -1)
    for restart in reversed(range(6)):
        x_adv = pgd(
            model,
            x,
            y,
            Linf(eps),
            rng=Rng(0, "pgd", "ce", restart, images=range(24)),
            steps=2,
            step_size=0.01,
        )
        first[model(x_adv).argmax(1) != y] = restart
    assert torch.equal(found.restart, first)
    assert len(set(first.tolist())) > 2, "the scene must have images that fall to different starts"


#: chosen so that some images stand and others fall, to different starts
OFFSET = 47.0


def bumpy():
    """A function rough enough that different starts end differently."""

    class Bumpy(nn.Module):
        def forward(self, x):
            w = torch.linspace(-3, 3, 48).view(3, 4, 4)
            z = (torch.sin(60 * x) * w).flatten(1).sum(1) + OFFSET
            return torch.cat([torch.stack([z, -z], 1), z.new_full((len(z), 8), -99.0)], 1)

    return Bumpy().eval()


@pytest.mark.parametrize("success", ["last", "any"])
def test_merged_columns_are_what_each_column_is_alone(success):
    model = small_net()
    data = dataset(classes=4, labels=model(points()).argmax(1))
    asked = PAPER.columns(0.01)
    together, _ = evaluate(model, data, asked, success=success)
    assert 0 < together["pgd-50"].float().mean() < 1, "the scene must tell columns apart"
    for column in asked[1:]:
        alone, _ = evaluate(model, data, [asked[0], column], success=success)
        assert torch.equal(alone[column.name], together[column.name]), column.name


@pytest.mark.parametrize("success", ["last", "any"])
@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_outcomes_do_not_depend_on_the_batch_size(success, batch_size):
    model = small_net()
    data = dataset(classes=4, labels=model(points()).argmax(1))
    asked = PAPER.columns(0.01)
    whole, _ = evaluate(model, data, asked, success=success)
    split, _ = evaluate(model, data, asked, success=success, batch_size=batch_size)
    for column in asked:
        assert torch.equal(whole[column.name], split[column.name]), column.name


@pytest.mark.parametrize("success", ["last", "any"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outcomes_do_not_depend_on_how_often_the_device_is_waited_for(success, precision, monkeypatch):
    spec = {"steps": [7, 20], "restarts": 2, "step_size": "eps/4"}
    asked = Protocol.model_validate({"name": "t", "column": [{"attack": "pgd"} | spec]}).columns(0.003)
    model, data = small_net(10).eval(), dataset()
    with torch.no_grad():
        labels = model(data.test.batch(slice(None))[0]).argmax(1)
    data = dataset(labels=labels)
    found = []
    for every in (1, 5, 10):
        monkeypatch.setattr(
            "bench.trial.trajectory",
            lambda *args, every=every, **named: trajectory(*args, every=every, **named),
        )
        evaluator = Evaluator(
            copy.deepcopy(model), classes=10, split=data.test, seed=0, success=success, precision=precision
        )
        found.append(evaluator.run(plan(asked), np.arange(24)).outcomes)
    for column in asked:
        for name in ("robust", "prediction", "restart", "step"):
            one, *others = (getattr(outcomes[column.name], name) for outcomes in found)
            assert all(torch.equal(one, other) for other in others), (column.name, name)
    assert 0 < int(found[0][asked[-1].name].robust.sum()) < 24


def test_an_image_that_is_seen_to_break_is_not_asked_about_again():
    specs = {"attack": "pgd", "steps": [20, 40, 60]}
    asked = Protocol.model_validate({"name": "t", "column": [specs]}).columns(0.9)
    batch = Evaluator(Hyperplane(), classes=10, split=dataset().test, seed=0, success="any").run(
        plan(asked), np.arange(24)
    )
    assert not batch.outcomes["pgd-60"].robust.any()
    assert batch.costs["pgd"].forwards == 24


def test_outcomes_do_not_depend_on_which_images_come_with_an_image():
    model = bumpy()
    data = dataset(labels=model(points()).argmax(1))
    asked = columns({"attack": "ms-pgd", "steps": 2, "restarts": 3, "step_size": 0.01}, eps=0.05)
    whole, _ = evaluate(model, data, asked)
    some, _ = evaluate(model, data, asked, index=[20, 3, 11])
    assert torch.equal(whole["ms-pgd-2"][[20, 3, 11]], some["ms-pgd-2"])


def test_another_seed_gives_other_starts():
    model = bumpy()
    data = dataset(n=200, labels=model(points(200)).argmax(1))
    asked = columns({"attack": "pgd", "steps": 2, "step_size": 0.01}, eps=0.05)
    (one, _), (two, _) = (evaluate(model, data, asked, seed=seed) for seed in (0, 1))
    assert not torch.equal(one["pgd-2"], two["pgd-2"])


def test_the_worst_iterate_is_never_better_than_the_last():
    model = bumpy()
    data = dataset(n=100, labels=model(points(100)).argmax(1))
    asked = columns({"attack": "pgd", "steps": [1, 5, 20], "step_size": 0.02}, eps=0.05)
    last, _ = evaluate(model, data, asked, success="last")
    worst, _ = evaluate(model, data, asked, success="any")
    for name in last:
        assert (worst[name] <= last[name]).all()
    assert (worst["pgd-20"] < last["pgd-20"]).any(), "the scene must have images that recover"
    assert (worst["pgd-20"] <= worst["pgd-5"]).all() and (worst["pgd-5"] <= worst["pgd-1"]).all()


def test_broken_images_cost_no_further_gradient_when_any_iterate_counts():
    model, data = Hyperplane(), dataset()
    eps = float(model.margin(points()).max()) * 3
    asked = columns({"attack": "ms-pgd", "steps": 100, "restarts": 5}, eps=eps)
    _, (batch,) = evaluate(model, data, asked, success="any")
    assert batch.costs["ms-pgd"].gradients < 24 * 15


# --- what voids a run -----------------------------------------------------------------------------------------------


class Spoilt(nn.Module):
    """The hyperplane, with something wrong once images move."""

    def __init__(self, spoil):
        super().__init__()
        self.inner, self.spoil = Hyperplane(), spoil
        self.x = points()

    def forward(self, x):
        moved = len(x) != 24 or not torch.equal(x, self.x[: len(x)])
        return self.spoil(self.inner(x), x) if moved and len(x) > 8 else self.inner(x)


def raises(z, x):
    raise RuntimeError("no such expert")


def changes(z, x):
    if not x.requires_grad:
        x.add_(0.1)
    return z


FAULTS = {
    "nan logits": (
        lambda z, x: torch.cat([z[:5], z[5:] * float("nan")]),
        "logits are NaN or infinite .*image 5",
    ),
    "infinite logits": (lambda z, x: z / 0, "logits are NaN or infinite"),
    "wrong number of classes": (lambda z, x: z[:, :4], r"must return float logits \(24, 10\) for 10 classes"),
    "one number per image": (lambda z, x: z.sum(1), "must return float logits"),
    "a tuple": (lambda z, x: (z, z) if not x.requires_grad else z, "but returned a tuple"),
    "an exception": (raises, "the model raised RuntimeError: no such expert"),
    "an input changed in place": (changes, "changed its input in place"),
}


@pytest.mark.parametrize("spoil, message", FAULTS.values(), ids=FAULTS)
def test_a_model_that_fails_voids_the_run(spoil, message):
    asked = columns({"attack": "fgsm"}, {"attack": "pgd", "steps": 3})
    with pytest.raises(VoidRun, match=f"run void: .*{message}.*column fgsm") as caught:
        evaluate(Spoilt(spoil), dataset(), asked)
    assert "\n" not in str(caught.value)


def test_a_model_that_fails_at_once_is_not_attacked():
    with pytest.raises(VoidRun, match="cannot be evaluated: logits are NaN .*before any attack"):
        Evaluator(
            nn.Sequential(nn.Flatten(), nn.Linear(48, 10), Nan()),
            classes=10,
            split=dataset().test,
            seed=0,
            success="last",
        )


class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_a_nan_gradient_names_the_image_of_the_dataset_and_the_column():
    class Rooted(nn.Module):
        def forward(self, x):
            z = torch.stack([x.flatten(1).sum(1), x.flatten(1).sum(1) - 1], 1)
            bad = (x - points()[17]).flatten(1).abs().amax(1) < 1e-9
            root = ((x[bad] - x[bad].detach()) ** 2).sum((1, 2, 3)).sqrt()
            z[bad] = z[bad] + root[:, None]
            return z

    with pytest.raises(VoidRun, match=r"gradients are NaN or infinite .*\(image 17, column fgsm\)"):
        evaluate(
            Rooted(),
            dataset(labels=torch.zeros(24, dtype=torch.long), classes=2),
            columns({"attack": "fgsm"}),
            index=[3, 17],
        )


@pytest.mark.parametrize("factor, legal", [(1.0, True), (1.01, False)])
def test_an_illegal_perturbation_voids_the_run(monkeypatch, factor, legal):
    def cheat(model, x, y, threats, **options):
        for threat in threats:
            x_adv = x.clone()
            x_adv[2] += factor * threat.eps
            yield threat, x_adv

    monkeypatch.setattr("bench.trial.sweep", cheat)
    asked = columns({"attack": "fgsm"}, eps=0.1)
    if legal:
        evaluate(Hyperplane(), dataset(), asked)
    else:
        with pytest.raises(
            VoidRun, match=r"Linf size 0\.101 .*leaves the ball of 0\.1 .*image 2, column fgsm"
        ):
            evaluate(Hyperplane(), dataset(), asked)


def test_an_attack_that_crashes_voids_the_run_and_is_our_bug(monkeypatch):
    def crash(*args, **options):
        raise IndexError("off by one")

    monkeypatch.setattr("bench.trial.trajectory", crash)
    with pytest.raises(
        AttackCrash, match="the attack raised IndexError: off by one .*column pgd-3"
    ) as caught:
        evaluate(Hyperplane(), dataset(), columns({"attack": "pgd", "steps": 3}))
    assert caught.value.exit_code == 1


def test_what_an_attack_believes_is_not_asked(monkeypatch):
    """An attack that returns the clean images breaks nothing, whatever its gradients saw."""
    monkeypatch.setattr("bench.trial.sweep", lambda m, x, y, threats, **o: ((t, x.clone()) for t in threats))
    robust, _ = evaluate(Hyperplane(), dataset(), columns({"attack": "fgsm"}, eps=0.5))
    assert robust["fgsm"].all()


def test_the_model_is_judged_in_eval_mode():
    model = small_net().train()
    data = dataset(classes=4)
    Evaluator(model, classes=4, split=data.test, seed=0, success="last")
    assert not any(part.training for part in model.modules())


def test_a_random_model_is_recognised_and_said_to_be():
    class Noisy(Hyperplane):
        def forward(self, x):
            return super().forward(x) + torch.randn(len(x), 1)

    data = dataset()
    evaluator = Evaluator(Noisy(), classes=10, split=data.test, seed=0, success="last")
    assert evaluator.random and evaluator.facts.randomness != "deterministic"
    assert "random-forward" in [finding.code for finding in evaluator.contract.findings]
    assert not Evaluator(Hyperplane(), classes=10, split=data.test, seed=0, success="last").random


def test_a_random_model_is_evaluated_alike_twice_and_moves_no_global_generator():
    class Noisy(Hyperplane):
        def forward(self, x):
            return super().forward(x + 0.05 * torch.randn_like(x))

    asked = columns({"attack": "pgd", "steps": 3}, {"attack": "a-pgd", "steps": 3, "eot": 4}, eps=0.02)
    before = torch.random.get_rng_state()
    one, _ = evaluate(Noisy(), dataset(), asked)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(5)
    two, _ = evaluate(Noisy(), dataset(), asked)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_judge_counts_what_it_asks():
    cost = Cost()
    x = points(7)
    Judge(Hyperplane(), 10, cost)(x, x, None)
    assert (cost.forwards, cost.gradients) == (7, 0)


@pytest.mark.slow
def test_library_attacks_are_columns_under_the_same_checks():
    pytest.importorskip("torchattacks")
    model, data = Hyperplane(), dataset()
    eps = float(model.margin(points()).median()) * 1.05
    asked = columns(
        {"attack": "torchattacks:PGD", "settings": {"steps": 20}}, {"attack": "autoattack"}, eps=eps
    )
    robust, _ = evaluate(model, data, asked)
    for column in asked[1:]:
        assert torch.equal(robust[column.name], model.margin(points()) > eps), column.name


@pytest.mark.parametrize(("seed", "sizes"), [(None, [5, 5, 2]), ((0, "judge"), [12])])
def test_the_judge_asks_few_images_at_a_time_but_all_at_once_where_chance_is_addressed(seed, sizes):
    model, x, asked = Hyperplane(), points(12), []

    def listening(images):
        asked.append(len(images))
        return model(images)

    judge = Judge(listening, 10, Cost(), seed=seed, at_once=5)
    assert torch.equal(judge.logits(x, x, None), model(x))
    assert asked == sizes and judge.cost.forwards == 12


@pytest.mark.parametrize("answer", [lambda x: [x], lambda x: x.flatten(1)[:, :9], lambda x: None])
def test_the_judge_complains_of_answers_in_parts_as_of_whole_ones(answer):
    for at_once in (None, 5):
        with pytest.raises(VoidRun, match=r"must return float logits \(12, 10\)"):
            Judge(answer, 10, Cost(), at_once=at_once)(points(12), points(12), None)
