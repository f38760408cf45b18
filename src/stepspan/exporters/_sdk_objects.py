"""Neutral records -> the OpenTelemetry SDK's own objects, for any SpanExporter, MetricExporter or LogRecordExporter.

The one file that imports `opentelemetry._logs` and `opentelemetry.sdk._logs`, whose names may still move. Importing
the SDK costs 0.1 s: import this module late.

A number point has no flags in the SDK, so a "no recorded value" point cannot be said and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.metrics import Exemplar as SdkExemplar
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from stepspan._version import __version__
from stepspan.exporters._sdk_records import log_record, readable_span, scope_metrics
from stepspan.mapping.columns import Column
from stepspan.mapping.records import Attributes, Exemplar, Histogram, Log, Point, SdkRecord, Span, Sum
from stepspan.otlp.rules import (
    INT64_MAX,
    INT64_MIN,
    MAX_DEPTH,
    NAN,
    SAMPLED,
    SCOPE_NAME,
    SEVERITY_TEXT,
    MetricKey,
    by_metric,
    utf8,
)

_SCOPE = InstrumentationScope(SCOPE_NAME, __version__)
_CUMULATIVE = export.AggregationTemporality.CUMULATIVE
_NO_BUCKETS = export.Buckets(0, [])
_UNSET = trace.Status(trace.StatusCode.UNSET)


def metrics_data(resource: Attributes, points: Sequence[Point | SdkRecord]) -> export.MetricsData:
    """What `MetricExporter.export` takes. Points without a value are left out, and metrics without a point."""
    ours, foreign = by_metric(points)
    metrics = [_metric(key, columns) for key, columns in ours.items()]
    scopes = [export.ScopeMetrics(_SCOPE, [metric for metric in metrics if metric.data.data_points], "")]
    if foreign:
        scopes = [*(scopes if ours else ()), *scope_metrics(foreign)]
    return export.MetricsData([export.ResourceMetrics(_resource(resource), scopes, "")])


def readable_spans(resource: Attributes, spans: Sequence[Span | SdkRecord]) -> list[ReadableSpan]:
    """What `SpanExporter.export` takes."""
    sdk_resource = _resource(resource)
    return [
        readable_span(sdk_resource, span) if isinstance(span, SdkRecord) else _span(sdk_resource, span)
        for span in spans
    ]


def log_records(resource: Attributes, logs: Sequence[Log | SdkRecord]) -> list[ReadableLogRecord]:
    """What `LogRecordExporter.export` takes."""
    sdk_resource = _resource(resource)
    return [
        log_record(sdk_resource, log)
        if isinstance(log, SdkRecord)
        else ReadableLogRecord(_log(log), sdk_resource, _SCOPE)
        for log in logs
    ]


def _metric(key: MetricKey, columns: list[Column]) -> export.Metric:
    name, unit, kind = key
    points: list[Any] = []
    for series, times, values in columns:
        attributes = _attributes(series.attributes)
        found = zip(times, values, strict=True)
        points += [_point(attributes, time, value) for time, value in found if value is not None]
    data: export.DataT
    if kind == "gauge":
        data = export.Gauge(points)
    elif kind == "sum":
        data = export.Sum(points, _CUMULATIVE, is_monotonic=True)
    else:
        data = export.ExponentialHistogram(points, _CUMULATIVE)
    return export.Metric(_text(name), _text(columns[0][0].description), _text(unit), data)


def _point(attributes: dict[str, Any], time: int, value: float | Sum | Histogram) -> export.DataPointT:
    if isinstance(value, Histogram):
        return _histogram(attributes, time, value)
    if isinstance(value, Sum):
        return export.NumberDataPoint(attributes, value.start, time, _double(value.value))
    return export.NumberDataPoint(attributes, 0, time, _double(value))


def _histogram(attributes: dict[str, Any], time: int, histogram: Histogram) -> export.ExponentialHistogramDataPoint:
    return export.ExponentialHistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=histogram.start,
        time_unix_nano=time,
        count=histogram.count,
        sum=_double(histogram.sum),
        scale=histogram.scale,
        zero_count=histogram.zero_count,
        positive=export.Buckets(histogram.offset, histogram.counts),
        negative=_NO_BUCKETS,
        flags=0,
        min=_double(histogram.minimum),
        max=_double(histogram.maximum),
        exemplars=[_exemplar(exemplar) for exemplar in histogram.exemplars],
    )


def _exemplar(exemplar: Exemplar) -> SdkExemplar:
    return SdkExemplar(
        filtered_attributes={},
        value=_double(exemplar.value),
        time_unix_nano=exemplar.time,
        span_id=_id(exemplar.span_id),
        trace_id=_id(exemplar.trace_id),
    )


def _span(resource: Resource, span: Span) -> ReadableSpan:
    status = _UNSET if span.error is None else trace.Status(trace.StatusCode.ERROR, _text(span.error))
    return ReadableSpan(
        name=_text(span.name),
        context=_context(span.trace_id, span.span_id),
        parent=None if span.parent_id is None else _context(span.trace_id, span.parent_id),
        resource=resource,
        attributes=_attributes(span.attributes),
        events=[Event(_text(event.name), _attributes(event.attributes), event.time) for event in span.events],
        links=[trace.Link(_context(link.trace_id, link.span_id), _attributes(link.attributes)) for link in span.links],
        kind=trace.SpanKind.INTERNAL,
        status=status,
        start_time=span.start,
        end_time=span.end,
        instrumentation_scope=_SCOPE,
    )


def _log(log: Log) -> LogRecord:
    # Never an empty Context(): it is falsy, and LogRecord takes the calling thread's current span instead.
    context = trace.set_span_in_context(trace.INVALID_SPAN, Context())
    if log.trace_id is not None:
        span = trace.NonRecordingSpan(_context(log.trace_id, log.span_id or b""))
        context = trace.set_span_in_context(span, Context())
    return LogRecord(
        timestamp=log.time,
        observed_timestamp=log.time,
        context=context,
        severity_text=SEVERITY_TEXT.get(log.severity, ""),
        severity_number=SeverityNumber(log.severity) if log.severity in SEVERITY_TEXT else None,
        body=_value(log.body),
        attributes=_attributes(log.attributes),
        event_name=_text(log.event_name),
    )


def _context(trace_id: bytes, span_id: bytes) -> trace.SpanContext:
    flags = trace.TraceFlags(SAMPLED)
    return trace.SpanContext(_id(trace_id), _id(span_id), is_remote=False, trace_flags=flags)


def _id(number: bytes) -> int:
    return int.from_bytes(number, "big")


def _resource(attributes: Attributes) -> Resource:
    return Resource(_attributes(attributes))  # not Resource.create: it would add what detectors find on this machine


def _attributes(attributes: Attributes, depth: int = 0) -> dict[str, Any]:
    return {_text(key): _value(value, depth) for key, value in attributes.items() if value is not None}


def _value(value: Any, depth: int = 0) -> Any:
    """The value as the official encoders can write it: one bad value fails their whole batch."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        return str(value)
    if isinstance(value, float):
        return _double(value)
    if not isinstance(value, (Mapping, Sequence)):
        return value
    if depth == MAX_DEPTH:
        return _text(str(value))
    if isinstance(value, Mapping):
        return _attributes(value, depth + 1)
    return [_value(item, depth + 1) for item in value]


def _double(value: float) -> float:
    return value if value == value else NAN


def _text(text: str) -> str:
    return utf8(text).decode()
