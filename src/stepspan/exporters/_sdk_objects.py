"""Neutral records -> the OpenTelemetry SDK's own objects, for any SpanExporter, MetricExporter or LogRecordExporter.

They come from the request that `stepspan.otlp.json` writes, so that a record is the same telemetry here as over OTLP.
What the SDK has no room for is left out: flags of number points (hence points that say "no recorded value"), dropped
counts, and summaries.

The one file that imports `opentelemetry._logs` and `opentelemetry.sdk._logs`, whose names may still move. Importing
the SDK costs 0.1 s: import this module late.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import orjson
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.metrics import Exemplar, export
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from stepspan.mapping.records import METRIC_DATA, Attributes, Log, Point, Record, SdkRecord, Signal, Span
from stepspan.otlp.json import encode
from stepspan.otlp.rules import FIELDS, IS_REMOTE, NAN, NO_RECORDED_VALUE, SAMPLED

_Json: TypeAlias = Mapping[str, Any]


def metrics_data(resource: Attributes, points: Sequence[Point | SdkRecord]) -> export.MetricsData:
    """What `MetricExporter.export` takes. Points without a value are left out, and metrics without a point."""
    sdk_resource, scopes = _request("metrics", resource, points)
    return export.MetricsData([export.ResourceMetrics(sdk_resource, [_scope_metrics(scope) for scope in scopes], "")])


def readable_spans(resource: Attributes, spans: Sequence[Span | SdkRecord]) -> list[ReadableSpan]:
    """What `SpanExporter.export` takes: by scope, our own first, then in their order."""
    sdk_resource, scopes = _request("traces", resource, spans)
    return [
        _span(sdk_resource, sdk_scope, span)
        for scope in scopes
        for sdk_scope in [_scope(scope)]
        for span in scope["spans"]
    ]


def log_records(resource: Attributes, logs: Sequence[Log | SdkRecord]) -> list[ReadableLogRecord]:
    """What `LogRecordExporter.export` takes: by scope, our own first, then in their order."""
    sdk_resource, scopes = _request("logs", resource, logs)
    return [
        ReadableLogRecord(_log(log), sdk_resource, sdk_scope)
        for scope in scopes
        for sdk_scope in [_scope(scope)]
        for log in scope["logRecords"]
    ]


def _request(signal: Signal, resource: Attributes, records: Sequence[Record]) -> tuple[Resource, list[_Json]]:
    """The resource of the request for these records, and its scopes in OTLP JSON."""
    fields = FIELDS[signal]
    (entry,) = orjson.loads(encode(signal, resource, records))[fields.resources]
    # Not Resource.create: it would add what detectors find on this machine.
    return Resource(_attributes(entry["resource"])), entry[fields.scopes]


def _scope(scope: _Json) -> InstrumentationScope:
    described = scope["scope"]
    return InstrumentationScope(
        described.get("name", ""), described.get("version"), scope.get("schemaUrl"), _attributes(described)
    )


def _span(resource: Resource, scope: InstrumentationScope, span: _Json) -> ReadableSpan:
    status = span.get("status", {})
    parent = span.get("parentSpanId")
    return ReadableSpan(
        name=span.get("name", ""),
        context=_context(span),
        parent=_context({"traceId": span["traceId"], "spanId": parent}, _is_remote(span)) if parent else None,
        resource=resource,
        attributes=_attributes(span),
        events=[
            Event(event.get("name", ""), _attributes(event), int(event["timeUnixNano"]))
            for event in span.get("events", ())
        ],
        links=[trace.Link(_context(link, _is_remote(link)), _attributes(link)) for link in span.get("links", ())],
        kind=trace.SpanKind(max(0, int(span.get("kind", 1)) - 1)),
        status=trace.Status(trace.StatusCode(int(status.get("code", 0))), status.get("message") or None),
        start_time=int(span["startTimeUnixNano"]),
        end_time=int(span["endTimeUnixNano"]),
        instrumentation_scope=scope,
    )


def _log(log: _Json) -> LogRecord:
    # Never an empty Context(): it is falsy, and LogRecord takes the calling thread's current span instead.
    span = trace.NonRecordingSpan(_context(log)) if log.get("traceId") else trace.INVALID_SPAN
    severity = log.get("severityNumber")
    return LogRecord(
        timestamp=int(log["timeUnixNano"]) if "timeUnixNano" in log else None,
        observed_timestamp=int(log.get("observedTimeUnixNano", 0)),
        context=trace.set_span_in_context(span, Context()),
        severity_text=log.get("severityText"),
        severity_number=SeverityNumber(severity) if severity in _SEVERITIES else None,
        body=_value(log.get("body", {})),
        attributes=_attributes(log),
        event_name=log.get("eventName"),
    )


_SEVERITIES = frozenset(severity.value for severity in SeverityNumber)


def _scope_metrics(scope: _Json) -> export.ScopeMetrics:
    metrics = [_metric(metric) for metric in scope["metrics"] if not metric.keys().isdisjoint(_POINTS)]
    metrics = [metric for metric in metrics if metric.data.data_points]
    return export.ScopeMetrics(_scope(scope), metrics, scope.get("schemaUrl", ""))


def _metric(metric: _Json) -> export.Metric:
    (kind,) = metric.keys() & METRIC_DATA
    data = metric[kind]
    points: list[Any] = []
    last, attributes = None, {}  # the points of a series follow each other: their attributes are converted once
    for point in data["dataPoints"]:
        if point.get("attributes") != last:
            last, attributes = point.get("attributes"), _attributes(point)
        if not int(point.get("flags", 0)) & NO_RECORDED_VALUE:
            points.append(_POINTS[kind](point, attributes))
    return export.Metric(
        metric["name"], metric.get("description", ""), metric.get("unit", ""), _metric_data(kind, data, points)
    )


def _metric_data(kind: str, data: _Json, points: list[Any]) -> export.DataT:
    if kind == "gauge":
        return export.Gauge(points)
    temporality = export.AggregationTemporality(int(data["aggregationTemporality"]))
    if kind == "sum":
        return export.Sum(points, temporality, is_monotonic=bool(data.get("isMonotonic")))
    histogram = export.Histogram if kind == "histogram" else export.ExponentialHistogram
    return histogram(points, temporality)


def _number_point(point: _Json, attributes: dict[str, Any]) -> export.NumberDataPoint:
    start, time = int(point.get("startTimeUnixNano", 0)), int(point["timeUnixNano"])
    return export.NumberDataPoint(attributes, start, time, _point_value(point), _exemplars(point))


def _histogram_point(point: _Json, attributes: dict[str, Any]) -> export.HistogramDataPoint:
    return export.HistogramDataPoint(
        **_statistics(point, attributes),
        bucket_counts=[int(count) for count in point.get("bucketCounts", ())],
        explicit_bounds=[float(bound) for bound in point.get("explicitBounds", ())],
    )


def _exponential_point(point: _Json, attributes: dict[str, Any]) -> export.ExponentialHistogramDataPoint:
    return export.ExponentialHistogramDataPoint(
        **_statistics(point, attributes),
        scale=int(point.get("scale", 0)),
        zero_count=int(point.get("zeroCount", 0)),
        positive=_buckets(point.get("positive", {})),
        negative=_buckets(point.get("negative", {})),
        flags=int(point.get("flags", 0)),
    )


_POINTS: Mapping[str, Callable[[_Json, dict[str, Any]], export.DataPointT]] = {
    "gauge": _number_point,
    "sum": _number_point,
    "histogram": _histogram_point,
    "exponentialHistogram": _exponential_point,
}
"""What converts the points of a kind of metric."""


def _statistics(point: _Json, attributes: dict[str, Any]) -> dict[str, Any]:
    """What histograms of both kinds have."""
    return {
        "attributes": attributes,
        "start_time_unix_nano": int(point.get("startTimeUnixNano", 0)),
        "time_unix_nano": int(point["timeUnixNano"]),
        "count": int(point.get("count", 0)),
        **{name: _double(point.get(name, 0.0)) for name in ("sum", "min", "max")},
        "exemplars": _exemplars(point),
    }


def _buckets(buckets: _Json) -> export.Buckets:
    return export.Buckets(int(buckets.get("offset", 0)), [int(count) for count in buckets.get("bucketCounts", ())])


def _exemplars(point: _Json) -> list[Exemplar]:
    return [
        Exemplar(
            filtered_attributes=_attributes(exemplar, "filteredAttributes"),
            value=_point_value(exemplar),
            time_unix_nano=int(exemplar["timeUnixNano"]),
            span_id=int(exemplar["spanId"], 16) if exemplar.get("spanId") else None,
            trace_id=int(exemplar["traceId"], 16) if exemplar.get("traceId") else None,
        )
        for exemplar in point.get("exemplars", ())
    ]


def _point_value(point: _Json) -> int | float:
    return int(point["asInt"]) if "asInt" in point else _double(point["asDouble"])


def _context(ids: _Json, is_remote: bool = False) -> trace.SpanContext:
    state = ids.get("traceState")
    return trace.SpanContext(
        int(ids["traceId"], 16),
        int(ids.get("spanId") or "0", 16),
        is_remote=is_remote,
        trace_flags=trace.TraceFlags(SAMPLED),
        trace_state=trace.TraceState.from_header([state]) if state else None,
    )


def _is_remote(record: _Json) -> bool:
    return bool(int(record.get("flags", 0)) & IS_REMOTE)


def _attributes(record: _Json, field: str = "attributes") -> dict[str, Any]:
    return {entry["key"]: _value(entry.get("value", {})) for entry in record.get(field, ())}


def _value(value: _Json) -> Any:
    """The value in an AnyValue."""
    for kind, content in value.items():
        return _VALUES[kind](content)
    return None


def _double(value: Any) -> float:
    number = float(value)
    return number if number == number else NAN


_VALUES: Mapping[str, Callable[[Any], Any]] = {
    "stringValue": str,
    "boolValue": bool,
    "intValue": int,
    "doubleValue": _double,
    "bytesValue": b64decode,
    "arrayValue": lambda value: [_value(item) for item in value.get("values", ())],
    "kvlistValue": lambda value: _attributes(value, "values"),
}
