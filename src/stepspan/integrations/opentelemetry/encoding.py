"""Objects of the OpenTelemetry SDK as the OTLP JSON that the journal keeps.

Made in the thread that ends the span or writes the log line, so straight from the object's fields. Times and 64-bit
integers are strings, ids are hex, enums are numbers; numbers that are not finite are strings.
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from opentelemetry.sdk._logs import ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext

from stepspan.events import Event
from stepspan.otlp.json import any_value, key_values
from stepspan.otlp.rules import HAS_IS_REMOTE, IS_REMOTE
from stepspan.values import json_number


def span(one: ReadableSpan) -> Event:
    """The fields of an `otel` event for a span that has ended."""
    context, parent = one.get_span_context(), one.parent
    assert context is not None
    record: dict[str, Any] = {
        **_ids(context),
        "name": one.name,
        "kind": one.kind.value + 1,  # OTLP has 0 for "unspecified"
        "startTimeUnixNano": str(one.start_time),
        "endTimeUnixNano": str(one.end_time),
        "flags": _remote(parent),
    }
    if parent is not None:
        record["parentSpanId"] = f"{parent.span_id:016x}"
    if one.attributes:
        record["attributes"] = key_values(one.attributes)
    if one.events:
        record["events"] = [
            {
                "timeUnixNano": str(event.timestamp),
                "name": event.name,
                "attributes": key_values(event.attributes or {}),
                **_dropped(event.dropped_attributes),
            }
            for event in one.events
        ]
    if one.links:
        record["links"] = [
            {
                **_ids(link.context),
                "attributes": key_values(link.attributes or {}),
                "flags": _remote(link.context),
                **_dropped(link.dropped_attributes),
            }
            for link in one.links
        ]
    if one.status.status_code.value:
        record["status"] = {"code": one.status.status_code.value}
        if one.status.description:
            record["status"]["message"] = one.status.description
    for name, count in (
        ("droppedAttributesCount", one.dropped_attributes),
        ("droppedEventsCount", one.dropped_events),
        ("droppedLinksCount", one.dropped_links),
    ):
        if count:
            record[name] = count
    return {"signal": "traces", **_scope(one.instrumentation_scope), "record": record}


def log(one: ReadWriteLogRecord | ReadableLogRecord) -> Event:
    """The fields of an `otel` event for a log record."""
    given = one.log_record
    record: dict[str, Any] = {"observedTimeUnixNano": str(given.observed_timestamp or given.timestamp)}
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
    record.update(_dropped(one.dropped_attributes))
    return {"signal": "logs", **_scope(one.instrumentation_scope), "record": record}


def metrics(data: export.MetricsData) -> Iterator[Event]:
    """The fields of an `otel` event for each metric of a collection that has points."""
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            origin = _scope(scope.scope, scope.schema_url)
            for metric in scope.metrics:
                record = _metric(metric)
                if record is not None:
                    yield {"signal": "metrics", **origin, "record": record}


def _metric(metric: export.Metric) -> dict[str, Any] | None:
    data = metric.data
    if not data.data_points:
        return None
    record: dict[str, Any] = {"name": metric.name}
    if metric.description:
        record["description"] = metric.description
    if metric.unit:
        record["unit"] = metric.unit
    field, encode_point = _POINTS[type(data)]
    encoded: dict[str, Any] = {"dataPoints": [encode_point(point) for point in data.data_points]}
    if not isinstance(data, export.Gauge):
        encoded["aggregationTemporality"] = int(data.aggregation_temporality)
    if isinstance(data, export.Sum):
        encoded["isMonotonic"] = data.is_monotonic
    return {**record, field: encoded}


def _number_point(point: export.NumberDataPoint) -> dict[str, Any]:
    return {**_point(point), **_number_value(point.value)}


def _histogram(point: export.HistogramDataPoint) -> dict[str, Any]:
    return {
        **_point(point),
        **_summary(point),
        "bucketCounts": [str(count) for count in point.bucket_counts],
        "explicitBounds": [json_number(float(bound)) for bound in point.explicit_bounds],
    }


def _exponential(point: export.ExponentialHistogramDataPoint) -> dict[str, Any]:
    record = {**_point(point), **_summary(point), "scale": point.scale, "zeroCount": str(point.zero_count)}
    for name, side in (("positive", point.positive), ("negative", point.negative)):
        if side.bucket_counts:
            record[name] = {"offset": side.offset, "bucketCounts": [str(count) for count in side.bucket_counts]}
    if point.flags:
        record["flags"] = point.flags
    return record


_POINTS: Mapping[type, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    export.Gauge: ("gauge", _number_point),
    export.Sum: ("sum", _number_point),
    export.Histogram: ("histogram", _histogram),
    export.ExponentialHistogram: ("exponentialHistogram", _exponential),
}
"""A metric's data -> its field in OTLP, and what encodes one of its points."""


def _point(point: Any) -> dict[str, Any]:
    """The fields of data points of all kinds."""
    record: dict[str, Any] = {"timeUnixNano": str(point.time_unix_nano)}
    if point.start_time_unix_nano:
        record["startTimeUnixNano"] = str(point.start_time_unix_nano)
    if point.attributes:
        record["attributes"] = key_values(point.attributes)
    if point.exemplars:
        record["exemplars"] = [_exemplar(exemplar) for exemplar in point.exemplars]
    return record


def _summary(point: Any) -> dict[str, Any]:
    """The fields of both kinds of histogram."""
    record = {"count": str(point.count), "sum": json_number(float(point.sum))}
    if point.count:  # of nothing, the SDK's minimum and maximum are infinite
        record.update(min=json_number(float(point.min)), max=json_number(float(point.max)))
    return record


def _exemplar(exemplar: Any) -> dict[str, Any]:
    record = {"timeUnixNano": str(exemplar.time_unix_nano), **_number_value(exemplar.value)}
    if exemplar.trace_id:
        record.update(traceId=f"{exemplar.trace_id:032x}", spanId=f"{exemplar.span_id:016x}")
    record["filteredAttributes"] = key_values(exemplar.filtered_attributes or {})
    return record


def _number_value(value: float) -> dict[str, Any]:
    return {"asInt": str(value)} if isinstance(value, int) else {"asDouble": json_number(value)}


def _scope(scope: InstrumentationScope | None, schema_url: str | None = None) -> Event:
    if scope is None:
        return {"scope": {}}
    encoded: dict[str, Any] = {"name": scope.name}
    if scope.version:
        encoded["version"] = scope.version
    if scope.attributes:
        encoded["attributes"] = key_values(scope.attributes)
    schema_url = schema_url or scope.schema_url
    return {"scope": encoded, "schema_url": schema_url} if schema_url else {"scope": encoded}


def _ids(context: SpanContext) -> dict[str, Any]:
    state = {"traceState": context.trace_state.to_header()} if context.trace_state else {}
    return {"traceId": f"{context.trace_id:032x}", "spanId": f"{context.span_id:016x}", **state}


def _remote(context: SpanContext | None) -> int:
    return HAS_IS_REMOTE | (IS_REMOTE if context is not None and context.is_remote else 0)


def _dropped(count: int) -> dict[str, int]:
    return {"droppedAttributesCount": count} if count else {}
