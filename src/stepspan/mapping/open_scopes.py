"""What is open at a point of the journal, and its ids: the same that the process which began it computes.

A scope's ids are computed when they are first asked for. They cost up to three hashes, and most steps of a fast run are
thinned away before anybody wants theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stepspan.events import Event
from stepspan.mapping import ids
from stepspan.mapping.records import Attributes
from stepspan.mapping.trace_context import remote_parent

MAX_OPEN = 10_000
"""Scopes that have begun and not ended; beyond that the oldest ones but the run are forgotten."""
FAILED_STATUSES = ("error", "failed", "interrupted")
"""Of an end event: what makes a scope a failed one."""


def step_trace_id(header: Event, begin: Event) -> bytes:
    """The id of the trace of the step that begins with `begin`."""
    return ids.step_trace_id(header["run_key"], begin["split"], begin.get("epoch"), begin.get("lap", 0), begin["step"])


@dataclass(eq=False)
class ScopeState:
    """A run, epoch, step or span, from its begin event on.

    Attributes:
        begin: Its begin event.
        parent: The scope it was begun in, if that was open. Not kept of a step.
        step: The nearest step around it, if that was open. Not kept of a step.
        trace_id: Of its trace, in hex, and likewise `span_id`; "" before they have been asked for.
        parent_id: The span id of its parent, in hex; "" of a root.
        end: Its end event; not set before it has ended.
        duration: How long it took, s, once it has ended.
        error: What was raised in it: "ValueError: boom". None where nothing was.
        thinned: Whether it belongs to a step that has ended, and whose trace does not go out.
        events: Name, time (Unix ns), attributes of each event of its span, and how many more of these there were.
        dropped_events: How many more events there were.
        hyperparams: Of a run: attributes of its span; None for those that are too many.
        cut_hyperparams: How many the journal could not hold.

    """

    begin: Event
    parent: ScopeState | None = None
    step: StepState | None = None
    # From here on defaults stand in the class: most scopes never have a value of their own.
    trace_id: str = field(default="", init=False)
    span_id: str = field(default="", init=False)
    parent_id: str = field(default="", init=False)
    end: Event = field(init=False)
    duration: float = field(default=0.0, init=False)
    error: str | None = field(default=None, init=False)
    thinned: bool = field(default=False, init=False)
    events: list[tuple[str, int, Attributes, int]] | None = field(default=None, init=False)
    dropped_events: int = field(default=0, init=False)
    hyperparams: dict[str, Any] | None = field(default=None, init=False)
    cut_hyperparams: int = field(default=0, init=False)

    @property
    def failed(self) -> bool:
        """Whether it has ended, and failed: with an error in it, or with a status that says so.

        A run whose own last line says that it was interrupted has not failed; one that a crash left open has.
        """
        status = self.end.get("status")
        orderly = status == "interrupted" and self.begin["tag"] == "run_begin" and "seq" in self.end
        return self.error is not None or (status in FAILED_STATUSES and not orderly)

    @property
    def ended(self) -> int:
        """When it ended, Unix ns, not before it began. A step's may be earlier than its end event."""
        ended: int = max(self.end.get("ended", self.end["ts"]), self.begin["ts"])
        return ended


