"""Neutral records -> the bytes of one Export*ServiceRequest in protobuf, for OTLP over HTTP and gRPC.

Written straight to the wire, without message objects: building messages costs several times as much as the rest of
delivery. What an OpenTelemetry SDK handed over is converted by `stepspan.otlp.sdk_records`.
Field numbers are those of opentelemetry-proto 1.x; tests/test_encoders.py parses what this writes with
the official messages and holds it equal to the official encoder. Every NaN leaves as `rules.NAN`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from operator import eq
from typing import Any, NamedTuple

from stepspan._version import __version__
from stepspan.mapping.records import (
    Attributes,
    AttributeValue,
    Histogram,
    Link,
    Log,
    Record,
    Series,
    Signal,
    Span,
    Sum,
)
from stepspan.otlp import rules
from stepspan.values import utf8

_fixed64 = struct.Struct("<BQ").pack
_two_fixed64 = struct.Struct("<BQBQ").pack
_gauge_point = struct.Struct("<QBd").pack
MAX_SHORT_CHARS = 24
"""Of a key or text whose attribute is short enough for lengths of one byte, whatever its characters."""
MAX_SHORT_INT = 1 << 63


class _Layout(NamedTuple):
    """What of a metric depends on its kind: tags, and bytes that are always the same.

    Args:
        data: Tag of the metric's data.
        rest: What the data holds in addition to the points.
        attributes: Tag of a point's attributes.
        no_recorded_value: A point's flags where it has no value.

    """

    data: bytes
    rest: bytes
    attributes: bytes
    no_recorded_value: bytes


_DELTA, _CUMULATIVE = b"\x10\x01", b"\x10\x02"  # aggregation_temporality = 1, 2
_MONOTONIC = b"\x18\x01"  # is_monotonic = true
_NO_VALUE = bytes([rules.NO_RECORDED_VALUE])
_LAYOUTS = {
    "gauge": _Layout(b"\x2a", b"", b"\x3a", b"\x40" + _NO_VALUE),
    "sum": _Layout(b"\x3a", _CUMULATIVE + _MONOTONIC, b"\x3a", b"\x40" + _NO_VALUE),
    "histogram": _Layout(b"\x52", _CUMULATIVE, b"\x0a", b"\x50" + _NO_VALUE),
    "explicit_histogram": _Layout(b"\x4a", _CUMULATIVE, b"\x4a", b"\x50" + _NO_VALUE),
    "delta_sum": _Layout(b"\x3a", _DELTA + _MONOTONIC, b"\x3a", b"\x40" + _NO_VALUE),
    "delta_histogram": _Layout(b"\x52", _DELTA, b"\x0a", b"\x50" + _NO_VALUE),
    "delta_explicit_histogram": _Layout(b"\x4a", _DELTA, b"\x4a", b"\x50" + _NO_VALUE),
}


def encode(signal: Signal, resource: Attributes, records: Sequence[Record]) -> bytes:
    """Encode records of one signal of one session as a request body in protobuf.

    Args:
        signal: The signal of all records.
        resource: The attributes of the session's Resource.
        records: Points come in time order, mixed over series; each series leaves in time order.

    Returns:
        The body of an Export*ServiceRequest, not compressed.

    Raises:
        ValueError: A record that an OpenTelemetry SDK handed over is not OTLP JSON.

    """
    own, sdk_records = rules.partition(signal, records)
    # Resource*, Scope* and their records have the same numbers in all three signals.
    scopes = []
    if own or not sdk_records:
        scope = _string_field(b"\x0a", rules.SCOPE_NAME) + _string_field(b"\x12", __version__)
        encode_record = _ENCODERS[signal]
        fields = [_bytes_field(b"\x12", encode_record(record)) for record in own]
        scopes.append(_bytes_field(b"\x12", _bytes_field(b"\x0a", scope) + b"".join(fields)))
    if sdk_records:
        from stepspan.otlp.sdk_records import encode_scopes

        scopes.append(encode_scopes(signal, sdk_records))
    return _bytes_field(b"\x0a", _bytes_field(b"\x0a", _key_values(b"\x0a", resource)) + b"".join(scopes))


def join(signal: Signal, requests: Sequence[bytes]) -> bytes:
    """Requests of several sessions as one: a message's repeated fields may follow one another.

    Args:
        signal: The signal of all of them.
        requests: At least one, from `encode`.

    """
    return b"".join(requests)


# --- metrics


def _metric(metric: rules.Metric) -> bytes:
    (name, unit, kind), columns = metric
    layout = _LAYOUTS[kind]
    points = b"".join([_points(layout, *column) for column in columns])
    return _metric_names(name, columns[0][0].description, unit) + _bytes_field(layout.data, points + layout.rest)


@lru_cache(maxsize=4096)
def _metric_names(name: str, description: str, unit: str) -> bytes:
    return _string_field(b"\x0a", name) + _string_field(b"\x12", description) + _string_field(b"\x1a", unit)


def _points(layout: _Layout, series: Series, times: Sequence[int], values: Sequence[Any]) -> bytes:
    attributes = series.encoded.get("protobuf")
    if not isinstance(attributes, bytes):
        attributes = series.encoded["protobuf"] = _key_values(layout.attributes, series.attributes)
    if series.kind == "gauge":
        try:
            return _gauge_points(attributes, times, values)
        except struct.error:  # a None among the values
            pass
    points = zip(times, values, strict=True)
    return b"".join([_bytes_field(b"\x0a", _point(layout, time, value) + attributes) for time, value in points])


def _gauge_points(attributes: bytes, times: Sequence[int], values: Sequence[float]) -> bytes:
    """All points of a gauge have one layout: 18 bytes of time and value, then the attributes of the series.

    Only time and value change, so the rest is what they are joined with.
    """
    head = b"\x0a" + _varint(18 + len(attributes)) + b"\x19"
    if not all(map(eq, values, values)):
        values = [value if value == value else rules.NAN for value in values]
    return head + (attributes + head).join(map(_gauge_point, times, repeat(0x21), values)) + attributes


def _point(layout: _Layout, time: int, value: float | Sum | Histogram | None) -> bytes:
    """A data point without its attributes."""
    if value is None:
        return _fixed64(0x19, time) + layout.no_recorded_value
    if isinstance(value, Histogram):
        return _fixed64(0x19, time) + _histogram(value)
    if isinstance(value, Sum):
        return _two_fixed64(0x11, value.start, 0x19, time) + _double_field(0x21, value.value)
    return _fixed64(0x19, time) + _double_field(0x21, value)


def _histogram(histogram: Histogram) -> bytes:
    encoded = [_two_fixed64(0x11, histogram.start, 0x21, histogram.count), _double_field(0x29, histogram.sum)]
    if histogram.bounds:
        minimum, maximum, exemplar_tag = 0x59, 0x61, b"\x42"
        buckets, bounds = len(histogram.counts), len(histogram.bounds)
        encoded.append(_bytes_field(b"\x32", struct.pack(f"<{buckets}Q", *histogram.counts)))
        encoded.append(_bytes_field(b"\x3a", struct.pack(f"<{bounds}d", *histogram.bounds)))
    else:
        minimum, maximum, exemplar_tag = 0x61, 0x69, b"\x5a"
        encoded.append(b"\x30" + _zigzag(histogram.scale) + _fixed64(0x39, histogram.zero_count))
        if histogram.counts:
            counts = _bytes_field(b"\x12", b"".join([_varint(count) for count in histogram.counts]))
            encoded.append(_bytes_field(b"\x42", b"\x08" + _zigzag(histogram.offset) + counts))
    if histogram.minimum is not None and histogram.maximum is not None:
        encoded.append(_double_field(minimum, histogram.minimum) + _double_field(maximum, histogram.maximum))
    for exemplar in histogram.exemplars:
        ids = _bytes_field(b"\x22", exemplar.span_id) + _bytes_field(b"\x2a", exemplar.trace_id)
        measured = _fixed64(0x11, exemplar.time) + _double_field(0x19, exemplar.value)
        encoded.append(_bytes_field(exemplar_tag, measured + ids))
    return b"".join(encoded)


# --- traces


_LINK_FLAGS = struct.pack("<BI", 0x35, rules.HAS_IS_REMOTE)
_SPAN_FLAGS = struct.pack("<HI", 0x0185, rules.HAS_IS_REMOTE)  # field 16: a tag of two bytes


def _span(span: Span) -> bytes:
    encoded = [
        b"\x0a\x10",
        span.trace_id,
        b"\x12\x08",
        span.span_id,
        _span_name(span.name),
        _two_fixed64(0x39, span.start, 0x41, span.end),
        _key_values(b"\x4a", span.attributes),
        _SPAN_FLAGS,
    ]
    if span.dropped_attributes or span.dropped_events:
        encoded += _count(b"\x50", span.dropped_attributes), _count(b"\x60", span.dropped_events)
    if span.parent_id is not None:
        encoded += b"\x22\x08", span.parent_id
    for event in span.events:
        named = _fixed64(0x09, event.time) + _string_field(b"\x12", event.name)
        dropped = _count(b"\x20", event.dropped_attributes)
        encoded.append(_bytes_field(b"\x5a", named + _key_values(b"\x1a", event.attributes) + dropped))
    for link in span.links:
        field = link.encoded.get("protobuf")
        encoded.append(field if isinstance(field, bytes) else _link(link))
    if span.dropped_links:
        encoded.append(_count(b"\x70", span.dropped_links))
    if span.trace_state:
        encoded.append(_string_field(b"\x1a", span.trace_state))
    if span.error is not None:
        encoded.append(_bytes_field(b"\x7a", _string_field(b"\x12", span.error) + b"\x18\x02"))  # code = ERROR
    return b"".join(encoded)


@lru_cache(maxsize=1024)
def _span_name(name: str) -> bytes:
    return _string_field(b"\x2a", name) + b"\x30\x01"  # kind = INTERNAL


def _link(link: Link) -> bytes:
    """A link, which most spans of a session have in common."""
    ids = _bytes_field(b"\x0a", link.trace_id) + _bytes_field(b"\x12", link.span_id)
    rest = _string_field(b"\x1a", link.trace_state) + _count(b"\x28", link.dropped_attributes) + _LINK_FLAGS
    link.encoded["protobuf"] = field = _bytes_field(b"\x6a", ids + _key_values(b"\x22", link.attributes) + rest)
    return field


# --- logs


_LOG_FLAGS = struct.pack("<BI", 0x45, rules.SAMPLED)


def _log(log: Log) -> bytes:
    encoded = [
        _two_fixed64(0x09, log.time, 0x59, log.time),
        b"\x10" + _varint(log.severity),
        _string_field(b"\x1a", rules.SEVERITY_TEXT.get(log.severity, "")),
        _bytes_field(b"\x2a", _any_value(log.body)),
        _key_values(b"\x32", log.attributes),
        _string_field(b"\x62", log.event_name),
        _count(b"\x38", log.dropped_attributes),
    ]
    if log.trace_id is not None:
        encoded.append(_LOG_FLAGS + _bytes_field(b"\x4a", log.trace_id))
    if log.span_id is not None:
        encoded.append(_bytes_field(b"\x52", log.span_id))
    return b"".join(encoded)


# --- attributes


def _key_values(tag: bytes, attributes: Attributes, depth: int = 0) -> bytes:
    """Attributes as repeated KeyValue fields under this tag."""
    encoded: list[bytes] = []
    value: Any
    for key, value in attributes.items():
        kind = type(value)
        if kind is int and 0 <= value < MAX_SHORT_INT and len(key) <= MAX_SHORT_CHARS:
            name, digits = _key(key), _varint(value)
            size = len(digits) + 1
            encoded += tag, _ONE_BYTE[len(name) + size + 2], name, b"\x12", _ONE_BYTE[size], b"\x18", digits
        elif kind is str and len(value) <= MAX_SHORT_CHARS and len(key) <= MAX_SHORT_CHARS:
            encoded.append(_text_attribute(tag, key, value))
        elif value is not None:
            encoded.append(_bytes_field(tag, _key(key) + _bytes_field(b"\x12", _any_value(value, depth))))
    return b"".join(encoded)


@lru_cache(maxsize=4096)
def _text_attribute(tag: bytes, key: str, text: str) -> bytes:
    return _bytes_field(tag, _key(key) + _bytes_field(b"\x12", _string_field(b"\x0a", text)))


@lru_cache(maxsize=1024)
def _key(key: str) -> bytes:
    return _string_field(b"\x0a", key)


def _any_value(value: AttributeValue | None, depth: int = 0) -> bytes:
    """A value as the body of OTLP's AnyValue; what is nested too deep becomes text."""
    if isinstance(value, str):
        return _string_field(b"\x0a", value)
    if isinstance(value, bool):  # before int, which it is a kind of
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return (
            b"\x18" + _varint(value)
            if rules.INT64_MIN <= value <= rules.INT64_MAX
            else _string_field(b"\x0a", str(value))
        )
    if isinstance(value, float):
        return _double_field(0x21, value)
    if value is None:  # within a list, where leaving it out would move the others
        return b""
    if depth == rules.MAX_ATTRIBUTE_NESTING:
        return _string_field(b"\x0a", str(value))
    if isinstance(value, Mapping):
        return _bytes_field(b"\x32", _key_values(b"\x0a", value, depth + 1))
    return _bytes_field(b"\x2a", b"".join([_bytes_field(b"\x0a", _any_value(item, depth + 1)) for item in value]))


