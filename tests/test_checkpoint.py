"""Checkpoints: what is read, what is refused, whose normalisation it gets."""

import hashlib
import pickle
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from torch.nn import functional as F

from bench import checkpoint, registry
from bench.checkpoint import Loaded, check_clean
from bench.config import replaced
from bench.data import Dataset
from bench.errors import CheckpointError

KUANGLIU = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
HUYVNPHAN = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASET = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def dataset(name="cifar10", channels=3, side=32, classes=10):
    return Dataset(
        name=name,
        classes=tuple(map(str, range(classes))),
        shape=(channels, side, side),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        eps=8 / 255,
        crop=4,
        flip=True,
        read=lambda split: pytest.fail("no image is needed to load a checkpoint"),
    )


def defense(name, recipe="paper", **settings):
    cls = registry.get(name)
    return cls(replaced(cls.recipes[recipe], settings))


def loaded(source, made, data=None):
    """The model with the file in it, in eval mode, and what the loader says of it."""
    data = data or dataset()
    model = made.build(data)
    result = checkpoint.load(str(source), model, defense=made, data=data)
    return model.eval(), result


def refused(source, made=None, data=None):
    """The message of a refusal: one line."""
    with pytest.raises(CheckpointError) as caught:
        loaded(source, made or defense("resnet20"), data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def lived_in(net):
    """The network in eval mode with statistics that are not those of a fresh one."""
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.weight.data, part.running_var):
                value.copy_(0.5 + torch.rand_like(value))
            for value in (part.bias.data, part.running_mean):
                value.copy_(0.1 * torch.randn_like(value))
    return net.eval()


