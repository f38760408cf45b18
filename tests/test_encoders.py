"""Our JSON, our protobuf and our SDK objects say the same, and what the official encoders say.

The oracle is `opentelemetry.exporter.otlp.proto.common` on the SDK objects of `stepspan.otlp.sdk_objects`. All
three are parsed into the same messages and compared there; DIFFERENCES holds all that is allowed to differ.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stepspan import __version__
from stepspan.mapping.records import Exemplar, Histogram, Link, Log, Series, Signal, Span, SpanEvent, Sum
from stepspan.otlp import json as otlp_json
from stepspan.otlp import protobuf as otlp_protobuf
from stepspan.otlp.rules import NAN
from stepspan.otlp.sdk_objects import log_records, metrics_data, readable_spans

SECOND = 1_000_000_000
START = 1_760_000_000 * SECOND
TRACE_ID, SPAN_ID, PARENT_ID = bytes(range(16)), bytes(range(8)), bytes(range(8, 16))
RESOURCE = {"service.name": "training", "rank": 3}

REQUESTS = {
    "metrics": ExportMetricsServiceRequest,
    "traces": ExportTraceServiceRequest,
    "logs": ExportLogsServiceRequest,
}
OFFICIAL = {
    "metrics": lambda resource, points: encode_metrics(metrics_data(resource, points)),
    "traces": lambda resource, spans: encode_spans(readable_spans(resource, spans)),
    "logs": lambda resource, logs: encode_logs(log_records(resource, logs)),
}


# --- what may differ


def drop_empty_status(request: Any) -> None:
    for message in walk(request):
        if message.DESCRIPTOR.full_name == "opentelemetry.proto.trace.v1.Span" and not message.status.ByteSize():
            message.ClearField("status")


def drop_points_without_value(request: Any) -> None:
    for message in walk(request):
        if message.DESCRIPTOR.name != "ScopeMetrics":
            continue
        for metric in message.metrics:
            points = getattr(metric, metric.WhichOneof("data")).data_points
            kept = [point for point in points if not point.flags]
            del points[:]
            points.extend(kept)
        metrics = [metric for metric in message.metrics if getattr(metric, metric.WhichOneof("data")).data_points]
        del message.metrics[:]
        message.metrics.extend(metrics)


def set_our_nan(request: Any) -> None:
    for message in walk(request):
        for field, value in message.ListFields():
            if field.type == field.TYPE_DOUBLE and not field.is_repeated and value != value:
                setattr(message, field.name, NAN)


ALL = {"json", "protobuf", "official"}
DIFFERENCES: list[tuple[set[str], str, Callable[[Any], None]]] = [
    (ALL, "the official encoder writes an unset status as an empty message, we write none", drop_empty_status),
    (ALL, "the SDK's number points have no flags: no 'no recorded value' from it", drop_points_without_value),
    ({"json"}, "JSON has one NaN, and Python reads it as other bits than Go", set_our_nan),
]


# --- parsing


def walk(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in value if field.is_repeated else [value]:
                yield from walk(child)


def parse_protobuf(signal: str, body: bytes) -> Any:
    request = REQUESTS[signal].FromString(body)  # type: ignore[attr-defined]
    size = request.ByteSize()
    request.DiscardUnknownFields()
    assert request.ByteSize() == size, "a field that OTLP does not have"
    return request


HEX = {"traceId": 16, "spanId": 8, "parentSpanId": 8}
STRINGS = {"timeUnixNano", "startTimeUnixNano", "endTimeUnixNano", "observedTimeUnixNano", "count", "zeroCount"}
STRINGS |= {"intValue", "bucketCounts"}
NUMBERS = {"kind", "code", "flags", "severityNumber", "aggregationTemporality", "scale", "offset"}


def parse_json(signal: str, body: bytes) -> Any:
    """Proto3 JSON's own parser, after holding the rules of OTLP that it would not notice."""

    def proto3(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {key: proto3(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [proto3(item, key) for item in value]
        if key in HEX:
            assert len(value) == 2 * HEX[key]
            return base64.b64encode(bytes.fromhex(value)).decode()
        assert key not in STRINGS or isinstance(value, str), key
        assert key not in NUMBERS or type(value) is int, key
        return value

    def refuse(constant: Any) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json_format.ParseDict(proto3(json.loads(body, parse_constant=refuse)), REQUESTS[signal]())


def comparable(request: Any) -> dict[str, Any]:
    """The message as plain data in which floats are equal when their bits are."""

    def plain(value: Any) -> Any:
        if isinstance(value, Message):
            return {
                field.name: [plain(item) for item in child] if field.is_repeated else plain(child)
                for field, child in value.ListFields()
            }
        if isinstance(value, float):
            return f"{value!r} {struct.pack('>d', value).hex()}"
        return value

    return plain(request)  # type: ignore[no-any-return]


def assert_all_agree(signal: Signal, resource: Any, records: Any) -> None:
    requests = {
        "json": parse_json(signal, otlp_json.encode(signal, resource, records)),
        "protobuf": parse_protobuf(signal, otlp_protobuf.encode(signal, resource, records)),
        "official": OFFICIAL[signal](resource, records),  # type: ignore[no-untyped-call]
    }
    for paths, _reason, normalise in DIFFERENCES:
        for path in paths:
            normalise(requests[path])
    expected = comparable(requests["official"])
    assert comparable(requests["protobuf"]) == expected
    assert comparable(requests["json"]) == expected


# --- what there is to encode

doubles = st.floats() | st.sampled_from(
    [NAN, float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 1.7976931348623157e308]
)
integers = (
    st.integers() | st.integers(-(2**63) - 1, 2**63) | st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1])
)
texts = st.text(st.characters(), max_size=12) | st.just("\ud800 lone, \U0001f525 pair, é\x00")
keys = st.text(min_size=1, max_size=8)  # no surrogates: two keys may become one
uint64 = st.integers(0, 2**64 - 1)
sint32 = st.integers(-(2**31), 2**31 - 1)
trace_ids = st.binary(min_size=16, max_size=16).filter(any)
span_ids = st.binary(min_size=8, max_size=8).filter(any)

scalars = texts | st.booleans() | integers | doubles
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner | st.none(), max_size=3) | st.dictionaries(keys, inner | st.none(), max_size=3),
    max_leaves=6,
)
attributes = st.dictionaries(keys, values | st.none(), max_size=5)

