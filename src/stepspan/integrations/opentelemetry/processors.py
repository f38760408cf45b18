"""Straight to the journal: what a span processor, a log record processor and a metric exporter of ours do.

What each survives: a span that has ended and a log record that was emitted stand in the journal when `end()` or
`emit()` returns, so a SIGKILL loses only spans that are still open. Metrics stand there as of the last collection: what
was counted since (OTEL_METRIC_EXPORT_INTERVAL, 60 s at most) dies with the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk._logs import LogRecordProcessor, ReadWriteLogRecord
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from stepspan.disabled import DISABLED
from stepspan.events import Event
from stepspan.integrations.opentelemetry import encoding
from stepspan.run import Run
from stepspan.start import current_run

DEEPEST = 2
"""What is emitted while an event is being written, by a signal handler say, is written too; what is emitted within that
is not: a processor that logs to OpenTelemetry would never end."""

_inside = threading.local()


@contextmanager
def writing() -> Iterator[int]:
    """How deep this thread already was in its own writing: from `DEEPEST` on it may not write."""
    depth = getattr(_inside, "depth", 0)
    _inside.depth = depth + 1
    try:
        yield depth
    finally:
        _inside.depth = depth


class _Journal:
    """The run that records go to: a given one, or whichever is open."""

    def __init__(self, run: Run | None = None) -> None:
        self._run = run
        self._shut = False

    @property
    def _open(self) -> Run | None:
        run = self._run or current_run()
        return None if self._shut or run is DISABLED or run.closed else run

    def _write(self, fields: Callable[[], Event]) -> None:
        run = self._open
        if run is not None:
            with writing() as depth:
                if depth < DEEPEST:
                    run._record("otel", lambda: {"parent": run._scopes.around(), **fields()})

    def shutdown(self, *args: Any, **options: Any) -> None:
        """Take nothing more."""
        self._shut = True

    def force_flush(self, timeout_millis: float = 30_000) -> bool:
        """Nothing waits."""
        return True


class JournalSpanProcessor(_Journal, SpanProcessor):
    """Writes each sampled span to the journal as it ends, in the thread that ends it: from then on it survives SIGKILL.

    `run`: whose journal; None: that of the run that is open at the time, if any.
    """

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing: a span that has not ended is not written."""

    def on_end(self, span: ReadableSpan) -> None:
        """Write it."""
        context = span.get_span_context()
        if context is not None and context.trace_flags.sampled:
            self._write(lambda: encoding.span(span))


class JournalLogRecordProcessor(_Journal, LogRecordProcessor):
    """Writes each log record to the journal as it is emitted, in that thread: from then on it survives SIGKILL.

    `run`: whose journal; None: that of the run that is open at the time, if any.
    """

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        """Write it."""
        self._write(lambda: encoding.log(log_record))


class JournalMetricExporter(_Journal, MetricExporter):
    """Writes what a `PeriodicExportingMetricReader` collects to the journal: what was collected survives SIGKILL.

    Cumulative, whatever the variables say: Prometheus takes no deltas. `run`: whose journal; None: that of the run that
    is open at the time, if any.
    """

    def __init__(self, run: Run | None = None) -> None:
        MetricExporter.__init__(self)
        _Journal.__init__(self, run)

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any) -> MetricExportResult:
        """Write one event a metric. They are no sign that training goes on."""
        run = self._open
        if run is None:
            return MetricExportResult.FAILURE
        for fields in encoding.metrics(metrics_data):
            run.emit_background({"ts": 0, "seq": 0, "tag": "otel", **fields})
        return MetricExportResult.SUCCESS
