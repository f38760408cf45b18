"""Where the journal of a live session ends, seen without reading it: that nothing is new must cost next to nothing.

A look costs two `fstat` calls a session, however many signals ask. The directory's time tells what needs no line: a
`closed.json` or a new segment. What was appended is read once, for words of events that must not wait.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from stepspan.journal.reader import JournalReader

LOOK_INTERVAL_S = 0.05
"""Within which what was seen is usually not looked at again."""
URGENT = (b'"tag":"error"', b'"tag":"run_end"', b'"NaN"', b'Infinity"')
"""In lines that must not wait for others."""
URGENT_INTERVAL_S = 1.0
"""Between urgent lines of one session that count: a value that stays NaN is news once."""
MAX_URGENT_BYTES = 64 << 10
"""Of what was appended since the last look, the last so many bytes are searched."""
LONG_AGO = float("-inf")


class Tail(NamedTuple):
    """How a journal's end was seen last. Times are those of the looks."""

    number: int
    """The last segment; 0: there is none."""
    size: int
    """Of that segment, bytes."""
    grew_at: float
    """When it was seen for the first time as it is now."""
    urgent_at: float
    """When something was seen last that must not wait."""


class TailWatch:
    """Looks at the end of one session, for all of its tasks. Any thread may call.

    Args:
        reader: Has the session open.

    """

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._looked_at = self._urgent_line_at = LONG_AGO
        self._directory_ns = -1
        self._tail: Tail | None = None

    def look(self, now: float, max_age: float = LOOK_INTERVAL_S) -> Tail:
        """How the journal ends.

        Args:
            now: Monotonic seconds; the same clock for all who look.
            max_age: For how many seconds an earlier look counts.

        """
        tail = self._tail
        if tail is not None and now - self._looked_at < max_age:
            return tail
        with self._lock:
            self._looked_at = now
            try:
                self._tail = tail = self._look(now)
            except OSError:  # it is gone, maybe: whoever reads finds out
                self._tail = tail = Tail(0, 0, now, now)
            return tail

    def _look(self, now: float) -> Tail:
        reader, before = self._reader, self._tail
        directory_ns = reader.changed_ns()
        has_changed, self._directory_ns = directory_ns != self._directory_ns, directory_ns
        number = reader.last_segment() if before is None or has_changed else before.number
        size = reader.size_of(number)
        if before is None:
            return Tail(number, size, now, LONG_AGO)
        grew_at, urgent_at = before.grew_at, now if has_changed else before.urgent_at
        if (number, size) != before[:2]:
            grew_at = now
            start = max(before.size if number == before.number else 0, size - MAX_URGENT_BYTES)
            if now - self._urgent_line_at >= URGENT_INTERVAL_S:
                appended = reader.peek(number, start, size)
                if any(words in appended for words in URGENT):
                    urgent_at = self._urgent_line_at = now
        return Tail(number, size, grew_at, urgent_at)
