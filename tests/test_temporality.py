"""What receivers get that want deltas, or histograms with bounds: the same as others get, said in another way."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from harness.delivery import Training, deliver, options
from harness.events_of import SECOND, START, SessionEvents, key_of, mapper, restored
from harness.receiver import ScriptedReceiver
from hypothesis import given, settings
from hypothesis import strategies as st
from test_purity import counter, sessions

from stepspan.config import load
from stepspan.deliver.task import DeliveryTask
from stepspan.errors import ConfigError
from stepspan.exporters.memory import MemoryExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.exporters.sdk import SdkExporter
from stepspan.mapping.histogram import BOUNDS_S
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Histogram, PastPoint, SdkRecord, Sum
from stepspan.mapping.temporality import SdkDeltas

DELTA = MappingOptions(temporality="delta")
EXPLICIT = MappingOptions(histogram_aggregation="explicit_bucket_histogram")
ALL = 1 << 62
PROTOCOLS = ["http/protobuf", "http/json", "grpc"]


def points_of(s: SessionEvents, wants: MappingOptions) -> dict[Any, list[tuple[int, Any]]]:
    fold = mapper("metrics", s.header, wants)
    found: dict[Any, list[tuple[int, Any]]] = {}
    for point in [*fold.map(s.events), *fold.finish(s.closed())]:
        if type(point) not in (PastPoint, SdkRecord):
            found.setdefault((key_of(point[0]), point[0].kind), []).append(point[1:])
    return found


def counted(value: Sum | Histogram) -> tuple[Any, ...]:
    """What adds up, without empty buckets."""
    if isinstance(value, Sum):
        return (value.value,)
    buckets = {index: count for index, count in enumerate(value.counts, value.offset) if count}
    return value.count, round(value.sum, 6), value.zero_count, buckets


# ---------------------------------------------------------------- our own series


@settings(deadline=None, max_examples=100)
@given(s=sessions(), histogram=st.sampled_from(["base2_exponential_bucket_histogram", "explicit_bucket_histogram"]))
def test_deltas_add_up_to_what_is_cumulative_and_each_begins_where_the_one_before_ended(s: Any, histogram: Any) -> None:
    whole = points_of(s, MappingOptions(histogram_aggregation=histogram))
    deltas = points_of(s, MappingOptions(temporality="delta", histogram_aggregation=histogram))
    assert not {kind for _, kind in deltas} & {"sum", "histogram", "explicit_histogram"}
    assert {(key, kind.removeprefix("delta_")) for key, kind in deltas} == set(whole)
    for (key, kind), points in whole.items():
        if kind == "gauge":
            assert repr(deltas[key, kind]) == repr(points)
            continue
        values = [point for point in points if point[1] is not None]
        of_series = deltas[key, f"delta_{kind}"]
        assert [time for time, _ in of_series] == [time for time, _ in values], "a series of deltas has no end"
        assert [value.start for _, value in of_series] == [values[0][1].start, *(time for time, _ in values[:-1])]
        if kind == "sum":
            if key[0] != "system.disk.io":  # which may begin anew
                assert sum(value.value for _, value in of_series) == pytest.approx(values[-1][1].value)
            continue
        last = values[-1][1]
        assert sum(value.count for _, value in of_series) == last.count
        assert sum(value.zero_count for _, value in of_series) == last.zero_count
        buckets: dict[int, int] = {}
        for _, value in of_series:
            for index, count in enumerate(value.counts, value.offset):
                assert count >= 0
                buckets[index] = buckets.get(index, 0) + count
            assert (value.minimum is None) == (value.count == 0)
        used = [value for _, value in of_series if value.count]
        assert min(value.minimum for value in used) == last.minimum
        assert max(value.maximum for value in used) == last.maximum
        expected = {index: count for index, count in enumerate(last.counts, last.offset) if count}
        assert {index: count for index, count in buckets.items() if count} == expected


def test_a_delta_has_the_smallest_and_the_largest_step_of_its_own_time() -> None:
    s = SessionEvents()
    run = s.run()
    for second, lasts in [(1, 0.5), (2, 2.0), (12, 0.75), (33, 4.0)]:
        s.ts = START + second * SECOND
        s.step(second, lasts=lasts, parent=run)
    (points,) = [points for (key, _), points in points_of(s, DELTA).items() if key[0] == "training.step.duration"]
    found = [((time - START) // SECOND, v.count, v.minimum, v.maximum, v.sum, len(v.exemplars)) for time, v in points]
    assert found == [(10, 2, 0.5, 2.0, 2.5, 1), (30, 1, 0.75, 0.75, 0.75, 1), (37, 1, 4.0, 4.0, 4.0, 1)]


def test_a_histogram_with_bounds_counts_what_lies_up_to_each_of_them() -> None:
    s = SessionEvents()
    run = s.run()
    for lasts in (0.01, 0.011, 5.12, 100.0):
        s.step(0, lasts=lasts, parent=run)
    (points,) = [points for (_, kind), points in points_of(s, EXPLICIT).items() if kind == "explicit_histogram"]
    *_, (_, last), (_, end) = points
    assert end is None
    assert last.bounds == BOUNDS_S
    expected = [0] * (len(BOUNDS_S) + 1)
    expected[0], expected[1], expected[BOUNDS_S.index(5.12)], expected[-1] = 1, 1, 1, 1
    assert last.counts == expected


def test_lowmemory_keeps_what_the_system_counts_cumulative() -> None:
    s = SessionEvents()
    run = s.run()
    s.emit("sample", values=[["system.disk.io", 5], ["system.cpu.utilization", 0.5]])
    s.emit("error", type="ValueError", message="m", stack="s", attributes={}, parent=run)
    s.step(0, parent=run)
    kinds = {key[0]: kind for key, kind in points_of(s, MappingOptions(temporality="lowmemory"))}
    assert kinds["system.disk.io"] == "sum"
    assert kinds["training.run.errors"] == "delta_sum"
    assert kinds["training.step.duration"] == "delta_histogram"
    assert {key[0]: kind for key, kind in points_of(s, DELTA)}["system.disk.io"] == "delta_sum"


def test_a_counter_that_begins_anew_is_a_delta_of_all_it_has_come_to() -> None:
    s = SessionEvents()
    for second, value in [(1, 50), (11, 60), (21, 4), (31, 10)]:
        s.ts = START + second * SECOND
        s.emit("sample", values=[["system.disk.io", value]])
    (points,) = [points for (key, _), points in points_of(s, DELTA).items() if key[0] == "system.disk.io"]
    assert [value.value for _, value in points] == [50, 10, 4, 6]


# ---------------------------------------------------------------- what other instrumentation emits


def test_deltas_of_cumulative_points_are_what_the_sdk_itself_makes_of_the_same_calls() -> None:
    from opentelemetry.sdk.metrics import Counter, MeterProvider, export
    from opentelemetry.sdk.metrics import Histogram as SdkHistogram
    from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View

    from stepspan.otlp.sdk_objects import metric_fields

    delta = export.AggregationTemporality.DELTA
    readers: list[Any] = [
        export.InMemoryMetricReader(),
        export.InMemoryMetricReader(dict.fromkeys((Counter, SdkHistogram), delta)),
    ]
    views = [View(instrument_name="wide", aggregation=ExponentialBucketHistogramAggregation(max_size=20))]
    provider = MeterProvider(readers, views=views)
    meter = provider.get_meter("app")
    counter, up_down = meter.create_counter("tokens"), meter.create_up_down_counter("queue")
    histogram, wide = meter.create_histogram("latency"), meter.create_histogram("wide")
    fold = mapper("metrics", SessionEvents().header, DELTA)
    seq, ended = 2, dict[Any, str]()
    for turn in range(5):
        for n in range(turn + 1):
            counter.add(3 + n, {"k": n % 2})
            up_down.add(1 - 2 * (n % 2))
            histogram.record(7.0 * n, {"k": n % 2})
            wide.record(0.001 * 10 ** (turn + n))  # its scale shrinks from turn to turn
        cumulative, expected = (list(metric_fields(reader.get_metrics_data())) for reader in readers)
        events = [
            {"ts": START + seq * SECOND + n, "seq": seq + n, "tag": "otel", **each} for n, each in enumerate(cumulative)
        ]
        seq += len(events)
        fold = restored("metrics", SessionEvents().header, fold.state(), DELTA)
        found: dict[Any, Any] = {}
        for source, _, point in fold.map(events):
            (kind,) = source.metric.keys() & {"sum", "histogram", "exponentialHistogram"}
            found[source.metric["name"], str(point.get("attributes"))] = kind, source.metric[kind], point
        for event in expected:
            (kind,) = event["record"].keys() & {"sum", "histogram", "exponentialHistogram"}
            data = event["record"][kind]
            for point in data["dataPoints"]:
                kind_found, data_found, got = found[event["record"]["name"], str(point.get("attributes"))]
                assert kind_found == kind
                assert data_found["aggregationTemporality"] == data["aggregationTemporality"]
                if event["record"]["name"] == "queue":
                    assert data["aggregationTemporality"] == 2
                else:
                    series = event["record"]["name"], str(point.get("attributes"))
                    assert got["startTimeUnixNano"] == ended.get(series, got["startTimeUnixNano"])
                    ended[series] = got["timeUnixNano"]
                assert_same_increment(kind, got, point)


def assert_same_increment(kind: str, found: Any, expected: Any) -> None:
    for name in ("asInt", "count", "zeroCount", "explicitBounds", "bucketCounts"):
        assert found.get(name) == expected.get(name), name
    assert found.get("sum") == pytest.approx(expected.get("sum"))
    if kind == "exponentialHistogram":
        shift = expected.get("scale", 0) - found.get("scale", 0)
        assert shift >= 0
        assert buckets(found["positive"], 0) == buckets(expected["positive"], shift)


def buckets(side: Any, shift: int) -> dict[int, int]:
    counts: dict[int, int] = {}
    for index, count in enumerate(side["bucketCounts"], side.get("offset", 0)):
        counts[index >> shift] = counts.get(index >> shift, 0) + int(count)
    return {index: count for index, count in counts.items() if count}


POINT = {"startTimeUnixNano": "100", "timeUnixNano": "200", "attributes": []}


def converted(kind: str, *points: dict[str, Any]) -> list[dict[str, Any]]:
    deltas, found = SdkDeltas(), []
    for point in points:
        found += deltas.convert(kind, b"metric", [{**POINT, **point}])
        state, deltas = deltas.state(), SdkDeltas()
        deltas.restore(orjson.loads(orjson.dumps(state)))
    return found


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        pytest.param({"asInt": "5"}, {"asInt": "7"}, {"asInt": "2"}, id="integers"),
        pytest.param({"asInt": "5"}, {"asDouble": 7.5}, {"asDouble": 2.5}, id="an integer and a float"),
        pytest.param({"asDouble": 5.5}, {"asInt": "7"}, {"asDouble": 1.5}, id="a float and an integer"),
        pytest.param({"asInt": "5"}, {"asInt": "5"}, {"asInt": "0"}, id="nothing has come on"),
        pytest.param({"asInt": "5"}, {"asInt": "3"}, {"asInt": "3"}, id="less than before"),
    ],
)
def test_the_difference_of_two_numbers(first: Any, second: Any, expected: Any) -> None:
    _, delta = converted("sum", first, {**second, "timeUnixNano": "300"})
    assert delta == {"startTimeUnixNano": "200", "timeUnixNano": "300", "attributes": [], **expected}


def test_a_stream_with_another_start_is_another_one() -> None:
    later = {"startTimeUnixNano": "250", "timeUnixNano": "300"}
    first, second = converted("sum", {"asInt": "5"}, {"asInt": "7", **later})
    assert (first["startTimeUnixNano"], first["asInt"]) == ("100", "5")
    assert (second["startTimeUnixNano"], second["asInt"]) == ("250", "7")


def test_buckets_that_are_others_than_before_are_another_stream() -> None:
    one = {"count": "3", "sum": 3.0, "explicitBounds": [1.0], "bucketCounts": ["1", "2"]}
    other = {"count": "4", "sum": 4.0, "explicitBounds": [2.0], "bucketCounts": ["1", "3"], "timeUnixNano": "300"}
    _, delta = converted("histogram", one, other)
    assert (delta["count"], delta["bucketCounts"], delta["startTimeUnixNano"]) == ("4", ["1", "3"], "200")


def test_what_comes_as_a_delta_or_goes_down_is_left_as_it_is() -> None:
    assert SdkDeltas.takes("sum", {"aggregationTemporality": 2, "isMonotonic": True})
    assert not SdkDeltas.takes("sum", {"aggregationTemporality": 2})
    assert not SdkDeltas.takes("sum", {"aggregationTemporality": 1, "isMonotonic": True})
    assert not SdkDeltas.takes("histogram", {"aggregationTemporality": 1})
    assert not SdkDeltas.takes("gauge", {})
    assert not SdkDeltas.takes("summary", {})


# ---------------------------------------------------------------- destinations


def test_each_destination_has_preferences_of_its_own() -> None:
    env = {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta"}
    by_variable = OtlpExporter("http://localhost:1", env=env)
    assert by_variable.mapping_options == DELTA
    other = OtlpExporter(
        "http://localhost:1", temporality="cumulative", histogram_aggregation="explicit_bucket_histogram", env=env
    )
    assert other.mapping_options == EXPLICIT
    again = OtlpExporter(**other.settings, env=env)  # as the deliverer process makes it
    assert again.mapping_options == EXPLICIT
    with pytest.raises(ConfigError, match=r"temporality.*'deltas'.*cumulative, delta, lowmemory"):
        OtlpExporter("http://localhost:1", temporality="deltas", env={})
    loaded = load({"exporters": [{"endpoint": "http://localhost:1", "temporality": "lowmemory"}]}, {})
    assert loaded.exporters[0].temporality == "lowmemory"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("aggregation", ["base2_exponential_bucket_histogram", "explicit_bucket_histogram"])
def test_a_receiver_of_deltas_gets_every_sum_and_histogram(tmp_path: Path, protocol: Any, aggregation: str) -> None:
    training = Training(tmp_path)
    training.steps(5)
    for value in (1, 3):
        training.emit("sample", source="host", values=[["system.disk.io", value]])
        training.emit("otel", signal="metrics", scope={"name": "app"}, record=counter(value))
        training.emit("error", type="ValueError", message="m", stack="", attributes={}, parent=training.run)
        training.steps(12, every=1.0)
    training.end()
    env = {
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "Delta",
        "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": aggregation,
    }
    with ScriptedReceiver() as receiver:
        where = receiver.grpc_target if protocol == "grpc" else receiver.url
        with closing(OtlpExporter(where, protocol=protocol, env=env)) as exporter:
            deliver(training.path, exporter, options())
        seen = {
            (metric.name, metric.WhichOneof("data"), getattr(metric, metric.WhichOneof("data")).aggregation_temporality)
            for request in receiver.requests["metrics"]
            for scope in request.resource_metrics[0].scope_metrics
            for metric in scope.metrics
            if metric.WhichOneof("data") != "gauge"
        }
        tokens = [point.value for point in receiver.points("app.tokens")]
    kind = "histogram" if aggregation.startswith("explicit") else "exponential_histogram"
    assert seen == {
        ("app.tokens", "sum", 1),
        ("system.disk.io", "sum", 1),
        ("training.run.errors", "sum", 1),
        ("training.step.duration", kind, 1),
    }
    assert sorted(tokens) == [("int", 1), ("int", 2)]


def test_an_sdk_exporter_that_prefers_deltas_gets_them() -> None:
    from opentelemetry.sdk.metrics import Counter, ObservableCounter
    from opentelemetry.sdk.metrics.export import AggregationTemporality, ConsoleMetricExporter

    delta = AggregationTemporality.DELTA
    assert SdkExporter(metric=ConsoleMetricExporter()).mapping_options == DEFAULT_OPTIONS
    of_counters = ConsoleMetricExporter(preferred_temporality={Counter: delta})
    assert SdkExporter(metric=of_counters).mapping_options == MappingOptions(temporality="lowmemory")
    of_all = ConsoleMetricExporter(preferred_temporality={Counter: delta, ObservableCounter: delta})
    assert SdkExporter(metric=of_all).mapping_options == DELTA


def test_a_change_of_preferences_goes_on_from_the_point_that_went_out(tmp_path: Path) -> None:
    """The checkpoint of the other temporality is not used."""

    class Receiving(MemoryExporter):
        signals = ("metrics",)

        def __init__(self, wants: MappingOptions) -> None:
            super().__init__(destination="there")
            self.signals, self.mapping_options = ("metrics",), wants

    training, how = Training(tmp_path), options(batch_bytes=2000)
    training.steps(60)
    found: list[Any] = []
    session = training.path
    for wants in (DEFAULT_OPTIONS, DELTA):
        exporter = Receiving(wants)
        if wants is DELTA:
            training.steps(60)
            session = training.end()
        with closing(DeliveryTask(training.path, "metrics", exporter, how)) as task:
            while task.advance(ALL):
                pass
        points: list[Any] = [point for _, point in exporter.records["metrics"]]
        found += [point[1:] for point in points if point[0].name == "training.step.duration" and point[2] is not None]
    assert session == training.path
    counts = [value.count for _, value in found]
    changed = next(n for n in range(1, len(counts)) if counts[n] < counts[n - 1])
    assert 0 < changed < len(counts) - 1
    assert found[changed][1].start == found[changed - 1][0]
    assert counts[changed - 1] + sum(counts[changed:]) == 120
