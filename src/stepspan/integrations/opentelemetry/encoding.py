"""Objects of the OpenTelemetry SDK as the OTLP JSON that the journal keeps.

Made in the thread that ends the span or writes the log line, so each is one expression over the object's fields. Times
and 64-bit integers are strings, ids are hex, enums are numbers; numbers that are not finite are strings.
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opentelemetry.sdk._logs import ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext

from stepspan.events import Event
from stepspan.otlp.json import attributes_json, number_json, value_json

HAS_IS_REMOTE, IS_REMOTE = 0x100, 0x200
"""SpanFlags, as the official encoder writes them."""


def span(one: ReadableSpan) -> Event:
    """An ended span as the fields of an `otel` event."""
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
        record["attributes"] = attributes_json(one.attributes)
    if one.events:
        record["events"] = [
            {
                "timeUnixNano": str(event.timestamp),
                "name": event.name,
                "attributes": attributes_json(event.attributes or {}),
                **_dropped(event.dropped_attributes),
            }
            for event in one.events
        ]
    if one.links:
        record["links"] = [
            {
                **_ids(link.context),
                "attributes": attributes_json(link.attributes or {}),
                "flags": _remote(link.context),
                **_dropped(link.dropped_attributes),
            }
            for link in one.links
        ]
    if one.status.status_code.value:
        said = {"message": one.status.description} if one.status.description else {}
        record["status"] = {"code": one.status.status_code.value, **said}
    for name, count in (
        ("droppedAttributesCount", one.dropped_attributes),
        ("droppedEventsCount", one.dropped_events),
        ("droppedLinksCount", one.dropped_links),
    ):
        if count:
            record[name] = count
    return {"signal": "traces", **_scope(one.instrumentation_scope), "record": record}


def log(one: ReadWriteLogRecord | ReadableLogRecord) -> Event:
    """A log record as the fields of an `otel` event."""
    told = one.log_record
    record: dict[str, Any] = {"observedTimeUnixNano": str(told.observed_timestamp or told.timestamp)}
    if told.timestamp:
        record["timeUnixNano"] = str(told.timestamp)
    if told.severity_number is not None:
        record["severityNumber"] = told.severity_number.value
    if told.severity_text:
        record["severityText"] = told.severity_text
    if told.body is not None:
        record["body"] = value_json(told.body)
    if told.attributes:
        record["attributes"] = attributes_json(told.attributes)
    if told.event_name:
        record["eventName"] = told.event_name
    if told.trace_id:
        record.update(traceId=f"{told.trace_id:032x}", flags=int(told.trace_flags or 0))
    if told.span_id:
        record["spanId"] = f"{told.span_id:016x}"
    return {
        "signal": "logs",
        **_scope(one.instrumentation_scope),
        "record": {**record, **_dropped(one.dropped_attributes)},
    }


def metrics(data: export.MetricsData) -> Iterator[Event]:
    """Each metric of a collection as the fields of an `otel` event."""
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            about = _scope(scope.scope, scope.schema_url)
            for metric in scope.metrics:
                record = _metric(metric)
                if record is not None:
                    yield {"signal": "metrics", **about, "record": record}


def _metric(metric: export.Metric) -> dict[str, Any] | None:
    data = metric.data
    told: dict[str, Any]
    if isinstance(data, export.Gauge):
        told = {"gauge": {"dataPoints": [_number_point(point) for point in data.data_points]}}
    elif isinstance(data, export.Sum):
        points = [_number_point(point) for point in data.data_points]
        told = {"sum": {**_temporality(data), "isMonotonic": data.is_monotonic, "dataPoints": points}}
    elif isinstance(data, export.Histogram):
        told = {"histogram": {**_temporality(data), "dataPoints": [_histogram(point) for point in data.data_points]}}
    else:
        points = [_exponential(point) for point in data.data_points]
        told = {"exponentialHistogram": {**_temporality(data), "dataPoints": points}}
    if not data.data_points:
        return None
    about = {"description": metric.description or "", "unit": metric.unit or ""}
    return {"name": metric.name, **{name: text for name, text in about.items() if text}, **told}


def _number_point(point: export.NumberDataPoint) -> dict[str, Any]:
    return {**_point(point), **_number(point.value)}


def _histogram(point: export.HistogramDataPoint) -> dict[str, Any]:
    return {
        **_point(point),
        **_summary(point),
        "bucketCounts": [str(count) for count in point.bucket_counts],
        "explicitBounds": [number_json(float(bound)) for bound in point.explicit_bounds],
    }


def _exponential(point: export.ExponentialHistogramDataPoint) -> dict[str, Any]:
    sides = {"positive": point.positive, "negative": point.negative}
    return {
        **_point(point),
        **_summary(point),
        "scale": point.scale,
        "zeroCount": str(point.zero_count),
        **{
            name: {"offset": side.offset, "bucketCounts": [str(count) for count in side.bucket_counts]}
            for name, side in sides.items()
            if side.bucket_counts
        },
        **({"flags": point.flags} if point.flags else {}),
    }


def _point(point: Any) -> dict[str, Any]:
    """What data points of all kinds have."""
    told: dict[str, Any] = {"timeUnixNano": str(point.time_unix_nano)}
    if point.start_time_unix_nano:
        told["startTimeUnixNano"] = str(point.start_time_unix_nano)
    if point.attributes:
        told["attributes"] = attributes_json(point.attributes)
    if point.exemplars:
        told["exemplars"] = [_exemplar(exemplar) for exemplar in point.exemplars]
    return told


def _summary(point: Any) -> dict[str, Any]:
    told = {"count": str(point.count), "sum": number_json(float(point.sum))}
    if point.count:  # of nothing, the SDK says infinities
        told.update(min=number_json(float(point.min)), max=number_json(float(point.max)))
    return told


def _exemplar(exemplar: Any) -> dict[str, Any]:
    ids = {}
    if exemplar.trace_id:
        ids = {"traceId": f"{exemplar.trace_id:032x}", "spanId": f"{exemplar.span_id:016x}"}
    return {
        "timeUnixNano": str(exemplar.time_unix_nano),
        **_number(exemplar.value),
        **ids,
        "filteredAttributes": attributes_json(exemplar.filtered_attributes or {}),
    }


def _number(value: float) -> dict[str, Any]:
    return {"asInt": str(value)} if isinstance(value, int) else {"asDouble": number_json(value)}


def _temporality(data: Any) -> dict[str, Any]:
    return {"aggregationTemporality": int(data.aggregation_temporality)}


def _scope(scope: InstrumentationScope | None, schema_url: str | None = None) -> Event:
    if scope is None:
        return {"scope": {}}
    told: dict[str, Any] = {"name": scope.name}
    if scope.version:
        told["version"] = scope.version
    if scope.attributes:
        told["attributes"] = attributes_json(scope.attributes)
    schema_url = schema_url or scope.schema_url
    return {"scope": told, "schema_url": schema_url} if schema_url else {"scope": told}


def _ids(context: SpanContext) -> dict[str, Any]:
    state = {"traceState": context.trace_state.to_header()} if context.trace_state else {}
    return {"traceId": f"{context.trace_id:032x}", "spanId": f"{context.span_id:016x}", **state}


def _remote(context: SpanContext | None) -> int:
    return HAS_IS_REMOTE | (IS_REMOTE if context is not None and context.is_remote else 0)


def _dropped(count: int) -> dict[str, int]:
    return {"droppedAttributesCount": count} if count else {}
