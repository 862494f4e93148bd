"""What every defense promises, its config and its file included; and what the base class makes of mistakes."""

import copy
import dataclasses
import importlib
import json
import math
import os
import signal

import pytest
import torch
from learnable import dataset
from torch import nn
from torch.nn import functional as F

import bench
from bench import registry
from bench.audit.contract import is_random
from bench.config import as_json, from_json, replaced
from bench.defense import Defense, FunctionDefense, NoSettings, Stage, follow
from bench.errors import Interrupted, UsageError
from bench.published import rows
from bench.rng import Rng
from bench.train import initial, train

ENTRIES = registry.entries()
DEFENSES = [name for name, entry in ENTRIES.items() if entry.module.startswith("defenses.")]
NAMES = [*DEFENSES, "resnet20", "resnet18"]
RECIPES = ["tiny", "fast", "paper"]
EVERY_RECIPE = [(name, recipe) for name in NAMES for recipe in registry.get(name).recipes]
EVERY = pytest.mark.parametrize("name", NAMES)
DATA = dataset()


def small(name, **settings):
    """The defense at a size for tests: narrow, one epoch a stage, few steps of its attacks."""
    kind = registry.get(name)
    config = kind.recipes["tiny"]
    known = {field.name for field in dataclasses.fields(config)}
    sizes = {"width": 4, "steps": 2, "batch_size": 18} | {n: 1 for n in known if n.endswith("epochs")}
    return kind(replaced(config, {k: v for k, v in sizes.items() if k in known} | settings))


def test_there_are_defenses_to_test():
    assert {"dwf", "fgsm_at", "pgd_at"} <= set(DEFENSES)


# ---------------------------------------------------------------------------------------------------------------------
# settings


@EVERY
def test_recipes_are_instances_of_one_frozen_keyword_only_config(name):
    recipes = registry.get(name).recipes
    assert set(recipes) >= set(RECIPES)
    (config,) = {type(recipe) for recipe in recipes.values()}
    assert config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(config))
    first = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(recipes["tiny"], first, None)


@pytest.mark.parametrize(("name", "recipe"), EVERY_RECIPE)
def test_a_recipe_comes_back_from_json_as_it_was(name, recipe):
    config = registry.get(name).recipes[recipe]
    stored = json.loads(json.dumps(as_json(config)))
    assert from_json(type(config), stored) == config
    assert replaced(config, {}) == config
    assert replaced(config, {field: json.dumps(value) for field, value in stored.items()}) == config


@EVERY
def test_an_unknown_setting_is_refused(name):
    config = registry.get(name).recipes["tiny"]
    with pytest.raises(UsageError, match="no setting named 'unheard_of'"):
        replaced(config, {"unheard_of": 1})
    with pytest.raises(UsageError, match="unheard_of: no such setting"):
        from_json(type(config), as_json(config) | {"unheard_of": 1})


@pytest.mark.parametrize("name", DEFENSES)
def test_a_setting_of_the_wrong_kind_is_refused(name):
    config = registry.get(name).recipes["tiny"]
    for field in dataclasses.fields(config):
        with pytest.raises(UsageError, match=f"bad setting: {field.name}"):
            replaced(config, {field.name: '{"not": "this"}'})


@pytest.mark.parametrize("name", DEFENSES)
def test_numbers_that_cannot_be_trained_with_are_refused_before_anything_is_built(name):
    config = registry.get(name).recipes["tiny"]
    known = {field.name for field in dataclasses.fields(config)}
    bad = {"batch_size": (0, -1), "width": (0,), "steps": (0,), "eps": (0, 2), "weight_decay": (-1,)}
    bad |= {field: (-1,) for field in known if field.endswith("epochs")}
    bad |= {field: (0, -1, math.nan) for field in known if field == "lr" or field.endswith("_lr")}
    for field, values in bad.items():
        for value in values if field in known else ():
            with pytest.raises(UsageError, match=field.rsplit("_", 1)[-1]):
                registry.get(name)(replaced(config, {field: value})).stages(DATA)


