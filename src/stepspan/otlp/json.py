"""Neutral records -> OTLP/JSON: the body of one Export*ServiceRequest, which is also a line of the OTLP file format.

OTLP's JSON is proto3 JSON with changes of its own: ids are hex (base64 gets a 400), enums are integers, keys are
lowerCamelCase; as in proto3 JSON 64-bit integers are strings and so are "NaN", "Infinity" and "-Infinity".
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding

Points are what there are most of, so a series' finite gauge points are not built as objects at all: orjson writes all
its times and all its values, and the digits are joined with the bytes that every point of the series shares (0.2 µs
a point, against 0.3 with a dict each and 0.6 with formatting).
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, isnan
from typing import Any, cast

import orjson

from stepspan._version import __version__
from stepspan.mapping.columns import Column
from stepspan.mapping.records import (
    Attributes,
    Exemplar,
    Histogram,
    Link,
    Log,
    Point,
    Record,
    SdkRecord,
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
    NO_RECORDED_VALUE,
    SAMPLED,
    SCOPE_NAME,
    SEVERITY_TEXT,
    SPAN_FLAGS,
    MetricKey,
    by_metric,
    partition,
    utf8,
)

_Json = dict[str, Any]
_Encoded = tuple[list[_Json], list[SdkRecord]]
"""Our own records, and what is another SDK's."""

_CUMULATIVE = 2
_KIND_INTERNAL = 1
_STATUS_ERROR = 2

_DATA: dict[str, tuple[str, _Json]] = {
    "gauge": ("gauge", {}),
    "sum": ("sum", {"aggregationTemporality": _CUMULATIVE, "isMonotonic": True}),
    "histogram": ("exponentialHistogram", {"aggregationTemporality": _CUMULATIVE}),
}
"""A series' kind -> the metric's data field, and what stands in it beside the points."""


def encode(signal: Signal, resource: Attributes, records: Sequence[Record]) -> bytes:
    """The request body for records of one signal of one session.

    Points come in time order, mixed over series; each series leaves in time order.
    """
    resource_field, scope_field, records_field, encode_records = _ENVELOPE[signal]
    ours, foreign = encode_records(records)
    scopes = []
    if ours or not foreign:
        scopes.append({"scope": {"name": SCOPE_NAME, "version": __version__}, records_field: ours})
    if foreign:
        from stepspan.otlp.sdk_records import scopes_of

        scopes += scopes_of(signal, foreign)
    return _dumps({resource_field: [{"resource": {"attributes": attributes_json(resource)}, scope_field: scopes}]})


def _metrics(records: Sequence[Record]) -> _Encoded:
    metrics, foreign = by_metric(cast("Sequence[Point | SdkRecord]", records))
    written: dict[int, list[bytes]] = {}
    return [_metric(key, columns, written) for key, columns in metrics.items()], foreign


def _metric(key: MetricKey, columns: list[Column], written: dict[int, list[bytes]]) -> _Json:
    """`written`: times that columns share, by their id, as they were written for another one."""
    name, unit, kind = key
    field, data = _DATA[kind]
    points = b",".join([_points(*column, written) for column in columns])
    metric: _Json = {"name": name, field: {"dataPoints": orjson.Fragment(b"[" + points + b"]"), **data}}
    if unit:
        metric["unit"] = unit
    if description := columns[0][0].description:
        metric["description"] = description
    return metric


def _points(series: Series, times: Sequence[int], values: Sequence[Any], written: dict[int, list[bytes]]) -> bytes:
    """A series' data points, separated by commas."""
    attributes = _series_attributes(series)
    if series.kind == "gauge":
        digits = orjson.dumps(values)
        if b"null" not in digits:  # orjson's word for None, NaN and infinities alike
            if id(times) not in written:
                written[id(times)] = orjson.dumps(times)[1:-1].split(b",")
            return _finite_gauge_points(attributes, written[id(times)], digits[1:-1].split(b","))
    shared = {"attributes": orjson.Fragment(attributes)}
    return _dumps([_point(time, value) | shared for time, value in zip(times, values, strict=True)])[1:-1]


def _finite_gauge_points(attributes: bytes, times: list[bytes], values: list[bytes]) -> bytes:
    """The digits of numbers become the points: every fourth piece is a time, every fourth a value."""
    pieces = [b'","asDouble":'] * (4 * len(times))
    pieces[0::4] = times
    pieces[2::4] = values
    pieces[3::4] = [b',"attributes":' + attributes + b'},{"timeUnixNano":"'] * len(times)
    pieces[-1] = b',"attributes":' + attributes + b"}"
    return b'{"timeUnixNano":"' + b"".join(pieces)


def _series_attributes(series: Series) -> bytes:
    cached = series.encoded.get("json")
    if not isinstance(cached, bytes):
        cached = series.encoded["json"] = _dumps(attributes_json(series.attributes))
    return cached


def _point(time: int, value: float | Sum | Histogram | None) -> _Json:
    point: _Json = {"timeUnixNano": str(time)}
    if value is None:
        point["flags"] = NO_RECORDED_VALUE
    elif isinstance(value, Sum):
        point.update(startTimeUnixNano=str(value.start), asDouble=number_json(value.value))
    elif isinstance(value, Histogram):
        point.update(_histogram(value))
    else:
        point["asDouble"] = number_json(value)
    return point