exemplars = st.builds(Exemplar, uint64, doubles, trace_ids, span_ids)
sums = st.builds(Sum, uint64, doubles)


@st.composite
def histograms(draw: Any, *, has_bounds: bool) -> Histogram:
    finite = st.floats(allow_nan=False, allow_infinity=False)
    bounds = draw(st.lists(finite, min_size=1, max_size=4)) if has_bounds else []
    fewest, most = (len(bounds) + 1, len(bounds) + 1) if has_bounds else (0, 5)
    minimum, maximum = draw(st.just((None, None)) | st.tuples(doubles, doubles))
    return Histogram(
        start=draw(uint64),
        count=draw(uint64),
        sum=draw(doubles),
        minimum=minimum,
        maximum=maximum,
        scale=0 if has_bounds else draw(sint32),
        zero_count=0 if has_bounds else draw(uint64),
        offset=0 if has_bounds else draw(sint32),
        counts=draw(st.lists(uint64, min_size=fewest, max_size=most)),
        exemplars=draw(st.lists(exemplars, max_size=2)),
        bounds=bounds,
    )


points_of = {
    "gauge": doubles,
    "sum": sums,
    "histogram": histograms(has_bounds=False),
    "explicit_histogram": histograms(has_bounds=True),
    "delta_sum": sums,
    "delta_histogram": histograms(has_bounds=False),
    "delta_explicit_histogram": histograms(has_bounds=True),
}
names = st.sampled_from(["training.loss", "training.step.time"]) | texts  # so that several series share a name
series = st.builds(Series, names, attributes, st.sampled_from(["", "s"]), st.sampled_from(list(points_of)), texts)


@st.composite
def points(draw: Any) -> list[Any]:
    pool = draw(st.lists(series, min_size=1, max_size=4))
    mixed = draw(st.lists(st.sampled_from(pool), max_size=12))
    times = sorted(draw(st.lists(uint64, min_size=len(mixed), max_size=len(mixed))))
    return [(one, time, draw(points_of[one.kind] | st.none())) for one, time in zip(mixed, times, strict=True)]


spans = st.builds(
    Span,
    trace_id=trace_ids,
    span_id=span_ids,
    parent_id=st.none() | span_ids,
    name=texts,
    start=uint64,
    end=uint64,
    attributes=attributes,
    error=st.none() | texts,
    events=st.lists(st.builds(SpanEvent, texts, uint64, attributes), max_size=2),
    links=st.lists(st.builds(Link, trace_ids, span_ids, attributes), max_size=2),
)
logs = st.builds(
    lambda log, ids: Log(*log, *ids),
    st.tuples(uint64, st.integers(0, 24), values, texts, attributes),
    st.tuples(trace_ids, span_ids) | st.tuples(trace_ids, st.none()) | st.just((None, None)),
)


