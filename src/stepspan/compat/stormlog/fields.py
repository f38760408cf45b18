"""The fields of a stormlog record, all versions of the schema in one table.

The order is part of the schema: fields are checked in it, and `telemetry_event_to_dict` writes in it. Within a group
all types are checked before all ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stepspan.errors import RecordError as RecordError

SCHEMA_VERSION_V2: Final = 2
SCHEMA_VERSION_V3: Final = 3
SCHEMA_VERSION_V4: Final = 4
SCHEMA_VERSION_LATEST: Final = 3  # what is written; V4 is read
VERSIONS = (SCHEMA_VERSION_V2, SCHEMA_VERSION_V3, SCHEMA_VERSION_V4)


def shown(value: object) -> str:
    """A value as an error shows it, cut short."""
    try:
        text = repr(value)
    except Exception as error:  # a foreign object may fail in any way, and the error about it must not
        text = f"something whose repr fails with {type(error).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


@dataclass(frozen=True, slots=True)
class Field:
    """A row of the table."""

    name: str
    kind: type  # int, str or dict
    minimum: int | None = None  # of an integer
    null: int | None = None  # the first version of the schema in which it may be null
    since: int = SCHEMA_VERSION_V2
    optional: bool = False
    blank: bool = False  # may a text be empty or all spaces?

    def check_type(self, value: object, version: int) -> None:
        """Raise `RecordError` for a value of the wrong type, or a text that is blank and may not be."""
        if value is None and self.null is not None and self.null <= version:
            return
        if self.kind is int:
            integer(self.name, value)
        elif self.kind is str:
            text(self.name, value, blank=self.blank)
        elif not isinstance(value, dict):
            raise RecordError(f"{self.name} must be an object, not {shown(value)}", self.name)

    def check_range(self, value: object, version: int) -> None:
        """Raise `RecordError` for an integer that is too small."""
        if isinstance(value, int) and self.minimum is not None and value < self.minimum:
            provided = " when provided" if self.null is not None and self.null <= version else ""
            raise RecordError(f"{self.name} must be >= {self.minimum}{provided}, not {shown(value)}", self.name)


def integer(name: str, value: object) -> int:
    """The value, if it is an integer: neither a bool nor 1.0 is one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise RecordError(f"{name} must be an integer, not {shown(value)}", name)


def text(name: str, value: object, *, blank: bool = False) -> str:
    """The value, if it is a string, and says something unless it may be blank."""
    if isinstance(value, str) and (blank or value.strip()):
        return value
    must = "a string" if blank or not (value is None or isinstance(value, str)) else "a non-empty string"
    raise RecordError(f"{name} must be {must}, not {shown(value)}", name)


# fmt: off
GROUPS: tuple[tuple[Field, ...], ...] = (
    (Field("schema_version", int),),
    (Field("session_id", str, since=3),),
    (Field("timestamp_ns", int, 0),),  # Unix time
    (Field("event_type", str),),
    (Field("collector", str),),
    (Field("sampling_interval_ms", int, 0),),
    (Field("pid", int, -1),),  # -1: unknown
    (Field("host", str),),
    (Field("job_id", str, null=2, optional=True),),
    (Field("rank", int, 0, optional=True),),
    (Field("local_rank", int, 0, optional=True),),
    (Field("world_size", int, 1, optional=True),),
    (Field("device_id", int),),  # -1: none
    (Field("allocator_allocated_bytes", int, 0, null=4),
     Field("allocator_reserved_bytes", int, 0, null=4),
     Field("allocator_active_bytes", int, 0, null=2),
     Field("allocator_inactive_bytes", int, 0, null=2),
     Field("allocator_change_bytes", int, null=4)),
    (Field("device_used_bytes", int, 0, null=4),
     Field("device_free_bytes", int, 0, null=2),
     Field("device_total_bytes", int, 0, null=2)),
    (Field("context", str, null=2, blank=True),),
    (Field("metadata", dict),),
)
# fmt: on
FIELDS = tuple(field for group in GROUPS for field in group)
NAMES = tuple(field.name for field in FIELDS)
IDENTITY: dict[str, str | int | None] = {"job_id": None, "rank": 0, "local_rank": 0, "world_size": 1}
"""The optional fields, and what they are where a record lacks them."""

CAPABILITY_TEXTS = ("backend", "telemetry_collector", "sampling_source")
CAPABILITY_FLAGS = (
    "supports_allocator_allocated",
    "supports_allocator_reserved",
    "supports_allocator_active",
    "supports_allocator_inactive",
    "supports_device_used",
    "supports_device_free",
    "supports_device_total",
    "supports_native_allocator_history",
    "supports_fragmentation_analysis",
    "supports_allocator_attribution",
    "supports_bounded_profiling",
)
CAPABILITIES = CAPABILITY_TEXTS + CAPABILITY_FLAGS
"""What `metadata.memory_capabilities` of a V4 record holds: exactly these, three texts and eleven booleans."""
