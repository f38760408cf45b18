"""The right to deliver: one lock for each host and destination, and the directory where deliverers keep their files.

    <directory>/.deliverers/<host>-<destination>.lock   empty; flock'ed by the one deliverer that is at work
    <directory>/.deliverers/<host>.log                  what the deliverers of that host log

Only the holder of a destination's lock moves cursors of that destination for sessions of that host: two at once would
send everything twice and overwrite each other's positions. The lock is an flock, so the kernel lets go of it however
its holder ends; a crash leaves the file, which means nothing while nobody holds it. It is never removed: two processes
could otherwise lock two files of one name.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from stepspan.journal.layout import open_path, slug

DELIVERERS_DIRECTORY = ".deliverers"
RETRY_INTERVAL_S = 0.1


class DeliveryLock:
    """The lock of one destination on one host.

    Args:
        directory: The directory of the journals.
        host: The name of the host whose sessions are delivered.
        destination: The name of the exporter's destination.

    """

    def __init__(self, directory: Path, host: str, destination: str) -> None:
        self._directory = directory
        self._name = f"{slug(host)}-{destination}.lock"
        self._fd = -1

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
        self._fd = fd
        return True

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_deliverers_file(directory: Path, name: str, flags: int) -> int:
    """Open a file that deliverers keep below `directory`; their own directory is made where it is missing. OSError."""
    path = directory / DELIVERERS_DIRECTORY
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return open_path(path / name, flags)
