"""The right to deliver: one lock for each host and route, and the directory where deliverers keep their files.

    <directory>/.deliverers/<host>-<route>.lock   flock'ed by the one deliverer at work, whose `Outlook` it holds
    <directory>/.deliverers/<host>.log            what the deliverers of that host log

A route is a destination, and how it is reached (`stepspan.deliver.routes`). Only the holder of its lock sends by it. Of
several routes to a destination, each has its own sessions (`stepspan.deliver.sessions`), and a cursor is open once.
The lock is an flock, so the kernel lets go of it however its holder ends; a crash leaves the file, which means nothing
while nobody holds it. It is never removed: two processes could otherwise lock two files of one name. A rank that starts
a deliverer takes the lock first, and the deliverer inherits it: nobody else starts one meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from stepspan.journal.layout import open_path, read_file, slug
from stepspan.journal.liveness import exclusive

DELIVERERS_DIRECTORY = ".deliverers"
RETRY_INTERVAL_S = 0.1
OUTLOOK_BYTES = 512
RING_OFFSET, RING_BYTES = 512, 32
CLAIM_OFFSET, CLAIM_BYTES = 544, 64
"""Where in a lock's file what stands: what its holder says, what wakes it, what a rank has taken on."""


class Outlook(NamedTuple):
    """What a deliverer says of a receiver, for runs that end."""

    state: Literal["", "starting", "asking", "answering", "away"]
    """The deliverer is starting; its first request is on its way; the receiver takes something; it does not. "": nobody
    says anything."""
    since: float = 0.0
    """Unix seconds: when the deliverer was started, or the request that is under way began."""
    noticed: float = 0.0
    """When the last wake-up was seen (`DeliveryLock.ring`), Unix seconds; 0: none was."""
    tried: float = 0.0
    """When that wake-up was seen after which each signal has had its try, or is under way for longer than runs wait."""
    pid: int = 0
    """The deliverer's process; 0: not known."""
    message: str = ""
    """Why the receiver took nothing when it was last asked."""


UNKNOWN = Outlook("")

_held: set[int] = set()
"""The descriptors that have locks, of this process."""


