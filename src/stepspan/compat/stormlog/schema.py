"""The schema of a stormlog record, all versions in one table, and whether a record is as it says.

The order of the table is part of the schema: fields are checked in it, and `telemetry_event_to_dict` writes in it.
Within a group all types are checked before all ranges.

Two ways to the same answer. `accepted` is quick: a record with exactly the fields of its version, whose types are ones
that have been found right before, needs a handful of comparisons. What it cannot vouch for goes to `check`, which walks
the table and says what is wrong, in the order that is part of stormlog's contract: missing, unknown, session, scalars,
identity, device_id, allocator, device, context, metadata, ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

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
        blank: Whether a text may be empty or all spaces.

    """

    name: str
    kind: type
    minimum: int | None = None
    null: int | None = None
    since: int = SCHEMA_VERSION_V2
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
    (Field("job_id", str, null=2),),
    (Field("rank", int, 0),),
    (Field("local_rank", int, 0),),
    (Field("world_size", int, 1),),
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

MEASURED = {
    name: "supports_" + ("allocator_allocated" if name == "allocator_change_bytes" else name.removesuffix("_bytes"))
    for name in NAMES
    if name.endswith("_bytes")
}
"""Counter -> the capability without which it is null in a V4 record."""
CAPABILITY_TEXTS = ("backend", "telemetry_collector", "sampling_source")
CAPABILITY_FLAGS = (
    *dict.fromkeys(MEASURED.values()),
    "supports_native_allocator_history",
    "supports_fragmentation_analysis",
    "supports_allocator_attribution",
    "supports_bounded_profiling",
)
CAPABILITIES = CAPABILITY_TEXTS + CAPABILITY_FLAGS
"""What `metadata.memory_capabilities` of a V4 record holds: exactly these, three texts and eleven booleans."""

Values = tuple[Any, ...]
"""Of a record, in the order of its layout's names."""
Picker = Callable[[Values], Values]

# fmt: off
_LIMITS = ("pid", "rank", "local_rank", "world_size",
           "device_used_bytes", "device_free_bytes", "device_total_bytes")
# fmt: on


class Layout:
    """The fields of one version of the schema, and whether a record has them as it should."""

    def __init__(self, version: int) -> None:
        self.version = version
        groups = (tuple(field for field in group if field.since <= version) for group in GROUPS)
        self.groups = tuple(filter(None, groups))
        self.fields = tuple(field for group in self.groups for field in group)
        self.names = tuple(field.name for field in self.fields)
        self.pick: Callable[[Mapping[str, Any]], Values] = itemgetter(*self.names)
        self._limits = itemgetter(*map(self.names.index, _LIMITS))
        self._shapes: dict[tuple[type, ...], tuple[Picker, Picker]] = {}
        """Types found right, in the order of the names -> pick the integers that may not be negative, and the texts
        that may not be blank."""

    def fits(self, values: Values) -> bool:
        """Quickly: True only if `check` has nothing to say about them but, in V4, about capabilities."""
        shape = self._shapes.get(tuple(map(type, values)))
        if shape is None:
            return False
        counters, texts = shape
        pid, rank, local_rank, world_size, used, free, total = self._limits(values)
        return (
            min(counters(values)) >= 0
            and all(map(str.strip, texts(values)))
            and pid >= -1
            and rank < world_size
            and local_rank < world_size
            and (total is None or ((used is None or used <= total) and (free is None or free <= total)))
        )

    def learn(self, values: Values) -> None:
        """These values passed `check`: others of the same types need not go there."""
        types = tuple(map(type, values))
        if all(kind in (int, str, dict, type(None)) for kind in types):
            present = [(i, field) for i, field in enumerate(self.fields) if types[i] is field.kind]
            self._shapes[types] = (
                itemgetter(*(i for i, field in present if field.minimum == 0)),
                itemgetter(*(i for i, field in present if field.kind is str and not field.blank)),
            )

    def check(self, record: Mapping[str, Any]) -> Values:
        """The record's values. Raises `RecordError` with the first thing that is wrong."""
        missing = [name for name in self.names if name not in IDENTITY and name not in record]
        if missing:
            raise RecordError(f"Missing required telemetry fields: {', '.join(missing)}", *missing)
        unknown = sorted(str(name) for name in record if name not in self.names)
        if unknown:
            raise RecordError(
                f"Unknown telemetry fields: {', '.join(unknown)} (your own fields belong in `metadata`)", *unknown
            )
        full = {**IDENTITY, **record}
        for group in self.groups:
            for field in group:
                field.check_type(full[field.name], self.version)
            for field in group:
                field.check_range(full[field.name], self.version)
            if group[0].name == "device_used_bytes":
                _check_totals(full)
        if self.version >= SCHEMA_VERSION_V4:
            check_capabilities(full)
        check_ranks(full["rank"], full["local_rank"], full["world_size"])
        values = self.pick(full)
        self.learn(values)
        return values


