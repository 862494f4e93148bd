"""Weights that people have: where they are, how their keys are laid out, which pixels they were trained on.

A checkpoint is a path, `hf_hub:NAME` or an https URL. Tensors are read from it and nothing else:
`safetensors`, or `torch.load(weights_only=True)`; no object of a stranger's is ever built.

    file -> state dict (out of its wrapper, without `module.`) -> layout of a known source -> network

A foreign file says nothing of the normalisation its network was trained with, and a wrong one costs
accuracy without an error. So it travels with the source: a network's class lists its public `sources`, each
with mean, std and the clean accuracy it states. A source is recognised, surest evidence first, by

1. `--set source=NAME`;
2. the name of the file, the hub or the first digits of its sha256;
3. the layout of its keys, where one source of this dataset alone has it, or where entries of the file tell
two apart.

Where several fit, the user is asked; where none does, the dataset's own normalisation is used and `notes`
says so.
After loading, `check_clean` compares the accuracy measured with the one stated.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import io
import json
import math
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from bench.config import replaced
from bench.data import Dataset
from bench.defense import Defense
from bench.errors import CheckpointError
from bench.model import Normalized
from bench.record import atomic
from bench.tensors import tensors

State = dict[str, Tensor]

#: the metadata key of our own files
OWN = "bench"
#: the choice that treats a file as nobody's: the dataset's normalisation, no accuracy stated
PLAIN = "plain"
#: where a state dict lies in a file, likeliest first
WRAPPERS = (
    "state_dict",
    "net",
    "model",
    "model_state_dict",
    "model_state",
    "network",
    "params",
    "weights",
    "ema",
    "last",
    "best",
)
#: what wrapping a module puts before all of its keys
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "1.")
#: names of the constants that some networks normalise with
BUFFERS = {"mu": "mean", "mean": "mean", "sigma": "std", "std": "std"}


#: what torch's reader raises on a file that was cut short or scrambled
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    OSError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public origin of weights for one network on one dataset.

    Args:
        name: what `--set source=` is given; for a model of the Hugging Face hub, its name there.
        dataset: the one it was trained on.
        mean, std: per channel, what its network was given: `(pixel - mean) / std`.
        clean: the accuracy it states on the test set, in percent; None where it publishes no weights or no
            number.
        translate: its keys as ours, leaving alone what it does not know; None where they are ours.
        settings: the fields of the config that its networks are built with, whatever recipe is asked for.
        states: the entry of its files that states their own clean accuracy in percent.
        files: patterns of the paths its files have, such as `*/cifar10_resnet20-4118986f.pt`.
        sha256: first digits of the hash of its file.
        modules: modules without weights that torch lists in a state dict's metadata, and that tell it from
            others.
        by_name: too little tells its files from another's, so that it must be named (choice 1 or 2 above).
    """

    name: str
    dataset: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    clean: float | None = None
    translate: Callable[[State], State] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    states: str | None = None
    files: tuple[str, ...] = ()
    sha256: str | None = None
    modules: tuple[str, ...] = ()
    by_name: bool = False


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was loaded.

    Args:
        source: as it was given.
        sha256: of the file.
        origin: name of the recognised source, `dwf-bench` or `plain state dict`.
        clean: accuracy on the dataset's test set that the file or its source states, in percent.
        mean, std: the normalisation that the network now has; None where the loader did not decide it.
        settings: fields of the config in which the network was changed to fit the file.
        notes: what was decided without being asked, a sentence each.
    """

    source: str
    sha256: str
    origin: str
    clean: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def renamed(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[State], State]:
    """A translation that applies `re.sub(pattern, replacement)` to every key, rule after rule."""

    def translate(state: State) -> State:
        out = {}
        for key, value in state.items():
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            out[key] = value
        return out

    return translate


def save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a checkpoint of ours: safetensors, complete or not at all.

    `mean`, `std` (JSON) and `clean` (percent) in the metadata are used when it is loaded.

    Raises:
        UsageError: the folder cannot be written.
    """
    import safetensors.torch

    copies = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    atomic(path, safetensors.torch.save(copies, metadata={OWN: "1", **metadata}))


