"""Events as neutral records: what happened, on what, and what else it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as _quoted
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Literal

from stepspan.compat.stormlog.convert import telemetry_event_from_record
from stepspan.compat.stormlog.events import TelemetryEventLike, TelemetryEventV2, telemetry_event_to_dict
from stepspan.compat.stormlog.schema import IDENTITY, MEASURED, NAMES
from stepspan.errors import RecordError

SOURCE_KINDS = ("cuda", "rocm", "mps", "cpu", "tensorflow")
SEVERITIES = {
    "critical": "critical",
    "error": "error",
    "warning": "warning",
    "collector_degraded": "warning",
    "collector_recovered": "info",
    "start": "info",
    "stop": "info",
    "phase_enter": "info",
    "phase_exit": "info",
    "sample": "info",
}
"""Event type -> severity, where metadata names none."""
COUNTERS = {f"memory.{name.replace('_', '.', 1)}": name for name in MEASURED}
"""Attribute, such as `memory.allocator.allocated_bytes` -> the record's field, in bytes."""
_COUNTER_VALUES = itemgetter(*COUNTERS.values())
PHASE_IDS = ("scope_id", "parent_scope_id", "sequence")
"""Of metadata's `phase_scope`: they go into the correlation."""


@dataclass(frozen=True)
class ProjectedTelemetryRecord:
    """An event as a neutral record: the fields of stormlog's class of that name.

    Times are Unix nanoseconds; the mappings that a projection gives are read-only, all the way down.
    """

    schema_version: Literal[1]
    record_id: str
    """`telemetry-` and a hash of the entire event."""
    timestamp_ns: int
    observed_timestamp_ns: int
    session_id: str
    source_kind: str
    """One of SOURCE_KINDS, else `gpu` for a device and `other` for none."""
    event_type: str
    stage: str | None
    """The phase it happened in."""
    severity: str | None
    severity_text: str | None
    body: str | None
    resource: Mapping[str, Any] = field(default_factory=dict)
    """Source, collector, host, process, device, job and rank."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Metadata, counters (bytes) and the sampling interval (ms)."""
    correlation: Mapping[str, Any] = field(default_factory=dict)
    """Session, job, rank and phase."""


def project_telemetry_event(
    event: TelemetryEventLike | TelemetryEventV2 | Mapping[str, Any],
) -> ProjectedTelemetryRecord:
    """The neutral record of an event, as stormlog's function of that name gives it.

    Args:
        event: An event of any version, or a record, which `telemetry_event_from_record` converts first.

    Returns:
        The record.

    Raises:
        RecordError: A record is not as its schema says, or metadata nests too deeply.

    """
    if not isinstance(event, TelemetryEventLike):
        given = telemetry_event_to_dict(event) if isinstance(event, TelemetryEventV2) else event
        event = telemetry_event_from_record(given)
    record = vars(event)
    try:
        metadata: Mapping[str, Any] = _frozen(event.metadata)
        digest = hashlib.sha256(_json({**record, "metadata": metadata}).encode()).hexdigest()
    except RecursionError:
        raise RecordError("metadata nests too deeply, or contains itself", "metadata") from None
    severity_text = metadata.get("severity_text")
    kind = _source_kind(event, metadata)
    resource = {
        "source_kind": kind,
        "collector": event.collector,
        "host": event.host,
        "pid": event.pid,
        "device_id": event.device_id,
    }
    attributes = {**metadata, "sampling.interval_ms": event.sampling_interval_ms}
    attributes.update(zip(COUNTERS, _COUNTER_VALUES(record), strict=True))
    identity = {name: record[name] for name in IDENTITY}
    correlation = {"session_id": event.session_id, **identity}
    stage, scope = None, metadata.get("phase_scope")
    if isinstance(scope, MappingProxyType):
        stage = phase_name(scope)
        correlation |= {f"phase.{name}": scope[name] for name in PHASE_IDS if scope.get(name) is not None}
    projected = object.__new__(ProjectedTelemetryRecord)
    projected.__dict__.update(  # its __init__, being frozen, takes three times as long
        schema_version=1,
        record_id=f"telemetry-{digest[:32]}",
        timestamp_ns=event.timestamp_ns,
        observed_timestamp_ns=event.timestamp_ns,
        session_id=event.session_id,
        source_kind=kind,
        event_type=event.event_type,
        stage=stage,
        severity=_severity(event.event_type, metadata),
        severity_text=None if severity_text is None else str(severity_text),
        body=event.context,
        resource=MappingProxyType(resource | identity),
        attributes=MappingProxyType(attributes),
        correlation=MappingProxyType(correlation),
    )
    return projected


def project_telemetry_events(
    events: Iterable[TelemetryEventLike | TelemetryEventV2 | Mapping[str, Any]],
) -> list[ProjectedTelemetryRecord]:
    """The neutral records of several events, in their order; raises as `project_telemetry_event` does.

    Args:
        events: Each as `project_telemetry_event` takes one.

    """
    return [project_telemetry_event(event) for event in events]


def _frozen(value: Any) -> Any:
    """The value with read-only mappings, whose keys are text, and tuples for lists."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return MappingProxyType({str(key): _frozen(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value


def _json(record: Mapping[str, Any]) -> str:
    """What `json.dumps(record, sort_keys=True)` writes. The record's own keys are sorted once for all."""
    return _TEMPLATE % tuple(map(_json_value, _SORTED(record)))


def _json_value(value: object) -> object:
    if type(value) is int:
        return value
    if type(value) is str:
        return _quoted(value)
    if type(value) is MappingProxyType:
        inner = [f"{_quoted(key)}: {_json_value(each)}" for key, each in sorted(value.items())]
        return f"{{{', '.join(inner)}}}"
    return "null" if value is None else _ENCODE(value)


def _json_default(value: object) -> object:
    return dict(value) if isinstance(value, MappingProxyType) else str(value)


_ENCODE = json.JSONEncoder(sort_keys=True, default=_json_default).encode
_SORTED = itemgetter(*sorted(NAMES))
_TEMPLATE = "{" + ", ".join(f'"{name}": %s' for name in sorted(NAMES)) + "}"


def _source_kind(event: TelemetryEventLike, metadata: Mapping[str, Any]) -> str:
    backend = metadata.get("backend")
    if isinstance(backend, str) and backend.strip().lower() in SOURCE_KINDS:
        return backend.strip().lower()
    collector = event.collector.lower()
    fallback = "gpu" if event.device_id >= 0 else "other"
    return next((kind for kind in SOURCE_KINDS if kind in collector), fallback)


def phase_name(scope: Any) -> str | None:
    """The phase that metadata's `phase_scope` names: by itself, or as the last part of its path."""
    if not isinstance(scope, Mapping):
        return None
    path = scope.get("path")
    last = path[-1] if isinstance(path, (list, tuple)) and path else None
    return next((name for name in (scope.get("name"), last) if isinstance(name, str) and name.strip()), None)


def _severity(event_type: str, metadata: Mapping[str, Any]) -> str | None:
    own = metadata.get("severity")
    return own.strip().lower() if isinstance(own, str) and own.strip() else SEVERITIES.get(event_type.strip().lower())
