"""Alive, dead or unknown: who may say that a session has ended, and how everyone comes to agree.

The writer holds an flock for as long as it lives. A free lock means dead, but only on the host and boot that wrote the
session: elsewhere the lock may not travel, and silence for `dead_after` is the only sign. Whoever decides creates
`closed.json` by hard link, which exactly one can do, and everyone reads the end from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from stepspan.journal.layout import open_directory, open_file, read_file

DEAD_AFTER = 900.0
CLOSED = "closed.json"
LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Closed:
    """The end of a session: its last event's `seq` and `ts` (Unix ns), and its status."""

    seq: int
    ts: int
    status: str


def take_lock(directory: Path) -> int | None:
    """Take the session's lock; a descriptor to keep, or None where another process holds it."""
    dir_fd = open_directory(directory)
    try:
        fd = open_file(LOCK, os.O_RDWR | os.O_CREAT, dir_fd=dir_fd)
    finally:
        os.close(dir_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def is_alive_here(directory: Path) -> bool:
    """Whether a process of this host holds the session's lock."""
    try:
        fd = take_lock(directory)
    except OSError:
        return False
    if fd is None:
        return True
    os.close(fd)
    return False


def read_closed(directory: Path) -> Closed | None:
    """What `closed.json` says, if there is one."""
    raw = read_file(directory / CLOSED)
    if raw is None:
        return None
    try:
        content = orjson.loads(raw)
        return Closed(int(content["seq"]), int(content["ts"]), str(content["status"]))
    except (ValueError, KeyError, TypeError):
        return None


def write_closed(directory: Path, closed: Closed, *, by: str, mode: int = 0o600) -> Closed:
    """Say that a session has ended, unless somebody has; returns what stands there now. OSError: it cannot be said."""
    content = orjson.dumps({"seq": closed.seq, "ts": closed.ts, "status": closed.status, "by": by})
    dir_fd = open_directory(directory)
    draft = f".{CLOSED}.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        with open(open_file(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=dir_fd, mode=mode), "wb") as file:
            file.write(content)
        try:
            with contextlib.suppress(FileExistsError):
                os.link(draft, CLOSED, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        finally:
            os.unlink(draft, dir_fd=dir_fd)
    finally:
        os.close(dir_fd)
    return read_closed(directory) or closed


def is_dead(directory: Path, header: Mapping[str, Any], *, boot_id: str, quiet_for: float, dead_after: float) -> bool:
    """Whether a session without a `closed.json` has ended. `quiet_for`: seconds since its last byte."""
    if header.get("boot_id") != boot_id:
        return quiet_for >= dead_after
    try:
        fd = take_lock(directory)
    except OSError:  # not ours to lock
        return quiet_for >= dead_after
    if fd is None:
        return False
    os.close(fd)
    return True


def quiet_for(path: Path) -> float:
    """Seconds since a file was last written, by the wall clock; 0 where that cannot be told."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0
