"""Traces: steps, epochs, phases and the run as spans, including those that a crash left open.

Spans in a step go out with it, because only its end tells whether its trace goes out at all (`thinning`). A step that
waits for device times (`steps`) goes out when its wait is known, or will never be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.mapping.attributes import (
    MAX_ATTRIBUTES,
    MAX_TEXT_CHARS,
    Flat,
    artifact_attributes,
    attribute_value,
    event_attributes,
    exception_attributes,
    flatten,
    leaves,
)
from stepspan.mapping.dispatch import MALFORMED, NothingAhead, dispatch, warn_unmappable
from stepspan.mapping.open_scopes import ScopeState, StepState
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Attributes, Link, Record, SdkRecord, Span, SpanEvent
from stepspan.mapping.sdk_records import SdkRecords
from stepspan.mapping.steps import StepFold
from stepspan.mapping.thinning import Thinning
from stepspan.mapping.trace_context import remote_parent, trace_context
from stepspan.values import shorten

MAX_EVENTS = 128
"""Of a span; the SDK's default."""
MAX_CHILDREN = 512
"""Spans that wait for the end of their step."""
STEP_FIELDS = ("step", "split", "epoch", "lap")
"""Of a step's begin event: the attributes of its span."""


class TraceMapper(NothingAhead):
    """One session's events as finished spans."""

    def __init__(self, header: Event, options: MappingOptions = DEFAULT_OPTIONS) -> None:
        self.filtered = 0
        self._options = options
        self._is_cut = options.limits != DEFAULT_OPTIONS.limits
        self._is_sampled = options.sampler != DEFAULT_OPTIONS.sampler
        self._max_attributes = max(MAX_ATTRIBUTES, options.limits.span.count or 0)
        self._max_event_attributes = max(MAX_ATTRIBUTES, options.limits.event.count or 0)
        self._max_events = max(MAX_EVENTS, options.limits.events or 0)
        self._header = header
        self._steps = StepFold(header)
        self._thinning = Thinning(header)
        self._sdk_records = SdkRecords("traces")
        self._spans: list[Span | SdkRecord] = []
        self._run_links: list[Link] = []
        self._handlers: dict[str, Callable[[Event], object]] = {
            "run_begin": self._steps.begin_run,
            "epoch_begin": self._steps.begin,
            "step_begin": self._steps.begin_step,
            "span_begin": self._steps.begin,
            **dict.fromkeys(("run_end", "epoch_end", "span_end"), self._end),
            "step_end": self._end_step,
            "device_time": self._device_time,
            "hyperparams": self._hyperparams,
            "artifact": self._artifact,
            "event": self._event,
            "error": self._error,
            "otel": self._otel,
            "clock": self._steps.time.set,
        }
        self.tags = self._handlers.keys()

    def map(self, events: Sequence[Event]) -> list[Record]:
        """The spans that the next events complete."""
        self._spans = []
        dispatch(self._handlers, events)
        return self._outgoing()

    def finish(self, closed: Closed) -> list[Record]:
        """What is still open in a session that has ended, innermost first: ERROR, ended at the last event."""
        self._spans = []
        self._steps.give_up_device_times()
        self._settle()
        for seq, scope in sorted(self._steps.open.items(), reverse=True):
            end = self._end_step if isinstance(scope, StepState) else self._end
            status = closed.status if seq == self._steps.run else "interrupted"
            end({"begin": seq, "ts": closed.ts, "status": status})
        return self._outgoing()

    def state(self) -> dict[str, Any]:
        """What is carried on, as JSON."""
        return {"filtered": self.filtered, "steps": self._steps.state(), "thinning": asdict(self._thinning)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, of an equal journal."""
        self.filtered = state["filtered"]
        self._steps.restore(state["steps"])
        self._thinning = Thinning(**state["thinning"])

    def _outgoing(self) -> list[Record]:
        """The spans that were made, as the destination wants them."""
        if not (self._is_sampled or self._is_cut):
            return list(self._spans)
        spans: list[Record] = [span for span in self._spans if not self._is_sampled or self._keeps(span)]
        self.filtered += len(self._spans) - len(spans)
        limits = self._options.limits
        return [limits.apply("traces", span) for span in spans] if self._is_cut else spans

    def _keeps(self, span: Span | SdkRecord) -> bool:
        """Whether the trace of a span goes out."""
        trace_id = span.trace_id if isinstance(span, Span) else bytes.fromhex(span.record.get("traceId", ""))
        return self._options.sampler.keeps(trace_id)

    def _end(self, event: Event) -> None:
        scope = self._steps.end(event)
        if scope is None:
            return
        step = self._steps.open_step(scope)
        if step is not None:
            self._hold(step, scope)
        elif scope.thinned:  # it has outlived its step
            self.filtered += 1
        else:
            self._emit(scope, scope.ended)

    def _hold(self, step: StepState, child: ScopeState | Event) -> None:
        """Keep a span until its step has ended."""
        if step.children is None:
            step.children = []
        if len(step.children) < MAX_CHILDREN:
            step.children.append(child)
        else:
            self.filtered += 1

    def _end_step(self, event: Event) -> None:
        step = self._steps.end(event)
        if not isinstance(step, StepState):
            return
        if not self._thinning.keeps(step):
            self.filtered += 1 + len(step.children or ())
            step.thinned, step.children = True, None
            for scope in self._steps.open.values():
                scope.thinned |= scope.step is step
        elif not step.pending:
            self._emit_step(step)
        if step.pending:
            self._settle()

    def _device_time(self, event: Event) -> None:
        self._steps.device_time(event)
        self._settle()

    def _settle(self) -> None:
        for step in self._steps.settle():
            if not step.thinned:
                self._emit_step(step)

    def _emit_step(self, step: StepState) -> None:
        """Send a step's span and those in it."""
        children, step.children = step.children, None
        if step.events is None and not self._steps.time.corrections:
            self._spans.append(self._plain_step_span(step))
        else:
            self._emit(step, step.ended)
        for child in children or ():
            if isinstance(child, ScopeState):
                self._emit(child, step.ended)
            else:
                self._spans += self._sdk_records.of(child)

    def _emit(self, scope: ScopeState, known_at: int) -> None:
        """Send a span as it is known at a time (Unix ns): clocks that were set before it are taken into account."""
        try:
            self._spans.append(self._span(scope, known_at))
        except MALFORMED as error:  # costs this span, not those beside it
            warn_unmappable(scope.begin["tag"], repr(error))

    def _otel(self, event: Event) -> None:
        """A span of other instrumentation waits, as our own do, for the end of the step whose trace it is in."""
        spans = self._sdk_records.of(event)
        step = self._steps.sdk_span(event) if spans else None
        if step is None:
            self._spans += spans
        else:
            self._hold(step, event)

    def _span(self, scope: ScopeState, known_at: int) -> Span:
        begin, status = scope.begin, scope.end.get("status", "")
        start, end, events = begin["ts"], scope.ended, [SpanEvent(*event) for event in scope.events or ()]
        if self._steps.time.corrections:
            start, end, *times = (
                known_at - self._steps.time.elapsed(ts, known_at) for ts in (start, end, *(e.time for e in events))
            )
            events = [replace(event, time=time) for event, time in zip(events, times, strict=True)]
        kind = begin["tag"].removesuffix("_begin")
        self._steps.name(scope)
        attributes, dropped = self._attributes(kind, scope)
        parent = remote_parent(begin) if kind == "run" else None
        return Span(
            trace_id=bytes.fromhex(scope.trace_id),
            span_id=bytes.fromhex(scope.span_id),
            parent_id=bytes.fromhex(scope.parent_id) if scope.parent_id else None,
            name=shorten(begin["name"], MAX_TEXT_CHARS) if kind == "span" else f"training.{kind}",
            start=start,
            end=end,
            attributes=attributes,
            error=None if not scope.failed else status if scope.error is None else scope.error,
            events=events,
            links=self._links_of(kind, scope),
            dropped_attributes=dropped,
            dropped_events=scope.dropped_events,
            trace_state=parent.state if parent else "",
        )

    def _plain_step_span(self, step: StepState) -> Span:
        """What `_span` makes of a step without events whose times are right: of almost every span there is."""
        begin, end = step.begin, step.end
        start, ended = begin["ts"], end["ended" if "ended" in end else "ts"]
        trace_id, span_id, parent_id = self._steps.step_ids.of(begin)
        failed = (step.error is not None or "status" in end) and step.failed
        return Span(
            trace_id,
            span_id,
            parent_id,
            "training.step",
            start,
            ended if ended > start else start,
            self._step_attributes(step),
            (end.get("status", "") if step.error is None else step.error) if failed else None,
            (),
            self._links(),
        )

    @staticmethod
    def _step_attributes(step: StepState) -> Attributes:
        begin, end = step.begin, step.end
        fields: dict[str, Any] = {name: begin[name] for name in STEP_FIELDS if name in begin}
        if "data_wait" in end:
            fields["data_wait"] = end["data_wait"]
        if step.wait is not None:
            fields["wait"] = step.wait
        return fields

    def _attributes(self, kind: str, scope: ScopeState) -> tuple[Attributes, int]:
        """The attributes of a scope's span, and how many more there were."""
        begin, end = scope.begin, scope.end
        if isinstance(scope, StepState):
            return self._step_attributes(scope), 0
        if kind == "epoch":
            return {"epoch": begin["epoch"]}, 0
        if kind == "run":
            params = scope.hyperparams or {}
            kept = {name: value for name, value in params.items() if value is not None}
            about = {
                "name": shorten(begin["name"], MAX_TEXT_CHARS),
                **({"group": begin["group"]} if begin.get("group") else {}),
                "tags": [shorten(str(tag), MAX_TEXT_CHARS) for tag in begin.get("tags", ())],
                "attempt": begin["attempt"],
                "session": self._header["session"],
                "process.pid": self._header["pid"],
                "status": end.get("status", ""),
            }
            return {**about, **kept}, len(params) - len(kept) + scope.cut_hyperparams
        flat = flatten(begin.get("attributes", {}), cut=begin.get("cut", 0), limit=self._max_attributes)
        if begin.get("collective"):
            flat.attributes["collective"] = True
        return flat

    def _links_of(self, kind: str, scope: ScopeState) -> list[Link]:
        """A run leads to the span that has started it, unless that is its parent; others lead to the run."""
        if kind != "run":
            return [] if kind == "span" and scope.parent_id else self._links()
        caller = None if remote_parent(scope.begin) else trace_context(scope.begin)
        if caller is None:
            return []
        return [Link(caller.trace_id, caller.span_id, {"relation": "caller"}, trace_state=caller.state)]

    def _links(self) -> list[Link]:
        """Each span that begins a part of a trace leads to its run."""
        if not self._run_links and self._steps.run_ids:
            trace_id, span_id = map(bytes.fromhex, self._steps.run_ids)
            self._run_links = [Link(trace_id, span_id, {"relation": "run"})]
        return self._run_links

    @property
    def _run(self) -> ScopeState | None:
        """The run, if it is open."""
        return self._steps.open.get(self._steps.run)

    def _hyperparams(self, event: Event) -> None:
        run = self._run
        if run is None:
            return
        params = run.hyperparams = run.hyperparams or {}
        for key, value in leaves(event["params"], "hyperparams."):
            kept = params[key] is not None if key in params else len(params) < self._max_attributes
            params[key] = attribute_value(value) if kept else None
        run.cut_hyperparams = max(run.cut_hyperparams, event.get("cut", 0))

    def _artifact(self, event: Event) -> None:
        self._add_event(self._run, "training.artifact", event["ts"], Flat(artifact_attributes(event), 0))

    def _event(self, event: Event) -> None:
        self._add_event(self._run, event["name"], event["ts"], event_attributes(event, self._max_event_attributes))

    def _error(self, event: Event) -> None:
        attributes = exception_attributes(event, self._max_event_attributes)
        self._add_event(self._steps.error(event), "exception", event["ts"], attributes)

    def _add_event(self, scope: ScopeState | None, name: str, ts: int, flat: Flat) -> None:
        if scope is None:
            return
        if scope.events is None:
            scope.events = []
        if len(scope.events) < self._max_events:
            scope.events.append((name, ts, *flat))
        else:
            scope.dropped_events += 1
