"""Standard SDK exporters that write to a journal: `OTEL_TRACES_EXPORTER=stepspan_jsonl opentelemetry-instrument …`.

What they survive: the SDK puts a batch processor before an exporter, and what that holds (spans and logs of the last
5 s or less, by OTEL_BSP_SCHEDULE_DELAY and OTEL_BLRP_SCHEDULE_DELAY) is lost in a SIGKILL. What was exported is safe.
`configure()` has no batch processor and does not lose it.

Where a run is open in the process when a batch comes they write to its journal. Elsewhere they open a run of their
own, all three one, when the first of them has something to write: its Resource is the SDK's with stepspan's identity,
nothing delivers it, and `stepspan sync` or `stepspan export` take it from there. It ends when the last exporter is shut
down.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from stepspan import start
from stepspan.disabled import DISABLED
from stepspan.events import Event
from stepspan.integrations.opentelemetry import encoding
from stepspan.integrations.opentelemetry.processors import DEEPEST, writing
from stepspan.run import Run

Result = TypeVar("Result")
Events: TypeAlias = Callable[[], Iterable[Event]]
log = logging.getLogger("stepspan")

QUIET: dict[str, Any] = {"stall_after": 0, "samplers": []}
"""Settings that switch off what watches over a training: this may be any program."""
PATIENCE = 5.0
"""Seconds that one thread waits for another to begin the run. That one may log meanwhile, and wait for a lock of
`logging` which this one holds."""


class _Shared:
    """The run of this process's exporters that write below one directory, where nobody else has one open."""

    def __init__(self, directory: Path | None) -> None:
        self.users = 0
        self.run: Run | None = None
        self.lock = threading.Lock()
        self._directory = directory
        self._told = False

    @property
    def is_open(self) -> bool:
        """Whether the run has begun and not ended."""
        return self.run is not None and not self.run.closed

    def open(self, resource: Resource) -> Run:
        """The run, begun by the first who asks. Raises `ConfigError` and OSError."""
        if not self.lock.acquire(timeout=PATIENCE):
            raise TimeoutError(f"another thread has been opening it for {PATIENCE:g} s")
        try:
            if self.run is None or self.run.closed:
                self.run = _begin(self._directory, resource)
            return self.run
        finally:
            self.lock.release()

    def warn_once(self, error: Exception) -> None:
        """Say what goes wrong the first time."""
        if not self._told:
            self._told = True
            log.warning("OpenTelemetry's records cannot be written to a journal: %s (told once)", error)

    def release(self) -> None:
        """One exporter is shut down; with the last one the run ends."""
        self.users -= 1
        if self.users <= 0 and self.run is not None:
            self.run.close()

    def after_fork(self) -> None:
        """In a forked child: the run goes on in a session of its own when something is written."""
        self.lock = threading.Lock()
        if self.run is not None and not self.run.closed:
            self.run.after_fork(start._forks)


_shared: dict[Path | None, _Shared] = {}


class _Jsonl:
    """What the three exporters have in common."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        key = None if directory is None else Path(os.path.abspath(directory))
        self._shared = _shared.setdefault(key, _Shared(key))
        self._shared.users += 1
        self._shut = False

    def _export(self, resource: Resource | None, events: Events, yes: Result, no: Result) -> Result:
        """Write events; `yes` where all of them stand in the journal."""
        if self._shut:
            return no
        with writing() as depth:
            try:
                return yes if depth < DEEPEST and self._write(resource, events, begins=not depth) else no
            except Exception as error:  # bad settings, or no place for a journal: the SDK's worker goes on
                self._shared.warn_once(error)
                return no

    def _write(self, resource: Resource | None, events: Events, *, begins: bool) -> bool:
        run = start.current_run()
        if run is DISABLED:
            if not begins and not self._shared.is_open:  # what the run itself logs as it begins has no place yet
                return False
            run = self._shared.open(resource or Resource({}))
        if run is DISABLED:  # switched off: nobody wants it
            return True
        lost = _lost(run)
        for fields in events():
            run.emit_background({"ts": 0, "seq": 0, "tag": "otel", **fields})
        return _lost(run) == lost

    def shutdown(self, *args: Any, **options: Any) -> None:
        """Take nothing more. The run that these exporters have opened ends with the last of them."""
        if not self._shut:
            self._shut = True
            self._shared.release()

    def force_flush(self, timeout_millis: float = 30_000) -> bool:
        """Nothing waits here."""
        return True


class JsonlSpanExporter(_Jsonl, SpanExporter):
    """Writes spans to a journal below `directory`, by default STEPSPAN_DIRECTORY or "stepspan-runs"."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """SUCCESS: all of them stand in the journal."""
        resource = spans[0].resource if spans else None
        found = lambda: map(encoding.span, spans)  # noqa: E731 # run where a failure is counted
        return self._export(resource, found, SpanExportResult.SUCCESS, SpanExportResult.FAILURE)


class JsonlLogRecordExporter(_Jsonl, LogRecordExporter):
    """Writes log records to a journal below `directory`, by default STEPSPAN_DIRECTORY or "stepspan-runs"."""

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        """SUCCESS: all of them stand in the journal."""
        resource = batch[0].resource if batch else None
        found = lambda: map(encoding.log, batch)  # noqa: E731
        return self._export(resource, found, LogRecordExportResult.SUCCESS, LogRecordExportResult.FAILURE)


class JsonlMetricExporter(_Jsonl, MetricExporter):
    """Writes metrics to a journal below `directory`, by default STEPSPAN_DIRECTORY or "stepspan-runs". Cumulative."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        MetricExporter.__init__(self)
        _Jsonl.__init__(self, directory)

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any) -> MetricExportResult:
        """SUCCESS: all of them stand in the journal."""
        resource = next((one.resource for one in metrics_data.resource_metrics), None)
        found = lambda: encoding.metrics(metrics_data)  # noqa: E731
        return self._export(resource, found, MetricExportResult.SUCCESS, MetricExportResult.FAILURE)


def _begin(directory: Path | None, resource: Resource) -> Run:
    """A run beside everything else: nothing is delivered, sampled or watched, and its spans are nobody's parents."""
    from stepspan import config

    attributes = dict(resource.attributes)
    service = str(attributes.pop("service.name", ""))
    attributes.pop("service.instance.id", None)
    given = {
        "directory": directory,
        "resource": attributes,
        "service_name": None if service.startswith("unknown_service") else service or None,
        "propagate": False,
        **QUIET,
    }
    settings = config.load(given, os.environ)
    return start._assemble(settings, {}, (), ()) if settings.enabled else DISABLED


def _lost(run: Run) -> int:
    writer = run.pipeline.journal.writer
    return 0 if writer is None else writer.lost


def _after_fork_in_child() -> None:
    for shared in _shared.values():
        shared.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
