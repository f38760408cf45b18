"""`configure()`: any OpenTelemetry program's spans, log records and metrics on the journal, in two lines."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from opentelemetry import _logs, metrics, trace
from opentelemetry._logs._internal import ProxyLoggerProvider
from opentelemetry.metrics._internal import _ProxyMeterProvider
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider

from stepspan.disabled import DISABLED
from stepspan.integrations.opentelemetry.processors import (
    JournalLogRecordProcessor,
    JournalMetricExporter,
    JournalSpanProcessor,
)
from stepspan.run import Run
from stepspan.start import current_run, start_run

if TYPE_CHECKING:
    from typing_extensions import Self


class Configured:
    """What `configure()` has set up; a context manager. `run` is the run whose journal it is."""

    def __init__(self, run: Run, owned: bool) -> None:
        self.run = run
        self._owned = owned
        self._stopped = False
        self._follows = False
        """Whether it writes to whichever run is open."""
        self._processors: list[JournalSpanProcessor | JournalLogRecordProcessor] = []
        self._reader: PeriodicExportingMetricReader | None = None

    def add(self, run: Run | None, tracing: Any) -> None:
        """Add our processors to the global providers. `run`: None for whichever is open."""
        self._follows = run is None
        logging = _provider(_logs.get_logger_provider(), ProxyLoggerProvider, _install_logging)
        if isinstance(tracing, TracerProvider):
            spans = JournalSpanProcessor(run)
            tracing.add_span_processor(spans)
            self._processors.append(spans)
        if isinstance(logging, LoggerProvider):
            logs = JournalLogRecordProcessor(run)
            logging.add_log_record_processor(logs)
            self._processors.append(logs)
        for provider, kind in ((tracing, TracerProvider), (logging, LoggerProvider)):
            if not isinstance(provider, kind):
                self._refused(provider)
        self._add_reader(run)

    def _add_reader(self, run: Run | None) -> None:
        metering = metrics.get_meter_provider()
        fresh = isinstance(metering, _ProxyMeterProvider)
        add = getattr(metering, "add_metric_reader", None)  # not before SDK 1.42 or so
        if not fresh and add is None:
            self._refused(metering)
            return
        self._reader = PeriodicExportingMetricReader(JournalMetricExporter(run))
        if fresh:  # the reader is shut down here, before the run ends, and not by the provider
            metrics.set_meter_provider(MeterProvider([self._reader], shutdown_on_exit=False))
        elif add is not None:
            add(self._reader)

    def _refused(self, provider: Any) -> None:
        told = f"{type(provider).__module__}.{type(provider).__qualname__}"
        self.run.warn_once(told, f"{told} takes nothing of ours beside what it has: what it gets is not recorded")

    def serves(self, run: Run | None) -> bool:
        """Whether what `configure(run)` would add is there already; then `run` is the one that it asks for."""
        found = run or current_run()
        if self._stopped or found.closed or not (self.run is found or (self._follows and found is current_run())):
            return False
        if found is DISABLED:
            self.run, self._owned = start_run(), True
        elif found is not self.run:
            self.run, self._owned = found, False
        return True

    def force_flush(self, timeout: float = 5.0) -> bool:
        """Collect the metrics now, and wait for delivery as `Run.flush` does. Spans and logs need none to be kept."""
        if self._reader is not None:
            self._reader.force_flush(timeout * 1000)
        return self.run.flush(timeout)

    def shutdown(self) -> None:
        """Collect the metrics for the last time, take nothing more, and end the run if `configure()` has begun it.

        The providers stay, for OpenTelemetry has no way to take them back; `configure()` may be called again.
        """
        atexit.unregister(self.stop)
        self.stop()
        if self._owned:
            self.run.close()

    def stop(self) -> None:
        """The same, without ending the run: at exit it learns what has ended the process."""
        self._stopped = True
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.shutdown()
        for processor in self._processors:
            processor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owned and error is not None:
            self.run.__exit__(kind, error, traceback)
        self.shutdown()


_latest: Configured | None = None


def configure(run: Run | None = None) -> Configured:
    """Put what OpenTelemetry instrumentation emits in this process on the journal of a run.

    ```python
    from stepspan.integrations.opentelemetry import configure
    configure()
    ```

    `run`: the run; None: whichever is open, or a new one with the defaults of `stepspan.start_run()`, which ends with
    the process or with `shutdown()`.

    Where no TracerProvider, LoggerProvider or MeterProvider is installed one is, with the SDK's own defaults and
    OTEL_* variables; to one that is, our processors are added beside what it has. A sampler is never replaced. Spans
    made inside a step are its children, unless a sampler decides that such a parent would overrule; then set
    `propagate` (STEPSPAN_PROPAGATE=1) to have it so.

    What survives a SIGKILL: spans that have ended and log records that were emitted, all of them; metrics as of the
    last collection (OTEL_METRIC_EXPORT_INTERVAL, 60 s).

    Called again before `shutdown()`, by a notebook's cell or by a library and its application, it returns what the
    first call did.

    Raises what `start_run` raises. A provider that takes nothing beside what it has is left alone, and said once.
    """
    global _latest
    if _latest is not None and _latest.serves(run):
        return _latest
    tracing = _provider(trace.get_tracer_provider(), trace.ProxyTracerProvider, _install_tracing)
    found = run or current_run()
    configured = Configured(found, owned=False) if found is not DISABLED else Configured(start_run(), owned=True)
    if configured.run is not DISABLED:
        configured.add(run, tracing)
        _latest = configured
        atexit.register(configured.stop)
    return configured


def _provider(installed: Any, proxy: type, install: Callable[[], Any]) -> Any:
    """The global provider; where only the API's stand-in is there, one that is installed now."""
    return install() if isinstance(installed, proxy) else installed


def _install_tracing() -> TracerProvider:
    provider = TracerProvider()
    trace.set_tracer_provider(provider)
    return provider


def _install_logging() -> LoggerProvider:
    provider = LoggerProvider()
    _logs.set_logger_provider(provider)
    return provider
