"""The audit of a run: what its outcomes say, and what further cheap attacks on a sample of its images find.

run → outcome checks (free) → gradient checks → probes, as far as their budget goes → findings
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.arithmetic import exact_arithmetic
from bench.audit.gradients import gradient_checks, saturation
from bench.audit.outcomes import Outcomes, outcome_findings
from bench.audit.probes import probe
from bench.finding import Finding, merged, verdict
from bench.judge import Cost, Judge, seeded
from bench.record import Audited, Record
from bench.rng import Rng
from bench.threat import threat_model

if TYPE_CHECKING:
    from bench.evaluate import Evaluator

#: the share of the passes that a run's outcomes stand for that looking for doubts may cost
SHARE = 0.15
#: what a gradient costs in forward passes
GRADIENT = 3
#: how the programs begin that may stop asking for gradients
PGD = "pgd"
#: the most images that are looked at
IMAGES = 128
#: the forward passes that the gradient checks take for an image: 8 directions, two step sizes, both sides, in float64
DIRECTIONS = 8
PER_IMAGE = 2 * 4 * DIRECTIONS + 4 * GRADIENT


def stood_for(record: Record, seen: Outcomes) -> int:
    """Forward passes that the outcomes stand for, a gradient counting three.

    They are those that were taken, and those that PGD knew the end of, since its iterates went round. The second count too: a
    masked model is one whose iterates soon settle, and it is not to be looked at less for that.
    """
    columns = {column.name: column for column in record.columns}
    total = 0
    for program in record.programs:
        whole = [
            int(seen.robust[column.name].sum())
            * (column.steps or 0)
            * (column.restarts or 1)
            * (column.eot or 1)
            for column in map(columns.__getitem__, program.columns)
            if program.name.startswith(PGD)
        ]
        total += GRADIENT * max([program.gradients, *whole]) + program.forwards
    return total


def audit(evaluator: Evaluator, record: Record, outcomes: bytes) -> Record:
    """The record with what speaks against it, its verdict, and what looking for that cost.

    Args:
        evaluator: with the model that was attacked.
        record: of the run that has just ended; findings it has already are kept.
        outcomes: its outcomes.parquet.
    """
    began = time.perf_counter()
    file = pq.ParquetFile(pa.BufferReader(outcomes), pre_buffer=False)
    seen = Outcomes.read(file.read(use_threads=False).to_pandas(), record)
    spent = stood_for(record, seen)
    # a tenth is kept back: judging what a step seems to have broken comes on top of what a probe states
    budget = int(0.9 * SHARE * spent)
    found: list[Finding] = []
    cost, zero_loss = Cost(), 0.0
    right = seen.robust.index[seen.right].to_numpy()
    # any of them: a model must not know which images will be looked at
    right = np.sort(right[Rng(evaluator.seed, "audit").permutation(len(right)).numpy()[:IMAGES]])
    with exact_arithmetic(), seeded((evaluator.seed, "audit"), 0, evaluator.device):
        if len(right):
            x, y = evaluator.split.batch(right, evaluator.device)
            # a quarter of the budget, and no more images than tell one in a hundred from none
            some = slice(0, min(64, budget // 4 // PER_IMAGE))
            if some.stop:
                found += gradient_checks(
                    evaluator.attacked,
                    x[some],
                    y[some],
                    black_box=seen.black_box,
                    adaptive=evaluator.mixture is not None,
                    directions=DIRECTIONS,
                )
                cost.forwards += PER_IMAGE * len(x[some])
            if len(x) <= budget // 4:
                logits = Judge(evaluator.attacked, evaluator.classes, cost).logits(x, x, None)
                _, zero_loss = saturation(logits, y)
            # where nothing is left standing there is nothing to doubt
            radius = seen.claimed or seen.eps
            probed, more = probe(
                evaluator.model,
                evaluator.gradient_model,
                x,
                y,
                threat=threat_model(seen.norm, radius),
                outcomes=seen.at(right),
                classes=evaluator.classes,
                random=evaluator.random,
                seed=evaluator.seed,
                budget=max(0, budget - cost.forwards),
            )
            if radius != seen.eps:
                probed = [
                    one.model_copy(update={"evidence": f"{one.evidence} (at radius {radius:.4g})"})
                    for one in probed
                ]
            found += probed
            cost.gradients += more.gradients
            cost.forwards += more.forwards
    seen = seen.with_zero_loss(zero_loss)
    doubts = merged([*record.findings, *outcome_findings(seen), *found])
    audited = Audited(
        images=len(right),
        gradients=cost.gradients,
        forwards=cost.forwards,
        seconds=round(time.perf_counter() - began, 3),
        share=round((GRADIENT * cost.gradients + cost.forwards) / max(1, spent), 4),
    )
    return record.model_copy(
        update={"findings": doubts, "verdict": verdict(doubts), "audited": audited, "model": seen.facts}
    )