def assert_same(model, net, normalisation):
    """The model is the network behind this normalisation."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalisation)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net((x - mean) / std)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def net20():
    torch.manual_seed(0)
    return lived_in(defense("resnet20").network(dataset()))


@pytest.fixture
def weights20(tmp_path, net20):
    torch.save(net20.state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.fixture(scope="module")
def net18():
    torch.manual_seed(0)
    return lived_in(defense("resnet18").network(dataset()))


# --- our own files


def test_a_file_of_ours_comes_back_bit_for_bit(tmp_path):
    made = defense("resnet20", "tiny")
    model = made.build(dataset())
    checkpoint.save(tmp_path / "ours.safetensors", model.state_dict(), {"defense": "resnet20"})
    back, result = loaded(tmp_path / "ours.safetensors", made)
    assert result.origin == "dwf-bench"
    assert result.sha256 == hashlib.sha256((tmp_path / "ours.safetensors").read_bytes()).hexdigest()
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_a_file_of_ours_brings_normalisation_and_accuracy_from_its_metadata(tmp_path):
    made = defense("resnet20", "tiny")
    metadata = {"mean": "[0.1, 0.2, 0.3]", "std": "[1, 2, 3]", "clean": "87.5"}
    checkpoint.save(tmp_path / "ours.safetensors", made.build(dataset()).state_dict(), metadata)
    model, result = loaded(tmp_path / "ours.safetensors", made)
    assert (result.mean, result.std, result.clean) == ((0.1, 0.2, 0.3), (1, 2, 3), 87.5)
    assert model.normalize.std.flatten().tolist() == [1, 2, 3]


def test_a_file_of_ours_for_another_width_is_refused_with_both_shapes(tmp_path):
    checkpoint.save(
        tmp_path / "ours.safetensors", defense("resnet20", "tiny").build(dataset()).state_dict(), {}
    )
    message = refused(tmp_path / "ours.safetensors")
    assert "another network than ResNet20" in message
    assert "net.conv1.weight (8, 3, 3, 3) instead of (16, 3, 3, 3)" in message


def test_tensors_that_share_memory_are_saved(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    checkpoint.save(tmp_path / "ours.safetensors", {"a": shared, "b": shared.t()}, {})
    back = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert torch.equal(back["b"], shared.t())


# --- wrappers, prefixes, formats

WRAPPINGS = {
    "bare": lambda state: state,
    "kuangliu": lambda state: {"net": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
    "akamaster": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {
        "model": {f"_orig_mod.{k}": v for k, v in state.items()},
        "optimizer": {"lr": 1},
    },
    "compiled and parallel": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "nested": lambda state: {"model": {"state_dict": {f"model.{k}": v for k, v in state.items()}}},
    "numbers beside": lambda state: {**state, "epoch": 3},
    "no counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_state_dict_is_found_under_its_usual_wrappers_and_prefixes(wrapping, tmp_path, net20):
    torch.save(WRAPPINGS[wrapping](net20.state_dict()), tmp_path / "weights.pt")
    model, result = loaded(tmp_path / "weights.pt", defense("resnet20"))
    assert result.origin == "akamaster/pytorch_resnet_cifar10"
    assert (result.mean, result.std) == IMAGENET
    if wrapping != "half":
        assert_same(model, net20, IMAGENET)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_are_known_by_their_content(name, tmp_path, net20):
    safetensors.torch.save_file(net20.state_dict(), tmp_path / name)
    assert_same(loaded(tmp_path / name, defense("resnet20"))[0], net20, IMAGENET)


def test_the_old_format_of_torch_is_read(tmp_path, net20):
    torch.save(net20.state_dict(), tmp_path / "weights.th", _use_new_zipfile_serialization=False)
    assert_same(loaded(tmp_path / "weights.th", defense("resnet20"))[0], net20, IMAGENET)


def test_a_choice_between_two_state_dicts_in_one_file_is_told(tmp_path, net20):
    state = net20.state_dict()
    torch.save({"ema": {k: v + 1 for k, v in state.items()}, "state_dict": state}, tmp_path / "weights.pt")
    model, result = loaded(tmp_path / "weights.pt", defense("resnet20"))
    assert_same(model, net20, IMAGENET)
    assert "took 'state_dict'; the file also has 'ema'" in result.notes


def test_loading_moves_no_global_generator(weights20):
    made = defense("resnet20", "tiny")
    model = made.build(dataset())
    before = torch.random.get_rng_state()
    checkpoint.load(str(weights20), model, defense=made, data=dataset())
    assert torch.equal(torch.random.get_rng_state(), before)


# --- layouts of public sources


def test_kuangliu_resnet18_with_all_its_wrapping(tmp_path, net18):
    state = {"net": {f"module.{k}": v for k, v in net18.state_dict().items()}, "acc": 95.47, "epoch": 199}
    torch.save(state, tmp_path / "ckpt.pth")
    model, result = loaded(tmp_path / "ckpt.pth", defense("resnet18"))
    assert result.origin == "kuangliu/pytorch-cifar"
    assert result.clean == 95.47
    assert (result.mean, result.std) == KUANGLIU
    assert_same(model, net18, KUANGLIU)


def test_a_kuangliu_file_without_its_accuracy_states_none(tmp_path, net18):
    torch.save(net18.state_dict(), tmp_path / "ckpt.pth")
    result = loaded(tmp_path / "ckpt.pth", defense("resnet18"))[1]
    assert (result.origin, result.clean) == ("kuangliu/pytorch-cifar", None)
    assert result.notes == ("recognised as kuangliu/pytorch-cifar by its keys: its mean and std are used",)


def test_the_recipe_at_hand_does_not_keep_a_wider_network_out(tmp_path, net18):
    torch.save(net18.state_dict(), tmp_path / "ckpt.pth")
    model, result = loaded(tmp_path / "ckpt.pth", defense("resnet18", "tiny"))
    assert result.settings == {"width": 64}
    assert_same(model, net18, KUANGLIU)


def torchvision_resnet18():
    import torchvision

    net = torchvision.models.resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    return lived_in(net)


def timm_resnet18():
    import timm

    net = timm.create_model("resnet18", num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    return lived_in(net)


def test_huyvnphan_resnet18_keeps_the_pool_of_its_stem(tmp_path):
    net = torchvision_resnet18()
    torch.save(net.state_dict(), tmp_path / "resnet18.pt")
    model, result = loaded(tmp_path / "resnet18.pt", defense("resnet18"))
    assert (result.origin, result.clean) == ("huyvnphan/PyTorch_CIFAR10", 93.07)
    assert result.settings == {"pool": True}
    assert_same(model, net, HUYVNPHAN)


def test_edadaltocg_resnet18_has_no_pool(tmp_path):
    net = timm_resnet18()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    model, result = loaded(tmp_path / "pytorch_model.bin", defense("resnet18"))
    assert (result.origin, result.clean) == ("edadaltocg/resnet18_cifar10", 94.98)
    assert result.settings == {}
    assert_same(model, net, KUANGLIU)


def test_of_two_sources_with_one_layout_the_user_is_asked(tmp_path):
    net = timm_resnet18()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "model.safetensors")
    message = refused(tmp_path / "model.safetensors", defense("resnet18"))
    assert "huyvnphan/PyTorch_CIFAR10, edadaltocg/resnet18_cifar10" in message
    assert "--set source=NAME" in message
    model, result = loaded(tmp_path / "model.safetensors", defense("resnet18", source="edadaltocg"))
    assert result.origin == "edadaltocg/resnet18_cifar10"
    assert_same(model, net, KUANGLIU)
    # Only one of them has it for SVHN.
    result = loaded(tmp_path / "model.safetensors", defense("resnet18"), dataset("svhn"))[1]
    assert (result.origin, result.clean) == ("edadaltocg/resnet18_svhn", 95.95)


def test_chenyaofo_resnet20_has_projections(tmp_path):
    net = lived_in(defense("resnet20", shortcut="B").network(dataset()))
    state = {
        k.replace(".shortcut.", ".downsample.").replace("linear.", "fc."): v
        for k, v in net.state_dict().items()
    }
    torch.save(state, tmp_path / "any.pt")
    model, result = loaded(tmp_path / "any.pt", defense("resnet20"))
    assert (result.origin, result.clean) == ("chenyaofo/pytorch-cifar-models", 92.60)
    assert result.settings == {"shortcut": "B"}
    assert_same(model, net, KUANGLIU)


@pytest.mark.parametrize(
    ("head", "origin", "normalisation"),
    [
        ((), "kuangliu/pytorch-cifar", KUANGLIU),
        ((512, 512), "chenyaofo/pytorch-cifar-models", KUANGLIU),
        ((4096, 4096), "huyvnphan/PyTorch_CIFAR10", HUYVNPHAN),
    ],
)
def test_three_sources_of_vgg19_differ_in_their_heads(head, origin, normalisation, tmp_path):
    from torchvision.models.vgg import VGG, cfgs, make_layers

    net = VGG(make_layers(cfgs["E"], batch_norm=True), init_weights=False)
    net.avgpool = nn.Identity()
    layers = []
    for width_in, width in zip((512, *head), (*head, 10), strict=True):
        layers += [nn.Linear(width_in, width), nn.ReLU(), nn.Dropout()]
    net.classifier = nn.Sequential(*layers[:-2]) if head else layers[0]
    lived_in(net)
    torch.save(net.state_dict(), tmp_path / "vgg19.pt")
    model, result = loaded(tmp_path / "vgg19.pt", defense("vgg19"))
    assert result.origin == origin
    assert_same(model, net, normalisation)


class KuangliuDense(nn.Module):
    """A DenseNet that puts new channels first, under the names kuangliu gives them."""

    def __init__(self, growth, depths):
        super().__init__()
        width = 2 * growth
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        for block, depth in enumerate(depths, 1):
            layers = []
            for _ in range(depth):
                layer = nn.Module()
                layer.bn1, layer.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 4 * growth, 1, bias=False)
                layer.bn2 = nn.BatchNorm2d(4 * growth)
                layer.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
                layers.append(layer)
                width += growth
            self.add_module(f"dense{block}", nn.Sequential(*layers))
            if block < 4:
                trans = nn.Module()
                trans.bn, trans.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width // 2, 1, bias=False)
                self.add_module(f"trans{block}", trans)
                width //= 2
        self.bn, self.linear = nn.BatchNorm2d(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.conv1(x)
        for block in range(1, 5):
            for layer in self.get_submodule(f"dense{block}"):
                new = layer.conv2(F.relu(layer.bn2(layer.conv1(F.relu(layer.bn1(x))))))
                x = torch.cat([new, x], 1)
            if block < 4:
                trans = self.get_submodule(f"trans{block}")
                x = F.avg_pool2d(trans.conv(F.relu(trans.bn(x))), 2)
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


@pytest.mark.parametrize(("growth", "source"), [(32, None), (12, "kuangliu")])
def test_kuangliu_densenet_puts_new_channels_first(growth, source, tmp_path):
    net = lived_in(KuangliuDense(growth, (6, 12, 24, 16)))
    torch.save({"net": net.state_dict(), "acc": 95.0}, tmp_path / "ckpt.pth")
    model, result = loaded(tmp_path / "ckpt.pth", defense("densenet121", source=source))
    assert (result.origin, result.clean) == ("kuangliu/pytorch-cifar", 95.0)
    assert_same(model, net, KUANGLIU)


def test_edadaltocg_densenet_is_narrow_and_bare(tmp_path):
    from timm.models.densenet import DenseNet

    net = DenseNet(growth_rate=12, block_config=(6, 12, 24, 16), num_classes=10)
    net.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    net.features.norm0, net.features.pool0 = nn.Identity(), nn.Identity()
    lived_in(net)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "model.safetensors")
    model, result = loaded(tmp_path / "model.safetensors", defense("densenet121"))
    assert (result.origin, result.clean) == ("edadaltocg/densenet121_cifar10", 93.91)
    assert_same(model, net, KUANGLIU)


def test_huyvnphan_densenet_keeps_the_pool_of_its_stem(tmp_path):
    from torchvision.models.densenet import DenseNet

    net = DenseNet(num_classes=10)
    net.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    lived_in(net)
    torch.save(net.state_dict(), tmp_path / "densenet121.pt")
    model, result = loaded(tmp_path / "densenet121.pt", defense("densenet121"))
    assert result.origin == "huyvnphan/PyTorch_CIFAR10"
    assert_same(model, net, HUYVNPHAN)


class KuangliuInception(nn.Module):
    """An inception module with biased convolutions, and two 3×3 ones for a 5×5."""

    def __init__(self, width, n1, r3, n3, r5, n5, pool):
        super().__init__()

        def tower(*convolutions):
            layers = []
            for width_in, width_out, kernel in convolutions:
                layers += [
                    nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2),
                    nn.BatchNorm2d(width_out),
                ]
                layers += [nn.ReLU()]
            return layers

        self.b1 = nn.Sequential(*tower((width, n1, 1)))
        self.b2 = nn.Sequential(*tower((width, r3, 1), (r3, n3, 3)))
        self.b3 = nn.Sequential(*tower((width, r5, 1), (r5, n5, 3), (n5, n5, 3)))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), *tower((width, pool, 1)))

    def forward(self, x):
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


class KuangliuGoogLeNet(nn.Module):
    """GoogLeNet under the names kuangliu gives its parts."""

    WIDTHS = {
        "a3": (192, 64, 96, 128, 16, 32, 32),
        "b3": (256, 128, 128, 192, 32, 96, 64),
        "a4": (480, 192, 96, 208, 16, 48, 64),
        "b4": (512, 160, 112, 224, 24, 64, 64),
        "c4": (512, 128, 128, 256, 24, 64, 64),
        "d4": (512, 112, 144, 288, 32, 64, 64),
        "e4": (528, 256, 160, 320, 32, 128, 128),
        "a5": (832, 256, 160, 320, 32, 128, 128),
        "b5": (832, 384, 192, 384, 48, 128, 128),
    }

    def __init__(self):
        super().__init__()
        self.pre_layers = nn.Sequential(nn.Conv2d(3, 192, 3, padding=1), nn.BatchNorm2d(192), nn.ReLU())
        for name, widths in self.WIDTHS.items():
            self.add_module(name, KuangliuInception(*widths))
        self.linear = nn.Linear(1024, 10)

    def forward(self, x):
        x = self.pre_layers(x)
        for name in self.WIDTHS:
            x = self.get_submodule(name)(x)
            if name in ("b3", "e4"):
                x = F.max_pool2d(x, 3, 2, 1)
        return self.linear(x.mean((2, 3)))


def test_kuangliu_googlenet_has_biases_and_two_towers(tmp_path):
    net = lived_in(KuangliuGoogLeNet())
    torch.save({"net": net.state_dict(), "acc": 95.2}, tmp_path / "ckpt.pth")
    model, result = loaded(tmp_path / "ckpt.pth", defense("googlenet"))
    assert (result.origin, result.settings) == ("kuangliu/pytorch-cifar", {"towers": "two"})
    assert_same(model, net, KUANGLIU)


def test_kuangliu_mobilenet_has_projected_shortcuts(tmp_path):
    net = lived_in(defense("mobilenet_v2", blocks="kuangliu").network(dataset()))
    assert {"conv1.weight", "layers.0.shortcut.0.weight", "layers.16.bn3.bias", "linear.bias"} <= {
        *net.state_dict()
    }
    torch.save({"net": net.state_dict(), "acc": 0.9443}, tmp_path / "ckpt.pth")
    model, result = loaded(tmp_path / "ckpt.pth", defense("mobilenet_v2"))
    assert result.clean == pytest.approx(94.43)
    assert_same(model, net, KUANGLIU)


def test_two_sources_of_mobilenet_differ_only_in_their_std(tmp_path):
    net = lived_in(defense("mobilenet_v2").network(dataset()))
    torch.save(net.state_dict(), tmp_path / "mobilenet.pt")
    assert "huyvnphan/PyTorch_CIFAR10, chenyaofo" in refused(
        tmp_path / "mobilenet.pt", defense("mobilenet_v2")
    )
    named = tmp_path / "cifar10_mobilenetv2_x1_0-fe6a5b48.pt"
    (tmp_path / "mobilenet.pt").rename(named)
    model, result = loaded(named, defense("mobilenet_v2"))
    assert result.origin == "chenyaofo/pytorch-cifar-models"
    assert_same(model, net, KUANGLIU)


def test_robustbench_networks_without_normalisation_are_known_by_their_file_name(tmp_path, net18):
    (tmp_path / "Linf").mkdir()
    torch.save(net18.state_dict(), tmp_path / "Linf" / "Sehwag2021Proxy_R18.pt")
    model, result = loaded(tmp_path / "Linf" / "Sehwag2021Proxy_R18.pt", defense("resnet18"))
    assert (result.origin, result.clean) == ("robustbench/Linf/Sehwag2021Proxy_R18", 84.38)
    assert_same(model, net18, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("mean", "std", "prefix"),
    [("mu", "sigma", ""), ("normalize.mean", "normalize.std", "model."), ("0.mean", "0.std", "1.")],
)
def test_normalisation_in_the_file_is_used(mean, std, prefix, tmp_path, net18):
    state = {f"{prefix}{k}": v for k, v in net18.state_dict().items()}
    state[mean] = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    state[std] = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    torch.save(state, tmp_path / "weights.pt")
    model, result = loaded(tmp_path / "weights.pt", defense("resnet18"))
    assert_same(model, net18, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert result.mean == pytest.approx((0.1, 0.2, 0.3))


def test_normalisation_that_the_user_sets_goes_before_all_other(weights20, net20):
    made = defense("resnet20", mean="[0, 0, 0]", std="[1, 1, 1]")
    model, result = loaded(weights20, made)
    assert_same(model, net20, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert result.clean == 91.73, "a wrong normalisation of the user's must still be found out"


def test_a_folder_of_images_may_be_the_sources_dataset(weights20):
    assert loaded(weights20, defense("resnet20"), dataset("npz:exact"))[1].clean == 91.73


@pytest.mark.parametrize("data", [dataset("svhn"), dataset("npz:big", side=64)])
def test_for_another_dataset_only_the_layout_is_taken(data, weights20, net20):
    model, result = loaded(weights20, defense("resnet20"), data)
    assert (result.origin, result.clean) == ("plain state dict", None)
    assert (result.mean, result.std) == DATASET
    assert "the dataset's mean and std are used" in result.notes[0]
    assert_same(model, net20, DATASET)


def test_source_plain_treats_a_file_as_nobodys(weights20, net20):
    model, result = loaded(weights20, defense("resnet20", source="plain"))
    assert (result.origin, result.clean, result.notes) == ("plain state dict", None, ())
    assert_same(model, net20, DATASET)


def test_an_unknown_source_is_answered_with_those_there_are(weights20):
    message = refused(weights20, defense("resnet20", source="madry"))
    assert "akamaster/pytorch_resnet_cifar10, chenyaofo/pytorch-cifar-models, plain" in message


def test_a_source_that_the_file_does_not_fit_is_named(weights20):
    assert "(read as chenyaofo/pytorch-cifar-models): missing layer2.0.shortcut" in refused(
        weights20, defense("resnet20", source="chenyaofo")
    )


def test_a_model_of_the_users_takes_a_state_dict_as_it_is(tmp_path):
    from bench.defense import FunctionDefense

    def build(data):
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    made = FunctionDefense.of("mine", build)(None)
    net = build(None)
    torch.save({"model": net.state_dict()}, tmp_path / "mine.pt")
    model, result = loaded(tmp_path / "mine.pt", made, dataset(side=2, classes=3))
    assert torch.equal(model[1].weight, net[1].weight)
    assert (result.origin, result.mean, result.std) == ("plain state dict", None, None)


# --- what is refused


class Spy:
    """Unpickled, it would write a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_wants_more_than_tensors_is_refused_unopened(new, tmp_path):
    torch.save({"net": Spy(tmp_path / "written")}, tmp_path / "evil.pt", _use_new_zipfile_serialization=new)
    message = refused(tmp_path / "evil.pt")
    assert "not tensors alone; refused" in message
    assert "torch.save(" in message
    assert not (tmp_path / "written").exists()


