"""`configure()`: any OpenTelemetry program's spans, log records and metrics on the journal, in two lines."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from opentelemetry import _logs, metrics, trace
from opentelemetry._logs._internal import ProxyLoggerProvider
from opentelemetry.metrics._internal import _ProxyMeterProvider
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider

from stepspan.integrations.opentelemetry.processors import (
    JournalLogRecordProcessor,
    JournalMetricExporter,
    JournalSpanProcessor,
)
from stepspan.integrations.opentelemetry.variables import readable_variables
from stepspan.recording.open_runs import OPEN_RUNS
from stepspan.run import DISABLED, Run, current_run
from stepspan.start import check_arguments, start_run

if TYPE_CHECKING:
    from typing_extensions import Self


class Configured(AbstractContextManager["Configured"]):
    """What `configure()` has set up: a context manager, which shuts it down.

    Args:
        run: The run whose journal is written; None: a new one.
        arguments: Of `start_run`, for the new one.

    Attributes:
        run: The run whose journal is written, as of the last `configure()`.

    """

    def __init__(self, run: Run | None, arguments: Mapping[str, Any]) -> None:
        self._own: Run | None = None
        """The run that `configure()` has begun, and that is ended here."""
        self.run = run or self._begin(arguments)
        self._stopped = False
        self._blocks = 0
        """How many `with` blocks go on that it was entered for."""
        self._follows = False
        """Whether it writes to whichever run is open."""
        self._processors: list[JournalSpanProcessor | JournalLogRecordProcessor] = []
        self._reader: PeriodicExportingMetricReader | None = None

    def add(self, run: Run | None, tracer_provider: Any) -> None:
        """Add our processors and our metric reader to the global providers.

        Args:
            run: The run to write to; None: whichever is open.
            tracer_provider: The global one. `configure` has it installed before it starts a run, so that the run's own
                scopes find it.

        """
        self._follows = run is None
        logger_provider = _provider(
            _logs.get_logger_provider, _logs.set_logger_provider, ProxyLoggerProvider, LoggerProvider
        )
        self._add_processor(JournalSpanProcessor(run), tracer_provider, "add_span_processor")
        self._add_processor(JournalLogRecordProcessor(run), logger_provider, "add_log_record_processor")
        self._add_reader(run)

    def _add_processor(
        self, processor: JournalSpanProcessor | JournalLogRecordProcessor, provider: Any, method: str
    ) -> None:
        if isinstance(provider, (TracerProvider, LoggerProvider)):
            getattr(provider, method)(processor)
            self._processors.append(processor)
        else:
            self._warn_not_extensible(provider)

    def _add_reader(self, run: Run | None) -> None:
        meter_provider = metrics.get_meter_provider()
        if isinstance(meter_provider, _ProxyMeterProvider):
            self._reader = PeriodicExportingMetricReader(JournalMetricExporter(run))
            # The reader is shut down here, before the run ends, and not by the provider.
            metrics.set_meter_provider(MeterProvider([self._reader], shutdown_on_exit=False))
        elif hasattr(meter_provider, "add_metric_reader"):  # not before SDK 1.42 or so
            self._reader = PeriodicExportingMetricReader(JournalMetricExporter(run))
            meter_provider.add_metric_reader(self._reader)
        else:
            self._warn_not_extensible(meter_provider)

    def _warn_not_extensible(self, provider: Any) -> None:
        name = f"{type(provider).__module__}.{type(provider).__qualname__}"
        self.run._warn_once(name, f"{name} takes no further processor or reader: what it gets is not recorded")

    def serves(self, run: Run | None, arguments: Mapping[str, Any]) -> bool:
        """Whether what `configure(run)` would add is there already; if so, `self.run` becomes the run it asks for."""
        wanted = run or current_run()
        if self._stopped or wanted.closed or not (self.run is wanted or (self._follows and wanted is current_run())):
            return False
        self.run = self._begin(arguments) if _is_wanting(wanted) else wanted
        return True

    def _begin(self, arguments: Mapping[str, Any]) -> Run:
        self._own = start_run(**arguments)._hold(is_substitute=True)
        return self._own

    def force_flush(self, timeout: float = 5.0) -> bool:
        """Collect the metrics now, and wait for delivery. Spans and logs are kept without it.

        Args:
            timeout: Seconds to collect, and seconds to wait for delivery.

        Returns:
            Whether every destination has taken all events so far, as `Run.flush` does.

        """
        if self._reader is not None:
            self._reader.force_flush(timeout * 1000)
        return self.run.flush(timeout)

    def shutdown(self) -> None:
        """Collect the metrics for the last time, take nothing more, and end the run if `configure()` has begun it.

        The providers stay, for OpenTelemetry has no way to remove them; `configure()` may be called again.
        """
        atexit.unregister(self.stop)
        self.stop()
        if self._own is not None:
            self._own.close()

    def stop(self) -> None:
        """Shut down without ending the run: at exit the run itself learns what has ended the process."""
        self._stopped = True
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.shutdown()
        for processor in self._processors:
            processor.shutdown()

    def __enter__(self) -> Self:
        self._blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._blocks -= 1
        if self._blocks > 0:  # of other runs, or around this one
            return
        if self._own is not None and error is not None:
            self._own.__exit__(kind, error, traceback)
        self.shutdown()


_latest: Configured | None = None


def configure(run: Run | None = None, **arguments: Any) -> Configured:
    """Put what OpenTelemetry instrumentation emits in this process on the journal of a run.

    ```python
    from stepspan.integrations.opentelemetry import configure
    configure()
    ```

    Where no TracerProvider, LoggerProvider or MeterProvider is installed one is, with the SDK's own defaults and
    OTEL_* variables; to one that is, our processors are added beside what it has. A sampler is never replaced. Spans
    made inside a step are its children, unless a sampler decides that such a parent would overrule; then set
    `propagate` (STEPSPAN_PROPAGATE=1) to have it so. A provider that takes no further processor is left alone, with a
    warning.

    What survives a SIGKILL: spans that have ended and log records that were emitted, all of them; metrics as of the
    last collection (OTEL_METRIC_EXPORT_INTERVAL, 60 s).

    Args:
        run: The run whose journal is written; None: whichever is `current_run()` where a span ends or a line is logged,
            or a new one, which ends with the process or with `shutdown()`.
        **arguments: Of `stepspan.start_run`, for the new one.

    Returns:
        What was set up. Called again before its `shutdown()`, by a notebook's cell or by a library and its application,
        `configure` returns the same object.

    Raises:
        ConfigError: As `start_run` does.
        TypeError: An argument is none of `start_run`'s.

    """
    global _latest
    check_arguments(arguments)
    if _latest is not None and _latest.serves(run, arguments):
        return _latest
    with readable_variables():
        tracer_provider = _provider(
            trace.get_tracer_provider, trace.set_tracer_provider, trace.ProxyTracerProvider, TracerProvider
        )
        wanted = run or current_run()
        configured = Configured(None if _is_wanting(wanted) else wanted, arguments)
        if configured.run is not DISABLED:
            configured.add(run, tracer_provider)
            _latest = configured
            atexit.register(configured.stop)
    return configured


def _is_wanting(run: Run) -> bool:
    """Whether no run is open, and no `with start_run(enabled=False)` block says that none is to be."""
    return run is DISABLED and OPEN_RUNS.here() is None


def _provider(get: Callable[[], Any], install: Callable[[Any], None], proxy: type, kind: Callable[[], Any]) -> Any:
    """The global provider; one of the SDK's that is installed now, where only the API's proxy is there."""
    provider = get()
    if isinstance(provider, proxy):
        provider = kind()
        install(provider)
    return provider
