"""`stepspan report`: each run on one page, from its journal alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.text import Text

from stepspan.cli.describe import pairs, printable, short
from stepspan.cli.table import print_table, shortened
from stepspan.identity import host_facts
from stepspan.journal.layout import find_sessions
from stepspan.reading.runs import summarise
from stepspan.values import format_seconds, json_value

MOST_SESSIONS, MOST_METRICS, MOST_LINES = 24, 40, 8
"""Rows of a table; how many errors and checkpoints are shown."""
UNEVEN = 0.1
"""A rank holds the others up if they wait longer than it does by this share of a step."""
PIPED = 200  # columns where there is no terminal

Row = Sequence[str]


def show_report(path: Path, *, as_json: bool, state_directory: Path | None) -> int:
    """Print a page for each run at or below `path`. The exit code."""
    jobs = summarise(find_sessions(path), boot_id=host_facts().boot_id, state_directory=state_directory)
    if not jobs:
        print(f"stepspan report: no journal at or below {path}", file=sys.stderr)
        return 2
    if as_json:
        print(orjson.dumps(json_value({"jobs": jobs}), option=orjson.OPT_INDENT_2).decode())
        return 0
    page = Page(Console(width=None if sys.stdout.isatty() else PIPED, highlight=False))
    for number, job in enumerate(jobs):
        if number:
            page.line("")
        page.job(job)
    return 0


class Page:
    """Where a run is printed."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def job(self, job: Mapping[str, Any]) -> None:
        """One run."""
        self._head(job)
        self._sessions(job)
        self._straggler(job)
        self._metrics(job["metrics"])
        self._errors(job["errors"])
        self._checkpoints(job["checkpoints"])
        self._lost(job["sessions"])
        self._delivery(job["delivery"], len(job["sessions"]))

    def line(self, text: str, style: str = "") -> None:
        """A line of text, whatever it holds."""
        self._console.print(Text(printable(text), style=style), soft_wrap=True)

    def title(self, text: str) -> None:
        """The heading of a part."""
        self.line("")
        self.line(text, "bold")

    def table(self, columns: str, rows: Iterable[Row], *, keys: int = 1) -> None:
        """A table; the first `keys` columns are repeated where it is too wide for the terminal."""
        names = [name.strip() for name in columns.split(",")]
        print_table(self._console, names, rows, keys=names[:keys])

    def _head(self, job: Mapping[str, Any]) -> None:
        name = f"  {job['name']}" if job["name"] not in (None, job["job"]) else ""
        labels = "".join(f" [{label}]" for label in (job["group"], *job["tags"]) if label)
        self.line(f"{job['job']}{name}{labels}", "bold")
        sessions = job["sessions"]
        statuses: dict[str, int] = {}
        for session in sessions:
            statuses[session["status"]] = statuses.get(session["status"], 0) + 1
        ended = ", ".join(f"{count} {status}" for status, count in statuses.items())
        took = format_seconds(max(0, job["last_event"] - job["started"]) / 1e9)
        self.line(
            f"{_count(job['ranks'], 'rank')}, {_count(len(sessions), 'session')} ({ended}); "
            f"began {_moment(job['started'])}, last event {took} later"
        )
        last = max((s["last_step"] for s in sessions if s["last_step"] is not None), default=None)
        if last is not None:
            total = job["total_steps"]
            done = bool(total) and max(s["steps"] for s in sessions) >= total  # numbers may count from 0 or from 1
            told = f"reached step {last}" + (f" of {total}" if total is not None else "")
            epoch = max((s["epoch"] for s in sessions if s["epoch"] is not None), default=None)
            where = f"{', the last' if done else ''} in epoch {epoch}" if epoch is not None else ""
            self.line(f"took all {total} steps{where}" if done else f"{told}{where}")
        if job["hyperparams"]:
            self.line(pairs(job["hyperparams"]))

    def _sessions(self, job: Mapping[str, Any]) -> None:
        self.title("ranks")
        sessions = job["sessions"]
        shown = sessions
        if len(sessions) > MOST_SESSIONS:
            telling = lambda s: (s["status"] == "completed", -(s["step_time"] or {"p50": 0.0})["p50"])  # noqa: E731
            shown = sorted(sorted(sessions, key=telling)[:MOST_SESSIONS], key=lambda s: (s["rank"], s["started"]))
        length, hosts = shortened(s["session"] for s in sessions), {s["host"] for s in sessions}
        self.table(
            "rank, session, host, attempt, status, took, >steps, >last, >open, >p50, >p99, >max, >data (mean), "
            ">in collectives (p50), >errors, >stalls",
            (_session(session, length, several_hosts=len(hosts) > 1) for session in shown),
            keys=2,
        )
        if len(hosts) == 1 and hosts != {""}:
            self.line(f"all on {hosts.pop()}", "dim")
        if len(shown) < len(sessions):
            left = len(sessions) - len(shown)
            self.line(f"and {left} more; these are those that did not complete, and the slowest (all: --json)", "dim")
        for session in shown:
            if session["trouble"]:
                self.line(f"{session['path']}: {session['trouble']}", "yellow")

    def _straggler(self, job: Mapping[str, Any]) -> None:
        found = job["straggler"]
        if found is None:
            return
        steps = [s["step_time"]["p50"] for s in job["sessions"] if s["step_time"]]
        uneven = found["others_wait"] - found["wait"] > UNEVEN * max(steps, default=0.0)
        self.line("")
        self.line(
            f"least wait in collectives: rank {found['rank']}, {format_seconds(found['wait'])} a step; "
            f"the others {format_seconds(found['others_wait'])}" + (": it holds them up" if uneven else ""),
            "yellow" if uneven else "",
        )

    def _metrics(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        if not metrics:
            return
        self.title("metrics")
        rows = [
            (
                name,
                short(values["last"]),
                _step(values["last_step"]),
                "" if values["min"] is None else short(values["min"]),
                _step(values.get("min_step")),
                "" if values["max"] is None else short(values["max"]),
                f"{values['points']:,}",
                str(values["nonfinite"] or ""),
            )
            for name, values in list(metrics.items())[:MOST_METRICS]
        ]
        self.table("metric, >last, >at step, >min, >at step, >max, >points, >not finite", rows)
        if len(metrics) > MOST_METRICS:
            self.line(f"and {len(metrics) - MOST_METRICS} more (--json)", "dim")

    def _errors(self, errors: Mapping[str, Any]) -> None:
        if not errors["count"]:
            return
        self.title(f"errors: {errors['count']}")
        for error in errors["list"][:MOST_LINES]:
            where = f"rank {error['rank']}" + ("" if error["step"] is None else f", step {error['step']}")
            self.line(f"{_moment(error['ts'])}  {where}  {error['type']}: {error['message']}", "red")
        if errors["count"] > MOST_LINES:
            self.line(f"and {errors['count'] - MOST_LINES} more: stepspan tail --tag error", "dim")

    def _checkpoints(self, checkpoints: Sequence[Mapping[str, Any]]) -> None:
        if not checkpoints:
            return
        self.title("checkpoints")
        for checkpoint in checkpoints[-MOST_LINES:]:
            step = "" if checkpoint["step"] is None else f"step {checkpoint['step']}  "
            self.line(f"{_moment(checkpoint['ts'])}  {step}{checkpoint['name']}  {checkpoint['path']}")

    def _lost(self, sessions: Sequence[Mapping[str, Any]]) -> None:
        lost = {what: sum(session["lines"][what] for session in sessions) for what in ("damaged", "dropped", "pruned")}
        if any(lost.values()):
            why = {reason: None for session in sessions for reason in session["lines"]["why"]}
            self.title("lost")
            told = ", ".join(f"{count:,} lines {what}" for what, count in lost.items() if count)
            self.line(told + (f" ({'; '.join(why)})" if why else ""), "yellow")

    def _delivery(self, rows: Sequence[Mapping[str, Any]], sessions: int) -> None:
        self.title("delivery")
        if not rows:
            self.line("sent nowhere: `stepspan sync` does that")
            return
        self.table(
            "destination, signal, >delivered, >filtered, >rejected, >lines waiting, >lag, >sessions done, >held",
            (
                (
                    row["destination"],
                    row["signal"],
                    f"{row['delivered']:,}",
                    str(row["filtered"] or ""),
                    str(row["rejected"] or ""),
                    f"{row['pending']:,}",
                    format_seconds(row["lag"]) if row["lag"] else "",
                    f"{row['finished']} of {sessions}",
                    str(row["held"] or ""),
                )
                for row in rows
            ),
            keys=2,
        )
        for message in dict.fromkeys(message for row in rows for message in row["messages"]):
            self.line(message, "yellow")


def _session(session: Mapping[str, Any], length: int, *, several_hosts: bool) -> Row:
    times = session["step_time"] or {}
    attempt = session["attempt"] or [0]
    return (
        f"{session['rank']}{'.' + session['role'] if session['role'] else ''}",
        session["session"][:length],
        session["host"] if several_hosts else "",
        ".".join(map(str, attempt)) if any(attempt) else "",
        session["status"],
        "" if session["seconds"] is None else format_seconds(session["seconds"]),
        f"{session['steps']:,}",
        _step(session["last_step"]),
        _step(session["open_step"]),
        *(format_seconds(times[name]) if times else "" for name in ("p50", "p99", "max")),
        format_seconds(session["data_wait"]) if session["data_wait"] else "",
        "" if session["collective_wait"] is None else format_seconds(session["collective_wait"]),
        str(session["errors"] or ""),
        str(session["stalls"] or ""),
    )


def _moment(ts: int) -> str:
    return datetime.fromtimestamp(ts / 1e9).strftime("%Y-%m-%d %H:%M:%S") if ts else "at an unknown time"


def _step(step: Any) -> str:
    return "" if step is None else str(step)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
