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
from typing import Any

import orjson

from stepspan._version import __version__
from stepspan.mapping.records import Attributes, Histogram, Log, Record, Series, Signal, Span, Sum
from stepspan.otlp import rules
from stepspan.values import json_number, utf8

_Json = dict[str, Any]
_DELTA, _CUMULATIVE = 1, 2
_KIND_INTERNAL = 1
_STATUS_ERROR = 2

_DATA: dict[str, tuple[str, _Json]] = {
    "gauge": ("gauge", {}),
    "sum": ("sum", {"aggregationTemporality": _CUMULATIVE, "isMonotonic": True}),
    "histogram": ("exponentialHistogram", {"aggregationTemporality": _CUMULATIVE}),
    "explicit_histogram": ("histogram", {"aggregationTemporality": _CUMULATIVE}),
    "delta_sum": ("sum", {"aggregationTemporality": _DELTA, "isMonotonic": True}),
    "delta_histogram": ("exponentialHistogram", {"aggregationTemporality": _DELTA}),
    "delta_explicit_histogram": ("histogram", {"aggregationTemporality": _DELTA}),
}
"""A series' kind -> the metric's data field, and what it holds in addition to the points."""


def encode(signal: Signal, resource: Attributes, records: Sequence[Record]) -> bytes:
    """Encode records of one signal of one session as a request body in JSON.

    Args:
        signal: The signal of all records.
        resource: The attributes of the session's Resource.
        records: Points come in time order, mixed over series; each series leaves in time order.

    Returns:
        The body of an Export*ServiceRequest, not compressed.

    """
    fields = rules.FIELDS[signal]
    own, sdk_records = rules.partition(signal, records)
    scopes = []
    if own or not sdk_records:
        scope = {"name": rules.SCOPE_NAME, "version": __version__}
        scopes.append({"scope": scope, fields.records: _ENCODERS[signal](own)})
    if sdk_records:
        from stepspan.otlp.sdk_records import scopes_of

        scopes += scopes_of(signal, sdk_records)
    return _dumps({fields.resources: [{"resource": {"attributes": key_values(resource)}, fields.scopes: scopes}]})


def join(signal: Signal, requests: Sequence[bytes]) -> bytes:
    """Requests of several sessions as one: their resources in one array.

    Args:
        signal: The signal of all of them.
        requests: At least one, from `encode`.

    """
    begin, end = b'{"%b":[' % rules.FIELDS[signal].resources.encode(), b"]}"
    return begin + b",".join([request[len(begin) : -len(end)] for request in requests]) + end


def _metrics(metrics: list[rules.Metric]) -> list[_Json]:
    written: dict[int, list[bytes]] = {}
    return [_metric(metric, written) for metric in metrics]


def _metric(metric: rules.Metric, written: dict[int, list[bytes]]) -> _Json:
    """One metric. `written`: the digits of times that columns share, by the id of the times."""
    (name, unit, kind), columns = metric
    field, data = _DATA[kind]
    points = b",".join([_points(*column, written) for column in columns])
    encoded: _Json = {"name": name, field: {"dataPoints": orjson.Fragment(b"[" + points + b"]"), **data}}
    if unit:
        encoded["unit"] = unit
    if description := columns[0][0].description:
        encoded["description"] = description
    return encoded


def _points(series: Series, times: Sequence[int], values: Sequence[Any], written: dict[int, list[bytes]]) -> bytes:
    """A series' data points, separated by commas."""
    attributes = series.encoded.get("json")
    if not isinstance(attributes, bytes):
        attributes = series.encoded["json"] = _dumps(key_values(series.attributes))
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


def _point(time: int, value: float | Sum | Histogram | None) -> _Json:
    point: _Json = {"timeUnixNano": str(time)}
    if value is None:
        point["flags"] = rules.NO_RECORDED_VALUE
    elif isinstance(value, Sum):
        point.update(startTimeUnixNano=str(value.start), asDouble=json_number(value.value))
    elif isinstance(value, Histogram):
        point.update(_histogram(value))
    else:
        point["asDouble"] = json_number(value)
    return point


def _histogram(histogram: Histogram) -> _Json:
    point: _Json = {
        "startTimeUnixNano": str(histogram.start),
        "count": str(histogram.count),
        "sum": json_number(histogram.sum),
    }
    if histogram.minimum is not None and histogram.maximum is not None:
        point.update(min=json_number(histogram.minimum), max=json_number(histogram.maximum))
    if histogram.bounds:
        point.update(bucketCounts=[str(count) for count in histogram.counts], explicitBounds=list(histogram.bounds))
    else:
        point.update(scale=histogram.scale, zeroCount=str(histogram.zero_count))
    if histogram.counts and not histogram.bounds:
        point["positive"] = {"offset": histogram.offset, "bucketCounts": [str(count) for count in histogram.counts]}
    if histogram.exemplars:
        point["exemplars"] = [
            {
                "timeUnixNano": str(exemplar.time),
                "asDouble": json_number(exemplar.value),
                "traceId": exemplar.trace_id.hex(),
                "spanId": exemplar.span_id.hex(),
            }
            for exemplar in histogram.exemplars
        ]
    return point


