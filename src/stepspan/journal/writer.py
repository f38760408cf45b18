"""Writing a session: one event, one line, one `write(2)`, under one lock with its time and its `seq`.

- A thread that holds the lock and is interrupted by a signal handler that logs would wait for itself: the handler's
  event goes to a pending list, and the holder writes it before it returns.
- `os.write` gives up the GIL, and beside a busy Python thread takes milliseconds to get it back. While other threads
  exist lines are written through `ctypes.PyDLL`, which keeps it.
- When the disk is full or broken, lines wait in bounded memory; what does not fit is counted, and a `gap` line says so
  once the disk takes lines again. A line cut in the middle is followed by a newline, and written again whole.
- Upkeep (is the session still ours, is the disk filling up, do lines wait) is done at most once a second of event time,
  by the call that crosses it; there is no thread. Our owner's comes once the lock is let go: it may take others' locks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from stepspan.errors import JournalError
from stepspan.events import Event, encode
from stepspan.journal.cursor import read_cursor
from stepspan.journal.layout import Descriptors, open_directory, open_file, segment_name, session_name
from stepspan.journal.liveness import CLOSED, Closed, take_lock, write_closed

SECOND = 1_000_000_000
THREADS = threading._active  # type: ignore[attr-defined] # what active_count() counts, without its lock and its cost
SLEEPERS: set[int] = set()
"""The idents of those that are hardly ever awake: beside them alone the GIL may be given up."""
LONGEST_BACKLOG = 16 << 20  # bytes of lines that wait for the disk


class SessionTaken(JournalError):
    """Somebody found this session silent for so long that they closed it: go on in a new one."""


class SessionGone(SessionTaken):
    """Its files were deleted, or somebody closed our descriptors of them."""


class Scope(Protocol):
    """What begins and ends: it takes its begin line's `seq` and `ts`, and hands the `seq` to its end."""

    seq: int
    ts: int


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a disk a session may take, and how hard it holds on to what it wrote."""

    segment_bytes: int = 64 << 20
    session_bytes: int = 10 << 30
    free_bytes: int = 1 << 30
    free_ratio: float = 0.02
    sync_every: float | None = None
    """Seconds between fdatasync calls; 0: each event; None: never (survives the process, not the power)."""
    group_readable: bool = False


class Disk:
    """The system calls that can fail under load; tests inject faults here."""

    write = staticmethod(os.write)
    """(fd, data) -> bytes written by one call; OSError. Gives up the GIL."""

    def __init__(self) -> None:
        self.write_keeping_gil = ctypes.PyDLL(None).write
        """(fd, data, length) -> bytes written by one call, -1 for an error."""
        self.write_keeping_gil.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
        self.write_keeping_gil.restype = ctypes.c_ssize_t

    def sync(self, fd: int) -> None:
        """Until the data is on the disk."""
        getattr(os, "fdatasync", os.fsync)(fd)

    def low(self, fd: int, limits: Limits) -> bool:
        """Whether less is free than the limits allow."""
        found = os.fstatvfs(fd)
        free = found.f_bavail * found.f_frsize
        return free < max(limits.free_bytes, limits.free_ratio * found.f_blocks * found.f_frsize)


class Clock:
    """The wall clock at its making plus the time since, a laptop's sleep included: never goes back, never jumps."""

    def __init__(self) -> None:
        sleeping = getattr(time, "CLOCK_BOOTTIME", None)
        self._since = time.monotonic_ns if sleeping is None else partial(time.clock_gettime_ns, sleeping)
        self._offset = time.time_ns() - self._since()

    def __call__(self) -> int:
        """Unix nanoseconds."""
        return self._offset + self._since()


