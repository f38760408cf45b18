"""Reading a session that may still be written: whole lines only, never past what is known to be settled.

A batch always ends between two milliseconds, so that "several points of a series in one millisecond" can be judged
within a batch, whatever the batches are. At the live tail the newest millisecond waits until a later line exists, the
session has ended, or the file has been quiet for `SETTLE` seconds.

A damaged line costs that line: it shows as a hole in `seq` and is counted; its bytes stay where they are.

Several threads may read a session by one reader, each from where it stands. With a `ChunkCache` lines are then read,
checked and parsed by the first who comes to them (`chunks`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice, repeat
from pathlib import Path
from typing import NamedTuple

from stepspan.errors import Damaged, NewerSchema
from stepspan.events import MILLISECOND_NS, SCHEMA_MAJOR, Event
from stepspan.journal.chunks import Chunk, ChunkCache, Follower, SharedLines
from stepspan.journal.cursor import Ledger, Position
from stepspan.journal.format import decode, decode_sequence
from stepspan.journal.layout import SessionPath, open_directory, open_file, segment_name
from stepspan.journal.liveness import Closed

SETTLE_S = 0.2
USUAL_HEADER_BYTES = 1 << 16
JUMP = b'"tag":"clock"'
JUMP_SEARCH_BYTES, JUMP_READ_BYTES = 64 << 20, 1 << 20
LISTING_INTERVAL_S = 1.0
"""Between listings of the segments in a directory whose time of change is the same."""
LISTING_AGE_NS = 50 * MILLISECOND_NS
"""How old that time must be: what changes in the same tick of the file system's clock does not move it."""


@dataclass(slots=True)
class EventBatch:
    """Events, where to read on after them, and what the ledger gains. `at_end`: nothing more can be read now."""

    events: list[Event]
    position: Position
    counts: Ledger
    at_end: bool
    beyond: int = 0
    """The time of the event that `until` kept out, Unix ns; 0 where there was none."""


class _Tail(NamedTuple):
    """Where a segment ends as of now, and the number of its successor; 0: there is none."""

    end: int
    successor: int