def load(source: str, model: nn.Module, *, defense: Defense[Any], data: Dataset) -> Loaded:
    """Puts the weights of a checkpoint into a model that `defense.build(data)` made.

    A file of ours goes into the whole model. A foreign one goes into the network inside `Normalized`, which
    then has the normalisation of the file's source; a network that the source builds differently is rebuilt
    like it.

    Args:
        source: a path, `hf_hub:NAME` or an https URL.
        model: on any device; changed in place.
        defense: its `sources` are the layouts known; its config may choose `source`, `mean` and `std`.
        data: what the model is for.

    Raises:
        CheckpointError: the file cannot be had, is damaged, wants more than tensors, belongs to another
            architecture, or fits several sources.
    """
    path = _fetch(source, defense)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    file = _read(source, content)
    del content
    if file.own:
        return _load_own(source, sha256, file, model, defense)
    # Only in a Normalized model is it known where such constants go; elsewhere they are parts like others.
    inside = isinstance(model, Normalized)
    state, constants = _without_constants(file.state, data.shape[0]) if inside else (file.state, {})
    reading = _Reading(source, sha256, file, _stripped(state), model, defense, data)
    return reading.finish(reading.choose(), constants)


def check_clean(loaded: Loaded, measured: float, n: int) -> None:
    """Compares clean accuracy on `n` test images, in percent, with the one that the source states.

    Raises:
        CheckpointError: they differ by more than a point and by more than three standard errors of `n`
            images.
    """
    if loaded.clean is None:
        return
    share = loaded.clean / 100
    allowed = max(1.0, 300 * math.sqrt(share * (1 - share) / n))
    if abs(measured - loaded.clean) > allowed:
        raise CheckpointError(
            f"{loaded.source} ({loaded.origin}) states {loaded.clean:.2f} % clean accuracy, measured "
            f"{measured:.2f} % on {n} images: the normalisation (mean {_plain(loaded.mean)}, std "
            f"{_plain(loaded.std)}) or the layout is likely wrong, or these are other images; choose with "
            f"--set source=NAME or --set mean=[...] --set std=[...], or waive the statement with "
            f"--set source={PLAIN}"
        )


@dataclass(frozen=True)
class _File:
    state: State
    own: bool = False
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


# --- getting the file


def _fetch(source: str, defense: Defense[Any]) -> Path:
    if source.startswith("hf_hub:"):
        return _from_hub(source, defense)
    if source.startswith("https://"):
        return _from_url(source)
    if "://" in source:
        raise CheckpointError(
            f"checkpoint {source!r}: only https is fetched; download the file and give its path"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        raise CheckpointError(f"checkpoint {source!r} is a folder; give the file with the weights in it")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {source!r}; give a path, hf_hub:NAME or an https URL")
    return path


def _from_hub(source: str, defense: Defense[Any]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    name = source.removeprefix("hf_hub:")
    problem = "there is none of these files"
    for filename in ("model.safetensors", "pytorch_model.bin"):
        try:
            return Path(huggingface_hub.hf_hub_download(name, filename))
        except LocalEntryNotFoundError:
            problem = "the hub cannot be reached"
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            problem = str(error).strip().split("\n")[0]
    hint = f" --set source={name}" if name in {known.name for known in _sources(defense)} else ""
    raise CheckpointError(
        f"cannot fetch {source} ({problem}); download model.safetensors or pytorch_model.bin of {name} from "
        f"the Hugging Face hub where there is a connection, and give its path: --checkpoint PATH{hint}"
    )


def _from_url(source: str) -> Path:
    """The file of a URL, fetched once and compared with its hash, where URL or name tell one.

    A hash is told by `URL#sha256=HEX`, or by a name such as `resnet18-5c106cde.pth`, as torch.hub's files have it.
    """
    url, _, fragment = source.partition("#")
    name = PurePosixPath(url.split("?")[0]).name or "weights"
    told = re.search(r"-([0-9a-f]{8,64})\.", name)
    wanted = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else told[1] if told else ""
    if fragment and not re.fullmatch(r"sha256=[0-9a-f]{8,64}", fragment):
        raise CheckpointError(f"{source}: write the hash as #sha256= and 8 to 64 hexadecimal digits")
    # Two URLs may end in one name, so that the folder is named after the whole of it.
    folder = Path(torch.hub.get_dir()) / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:12]
    path = folder / name
    fetched = not path.is_file()
    try:
        if fetched:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=True)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"cannot fetch {source}: {reason}; download the file and give its path"
        ) from None
    if not found.startswith(wanted):
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{source} is not what its hash says: its sha256 begins with {found[:16]}, not with {wanted}; it was deleted, fetch "
            "it again or give the right URL"
        )
    return path


