"""Objects of the OpenTelemetry SDK as the OTLP JSON that the journal keeps.

Made in the thread that ends the span or writes the log line, so straight from the object's fields. Times and 64-bit
integers are strings, ids are hex, enums are numbers; numbers that are not finite are strings. Optional fields that are
0, "" or empty are left out, as proto3 leaves them out.
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from opentelemetry.sdk._logs import ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext

from stepspan.events import Event
from stepspan.otlp.json import any_value, key_values
from stepspan.otlp.rules import HAS_IS_REMOTE, IS_REMOTE
from stepspan.values import json_number

_Json: TypeAlias = dict[str, Any]
_Fields: TypeAlias = tuple[tuple[str, str, Callable[[Any], Any]], ...]
"""Optional fields: an attribute of the SDK's object, the field of OTLP, and what encodes the value."""


def span(one: ReadableSpan) -> Event:
    """The fields of an `otel` event for a span that has ended."""
    context, parent = one.get_span_context(), one.parent
    assert context is not None
    record: _Json = {
        **_ids(context),
        "name": one.name,
        "kind": one.kind.value + 1,  # OTLP has 0 for "unspecified"
        "startTimeUnixNano": str(one.start_time),
        "endTimeUnixNano": str(one.end_time),
        "flags": _remote(parent),
        **_encoded(one, _SPAN),
    }
    if parent is not None:
        record["parentSpanId"] = f"{parent.span_id:016x}"
    if one.status.status_code.value:
        record["status"] = {"code": one.status.status_code.value, **_encoded(one.status, _STATUS)}
    return {"signal": "traces", **_scope(one.instrumentation_scope), "record": record}


def log(one: ReadWriteLogRecord | ReadableLogRecord) -> Event:
    """The fields of an `otel` event for a log record."""
    given = one.log_record
    record: _Json = {"observedTimeUnixNano": str(given.observed_timestamp or given.timestamp)}
    if given.timestamp:
        record["timeUnixNano"] = str(given.timestamp)
    if given.severity_number is not None:
        record["severityNumber"] = given.severity_number.value
    if given.severity_text:
        record["severityText"] = given.severity_text
    if given.body is not None:
        record["body"] = any_value(given.body)
    if given.attributes:
        record["attributes"] = key_values(given.attributes)
    if given.event_name:
        record["eventName"] = given.event_name
    if given.trace_id:
        record.update(traceId=f"{given.trace_id:032x}", flags=int(given.trace_flags or 0))
    if given.span_id:
        record["spanId"] = f"{given.span_id:016x}"
    if one.dropped_attributes:
        record["droppedAttributesCount"] = one.dropped_attributes
    return {"signal": "logs", **_scope(one.instrumentation_scope), "record": record}


def metrics(data: export.MetricsData) -> Iterator[Event]:
    """The fields of an `otel` event for each metric of a collection that has points."""
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            origin = _scope(scope.scope, scope.schema_url)
            for metric in scope.metrics:
                if metric.data.data_points:
                    yield {"signal": "metrics", **origin, "record": _metric(metric)}


def _metric(metric: export.Metric) -> _Json:
    data = metric.data
    field, encode_point = _POINTS[type(data)]
    encoded: _Json = {"dataPoints": [encode_point(point) for point in data.data_points]}
    if not isinstance(data, export.Gauge):
        encoded["aggregationTemporality"] = int(data.aggregation_temporality)
    if isinstance(data, export.Sum):
        encoded["isMonotonic"] = data.is_monotonic
    return {"name": metric.name, **_encoded(metric, _METRIC), field: encoded}


def _point(point: Any) -> _Json:
    return {"timeUnixNano": str(point.time_unix_nano), **_encoded(point, _POINT)}


def _number_point(point: export.NumberDataPoint) -> _Json:
    return {**_point(point), **_number_value(point.value)}


def _histogram(point: export.HistogramDataPoint | export.ExponentialHistogramDataPoint) -> _Json:
    record = {**_point(point), "count": str(point.count), "sum": json_number(float(point.sum))}
    if point.count:  # of nothing, the SDK's minimum and maximum are infinite
        record.update(min=json_number(float(point.min)), max=json_number(float(point.max)))
    return record


