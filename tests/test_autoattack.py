import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from oracles import Hyperplane, small_net
from torch import nn

from bench.attacks.addressed import OTHERS, Draws, addressed, distinct
from bench.attacks.autoattack import (
    COMPONENTS,
    MODULES,
    autoattack,
    component,
    components,
    earned,
    label,
    source,
    strength,
)
from bench.errors import NonFinite, UsageError, VoidRun
from bench.rng import Rng
from bench.threat import Linf, threat_model

each_component = pytest.mark.parametrize("name", COMPONENTS)
each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])
QUICK = {"steps": 6, "restarts": 2, "targets": 3, "queries": 60}
SIDE = 6


def images(n, low=96, high=160, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, 3, SIDE, SIDE), generator=generator).float() / 255


class Plane(Hyperplane):
    """A hyperplane through images large enough for Square's windows."""

    def __init__(self, classes=10):
        super().__init__(classes)
        self.w = nn.Parameter(torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
        self.b = nn.Parameter(-0.5 * self.w.detach().sum())
        self.eval().requires_grad_(False)


class Exact(nn.Module):
    """A network whose rounding does not depend on the batch: it computes in float64."""

    def __init__(self):
        super().__init__()
        self.net = small_net().double()

    def forward(self, x):
        return self.net(x.double()).float()


def theirs(module):
    return importlib.import_module(f"{source().name}.{module}")


@each_component
@each_norm
def test_it_breaks_what_can_be_broken_and_stays_in_ball_and_box(name, norm):
    model, x = Plane(), images(12)
    y = model.labels(x)
    # random search needs room; gradients do not
    room = 8 if name == "square" else 1.25
    for rows in torch.arange(12).split(4):
        threat = threat_model(norm, room * float(model.margin(x[rows], norm).max()))
        settings = QUICK | {"queries": 600, "restarts": 1}
        x_adv = component(name, model, x[rows], y[rows], threat, rng=Rng(0), **settings)
        assert (model(x_adv).argmax(1) != y[rows]).all()
        assert threat.contains(x_adv, x[rows]).all()


@each_component
@each_norm
def test_it_never_breaks_what_cannot_be_broken(name, norm):
    model, x = Plane(), images(8)
    y = model.labels(x)
    threat = threat_model(norm, 0.99 * float(model.margin(x, norm).min()))
    x_adv = component(name, model, x, y, threat, rng=Rng(0), **QUICK)
    assert (model(x_adv).argmax(1) == y).all() and threat.contains(x_adv, x).all()


@each_component
@each_norm
def test_an_image_fares_alike_in_any_batch(name, norm):
    model, x = Exact().eval(), images(12, 89, 166, seed=3)
    y = model(x).argmax(1)
    eps = {"Linf": 0.025, "L2": 0.15, "Linf square": 0.04, "L2 square": 0.45}[
        f"{norm} square" if name == "square" else norm
    ]

    def attacked(rows):
        return component(name, model, x[rows], y[rows], threat_model(norm, eps), rng=Rng(0, images=rows), **QUICK)  # fmt: skip

    whole = attacked(list(range(12)))
    broken = model(whole).argmax(1) != y
    assert 0 < broken.sum() < 12, "all alike would prove nothing"
    shuffled = [7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 6, 4]
    for batches in ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]], [[i] for i in range(12)], [shuffled]):
        for rows in batches:
            found = attacked(rows)
            torch.testing.assert_close(found, whole[rows], rtol=0, atol=1e-6)
            assert torch.equal(model(found).argmax(1) != y[rows], broken[rows])


def test_an_image_that_stands_twice_in_a_batch_is_told_from_itself():
    model, x = Exact().eval(), images(3, 89, 166, seed=3)[[0, 1, 0]]
    y = model(x).argmax(1)

    def attacked(rows):
        return component("apgd-ce", model, x[rows], y[rows], Linf(0.1), rng=Rng(0, images=rows), steps=1)

    whole = attacked([0, 1, 2])
    assert not torch.equal(whole[0], whole[2])
    for row in range(3):
        assert torch.equal(attacked([row]), whole[row : row + 1])
    assert [group.tolist() for group in distinct(x)] == [[0, 1], [2]]


