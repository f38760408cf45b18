"""The sessions that a deliverer has open: the tasks of one session share its files, its parsed lines and its end.

Each signal and destination has a thread and a cursor of its own. What they have in common is the journal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stepspan.events import Event
from stepspan.journal.chunks import ChunkCache
from stepspan.journal.cursor import Position
from stepspan.journal.layout import SessionPath
from stepspan.journal.liveness import Closed
from stepspan.journal.reader import EventBatch, JournalReader

if TYPE_CHECKING:
    from typing_extensions import Self


class OpenSessions:
    """All that a deliverer has open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cache = ChunkCache()
        self._users: dict[JournalReader, int] = {}
        self._readers: dict[Path, JournalReader] = {}

    def open(self, session: SessionPath, lane: str, clock: Callable[[], float]) -> SharedReader:
        """One task's reader of a session.

        Args:
            session: Where it lies.
            lane: Names the thread of the task.
            clock: Monotonic seconds.

        Raises:
            JournalError: It cannot be read.
            OSError: The same, in the file system's words.

        """
        with self._lock:
            reader = self._readers.get(session.path)
            if reader is not None:
                self._users[reader] += 1
        if reader is None:
            made = JournalReader(session, clock=clock, cache=self._cache)
            with self._lock:
                reader = self._readers.setdefault(session.path, made)
                self._users[reader] = self._users.get(reader, 0) + 1
            if reader is not made:  # another thread was faster
                made.close()
        return SharedReader(self, reader, lane)

    def after_fork(self) -> None:
        """In a forked child, before its copies of the files are closed: locks that no thread of it holds are free."""
        self._lock = threading.Lock()
        self._cache.after_fork()