@settings(deadline=None)
@given(attributes, points())
def test_points_agree_with_the_official_encoder(resource: Any, records: Any) -> None:
    assert_all_agree("metrics", resource, records)


@settings(deadline=None)
@given(attributes, st.lists(spans, min_size=1, max_size=3))
def test_spans_agree_with_the_official_encoder(resource: Any, records: Any) -> None:
    assert_all_agree("traces", resource, records)


@settings(deadline=None)
@given(attributes, st.lists(logs, min_size=1, max_size=3))
def test_logs_agree_with_the_official_encoder(resource: Any, records: Any) -> None:
    assert_all_agree("logs", resource, records)


# --- examples: given these records, exactly this OTLP


def body_of(signal: Signal, records: Any) -> Any:
    """The whole JSON body, with what is the same for every request taken off."""
    body = json.loads(otlp_json.encode(signal, RESOURCE, records))  # type: ignore[arg-type]
    (outer,) = body.values()
    (entry,) = outer
    assert entry["resource"] == {
        "attributes": [
            {"key": "service.name", "value": {"stringValue": "training"}},
            {"key": "rank", "value": {"intValue": "3"}},
        ]
    }
    scope_field = {"metrics": "scopeMetrics", "traces": "scopeSpans", "logs": "scopeLogs"}[signal]
    (scope,) = entry[scope_field]
    assert scope.pop("scope") == {"name": "stepspan", "version": __version__}
    return scope


def test_series_of_one_name_become_one_metric() -> None:
    train = Series("training.loss", {"split": "train"})
    val = Series("training.loss", {"split": "val"})
    records = [(train, 1, 0.5), (val, 2, 0.75), (train, 3, float("nan")), (val, 4, 1e-7), (train, 5, -float("inf"))]
    split = {name: [{"key": "split", "value": {"stringValue": name}}] for name in ("train", "val")}
    assert body_of("metrics", records) == {
        "metrics": [
            {
                "name": "training.loss",
                "gauge": {
                    "dataPoints": [
                        {"timeUnixNano": "1", "asDouble": 0.5, "attributes": split["train"]},
                        {"timeUnixNano": "3", "asDouble": "NaN", "attributes": split["train"]},
                        {"timeUnixNano": "5", "asDouble": "-Infinity", "attributes": split["train"]},
                        {"timeUnixNano": "2", "asDouble": 0.75, "attributes": split["val"]},
                        {"timeUnixNano": "4", "asDouble": 1e-7, "attributes": split["val"]},
                    ]
                },
            }
        ]
    }


def test_a_series_that_ends() -> None:
    series = Series("training.loss", {})
    assert body_of("metrics", [(series, START, 1.0), (series, START + SECOND, None)]) == {
        "metrics": [
            {
                "name": "training.loss",
                "gauge": {
                    "dataPoints": [
                        {"timeUnixNano": "1760000000000000000", "asDouble": 1.0, "attributes": []},
                        {"timeUnixNano": "1760000001000000000", "flags": 1, "attributes": []},
                    ]
                },
            }
        ]
    }


def test_a_sum_and_a_histogram() -> None:
    errors = Series("training.run.errors", {"error.type": "ValueError"}, "{error}", "sum", "Errors logged")
    duration = Series("training.step.duration", {}, "s", "histogram")
    histogram = Histogram(START, 6, 1.5, 0.1, 0.5, 3, 1, -26, [2, 0, 3], [Exemplar(START + 1, 0.5, TRACE_ID, SPAN_ID)])
    records = [(errors, START + 2, Sum(START, 2.0)), (duration, START + 2, histogram)]
    assert body_of("metrics", records) == {
        "metrics": [
            {
                "name": "training.run.errors",
                "description": "Errors logged",
                "unit": "{error}",
                "sum": {
                    "aggregationTemporality": 2,
                    "isMonotonic": True,
                    "dataPoints": [
                        {
                            "startTimeUnixNano": "1760000000000000000",
                            "timeUnixNano": "1760000000000000002",
                            "asDouble": 2.0,
                            "attributes": [{"key": "error.type", "value": {"stringValue": "ValueError"}}],
                        }
                    ],
                },
            },
            {
                "name": "training.step.duration",
                "unit": "s",
                "exponentialHistogram": {
                    "aggregationTemporality": 2,
                    "dataPoints": [
                        {
                            "startTimeUnixNano": "1760000000000000000",
                            "timeUnixNano": "1760000000000000002",
                            "count": "6",
                            "sum": 1.5,
                            "min": 0.1,
                            "max": 0.5,
                            "scale": 3,
                            "zeroCount": "1",
                            "positive": {"offset": -26, "bucketCounts": ["2", "0", "3"]},
                            "attributes": [],
                            "exemplars": [
                                {
                                    "timeUnixNano": "1760000000000000001",
                                    "asDouble": 0.5,
                                    "traceId": "000102030405060708090a0b0c0d0e0f",
                                    "spanId": "0001020304050607",
                                }
                            ],
                        }
                    ],
                },
            },
        ]
    }


