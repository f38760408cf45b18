"""Writing one session: an event becomes a line with the next `seq`, and the line goes out in one `write(2)`.

- `os.write` gives up the GIL, and beside a busy Python thread takes milliseconds to get it back. While other threads
  exist lines are written through `ctypes.PyDLL`, which keeps it.
- When the disk is full or broken, lines wait in bounded memory; what does not fit is counted, and a `gap` line says so
  once the disk takes lines again. A line that was cut in the middle is followed by a newline, and written again whole.
- A segment is complete once its successor exists. Only the writer removes segments: delivered ones where the disk is
  low, the oldest ones where the session grows beyond its limit.
- While the disk is low the session does not grow, but for its first bytes: what is beyond waits as if it were full.
- An exception may come at any call, of a signal handler. `seq` counts lines that have their place, in the file or among
  those that wait; so `settle`, which comes before anything else is written, sees in the file what was done, and does
  the rest. Nothing between two calls can be interrupted: what belongs together is set there.

The session is made under a name of its own and renamed when its first segment has a header, so that a reader never
finds one without. Calls come under the lock of the `Journal`, which also decides when `maintain` is due and what
follows a session that has ended: nothing here locks, and nothing here starts another session.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from stepspan.events import Event
from stepspan.journal.cursor import CursorState, read_cursor
from stepspan.journal.disk import Disk, Limits
from stepspan.journal.format import decode, encode
from stepspan.journal.layout import Descriptors, RefusalIgnored, open_directory, open_file, segment_name, session_name
from stepspan.journal.liveness import CLOSED, Closed, take_lock, write_closed
from stepspan.journal.location import directory_mode
from stepspan.journal.reader import last_line

THREADS = threading._active  # type: ignore[attr-defined] # what active_count() counts, without its lock and its cost


class IdleThreads(set[int]):
    """The idents of threads that are hardly ever awake: beside them alone the GIL may be given up.

    Attributes:
        others: Whether there are any other threads, as was counted last: at least once a second, and where one starts
            while a run is open.

    """

    def __init__(self) -> None:
        self.others = True
        self._lock = threading.Lock()

    def add(self, ident: int) -> None:
        """Count a thread among them."""
        with self._lock:
            super().add(ident)
        self.count_others()

    def discard(self, ident: object) -> None:
        """Count a thread as one that may be awake, as it ends or wakes up."""
        with self._lock:
            super().discard(ident)
        self.count_others()

    def count_others(self) -> bool:
        """Whether there are any, besides this thread."""
        self.others = others = len(THREADS) > len(self) + 1
        return others

    def clear(self) -> None:
        """In a forked child: they are the parent's."""
        self._lock = threading.Lock()
        super().clear()


IDLE_THREADS = IdleThreads()
SEGMENT_FLAGS = os.O_RDWR | os.O_APPEND
MAX_BACKLOG_BYTES = 16 << 20
"""Of lines that wait for the disk."""
ALWAYS_BYTES = 16 << 20
"""Of a session, which are written however little is free: until the disk itself refuses."""
UNSETTLED, WAITING, TORN, LOW = 1, 2, 4, 8
"""What keeps a line from simply being written, as bits: an exception came in the midst of a call, and `settle` is to
find out how far that got; lines wait; the last one was cut in the middle; the disk is low."""


class SessionGone(OSError):
    """The session's files were deleted, or somebody closed our descriptors of them."""


class Begun(Protocol):
    """What begins and ends: it takes its begin line's `seq` and `ts`, and hands the `seq` to its end line."""

    seq: int
    ts: int


class Emit(Protocol):
    """Takes an event to the journal; False where a processor dropped it."""

    def __call__(self, event: Event, begun: Begun | None = None) -> bool:
        """Write one event, begun or ended by `begun`; False where a processor dropped it."""


