"""Gradients of narrow networks are right, whatever the processor's convolutions do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from baselines.resnet import resnet18, resnet50
from baselines.resnet_cifar import CifarResNet
from bench.overrun import overruns, sound, vector_floats


def strided(channels, stride=2, kernel=1, groups=1):
    return nn.Sequential(nn.Conv2d(channels, 8 * groups, kernel, stride, groups=groups))


def test_few_channels_before_a_strided_1x1_convolution_are_known():
    few = vector_floats() - 1
    assert overruns(strided(few)) and overruns(strided(2 * few, groups=2))
    assert not overruns(strided(few + 1)) and not overruns(strided(few, stride=1))
    assert not overruns(strided(few, kernel=3)) and not overruns(nn.Linear(3, 2))


@pytest.mark.parametrize(
    "net",
    [
        resnet18(channels=3, classes=3, width=4),
        resnet18(channels=3, classes=3, width=4, copies=3),
        resnet50(channels=3, classes=3, width=1),
        CifarResNet(1, channels=3, classes=3, width=4, shortcut="B"),
    ],
)
def test_our_own_networks_have_none(net):
    assert not overruns(net)


def gradients(model, x):
    loss = F.cross_entropy(model(x).flatten(1), torch.arange(len(x)) % 3)
    return torch.autograd.grad(loss, list(model.parameters()))


def apart(program):
    """Runs it in a process of its own: where it goes wrong, memory is overwritten."""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMPARED = """
    expected = gradients(model, x)
    with sound(model, "cpu"):
        model.to(memory_format=torch.channels_last)
        for _ in range(3):
            for found, wanted in zip(gradients(model, x.contiguous(memory_format=torch.channels_last)), expected):
                assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-6
"""


@pytest.mark.parametrize("width", [4, 6, 8, 12, 16])
def test_channels_last_a_narrow_resnet_has_the_gradients_of_the_usual_layout(width):
    apart(f"""
import torch
from test_overrun import F, gradients, resnet18, sound
# smooth: a ReLU's slope at 0 is decided by rounding
F.relu = F.softplus
torch.manual_seed(0)
if True:
    model, x = resnet18(channels=3, classes=3, width={width}), torch.rand(8, 3, 32, 32)
{COMPARED}""")


def test_channels_last_a_strangers_narrow_network_is_trained_soundly():
    apart(f"""
import torch
from torch import nn
from test_overrun import gradients, sound
torch.manual_seed(0)
if True:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1, 2), nn.Flatten(), nn.Linear(8 * 256, 3))
    x = torch.rand(8, 3, 32, 32)
{COMPARED}""")


def test_onednn_is_as_before_afterwards():
    with sound(strided(1), "cpu"):
        assert not torch.backends.mkldnn.enabled
    with sound(strided(1), "cuda"):
        assert torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled
