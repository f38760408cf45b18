"""`stepspan status`: the ledgers of journals."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepspan.deliver.ledgers import session_ledger
from stepspan.journal.layout import find_sessions

COUNTS = ("delivered", "filtered", "rejected", "pending", "damaged", "pruned", "dropped")


def show_status(path: Path, *, as_json: bool, state_directory: Path | None) -> int:
    """Print the ledgers of all sessions at or below `path`. The exit code."""
    sessions = list(find_sessions(path))
    if not sessions:
        print(f"stepspan status: no journal at or below {path}", file=sys.stderr)
        return 2
    found = [
        session_ledger(session, state_directory / session.path.name if state_directory else None)
        for session in sessions
    ]
    if as_json:
        print(json.dumps({"sessions": found}, indent=2))
    else:
        ledger_table(found)
    return 0


def ledger_table(found: Sequence[dict[str, Any]]) -> None:
    """One row for each session, destination and signal; below it, what receivers said."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("job", "rank", "session", "status", "lines", "destination", "signal", *COUNTS, "lag", "state"):
        numeric = column in {"rank", "lines", "lag", *COUNTS}
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    said: dict[str, None] = {}
    for ledger in found:
        job = Path(ledger["path"]).absolute().parents[1].name
        head = [job, str(ledger["rank"]), ledger["session"], ledger["status"], str(ledger["journaled"])]
        rows = [(d, s, state) for d, signals in ledger["destinations"].items() for s, state in signals.items()]
        if not rows:
            table.add_row(*head, "-", "-", *["-"] * len(COUNTS), "-", "not sent")
        for destination, signal, state in rows:
            counts = [str(state[name]) for name in COUNTS]
            table.add_row(*head, destination, signal, *counts, _seconds(state["lag"]), state["state"])
            head = [""] * len(head)
            if state["message"]:
                said[f"{destination} {signal} {state['state']}: {state['message']}"] = None
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    console.print(table)
    for line in said:
        console.print(Text(line))


def _seconds(lag: float) -> str:
    return f"{lag:.1f} s" if lag < 120 else f"{lag / 60:.0f} min" if lag < 7200 else f"{lag / 3600:.1f} h"
