"""The event types: a record of one version of the schema each, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from stepspan.compat.stormlog.fields import VERSIONS, RecordError, shown
from stepspan.compat.stormlog.validate import LAYOUTS, Values, validate_telemetry_record


@dataclass
class TelemetryEventV2:
    """An event of schema 2, which had no session. Raises `RecordError` on values that the schema refuses."""

    schema_version: Literal[2]
    timestamp_ns: int
    event_type: str
    collector: str
    sampling_interval_ms: int
    pid: int
    host: str
    device_id: int
    allocator_allocated_bytes: int
    allocator_reserved_bytes: int
    allocator_active_bytes: int | None
    allocator_inactive_bytes: int | None
    allocator_change_bytes: int
    device_used_bytes: int
    device_free_bytes: int | None
    device_total_bytes: int | None
    context: str | None
    job_id: str | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_telemetry_record(vars(self))


@dataclass
class TelemetryEventV3:
    """An event of schema 3: what is written. Raises `RecordError` on values that the schema refuses.

    Times are Unix nanoseconds, counters bytes; pid -1 is unknown, device_id -1 is no device.
    """

    schema_version: Literal[3]
    session_id: str
    timestamp_ns: int
    event_type: str
    collector: str
    sampling_interval_ms: int
    pid: int
    host: str
    device_id: int
    allocator_allocated_bytes: int
    allocator_reserved_bytes: int
    allocator_active_bytes: int | None
    allocator_inactive_bytes: int | None
    allocator_change_bytes: int
    device_used_bytes: int
    device_free_bytes: int | None
    device_total_bytes: int | None
    context: str | None
    job_id: str | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_telemetry_record(vars(self))


@dataclass
class TelemetryEventV4:
    """An event of schema 4, in which every counter may be null, as `metadata["memory_capabilities"]` explains.

    Raises `RecordError` on values that the schema refuses.
    """

    schema_version: Literal[4]
    session_id: str
    timestamp_ns: int
    event_type: str
    collector: str
    sampling_interval_ms: int
    pid: int
    host: str
    device_id: int
    allocator_allocated_bytes: int | None
    allocator_reserved_bytes: int | None
    allocator_active_bytes: int | None
    allocator_inactive_bytes: int | None
    allocator_change_bytes: int | None
    device_used_bytes: int | None
    device_free_bytes: int | None
    device_total_bytes: int | None
    context: str | None
    job_id: str | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_telemetry_record(vars(self))


TelemetryEvent = TelemetryEventV3
TelemetryEventLike = TelemetryEventV3 | TelemetryEventV4
"""What records are converted to: V4 stays V4, because V3 has no place for its nulls; all else becomes V3."""

_TYPES: dict[int, type[Any]] = {2: TelemetryEventV2, 3: TelemetryEventV3, 4: TelemetryEventV4}
_LAYOUTS = {_TYPES[version]: LAYOUTS[version] for version in VERSIONS}


def event_of(version: int, values: Values) -> TelemetryEventLike:
    """The event of values, in the order of their layout, that have been checked: they are not checked again."""
    event: TelemetryEventLike = object.__new__(_TYPES[version])
    fields = dict(zip(LAYOUTS[version].names, values, strict=True))
    fields["metadata"] = fields["metadata"].copy()
    event.__dict__ = fields
    return event


def telemetry_event_to_dict(event: TelemetryEventLike | TelemetryEventV2) -> dict[str, Any]:
    """The record of an event, in the schema's order. Its metadata is a copy, one level deep."""
    layout = _LAYOUTS.get(type(event)) or next((_LAYOUTS[kind] for kind in _LAYOUTS if isinstance(event, kind)), None)
    if layout is None:
        raise RecordError(f"event must be a TelemetryEvent, not {shown(event)}")
    record = dict(zip(layout.names, layout.pick(vars(event)), strict=True))
    record["metadata"] = dict(record["metadata"])
    return record
