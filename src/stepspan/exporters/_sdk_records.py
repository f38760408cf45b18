"""What an OpenTelemetry SDK handed over, from OTLP JSON back to objects of the SDK, for `SdkExporter`.

What the SDK has no room for is left out: flags of number points, dropped counts, and attributes of links' states.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.metrics import Exemplar, export
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from stepspan.mapping.records import METRIC_DATA, SdkRecord, SdkScope
from stepspan.otlp.rules import NAN, SAMPLED
from stepspan.otlp.sdk_records import scopes_of

_Json: TypeAlias = Mapping[str, Any]

IS_REMOTE = 0x200


def readable_span(resource: Resource, foreign: SdkRecord) -> ReadableSpan:
    """A span."""
    record = foreign.record
    status = record.get("status", {})
    parent = record.get("parentSpanId")
    remote = bool(int(record.get("flags", 0)) & IS_REMOTE)
    return ReadableSpan(
        name=record.get("name", ""),
        context=_context(record),
        parent=_context({"traceId": record["traceId"], "spanId": parent}, remote) if parent else None,
        resource=resource,
        attributes=_attributes(record),
        events=[
            Event(event.get("name", ""), _attributes(event), int(event["timeUnixNano"]))
            for event in record.get("events", ())
        ],
        links=[
            trace.Link(_context(link, bool(int(link.get("flags", 0)) & IS_REMOTE)), _attributes(link))
            for link in record.get("links", ())
        ],
        kind=trace.SpanKind(max(0, int(record.get("kind", 1)) - 1)),
        status=trace.Status(trace.StatusCode(int(status.get("code", 0))), status.get("message") or None),
        start_time=int(record["startTimeUnixNano"]),
        end_time=int(record["endTimeUnixNano"]),
        instrumentation_scope=_scope(foreign.source),
    )


def log_record(resource: Resource, foreign: SdkRecord) -> ReadableLogRecord:
    """A log record."""
    record = foreign.record
    # Never an empty Context(): it is falsy, and LogRecord takes the calling thread's current span instead.
    span = trace.NonRecordingSpan(_context(record)) if record.get("traceId") else trace.INVALID_SPAN
    severity = record.get("severityNumber")
    return ReadableLogRecord(
        LogRecord(
            timestamp=int(record["timeUnixNano"]) if "timeUnixNano" in record else None,
            observed_timestamp=int(record.get("observedTimeUnixNano", 0)),
            context=trace.set_span_in_context(span, Context()),
            severity_text=record.get("severityText"),
            severity_number=SeverityNumber(severity) if severity is not None else None,
            body=_value(record.get("body", {})),
            attributes=_attributes(record),
            event_name=record.get("eventName"),
        ),
        resource,
        _scope(foreign.source),
    )


def scope_metrics(foreign: Iterable[SdkRecord]) -> list[export.ScopeMetrics]:
    """Data points, as metrics in their scopes."""
    return [
        export.ScopeMetrics(
            _scope(SdkScope(scope["scope"], scope.get("schemaUrl", ""))),
            [_metric(metric) for metric in scope["metrics"] if not metric.keys().isdisjoint(_DATA)],
            scope.get("schemaUrl", ""),
        )
        for scope in scopes_of("metrics", foreign)
    ]


def _metric(metric: _Json) -> export.Metric:
    (kind,) = metric.keys() & METRIC_DATA
    data = _DATA[kind](metric[kind])
    return export.Metric(metric["name"], metric.get("description", ""), metric.get("unit", ""), data)


def _number_point(point: _Json) -> export.NumberDataPoint:
    return export.NumberDataPoint(**_times(point), value=_number(point), exemplars=_exemplars(point))


def _histogram_point(point: _Json) -> export.HistogramDataPoint:
    return export.HistogramDataPoint(
        **_times(point),
        **_summary(point),
        bucket_counts=[int(count) for count in point.get("bucketCounts", ())],
        explicit_bounds=[float(bound) for bound in point.get("explicitBounds", ())],
        exemplars=_exemplars(point),
    )


def _exponential_point(point: _Json) -> export.ExponentialHistogramDataPoint:
    return export.ExponentialHistogramDataPoint(
        **_times(point),
        **_summary(point),
        scale=int(point.get("scale", 0)),
        zero_count=int(point.get("zeroCount", 0)),
        positive=_buckets(point.get("positive", {})),
        negative=_buckets(point.get("negative", {})),
        flags=int(point.get("flags", 0)),
        exemplars=_exemplars(point),
    )


def _times(point: _Json) -> dict[str, Any]:
    return {
        "attributes": _attributes(point),
        "start_time_unix_nano": int(point.get("startTimeUnixNano", 0)),
        "time_unix_nano": int(point["timeUnixNano"]),
    }


def _summary(point: _Json) -> dict[str, Any]:
    numbers = {name: float(point.get(name, 0.0)) for name in ("sum", "min", "max")}
    return {"count": int(point.get("count", 0)), **numbers}


def _buckets(buckets: _Json) -> export.Buckets:
    return export.Buckets(int(buckets.get("offset", 0)), [int(count) for count in buckets.get("bucketCounts", ())])


def _exemplars(point: _Json) -> list[Exemplar]:
    return [
        Exemplar(
            filtered_attributes=_attributes(exemplar, "filteredAttributes"),
            value=_number(exemplar),
            time_unix_nano=int(exemplar["timeUnixNano"]),
            span_id=int(exemplar["spanId"], 16) if exemplar.get("spanId") else None,
            trace_id=int(exemplar["traceId"], 16) if exemplar.get("traceId") else None,
        )
        for exemplar in point.get("exemplars", ())
    ]


def _number(point: _Json) -> int | float:
    return int(point["asInt"]) if "asInt" in point else _double(point["asDouble"])


def _temporality(data: _Json) -> export.AggregationTemporality:
    return export.AggregationTemporality(int(data["aggregationTemporality"]))


_DATA: Mapping[str, Callable[[_Json], export.DataT]] = {
    "gauge": lambda data: export.Gauge([_number_point(point) for point in data["dataPoints"]]),
    "sum": lambda data: export.Sum(
        [_number_point(point) for point in data["dataPoints"]],
        _temporality(data),
        is_monotonic=bool(data.get("isMonotonic")),
    ),
    "histogram": lambda data: export.Histogram(
        [_histogram_point(point) for point in data["dataPoints"]], _temporality(data)
    ),
    "exponentialHistogram": lambda data: export.ExponentialHistogram(
        [_exponential_point(point) for point in data["dataPoints"]], _temporality(data)
    ),
}
"""The data of a metric; the SDK has no summary."""


def _scope(source: SdkScope) -> InstrumentationScope:
    scope = source.scope
    return InstrumentationScope(
        scope.get("name", ""), scope.get("version"), source.schema_url or None, _attributes(scope)
    )


def _context(record: _Json, remote: bool = False) -> trace.SpanContext:
    state = record.get("traceState")
    return trace.SpanContext(
        int(record["traceId"], 16),
        int(record.get("spanId") or "0", 16),
        is_remote=remote,
        trace_flags=trace.TraceFlags(SAMPLED),
        trace_state=trace.TraceState.from_header([state]) if state else None,
    )


def _attributes(record: _Json, field: str = "attributes") -> dict[str, Any]:
    return {entry["key"]: _value(entry.get("value", {})) for entry in record.get(field, ())}


def _value(value: _Json) -> Any:
    for kind, told in value.items():
        return _VALUES[kind](told)
    return None


def _double(value: Any) -> float:
    number = float(value)
    return number if number == number else NAN


_VALUES: Mapping[str, Callable[[Any], Any]] = {
    "stringValue": str,
    "boolValue": bool,
    "intValue": int,
    "doubleValue": _double,
    "bytesValue": lambda value: b64decode(value),
    "arrayValue": lambda value: [_value(item) for item in value.get("values", ())],
    "kvlistValue": lambda value: _attributes(value, "values"),
}