@each_component
def test_the_address_alone_decides_and_the_global_generator_is_untouched(name):
    model, x = small_net().eval(), images(6)
    y = model(x).argmax(1)
    threat = threat_model("L2", 0.3)

    def attacked(seed):
        return component(name, model, x, y, threat, rng=Rng(seed), classes=4, **QUICK)

    # away from the state that seeding by 0 would lead to
    torch.rand(1)
    before = torch.random.get_rng_state()
    first = attacked(0)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, attacked(0))
    if name in ("apgd-ce", "apgd-dlr"):
        assert not torch.equal(first, attacked(1))


def test_without_positions_the_rows_stand_for_them():
    model, x = small_net().eval(), images(4)
    y = model(x).argmax(1)
    found = [autoattack(model, x, y, Linf(0.02), rng=rng, attacks=["apgd-ce", "apgd-dlr"])
             for rng in (Rng(0), Rng(0, images=[0, 1, 2, 3]), Rng(0, images=[4, 5, 6, 7]))]  # fmt: skip
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@each_component
def test_it_leaves_model_and_images_as_it_found_them(name):
    model, x = small_net().requires_grad_(True), images(4)
    y = model(x).argmax(1)
    before, state = x.clone(), {key: value.clone() for key, value in model.state_dict().items()}
    component(name, model, x, y, Linf(0.05), rng=Rng(0), **QUICK)
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_every_component_is_set_up_as_the_authors_ensemble_sets_it_up(version, norm, monkeypatch):
    ensemble = theirs("autoattack").AutoAttack(small_net(), norm=norm, eps=0.1, version=version)
    ours = {}
    for module, kind in (
        ("autopgd_base", "APGDAttack"),
        ("autopgd_base", "APGDAttack_targeted"),
        ("fab_base", "FABAttack"),
        ("square", "SquareAttack"),
    ):

        def perturb(self, x, y):
            ours[asked] = vars(self)
            return x

        monkeypatch.setattr(getattr(theirs(module), kind), "perturb", perturb)
    x, y = images(1), torch.tensor([0])
    assert list(components(version)) == ensemble.attacks_to_run
    for asked in components(version):
        component(asked, small_net(10), x, y, threat_model(norm, 0.1), rng=Rng(0), **strength(version, asked))
        expected = vars(
            {"apgd-t": ensemble.apgd_targeted, "square": ensemble.square}.get(
                asked, ensemble.fab if asked.startswith("fab") else ensemble.apgd
            )
        )
        # what their ensemble sets when it comes to the component
        expected = expected | {"apgd-ce": {"loss": "ce"}, "apgd-dlr": {"loss": "dlr"}, "fab": {"targeted": False},
                               "fab-t": {"targeted": True, "n_restarts": 1}}.get(asked, {})  # fmt: skip
        own = ("model", "predict", "logger", "seed", "device", "attack_single_run", "margin_and_loss")
        differs = {key for key in expected if key not in own and ours[asked].get(key) != expected[key]}
        assert not differs, f"{asked}: {differs}"


def test_targets_are_never_more_than_there_are_wrong_classes(monkeypatch):
    seen = []
    attack = theirs("autopgd_base").APGDAttack_targeted
    monkeypatch.setattr(attack, "perturb", lambda self, x, y: seen.append(self.n_target_classes) or x)
    for classes in (4, 10, 12):
        component("apgd-t", small_net(classes), images(1), torch.tensor([0]), Linf(0.1), rng=Rng(0))
    assert seen == [3, 9, 9]


