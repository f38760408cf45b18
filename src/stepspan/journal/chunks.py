"""Lines that were read, checked and parsed once, for all who read the same session: a signal each, say.

A **chunk** is what one read of a segment gave. It is kept while a **follower** of the session stands before or in it,
and taken from there by whoever comes to it. All chunks of a cache together are of at most `MAX_CHUNK_BYTES` of journal.

Who is ahead waits before it reads what would push out a chunk that another one still needs: on one interpreter that
costs no time, and otherwise the slower ones would read everything again, always just behind. It waits for as long as
they come on, `MAX_WAIT_S` at most, and `STANDSTILL_S` where they don't. A thread that was waited for in vain is not
waited for again in the next `SLOW_THREAD_S`, and nothing is kept for it: one that hangs stops no other.

Any thread may call, for any session. Parsed events are shared: nobody may change them.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field

from stepspan.events import Event

MAX_CHUNK_BYTES = 1 << 20
"""Of journal; parsed that is some six times as much. Two full batches, so that who is ahead may send meanwhile."""
MAX_LAG_BYTES = 16 << 20
"""Who is further behind is not waited for."""
STANDSTILL_S, MAX_WAIT_S = 0.25, 1.0
SLOW_THREAD_S = 10.0
IDLE_FOLLOWER_S = 30.0
"""A follower that has not read for so long (it is held, say) is one that nothing is kept for."""

Place = tuple[int, int]
"""A segment, and an offset in it."""


@dataclass(slots=True, eq=False)
class Chunk:
    """Lines of one segment, one after the other.

    Attributes:
        start: Where they begin.
        end: Where the last of them ends.
        seq: The number of the last event before them.
        events: Theirs, by ascending number; of a damaged line there is none.
        ends: The offset at which the line of each event ends.
        is_full: Whether as much was read as had been asked for, so that more stands behind it.
        ends_a_millisecond: Whether it is full, and ends between two milliseconds.

    """

    start: Place
    end: int
    seq: int
    events: list[Event]
    ends: list[int]
    is_full: bool
    ends_a_millisecond: bool = False

    def index(self, place: Place, seq: int) -> int | None:
        """The index of the first event after a place and number; None where that is none of the places between them."""
        if place == self.start:
            return 0 if seq == self.seq else None
        if place[0] != self.start[0] or not self.start[1] < place[1] < self.end:
            return None
        index = bisect_left(self.ends, place[1])
        found = index < len(self.ends) and self.ends[index] == place[1] and self.events[index]["seq"] == seq
        return index + 1 if found else None


@dataclass(slots=True, eq=False)
class SharedLines:
    """The chunks of one session, and who follows it."""

    followers: list[Follower] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Follower:
    """One who reads a session from place to place.

    Attributes:
        lines: Of the session.
        thread: Names the thread that reads, of all of its followers.
        place: Where it stands, or where the full chunk ends that it has taken.
        read_at: When it last read, or began, monotonic seconds.
        is_behind: Whether the last chunk that it took was full, so that it will soon come to another one.

    """

    lines: SharedLines
    thread: str
    place: Place = (0, 0)
    read_at: float = field(default_factory=time.monotonic)
    is_behind: bool = False


class ChunkCache:
    """The chunks of several sessions."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._kept: dict[Chunk, SharedLines] = {}
        """In the order in which they were read."""
        self._bytes = 0
        self._waiting = 0
        """How many threads wait for room."""
        self._slow: dict[str, float] = {}
        """A thread that was waited for in vain -> until when it is not waited for again, monotonic seconds."""

    def after_fork(self) -> None:
        """In a forked child: a thread that it does not have may have held the lock."""
        self._changed = threading.Condition(threading.Lock())

    def follow(self, lines: SharedLines, thread: str) -> Follower:
        """A new follower of a session."""
        with self._changed:
            lines.followers.append(follower := Follower(lines, thread))
        return follower

    def leave(self, follower: Follower) -> None:
        """A follower reads no more."""
        with self._changed:
            if follower in follower.lines.followers:
                follower.lines.followers.remove(follower)
            self._drop_passed(follower.lines)

    def stand(self, follower: Follower, place: Place) -> None:
        """Note where a follower reads on from: a segment, and the offset at which one of its lines begins."""
        with self._changed:
            follower.place, follower.read_at = place, time.monotonic()
            if self._waiting:
                self._changed.notify_all()
            if follower.lines.chunks:
                self._drop_passed(follower.lines)

    def find(self, follower: Follower, place: Place, seq: int) -> tuple[Chunk, int] | None:
        """What was read already of what stands at a place.

        Args:
            follower: Who comes to it.
            place: A segment, and the offset at which one of its lines begins.
            seq: The number of the last event before that.

        Returns:
            The chunk, and the index of its first event there; None: it is to be read.

        """
        with self._changed:
            for chunk in follower.lines.chunks:
                index = chunk.index(place, seq)
                if index is not None:
                    self._move_past(follower, chunk)
                    return chunk, index
        return None

    def wait_for_room(self, size: int) -> None:
        """Wait for others to pass what a chunk of `size` bytes would push out."""
        with self._changed:
            begun = standing_since = time.monotonic()
            places: list[Place] = []
            while self._kept and self._bytes + size > MAX_CHUNK_BYTES:
                oldest, lines = next(iter(self._kept.items()))
                now = time.monotonic()
                behind = self._followers_before(oldest, lines, now)
                before, places = places, [follower.place for follower in lines.followers]
                if places != before:
                    standing_since = now
                rest = min(begun + MAX_WAIT_S, standing_since + STANDSTILL_S) - now
                if behind and rest > 0:
                    self._waiting += 1
                    self._changed.wait(rest)
                    self._waiting -= 1
                    continue
                self._slow.update({follower.thread: now + SLOW_THREAD_S for follower in behind})
                self._drop(oldest)

    def keep(self, follower: Follower, chunk: Chunk) -> None:
        """Keep what a follower has read, if there is another one whom it is for."""
        lines, size = follower.lines, chunk.end - chunk.start[1]
        with self._changed:
            if size > MAX_CHUNK_BYTES:
                return
            self._kept[chunk] = lines
            self._bytes += size
            lines.chunks.append(chunk)
            self._move_past(follower, chunk)
            while self._bytes > MAX_CHUNK_BYTES:
                self._drop(next(iter(self._kept)))

    def _move_past(self, follower: Follower, chunk: Chunk) -> None:
        """Note that a follower has a chunk, which it may be the last one to need.

        Of one at the end of what is written it may take a part now and the rest when that has settled, so it is kept
        until the follower comes from behind it: all then read on from its end, and share what they read.
        """
        follower.is_behind = chunk.is_full
        if chunk.is_full:
            follower.place = chunk.start[0], chunk.end
            self._drop_passed(follower.lines)

    def _followers_before(self, chunk: Chunk, lines: SharedLines, now: float) -> list[Follower]:
        """Those that will come to a chunk soon."""
        (segment, start), end = chunk.start, (chunk.start[0], chunk.end)
        return [
            follower
            for follower in lines.followers
            if follower.place < end
            and now - follower.read_at < IDLE_FOLLOWER_S
            and (start - follower.place[1] < MAX_LAG_BYTES if follower.place[0] == segment else start < MAX_LAG_BYTES)
            and self._slow.get(follower.thread, 0.0) <= now
        ]

    def _drop_passed(self, lines: SharedLines) -> None:
        """Give up the chunks of a session that nobody will come to."""
        now = time.monotonic()
        for chunk in [chunk for chunk in lines.chunks if not self._followers_before(chunk, lines, now)]:
            self._drop(chunk)

    def _drop(self, chunk: Chunk) -> None:
        self._kept.pop(chunk).chunks.remove(chunk)
        self._bytes -= chunk.end - chunk.start[1]
        self._changed.notify_all()