LAYOUTS = {version: Layout(version) for version in VERSIONS}


def validate_telemetry_record(record: Mapping[str, Any]) -> None:
    """Check a record, as stormlog's function of that name does; schema 4 is taken, too.

    Args:
        record: The record; one without `schema_version` is refused: `telemetry_event_from_record` converts those.

    Raises:
        RecordError: The record is not as its schema says: the first fault in stormlog's order, with the `fields`.

    """
    if type(record) is not dict or accepted(record) is None:
        layout_of(record).check(record)


def accepted(record: dict[str, Any]) -> tuple[Layout, Values] | None:
    """Quickly: the layout and values of a record without fault. None: it has one, or must be looked at closely."""
    try:
        layout = LAYOUTS[record["schema_version"]]
        values = layout.pick(record)
    except (KeyError, TypeError):
        return None
    if len(record) != len(values) or not layout.fits(values):
        return None
    if layout.version >= SCHEMA_VERSION_V4:
        check_capabilities(record)
    return layout, values


def layout_of(record: Mapping[str, Any]) -> Layout:
    """The layout that a record names. Raises `RecordError` where it names none, or one that is not known."""
    if not isinstance(record, Mapping):
        raise RecordError(f"record must be a mapping, not {short_repr(record)}")
    version = require_int("schema_version", record.get("schema_version"))
    layout = LAYOUTS.get(version)
    if layout is None:
        raise RecordError(f"Unsupported schema_version: {short_repr(version)} (2, 3 and 4 are known)", "schema_version")
    return layout


def check_ranks(rank: int, local_rank: int, world_size: int) -> None:
    """Raise `RecordError` for a rank or local rank that is not below the world size."""
    for name, value in (("rank", rank), ("local_rank", local_rank)):
        if value >= world_size:
            problem = f"{name} must be < world_size: it is {short_repr(value)} of {short_repr(world_size)}"
            raise RecordError(problem, name, "world_size")


def _check_totals(record: Mapping[str, Any]) -> None:
    total = record["device_total_bytes"]
    for name in ("device_used_bytes", "device_free_bytes"):
        value = record[name]
        if total is not None and value is not None and value > total:
            problem = f"{name} cannot exceed device_total_bytes: {short_repr(value)} > {short_repr(total)}"
            raise RecordError(problem, name, "device_total_bytes")


def check_capabilities(record: Mapping[str, Any]) -> None:
    """Raise `RecordError` unless the metadata of a V4 record says what its collector could measure.

    A counter that could not be measured is null, and where allocated memory could not, its change is null as well.
    """
    path = "metadata.memory_capabilities"
    found = record["metadata"].get("memory_capabilities")
    if not isinstance(found, dict):
        raise RecordError(f"{path} must be an object in schema 4, not {short_repr(found)}", "metadata")
    missing = [name for name in CAPABILITIES if name not in found]
    if missing:
        raise RecordError(f"Missing memory capability fields: {', '.join(missing)}", "metadata", *missing)
    unknown = sorted(str(name) for name in found if name not in CAPABILITIES)
    if unknown:
        raise RecordError(f"Unknown memory capability fields: {', '.join(unknown)}", "metadata", *unknown)
    for name in CAPABILITY_TEXTS:
        require_text(f"{path}.{name}", found[name])
    for name in CAPABILITY_FLAGS:
        if not isinstance(found[name], bool):
            raise RecordError(f"{path}.{name} must be a boolean, not {short_repr(found[name])}", f"{path}.{name}")
    for name, flag in MEASURED.items():
        if not found[flag] and record[name] is not None:
            problem = f"{name} must be null when {path}.{flag} is false, not {short_repr(record[name])}"
            raise RecordError(problem, name, f"{path}.{flag}")
