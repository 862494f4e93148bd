"""The processes that share one command: as many as torchrun started, or this one alone.

    torchrun --nproc-per-node 4 -m bench run --defense dwf --dataset cifar10

Every process walks the same way through the same code. What is to be done once for all of them is handed out piece by piece
(`share`), what they must see alike is what the first to come saw (`agreed`), and process 0 alone speaks. They meet in the
key-value store that torchrun's rendezvous brings; nothing here schedules, and nothing is trained or attacked differently for
being many.

One that fails says why, in one line, before it goes; the others find that in the store and end with the same exit code.
Without torchrun each function is what it says for one process, and torch.distributed is not even imported.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.errors import Elsewhere, Interrupted, UsageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

#: how long a file that another process has written may take to be seen: network file systems keep directories for a while
SEEN_WITHIN = 90.0
#: seconds within which all processes must have started
TOGETHER_WITHIN = 600.0
#: seconds between two looks at what the others have come to
LOOK = 0.05
#: seconds that process 0 stays for the others to hear of a failure, where torchrun keeps no store
LINGER = 5.0
#: a collective may wait as long as the slowest process computes; torchrun sees to those that died
PATIENCE = timedelta(days=7)


@dataclass
class Team:
    """The processes of this command as one of them sees them."""

    rank: int
    count: int
    store: Any
    """torch.distributed's key-value store"""
    met: int = 0
    """how often they have met; all count alike, since all walk the same way"""

    def place(self) -> str:
        """The key of the next meeting."""
        self.met += 1
        return f"bench/{self.met}"


_team: Team | None = None


def rank() -> int:
    """Which process this is; 0 speaks and writes for all."""
    return 0 if _team is None else _team.rank


def count() -> int:
    """How many there are."""
    return 1 if _team is None else _team.count


def local_rank() -> int:
    """Which one of its machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _team is not None else 0


@contextmanager
def joined() -> Iterator[None]:
    """Finds the others that torchrun started, and parts from them in the end; within another such block, nothing.

    Raises:
        Elsewhere: another process failed first, and has said why.
        Interrupted: one has gone without a word, such as by SIGKILL.
    """
    global _team
    if _team is not None or int(os.environ.get("WORLD_SIZE", 1)) <= 1 or "RANK" not in os.environ:
        yield
        return
    with _reaching():
        _team = _find()
    try:
        # one that fails, or ends, while another still makes its connections would break those
        barrier()
        yield
        # process 0, whose store the others may be asking, goes last
        arrive()
    except BaseException as error:
        code = getattr(error, "exit_code", Interrupted.exit_code if _stops(error) else 1)
        # 0 is how click ends after --help
        if code and not isinstance(error, Elsewhere) and not _first_to_fail(code):
            raise Elsewhere(code) from error
        raise
    finally:
        _leave()
        _team = None


def _find() -> Team:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    kept, place, size = next(rendezvous("env://", timeout=timedelta(seconds=TOGETHER_WITHIN)))
    store = dist.distributed_c10d.PrefixStore(_attempt(kept, place, size), kept)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        store=dist.distributed_c10d.PrefixStore("group", store),
        rank=place,
        world_size=size,
        timeout=PATIENCE,
    )
    return Team(place, size, store)


def _attempt(store: Any, place: int, size: int) -> str:
    """A name that only the processes of this attempt have: torchrun keeps its store, and what is in it, when it restarts them.

    Every process calls a name of its own; process 0, whose name it will be, answers each of them. None that is dead does.

    Raises:
        Interrupted: not all come.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + TOGETHER_WITHIN
    answered: dict[int, str] = {}
    if place:
        store.set(f"bench/calls/{place}", own)
    while time.monotonic() < until:
        if place and store.check([f"bench/answers/{own}"]):
            name: str = store.get(f"bench/answers/{own}").decode()
            store.add(f"{name}/here", 1)
            return name
        if not place:
            if store.add(f"{own}/here", 0) == size - 1:
                return own
            for other in range(1, size):
                if store.check([f"bench/calls/{other}"]):
                    called = store.get(f"bench/calls/{other}").decode()
                    if answered.get(other) != called:
                        store.set(f"bench/answers/{called}", own)
                        answered[other] = called
        time.sleep(LOOK)
    raise Interrupted(f"not all of {size} processes have come within {TOGETHER_WITHIN:.0f} s")


def _leave() -> None:
    """Goes; where process 0 keeps the store, it gives the others a moment to read there how it all ended."""
    import torch.distributed as dist

    assert _team is not None
    # what cannot be reached or taken down any more was taken down by the other side
    with suppress(RuntimeError):
        gone = _team.store.add("bench/gone", 1)
        until = time.monotonic() + LINGER
        keeps = _team.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while keeps and gone < _team.count and time.monotonic() < until:
            time.sleep(LOOK)
            gone = _team.store.add("bench/gone", 0)
    with suppress(RuntimeError):
        dist.destroy_process_group()


