"""Columns to the fewest attack programs that answer them, exactly.

- FGSM at many radii is one gradient: it is taken at the clean image, whatever the radius.
- PGD of any number of steps from one start is one trajectory, read at its milestones; so are multi-restart PGD's first
  run and, on a deterministic model, adaptive PGD with an expectation over one pass.
- Later restarts see only the images that are still standing.

Nothing is merged that is not the same computation. On a random model every pass differs, so there an expectation over
one pass is a program of its own too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.protocol import BOUND, EXPERT_ATTACKED, Column

#: the families whose passes are counted beforehand
OURS = ("clean", "fgsm", "pgd", "8-bit")


@dataclass(frozen=True)
class Program:
    """One attack program and the columns it answers, `first` standing for what they have in common."""

    name: str
    columns: tuple[Column, ...]

    @property
    def first(self) -> Column:
        """A column that has the family, loss, radius and step size of all."""
        return self.columns[0]

    @property
    def restarts(self) -> int:
        """The most starts that any column asks for."""
        return max(column.restarts for column in self.columns)

    def milestones(self, restart: int) -> list[int]:
        """The steps at which columns that ask for this restart are read, rising."""
        return sorted({column.steps for column in self.columns if column.restarts > restart})

    def gradients(self) -> tuple[int, int]:
        """Forward-backward passes per image: at least (it falls to the first start), and at most (it never falls).

        Fewer than that where PGD's iterates go round, which is not known beforehand.
        """
        if self.first.family == "fgsm":
            return self.first.eot, self.first.eot
        if self.first.family == "mixture":
            # how many runs there are the mixture's size decides; one is the least
            return 0, self.first.steps
        if self.first.family.startswith("transfer:"):
            return self.first.steps, self.first.steps
        if self.first.family == "pgd":
            runs = [max(self.milestones(restart)) * self.first.eot for restart in range(self.restarts)]
            return runs[0], sum(runs)
        return 0, 0

    def forwards(self) -> tuple[int, int]:
        """Forward passes per image that judge outcomes, likewise."""
        if self.first.family == "pgd":
            reads = [len(self.milestones(restart)) for restart in range(self.restarts)]
            return reads[0], sum(reads)
        return len(self.columns), len(self.columns)


def plan(columns: Sequence[Column], *, random: bool = False) -> list[Program]:
    """The programs that answer these columns, in the order in which the columns first ask for them.

    Args:
        columns: of one protocol.
        random: whether the model's output differs from call to call.
    """
    groups: dict[tuple[object, ...], list[Column]] = {}
    for column in columns:
        groups.setdefault(_computation(column, random), []).append(column)
    return [
        Program(
            group[-1].part_of or "+".join(dict.fromkeys(c.attack for c in group if c.part_of is None)),
            tuple(group),
        )
        for group in groups.values()
    ]


def _computation(column: Column, random: bool) -> tuple[object, ...]:
    """What two columns must share to be one program."""
    c = column
    if c.family == "fgsm":
        return (c.family, c.norm, c.loss, c.eot)
    if c.family == "pgd":
        own = (c.attack,) if random else ()
        return (c.family, c.norm, c.eps, c.step_size, c.loss, c.eot, c.random_start, *own)
    if c.family == "autoattack":
        # an ensemble's components run in turn, each on what the one before left standing
        return (c.family, c.part_of or c.name)
    if c.family == "mixture":
        # attacking each expert alone tells what that does to the mixture, to all experts, and to the one that was chosen
        return (c.family, "per-expert" if c.name in (BOUND, EXPERT_ATTACKED) else c.name)
    return (c.family, c.name)


def explain(programs: Sequence[Program], success: str) -> str:
    """The plan as a table: programs, the columns they answer, and passes per image."""
    lines = [
        f"{'program':24} {'gradients':>11} {'forwards':>9}  columns",
    ]
    low = high = asked = 0
    for program in programs:
        g, f = program.gradients(), program.forwards()
        if success == "any" and program.first.family == "pgd":
            g = (0, g[1])
        if program.first.family in OURS:
            low, high = low + g[0], high + g[1]
        asked += sum(
            c.steps * c.restarts * c.eot if c.family == "pgd" else c.eot
            for c in program.columns
            if c.family in ("fgsm", "pgd")
        )
        names = [column.name for column in program.columns]
        shown = ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]} ({len(names)})"
        family = program.first.family
        cost = f"{g[1]} a run" if family == "mixture" else _span(g) if family in OURS else "its own"
        lines.append(f"{program.name:24} {cost:>11} {_span(f):>9}  {shown}")
    lines.append(
        f"{'together':24} {_span((low, high)):>11} {'':>9}  per image; one by one they would be {asked}"
    )
    lines.append(
        "a misclassified image costs nothing; one on which PGD goes round in circles, the way until then"
    )
    lines.append(
        f"success: {success} ({'the final iterate decides' if success == 'last' else 'the worst iterate decides; broken images leave at once'})"
    )
    return "\n".join(lines)


def _span(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}…{values[1]}"
