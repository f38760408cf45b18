"""What begins and ends: the run, its epochs, steps and spans, and the loop that makes steps.

The innermost open scope of a thread or asyncio task stands in a context variable; a thread that has none takes the
run's main one. A scope that exits ends what is still open inside it, with its own outcome: that is how a step learns
whether its loop was left by `break` or by an exception, which the loop's iterator is never told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stepspan.events import Event
from stepspan.otlp import ids

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.identity import Identity
    from stepspan.pipeline import Pipeline

T = TypeVar("T")

current: ContextVar[Scope | None] = ContextVar("stepspan.scope", default=None)


class Scope:
    """An open run, epoch, step or span; a context manager. `seq` and `ts` are those of its begin line."""

    __slots__ = (
        "begin", "epoch", "home", "lap", "loose", "outer", "owner", "parent",
        "seq", "split", "step", "tag", "token", "ts", "waited",
    )  # fmt: skip

    def __init__(self, owner: Scopes, tag: str, begin: Event) -> None:
        self.owner = owner
        self.tag = tag
        self.begin = begin
        self.seq = self.ts = self.parent = self.lap = 0
        self.loose = 0
        """When its loop was left, Unix ns; 0 while it is held."""
        self.home: object = None
        """The session it was begun in; None when it is not open."""
        self.outer: Scope | None = None
        self.epoch: int | None = None
        self.step: int | None = None
        self.split: str | None = None
        self.waited: float | None = None
        """Seconds that a step waited for its data."""
        self.token: Any = None

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
        tell: Callable[[str, str], None],
        record_error: Callable[[BaseException], None],
        propagate: bool | None,
    ) -> None:
        self.clock = pipeline.journal.clock
        self._identity = identity
        self._journal = pipeline.journal
        self._emit = pipeline.emit
        self._tell = tell
        self._record_error = record_error
        self._propagate = propagate
        self._main: Scope | None = None
        self._laps: dict[str, tuple[int, int, int]] = {}
        self._next_step: dict[str, int] = {}

    def begin(self, scope: Scope) -> None:
        """Open a scope inside the innermost one."""
        try:
            tag, outer, home = scope.tag, self.innermost(), self._journal.home
            if outer is not None and outer.home is home:
                scope.parent = outer.seq
                if tag != "run" and tag != "epoch":
                    scope.epoch = outer.epoch
                    if tag == "span":
                        scope.step, scope.split, scope.lap = outer.step, outer.split, outer.lap
            scope.outer = outer
            event: Event = {"ts": 0, "seq": 0, "tag": tag + "_begin", "parent": scope.parent}
            if tag == "step":
                event["step"] = scope.step
                event["split"] = scope.split
                if scope.epoch is not None:
                    event["epoch"] = scope.epoch
                scope.lap = self._lap(scope)
                if scope.lap:
                    event["lap"] = scope.lap
            else:
                event.update(scope.begin)
            self._emit(event, scope)
            scope.home = self._journal.home
            if scope.home is not home:  # the event opened a session of its own: nothing there to lie in
                scope.parent = 0
            current.set(scope)
            if tag != "span":
                self._main = scope
            if self._propagate is not False and "opentelemetry.trace" in sys.modules:
                self._attach(scope)
        except Exception as error:
            self._tell("begin", f"a {scope.tag} could not be begun: {error!r}")

    def end(self, scope: Scope, error: BaseException | None) -> None:
        """Close a scope and whatever is still open inside it."""
        if scope.home is None:
            return
        try:
            if current.get() is not scope:
                self._end_inside(scope, error)
            event: Event = {"ts": 0, "seq": 0, "tag": scope.tag + "_end", "begin": 0}
            if error is not None and is_failure(error):
                self.fail(error)
                event["status"] = "failed" if scope.tag == "run" else "error"
            elif scope.tag == "run":
                event["status"] = scope.begin["status"]
            if scope.waited is not None:
                event["data_wait"] = round(scope.waited, 9)
            if scope.loose:
                event["ended"] = scope.loose
            if scope.home is self._journal.home:
                self._emit(event, scope)
        except Exception as failure:
            self._tell("end", f"a {scope.tag} could not be ended: {failure!r}")
        finally:
            scope.home = None
            if current.get() is scope:
                current.set(scope.outer)
            if self._main is scope:
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

    def parent(self) -> int:
        """The `seq` of the innermost scope's begin line; 0 for none in this session."""
        scope = self.innermost()
        return scope.seq if scope is not None and scope.home is self._journal.home else 0

    def step(self, number: int | None, split: str) -> Scope:
        """A step that is not open yet; None: the one after the last of this split."""
        scope = Scope(self, "step", {})
        scope.split = split
        scope.step = self._next_step.get(split, 0) if number is None else number
        self._next_step[split] = scope.step + 1
        return scope

    def fail(self, error: BaseException) -> None:
        """Record an exception that passes through scopes, once."""
        if not getattr(error, "_stepspan_recorded", False):
            self._record_error(error)
            try:
                error._stepspan_recorded = True  # type: ignore[attr-defined]
            except AttributeError:  # an exception with slots is recorded by every scope
                return

    def ids(self, scope: Scope) -> tuple[bytes, bytes]:
        """The trace and span id that the mapping will give a scope."""
        me, writer = self._identity, self._journal.writer
        top = scope
        while top.tag == "span" and top.parent and top.outer is not None and top.outer.tag in {"span", "step"}:
            top = top.outer
        if top.tag == "step":
            trace_id = ids.step_trace_id(me.run_key, top.split or "", top.epoch, top.lap, top.step or 0)
        else:
            trace_id = ids.outside_trace_id(me.run_key, me.rank, me.role, top.epoch, top.ts)
        if scope.tag == "step":
            return trace_id, ids.step_span_id(trace_id, me.rank, me.role)
        return trace_id, ids.span_id(writer.session if writer else "", scope.seq)

    def after_fork(self, identity: Identity) -> None:
        """In a forked child: what the parent has open is not ours to end."""
        self._identity = identity
        self._main = None
        current.set(None)

    def _end_inside(self, scope: Scope, error: BaseException | None) -> None:
        inside, inner = [], current.get()
        while inner is not None and inner is not scope:
            inside.append(inner)
            inner = inner.outer
        if inner is scope:  # otherwise this is another thread or task, whose scopes are its own
            for left in inside:
                self.end(left, error)

    def _lap(self, scope: Scope) -> int:
        """How often the steps of this split have begun again: within a lap (epoch, step) grows."""
        epoch, step, split = -1 if scope.epoch is None else scope.epoch, scope.step or 0, scope.split or ""
        last_epoch, last_step, lap = self._laps.get(split, (-1, -1, 0))
        if (epoch, step) <= (last_epoch, last_step):
            lap += 1
        self._laps[split] = epoch, step, lap
        return lap

    def _attach(self, scope: Scope) -> None:
        from stepspan import propagation

        if self._propagate or not propagation.foreign_provider():
            scope.token = propagation.attach(scope)

    @staticmethod
    def _detach(scope: Scope) -> None:
        from stepspan import propagation

        propagation.detach(scope.token)
        scope.token = None


