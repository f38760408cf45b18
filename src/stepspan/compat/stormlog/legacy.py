"""Records from before the schema had versions, turned into records of schema 3.

Permissive, as stormlog is: a field goes by several names, what is not there has a default, unknown keys are dropped.
What is there must be of the right type all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stepspan.compat.stormlog.fields import FIELDS, IDENTITY, SCHEMA_VERSION_LATEST, require_int
from stepspan.compat.stormlog.identity import resolve_distributed_identity
from stepspan.errors import RecordError, short_repr

BYTES_PER_MIB = 1024 * 1024
NO_DEVICE = -1
UNKNOWN_PID = -1
UNKNOWN_HOST = "unknown"
TOTALS = ("total_memory", "device_total", "total_bytes")
BACKENDS = ("cuda", "rocm", "mps", "cpu")
_CHECKED_FIRST = (
    *(field for field in FIELDS if field.kind is int and field.name not in IDENTITY),
    *(field for field in FIELDS if field.name in ("event_type", "host")),
)
_FIELDS_IN_METADATA = (*IDENTITY, "session_id")
"""They become fields of their own."""
_DEVICE_NUMBER = re.compile(r".*:(\d{1,9})", re.DOTALL)


def record_of_legacy(
    record: Mapping[str, Any], metadata: dict[str, Any], session_id: str, collector: str, sampling_interval_ms: int
) -> dict[str, Any]:
    """A record of schema 3, yet to be checked; the last two arguments are for a legacy record that does not say.

    Takes out of its `metadata` what becomes a field. Raises `RecordError` for a time that is none, a counter that is no
    integer, and a rank outside its world.
    """
    time = _timestamp_ns(record)
    device_id = _device_id(record)
    backend = _backend(record, metadata)
    used_by_default = require_int("device_used_bytes", record.get("device_used_bytes", 0))
    allocated = _counter(
        record, ("allocator_allocated_bytes", "memory_allocated"), _used_bytes(record, used_by_default)
    )
    used = record.get("device_used_bytes", allocated)
    total = _total(record, metadata)
    converted = {
        "schema_version": SCHEMA_VERSION_LATEST,
        "session_id": session_id,
        "timestamp_ns": time,
        "event_type": _first(record, ("event_type", "type"), "sample"),
        "collector": _collector(record, backend, device_id, collector),
        "sampling_interval_ms": record.get("sampling_interval_ms", sampling_interval_ms),
        "pid": record.get("pid", metadata.get("pid", UNKNOWN_PID)),
        "host": record.get("host", metadata.get("host", UNKNOWN_HOST)),
        "device_id": device_id,
        "allocator_allocated_bytes": allocated,
        "allocator_reserved_bytes": _counter(record, ("allocator_reserved_bytes", "memory_reserved"), allocated),
        "allocator_active_bytes": record.get("allocator_active_bytes"),
        "allocator_inactive_bytes": record.get("allocator_inactive_bytes"),
        "allocator_change_bytes": _counter(record, ("allocator_change_bytes", "memory_change"), 0),
        "device_used_bytes": used,
        "device_free_bytes": record.get("device_free_bytes", None if total is None else max(total - used, 0)),
        "device_total_bytes": total,
        "context": _first(record, ("context", "message"), None),
    }
    identity = IDENTITY
    if not (identity.keys().isdisjoint(record) and identity.keys().isdisjoint(metadata)):
        try:
            identity = resolve_distributed_identity(**{name: record.get(name) for name in IDENTITY}, metadata=metadata)
        except RecordError:
            check_legacy(converted)
            raise
    for name in _FIELDS_IN_METADATA:
        metadata.pop(name, None)
    return {**converted, **identity, "metadata": metadata}


def check_legacy(converted: Mapping[str, Any]) -> None:
    """Raise `RecordError` for what stormlog finds first in a legacy record: wrong types, before identities."""
    for field in _CHECKED_FIRST:
        field.check_type(converted[field.name], SCHEMA_VERSION_LATEST)


def _first(record: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    for name in names:
        if name in record:
            return record[name]
    return default


def _counter(record: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    for name in names:
        if name in record:
            return require_int(name, record[name])
    return default


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scaled(name: str, value: float, scale: float) -> int:
    try:
        return int(float(value) * scale)
    except (OverflowError, ValueError):
        raise RecordError(f"{name} must be a finite number, not {short_repr(value)}", name) from None


def metadata_of_legacy(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a record's metadata, with what stands in `metadata_*` keys. Raises `RecordError` if it is no object."""
    metadata = record.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise RecordError(f"metadata must be an object when provided, not {short_repr(metadata)}", "metadata")
    prefix = "metadata_"
    flat = {
        key[len(prefix) :]: value for key, value in record.items() if isinstance(key, str) and key.startswith(prefix)
    }
    return {**(metadata or {}), **flat}


def _timestamp_ns(record: Mapping[str, Any]) -> int:
    if "timestamp_ns" in record:
        return require_int("timestamp_ns", record["timestamp_ns"])
    seconds = record.get("timestamp")
    if not _is_number(seconds):
        raise RecordError(
            f"Legacy record is missing a valid timestamp: give `timestamp` in seconds or `timestamp_ns`,"
            f" not timestamp={short_repr(seconds)}",
            "timestamp",
        )
    return _scaled("timestamp", seconds, 1e9)  # type: ignore[arg-type]  # a number it is


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


def _used_bytes(record: Mapping[str, Any], default: int) -> int:
    size = record.get("memory_mb")
    return _scaled("memory_mb", size, BYTES_PER_MIB) if _is_number(size) else default  # type: ignore[arg-type]


def _total(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> int | None:
    """The device's memory; a null that is given stays null."""
    sources = ((record, ("device_total_bytes", *TOTALS)), (metadata, TOTALS))
    for source, names in sources:
        for name in names:
            if name in source:
                return None if source[name] is None else require_int(name, source[name])
    return None
