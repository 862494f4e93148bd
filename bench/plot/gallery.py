"""Test images, the perturbation that PGD found, and what the model says of both: the DWF paper's figure 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from bench.arithmetic import exact_arithmetic
from bench.plot.network import Attacked, attacked, images_of, only, ready
from bench.plot.style import COLORS, STYLE, WIDE, WIDTH, canvas, lines_of, saved, write
from bench.record import safe
from bench.session import Session

#: images, where nothing else is said, the most in one column of a paper, and the most of all
IMAGES, COLUMN, MOST = 6, 6, 12
#: inches left of the images, above them, and below a row of them, for what is said
LEFT, TOP, SAID = 0.25, 0.16, 0.21


@dataclass(frozen=True)
class Answers:
    """What a model says of images: class `(b,)`, and the softmax of it `(b,)`."""

    predicted: Tensor
    confidence: Tensor


def figure(session: Session, out: Path, *, data_only: bool = False) -> list[Path]:
    """Draws `<dataset>-<defense>-gallery` of the first test images, `session.samples` of them.

    Above, the image, in the middle the perturbation around grey, as many times larger as fits, below the adversarial image;
    below both what the model says, and how sure it is: set off where it is wrong. The CSV has a line an image.

    Args:
        session: one defense; its weights are those of its checkpoint or of an earlier training, nothing is trained.
        out: where the files go; made if it is not there.
        data_only: whether the CSV alone is written.

    Returns:
        The files.

    Raises:
        UsageError: not one defense, too many images, no weights, or a folder that cannot be written.
    """
    job = only(session, "a gallery is")
    samples = images_of(session, IMAGES, MOST)
    model = ready(session, job)
    found = attacked(session, job, model, samples)
    clean, adversarial = (_asked(model, x.to(session.device)) for x in (found.x, found.x_adv))
    drawn = [] if data_only else _draw(found, clean, adversarial, session.data.classes)
    data = _data(found, clean, adversarial, session.data.classes)
    return write(Path(out) / f"{safe(session.data.name)}-{safe(job.name)}-gallery", [*drawn, ("csv", data)])


def times(eps: float) -> int:
    """How many times larger a perturbation of this radius can be shown around grey."""
    return max(1, int(0.5 / eps + 1e-6))


def shown(found: Attacked) -> Tensor:
    """The perturbation around grey, `times` as large, in [0,1]."""
    return (0.5 + times(found.eps) * (found.x_adv - found.x)).clamp(0, 1)


@torch.no_grad()
def _asked(model: nn.Module, x: Tensor) -> Answers:
    with exact_arithmetic():
        confidence, predicted = model(x).softmax(1).max(1)
    return Answers(predicted.cpu(), confidence.cpu())


def _draw(
    found: Attacked, clean: Answers, adversarial: Answers, classes: Sequence[str]
) -> list[tuple[str, bytes]]:
    """The figure as PNG and as PDF."""
    count = len(found.x)
    width = WIDTH if count <= COLUMN else WIDE
    across = (width - LEFT) / max(count, 3)
    side = 0.94 * across
    down = side * found.x.shape[2] / found.x.shape[3]
    rows: tuple[tuple[str, Tensor, Answers | None], ...] = (
        ("clean", found.x, clean),
        (f"perturbation\n×{times(found.eps)}", shown(found), None),
        ("adversarial", found.x_adv, adversarial),
    )
    height = TOP + sum(down + (SAID if answers else 0.05) for _, _, answers in rows)
    with matplotlib.rc_context(STYLE):
        page = canvas(width, height)
        bottom = height - TOP
        for row, (name, images, answers) in enumerate(rows):
            bottom -= down
            for place in range(count):
                left = LEFT + place * across
                axes = page.add_axes((left / width, bottom / height, side / width, down / height))
                pixels = images[place].permute(1, 2, 0)
                axes.imshow(
                    pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy(),
                    cmap="gray",
                    vmin=0,
                    vmax=1,
                )
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set(linewidth=0.4, color="0.6")
                label = int(found.y[place])
                if row == 0:
                    axes.set_title(classes[label], fontsize=6, pad=2)
                if answers is not None:
                    said, sure = int(answers.predicted[place]), 100 * float(answers.confidence[place])
                    wrong = said != label
                    axes.set_xlabel(
                        f"{classes[said]}\n{sure:.0f} %",
                        fontsize=5.5,
                        labelpad=1.5,
                        linespacing=0.95,
                        color=COLORS[1] if wrong else "black",
                        fontweight="bold" if wrong else "normal",
                    )
            page.text(
                0.5 * LEFT / width,
                (bottom + down / 2) / height,
                name,
                rotation=90,
                ha="center",
                va="center",
                fontsize=5.5 if down > 0.62 else 5,
            )
            bottom -= SAID if answers is not None else 0.05
        return saved(page)


def _data(found: Attacked, clean: Answers, adversarial: Answers, classes: Sequence[str]) -> bytes:
    """A line an image as CSV: what the model says of both, how sure it is (in percent), and how large the perturbation is."""
    header = ["image", "label", "clean", "clean_confidence", "adversarial", "adversarial_confidence"]
    rows: list[list[object]] = [[*header, "largest_change", "eps", "times"]]
    for place, label in enumerate(found.y.tolist()):
        told: list[object] = [place, classes[label]]
        for answers in (clean, adversarial):
            told += [classes[int(answers.predicted[place])], 100 * float(answers.confidence[place])]
        largest = float((found.x_adv[place] - found.x[place]).abs().max())
        rows.append([*told, f"{largest:.6g}", repr(found.eps), times(found.eps)])
    return lines_of(rows)
