"""Rows on their way into a file that is only ever appended to.

Each row gets there once and in order, whatever the file system does in between:

- What a failed or short write has left over waits in memory, and the next flush goes on at the very byte.
- A forked child leaves to its parent what waited there.
- The owner of a `RowWriter` calls `flush` one last time at the end (`weakref.finalize` does so at exit, too); a worker
  of multiprocessing, which leaves without running atexit, is taken care of here.
- Nothing is raised: the first failure is logged, and rows beyond `MAX_WAITING_BYTES` are counted in `lost`.

The file is opened for each flush, so it may be rotated, and no descriptor is shared with a child.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepspan.conversion import json_value
from stepspan.copying import SharedByCopies
from stepspan.values import to_float

log = logging.getLogger("stepspan")

MAX_WAITING_BYTES = 64 << 20
APPEND = os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)


class RowWriter(SharedByCopies):
    """Appends rows to the file at `path`, which is created with its directories at the first flush.

    Any number of threads may use one writer, and a signal handler may add a row.

    Args:
        path: The file.
        write: `os.write`, or what a test puts in its place.

    """

    def __init__(self, path: str | os.PathLike[str], *, write: Callable[[int, bytes], int] = os.write) -> None:
        self.path = Path(os.path.expanduser(path)).absolute()
        self.lost = 0
        self._write = write
        self._warned: set[int | None] = set()
        """Error numbers of the failures that were logged."""
        self._reset()

    def _reset(self) -> None:
        """Start anew in this process, with no rows waiting."""
        self._lock = threading.RLock()
        self._waiting = bytearray()
        self._busy = False
        self._pid = os.getpid()
        process, util = map(sys.modules.get, ("multiprocessing.process", "multiprocessing.util"))
        if process and util and process.parent_process() is not None:
            util.Finalize(None, self.flush, exitpriority=0)

    def add(self, row: Any) -> None:
        """Take a row, any object that `to_json` makes JSON of. The next flush writes it."""
        line = f"{to_json(row)}\n".encode()
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            if len(self._waiting) + len(line) > MAX_WAITING_BYTES:
                self.lost += 1
            else:
                self._waiting += line

    def flush(self) -> None:
        """Write the rows that wait. Never raises."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            if self._busy or not self._waiting:  # busy: a signal handler logs in the middle of a write
                return
            self._busy = True
            try:
                fd = open_append(self.path, mode=0o666)
                try:
                    while self._waiting:
                        del self._waiting[: self._write(fd, bytes(self._waiting))]
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno not in self._warned:
                    self._warned.add(error.errno)
                    log.warning("stepspan: %s cannot be written: %s; rows wait (logged once)", self.path, error)
            finally:
                self._busy = False


def open_append(path: Path, *, mode: int, flags: int = os.O_WRONLY) -> int:
    """A descriptor that appends to a file, which is created with its directories if need be. Raises OSError."""
    flags |= APPEND
    try:
        return os.open(path, flags, mode)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, mode)


def to_json(value: Any, indent: int | None = None) -> str:
    """Any object as JSON text, as Python's `json` writes it: bare NaN included, because its readers expect it.

    What JSON has no word for becomes a number where it is one (a numpy scalar, a 0-d tensor), and text otherwise. Keys
    at the top are text. Never raises.
    """
    try:
        text = json.dumps(value, indent=indent, default=_json_default)
        text.encode()  # a lone surrogate is no UTF-8
        return text
    except Exception:  # a key that is no text, a circle, whatever a user's `__float__` raises
        is_dict = isinstance(value, dict)
        value = {key: json_value(item) for key, item in value.items()} if is_dict else json_value(value)
        return json.dumps(value, indent=indent, default=str)


def to_scalar(value: Any) -> float | None:
    """A number, or an array without dimensions, as a float; None for all else, bool and text included."""
    try:
        if isinstance(value, (bool, str, bytes)) or tuple(getattr(value, "shape", ())):
            return None
    except Exception:  # an attribute of a user's object may raise anything
        return None
    return to_float(value)


def _json_default(value: Any) -> Any:
    try:
        return operator.index(value)
    except Exception:  # not an integer
        number = to_scalar(value)
        return json_value(value) if number is None else number
