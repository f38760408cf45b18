"""`stepspan report`: each run on one page, from its journal alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from stepspan.cli.event_text import format_fields, format_value
from stepspan.cli.options import require_sessions
from stepspan.cli.terminal import print_line, print_table, rank_label, short_id_length, stdout_console
from stepspan.conversion import json_value
from stepspan.identity import host_facts
from stepspan.reading.runs import summarise
from stepspan.values import format_seconds

MAX_SESSIONS, MAX_METRICS, MAX_LINES = 24, 40, 8
"""Rows of the tables of ranks and metrics; how many errors and checkpoints are shown."""
STRAGGLER_SHARE = 0.1
"""A rank holds the others up if they wait longer than it does by this share of a step."""


def show_report(path: Path, *, as_json: bool, state_directory: Path | None) -> None:
    """Print a page for each run at or below `path`. Raises `JournalError`."""
    runs = summarise(require_sessions(path), boot_id=host_facts().boot_id, state_directory=state_directory)
    if as_json:
        print(orjson.dumps(json_value({"jobs": runs}), option=orjson.OPT_INDENT_2).decode())
        return
    page = Page(stdout_console())
    for number, run in enumerate(runs):
        if number:
            page.line("")
        page.run(run)


class Page:
    """Prints runs, as `summarise` gives them, part by part."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def run(self, run: Mapping[str, Any]) -> None:
        """Print one run: ranks, step times, the straggler, metrics, errors and checkpoints."""
        self._head(run)
        self._sessions(run["sessions"])
        self._straggler(run)
        self._metrics(run["metrics"])
        self._errors(run["errors"])
        self._checkpoints(run["checkpoints"])
        self._lost_lines(run["sessions"])
        self._delivery(run["delivery"], len(run["sessions"]))

    def line(self, text: str, style: str = "") -> None:
        """Print a line of any text."""
        print_line(self._console, text, style)

    def title(self, text: str) -> None:
        """Print the heading of a part."""
        self.line("")
        self.line(text, "bold")

    def table(self, columns: str, rows: Iterable[Sequence[object]], *, keys: int = 1) -> None:
        """Print a table; the first `keys` columns are repeated where it is too wide for the terminal."""
        names = [name.strip() for name in columns.split(",")]
        print_table(self._console, names, rows, keys=names[:keys])

    def _head(self, run: Mapping[str, Any]) -> None:
        name = f"  {run['name']}" if run["name"] not in (None, run["job"]) else ""
        labels = "".join(f" [{label}]" for label in (run["group"], *run["tags"]) if label)
        self.line(f"{run['job']}{name}{labels}", "bold")
        sessions = run["sessions"]
        statuses = Counter(session["status"] for session in sessions)
        ended = ", ".join(f"{count} {status}" for status, count in statuses.items())
        duration = format_seconds(max(0, run["last_event"] - run["started"]) / 1e9)
        self.line(
            f"{_count(run['ranks'], 'rank')}, {_count(len(sessions), 'session')} ({ended}); "
            f"began {_moment(run['started'])}, last event {duration} later"
        )
        last = max((s["last_step"] for s in sessions if s["last_step"] is not None), default=None)
        if last is not None:
            total = run["total_steps"]
            done = bool(total) and max(s["steps"] for s in sessions) >= total  # numbers may count from 0 or from 1
            reached = f"took all {total} steps" if done else f"reached step {last}"
            reached += f" of {total}" if total is not None and not done else ""
            epoch = max((s["epoch"] for s in sessions if s["epoch"] is not None), default=None)
            self.line(reached + ("" if epoch is None else f"{', the last' if done else ''} in epoch {epoch}"))
        if run["hyperparams"]:
            self.line(format_fields(run["hyperparams"]))

    def _sessions(self, sessions: Sequence[Mapping[str, Any]]) -> None:
        self.title("ranks")
        shown = sessions
        if len(sessions) > MAX_SESSIONS:
            worst_first = sorted(sessions, key=_completed_and_fast)
            shown = sorted(worst_first[:MAX_SESSIONS], key=lambda s: (s["rank"], s["started"]))
        id_length, hosts = short_id_length(s["session"] for s in sessions), {s["host"] for s in sessions}
        self.table(
            "rank, session, host, attempt, status, took, >steps, >last, >open, >p50, >p99, >max, >data (mean), "
            ">in collectives (p50), >errors, >stalls",
            (_session_row(session, id_length, several_hosts=len(hosts) > 1) for session in shown),
            keys=2,
        )
        if len(hosts) == 1 and hosts != {""}:
            self.line(f"all on {hosts.pop()}", "dim")
        if len(shown) < len(sessions):
            more = len(sessions) - len(shown)
            self.line(f"and {more} more; shown are those that did not complete, and the slowest (all: --json)", "dim")
        for session in shown:
            if session["trouble"]:
                self.line(f"{session['path']}: {session['trouble']}", "yellow")

    def _straggler(self, run: Mapping[str, Any]) -> None:
        straggler = run["straggler"]
        if straggler is None:
            return
        step_time = max((s["step_time"]["p50"] for s in run["sessions"] if s["step_time"]), default=0.0)
        holds_up = straggler["others_wait"] - straggler["wait"] > STRAGGLER_SHARE * step_time
        self.line("")
        self.line(
            f"least wait in collectives: rank {straggler['rank']}, {format_seconds(straggler['wait'])} a step; "
            f"the others {format_seconds(straggler['others_wait'])}" + (": it holds them up" if holds_up else ""),
            "yellow" if holds_up else "",
        )

    def _metrics(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        if not metrics:
            return
        self.title("metrics")
        rows = [
            (
                name,
                format_value(values["last"]),
                values["last_step"],
                "" if values["min"] is None else format_value(values["min"]),
                values["min_step"],
                "" if values["max"] is None else format_value(values["max"]),
                f"{values['points']:,}",
                values["nonfinite"] or None,
            )
            for name, values in list(metrics.items())[:MAX_METRICS]
        ]
        self.table("metric, >last, >at step, >min, >at step, >max, >points, >not finite", rows)
        if len(metrics) > MAX_METRICS:
            self.line(f"and {len(metrics) - MAX_METRICS} more (--json)", "dim")

    def _errors(self, errors: Mapping[str, Any]) -> None:
        if not errors["count"]:
            return
        self.title(f"errors: {errors['count']}")
        for error in errors["list"][:MAX_LINES]:
            where = f"rank {error['rank']}" + ("" if error["step"] is None else f", step {error['step']}")
            self.line(f"{_moment(error['ts'])}  {where}  {error['type']}: {error['message']}", "red")
        if errors["count"] > MAX_LINES:
            self.line(f"and {errors['count'] - MAX_LINES} more: stepspan tail --tag error", "dim")

    def _checkpoints(self, checkpoints: Sequence[Mapping[str, Any]]) -> None:
        if not checkpoints:
            return
        self.title("checkpoints")
        for checkpoint in checkpoints[-MAX_LINES:]:
            step = "" if checkpoint["step"] is None else f"step {checkpoint['step']}  "
            self.line(f"{_moment(checkpoint['ts'])}  {step}{checkpoint['name']}  {checkpoint['path']}")

    def _lost_lines(self, sessions: Sequence[Mapping[str, Any]]) -> None:
        lost = {what: sum(session["lines"][what] for session in sessions) for what in ("damaged", "dropped", "pruned")}
        if any(lost.values()):
            reasons = "; ".join(dict.fromkeys(reason for session in sessions for reason in session["lines"]["why"]))
            counts = ", ".join(f"{count:,} lines {what}" for what, count in lost.items() if count)
            self.title("lost")
            self.line(counts + (f" ({reasons})" if reasons else ""), "yellow")

    def _delivery(self, rows: Sequence[Mapping[str, Any]], sessions: int) -> None:
        self.title("delivery")
        if not rows:
            self.line("sent nowhere: `stepspan sync` does that")
            return
        self.table(
            "destination, signal, >delivered, >filtered, >thinned, >rejected, >lines waiting, >lag, "
            ">sessions done, >held",
            (
                (
                    row["destination"],
                    row["signal"],
                    f"{row['delivered']:,}",
                    row["filtered"] or None,
                    row["thinned"] or None,
                    row["rejected"] or None,
                    f"{row['pending']:,}",
                    format_seconds(row["lag"]) if row["lag"] else "",
                    f"{row['finished']} of {sessions}",
                    row["held"] or None,
                )
                for row in rows
            ),
            keys=2,
        )
        for message in dict.fromkeys(message for row in rows for message in row["messages"]):
            self.line(message, "yellow")


def _session_row(session: Mapping[str, Any], id_length: int, *, several_hosts: bool) -> Sequence[object]:
    times = session["step_time"] or {}
    attempt = session["attempt"] or [0]
    return (
        rank_label(session["rank"], session["role"]),
        session["session"][:id_length],
        session["host"] if several_hosts else "",
        ".".join(map(str, attempt)) if any(attempt) else "",
        session["status"],
        "" if session["seconds"] is None else format_seconds(session["seconds"]),
        f"{session['steps']:,}",
        session["last_step"],
        session["open_step"],
        *(format_seconds(times[name]) if times else "" for name in ("p50", "p99", "max")),
        format_seconds(session["data_wait"]) if session["data_wait"] else "",
        "" if session["collective_wait"] is None else format_seconds(session["collective_wait"]),
        session["errors"] or None,
        session["stalls"] or None,
    )


def _completed_and_fast(session: Mapping[str, Any]) -> tuple[bool, float]:
    """Sorts sessions by how little they say: those that completed last, and of equals the slowest first."""
    return session["status"] == "completed", -(session["step_time"] or {"p50": 0.0})["p50"]


def _moment(ts: int) -> str:
    return datetime.fromtimestamp(ts / 1e9).strftime("%Y-%m-%d %H:%M:%S") if ts else "at an unknown time"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
