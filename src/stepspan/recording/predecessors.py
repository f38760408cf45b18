"""Where a session's points may begin: behind those of its instance's session before it.

Rows of points may run ahead of their lines (`stepspan.mapping.point_buffer`), and the end of a session adds points
behind its last line. A session that begins within that time, in the same process or another, would put other values
where those are. So its header says `not_before`: a time behind all that the session before can have, however it ended.

That time is found in the last lines of the session before: each row takes at most one millisecond after the row before
it. Nothing is kept for it while a run goes on, and only a session that has written within the last minutes is read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from stepspan.errors import Damaged, JournalError
from stepspan.events import MILLISECOND_NS, SECOND_NS
from stepspan.journal.format import decode
from stepspan.journal.layout import SessionPath, find_sessions, segment_name, session_name, slug
from stepspan.journal.reader import JournalReader
from stepspan.mapping.records import MAX_LEAD_MS, MAX_WAITING

RECENT_S = 600.0
"""A session that was written longer ago by the file system's clock has no points in the future."""
MAX_SHIFT_NS = 120 * SECOND_NS
"""A session that is further ahead had a wrong clock: what follows must not wait for it."""
TAIL_BYTES, MAX_TAIL_BYTES = 1 << 18, 16 << 20
MAX_LEAD_NS = MAX_LEAD_MS * MILLISECOND_NS
MAX_END_NS = (3 * MAX_WAITING + 4) * MILLISECOND_NS
"""What may come behind the last row that kept to the limit: rows that waited, and the end of every series."""
END_NS = 4 * MILLISECOND_NS
LINE = re.compile(rb'\{"ts":(\d+),"seq":\d+,"tag":"(\w+)"')
ROWS = frozenset({"metrics", "step_end", "span_end"})
"""Tags of events that are a row of points."""


def first_free_time(
    directory: Path, job_id: str, rank: int, role: str, now: int, *, among: Iterable[SessionPath] | None = None
) -> int | None:
    """The time at which points of a session that begins now may begin.

    Args:
        directory: Of the journals.
        job_id: Of the session, as `rank` and `role`.
        rank: Its rank.
        role: What it is beside the rank's own process.
        now: When it begins, Unix ns.
        among: The sessions to look at; None: all of the job.

    Returns:
        Unix ns; None where it is not later than `now`.

    """
    prefix = session_name(rank, role, "")
    latest = now
    for session in find_sessions(directory / slug(job_id)) if among is None else among:
        if session.path.name.startswith(prefix):
            with suppress(OSError, JournalError):
                end = _end_of_points(session)
                if end <= now + MAX_SHIFT_NS:
                    latest = max(latest, end)
    return latest if latest > now else None


def _end_of_points(session: SessionPath) -> int:
    """A time, Unix ns, behind all points that a session may have; 0 if it is long past. OSError, `JournalError`."""
    segments = session.segments()
    if not segments or time.time() - (session.path / segment_name(segments[-1])).stat().st_mtime > RECENT_S:
        return 0
    reader = JournalReader(session)
    reader.close()
    not_before, size = int(reader.header.get("not_before", 0)), TAIL_BYTES
    while True:
        data, complete = _tail(session, segments, size)
        is_enough = complete or size >= MAX_TAIL_BYTES
        lines = list(_lines(data))
        if lines:
            begin, end = lines[0][0], lines[-1][0]
            ahead = max(begin, not_before) + (0 if complete else MAX_LEAD_NS)
            for ts, is_row in lines:
                ahead = max(ahead + MILLISECOND_NS, ts) if is_row else max(ahead, ts)
            limit = max(end, not_before) + MAX_LEAD_NS + MAX_END_NS
            if is_enough or end - begin > MAX_LEAD_NS or ahead > limit:
                return min(ahead + END_NS, limit)
        elif is_enough:
            return not_before
        size *= 4


def _lines(data: bytes) -> Iterator[tuple[int, bool]]:
    """The time of each whole line, Unix ns, and whether it is a row of points."""
    for line in data.splitlines():
        found = LINE.match(line)
        if found:
            yield int(found[1]), found[2].decode() in ROWS
        else:  # a processor has put its fields in another order
            with suppress(Damaged):
                event = decode(line)
                yield event["ts"], event["tag"] in ROWS


def _tail(session: SessionPath, segments: list[int], size: int) -> tuple[bytes, bool]:
    """The last bytes of a session, from the beginning of a line on, and whether they are all there are. OSError."""
    data = b""
    for number in reversed(segments):
        length = (session.path / segment_name(number)).stat().st_size
        begin = max(0, length - (size - len(data)))
        data = session.read(number, begin, length - begin) + data
        if begin:
            return data.partition(b"\n")[2], False
    return data, True
