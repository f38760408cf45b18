"""What the cursors say, for people: `stepspan status`, `Run.stats()`, the demo."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepspan.errors import JournalError
from stepspan.journal.cursor import CursorState, read_cursor
from stepspan.journal.layout import SessionPath
from stepspan.journal.liveness import read_closed
from stepspan.journal.reader import JournalReader, last_event
from stepspan.mapping.records import SIGNALS


def cursors(home: Path) -> dict[str, dict[str, CursorState]]:
    """Destination -> signal -> cursor, of the session whose cursors lie below `home`."""
    found: dict[str, dict[str, CursorState]] = {}
    for path in sorted((home / "cursors").glob("*.*")):
        destination, _, signal = path.name.rpartition(".")
        state = read_cursor(path) if signal in SIGNALS else None
        if state is not None:
            found.setdefault(destination, {})[signal] = state
    return found


def session_ledger(session: SessionPath, home: Path | None = None) -> dict[str, Any]:
    """One session: lines journaled, how it ended, and for each destination and signal the ledger and what waits."""
    closed = read_closed(session.path) or (read_closed(home) if home else None)
    seq, ts = (closed.seq, closed.ts) if closed else last_event(session)
    destinations = cursors(home or session.path)
    started = _started(session) if destinations else 0
    return {
        "session": session.session,
        "rank": session.rank,
        "path": str(session.path),
        "status": closed.status if closed else "open",
        "journaled": seq,
        "last_event": ts,
        "destinations": {
            destination: {signal: signal_ledger(state, seq, ts, started) for signal, state in states.items()}
            for destination, states in destinations.items()
        },
    }


def _started(session: SessionPath) -> int:
    """When a session began, Unix ns; 0 where its header cannot be read."""
    try:
        with closing(JournalReader(session)) as reader:
            return int(reader.header.get("started", 0))
    except (OSError, JournalError):
        return 0


def signal_ledger(state: CursorState, seq: int, ts: int, started: int = 0) -> dict[str, Any]:
    """One signal: its ledger, the lines that wait, and how far event time lags behind the journal (s).

    A cursor that has not moved yet stands where the session `started`.
    """
    ledger = asdict(state.ledger)
    counted = ledger["read"] + ledger["damaged"] + ledger["pruned"] + ledger["dropped"]
    pending = max(0, seq - counted)
    since = state.position.ts or started
    return {
        **ledger,
        "pending": pending,
        "lag": round(max(0, ts - since) / 1e9, 3) if pending and since else 0.0,
        "finished": state.position.finished,
        "state": state.state,
        "message": state.message,
        "answered": state.answered,
    }
