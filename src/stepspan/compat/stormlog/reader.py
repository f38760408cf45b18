"""stormlog's files as sessions of a journal, in one go or as they grow.

Counters become memory events, `phase_enter` and `phase_exit` spans, everything else but plain samples a named event
with its severity; a session becomes a run with its status.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stepspan.compat.importing import BeginLine, ImportedSession, Line, SessionImport, event
from stepspan.compat.stormlog.events import TelemetryEventLike
from stepspan.compat.stormlog.load import LoadedTelemetrySession, load_telemetry_sessions
from stepspan.compat.stormlog.projection import COUNTERS, SEVERITIES, phase_name
from stepspan.compat.stormlog.sink import MANIFEST, SEGMENTS
from stepspan.conversion import json_value

MEMORY = {name.removeprefix("memory.").removesuffix("_bytes"): field for name, field in COUNTERS.items()}
"""The metric below `training.memory.` -> the record's field."""
WITHOUT_EVENT = frozenset({"sample", "allocation", "deallocation", "phase_enter", "phase_exit"})
"""Event types that are only numbers or spans."""


def detect(path: Path) -> str | None:
    """What a path is taken for, in words; None where it is not stormlog's. Never raises."""
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


def read_sessions(path: Path, *, job_id: str | None = None) -> Iterator[ImportedSession]:
    """The sessions of a file or sink.

    Args:
        path: The file, the sink's directory or its manifest.
        job_id: The run's id for all of them; what each session's records say where None.

    Yields:
        The sessions that have events.

    Raises:
        RecordError: A record is not as its schema says; it names file and line.
        OSError: A file cannot be read.

    """
    for session in load_telemetry_sessions(path):
        if session.events:
            yield _imported(path, session, job_id)


class Follower:
    """A sink that is still being written, as journals that grow with it: call `poll` again and again.

    Args:
        path: The sink.
        directory: Where the journals go.
        boot_id: Of this host: the journals count as live while this process holds their locks.

    """

    def __init__(self, path: Path, directory: Path, *, boot_id: str) -> None:
        self._path, self._directory, self._boot_id = path, directory, boot_id
        self._open: dict[str, tuple[SessionImport, _Translation]] = {}
        self._finished: set[str] = set()

    def poll(self) -> None:
        """Import what has been added.

        Raises:
            RecordError: The sink is not as stormlog writes it.
            OSError: The sink cannot be read, or a journal not written.

        """
        for session in load_telemetry_sessions(self._path):
            if session.events and session.summary.session_id not in self._finished:
                self._import(session)

    def _import(self, session: LoadedTelemetrySession) -> None:
        session_id = session.summary.session_id
        if session_id not in self._open:
            imported = replace(_imported(self._path, session, None), boot_id=self._boot_id)
            journal = SessionImport(self._directory, imported)
            self._open[session_id] = journal, _Translation(journal.run)
        journal, translation = self._open[session_id]
        if not journal.complete:
            journal.write(translation.lines(session))
            if session.summary.status == "running":
                return
            journal.close(_status(session), _ended(session))
        self._finished.add(session_id)
        del self._open[session_id]


def _imported(path: Path, session: LoadedTelemetrySession, job_id: str | None) -> ImportedSession:
    """One session, to be written from its beginning."""
    summary = session.summary
    return ImportedSession(
        system="stormlog",
        source=path,
        job_id=job_id or summary.job_id or f"stormlog-{summary.session_id}",
        name=summary.job_id or summary.session_id,
        started=min(summary.started_at_ns, session.events[0].timestamp_ns),
        ended=_ended(session),
        lines=lambda run: _Translation(run).lines(session),
        key=summary.session_id,
        tags=("stormlog",),
        rank=summary.rank,
        local_rank=summary.local_rank,
        world_size=summary.world_size,
        host=summary.host,
        pid=summary.pid,
        status=_status(session),
        resource={"stormlog.session_id": summary.session_id},
    )


def _status(session: LoadedTelemetrySession) -> str:
    return "completed" if session.summary.status == "completed" else "interrupted"


def _ended(session: LoadedTelemetrySession) -> int | None:
    """When its run ended, Unix ns; None where it has not said so."""
    if session.summary.status != "completed":
        return None
    return max(session.summary.ended_at_ns or 0, session.events[-1].timestamp_ns)


class _Translation:
    """A session's events as lines of a journal, each time from where it stopped before."""

    def __init__(self, run: BeginLine) -> None:
        self._run = run
        self._done = 0
        self._phases: list[tuple[str, BeginLine]] = []
        """The open phases, the innermost last."""

    def lines(self, session: LoadedTelemetrySession) -> Iterator[Line]:
        """The lines of the events that a session has gained."""
        while self._done < len(session.events):
            self._done += 1
            yield from self._lines_of(session.events[self._done - 1])

    def _lines_of(self, record: TelemetryEventLike) -> Iterator[Line]:
        ts, kind = record.timestamp_ns, record.event_type.strip().lower()
        counters = {name: getattr(record, field) for name, field in MEMORY.items()}
        known = {name: value for name, value in counters.items() if value is not None}
        yield ts, event("memory", device_id=record.device_id, counters=known), None
        parent = (self._phases[-1][1] if self._phases else self._run).seq
        if kind == "phase_enter":
            begin, name = BeginLine(), _phase(record)
            yield ts, event("span_begin", parent=parent, name=name, attributes=json_value(record.metadata)), begin
            self._phases.append((name, begin))
        elif kind == "phase_exit":
            name = _phase(record)
            index = next((i for i in reversed(range(len(self._phases))) if self._phases[i][0] == name), None)
            if index is not None:
                yield ts, event("span_end", begin=0), self._phases.pop(index)[1]
        elif kind not in WITHOUT_EVENT:
            attributes = {**json_value(record.metadata), "collector": record.collector, "device_id": record.device_id}
            if record.context:
                attributes["message"] = record.context
            severity = SEVERITIES.get(kind, "info")
            name = f"stormlog.{kind}"
            yield ts, event("event", parent=parent, name=name, severity=severity, attributes=attributes), None


def _phase(record: TelemetryEventLike) -> str:
    """The name of the phase that an event enters or leaves."""
    context = record.context if record.context and record.context.strip() else "phase"
    return phase_name(record.metadata.get("phase_scope")) or context
