"""Robust accuracy under PGD against its radius, and what a paper prints of the same networks: which radius that belongs to.

The DWF paper does not say at which radius its PGD ran. Where the curve of a network crosses the value that the paper prints
of it lies the radius at which a working PGD leaves as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from bench import published
from bench.curves import high_end, low_end
from bench.long import Group, Measured
from bench.plot.curves import chance
from bench.plot.style import STYLE, band, empty, legend, lines_of, look, saved, tidy, write
from bench.record import safe

PROTOCOL = "calibration"
NOTHING = f"no finished {PROTOCOL} runs in {{}}; `bench run --protocol {PROTOCOL}` makes some"
#: what a radius axis may be labelled with
TICKS = (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class _Curve:
    """A network: its points by radius, clean images at 0, and what the paper prints of it; in percent."""

    label: str
    points: tuple[Measured, ...]
    row: str | None = None
    printed: float | None = None

    @property
    def eps(self) -> list[float]:
        return [point.epsilon or 0.0 for point in self.points]

    @property
    def implied(self) -> float | None:
        """The radius at which the curve comes down to what is printed; None where it does not."""
        return None if self.printed is None else crossing(self.eps, self.accuracies, self.printed)

    @property
    def accuracies(self) -> list[float]:
        return [point.accuracy for point in self.points]


def draw(
    found: Sequence[Group], out: Path, *, lines: str | None = None, data_only: bool = False
) -> list[Path]:
    """Draws `<dataset>-calibration` of calibration runs.

    Dashed, in a network's colour, is what the DWF paper prints of it at the same number of steps, down from where the curve
    meets it; grey are the paper's other rows.

    Args:
        found: groups to choose from.
        out: where the files go.
        lines: the dataset whose published rows are drawn where the images' own name has none, as with `npz:DIR`.
        data_only: whether the CSV alone is written.
    """
    found = [group for group in found if group.protocol == PROTOCOL]
    written = []
    for dataset in dict.fromkeys(group.dataset for group in found):
        alike = [group for group in found if group.dataset == dataset]
        rows = published.rows(dataset) or (published.rows(lines) if lines else {})
        steps = max(column.steps or 0 for group in alike for column in group.columns)
        printed = {
            name: row["pgd", float(steps)].accuracy for name, row in rows.items() if ("pgd", steps) in row
        }
        curves = [_curve(group, printed) for group in alike]
        others = {name: value for name, value in printed.items() if name not in {c.row for c in curves}}
        drawn = [] if data_only else _draw(curves, others, steps, chance(alike))
        data = _data(curves, printed, steps)
        written += write(out / f"{safe(dataset)}-calibration", [*drawn, ("csv", data)])
    return written


def crossing(eps: Sequence[float], accuracies: Sequence[float], value: float) -> float | None:
    """The first radius at which the straight pieces between points come down to a value; None where none does."""
    if accuracies[0] < value:
        return None
    for place in range(1, len(eps)):
        before, after = accuracies[place - 1], accuracies[place]
        if after <= value <= before:
            share = 0.0 if before == after else (before - value) / (before - after)
            return eps[place - 1] + share * (eps[place] - eps[place - 1])
    return None


def implied(group: Group, accuracy: float) -> float | None:
    """The radius at which PGD leaves this accuracy, in percent, of a calibration run's network; None where it never does."""
    curve = _curve(group, {})
    return crossing(curve.eps, curve.accuracies, accuracy)


def _curve(group: Group, printed: dict[str, float]) -> _Curve:
    columns = [column for column in group.columns if column.attack in ("clean", "pgd")]
    columns.sort(key=lambda column: column.epsilon or 0.0)
    record = group.records[0]
    row = published.row_of(record.asked.defense, record.published_as, printed)
    return _Curve(group.label, tuple(columns), row, printed[row] if row else None)


def _draw(
    curves: Sequence[_Curve], others: dict[str, float], steps: int, chance: float
) -> list[tuple[str, bytes]]:
    """The figure as PNG and as PDF."""
    with matplotlib.rc_context(STYLE):
        known = [curve for curve in curves if curve.printed is not None]
        extra = ["the paper, other networks"] * bool(others) + ["the paper, same network"] * bool(known)
        figure, axes, columns = empty([*(curve.label for curve in curves), *extra])
        for value in others.values():
            axes.axhline(value, color="0.75", linewidth=0.6, zorder=0)
        for place, curve in enumerate(curves):
            shown = look(place)
            bands = [low_end(point) for point in curve.points], [high_end(point) for point in curve.points]
            axes.fill_between(curve.eps, *bands, color=shown["color"], alpha=0.18, linewidth=0)
            axes.plot(curve.eps, curve.accuracies, **shown, label=curve.label)
            if curve.printed is not None:
                at = curve.implied
                paper = {"color": shown["color"], "linestyle": (0, (4, 2)), "linewidth": 0.8}
                axes.axhline(curve.printed, **paper)
                if at is not None:
                    axes.vlines(at, 0, curve.printed, **paper)
                    axes.plot(at, curve.printed, marker="o", markersize=6, markerfacecolor="none", **paper)
        if known:
            axes.plot(
                [], [], color="0.3", linestyle=(0, (4, 2)), linewidth=0.8, label="the paper, same network"
            )
        if others:
            axes.plot([], [], color="0.75", linewidth=0.6, label="the paper, other networks")
        axes.axhline(chance, color="0.45", linestyle=(0, (1, 2)), linewidth=0.9, label="chance")
        last = max(eps for curve in curves for eps in curve.eps)
        axes.set_xscale("symlog", linthresh=0.001, linscale=0.3)
        axes.set_xlim(-0.0002, 1.15 * last)
        ticks = [tick for tick in TICKS if tick <= last]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=6)
        axes.minorticks_off()
        axes.set_ylim(0, 100)
        axes.set_xlabel("radius eps of PGD (pixels in [0,1])")
        axes.set_ylabel(f"accuracy under PGD-{steps} (%)")
        tidy(axes, "y")
        legend(figure, columns)
        return saved(figure)


def _data(curves: Sequence[_Curve], printed: dict[str, float], steps: int) -> bytes:
    """The points as CSV, measured and published, accuracies in percent, radii in pixel units.

    `implied_eps` is where the curve of that network comes down to the value that the paper prints.
    """
    header = ("source", "defense", "eps", "steps", "accuracy", "low", "high", "band", "n", "seeds")
    rows: list[list[object]] = [[*header, "curve", "implied_eps"]]
    for curve in curves:
        for eps, point in zip(curve.eps, curve.points, strict=True):
            ends = (point.accuracy, low_end(point), high_end(point), band(point), point.n, point.seeds)
            rows.append(["measured", curve.label, repr(eps), steps if eps else 0, *ends, curve.label, ""])
    by_row = {curve.row: curve for curve in curves if curve.row is not None}
    for name, value in printed.items():
        own = by_row.get(name)
        at = None if own is None or own.implied is None else round(own.implied, 6)
        unknown: list[object] = [""] * 5
        rows.append(
            [
                "published",
                name,
                "",
                steps,
                value,
                *unknown,
                own.label if own else "",
                "" if at is None else repr(at),
            ]
        )
    return lines_of(rows)
