"""What begins and ends: the run, its epochs, steps and spans.

The innermost open scope of a thread or asyncio task stands in a context variable; a thread that has none takes the
run's main one. A scope that exits ends what is still open inside it, with its own outcome: that is how a step learns
whether its loop was left by `break` or by an exception, which the loop's iterator is never told.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from threading import get_ident
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from stepspan.events import Event
from stepspan.mapping import ids
from stepspan.values import json_value

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.identity import Identity
    from stepspan.pipeline import Pipeline

T = TypeVar("T")
SECOND = 1_000_000_000

current: ContextVar[Scope | None] = ContextVar("stepspan.scope", default=None)


class Scope:
    """An open run, epoch, step or span; a context manager. `seq` and `ts` are those of its begin line."""

    __slots__ = (
        "begin", "epoch", "home", "lap", "leaving", "loose", "outer", "owner",
        "samples", "seq", "split", "step", "tag", "thread", "token", "tokens", "ts", "waited",
    )  # fmt: skip

    aside = False  # whether what it times goes on beside the code here, so that nothing comes to lie in it

    def __init__(
        self, owner: Scopes, tag: str, begin: Event, step: int | None = None, split: str | None = None
    ) -> None:
        self.owner = owner
        self.tag = tag
        self.begin = begin
        """Its begin event."""
        self.step = step
        self.split = split
        self.epoch: int | None = None
        self.seq = self.ts = self.lap = 0
        self.loose = 0
        """When its loop was left, Unix ns; 0 while it is held."""
        self.home: Any = None
        """The session it was begun in; None when it is not open."""
        self.outer: Scope | None = None
        """What it lies in. One that goes on beside other code is told; the others find it as they begin."""
        self.leaving: tuple[Callable[[], None], ...] = ()
        """To be called just before it ends."""
        self.waited: int | None = None
        """Nanoseconds that a step waited for its data."""
        self.samples: float | None = None
        """How many samples a step processed: `training.throughput`. May be set while the step is open."""
        self.tokens: float | None = None
        """How many tokens."""
        self.token: Any = None
        self.thread = 0
        """The ident of the thread that began it."""

    def __enter__(self) -> Self:
        self.owner.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.owner.end(self, error)


class Scopes:
    """The open scopes of one run, and the events of their beginning and ending. Nothing here raises."""

    def __init__(
        self,
        identity: Identity,
        pipeline: Pipeline,
        *,
        warn: Callable[[str, str], None],
        record_error: Callable[[BaseException], None],
        propagate: bool | None,
    ) -> None:
        self.clock = pipeline.journal.clock
        self.closed = False
        self._identity = identity
        self._journal = pipeline.journal
        self._emit = pipeline.emit
        self._warn = warn
        self._record_error = record_error
        self._propagate = propagate
        self._propagation: ModuleType | None = None
        self._forebears: dict[object, Identity] = {}
        """The session of a process that forked this one -> its identity."""
        self._main: Scope | None = None
        self._spans: dict[Scope, None] = {}
        """The open ones of all threads, in the order of their beginning."""
        self._laps: dict[str, tuple[int, int, int]] = {}
        self._next_epoch = 0
        self._next_step: dict[str, int] = {}

    def run(self, fields: Event) -> Scope:
        """The run, not open yet."""
        return Scope(self, "run", {"ts": 0, "seq": 0, "tag": "run_begin", "parent": 0, **fields})

    def epoch(self, number: int | None) -> Scope:
        """An epoch that is not open yet; None: the one after the last."""
        if number is None:
            number = self._next_epoch
        self._next_epoch = number + 1
        scope = Scope(self, "epoch", {"ts": 0, "seq": 0, "tag": "epoch_begin", "parent": 0, "epoch": number})
        scope.epoch = number
        return scope

    def step(self, number: int | None, split: str) -> Scope:
        """A step that is not open yet; None: the one after the last of this split."""
        if number is None:
            number = self._next_step.get(split, 0)
        self._next_step[split] = number + 1
        event = {"ts": 0, "seq": 0, "tag": "step_begin", "parent": 0, "step": number, "split": split}
        return Scope(self, "step", event, number, split)

    def span(self, fields: Event) -> Scope:
        """A phase, not open yet."""
        return Scope(self, "span", {"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0, **fields})

    def begin(self, scope: Scope) -> None:
        """Open a scope inside the innermost one."""
        try:
            tag, event, home = scope.tag, scope.begin, self._journal.home
            scope.thread = get_ident()
            if not scope.aside:
                scope.outer = self.innermost()
            outer = scope.outer
            if outer is not None and outer.home is home:
                event["parent"] = outer.seq
                if tag == "step":
                    scope.epoch = outer.epoch
                elif tag == "span":
                    scope.epoch, scope.step, scope.split, scope.lap = outer.epoch, outer.step, outer.split, outer.lap
            if tag == "step":
                self._place(scope, event)
            self._emit(event, scope)
            if self.closed:
                return
            scope.home = self._journal.home
            if scope.home is not home:  # the event opened a session of its own: nothing there to lie in
                event["parent"] = 0
            if tag == "span":
                self._spans[scope] = None
            else:
                self._main = scope
            if scope.aside:
                return
            current.set(scope)
            if self._propagate is not False and "opentelemetry.trace" in sys.modules:
                self._attach(scope)
        except Exception as error:
            self._warn("begin", f"a {scope.tag} could not be begun: {error!r}")

    def end(self, scope: Scope, error: BaseException | None, status: str | None = None) -> None:
        """Close a scope and whatever is still open inside it. `status`: of one that no exception has failed."""
        if scope.home is None:
            return
        try:
            if current.get() is not scope:
                self._end_inside(scope, error)
            for leave in scope.leaving:
                leave()
            event: Event = {"ts": 0, "seq": 0, "tag": scope.tag + "_end", "begin": 0}
            if scope.waited is not None:
                event["data_wait"] = scope.waited / SECOND
            if scope.samples is not None and (samples := self.amount("samples", scope.samples)) is not None:
                event["samples"] = samples
            if scope.tokens is not None and (tokens := self.amount("tokens", scope.tokens)) is not None:
                event["tokens"] = tokens
            if scope.loose:
                event["ended"], scope.loose = scope.loose, 0
            if error is not None and is_failure(error):
                self._fail(error)
                event["status"] = "failed" if scope.tag == "run" else "error"
            elif status is not None:
                event["status"] = status
            if scope.home is self._journal.home:
                self._emit(event, scope)
        except Exception as failure:
            self._warn("end", f"a {scope.tag} could not be ended: {failure!r}")
        finally:
            scope.home = None
            if current.get() is scope:
                current.set(scope.outer)
            if scope.tag == "span":
                self._spans.pop(scope, None)
            elif self._main is scope:
                self._main = scope.outer
            if scope.token is not None:
                self._detach(scope)

    def innermost(self) -> Scope | None:
        """The innermost open scope here."""
        scope = current.get()
        if scope is None or scope.owner is not self:
            scope = self._main
        while scope is not None and (scope.loose or scope.home is None):
            outer = scope.outer
            self.end(scope, None)  # its loop was left, and no exception has come by since
            scope = outer
        return scope

    def open(self) -> list[Scope]:
        """What is open in this session, whichever thread asks: run, epoch, step, then the spans of all threads."""
        chain, scope = [], self._main
        while scope is not None:
            chain.append(scope)
            scope = scope.outer
        chain.reverse()
        home = self._journal.home
        chain += [span for span in list(self._spans) if span not in chain]
        return [scope for scope in chain if scope.home is home and not scope.loose]

    def parent(self) -> int:
        """The `seq` of the innermost scope's begin line; 0 for none in this session."""
        scope = self.innermost()
        return scope.seq if scope is not None and scope.home is self._journal.home else 0

    def around(self) -> int:
        """The same, but a step whose loop was left stays open: what asks may itself run as an exception passes."""
        scope = current.get()
        if scope is None or scope.owner is not self:
            scope = self._main
        while scope is not None and (scope.loose or scope.home is not self._journal.home):
            scope = scope.outer
        return scope.seq if scope is not None else 0

    def recorded(self, error: BaseException) -> None:
        """Remember that an exception stands in this session: the scopes it passes through need not say it again."""
        with suppress(Exception):  # one that takes no attribute is recorded by every scope
            error._stepspan_recorded = self._mark  # type: ignore[attr-defined]

    def ids(self, scope: Scope) -> tuple[bytes, bytes]:
        """The trace and span id that the mapping will give a scope."""
        me = self._forebears.get(scope.home, self._identity)
        top = scope
        while top.tag == "span" and top.begin["parent"] and top.outer is not None and top.outer.tag in {"span", "step"}:
            top = top.outer
        if top.tag == "step":
            trace_id = ids.step_trace_id(me.run_key, top.split or "", top.epoch, top.lap, top.step or 0)
        else:
            trace_id = ids.outside_trace_id(me.run_key, me.rank, me.role, top.epoch, top.ts)
        if scope.tag == "step":
            return trace_id, ids.step_span_id(trace_id, me.rank, me.role)
        session = getattr(scope.home or self._journal.writer, "session", "")
        return trace_id, ids.span_id(session, scope.seq)

    def amount(self, field: str, given: Any, batch: Any = None, before: float | None = None) -> float | None:
        """`before` plus how much is in a batch. What is no number at all is counted, and told once."""
        try:
            found = float(given(batch) if callable(given) else given)
            if 0 <= found < math.inf:
                return found + (before or 0.0)
            raise ValueError("below 0 or not finite")
        except Exception as error:  # a user's function may raise anything
            self._warn(field, f"{field}={json_value(given)!s:.80}: {json_value(error)}; throughput is left out")
            return before

    def before_fork_child(self, identity: Identity) -> None:
        """In a forked child, while the journal is still the parent's: what the parent has open is not ours to end."""
        self._forebears[self._journal.home] = self._identity
        self._identity = identity
        self._main = None
        self._spans.clear()
        current.set(None)

    @property
    def _mark(self) -> str:
        return self._identity.run_key + self._identity.role

    def _fail(self, error: BaseException) -> None:
        with suppress(Exception):
            if error._stepspan_recorded == self._mark:  # type: ignore[attr-defined]
                return
        self._record_error(error)

    def _end_inside(self, scope: Scope, error: BaseException | None) -> None:
        inside, inner = [], current.get()
        while inner is not None and inner is not scope:
            inside.append(inner)
            inner = inner.outer
        if inner is scope:  # otherwise this is another thread or task, whose scopes are its own
            for left in inside:
                self.end(left, error)

    def _place(self, scope: Scope, event: Event) -> None:
        """Epoch and lap of a step: how often the steps of its split have begun again. (epoch, step) grows in a lap."""
        epoch, number = scope.epoch, scope.step or 0
        if epoch is None:
            epoch = -1
        else:
            event["epoch"] = epoch
        split = scope.split or ""
        last_epoch, last_number, lap = self._laps.get(split, (-1, -1, 0))
        if epoch < last_epoch or (epoch == last_epoch and number <= last_number):
            lap += 1
        self._laps[split] = epoch, number, lap
        if lap:
            scope.lap = event["lap"] = lap

    def _attach(self, scope: Scope) -> None:
        if self._propagation is None:
            from stepspan.recording import propagation

            self._propagation = propagation
        if self._propagate or not self._propagation.foreign_provider():
            scope.token = self._propagation.attach(scope)

    def _detach(self, scope: Scope) -> None:
        token, scope.token = scope.token, None
        if self._propagation is not None:
            self._propagation.detach(token)


def is_failure(error: BaseException) -> bool:
    """Whether an exception that leaves a scope means that it failed.

    A `SystemExit` of a kind of its own is no good end, even without a code: Lightning raises one on SIGTERM.
    """
    return not (isinstance(error, GeneratorExit) or (type(error) is SystemExit and not error.code))
