"""What is open: a run, an epoch, a step or a span, as code sees it that opens one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

from stepspan.events import Event
from stepspan.recording.decorators import F, decorate
from stepspan.recording.step_loop import StepLoop
from stepspan.recording.steps_in_force import StepOf

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.journal.writer import SessionWriter


PUBLIC = ("epoch", "samples", "split", "step", "tokens")
"""What is for users of a scope's attributes."""
_FOUND = frozenset({"cuda", "epoch", "lap"})
"""Fields of a begin event that are found as a step or span begins."""
AMOUNTS = frozenset({"samples", "tokens"})
NUMBERS = frozenset({float, int})
MAX_AMOUNT = 1e300
T = TypeVar("T")


class ScopeOwner(Protocol):
    """The open scopes of a run: a scope begins and ends there."""

    def begin(self, scope: Scope) -> None:
        """Open a scope inside the innermost one."""

    def begin_step(self, scope: Step) -> None:
        """Open a step."""

    def begin_span(self, scope: Span) -> None:
        """Open a span."""

    def end(self, scope: Scope, error: BaseException | None) -> None:
        """Close a scope and whatever is still open inside it."""

    def innermost(self) -> Scope | None:
        """The innermost open scope here."""


class Nobody:
    """The owner of copies: they belong to no run, and are never open."""

    def begin(self, scope: Scope) -> None:
        """Leave the scope closed, so that there is nothing to end."""

    def begin_step(self, scope: Step) -> None:
        """Leave it closed, too."""

    def begin_span(self, scope: Span) -> None:
        """Leave it closed, too."""

    def end(self, scope: Scope, error: BaseException | None) -> None:
        """Do nothing: it is not open."""

    def innermost(self) -> Scope | None:
        """There is none."""
        return None


