"""The harness against other libraries: same model, same images, same machine, in turn, in one run.

    python tests/perf/peers.py                                  # networks trained here, on digits
    python tests/perf/peers.py --only dwf-paper pgd first --models at --samples 1024 --peer-samples 128 \\
        --at pgd_at dataset=npz:DIR checkpoint=AT.pt width=16 eps=8/255
    python tests/perf/peers.py --only dwf-paper --models plain --plain resnet20 dataset=npz:DIR checkpoint=W.pt eps=8/255

| section    | what                                                                                            |
|------------|-------------------------------------------------------------------------------------------------|
| dwf-paper  | the protocol: attack by attack through each library, and as one merged plan                     |
| pgd        | PGD-100 with five starts at the radius, as each library does it; ours leaves what is broken      |
| first      | seconds until `standard`, attack after attack, has left no more images than the fastest peer's `pgd` |
| autoattack | the authors' AutoAttack on the plain model, and the same on the copy that gradients come from   |
| overhead   | what of an evaluation's wall time is neither a forward nor a backward pass of the model         |
| experts    | nine experts beside one: `experts_speed.py`                                                     |

| model | what                                    | target of `dwf-paper` (fp32, bf16) against the fastest peer |
|-------|-----------------------------------------|--------------------------------------------------------------|
| at    | adversarially trained, RA about 50 %    | 3.2, 6.5                                                     |
| plain | undefended, RA about 0                  | 4, 9; where any iterate decides 50                           |
| dwf   | DWF with nine experts                   | none                                                         |

Peers are timed on the first `--peer-samples` images, and so are we in every ratio; columns in bf16 are compared with ours
in fp32 on all `--samples`. The last table says which targets were reached; one that was missed is an exit code of 1.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peers_attacks import PEERS, Peer, installed, version
from peers_contest import Clock, Ours, Result, Subject, in_turn, one_by_one, standing, subject
from torch import Tensor

from bench import protocol as protocols
from bench.arithmetic import arithmetic_of
from bench.errors import BenchError
from bench.fast import fast
from bench.outcome import Outcome
from bench.plan import plan
from bench.protocol import Column, Protocol

MODELS = {
    # radii chosen so that RA is about 50 %, and about 0
    "at": ["pgd_at", "eps=0.17"],
    "plain": ["resnet18", "eps=0.25"],
    "dwf": ["dwf"],
}
#: how many times faster than the fastest peer, by model, precision and the iterate that decides
DWF_PAPER = {
    ("at", "fp32", "last"): 3.2,
    ("at", "bf16", "last"): 6.5,
    ("plain", "fp32", "last"): 4.0,
    ("plain", "bf16", "last"): 9.0,
    ("plain", "fp32", "any"): 50.0,
    ("plain", "bf16", "any"): 50.0,
}
PGD, FIRST, AUTOATTACK, OVERHEAD = 4.5, 15.0, 1.5, 3.0
#: points by which accuracies may differ, on at least so many images
FP32_WITHIN, BF16_WITHIN, ABOVE, ENOUGH = 0.5, 0.3, 0.1, 1000


@dataclass
class Verdict:
    """A target, and what was found; `met` is None where too few images were asked to say."""

    where: str
    what: str
    found: str
    target: str
    met: bool | None


@dataclass
class Report:
    """What was asked, and what was found so far."""

    args: argparse.Namespace
    peers: dict[str, type[Peer]]
    verdicts: list[Verdict] = field(default_factory=list)
    pgd: dict[str, dict[str, Result]] = field(default_factory=dict)
    """results of PGD-100×5 by model, for `first`"""

    def judge(self, where: str, what: str, found: str, target: str, met: bool | None) -> None:
        self.verdicts.append(Verdict(where, what, found, target, met))

    def faster(self, where: str, what: str, ratio: float, target: float | None) -> None:
        if target is not None:
            self.judge(where, what, f"{ratio:.2f}×", f"≥ {target:g}×", ratio >= target)

    def contestants(self, on: Subject, columns: Sequence[Column]) -> dict[str, object]:
        return {
            name: one_by_one(kind, on, columns, self.args.batch_size) for name, kind in self.peers.items()
        }

    def fastest(self, results: dict[str, Result]) -> str:
        """The fastest peer's name."""
        return min(self.peers, key=lambda name: results[name].seconds)


