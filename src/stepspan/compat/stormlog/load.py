"""Files become sessions: `.jsonl` and sink directories line by line, anything else as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepspan.compat.rows import parse_row
from stepspan.compat.stormlog.convert import legacy_session_id, telemetry_event_from_record
from stepspan.compat.stormlog.events import TelemetryEventLike
from stepspan.compat.stormlog.projection import ProjectedTelemetryRecord, project_telemetry_events
from stepspan.compat.stormlog.schema import IDENTITY
from stepspan.compat.stormlog.sink import MANIFEST, STATUSES, Manifest, SessionSummary, read_manifest, segments_of
from stepspan.errors import RecordError, short_repr

EVENTS = ("events", "telemetry_events")
"""Where a JSON document keeps its events."""
RECORD_FIELDS = ("schema_version", "timestamp", "timestamp_ns", "event_type", "type", "memory_mb")
"""A JSON document with one of these is an event itself."""

Found = tuple[TelemetryEventLike, str]  # an event and the file it is from
Positioned = Iterable[tuple[str, dict[str, Any]]]  # where a record is, for errors, and the record


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


def load_telemetry_sessions(
    path: str | Path,
    permissive_legacy: bool = True,
    events_key: str | None = None,
) -> list[LoadedTelemetrySession]:
    """The sessions in a file or sink directory, as stormlog's function of that name gives them.

    Args:
        path: A `.jsonl` file, a sink directory or its manifest, or any other file, which is one JSON document. The last
            line of a `.jsonl` file is left out if it is torn and has no newline: its writer may be about to finish it.
        permissive_legacy: Whether records without `schema_version` are converted, not refused.
        events_key: The name of the list of events in a JSON document; the usual names are tried where None.

    Returns:
        The sessions by status, then the newest end, the newest start, and the id.

    Raises:
        RecordError: A record, or the file, is not as its schema says; it names file and line.
        UnicodeDecodeError: The file is not UTF-8.
        OSError: The file cannot be read.

    """
    path = Path(path)
    manifest, segments = _sink(path)
    if segments:
        default_id = legacy_session_id(path.resolve(), "sink")
        files = [(each, manifest.segments.get(each.name) or default_id, _records_of_lines(each)) for each in segments]
    elif path.is_dir() or manifest.sessions or manifest.segments:
        raise RecordError(f"Telemetry sink {path} retained no segments (it should have segment-*.jsonl files)")
    else:
        manifest = Manifest()
        default_id = legacy_session_id(path.resolve(), events_key or "json")
        files = [(path, default_id, _records_of_document(path, events_key))]

    found: dict[str, list[Found]] = {session_id: [] for session_id in manifest.sessions}
    for file, default_id, records in files:
        for where, record in records:
            try:
                event = telemetry_event_from_record(record, permissive_legacy, default_session_id=default_id)
            except RecordError as error:
                raise error.at(where) from None
            found.setdefault(event.session_id, []).append((event, str(file)))
    return sorted((_session(path, manifest, *each) for each in found.items()), key=_preference)


def load_telemetry_events(
    path: str | Path,
    permissive_legacy: bool = True,
    events_key: str | None = None,
    session_id: str | None = None,
) -> list[TelemetryEventLike]:
    """The events of one session, by time, as stormlog's function of that name gives them.

    Args:
        path: As in `load_telemetry_sessions`.
        permissive_legacy: As in `load_telemetry_sessions`.
        events_key: As in `load_telemetry_sessions`.
        session_id: The session; None is the first of `load_telemetry_sessions` that has events.

    Returns:
        Its events; an empty list for a file without any.

    Raises:
        RecordError: There is no such session; and as `load_telemetry_sessions`.
        UnicodeDecodeError: As `load_telemetry_sessions`.
        OSError: As `load_telemetry_sessions`.

    """
    sessions = load_telemetry_sessions(path, permissive_legacy, events_key)
    if session_id is None or not sessions:
        return next((session.events for session in sessions if session.events), [])
    for session in sessions:
        if session.summary.session_id == session_id:
            return session.events
    known = ", ".join(session.summary.session_id for session in sessions)
    raise RecordError(f"Requested session_id not found: {short_repr(session_id)} (there are: {known})", "session_id")


def _sink(path: Path) -> tuple[Manifest, list[Path]]:
    """The segments to read, with the manifest next to them; no segments where `path` is a JSON document."""
    directory = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == MANIFEST:
        manifest = read_manifest(directory)
        return manifest, segments_of(directory, manifest)
    if path.suffix == ".jsonl":
        return read_manifest(directory), [path]
    return Manifest(), []


def _session(path: Path, manifest: Manifest, session_id: str, found: list[Found]) -> LoadedTelemetrySession:
    found = sorted(found, key=lambda each: each[0].timestamp_ns)
    events = [event for event, _ in found]
    return LoadedTelemetrySession(
        summary=manifest.sessions.get(session_id) or _summary(session_id, events, f"artifact:{path.name}"),
        events=events,
        sources_loaded=sorted({source for _, source in found}) or [str(path)],
        warnings=list(manifest.warnings),
    )


def _summary(session_id: str, events: list[TelemetryEventLike], source: str) -> SessionSummary:
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


def _preference(session: LoadedTelemetrySession) -> tuple[int, int, int, str]:
    """What sessions are sorted by: status, then the newest end, the newest start, and the id."""
    summary = session.summary
    end = summary.started_at_ns if summary.ended_at_ns is None else summary.ended_at_ns
    return STATUSES.index(summary.status), -end, -summary.started_at_ns, summary.session_id


def _records_of_lines(path: Path) -> Positioned:
    """The records of a file. As in stormlog, a line also ends at a raw U+2028, which JSON need not escape."""
    content = _read_text(path)
    lines = content.splitlines()
    ended = content.endswith(("\n", "\r"))
    for number, line in enumerate(lines, 1):
        where = f"{path} at line {number}"
        may_be_torn = number == len(lines) and not ended
        record = parse_row(line, f"Malformed telemetry JSONL record in {where}", may_be_torn=may_be_torn)
        if record is not None:
            yield where, record


def _records_of_document(path: Path, events_key: str | None) -> Positioned:
    content = _read_text(path)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON: {error}") from None
    try:
        records = _event_list(document, events_key)
        for number, record in enumerate(records):
            if not isinstance(record, dict):
                raise RecordError(f"Event at index {number} must be an object, not {short_repr(record)}")
            yield f"{path} at index {number}", record
    except RecordError as error:
        raise error.at(str(path)) from None


def _event_list(document: Any, events_key: str | None) -> list[Any]:
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise RecordError(f"Telemetry payload must be a JSON object or array, not {short_repr(document)}")
    for name in EVENTS if events_key is None else (events_key,):
        events = document.get(name)
        if isinstance(events, list):
            return events
    if events_key is not None:
        raise RecordError(f"Top-level key {short_repr(events_key)} must contain a list of events")
    if any(name in document for name in RECORD_FIELDS):
        return [document]
    raise RecordError("JSON payload does not contain telemetry events (name their list by events_key)")


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = f"{error.reason}, in {path} at line {line}"
        raise UnicodeDecodeError(error.encoding, error.object, error.start, error.end, reason) from None
