"""What the cursors say, for people: `stepspan status`, `Run.stats()`, the demo; and since when lines wait."""

from __future__ import annotations

import re
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepspan.errors import JournalError
from stepspan.journal.cursor import CursorState, Position, read_cursor
from stepspan.journal.layout import SessionPath
from stepspan.journal.liveness import read_closed, read_resting
from stepspan.journal.reader import JournalReader, last_event
from stepspan.mapping.records import SIGNALS

THINNED = (
    "values are logged faster than one a millisecond for over 10 s, and receivers tell no finer times apart: some are "
    "thinned, the last of each curve goes out, the journal has all of them; `stepspan status` counts"
)
SEARCH_BYTES = 4096
"""In which the next line's time is looked for."""
LINE_TIME = re.compile(rb'^\{"ts":(\d+),', re.MULTILINE)


def cursors(state_directory: Path) -> dict[str, dict[str, CursorState]]:
    """The cursors of one session.

    Args:
        state_directory: The session's directory, or the one below `--state-directory` that stands for it.

    Returns:
        Destination -> signal -> cursor.

    """
    found: dict[str, dict[str, CursorState]] = {}
    for path in sorted((state_directory / "cursors").glob("*.*")):
        destination, _, signal = path.name.rpartition(".")
        state = read_cursor(path) if signal in SIGNALS else None
        if state is not None:
            found.setdefault(destination, {})[signal] = state
    return found


def session_ledger(session: SessionPath, state_directory: Path | None = None) -> dict[str, Any]:
    """One session: lines journaled, how it ended, and for each destination and signal the ledger and what waits.

    Args:
        session: Where it lies.
        state_directory: Where its cursors lie, if that is not in the session's own directory.

    Returns:
        JSON: `session`, `rank`, `path`, `status`, `journaled` (lines), `last_event` (Unix ns), `begun_for` (the
        destinations that it goes to by itself; null: its header does not say), `destinations` (destination -> signal ->
        `signal_ledger`).

    Raises:
        OSError: The session cannot be read.

    """
    closed = read_closed(session.path) or (read_closed(state_directory) if state_directory else None)
    seq, ts = (closed.seq, closed.ts) if closed else last_event(session)
    return {
        "session": session.session,
        "rank": session.rank,
        "path": str(session.path),
        "status": closed.status if closed else read_resting(session.path) or "open",
        "journaled": seq,
        "last_event": ts,
        "begun_for": _begun_for(session),
        "destinations": {
            destination: {
                signal: signal_ledger(
                    state, seq, ts, first_pending_time(session, state.position) if state.position.seq < seq else 0
                )
                for signal, state in states.items()
            }
            for destination, states in cursors(state_directory or session.path).items()
        },
    }


def _begun_for(session: SessionPath) -> list[str] | None:
    with suppress(OSError, JournalError), closing(JournalReader(session)) as reader:
        listed = reader.header.get("destinations")
        return listed if isinstance(listed, list) else None
    return None


def signal_ledger(state: CursorState, seq: int, ts: int, pending_since: int = 0) -> dict[str, Any]:
    """One signal of one session at one destination.

    Args:
        state: What its cursor says.
        seq: Lines journaled.
        ts: The time of the last of them, Unix ns.
        pending_since: The time of the first line that waits, Unix ns; 0: none does.

    Returns:
        JSON: the ledger's fields, `partial` (of those rejected) and `left_out` (of those filtered) as a cursor has
        them, `pending` (lines), `lag` (seconds of event time that wait), `finished`, `state`, `message` and `answered`
        (Unix seconds).

    """
    ledger = asdict(state.ledger)
    counted = ledger["read"] + ledger["damaged"] + ledger["pruned"] + ledger["dropped"]
    pending = max(0, seq - counted)
    return {
        **ledger,
        "partial": state.partial,
        "left_out": state.left_out,
        "pending": pending,
        "lag": round(max(0, ts - pending_since) / 1e9, 3) if pending and pending_since else 0.0,
        "finished": state.position.finished,
        "state": state.state,
        "message": state.message,
        "answered": state.answered,
    }


def first_pending_time(session: SessionPath, position: Position) -> int:
    """The time of the first line after a position, Unix ns; 0: there is none, or it is still being written.

    Damaged lines are passed over; if there is nothing else in a few KiB, it is the time that the position has reached.
    """
    with suppress(OSError):
        for number in [n for n in session.segments() if n >= position.segment][:2]:
            data = session.read(number, position.offset if number == position.segment else 0, SEARCH_BYTES)
            match = LINE_TIME.search(data) if b"\n" in data or len(data) == SEARCH_BYTES else None
            if match:
                return int(match[1])
            if len(data) == SEARCH_BYTES:
                return position.ts
    return 0
