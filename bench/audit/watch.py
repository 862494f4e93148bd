"""What a model does during one forward pass that its logits do not tell.

    with watching(model) as watched:
        logits = model(x)
    watched.draws, watched.passes, watched.optimises, watched.hidden_in(logits)

Two of torch's modes look on and change nothing. One sees the calls that the author wrote: that gradients are switched on or
off, or asked for. The other sees the operations they come to, whatever library wrote them, and knows which draw random
numbers. What a gradient cannot see is followed from where it arises to where it ends, so that values which are only kept
for whoever wants to look at them count for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: operations whose value jumps, or that pick by rank, so that their derivative says nothing of what they do
JUMPS = frozenset(
    (
        *(
            "ceil",
            "floor",
            "floor_divide",
            "fmod",
            "frac",
            "heaviside",
            "remainder",
            "round",
            "sgn",
            "sign",
            "trunc",
        ),
        *("argmax", "argmin", "argsort", "bucketize", "kthvalue", "searchsorted", "sort", "topk"),
    )
)
#: calls by which a tensor becomes Python numbers, where nothing can be followed
LEAVES = frozenset(("__array__", "__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist"))


class Watched:
    """What was seen of one forward pass."""

    def __init__(self) -> None:
        self.draws: list[Tensor] = []
        """the random numbers that were drawn from torch's generators, global or private"""
        self.optimises: set[str] = set()
        """how gradients were taken inside the pass"""
        self.calls: Counter[int] = Counter()
        """how often each layer with parameters was called"""
        self.escaped: set[str] = set()
        """what gradients cannot see and nobody could follow further"""
        # a tensor is kept with its entry, so that no other one can be given its id
        self._hidden: dict[int, tuple[Tensor, frozenset[str]]] = {}

    @property
    def passes(self) -> int:
        """The most often that one layer with parameters was called."""
        return max(self.calls.values(), default=1)

    def hidden_in(self, value: object) -> frozenset[str]:
        """The operations without a telling gradient that these tensors were computed by."""
        found = [self._hidden[id(one)][1] for one in tree_leaves(value) if id(one) in self._hidden]
        return frozenset().union(*found)

    def hide(self, tensor: Tensor, names: frozenset[str]) -> None:
        """Notes that a tensor, and what it is a view of, was computed by these operations."""
        for one in (tensor, tensor._base):
            if one is not None:
                self._hidden[id(one)] = (one, names | self.hidden_in(one))


@contextmanager
def watching(model: nn.Module) -> Iterator[Watched]:
    """Looks on while the model is called; its parameters should need no gradient, or they are taken for the image's."""
    watched = Watched()

    def count(part: nn.Module, _: object) -> None:
        watched.calls[id(part)] += 1

    hooks = [
        part.register_forward_pre_hook(count)
        for part in model.modules()
        if not any(True for _ in part.children()) and any(True for _ in part.parameters())
    ]
    try:
        operations = _Operations(watched)
        with _Calls(watched, operations), operations:
            yield watched
    finally:
        for hook in hooks:
            hook.remove()


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what is computed."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.jumped: set[str] = set()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = op(*args, **given)
        if draws(op, args, given):
            self.watched.draws += [
                one.detach().clone() for one in tree_leaves(out) if isinstance(one, Tensor)
            ]
        name = str(op.overloadpacket.__name__).rstrip("_")
        if (name in JUMPS or given.get("rounding_mode") is not None) and _with_gradient((args, given)):
            self.jumped.add(name)
        return out


class _Calls(TorchFunctionMode):
    """Sees what the author wrote."""

    def __init__(self, watched: Watched, operations: _Operations) -> None:
        super().__init__()
        self.watched, self.operations = watched, operations
        self.switched_off = False

    def __torch_function__(
        self,
        call: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given, name = kwargs or {}, getattr(call, "__name__", str(call))
        if name == "_set_grad_enabled":
            if args[0] and not torch.is_grad_enabled() and not self.switched_off:
                self.watched.optimises.add("enable_grad")
            self.switched_off = not args[0]
            return call(*args, **given)
        if name in ("grad", "backward"):
            self.watched.optimises.add(name)
        # what jumped outside any call was run by a script, which nobody can look into
        self.watched.escaped |= self.operations.jumped
        self.operations.jumped = set()
        out = call(*args, **given)
        self._follow(name, call, (args, given), out)
        return out

    def _follow(
        self, name: str, call: object, inputs: tuple[Sequence[Any], dict[str, Any]], out: object
    ) -> None:
        names = self.watched.hidden_in(inputs) | self.operations.jumped
        self.operations.jumped = set()
        tensors = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        if _with_gradient(inputs):
            blind = (self.switched_off or torch.is_inference_mode_enabled()) and not torch.is_grad_enabled()
            if blind:
                names |= {"no_grad"}
            elif name in ("detach", "detach_") or call == Tensor.data.__get__:  # type: ignore[attr-defined]
                names |= {"detach"}
            for one in tensors:
                if not one.is_floating_point() and one.dtype != torch.bool:
                    self.watched.hide(one, names | {name})
        if not names:
            return
        if name in LEAVES:
            self.watched.escaped |= names
        if name.endswith("_") and isinstance(inputs[0][0], Tensor):
            # in place, `__setitem__` included
            tensors.append(inputs[0][0])
        for one in tensors:
            self.watched.hide(one, names)


def draws(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this operation draws random numbers; attention and dropout that drop nothing do not."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    parameters = op._schema.arguments
    given = {one.name: one.default_value for one in parameters}
    given |= {one.name: value for one, value in zip(parameters, args, strict=False)} | kwargs
    return given.get("dropout_p", 1.0) != 0 and bool(given.get("training", given.get("train", True)))


def _with_gradient(value: object) -> bool:
    return any(
        isinstance(one, Tensor) and one.requires_grad and one.is_floating_point()
        for one in tree_leaves(value)
    )