class Steps(Generic[T]):
    """Iterates over batches: waits for one, opens the step, hands the batch out, and ends the step when asked for more.

    An object and not a generator: it has a length, and it can be left in any way. `accumulate` batches make one step.
    """

    def __init__(
        self, scopes: Scopes, iterable: Iterable[T], *, start: int | None, accumulate: int, split: str
    ) -> None:
        self._scopes = scopes
        self._iterable = iterable
        self._iterator: Iterator[T] | None = None
        self._start = start
        self._accumulate = accumulate
        self._split = split
        self._scope: Scope | None = None
        self._batches = 0
        self._waited = 0.0

    def __iter__(self) -> Iterator[T]:
        return self

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type] # as long as what it iterates over, if that has a length

    def __next__(self) -> T:
        if self._batches >= self._accumulate:
            self._finish(None)
        before = time.perf_counter()
        try:
            if self._iterator is None:
                self._iterator = iter(self._iterable)
            batch = next(self._iterator)
        except StopIteration:
            self._finish(None)
            raise
        except BaseException as error:
            self._finish(error)
            raise
        self._waited += time.perf_counter() - before
        self._batches += 1
        if self._scope is None:
            self._scope = self._scopes.step(self._start, self._split)
            self._start = None
            self._scopes.begin(self._scope)
        return batch

    def _finish(self, error: BaseException | None) -> None:
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.waited = self._waited
            self._scopes.end(scope, error)
        self._waited, self._batches = 0.0, 0

    def __del__(self) -> None:
        scope = getattr(self, "_scope", None)
        if scope is not None and not scope.loose:  # the loop was left; how, the scope around it will know
            scope.waited = self._waited
            scope.loose = self._scopes.clock()


def is_failure(error: BaseException) -> bool:
    """Whether an exception that leaves a scope means that it failed."""
    return not (isinstance(error, GeneratorExit) or (isinstance(error, SystemExit) and not error.code))
