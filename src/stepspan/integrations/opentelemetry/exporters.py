"""Standard SDK exporters that write to a journal: `OTEL_TRACES_EXPORTER=stepspan_jsonl opentelemetry-instrument …`.

What they survive: the SDK puts a batch processor before an exporter, and what that holds (spans and logs of the last
5 s or less, by OTEL_BSP_SCHEDULE_DELAY and OTEL_BLRP_SCHEDULE_DELAY) is lost in a SIGKILL. What was exported is safe.
`configure()` has no batch processor and does not lose it.

Where a run is open in the process when a batch comes they write to its journal. Elsewhere they open a run of their
own, one for all exporters of a directory, when the first of them has something to write: its Resource is the SDK's with
stepspan's identity, nothing delivers it, and `stepspan sync` or `stepspan export` take it from there. It ends when the
last of these exporters is shut down.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from stepspan import start
from stepspan.integrations.opentelemetry.processors import preferred_aggregation
from stepspan.integrations.opentelemetry.sink import JournalSink
from stepspan.otlp.sdk_objects import log_fields, metric_fields, span_fields
from stepspan.run import DISABLED, Run

log = logging.getLogger("stepspan")

OPEN_TIMEOUT_S = 5.0
"""How long a thread waits for another one to open the run. That one may log meanwhile, and wait for a lock of `logging`
which this one holds."""


class _SharedRun:
    """The run of this process's exporters that write below one directory, for when no other run is open.

    Attributes:
        users: Number of exporters that are not shut down; the run ends with the last of them.
        run: None until the first of them has something to write.
        warned: Classes of the failures that were logged: only the first one of each is.

    """

    def __init__(self, directory: Path | None) -> None:
        self.users = 0
        self.run: Run | None = None
        self.lock = threading.Lock()
        self._directory = directory
        self.warned: set[type] = set()

    def open(self, resource: Resource) -> Run:
        """Return the run; the first call opens it.

        Args:
            resource: The SDK's, whose attributes the run's Resource takes over.

        Raises:
            ConfigError: A setting is wrong.
            OSError: No journal can be kept.
            TimeoutError: Another thread has been opening it for `OPEN_TIMEOUT_S`.

        """
        if not self.lock.acquire(timeout=OPEN_TIMEOUT_S):
            raise TimeoutError(f"another thread has been opening it for {OPEN_TIMEOUT_S:g} s")
        try:
            if self.run is None or self.run.closed:
                self.run = _open_run(self._directory, resource)
            return self.run
        finally:
            self.lock.release()

    def after_fork(self) -> None:
        """In a forked child: the run goes on in a session of its own when something is written."""
        self.lock = threading.Lock()
        if self.run is not None and not self.run.closed:
            self.run._after_fork()


_shared_runs: dict[Path | None, _SharedRun] = {}


class _JsonlSink(JournalSink):
    """What the three exporters have in common."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        key = None if directory is None else Path(os.path.abspath(directory))
        self._shared = _shared_runs.setdefault(key, _SharedRun(key))
        self._shared.users += 1

    def _run(self, resource: Resource | None = None, *, nested: bool = False) -> Run | None:
        run = super()._run()
        if run is not None:
            return run
        is_open = self._shared.run is not None and not self._shared.run.closed
        if nested and not is_open:  # what is logged as the run is opened has no journal yet
            return None
        return self._shared.open(resource or Resource({}))

    def _warn(self, error: Exception) -> None:
        if type(error) not in self._shared.warned:
            self._shared.warned.add(type(error))
            log.warning("stepspan: OpenTelemetry's records cannot be written to a journal: %s (logged once)", error)

    def shutdown(self, *args: Any, **options: Any) -> None:
        """Take nothing more. The run that these exporters have opened ends with the last of them."""
        if not self._shut_down:
            super().shutdown()
            self._shared.users -= 1
            if self._shared.users <= 0 and self._shared.run is not None:
                self._shared.run.close()


class JsonlSpanExporter(_JsonlSink, SpanExporter):
    """Writes spans to a journal.

    Args:
        directory: Where the journal of a run lies that this exporter has to open; by default STEPSPAN_DIRECTORY, or
            "stepspan-runs".

    """

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write a batch of ended spans; the SDK's span processor calls this.

        Args:
            spans: Spans of one Resource.

        Returns:
            SUCCESS where all of them stand in the journal, else FAILURE.

        """
        resource = spans[0].resource if spans else None
        result: SpanExportResult = self._export(resource, map(span_fields, spans), SpanExportResult)
        return result


class JsonlLogRecordExporter(_JsonlSink, LogRecordExporter):
    """Writes log records to a journal.

    Args:
        directory: Where the journal of a run lies that this exporter has to open; by default STEPSPAN_DIRECTORY, or
            "stepspan-runs".

    """

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        """Write a batch of log records; the SDK's log record processor calls this.

        Args:
            batch: Log records of one Resource.

        Returns:
            SUCCESS where all of them stand in the journal, else FAILURE.

        """
        resource = batch[0].resource if batch else None
        result: LogRecordExportResult = self._export(resource, map(log_fields, batch), LogRecordExportResult)
        return result


class JsonlMetricExporter(_JsonlSink, MetricExporter):
    """Writes metrics to a journal, with cumulative points, and histograms as the variable of their aggregation says.

    Args:
        directory: Where the journal of a run lies that this exporter has to open; by default STEPSPAN_DIRECTORY, or
            "stepspan-runs".

    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        super().__init__(directory)
        self._preferred_aggregation = preferred_aggregation()

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any) -> MetricExportResult:
        """Write one event for each metric of a collection; the SDK's metric reader calls this.

        Args:
            metrics_data: What was collected.
            timeout_millis: Not needed: writing waits for no receiver.
            **options: Not needed.

        Returns:
            SUCCESS where all of it stands in the journal, else FAILURE.

        """
        resource = next((one.resource for one in metrics_data.resource_metrics), None)
        result: MetricExportResult = self._export(resource, metric_fields(metrics_data), MetricExportResult)
        return result


def _open_run(directory: Path | None, resource: Resource) -> Run:
    """A run for these exporters alone: nothing is delivered, sampled or watched, and its spans are no one's parents."""
    from stepspan import config

    attributes = dict(resource.attributes)
    service = str(attributes.pop("service.name", ""))
    attributes.pop("service.instance.id", None)
    given: dict[str, Any] = {
        "directory": directory,
        "resource": attributes,
        "service_name": None if service.startswith("unknown_service") else service or None,
        "propagate": False,
        # No watching over a training: this may be any program.
        "stall_after": 0,
        "samplers": [],
    }
    settings = config.load(given, os.environ)
    return start.open_run(settings, exporters=(), label="opentelemetry") if settings.enabled else DISABLED


def _after_fork_in_child() -> None:
    for shared in _shared_runs.values():
        shared.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
