"""Lines on their way into a file: each gets there once, in order, whatever the file system does in between.

- What a failed or short write has left over waits in memory and goes on at the very byte, with the next flush.
- A forked child leaves to its parent what waited there.
- Whoever owns a `Lines` calls `flush` for a last time at the end (`weakref.finalize` does, at exit too); a worker of
  multiprocessing, which leaves past atexit, is seen to here.
- Nothing is raised: trouble is logged once, and lines beyond `LONGEST` waiting bytes are counted in `lost`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("stepspan")

LONGEST = 64 << 20


class Lines:
    """Appends to the file at `path`, which is made with its directories at the first flush."""

    def __init__(self, path: str | os.PathLike[str], *, write: Callable[[int, bytes], int] = os.write) -> None:
        self.path = Path(path).expanduser().absolute()
        self.lost = 0
        self._write = write
        self._told = False
        self._begin()

    def _begin(self) -> None:
        """In this process, which nothing waits for yet."""
        self._lock = threading.RLock()
        self._waiting = bytearray()
        self._busy = False
        self._pid = os.getpid()
        process, util = map(sys.modules.get, ("multiprocessing.process", "multiprocessing.util"))
        if process and util and process.parent_process() is not None:
            util.Finalize(None, self.flush, exitpriority=0)

    def add(self, line: bytes) -> None:
        """Take a line, newline included. It is written by the next flush."""
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            if len(self._waiting) + len(line) > LONGEST:
                self.lost += 1
            else:
                self._waiting += line

    def flush(self) -> None:
        """Write what waits."""
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            if self._busy or not self._waiting:  # busy: a signal handler logs in the middle of a write
                return
            self._busy = True
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
                try:
                    while self._waiting:
                        del self._waiting[: self._write(fd, bytes(self._waiting))]
                finally:
                    os.close(fd)
            except OSError as error:
                if not self._told:
                    self._told = True
                    log.warning("%s cannot be written: %s; lines wait in memory (told once)", self.path, error)
            finally:
                self._busy = False
