"""Objects of the OpenTelemetry SDK as the OTLP JSON that the journal keeps, and OTLP JSON as objects of the SDK.

Both ways follow the same tables, at the end of the module: a `Field` for each attribute that the two have in common.
Written here: what has no counterpart of its own, such as the ids of a span.

To JSON: in the thread that ends the span or writes the log line, so straight from the object's attributes. Times and
64-bit integers are strings, ids are hex, enums are numbers; numbers that are not finite are strings. What is 0, "" or
empty is left out, as proto3 leaves it out. https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding

To objects: from the request that `stepspan.otlp.json` writes, so that a record is the same telemetry for an exporter of
the SDK as over OTLP. What the SDK has no room for is left out: flags of number points (hence points that say "no
recorded value"), dropped counts, and summaries.

The one file of the core that imports `opentelemetry._logs` and `opentelemetry.sdk._logs`, whose names may still move.
Importing the SDK costs 0.1 s: import this module late.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import orjson
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.sdk._logs import ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk.metrics import Exemplar, export
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from stepspan.mapping.records import METRIC_DATA, Attributes, Log, Point, Record, SdkRecord, Signal, Span
from stepspan.otlp import rules
from stepspan.otlp.json import any_value, encode, key_values
from stepspan.values import json_number

_Json: TypeAlias = dict[str, Any]
_Convert: TypeAlias = Callable[[Any], Any]


class Field(NamedTuple):
    """What an object of the SDK and its OTLP JSON have in common.

    Args:
        attribute: The name in the SDK, of the object's attribute and of its class' argument.
        name: The name in OTLP JSON.
        encode: Makes the JSON.
        decode: Makes the argument; None if the class takes none.
        default: The JSON that is left out. None: nothing is, and the argument may be None.

    """

    attribute: str
    name: str
    encode: _Convert
    decode: _Convert | None
    default: Any = None


Fields: TypeAlias = tuple[Field, ...]


def _encoded(source: Any, fields: Fields) -> _Json:
    """The JSON of an object of the SDK."""
    record = {}
    for attribute, name, encode_value, _, default in fields:
        value = getattr(source, attribute)
        if value or (default is None and value is not None):
            encoded = encode_value(value)
            if encoded != default:
                record[name] = encoded
    return record


def _decoded(record: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """The arguments for an object of the SDK."""
    arguments = {}
    for attribute, name, _, decode, default in fields:
        if decode is not None:
            value = record.get(name, default)
            arguments[attribute] = None if value is None else decode(value)
    return arguments


# --- objects of the SDK as the fields of `otel` events


def span_fields(span: ReadableSpan) -> _Json:
    """The fields of an `otel` event for a span that has ended."""
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    record = {**_ids(context), "flags": _flags(parent), **_encoded(span, _SPAN)}
    if parent is not None:
        record["parentSpanId"] = f"{parent.span_id:016x}"
    return {"signal": "traces", **_scope_fields(span.instrumentation_scope), "record": record}


def log_fields(log: ReadWriteLogRecord | ReadableLogRecord) -> _Json:
    """The fields of an `otel` event for a log record."""
    given = log.log_record
    record = {**_encoded(given, _LOG), **_encoded(log, (_DROPPED_ATTRIBUTES,))}
    record["observedTimeUnixNano"] = str(given.observed_timestamp or given.timestamp)
    if given.trace_id:
        record.update(traceId=f"{given.trace_id:032x}", flags=int(given.trace_flags or 0))
    if given.span_id:
        record["spanId"] = f"{given.span_id:016x}"
    return {"signal": "logs", **_scope_fields(log.instrumentation_scope), "record": record}


def metric_fields(data: export.MetricsData) -> Iterator[_Json]:
    """The fields of an `otel` event for each metric of a collection that has points."""
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            origin = _scope_fields(scope.scope, scope.schema_url)
            for metric in scope.metrics:
                if metric.data.data_points:
                    yield {"signal": "metrics", **origin, "record": _metric_json(metric)}


def _metric_json(metric: export.Metric) -> _Json:
    data = metric.data
    name, kind = next((name, kind) for name, kind in _KINDS.items() if type(data) is kind.data)
    points = [_point_json(kind, point) for point in data.data_points]
    return {**_encoded(metric, _METRIC), name: {"dataPoints": points, **_encoded(data, kind.data_fields)}}


def _point_json(kind: _Kind, point: Any) -> _Json:
    record = _encoded(point, kind.point_fields)
    if kind.point is export.NumberDataPoint:
        record.update(_number_json(point.value))
    elif not point.count:  # of nothing, the SDK's minimum and maximum are infinite
        del record["min"], record["max"]
    return record


def _number_json(value: float) -> _Json:
    return {"asInt": str(value)} if isinstance(value, int) else {"asDouble": json_number(value)}


def _exemplar_json(exemplar: Exemplar) -> _Json:
    return {**_number_json(exemplar.value), **_encoded(exemplar, _EXEMPLAR)}


def _link_json(link: trace.Link) -> _Json:
    return {**_ids(link.context), "flags": _flags(link.context), **_encoded(link, _LINK)}


def _scope_fields(scope: InstrumentationScope | None, schema_url: str | None = None) -> _Json:
    if scope is None:
        return {"scope": {}}
    schema_url = schema_url or scope.schema_url
    return {"scope": _encoded(scope, _SCOPE), **({"schema_url": schema_url} if schema_url else {})}


def _ids(context: trace.SpanContext) -> _Json:
    state = {"traceState": context.trace_state.to_header()} if context.trace_state else {}
    return {"traceId": f"{context.trace_id:032x}", "spanId": f"{context.span_id:016x}", **state}


def _flags(context: trace.SpanContext | None) -> int:
    return rules.HAS_IS_REMOTE | (rules.IS_REMOTE if context is not None and context.is_remote else 0)


# --- records as objects of the SDK


def metrics_data(resource: Attributes, points: Sequence[Point | SdkRecord]) -> export.MetricsData:
    """What `MetricExporter.export` takes. Points without a value are left out, and metrics without a point."""
    sdk_resource, scopes = _request("metrics", resource, points)
    return export.MetricsData([export.ResourceMetrics(sdk_resource, [_scope_metrics(scope) for scope in scopes], "")])


def readable_spans(resource: Attributes, spans: Sequence[Span | SdkRecord]) -> list[ReadableSpan]:
    """What `SpanExporter.export` takes: by scope, our own first, then in their order."""
    sdk_resource, scopes = _request("traces", resource, spans)
    return [_span(sdk_resource, sdk_scope, span) for sdk_scope, span in _with_scopes(scopes, "spans")]


def log_records(resource: Attributes, logs: Sequence[Log | SdkRecord]) -> list[ReadableLogRecord]:
    """What `LogRecordExporter.export` takes: by scope, our own first, then in their order."""
    sdk_resource, scopes = _request("logs", resource, logs)
    return [ReadableLogRecord(_log(log), sdk_resource, scope) for scope, log in _with_scopes(scopes, "logRecords")]


def _request(signal: Signal, resource: Attributes, records: Sequence[Record]) -> tuple[Resource, list[_Json]]:
    """The resource of the request for these records, and its scopes in OTLP JSON."""
    fields = rules.FIELDS[signal]
    (entry,) = orjson.loads(encode(signal, resource, records))[fields.resources]
    # Not Resource.create: it would add what detectors find on this machine.
    return Resource(_attributes(entry["resource"].get("attributes", ()))), entry[fields.scopes]


def _with_scopes(scopes: list[_Json], field: str) -> Iterator[tuple[InstrumentationScope, _Json]]:
    """Each record, with its scope."""
    for scope in scopes:
        sdk_scope = _scope(scope)
        for record in scope[field]:
            yield sdk_scope, record


def _scope(scope: _Json) -> InstrumentationScope:
    return InstrumentationScope(**_decoded(scope["scope"], _SCOPE), schema_url=scope.get("schemaUrl"))


def _span(resource: Resource, scope: InstrumentationScope, span: _Json) -> ReadableSpan:
    parent = span.get("parentSpanId")
    return ReadableSpan(
        **_decoded(span, _SPAN),
        context=_context(span),
        parent=_context({"traceId": span["traceId"], "spanId": parent}, _is_remote(span)) if parent else None,
        resource=resource,
        instrumentation_scope=scope,
    )


def _log(log: _Json) -> LogRecord:
    # Never an empty Context(): it is falsy, and LogRecord takes the calling thread's current span instead.
    span = trace.NonRecordingSpan(_context(log)) if log.get("traceId") else trace.INVALID_SPAN
    return LogRecord(
        **_decoded(log, _LOG),
        observed_timestamp=int(log.get("observedTimeUnixNano", 0)),
        context=trace.set_span_in_context(span, Context()),
    )


def _scope_metrics(scope: _Json) -> export.ScopeMetrics:
    metrics = [_metric(metric) for metric in scope["metrics"] if not metric.keys().isdisjoint(_KINDS)]
    metrics = [metric for metric in metrics if metric.data.data_points]
    return export.ScopeMetrics(_scope(scope), metrics, scope.get("schemaUrl", ""))


def _metric(metric: _Json) -> export.Metric:
    (name,) = metric.keys() & METRIC_DATA
    kind, data = _KINDS[name], metric[name]
    points: list[Any] = []
    last, attributes = None, {}  # the points of a series follow each other: their attributes are converted once
    for point in data["dataPoints"]:
        if point.get("attributes") != last:
            last = point.get("attributes")
            attributes = _attributes(last or ())
        if not int(point.get("flags", 0)) & rules.NO_RECORDED_VALUE:
            arguments = _decoded(point, kind.point_fields[1:])
            if kind.point is export.NumberDataPoint:
                arguments["value"] = _number_value(point)
            points.append(kind.point(attributes=attributes, **arguments))
    return export.Metric(
        **_decoded(metric, _METRIC), data=kind.data(data_points=points, **_decoded(data, kind.data_fields))
    )


def _number_value(point: _Json) -> int | float:
    return int(point["asInt"]) if "asInt" in point else rules.double(point["asDouble"])


def _exemplar(exemplar: _Json) -> Exemplar:
    return Exemplar(value=_number_value(exemplar), **_decoded(exemplar, _EXEMPLAR))


def _link(link: _Json) -> trace.Link:
    return trace.Link(_context(link, _is_remote(link)), **_decoded(link, _LINK))


def _context(ids: _Json, is_remote: bool = False) -> trace.SpanContext:
    state = ids.get("traceState")
    return trace.SpanContext(
        _from_hex(ids["traceId"]),
        _from_hex(ids.get("spanId") or "0"),
        is_remote=is_remote,
        trace_flags=trace.TraceFlags(rules.SAMPLED),
        trace_state=trace.TraceState.from_header([state]) if state else None,
    )


def _is_remote(record: _Json) -> bool:
    return bool(int(record.get("flags", 0)) & rules.IS_REMOTE)


# --- values


def _attributes(entries: Sequence[_Json]) -> dict[str, Any]:
    return {entry["key"]: _value(entry.get("value", {})) for entry in entries}


def _value(value: _Json) -> Any:
    """The value in an AnyValue."""
    for kind, content in value.items():
        return _VALUES[kind](content)
    return None


_VALUES: Mapping[str, _Convert] = {
    "stringValue": str,
    "boolValue": bool,
    "intValue": int,
    "doubleValue": rules.double,
    "bytesValue": b64decode,
    "arrayValue": lambda value: [_value(item) for item in value.get("values", ())],
    "kvlistValue": lambda value: _attributes(value.get("values", ())),
}


def _from_hex(digits: str) -> int:
    return int(digits, 16)


def _double_json(value: float) -> float | str:
    return json_number(float(value))


def _list(convert: _Convert) -> _Convert:
    return lambda items: [convert(item) for item in items]


def _object(kind: Callable[..., Any], fields: Fields) -> tuple[_Convert, _Convert]:
    """What encodes and decodes an object within another."""
    return lambda source: _encoded(source, fields), lambda record: kind(**_decoded(record, fields))


# --- the tables

_NAME = Field("name", "name", str, str, "")
_ATTRIBUTES = Field("attributes", "attributes", key_values, _attributes, [])
_DROPPED_ATTRIBUTES = Field("dropped_attributes", "droppedAttributesCount", int, None, 0)
_SCOPE = (_NAME, Field("version", "version", str, str, ""), _ATTRIBUTES)

_LINK = (_ATTRIBUTES, _DROPPED_ATTRIBUTES)
_EVENT = (_NAME, Field("timestamp", "timeUnixNano", str, int, "0"), _ATTRIBUTES, _DROPPED_ATTRIBUTES)
_STATUS = (
    Field("status_code", "code", lambda code: code.value, lambda number: trace.StatusCode(int(number)), 0),
    Field("description", "message", str, lambda text: text or None),
)
_event_json, _event = _object(Event, _EVENT)
_SPAN = (
    _NAME,
    # OTLP has 0 for "unspecified"
    Field("kind", "kind", lambda kind: kind.value + 1, lambda number: trace.SpanKind(max(0, int(number) - 1)), 0),
    Field("start_time", "startTimeUnixNano", str, int, "0"),
    Field("end_time", "endTimeUnixNano", str, int, "0"),
    Field("status", "status", *_object(trace.Status, _STATUS), {}),
    _ATTRIBUTES,
    Field("events", "events", _list(_event_json), _list(_event), []),
    Field("links", "links", _list(_link_json), _list(_link), []),
    _DROPPED_ATTRIBUTES,
    Field("dropped_events", "droppedEventsCount", int, None, 0),
    Field("dropped_links", "droppedLinksCount", int, None, 0),
)

_SEVERITIES = {severity.value: severity for severity in SeverityNumber}
_LOG = (
    Field("timestamp", "timeUnixNano", str, int),
    Field("severity_text", "severityText", str, str),
    Field("severity_number", "severityNumber", lambda severity: severity.value, _SEVERITIES.get),
    Field("body", "body", any_value, _value),
    _ATTRIBUTES,
    Field("event_name", "eventName", str, str),
)

_METRIC = (_NAME, Field("description", "description", str, str, ""), Field("unit", "unit", str, str, ""))
_TEMPORALITY = Field(
    "aggregation_temporality", "aggregationTemporality", int, lambda number: export.AggregationTemporality(int(number))
)
_EXEMPLAR = (
    Field("time_unix_nano", "timeUnixNano", str, int, "0"),
    Field("trace_id", "traceId", "{:032x}".format, _from_hex),
    Field("span_id", "spanId", "{:016x}".format, _from_hex),
    Field("filtered_attributes", "filteredAttributes", key_values, _attributes, []),
)
_POINT = (
    _ATTRIBUTES,
    Field("start_time_unix_nano", "startTimeUnixNano", str, int, "0"),
    Field("time_unix_nano", "timeUnixNano", str, int, "0"),
    Field("exemplars", "exemplars", _list(_exemplar_json), _list(_exemplar), []),
)
_BUCKET_COUNTS = Field("bucket_counts", "bucketCounts", _list(str), _list(int), [])
_BUCKETS = (Field("offset", "offset", int, int, 0), _BUCKET_COUNTS)
_STATISTICS = (
    *_POINT,
    Field("count", "count", str, int, "0"),
    Field("sum", "sum", _double_json, rules.double),
    Field("min", "min", _double_json, rules.double),
    Field("max", "max", _double_json, rules.double),
)
_EXPLICIT = (
    *_STATISTICS,
    _BUCKET_COUNTS,
    Field("explicit_bounds", "explicitBounds", _list(_double_json), _list(rules.double), []),
)
_EXPONENTIAL = (
    *_STATISTICS,
    Field("scale", "scale", int, int, 0),
    Field("zero_count", "zeroCount", str, int, "0"),
    Field("positive", "positive", *_object(export.Buckets, _BUCKETS), {}),
    Field("negative", "negative", *_object(export.Buckets, _BUCKETS), {}),
    Field("flags", "flags", int, int, 0),
)


class _Kind(NamedTuple):
    """A kind of metric: the SDK's classes of its data and of a point, and their fields."""

    data: Callable[..., Any]
    data_fields: Fields
    point: Callable[..., Any]
    point_fields: Fields


_KINDS: Mapping[str, _Kind] = {
    "gauge": _Kind(export.Gauge, (), export.NumberDataPoint, _POINT),
    "sum": _Kind(
        export.Sum,
        (_TEMPORALITY, Field("is_monotonic", "isMonotonic", bool, bool, False)),
        export.NumberDataPoint,
        _POINT,
    ),
    "histogram": _Kind(export.Histogram, (_TEMPORALITY,), export.HistogramDataPoint, _EXPLICIT),
    "exponentialHistogram": _Kind(
        export.ExponentialHistogram, (_TEMPORALITY,), export.ExponentialHistogramDataPoint, _EXPONENTIAL
    ),
}
"""A metric's field in OTLP JSON -> its kind. A summary is none: the SDK has no room for it."""
