"""Writes docs/checks.md from the checks themselves: `python tests/checks_doc.py`; a test says when it is out of date."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.audit.check import Check

FILE = Path(__file__).parent.parent / "docs" / "checks.md"

#: where checks are, what they look at, and how
SECTIONS = {
    "bench.audit.contract": (
        "The model contract",
        "Asked of a model before any attack, in seconds; `bench check MODEL` asks nothing else.",
    ),
    "bench.audit.gradients": (
        "Gradients",
        "Asked of a sample of correctly classified images, with central differences.",
    ),
    "bench.audit.outcomes": (
        "Outcomes",
        "Read off what became of every image in every column; costs nothing. *Beyond chance* is an exact one-sided test at "
        "1 %: binomial for a share, McNemar's for a pair of columns.",
    ),
    "bench.audit.probes": (
        "Probes",
        "Further attacks on a sample of the images, within a budget of the run's own cost, at the protocol's radius; where nothing is "
        "left there, at the next smaller one at which PGD leaves more than chance. *Beyond chance* is the exact "
        "one-sided binomial test at 2 %, against what the check allows.",
    ),
    "bench.lint": ("Tables", "Asked of anybody's table of accuracies by `bench lint`; no model is needed."),
}

CARLINI = "Carlini et al. 2019"
ATHALYE = "Athalye et al. 2018"
TRAMER = "Tramèr et al. 2020"
PINTOR = "Pintor et al. 2022"
CROCE = "Croce and Hein 2020"
OURS = "ours"

PAPERS = {
    ATHALYE: "Obfuscated Gradients Give a False Sense of Security, arXiv 1802.00420",
    CARLINI: "On Evaluating Adversarial Robustness, arXiv 1902.06705",
    TRAMER: "On Adaptive Attacks to Adversarial Example Defenses, arXiv 2002.08347",
    CROCE: "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, arXiv 2003.01690",
    PINTOR: "Indicators of Attack Failure, arXiv 2106.09947",
}

#: what a rule asks for, and whose it is
RULES = {
    "M1": ("evaluation mode, kept", OURS),
    "M2": ("pixels in, one float logit per class out", OURS),
    "M3": ("pixels in [0,1]", OURS),
    "M4": ("the accuracy that was stated or published", OURS),
    "M5": ("logits, not probabilities", CROCE),
    "M6": ("randomness is known", f"{CROCE}; {ATHALYE}"),
    "M7": ("no state", OURS),
    "M8": ("every image for itself", OURS),
    "M9": ("no optimisation at test time unseen", f"{CROCE}; {TRAMER}"),
    "M10": ("pixels, not memory", OURS),
    "M11": ("finite everywhere", OURS),
    "M12": ("the gradient is the function's own", f"{ATHALYE}; {TRAMER}"),
    "M13": ("the gradient is there", f"{PINTOR}; {CROCE}"),
    "M14": ("no plateaus", ATHALYE),
    "M15": ("reduced precision attacks no worse", "ours"),
    "M16": ("enough classes", CROCE),
    "A1": ("the loss moves", CARLINI),
    "A2": ("optimisation is complete", PINTOR),
    "A4": ("the landscape is stable", PINTOR),
    "A5": ("many steps beat one", f"{ATHALYE}; {CARLINI}"),
    "A6": ("twice the effort changes nothing", CARLINI),
    "A7": ("a larger ball breaks more", CARLINI),
    "A8": ("an unbounded attack always succeeds", f"{ATHALYE}; {CARLINI}; {PINTOR}"),
    "A9": ("knowing beats guessing", f"{ATHALYE}; {CARLINI}; {CROCE}"),
    "A10": ("a search without gradients finds nothing more", CARLINI),
    "A11": ("losses agree", f"{CROCE}; {TRAMER}"),
    "A12": ("settings can work", CARLINI),
    "A14": ("enough samples per gradient", f"{ATHALYE}; {CARLINI}"),
    "A16": ("targeted attacks as well", f"{CARLINI}; {CROCE}"),
    "V5": ("stored images count", OURS),
    "R1": ("scored by fresh draws", OURS),
    "S1": ("the worst case per image", f"{CARLINI}; {CROCE}"),
    "S2": ("enough images", OURS),
    "S4": ("enough seeds", OURS),
    "S5": ("like with like", OURS),
    "S6": ("no average over attacks", CARLINI),
    "S7": ("a table does not contradict itself", CARLINI),
    "S8": ("better than guessing", OURS),
    "S9": ("not fitted to one step", f"{ATHALYE}; {TRAMER}"),
    "E1": ("the gate is attacked as well", TRAMER),
    "E3": ("every way round the gate", TRAMER),
    "E4": ("a mixture errs where an expert errs", OURS),
}  # fmt: skip

HEAD = """# What is checked

What may speak against believing a robust accuracy, check by check. `bench run` ends with these, `bench audit RUN` shows what
they found. A finding **blocks** (no number is printed), **warns** (the number carries a mark) or **informs**; the severity in
the table is the usual one, and the text says where another applies. Several checks may share a code: they are ways to see one
fault. A threshold that is a share is of the images that the check looks at.

This page is made from the checks themselves by `python tests/checks_doc.py`.
"""


def page(sections: dict[str, Sequence[Check]]) -> str:
    """The whole page; by section, the checks in it."""
    parts = [HEAD]
    for name, checks in sections.items():
        title, about = SECTIONS[name]
        parts += [f"## {title}\n", f"{about}\n", table(checks)]
    used = {check.rule for checks in sections.values() for check in checks}
    parts += ["## Rules and where they come from\n", rules(used), "## Sources\n"]
    parts.append("\n".join(f"- {short}: {title}" for short, title in PAPERS.items()) + "\n")
    return "\n".join(parts)


def table(checks: Iterable[Check]) -> str:
    """One row for each check."""
    rows = [
        f"| `{one.code}` | {one.rule} | {one.severity} | {threshold(one)} | {cell(one.about)} | {cell(one.advice)} |"
        for one in checks
    ]
    head = ["| code | rule | severity | threshold | fires when | what to do |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def rules(used: Iterable[str]) -> str:
    """One row for each rule that is used."""
    order = sorted(used, key=lambda rule: ("MAVRSE".index(rule[0]), int(rule[1:])))
    rows = [f"| {rule} | {RULES[rule][0]} | {RULES[rule][1]} |" for rule in order]
    return "\n".join(["| rule | asks that | origin |", "|---|---|---|", *rows]) + "\n"


def threshold(one: Check) -> str:
    """As people write it; a dash where the check has none."""
    return f"{one.threshold:g}" if one.threshold else "–"


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return text.replace("|", "\\|")


def written() -> dict[str, Sequence[Check]]:
    """Every module's checks."""
    return {name: importlib.import_module(name).CHECKS for name in SECTIONS}


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(page(written()), encoding="utf-8")
    print(f"wrote {FILE}")