class JournalWriter:
    """A session being written. The constructor raises OSError; `append` raises only `SessionTaken`.

    `upkeep` is called about once a second of event time, by a thread that logs, and must not raise.
    """

    def __init__(
        self,
        place: Path,
        header: Event,
        *,
        limits: Limits | None = None,
        clock: Callable[[], int] | None = None,
        disk: Disk | None = None,
        upkeep: Callable[[], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.session: str = header["session"]
        self.path = place / session_name(header["rank"], header["role"], self.session)
        self.seq = self.lost = 0
        self.trouble: OSError | SessionGone | None = None
        """The latest, until whoever tells it clears it."""
        self._why: OSError | SessionGone | None = None
        self._header = header
        self._disk = disk or Disk()
        self._clock = clock or Clock()
        self._upkeep = upkeep
        self._lock = threading.RLock()
        self._pending: deque[tuple[Event, Scope | None]] = deque()
        self._backlog: deque[bytes] = deque()
        self._backlog_size = self._dropped = 0
        self._busy = self._torn = self._low = self._taken = self._due = False
        self._sizes: dict[int, int] = {}
        """Segment -> its bytes; the open one counts as full."""
        self._sync_each = self.limits.sync_every == 0
        self._last = self._next_tick = self._checked = 0
        self._write, self._write_keeping_gil = self._disk.write, self._disk.write_keeping_gil
        self._room = 0
        """Bytes until the next segment."""
        self._descriptors, self._fd = Descriptors(), -1
        self._mode = 0o640 if self.limits.group_readable else 0o600

        draft = place / f".{self.path.name}"
        draft.mkdir(mode=0o750 if self.limits.group_readable else 0o700)
        self._directory = self._descriptors.hold(open_directory(draft))
        try:
            self._descriptors.hold(take_lock(draft))
            self._rotate()
            if self._backlog or not self._sizes:
                raise self.trouble or OSError("the header could not be written")
            os.rename(draft, self.path)
            parent = open_directory("..", dir_fd=self._directory)
            self._sync(parent)
            os.close(parent)
        except BaseException:
            self.forget()
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def append(self, event: Event, scope: Scope | None = None) -> None:
        """Write one event, filling in `ts` and `seq`; the `seq` of a scope's begin is kept for its end."""
        with self._lock:
            if self._busy or self._fd < 0:
                self._put_off(event, scope)
                return
            self._busy = True
            try:
                self._append(event, scope)
            finally:
                self._busy = False
            while self._pending:  # after `busy` is down: a handler that comes now writes for itself
                self.append(*self._pending.popleft())
        if self._due and self._upkeep and not self._lock._is_owned():  # type: ignore[attr-defined] # by a call around us
            self._due = False
            self._upkeep()

    def _append(self, event: Event, scope: Scope | None) -> None:
        ts = self._clock()
        if ts >= self._next_tick:
            self._tick(ts)
            ts = self._clock()
        if ts <= self._last:
            ts = self._last + 1
        self._last = ts
        seq = self.seq + 1
        event["ts"] = ts
        event["seq"] = seq
        if scope is not None:
            if "begin" in event:
                event["begin"] = scope.seq
            else:
                scope.seq, scope.ts = seq, ts
        line = encode(event)
        length = len(line)
        self.seq = seq
        if self._backlog or self._torn or self._low:
            self._wait(line)
            return
        try:
            if len(THREADS) - len(SLEEPERS) > 1:
                written = self._write_keeping_gil(self._fd, line, length)
            else:
                written = self._write(self._fd, line)
        except OSError:
            written = -1
        if written != length and not self._complete(line, max(written, 0)):
            return
        self._room -= length
        if self._room <= 0:
            self._rotate()
        if self._sync_each:
            self._sync(self._fd)

    def _put_off(self, event: Event, scope: Scope | None) -> None:
        if self._busy:  # this thread is in here already: a signal handler logs
            self._pending.append((event, scope))
        elif self._taken:
            raise SessionTaken(str(self.path))
        else:  # after the end
            self.lost += 1

    def _complete(self, line: bytes, written: int) -> bool:
        """After a short or failed write: the rest of the line or, failing that, a memory of the whole."""
        try:
            while written < len(line):
                written += self._disk.write(self._fd, line[written:])
        except OSError as error:
            self.trouble = self._why = error
            self._torn = written > 0
            self._wait(line)
            return False
        return True

    def _wait(self, line: bytes) -> None:
        if self._dropped or self._fd < 0 or self._backlog_size + len(line) > LONGEST_BACKLOG:
            self._dropped += 1
            self.lost += 1
        else:
            self._backlog.append(line)
            self._backlog_size += len(line)

    def _catch_up(self) -> None:
        """Write what waits; stops at the first line that the disk does not take."""
        try:
            if self._torn:
                self._disk.write(self._fd, b"\n")
                self._torn = False
            while self._backlog:
                line, written = self._backlog[0], 0
                while written < len(line):
                    written += self._disk.write(self._fd, line[written:])
                    self._torn = written < len(line)
                self._backlog.popleft()
                self._backlog_size -= len(line)
                self._room -= len(line)
        except OSError as error:
            self.trouble = self._why = error
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._append({"ts": 0, "seq": 0, "tag": "gap", "dropped": dropped, "why": str(self._why)}, None)

    def _tick(self, ts: int) -> None:
        with contextlib.suppress(OSError):
            os.stat(CLOSED, dir_fd=self._directory)
            self._taken = True
            raise SessionTaken(str(self.path))  # and the next tick is due at once, so nobody writes here any more
        if self._descriptors.gone():
            self._abandon()
            self._taken = True
            raise SessionGone(str(self.path))
        self._checked, self._next_tick = self.seq, ts + SECOND
        self._low = self._is_low() and not self._prune_delivered()
        if self._low:
            least = f"max({self.limits.free_bytes} B, {self.limits.free_ratio:.0%})"
            self.trouble = self._why = OSError(f"less free disk than {least}")
        elif self._backlog or self._torn or self._dropped:
            self._catch_up()
        self._due = True
        if self.limits.sync_every:
            self._next_tick = ts + min(SECOND, int(self.limits.sync_every * SECOND))
            self._sync(self._fd)

    def _abandon(self) -> None:
        """Count what was written since the files were last seen there: nobody will read it."""
        unread = max(0, self.seq - self._checked - len(self._backlog) - self._dropped)
        self._checked, self._dropped, self.lost = self.seq, self._dropped + unread, self.lost + unread
        self._why = self.trouble = SessionGone(f"{self.path} was deleted, or somebody closed its descriptors")

    def _rotate(self) -> None:
        """Begin the next segment, and remove the oldest ones beyond the session's limit."""
        number = max(self._sizes, default=0) + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        try:
            fd = open_file(segment_name(number), flags, dir_fd=self._directory, mode=self._mode)
        except OSError as error:  # no room for a new file: the old one goes on
            self.trouble = error
            return
        if self._fd >= 0:
            self._sizes[number - 1] -= self._room
            self._sync(self._fd)
            self._descriptors.close(self._fd)
        self._fd = self._descriptors.hold(fd)
        self._sizes[number] = self._room = self.limits.segment_bytes
        ts = max(self._clock(), self._last + 1)
        self._last, self.seq = ts, self.seq + 1
        line = encode({**self._header, "ts": ts, "seq": self.seq})
        if self._complete(line, 0):
            self._room -= len(line)
        self._sync(self._directory)
        while sum(self._sizes.values()) - self._room > self.limits.session_bytes and len(self._sizes) > 1:
            self._remove(min(self._sizes))

    def _prune_delivered(self) -> bool:
        """Remove the segments that no cursor needs; whether the disk is no longer low."""
        states = [read_cursor(path) for path in (self.path / "cursors").glob("*.*") if path.suffix != ".state"]
        needed = min((state.needs for state in states if state), default=0)
        for number in sorted(self._sizes)[:-1]:
            if number < needed:
                self._remove(number)
        return not self._is_low()

    def _is_low(self) -> bool:
        try:
            return self._disk.low(self._directory, self.limits)
        except OSError as error:
            self.trouble = error
            return False

    def _remove(self, number: int) -> None:
        del self._sizes[number]
        with contextlib.suppress(OSError):
            os.unlink(segment_name(number), dir_fd=self._directory)

    def _sync(self, fd: int) -> None:
        if self.limits.sync_every is not None:
            try:
                self._disk.sync(fd)
            except OSError as error:
                self.trouble = error

    def take_over(self, other: JournalWriter) -> None:
        """From a session that was closed under its writer: lines that waited there are lost, and counted here.

        What signal handlers logged in the meantime is written after the next event.
        """
        with self._lock, other._lock:  # its other threads see it closed, or not at all
            self._pending.extend(other._pending)
            waiting = len(other._backlog)
            self.lost = other.lost + waiting
            self._dropped, self._why = other._dropped + waiting, other._why
            self.trouble = other.trouble or self.trouble
            self._next_tick = 0  # which is when the `gap` line is written
            other.forget()

    def close(self, status: str) -> None:
        """The end of the session: everything that waits is written if it can be, and the end is said."""
        with self._lock:
            if self._fd < 0:
                return
            busy, self._busy, self._low, self._next_tick = self._busy, True, False, sys.maxsize
            if self._descriptors.gone():
                self._abandon()
            else:
                self._catch_up()
                while self._pending:  # a signal handler logged, or it is one that closes
                    self._append(*self._pending.popleft())
                self._sync(self._fd)
                with contextlib.suppress(OSError):
                    write_closed(self.path, Closed(self.seq, self._last, status), by="writer", mode=self._mode)
            self.lost += len(self._backlog) + len(self._pending)
            self._pending.clear()
            self.forget()
            self._busy = busy

    def forget(self) -> None:
        """Close the descriptors and say nothing: in a forked child, which must not hold its parent's lock."""
        self._fd = self._directory = -1
        self._descriptors.close_all()


@contextmanager
def asleep() -> Iterator[None]:
    """Within it, this thread says of itself that it is hardly ever awake."""
    SLEEPERS.add(threading.get_ident())
    try:
        yield
    finally:
        SLEEPERS.discard(threading.get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SLEEPERS.clear)
