"""How our span and log record processors and our exporters write `otel` events to the journal of a run.

What a processor is handed is written as it comes, in the thread that ended the span or logged the line, and in the
scope that is open there. What an exporter is handed was collected earlier, maybe on a thread of the SDK: it is written
as background events, which are no sign that training goes on, and lies in no scope.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

from opentelemetry.sdk.resources import Resource

from stepspan.events import Event
from stepspan.integrations.reentrancy import MAX_RECORDING_DEPTH, recording_depth
from stepspan.recording.open_runs import OPEN_RUNS
from stepspan.run import DISABLED, Run, current_run
from stepspan.values import error_text

_GIVEN: defaultdict[type, WeakSet[Run]] = defaultdict(WeakSet)
"""Class of a processor -> the runs that one of it is for: what is emitted in one of them does not go to another."""


class JournalSink:
    """Base of our processors and exporters.

    Args:
        run: The run whose journal is written; None: whichever is open at the time, if any.

    """

    def __init__(self, run: Run | None = None) -> None:
        super().__init__()  # the SDK's base, which stands behind this one
        self._given = run
        self._shut_down = False
        if run is not None:
            _GIVEN[type(self)].add(run)

    def _run(self, resource: Resource | None = None, *, nested: bool = False) -> Run | None:
        """The run to write to, if any. `nested`: whether this thread is already writing, or opening that run."""
        run = self._given or current_run()
        return None if run is DISABLED or run.closed else run

    def _is_of_another(self, run: Run) -> bool:
        """Whether what is emitted here goes to another run, or to this one by a processor that is for it alone."""
        given = _GIVEN[type(self)]
        return run in given if self._given is None else (here := OPEN_RUNS.here()) is not run and here in given

    def _record(self, fields: Callable[[], Event]) -> None:
        """Write one record that was emitted in this thread just now."""
        with recording_depth as depth:
            run = None if self._shut_down or depth >= MAX_RECORDING_DEPTH else self._run()
            if run is not None and not self._is_of_another(run):
                scopes = run._recorder.scopes
                run._recorder.record("otel", lambda: {"parent": scopes.parent_without_closing(), **fields()})

    def _export(self, resource: Resource | None, events: Iterable[Event], result: Any) -> Any:
        """Write a batch.

        Args:
            resource: The SDK's, for a run that has to be opened.
            events: The fields of each `otel` event, made as they are written.
            result: The SDK's enumeration of results.

        Returns:
            `result.SUCCESS` where all of them stand in the journal, else `result.FAILURE`.

        """
        with recording_depth as depth:
            try:
                refused = self._shut_down or depth >= MAX_RECORDING_DEPTH
                run = None if refused else self._run(resource, nested=depth > 0)
                if run is None:
                    return result.FAILURE
                lost = run._recorder.lost_events()
                for fields in events:
                    run._recorder.emit_background({"ts": 0, "seq": 0, "tag": "otel", **fields})
                return result.SUCCESS if run._recorder.lost_events() == lost else result.FAILURE
            except Exception as error:  # wrong settings, no place for a journal, or a record that is none
                self._warn(error)
                return result.FAILURE

    def _warn(self, error: Exception) -> None:
        message = f"OpenTelemetry's records were lost: {error_text(error)}"
        (self._given or current_run())._warn_once("otel", message, key=type(error).__name__)

    def shutdown(self, *args: Any, **options: Any) -> None:
        """Take nothing more. The arguments, which differ between SDK versions, are not needed."""
        self._shut_down = True
        if self._given is not None:
            _GIVEN[type(self)].discard(self._given)

    def force_flush(self, timeout_millis: float = 30_000) -> bool:
        """Return True at once: nothing is held back."""
        return True