class JournalReader:
    """Reads one session. The constructor raises OSError, `Damaged` (no header) or `NewerSchema`.

    Args:
        session: Where it lies.
        clock: Monotonic seconds, by which the tail of a file settles.
        cache: Keeps what followers have read for each other.

    """

    def __init__(
        self, session: SessionPath, *, clock: Callable[[], float] = time.monotonic, cache: ChunkCache | None = None
    ) -> None:
        self.session = session
        self.lines = SharedLines()
        """The chunks of lines that its followers share."""
        self._clock = clock
        self._cache = cache
        self._lock = threading.Lock()
        self._number, self._fd = 0, -1
        self._tail = (0, 0)
        self._grew_at = clock()
        self._listed: tuple[list[int], int, float] | None = None
        """The segments, the time of change of their directory (ns) and when it was listed."""
        self._directory = open_directory(session.path)
        try:
            self.header = self._read_header()
        except BaseException:
            self.close()
            raise

    def read(
        self,
        start: Position,
        *,
        size: int,
        until: int | None = None,
        closed: Closed | None = None,
        follower: Follower | None = None,
    ) -> EventBatch:
        """The next events.

        Args:
            start: Where to read on.
            size: How many bytes of journal, about.
            until: The time of the last event, Unix ns.
            closed: The end of the session.
            follower: Who reads, of `lines`; None: what is read is not shared.

        """
        number, offset, seq = start.segment or self._successor(0), start.offset, start.seq
        events: list[Event] = []
        numbers: list[int] = []  # of the segments of the events
        ends: list[int] = []  # and where they end there
        unsettled: int | None = None  # events of this millisecond may have siblings that we have not seen
        consumed, at_end, full, beyond = 0, False, False, 0
        if follower is not None and self._cache is not None:
            self._cache.stand(follower, (number, offset))
        while number and not full:
            chunk, first, tail = self._chunk(number, offset, seq, size - consumed, follower)
            found, their_ends = chunk.events, chunk.ends
            if first:
                found, their_ends = found[first:], their_ends[first:]
            if found and not _within(found[-1], until, closed):
                cut = next(index for index, event in enumerate(found) if not _within(event, until, closed))
                if closed is not None and found[cut]["seq"] > closed.seq:
                    at_end = True
                else:
                    beyond = found[cut]["ts"]
                    unsettled = beyond // MILLISECOND_NS
                full, found = True, found[:cut]
            if found:
                events += found
                numbers += repeat(number, len(found))
                ends += their_ends
                seq = found[-1]["seq"]
            if full:
                break
            consumed, offset = consumed + chunk.end - offset, chunk.end
            if chunk.ends_a_millisecond:
                full = True
            elif chunk.is_full or consumed >= size:
                if events and events[0]["ts"] // MILLISECOND_NS != events[-1]["ts"] // MILLISECOND_NS:
                    unsettled, full = events[-1]["ts"] // MILLISECOND_NS, True
                else:  # one line, or one millisecond, is larger than a batch
                    size = max(size, consumed) * 2
            elif tail is None:
                continue  # it was read a while ago: there may be more by now
            elif tail.successor:
                number, offset = tail.successor, 0
            else:
                at_end = full = True
                if closed is None and not self._quiet(number, tail.end) and events:
                    unsettled = events[-1]["ts"] // MILLISECOND_NS
        while events and events[-1]["ts"] // MILLISECOND_NS == unsettled:
            events.pop()
        if not events:
            return EventBatch(events, start, Ledger(), at_end or not number, beyond)
        last = events[-1]
        counts = Ledger(read=len(events))
        if last["seq"] - start.seq != len(events):
            self._count_holes(start, events, numbers, counts)
        position = Position(numbers[len(events) - 1], ends[len(events) - 1], last["seq"], last["ts"])
        return EventBatch(events, position, counts, at_end, beyond)

    def _chunk(
        self, number: int, offset: int, seq: int, size: int, follower: Follower | None
    ) -> tuple[Chunk, int, _Tail | None]:
        """What stands at a place: a chunk, the index of its first event there, and the segment's end as of now.

        The end is None where the chunk was read before.
        """
        place, cache = (number, offset), self._cache
        if follower is None or cache is None or len(self.lines.followers) < 2:
            with self._lock:
                return self._parse(number, offset, seq, size)
        if (found := cache.find(follower, place, seq)) is not None:
            return *found, None
        if follower.is_behind:
            cache.wait_for_room(size)
        is_contended = not self._lock.acquire(blocking=False)
        if is_contended:
            self._lock.acquire()
        try:
            if is_contended and (found := cache.find(follower, place, seq)) is not None:  # whoever held it has read it
                return *found, None
            parsed = self._parse(number, offset, seq, size)
            if parsed[0].events:
                cache.keep(follower, parsed[0])
            return parsed
        finally:
            self._lock.release()

    def _parse(self, number: int, offset: int, seq: int, size: int) -> tuple[Chunk, int, _Tail]:
        """Read what stands at a place."""
        successor = self._successor(number)  # looked up first: if it exists, what we read now is all of this one
        data = self._pread(number, offset, size)
        end = data.rfind(b"\n") + 1
        tail = _Tail(offset + len(data), successor)
        lines = data[:end].splitlines(keepends=True)
        events = decode_sequence(lines, seq) if lines else []
        if events is not None:
            ends = list(islice(accumulate(map(len, lines), initial=offset), 1, None))
        else:
            events, ends = _decode_each(data[:end].split(b"\n")[:-1], offset, seq)
        chunk = Chunk((number, offset), offset + end, seq, events, ends, is_full=len(data) == size)
        if chunk.is_full and events:
            last = events[-1]["ts"] // MILLISECOND_NS
            if events[0]["ts"] // MILLISECOND_NS != last:  # so that all who read it go on from one place
                while events[-1]["ts"] // MILLISECOND_NS == last:
                    events.pop()
                    ends.pop()
                chunk.end, chunk.ends_a_millisecond = ends[-1], True
        return chunk, 0, tail

    def next_jump(self, start: Position) -> Event | None:
        """The next event after a position that sets a clock forward, if that is near: all times before it were wrong.

        Args:
            start: Where to look from, for `JUMP_SEARCH_BYTES`.

        """
        left, number, offset, rest = JUMP_SEARCH_BYTES, start.segment or self._successor(0), start.offset, b""
        while number and left > 0:
            data = self.session.read(number, offset, JUMP_READ_BYTES)
            offset, left = offset + len(data), left - JUMP_READ_BYTES
            complete, _, rest = (rest + data).rpartition(b"\n")
            if JUMP in complete:
                for line in complete.split(b"\n"):
                    if JUMP in line:
                        with contextlib.suppress(Damaged):
                            event = decode(line)
                            if event["tag"] == "clock" and event.get("forward"):
                                return event
            if not data:
                number, offset, rest = self._successor(number), 0, b""
        return None

    def _count_holes(self, start: Position, events: list[Event], numbers: list[int], counts: Ledger) -> None:
        present = set(self.session.segments())
        number, seq = max(start.segment, 1), start.seq
        for event, here in zip(events, numbers, strict=False):
            hole = event["seq"] - seq - 1
            if hole and not present.issuperset(range(number, here + 1)):
                counts.pruned += hole
            elif hole:
                dropped = min(hole, int(event["dropped"])) if event["tag"] == "gap" else 0
                counts.dropped += dropped
                counts.damaged += hole - dropped
            number, seq = here, event["seq"]

    def note_end(self, number: int, end: int, at: float) -> None:
        """Somebody saw where the journal ends: if it still does, it has been quiet since then.

        Args:
            number: The last segment.
            end: Its size.
            at: When it was that for the first time, by the reader's clock.

        """
        if (number, end) != self._tail:
            self._grew_at, self._tail = at, (number, end)

    def changed_ns(self) -> int:
        """When a file of the session was last made or removed, Unix ns. OSError."""
        return os.fstat(self._directory).st_mtime_ns

    def last_segment(self) -> int:
        """The number of the last segment; 0: there is none. OSError."""
        return max(self.session.segments(), default=0)

    def size_of(self, number: int) -> int:
        """The size of a segment, bytes. OSError."""
        with self._lock:
            if number == self._number:
                return os.fstat(self._fd).st_size
        return os.stat(segment_name(number), dir_fd=self._directory, follow_symlinks=False).st_size

    def peek(self, number: int, start: int, end: int) -> bytes:
        """The bytes of a segment from `start` to `end`, as they are. OSError."""
        with self._lock:
            return self._pread(number, start, end - start)

    def close(self) -> None:
        """Close the files; reading on needs a new reader."""
        for fd in (self._fd, self._directory):
            if fd >= 0:
                os.close(fd)
        self._number, self._fd, self._directory = 0, -1, -1

    def _successor(self, number: int) -> int:
        """The next segment that is there; 0 for none."""
        found = min((there for there in self._segments() if there > number), default=0)
        if number and found > number + 1:  # is one missing, or did it appear while the directory was read?
            with contextlib.suppress(OSError):
                os.stat(segment_name(number + 1), dir_fd=self._directory, follow_symlinks=False)
                return number + 1
        return found

    def _segments(self) -> list[int]:
        """The segments that are there. They are listed again when the directory has changed, and now and then."""
        changed, now = os.fstat(self._directory).st_mtime_ns, time.monotonic()
        if self._listed is not None:
            segments, changed_before, listed_at = self._listed
            if changed == changed_before and now - listed_at < LISTING_INTERVAL_S:
                return segments
        is_of_before = time.time_ns() - changed > LISTING_AGE_NS
        segments = self.session.segments()
        self._listed = (segments, changed, now) if is_of_before else None
        return segments

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        if number != self._number:
            if self._fd >= 0:
                os.close(self._fd)
            self._number, self._fd = 0, -1
            try:
                self._fd = open_file(segment_name(number), os.O_RDONLY, dir_fd=self._directory)
            except FileNotFoundError:  # pruned: its successor shows by how much
                return b""
            self._number = number
        return os.pread(self._fd, size, offset)

    def _quiet(self, number: int, end: int) -> bool:
        now = self._clock()
        if (number, end) != self._tail:
            self._grew_at, self._tail = now, (number, end)  # in this order: another thread may look in between
        return now - self._grew_at >= SETTLE_S

    def _read_header(self) -> Event:
        for number in self.session.segments():
            size = USUAL_HEADER_BYTES
            while b"\n" not in (data := self._pread(number, 0, size)) and len(data) == size:
                size *= 2
            try:
                event = decode(data.partition(b"\n")[0])
            except Damaged:
                continue
            if event.get("tag") == "header":
                check_schema(event, self.session.path)
                return event
        raise Damaged(f"{self.session.path}: no segment begins with a header that can be read")


