"""AutoAttack (Croce and Hein, ICML 2020, arXiv 2003.01690), run by its authors' code.

| component  | what it does                                              | full strength                  |
|------------|-----------------------------------------------------------|--------------------------------|
| `apgd-ce`  | PGD with adaptive steps on cross-entropy                  | 100 steps                      |
| `apgd-dlr` | the same on the difference of logits ratio; 3 classes     | 100 steps                      |
| `apgd-t`   | the same towards the likeliest wrong classes; 4 classes   | 100 steps, 9 targets           |
| `fab`      | the nearest decision boundary (arXiv 1907.02044)          | 100 steps                      |
| `fab-t`    | the same towards the likeliest wrong classes              | 100 steps, 9 targets           |
| `square`   | random squares, no gradient (ECCV 2020, arXiv 1912.00049) | 5,000 queries                  |

`standard` is APGD-CE, APGD-T, FAB-T and Square, each on what the ones before left standing; `rand`, against random models,
is APGD-CE and APGD-DLR on gradients averaged over 20 passes. Nothing less than `standard` may call itself AutoAttack.

The code is that of `pyautoattack`, or of the authors' own package `autoattack` where that is installed. Of it the
attacks are used, not the ensemble around them: who is attacked and who has fallen is for the caller to say. Its random
numbers are addressed (`bench.attacks.addressed`), so an image fares alike in any batch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.addressed import Draws, addressed, distinct
from bench.errors import NonFinite, UsageError, VoidRun
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images, Labels, Logits

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
COMPONENTS = VERSIONS["plus"]
#: what `component` does unless it is told otherwise
FULL = {"steps": 100, "restarts": 1, "targets": 9, "queries": 5000, "eot": 1}
#: the fewest classes that the losses of these are defined for, and what to use with fewer
LEAST = {"apgd-dlr": (3, "apgd-ce"), "apgd-t": (4, "apgd-ce and fab-t")}

PACKAGES = ("autoattack", "pyautoattack")
MODULES = ("autopgd_base", "fab_base", "fab_pt", "square")


@dataclass(frozen=True)
class Source:
    """Whose code runs: a package, its version, and the commit where it was installed from git."""

    name: str
    version: str
    commit: str | None = None


def source() -> Source:
    """The authors' own package where it is installed, else `pyautoattack`.

    Raises:
        UsageError: neither is installed.
    """
    for name in PACKAGES:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        origin = json.loads(package.read_text("direct_url.json") or "{}")
        return Source(name, package.version, origin.get("vcs_info", {}).get("commit_id"))
    raise UsageError("AutoAttack's code is not installed; `pip install pyautoattack==0.2.0` brings it")


def components(version: str) -> tuple[str, ...]:
    """The components of a version, in the order in which they run.

    Raises:
        UsageError: there is no such version.
    """
    if version not in VERSIONS:
        raise UsageError(f"AutoAttack has no version {version!r}; known: {', '.join(VERSIONS)}")
    return VERSIONS[version]


def strength(version: str, name: str) -> dict[str, int]:
    """The settings in which a version's component differs from `FULL`."""
    if version == "rand":
        return {"eot": 20}
    return {"restarts": 5} if version == "plus" and name in ("apgd-ce", "apgd-dlr", "fab") else {}


def earned(
    version: str,
    attacks: Sequence[str] | None,
    settings: Mapping[str, object],
    deterministic: bool,
    *,
    classes: int | None = None,
) -> bool:
    """Whether a run may call itself AutoAttack.

    It may when it is the authors' standard composition in order, with 100 steps, 9 targets (all wrong classes where there
    are fewer) and 5,000 queries, against a deterministic model.

    Args:
        version: as `autoattack` takes it.
        attacks: the components, if they were named one by one.
        settings: of `FULL`, those that were set.
        deterministic: whether the model answers the same images alike every time.
        classes: how many the model has, if it is known.
    """
    full = dict(FULL)
    if classes is not None:
        full["targets"] = min(FULL["targets"], classes - 1)
        settings = {
            key: min(value, classes - 1) if key == "targets" and isinstance(value, int) else value
            for key, value in settings.items()
        }
    return (
        deterministic
        and version == "standard"
        and tuple(attacks or VERSIONS[version]) == VERSIONS["standard"]
        and all(key in full and value == full[key] for key, value in settings.items())
    )


