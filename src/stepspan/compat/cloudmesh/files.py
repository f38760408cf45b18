"""Where records go: a JSONL file that many may append to, or a text for people."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from stepspan.compat.row_writer import open_append
from stepspan.conversion import json_value
from stepspan.errors import ConfigError

SQLITE_MAGIC = b"SQLite format 3\0"
SETTLE_S = 0.02
SETTLE_CHECKS = 5
"""A write takes less than all of these together, even where its process waits for a CPU in the middle of it."""
FILE_MODE = 0o600
READ_AND_APPEND = os.O_RDWR | getattr(os, "O_NONBLOCK", 0)


def file_path(path: object, default: str) -> Path:
    """Where a file is or will be. Raises `ConfigError` for a path that cannot be a file."""
    mode = stat.S_IFREG
    try:
        found = Path(os.path.expanduser(default if path is None else path))  # type: ignore[call-overload]
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = found.stat().st_mode
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError("path", path, f"name a file: {error}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError("path", str(path), "this is not a file: name one, or one that does not exist yet")
    parent = next((parent for parent in found.absolute().parents if parent.exists()), None)
    if parent is not None and not parent.is_dir():
        raise ConfigError("path", str(path), f"{parent} is a file: name a directory that files can go to")
    return found


def is_database(path: Path) -> bool:
    """Whether a file is a SQLite database; False where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return False


class JsonlBackend:
    """A line per record, appended with one `write(2)`: any number of threads and processes may write one file.

    The file is opened for each record, so it may be rotated. A line that a full disk, or a writer that died, cut in the
    middle is ended before the next one. No lock is needed, so a signal handler may emit a record, too.
    """

    def __init__(self, path: object = None) -> None:
        self.path = file_path(path, "telemetry.jsonl")
        if is_database(self.path):
            raise ConfigError("path", str(path), 'this is a SQLite database: give backend="sqlite", or another path')
        self._ends_with_line = False
        """Whether our own last line is known to be complete."""

    def emit(self, record: Mapping[str, Any]) -> None:
        """Append a record as a JSON line. Raises OSError."""
        line = orjson.dumps(json_value(record)) + b"\n"
        fd = open_append(self.path, mode=FILE_MODE, flags=READ_AND_APPEND)
        try:
            if not self._ends_with_line and _is_torn(fd):
                line = b"\n" + line
            self._ends_with_line = False
            while line:
                line = line[os.write(fd, line) :]
            self._ends_with_line = True
        finally:
            os.close(fd)


class TextBackend:
    """Three lines per record for people, in a file, or on standard output."""

    def __init__(self, path: object = None) -> None:
        self.path = None if path is None else file_path(path, "")

    def emit(self, record: Mapping[str, Any]) -> None:
        """Append a record as three lines. Raises OSError."""
        metrics = ", ".join(f"{key}={value}" for key, value in (record.get("metrics") or {}).items())
        event = f" {record['event']}" if record.get("event") else ""
        status = str(record.get("status") or "-").upper()
        head = f"[{record.get('timestamp')}] {record.get('command')}{event} | STATUS: {status}"
        text = f"{head} | Metrics: {metrics or 'None'}\nMessage: {record.get('message') or ''}\n{'-' * 40}\n"
        if self.path is None:
            sys.stdout.write(text)
            return
        with open(open_append(self.path, mode=FILE_MODE), "ab") as file:
            file.write(text.encode(errors="backslashreplace"))


def _is_torn(fd: int) -> bool:
    """Whether a file ends within a line that no other process is just writing: a write may be seen in parts."""
    for _ in range(SETTLE_CHECKS):
        size = os.fstat(fd).st_size
        if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
            return False
        time.sleep(SETTLE_S)
    return True
