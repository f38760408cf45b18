"""The exporters that follow the journal: memory, OTLP with processors of its own, and any of the SDK's."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.delivery import Training, deliver, everything, options, trained
from harness.processes import until
from harness.receiver import Answer, ScriptedReceiver
from harness.runs import start
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import stepspan
from stepspan.deliver.threads import ThreadDelivery
from stepspan.errors import ConfigError
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.exporters.memory import MemoryExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.exporters.sdk import SdkExporter
from stepspan.mapping.records import SIGNALS
from stepspan.otlp.endpoint import PROTOCOLS
from stepspan.otlp.outcome import Verdict
from stepspan.processors import Drop, SampleSteps
from stepspan.run import Run
from stepspan.testing import FixedClock

start = start


class KeepingMetrics(MetricExporter):
    """The SDK has no exporter that keeps metrics."""

    def __init__(self, result: Any = MetricExportResult.SUCCESS) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.result, self.closed = result, False

    def export(self, metrics_data: Any, timeout_millis: int = 10_000, **kwargs: Any) -> Any:  # type: ignore[override]
        self.kept.append(metrics_data)
        return self.result

    def force_flush(self, timeout_millis: int = 10_000) -> bool:  # type: ignore[override]
        return True

    def shutdown(self, timeout_millis: int = 30_000, **kwargs: Any) -> None:  # type: ignore[override]
        self.closed = True

    def points(self, name: str) -> list[Any]:
        return [
            (point.time_unix_nano, point.value)
            for data in self.kept
            for metric in data.resource_metrics[0].scope_metrics[0].metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


class Raising(SpanExporter):
    def __init__(self) -> None:
        self.calls = 0

    def export(self, spans: Any) -> None:  # type: ignore[override]
        self.calls += 1
        raise RuntimeError("out of ideas")


def journal() -> JsonlExporter:
    """A millisecond for each event: of several points in one only the last goes out."""
    return JsonlExporter("runs", clock=FixedClock(time.time_ns()))


# ---------------------------------------------------------------- memory


def test_the_memory_exporter_keeps_what_it_is_given(tmp_path: Path) -> None:
    session = trained(tmp_path, 5)
    memory: Any = MemoryExporter()
    for signal in SIGNALS:
        task = deliver(session, memory, options(), signal)
        assert len(memory.records[signal]) == task.state.ledger.delivered == len(everything(session)[signal])
    assert {resource["rank"] for resource, _ in memory.records["metrics"]} == {0}
    assert [r[2] for _, r in memory.records["metrics"] if r[0].name == "training.lr" and r[2] is not None] == [0.5] * 5


def test_a_run_with_a_memory_exporter_delivers_on_a_thread(start: Callable[..., Run]) -> None:
    memory: Any = MemoryExporter()
    run = start(exporters=[journal(), memory])
    assert isinstance(run._delivery, ThreadDelivery)
    for step in range(5):
        with run.step(step):
            run.log_metrics({"loss": step})
    assert run.flush(10)
    losses = [r[2] for _, r in memory.records["metrics"] if r[0].name == "training.loss"]
    assert losses == [0, 1, 2, 3, 4]
    run.close()
    assert run.stats()["delivery"]["memory"]["metrics"]["finished"]


def test_a_run_that_ends_at_once_has_delivered_to_a_receiver_that_answers(start: Callable[..., Run]) -> None:
    memory: Any = MemoryExporter()
    with start(exporters=[journal(), memory]) as run:
        run.log_metrics({"loss": 0.5})
    assert [r[2] for _, r in memory.records["metrics"] if r[0].name == "training.loss"] == [0.5, None]
    assert {r.name for _, r in memory.records["traces"]} == {"training.run"}


# ---------------------------------------------------------------- OTLP


def test_an_exporters_processors_are_its_own(tmp_path: Path) -> None:
    session = trained(tmp_path, 12)
    with ScriptedReceiver() as receiver:
        sampled = OtlpExporter(receiver.url, env={}, destination="a", processors=[SampleSteps(every=4)])
        without = OtlpExporter(receiver.url, env={}, destination="b", processors=[Drop(metrics=["lr"])])
        with contextlib.closing(sampled), contextlib.closing(without):
            deliver(session, sampled, options())
            assert [
                p.number
                for p in sorted(receiver.points("training.step.number"), key=lambda p: p.time)
                if p.value is not None
            ] == [0, 4, 8]
            assert len([p for p in receiver.points("training.lr") if p.value is not None]) == 3
            receiver.requests["metrics"].clear()
            deliver(session, without, options())
            assert receiver.points("training.lr") == set()
            assert len([p for p in receiver.points("training.loss") if p.value is not None]) == 12


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_otlp_sends_each_signal_and_closes(tmp_path: Path, protocol: Any) -> None:
    session = trained(tmp_path, 5)
    with ScriptedReceiver() as receiver:
        endpoint = receiver.grpc_target if protocol == "grpc" else receiver.url
        exporter = OtlpExporter(endpoint, protocol=protocol, env={})
        for signal in exporter.signals:
            deliver(session, exporter, options(), signal)
        exporter.close()
        exporter.close()
        assert {seen.protocol for seen in receiver.seen} == {protocol}
        assert {seen.signal for seen in receiver.seen} == set(SIGNALS)
        assert len([p for p in receiver.points("training.loss") if p.value is not None]) == 5
        assert len([s for s in receiver.spans() if s["name"] == "training.step"]) == 5


def test_a_signal_that_is_switched_off_is_not_sent_and_changes_no_name() -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    both = OtlpExporter(env=env)
    one = OtlpExporter(env={**env, "OTEL_TRACES_EXPORTER": "none"})
    assert set(both.signals) - set(one.signals) == {"traces"}
    assert one.destination == both.destination
    assert OtlpExporter(env={}).signals == ()


# ---------------------------------------------------------------- the SDK's


def test_sdk_needs_at_least_one_exporter() -> None:
    with pytest.raises(ConfigError, match="span="):
        SdkExporter()


def test_sdk_exporters_in_memory_get_spans_points_and_logs(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(8, value=lambda n: "NaN" if n == 3 else float(n))
    session = training.end()
    spans, logs, points = InMemorySpanExporter(), InMemoryLogRecordExporter(), KeepingMetrics()  # type: ignore[no-untyped-call]
    exporter = SdkExporter(span=spans, metric=points, log=logs)
    assert set(exporter.signals) == set(SIGNALS)
    for signal in exporter.signals:
        task = deliver(session, exporter, options(), signal)
        assert task.state.ledger.delivered == len(everything(session)[signal])
    steps = [span for span in spans.get_finished_spans() if span.name == "training.step"]
    assert [span.attributes["step"] for span in steps] == [*range(8)]  # type: ignore[index]
    assert steps[0].resource.attributes["rank"] == 0
    values = [value for _, value in points.points("training.loss")]
    assert values[:3] == [0.0, 1.0, 2.0]
    assert math.isnan(values[3])
    assert len(values) == 8, "the end of a series can't be said"
    assert [log.log_record.event_name for log in logs.get_finished_logs()] == ["milestone"] * 2
    exporter.close()
    assert points.closed


def test_a_run_with_sdk_exporters_and_a_flush(start: Callable[..., Run]) -> None:
    spans, points = InMemorySpanExporter(), KeepingMetrics()
    with start(exporters=[journal(), SdkExporter(span=spans, metric=points)]) as run:
        for step in range(3):
            with run.step(step):
                run.log_metrics({"loss": step / 2})
        assert run.flush(10)
        assert [value for _, value in points.points("training.loss")] == [0.0, 0.5, 1.0]
    assert points.closed


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_official_exporters_deliver_to_a_receiver(tmp_path: Path, kind: str) -> None:
    session = trained(tmp_path, 8)
    with ScriptedReceiver() as ours, ScriptedReceiver() as theirs:
        own = OtlpExporter(ours.url, env={}, destination="own")
        metric = (
            OTLPMetricExporter(endpoint=f"{theirs.url}/v1/metrics")
            if kind == "http"
            else GrpcMetricExporter(endpoint=theirs.grpc_target, insecure=True)
        )
        sdk = SdkExporter(
            metric=metric,
            span=OTLPSpanExporter(endpoint=f"{theirs.url}/v1/traces"),
            log=OTLPLogExporter(endpoint=f"{theirs.url}/v1/logs"),
        )
        for signal in SIGNALS:
            deliver(session, own, options(), signal)
            deliver(session, sdk, options(), signal)
        assert theirs.points() == {point for point in ours.points() if point.value is not None}
        assert theirs.spans() == ours.spans()
        assert theirs.logs() == ours.logs()
        own.close()
        sdk.close()


def test_a_failure_of_an_sdk_exporter_is_retried_then_held_and_never_rejected(tmp_path: Path) -> None:
    session = trained(tmp_path, 3)
    exporter = SdkExporter(metric=KeepingMetrics(MetricExportResult.FAILURE))
    outcome = exporter.export("metrics", {}, [])
    assert outcome.verdict is Verdict.RETRY_THEN_HOLD
    assert "KeepingMetrics answered" in outcome.message
    from stepspan.deliver.task import DeliveryTask

    task = DeliveryTask(session, "metrics", exporter, options())
    for _ in range(5):
        task.advance(1 << 62)
    assert task.held
    assert task.state.ledger.rejected == 0
    task.close()


def test_an_sdk_exporter_that_raises_stops_its_signal_only(start: Callable[..., Run]) -> None:
    raising, points = Raising(), KeepingMetrics()
    run = start(exporters=[SdkExporter(span=raising, metric=points)], directory="runs")
    with run.step(0):
        run.log_metrics({"loss": 0.5})
    until(lambda: points.points("training.loss") and raising.calls)
    run.log_metrics({"loss": 0.25})
    until(lambda: len(points.points("training.loss")) == 2)
    ledger = run.stats()["delivery"]["sdk"]
    assert ledger["traces"]["state"] == "retry"
    assert "RuntimeError('out of ideas')" in ledger["traces"]["message"]
    assert ledger["traces"]["rejected"] == 0
    before = time.monotonic()
    run.close()
    assert time.monotonic() - before < 7


def test_official_exporters_to_a_receiver_that_is_away_cost_the_end_of_a_run_less_than_a_second(
    start: Callable[..., Run],
) -> None:
    with ScriptedReceiver() as receiver:
        receiver.script("all", lambda _: Answer(then="hang"))
        sdk = SdkExporter(span=OTLPSpanExporter(endpoint=f"{receiver.url}/v1/traces", timeout=1))
        run = start(exporters=[sdk], directory="runs")
        run.log_metrics({"loss": 0.5})
        before = time.monotonic()
        run.close()
        assert time.monotonic() - before < 1.0
        assert receiver.spans() == []
        assert run.stats()["journaled"] == 4, "it is all in the journal"


def test_exporters_that_are_none_are_refused_with_what_they_lack(start: Callable[..., Run]) -> None:
    with pytest.raises(stepspan.errors.ConfigError, match="it lacks destination"):
        start(exporters=[object()], directory="runs")
