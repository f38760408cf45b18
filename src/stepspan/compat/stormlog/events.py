"""The event types: one per version of the schema, checked when they are made.

Their fields are stormlog's, in stormlog's order, so positional arguments, `repr`, `==` and `dataclasses.asdict` agree
with its own classes. The order comes from that of the base classes: version, then session, then the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from stepspan.compat.stormlog.schema import LAYOUTS, Values, validate_telemetry_record
from stepspan.errors import RecordError, short_repr


@dataclass
class _Version:
    schema_version: int


@dataclass
class _Session(_Version):
    session_id: str


@dataclass
class _Measurement:
    """The fields that all versions have. Times are Unix nanoseconds, counters bytes."""

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


@dataclass
class _Measured(_Measurement):
    """Before schema 4 these counters are never null."""

    allocator_allocated_bytes: int
    allocator_reserved_bytes: int
    allocator_change_bytes: int
    device_used_bytes: int


@dataclass
class TelemetryEventV2(_Measured, _Version):
    """An event of schema 2, which had no session.

    Raises:
        RecordError: A value is not as the schema says.

    """

    schema_version: Literal[2]


@dataclass
class TelemetryEventV3(_Measured, _Session):
    """An event of schema 3, which is the one that is written.

    Times are Unix nanoseconds, counters bytes; pid -1 is unknown, device_id -1 is no device.

    Raises:
        RecordError: A value is not as the schema says.

    """

    schema_version: Literal[3]


@dataclass
class TelemetryEventV4(_Measurement, _Session):
    """An event of schema 4, in which every counter may be null, as `metadata["memory_capabilities"]` explains.

    Raises:
        RecordError: A value is not as the schema says.

    """

    schema_version: Literal[4]


TelemetryEvent = TelemetryEventV3
TelemetryEventLike = TelemetryEventV3 | TelemetryEventV4
"""What records are converted to: V4 stays V4, because V3 has no room for its nulls; all else becomes V3."""

_TYPES: dict[int, type[Any]] = {2: TelemetryEventV2, 3: TelemetryEventV3, 4: TelemetryEventV4}
_LAYOUTS = {kind: LAYOUTS[version] for version, kind in _TYPES.items()}


def event_of(version: int, values: Values) -> TelemetryEventLike:
    """The event of values, in the order of their layout, that have been checked: they are not checked again."""
    event: TelemetryEventLike = object.__new__(_TYPES[version])
    fields = dict(zip(LAYOUTS[version].names, values, strict=True))
    fields["metadata"] = fields["metadata"].copy()
    event.__dict__ = fields
    return event


def telemetry_event_to_dict(event: TelemetryEventLike | TelemetryEventV2) -> dict[str, Any]:
    """The record of an event, as stormlog's function of that name gives it.

    Args:
        event: An event of any version.

    Returns:
        Its fields in the schema's order; `metadata` is a copy, one level deep.

    Raises:
        RecordError: `event` is not an event.

    """
    layout = _LAYOUTS.get(type(event)) or next((_LAYOUTS[kind] for kind in _LAYOUTS if isinstance(event, kind)), None)
    if layout is None:
        raise RecordError(f"event must be a TelemetryEvent, not {short_repr(event)}")
    record = dict(zip(layout.names, layout.pick(vars(event)), strict=True))
    record["metadata"] = dict(record["metadata"])
    return record