def _span(span: Span) -> _Json:
    encoded: _Json = {
        "traceId": span.trace_id.hex(),
        "spanId": span.span_id.hex(),
        "name": span.name,
        "kind": _KIND_INTERNAL,
        "startTimeUnixNano": str(span.start),
        "endTimeUnixNano": str(span.end),
        "attributes": key_values(span.attributes),
        "flags": rules.HAS_IS_REMOTE,
    }
    if span.parent_id is not None:
        encoded["parentSpanId"] = span.parent_id.hex()
    if span.events:
        encoded["events"] = [
            {
                "timeUnixNano": str(event.time),
                "name": event.name,
                "attributes": key_values(event.attributes),
                **({"droppedAttributesCount": event.dropped_attributes} if event.dropped_attributes else {}),
            }
            for event in span.events
        ]
    if span.links:
        encoded["links"] = [
            {
                "traceId": link.trace_id.hex(),
                "spanId": link.span_id.hex(),
                "attributes": key_values(link.attributes),
                "flags": rules.HAS_IS_REMOTE,
                **({"traceState": link.trace_state} if link.trace_state else {}),
                **({"droppedAttributesCount": link.dropped_attributes} if link.dropped_attributes else {}),
            }
            for link in span.links
        ]
    if span.dropped_attributes:
        encoded["droppedAttributesCount"] = span.dropped_attributes
    if span.dropped_events:
        encoded["droppedEventsCount"] = span.dropped_events
    if span.dropped_links:
        encoded["droppedLinksCount"] = span.dropped_links
    if span.trace_state:
        encoded["traceState"] = span.trace_state
    if span.error is not None:
        encoded["status"] = {"code": _STATUS_ERROR, "message": span.error}
    return encoded


def _log(log: Log) -> _Json:
    time = str(log.time)
    encoded: _Json = {
        "timeUnixNano": time,
        "observedTimeUnixNano": time,
        "severityNumber": log.severity,
        "severityText": rules.SEVERITY_TEXT.get(log.severity, ""),
        "body": any_value(log.body),
        "eventName": log.event_name,
        "attributes": key_values(log.attributes),
    }
    if log.dropped_attributes:
        encoded["droppedAttributesCount"] = log.dropped_attributes
    if log.trace_id is not None:
        encoded.update(traceId=log.trace_id.hex(), flags=rules.SAMPLED)
    if log.span_id is not None:
        encoded["spanId"] = log.span_id.hex()
    return encoded


def key_values(attributes: Mapping[str, Any], depth: int = 0) -> list[_Json]:
    """Attributes as KeyValue objects. What is None is left out.

    Args:
        attributes: Name -> value, as `any_value` takes it.
        depth: How many values it lies in, for the recursion.

    """
    return [{"key": key, "value": any_value(value, depth)} for key, value in attributes.items() if value is not None]


def any_value(value: Any, depth: int = 0) -> _Json:
    """A value as an AnyValue.

    Args:
        value: Text, a boolean, a number, bytes, a mapping, a sequence, or None within a sequence. An integer beyond
            64 bits and what is nested deeper than `rules.MAX_ATTRIBUTE_NESTING` become text.
        depth: How many values it lies in, for the recursion.

    """
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):  # before int, which it is a kind of
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if rules.INT64_MIN <= value <= rules.INT64_MAX else {"stringValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": json_number(value)}
    if value is None:  # within a list, where leaving it out would move the others
        return {}
    if isinstance(value, bytes):  # of other instrumentation: our own records hold none
        return {"bytesValue": b64encode(value).decode()}
    if depth == rules.MAX_ATTRIBUTE_NESTING:
        return {"stringValue": str(value)}
    if isinstance(value, Mapping):
        return {"kvlistValue": {"values": key_values(value, depth + 1)}}
    return {"arrayValue": {"values": [any_value(item, depth + 1) for item in value]}}


def _dumps(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate somewhere: rare, so only then is every string looked at
        return orjson.dumps(_without_surrogates(value))


def _without_surrogates(value: object) -> object:
    if isinstance(value, str):
        return utf8(value).decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    return value


_ENCODERS: Mapping[Signal, Callable[[list[Any]], list[_Json]]] = {
    "metrics": _metrics,
    "traces": lambda spans: [_span(span) for span in spans],
    "logs": lambda logs: [_log(log) for log in logs],
}
