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

from stepspan.errors import ConfigError
from stepspan.values import json_value

SQLITE = b"SQLite format 3\0"
SETTLE = 0.02  # seconds; more than a write takes


def file_path(path: object, default: str) -> Path:
    """Where a file is or will be. Raises `ConfigError` for what can't be one."""
    mode = stat.S_IFREG
    try:
        found = Path(default if path is None else path).expanduser()  # type: ignore[arg-type]
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = found.stat().st_mode
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError("path", path, f"name a file: {error}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError("path", str(path), "this is no file: name one, or one that does not exist yet")
    above = next((parent for parent in found.absolute().parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise ConfigError("path", str(path), f"{above} is a file: name a directory that files can go to")
    return found


def is_database(path: Path) -> bool:
    """Whether a file is SQLite's."""
    try:
        with open(path, "rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False


class JsonlBackend:
    """A line per record, appended with one `write(2)`: any number of threads and processes may write one file.

    The file is opened for each record, so it may be rotated. A line that a full disk, or a writer that died, cut in the
    middle is ended before the next one. Needs no lock, so a signal handler may tell, too.
    """

    def __init__(self, path: object = None) -> None:
        self.path = file_path(path, "telemetry.jsonl")
        if is_database(self.path):
            raise ConfigError("path", str(path), 'this is a SQLite database: give backend="sqlite", or another path')
        self._seen = False

    def emit(self, record: Mapping[str, Any]) -> None:
        """Append a record. Raises OSError."""
        line = orjson.dumps(json_value(record)) + b"\n"
        if not self._seen:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        fd = os.open(self.path, flags, 0o600)
        try:
            if not self._seen and _is_torn(fd):
                line = b"\n" + line
            self._seen = False
            rest = line[os.write(fd, line) :]
            while rest:
                rest = rest[os.write(fd, rest) :]
            self._seen = True
        finally:
            os.close(fd)

    def close(self) -> None:
        """Nothing is open."""


class TextBackend:
    """Three lines per record for people, in a file, or on standard output."""

    def __init__(self, path: object = None) -> None:
        self.path = None if path is None else file_path(path, "")

    def emit(self, record: Mapping[str, Any]) -> None:
        """Append a record. Raises OSError."""
        metrics = ", ".join(f"{key}={value}" for key, value in (record.get("metrics") or {}).items())
        event = f" {record['event']}" if record.get("event") else ""
        status = str(record.get("status") or "-").upper()
        head = f"[{record.get('timestamp')}] {record.get('command')}{event} | STATUS: {status}"
        text = f"{head} | Metrics: {metrics or 'None'}\nMessage: {record.get('message') or ''}\n{'-' * 40}\n"
        if self.path is None:
            sys.stdout.write(text)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace", opener=_private) as file:
            file.write(text)

    def close(self) -> None:
        """Nothing is open."""


def _is_torn(fd: int) -> bool:
    """Whether a file ends within a line, and nobody is just writing it: to others a write shows itself in parts."""
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return False
    time.sleep(SETTLE)
    return os.fstat(fd).st_size == size and os.pread(fd, 1, size - 1) != b"\n"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
