"""Attacks: one file each, pure functions of a model, images and labels.

    from bench.attacks import pgd
    from bench.threat import Linf
    from bench.rng import Rng

    x_adv = pgd(model, x, y, Linf(8 / 255), rng=Rng(0), steps=10, step_size=2 / 255)

| function     | what it does                                              | draws | answers                     |
|--------------|-----------------------------------------------------------|-------|-----------------------------|
| `fgsm`       | one step of length eps along the gradient's sign          | no    | one radius; `sweep` many    |
| `pgd`        | many projected steps from a random start                  | start | one; `trajectory` many steps|
| `autoattack` | APGD-CE, APGD-T, FAB-T, Square, by their authors' code    | yes   | one ensemble                |
| `from_torchattacks` | any attack of the torchattacks library             | yes   | whatever that attack does   |

Every attack ascends its loss, summed over the batch; takes gradients with respect to the images alone; draws from the
`rng` it is given; leaves the model as it found it; and returns images without saying whether they succeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.attacks.autoattack import autoattack as autoattack
    from bench.attacks.fgsm import fgsm as fgsm
    from bench.attacks.pgd import pgd as pgd
    from bench.attacks.torchattacks import from_torchattacks as from_torchattacks

#: what `attack = "…"` in a protocol may say; a trailing colon stands for a family of names
NAMES = {
    "clean": "the images as they are",
    "fgsm": "one step along the sign of the gradient (Goodfellow et al. 2015)",
    "pgd": "projected gradient ascent from a random start (Madry et al. 2018)",
    "ms-pgd": "pgd from several random starts; an image must survive them all",
    "a-pgd": "pgd whose gradient is averaged over `eot` passes through the full model",
    "adaptive": "everything that `bench.attacks.mixture` knows against a mixture; nothing on other models",
    "autoattack": "APGD-CE, APGD-T, FAB-T and Square in turn (Croce and Hein 2020), by their authors' code",
    "torchattacks:": "any attack of the torchattacks library, by its class name",
}

_WHERE = {
    "fgsm": "bench.attacks.fgsm",
    "pgd": "bench.attacks.pgd",
    "autoattack": "bench.attacks.autoattack",
    "from_torchattacks": "bench.attacks.torchattacks",
}

__all__ = ["NAMES", "autoattack", "fgsm", "from_torchattacks", "pgd"]


def __getattr__(name: str) -> object:
    # the names above are read by `bench list`, which must not wait for torch
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
