"""Neutral records -> the bytes of one Export*ServiceRequest in protobuf, for OTLP over HTTP and gRPC.

Written straight to the wire, without message objects: building messages costs several times as much as the rest of
delivery. The wire format is small enough to stand here whole. A message is a sequence of fields, a field is a tag
(field number << 3 | wire type) and its payload:

    wire type 0  varint                        uint, int, bool, enum (sint32: zigzag first)
    wire type 1  8 bytes, little-endian        fixed64, double
    wire type 2  length as varint, then bytes  string, bytes, message, packed repeated scalars
    wire type 5  4 bytes, little-endian        fixed32

Field numbers are those of opentelemetry-proto 1.x; tests/test_encoders.py parses what this writes with
the official messages and holds it equal to the official encoder. Every NaN leaves as `rules.NAN`.
"""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

from stepspan import __version__
from stepspan.otlp.records import (
    Attributes,
    AttributeValue,
    Exemplar,
    Histogram,
    Link,
    Log,
    Point,
    Record,
    Series,
    Signal,
    Span,
    SpanEvent,
    Sum,
)
from stepspan.otlp.rules import (
    INT64_MAX,
    INT64_MIN,
    MAX_DEPTH,
    NAN,
    NO_RECORDED_VALUE,
    SAMPLED,
    SCOPE_NAME,
    SEVERITY_TEXT,
    SPAN_FLAGS,
    MetricKey,
    SeriesPoints,
    by_metric,
    utf8,
)

_IDS = frozenset({"traceId", "spanId", "parentSpanId"})
_UINT64 = (1 << 64) - 1
_ONE_BYTE = [bytes([number]) for number in range(128)]

_fixed64 = struct.Struct("<BQ").pack
_double_field = struct.Struct("<Bd").pack
_two_fixed64 = struct.Struct("<BQBQ").pack
_gauge_point = struct.Struct("<QBd").pack


class _Layout(NamedTuple):
    """What of a metric depends on its kind: tags, and bytes that are always the same."""

    data: bytes
    """Tag of the metric's data."""
    beside: bytes
    """Stands in the data beside the points."""
    attributes: bytes
    """Tag of a point's attributes."""
    no_recorded_value: bytes
    """A point's flags where it has no value."""


_CUMULATIVE = b"\x10\x02"  # aggregation_temporality = 2
_MONOTONIC = b"\x18\x01"  # is_monotonic = true
_NO_VALUE = bytes([NO_RECORDED_VALUE])
_LAYOUTS = {
    "gauge": _Layout(b"\x2a", b"", b"\x3a", b"\x40" + _NO_VALUE),
    "sum": _Layout(b"\x3a", _CUMULATIVE + _MONOTONIC, b"\x3a", b"\x40" + _NO_VALUE),
    "histogram": _Layout(b"\x52", _CUMULATIVE, b"\x0a", b"\x50" + _NO_VALUE),
}


def encode(signal: Signal, resource: Attributes, records: Sequence[Record]) -> bytes:
    """The request body for records of one signal of one session.

    Points come in time order, mixed over series; each series leaves in time order.
    """
    scope = _text(b"\x0a", SCOPE_NAME) + _text(b"\x12", __version__)
    scope_records = _field(b"\x0a", scope) + b"".join(_ENCODERS[signal](records))
    # Resource*, Scope* and their records have the same numbers in all three signals.
    return _field(b"\x0a", _field(b"\x0a", _attributes(b"\x0a", resource)) + _field(b"\x12", scope_records))


def from_json(signal: Signal, request: bytes) -> bytes:
    """The request body of an OTLP JSON one, as `stepspan.otlp.json` writes it. ValueError where it is none.

    For the few requests that are kept as JSON: through message objects, 28 µs a point.
    """
    from google.protobuf import json_format
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    kinds: dict[Signal, Any] = {
        "metrics": ExportMetricsServiceRequest,
        "traces": ExportTraceServiceRequest,
        "logs": ExportLogsServiceRequest,
    }
    message = kinds[signal]()
    try:
        json_format.ParseDict(_protobuf_ids(json.loads(request)), message)
    except json_format.ParseError as error:
        raise ValueError(str(error)) from None
    _one_nan(message)
    body: bytes = message.SerializeToString()
    return body


