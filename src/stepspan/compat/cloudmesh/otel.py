"""The OpenTelemetry backend: records become points, spans and logs of a run.

The run is the open one (`stepspan.current_run()`); where there is none, the first record starts one, and `close()` or
the interpreter's exit closes it. What is "started" and later "completed" or "failed" is a span: that of `track()` holds
what happens inside it, the others hold only their own two log records, so that they may overlap.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from stepspan.compat.cloudmesh.context import resource
from stepspan.compat.cloudmesh.records import has_failed, milestone, numbers, span_name
from stepspan.errors import ConfigError
from stepspan.recording.open_runs import OPEN_RUNS
from stepspan.recording.scope import Scope
from stepspan.run import Run, current_run
from stepspan.start import start_run

PARAMETERS = frozenset({"self", "name", "status", "collective"})
"""Names of arguments of a run's methods: as attributes they become `telemetry.<name>`."""


class OtelBackend:
    """Records as events of a run.

    Args:
        path: The directory of the journal of a run that it starts itself.
        endpoint: The OTLP endpoint of such a run.
        job_id: The job id of such a run.

    Raises:
        ConfigError: `path` cannot be a directory.

    """

    def __init__(self, path: object = None, *, endpoint: str | None = None, job_id: str | int | None = None) -> None:
        try:
            self._directory = None if path is None else os.fsdecode(path)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError("path", path, f"name the journal's directory: {error}") from None
        if self._directory is not None and os.path.isfile(self._directory):
            raise ConfigError("path", path, "this is a file: with the otel backend, name the journal's directory")
        self._endpoint = endpoint
        self._job_id = job_id
        self._own: Run | None = None
        self._latest: Run | None = None
        """The last open run that this backend did not start."""
        self._introduced: WeakSet[Run] = WeakSet()
        """Those of them that know the machine and the user."""
        self._spans: dict[str, tuple[Scope, contextvars.Context | None]] = {}

    def emit(self, record: Mapping[str, Any], *, error: BaseException | None = None, inside: bool = False) -> None:
        """Log a record.

        Args:
            record: The record.
            error: The exception that it is about.
            inside: Whether its span holds what happens until the record of its end.

        Raises:
            ConfigError: There is no open run, and none can be started.

        """
        run = self._run(record)
        reported, values, span = milestone(record), numbers(record), record.get("span")
        name, status, attributes = reported or (span_name(record), None, {})
        attributes = {f"telemetry.{key}" if key in PARAMETERS else key: value for key, value in attributes.items()}
        if values:
            run.log_metrics({key: float(value) for key, value in values.items()})
        if span is None:
            if error is not None:
                run.log_error(error)
            if reported:
                run.log_event(name, status=status, **attributes)
            return
        if span in self._spans:
            scope, context = self._spans.pop(span)
            _call_in(context, run.log_event, name, status=status, **attributes)
            _call_in(context, scope.owner.end, scope, error, "failed" if has_failed(record) else None)
            return
        scope = run.span(span_name(record), **attributes)
        if not run._recorder.active:
            return
        context = None if inside else contextvars.copy_context()
        self._spans[span] = scope, context
        _call_in(context, scope.__enter__)
        _call_in(context, run.log_event, name, status=status, **attributes)

    def close(self) -> None:
        """Close the run, if this backend started it."""
        if self._own is not None:
            self._own.close()

    def flush(self, timeout: float) -> bool:
        """Wait until the open run is delivered; False after `timeout` seconds."""
        return current_run().flush(timeout)

    def _run(self, record: Mapping[str, Any]) -> Run:
        run = current_run()
        if run._recorder.active:
            if run is not self._own:
                self._latest = run
            if run is not self._own and run not in self._introduced:
                self._introduced.add(run)
                run.log_event("telemetry.context", system=record.get("system"), user=record.get("user"))
            return run
        if OPEN_RUNS.here() is not None:  # in a block that records nothing
            return run
        if self._latest is not None:
            return self._latest  # it has ended, and counts records that come after that
        if self._own is None:
            self._own = start_run(
                name=str(record.get("command")),
                job_id=self._job_id,
                directory=self._directory,
                endpoint=self._endpoint,
                resource=resource(record),
            )._hold(is_substitute=True)
        return self._own


def _call_in(context: contextvars.Context | None, function: Any, *args: Any, **kwargs: Any) -> None:
    """Call a function in a context, or in the caller's."""
    if context is None:
        function(*args, **kwargs)
    else:
        context.run(function, *args, **kwargs)
