"""What there is to compare, as tables for a paper: the taxonomy of methods, what protocols ask, and how recipes train.

They are the DWF paper's Tables 1, 4 and 5, read off the registry and the protocols, so that they cannot say anything else
than what is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import data as datasets
from bench import protocol as protocols
from bench import published, registry
from bench.config import as_json
from bench.defense import Stage
from bench.errors import UsageError
from bench.long import radius
from bench.protocol import ColumnSpec, Protocol
from bench.sheet import Sheet

#: the column of the paper's Table 1 that a fact stands in
_PRINTED = {
    "gating": "gating_mechanism",
    "routing": "routing_topology",
    "training": "training_strategy",
    "activation": "expert_activation",
}
#: settings that stages tell, and those that say where images come from
_TOLD = ("batch_size", "weight_decay", "lr", "epochs")
_NOT_TRAINING = ("source", "mean", "std", "threat_model")


def taxonomy(*, beside: bool = False) -> Sheet:
    """Gating, routing, training and expert activation of every defense, mixtures first.

    Args:
        beside: whether the paper's own row stands below ours where the two differ.
    """
    printed = published.taxonomy()
    found = sorted(registry.kinds().items(), key=lambda pair: pair[1].taxonomy["gating"] == "none")
    rows: list[tuple[str, ...]] = []
    differ = False
    for name, kind in found:
        facts = dict(kind.taxonomy)
        own = [str(facts[fact]) for fact in _PRINTED]
        shown = [f"{own[0]}, random" if kind.random else own[0], *own[1:]]
        rows.append((name, *shown))
        row = printed.get(kind.published_as or "")
        if row is not None:
            theirs = [row[column] for column in _PRINTED.values()]
            if theirs != own:
                differ = True
                if beside:
                    rows.append((f"{kind.published_as}, published", *theirs))
    notes = ["'published' rows are the DWF paper's Table 1 where it says something else."] * (
        differ and beside
    )
    caption = "Taxonomy: how mixtures of experts route and learn, and single networks beside them."
    return Sheet("taxonomy", caption, ("defense", *_PRINTED), tuple(rows), tuple(notes))


def attacks(names: Sequence[str] = ()) -> Sheet:
    """What each protocol asks, a row for each attack.

    Args:
        names: of protocols or their files; all that come with the harness by default.

    Raises:
        UnknownName: no such protocol.
        ProtocolError: a file that does not say what to do.
    """
    asked = [protocols.load(name) for name in names or protocols.names()]
    rows = [(one.name, *_attack(one, spec)) for one in asked for spec in one.specs if spec.attack != "clean"]
    notes = []
    for one in asked:
        ours = [name for name, source in one.provenance.items() if source == "unrecovered"]
        if ours:
            notes.append(f"{one.name}: {', '.join(ours)} could not be recovered from the paper and are ours.")
    headings = ("protocol", "attack", "loss", "norm", "eps", "step size", "steps", "restarts", "EoT", "start")
    caption = "Attack settings; radii and step sizes in pixel units of [0,1]. Clean images are part of every protocol."
    return Sheet("protocols", caption, (*headings, "decides"), tuple(rows), tuple(notes))


def _attack(one: Protocol, spec: ColumnSpec) -> tuple[str, ...]:
    """An attack's cells behind the protocol's name; empty where something does not apply."""
    iterated = spec.steps is not None
    own = spec.eps if spec.eps is not None else one.eps
    eps = "the dataset's" if own == "dataset" else _several(own, radius)
    gradient = iterated or spec.attack == "fgsm"
    size = "eps/4" if spec.step_size is None else spec.step_size
    return (
        spec.attack,
        {"ce": "cross-entropy"}.get(spec.loss, spec.loss) if gradient else "",
        {"Linf": "L∞", "L2": "L2"}[one.norm],
        eps,
        (size if isinstance(size, str) else radius(size)) if iterated else "",
        _several(spec.steps, str) if iterated else "",
        str(spec.restarts) if iterated else "",
        str(spec.eot) if gradient else "",
        ("uniform" if spec.random_start else "the image") if iterated else "",
        {"last": "final iterate", "any": "worst iterate"}[one.success],
    )


def _several(value: Any, shown: Any) -> str:
    """One number, or the list of them; from the first to the last where they are many."""
    if not isinstance(value, list):
        return str(shown(value))
    texts = [str(shown(one)) for one in value]
    return ", ".join(texts) if len(texts) <= 5 else f"{texts[0]}, {texts[1]}, …, {texts[-1]} ({len(texts)})"


def recipes(only: str | None = None) -> Sheet:
    """How every defense is trained, a row for each stage of each recipe; those that are trained alike share theirs.

    Args:
        only: a recipe, such as `paper`; all by default.

    Raises:
        UsageError: no defense has such a recipe.
    """
    data = datasets.load("digits")
    by_content: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    there: dict[str, None] = {}
    for name, kind in registry.kinds().items():
        for recipe, config in kind.recipes.items():
            there[recipe] = None
            stages = kind(config).stages(data)
            if only in (None, recipe) and stages:
                content = tuple((recipe, *_stage(stage, config, place)) for place, stage in enumerate(stages))
                by_content.setdefault(content, []).append(name)
    if only is not None and only not in there:
        raise UsageError(f"no defense has a recipe {only!r}; there are {', '.join(there)}")
    rows = [(", ".join(names), *row) for content, names in by_content.items() for row in content]
    headings = ("defense", "recipe", "stage", "epochs", "batch", "lr", "momentum", "weight decay", "keeps")
    caption = (
        "Hyperparameters. SGD with a cosine schedule where the settings name no other; radii and step sizes in pixel units of [0,1], "
        "where none is named the dataset's radius and a quarter of it."
    )
    return Sheet("recipes", caption, (*headings, "settings"), tuple(rows))


def _stage(stage: Stage, config: Any, place: int) -> tuple[str, ...]:
    """A stage's cells, and once the settings that no stage tells."""
    settings = [
        f"{name}={_short(value)}"
        for name, value in as_json(config).items()
        if value not in (None, False, [])
        and name not in _NOT_TRAINING
        and not any(name == told or name.endswith(f"_{told}") for told in _TOLD)
    ]
    kept = {"clean": "best on clean", "robust": "best under PGD-10", "last": "the last epoch"}[stage.select]
    return (
        stage.name,
        str(stage.epochs),
        str(stage.batch_size),
        f"{stage.lr:g}",
        f"{stage.momentum:g}",
        f"{stage.weight_decay:g}",
        kept,
        ", ".join(settings) if place == 0 else "",
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"({_several(value, _short)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