def ours_name(precision: str, success: str) -> str:
    return f"ours {precision} {success}"


def speeds(report: Report, results: dict[str, Result], column: str | None = None) -> str:
    """Prints seconds and ratios, with the accuracy of a column where one is named; the fastest peer's name."""
    fastest = report.fastest(results)
    print("a set-up of ours takes " + ", ".join(f"{r.setup:.2f} s" for r in results.values() if r.setup))
    print(
        f"{'':16} {'ms an image':>12} {'decides':>8} {'times ' + fastest:>20}"
        + ("      RA" if column else "")
    )
    for name, result in results.items():
        decides = report.peers[name].success if name in report.peers else name.split()[-1]
        ratio = results[fastest].seconds / result.seconds
        shown = f" {result.accuracy(column):7.2f}" if column else ""
        print(f"{name:16} {1e3 * result.seconds:12.2f} {decides:>8} {ratio:20.2f}{shown}")
    return fastest


def dwf_paper(report: Report, on: Subject) -> None:
    """The paper's protocol, attack by attack and merged."""
    args, columns = report.args, protocols.load("dwf-paper").columns(on.eps)
    contestants = report.contestants(on, columns)
    for success in ("last", "any"):
        for precision in args.precision:
            contestants[ours_name(precision, success)] = Ours(on, columns, success, precision)
    batches = on.batches(args.batch_size, args.peer_samples)
    results = in_turn(contestants, batches, args.rounds, len(on.split))
    print(f"{'column':12} " + " ".join(f"{name:>14}" for name in results))
    for column in columns:
        print(f"{column.name:12} " + " ".join(f"{r.accuracy(column.name):14.2f}" for r in results.values()))
    fastest = speeds(report, results)
    for precision in args.precision:
        for success in ("last", "any"):
            name = ours_name(precision, success)
            ratio = results[fastest].seconds / results[name].seconds
            target = DWF_PAPER.get((on.label, precision, success))
            report.faster(f"dwf-paper, {on.label}", f"{name} against {fastest}", ratio, target)
    agreement(report, on, columns, results, contestants)


def agreement(
    report: Report,
    on: Subject,
    columns: Sequence[Column],
    results: dict[str, Result],
    contestants: dict[str, object],
) -> None:
    """Whether the accuracies are the same: ours and the peers' where the final iterate decides, and ours in bf16."""
    where = f"dwf-paper, {on.label}"
    plain, half = (ours_name(precision, "last") for precision in ("fp32", "bf16"))
    single = [column.name for column in columns if column.attack in ("clean", "fgsm")]
    for name, kind in report.peers.items() if plain in results else ():
        n, what = len(results[name].robust["clean"]), f"{plain} and {name}"
        unequal = sum(int((results[plain].robust[c] != results[name].robust[c]).sum()) for c in single)
        report.judge(where, f"{what}: FGSM", f"{unequal} of {n * len(single)} differ", "none", unequal == 0)
        if kind.success == "last":
            apart = results[plain].difference(results[name])
            met = apart <= FP32_WITHIN if n >= ENOUGH else None
            report.judge(where, f"{what}, n = {n}", f"{apart:.2f} points", f"≤ {FP32_WITHIN}", met)
    if plain not in results or half not in results:
        return
    rest = on.batches(report.args.batch_size, start=len(results[plain].robust["clean"]))
    pair = {name: results[name] for name in (plain, half)}
    if rest:
        more = in_turn({name: contestants[name] for name in pair}, rest, 1, len(on.split))
        pair = {
            name: Result({c: np.r_[r.robust[c], more[name].robust[c]] for c in r.robust}, r.seconds)
            for name, r in pair.items()
        }
    n, apart = len(on.split), pair[half].difference(pair[plain])
    met = apart <= BF16_WITHIN if n >= ENOUGH else None
    report.judge(where, f"{half} and {plain}, n = {n}", f"{apart:.2f} points", f"≤ {BF16_WITHIN}", met)


