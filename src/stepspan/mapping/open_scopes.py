"""What is open at a point of the journal, and its ids: the same that the process which began it computes.

A scope's ids are computed when they are first asked for. They cost up to three hashes, and most steps of a fast run are
thinned away before anybody wants theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepspan.events import Event
from stepspan.mapping import ids
from stepspan.mapping.dispatch import MALFORMED
from stepspan.mapping.records import Attributes

MAX_OPEN = 10_000
"""Scopes that have begun and not ended; beyond that the oldest ones but the run are forgotten."""
FAILED_STATUSES = ("error", "failed", "interrupted")
"""Of an end event: what makes a scope a failed one."""


def step_trace_id(header: Event, begin: Event) -> bytes:
    """The id of the trace of the step that begins with `begin`."""
    return ids.step_trace_id(header["run_key"], begin["split"], begin.get("epoch"), begin.get("lap", 0), begin["step"])


class SpanIds(NamedTuple):
    """A scope's trace and span id, and the span id of its parent (None for a root)."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes | None


@dataclass(eq=False)
class Scope:
    """A run, epoch, step or span, from its begin event on.

    Attributes:
        begin: Its begin event.
        parent: The scope it was begun in, if that was open. Not kept of a step.
        step: The nearest step around it, if that was open. Not kept of a step.
        ids: Its ids, once they have been asked for.
        end: Its end event; not set before it has ended.
        duration: How long it took, s, once it has ended.
        error: What was raised in it: "ValueError: boom". None where nothing was.
        in_thinned: Whether the trace of the step around it does not go out, if that was before a restart.
        events: Name, time (Unix ns) and attributes of each event of its span.
        hyperparams: Of a run: attributes of its span.

    """

    begin: Event
    parent: Scope | None = None
    step: Step | None = None
    # From here on defaults stand in the class: most scopes never have a value of their own.
    ids: SpanIds | None = field(default=None, init=False)
    end: Event = field(init=False)
    duration: float = field(default=0.0, init=False)
    error: str | None = field(default=None, init=False)
    in_thinned: bool = field(default=False, init=False)
    events: list[tuple[str, int, Attributes]] | None = field(default=None, init=False)
    hyperparams: dict[str, Any] | None = field(default=None, init=False)

    @property
    def failed(self) -> bool:
        """Whether it has ended, and failed: with an error in it, or with a status that says so."""
        return self.error is not None or self.end.get("status") in FAILED_STATUSES

    @property
    def ended(self) -> int:
        """When it ended, Unix ns, not before it began. A step's may be earlier than its end event."""
        ended: int = max(self.end.get("ended", self.end["ts"]), self.begin["ts"])
        return ended


@dataclass(eq=False)
class Step(Scope):
    """A step, and what is computed of it in `steps`.

    Attributes:
        has_failure: Whether anything in it has failed.
        wait: What it has waited for other ranks in collectives, s. None where there was no wait, or it is not known.
        missing: How many device times are missing in `wait`; None where there was none to come.
        wait_lost: Whether one of them will not come.
        pending: Whether it has ended, and its `wait` is still to come.
        thinned: Whether it has ended, and its trace does not go out.
        children: The spans that go out with it; those of other instrumentation as `otel` events.

    """

    # Its ids need nothing around it.
    parent: None = field(default=None, init=False)
    step: None = field(default=None, init=False)
    has_failure: bool = field(default=False, init=False)
    wait: float | None = field(default=None, init=False)
    missing: int | None = field(default=None, init=False)
    wait_lost: bool = field(default=False, init=False)
    pending: bool = field(default=False, init=False)
    thinned: bool = field(default=False, init=False)
    children: list[Scope | Event] | None = field(default=None, init=False)


