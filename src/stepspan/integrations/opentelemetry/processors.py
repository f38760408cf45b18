"""Straight to the journal: the processors and the metric exporter that `configure()` adds to OpenTelemetry's providers.

What each survives: a span that has ended and a log record that was emitted stand in the journal when `end()` or
`emit()` returns, so a SIGKILL loses only spans that are still open. Metrics stand there as of the last collection: what
was counted since (OTEL_METRIC_EXPORT_INTERVAL, 60 s at most) dies with the process.
"""

from __future__ import annotations

import os
from typing import Any

from opentelemetry.sdk._logs import LogRecordProcessor, ReadWriteLogRecord
from opentelemetry.sdk.metrics import Histogram
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.metrics.view import Aggregation, ExponentialBucketHistogramAggregation
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from stepspan.environment import unquoted
from stepspan.integrations.opentelemetry.sink import JournalSink
from stepspan.otlp.sdk_objects import log_fields, metric_fields, span_fields
from stepspan.run import Run

HISTOGRAM_AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
EXPONENTIAL = "base2_exponential_bucket_histogram"


class JournalSpanProcessor(JournalSink, SpanProcessor):
    """Writes each sampled span to the journal as it ends, in the thread that ends it: from then on it survives SIGKILL.

    Args:
        run: The run whose journal is written; None: whichever is open as a span ends, if any.

    """

    def on_end(self, span: ReadableSpan) -> None:
        """Write a span, if it is sampled; the SDK calls this in the thread that ends it.

        Args:
            span: A span that has ended.

        """
        context = span.get_span_context()
        if context is not None and context.trace_flags.sampled:
            self._record(lambda: span_fields(span))


class JournalLogRecordProcessor(JournalSink, LogRecordProcessor):
    """Writes each log record to the journal as it is emitted, in that thread: from then on it survives SIGKILL.

    Args:
        run: The run whose journal is written; None: whichever is open as a record is emitted, if any.

    """

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        """Write a log record; the SDK calls this in the thread that emits it.

        Args:
            log_record: As it was emitted, after the processors that were added before.

        """
        self._record(lambda: log_fields(log_record))


def preferred_aggregation() -> dict[type, Aggregation]:
    """What OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION says of an SDK's histograms; empty: its default."""
    wanted = unquoted(os.environ.get(HISTOGRAM_AGGREGATION, "")).strip().lower()
    return {Histogram: ExponentialBucketHistogramAggregation()} if wanted == EXPONENTIAL else {}


class JournalMetricExporter(JournalSink, MetricExporter):
    """Writes what a `PeriodicExportingMetricReader` collects to the journal: what was collected survives SIGKILL.

    Points are cumulative in the journal, whatever the variables say: for destinations that want deltas they become such
    on their way there. Histograms are what the variable of their aggregation says.

    Args:
        run: The run whose journal is written; None: whichever is open at a collection, if any.

    """

    def __init__(self, run: Run | None = None) -> None:
        super().__init__(run)
        self._preferred_aggregation = preferred_aggregation()

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any) -> MetricExportResult:
        """Write one event for each metric of a collection; the metric reader calls this.

        Args:
            metrics_data: What was collected.
            timeout_millis: Not needed: writing waits for no receiver.
            **options: Not needed.

        Returns:
            SUCCESS where all of them stand in the journal; FAILURE otherwise, and where no run is open.

        """
        result: MetricExportResult = self._export(None, metric_fields(metrics_data), MetricExportResult)
        return result
