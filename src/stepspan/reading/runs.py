"""The sessions of each job as one run: what `stepspan report` shows, as plain data.

Durations are seconds, times Unix ns; None is not known.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from stepspan.deliver.ledgers import session_ledger
from stepspan.journal.layout import SessionPath
from stepspan.reading.session_summary import MAX_LISTED, MetricValues, SessionSummary, metric_labels
from stepspan.reading.sessions import state_path

RECORD_COUNTS = ("delivered", "rejected", "filtered", "thinned", "pending")


def summarise(
    paths: Iterable[SessionPath], *, boot_id: str, state_directory: Path | None = None
) -> list[dict[str, Any]]:
    """What each job's sessions say of its run. Each session is read once, in bounded memory.

    Args:
        paths: Sessions of any jobs; those whose headers have the same job id are one run.
        boot_id: This host's boot, to tell which sessions are still written.
        state_directory: Where delivery keeps its cursors if it may not write to the journals.

    Returns:
        A mapping for each run, in the order in which they began: what `stepspan report --json` prints.

    """
    jobs: dict[str, list[SessionSummary]] = {}
    for path in paths:
        session = SessionSummary.read(path, boot_id=boot_id, state_directory=state_directory)
        jobs.setdefault(session.job, []).append(session)
    runs = []
    for job, sessions in jobs.items():
        sessions.sort(key=lambda session: (session.rank, session.role, session.started))
        ledgers = [session_ledger(session.path, state_path(session.path, state_directory)) for session in sessions]
        runs.append({**_run(job, sessions), "delivery": delivery_totals(ledgers)})
    return sorted(runs, key=lambda run: run["started"])


def _run(job: str, sessions: Sequence[SessionSummary]) -> dict[str, Any]:
    """One run from its sessions, which are in the order of their ranks."""
    errors = sorted((error for session in sessions for error in session.errors), key=lambda error: error["ts"])
    checkpoints = sorted((made for session in sessions for made in session.checkpoints), key=lambda made: made["ts"])
    return {
        "job": job,
        "name": next((session.name for session in sessions if session.name), None),
        "group": next((session.group for session in sessions if session.group), None),
        "tags": sessions[0].tags,
        "started": min((session.started for session in sessions if session.started), default=0),
        "last_event": max(session.last_event for session in sessions),
        "ranks": len({(session.rank, session.role) for session in sessions}),
        "total_steps": max((s.total_steps for s in sessions if s.total_steps is not None), default=None),
        "sessions": [session.as_dict() for session in sessions],
        "straggler": _straggler(sessions),
        "hyperparams": {key: value for session in sessions for key, value in session.hyperparams.items()},
        "metrics": _metrics(sessions),
        "errors": {"count": sum(session.error_count for session in sessions), "list": errors[:MAX_LISTED]},
        "checkpoints": checkpoints[-MAX_LISTED:],
    }


def _straggler(sessions: Sequence[SessionSummary]) -> dict[str, Any] | None:
    """The rank that waited least in collectives, as the others waited for it; None unless two ranks or more waited."""
    waits: dict[int, array[float]] = {}
    for session in sessions:
        if session.collective_waits:
            waits.setdefault(session.rank, array("d")).extend(session.collective_waits)
    if len(waits) < 2:
        return None
    usual = {rank: median(values) for rank, values in waits.items()}  # the first step's wait would dominate a mean
    slowest = min(usual, key=lambda rank: usual[rank])
    others_wait = fmean(wait for rank, wait in usual.items() if rank != slowest)
    return {"rank": slowest, "wait": usual[slowest], "others_wait": others_wait}


def _metrics(sessions: Sequence[SessionSummary]) -> dict[str, dict[str, Any]]:
    """Each metric: the last value of the lowest rank that has it, the extremes of all ranks."""
    merged: dict[tuple[str, str], MetricValues] = {}
    for session in sessions:
        for metric, values in session.metrics.items():
            if metric in merged:
                merged[metric].merge(values)
            else:
                merged[metric] = values
    labels = metric_labels(merged)
    return {labels[metric]: asdict(values) for metric, values in merged.items()}


def delivery_totals(ledgers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each destination and signal the sums over some sessions' ledgers, as `session_ledger` gives them.

    Returns:
        Mappings with records by outcome, journal lines that are `pending`, how many `sessions` there are, of them
        `finished` and `held`, the largest `lag` in seconds, and the distinct `messages` of receivers.

    """
    totals: dict[tuple[str, str], dict[str, Any]] = {}
    for ledger in ledgers:
        for destination, signals in ledger["destinations"].items():
            for signal, state in signals.items():
                row = totals.setdefault(
                    (destination, signal),
                    {"destination": destination, "signal": signal, **dict.fromkeys(RECORD_COUNTS, 0), "sessions": 0,
                     "finished": 0, "held": 0, "lag": 0.0, "messages": []},
                )  # fmt: skip
                for name in RECORD_COUNTS:
                    row[name] += state[name]
                row["sessions"] += 1
                row["finished"] += state["finished"]
                row["held"] += state["state"] == "hold"
                row["lag"] = max(row["lag"], state["lag"])
                if state["message"] and state["message"] not in row["messages"]:
                    row["messages"].append(state["message"])
    return list(totals.values())
