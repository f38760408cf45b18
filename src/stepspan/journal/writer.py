"""Writing one session: an event becomes a line with the next `seq`, and the line goes out in one `write(2)`.

- `os.write` gives up the GIL, and beside a busy Python thread takes milliseconds to get it back. While other threads
  exist lines are written through `ctypes.PyDLL`, which keeps it.
- When the disk is full or broken, lines wait in bounded memory; what does not fit is counted, and a `gap` line says so
  once the disk takes lines again. A line that was cut in the middle is followed by a newline, and written again whole.
- A segment is complete once its successor exists. Only the writer removes segments: delivered ones where the disk is
  filling up, the oldest ones where the session grows beyond its limit.

The session is made under a name of its own and renamed when its first segment has a header, so that a reader never
finds one without. Calls come under the lock of the `Journal`, which also decides when `maintain` is due and what
follows a session that has ended: nothing here locks, and nothing here starts another session.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from stepspan.events import Event
from stepspan.journal.cursor import read_cursor
from stepspan.journal.disk import Disk, Limits
from stepspan.journal.format import encode
from stepspan.journal.layout import Descriptors, open_directory, open_file, segment_name, session_name
from stepspan.journal.liveness import CLOSED, Closed, take_lock, write_closed
from stepspan.journal.location import directory_mode

THREADS = threading._active  # type: ignore[attr-defined] # what active_count() counts, without its lock and its cost
IDLE_THREADS: set[int] = set()
"""The idents of those that are hardly ever awake: beside them alone the GIL may be given up."""
MAX_BACKLOG_BYTES = 16 << 20
"""Of lines that wait for the disk."""


class SessionGone(OSError):
    """The session's files were deleted, or somebody closed our descriptors of them."""


class Begun(Protocol):
    """What begins and ends: it takes its begin line's `seq` and `ts`, and hands the `seq` to its end line."""

    seq: int
    ts: int