@dataclass(eq=False)
class StepState(ScopeState):
    """A step, and what is computed of it in `steps`.

    Attributes:
        has_failure: Whether anything in it has failed.
        wait: What it has waited for other ranks in collectives, s. None where there was no wait, or it is not known.
        missing: How many device times are missing in `wait`; None where there was none to come.
        wait_lost: Whether one of them will not come.
        pending: Whether it has ended, and its `wait` is still to come.
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
    children: list[ScopeState | Event] | None = field(default=None, init=False)


class OpenScopes:
    """Folds begin and end events of one session.

    Args:
        header: The session's header.

    Attributes:
        step_ids: Makes the ids of steps.
        open: The `seq` of a begin event -> its scope, in the order in which they began.
        run: The `seq` of the run's begin event; 0 where it is not known.
        run_ids: The run's trace and span id in hex, also after it has ended; None where it is not known.

    """

    def __init__(self, header: Event) -> None:
        self._header = header
        self.step_ids = ids.StepIds(header)
        self.open: dict[int, ScopeState] = {}
        self.run = 0
        self.run_ids: tuple[str, str] | None = None

    def begin(self, event: Event) -> None:
        """Open what is no step."""
        parent = self.open.get(event["parent"])
        step = parent if isinstance(parent, StepState) else None if parent is None else parent.step
        self.open[event["seq"]] = ScopeState(event, parent, step)
        if len(self.open) > MAX_OPEN:
            self._forget_oldest()

    def begin_step(self, event: Event) -> None:
        """Open a step.

        Raises:
            TypeError: It has no number or split, as a processor took that away. Its ids could not be made.

        """
        if type(event["step"]) is not int or type(event["split"]) is not str:
            raise TypeError(f"step {event['step']!r:.40} of {event['split']!r:.40}")
        self.open[event["seq"]] = StepState(event)
        if len(self.open) > MAX_OPEN:
            self._forget_oldest()

    def begin_run(self, event: Event) -> None:
        """Open the scope of the run."""
        self.begin(event)
        self.run = event["seq"]
        run = self.name(self.open[self.run])
        self.run_ids = run.trace_id, run.span_id

    def close(self, event: Event) -> ScopeState | None:
        """Close the scope of an end event; None where its begin was never seen."""
        return self.open.pop(event["begin"], None)

    def open_step(self, scope: ScopeState) -> StepState | None:
        """The step that a scope is or lies in, if that is open."""
        step = scope if isinstance(scope, StepState) else scope.step
        return step if step is not None and step.begin["seq"] in self.open else None

    def name(self, scope: ScopeState) -> ScopeState:
        """Give a scope its ids, if it has none yet.

        Args:
            scope: It, and what is around it, gets them.

        Returns:
            The same scope.

        """
        if not scope.trace_id:
            unnamed: list[ScopeState] = []
            above = scope.parent
            while above is not None and not above.trace_id:
                unnamed.append(above)
                above = above.parent
            while unnamed:
                self._name(unnamed.pop())
            self._name(scope)
        return scope

    def _name(self, scope: ScopeState) -> None:
        """Give a scope its ids; its parent has them."""
        begin, parent, header = scope.begin, scope.parent, self._header
        rank, role = header["rank"], header["role"]
        if isinstance(scope, StepState):
            trace_id, span_id, parent_id = self.step_ids.of(begin)
            scope.trace_id, scope.span_id, scope.parent_id = trace_id.hex(), span_id.hex(), (parent_id or b"").hex()
            return
        scope.span_id = ids.span_id(header["session"], begin["seq"]).hex()
        if begin["tag"] == "run_begin" and (caller := remote_parent(begin)):
            scope.trace_id, scope.parent_id = caller.trace_id.hex(), caller.span_id.hex()
            return
        if parent is not None and begin["tag"] == "span_begin" and parent.begin["tag"] in {"span_begin", "step_begin"}:
            scope.trace_id, scope.parent_id = parent.trace_id, parent.span_id
            return
        epoch: ScopeState | None = scope
        while epoch is not None and epoch.begin["tag"] != "epoch_begin":
            epoch = epoch.parent
        number = None if epoch is None else epoch.begin.get("epoch")
        scope.trace_id = ids.outside_trace_id(header["run_key"], rank, role, number, begin["ts"]).hex()
        if parent is not None and parent.trace_id == scope.trace_id:
            scope.parent_id = parent.span_id

    def state(self) -> dict[str, Any]:
        """Everything that is open, and the run, as JSON for a checkpoint."""
        scopes = [self._to_json(scope) for scope in self.open.values()]
        return {"open": scopes, "run": self.run, "run_ids": self.run_ids}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, of an equal journal."""
        self.open = {}
        for content in state["open"]:
            self.open[content["begin"]["seq"]] = self._from_json(content)
        self.run, self.run_ids = state["run"], state["run_ids"]

    def _forget_oldest(self) -> None:
        del self.open[next(seq for seq in self.open if seq != self.run)]

    def _to_json(self, scope: ScopeState) -> dict[str, Any]:
        """A scope's own values; those around it by their `seq`. It is named now, as those may have ended."""
        self.name(scope)
        content = {**vars(scope), "parent": seq_of(scope.parent), "step": seq_of(scope.step)}
        if isinstance(scope, StepState) and scope.children:
            content["children"] = [self._to_json(c) if isinstance(c, ScopeState) else c for c in scope.children]
        return content

    def _from_json(self, content: dict[str, Any]) -> ScopeState:
        kind = StepState if content["begin"]["tag"] == "step_begin" else ScopeState
        scope = kind(content["begin"])
        children: Sequence[Any] = content.pop("children", None) or ()
        around = {name: self.open.get(content[name]) for name in ("parent", "step")}
        vars(scope).update(content, **around)
        if isinstance(scope, StepState):
            scope.children = [c if "tag" in c else self._from_json(c) for c in children]
        return scope


def seq_of(scope: ScopeState | None) -> int:
    """The `seq` of a scope's begin event; 0 where there is no scope."""
    seq: int = 0 if scope is None else scope.begin["seq"]
    return seq