class SessionWriter:
    """A session being written; `open` comes first.

    Args:
        parent_directory: The directory of the job's host, which the session's own directory is made in.
        header: Of the session; its `session`, `rank` and `role` name the directory.
        limits: What it may take of the disk.
        clock: Gives Unix ns, for the lines that the writer makes itself (headers and gaps).
        disk: The system calls.

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
        self.hindrances = 0
        """What keeps the next line from simply being written: bits, as above. Lines then wait."""
        self._gap_reason: OSError | None = None
        self.header = header
        self._disk = disk or Disk()
        self._clock = clock
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._dropped = self._dropped_before = self._holes = 0
        """Lines that were left out since the last gap line; those of an earlier session; and all of this session."""
        self._bound: int | None = None
        """While the disk is low: how many bytes the session may hold."""
        self._sizes: dict[int, int] = {}
        """Segment -> its bytes; the open one counts as full."""
        self.syncs_each = limits.sync_every == 0
        """Whether each line is on the disk before its call returns."""
        self._last_seen = 0
        """`seq` when the files were last seen in their place."""
        self.write_file, self.write_keeping_gil = self._disk.write, self._disk.write_keeping_gil
        self.room = 0
        """Bytes until the next segment."""
        self._descriptors, self.fd, self._directory, self._lock = Descriptors(), -1, -1, -1
        self._former: tuple[Path, Path, Descriptors] | None = None
        """A session that this one takes the place of: a hidden path, its path, and its descriptors."""
        self._mode = 0o640 if limits.group_readable else 0o600

    def open(self) -> None:
        """Make the session.

        Raises:
            OSError: It could not be made; nothing is left of it.

        """
        self._draft.mkdir(mode=directory_mode(self.limits))
        try:
            self._directory = self._descriptors.hold(open_directory(self._draft))
            self._lock = self._descriptors.hold(take_lock(self._draft))
            self.rotate()
            if not self._sizes:
                raise self.error or OSError("the header could not be written")
            os.rename(self._draft, self.path)
            parent = open_directory("..", dir_fd=self._directory)
            self._sync(parent)
            os.close(parent)
        except BaseException:
            self.discard()
            raise

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self.fd < 0

    @property
    def waiting(self) -> int:
        """Lines that are only in memory."""
        return len(self._backlog)

    @property
    def stored_seq(self) -> int:
        """The number of the last line that stands in the files."""
        return max(0, self.seq - self._dropped - len(self._backlog))

    @property
    def journaled(self) -> int:
        """Lines that stand in the files: they survive the process."""
        return max(0, self.seq - self._holes - len(self._backlog))

    def write(self, event: Event, ts: int, begun: Begun | None = None) -> None:
        """Write one event.

        Args:
            event: Gets its `ts` and `seq`; an end event gets its `begin`.
            ts: Its time, Unix ns; 1 ns after the last line's where the clock did not go on.
            begun: What ends by this event, if its `begin` is 0; else what takes its `seq` and `ts`.

        """
        if self.hindrances & UNSETTLED:
            with RefusalIgnored():
                self.settle()
        if ts <= self.ts:
            ts = self.ts + 1
        event["ts"] = self.ts = ts
        event["seq"] = seq = self.seq + 1
        if begun is not None:
            if event.get("begin") == 0:
                event["begin"] = begun.seq
            else:
                begun.seq, begun.ts = seq, ts
        self.write_line(encode(event), seq)

    def write_line(self, line: bytes, seq: int) -> None:
        """Write a line that has its time and its number.

        Args:
            line: The newline included.
            seq: Its number, the one after the last.

        """
        if self.hindrances:
            self._enqueue(line)
            return
        length = len(line)
        try:
            if IDLE_THREADS.count_others():
                written = self.write_keeping_gil(self.fd, line, length)
            else:
                written = self.write_file(self.fd, line)
        except OSError as error:
            if error.errno is None:  # of a signal handler, which may raise any exception of its own
                raise
            written = -1
        if written == length:
            self._advance(seq, length)
        else:
            self.complete(line, max(written, 0), seq)

    def _advance(self, seq: int, length: int) -> None:
        """The next line is in the file."""
        self.seq = seq  # not before that: `settle` can tell
        self.room -= length
        if self.room <= 0:
            self.rotate()
        if self.syncs_each:
            self._sync(self.fd)

    def settle(self) -> None:
        """After an exception in the midst of a call: see what reached the disk, write what did not, go on from there.

        Raises:
            OSError: That cannot be seen now; lines wait.

        """
        if self.fd < 0:
            return
        self._remove_former()
        self._descriptors.close_others({self.fd, self._directory, self._lock})
        size = os.fstat(self.fd).st_size
        self.room = self._sizes[max(self._sizes)] - size
        self._mark(TORN, size > 0 and os.pread(self.fd, 1, size - 1) != b"\n")
        last = last_line(self.fd)
        if last is not None:
            while self._backlog and decode(self._backlog[0][:-1])["seq"] <= last["seq"]:
                self._backlog.popleft()
            newest = decode(self._backlog[-1][:-1]) if self._backlog else last
            self.seq, self.ts = max(self.seq, newest["seq"]), max(self.ts, newest["ts"])
            self._dropped = self.seq - newest["seq"]
        self._backlog_bytes = sum(map(len, self._backlog))
        self.hindrances = self.hindrances & ~(UNSETTLED | WAITING) | (WAITING if self._backlog else 0)
        if _exists(segment_name(max(self._sizes) + 1), self._directory):
            self.rotate()
        if not self.hindrances & LOW:
            self._write_backlog()

    def is_taken(self) -> bool:
        """Whether somebody found this session silent for so long that they closed it."""
        try:
            os.stat(CLOSED, dir_fd=self._directory)
        except OSError:
            return False
        return True

    def is_delivered(self) -> bool:
        """Whether anything of it has been."""
        return any(state.position.seq for state in self._cursors())

    def is_gone(self) -> bool:
        """Whether the files were deleted. What was written since they were last seen is counted as lost then."""
        if not self._descriptors.gone():
            return False
        unread = max(0, self.seq - self._last_seen - len(self._backlog) - self._dropped)
        gone = SessionGone(f"{self.path} was deleted, or somebody closed its descriptors")
        self._last_seen, self._dropped, self.lost = self.seq, self._dropped + unread, self.lost + unread
        self._holes, self._gap_reason, self.error = self.seq - len(self._backlog), gone, gone
        return True

    def maintain(self) -> None:
        """Look at the disk, and write what waits for it; about once a second."""
        self._last_seen = self.seq
        IDLE_THREADS.count_others()
        if self.hindrances & UNSETTLED:
            with RefusalIgnored():
                self.settle()
        shortage = self._shortage()
        if shortage is not None:
            self._remove_delivered()
            shortage = self._shortage()
        if shortage is None:
            self._bound, self.hindrances = None, self.hindrances & ~LOW
        else:
            self._stop_growth(shortage)
        if not self.hindrances & (LOW | UNSETTLED):
            self._write_backlog()
        if self.limits.sync_every:
            self._sync(self.fd)

    def take_over(self, ended: SessionWriter) -> None:
        """Go on after a session that was ended by others: lines that waited there are lost, and counted here."""
        waiting = len(ended._backlog)
        self.lost = ended.lost + waiting
        self._dropped_before, self._gap_reason = ended._dropped_before + ended._dropped + waiting, ended._gap_reason
        self.error = ended.error or self.error
        ended.forget()

    def close(self, status: str) -> None:
        """End the session, and let go of it. Arguments as `finish`."""
        try:
            self.finish(status)
        finally:
            self.forget()

    def finish(self, status: str) -> None:
        """End the session: everything that waits is written if it can be, and `closed.json` says the end.

        It can be called again where an exception has come in its midst.

        Args:
            status: "completed", "failed" or "interrupted".

        """
        self._bound, self.hindrances = None, self.hindrances & ~LOW
        if self.fd < 0 or self.is_gone():
            return
        if self.hindrances & UNSETTLED:
            with RefusalIgnored():
                self.settle()
        self._write_backlog()
        self._sync(self.fd)
        closed = Closed(self.seq, self.ts, status, lost=len(self._backlog) + self._dropped)
        with RefusalIgnored():
            write_closed(self.path, closed, by="writer", mode=self._mode)

    def forget(self) -> None:
        """Close the descriptors and say nothing: in a forked child, which must not hold its parent's lock."""
        waiting = len(self._backlog)
        self.lost, self._holes, self.fd, self._directory = self.lost + waiting, self._holes + waiting, -1, -1
        self._backlog.clear()
        self._descriptors.close_all()

    def become(self, fresh: SessionWriter) -> None:
        """Go on as another session, and remove this one's files: for those who know this object it is the same one."""
        fresh._clock, fresh._former = self._clock, (self._draft, self.path, self._descriptors)
        vars(self).update(vars(fresh))
        self._remove_former()

    def discard(self) -> None:
        """Leave nothing of a session that was only just made."""
        with RefusalIgnored():
            if os.path.samestat(os.stat(self.path), os.fstat(self._directory)):
                shutil.rmtree(self.path, ignore_errors=True)
        self.forget()
        shutil.rmtree(self._draft, ignore_errors=True)

    def _remove_former(self) -> None:
        """Remove what this session has taken the place of."""
        if self._former is not None:
            hidden, path, descriptors = self._former
            descriptors.close_all()
            with RefusalIgnored():
                os.rename(path, hidden)
            with RefusalIgnored():  # `rmtree` would fail where it is interrupted
                for file in sorted(hidden.rglob("*"), reverse=True):
                    file.rmdir() if file.is_dir() else file.unlink()
                hidden.rmdir()
            self._former = None

    @property
    def _draft(self) -> Path:
        """Where the session lies until it can be read."""
        return self.path.with_name(f".{self.path.name}")

    def complete(self, line: bytes, written: int, seq: int) -> None:
        """After a short or failed write: write the rest of the line or, failing that, have the whole of it wait.

        Args:
            line: The next one.
            written: How many bytes of it are in the file.
            seq: Its number.

        """
        try:
            while written < len(line):
                written += self._disk.write(self.fd, line[written:])
        except OSError as error:
            if error.errno is None:
                raise
            self.error = self._gap_reason = error
            if written:
                self.hindrances |= TORN
            self._enqueue(line)
        else:
            self._advance(seq, len(line))

    def _mark(self, hindrance: int, is_so: bool) -> None:
        self.hindrances = self.hindrances | hindrance if is_so else self.hindrances & ~hindrance

    def _enqueue(self, line: bytes) -> None:
        """Have the next line wait, or count it where there is no room for that."""
        size = self._backlog_bytes + len(line)
        if self._dropped or self.fd < 0 or size > MAX_BACKLOG_BYTES:
            self._dropped, self._holes, self.lost = self._dropped + 1, self._holes + 1, self.lost + 1
        else:
            self._backlog_bytes = size
            self.hindrances |= WAITING
            self._backlog.append(line)
        self.seq += 1

    def _write_backlog(self) -> None:
        """Write what waits; stops at the first line that the disk does not take."""
        try:
            if self.hindrances & TORN:
                self._disk.write(self.fd, b"\n")
                self.hindrances &= ~TORN
            while self._backlog:
                line, written = self._backlog[0], 0
                while written < len(line):
                    written += self._disk.write(self.fd, line[written:])
                    self._mark(TORN, written < len(line))
                self._backlog.popleft()
                self._backlog_bytes -= len(line)
                self.room -= len(line)
            self.hindrances &= ~WAITING
        except OSError as error:
            if error.errno is None:
                raise
            self.error = self._gap_reason = error
            return
        dropped = self._dropped + self._dropped_before
        if dropped:
            self._dropped = self._dropped_before = 0
            gap = {"ts": 0, "seq": 0, "tag": "gap", "dropped": dropped, "why": str(self._gap_reason)}
            self.write(gap, self._clock())

    def rotate(self) -> None:
        """Begin the next segment, and remove the oldest ones beyond the session's limit.

        A reader takes a segment for complete once there is another one: from then on nothing is written to the old one.
        So what an exception has left of a rotation is not undone, but `settle` does the rest, here.
        """
        number = max(self._sizes, default=0) + 1
        name, fd, length = segment_name(number), -1, 0
        try:
            try:
                fd = open_file(name, SEGMENT_FLAGS | os.O_CREAT | os.O_EXCL, dir_fd=self._directory, mode=self._mode)
            except FileExistsError:
                fd, length = self._adopt(name)
            self._descriptors.hold(fd)
            ts, seq = max(self._clock(), self.ts + 1), self.seq + 1
            if not length:
                line = encode({**self.header, "ts": ts, "seq": seq})
                while length < len(line):
                    length += self._disk.write(fd, line[length:])
        except OSError as error:  # no room for a new file: the old one goes on
            if error.errno is None:
                raise
            self.error = error
            if fd >= 0:
                self._abandon(name, fd)
            return
        old = self.fd
        if old >= 0:
            self._sync(old)
            self._sizes[number - 1] -= self.room
        self._sizes[number] = self.limits.segment_bytes
        self.room = self.limits.segment_bytes - length
        self.ts, self.seq, self.fd = ts, seq, fd
        if old >= 0:
            self._descriptors.close(old)
        self._sync(self._directory)
        while self._size() > self.limits.session_bytes and len(self._sizes) > 1:
            self._remove(min(self._sizes))
        if self._bound is not None:
            self._mark(LOW, self._size() >= self._bound)
            self._shrink_room()

    def _adopt(self, name: str) -> tuple[int, int]:
        """Open a segment that an exception has kept us from beginning.

        Returns:
            Its descriptor, and the bytes of its header; 0 where that is not whole.

        Raises:
            OSError: It is not ours.

        """
        fd = open_file(name, SEGMENT_FLAGS, dir_fd=self._directory)
        found = last_line(fd)
        if found is None:
            os.ftruncate(fd, 0)
        elif found["seq"] != self.seq + 1 or found.get("session") != self.id:
            os.close(fd)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path / name))
        return fd, os.fstat(fd).st_size

    def _abandon(self, name: str, fd: int) -> None:
        """Take back a segment whose header could not be written."""
        try:
            os.unlink(name, dir_fd=self._directory)
        except OSError:
            self.hindrances |= UNSETTLED
        self._descriptors.close(fd)

    def _size(self) -> int:
        """The bytes of the session's segments."""
        return sum(self._sizes.values()) - self.room

    def _stop_growth(self, shortage: OSError) -> None:
        """The disk is low: the session may hold what it holds now, or its first bytes; beyond that lines wait.

        A segment that was delivered makes room: so each ends where a quarter of the bound is reached, or all of it.
        """
        if self._bound is None:
            self._bound = max(self._size(), ALWAYS_BYTES)
        full = self._size() >= self._bound
        if full and (not self.hindrances & LOW or len(self._sizes) == 1):
            self._write_backlog()
            if not self._backlog:
                self.rotate()
        self._mark(LOW, full and self._size() >= self._bound)
        if self.hindrances & LOW:
            self.error = self._gap_reason = shortage
        else:
            self._shrink_room()

    def _shrink_room(self) -> None:
        """End the open segment early, where the session would grow beyond its bound or could not make room again."""
        assert self._bound is not None
        number = max(self._sizes)
        used = self._sizes[number] - self.room
        room = max(0, min(self._bound - self._size(), self._bound // 4 - used, self.limits.segment_bytes - used))
        self._sizes[number], self.room = used + room, room

    def _cursors(self) -> list[CursorState]:
        """Those of each destination and signal; none where they cannot be listed."""
        paths: list[Path] = []
        with RefusalIgnored():
            paths += (path for path in (self.path / "cursors").glob("*.*") if path.suffix != ".state")
        return [state for state in map(read_cursor, paths) if state is not None]

    def _remove_delivered(self) -> None:
        """Remove the segments that no cursor needs."""
        needed = min((state.needs for state in self._cursors()), default=0)
        for number in sorted(self._sizes)[:-1]:
            if number < needed:
                self._remove(number)

    def _shortage(self) -> OSError | None:
        """Why the session must not grow: what is free on its disk, and what is to stay free; None where it may."""
        try:
            free, size = self._disk.free_and_size(self._directory)
        except OSError as error:
            self.error = error
            return None
        kept = self.limits.kept_free(size)
        if free >= kept:
            return None
        left = f"{_size_text(free)} of {_size_text(size)} are free"
        return OSError(f"{left}, and {_size_text(kept)} are kept free (free_bytes, free_ratio)")

    def _remove(self, number: int) -> None:
        with RefusalIgnored():
            os.unlink(segment_name(number), dir_fd=self._directory)
        del self._sizes[number]

    def _sync(self, fd: int) -> None:
        if self.limits.sync_every is not None:
            try:
                self._disk.sync(fd)
            except OSError as error:
                self.error = error


def _exists(name: str, dir_fd: int) -> bool:
    """Whether a directory has an entry of this name, a link that leads nowhere included. OSError."""
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _size_text(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


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