def test_a_failed_span() -> None:
    span = Span(
        TRACE_ID,
        SPAN_ID,
        PARENT_ID,
        "training.step",
        START,
        START + SECOND,
        {"span.step": 812, "warmup": False, "lr": 3e-4, "shape": [2, 3], "big": 2**63, "absent": None},  # type: ignore[dict-item]
        error="out of memory",
        events=[SpanEvent("exception", START + 1, {"exception.type": "MemoryError"})],
        links=[Link(TRACE_ID, PARENT_ID, {"link": "run"})],
    )
    assert body_of("traces", [span]) == {
        "spans": [
            {
                "traceId": "000102030405060708090a0b0c0d0e0f",
                "spanId": "0001020304050607",
                "parentSpanId": "08090a0b0c0d0e0f",
                "name": "training.step",
                "kind": 1,
                "flags": 256,
                "startTimeUnixNano": "1760000000000000000",
                "endTimeUnixNano": "1760000001000000000",
                "attributes": [
                    {"key": "span.step", "value": {"intValue": "812"}},
                    {"key": "warmup", "value": {"boolValue": False}},
                    {"key": "lr", "value": {"doubleValue": 0.0003}},
                    {"key": "shape", "value": {"arrayValue": {"values": [{"intValue": "2"}, {"intValue": "3"}]}}},
                    {"key": "big", "value": {"stringValue": "9223372036854775808"}},
                ],
                "events": [
                    {
                        "timeUnixNano": "1760000000000000001",
                        "name": "exception",
                        "attributes": [{"key": "exception.type", "value": {"stringValue": "MemoryError"}}],
                    }
                ],
                "links": [
                    {
                        "traceId": "000102030405060708090a0b0c0d0e0f",
                        "spanId": "08090a0b0c0d0e0f",
                        "flags": 256,
                        "attributes": [{"key": "link", "value": {"stringValue": "run"}}],
                    }
                ],
                "status": {"code": 2, "message": "out of memory"},
            }
        ]
    }


def test_what_was_dropped_is_counted_in_both_encodings() -> None:
    span = Span(TRACE_ID, SPAN_ID, None, "s", 1, 2, {}, None, [SpanEvent("e", 1, {}, 3)], [], 400, 2)
    log = Log(START, 9, "", "training.hyperparams", {}, None, None, 72)
    (encoded,) = body_of("traces", [span])["spans"]
    assert (encoded["droppedAttributesCount"], encoded["droppedEventsCount"]) == (400, 2)
    assert encoded["events"][0]["droppedAttributesCount"] == 3
    (record,) = body_of("logs", [log])["logRecords"]
    assert record["droppedAttributesCount"] == 72
    for signal, records in (("traces", [span]), ("logs", [log])):
        as_json = parse_json(signal, otlp_json.encode(signal, RESOURCE, records))  # type: ignore[arg-type]
        assert parse_protobuf(signal, otlp_protobuf.encode(signal, RESOURCE, records)) == as_json  # type: ignore[arg-type]


def test_an_event_within_a_span() -> None:
    log = Log(START, 13, {"lr": 3e-4, "name": "a\ud800b"}, "training.hyperparams", {"n": None}, TRACE_ID, SPAN_ID)  # type: ignore[dict-item]
    assert body_of("logs", [log]) == {
        "logRecords": [
            {
                "timeUnixNano": "1760000000000000000",
                "observedTimeUnixNano": "1760000000000000000",
                "severityNumber": 13,
                "severityText": "WARN",
                "eventName": "training.hyperparams",
                "body": {
                    "kvlistValue": {
                        "values": [
                            {"key": "lr", "value": {"doubleValue": 0.0003}},
                            {"key": "name", "value": {"stringValue": "a?b"}},
                        ]
                    }
                },
                "attributes": [],
                "traceId": "000102030405060708090a0b0c0d0e0f",
                "spanId": "0001020304050607",
                "flags": 1,
            }
        ]
    }


