"""How a deliverer learns that a session has ended: `closed.json` says so, or the writer is dead and it writes that."""

from __future__ import annotations

import math
from pathlib import Path

from stepspan.deliver.options import Options
from stepspan.events import Event
from stepspan.journal.layout import SessionPath
from stepspan.journal.liveness import Closed, read_closed, read_resting, write_closed, writer_is_dead
from stepspan.journal.reader import last_event

CLOSED_INTERVAL_S = 0.1
"""Between looks for `closed.json`."""
LIVENESS_INTERVAL_S = 1.0
"""Between looks at the writer's lock."""


class SessionEnd:
    """The end of one session, looked for no more often than the intervals above.

    `state_directory` is where this deliverer writes what it finds out: the session's own directory, or another one
    where that belongs to another user.
    """

    def __init__(self, session: SessionPath, header: Event, state_directory: Path, options: Options) -> None:
        self._session = session
        self._header = header
        self._state_directory = state_directory
        self._options = options
        self._closed: Closed | None = None
        self._read_at = self._probed_at = -LIVENESS_INTERVAL_S

    def look_again(self) -> None:
        """Let the next `read` and `probe` look, however short a time has passed: a run has just ended, perhaps."""
        self._read_at = self._probed_at = -math.inf

    def read(self) -> Closed | None:
        """The end, if it is written down."""
        now = self._options.clock()
        if self._closed is None and now - self._read_at >= CLOSED_INTERVAL_S:
            self._read_at = now
            for directory in dict.fromkeys((self._session.path, self._state_directory)):
                self._closed = self._closed or read_closed(directory)
        return self._closed

    def note_alive(self) -> None:
        """The session was written just now, and no file of it has come: neither look is needed for a while."""
        self._read_at = self._probed_at = self._options.clock()

    def probe(self) -> Closed | None:
        """The end, written down here if the writer turns out to be dead. OSError, `JournalError`: it is gone."""
        now = self._options.clock()
        if self._closed is None and now - self._probed_at >= LIVENESS_INTERVAL_S:
            self._probed_at = now
            boot_id, dead_after = self._options.boot_id, self._options.dead_after
            if writer_is_dead(self._session, self._header, boot_id=boot_id, dead_after=dead_after):
                seq, ts = last_event(self._session)
                end = Closed(seq, ts, read_resting(self._session.path) or "interrupted")
                self._closed = write_closed(self._state_directory, end, by="deliverer")
        return self._closed
