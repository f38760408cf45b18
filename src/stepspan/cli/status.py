"""`stepspan status`: the ledgers of journals."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from stepspan.cli.describe import printable
from stepspan.cli.table import print_table, shortened
from stepspan.deliver.ledgers import session_ledger
from stepspan.journal.layout import find_sessions
from stepspan.values import format_seconds

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


def ledger_table(found: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """For each job one row a session, destination and signal; below it, what receivers said."""
    console = console or Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    jobs: dict[str, list[dict[str, Any]]] = {}
    for ledger in found:
        jobs.setdefault(Path(ledger["path"]).absolute().parents[1].name, []).append(ledger)
    for number, (job, ledgers) in enumerate(jobs.items()):
        if number:
            console.print()
        console.print(Text(printable(job), style="bold"), soft_wrap=True)
        _job(console, ledgers)
    said = {
        f"{destination} {signal} {state['state']}: {state['message']}": None
        for ledger in found
        for destination, signals in ledger["destinations"].items()
        for signal, state in signals.items()
        if state["message"]
    }
    for line in said:
        console.print(Text(printable(line)), soft_wrap=True)


def _job(console: Console, ledgers: Sequence[dict[str, Any]]) -> None:
    """The sessions of a job; a count that is zero everywhere is left out."""
    states = [s for ledger in ledgers for signals in ledger["destinations"].values() for s in signals.values()]
    counts = [name for name in COUNTS if name == "delivered" or any(state[name] for state in states)]
    length = shortened(ledger["session"] for ledger in ledgers)
    rows: list[list[str]] = []
    for ledger in ledgers:
        head = [str(ledger["rank"]), ledger["session"][:length], ledger["status"], str(ledger["journaled"])]
        if not ledger["destinations"]:
            rows.append([*head, "", "", *[""] * len(counts), "", "not sent"])
        for destination, signals in ledger["destinations"].items():
            for signal, state in signals.items():
                told = [str(state[name]) for name in counts]
                lag = format_seconds(state["lag"]) if state["pending"] else ""
                rows.append([*head, destination, signal, *told, lag, state["state"]])
                head, destination = [""] * len(head), ""
    columns = [">rank", "session", "status", ">lines", "destination", "signal", *(f">{name}" for name in counts)]
    print_table(console, [*columns, ">lag", "state"], rows, keys=("rank", "destination", "signal"))