def _decode_each(lines: list[bytes], offset: int, seq: int) -> tuple[list[Event], list[int]]:
    """The events of lines among which any may be damaged, and where each ends.

    Args:
        lines: Without their newlines.
        offset: Where they begin.
        seq: The number of the last event before them: nothing goes backwards, what does is a copy.

    """
    events: list[Event] = []
    ends: list[int] = []
    for line in lines:
        offset += len(line) + 1
        with contextlib.suppress(Damaged):
            event = decode(line)
            if event["seq"] > seq:
                seq = event["seq"]
                events.append(event)
                ends.append(offset)
    return events, ends


def _within(event: Event, until: int | None, closed: Closed | None) -> bool:
    return (until is None or event["ts"] <= until) and (closed is None or event["seq"] <= closed.seq)


def check_schema(header: Event, path: Path) -> None:
    """Refuse a journal of a newer major version: `NewerSchema`."""
    found = str(header.get("schema", ""))
    if not found.split(".")[0].isdigit():
        raise Damaged(f"{path}: the header's schema is {found!r}")
    if int(found.split(".")[0]) > SCHEMA_MAJOR:
        raise NewerSchema(str(path), found, SCHEMA_MAJOR)


def last_event(session: SessionPath) -> tuple[int, int]:
    """`seq` and `ts` (ns) of the last whole line of a session; (0, 0) where there is none."""
    directory = open_directory(session.path)
    try:
        for number in reversed(session.segments()):
            with contextlib.suppress(OSError):
                with open(open_file(segment_name(number), os.O_RDONLY, dir_fd=directory), "rb") as file:
                    event = last_line(file.fileno())
                if event:
                    return event["seq"], event["ts"]
    finally:
        os.close(directory)
    return 0, 0


def last_line(fd: int) -> Event | None:
    """The last whole line of a segment; it may have any length, and any number of damaged ones may follow it."""
    end, size = os.fstat(fd).st_size, 1 << 16
    while True:
        start = max(0, end - size)
        for line in reversed(os.pread(fd, end - start, start).split(b"\n")[:-1]):
            with contextlib.suppress(Damaged):
                return decode(line)
        if not start:
            return None
        size *= 2
