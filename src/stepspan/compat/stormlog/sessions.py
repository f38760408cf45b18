"""Sessions: the events of one tracker from start to stop, and what is known of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stepspan.compat.stormlog.events import TelemetryEventLike
from stepspan.compat.stormlog.projection import ProjectedTelemetryRecord, project_telemetry_events

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
