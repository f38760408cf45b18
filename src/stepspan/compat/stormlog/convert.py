"""Records of any version of the schema, and those from before it had versions, become events of the versions 3 and 4.

With legacy records it is permissive, as stormlog is: a field goes by several names, what is missing has a default,
unknown keys are dropped. What is there must be of the right type all the same.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any

from stepspan.compat.rows import NS_PER_S
from stepspan.compat.stormlog.events import TelemetryEventLike, event_of
from stepspan.compat.stormlog.identity import resolve_distributed_identity
from stepspan.compat.stormlog.schema import (
    FIELDS,
    IDENTITY,
    LAYOUTS,
    SCHEMA_VERSION_V2,
    SCHEMA_VERSION_V3,
    accepted,
    layout_of,
    require_int,
    require_text,
)
from stepspan.errors import RecordError, short_repr

BYTES_PER_MIB = 1024 * 1024
NO_DEVICE = -1
UNKNOWN_PID = -1
UNKNOWN_HOST = "unknown"
TOTALS = ("total_memory", "device_total", "total_bytes")
BACKENDS = ("cuda", "rocm", "mps", "cpu")
METADATA_PREFIX = "metadata_"
_CHECKED_FIRST = (
    *(field for field in FIELDS if field.kind is int and field.name not in IDENTITY),
    *(field for field in FIELDS if field.name in ("event_type", "host")),
)
_FIELDS_IN_METADATA = (*IDENTITY, "session_id")
_DEVICE_NUMBER = re.compile(r".*:(\d{1,9})", re.DOTALL)


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
    return _checked(converted, legacy=True)


def _upgraded(record: Mapping[str, Any], default_session_id: str | None) -> TelemetryEventLike:
    version = layout_of(record).version
    if "metadata" in record and not isinstance(record["metadata"], dict):
        raise RecordError(f"metadata must be an object, not {short_repr(record['metadata'])}", "metadata")
    identity = resolve_distributed_identity(**{name: record.get(name) for name in IDENTITY})
    session = session_of(record, record.get("metadata", {}), default_session_id)
    version = max(version, SCHEMA_VERSION_V3)
    return _checked({**identity, **record, "schema_version": version, "session_id": session})


def _checked(record: dict[str, Any], *, legacy: bool = False) -> TelemetryEventLike:
    known = accepted(record)
    if known is not None:
        return event_of(known[0].version, known[1])
    if legacy:
        _check_first(record)
    layout = LAYOUTS[record["schema_version"]]
    return event_of(layout.version, layout.check(record))


def legacy_session_id(*seed: object) -> str:
    """The session of records that name none, the same for the same seed."""
    name = "::".join(str(part) for part in seed if part is not None)
    # A lone surrogate, which JSON allows, has no UTF-8; all else comes back as it was.
    name = name.encode("utf-8", "backslashreplace").decode()
    return f"legacy-{uuid.uuid5(uuid.NAMESPACE_URL, name)}"


def session_of(record: Mapping[str, Any], metadata: Mapping[str, Any], default: str | None) -> str:
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


def record_of_legacy(
    record: Mapping[str, Any], session_id: str | None, collector: str, sampling_interval_ms: int
) -> dict[str, Any]:
    """A record of schema 3, yet to be checked; the last three arguments are for a legacy record that does not say.

    Raises `RecordError` for a time that is not one, a counter that is not an integer, metadata that is not an object,
    and a rank outside its world.
    """
    metadata = _metadata(record)
    session_id = session_of(record, metadata, session_id)
    time = _timestamp_ns(record)
    device_id = _device_id(record)
    used_by_default = require_int("device_used_bytes", record.get("device_used_bytes", 0))
    measured = _scaled("memory_mb", record.get("memory_mb"), BYTES_PER_MIB)
    allocated_by_default = used_by_default if measured is None else measured
    allocated = _counter(record, "allocator_allocated_bytes", "memory_allocated", allocated_by_default)
    used = record.get("device_used_bytes", allocated)
    total = _total(record, metadata)
    converted = {
        "schema_version": SCHEMA_VERSION_V3,
        "session_id": session_id,
        "timestamp_ns": time,
        "event_type": record.get("event_type", record.get("type", "sample")),
        "collector": _collector(record, _backend(record, metadata), device_id, collector),
        "sampling_interval_ms": record.get("sampling_interval_ms", sampling_interval_ms),
        "pid": record.get("pid", metadata.get("pid", UNKNOWN_PID)),
        "host": record.get("host", metadata.get("host", UNKNOWN_HOST)),
        "device_id": device_id,
        "allocator_allocated_bytes": allocated,
        "allocator_reserved_bytes": _counter(record, "allocator_reserved_bytes", "memory_reserved", allocated),
        "allocator_active_bytes": record.get("allocator_active_bytes"),
        "allocator_inactive_bytes": record.get("allocator_inactive_bytes"),
        "allocator_change_bytes": _counter(record, "allocator_change_bytes", "memory_change", 0),
        "device_used_bytes": used,
        "device_free_bytes": record.get("device_free_bytes", None if total is None else max(total - used, 0)),
        "device_total_bytes": total,
        "context": record.get("context", record.get("message")),
    }
    identity = IDENTITY
    if not (identity.keys().isdisjoint(record) and identity.keys().isdisjoint(metadata)):
        _check_first(converted)
        identity = resolve_distributed_identity(**{name: record.get(name) for name in IDENTITY}, metadata=metadata)
    for name in _FIELDS_IN_METADATA:
        metadata.pop(name, None)
    return {**converted, **identity, "metadata": metadata}


def _check_first(converted: Mapping[str, Any]) -> None:
    """Raise `RecordError` for what stormlog finds first in a legacy record: wrong types, before identities."""
    for field in _CHECKED_FIRST:
        field.check_type(converted[field.name], SCHEMA_VERSION_V3)


def _metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a record's metadata, with what is in `metadata_*` keys."""
    metadata = record.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise RecordError(f"metadata must be an object when provided, not {short_repr(metadata)}", "metadata")
    found = dict(metadata or {})
    for key, value in record.items():
        if isinstance(key, str) and key.startswith(METADATA_PREFIX):
            found[key[len(METADATA_PREFIX) :]] = value
    return found


