"""Records of any version of the schema become events of the versions 3 and 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepspan.compat.stormlog.events import TelemetryEventLike, event_of
from stepspan.compat.stormlog.fields import IDENTITY, SCHEMA_VERSION_V2, SCHEMA_VERSION_V3
from stepspan.compat.stormlog.identity import resolve_distributed_identity
from stepspan.compat.stormlog.legacy import check_legacy, record_of_legacy, session_of
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
        session = session_of(record, record["metadata"], default_session_id)
        return event_of(SCHEMA_VERSION_V3, (SCHEMA_VERSION_V3, session, *values[1:]))
    if not isinstance(record, Mapping):
        raise RecordError(f"record must be a mapping, not {short_repr(record)}")
    if "schema_version" in record:
        return _upgraded(record, default_session_id)
    if not permissive_legacy:
        raise RecordError("Legacy record conversion is disabled (permissive_legacy=False)", "schema_version")
    converted = record_of_legacy(record, default_session_id, default_collector, default_sampling_interval_ms)
    return _checked(converted, check_legacy)


def _upgraded(record: Mapping[str, Any], default_session_id: str | None) -> TelemetryEventLike:
    version = layout_of(record).version
    if "metadata" in record and not isinstance(record["metadata"], dict):
        raise RecordError(f"metadata must be an object, not {short_repr(record['metadata'])}", "metadata")
    identity = resolve_distributed_identity(**{name: record.get(name) for name in IDENTITY})
    session = session_of(record, record.get("metadata", {}), default_session_id)
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
