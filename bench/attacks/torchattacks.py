"""Any attack of the torchattacks library as a column.

The library is an optional extra. Its attacks draw from the global generator, which is seeded from the batch's first
image and put back; so their outcome depends on how images are batched.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from bench.errors import UsageError, meant
from bench.model import evaluating
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images, Labels


def from_torchattacks(
    model: nn.Module, x: Images, y: Labels, threat: ThreatModel, *, rng: Rng, name: str, **settings: Any
) -> Images:
    """Adversarial images `(b, c, h, w)` by `torchattacks.<name>(model, eps=…, **settings)`.

    `eps` is the threat model's where the attack takes one; what a minimum-norm attack returns is projected into the
    ball, since it knows none.

    Raises:
        UsageError: the library is not installed, or has no such attack, or the attack refuses the settings.
    """
    kind = attack_class(name)
    with (
        torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []),
        evaluating(model),
        torch.enable_grad(),
    ):
        torch.manual_seed(rng.seed())
        try:
            attack = kind(model, **({"eps": threat.eps} if _takes(kind, "eps") else {}), **settings)
        except TypeError as error:
            raise UsageError(f"torchattacks:{name} refuses its settings: {error}") from None
        x_adv: Images = attack(x, y).detach()
    return x_adv if _takes(kind, "eps") else threat.project(x_adv, x)


def attack_class(name: str) -> Any:
    """The attack class of that name.

    Raises:
        UsageError: the library is not installed or has no such attack.
    """
    if importlib.util.find_spec("torchattacks") is None:
        raise UsageError("torchattacks is not installed; `pip install 'dwf-bench[torchattacks]'` brings it")
    import torchattacks

    kind = getattr(torchattacks, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torchattacks.attack.Attack)):
        known = (
            sorted(n for n in torchattacks.__all__ if n[0].isupper())
            if hasattr(torchattacks, "__all__")
            else []
        )
        raise UsageError(
            f"torchattacks has no attack named {name!r}"
            + (f"; it has {', '.join(known)}" if known else "")
            + meant(name, known)
        )
    return kind


def _takes(kind: Any, argument: str) -> bool:
    import inspect

    return argument in inspect.signature(kind.__init__).parameters
