"""stormlog's event schema: the names and signatures of `stormlog.telemetry`; schema 3 is written, 2 to 4 are read.

Replace `from stormlog.telemetry import ...` by `from stepspan.stormlog import ...`.
"""

from __future__ import annotations

from stepspan.compat.stormlog.convert import telemetry_event_from_record
from stepspan.compat.stormlog.events import (
    TelemetryEvent,
    TelemetryEventV2,
    TelemetryEventV3,
    TelemetryEventV4,
    telemetry_event_to_dict,
)
from stepspan.compat.stormlog.identity import resolve_distributed_identity
from stepspan.compat.stormlog.load import LoadedTelemetrySession, load_telemetry_events, load_telemetry_sessions
from stepspan.compat.stormlog.projection import (
    ProjectedTelemetryRecord,
    project_telemetry_event,
    project_telemetry_events,
)
from stepspan.compat.stormlog.schema import (
    SCHEMA_VERSION_LATEST,
    SCHEMA_VERSION_V2,
    SCHEMA_VERSION_V3,
    SCHEMA_VERSION_V4,
    validate_telemetry_record,
)
from stepspan.compat.stormlog.sink import SessionSummary
from stepspan.errors import RecordError

__all__ = [
    "SCHEMA_VERSION_LATEST",
    "SCHEMA_VERSION_V2",
    "SCHEMA_VERSION_V3",
    "SCHEMA_VERSION_V4",
    "LoadedTelemetrySession",
    "ProjectedTelemetryRecord",
    "RecordError",
    "SessionSummary",
    "TelemetryEvent",
    "TelemetryEventV2",
    "TelemetryEventV3",
    "TelemetryEventV4",
    "load_telemetry_events",
    "load_telemetry_sessions",
    "project_telemetry_event",
    "project_telemetry_events",
    "resolve_distributed_identity",
    "telemetry_event_from_record",
    "telemetry_event_to_dict",
    "validate_telemetry_record",
]
