"""Images are crafted against a network that stands still, so its BatchNorm is a part of its convolutions.

    BN(conv(x)) = γ (W∗x + b - μ) / √(σ² + ε) + β = (s W)∗x + (s (b - μ) + β),   s = γ / √(σ² + ε)

While crafting, the convolutions have the weights on the right and the BatchNorms hand on what they get; the parameters need
no gradient. That is exact in eval mode, and is done anew each time, from the weights and statistics of the moment.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from bench.attacks.gradient import input_gradient
from bench.audit.untouched import frozen
from bench.model import evaluating
from bench.rng import Rng
from bench.types import Images, Labels, Logits

#: the largest difference in float64 from the network's logits and gradients, relative to their largest value
EXACT = 1e-8


@contextmanager
def crafting(model: nn.Module) -> Iterator[nn.Module]:
    """The model as images are crafted against it: in eval mode, its parameters needing no gradient.

    Where `find_folds` has found that BatchNorms are a part of convolutions, they are. All is put back afterwards.
    """
    with evaluating(model), frozen(model), _folded(model):
        yield model


def find_folds(model: nn.Module, x: Images) -> int:
    """Lets `crafting` fold the BatchNorms of this network as far as torch.fx can follow it; how many those are.

    None, unless a float64 copy of the network, given other BatchNorms, answers the images `x` with the same logits and
    gradients folded and not. Neither the network nor a global generator is changed.
    """
    with evaluating(model):
        pairs = _pairs(model)
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        if not pairs or not _same(model, pairs, x.double()):
            return 0
    _tie(model, pairs)
    return len(pairs)


def mirror(network: nn.Module, other: nn.Module) -> None:
    """Lets the BatchNorms of another network of the same layers hand on what they get where those of `network` do."""
    for one, its in zip(network.modules(), other.modules(), strict=True):
        if isinstance(one, nn.BatchNorm2d):
            _hand_on(its, _hands_on(one))


@contextmanager
def _folded(model: nn.Module) -> Iterator[None]:
    folds = [
        (vars(part)["before"][0], part)
        for part in model.modules()
        # one that hands on already is folded: crafting within crafting
        if isinstance(part, nn.BatchNorm2d) and "before" in vars(part) and not _hands_on(part)
    ]
    own = [dict(conv._parameters) for conv, _ in folds]
    try:
        for conv, norm in folds:
            conv._parameters.update(_as_one(conv, norm))
            _hand_on(norm, True)
        yield
    finally:
        for (conv, norm), parameters in zip(folds, own, strict=True):
            conv._parameters.update(parameters)
            _hand_on(norm, False)


@torch.no_grad()
def _as_one(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    s = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        s = s * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * s if not norm.affine else bias * s + norm.bias
    return {"weight": conv.weight * s[:, None, None, None], "bias": bias}


def _hand_on(norm: nn.Module, does: bool) -> None:
    if does:
        norm.forward = _as_it_is
    else:
        vars(norm).pop("forward", None)


def _hands_on(norm: nn.Module) -> bool:
    return "forward" in vars(norm)


def _as_it_is(h: Tensor) -> Tensor:
    return h


def _tie(model: nn.Module, pairs: dict[str, str]) -> None:
    for norm, conv in pairs.items():
        # in a tuple, so that the convolution is no part of the BatchNorm; a copy of the network knows it too
        vars(model.get_submodule(norm))["before"] = (model.get_submodule(conv),)


def _pairs(module: nn.Module, prefix: str = "") -> dict[str, str]:
    """The names of BatchNorms that are all that is done with a convolution, and the convolutions'."""
    try:
        graph = fx.Tracer().trace(module)
    except Exception:
        # tracing runs the author's code on stand-ins and may fail in any way; then each part is tried alone
        parts = (_pairs(child, f"{prefix}{name}.") for name, child in module.named_children())
        return {norm: conv for part in parts for norm, conv in part.items()}
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        names = str(node.target), str(before.target)
        norm, conv = (module.get_submodule(name) for name in names)
        if (
            type(norm) is nn.BatchNorm2d
            and norm.running_mean is not None
            and type(conv) is nn.Conv2d
            and all(calls[name] == 1 for name in names)
        ):
            found[prefix + names[0]] = prefix + names[1]
    return found


def _same(model: nn.Module, pairs: dict[str, str], x: Images) -> bool:
    try:
        other = copy.deepcopy(model).double()
        for i, name in enumerate(pairs):
            # those of an untrained network are all alike, and would not show which one was folded where
            _disturb(other.get_submodule(name), Rng("fold", i))
        _tie(other, pairs)
        # off the grid of stored pixels, so that flat regions of an image are no ties for a max pool
        x = 0.9 * x + 0.1 * Rng("probe").uniform(x)
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with evaluating(other):
            torch.manual_seed(0)
            expected = input_gradient(other, x, y, _projection)
        with crafting(other):
            torch.manual_seed(0)
            found = input_gradient(other, x, y, _projection)
    except Exception:
        # a stranger's network may refuse to be copied, or to run in float64, in any way; it is attacked as it is
        return False
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= EXACT * b.abs().max().clamp_min(1e-12))
        for a, b in zip(found, expected, strict=True)
    )


def _disturb(norm: nn.Module, rng: Rng) -> None:
    for key, value in norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.5 + rng.at(key).uniform(value))


def _projection(logits: Logits, y: Labels) -> Tensor:
    """A fixed random combination of the logits, `(b,)`: unlike a loss it has no images where its gradient vanishes."""
    return (logits * Rng("projection").normal(logits[:1].detach())).sum(1)