def _histogram(histogram: Histogram) -> _Json:
    point: _Json = {
        "startTimeUnixNano": str(histogram.start),
        "count": str(histogram.count),
        "sum": number_json(histogram.sum),
        "min": number_json(histogram.minimum),
        "max": number_json(histogram.maximum),
        "scale": histogram.scale,
        "zeroCount": str(histogram.zero_count),
    }
    if histogram.counts:
        point["positive"] = {"offset": histogram.offset, "bucketCounts": [str(count) for count in histogram.counts]}
    if histogram.exemplars:
        point["exemplars"] = [_exemplar(exemplar) for exemplar in histogram.exemplars]
    return point


def _exemplar(exemplar: Exemplar) -> _Json:
    return {
        "timeUnixNano": str(exemplar.time),
        "asDouble": number_json(exemplar.value),
        "traceId": exemplar.trace_id.hex(),
        "spanId": exemplar.span_id.hex(),
    }


def _spans(records: Sequence[Record]) -> _Encoded:
    spans, foreign = partition(records)
    return [_span(span) for span in cast("Sequence[Span]", spans)], foreign


def _span(span: Span) -> _Json:
    encoded: _Json = {
        "traceId": span.trace_id.hex(),
        "spanId": span.span_id.hex(),
        "name": span.name,
        "kind": _KIND_INTERNAL,
        "startTimeUnixNano": str(span.start),
        "endTimeUnixNano": str(span.end),
        "attributes": attributes_json(span.attributes),
        "flags": SPAN_FLAGS,
    }
    if span.parent_id is not None:
        encoded["parentSpanId"] = span.parent_id.hex()
    if span.events:
        encoded["events"] = [_event(event) for event in span.events]
    if span.links:
        encoded["links"] = [_link(link) for link in span.links]
    if span.error is not None:
        encoded["status"] = {"code": _STATUS_ERROR, "message": span.error}
    return encoded


def _event(event: SpanEvent) -> _Json:
    return {"timeUnixNano": str(event.time), "name": event.name, "attributes": attributes_json(event.attributes)}


def _link(link: Link) -> _Json:
    return {
        "traceId": link.trace_id.hex(),
        "spanId": link.span_id.hex(),
        "attributes": attributes_json(link.attributes),
        "flags": SPAN_FLAGS,
    }


def _logs(records: Sequence[Record]) -> _Encoded:
    logs, foreign = partition(records)
    return [_log(log) for log in cast("Sequence[Log]", logs)], foreign


def _log(log: Log) -> _Json:
    time = str(log.time)
    encoded: _Json = {
        "timeUnixNano": time,
        "observedTimeUnixNano": time,
        "severityNumber": log.severity,
        "severityText": SEVERITY_TEXT.get(log.severity, ""),
        "body": value_json(log.body),
        "eventName": log.event_name,
        "attributes": attributes_json(log.attributes),
    }
    if log.trace_id is not None:
        encoded.update(traceId=log.trace_id.hex(), flags=SAMPLED)
    if log.span_id is not None:
        encoded["spanId"] = log.span_id.hex()
    return encoded


def attributes_json(attributes: Mapping[str, Any], depth: int = 0) -> list[_Json]:
    """KeyValue objects; what is None is left out."""
    return [{"key": key, "value": value_json(value, depth)} for key, value in attributes.items() if value is not None]


def value_json(value: Any, depth: int = 0) -> _Json:
    """An AnyValue."""
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):  # before int, which it is a kind of
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if INT64_MIN <= value <= INT64_MAX else {"stringValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": number_json(value)}
    if value is None:  # within a list, where leaving it out would move the others
        return {}
    if isinstance(value, bytes):  # of other instrumentation: our own records hold none
        return {"bytesValue": b64encode(value).decode()}
    if depth == MAX_DEPTH:
        return {"stringValue": str(value)}
    if isinstance(value, Mapping):
        return {"kvlistValue": {"values": attributes_json(value, depth + 1)}}
    return {"arrayValue": {"values": [value_json(item, depth + 1) for item in value]}}


def number_json(value: float) -> float | str:
    """A double: one that is not finite is a string."""
    if isfinite(value):
        return value
    return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _dumps(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate somewhere: rare, so only then is every string looked at
        return orjson.dumps(_readable(value))


def _readable(value: object) -> object:
    if isinstance(value, str):
        return utf8(value).decode()
    if isinstance(value, dict):
        return {_readable(key): _readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return value


_ENVELOPE: dict[Signal, tuple[str, str, str, Callable[[Sequence[Record]], _Encoded]]] = {
    "metrics": ("resourceMetrics", "scopeMetrics", "metrics", _metrics),
    "traces": ("resourceSpans", "scopeSpans", "spans", _spans),
    "logs": ("resourceLogs", "scopeLogs", "logRecords", _logs),
}
"""Signal -> the fields around its records, and what writes them."""