def pgd_columns(eps: float) -> list[Column]:
    asked = [{"attack": "pgd", "steps": 100, "restarts": 5, "step_size": "eps/4"}]
    return Protocol.model_validate({"name": "pgd", "column": asked}).columns(eps)


def pgd(report: Report, on: Subject) -> None:
    """PGD-100 with five starts: as each peer does it, and ours, where the worst iterate decides."""
    args, columns = report.args, pgd_columns(on.eps)
    attack = columns[-1]
    contestants = report.contestants(on, [attack])
    for precision in args.precision:
        contestants[ours_name(precision, "any")] = Ours(on, columns, "any", precision)
    batches = on.batches(args.batch_size, args.peer_samples)
    results = report.pgd[on.label] = in_turn(contestants, batches, args.rounds, len(on.split))
    fastest = speeds(report, results, attack.name)
    for precision in args.precision:
        name = ours_name(precision, "any")
        ratio = results[fastest].seconds / results[name].seconds
        above = results[name].accuracy(attack.name) - results[fastest].accuracy(attack.name)
        if on.label == "at":
            report.judge(
                f"pgd, {on.label}",
                f"{name} against {fastest}",
                f"{ratio:.2f}×, RA {above:+.2f}",
                f"≥ {PGD:g}×, RA ≤ +{ABOVE}",
                ratio >= PGD and above <= ABOVE,
            )


class Reached(BaseException):
    """Few enough images stand; no Exception, as those are an attack's failure."""


class Countdown:
    """Follows which images stand, as each answer is entered; raises `Reached` when `level` of them are left.

    `left` are dataset positions, bool `(n,)`; `index` those of the batch that is attacked.
    """

    def __init__(self, left: np.ndarray, level: int) -> None:
        self.left, self.level, self.index = left, level, np.arange(len(left))

    def __enter__(self) -> Countdown:
        self._settle = settle = Outcome.settle

        def watched(outcome: Outcome, rows: Tensor, prediction: Tensor, y: Tensor, *where: int, **how: bool):
            settle(outcome, rows, prediction, y, *where, **how)
            self.left[self.index[rows[prediction != y].cpu().numpy()]] = False
            if self.left.sum() <= self.level:
                raise Reached

        Outcome.settle = watched
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> bool:
        Outcome.settle = self._settle
        return kind is Reached


def first(report: Report, on: Subject) -> None:
    """Seconds until no more images stand in `standard` than the fastest peer's PGD-100×5 leaves at its end.

    Each attack of the protocol sees all that stands before the next begins. The set-up counts.
    """
    args = report.args
    attack = pgd_columns(on.eps)[-1]
    if on.label not in report.pgd:
        batches = on.batches(args.batch_size, args.peer_samples)
        report.pgd[on.label] = in_turn(report.contestants(on, [attack]), batches, args.rounds, len(on.split))
    results = report.pgd[on.label]
    fastest = report.fastest(results)
    robust = results[fastest].robust[attack.name]
    n, level, theirs = len(robust), int(robust.sum()), len(robust) * results[fastest].seconds
    asked = protocols.load("standard").columns(on.eps, classes=on.classes)
    print(f"{fastest}: {level} of {n} images stand after {theirs:.1f} s")
    for precision in args.precision:
        taken = []
        for _ in range(args.rounds):
            with Clock(on.device) as clock, Countdown(on.clean[:n].copy(), level) as countdown:
                evaluator = Ours(on, asked, "any", precision).evaluator
                clean, *attacks = plan(asked)
                for program in attacks:
                    stands = countdown.left.nonzero()[0]
                    for start in range(0, len(stands), args.first_batch_size):
                        countdown.index = stands[start : start + args.first_batch_size]
                        evaluator.run([clean, program], countdown.index)
            taken.append(clock.seconds)
        stand, ratio = int(countdown.left.sum()), theirs / min(taken)
        print(f"ours {precision}: {stand} of {n} images stand after {min(taken):.1f} s ({program.name})")
        if on.label == "at":
            found = f"{ratio:.2f}×" if stand <= level else f"not reached: {stand} > {level}"
            met = stand <= level and ratio >= FIRST
            report.judge(
                f"first, {on.label}", f"ours {precision} against {fastest}", found, f"≥ {FIRST:g}×", met
            )


