"""The fields of a stormlog record, all versions of the schema in one table.

The order is part of the schema: fields are checked in it, and `telemetry_event_to_dict` writes in it. Within a group
all types are checked before all ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stepspan.errors import RecordError, short_repr

SCHEMA_VERSION_V2: Final = 2
SCHEMA_VERSION_V3: Final = 3
SCHEMA_VERSION_V4: Final = 4
SCHEMA_VERSION_LATEST: Final = 3
"""The version that is written; V4 is only read."""
VERSIONS = (SCHEMA_VERSION_V2, SCHEMA_VERSION_V3, SCHEMA_VERSION_V4)


@dataclass(frozen=True, slots=True)
class Field:
    """A row of the table.

    Args:
        name: The field's name.
        kind: int, str or dict.
        minimum: The least value of an integer; None: any.
        null: The first version of the schema in which the field may be null; None: never.
        since: The first version of the schema that has the field.
        optional: Whether a record may lack it.
        blank: Whether a text may be empty or all spaces.

    """

    name: str
    kind: type
    minimum: int | None = None
    null: int | None = None
    since: int = SCHEMA_VERSION_V2
    optional: bool = False
    blank: bool = False

    def check_type(self, value: object, version: int) -> None:
        """Raise `RecordError` for a value of the wrong type, or a text that is blank and may not be."""
        if value is None and self.null is not None and self.null <= version:
            return
        if self.kind is int:
            require_int(self.name, value)
        elif self.kind is str:
            require_text(self.name, value, blank=self.blank)
        elif not isinstance(value, dict):
            raise RecordError(f"{self.name} must be an object, not {short_repr(value)}", self.name)

    def check_range(self, value: object, version: int) -> None:
        """Raise `RecordError` for an integer that is too small."""
        if isinstance(value, int) and self.minimum is not None and value < self.minimum:
            provided = " when provided" if self.null is not None and self.null <= version else ""
            raise RecordError(f"{self.name} must be >= {self.minimum}{provided}, not {short_repr(value)}", self.name)


def require_int(name: str, value: object) -> int:
    """The value, if it is an integer: neither a bool nor 1.0 is one. Raises `RecordError` that names the field."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise RecordError(f"{name} must be an integer, not {short_repr(value)}", name)


def require_text(name: str, value: object, *, blank: bool = False) -> str:
    """The value, if it is a string, and not blank unless it may be. Raises `RecordError` that names the field."""
    if isinstance(value, str) and (blank or value.strip()):
        return value
    must = "a string" if blank or not (value is None or isinstance(value, str)) else "a non-empty string"
    raise RecordError(f"{name} must be {must}, not {short_repr(value)}", name)


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
