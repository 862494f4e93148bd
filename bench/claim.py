"""Who works on a run or a training: one process at a time. The others wait, and say for whom.

The lock is the kernel's (`flock`, by the library filelock). It ends with the process that holds it, however that ended, so
no lock is ever stale and none has to be deleted. Over NFS Linux passes `flock` on to the server, from NFS 4 or `lockd` on;
where a file system has no locks that is said, and both processes work: whatever they write is whole, and of two equal batches
one counts. So a lock saves work, and nothing that is true depends on it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from bench import processes
from bench.errors import UsageError
from bench.record import UNDER_WAY, atomic, cannot_write

#: seconds between two looks at a lock that somebody has
LOOK = 0.2
#: a file system says with these that it knows no locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def claim(
    results: Path, folder: Path, say: Callable[[str], None], *, together: bool = False
) -> Iterator[None]:
    """Has the folder of a run or a training to itself; waits while another process has it.

    What a killed process left half-written there is removed.

    Args:
        results: the results folder.
        folder: below it; need not be there yet.
        say: hears whom is waited for.
        together: whether all processes of this command work there; then their first one has it for all.

    Raises:
        UsageError: a link leads from the results folder to elsewhere, or it cannot be written.
    """
    _inside(results, folder)
    if together and processes.rank():
        yield
        return
    name = hashlib.sha256(folder.relative_to(results).as_posix().encode()).hexdigest()[:16]
    file, who = (results / ".locks" / f"{name}{suffix}" for suffix in (".lock", ".json"))
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _wait(lock, file, who, folder, say)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise cannot_write(file, error) from None
        say(
            f"{results} lies on a file system without locks; two processes may do the same work, and lose none"
        )
        yield
        return
    try:
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": f"{datetime.now(timezone.utc):%F %T} UTC",
        }
        atomic(who, json.dumps(me).encode())
        for place in (folder, folder / "parts"):
            for left in place.glob(f".*{UNDER_WAY}"):
                left.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):
            who.unlink(missing_ok=True)
        lock.release()


def _wait(lock: FileLock, file: Path, who: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Takes the lock; says once whom it waits for.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    said = False
    while True:
        try:
            lock.acquire(timeout=LOOK, poll_interval=LOOK)
            return
        except Timeout:
            if not file.exists():
                raise OSError(errno.EACCES, os.strerror(errno.EACCES)) from None
            if not said:
                say(f"{holder(who)} works on {folder}; this one waits for it (Ctrl-C gives up)")
                said = True


def holder(who: Path) -> str:
    """The process that has a lock, in words."""
    try:
        known = json.loads(who.read_bytes())
        return f"process {known['pid']} on {known['host']} (since {known['since']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # it has taken the lock and not yet written who it is
        return "another process"


def _inside(results: Path, folder: Path) -> None:
    """Refuses to write through a link that leads out of the results folder; that folder itself may be a link.

    Raises:
        UsageError: there is such a link.
    """
    root = results.resolve()
    for place in (folder, folder / "parts", results / ".locks"):
        try:
            there = place.resolve()
        except (OSError, RuntimeError):
            raise UsageError(f"{place} is a link in a circle; remove it") from None
        if not there.is_relative_to(root):
            raise UsageError(
                f"{place} leads out of the results folder, to {there}; nothing is written there: remove the link, or link the "
                "whole results folder"
            )