def label(
    version: str,
    attacks: Sequence[str] | None,
    settings: Mapping[str, object],
    deterministic: bool,
    *,
    classes: int | None = None,
) -> str:
    """`autoattack` where the run has `earned` it; else what ran, such as `aa-like:apgd-ce+square` or `aa-like:rand`."""
    if earned(version, attacks, settings, deterministic, classes=classes):
        return "autoattack"
    return f"aa-like:{'+'.join(attacks or (['rand'] if version == 'rand' else components(version)))}"


def autoattack(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    *,
    rng: Rng,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
) -> Images:
    """Adversarial images `(b, c, h, w)`; the original where every component failed.

    Args:
        model: pixels to logits, in eval mode; it judges what each component returns.
        x, y: correctly classified images and their labels.
        threat: `Linf` or `L2`.
        rng: the address of all draws; without `images` the rows' positions in the batch stand for them.
        version: `standard`, `plus` or `rand`.
        attacks: components to run in turn, as `standard` has them, instead of a version's.

    Raises:
        UsageError: an unknown version or component, or one that this model or these images do not admit.
        NonFinite: a logit or a gradient is NaN or infinite.
    """
    names = tuple(attacks or components(version))
    for name in names:
        _known(name)
    rng = _positioned(rng, x)
    x_adv, rows = x.clone(), torch.arange(len(x), device=x.device)
    for name in names:
        settings = {} if attacks else strength(version, name)
        found = component(name, model, x[rows], y[rows], threat, rng=rng.take(rows), **settings)
        if len(rows):
            with torch.no_grad():
                broken = model(found.clone()).argmax(1) != y[rows]
            x_adv[rows[broken]] = found[broken]
            rows = rows[~broken]
    return x_adv


def component(
    name: str,
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    *,
    rng: Rng,
    steps: int = FULL["steps"],
    restarts: int = FULL["restarts"],
    targets: int = FULL["targets"],
    queries: int = FULL["queries"],
    eot: int = FULL["eot"],
    classes: int | None = None,
) -> Images:
    """What one component returns, `(b, c, h, w)`, unjudged: the original where it found nothing.

    Args:
        name: one of `COMPONENTS`.
        model: pixels to logits, in eval mode; any faster copy of the model that will judge.
        x, y: the images to attack and their labels. What the model gets wrong is returned as it is.
        threat: `Linf` or `L2`.
        rng: the address of all draws; without `images` the rows' positions in the batch stand for them.
        steps: of APGD and FAB.
        restarts: random starts, each on what the one before left standing; FAB's first starts at the image itself.
        targets: wrong classes aimed at, the likeliest first; never more than there are.
        queries: of Square.
        eot: passes that APGD's gradients are averaged over.
        classes: how many there are; the model is asked about one image where it is not said.

    Raises:
        UsageError: an unknown component, or one that this model or these images do not admit.
        NonFinite: a logit or a gradient is NaN or infinite.
        VoidRun: the model's output carries no gradient.
    """
    _known(name)
    if len(x) == 0:
        return x.clone()
    if name == "square" and threat.norm == "L2" and min(x.shape[2:]) < 5:
        raise UsageError(
            f"square in L2 needs images of at least 5×5 pixels, and these have {x.shape[2]}×{x.shape[3]}; leave it out"
        )
    rng, x = _positioned(rng, x).at(name), x.contiguous()
    with torch.no_grad(), _untouched(model):
        ask = _asked(model)
        classes = classes or ask(x[:1]).shape[1]
        fewest, instead = LEAST.get(name, (2, ""))
        if classes < fewest:
            raise UsageError(
                f"{name} needs at least {fewest} classes, and this model has {classes}; use {instead}"
            )
        package = source().name
        theirs = {module: importlib.import_module(f"{package}.{module}") for module in MODULES}
        x_adv = x.clone()
        for rows in distinct(x):
            draws = Draws(rng.take(rows), x[rows])
            attack = _built(
                name, theirs, ask, threat, x.device,
                steps=steps, restarts=restarts, targets=min(targets, classes - 1), queries=queries, eot=eot,
            )  # fmt: skip
            _follow(attack, draws)
            with addressed(list(theirs.values()), draws):
                x_adv[rows] = attack.perturb(x[rows], y[rows]).detach()
    return x_adv


