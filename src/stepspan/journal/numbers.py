"""The numbers that forked workers go by: small ones, taken again, so that their series don't become more for ever.

    <directory>/<job>/<host>/.rank-00003.worker2    flock'ed by the process that is worker 2 of rank 3 while it lives;
                                                    holds the name of its session

A worker takes the smallest number whose last owner has ended, and has written nothing for `REUSE_AFTER_S`: the points
that end its series, and rows that ran ahead of their lines, are over by then. At most `MAX_RESTING` numbers rest so.
The kernel lets go of the lock however its owner ends. The file is never removed: two processes could otherwise lock
two files of one name.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from stepspan.journal.layout import Descriptors, SessionPath, open_path, segment_name, session_name
from stepspan.journal.liveness import CLOSED

REUSE_AFTER_S = 10.0
MAX_RESTING = 8
"""Where more numbers than that are free but rest, the one that has rested longest is taken: workers may come and go by
the hundred in ten seconds. Its points then begin behind those of its last owner, as the header says (`not_before`)."""
MAX_NAME_BYTES = 255
"""Of a session's directory."""


class WorkerNumber:
    """A number that is this process's while it lives.

    Attributes:
        number: From 1 on.

    """

    def __init__(self, number: int, directory: Path, fd: int) -> None:
        self.number = number
        self._directory, self._fd = directory, fd
        self._descriptors = Descriptors()
        self._descriptors.hold(fd)

    @property
    def is_held(self) -> bool:
        """Whether it still is: its file may be deleted with the journal, or somebody close our descriptor."""
        return not self._descriptors.gone()

    def begin(self, session: str) -> SessionPath | None:
        """Note that a session begins. OSError.

        Args:
            session: The name of its directory.

        Returns:
            The one before it that went by this number.

        """
        before = _last_session(self._directory, self._fd)
        os.pwrite(self._fd, session.encode().ljust(MAX_NAME_BYTES), 0)
        return before

    def forget(self) -> None:
        """Close our copy of the descriptor: in a forked child, which must not keep its parent's number."""
        self._descriptors.close_all()


def take_worker_number(directory: Path, rank: int, role: str) -> WorkerNumber | None:
    """Take the smallest number that is free.

    Args:
        directory: Of the host, in the job's: where the worker's sessions lie.
        rank: Of this process.
        role: Of the process that began the run; the worker's own goes on with "worker" and the number.

    Returns:
        The number; None where files can't be locked.

    """
    resting: list[tuple[float, int]] = []
    try:
        for number in count(1):
            found = _lock(directory, rank, role, number)
            if found is None:
                continue
            quiet = _quiet_for(directory, found)
            if quiet >= REUSE_AFTER_S:
                return WorkerNumber(number, directory, found)
            os.close(found)
            resting.append((quiet, number))
            while len(resting) >= MAX_RESTING:
                _, number = resting.pop(resting.index(max(resting)))
                found = _lock(directory, rank, role, number)
                if found is not None:
                    return WorkerNumber(number, directory, found)
    except OSError:
        pass
    return None


def _lock(directory: Path, rank: int, role: str, number: int) -> int | None:
    """A descriptor that has the lock of a number; None where its owner lives. OSError: files can't be locked here."""
    name = session_name(rank, f"{role}worker{number}", "").rstrip("-")
    fd = open_path(directory / f".{name}", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return fd


def _last_session(directory: Path, fd: int) -> SessionPath | None:
    name = os.pread(fd, MAX_NAME_BYTES, 0).decode("utf-8", "replace").strip()
    return SessionPath.of(directory / name)


def _quiet_for(directory: Path, fd: int) -> float:
    """Seconds since the last owner of a number began a session, or wrote anything; infinite where there was none."""
    session = _last_session(directory, fd)
    if session is None:
        return math.inf
    written = [os.fstat(fd).st_mtime]
    with suppress(OSError):
        for file in (CLOSED, *map(segment_name, session.segments()[-1:])):
            with suppress(FileNotFoundError):
                written.append((session.path / file).stat().st_mtime)
    return time.time() - max(written)
