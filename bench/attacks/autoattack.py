"""AutoAttack (Croce and Hein, ICML 2020, arXiv 2003.01690), run by its authors' code as `pyautoattack` packages it.

`standard` is APGD-CE, targeted APGD-DLR, targeted FAB and Square, each on what the one before left standing. Anything
less is not called AutoAttack here.

Their code seeds the global generator and draws noise for a whole batch, so unlike our own attacks its outcome depends
on how images are batched; the seed is a function of the batch's first image, and the global generator is put back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from bench.errors import UsageError
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images, Labels

COMPONENTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


def autoattack(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    *,
    rng: Rng,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
) -> Images:
    """Adversarial images `(b, c, h, w)`; the original where every component failed.

    Args:
        model: pixels to logits, in eval mode.
        x, y: correctly classified images and their labels.
        threat: `Linf` or `L2`.
        rng: names the seed.
        version: `standard`, `plus` or `rand`.
        attacks: components to run in turn instead of a version.

    Raises:
        UsageError: an unknown component.
    """
    import pyautoattack
    import pyautoattack.checks

    unknown = [name for name in attacks or () if name not in COMPONENTS]
    if unknown:
        raise UsageError(f"no AutoAttack component named {unknown[0]!r}; known: {', '.join(COMPONENTS)}")
    # its test for defenses that optimise at test time counts calls in a global that it never resets
    for counted in pyautoattack.checks.funcs:
        pyautoattack.checks.funcs[counted] = 0
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    device = x.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        attack = pyautoattack.AutoAttack(
            model,
            norm=threat.norm,
            eps=threat.eps,
            version="custom" if attacks else version,
            attacks=list(attacks) if attacks else None,
            device=device,
            seed=rng.seed() % 2**31,
        )
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    # its float32 projections may leave the ball by a rounding; the judge's tolerance is for those alone
    found: Images = x_adv.detach()
    return found