def autoattack(report: Report, on: Subject) -> None:
    """AutoAttack standard by its authors' code, on the plain model and on the copy that gradients come from."""
    from pyautoattack import AutoAttack

    args = report.args
    x, y = on.batch(np.arange(min(8, len(on.split))))
    model = copy.deepcopy(on.model).requires_grad_(False)
    models = {"plain": on.model} | {p: fast(model, x, y, p).model for p in args.precision}

    def attack(attacked):
        def work(index):
            x, y = on.batch(index)
            with Clock(on.device) as clock:
                ensemble = AutoAttack(attacked, eps=on.eps, norm="Linf", seed=0, device=on.device)
                with arithmetic_of(attacked):
                    x_adv, _ = ensemble.run_standard_evaluation(x, y, batch_size=args.batch_size)
            right = standing(on.model, x_adv, y).cpu().numpy() & on.clean[index]
            return {"autoattack": right}, clock.seconds

        return work

    n = min(args.autoattack_samples, len(on.split))
    results = in_turn({name: attack(m) for name, m in models.items()}, [np.arange(n)], args.rounds, n)
    print(f"{'':16} {'s an image':>12} {'times plain':>12} {'RA':>8}   n = {n}")
    plain = results["plain"]
    for name, result in results.items():
        ratio, accuracy = plain.seconds / result.seconds, result.accuracy("autoattack")
        print(f"{name:16} {result.seconds:12.3f} {ratio:12.2f} {accuracy:8.2f}")
        if name == "fp32":
            same = accuracy == plain.accuracy("autoattack")
            found = f"{ratio:.2f}×, RA {'the same' if same else 'differs'}"
            target = f"≥ {AUTOATTACK:g}×, the same RA"
            report.judge(f"autoattack, {on.label}", "fp32 copy", found, target, same and ratio >= AUTOATTACK)


class Timed:
    """A model whose forward passes are timed."""

    def __init__(self, model, clock: Clock) -> None:
        self._model, self._clock = model, clock

    def __call__(self, x: Tensor) -> Tensor:
        with self._clock:
            return self._model(x)

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


def overhead(report: Report, on: Subject) -> None:
    """The share of `Evaluator.run` outside the model's passes, on one batch after a warm one."""
    args, work = report.args, {"dwf-paper": "last", "pgd": "any"}
    print(f"{'':24} {'seconds':>9} {'judging':>9} {'forward':>9} {'backward':>9} {'the rest':>9}   %")
    for name, success in work.items():
        columns = pgd_columns(on.eps) if name == "pgd" else protocols.load(name).columns(on.eps)
        for precision in args.precision:
            ours = Ours(on, columns, success, precision)
            ours(np.arange(min(8, len(on.split))))
            judging, forward, backward = (Clock(on.device) for _ in range(3))
            evaluator, grad = ours.evaluator, torch.autograd.grad
            evaluator.model = Timed(evaluator.model, judging)
            evaluator.attacked = Timed(evaluator.attacked, forward)
            evaluator.gradient_model = Timed(evaluator.gradient_model, forward)

            def timed(*given, grad=grad, clock=backward, **named):
                with clock:
                    return grad(*given, **named)

            torch.autograd.grad = timed
            try:
                _, seconds = ours(np.arange(min(args.batch_size, len(on.split))))
            finally:
                torch.autograd.grad = grad
            parts = [clock.seconds for clock in (judging, forward, backward)]
            shares = [100 * part / seconds for part in (*parts, seconds - sum(parts))]
            what = f"{name}, {ours_name(precision, success)}"
            print(f"{what:24} {seconds:9.1f} " + " ".join(f"{share:9.2f}" for share in shares))
            found, met = f"{shares[-1]:.2f} %", shares[-1] <= OVERHEAD
            report.judge(f"overhead, {on.label}", what, found, f"≤ {OVERHEAD:g} %", met)