def _explicit(point: export.HistogramDataPoint) -> _Json:
    bounds = [json_number(float(bound)) for bound in point.explicit_bounds]
    return {**_histogram(point), "bucketCounts": _strings(point.bucket_counts), "explicitBounds": bounds}


def _exponential(point: export.ExponentialHistogramDataPoint) -> _Json:
    record = {**_histogram(point), "scale": point.scale, "zeroCount": str(point.zero_count), "flags": point.flags}
    for name, side in (("positive", point.positive), ("negative", point.negative)):
        if side.bucket_counts:
            record[name] = {"offset": side.offset, "bucketCounts": _strings(side.bucket_counts)}
    return record


_POINTS: Mapping[type, tuple[str, Callable[[Any], _Json]]] = {
    export.Gauge: ("gauge", _number_point),
    export.Sum: ("sum", _number_point),
    export.Histogram: ("histogram", _explicit),
    export.ExponentialHistogram: ("exponentialHistogram", _exponential),
}
"""A metric's data -> its field in OTLP, and what encodes one of its points."""


def _exemplar(exemplar: Any) -> _Json:
    time = str(exemplar.time_unix_nano)
    return {"timeUnixNano": time, **_number_value(exemplar.value), **_encoded(exemplar, _EXEMPLAR)}


def _number_value(value: float) -> _Json:
    return {"asInt": str(value)} if isinstance(value, int) else {"asDouble": json_number(value)}


def _span_event(event: Any) -> _Json:
    return {"timeUnixNano": str(event.timestamp), "name": event.name, **_encoded(event, _ATTRIBUTES)}


def _link(link: Any) -> _Json:
    return {**_ids(link.context), "flags": _remote(link.context), **_encoded(link, _ATTRIBUTES)}


def _scope(scope: InstrumentationScope | None, schema_url: str | None = None) -> Event:
    if scope is None:
        return {"scope": {}}
    schema_url = schema_url or scope.schema_url
    encoded: _Json = {"name": scope.name}
    if scope.version:
        encoded["version"] = scope.version
    if scope.attributes:
        encoded["attributes"] = key_values(scope.attributes)
    return {"scope": encoded, "schema_url": schema_url} if schema_url else {"scope": encoded}


def _ids(context: SpanContext) -> _Json:
    state = {"traceState": context.trace_state.to_header()} if context.trace_state else {}
    return {"traceId": f"{context.trace_id:032x}", "spanId": f"{context.span_id:016x}", **state}


def _remote(context: SpanContext | None) -> int:
    return HAS_IS_REMOTE | (IS_REMOTE if context is not None and context.is_remote else 0)


def _encoded(source: Any, fields: _Fields) -> _Json:
    return {name: encode(value) for attribute, name, encode in fields if (value := getattr(source, attribute))}


def _strings(counts: Any) -> list[str]:
    return [str(count) for count in counts]


def _each(encode: Callable[[Any], _Json]) -> Callable[[Any], list[_Json]]:
    return lambda items: [encode(item) for item in items]


_ATTRIBUTES: _Fields = (
    ("attributes", "attributes", key_values),
    ("dropped_attributes", "droppedAttributesCount", int),
)
_SPAN: _Fields = (
    *_ATTRIBUTES,
    ("events", "events", _each(_span_event)),
    ("links", "links", _each(_link)),
    ("dropped_events", "droppedEventsCount", int),
    ("dropped_links", "droppedLinksCount", int),
)
_STATUS: _Fields = (("description", "message", str),)
_METRIC: _Fields = (("description", "description", str), ("unit", "unit", str))
_POINT: _Fields = (
    ("start_time_unix_nano", "startTimeUnixNano", str),
    ("attributes", "attributes", key_values),
    ("exemplars", "exemplars", _each(_exemplar)),
)
_EXEMPLAR: _Fields = (
    ("trace_id", "traceId", "{:032x}".format),
    ("span_id", "spanId", "{:016x}".format),
    ("filtered_attributes", "filteredAttributes", key_values),
)