def _counter(record: Mapping[str, Any], name: str, old_name: str, default: int) -> int:
    if name not in record:
        name = old_name
    return require_int(name, record[name]) if name in record else default


def _scaled(name: str, value: object, scale: float) -> int | None:
    """A number times `scale`, as an integer; None for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return int(float(value) * scale)
    except (OverflowError, ValueError):
        raise RecordError(f"{name} must be a finite number, not {short_repr(value)}", name) from None


def _timestamp_ns(record: Mapping[str, Any]) -> int:
    if "timestamp_ns" in record:
        return require_int("timestamp_ns", record["timestamp_ns"])
    seconds = record.get("timestamp")
    time = _scaled("timestamp", seconds, NS_PER_S)
    if time is None:
        problem = "Legacy record is missing a valid timestamp: give `timestamp` in seconds or `timestamp_ns`"
        raise RecordError(f"{problem}, not timestamp={short_repr(seconds)}", "timestamp")
    return time


def _device_id(record: Mapping[str, Any]) -> int:
    """The number at the end of a device's name, such as `/GPU:1`; a CPU is no device, whatever its number."""
    if "device_id" in record:
        return require_int("device_id", record["device_id"])
    device = record.get("device")
    if isinstance(device, str):
        if "cpu" in device.lower():
            return NO_DEVICE
        number = _DEVICE_NUMBER.fullmatch(device)
        if number:
            return int(number[1])
    return 0 if "memory_mb" in record else NO_DEVICE  # TensorFlow's tracker names none where there is only one


def _backend(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    for backend in (record.get("backend"), metadata.get("backend")):
        if isinstance(backend, str) and backend.strip():
            name = backend.strip().lower()
            return name if name in BACKENDS else ""
    return ""


def _collector(record: Mapping[str, Any], backend: str, device_id: int, default: str) -> Any:
    own = record.get("collector")
    if isinstance(own, str) and own.strip():
        return own
    if backend:
        return f"stormlog.{backend}_tracker"
    if "memory_mb" in record:
        return "stormlog.tensorflow.memory_tracker"
    if "memory_allocated" in record:
        return "stormlog.cpu_tracker" if device_id == NO_DEVICE else "stormlog.cuda_tracker"
    return default


def _total(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> int | None:
    """The device's memory; a null that is given stays null."""
    for source, names in ((record, ("device_total_bytes", *TOTALS)), (metadata, TOTALS)):
        for name in names:
            if name in source:
                return None if source[name] is None else require_int(name, source[name])
    return None
