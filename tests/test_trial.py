"""What a program does to a batch beyond one attack: survivors, transfer, rounding; and a model that does not stay itself."""

import numpy as np
import pytest
import torch
from oracles import Hyperplane, dataset, points
from torch import nn

from bench import protocol as protocols
from bench.attacks.stored import stored
from bench.errors import UsageError, VoidRun
from bench.evaluate import Evaluator
from bench.plan import plan
from bench.protocol import Protocol
from bench.rng import Rng
from bench.threat import L2, Linf
from bench.trial import rounded


def columns(*specs, eps=0.1, **fields):
    return Protocol.model_validate({"name": "t", "column": list(specs), **fields}).columns(eps)


def evaluator(model, data, **options):
    return Evaluator(
        model, classes=len(data.classes), split=data.test, seed=0, **{"success": "any", **options}
    )


def outcomes(model, data, asked, **options):
    return evaluator(model, data, **options).run(plan(asked), np.arange(len(data.test)))


def median_eps():
    return float(Hyperplane().margin(points()).median()) * 1.001


class Hills(nn.Module):
    """Rises in waves along one direction: which hill an ascent ends on, and whether it is high enough, is up to its start."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(points().shape[1:], generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        u = ((x - 0.5) * self.w).flatten(1).sum(1)
        z = torch.cos(6 * u) + 0.4 * u - 1.2
        return torch.cat([torch.stack([-z, z], 1), z.new_full((len(z), 8), -1e3)], 1)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 1.5)])
@pytest.mark.parametrize("success", ["last", "any"])
def test_starts_side_by_side_find_what_they_find_one_by_one(success, norm, eps, monkeypatch):
    model, data = Hills(), dataset(labels=torch.zeros(24, dtype=torch.long))
    spec = {"steps": [3, 12], "step_size": eps / 30}
    six, three = {"attack": "ms-pgd", "restarts": 6}, {"attack": "pgd", "restarts": 3}
    asked = columns(three | spec, six | spec, eps=eps, norm=norm)
    together = outcomes(model, data, asked, success=success)
    monkeypatch.setattr("bench.trial.groupby", lambda restarts, key: [(None, [one]) for one in restarts])
    one_by_one = outcomes(model, data, asked, success=success)
    for column in asked:
        found, expected = together.outcomes[column.name], one_by_one.outcomes[column.name]
        for name in ("robust", "prediction", "restart", "step"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), (column.name, name)
    # the starts disagree, so that it matters which of them is named
    assert len(found.restart.unique()) > 3


def test_an_attack_on_survivors_is_shown_only_what_stands():
    specs = ({"attack": "pgd", "steps": 10}, {"attack": "pgd", "steps": 10, "loss": "margin"})
    shown = outcomes(Hyperplane(), dataset(), columns(*specs, eps=median_eps(), survivors=True))
    alone = outcomes(Hyperplane(), dataset(), columns(*specs, eps=median_eps()))
    assert shown.costs["pgd-margin"].gradients == 12 * 10
    assert alone.costs["pgd-margin"].gradients > 12 * 10
    first, second = shown.outcomes["pgd-10"], shown.outcomes["pgd-10-margin"]
    fell = ~first.robust
    assert fell.sum() == 12
    assert not second.robust[fell].any() and (second.restart[fell] == -1).all()
    assert torch.equal(second.prediction[fell], first.prediction[fell])
    assert (first.restart[fell] == 0).all() and (first.step[fell] >= 0).all()


def test_the_step_at_which_an_image_fell_is_entered():
    eps = median_eps() * 2
    asked = columns({"attack": "pgd", "steps": 8, "step_size": eps / 4, "random_start": False}, eps=eps)
    found = outcomes(Hyperplane(), dataset(), asked).outcomes["pgd-8"]
    needed = torch.ceil(Hyperplane().margin(points()) / (eps / 4) - 1e-4)
    assert torch.equal(found.step[~found.robust].float(), needed[~found.robust].clamp_max(4))


def test_a_misclassified_image_is_no_survivor_and_is_charged_to_nobody():
    labels = Hyperplane().labels(points())
    labels[::3] = 1 - labels[::3]
    specs = ({"attack": "pgd", "steps": 2}, {"attack": "pgd", "steps": 2, "loss": "margin"})
    batch = outcomes(Hyperplane(), dataset(labels=labels), columns(*specs, eps=1e-4, survivors=True))
    for name in ("pgd-2", "pgd-2-margin"):
        found = batch.outcomes[name]
        assert (
            not found.robust[::3].any() and (found.restart[::3] == 0).all() and (found.step[::3] == 0).all()
        )


def test_autoattacks_components_are_columns_of_their_own_each_on_what_the_last_left():
    eps = median_eps()
    spec = {"attack": "autoattack", "settings": {"attacks": ["apgd-ce", "square"], "steps": 5, "queries": 20}}
    asked = columns(spec, eps=eps)
    assert [c.name for c in asked] == ["clean", "apgd-ce", "square", "aa-like:apgd-ce+square"]
    batch = outcomes(Hyperplane(), dataset(), asked)
    standing = [batch.outcomes[c.name].robust for c in asked]
    assert torch.equal(standing[-1], standing[-2])
    assert (standing[2] <= standing[1]).all()
    assert torch.equal(standing[-1], Hyperplane().margin(points()) > eps)
    taken = ~standing[1]
    assert (batch.outcomes["square"].restart[taken] == -1).all()


def test_a_transferred_image_counts_only_against_the_deployed_model():
    class Flipped(Hyperplane):
        def forward(self, x):
            return super().forward(1 - x)

    eps = median_eps() * 3
    asked = columns({"attack": "transfer:resnet18", "steps": 20}, eps=eps)
    same = outcomes(Hyperplane(), dataset(), asked, surrogates={"transfer:resnet18": Hyperplane()})
    assert torch.equal(same.outcomes["transfer:resnet18-20"].robust, Hyperplane().margin(points()) > eps)
    other = outcomes(Hyperplane(), dataset(), asked, surrogates={"transfer:resnet18": Hyperplane(seed=9)})
    assert (
        other.outcomes["transfer:resnet18-20"].robust.sum()
        > same.outcomes["transfer:resnet18-20"].robust.sum()
    )


def test_rounded_images_are_levels_inside_the_ball():
    x = points(8)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for threat in (Linf(2.5 / 255), Linf(8 / 255), L2(0.05)):
        x_adv = threat.project(x + noise * threat.eps * 1.5, x)
        for away in (False, True):
            levels = rounded(x_adv, x, threat, away=away)
            assert torch.equal((levels * 255).round() / 255, levels)
            assert threat.contains(levels, x).all()
    assert torch.equal(rounded(x, x, Linf(0.001)), x)


def test_the_8_bit_column_asks_for_what_was_found_on_whole_levels():
    model, data = Hyperplane(), dataset()
    eps = 3.5 / 255
    asked = columns({"attack": "8-bit"}, {"attack": "pgd", "steps": 20}, eps=eps)
    margin = model.margin(points())
    for success in ("last", "any"):
        found = outcomes(model, data, asked, success=success).outcomes
        assert torch.equal(found["pgd-20"].robust, margin > eps)
        # on levels a pixel moves by three at most
        assert found["8-bit"].robust[margin > 3 / 255].all()
        if success == "last":
            assert torch.equal(found["8-bit"].robust, margin > 3 / 255)
    assert (margin > 3 / 255).logical_and(margin <= eps).any(), "some image must tell the two apart"


def test_a_model_that_changes_while_it_is_attacked_is_void():
    class Learns(Hyperplane):
        def __init__(self):
            super().__init__()
            self.calls, self.limit = 0, 10**6

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1 if self.calls < self.limit else -1)

    data = dataset()
    one = evaluator(Learns(), data)
    one.model.limit = one.model.calls + 2
    one.run(plan(columns({"attack": "pgd", "steps": 2}, eps=1e-4)), np.arange(24))
    with pytest.raises(VoidRun, match="asked again after the attacks") as caught:
        one.unchanged()
    assert caught.value.code == "stateful"
    honest = evaluator(Hyperplane(), data)
    honest.run(plan(columns({"attack": "pgd", "steps": 3}, eps=0.1)), np.arange(24))
    honest.unchanged()


def test_a_model_whose_buffers_change_is_void_even_if_its_answers_do_not():
    class Counts(Hyperplane):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

    one = evaluator(Counts(), dataset())
    one.model.seen += 1
    with pytest.raises(VoidRun, match="buffers changed"):
        one.unchanged()


def test_probabilities_are_attacked_as_logarithms_and_judged_as_they_are():
    class Softmax(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.inner, self.scale = Hyperplane(), scale

        def forward(self, x):
            return (self.scale * self.inner(x)).softmax(1)

    eps = median_eps()
    asked = columns({"attack": "pgd", "steps": 20}, eps=eps)
    one = evaluator(Softmax(20.0), dataset())
    assert one.facts.output == "probabilities"
    assert "not-logits" in [finding.code for finding in one.contract.findings]
    robust = one.run(plan(asked), np.arange(24)).outcomes["pgd-20"].robust
    assert torch.equal(robust, Hyperplane().margin(points()) > eps)


def test_standard_is_survivors_only_and_ends_with_the_names_it_promises():
    asked = protocols.load("standard").columns(8 / 255)
    assert [c.name for c in asked if c.part_of is None] == [
        "clean",
        "pgd-100x5-margin",
        "pgd-100x5",
        "autoattack",
    ]
    assert all(c.survivors for c in asked[1:]) and not asked[0].survivors
    assert [c.name for c in asked if c.part_of == "autoattack"] == ["apgd-ce", "apgd-t", "fab-t", "square"]


def worst_corner(eps):
    """Images that break whatever can be broken within the radius."""
    model, x = Hyperplane(), points()
    side = torch.where(model.labels(x) == 0, -1.0, 1.0)[:, None, None, None]
    return (x + side * eps * model.w.detach().sign()).clamp(0, 1)


@pytest.mark.parametrize("form", ["npz floats", "npz bytes", "pt tensor", "pt pair"])
def test_stored_images_are_judged_like_any_others(form, tmp_path):
    eps = 6 / 255
    x_adv = worst_corner(eps)
    file = tmp_path / f"found.{form[:3].strip()}"
    if form == "npz floats":
        np.savez(file, x_adv=x_adv.numpy())
    elif form == "npz bytes":
        np.savez(file, images=(x_adv * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    else:
        torch.save(x_adv if form == "pt tensor" else (x_adv, torch.zeros(24)), file)
    asked = columns({"attack": f"images:{file}"}, eps=eps)
    found = outcomes(Hyperplane(), dataset(), asked).outcomes[f"images:{file}"]
    assert torch.equal(found.robust, Hyperplane().margin(points()) > eps)


def test_stored_images_that_leave_the_ball_void_the_run(tmp_path):
    torch.save(worst_corner(0.05), tmp_path / "far.pt")
    asked = columns({"attack": f"images:{tmp_path / 'far.pt'}"}, eps=0.04)
    with pytest.raises(VoidRun, match="leaves the ball"):
        outcomes(Hyperplane(), dataset(), asked)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no file"),
        (b"junk", "holds no images that can be read"),
        ({"a": 1}, "holds no batch of images"),
        (torch.zeros(3, 4), r"got \(3, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "must be uint8 or floats"),
    ],
)
def test_a_file_that_holds_no_images_is_refused_in_one_line(content, said, tmp_path):
    file = tmp_path / "x.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UsageError, match=said) as caught:
        stored(file)
    assert "\n" not in str(caught.value)


def test_too_few_stored_images_or_of_another_size_are_refused(tmp_path):
    torch.save(worst_corner(0.01)[:5], tmp_path / "few.pt")
    with pytest.raises(UsageError, match="are not those of this dataset"):
        outcomes(Hyperplane(), dataset(), columns({"attack": f"images:{tmp_path / 'few.pt'}"}, eps=0.04))


def test_an_image_that_an_attack_broke_is_not_lost_to_a_weaker_one_after_it():
    eps = 8 / 255
    specs = [
        {"attack": "pgd", "steps": 20},
        {"attack": "pgd", "steps": 1, "step_size": 1e-5, "loss": "margin"},
    ]
    asked = columns(*specs, {"attack": "8-bit"}, eps=eps)
    for success in ("last", "any"):
        found = outcomes(Hyperplane(), dataset(), asked, success=success).outcomes
        assert torch.equal(found["8-bit"].robust, found["pgd-20"].robust)
        assert found["pgd-1-margin"].robust.sum() > found["pgd-20"].robust.sum()


def test_what_fell_in_a_larger_ball_is_still_attacked_in_a_smaller_one():
    spec = {"attack": "pgd", "eps": [0.03, 0.004], "steps": 20}
    margin = Hyperplane().margin(points())
    found = outcomes(Hyperplane(), dataset(), columns(spec, survivors=True)).outcomes
    for eps in (0.03, 0.004):
        assert torch.equal(found[f"pgd-{eps}-20"].robust, margin > eps)


@pytest.mark.parametrize("threat", [Linf(8 / 255), Linf(0.001), L2(0.5), L2(0.05)])
def test_images_that_are_not_stored_in_eight_bits_are_rounded_into_the_ball_as_well(threat):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, 3, 8, 8, generator=generator)
    x_adv = threat.project(x + 2 * threat.eps * (torch.rand(x.shape, generator=generator) - 0.5), x)
    for away in (False, True):
        assert threat.contains(rounded(x_adv, x, threat, away=away), x).all()


def test_rounding_in_the_euclidean_norm_gives_up_little_of_the_radius():
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(16, 3, 32, 32, generator=generator) * 255).round() / 255
    threat = L2(0.5)
    x_adv = threat.random_start(x, Rng("x"))
    x_adv = threat.project(x + (x_adv - x) * 10, x)
    levels = rounded(x_adv, x, threat)
    assert threat.contains(levels, x).all()
    assert ((levels - x).flatten(1).norm(dim=1) > 0.97 * 0.5).all()
