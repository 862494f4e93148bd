"""The merged plan of `dwf-paper` against the same attacks run one by one through torchattacks.

    python tests/perf/plan_speed.py                                     # digits, a network with RA of about 50 %
    python tests/perf/plan_speed.py --dataset npz:DIR --defense resnet20 --checkpoint W.pt --eps 0.002 --samples 512

Same model, same images, same semantics (the final iterate decides), same threads, in one process. Targets: at least 3
times faster where RA is about 50 %, every column within 0.5 points, FGSM columns equal image by image.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench import pipeline, weights
from bench import protocol as protocols
from bench.data import Split
from bench.evaluate import Evaluator
from bench.plan import plan

TARGET, WITHIN = 3.0, 0.5


def one_by_one(model, x, y, columns, batch_size):
    """What a user of torchattacks writes: each attack on all images, in batches; robustness and seconds."""
    import torchattacks

    outcomes, started = {}, time.perf_counter()
    for column in columns:
        if column.attack == "clean":
            attack = None
        elif column.attack == "fgsm":
            attack = torchattacks.FGSM(model, eps=column.eps)
        elif column.attack == "a-pgd":
            attack = torchattacks.EOTPGD(
                model, eps=column.eps, alpha=column.step_size, steps=column.steps, eot_iter=1
            )
        else:
            single = [
                torchattacks.PGD(model, eps=column.eps, alpha=column.step_size, steps=column.steps)
                for _ in range(column.restarts)
            ]
            attack = single[0] if len(single) == 1 else torchattacks.MultiAttack(single)
        robust = []
        for start in range(0, len(x), batch_size):
            images, labels = x[start : start + batch_size], y[start : start + batch_size]
            adversarial = images if attack is None else attack(images, labels)
            with torch.no_grad():
                # both sides count an image that is misclassified as it is as broken
                robust.append((model(adversarial).argmax(1) == labels) & (model(images).argmax(1) == labels))
        outcomes[column.name] = torch.cat(robust).cpu().numpy()
    return outcomes, time.perf_counter() - started


def merged(model, split, columns, classes, batch_size, precision):
    started = time.perf_counter()
    evaluator = Evaluator(model, classes=classes, split=split, seed=0, success="last", precision=precision)
    programs = plan(columns)
    batches = [
        evaluator.run(programs, np.arange(start, min(start + batch_size, len(split))))
        for start in range(0, len(split), batch_size)
    ]
    outcomes = {
        c.name: np.concatenate([b.outcomes[c.name].robust.cpu().numpy() for b in batches]) for c in columns
    }
    return outcomes, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--defense", default="pgd_at")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--checkpoint")
    parser.add_argument("--eps", default="0.17", help="chosen so that RA is about 50 %%")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--results", default=".perf", help="where the network is kept once it is trained")
    args = parser.parse_args()

    session = pipeline.prepare(
        args.defense,
        args.dataset,
        checkpoint=args.checkpoint,
        eps=args.eps,
        results=Path(args.results),
        precision=args.precision,
    )
    data = session.data
    model = weights.weigh(session, session.jobs[0], 0).model.eval().requires_grad_(False)
    split = data.test
    if len(split) < args.samples and args.checkpoint is None:
        # the speed of an attack does not care whether an image was learnt from
        split = Split(
            np.concatenate([split.images, data.train.images]),
            np.concatenate([split.labels, data.train.labels]),
        )
    split = split.take(np.arange(min(args.samples, len(split))))
    protocol = protocols.load("dwf-paper")
    columns = protocol.columns(protocol.radius(data.eps, session.eps))
    x, y = split.batch(slice(None))

    theirs, ours, their_seconds, our_seconds = [], [], [], []
    for _ in range(args.rounds):
        outcomes, seconds = one_by_one(model, x, y, columns, args.batch_size)
        theirs.append(outcomes)
        their_seconds.append(seconds)
        outcomes, seconds = merged(model, split, columns, len(data.classes), args.batch_size, args.precision)
        ours.append(outcomes)
        our_seconds.append(seconds)

    worst, unequal = 0.0, 0
    print(
        f"{args.defense} on {data.name}, eps {args.eps}, n = {len(split)}, batch {args.batch_size}, {torch.get_num_threads()} threads"
    )
    print(f"{'column':12} {'ours':>7} {'torchattacks':>13}")
    for column in columns:
        a, b = (100 * found[0][column.name].mean() for found in (ours, theirs))
        worst = max(worst, abs(a - b))
        if column.attack in ("clean", "fgsm"):
            unequal += int((ours[0][column.name] != theirs[0][column.name]).sum())
        print(f"{column.name:12} {a:7.2f} {b:13.2f}")
    ratio = min(their_seconds) / min(our_seconds)
    print(
        f"one by one {min(their_seconds):.1f} s, merged {min(our_seconds):.1f} s: {ratio:.2f} times faster (target {TARGET})"
    )
    print(
        f"largest difference {worst:.2f} points (target {WITHIN}); FGSM images that differ: {unequal} (target 0)"
    )
    sys.exit(ratio < TARGET or worst > WITHIN or unequal > 0)


if __name__ == "__main__":
    main()
