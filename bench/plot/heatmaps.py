"""Test images and where each expert of a trained mixture sees their class: Grad-CAM heatmaps as a figure.

Every heatmap is scaled to its own largest value, so that colours compare places and not experts. How alike two experts
look is the mean over the images of the cosine of their heatmaps: 1 where they look at the same places, 0 where at none in common.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bench.arithmetic import exact_arithmetic
from bench.errors import UsageError
from bench.gradcam import heatmaps
from bench.plot.network import as_trained, images_of, only
from bench.plot.style import STYLE, WIDTH, canvas, saved, write
from bench.record import safe
from bench.session import Job, Session
from bench.weights import Weights, build

#: images, where nothing else is said, and the most that are drawn
ROWS, MOST = 6, 24
#: inches left of the images, for their labels, and above them, for the experts'
LEFT, TOP = 0.16, 0.16
#: how much of the image a heatmap covers
COVER = 0.6


def figure(session: Session, out: Path, *, data_only: bool = False) -> list[Path]:
    """Draws `<dataset>-<defense>-heatmaps` of the first test images, `session.samples` of them.

    A PNG and a PDF with a row an image and a column an expert, and a CSV of how alike two experts' heatmaps are.

    Args:
        session: one defense; its weights are those of its checkpoint or of an earlier training, nothing is trained.
        out: where the files go; made if it is not there.
        data_only: whether the CSV alone is written.

    Returns:
        The files.

    Raises:
        UsageError: not one defense, too many images, a model that shows no activations, no weights, or a folder that cannot
            be written.
    """
    job = only(session, "heatmaps are")
    samples = images_of(session, ROWS, MOST)
    model = explained(session, job).model.to(session.device)
    x, y = session.data.test.batch(slice(0, samples), session.device)
    with exact_arithmetic():
        heat = heatmaps(model, x, y).cpu()
    names = [session.data.classes[label] for label in y.tolist()]
    drawn = [] if data_only else _draw(x.cpu(), heat, names)
    return write(
        Path(out) / f"{safe(session.data.name)}-{safe(job.name)}-heatmaps", [*drawn, ("csv", _data(heat))]
    )


def explained(session: Session, job: Job) -> Weights:
    """The network with the weights that there are; none are made.

    Raises:
        UsageError: it shows no activations, or was not trained yet.
    """
    model = build(job, session.data, session.seeds[0])
    if not hasattr(model, "with_activations"):
        raise UsageError(
            f"{job.name!r} has no heatmaps: its model, a {type(model).__name__}, has no method `with_activations`"
        )
    return as_trained(session, job)


def similarity(heat: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The mean cosine of two experts' heatmaps, `(e, e)`, and over how many images: `(b, e, h, w)` of at least 0.

    A heatmap that is 0 everywhere has no direction; its image does not count, and where none is left the mean is NaN.
    """
    seen = heat.double().flatten(2)
    there = (seen.amax(2) > 0).double()
    # first to a largest value of 1: the squares of small slopes would vanish
    unit = F.normalize(seen / seen.amax(2, keepdim=True).where(there[:, :, None] > 0, 1), dim=2)
    n = there.T @ there
    mean = (unit @ unit.transpose(1, 2)).sum(0) / n
    return mean.numpy(), n.numpy().astype(np.int64)


def _data(heat: Tensor) -> bytes:
    """How alike the experts' heatmaps are as CSV, a row a pair, counted from 1; the cosine is empty where no image has both."""
    mean, n = similarity(heat)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["expert", "other", "cosine", "n"])
    for one, other in zip(*np.triu_indices(len(mean), 1), strict=True):
        cosine = round(float(mean[one, other]), 6) if n[one, other] else ""
        writer.writerow([one + 1, other + 1, cosine, n[one, other]])
    return file.getvalue().encode()


def _draw(x: Tensor, heat: Tensor, names: list[str]) -> list[tuple[str, bytes]]:
    """Images `(b, c, h, w)`, each beside itself under every heatmap `(b, e, h', w')`, as PNG and as PDF."""
    rows, columns = len(x), 1 + heat.shape[1]
    across = (WIDTH - LEFT) / columns
    down = across * x.shape[2] / x.shape[3]
    height = TOP + rows * down
    shown = x.permute(0, 2, 3, 1).squeeze(3).numpy() if x.shape[1] == 1 else x.permute(0, 2, 3, 1).numpy()
    scaled = (heat / heat.amax((2, 3), keepdim=True).clamp_min(1e-38)).numpy()
    extent = (0, x.shape[3], x.shape[2], 0)
    with matplotlib.rc_context(STYLE):
        page = canvas(WIDTH, height)
        for row in range(rows):
            for column in range(columns):
                left, bottom = LEFT + column * across, height - TOP - (row + 1) * down
                axes = page.add_axes(
                    (left / WIDTH, bottom / height, 0.97 * across / WIDTH, 0.97 * down / height)
                )
                axes.imshow(shown[row], cmap="gray", vmin=0, vmax=1, extent=extent)
                if column:
                    axes.imshow(
                        scaled[row, column - 1],
                        cmap="inferno",
                        vmin=0,
                        vmax=1,
                        alpha=COVER,
                        interpolation="bilinear",
                        extent=extent,
                    )
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if row == 0:
                    expert = f"expert {column}" if columns <= 6 else str(column)
                    axes.set_title(expert if column else "image", fontsize=6, pad=2)
                if column == 0:
                    axes.set_ylabel(names[row], fontsize=6, labelpad=2)
        return saved(page)
