"""What a random model is worth: the mean over images of the probability of a right answer.

To call an image broken as soon as one draw errs would charge the model with its own noise: one that nobody can attack but
that errs in a tenth of its draws would lose ten points and more. So every attack ends with one image; which of its
candidates that is, some draws decide; and what it is worth, fresh draws say, on which nothing was selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.attacks.gradient import naming
from bench.judge import Judge
from bench.outcome import Outcome
from bench.protocol import Column
from bench.threat import ThreatModel, threat_model
from bench.trial import Trial
from bench.types import Images, Labels

#: fresh draws by which an image is scored
DRAWS = 100
#: draws by which an attack chooses among its candidates
SELECTING = 20


def share(
    judge: Judge, x_adv: Images, x: Images, y: Labels, threat: ThreatModel | None, draws: int
) -> tuple[Tensor, Tensor]:
    """The share of new draws in which the answer is right, float `(b,)`, and the last wrong answer, or the label."""
    right, answer = torch.zeros(len(x), device=x.device), y.clone()
    for _ in range(draws):
        prediction = judge(x_adv, x, threat)
        right += prediction == y
        answer = torch.where(prediction == y, answer, prediction)
    return right / draws, answer


def score(judge: Judge, x_adv: Images, x: Images, y: Labels, threat: ThreatModel | None) -> Outcome:
    """The outcome of these images; for clean ones without a threat model."""
    selected, _ = share(judge, x_adv, x, y, threat, SELECTING)
    fresh, answer = share(judge, x_adv, x, y, threat, DRAWS)
    outcome = Outcome.of(answer, fresh == 1)
    outcome.share, outcome.selected = fresh, selected
    return outcome


class RandomTrial(Trial):
    """A program on a batch for a random model: no image leaves early, and every column ends with one image to be scored."""

    leaves = False

    def run(self) -> None:
        """Runs the program and scores what it found."""
        scored = [column for column in self.program.columns if not column.diagnostic]
        # the clean image is a candidate: no attack need do harm
        self.candidates = {column.name: self.x.clone() for column in scored}
        first, _ = share(self.judge, self.x, self.x, self.y, None, SELECTING)
        self.chosen_by = {column.name: first.clone() for column in scored}
        super().run()
        for column in scored:
            self._score(column)

    def samples(self, eot: int) -> int:
        """Passes per gradient: one where the model tells its expectation exactly."""
        return 1 if hasattr(self.attacked, "expected_log_probabilities") else eot

    def enter(
        self,
        columns: list[Column] | tuple[Column, ...],
        rows: Tensor,
        x_adv: Images,
        prediction: Tensor,
        restart: int,
        step: int,
        *,
        only_broken: bool = False,
    ) -> None:
        """Makes these images the columns' candidates wherever they are right in fewer draws than those so far."""
        with naming(rows):
            threat = threat_model(columns[0].norm, columns[0].eps)
            found, _ = share(self.judge, x_adv, self.x[rows], self.y[rows], threat, SELECTING)
        for column in columns:
            best = self.chosen_by[column.name]
            better = found < best[rows]
            best[rows[better]] = found[better]
            self.candidates[column.name][rows[better]] = x_adv[better]
            outcome = self.outcomes[column.name]
            outcome.restart[rows[better]] = restart
            outcome.step[rows[better]] = step

    def _score(self, column: Column) -> None:
        threat = threat_model(column.norm, column.eps)
        x_adv, outcome = self.candidates[column.name], self.outcomes[column.name]
        outcome.share, answer = share(self.judge, x_adv, self.x, self.y, threat, DRAWS)
        outcome.selected = self.chosen_by[column.name]
        outcome.robust = outcome.share == 1
        outcome.prediction = answer
        outcome.restart[outcome.robust] = outcome.step[outcome.robust] = -1
        if self.found is not None and column.eps == self.radius:
            everyone = torch.arange(len(self.x), device=self.x.device)
            self.found.keep(everyone, x_adv, outcome.selected < 0.5)
