"""What telemetry says of a step: how long it took, how long it waited for other ranks, and whether it failed.

Computed once, here, for metrics and traces, and for the reader of a journal that reports on a run.

A step waits in its collectives: spans with `collective`. Of collectives within each other the outer one counts. What
is timed on the host is known when the span ends. What is timed on the device (`cuda`) is known when its `device_time`
event comes, which may be after the step has ended: such a step is **pending**, and so is every step that waited and
ended after it, because the points of a series must be in time order. `settle` returns pending steps, in the order in
which they ended, when

- all device times of the step have come, and no step before it is pending: its `wait` is known; or
- more than `MAX_PENDING_STEPS` are pending, or it has been so for `MAX_PENDING_NS` of event time (the line of a device
  time can be lost), or the session has ended: its `wait` is None, and so is that of a step of which a device time is
  known to be lost (an event without a number).

All of this depends on the events alone, not on batches or restarts.

The order of calls: `begin`, `begin_step`, `error`, `sdk_span`, `device_time` and `end` as the events come; `settle`
after each `device_time`, and after each `end` of a step that is pending.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from stepspan.events import SECOND_NS, Event
from stepspan.mapping.attributes import MAX_TEXT_CHARS
from stepspan.mapping.clock import EventTime
from stepspan.mapping.open_scopes import OpenScopes, ScopeState, StepState, seq_of
from stepspan.values import shorten, to_float

MAX_DEVICE_SPANS = 10_000
"""Spans whose device time is still to come."""
MAX_PENDING_STEPS = 1000
MAX_PENDING_NS = 600 * SECOND_NS
STATUS_ERROR = 2
"""The status code of a failed span in OTLP JSON."""


class PendingDeviceTime(NamedTuple):
    """A span that has ended, and whose time on the device is still to come.

    Attributes:
        phase: Its name.
        ended: When it ended, Unix ns.
        step: The `seq` of the step whose wait the time is a part of; 0 where it is none.

    """

    phase: str
    ended: int
    step: int


class StepFold(OpenScopes):
    """Open scopes, and what becomes of them when they end.

    Attributes:
        time: What is known of the session's clock: `clock` events go to its `set`.

    """

    def __init__(self, header: Event) -> None:
        super().__init__(header)
        self.time = EventTime()
        self._pending: dict[int, StepState] = {}
        """The `seq` of a step's begin -> the step, in the order in which they ended."""
        self._device_spans: dict[int, PendingDeviceTime] = {}
        """By the `seq` of their begin, in the order in which they ended."""
        self._now = 0
        """The time of the event that `settle` follows, Unix ns."""

    def end(self, event: Event) -> ScopeState | None:
        """End a scope, and add what is no step to the step it is in.

        Args:
            event: Its end event.

        Returns:
            The scope, with what is known of it now; None where its begin was never seen.

        """
        scope = self.open.pop(event["begin"], None)
        if scope is None:
            return None
        begin = scope.begin
        scope.end = event
        ended, began = event["ended" if "ended" in event else "ts"], begin["ts"]
        duration = (self.time.elapsed(began, ended) if self.time.corrections else ended - began) / SECOND_NS
        scope.duration = duration if duration > 0.0 else 0.0
        if isinstance(scope, StepState):
            if "status" in event and scope.failed:
                scope.has_failure = True
            if self._pending or scope.missing is not None:
                self._postpone(scope)
        elif "collective" in begin or "cuda" in begin or "status" in event:
            self._add_to_step(scope)
        return scope

    def error(self, event: Event) -> ScopeState | None:
        """Fail the scope that an error was raised in.

        Args:
            event: The `error` event.

        Returns:
            The scope; None where none is open.

        """
        scope = self.open.get(event["parent"])
        if scope is not None:
            scope.error = shorten(f"{event['type']}: {event['message']}", MAX_TEXT_CHARS)
            step = self.open_step(scope)
            if step is not None:
                step.has_failure = True
        return scope

    def sdk_span(self, event: Event) -> StepState | None:
        """Find the open step in whose trace a span of other instrumentation lies. A failed span fails its step.

        Args:
            event: An `otel` event of signal "traces".

        Returns:
            The step; None where the span lies in no step, or in a trace of its own.

        """
        scope, record = self.open.get(event.get("parent", 0)), event["record"]
        step = None if scope is None else self.open_step(scope)
        if step is None or self.name(step).trace_id != record["traceId"]:
            return None
        if is_failed_sdk_span(record):
            step.has_failure = True
        return step

    def device_time(self, event: Event) -> PendingDeviceTime | None:
        """Take how long a span took on the device.

        Args:
            event: A `device_time` event; one without a number says that the time is lost.

        Returns:
            What is known of the span; None where it has not ended, or has been timed before.

        """
        self._now = event["ts"]
        span = self._device_spans.pop(event["begin"], None)
        if span is not None:
            self._add_device_time(span, to_float(event.get("seconds")))
        return span

    def settle(self) -> Iterator[StepState]:
        """Take the steps whose wait is known now, or will never be.

        Yields:
            Each step that is no longer pending, in the order in which they ended.

        """
        while self._pending:
            seq, step = next(iter(self._pending.items()))
            overdue = (
                len(self._pending) > MAX_PENDING_STEPS or self.time.elapsed(step.end["ts"], self._now) > MAX_PENDING_NS
            )
            if step.missing and not overdue:
                return
            del self._pending[seq]
            step.pending = False
            if step.missing or step.wait_lost:
                step.wait = None
            yield step

    def give_up_device_times(self) -> None:
        """Take the device times that are still to come for lost: the session has ended."""
        for span in self._device_spans.values():
            self._add_device_time(span, None)
        self._device_spans.clear()

    def state(self) -> dict[str, Any]:
        """What is open, pending and expected, as JSON for a checkpoint."""
        pending = [self._to_json(step) for step in self._pending.values()]
        spans = [[seq, list(span)] for seq, span in self._device_spans.items()]
        clock = self.time.corrections
        return {**super().state(), "pending": pending, "device_spans": spans, "clock": clock}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, of an equal journal."""
        super().restore(state)
        self.time.corrections = state["clock"]
        steps = map(self._from_json, state["pending"])
        self._pending = {seq_of(step): step for step in steps if isinstance(step, StepState)}
        self._device_spans = {seq: PendingDeviceTime(*span) for seq, span in state["device_spans"]}

    def _add_to_step(self, span: ScopeState) -> None:
        """Add a span that has ended to the step it is in: a wait, or a failure."""
        begin, step = span.begin, self.open_step(span)
        waiting = step if begin.get("collective") and not self._in_collective(span) else None
        if begin.get("cuda"):
            self._expect_device_time(span, waiting)
        elif waiting is not None:
            waiting.wait = (waiting.wait or 0.0) + span.duration
        if step is not None and span.failed:
            step.has_failure = True

    def _postpone(self, step: StepState) -> None:
        """Make a step pending whose wait is not known, or comes behind one that is not."""
        if step.wait_lost and not step.missing:
            step.wait = None
        elif step.missing or (self._pending and step.wait is not None):
            step.pending, self._now = True, step.end["ts"]
            self._pending[step.begin["seq"]] = step

    def _expect_device_time(self, span: ScopeState, step: StepState | None) -> None:
        """A span has ended whose device time is to come; `step`: whose wait that is a part of."""
        self._device_spans[span.begin["seq"]] = PendingDeviceTime(span.begin["name"], span.end["ts"], seq_of(step))
        if step is not None:
            step.wait, step.missing = step.wait or 0.0, (step.missing or 0) + 1
        if len(self._device_spans) > MAX_DEVICE_SPANS:
            oldest = next(iter(self._device_spans))
            self._add_device_time(self._device_spans.pop(oldest), None)

    def _add_device_time(self, span: PendingDeviceTime, seconds: float | None) -> None:
        step = self.open.get(span.step) or self._pending.get(span.step)
        if isinstance(step, StepState):
            step.missing = (step.missing or 0) - 1
            if seconds is None:
                step.wait_lost = True
            else:
                step.wait = (step.wait or 0.0) + seconds

    def _in_collective(self, scope: ScopeState) -> bool:
        """Whether a wait lies within another one of the same step."""
        above = self.open.get(scope.begin["parent"])
        while above is not None and above.begin["tag"] == "span_begin":
            if above.begin.get("collective"):
                return True
            above = self.open.get(above.begin["parent"])
        return False


def is_failed_sdk_span(record: Event) -> bool:
    """Whether a span in OTLP JSON has failed."""
    return bool(record.get("status", {}).get("code") == STATUS_ERROR)
