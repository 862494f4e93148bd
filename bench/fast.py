"""The same function, faster: a copy of a model that gradients are taken from.

BatchNorm in eval mode is an affine map and is folded into the convolution before it; sums and ReLUs of what nobody else
reads overwrite it, bit for bit the same; weights lie channels-last; with `bf16` the passes run under autocast, with `tf32`
a GPU multiplies in TF32 for as long as they last. Judging never uses the copy. Before it is used at all it is compared with
the model, both in float64, where folding is exact to rounding and no activation is so near to 0 that rounding decides its
sign: in float32 a correct copy of an untrained network can differ by a percent. What differs, or cannot be compared, is not
used. The gate and the experts of a mixture, which adaptive attacks ask apart, have a copy of their own.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench.arithmetic import tf32
from bench.attacks.gradient import input_gradient
from bench.errors import BenchError
from bench.moe import Apart, ByBatch, Experts, RoutedModel, most_grouped, output_of, small
from bench.rng import Rng
from bench.types import Images, Labels, Logits, Model

Precision = Literal["fp32", "tf32", "bf16"]

RANDOM = "as it is (random)"
FOLDED = "folded BatchNorm, channels_last"
#: how many images copies are compared on
PROBES = 2
#: the largest difference in float64 from the model's logits and gradients, relative to their largest value
EXACT = 1e-6
#: the largest difference in float32 from the model's logits, relative to their largest value
ROUNDED = 1e-2


@dataclass(frozen=True)
class Fast:
    """A model for gradients, and in a few words what was done to it."""

    model: Model
    about: str


def fast(model: nn.Module, x: Images, y: Labels, precision: Precision = "fp32") -> Fast:
    """A quicker model with the same gradients, checked on the images `x` with labels `y`.

    Args:
        model: in eval mode, deterministic, its parameters needing no gradient.
        x, y: a few images to check it on.
        precision: `bf16` runs the passes under autocast, `tf32` multiplies in TF32; neither is checked but for finite values.
    """
    changes = ((FOLDED, lambda part: _in_place(_folded(part))), (FOLDED, _folded), ("channels_last", _same))
    chosen, about = _quickest(model, x[:PROBES], y[:PROBES], changes)
    if precision == "bf16":
        return Fast(Autocast(chosen, x.device.type), f"{about}, bf16")
    if precision == "tf32":
        return Fast(TF32(chosen), f"{about}, tf32")
    return Fast(chosen, about)


def fast_expectation(model: nn.Module, x: Images, y: Labels, precision: Precision = "fp32") -> Fast:
    """As `fast`, of a random model's exact expectation, where it offers one as `expected_log_probabilities`; else the model itself."""
    if not hasattr(model, "expected_log_probabilities"):
        return Fast(model, RANDOM)
    made = fast(Expected(model), x, y, precision)
    return Fast(made.model, f"exact expectation, {made.about}")


class Expected(nn.Module):
    """What a random model says of its own expectation, as a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to log-probabilities `(b, k)`."""
        stated = cast(Callable[[Images], Logits], self.model.expected_log_probabilities)
        return stated(x)


def fast_mixture(mixture: nn.Module, x: Images, y: Labels, precision: Precision = "fp32") -> RoutedModel:
    """A mixture whose gate and experts answer as this one's do, only quicker; the mixture itself where no copy does.

    Args:
        mixture: a `RoutedModel`, as the model of `fast`; it may be random, if its gate and experts are not.
        x, y: a few images to check it on.
        precision: with `bf16` the experts run under autocast. The gate does not, since routes turn on small differences.
    """
    changes = (
        (FOLDED, lambda told: _in_place(_folded_mixture(told))),
        (FOLDED, _folded_mixture),
        ("channels_last", _same),
    )
    told, _ = _quickest(Told(mixture), x[:PROBES], y[:PROBES], changes)
    told = told.model if isinstance(told, ChannelsLast) else told
    quick = cast(RoutedModel, told.mixture)
    return cast(RoutedModel, AutocastExperts(quick, x.device.type)) if precision == "bf16" else quick