def _protobuf_ids(tree: Any) -> Any:
    """OTLP writes ids in hex, where protobuf's JSON has base64."""
    if isinstance(tree, list):
        return [_protobuf_ids(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: b64encode(bytes.fromhex(item)).decode() if key in _IDS else _protobuf_ids(item)
        for key, item in tree.items()
    }


def _one_nan(message: Any) -> None:
    """Every NaN becomes `NAN`."""
    for field, value in message.ListFields():
        if field.message_type:
            for inner in value if hasattr(value, "append") or hasattr(value, "add") else (value,):
                _one_nan(inner)
        elif isinstance(value, float) and value != value:
            setattr(message, field.name, NAN)


# --- metrics


def _metrics(records: Sequence[Record]) -> Iterable[bytes]:
    for key, series_points in by_metric(cast("Sequence[Point]", records)).items():
        yield _field(b"\x12", _metric(key, series_points))


def _metric(key: MetricKey, series_points: list[SeriesPoints]) -> bytes:
    name, unit, kind = key
    layout = _LAYOUTS[kind]
    points = b"".join([_points(layout, series, points) for series, points in series_points])
    names = _text(b"\x0a", name) + _text(b"\x12", series_points[0][0].description) + _text(b"\x1a", unit)
    return names + _field(layout.data, points + layout.beside)


def _points(layout: _Layout, series: Series, points: list[Point]) -> bytes:
    attributes = series.encoded.get("protobuf")
    if not isinstance(attributes, bytes):
        attributes = series.encoded["protobuf"] = _attributes(layout.attributes, series.attributes)
    if series.kind == "gauge":
        try:
            return _gauge_points(attributes, points)
        except struct.error:  # a None among the values
            pass
    return b"".join([_field(b"\x0a", _point(layout, time, value) + attributes) for _, time, value in points])


def _gauge_points(attributes: bytes, points: list[Point]) -> bytes:
    """All points of a gauge have one layout: 18 bytes of time and value, then the attributes of the series.

    Only time and value change, so the rest is what they are joined with.
    """
    head = b"\x0a" + _varint(18 + len(attributes)) + b"\x19"
    values = cast("list[tuple[Series, int, float]]", points)
    packed = [_gauge_point(time, 0x21, value if value == value else NAN) for _, time, value in values]
    return head + (attributes + head).join(packed) + attributes


def _point(layout: _Layout, time: int, value: float | Sum | Histogram | None) -> bytes:
    """A data point without its attributes."""
    if value is None:
        return _fixed64(0x19, time) + layout.no_recorded_value
    if isinstance(value, Histogram):
        return _fixed64(0x19, time) + _histogram(value)
    if isinstance(value, Sum):
        return _two_fixed64(0x11, value.start, 0x19, time) + _double(0x21, value.value)
    return _fixed64(0x19, time) + _double(0x21, value)


def _histogram(histogram: Histogram) -> bytes:
    encoded = [
        _two_fixed64(0x11, histogram.start, 0x21, histogram.count),
        _double(0x29, histogram.sum),
        b"\x30" + _zigzag(histogram.scale),
        _fixed64(0x39, histogram.zero_count),
        _double(0x61, histogram.minimum),
        _double(0x69, histogram.maximum),
    ]
    if histogram.counts:
        counts = b"".join([_varint(count) for count in histogram.counts])
        encoded.append(_field(b"\x42", b"\x08" + _zigzag(histogram.offset) + _field(b"\x12", counts)))
    encoded += [_field(b"\x5a", _exemplar(exemplar)) for exemplar in histogram.exemplars]
    return b"".join(encoded)


def _exemplar(exemplar: Exemplar) -> bytes:
    ids = _field(b"\x22", exemplar.span_id) + _field(b"\x2a", exemplar.trace_id)
    return _fixed64(0x11, exemplar.time) + _double(0x19, exemplar.value) + ids


# --- traces


def _spans(records: Sequence[Record]) -> Iterable[bytes]:
    return [_field(b"\x12", _span(span)) for span in cast("Sequence[Span]", records)]


_SPAN_FLAGS = struct.pack("<HI", 0x0185, SPAN_FLAGS)  # field 16: a tag of two bytes


def _span(span: Span) -> bytes:
    encoded = [
        _field(b"\x0a", span.trace_id),
        _field(b"\x12", span.span_id),
        _text(b"\x2a", span.name),
        b"\x30\x01",  # kind = INTERNAL
        _two_fixed64(0x39, span.start, 0x41, span.end),
        _attributes(b"\x4a", span.attributes),
        _SPAN_FLAGS,
    ]
    if span.parent_id is not None:
        encoded.append(_field(b"\x22", span.parent_id))
    if span.events:
        encoded += [_field(b"\x5a", _event(event)) for event in span.events]
    if span.links:
        encoded += [_field(b"\x6a", _link(link)) for link in span.links]
    if span.error is not None:
        encoded.append(_field(b"\x7a", _text(b"\x12", span.error) + b"\x18\x02"))  # code = ERROR
    return b"".join(encoded)


def _event(event: SpanEvent) -> bytes:
    return _fixed64(0x09, event.time) + _text(b"\x12", event.name) + _attributes(b"\x1a", event.attributes)


_LINK_FLAGS = struct.pack("<BI", 0x35, SPAN_FLAGS)


def _link(link: Link) -> bytes:
    ids = _field(b"\x0a", link.trace_id) + _field(b"\x12", link.span_id)
    return ids + _attributes(b"\x22", link.attributes) + _LINK_FLAGS


# --- logs


def _logs(records: Sequence[Record]) -> Iterable[bytes]:
    return [_field(b"\x12", _log(log)) for log in cast("Sequence[Log]", records)]


_LOG_FLAGS = struct.pack("<BI", 0x45, SAMPLED)


def _log(log: Log) -> bytes:
    encoded = [
        _two_fixed64(0x09, log.time, 0x59, log.time),
        b"\x10" + _varint(log.severity),
        _text(b"\x1a", SEVERITY_TEXT.get(log.severity, "")),
        _field(b"\x2a", _value(log.body)),
        _attributes(b"\x32", log.attributes),
        _text(b"\x62", log.event_name),
    ]
    if log.trace_id is not None:
        encoded.append(_LOG_FLAGS + _field(b"\x4a", log.trace_id))
    if log.span_id is not None:
        encoded.append(_field(b"\x52", log.span_id))
    return b"".join(encoded)


# --- attributes


def _attributes(tag: bytes, attributes: Attributes, depth: int = 0) -> bytes:
    """Attributes as repeated KeyValue fields under this tag."""
    return b"".join(
        [
            _field(tag, _key(key) + _field(b"\x12", _value(value, depth)))
            for key, value in attributes.items()
            if value is not None
        ]
    )


@lru_cache(maxsize=1024)
def _key(key: str) -> bytes:
    return _text(b"\x0a", key)


def _value(value: AttributeValue | None, depth: int = 0) -> bytes:
    """An AnyValue."""
    if isinstance(value, str):
        return _text(b"\x0a", value)
    if isinstance(value, bool):  # before int, which it is a kind of
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(value) if INT64_MIN <= value <= INT64_MAX else _text(b"\x0a", str(value))
    if isinstance(value, float):
        return _double(0x21, value)
    if value is None:  # within a list, where leaving it out would move the others
        return b""
    if depth == MAX_DEPTH:
        return _text(b"\x0a", str(value))
    if isinstance(value, Mapping):
        return _field(b"\x32", _attributes(b"\x0a", value, depth + 1))
    return _field(b"\x2a", b"".join([_field(b"\x0a", _value(item, depth + 1)) for item in value]))


# --- the wire


def _field(tag: bytes, payload: bytes) -> bytes:
    length = len(payload)
    return tag + (_ONE_BYTE[length] if length < 0x80 else _varint(length)) + payload


def _text(tag: bytes, text: str) -> bytes:
    return _field(tag, utf8(text))


def _double(tag: int, value: float) -> bytes:
    return _double_field(tag, value if value == value else NAN)


def _zigzag(number: int) -> bytes:
    return _varint(number << 1 ^ number >> 31)


def _varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; a negative number in two's complement of 64 bits."""
    if 0 <= number < 0x80:
        return _ONE_BYTE[number]
    number &= _UINT64
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_ENCODERS: dict[Signal, Callable[[Sequence[Record]], Iterable[bytes]]] = {
    "metrics": _metrics,
    "traces": _spans,
    "logs": _logs,
}