# --- reading it


def _read(source: str, content: bytes) -> _File:
    head = content[:512].lstrip().lower()
    if not content:
        raise CheckpointError(f"checkpoint {source!r} is empty; fetch it again")
    if head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise CheckpointError(
            f"checkpoint {source!r} is a web page, not weights; fetch the raw file that the page links to"
        )
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"checkpoint {source!r} is a Git LFS pointer, not the weights; run `git lfs pull` and try again"
        )
    read = _read_safetensors if content[8:9] == b"{" else _read_torch
    file = read(source, content)
    for key, value in file.state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"checkpoint {source!r} has NaN or infinite values in {key!r}; its training failed"
            )
    return file


def _read_safetensors(source: str, content: bytes) -> _File:
    import safetensors
    import safetensors.torch

    try:
        state = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"checkpoint {source!r} is damaged ({error}); fetch it again") from None
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return _File(state, own=OWN in metadata, metadata=metadata)


def _read_torch(source: str, content: bytes) -> _File:
    if not (content.startswith((b"PK", b"\x80")) or content[257:262] == b"ustar"):
        raise CheckpointError(
            f"checkpoint {source!r} is damaged or no checkpoint; "
            "expected safetensors or a file that torch.save wrote"
        )
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols and TorchScript before it refuses them, as we then do.
            warnings.simplefilter("ignore")
            found = tensors(io.BytesIO(content))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(source, str(error))) from None
    except _DAMAGE as error:
        reason = str(error).strip().split("\n")[0]
        if "torchscript" in reason.lower():
            raise CheckpointError(
                f"checkpoint {source!r} is a TorchScript program, not weights; "
                "save torch.jit.load(FILE).state_dict() and give that"
            ) from None
        raise CheckpointError(
            f"checkpoint {source!r} is damaged or no checkpoint ({reason}); fetch it again"
        ) from None
    return _unwrapped(source, found)


def _refusal(source: str, reason: str) -> str:
    wanted = re.search(r"GLOBAL ([\w.]+)", reason)
    what = f"builds {wanted[1]}" if wanted else "builds objects"
    return (
        f"checkpoint {source!r} {what}, not tensors alone; refused, since unpickling runs the code of "
        "whoever made the file; if you trust them, give its state dict instead: "
        "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pt')"
    )


def _unwrapped(source: str, found: object) -> _File:
    entries: dict[str, Any] = {}
    notes: list[str] = []
    for _ in range(4):
        if not isinstance(found, Mapping):
            break
        held = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
        inner = [name for name in WRAPPERS if _holds_tensors(found.get(name))]
        if not inner:
            if not held:
                break
            modules = frozenset(getattr(found, "_metadata", None) or ())
            return _File(held, entries=entries, modules=modules, notes=tuple(notes))
        entries.update({str(key): value for key, value in found.items() if _is_number(value)})
        if len(inner) > 1:
            notes.append(f"took {inner[0]!r}; the file also has {', '.join(map(repr, inner[1:]))}")
        found = found[inner[0]]
    raise CheckpointError(
        f"checkpoint {source!r} holds no state dict but a {type(found).__name__}; expected tensors by name, "
        f"bare or under one of: {', '.join(WRAPPERS)}"
    )


