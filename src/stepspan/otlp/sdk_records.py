"""What an OpenTelemetry SDK handed over, on its way out: its records under their own scopes, as JSON and as protobuf.

The journal keeps such records as OTLP JSON, so JSON is what they are. Protobuf is made by the official message classes,
whose descriptors say what each field holds; `json_format` would read ids as base64, and text as an empty message.
A field that the installed classes don't know is left out, as a receiver that doesn't know it would leave it out.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, TypeAlias

import orjson
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stepspan.mapping.records import METRIC_DATA, SdkRecord, SdkScope, Signal
from stepspan.otlp.rules import FIELDS, double

_Json: TypeAlias = dict[str, Any]
_Convert: TypeAlias = Callable[[Any], Any]

_IDS = frozenset({"traceId", "spanId", "parentSpanId"})

REQUESTS: Mapping[Signal, Descriptor] = {
    "metrics": ExportMetricsServiceRequest.DESCRIPTOR,
    "traces": ExportTraceServiceRequest.DESCRIPTOR,
    "logs": ExportLogsServiceRequest.DESCRIPTOR,
}


def scopes_of(signal: Signal, records: Iterable[SdkRecord]) -> list[_Json]:
    """ScopeSpans, ScopeLogs or ScopeMetrics: each scope once, each metric of it once, its points in order."""
    by_scope: dict[SdkScope, list[Mapping[str, Any]]] = {}
    for scope, _, record in records:
        by_scope.setdefault(scope, []).append(record)
    name = FIELDS[signal].records
    found: dict[bytes, _Json] = {}
    for scope, its_records in by_scope.items():
        key = orjson.dumps([scope.scope, scope.schema_url])
        if key not in found:
            schema = {"schemaUrl": scope.schema_url} if scope.schema_url else {}
            found[key] = {"scope": scope.scope, **schema, name: []}
        found[key][name] += its_records if scope.metric is None else [_with_points(scope.metric, its_records)]
    return list(found.values())


def encode_scopes(signal: Signal, records: Iterable[SdkRecord]) -> bytes:
    """The same in protobuf, as the fields of a ResourceSpans, ResourceLogs or ResourceMetrics.

    Raises:
        ValueError: A record is not OTLP JSON.

    """
    resource = REQUESTS[signal].fields[0].message_type
    assert resource is not None
    return to_wire(resource, {FIELDS[signal].scopes: scopes_of(signal, records)})


def request_from_json(signal: Signal, request: bytes) -> bytes:
    """The request body in protobuf of one in OTLP JSON, as `stepspan.otlp.json` writes it.

    Raises:
        ValueError: It is none.

    """
    tree, fields = orjson.loads(request), FIELDS[signal]
    entries = tree.get(fields.resources) if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not all(fields.scopes in entry for entry in entries if isinstance(entry, dict)):
        raise ValueError(f"not a request for {signal}")
    return to_wire(REQUESTS[signal], tree)


def to_wire(message: Descriptor, tree: Mapping[str, Any]) -> bytes:
    """OTLP JSON as the bytes of a message of that kind.

    Raises:
        ValueError: It is not OTLP JSON of that kind.

    """
    try:
        return GetMessageClass(message)(**_arguments(message, tree)).SerializeToString()
    except (AttributeError, TypeError, OverflowError, binascii.Error, RecursionError) as error:
        raise ValueError(f"not a {message.name} in OTLP JSON: {error}") from None


def _with_points(metric: Mapping[str, Any], points: list[Mapping[str, Any]]) -> _Json:
    return {name: {**value, "dataPoints": points} if name in METRIC_DATA else value for name, value in metric.items()}


def _arguments(message: Descriptor, tree: Mapping[str, Any]) -> dict[str, Any]:
    """What the class of the message takes, where messages within it are dicts."""
    fields = _fields(message)
    return {
        fields[name][0]: fields[name][1](value) for name, value in tree.items() if name in fields and value is not None
    }


@lru_cache(maxsize=256)
def _fields(message: Descriptor) -> dict[str, tuple[str, _Convert]]:
    """Name in JSON -> name in protobuf, and what converts the value."""
    return {field.json_name: (field.name, _converter(field)) for field in message.fields}


def _converter(field: FieldDescriptor) -> _Convert:
    convert: _Convert
    if field.message_type is not None:
        convert = partial(_arguments, field.message_type)
    elif field.json_name in _IDS:
        convert = bytes.fromhex
    else:
        convert = _SCALARS.get(field.type, _integer)
    return (lambda values: [convert(value) for value in values]) if field.is_repeated else convert


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise TypeError(f"{value} is not an integer")
    return int(value)


_SCALARS: Mapping[int, _Convert] = {
    FieldDescriptor.TYPE_STRING: _string,
    FieldDescriptor.TYPE_BOOL: lambda value: value is True,
    FieldDescriptor.TYPE_DOUBLE: double,
    FieldDescriptor.TYPE_BYTES: partial(b64decode, validate=True),
}
"""Field type -> what converts its values; all others are integers."""