def experts(report: Report) -> None:
    """Nine experts beside one, in a process of its own."""
    script = Path(__file__).with_name("experts_speed.py")
    words = ["--device", report.args.device, "--rounds", str(max(3, report.args.rounds))]
    done = subprocess.run([sys.executable, str(script), *words])
    report.judge("experts", "see above", "", "≥ 0.95", done.returncode == 0)


SECTIONS = {
    "dwf-paper": dwf_paper,
    "pgd": pgd,
    "first": first,
    "autoattack": autoattack,
    "overhead": overhead,
}
AGAINST_PEERS = {"dwf-paper", "pgd", "first"}


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, "experts"], default=[*SECTIONS, "experts"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    for label, words in MODELS.items():
        shown = (
            f"such as `pgd_at dataset=npz:DIR checkpoint=W.pt width=16 eps=8/255`; default: {' '.join(words)}"
        )
        parser.add_argument(f"--{label}", nargs="+", default=words, metavar="WORD", help=shown)
    parser.add_argument("--samples", type=int, default=256, help="images; 1,000 for bf16 to be compared")
    parser.add_argument(
        "--peer-samples", type=int, help="of them for peers, and for every ratio; default: all"
    )
    parser.add_argument("--autoattack-samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128, help="of peers and ours")
    parser.add_argument("--first-batch-size", type=int, default=1024, help="of ours in `first`")
    parser.add_argument("--rounds", type=int, default=1, help="the fastest of so many counts, for each batch")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "tf32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--results", default=".perf", help="where networks are kept once they are trained")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    found, missing = installed(args.peers)
    report = Report(args, found)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.device}, batch {args.batch_size}"
    )
    for name, kind in found.items():
        print(f"{name} {version(kind)}")
    for name, why in missing.items():
        print(f"{name}: not installed: {why}")
    if not found and AGAINST_PEERS & set(args.only):
        print("no peer is installed; `pip install 'dwf-bench[peers]'`, or `tox -e peers`")
        return 2
    for label in args.models if set(args.only) - {"experts"} else ():
        words = getattr(args, label)
        try:
            on = subject(label, words, samples=args.samples, device=args.device, results=args.results)
        except BenchError as error:
            print(f"--{label} {' '.join(words)}: {error}")
            return error.exit_code
        for section, run in SECTIONS.items():
            if section in args.only:
                n = f"{len(on.split)} images, {100 * on.clean.mean():.1f} % of them classified rightly"
                print(f"\n## {section}: {label}: {on.about}, {n}", flush=True)
                run(report, on)
    if "experts" in args.only:
        print("\n## experts", flush=True)
        experts(report)
    print(f"\n{'section, model':20} {'what':44} {'found':24} {'target':20}")
    says = {True: "reached", False: "missed", None: "too few images to say"}
    for v in report.verdicts:
        print(f"{v.where:20} {v.what:44} {v.found:24} {v.target:20} {says[v.met]}")
    return int(any(v.met is False for v in report.verdicts))


if __name__ == "__main__":
    sys.exit(main())