class DeliveryLock:
    """The lock of one route on one host.

    Args:
        directory: The directory of the journals.
        host: The name of the host whose sessions are delivered.
        route: The name of the route's lock.

    """

    def __init__(self, directory: Path, host: str, route: str) -> None:
        self._directory = directory
        self._name = f"{slug(host)}-{route}.lock"
        self._fd = -1
        self._bell: socket.socket | None = None
        self.reported: Outlook | None = None
        """What this object has said since it has the lock."""
        self._heard = b""

    def acquire(self, timeout: float = 0.0) -> bool:
        """Take the lock if it is free.

        Args:
            timeout: For how many seconds to try again where another process holds it.

        Returns:
            Whether it is held by this object now.

        Raises:
            OSError: The lock file cannot be made.

        """
        deadline = time.monotonic() + timeout
        while not self._try_acquire():
            if time.monotonic() >= deadline:
                return False
            time.sleep(RETRY_INTERVAL_S)
        return True

    def _try_acquire(self) -> bool:
        fd = open_deliverers_file(self._directory, self._name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self.adopt(fd)
        return True

    def adopt(self, fd: int) -> None:
        """Hold the lock by a descriptor that has it: what `fileno` of another object was, maybe in another process."""
        os.set_inheritable(fd, False)
        self._fd, self.reported = fd, None
        _held.add(fd)

    @property
    def is_held(self) -> bool:
        """Whether it is held by this object."""
        return self._fd >= 0

    def fileno(self) -> int:
        """The descriptor that has the lock; -1: it is not held."""
        return self._fd

    def report(self, outlook: Outlook) -> None:
        """Say how things stand, for others to read; only the holder may. Raises nothing."""
        if outlook != self.reported:
            self.reported = outlook
            with suppress(OSError):  # a full disk: runs wait as if nothing was known
                state, *numbers, message = outlook
                text = " ".join([state or "-", *map(repr, numbers), message])
                os.pwrite(self._fd, text.encode("utf-8", "replace")[:OUTLOOK_BYTES].ljust(OUTLOOK_BYTES), 0)

    def outlook(self) -> Outlook:
        """What the holder of the lock said last; unknown where nobody holds it."""
        path = self._directory / DELIVERERS_DIRECTORY / self._name
        try:
            text = (read_file(path, OUTLOOK_BYTES) or b"").decode("utf-8", "ignore")
            state, since, noticed, tried, pid, *rest = text.split(maxsplit=5)
            message = "".join(rest).strip()
            found = Outlook(state.strip("-"), float(since), float(noticed), float(tried), int(pid), message)  # type: ignore[arg-type]
        except ValueError:  # nobody has said anything, or an earlier version has
            return UNKNOWN
        return found if self.is_taken() else UNKNOWN

    def ring(self) -> float:
        """Wake the holder: it sends what there is, and tries once more what it has put off.

        Any process may, of any rank. The holder sees it within a tenth of a second, and says so in its `Outlook`.

        Returns:
            The time, Unix seconds: the holder has seen this call if it has `noticed` one no earlier.

        Raises:
            OSError: The lock's file cannot be written.

        """
        now = time.time()
        fd = open_deliverers_file(self._directory, self._name, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(fd, (b"%.6f %s" % (now, os.urandom(4).hex().encode())).ljust(RING_BYTES), RING_OFFSET)
            with suppress(OSError), _datagrams() as caller:  # nobody sleeps on it: the holder looks by itself
                caller.sendto(b"!", _bell_address(fd))
        finally:
            os.close(fd)
        return now

    def bell(self) -> int:
        """A descriptor that can be read when somebody rings; -1 where there is none. Only the holder may ask."""
        if self._bell is None:
            with suppress(OSError):
                bell = _datagrams()
                try:
                    bell.bind(_bell_address(self._fd))
                except OSError:
                    bell.close()
                    raise
                self._bell = bell
        return self._bell.fileno() if self._bell is not None else -1

    def claim(self, word: str, seconds: float) -> bool:
        """Take on what one process of this host is to do.

        Args:
            word: What it is about.
            seconds: How long a claim holds.

        Returns:
            Whether no other process has claimed the word within this time.

        Raises:
            OSError: The lock's file cannot be read or written.

        """
        path = self._directory / DELIVERERS_DIRECTORY
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = blake2b(word.encode("utf-8", "replace"), digest_size=8).hexdigest()
        with exclusive(path):
            fd = open_deliverers_file(self._directory, self._name, os.O_RDWR | os.O_CREAT)
            try:
                claimed, _, at = os.pread(fd, CLAIM_BYTES, CLAIM_OFFSET).decode("ascii", "replace").partition(" ")
                with suppress(ValueError):
                    if claimed == mine and abs(time.time() - float(at)) < seconds:
                        return False
                os.pwrite(fd, f"{mine} {time.time():.3f}".encode().ljust(CLAIM_BYTES), CLAIM_OFFSET)
            finally:
                os.close(fd)
        return True

    def was_rung(self) -> bool:
        """Whether somebody has rung since this was last asked; only the holder may ask."""
        try:
            heard = os.pread(self._fd, RING_BYTES, RING_OFFSET)
        except OSError:
            return False
        last, self._heard = self._heard, heard
        return heard != last

    def is_taken(self) -> bool:
        """Whether anybody holds it, this object included."""
        try:
            fd = open_deliverers_file(self._directory, self._name, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def release(self) -> None:
        """Let go of the lock, if it is held; a process that has inherited it keeps it."""
        if self._bell is not None:
            self._bell.close()
            self._bell = None
        if self._fd >= 0:
            _held.discard(self._fd)
            os.close(self._fd)
            self._fd = -1


def _datagrams() -> socket.socket:
    """A socket of this host that never blocks. OSError."""
    if sys.platform != "linux":
        raise OSError("names without files are Linux's")
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    found.setblocking(False)
    return found


def _bell_address(fd: int) -> bytes:
    """The name of a lock's bell. It is no file: whoever reads all files of a directory would hang at a FIFO."""
    lock = os.fstat(fd)
    return b"\0stepspan-%x-%x-%d" % (lock.st_dev, lock.st_ino, os.geteuid())


def open_deliverers_file(directory: Path, name: str, flags: int) -> int:
    """Open a file that deliverers keep below `directory`; their own directory is made where it is missing. OSError."""
    path = directory / DELIVERERS_DIRECTORY
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return open_path(path / name, flags)


def _after_fork_in_child() -> None:
    """Close the copies of descriptors that another thread of the parent was about to hand to a deliverer."""
    for fd in _held:
        with suppress(OSError):
            os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
