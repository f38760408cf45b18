"""Alive, dead or unknown: who may say that a session has ended, and how everyone comes to agree.

The writer holds an flock for as long as it lives. A free lock means dead, but only on the host and boot that wrote the
session: elsewhere the lock may not travel, and silence for `dead_after` is the only sign. Whoever decides creates
`closed.json` by hard link, which exactly one can do, and everyone reads the end from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from stepspan.errors import JournalError
from stepspan.journal.format import decode
from stepspan.journal.layout import SessionPath, create_file, open_path, read_file, segment_name, writable_by_us

DEAD_AFTER_S = 900.0
"""Silence after which a session of another host or boot counts as dead."""
EXCLUSIVE_TIMEOUT_S = 5.0
"""For which one holder is waited for; others may have it before and after."""
RETRY_INTERVAL_S = 0.005
HOLDER_BYTES = 8
"""By which who waits sees that another one has got the lock."""
MAX_HEADER_BYTES = 1 << 20
CLOSED = "closed.json"
RESTS = "rests.json"
LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Closed:
    """The end of a session: its last event's `seq` and `ts` (Unix ns), and its status.

    `lost`: how many of the last events could not be written, and stand nowhere.
    """

    seq: int
    ts: int
    status: str
    lost: int = 0


def take_lock(directory: Path) -> int:
    """Make and take the lock of a session that is being made: a descriptor to keep. OSError: it can't be made."""
    fd = open_path(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    with contextlib.suppress(OSError):  # a file system without locks: only silence will tell
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def lock_is_held(directory: Path) -> bool:
    """Whether a process of this host holds the session's lock. OSError where that can't be told.

    Asks for a share of it, so that two who ask at once don't take each other for the writer.
    """
    fd = open_path(directory / LOCK, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Within it, no other process or thread is within it for the same file, on any host to which locks travel.

    It is kept by a lock that goes with its holder. One that is held for longer than `EXCLUSIVE_TIMEOUT_S` is not waited
    for. Where the file system has no locks, the processes of this host lock a file of their own in its stead.

    Args:
        path: Of the file, which is made and never removed: two could otherwise lock two files of one name.

    """
    with contextlib.ExitStack() as files:
        try:
            fd = _open_claim(path, files)
            locked = _wait_for_lock(fd)
            if locked is None:
                _wait_for_lock(_open_claim(_substitute(path), files))
        except OSError:  # nobody can be kept out
            pass
        yield


def _open_claim(path: Path, files: contextlib.ExitStack) -> int:
    fd = open_path(path, os.O_RDWR | os.O_CREAT)
    files.callback(os.close, fd)
    files.callback(_unlock, fd)
    return fd


def _unlock(fd: int) -> None:
    """Unlock a file, also of the copy that another thread's forked child may have."""
    with contextlib.suppress(OSError):  # the file system has no locks
        fcntl.flock(fd, fcntl.LOCK_UN)


def _wait_for_lock(fd: int) -> bool | None:
    """Lock a file, unless one holder keeps it for too long. Whether it is locked; None: it cannot be."""
    holder, deadline = b"", time.monotonic() + EXCLUSIVE_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if (found := os.pread(fd, HOLDER_BYTES, 0)) != holder:
                holder, deadline = found, time.monotonic() + EXCLUSIVE_TIMEOUT_S
            time.sleep(RETRY_INTERVAL_S)
        except OSError:
            return None
        else:
            os.pwrite(fd, os.urandom(HOLDER_BYTES), 0)
            return True
    return False


def _substitute(path: Path) -> Path:
    """A file on this host that stands for one on a file system without locks. OSError: there can be none."""
    directory = Path(tempfile.gettempdir(), f"stepspan-locks-{os.geteuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    if not writable_by_us(directory):
        raise PermissionError(f"{directory} is not ours")
    return directory / hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()


def is_alive_here(directory: Path) -> bool:
    """Whether a process of this host is known to hold the session's lock."""
    try:
        return lock_is_held(directory)
    except OSError:
        return False


def is_process_alive(directory: Path, boot_id: str) -> bool:
    """Whether the process that a session's header names exists on this host: a sign of life where there are no locks.

    Args:
        directory: Of the session.
        boot_id: Of this host.

    """
    session = SessionPath.of(directory)
    try:
        first = session.segments()[0] if session else 0
        line, end, _ = session.read(first, 0, MAX_HEADER_BYTES).partition(b"\n") if session else (b"", b"", b"")
        header = decode(line) if end else {}
        if header.get("boot_id") != boot_id:
            return False
        os.kill(int(header["pid"]), 0)
    except PermissionError:  # of another user
        return True
    except (OSError, LookupError, TypeError, ValueError, JournalError):
        return False
    return True


def read_closed(directory: Path) -> Closed | None:
    """What `closed.json` says, if there is one."""
    raw = read_file(directory / CLOSED)
    if raw is None:
        return None
    try:
        content = orjson.loads(raw)
        return Closed(int(content["seq"]), int(content["ts"]), str(content["status"]), int(content.get("lost", 0)))
    except (ValueError, KeyError, TypeError):
        return None


def write_closed(directory: Path, closed: Closed, *, by: str, mode: int = 0o600) -> Closed:
    """Say that a session has ended, unless somebody has; returns what stands there now. OSError: it cannot be said."""
    lost = {"lost": closed.lost} if closed.lost else {}
    content = orjson.dumps({"seq": closed.seq, "ts": closed.ts, "status": closed.status, "by": by, **lost})
    create_file(directory / CLOSED, content, mode=mode)
    return read_closed(directory) or closed


def read_resting(directory: Path) -> str | None:
    """How the run of a session has ended that rests: its session takes what is evaluated. None: it has not ended."""
    raw = read_file(directory / RESTS)
    try:
        return None if raw is None else str(orjson.loads(raw)["status"])
    except (ValueError, KeyError, TypeError):
        return None


def write_resting(directory: Path, status: str, *, mode: int) -> None:
    """Say how the run of a session has ended that rests. OSError: it cannot be said."""
    create_file(directory / RESTS, orjson.dumps({"status": status}), mode=mode)


def is_dead(directory: Path, header: Mapping[str, Any], *, boot_id: str, quiet_for: float, dead_after: float) -> bool:
    """Whether a session without a `closed.json` has ended. `quiet_for`: seconds since its last byte."""
    if header.get("boot_id") == boot_id:
        with contextlib.suppress(OSError):  # no lock there, or not ours to read: only silence can tell
            return not lock_is_held(directory)
    return quiet_for >= dead_after


def writer_is_dead(session: SessionPath, header: Mapping[str, Any], *, boot_id: str, dead_after: float) -> bool:
    """Whether a session without a `closed.json` has ended; see above for how that is known.

    Args:
        session: The session.
        header: Its header.
        boot_id: This host's boot.
        dead_after: Seconds of silence after which the session of another host or boot counts as dead.

    Raises:
        OSError: Its files cannot be listed.
        JournalError: They are gone.

    """
    segments = session.segments()
    if not segments:
        raise JournalError(f"{session.path}: it is gone")
    silence = quiet_for(session.path / segment_name(segments[-1]))
    return is_dead(session.path, header, boot_id=boot_id, quiet_for=silence, dead_after=dead_after)


def quiet_for(path: Path) -> float:
    """Seconds since a file was last written, by the wall clock; 0 where that cannot be told."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0
