"""stormlog's files as sessions of a journal, whole or as they grow.

Counters become memory events, `phase_enter` and `phase_exit` spans, everything else but plain samples a named event
with its severity; a session becomes a run with its status.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepspan.compat.importing import Imported, Line, Mark, SessionImport
from stepspan.compat.stormlog.events import TelemetryEventLike
from stepspan.compat.stormlog.load import load_telemetry_sessions
from stepspan.compat.stormlog.projection import SEVERITIES
from stepspan.compat.stormlog.sessions import LoadedTelemetrySession
from stepspan.compat.stormlog.sink import MANIFEST, SEGMENTS
from stepspan.events import Event
from stepspan.values import json_value

COUNTERS = {
    "allocator.allocated": "allocator_allocated_bytes",
    "allocator.reserved": "allocator_reserved_bytes",
    "allocator.active": "allocator_active_bytes",
    "allocator.inactive": "allocator_inactive_bytes",
    "allocator.change": "allocator_change_bytes",
    "device.used": "device_used_bytes",
    "device.free": "device_free_bytes",
    "device.total": "device_total_bytes",
}
"""The metric below `training.memory.` -> the record's field."""
SILENT = frozenset({"sample", "allocation", "deallocation", "phase_enter", "phase_exit"})
"""Event types that are numbers or spans, and no milestones."""


def detect(path: Path) -> str | None:
    """What a path is taken for; None where it is not stormlog's."""
    if path.is_dir():
        segments = len(list(path.glob(SEGMENTS)))
        return f"a stormlog sink of {segments} segments" if segments else None
    if path.suffix not in {".json", ".jsonl"} and path.name != MANIFEST:
        return None
    try:
        sessions = load_telemetry_sessions(path, permissive_legacy=False)
    except (OSError, ValueError):
        return None
    events = sum(len(session.events) for session in sessions)
    return f"stormlog telemetry of {events} events in {len(sessions)} sessions" if events else None


def read(path: Path, *, job_id: str | None = None) -> Iterator[Imported]:
    """The sessions of a file or sink. Raises ValueError naming file and line; OSError."""
    for session in load_telemetry_sessions(path):
        if session.events:
            yield imported(path, session, job_id)


def imported(path: Path, session: LoadedTelemetrySession, job_id: str | None) -> Imported:
    """One session, to be written from its beginning."""
    summary = session.summary
    return Imported(
        system="stormlog",
        source=path,
        key=summary.session_id,
        job_id=job_id or summary.job_id or f"stormlog-{summary.session_id}",
        started=min(summary.started_at_ns, session.events[0].timestamp_ns),
        lines=lambda: _Translation(session).all(),
        rank=summary.rank,
        local_rank=summary.local_rank,
        world_size=summary.world_size,
        host=summary.host,
        pid=summary.pid,
        status="completed" if summary.status == "completed" else "interrupted",
        resource={"stormlog.session_id": summary.session_id},
    )


class Follower:
    """A sink that is still being written, as journals that grow with it."""

    def __init__(self, path: Path, directory: Path, *, boot_id: str) -> None:
        self._path, self._directory, self._boot_id = path, directory, boot_id
        self._open: dict[str, tuple[SessionImport, _Translation]] = {}
        self._whole: set[str] = set()

    def poll(self) -> int:
        """Take over what has been added; how many events. ValueError or OSError where the sink can't be read."""
        added = 0
        for session in load_telemetry_sessions(self._path):
            key = session.summary.session_id
            if key in self._whole or not session.events:
                continue
            if key not in self._open:
                found = replace(imported(self._path, session, None), boot_id=self._boot_id)
                journal = SessionImport(self._directory, found)
                self._open[key] = journal, _Translation(session)
            journal, translation = self._open[key]
            if not journal.whole:
                translation.session = session
                over = session.summary.status != "running"
                added += journal.write(translation.all() if over else translation.so_far())
                if not over:
                    continue
                journal.close("completed" if session.summary.status == "completed" else "interrupted")
            self._whole.add(key)
            del self._open[key]
        return added


class _Translation:
    """A session's events as lines of a journal, from where it stopped the last time."""

    def __init__(self, session: LoadedTelemetrySession) -> None:
        self.session = session
        self._done = 0
        self._run: Mark | None = None
        self._phases: list[tuple[str, Mark]] = []

    def all(self) -> Iterator[Line]:
        """What is left, and the end."""
        yield from self.so_far()
        summary = self.session.summary
        end = max(summary.ended_at_ns or 0, self.session.events[-1].timestamp_ns)
        if summary.status == "completed":
            yield end, {"ts": 0, "seq": 0, "tag": "run_end", "begin": 0, "status": "completed"}, self._run

    def so_far(self) -> Iterator[Line]:
        """What is new."""
        if self._run is None:
            self._run = Mark()
            summary = self.session.summary
            about = {
                "name": summary.job_id or summary.session_id,
                "group": None,
                "tags": ["stormlog"],
                "attempt": [0, 0],
            }
            yield summary.started_at_ns, {"ts": 0, "seq": 0, "tag": "run_begin", "parent": 0, **about}, self._run
        while self._done < len(self.session.events):
            event = self.session.events[self._done]
            self._done += 1
            yield from self._lines(event)

    def _lines(self, event: TelemetryEventLike) -> Iterator[Line]:
        ts, kind = event.timestamp_ns, event.event_type.strip().lower()
        counters = {name: getattr(event, field) for name, field in COUNTERS.items()}
        known = {name: value for name, value in counters.items() if value is not None}
        yield ts, {"ts": 0, "seq": 0, "tag": "memory", "device_id": event.device_id, "counters": known}, None
        if kind == "phase_enter":
            mark = Mark()
            begin: Event = {"ts": 0, "seq": 0, "tag": "span_begin", "parent": self._innermost().seq}
            yield ts, {**begin, "name": _phase(event), "attributes": json_value(event.metadata)}, mark
            self._phases.append((_phase(event), mark))
        elif kind == "phase_exit":
            name = _phase(event)
            place = next((i for i in reversed(range(len(self._phases))) if self._phases[i][0] == name), None)
            if place is not None:
                yield ts, {"ts": 0, "seq": 0, "tag": "span_end", "begin": 0}, self._phases.pop(place)[1]
        elif kind not in SILENT:
            told = {
                "parent": self._innermost().seq,
                "name": f"stormlog.{kind}",
                "severity": SEVERITIES.get(kind, "info"),
            }
            attributes = {**json_value(event.metadata), "collector": event.collector, "device_id": event.device_id}
            if event.context:
                attributes["message"] = event.context
            yield ts, {"ts": 0, "seq": 0, "tag": "event", **told, "attributes": attributes}, None

    def _innermost(self) -> Mark:
        return self._phases[-1][1] if self._phases else self._run or Mark()


def _phase(event: TelemetryEventLike) -> str:
    """The name of a phase event's phase."""
    scope: Any = event.metadata.get("phase_scope")
    named = scope.get("name") if isinstance(scope, dict) else None
    path = scope.get("path") if isinstance(scope, dict) else None
    last = path[-1] if isinstance(path, list) and path else None
    return next((name for name in (named, last, event.context) if isinstance(name, str) and name.strip()), "phase")