# --- protobuf's wire format
#
# A message is a sequence of fields, a field is a tag (field number << 3 | wire type) and its payload:
#
#     wire type 0  varint                        uint, int, bool, enum (sint32: zigzag first)
#     wire type 1  8 bytes, little-endian        fixed64, double
#     wire type 2  length as varint, then bytes  string, bytes, message, packed repeated scalars
#     wire type 5  4 bytes, little-endian        fixed32


_UINT64 = (1 << 64) - 1
_ONE_BYTE = [bytes([number]) for number in range(128)]
_pack_double = struct.Struct("<Bd").pack


def _bytes_field(tag: bytes, payload: bytes) -> bytes:
    """A field of wire type 2.

    Args:
        tag: The field's number and wire type, encoded.
        payload: Bytes, a message, or packed scalars.

    """
    length = len(payload)
    return tag + (_ONE_BYTE[length] if length < 0x80 else _varint(length)) + payload


def _string_field(tag: bytes, string: str) -> bytes:
    """A string field, as UTF-8; a lone surrogate becomes "?"."""
    return _bytes_field(tag, utf8(string))


def _double_field(tag: int, value: float) -> bytes:
    """A double field; every NaN is written as `rules.NAN`. `tag` is a single byte."""
    return _pack_double(tag, value if value == value else rules.NAN)


def _zigzag(number: int) -> bytes:
    """A sint32 as a varint that is short where the absolute value is small."""
    return _varint(number << 1 ^ number >> 31)


def _count(tag: bytes, number: int) -> bytes:
    """A uint32 field; nothing where it is 0."""
    return tag + _varint(number) if number else b""


def _varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; a negative number in two's complement of 64 bits."""
    if 0 <= number < 0x4000:
        return _ONE_BYTE[number] if number < 0x80 else bytes((number & 0x7F | 0x80, number >> 7))
    number &= _UINT64
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_ENCODERS: Mapping[Signal, Callable[[Any], bytes]] = {
    "metrics": _metric,
    "traces": _span,
    "logs": _log,
}