# ---------------------------------------------------------------------------------------------------------------------
# the network


@EVERY
@pytest.mark.parametrize("shape", [(1, 8, 10), (3, 32, 7)])
def test_a_network_gives_float_logits_for_the_datasets_images(name, shape):
    channels, side, classes = shape
    data = dataset(channels=channels, side=side, classes=classes)
    model = initial(small(name), data, 0).eval()
    logits = model(torch.rand(2, *data.shape))
    assert logits.shape == (2, classes) and logits.dtype == torch.float32
    assert logits.isfinite().all()


@EVERY
def test_a_network_is_a_function_of_the_seed(name):
    one, again, other = (initial(small(name), DATA, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@EVERY
def test_an_image_is_judged_alone_and_the_same_way_twice(name):
    model = initial(small(name), DATA, 0).double()
    x = torch.rand(6, *DATA.shape, dtype=torch.float64)
    model.train()(x)
    model.eval()
    answers = deterministic(model)
    with torch.no_grad():
        together = answers(x)
        assert torch.equal(answers(x), together)
        torch.testing.assert_close(torch.cat([answers(one[None]) for one in x]), together)


def deterministic(model):
    """The model, or what a random one says of its expectation."""
    return getattr(model, "expected_log_probabilities", model)


@EVERY
def test_a_network_is_random_if_and_only_if_its_defense_says_so(name):
    model = initial(small(name), DATA, 0).eval()
    x, y = DATA.test.batch(slice(0, 6))
    assert is_random(model, x, y, len(DATA.classes)) == registry.get(name).random


@EVERY
def test_weights_carry_a_network_from_one_build_to_another(name):
    model, other = (initial(small(name), DATA, seed) for seed in (0, 1))
    x = torch.rand(6, *DATA.shape)
    model.train()(x)
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    assert torch.equal(deterministic(other)(x), deterministic(model)(x))
    assert torch.equal(deterministic(copy.deepcopy(model))(x), deterministic(model)(x))


@EVERY
def test_a_mixture_says_what_adaptive_attacks_ask_of_it(name):
    model, x = initial(small(name), DATA, 0).eval(), torch.rand(5, *DATA.shape)
    if not hasattr(model, "all_outputs"):
        assert not hasattr(model, "gate") and not hasattr(model, "selected")
        return
    scores, outputs, selected = model.gate(x), model.all_outputs(x), model.selected(x)
    b, e = scores.shape
    assert b == 5 and outputs.shape == (5, e, 3) and scores.is_floating_point()
    assert selected.shape == (5,) and selected.dtype == torch.int64
    assert torch.equal(selected, scores.argmax(1))


@EVERY
def test_a_mixture_that_can_ask_one_expert_alone_is_told_what_it_says_among_the_others(name):
    model = initial(small(name), DATA, 0).double().eval()
    if not hasattr(model, "one_output"):
        return
    x = torch.rand(5, *DATA.shape, dtype=torch.float64, requires_grad=True)
    for k in range(model.experts_count):
        found, expected = model.one_output(x, k), model.all_outputs(x)[:, k]
        torch.testing.assert_close(found, expected)
        told, wanted = (torch.autograd.grad(z.square().sum(), x)[0] for z in (found, expected))
        torch.testing.assert_close(told, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# training


def take(model, stage, steps, x, y):
    """Losses of some steps on one batch, all of which draw alike."""
    groups = stage.groups(model) if stage.groups else [model.parameters()]
    optimisers = [torch.optim.SGD(group, lr=0.02, momentum=0.9) for group in groups]
    return [stage.step(model, x, y, Rng(0), optimisers).item() for _ in range(steps)]


@EVERY
def test_a_few_steps_of_each_stage_lower_its_loss(name):
    defense = small(name)
    stages = defense.stages(DATA)
    assert stages and len({stage.name for stage in stages}) == len(stages)
    x, y = DATA.train.batch(slice(0, 18))
    # one network for all: a later stage may need what an earlier one taught
    model = initial(defense, DATA, 0).train()
    for stage in stages:
        losses = take(model, stage, 10, x, y)
        enough = max(0.95 * losses[0], 0.05)
        if losses[-1] >= enough:
            # a gate that draws noise makes losses jump: on some processors ten steps end on such a jump
            losses = take(model, stage, 20, x, y)
        assert losses[-1] < enough, stage.name


@EVERY
def test_a_step_leaves_the_images_the_modes_and_the_requirements_of_gradients_as_they_were(name):
    defense = small(name)
    model = initial(defense, DATA, 0).train()
    x, y = DATA.train.batch(slice(0, 6))
    given = x.clone(), y.clone()
    for stage in defense.stages(DATA):
        take(model, stage, 1, x, y)
        assert torch.equal(x, given[0]) and torch.equal(y, given[1])
        assert all(part.training for part in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())


@EVERY
def test_a_stage_moves_parameters_of_the_network_each_by_one_optimiser(name):
    defense = small(name)
    model = initial(defense, DATA, 0)
    own = {id(parameter) for parameter in model.parameters()}
    for stage in defense.stages(DATA):
        if stage.groups is not None:
            moved = [id(parameter) for group in stage.groups(model) for parameter in group]
            assert moved and len(set(moved)) == len(moved) and set(moved) <= own, stage.name


@EVERY
def test_a_training_that_is_stopped_after_every_step_ends_as_an_unbroken_one(name, tmp_path, monkeypatch):
    whole = train(small(name), DATA, seed=0, folder=tmp_path / "whole", quiet=True)
    real = Stage.step

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(Stage, "step", interrupted)
    for _ in range(3 * len(small(name).stages(DATA))):
        with pytest.raises(Interrupted):
            train(small(name), DATA, seed=0, folder=tmp_path / "parts", quiet=True)
    parts = train(small(name), DATA, seed=0, folder=tmp_path / "parts", quiet=True)
    assert parts.history == whole.history
    for (key, one), two in zip(
        whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key


@EVERY
def test_a_defense_trains_in_bf16(name, tmp_path):
    result = train(small(name), DATA, seed=0, folder=tmp_path, quiet=True, precision="bf16")
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# the file


@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_is_named_after_its_file_and_described_in_one_line(name):
    entry = ENTRIES[name]
    assert entry.module == f"defenses.{name}"
    assert entry.summary.endswith(".") and len(entry.summary) < 110


@pytest.mark.parametrize("name", DEFENSES)
def test_the_docstring_of_a_defense_names_its_paper_and_what_was_reported_is_expected_and_differs(name):
    text = importlib.import_module(ENTRIES[name].module).__doc__
    places = [text.find(f"\n{section}:") for section in ("Reported", "Expect", "Differs")]
    assert -1 not in places and places == sorted(places)
    assert "↔" in text, "symbols and names side by side"
    assert any(where in text for where in ("arXiv", "openreview.net", "doi.org"))
    assert not any(unfinished in text for unfinished in ("@@", "TODO", "XXX", "FIXME"))


@pytest.mark.parametrize("name", DEFENSES)
def test_the_name_in_the_papers_tables_is_one_that_they_print(name):
    printed = registry.get(name).published_as
    assert printed is None or printed in rows("cifar10")


PLUGIN = '''
import torch
from torch import nn

import bench
from bench.config import config
from bench.defense import Defense, Stage
from bench.model import Normalized


@config
class Config:
    epochs: int = 2


@bench.register("of_ones_own")
class Own(Defense[Config]):
    """Softmax regression."""

    recipes = {"tiny": Config()}

    def build(self, data):
        c, h, w = data.shape
        net = nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, len(data.classes)))
        return Normalized(net, data.mean, data.std)

    def stages(self, data):
        def loss(model, x, y, rng):
            return nn.functional.cross_entropy(model(x), y)

        return [Stage(name="clean", loss=loss, epochs=self.config.epochs, batch_size=18, lr=0.01)]
'''


def test_a_defense_needs_a_file_and_no_other_edit(tmp_path):
    (tmp_path / "own.py").write_text(PLUGIN)
    frame = bench.run(
        "of_ones_own",
        "digits",
        plugin=tmp_path / "own.py",
        settings={"epochs": "1"},
        samples=20,
        results=tmp_path / "results",
        quiet=True,
    )
    assert set(frame["defense"]) == {"of_ones_own"} and len(frame) >= 17
    assert frame.set_index("attack").loc["clean", "accuracy"] > 50


# ---------------------------------------------------------------------------------------------------------------------
# the base class


def plain_loss(model, x, y, rng):
    return F.cross_entropy(model(x), y)


def plain_update(model, x, y, rng, optimisers):
    loss = plain_loss(model, x, y, rng)
    follow(loss, optimisers)
    return loss


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": None}, "either a loss or an update"),
        ({"update": plain_update}, "either a loss or an update"),
        ({"epochs": -1}, "epochs of at least 0, not -1"),
        ({"batch_size": 0}, "a batch_size of at least 1, not 0"),
        ({"lr": 0.0}, "an lr above 0, not 0.0"),
        ({"lr": math.nan}, "an lr above 0, not nan"),
        ({"lr": math.inf}, "an lr above 0, not inf"),
        ({"momentum": 1.0}, "a momentum from 0 to below 1, not 1.0"),
        ({"weight_decay": -0.1}, "a weight_decay of at least 0, not -0.1"),
        ({"warmup": -1}, "a warmup of at least 0 epochs, not -1"),
        ({"ema": 1.0}, "an ema from 0 to below 1, not 1.0"),
        ({"select": "best"}, "select to be clean, robust or last, not 'best'"),
    ],
)
def test_a_stage_out_of_range_is_refused_with_its_name_and_the_range(settings, said):
    given = {"name": "mine", "loss": plain_loss, "epochs": 1, "batch_size": 8, "lr": 0.1}
    Stage(**given)
    with pytest.raises(UsageError, match=f"stage 'mine' needs {said}"):
        Stage(**given | settings)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda loss: loss.expand(3), r"shape \(3,\)"),
        (lambda loss: loss.item(), "a float"),
        (lambda loss: None, "a NoneType"),
    ],
)
@pytest.mark.parametrize("hook", ["loss", "update"])
def test_a_loss_that_is_not_one_number_is_refused(hook, returned, said):
    def given(model, x, y, *rest):
        return returned(F.cross_entropy(model(x), y))

    stage = Stage(name="mine", epochs=1, batch_size=8, lr=0.1, **{hook: given})
    with pytest.raises(UsageError, match=f"stage 'mine' must return its mean loss .* not {said}"):
        stage.step(nn.Linear(2, 2), torch.rand(4, 2), torch.zeros(4, dtype=torch.long), Rng(0), [])


