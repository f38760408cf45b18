"""The contenders of `hot_path.py`: what a step of training does to be seen, with stepspan and with the SDK.

Each gives its blocks, name -> a function that does a step for each number it is given, and what waits until all that
was done is delivered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

JOB_ID = "hot-path"
Block = Callable[[Iterable[int]], None]


def stepspan_blocks(run: Any) -> dict[str, Block]:
    def step(numbers: Iterable[int]) -> None:
        for n in numbers:
            with run.step(n):
                run.log_metrics({"loss": n / 3, "lr": 3e-4, "grad_norm": n * 0.1, "accuracy": 0.9, "tokens": n / 7})

    def steps(numbers: Iterable[int]) -> None:
        for n in run.steps(numbers):
            run.log_metrics({"loss": n / 3, "lr": 3e-4, "grad_norm": n * 0.1, "accuracy": 0.9, "tokens": n / 7})

    def metrics(numbers: Iterable[int]) -> None:
        for n in numbers:
            run.log_metrics({"loss": n / 3, "lr": 3e-4, "grad_norm": n * 0.1, "accuracy": 0.9, "tokens": n / 7})

    def span(numbers: Iterable[int]) -> None:
        for _ in numbers:
            with run.span("forward"):
                pass

    return {"step": step, "steps": steps, "metrics": metrics, "span": span}


def sdk_blocks(tracer: Any, meter: Any) -> dict[str, Block]:
    """Blocks whose spans and values have the attributes that stepspan gives its own."""
    loss, lr, grad_norm, accuracy, tokens = gauges(meter)

    def step(numbers: Iterable[int]) -> None:
        for n in numbers:
            with tracer.start_as_current_span("training.step", attributes={"step": n, "split": "train", "epoch": 0}):
                loss.set(n / 3, {"split": "train"})
                lr.set(3e-4, {"split": "train"})
                grad_norm.set(n * 0.1, {"split": "train"})
                accuracy.set(0.9, {"split": "train"})
                tokens.set(n / 7, {"split": "train"})

    def metrics(numbers: Iterable[int]) -> None:
        for n in numbers:
            loss.set(n / 3, {"split": "train"})
            lr.set(3e-4, {"split": "train"})
            grad_norm.set(n * 0.1, {"split": "train"})
            accuracy.set(0.9, {"split": "train"})
            tokens.set(n / 7, {"split": "train"})

    def span(numbers: Iterable[int]) -> None:
        for _ in numbers:
            with tracer.start_as_current_span("forward"):
                pass

    return {"step": step, "metrics": metrics, "span": span}


def leanest_sdk_blocks(tracer: Any, meter: Any) -> dict[str, Block]:
    """The least that a program can do that has a span and five gauges: one attribute in all."""
    loss, lr, grad_norm, accuracy, tokens = gauges(meter)

    def step(numbers: Iterable[int]) -> None:
        for n in numbers:
            with tracer.start_as_current_span("training.step", attributes={"step": n}):
                loss.set(n / 3)
                lr.set(3e-4)
                grad_norm.set(n * 0.1)
                accuracy.set(0.9)
                tokens.set(n / 7)

    return {"step": step}


def gauges(meter: Any) -> list[Any]:
    return [meter.create_gauge(f"training.{name}") for name in ("loss", "lr", "grad_norm", "accuracy", "tokens")]


@contextlib.contextmanager
def stepspan_run(task: dict[str, Any]) -> Iterator[tuple[dict[str, Block], Callable[[], object]]]:
    """The blocks of an open run, and what waits until all is delivered."""
    import stepspan

    if task.get("with_sdk"):
        import opentelemetry.trace  # noqa: F401  # from here on steps are the current span of its context
    run = stepspan.start_run(
        job_id=JOB_ID, directory=task["directory"], endpoint=task.get("endpoint"), enabled=not task.get("disabled")
    )
    try:
        yield stepspan_blocks(run), lambda: run.flush(60.0)
    finally:
        if task.get("abandon"):
            end_deliverers()
        run.close()
        end_deliverers()


def end_deliverers() -> None:
    """Those that this process has started, and until they are gone: closing a run may have started one more."""
    import psutil

    found = psutil.Process().children()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(found, timeout=20)


@contextlib.contextmanager
def sdk(task: dict[str, Any]) -> Iterator[tuple[dict[str, Block], Callable[[], object]]]:
    """The same with the SDK, whose exporters discard or send to the receiver."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class DiscardSpans(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    class DiscardMetrics(MetricExporter):
        def export(self, metrics_data: Any, timeout_millis: float = 10_000, **_: Any) -> MetricExportResult:
            return MetricExportResult.SUCCESS

        def force_flush(self, timeout_millis: float = 10_000) -> bool:
            return True

        def shutdown(self, timeout_millis: float = 30_000, **_: Any) -> None:
            pass

    spans: SpanExporter = DiscardSpans()
    metrics: MetricExporter = DiscardMetrics()
    if task.get("endpoint"):
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        spans = OTLPSpanExporter(f"{task['endpoint']}/v1/traces")
        metrics = OTLPMetricExporter(f"{task['endpoint']}/v1/metrics")
    traced, metered = TracerProvider(), MeterProvider([PeriodicExportingMetricReader(metrics)])
    traced.add_span_processor(BatchSpanProcessor(spans))
    blocks = leanest_sdk_blocks if task["contender"] == "leanest" else sdk_blocks
    yield blocks(traced.get_tracer("training"), metered.get_meter("training")), traced.force_flush
    traced.shutdown()
    metered.shutdown()