def test_the_ensemble_hands_each_component_only_what_still_stands(monkeypatch):
    model, x = Plane(), images(12)
    y = model.labels(x)
    handed = []

    def spied(name, model, x, *rest, **settings):
        handed.append((name, len(x)))
        return component(name, model, x, *rest, **settings)

    # the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["bench.attacks.autoattack"], "component", spied)
    eps = float(model.margin(x).median())
    x_adv = autoattack(model, x, y, Linf(eps), rng=Rng(0), attacks=["apgd-ce", "fab-t"])
    broken = model(x_adv).argmax(1) != y
    assert torch.equal(broken, model.margin(x) < eps) and torch.equal(x_adv[~broken], x[~broken])
    assert handed == [("apgd-ce", 12), ("fab-t", int((~broken).sum()))]


@each_component
def test_what_the_model_gets_wrong_comes_back_as_it_was_and_no_images_are_no_images(name):
    model, x = Plane(), images(4)
    y = model.labels(x)
    y[1] = 1 - y[1]
    x_adv = component(name, model, x, y, Linf(0.1), rng=Rng(0), **QUICK)
    assert torch.equal(x_adv[1], x[1])
    assert component(name, model, x[:0], y[:0], Linf(0.1), rng=Rng(0)).shape == (0, 3, SIDE, SIDE)


@each_norm
def test_square_takes_a_tie_for_a_success(norm):
    def tied(x):
        assert len(x), "asked about no images"
        return torch.zeros(len(x), 4)

    model = nn.Module()
    model.forward = tied
    x = images(3)
    x_adv = component("square", model, x, torch.zeros(3, dtype=torch.long), threat_model(norm, 0.3), rng=Rng(0), queries=5)  # fmt: skip
    assert torch.equal(x_adv, x)


@pytest.mark.parametrize(
    "name, classes, instead",
    [("apgd-t", 3, "apgd-ce and fab-t"), ("apgd-t", 2, "apgd-ce and fab-t"), ("apgd-dlr", 2, "apgd-ce")],
)
def test_too_few_classes_are_an_error_that_says_what_to_use(name, classes, instead):
    with pytest.raises(
        UsageError,
        match=f"{name} needs at least . classes, and this model has {classes}; use {instead}$",
    ):
        component(name, Plane(classes), images(2), torch.tensor([0, 1]), Linf(0.1), rng=Rng(0))


@pytest.mark.parametrize("name", ["apgd-ce", "fab", "fab-t", "square"])
def test_two_classes_are_enough_for_the_others(name):
    model, x = Plane(2), images(4)
    threat = Linf(4 * float(model.margin(x).max()))
    x_adv = component(name, model, x, model.labels(x), threat, rng=Rng(0), **QUICK | {"queries": 300})
    assert (model(x_adv).argmax(1) != model.labels(x)).all()