def test_a_bare_pickle_is_refused_unopened(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Spy(tmp_path / "written")))
    assert "refused" in refused(tmp_path / "evil.pkl")
    assert not (tmp_path / "written").exists()


def test_a_whole_module_is_refused_by_name(tmp_path, net20):
    torch.save(net20, tmp_path / "module.pt")
    assert "CifarResNet, not tensors alone" in refused(tmp_path / "module.pt")


@pytest.mark.parametrize("kept", [20, 1000, 500_000])
@pytest.mark.parametrize("kind", ["new", "old", "safetensors"])
def test_a_truncated_file_is_damaged(kind, kept, tmp_path, net20):
    file = tmp_path / "weights"
    if kind == "safetensors":
        safetensors.torch.save_file(net20.state_dict(), file)
    else:
        torch.save(net20.state_dict(), file, _use_new_zipfile_serialization=kind == "new")
    file.write_bytes(file.read_bytes()[:kept])
    assert "damaged" in refused(file)


CONTENTS = {
    "empty": (b"", "is empty"),
    "page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, not weights"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "Git LFS pointer"),
    "text": (b"conv1.weight = 3\n", "damaged or no checkpoint"),
    "noise": (bytes(range(256)) * 4, "damaged or no checkpoint"),
    "numpy": (np.lib.format.magic(1, 0) + b"x" * 64, "damaged or no checkpoint"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_is_no_checkpoint_is_called_what_it_is(kind, tmp_path):
    content, expected = CONTENTS[kind]
    (tmp_path / "weights.pt").write_bytes(content)
    assert expected in refused(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(3), "no state dict but a Tensor"),
        ({"epoch": 3}, "no state dict but a dict"),
        ([torch.zeros(3)], "no state dict but a list"),
    ],
)
def test_tensors_without_names_are_refused(value, expected, tmp_path):
    torch.save(value, tmp_path / "weights.pt")
    assert expected in refused(tmp_path / "weights.pt")