class Rare(Generic[T]):
    """An attribute that few scopes have. It lies in `more`, so that the others are made, and known, without it."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type[Scope], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, scope: None, owner: type[Scope]) -> Self: ...

    @overload
    def __get__(self, scope: Scope, owner: type[Scope]) -> T: ...

    def __get__(self, scope: Scope | None, owner: type[Scope]) -> T | Self:
        if scope is None:
            return self
        return self._default if scope.more is None else scope.more.get(self._name, self._default)

    def __set__(self, scope: Scope, value: T) -> None:
        if value is not self._default:
            scope.more = {self._name: value} if scope.more is None else {**scope.more, self._name: value}
        elif scope.more is not None:
            scope.more = {name: its for name, its in scope.more.items() if name != self._name} or None


class Scope:
    """An open run, epoch, step or span; a context manager, and a decorator: each call is then one of its own.

    A copy, also one that was pickled, is a scope of a run that records nothing.

    Attributes:
        samples: How many samples a step processed: `training.throughput`. May be set while the step is open.
        tokens: How many tokens it processed.
        seq: The number of its begin line.
        ts: The time of its begin line, Unix ns.

    """

    __slots__ = (
        "begin", "epoch", "lap", "loop", "more", "owner", "parent", "seq", "session", "split", "started_in", "step",
        "tag", "task", "thread", "ts", "waited",
    )  # fmt: skip
    thread: int
    """The ident of the thread that began it."""
    task: int
    """The id of the asyncio task that did; 0: none."""

    detached: bool = False
    """Whether what it times goes on beside the code here, so that nothing comes to lie in it."""
    samples: Rare[float | None] = Rare(None)
    tokens: Rare[float | None] = Rare(None)
    abandoned_at: Rare[int] = Rare(0)
    """When its loop was left without its knowing how, Unix ns; 0 while the loop goes on."""
    in_main: Rare[bool] = Rare(False)
    """Whether its parent is the main thread's, for want of one in the thread that began this."""
    on_exit: Rare[tuple[Callable[[], None], ...]] = Rare(())
    """To be called just before it ends."""
    token: Rare[Any] = Rare(None)
    """Of the OpenTelemetry context, while it is the current span there."""

    def __init__(
        self, owner: ScopeOwner, tag: str, begin: Event, step: int | None = None, split: str | None = None
    ) -> None:
        self.owner = owner
        self.tag = tag
        self.begin = begin
        """The event that is written as it begins; its `parent` is filled in then."""
        self.step = step
        self.split = split
        self.epoch: int | None = None
        self.seq = self.ts = self.lap = 0
        self.loop: StepLoop | None = None
        """The loop whose step it is or lies in."""
        self.started_in: StepOf | None = None
        """The training step that it is or lies in, open or not; where there is none, an evaluation's."""
        self.session: SessionWriter | None = None
        """The journal session that it was begun in; None while it is not open."""
        self.parent: Scope | None = None
        """The scope that it lies in. A detached one is given it; the others find it as they begin."""
        self.waited: int | None = None
        """Nanoseconds that a step waited for its data."""
        self.more: dict[str, Any] | None = None
        """What few have; None: nothing."""

    def __enter__(self) -> Self:
        self.owner.begin(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.owner.end(self, error)

    def __repr__(self) -> str:
        named = self.begin.get("name") if self.tag == "span" else self.step if self.tag == "step" else self.epoch
        return f"<{self.tag} {'' if named is None else named!r}, {'open' if self.session is not None else 'not open'}>"

    def __dir__(self) -> Iterable[str]:
        return [*(name for name in super().__dir__() if name.startswith("__")), *PUBLIC]

    def __call__(self, function: F) -> F:
        """A function each of whose calls is a scope like this one.

        Args:
            function: Also a coroutine function, a generator function or a method.

        """
        with suppress(Exception):  # an object's own `__class__` or `__name__` may raise anything
            return decorate(function, self.renewed, self._renewed_detached)
        return function

    @property
    def is_special(self) -> bool:
        """Whether it has more than amounts that are plain numbers."""
        for name, value in (self.more or {}).items():
            if name not in AMOUNTS or not (type(value) in NUMBERS and 0 <= value <= MAX_AMOUNT):
                return True
        return False

    @property
    def is_elsewhere(self) -> bool:
        """Whether its loop was left, or what it lies in is another thread's."""
        return self.more is not None and ("abandoned_at" in self.more or "in_main" in self.more)

    def renewed(self) -> Scope:
        """A scope like this one, not open yet."""
        return self._like(type(self))

    def _renewed_detached(self) -> Scope:
        if self.tag != "span":
            return self.renewed()
        span = self._like(DetachedSpan)
        span.parent = self.owner.innermost()
        return span

    def _like(self, kind: type[Scope]) -> Scope:
        fields = {name: value for name, value in self.begin.items() if self.tag == "epoch" or name not in _FOUND}
        scope = kind(self.owner, self.tag, {**fields, "ts": 0, "seq": 0, "parent": 0}, self.step, self.split)
        scope.samples, scope.tokens = self.samples, self.tokens
        scope.epoch = self.epoch if self.tag == "epoch" else None
        return scope

    def __reduce__(self) -> tuple[Any, ...]:
        return _closed_scope, (self.tag, dict(self.begin), self.step, self.split, self.samples, self.tokens)


class DetachedSpan(Scope):
    """A span that goes on beside the code that began it, and may end in another thread."""

    __slots__ = ()
    detached = True


class Step(Scope):
    """A step: the scope that is made most often, so with as little as can be.

    Its begin event is made when somebody asks for it; usually its line is made from a template.
    """

    __slots__ = ()
    step: int
    split: str

    def __init__(self, owner: ScopeOwner, number: int, split: str) -> None:
        self.owner = owner
        self.tag = "step"
        self.step = number
        self.split = split
        self.seq = self.ts = self.lap = 0
        self.loop = self.session = self.parent = self.epoch = self.started_in = self.waited = self.more = None

    @property
    def begin(self) -> Event:  # type: ignore[override] # nobody sets it
        """The event that is written as it begins."""
        parent = self.parent.seq if self.parent is not None and self.parent.session is not None else 0
        event = {"ts": 0, "seq": 0, "tag": "step_begin", "parent": parent, "step": self.step, "split": self.split}
        if self.epoch is not None:
            event["epoch"] = self.epoch
        if self.lap:
            event["lap"] = self.lap
        return event

    def __enter__(self) -> Self:
        self.owner.begin_step(self)
        return self

    def renewed(self) -> Scope:
        """A step like this one, not open yet."""
        step = Step(self.owner, self.step, self.split)
        step.more = self.more and {name: self.more[name] for name in ("samples", "tokens") if name in self.more}
        return step


class Span(Scope):
    """A span with a name and nothing more; its begin event, too, is made when somebody asks for it.

    Attributes:
        name: Of the phase.
        line: The line that begins it: takes `parent`, and nothing.

    """

    __slots__ = ("line", "name")

    def __init__(self, owner: ScopeOwner, name: str, line: bytes) -> None:
        self.owner = owner
        self.tag = "span"
        self.name = name
        self.line = line
        self.seq = self.ts = self.lap = 0
        self.step = self.split = self.epoch = None
        self.loop = self.session = self.parent = self.started_in = self.waited = self.more = None

    @property
    def begin(self) -> Event:  # type: ignore[override] # nobody sets it
        """The event that is written as it begins."""
        parent = self.parent.seq if self.parent is not None and self.parent.session is self.session else 0
        return {"ts": 0, "seq": 0, "tag": "span_begin", "parent": parent, "name": self.name}

    def __enter__(self) -> Self:
        self.owner.begin_span(self)
        return self

    def renewed(self) -> Scope:
        """A span like this one, not open yet."""
        return Span(self.owner, self.name, self.line)


class AdjacentStep(Step):
    """A step of a loop that goes on side by side with that of another one, as in `zip`."""

    __slots__ = ("adjacent_to",)
    detached = True
    adjacent_to: Scope
    """The step of the other loop."""


def is_plain_amount(amount: Any) -> bool:
    """Whether an amount is a number that needs no closer look."""
    return type(amount) in NUMBERS and 0 <= amount <= MAX_AMOUNT


def is_loop_step(scope: Scope) -> bool:
    """Whether a scope is the open step of a loop."""
    return scope.loop is not None and scope.loop.step is scope


def has_begun_here(scope: Scope) -> bool:
    """Whether it was this thread and task that began a scope: another one goes on when that has ended."""
    return scope.thread == get_ident() and scope.task == current_task()


_get_running_loop: Callable[[], Any] | None = None
"""Of asyncio, once that is imported."""


def current_task() -> int:
    """The id of the asyncio task that runs here; 0 where none does."""
    global _get_running_loop  # found once: it is called for each scope
    if _get_running_loop is None:
        _get_running_loop = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)
        if _get_running_loop is None:  # nobody has imported it, or somebody is about to
            return 0
    event_loop = _get_running_loop()
    return 0 if event_loop is None else id(sys.modules["asyncio"].current_task(event_loop))


def _closed_scope(
    tag: str, begin: Event, step: int | None, split: str | None, samples: float | None, tokens: float | None
) -> Scope:
    """A copy of a scope, of a run that records nothing."""
    if tag == "step" and step is not None and split is not None:
        scope: Scope = Step(Nobody(), step, split)
    else:
        scope = Scope(Nobody(), tag, begin, step, split)
    scope.samples, scope.tokens = samples, tokens
    return scope