def _stops(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


def _first_to_fail(code: int) -> bool:
    """Whether no other process failed before; if so, all others will hear of it."""
    assert _team is not None
    try:
        first: bool = _team.store.add("bench/failures", 1) == 1
        if first:
            _team.store.set("bench/failed", str(code))
    except RuntimeError:
        # nobody to tell; whoever has gone took the store along
        return True
    return first


def check() -> None:
    """Goes no further where another process has failed.

    Raises:
        Elsewhere: it has, and has said why.
    """
    if _team is not None:
        with _reaching():
            if _team.store.check(["bench/failed"]):
                raise Elsewhere(int(_team.store.get("bench/failed")))


@contextmanager
def _reaching() -> Iterator[None]:
    """Says in one line that the others cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        # torch.distributed's errors are RuntimeErrors, whatever the backend
        raise Interrupted(
            f"another process of this command has gone ({str(error).splitlines()[0][:200]}); what was finished is kept, the same command "
            "goes on from there, and torchrun --max-restarts N does so by itself"
        ) from error


def _wait(come: Callable[[Any], bool]) -> None:
    """Waits until it holds, or another process has failed."""
    pause = LOOK
    while True:
        with _reaching():
            if come(_team):
                return
        check()
        time.sleep(pause)
        pause = min(1.0, 1.2 * pause)


def barrier() -> None:
    """Waits until every process has come here."""
    arrive(wait=True)


def arrive(*, wait: bool | None = None) -> None:
    """Says that this process has come here; process 0, or whoever is told to, waits for all others.

    Raises:
        Elsewhere: one of them has failed and will not come.
    """
    if _team is None:
        return
    place = _team.place()
    with _reaching():
        _team.store.add(place, 1)
    if _team.rank == 0 if wait is None else wait:
        _wait(lambda team: team.store.add(place, 0) == team.count)


def agreed(value: T) -> T:
    """The value of the first process that comes here, for all; it is what JSON can hold."""
    if _team is None:
        return value
    place = _team.place()
    with _reaching():
        said = _team.store.compare_set(place, "", json.dumps(value))
    found: T = json.loads(said)
    return found


def share(pieces: Sequence[T]) -> Iterator[tuple[int, T]]:
    """The pieces that this process is to do, with their numbers: each goes to whichever process asks first.

    All processes must give the same pieces. Whoever is quicker does more; none is done twice, and none is left out.

    Raises:
        Elsewhere: another process has failed.
    """
    if _team is None:
        yield from enumerate(pieces)
        return
    place = _team.place()
    while True:
        check()
        with _reaching():
            number = _team.store.add(place, 1) - 1
        if number >= len(pieces):
            return
        yield number, pieces[number]


def anyone(holds: bool) -> bool:
    """Whether it holds in some process; all must ask."""
    if _team is None:
        return holds
    import torch
    import torch.distributed as dist

    found = torch.tensor([int(holds)])
    with _reaching():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def summed(terms: Tensor) -> Tensor:
    """The sum of all processes' tensors, in a new one."""
    import torch.distributed as dist

    total = terms.clone()
    with _reaching():
        dist.all_reduce(total)
    return total


def gathered(mine: Tensor) -> list[Tensor]:
    """The tensors of all processes, in their order; all are of one shape."""
    import torch.distributed as dist

    found = [mine.new_empty(mine.shape) for _ in range(count())]
    with _reaching():
        dist.all_gather(found, mine)
    return found


def alike(tensors: Iterable[Tensor]) -> None:
    """Writes what process 0 has in these tensors into every other process's."""
    import torch.distributed as dist

    for one in tensors:
        sent = one.detach().contiguous()
        with _reaching():
            dist.broadcast(sent, 0)
        one.detach().copy_(sent)


def seen(file: Path) -> None:
    """Waits until a file that another process has written is seen here.

    Raises:
        UsageError: it is not, so that the processes share no file system.
    """
    since = time.monotonic()
    while not file.exists():
        check()
        if time.monotonic() - since > SEEN_WITHIN:
            raise UsageError(
                f"process {rank()} does not see {file}, which another process wrote; all hosts of a command must share the folder that "
                "--results names"
            )
        # makes a network file system look again
        with suppress(OSError):
            list(file.parent.iterdir())
        time.sleep(0.2)


def shared(folder: Path) -> None:
    """Sees that all processes have this folder in common.

    Raises:
        UsageError: they have not.
    """
    if _team is None:
        return
    name = agreed(f".{os.getpid()}-{time.time_ns()}")
    token = folder / name
    try:
        if rank() == 0:
            token.write_text("")
        arrive(wait=True)
        seen(token)
        arrive()
    finally:
        if rank() == 0:
            token.unlink(missing_ok=True)
