"""Records become events."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from stepspan.compat.stormlog.events import TelemetryEventLike, event_of
from stepspan.compat.stormlog.fields import IDENTITY, SCHEMA_VERSION_V2, SCHEMA_VERSION_V3, require_text
from stepspan.compat.stormlog.identity import resolve_distributed_identity
from stepspan.compat.stormlog.legacy import (
    UNKNOWN_HOST,
    UNKNOWN_PID,
    check_legacy,
    metadata_of_legacy,
    record_of_legacy,
)
from stepspan.compat.stormlog.validate import LAYOUTS, accepted, layout_of
from stepspan.errors import RecordError, short_repr


def telemetry_event_from_record(
    record: Mapping[str, Any],
    permissive_legacy: bool = True,
    default_collector: str = "legacy.unknown",
    default_sampling_interval_ms: int = 0,
    default_session_id: str | None = None,
) -> TelemetryEventLike:
    """The event of a record, as stormlog's function of that name gives it; records of schema 4 are taken, too.

    Args:
        record: A record of schema 2, 3 or 4, or a legacy one, which has no `schema_version`.
        permissive_legacy: Whether legacy records are converted, not refused.
        default_collector: The collector of a legacy record that names none.
        default_sampling_interval_ms: The sampling interval of a legacy record that names none.
        default_session_id: The session of a record that names none; `legacy-` and a hash of its time, host and pid
            where None.

    Returns:
        A V4 event for a record of schema 4, a V3 event for all others. Its metadata is a copy, one level deep.

    Raises:
        RecordError: The record is not as its schema says: the first fault in stormlog's order, with the `fields`.

    """
    known = accepted(record) if type(record) is dict else None
    if known is not None:
        layout, values = known
        if layout.version != SCHEMA_VERSION_V2:
            return event_of(layout.version, values)
        session = _session(record, record["metadata"], default_session_id)
        return event_of(SCHEMA_VERSION_V3, (SCHEMA_VERSION_V3, session, *values[1:]))
    if not isinstance(record, Mapping):
        raise RecordError(f"record must be a mapping, not {short_repr(record)}")
    if "schema_version" in record:
        return _upgraded(record, default_session_id)
    if not permissive_legacy:
        raise RecordError("Legacy record conversion is disabled (permissive_legacy=False)", "schema_version")
    metadata = metadata_of_legacy(record)
    session = _session(record, metadata, default_session_id)
    converted = record_of_legacy(record, metadata, session, default_collector, default_sampling_interval_ms)
    return _checked(converted, check_legacy)


def legacy_session_id(*seed: object) -> str:
    """The session of records that name none, the same for the same seed."""
    name = "::".join(str(part) for part in seed if part is not None)
    # A lone surrogate, which JSON allows, has no UTF-8; all else comes back as it was.
    name = name.encode("utf-8", "backslashreplace").decode()
    return f"legacy-{uuid.uuid5(uuid.NAMESPACE_URL, name)}"


def _session(record: Mapping[str, Any], metadata: Mapping[str, Any], default: str | None) -> str:
    """The session that a record or its metadata names, else the default, else one made from the record."""
    name = record.get("session_id")
    if name is None:
        name = metadata.get("session_id")
    if isinstance(name, str) and name.strip():
        return name
    if default is not None:
        return require_text("session_id", default)
    time = record.get("timestamp_ns", record.get("timestamp"))
    return legacy_session_id(time, record.get("host", UNKNOWN_HOST), record.get("pid", UNKNOWN_PID))


def _upgraded(record: Mapping[str, Any], default_session_id: str | None) -> TelemetryEventLike:
    version = layout_of(record).version
    if "metadata" in record and not isinstance(record["metadata"], dict):
        raise RecordError(f"metadata must be an object, not {short_repr(record['metadata'])}", "metadata")
    identity = resolve_distributed_identity(**{name: record.get(name) for name in IDENTITY})
    session = _session(record, record.get("metadata", {}), default_session_id)
    version = max(version, SCHEMA_VERSION_V3)
    return _checked({**identity, **record, "schema_version": version, "session_id": session})


def _checked(
    record: dict[str, Any], check_first: Callable[[dict[str, Any]], None] = lambda _: None
) -> TelemetryEventLike:
    known = accepted(record)
    if known is not None:
        return event_of(known[0].version, known[1])
    check_first(record)
    layout = LAYOUTS[record["schema_version"]]
    return event_of(layout.version, layout.check(record))