@pytest.mark.parametrize(("number", "text"), [(1, "TRACE"), (5, "DEBUG"), (9, "INFO"), (10, "INFO2"), (24, "FATAL4")])
def test_severity_text_comes_from_the_number(number: int, text: str) -> None:
    (record,) = body_of("logs", [Log(START, number, "", "", {})])["logRecords"]
    assert record["severityText"] == text


# --- what a comparison with the official encoder does not show


def test_every_nan_in_protobuf_has_the_bits_go_writes() -> None:
    nan = float("nan")
    kinds = {"gauge": nan, "sum": Sum(0, nan), "histogram": Histogram(0, 1, nan, nan, nan, 0, 0, 0, [1])}
    for kind, value in kinds.items():
        body = otlp_protobuf.encode("metrics", {}, [(Series("loss", {"a": nan}, "", kind), 1, value)])  # type: ignore[arg-type, list-item]
        assert body.count(bytes.fromhex("010000000000f87f")) == (4 if kind == "histogram" else 2)
        assert bytes.fromhex("000000000000f87f") not in body


def test_the_sdk_passes_those_bits_on() -> None:
    request = encode_metrics(metrics_data({}, [(Series("loss", {}), 1, float("nan"))]))
    assert bytes.fromhex("010000000000f87f") in request.SerializeToString()


def test_what_is_nested_too_deep_for_a_receiver_is_written_as_text() -> None:
    deep = {"x": ["\ud800", None, 1]}
    for level in range(100):
        deep = {"k": deep} if level % 2 else [deep]  # type: ignore[assignment, dict-item]
    assert_all_agree("logs", {"deep": deep}, [Log(1, 9, deep, "", {"deep": deep})])  # type: ignore[arg-type, dict-item]


@pytest.mark.parametrize("encoder", [otlp_json, otlp_protobuf])
def test_a_lone_surrogate_anywhere_becomes_a_question_mark(encoder: Any) -> None:
    bad = "a\ud800"
    point = (Series(bad, {bad: bad}, bad, "gauge", bad), 1, 0.5)
    span = Span(TRACE_ID, SPAN_ID, None, bad, 1, 2, {bad: [bad]}, bad, [SpanEvent(bad, 1, {bad: bad})])
    log = Log(1, 9, {bad: bad}, bad, {bad: bad})
    for signal, record in (("metrics", point), ("traces", span), ("logs", log)):
        assert b"a?" in encoder.encode(signal, {bad: bad}, [record])


def test_what_a_series_keeps_serves_every_encoder_again() -> None:
    series = Series("training.loss", {"split": "train"})
    first, second = [(series, 1, 0.5)], [(series, 2, 0.25)]
    for records in (first, second, [*first, *second]):
        assert_all_agree("metrics", RESOURCE, records)
    assert set(series.encoded) == {"json", "protobuf"}


def test_a_metric_that_only_ends_makes_no_empty_sdk_metric() -> None:
    (resource,) = metrics_data({}, [(Series("loss", {}), 1, None)]).resource_metrics
    assert resource.scope_metrics[0].metrics == []


def test_a_log_outside_spans_does_not_take_the_current_one() -> None:
    foreign = trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=False))
    with trace.use_span(foreign):
        (record,) = log_records({}, [Log(START, 9, "", "", {})])
    assert (record.log_record.trace_id, record.log_record.span_id) == (0, 0)


def test_sdk_objects_are_whole() -> None:
    """The SDK's own writers, which read every member, can write them."""
    link = Link(TRACE_ID, SPAN_ID, {})
    span = Span(TRACE_ID, SPAN_ID, None, "s", 1, 2, {}, "boom", [SpanEvent("e", 1, {"a": [1]})], [link])
    assert json.loads(readable_spans(RESOURCE, [span])[0].to_json())["status"]["status_code"] == "ERROR"  # type: ignore[arg-type]
    assert json.loads(log_records(RESOURCE, [Log(START, 9, "hi", "e", {"a": 1})])[0].to_json())["body"] == "hi"  # type: ignore[arg-type]
    assert json.loads(metrics_data(RESOURCE, [(Series("loss", {}), 1, 0.5)]).to_json())["resource_metrics"]  # type: ignore[arg-type]
