"""A protocol in words: what was asked, attack by attack, as one would say it."""

from __future__ import annotations

from collections.abc import Iterable

from bench.long import radius
from bench.record import ColumnRecord, Record

_SUCCESS = {
    "last": "The final iterate of an attack decides whether an image fell.",
    "any": "The worst iterate that an attack saw decides whether an image fell.",
}


def protocol(record: Record) -> list[str]:
    """Sentences on the whole of a run's protocol; its footnotes are remarks on the run."""
    asked = record.asked
    said = [
        f"{asked.samples} test images of {asked.dataset}, attacked under protocol {asked.protocol['name']}. "
        "An image that is misclassified clean counts as fallen and is not attacked."
    ]
    success = _SUCCESS.get(str(asked.protocol.get("success")))
    if success:
        said.append(success)
    if any(column.survivors for column in record.columns):
        said.append("Attacks run one after another, each on what those before it left standing.")
    if record.model.draws > 1:
        said.append(
            f"The model is random: an image counts by the share of {record.model.draws} fresh answers that are right."
        )
    said.append(
        "The headline is the worst case: an image holds only if it withstands every attack that is not a diagnostic."
    )
    said.append(f"Gradients were taken in {asked.precision}; the deployed model judged in fp32.")
    return said


def column(asked: ColumnRecord) -> str:
    """One column: its attack, radius, steps, starts, loss and what else it was given."""
    if asked.attack == "clean":
        return "images as they are"
    return ", ".join(_parts(asked))


def _parts(asked: ColumnRecord) -> Iterable[str]:
    yield asked.attack
    if asked.epsilon is not None:
        yield f"{asked.norm or 'norm not recorded'} ball of radius {radius(asked.epsilon)}"
    if asked.steps is not None:
        size = f" of {radius(asked.step_size)}" if asked.step_size is not None else ""
        yield f"{asked.steps} step{'s' if asked.steps != 1 else ''}{size}"
    if (asked.restarts or 1) > 1:
        yield f"{asked.restarts} starts"
    if asked.loss:
        yield f"ascending {asked.loss}"
    if (asked.eot or 1) > 1:
        yield f"gradient averaged over {asked.eot} passes"
    yield from (f"{name} {value}" for name, value in asked.settings.items())
    if asked.part_of:
        yield f"part of {asked.part_of}"
    if asked.survivors:
        yield "on what was left standing"
    if asked.diagnostic:
        yield "a diagnostic, no part of the worst case"