class Told(nn.Module):
    """All that adaptive attacks ask of a mixture, in one answer."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Images) -> Tensor:
        """`(b, c, h, w)` to `(b, …)`: the scores, every expert's logits, and what the defense's own aims look at."""
        mixture = cast(RoutedModel, self.mixture)
        mixture.selected(x)
        legacy: Callable[[], dict[str, Any]] | None = getattr(mixture, "legacy_aims", None)
        return torch.cat(
            [
                mixture.gate(x),
                mixture.all_outputs(x).flatten(1),
                *(output_of(mixture, x, k) for k in range(mixture.experts_count)),
                *(aim.output(x) for aim in (legacy() if legacy else {}).values()),
            ],
            1,
        )


def _folded_mixture(told: nn.Module) -> nn.Module:
    # each part for itself: of a mixture that was traced only the forward pass would remain
    _children_folded(cast(nn.Module, told.mixture))
    return told


class AutocastExperts:
    """A mixture whose experts answer in bfloat16 where autocast allows it, with float32 logits; all else is as it was."""

    def __init__(self, mixture: RoutedModel, device: str) -> None:
        self.mixture, self.device = mixture, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mixture, name)

    def all_outputs(self, x: Images) -> Tensor:
        """Every expert's logits, `(b, e, k)`."""
        with torch.autocast(self.device, torch.bfloat16):
            return self.mixture.all_outputs(x).float()

    def one_output(self, x: Images, expert: int) -> Logits:
        """One expert's logits, `(b, k)`."""
        with torch.autocast(self.device, torch.bfloat16):
            return output_of(self.mixture, x, expert).float()


class ChannelsLast(nn.Module):
    """A model whose input is laid out channels-last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to `(b, k)`."""
        logits: Logits = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits


class Autocast(nn.Module):
    """A model that runs in bfloat16 where autocast allows it, with float32 logits."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model = model
        self.device = device

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to `(b, k)`."""
        with torch.autocast(self.device, torch.bfloat16):
            logits: Logits = self.model(x)
        return logits.float()


class TF32(nn.Module):
    """A model whose gradients are taken in TF32: `arithmetic()` is entered by whoever takes them, for the backward pass too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to `(b, k)`."""
        logits: Logits = self.model(x)
        return logits

    def arithmetic(self) -> AbstractContextManager[None]:
        """The context of its passes."""
        return tf32()


def _quickest(
    model: nn.Module, x: Images, y: Labels, changes: Sequence[tuple[str, Callable[[nn.Module], nn.Module]]]
) -> tuple[nn.Module, str]:
    """The first changed copy that is the model, and what it is; the model itself where none is."""
    try:
        exact = copy.deepcopy(model).double()
        few, labels = _of_every_way(exact, x, y)
        # off the grid of stored pixels, so that flat regions of an image are no ties for a max pool
        probe = 0.9 * few.double() + 0.1 * Rng("probe").uniform(few.double())
        expected = _answers(exact, probe, labels)
        exact = _apart(exact, x)
        with torch.no_grad():
            logits = model(x)
    except BenchError:
        raise
    except Exception:
        # a stranger's model may refuse to be copied or to run in float64, in any way
        return model, "as it is (it does not run in float64)"
    for about, change in changes:
        try:
            candidate = ChannelsLast(change(copy.deepcopy(exact)).to(memory_format=torch.channels_last))
            found = _answers(candidate, probe, labels)
            candidate.float()
            with torch.no_grad():
                rounded = candidate(x)
        except Exception:
            # a changed copy that cannot run is as useless as a wrong one; the model itself has just run
            continue
        same = all(_close(a, b, EXACT) for a, b in zip(found, expected, strict=True))
        if same and _close(rounded, logits, ROUNDED):
            return candidate, about
    return model, "as it is (a faster copy differs)"