def test_a_torchscript_program_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        # What torch.jit.save writes, as far as it is told by.
        archive.writestr("program/data.pkl", pickle.dumps({}))
        archive.writestr("program/constants.pkl", pickle.dumps(()))
        archive.writestr("program/version", "3\n")
    assert "is a TorchScript program, not weights" in refused(tmp_path / "program.pt")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    assert f"no checkpoint file {str(tmp_path / 'none.pt')!r}" in refused(tmp_path / "none.pt")
    assert "is a folder" in refused(tmp_path)


def test_another_depth_is_refused_with_the_first_differences(weights20):
    message = refused(weights20, defense("resnet32"))
    assert (
        "does not fit ResNet32: missing layer1.3.conv1.weight, layer1.3.bn1.weight, layer1.3.bn1.bias and"
        in message
    )


def test_more_layers_than_there_are_places_are_refused(tmp_path):
    torch.save(defense("resnet32").network(dataset()).state_dict(), tmp_path / "weights.pt")
    assert "unexpected layer1.3.conv1.weight" in refused(tmp_path / "weights.pt")


def test_another_number_of_classes_is_refused_with_both_shapes(weights20):
    message = refused(weights20, data=dataset(classes=100))
    assert (
        "wrong shape linear.weight (10, 64) instead of (100, 64), linear.bias (10,) instead of (100,)"
        in message
    )


