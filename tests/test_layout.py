"""How networks lie in memory while they learn: the gradient is right, whatever the processor's convolutions do."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.layout import layout, vector_floats
from bench.moe import Experts


def resnet(width, **more):
    return resnet18(channels=3, classes=3, width=width, **more)


@pytest.mark.parametrize("width", [4, 7])
def test_few_channels_before_a_strided_1x1_convolution_are_not_laid_channels_last_on_a_cpu(width):
    for model in (resnet(width), resnet(width, copies=3), Experts(partial(resnet, width), 3)):
        assert layout(model, "cpu") == torch.contiguous_format
        assert layout(model, "cuda") == torch.channels_last


def test_a_register_full_of_them_is():
    assert layout(resnet(vector_floats()), "cpu") == torch.channels_last
    assert layout(nn.Conv2d(1, 4, 1), "cpu") == torch.channels_last
    assert layout(nn.Conv2d(1, 4, 3, stride=2), "cpu") == torch.channels_last
    assert layout(nn.Linear(3, 2), "cpu") == torch.channels_last


def gradients(model, x):
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 3)
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("width", [4, 6, 8, 12, 16])
def test_gradients_in_that_layout_are_those_of_the_usual_one(width):
    # in a process of its own: where they are not, memory is overwritten
    program = f"""
import torch
from test_layout import gradients, resnet
from bench.layout import layout
torch.manual_seed(0)
model = resnet({width})
x = torch.rand(8, 3, 32, 32)
expected = gradients(model, x)
how = layout(model, "cpu")
model.to(memory_format=how)
for _ in range(3):
    for found, wanted in zip(gradients(model, x.contiguous(memory_format=how)), expected):
        assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-6
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=__file__.rsplit("/", 1)[0], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
