"""The sessions that a deliverer has open: the tasks of one session share its files, its parsed lines and its end.

Each signal and destination has a thread and a cursor of its own. What they have in common is the journal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from stepspan.deliver.tails import TailWatch
from stepspan.journal.chunks import ChunkCache, Follower
from stepspan.journal.cursor import Position
from stepspan.journal.layout import SessionPath
from stepspan.journal.liveness import Closed
from stepspan.journal.reader import EventBatch, JournalReader

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class OpenSession:
    """A session that some task has open.

    Attributes:
        reader: Its one reader.
        users: How many tasks have it open.
        tail: What looks whether the journal grows.
        end: What looks for its end; None before a task has asked for it.

    """

    reader: JournalReader
    tail: TailWatch
    users: int = 0
    end: object = None


class OpenSessions:
    """All that a deliverer has open. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cache = ChunkCache()
        self._open: dict[Path, OpenSession] = {}

    def open(self, session: SessionPath, thread: str, clock: Callable[[], float]) -> SharedReader:
        """One task's reader of a session.

        Args:
            session: Where it lies.
            thread: Names the thread of the task.
            clock: Monotonic seconds.

        Raises:
            JournalError: It cannot be read.
            OSError: The same, in the file system's words.

        """
        with self._lock:
            opened = self._open.get(session.path)
            if opened is not None:
                opened.users += 1
        if opened is None:
            reader = JournalReader(session, clock=clock, cache=self._cache)
            made = OpenSession(reader, TailWatch(reader))
            with self._lock:
                opened = self._open.setdefault(session.path, made)
                opened.users += 1
            if opened is not made:  # another thread was faster
                made.reader.close()
        return SharedReader(self, opened, self._cache.follow(opened.reader.lines, thread))

    def look(self, now: float) -> tuple[float, float]:
        """Look at the ends of all journals.

        Args:
            now: Monotonic seconds.

        Returns:
            When one was seen last to have grown, and when something that must not wait.

        """
        tails = [opened.tail.look(now) for opened in list(self._open.values())]
        return max((t.grew_at for t in tails), default=0.0), max((t.urgent_at for t in tails), default=0.0)

    def shared_end(self, opened: OpenSession, make: Callable[[], T]) -> T:
        """What looks for the end of a session, for all of its tasks; `make` makes it for the first of them."""
        with self._lock:
            if opened.end is None:
                opened.end = make()
            return cast("T", opened.end)

    def leave(self, opened: OpenSession, follower: Follower) -> None:
        """A task reads no more; the last one closes the files."""
        self._cache.leave(follower)
        with self._lock:
            opened.users -= 1
            is_last = not opened.users
            if is_last:
                self._open.pop(opened.reader.session.path, None)
        if is_last:
            opened.reader.close()

    def after_fork(self) -> None:
        """In a forked child, before it closes its copies of the files: no lock is held by a thread that it lacks."""
        self._lock = threading.Lock()
        self._cache.after_fork()


class SharedReader:
    """One task's reader of a session; reads as `JournalReader` does."""

    def __init__(self, sessions: OpenSessions, opened: OpenSession, follower: Follower) -> None:
        self.session = opened.reader.session
        self.header = opened.reader.header
        self.next_jump = opened.reader.next_jump
        self.note_end = opened.reader.note_end
        self.look = opened.tail.look
        self._sessions = sessions
        self._opened = opened
        self._follower: Follower | None = follower

    def read(self, start: Position, *, size: int, until: int | None = None, closed: Closed | None = None) -> EventBatch:
        """The next events, which nobody may change: `JournalReader.read`."""
        return self._opened.reader.read(start, size=size, until=until, closed=closed, follower=self._follower)

    def end(self, make: Callable[[], T]) -> T:
        """What looks for the session's end: the one of all tasks, which the first of them makes."""
        return self._sessions.shared_end(self._opened, make)

    def close(self) -> None:
        """Leave the session; the last task that has it open closes its files."""
        follower, self._follower = self._follower, None
        if follower is not None:
            self._sessions.leave(self._opened, follower)
