"""How a mixture's gate spreads its weight over the experts, on clean images and on attacked ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bench.arithmetic import exact_arithmetic
from bench.errors import UsageError
from bench.moe import RoutedModel, as_mixture
from bench.plot.network import attacked, images_of, only, ready
from bench.plot.style import COLORS, HATCH, STYLE, WIDE, WIDTH, canvas, lines_of, saved, tidy, write
from bench.record import safe
from bench.session import Session
from bench.weights import build

#: images, where nothing else is said
IMAGES = 1000
#: experts that fit into one column
COLUMN = 12


@dataclass(frozen=True)
class Usage:
    """What each expert gets of the images, `(n, e)`: its weight, or of a hard gate 1 where it answers; and which is first."""

    weights: Tensor
    first: Tensor

    @property
    def mean(self) -> NDArray[np.float64]:
        """Each expert's mean, `(e,)`."""
        mean: NDArray[np.float64] = self.weights.double().mean(0).numpy()
        return mean

    @property
    def reach(self) -> NDArray[np.float64]:
        """Half the 95 % interval of that mean, of images drawn at random, `(e,)`; 0 for one image."""
        n = len(self.weights)
        if n == 1:
            return np.zeros(self.weights.shape[1])
        std: NDArray[np.float64] = self.weights.double().std(0).numpy()
        reach: NDArray[np.float64] = 1.96 * std / n**0.5
        return reach


def figure(session: Session, out: Path, *, data_only: bool = False) -> list[Path]:
    """Draws `<dataset>-<defense>-gates`: each expert's mean gate weight on clean images and on what PGD made of them.

    Of a hard gate it is the share of images that the expert answers. Bars reach over the 95 % interval of the mean. The CSV
    also tells how often each expert weighs most, and on which share of images that expert changed.

    Args:
        session: one defense, a mixture; its weights are those of its checkpoint or of an earlier training.
        out: where the files go; made if it is not there.
        data_only: whether the CSV alone is written.

    Returns:
        The files.

    Raises:
        UsageError: not one defense, no mixture, no weights, or a folder that cannot be written.
    """
    job = only(session, "gates are")
    untrained = build(job, session.data, session.seeds[0])
    if as_mixture(untrained) is None:
        raise UsageError(
            f"{job.name!r} has no gate to draw: its model, a {type(untrained).__name__}, is no mixture of experts"
        )
    samples = images_of(session, IMAGES, len(session.data.test))
    model = ready(session, job)
    found = attacked(session, job, model, samples)
    clean, adversarial = (usage(model, x, session) for x in (found.x, found.x_adv))
    soft = _mixture(model).soft
    drawn = [] if data_only else _draw(clean, adversarial, soft, found.attack)
    return write(
        Path(out) / f"{safe(session.data.name)}-{safe(job.name)}-gates",
        [*drawn, ("csv", _data(clean, adversarial, soft, found.eps))],
    )


@torch.no_grad()
def usage(model: nn.Module, x: Tensor, session: Session) -> Usage:
    """What the gate gives each expert of these images, batch by batch."""
    mixture = _mixture(model)
    weights, first = [], []
    for batch in torch.split(x, session.batch_size):
        with exact_arithmetic():
            images = batch.to(session.device)
            chosen = mixture.selected(images).cpu()
            scores = mixture.gate(images).softmax(1).cpu()
        first.append(chosen)
        weights.append(scores if mixture.soft else F.one_hot(chosen, scores.shape[1]).float())
    return Usage(torch.cat(weights), torch.cat(first))


def _mixture(model: nn.Module) -> RoutedModel:
    mixture = as_mixture(model)
    assert mixture is not None
    return mixture


def _draw(clean: Usage, adversarial: Usage, soft: bool, attack: str) -> list[tuple[str, bytes]]:
    """The figure as PNG and as PDF."""
    experts = clean.weights.shape[1]
    width = WIDTH if experts <= COLUMN else WIDE
    with matplotlib.rc_context(STYLE):
        page = canvas(width, 1.9)
        axes = page.add_axes((0.5 / width, 0.2, 1 - 0.58 / width, 0.66))
        at = np.arange(experts)
        n = len(clean.weights)
        fills: tuple[tuple[float, Usage, str, dict[str, Any]], ...] = (
            (-0.2, clean, f"clean (n = {n})", {"color": COLORS[0]}),
            (0.2, adversarial, attack, {"facecolor": "white", "edgecolor": COLORS[1], "hatch": HATCH}),
        )
        for shift, seen, label, fill in fills:
            bars = {"ecolor": "0.25", "elinewidth": 0.6, "capsize": 1.5}
            axes.bar(
                at + shift,
                seen.mean,
                0.38,
                yerr=seen.reach,
                error_kw=bars,
                label=label,
                linewidth=0.7,
                **fill,
            )
        axes.set_xticks(at, [str(expert + 1) for expert in at])
        axes.set_ylim(0, min(1.0, 1.1 * float(max((u.mean + u.reach).max() for u in (clean, adversarial)))))
        axes.set_xlabel("expert")
        axes.set_ylabel("mean gate weight" if soft else "share of images")
        tidy(axes, "y")
        page.legend(loc="upper center", ncols=2, frameon=False, borderaxespad=0.1)
        return saved(page)


def _data(clean: Usage, adversarial: Usage, soft: bool, eps: float) -> bytes:
    """An expert a line as CSV; shares in percent, the radius in pixel units."""
    experts = clean.weights.shape[1]
    names = ("clean", "clean_reach", "attacked", "attacked_reach", "clean_first", "attacked_first")
    rows: list[list[object]] = [["expert", "gate", *names, "first_changed", "n", "eps"]]
    changed = 100 * float((clean.first != adversarial.first).double().mean())
    for expert in range(experts):
        told: list[object] = []
        for seen in (clean, adversarial):
            told += [100 * float(seen.mean[expert]), 100 * float(seen.reach[expert])]
        firsts = [100 * float((seen.first == expert).double().mean()) for seen in (clean, adversarial)]
        gate = "soft" if soft else "hard"
        rows.append([expert + 1, gate, *told, *firsts, changed, len(clean.weights), repr(eps)])
    return lines_of(rows)
