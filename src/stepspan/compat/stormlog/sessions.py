"""Sessions: the events of one tracker from start to stop, and which of several is meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepspan.compat.stormlog.events import TelemetryEventLike
from stepspan.compat.stormlog.fields import IDENTITY
from stepspan.compat.stormlog.projection import ProjectedTelemetryRecord, project_telemetry_events
from stepspan.errors import RecordError, short_repr

STATUSES = ("completed", "interrupted", "incomplete", "running")
"""In the order in which sessions are preferred."""


@dataclass(frozen=True)
class SessionSummary:
    """What is known of a session: the fields of stormlog's class of that name.

    Times are Unix nanoseconds; `status` is one of `STATUSES`. `source` is where the summary is from: a sink's manifest,
    or `artifact:` and the name of the events' file.
    """

    session_id: str
    status: str
    started_at_ns: int
    ended_at_ns: int | None
    host: str
    pid: int
    job_id: str | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    source: str = "stormlog.session"


@dataclass
class LoadedTelemetrySession:
    """A session with its events, by time, the files they are from, and what was wrong with the sink's manifest."""

    summary: SessionSummary
    events: list[TelemetryEventLike]
    sources_loaded: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def telemetry_records(self) -> list[ProjectedTelemetryRecord]:
        """The events as neutral records. Raises RecordError where metadata nests too deeply."""
        return project_telemetry_events(self.events)

    def resources(self) -> list[dict[str, Any]]:
        """Each thing that the events are about (host, process, device), once, in the order of its first event."""
        return _distinct(dict(record.resource) for record in self.telemetry_records())

    def correlations(self) -> list[dict[str, Any]]:
        """Each set of ids that the events belong to (session, job, phase), once, in the order of its first event."""
        return _distinct(dict(record.correlation) for record in self.telemetry_records())


def _distinct(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({repr(sorted(each.items())): each for each in found}.values())


def summary_of(session_id: str, events: Sequence[TelemetryEventLike], source: str) -> SessionSummary:
    """The summary of a session that no manifest has: completed if its tracker logged `stop`, else incomplete."""
    first = events[0]
    stops = [event.timestamp_ns for event in events if event.event_type == "stop"]
    return SessionSummary(
        session_id=session_id,
        status="completed" if stops else "incomplete",
        started_at_ns=first.timestamp_ns,
        ended_at_ns=max(stops, default=None),
        host=first.host,
        pid=first.pid,
        source=source,
        **{name: getattr(first, name) for name in IDENTITY},
    )


def sort_sessions(sessions: Iterable[LoadedTelemetrySession]) -> list[LoadedTelemetrySession]:
    """By status, then the newest end, the newest start, and the id."""

    def key(session: LoadedTelemetrySession) -> tuple[int, int, int, str]:
        summary = session.summary
        end = summary.started_at_ns if summary.ended_at_ns is None else summary.ended_at_ns
        return STATUSES.index(summary.status), -end, -summary.started_at_ns, summary.session_id

    return sorted(sessions, key=key)


def select_events(sessions: Sequence[LoadedTelemetrySession], session_id: str | None) -> list[TelemetryEventLike]:
    """The events of the session that is asked for, else of the first that has any."""
    if session_id is None or not sessions:
        return next((session.events for session in sessions if session.events), [])
    for session in sessions:
        if session.summary.session_id == session_id:
            return session.events
    known = ", ".join(session.summary.session_id for session in sessions)
    raise RecordError(f"Requested session_id not found: {short_repr(session_id)} (there are: {known})", "session_id")
