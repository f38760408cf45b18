"""What an OpenTelemetry SDK handed over, on its way out: its records under their own scopes, as JSON and as protobuf.

The journal keeps such records as OTLP JSON, so JSON is what they are. Protobuf is written from the fields that the
official message classes describe, straight to the wire: 9 µs a span of three attributes, where `json_format` takes 42.
A field that the installed classes don't know is left out, as a receiver that doesn't know it would leave it out.
"""

from __future__ import annotations

import binascii
import json
import struct
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import orjson
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import ScopeLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans

from stepspan.mapping.records import METRIC_DATA, SdkRecord, SdkScope, Signal
from stepspan.otlp.rules import FIELDS, NAN
from stepspan.otlp.wire import bytes_field, varint, zigzag
from stepspan.values import utf8

_Json: TypeAlias = dict[str, Any]
_Write: TypeAlias = Callable[[Any], bytes]

_IDS = frozenset({"traceId", "spanId", "parentSpanId"})
_TYPE = FieldDescriptor


class Shape(NamedTuple):
    """The descriptors of a signal's messages: Export*ServiceRequest, and ScopeMetrics, ScopeSpans or ScopeLogs."""

    request: Descriptor
    scope: Descriptor


SHAPES: Mapping[Signal, Shape] = {
    "metrics": Shape(ExportMetricsServiceRequest.DESCRIPTOR, ScopeMetrics.DESCRIPTOR),
    "traces": Shape(ExportTraceServiceRequest.DESCRIPTOR, ScopeSpans.DESCRIPTOR),
    "logs": Shape(ExportLogsServiceRequest.DESCRIPTOR, ScopeLogs.DESCRIPTOR),
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


def encode_scopes(signal: Signal, records: Iterable[SdkRecord]) -> list[bytes]:
    """The same in protobuf. Raises ValueError where a record is not OTLP JSON."""
    return [to_wire(SHAPES[signal].scope, scope) for scope in scopes_of(signal, records)]


def request_from_json(signal: Signal, request: bytes) -> bytes:
    """The request body in protobuf of one in OTLP JSON, as `stepspan.otlp.json` writes it.

    Raises:
        ValueError: It is none.

    """
    tree, fields = json.loads(request), FIELDS[signal]
    entries = tree.get(fields.resources) if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not all(fields.scopes in entry for entry in entries if isinstance(entry, dict)):
        raise ValueError(f"not a request for {signal}")
    return to_wire(SHAPES[signal].request, tree)


def to_wire(message: Descriptor, tree: Mapping[str, Any]) -> bytes:
    """OTLP JSON as the bytes of a message of that kind.

    Raises:
        ValueError: It is not OTLP JSON of that kind.

    """
    try:
        return _message(message, tree)
    except (AttributeError, TypeError, OverflowError, struct.error, binascii.Error, RecursionError) as error:
        raise ValueError(f"not a {message.name} in OTLP JSON: {error}") from None


def _with_points(metric: Mapping[str, Any], points: list[Mapping[str, Any]]) -> _Json:
    return {name: {**value, "dataPoints": points} if name in METRIC_DATA else value for name, value in metric.items()}


def _message(message: Descriptor, tree: Mapping[str, Any]) -> bytes:
    plan = _plan(message)
    return b"".join([plan[name](value) for name, value in tree.items() if name in plan and value is not None])


@lru_cache(maxsize=256)
def _plan(message: Descriptor) -> dict[str, _Write]:
    """Name in JSON -> what writes the field."""
    return {described.json_name: _writer(described) for described in message.fields}


def _writer(described: FieldDescriptor) -> _Write:
    kind = described.type
    if kind == _TYPE.TYPE_MESSAGE:
        inner = described.message_type
        assert inner is not None
        payload: _Write = lambda tree: _message(inner, tree)  # noqa: E731 # made for one field
        wire_type = 2
    elif kind == _TYPE.TYPE_BYTES:
        payload, wire_type = bytes.fromhex if described.json_name in _IDS else _base64, 2
    else:
        payload, wire_type = _SCALARS[kind]
    repeated = described.is_repeated
    if repeated and wire_type != 2:  # packed
        tag = varint(described.number << 3 | 2)
        return lambda values: bytes_field(tag, b"".join([payload(value) for value in values]))
    tag = varint(described.number << 3 | wire_type)
    if wire_type != 2:
        return lambda value: tag + payload(value)
    if repeated:
        return lambda values: b"".join([bytes_field(tag, payload(value)) for value in values])
    return lambda value: bytes_field(tag, payload(value))


def _string(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return utf8(value)


def _base64(value: Any) -> bytes:
    return b64decode(value, validate=True)


def _double(value: Any) -> bytes:
    number = float(value)
    return struct.pack("<d", number if number == number else NAN)


def _integer(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise TypeError(f"{value} is not an integer")
    return int(value)


_SCALARS: Mapping[int, tuple[_Write, int]] = {
    _TYPE.TYPE_STRING: (_string, 2),
    _TYPE.TYPE_BOOL: (lambda value: b"\1" if value is True else b"\0", 0),
    _TYPE.TYPE_DOUBLE: (_double, 1),
    _TYPE.TYPE_FIXED64: (lambda value: struct.pack("<Q", _integer(value)), 1),
    _TYPE.TYPE_SFIXED64: (lambda value: struct.pack("<q", _integer(value)), 1),
    _TYPE.TYPE_FIXED32: (lambda value: struct.pack("<I", _integer(value)), 5),
    _TYPE.TYPE_SINT32: (lambda value: zigzag(_integer(value)), 0),
    **dict.fromkeys(
        (_TYPE.TYPE_ENUM, _TYPE.TYPE_INT32, _TYPE.TYPE_INT64, _TYPE.TYPE_UINT32, _TYPE.TYPE_UINT64),
        (lambda value: varint(_integer(value)), 0),
    ),
}
"""Field type -> what writes the payload, and its wire type."""
