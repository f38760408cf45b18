"""`stepspan status`: the ledgers of journals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from stepspan.cli.options import require_sessions
from stepspan.cli.terminal import print_line, print_table, short_id_length, stdout_console
from stepspan.deliver.ledgers import session_ledger
from stepspan.reading.sessions import job_folder, state_path
from stepspan.values import format_seconds

COUNTS = ("delivered", "filtered", "thinned", "rejected", "pending", "damaged", "pruned", "dropped")


def show_status(path: Path, *, as_json: bool, state_directory: Path | None) -> None:
    """Print the ledgers of all sessions at or below `path`. Raises `JournalError`."""
    ledgers = [session_ledger(session, state_path(session, state_directory)) for session in require_sessions(path)]
    if as_json:
        print(json.dumps({"sessions": ledgers}, indent=2))
    else:
        print_ledgers(ledgers)


def print_ledgers(ledgers: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print for each job a table with a row for each session, destination and signal; below it, what receivers said.

    Args:
        ledgers: Sessions' ledgers as `session_ledger` gives them.
        console: Where to; by default standard output.

    """
    console = console or stdout_console()
    jobs: dict[str, list[dict[str, Any]]] = {}
    for ledger in ledgers:
        jobs.setdefault(job_folder(Path(ledger["path"])), []).append(ledger)
    for number, (job, of_job) in enumerate(jobs.items()):
        if number:
            console.print()
        print_line(console, job, "bold")
        _print_job(console, of_job)
        messages = {
            f"{destination} {signal} {state['state']}: {state['message']}": None
            for ledger in of_job
            for destination, signals in ledger["destinations"].items()
            for signal, state in signals.items()
            if state["message"]
        }
        for message in messages:
            print_line(console, message)
    left_out = sum(
        state["left_out"]
        for ledger in ledgers
        for states in ledger["destinations"].values()
        for state in states.values()
    )
    if left_out:
        console.print()
        print_line(console, f"left out by rank, of those filtered: {left_out}; `stepspan sync --all-ranks` sends them")
    offline = sum(not ledger["destinations"] and not ledger["begun_for"] for ledger in ledgers)
    if offline:
        console.print()
        print_line(console, f"begun for no destination: {offline}; `stepspan sync PATH` sends what no run does")


def _print_job(console: Console, ledgers: Sequence[dict[str, Any]]) -> None:
    """The sessions of a job; a count that is zero everywhere is left out."""
    states = [s for ledger in ledgers for signals in ledger["destinations"].values() for s in signals.values()]
    counts = [name for name in COUNTS if name == "delivered" or any(state[name] for state in states)]
    id_length = short_id_length(ledger["session"] for ledger in ledgers)
    rows: list[list[object]] = []
    for ledger in ledgers:
        session = [ledger["rank"], ledger["session"][:id_length], ledger["status"], ledger["journaled"]]
        begun_for = ledger["begun_for"] or ([] if ledger["destinations"] else [""])
        for destination in (name for name in begun_for if name not in ledger["destinations"]):
            rows.append([*session, destination, "", *[""] * len(counts), "", "not sent"])
            session = [""] * len(session)
        for destination, signals in ledger["destinations"].items():
            for signal, state in signals.items():
                numbers = [state[name] for name in counts]
                lag = format_seconds(state["lag"]) if state["pending"] else ""
                rows.append([*session, destination, signal, *numbers, lag, state["state"]])
                session, destination = [""] * len(session), ""  # a cell that repeats the one above stays empty
    columns = [">rank", "session", "status", ">lines", "destination", "signal", *(f">{name}" for name in counts)]
    print_table(console, [*columns, ">lag", "state"], rows, keys=("rank", "destination", "signal"))
