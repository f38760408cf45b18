"""Reading a session that may still be written: whole lines only, never past what is known to be settled.

A batch always ends between two milliseconds, so that "several points of a series in one millisecond" can be judged
within a batch, whatever the batches are. At the live tail the newest millisecond waits until a later line exists, the
session has ended, or the file has been quiet for `SETTLE` seconds.

A damaged line costs that line: it shows as a hole in `seq` and is counted; its bytes stay where they are.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice, repeat
from pathlib import Path

from stepspan.errors import Damaged, NewerSchema
from stepspan.events import MILLISECOND_NS, SCHEMA_MAJOR, Event
from stepspan.journal.cursor import Ledger, Position
from stepspan.journal.format import decode, decode_sequence
from stepspan.journal.layout import SessionPath, open_directory, open_file, segment_name
from stepspan.journal.liveness import Closed

SETTLE_S = 0.2
USUAL_HEADER_BYTES = 1 << 16
JUMP = b'"tag":"clock"'
JUMP_SEARCH_BYTES, CHUNK_BYTES = 64 << 20, 1 << 20


@dataclass(slots=True)
class EventBatch:
    """Events, where to read on after them, and what the ledger gains. `at_end`: nothing more can be read now."""

    events: list[Event]
    position: Position
    counts: Ledger
    at_end: bool
    beyond: int = 0
    """The time of the event that `until` kept out, Unix ns; 0 where there was none."""


class JournalReader:
    """Reads one session. The constructor raises OSError, `Damaged` (no header) or `NewerSchema`."""

    def __init__(self, session: SessionPath, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.session = session
        self._clock = clock
        self._number, self._fd = 0, -1
        self._tail = (0, 0)
        self._grew_at = clock()
        self._directory = open_directory(session.path)
        try:
            self.header = self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, start: Position, *, size: int, until: int | None = None, closed: Closed | None = None) -> EventBatch:
        """Events from `start` on: about `size` bytes, none later than `until` (ns), none past the end."""
        number, offset, seq = start.segment or self._successor(0), start.offset, start.seq
        events: list[Event] = []
        numbers: list[int] = []  # of the segments of the events
        ends: list[int] = []  # and where they end there
        unsettled: int | None = None  # events of this millisecond may have siblings that we have not seen
        consumed, at_end, full, beyond = 0, False, False, 0
        while number and not full:
            successor = self._successor(number)  # looked up first: if it exists, what we read now is all of this one
            data = self._pread(number, offset, size - consumed)
            complete_bytes = data.rfind(b"\n") + 1
            lines = data[:complete_bytes].splitlines(keepends=True)
            decoded = decode_sequence(lines, seq) if lines else None
            if decoded and _within(decoded[-1], until, closed):
                events += decoded
                numbers += repeat(number, len(decoded))
                ends += islice(accumulate(map(len, lines), initial=offset), 1, None)
                seq, offset = decoded[-1]["seq"], offset + complete_bytes
                lines = []
            else:
                lines = data[:complete_bytes].split(b"\n")[:-1]
            for line in lines:
                offset += len(line) + 1
                try:
                    event = decode(line)
                except Damaged:
                    continue
                if event["seq"] <= seq:
                    continue  # a copy: nothing of ours goes backwards
                if closed is not None and event["seq"] > closed.seq:
                    at_end = full = True
                    break
                if until is not None and event["ts"] > until:
                    beyond, full = event["ts"], True
                    unsettled = beyond // MILLISECOND_NS
                    break
                seq = event["seq"]
                events.append(event)
                numbers.append(number)
                ends.append(offset)
            if full:
                break
            consumed += complete_bytes
            if len(data) == size - (consumed - complete_bytes):
                if events and events[0]["ts"] // MILLISECOND_NS != events[-1]["ts"] // MILLISECOND_NS:
                    unsettled, full = events[-1]["ts"] // MILLISECOND_NS, True
                else:
                    size *= 2  # one line, or one millisecond, is larger than a batch
            elif successor:
                number, offset = successor, 0
            else:
                at_end = full = True
                if closed is None and not self._quiet(number, offset + len(data) - complete_bytes) and events:
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

    def next_jump(self, start: Position) -> Event | None:
        """The next event after a position that sets a clock forward, if that is near: all times before it were wrong.

        Args:
            start: Where to look from, for `JUMP_SEARCH_BYTES`.

        """
        left, number, offset, rest = JUMP_SEARCH_BYTES, start.segment or self._successor(0), start.offset, b""
        while number and left > 0:
            data = self.session.read(number, offset, CHUNK_BYTES)
            offset, left = offset + len(data), left - CHUNK_BYTES
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

    def close(self) -> None:
        """Close the files; reading on needs a new reader."""
        for fd in (self._fd, self._directory):
            if fd >= 0:
                os.close(fd)
        self._number, self._fd, self._directory = 0, -1, -1

    def _successor(self, number: int) -> int:
        """The next segment that is there; 0 for none."""
        found = min((there for there in self.session.segments() if there > number), default=0)
        if number and found > number + 1:  # is one missing, or did it appear while the directory was read?
            with contextlib.suppress(OSError):
                os.stat(segment_name(number + 1), dir_fd=self._directory, follow_symlinks=False)
                return number + 1
        return found

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
            self._tail, self._grew_at = (number, end), now
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