def _holds_tensors(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(inner, Tensor) for inner in value.values()) or any(
        _holds_tensors(value.get(name)) for name in WRAPPERS
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _without_constants(state: State, channels: int) -> tuple[State, dict[str, tuple[float, ...]]]:
    """The state dict without its normalisation constants, and those."""
    found: dict[str, dict[str, str]] = {}
    for key, value in state.items():
        parent, _, last = key.rpartition(".")
        if last in BUFFERS and value.numel() == channels:
            found.setdefault(parent, {})[BUFFERS[last]] = key
    pairs = [pair for pair in found.values() if len(pair) == 2]
    if len(pairs) != 1:
        return state, {}
    constants = {name: tuple(state[key].double().flatten().tolist()) for name, key in pairs[0].items()}
    return {key: value for key, value in state.items() if key not in pairs[0].values()}, constants


def _stripped(state: State) -> list[State]:
    """The state dict as it is, and after each prefix that all of its keys share."""
    forms = [state]
    while True:
        state = forms[-1]
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return forms
        forms.append({key.removeprefix(prefix): value for key, value in state.items()})


# --- fitting it


@dataclass(frozen=True)
class _Misfit:
    """What keeps a state dict from a network: names of either, and `name (file's shape, network's shape)`."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    @classmethod
    def of(
        cls, state: Mapping[str, Tensor], target: Mapping[str, Tensor], *, strict: bool = False
    ) -> _Misfit:
        """The differences; a batch counter may be missing unless `strict`."""
        return cls(
            [
                key
                for key in target
                if key not in state and (strict or not key.endswith("num_batches_tracked"))
            ],
            [key for key in state if key not in target],
            [
                f"{key} {tuple(state[key].shape)} instead of {tuple(target[key].shape)}"
                for key in target
                if key in state and state[key].shape != target[key].shape
            ],
        )

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def __str__(self) -> str:
        said = []
        for word, keys in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("wrong shape", self.shapes),
        ):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                said.append(f"{word} {', '.join(keys[:3])}{more}")
        return "; ".join(said)


@dataclass(frozen=True)
class _Fit:
    """A way to read the file: through the layout of a source, or (None) as it is."""

    source: Source | None
    state: State
    misfit: _Misfit
    #: whether keys and scale are the source's own, not ours that its translation left alone
    own: bool = True
    #: fields of the config that this source's network has otherwise than the model at hand
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_its_own(self) -> bool:
        """Whether this may be a file of the source's."""
        return self.own and not len(self.misfit)


@dataclass(frozen=True)
class _Choice:
    fit: _Fit
    #: the source whose normalisation and accuracy hold; None where only the layout is known
    source: Source | None
    note: str | None = None


class _Reading:
    """One foreign file on its way into one network."""

    def __init__(
        self,
        source: str,
        sha256: str,
        file: _File,
        forms: list[State],
        model: nn.Module,
        defense: Defense[Any],
        data: Dataset,
    ) -> None:
        self.source = source
        self.sha256 = sha256
        self.file = file
        self.forms = forms
        self.model = model
        self.defense = defense
        self.data = data
        self.sources = _sources(defense) if isinstance(model, Normalized) else ()
        self.net = model.net if isinstance(model, Normalized) else model
        self.built: dict[str, Mapping[str, Tensor]] = {"{}": self.net.state_dict()}

    def choose(self) -> _Choice:
        """Which source the file is from."""
        wanted = getattr(self.defense.config, "source", None)
        if wanted == PLAIN:
            return self.layout_only(note=None)
        if wanted is not None:
            return self.named(wanted)
        for source in self.sources:
            if self.is_named_like(source):
                return _Choice(self.fitting(source), source)
        fits = self.told_apart(
            [
                fit
                for fit in map(self.fit, self.sources)
                if fit.source and fit.is_its_own and not fit.source.by_name and self.suits(fit.source)
            ]
        )
        if not fits:
            return self.layout_only(note="neither its keys nor its name say how its images were normalised")
        if len({_meaning(fit) for fit in fits}) > 1:
            names = ", ".join(fit.source.name for fit in fits if fit.source)
            raise CheckpointError(
                f"checkpoint {self.source!r} may be of {names}, whose keys are the same but not their "
                "normalisation or pooling; choose with --set source=NAME, "
                f"or --set source={PLAIN} --set mean=[...] --set std=[...]"
            )
        first = fits[0].source
        assert first is not None
        return _Choice(fits[0], first, note=f"recognised as {first.name} by its keys")

    def named(self, wanted: str) -> _Choice:
        """The source that the user chose."""
        known = [s for s in self.sources if wanted.lower() in (s.name.lower(), s.name.lower().split("/")[0])]
        known = [s for s in known if self.suits(s)] or known
        if len(known) != 1:
            names = ", ".join([*(s.name for s in known or self.sources), PLAIN])
            number = "several sources" if known else "no source"
            raise CheckpointError(f"{_name(self.defense)} has {number} {wanted!r}; there are: {names}")
        return _Choice(self.fitting(known[0]), known[0])

    def layout_only(self, note: str | None) -> _Choice:
        """The file as nobody's, through whichever layout fits it."""
        ways = [self.fit(None), *map(self.fit, self.sources)]
        # The fewest changes to the network as configured: a stranger's file says nothing of pooling.
        best = min(ways, key=lambda fit: (len(fit.misfit), len(fit.changes)))
        return _Choice(self.checked(best), None, note)

    def fitting(self, source: Source) -> _Fit:
        """The file read as this source's."""
        return self.checked(min(self.fit(source), self.fit(None, source), key=lambda fit: len(fit.misfit)))

    def checked(self, fit: _Fit) -> _Fit:
        """The same, if it fits.

        Raises:
            CheckpointError: it does not.
        """
        if len(fit.misfit):
            layout = f" (read as {fit.source.name})" if fit.source else ""
            raise CheckpointError(
                f"checkpoint {self.source!r} does not fit {_name(self.defense)}{layout}: {fit.misfit}"
            )
        return fit

    def fit(self, source: Source | None, like: Source | None = None) -> _Fit:
        """How far the file fits through a source's layout; `like`: our layout, that source's network."""
        whose = source or like
        settings = whose.settings if whose else {}
        tried = []
        for form in self.forms:
            state = source.translate(form) if source and source.translate else form
            scaled = {**settings, **self.scale(state)}
            own = source is None or source.translate is None or state.keys() != form.keys()
            own = own and all(scaled[name] == value for name, value in settings.items())
            changes = self.changes(scaled)
            tried.append(_Fit(whose, state, _Misfit.of(state, self.target(changes)), own, changes))
        return min(tried, key=lambda fit: len(fit.misfit))

    def scale(self, state: State) -> dict[str, int]:
        """The width of the network, where its class says which weight shows it."""
        told = getattr(self.defense, "scale", None)
        if told is None or told[1] not in state or state[told[1]].dim() == 0:
            return {}
        field, key, channels = told
        return {field: max(1, len(state[key]) // channels)}

    def changes(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of the settings that the config has otherwise."""
        return {
            name: value for name, value in settings.items() if getattr(self.defense.config, name) != value
        }

    def target(self, settings: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Names and shapes of the network with these settings, without its memory."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self.built:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                self.built[key] = self.changed(settings).network(self.data).state_dict()  # type: ignore[attr-defined]
        return self.built[key]

    def changed(self, settings: Mapping[str, Any]) -> Defense[Any]:
        """The defense with these settings."""
        return type(self.defense)(replaced(self.defense.config, settings))

    def suits(self, source: Source) -> bool:
        """Whether the dataset is the source's, or a folder of the user's that may hold it."""
        return self.data.name == source.dataset or (":" in self.data.name and self.data.shape == (3, 32, 32))

    def is_named_like(self, source: Source) -> bool:
        """Whether the file's own name or hash says that it is of this source."""
        if self.source.removeprefix("hf_hub:") == source.name:
            return True
        if source.sha256 is not None and self.sha256.startswith(source.sha256):
            return True
        place = "/" + Path(self.source.split("?")[0]).as_posix()
        return any(fnmatch.fnmatch(place, pattern) for pattern in source.files)

    def told_apart(self, fits: Sequence[_Fit]) -> list[_Fit]:
        """Those that the modules and entries of the file speak for; all of them where it is silent."""
        modules = self.file.modules
        named = [fit for fit in fits if fit.source and modules.intersection(fit.source.modules)]
        fits = named or list(fits)
        stating = [fit for fit in fits if fit.source and fit.source.states in self.file.entries]
        return stating or fits

    def finish(self, choice: _Choice, constants: Mapping[str, tuple[float, ...]]) -> Loaded:
        """The weights and the normalisation in place, and what they are."""
        fit, source = choice.fit, choice.source
        notes = list(self.file.notes)
        if choice.note is not None:
            notes.append(f"{choice.note}: {self.whose_normalisation(source, constants)} are used")
        if fit.changes:
            assert isinstance(self.model, Normalized)
            device = next(self.model.parameters()).device
            with torch.random.fork_rng(devices=[]):
                rebuilt = self.changed(fit.changes).build(self.data)
            self.model.net = self.net = rebuilt.get_submodule("net").to(device)
        self.net.load_state_dict(fit.state, strict=False)
        mean, std = self.normalisation(source, constants)
        return Loaded(
            source=self.source,
            sha256=self.sha256,
            origin=source.name if source else "plain state dict",
            clean=self.stated(source),
            mean=mean,
            std=std,
            settings=dict(fit.changes),
            notes=tuple(notes),
        )

    def normalisation(
        self, source: Source | None, constants: Mapping[str, tuple[float, ...]]
    ) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """The user's, else the file's, else the source's, else what the model has; set in the model."""
        if not isinstance(self.model, Normalized):
            return None, None
        config = self.defense.config
        chosen = {}
        for name in ("mean", "std"):
            buffer: Tensor = getattr(self.model.normalize, name)
            value = (
                getattr(config, name, None)
                or constants.get(name)
                or (getattr(source, name) if source else None)
            )
            if value is not None:
                buffer.copy_(torch.tensor(value, dtype=torch.float64).view(1, -1, 1, 1))
            chosen[name] = tuple(value) if value is not None else tuple(getattr(self.data, name))
        return chosen["mean"], chosen["std"]

    def whose_normalisation(self, source: Source | None, constants: Mapping[str, tuple[float, ...]]) -> str:
        """What `normalisation` takes mean and std from, in words."""
        config = self.defense.config
        if getattr(config, "mean", None) and getattr(config, "std", None):
            return "the mean and std that were set"
        if constants:
            return "the file's own mean and std"
        return "its mean and std" if source else "the dataset's mean and std"

    def stated(self, source: Source | None) -> float | None:
        """What the file itself states, else what its source does, in percent."""
        if source is None:
            return None
        said = self.file.entries.get(source.states) if source.states else None
        if said is None:
            return source.clean
        return float(said) * (100 if float(said) <= 1 else 1)


def _load_own(source: str, sha256: str, file: _File, model: nn.Module, defense: Defense[Any]) -> Loaded:
    misfit = _Misfit.of(file.state, model.state_dict(), strict=True)
    if len(misfit):
        raise CheckpointError(
            f"checkpoint {source!r} is of another network than {_name(defense)} with these settings: {misfit}"
        )
    model.load_state_dict(file.state)
    clean, constants = _stated(source, file.metadata, model)
    if isinstance(model, Normalized):
        for name, value in constants.items():
            getattr(model.normalize, name).copy_(torch.tensor(value).view(1, -1, 1, 1))
    return Loaded(
        source=source,
        sha256=sha256,
        origin="dwf-bench",
        clean=clean,
        mean=constants.get("mean"),
        std=constants.get("std"),
    )


def _stated(
    source: str, metadata: Mapping[str, str], model: nn.Module
) -> tuple[float | None, dict[str, tuple[float, ...]]]:
    """The clean accuracy in percent, and the normalisation, that a file of ours states.

    Raises:
        CheckpointError: they are no such numbers.
    """
    constants: dict[str, tuple[float, ...]] = {}
    channels = model.normalize.mean.numel() if isinstance(model, Normalized) else None
    try:
        for name in ("mean", "std"):
            if name in metadata:
                constants[name] = tuple(float(value) for value in json.loads(metadata[name]))
                if not all(map(math.isfinite, constants[name])) or len(constants[name]) != (
                    channels or len(constants[name])
                ):
                    raise ValueError(name)
        if min(constants.get("std", (1.0,))) <= 0:
            raise ValueError("std")
        clean = float(metadata["clean"]) if "clean" in metadata else None
        if clean is not None and not 0 <= clean <= 100:
            raise ValueError("clean")
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise CheckpointError(
            f"checkpoint {source!r} states a mean, std or clean accuracy that cannot be: "
            f"{ {name: metadata[name][:40] for name in ('mean', 'std', 'clean') if name in metadata} }; save it again"
        ) from None
    return clean, constants


def _sources(defense: Defense[Any]) -> tuple[Source, ...]:
    return tuple(getattr(defense, "sources", ()))


def _meaning(fit: _Fit) -> str:
    """What a choice between two fits would change."""
    assert fit.source is not None
    return repr((fit.source.mean, fit.source.std, sorted(fit.source.settings.items())))


def _name(defense: Defense[Any]) -> str:
    return type(defense).__name__


def _plain(values: tuple[float, ...] | None) -> str:
    return "unknown" if values is None else "/".join(f"{value:.4g}" for value in values)
