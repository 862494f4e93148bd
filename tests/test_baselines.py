"""The plain networks: size, cost, shapes, and the names that lead to them."""

import importlib
import importlib.metadata

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import registry
from bench.config import as_json, from_json, replaced
from bench.data import Dataset, Split
from bench.errors import UsageError
from bench.model import Normalized
from bench.rng import Rng

# parameters with ten classes, and multiply-adds of one 32×32 colour image in millions
SIZES = {
    "resnet20": (269_722, 41),
    "resnet32": (464_154, 69),
    "resnet44": (658_586, 97),
    "resnet56": (853_018, 125),
    "resnet18": (11_173_962, 555),
    "resnet34": (21_282_122, 1_159),
    "resnet50": (23_520_842, 1_298),
    "vgg19": (20_040_522, 398),
    "densenet121": (6_956_426, 888),
    "densenet169": (12_493_450, 1_060),
    "googlenet": (5_490_986, 1_337),
    "inception_v3": (21_638_954, 3_460),
    "xception": (20_827_442, 375),
    "mobilenet_v2": (2_236_682, 88),
}
NAMES = list(SIZES)
SMALL = ["resnet20", "resnet18", "resnet50", "densenet121"]


def dataset(channels=3, side=32, classes=10, name="cifar10"):
    def read(split):
        images = np.zeros((4, side, side, channels), np.uint8)
        return Split(images, np.arange(4) % classes)

    return Dataset(
        name=name,
        classes=tuple(map(str, range(classes))),
        shape=(channels, side, side),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        eps=8 / 255,
        crop=4,
        flip=True,
        read=read,
    )


def defense(name, recipe="paper", **settings):
    cls = registry.get(name)
    return cls(replaced(cls.recipes[recipe], settings))


@pytest.fixture(scope="module")
def networks():
    """Each network once, without its memory."""
    with torch.device("meta"):
        return {name: defense(name).network(dataset()).eval() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds_are_those_of_the_docstring(name, networks):
    net = networks[name]
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 32, 32, device="meta"))
    parameters, millions = SIZES[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert round(counter.get_total_flops() / 2e6) == millions
    text = importlib.import_module(type(defense(name)).__module__).__doc__
    assert f"{parameters:,}" in text
    assert f"{millions:,}" in text.split("Multiply-adds")[1].split(" M.")[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "side", "classes"), [(1, 8, 10), (3, 64, 7)])
def test_every_network_takes_images_from_8_to_64_pixels(name, channels, side, classes):
    data = dataset(channels, side, classes)
    with torch.device("meta"):
        net = defense(name).network(data).eval()
    assert net(torch.empty(2, channels, side, side, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("name", NAMES)
def test_images_too_small_for_a_network_are_refused_with_both_sizes(name):
    with pytest.raises(UsageError, match=r"at least 8×8 pixels, cifar10 has 4×4"):
        defense(name).build(dataset(side=4))


def test_a_pool_after_the_stem_of_a_densenet_needs_16_pixels():
    with pytest.raises(UsageError, match="set stem=norm"):
        defense("densenet121", stem="pool").build(dataset(side=8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", ["tiny", "fast", "paper"])
def test_every_recipe_survives_json(name, recipe):
    config = registry.get(name).recipes[recipe]
    assert from_json(type(config), as_json(config)) == config


@pytest.mark.parametrize("name", SMALL)
def test_a_few_steps_lower_the_loss(name):
    torch.manual_seed(0)
    data = dataset(1, 8, 3, "digits")
    made = defense(name, "tiny")
    model, (stage,) = made.build(data).train(), made.stages(data)
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(12):
        loss = stage.loss(model, x, y, Rng(step))
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_judged_alone(name):
    torch.manual_seed(0)
    net = defense(name, "tiny").network(dataset(3, 16)).double().eval()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


def test_mean_and_std_of_the_config_stand_in_for_the_datasets():
    model = defense("resnet20", "tiny", mean="[0, 0, 0]", std="[1, 1, 1]").build(dataset())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.normalize(x), x)


def test_a_mean_of_too_few_channels_is_refused():
    with pytest.raises(UsageError, match=r"mean has 1 number\(s\), cifar10 has 3 channel\(s\)"):
        defense("resnet20", mean="[0.5]").build(dataset())


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(UsageError, match="std"):
        defense("resnet20", std="[0, 1, 1]")


def test_a_setting_that_a_network_does_not_have_is_refused():
    with pytest.raises(UsageError, match="width"):
        defense("vgg19", width="8")


def test_copies_side_by_side_are_each_copy_alone():
    from baselines.resnet import resnet18

    torch.manual_seed(0)
    both = resnet18(channels=1, classes=3, width=4, copies=2).eval()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        together = both(torch.cat([x, x], 1))
        for i in range(2):
            one = resnet18(channels=1, classes=3, width=4).eval()
            one.load_state_dict({k: v.chunk(2)[i] if v.dim() else v for k, v in both.state_dict().items()})
            torch.testing.assert_close(together[:, i], one(x))


def test_the_shortcut_of_option_a_subsamples_and_pads_with_zeros():
    from baselines.resnet_cifar import Padded

    x = torch.arange(1.0, 33).view(1, 2, 4, 4)
    out = Padded(2, 4, 2)(x)
    assert out.shape == (1, 4, 2, 2)
    assert torch.equal(out[0, 1:3], x[0, :, ::2, ::2])
    assert not out[0, [0, 3]].any()


def test_any_timm_model_is_a_baseline_by_name():
    model = defense("timm:test_resnet").build(dataset(1, 32, 5)).eval()
    assert isinstance(model, Normalized)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def test_a_timm_model_of_fixed_size_is_built_for_the_images():
    model = defense("timm:test_vit").build(dataset(3, 32, 5)).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_an_unknown_timm_model_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"timm has no model named 'resnet81'; did you mean 'timm:resnet\d+"):
        registry.get("timm:resnet81")


def test_robustbench_is_detected_by_its_metadata_not_by_an_import(monkeypatch):
    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", none)
    with pytest.raises(UsageError, match="robustbench:Standard needs RobustBench, which is not installed"):
        registry.get("robustbench:Standard")


def test_a_robustbench_model_is_loaded_by_name_dataset_and_threat_model(monkeypatch):
    from types import SimpleNamespace

    net, asked = nn.Linear(1, 1), []

    def load_model(name, dataset, threat_model):
        asked.append((name, dataset, threat_model))
        return net

    modules = {
        "robustbench.model_zoo": SimpleNamespace(model_dicts={"cifar10": {"L2": {"Standard": None}}}),
        "robustbench.model_zoo.enums": SimpleNamespace(BenchmarkDataset=str, ThreatModel=str),
        "robustbench.utils": SimpleNamespace(load_model=load_model),
    }
    real = importlib.import_module
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: None)
    monkeypatch.setattr(
        importlib, "import_module", lambda name: modules[name] if name in modules else real(name)
    )
    assert defense("robustbench:Standard", threat_model="L2").build(dataset()) is net
    assert asked == [("Standard", "cifar10", "L2")]
    with pytest.raises(UsageError, match="did you mean 'robustbench:Standard'"):
        defense("robustbench:Standart", threat_model="L2").build(dataset())
    with pytest.raises(UsageError, match="no models for digits"):
        defense("robustbench:Standard").build(dataset(name="digits"))