def test_following_a_loss_forgets_earlier_gradients_and_steps_every_optimiser():
    one, two = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
    one.grad = torch.tensor(100.0)
    optimisers = [torch.optim.SGD([one], lr=0.1), torch.optim.SGD([two], lr=0.5)]
    follow(3 * one + 2 * two, optimisers)
    assert (one.item(), two.item()) == pytest.approx((0.7, 1.0))


def test_a_function_is_a_defense_with_nothing_to_train():
    def mine(data):
        """Somebody's model."""
        return nn.Linear(2, len(data.classes))

    kind = FunctionDefense.of("mine", mine)
    assert kind.__name__ == "mine" and kind.__doc__ == "Somebody's model."
    assert set(kind.recipes.values()) == {NoSettings()} and set(kind.recipes) == set(RECIPES)
    made = kind(kind.recipes["tiny"])
    assert made.build(DATA).out_features == 3 and list(made.stages(DATA)) == []


def test_a_function_that_returns_no_module_is_refused():
    kind = FunctionDefense.of("mine", lambda data: "a model")
    with pytest.raises(
        UsageError, match=r"'mine' returned a str; a registered function must return an nn\.Module"
    ):
        kind(NoSettings()).build(DATA)


def test_a_defense_says_what_to_build():
    with pytest.raises(NotImplementedError):
        Defense(None).build(DATA)