def _built(
    name: str,
    theirs: dict[str, ModuleType],
    ask: Callable[[Images], Logits],
    threat: ThreatModel,
    device: torch.device,
    *,
    steps: int,
    restarts: int,
    targets: int,
    queries: int,
    eot: int,
) -> Any:
    """Their attack object, set up as their ensemble sets it up."""
    common = {"norm": threat.norm, "eps": threat.eps, "n_restarts": restarts, "device": device}
    if name.startswith("apgd"):
        common |= {"n_iter": steps, "eot_iter": eot, "rho": 0.75, "logger": _Unheard()}
        if name == "apgd-t":
            return theirs["autopgd_base"].APGDAttack_targeted(ask, n_target_classes=targets, **common)
        return theirs["autopgd_base"].APGDAttack(ask, loss=name.removeprefix("apgd-"), **common)
    if name.startswith("fab"):
        return theirs["fab_pt"].FABAttack_PT(
            ask, n_iter=steps, targeted=name == "fab-t", n_target_classes=targets, **common
        )
    return theirs["square"].SquareAttack(ask, n_queries=queries, p_init=0.8, resc_schedule=False, **common)


def _follow(attack: Any, draws: Draws) -> None:
    """Tells `draws` when a run of the attack begins, and which images leave it."""
    single_run = attack.attack_single_run

    def attack_single_run(x: Images, *arguments: Any, **settings: Any) -> Any:
        draws.begin(x)
        return single_run(x, *arguments, **settings)

    attack.attack_single_run = attack_single_run
    if not hasattr(attack, "margin_and_loss"):
        return
    margin_and_loss = attack.margin_and_loss

    # Square alone drops images in the middle of a run, those whose margin is no longer positive
    def followed(x: Images, y: Labels) -> tuple[Tensor, Tensor]:
        margin, loss = margin_and_loss(x, y)
        draws.keep(margin > 0)
        # a tie counts as fallen, but not when it looks whether any image is left to attack
        return margin.masked_fill(margin == 0, -torch.finfo(margin.dtype).tiny), loss

    attack.margin_and_loss = followed


def _asked(model: nn.Module) -> Callable[[Images], Logits]:
    """The model as their code may have it: with every logit and gradient finite, and neither side writing into the other's."""

    def ask(x: Images) -> Logits:
        x = x.clone()
        logits: Logits = model(x)
        _finite("logits", logits)
        if x.requires_grad:
            if not logits.requires_grad:
                raise VoidRun(
                    "the model's logits carry no gradient to its input (a no_grad or detach inside?); gradient attacks would see nothing"
                )
            x.register_hook(lambda gradient: _finite("gradients", gradient))  # type: ignore[no-untyped-call]
        return logits.clone()

    return ask


def _finite(what: str, values: Tensor) -> None:
    finite = values.detach().flatten(1).isfinite().all(1)
    if not finite.all():
        error = NonFinite(what, (~finite).nonzero().flatten().tolist())
        # rows of what is attacked at the moment, which are not rows of the batch
        error.rows = []
        raise error


class _Unheard:
    """Their remarks go nowhere: what they warn of, the audit looks for itself."""

    def log(self, message: str) -> None:
        pass

    warning = log


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient: FAB calls `backward`, which would leave one in each."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learnt:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)


def _known(name: str) -> None:
    if name not in COMPONENTS:
        raise UsageError(f"no AutoAttack component named {name!r}; known: {', '.join(COMPONENTS)}")


def _positioned(rng: Rng, x: Images) -> Rng:
    return rng if rng.images is not None else Rng(*rng.address, images=range(len(x)))
