"""Networks of other packages, by name: `timm:NAME` and `robustbench:NAME`.

A timm model is taken as timm builds it, stem and all, for the dataset's channels, classes and (where its
size is fixed) image size; it is untrained. A RobustBench model brings its weights and normalises inside.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn

from baselines import plain
from bench.config import config
from bench.data import Dataset
from bench.defense import Defense
from bench.errors import UsageError
from bench.registry import register


class TimmNetwork(plain.PlainNetwork[plain.Config]):
    """A model of timm's."""

    architecture: ClassVar[str]

    def network(self, data: Dataset) -> nn.Module:
        """The model for this dataset.

        Raises:
            UsageError: timm cannot build it for images of this shape.
        """
        import timm

        channels, *side = data.shape
        cfg = timm.get_pretrained_cfg(self.architecture)
        size = {"img_size": tuple(side)} if cfg is not None and cfg.fixed_input_size else {}
        try:
            net: nn.Module = timm.create_model(
                self.architecture, num_classes=len(data.classes), in_chans=channels, **size
            )
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UsageError(
                f"timm cannot build {self.architecture!r} for {channels}×{side[0]}×{side[1]} images "
                f"({reason}); choose another model or dataset"
            ) from None
        return net


@register("timm:")
def timm_family(rest: str) -> type[Defense[plain.Config]]:
    """Any model of timm, untrained, as timm builds it: timm:NAME.

    Raises:
        UsageError: timm has no model of that name.
    """
    import timm

    if not timm.is_model(rest):
        near = difflib.get_close_matches(rest, timm.list_models(), n=1, cutoff=0.5)
        advice = f"did you mean 'timm:{near[0]}'?" if near else "timm.list_models() names them all"
        raise UsageError(f"timm has no model named {rest!r}; {advice}")
    return type(rest, (TimmNetwork,), {"architecture": rest, "__doc__": f"{rest} of timm."})


@config
class RobustBenchConfig:
    """`threat_model` is the leaderboard that the name is from."""

    threat_model: Literal["Linf", "L2", "corruptions"] = "Linf"


class RobustBenchNetwork(Defense[RobustBenchConfig]):
    """A trained model of RobustBench's zoo."""

    zoo_name: ClassVar[str]
    recipes: ClassVar[Mapping[str, object]] = {
        recipe: RobustBenchConfig() for recipe in ("tiny", "fast", "paper")
    }

    def build(self, data: Dataset) -> nn.Module:
        """The model with its weights, fetched where they are not there yet.

        Raises:
            UsageError: the dataset is none of RobustBench's, or the name is not on that leaderboard.
        """
        dataset = data.name
        if ":" in dataset:
            dataset = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}.get(len(data.classes), dataset)
        if dataset not in ("cifar10", "cifar100", "imagenet"):
            raise UsageError(
                f"RobustBench has no models for {data.name}; its datasets are cifar10, cifar100 and imagenet"
            )
        try:
            zoo = importlib.import_module("robustbench.model_zoo")
            enums = importlib.import_module("robustbench.model_zoo.enums")
            utils = importlib.import_module("robustbench.utils")
        except ImportError as error:
            raise UsageError(f"RobustBench is installed but cannot be imported: {error}") from error
        board = zoo.model_dicts[enums.BenchmarkDataset(dataset)]
        known = list(board[enums.ThreatModel(self.config.threat_model)])
        if self.zoo_name not in known:
            near = difflib.get_close_matches(self.zoo_name, known, n=1, cutoff=0.5)
            advice = (
                f"did you mean 'robustbench:{near[0]}'?"
                if near
                else "choose --set threat_model=Linf|L2|corruptions"
            )
            raise UsageError(
                f"RobustBench has no {dataset} {self.config.threat_model} model named {self.zoo_name!r}; "
                f"{advice}"
            )
        model: nn.Module = utils.load_model(
            self.zoo_name, dataset=dataset, threat_model=self.config.threat_model
        )
        return model


@register("robustbench:")
def robustbench_family(rest: str) -> type[Defense[RobustBenchConfig]]:
    """Any trained model of RobustBench's zoo: robustbench:NAME (needs RobustBench installed).

    Raises:
        UsageError: RobustBench is not installed.
    """
    # Another package ships a top-level `robustbench` that cannot be imported, so an import proves nothing.
    try:
        importlib.metadata.distribution("robustbench")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"robustbench:{rest} needs RobustBench, which is not installed; install it from its repository "
            "RobustBench/robustbench, or give a file of its zoo to --checkpoint"
        ) from None
    return type(rest, (RobustBenchNetwork,), {"zoo_name": rest, "__doc__": f"{rest} of RobustBench."})