def _apart(model: nn.Module, x: Images) -> nn.Module:
    """The model with experts that run one after another as networks of their own, so that each can be folded."""
    for name, part in list(model.named_modules()):
        if isinstance(part, Experts) and not small(x):
            model.set_submodule(name, ByBatch(part) if most_grouped(x) else part.apart())
    return model


def _of_every_way(model: nn.Module, x: Images, y: Labels) -> tuple[Images, Labels]:
    """Images enough that all of them go one way through the model, and the first few another where it has two."""
    if small(x) or not any(isinstance(part, Experts) for part in model.modules()):
        return x, y
    rows = torch.arange(max(len(x), most_grouped(x) + 1), device=x.device) % len(x)
    return x[rows], y[rows]


def _answers(model: nn.Module, x: Images, y: Labels) -> list[Tensor]:
    """Gradients and logits of all the images, and of the first few."""
    return [
        one for n in {len(x), min(len(x), PROBES)} for one in input_gradient(model, x[:n], y[:n], projection)
    ]


def projection(logits: Logits, y: Labels) -> Tensor:
    """A fixed random combination of the logits, `(b,)`: unlike a loss it has no images where its gradient vanishes."""
    return (logits * Rng("projection").normal(logits[:1].detach())).sum(1)


def _folded(module: nn.Module) -> nn.Module:
    """The module with BatchNorm folded wherever torch.fx can follow the forward pass."""
    if isinstance(module, (Apart, ByBatch)):
        # its networks are also asked one by one, and of what is traced only the forward pass remains
        return _children_folded(module)
    try:
        traced = fx.symbolic_trace(module)
    except Exception:
        # tracing runs the author's code on stand-ins and may fail in any way; then each part is tried alone
        return _children_folded(module)
    parts = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(parts[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and isinstance(parts[before.target], nn.Conv2d)
            and len(before.users) == 1
            and parts[node.target].track_running_stats
        ):
            traced.set_submodule(
                str(before.target), fuse_conv_bn_eval(parts[before.target], parts[node.target])
            )
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _children_folded(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _folded(child))
    return module


def _same(module: nn.Module) -> nn.Module:
    return module


def _in_place(module: nn.Module) -> nn.Module:
    """The module, folded, with sums and ReLUs that overwrite what they are given where nothing else reads it."""
    for traced in [part for part in module.modules() if isinstance(part, fx.GraphModule)]:
        parts = dict(traced.named_modules())
        for node in traced.graph.nodes:
            given = node.args
            if node.op == "call_function" and node.target in SUMS and len(given) == 2 and not node.kwargs:
                own = [arg for arg in given if _unshared(arg, parts)]
                if own:
                    other = given[1] if own[0] is given[0] else given[0]
                    node.target, node.args = _add, (own[0], other)
            elif _is_relu(node, parts) and _unshared(given[0], parts):
                node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, given[:1], {}
        traced.delete_all_unused_submodules()
        traced.recompile()
    return module


#: sums of two tensors; the last overwrites the first of them
SUMS = (operator.add, torch.add, operator.iadd)


def _is_relu(node: fx.Node, parts: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(parts[str(node.target)]) is nn.ReLU
    return node.op == "call_function" and node.target in (F.relu, torch.relu)


def _unshared(value: object, parts: dict[str, nn.Module]) -> bool:
    """Whether it is a tensor of its own that one node reads, and no backward pass: a convolution's, or a sum's."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    if value.op == "call_module":
        return type(parts[str(value.target)]) is nn.Conv2d
    if value.op == "call_function" and value.target in (operator.iadd, _add):
        return _unshared(value.args[0], parts)
    return value.op == "call_function" and value.target in SUMS


def _add(own: Tensor, other: Tensor) -> Tensor:
    """Their sum; it overwrites the first where that is of the sum's shape and type."""
    if isinstance(other, Tensor) and own.shape == other.shape and own.dtype == other.dtype:
        return own.add_(other)
    return own + other


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12))
    )