def test_another_architecture_is_refused(weights20):
    message = refused(weights20, defense("mobilenet_v2"))
    assert "does not fit MobileNetV2" in message
    assert "missing" in message
    assert "unexpected" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path, net20):
    state = {k: v.clone() for k, v in net20.state_dict().items()}
    state["layer1.0.bn1.bias"][3] = value
    torch.save(state, tmp_path / "weights.pt")
    assert "NaN or infinite values in 'layer1.0.bn1.bias'" in refused(tmp_path / "weights.pt")


# --- the hub and the web


def test_a_model_of_the_hub_is_known_by_its_name(tmp_path, monkeypatch):
    net = timm_resnet18()
    torch.save({**net.state_dict()}, tmp_path / "pytorch_model.bin")

    def download(name, filename):
        assert name == "edadaltocg/resnet18_cifar10"
        if filename == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model, result = loaded("hf_hub:edadaltocg/resnet18_cifar10", defense("resnet18"))
    assert (result.source, result.origin) == (
        "hf_hub:edadaltocg/resnet18_cifar10",
        "edadaltocg/resnet18_cifar10",
    )
    assert_same(model, net, KUANGLIU)


def test_without_a_connection_the_file_to_fetch_is_named(monkeypatch):
    def offline(name, filename):
        raise LocalEntryNotFoundError("no connection\nand no cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    message = refused("hf_hub:edadaltocg/resnet18_cifar10", defense("resnet18"))
    assert "the hub cannot be reached" in message
    assert "pytorch_model.bin of edadaltocg/resnet18_cifar10" in message
    assert "--set source=edadaltocg/resnet18_cifar10" in message


def test_a_file_of_the_web_is_fetched_once(tmp_path, monkeypatch, weights20):
    fetched = []

    def download(url, place, progress):
        fetched.append(url)
        Path(place).write_bytes(weights20.read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    url = f"https://example.org/resnet20-{hashlib.sha256(weights20.read_bytes()).hexdigest()[:8]}.th"
    for _ in range(2):
        assert loaded(url, defense("resnet20"))[1].origin == "akamaster/pytorch_resnet_cifar10"
    assert fetched == [url]


def test_a_file_that_cannot_be_fetched_is_an_error_of_one_line(tmp_path, monkeypatch):
    def download(url, place, progress):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert "cannot fetch https://example.org/a.pt: no route" in refused("https://example.org/a.pt")


@pytest.mark.parametrize("url", ["http://example.org/a.pt", "file:///tmp/a.pt", "ftp://example.org/a.pt"])
def test_nothing_but_https_is_fetched(url):
    assert "only https is fetched" in refused(url)


# --- the accuracy that a source states


@pytest.mark.parametrize(
    ("measured", "n", "believed"),
    [
        (91.73, 10_000, True),
        (92.72, 10_000, True),
        (90.72, 10_000, False),
        (92.74, 10_000, False),
        (89.2, 1_000, True),
        (88.9, 1_000, False),
        (86.6, 1_017, False),
    ],
)
def test_a_gap_of_a_point_or_three_standard_errors_is_believed(measured, n, believed):
    result = Loaded(
        source="weights.pt", sha256="", origin="akamaster", clean=91.73, mean=DATASET[0], std=DATASET[1]
    )
    if believed:
        check_clean(result, measured, n)
    else:
        with pytest.raises(CheckpointError, match=r"states 91.73 %.*mean 0.5/0.5/0.5.*likely wrong"):
            check_clean(result, measured, n)


def test_where_nothing_is_stated_any_accuracy_is_believed():
    check_clean(Loaded(source="weights.pt", sha256="", origin="plain state dict"), 3.0, 10_000)