class SessionWriter:
    """A session being written.

    Args:
        parent_directory: The directory of the job's host, which the session's own directory is made in.
        header: Of the session; its `session`, `rank` and `role` name the directory.
        limits: What it may take of the disk.
        clock: Gives Unix ns, for the lines that the writer makes itself (headers and gaps).
        disk: The system calls.

    Raises:
        OSError: The session could not be made; nothing is left of it.

    """

    def __init__(
        self,
        parent_directory: Path,
        header: Event,
        *,
        limits: Limits,
        clock: Callable[[], int],
        disk: Disk | None = None,
    ) -> None:
        self.limits = limits
        self.id: str = header["session"]
        self.path = parent_directory / session_name(header["rank"], header["role"], self.id)
        self.seq = self.ts = 0
        """Number and time (Unix ns) of the last line."""
        self.lost = 0
        """Events that no line holds."""
        self.error: OSError | None = None
        """The latest, until whoever reports it clears it."""
        self._gap_reason: OSError | None = None
        self._header = header
        self._disk = disk or Disk()
        self._clock = clock
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = self._dropped = 0
        self._torn = self._low = False
        self._sizes: dict[int, int] = {}
        """Segment -> its bytes; the open one counts as full."""
        self._sync_each = limits.sync_every == 0
        self._last_seen = 0
        """`seq` when the files were last seen in their place."""
        self._write, self._write_keeping_gil = self._disk.write, self._disk.write_keeping_gil
        self._segment_room = 0
        """Bytes until the next segment."""
        self._descriptors, self._fd = Descriptors(), -1
        self._mode = 0o640 if limits.group_readable else 0o600

        draft = parent_directory / f".{self.path.name}"
        draft.mkdir(mode=directory_mode(limits))
        self._directory = self._descriptors.hold(open_directory(draft))
        try:
            self._descriptors.hold(take_lock(draft))
            self._rotate()
            if self._backlog or not self._sizes:
                raise self.error or OSError("the header could not be written")
            os.rename(draft, self.path)
            parent = open_directory("..", dir_fd=self._directory)
            self._sync(parent)
            os.close(parent)
        except BaseException:
            self.forget()
            shutil.rmtree(draft, ignore_errors=True)
            raise

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._fd < 0

    def write(self, event: Event, ts: int, begun: Begun | None = None) -> None:
        """Write one event.

        Args:
            event: Gets its `ts` and `seq`; an end event gets its `begin`.
            ts: Its time, Unix ns; 1 ns after the last line's where the clock did not go on.
            begun: What begins or ends by this event.

        """
        if ts <= self.ts:
            ts = self.ts + 1
        self.ts = ts
        seq = self.seq + 1
        event["ts"] = ts
        event["seq"] = seq
        if begun is not None:
            if "begin" in event:
                event["begin"] = begun.seq
            else:
                begun.seq, begun.ts = seq, ts
        line = encode(event)
        length = len(line)
        self.seq = seq
        if self._backlog or self._torn or self._low:
            self._enqueue(line)
            return
        try:
            if len(THREADS) - len(IDLE_THREADS) > 1:
                written = self._write_keeping_gil(self._fd, line, length)
            else:
                written = self._write(self._fd, line)
        except OSError:
            written = -1
        if written != length and not self._complete(line, max(written, 0)):
            return
        self._segment_room -= length
        if self._segment_room <= 0:
            self._rotate()
        if self._sync_each:
            self._sync(self._fd)

    def is_taken(self) -> bool:
        """Whether somebody found this session silent for so long that they closed it."""
        try:
            os.stat(CLOSED, dir_fd=self._directory)
        except OSError:
            return False
        return True

    def is_gone(self) -> bool:
        """Whether the files were deleted. What was written since they were last seen is counted as lost then."""
        if not self._descriptors.gone():
            return False
        unread = max(0, self.seq - self._last_seen - len(self._backlog) - self._dropped)
        self._last_seen, self._dropped, self.lost = self.seq, self._dropped + unread, self.lost + unread
        self._gap_reason = self.error = SessionGone(f"{self.path} was deleted, or somebody closed its descriptors")
        return True

    def maintain(self) -> None:
        """Look at the disk, and write what waits for it; about once a second."""
        self._last_seen = self.seq
        self._low = self._is_low() and not self._prune_delivered()
        if self._low:
            least = f"max({self.limits.free_bytes} B, {self.limits.free_ratio:.0%})"
            self.error = self._gap_reason = OSError(f"less free disk than {least}")
        elif self._backlog or self._torn or self._dropped:
            self._write_backlog()
        if self.limits.sync_every:
            self._sync(self._fd)

    def take_over(self, ended: SessionWriter) -> None:
        """Go on after a session that was ended by others: lines that waited there are lost, and counted here."""
        waiting = len(ended._backlog)
        self.lost = ended.lost + waiting
        self._dropped, self._gap_reason = ended._dropped + waiting, ended._gap_reason
        self.error = ended.error or self.error
        ended.forget()

    def close(self, status: str, interrupting: Iterable[tuple[Event, Begun | None]] = ()) -> None:
        """End the session: everything that waits is written if it can be, and `closed.json` says the end.

        Args:
            status: "completed", "failed" or "interrupted".
            interrupting: What signal handlers have logged meanwhile.

        """
        self._low = False
        try:
            if not self.is_gone():
                self._write_backlog()
                for event, begun in interrupting:
                    self.write(event, self._clock(), begun)
                self._sync(self._fd)
                with contextlib.suppress(OSError):
                    write_closed(self.path, Closed(self.seq, self.ts, status), by="writer", mode=self._mode)
        finally:  # whatever an event raises that cannot be encoded: a free lock says that the session has ended
            self.lost += len(self._backlog)
            self.forget()

    def forget(self) -> None:
        """Close the descriptors and say nothing: in a forked child, which must not hold its parent's lock."""
        self._fd = self._directory = -1
        self._descriptors.close_all()

    def _complete(self, line: bytes, written: int) -> bool:
        """After a short or failed write: the rest of the line or, failing that, a memory of the whole."""
        try:
            while written < len(line):
                written += self._disk.write(self._fd, line[written:])
        except OSError as error:
            self.error = self._gap_reason = error
            self._torn = written > 0
            self._enqueue(line)
            return False
        return True

    def _enqueue(self, line: bytes) -> None:
        if self._dropped or self._fd < 0 or self._backlog_bytes + len(line) > MAX_BACKLOG_BYTES:
            self._dropped += 1
            self.lost += 1
        else:
            self._backlog.append(line)
            self._backlog_bytes += len(line)

    def _write_backlog(self) -> None:
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
                self._backlog_bytes -= len(line)
                self._segment_room -= len(line)
        except OSError as error:
            self.error = self._gap_reason = error
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            gap = {"ts": 0, "seq": 0, "tag": "gap", "dropped": dropped, "why": str(self._gap_reason)}
            self.write(gap, self._clock())

    def _rotate(self) -> None:
        """Begin the next segment, and remove the oldest ones beyond the session's limit."""
        number = max(self._sizes, default=0) + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        try:
            fd = open_file(segment_name(number), flags, dir_fd=self._directory, mode=self._mode)
        except OSError as error:  # no room for a new file: the old one goes on
            self.error = error
            return
        if self._fd >= 0:
            self._sizes[number - 1] -= self._segment_room
            self._sync(self._fd)
            self._descriptors.close(self._fd)
        self._fd = self._descriptors.hold(fd)
        self._sizes[number] = self._segment_room = self.limits.segment_bytes
        self.ts, self.seq = max(self._clock(), self.ts + 1), self.seq + 1
        line = encode({**self._header, "ts": self.ts, "seq": self.seq})
        if self._complete(line, 0):
            self._segment_room -= len(line)
        self._sync(self._directory)
        while sum(self._sizes.values()) - self._segment_room > self.limits.session_bytes and len(self._sizes) > 1:
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
            self.error = error
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
                self.error = error


@contextmanager
def mostly_idle() -> Iterator[None]:
    """Within it, this thread declares that it is hardly ever awake: the GIL may be given up beside it."""
    IDLE_THREADS.add(threading.get_ident())
    try:
        yield
    finally:
        IDLE_THREADS.discard(threading.get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=IDLE_THREADS.clear)
