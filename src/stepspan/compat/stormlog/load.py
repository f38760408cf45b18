"""Files become sessions: `.jsonl` and sink directories line by line, anything else as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepspan.compat.stormlog.convert import legacy_session_id, telemetry_event_from_record
from stepspan.compat.stormlog.events import TelemetryEventLike
from stepspan.compat.stormlog.fields import RecordError, shown
from stepspan.compat.stormlog.sessions import LoadedTelemetrySession, chosen, in_order, summary_of
from stepspan.compat.stormlog.sink import MANIFEST, Manifest, read_manifest, segments_of

EVENTS = ("events", "telemetry_events")  # where a JSON document keeps its events
_RECORD = ("schema_version", "timestamp", "timestamp_ns", "event_type", "type", "memory_mb")  # a document that is one

Found = tuple[TelemetryEventLike, str]  # an event and the file it is from


def load_telemetry_sessions(
    path: str | Path,
    permissive_legacy: bool = True,
    events_key: str | None = None,
) -> list[LoadedTelemetrySession]:
    """The sessions in a file or sink directory: by status, then the newest end, the newest start, and the id.

    `events_key` names the list of events in a JSON document. The last line of a `.jsonl` file is left out if it is torn
    and has no newline: its writer may be about to finish it. Raises `RecordError` for anything else that is wrong,
    naming file and line; OSError for a file that cannot be read; UnicodeDecodeError for one that is not UTF-8.
    """
    path = Path(path)
    manifest, segments = _sink(path)
    if segments:
        found = list(_of_lines(path, segments, manifest, permissive_legacy))
    elif path.is_dir() or manifest.sessions or manifest.segments:
        raise RecordError(f"Telemetry sink {path} retained no segments (it should have segment-*.jsonl files)")
    else:
        manifest = Manifest()
        found = list(_of_document(path, permissive_legacy, events_key))

    events: dict[str, list[Found]] = {session_id: [] for session_id in manifest.sessions}
    for event, source in found:
        events.setdefault(event.session_id, []).append((event, source))
    return in_order(_session(path, manifest, *each) for each in events.items())


def load_telemetry_events(
    path: str | Path,
    permissive_legacy: bool = True,
    events_key: str | None = None,
    session_id: str | None = None,
) -> list[TelemetryEventLike]:
    """The events of one session, by time: `session_id`, or else the first with events in `load_telemetry_sessions`.

    Raises as that does, and `RecordError` for a session that is not there.
    """
    return chosen(load_telemetry_sessions(path, permissive_legacy, events_key), session_id)


def _sink(path: Path) -> tuple[Manifest, list[Path]]:
    """The segments to read, with the manifest beside them; none of `path` is a JSON document."""
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
    summary = manifest.sessions.get(session_id)
    return LoadedTelemetrySession(
        summary=summary or summary_of(session_id, events, f"artifact:{path.name}"),
        events=events,
        sources_loaded=sorted({source for _, source in found}) or [str(path)],
        warnings=list(manifest.warnings),
    )


def _of_lines(path: Path, segments: list[Path], manifest: Manifest, permissive: bool) -> Iterator[Found]:
    fallback = legacy_session_id(path.resolve(), "sink")
    for segment in segments:
        session_id = manifest.segments.get(segment.name) or fallback
        for number, record in _lines(segment):
            yield _event(record, permissive, session_id, f"{segment} at line {number}"), str(segment)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records. A line ends where Python says so: also at a raw U+2028, which JSON need not escape."""
    content = _text(path)
    lines = content.splitlines()
    ended = content.endswith(("\n", "\r"))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not ended and isinstance(error, json.JSONDecodeError):
                return
            raise RecordError(f"Malformed telemetry JSONL record in {path} at line {number}: {error}") from None
        if not isinstance(record, dict):
            raise RecordError(f"Telemetry record in {path} at line {number} must be an object, not {shown(record)}")
        yield number, record


def _of_document(path: Path, permissive: bool, events_key: str | None) -> Iterator[Found]:
    fallback = legacy_session_id(path.resolve(), events_key or "json")
    content = _text(path)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON: {error}") from None
    for number, record in enumerate(_events(path, document, events_key)):
        if not isinstance(record, dict):
            raise RecordError(f"Event at index {number} must be an object, not {shown(record)}", where=str(path))
        yield _event(record, permissive, fallback, f"{path} at index {number}"), str(path)


def _events(path: Path, document: Any, events_key: str | None) -> list[Any]:
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise RecordError(f"Telemetry payload must be a JSON object or array, not {shown(document)}", where=str(path))
    if events_key is not None:
        if isinstance(document.get(events_key), list):
            return document[events_key]  # type: ignore[no-any-return]  # the check says it
        raise RecordError(f"Top-level key {shown(events_key)} must contain a list of events", where=str(path))
    for name in EVENTS:
        if isinstance(document.get(name), list):
            return document[name]  # type: ignore[no-any-return]
    if any(name in document for name in _RECORD):
        return [document]
    raise RecordError("JSON payload does not contain telemetry events (name their list by events_key)", where=str(path))


def _event(record: dict[str, Any], permissive: bool, session_id: str, where: str) -> TelemetryEventLike:
    try:
        return telemetry_event_from_record(record, permissive, default_session_id=session_id)
    except RecordError as error:
        raise error.at(where) from None


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = f"{error.reason}, in {path} at line {line}"
        raise UnicodeDecodeError(error.encoding, error.object, error.start, error.end, reason) from None
