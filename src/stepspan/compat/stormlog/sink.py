"""A sink: a directory that a tracker appends to.

    manifest.json            format `stormlog.append_only_telemetry_sink`, sessions and their status, segments
    segment-000001.jsonl     records, one a line

A manifest may be old, torn or gone, and then its segments are still there: what it does not list is found by name, and
what is wrong with it is a warning. A file that it names outside its directory is never read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepspan.compat.stormlog.schema import require_int, require_text
from stepspan.errors import RecordError, short_repr

MANIFEST = "manifest.json"
SEGMENTS = "segment-*.jsonl"
FIRST_SCHEMA_WITH_SESSIONS = 2
INTEGERS = {"pid": -1, "rank": 0, "local_rank": 0, "world_size": 1}
"""Fields that a session in a manifest may lack, and what they are then."""
STATUSES = ("completed", "interrupted", "incomplete", "running")
"""Of sessions, in the order in which they are preferred."""


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
class Manifest:
    """What a manifest says, as far as it could be understood."""

    sessions: dict[str, SessionSummary] = field(default_factory=dict)
    segments: dict[str, str | None] = field(default_factory=dict)
    """File name -> the session of its records."""
    warnings: list[str] = field(default_factory=list)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a sink, or an empty one. Never raises: what is wrong is in its `warnings`."""
    path = directory / MANIFEST
    manifest = Manifest()
    try:
        content = _require_object(json.loads(path.read_bytes().decode()))
        version = require_int("schema_version", content.get("schema_version"))
    except FileNotFoundError:
        return manifest
    except (OSError, ValueError, RecursionError) as error:
        manifest.warnings.append(f"{path}: ignored: {error}")
        return manifest
    kinds = {"segments": _add_segment, "sessions": _add_session}
    for kind in kinds if version >= FIRST_SCHEMA_WITH_SESSIONS else ("segments",):
        entries = content.get(kind)
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            try:
                kinds[kind](manifest, _require_object(entry))
            except RecordError as error:
                manifest.warnings.append(f"{path}: {kind}[{number}] ignored: {error}")
    return manifest


def segments_of(directory: Path, manifest: Manifest) -> list[Path]:
    """The segments that exist, listed or not, in the order of their names."""
    listed = (directory / name for name in manifest.segments)
    found = {path for path in (*listed, *directory.glob(SEGMENTS)) if os.path.isfile(path)}  # Path.is_file may raise
    return sorted(found, key=lambda path: path.name)


def _require_object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise RecordError(f"must be an object, not {short_repr(value)}")


def _add_session(manifest: Manifest, entry: dict[str, Any]) -> None:
    status = require_text("status", entry.get("status")).strip().lower()
    if status not in STATUSES:
        known = ", ".join(STATUSES)
        raise RecordError(f"status must be one of {known}, not {short_repr(entry['status'])}", "status")
    ended, job_id = entry.get("ended_at_ns"), entry.get("job_id")
    summary = SessionSummary(
        session_id=require_text("session_id", entry.get("session_id")),
        status=status,
        started_at_ns=require_int("started_at_ns", entry.get("started_at_ns")),
        ended_at_ns=None if ended is None else require_int("ended_at_ns", ended),
        host=require_text("host", entry.get("host")),
        job_id=None if job_id is None else require_text("job_id", job_id),
        source=require_text("source", entry.get("source", "stormlog.telemetry_sink")),
        **{name: require_int(name, entry.get(name, default)) for name, default in INTEGERS.items()},
    )
    manifest.sessions[summary.session_id] = summary


def _add_segment(manifest: Manifest, entry: dict[str, Any]) -> None:
    name = require_text("filename", entry.get("filename"))
    if name != Path(name).name:
        raise RecordError(f"filename must be a name in the sink's directory, not {short_repr(name)}", "filename")
    session = entry.get("session_id")
    manifest.segments[name] = session if isinstance(session, str) and session.strip() else None