@pytest.mark.parametrize(
    "ask, fault",
    [
        (lambda x: autoattack(Plane(), x, x, Linf(0.1), rng=Rng(0), version="strong"), "no version 'strong'; known: standard, plus, rand"),
        (lambda x: component("apgd-x", Plane(), x, x, Linf(0.1), rng=Rng(0)), "no AutoAttack component named 'apgd-x'; known: apgd-ce"),
        (lambda x: component("square", Plane(), x[..., :4], x, threat_model("L2", 1), rng=Rng(0)), "at least 5×5 pixels, and these have 6×4"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_an_error_of_one_line(ask, fault):
    with pytest.raises(UsageError, match=fault):
        ask(images(2))


class Spoiled(nn.Module):
    def __init__(self, spoil):
        super().__init__()
        self.net, self.spoil = small_net(), spoil

    def forward(self, x):
        return self.spoil(self.net(x), x)


@pytest.mark.parametrize(
    "spoil, error, what",
    [
        (lambda z, x: z * torch.where(x.amax((1, 2, 3)) > 0.64, torch.nan, 1)[:, None], NonFinite, "logits are NaN"),
        (lambda z, x: z + 0 * (x.flatten(1)[:, :1] * 0).sqrt(), NonFinite, "gradients are NaN"),
        (lambda z, x: z.detach(), VoidRun, "carry no gradient"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["apgd-ce", "fab-t"])
def test_what_is_not_finite_or_hidden_voids_the_run_and_their_modules_use_torch_again(
    name, spoil, error, what
):
    model, x = Spoiled(spoil), images(4)
    y = model.net(x).argmax(1)
    with pytest.raises(error, match=what) as caught:
        component(name, model, x, y, Linf(0.05), rng=Rng(0), **QUICK)
    assert caught.value.rows == []
    assert all(theirs(module).torch is torch for module in MODULES)


def test_a_model_may_write_into_what_it_is_given_and_return_what_is_its_own():
    model, x = small_net(), images(4)
    y = model(x).argmax(1)
    kept = torch.zeros(1, 4)

    class Careless(nn.Module):
        def forward(self, x):
            return model(x.mul_(2) / 2)

    class Constant(nn.Module):
        def forward(self, x):
            return kept.expand(len(x), 4)

    for name in ("apgd-ce", "fab-t", "square"):
        expected = component(name, model, x, y, Linf(0.03), rng=Rng(0), **QUICK)
        assert torch.equal(component(name, Careless(), x, y, Linf(0.03), rng=Rng(0), **QUICK), expected)
    component("square", Constant(), x, y * 0, Linf(0.03), rng=Rng(0), **QUICK)
    assert torch.equal(kept, torch.zeros(1, 4))


def test_their_code_draws_by_nothing_that_is_not_known_here():
    text = "".join(Path(theirs(module).__file__).read_text() for module in MODULES)
    drawn = set(re.findall(r"torch\.(rand\w*|normal|bernoulli|multinomial|poisson)\b(?!\.)", text))
    assert drawn <= {"rand", "randn", *OTHERS} and {"rand", "randn"} <= drawn
    assert not re.search(
        r"\bnp\.random|(?<!torch\.)(?<!cuda\.)\brandom\.\w|\.(uniform|normal|random)_\(", text
    )


def test_a_draw_without_an_address_is_refused_and_seeding_does_nothing():
    module = types.ModuleType("theirs")
    module.torch = torch
    with addressed([module], Draws(Rng(0, images=[0]), images(1))):
        before = torch.random.get_rng_state()
        module.torch.manual_seed(5)
        module.torch.random.manual_seed(6)
        module.torch.cuda.random.manual_seed(7)
        assert torch.equal(before, torch.random.get_rng_state())
        assert module.torch.zeros(2).tolist() == [0, 0]
        with pytest.raises(UsageError, match=r"draws by torch\.randint"):
            module.torch.randint(0, 3, (1,))
    assert module.torch is torch


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_an_image_has_streams_of_its_own_and_shares_the_rest(kind):
    x = images(3)
    some, all_ = Draws(Rng(0, images=[7]), x[1:2]), Draws(Rng(0, images=[5, 7, 9]), x)
    of_image = []
    for _ in range(2):
        some.begin(x[1:2])
        all_.begin(x)
        alone, together = getattr(some, kind)([1, 3, 1, 1]), getattr(all_, kind)((3, 3, 1, 1))
        assert torch.equal(alone, together[1:2]) and not torch.equal(together[0], together[1])
        shared = getattr(some, kind)([1])
        assert torch.equal(shared, getattr(all_, kind)(torch.Size([1]))) and shared != getattr(all_, kind)(1)
        all_.keep(torch.tensor([False, True, True]))
        assert torch.equal(getattr(some, kind)(1, 3, 2, 2), getattr(all_, kind)(2, 3, 2, 2)[:1])
        of_image.append(alone)
    assert not torch.equal(*of_image), "a run of its own has streams of its own"


@pytest.mark.parametrize(
    "version, attacks, settings, deterministic, classes, name",
    [
        ("standard", None, {}, True, None, "autoattack"),
        ("standard", ["apgd-ce", "apgd-t", "fab-t", "square"], {"steps": 100}, True, 10, "autoattack"),
        ("standard", None, {"targets": 3}, True, 4, "autoattack"),
        ("standard", None, {"targets": 9, "queries": 5000}, True, 4, "autoattack"),
        ("standard", None, {"targets": 3}, True, 10, "aa-like:apgd-ce+apgd-t+fab-t+square"),
        ("standard", None, {"steps": 99}, True, 10, "aa-like:apgd-ce+apgd-t+fab-t+square"),
        ("standard", None, {"queries": 1000}, True, 10, "aa-like:apgd-ce+apgd-t+fab-t+square"),
        ("standard", None, {"eot": 20}, True, 10, "aa-like:apgd-ce+apgd-t+fab-t+square"),
        ("standard", None, {}, False, 10, "aa-like:apgd-ce+apgd-t+fab-t+square"),
        ("standard", ["apgd-t", "apgd-ce", "fab-t", "square"], {}, True, 10, "aa-like:apgd-t+apgd-ce+fab-t+square"),
        ("standard", ["apgd-ce", "square"], {}, True, 10, "aa-like:apgd-ce+square"),
        ("rand", None, {}, False, 10, "aa-like:rand"),
        ("rand", None, {}, True, 10, "aa-like:rand"),
        ("plus", None, {}, True, 10, "aa-like:apgd-ce+apgd-dlr+fab+square+apgd-t+fab-t"),
    ],
)  # fmt: skip
def test_only_the_standard_composition_at_full_strength_is_called_autoattack(
    version, attacks, settings, deterministic, classes, name
):
    assert label(version, attacks, settings, deterministic, classes=classes) == name
    assert earned(version, attacks, settings, deterministic, classes=classes) == (name == "autoattack")


def installed(monkeypatch, packages):
    def distribution(name):
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        version, origin = packages[name]
        return types.SimpleNamespace(version=version, read_text={"direct_url.json": origin}.get)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def test_the_authors_own_package_is_preferred_and_its_commit_told(monkeypatch):
    real = {module: theirs(module) for module in MODULES}
    from_git = json.dumps({"url": "https://example.org", "vcs_info": {"vcs": "git", "commit_id": "a392200"}})
    installed(monkeypatch, {"pyautoattack": ("0.2.0", None), "autoattack": ("0.1", from_git)})
    assert (source().name, source().version, source().commit) == ("autoattack", "0.1", "a392200")
    used = []
    monkeypatch.setitem(sys.modules, "autoattack", types.ModuleType("autoattack"))
    for name, module in real.items():
        copy = types.ModuleType(f"autoattack.{name}")
        copy.__dict__.update(vars(module))
        monkeypatch.setitem(sys.modules, f"autoattack.{name}", copy)
    apgd = real["autopgd_base"].APGDAttack

    class Theirs(apgd):
        def perturb(self, x, y):
            used.append(type(self).__name__)
            return x

    sys.modules["autoattack.autopgd_base"].APGDAttack = Theirs
    component("apgd-ce", Plane(), images(1), torch.tensor([0]), Linf(0.1), rng=Rng(0))
    assert used == ["Theirs"]


def test_without_it_the_other_package_is_used_and_without_both_the_user_is_told(monkeypatch):
    installed(monkeypatch, {"pyautoattack": ("0.2.0", None)})
    assert (source().name, source().version, source().commit) == ("pyautoattack", "0.2.0", None)
    installed(monkeypatch, {})
    with pytest.raises(UsageError, match=r"not installed; `pip install pyautoattack==0\.2\.0` brings it"):
        component("apgd-ce", Plane(), images(1), torch.tensor([0]), Linf(0.1), rng=Rng(0))


@pytest.mark.slow
def test_the_parity_certificate_still_holds():
    script = Path(__file__).parent / "parity.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