class OpenScopes:
    """Folds begin and end events of one session.

    Args:
        header: The session's header.

    Attributes:
        open: The `seq` of a begin event -> its scope, in the order in which they began.
        run: The `seq` of the run's begin event; 0 where it is not known.
        run_ids: The run's ids, also after it has ended.

    """

    def __init__(self, header: Event) -> None:
        self._header = header
        self.open: dict[int, Scope] = {}
        self.run = 0
        self.run_ids: SpanIds | None = None

    def begin(self, event: Event) -> None:
        """Open what is no step."""
        parent = self.open.get(event["parent"])
        step = parent if isinstance(parent, Step) else None if parent is None else parent.step
        self.open[event["seq"]] = Scope(event, parent, step)
        if len(self.open) > MAX_OPEN:
            self._forget_oldest()

    def begin_step(self, event: Event) -> None:
        """Open a step."""
        self.open[event["seq"]] = Step(event)
        if len(self.open) > MAX_OPEN:
            self._forget_oldest()

    def begin_run(self, event: Event) -> None:
        """Open the scope of the run."""
        self.begin(event)
        self.run = event["seq"]
        self.run_ids = self.ids_of(self.open[self.run])

    def close(self, event: Event) -> Scope | None:
        """Close the scope of an end event; None where its begin was never seen."""
        return self.open.pop(event["begin"], None)

    def open_step(self, scope: Scope) -> Step | None:
        """The step that a scope is or lies in, if that is open."""
        step = scope if isinstance(scope, Step) else scope.step
        return step if step is not None and step.begin["seq"] in self.open else None

    def ids_of(self, scope: Scope) -> SpanIds:
        """The ids of a scope. One of `MALFORMED` where its begin event has no names to make them of."""
        unnamed: list[Scope] = []
        above: Scope | None = scope
        while above is not None and above.ids is None:
            unnamed.append(above)
            above = above.parent
        found = None if above is None else above.ids
        while unnamed:
            named = unnamed.pop()
            found = named.ids = self._make_ids(named, found)
        assert found is not None
        return found

    def _make_ids(self, scope: Scope, parent_ids: SpanIds | None) -> SpanIds:
        begin, parent, header = scope.begin, scope.parent, self._header
        rank, role = header["rank"], header["role"]
        if begin["tag"] == "step_begin":
            trace_id = step_trace_id(header, begin)
            root_id = ids.step_span_id(trace_id, 0) if rank or role else None
            return SpanIds(trace_id, ids.step_span_id(trace_id, rank, role), root_id)
        span_id = ids.span_id(header["session"], begin["seq"])
        if parent is None or parent_ids is None:
            parent_ids = None
        elif begin["tag"] == "span_begin" and parent.begin["tag"] in {"span_begin", "step_begin"}:
            return SpanIds(parent_ids.trace_id, span_id, parent_ids.span_id)
        trace_id = ids.outside_trace_id(header["run_key"], rank, role, _epoch_of(scope), begin["ts"])
        same_trace = parent_ids is not None and parent_ids.trace_id == trace_id
        return SpanIds(trace_id, span_id, parent_ids.span_id if parent_ids is not None and same_trace else None)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "open": [self._to_json(scope) for scope in self.open.values()],
            "run": self.run,
            "run_ids": _ids_to_json(self.run_ids),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.open = {}
        for content in state["open"]:
            scope = self._from_json(content)
            self.open[scope.begin["seq"]] = scope
        self.run, self.run_ids = state["run"], _ids_from_json(state["run_ids"])

    def _forget_oldest(self) -> None:
        del self.open[next(seq for seq in self.open if seq != self.run)]

    def _to_json(self, scope: Scope) -> dict[str, Any]:
        """A scope's own values; those around it by their `seq`. It gets its ids now, from those that have ended."""
        with contextlib.suppress(*MALFORMED):
            self.ids_of(scope)
        step = scope.step
        content = {**vars(scope), "ids": _ids_to_json(scope.ids), "parent": seq_of(scope.parent), "step": seq_of(step)}
        if step is not None and step.thinned:
            content["in_thinned"] = True
        if isinstance(scope, Step) and scope.children:
            content["children"] = [self._to_json(c) if isinstance(c, Scope) else c for c in scope.children]
        return content

    def _from_json(self, content: dict[str, Any]) -> Scope:
        begin = content.pop("begin")
        parent, step = (self.open.get(content.pop(name)) for name in ("parent", "step"))
        if begin["tag"] == "step_begin":
            scope: Scope = Step(begin)
        else:
            scope = Scope(begin, parent, step if isinstance(step, Step) else None)
        vars(scope).update(content, ids=_ids_from_json(content["ids"]))
        if isinstance(scope, Step) and scope.children:
            children: Sequence[Any] = scope.children
            scope.children = [c if "tag" in c else self._from_json(c) for c in children]
        return scope


def seq_of(scope: Scope | None) -> int:
    """The `seq` of a scope's begin event; 0 where there is no scope."""
    seq: int = 0 if scope is None else scope.begin["seq"]
    return seq


def _ids_to_json(found: SpanIds | None) -> list[str | None] | None:
    return None if found is None else [None if each is None else each.hex() for each in found]


def _ids_from_json(content: Sequence[str | None] | None) -> SpanIds | None:
    if content is None:
        return None
    trace_id, span_id, parent_id = content
    return SpanIds(
        bytes.fromhex(trace_id or ""), bytes.fromhex(span_id or ""), bytes.fromhex(parent_id) if parent_id else None
    )


def _epoch_of(scope: Scope) -> int | None:
    """The number of the nearest epoch around something outside of steps."""
    above: Scope | None = scope
    while above is not None:
        if above.begin["tag"] == "epoch_begin":
            epoch: int = above.begin["epoch"]
            return epoch
        above = above.parent
    return None
