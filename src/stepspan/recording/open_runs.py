"""The runs that are open in this process, and which of them is the current one where a program asks.

Several are open side by side: a study around its trials, trials in threads. Which one is current goes by context: what
a context variable says, so that asyncio tasks and `contextvars.copy_context()` inherit it. A new thread begins with an
empty context. It takes the run of the code that called its `Thread.start`, which is wrapped for that while a run is
open: nothing else in Python knows who started a thread. A thread that has neither (one of C++ code, or one that is
older than the runs) takes the only open run, or the oldest one, with a warning.

    start_run()          the run is current in this context from now on; until it ends, or the next one starts
    with run:            the run is current in the block; after it, what was before
    first other use      the run is a bare one: it ends the bare ones that its thread had opened before, as a cell of a
                         notebook does that is run again. No other run ends another one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Container
from contextlib import suppress
from contextvars import ContextVar
from functools import wraps
from threading import get_ident
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from weakref import WeakSet, ref

from stepspan.identity import Identity
from stepspan.journal.writer import IDLE_THREADS, THREADS
from stepspan.recording.recorder import Recorder

INHERITED = "_stepspan_run"
"""The attribute of a thread that says which run was current where the thread was started."""


class OpenRun(Protocol):
    """What there is to know of a run here."""

    _rests: bool
    """Whether it has ended, and takes what is evaluated afterwards."""

    closed: bool
    _recorder: Recorder

    @property
    def identity(self) -> Identity:
        """Which job and rank this process is."""

    def close(self, status: str | None = None) -> None:
        """End the run with a status; None: as the exception being handled says, else "completed"."""

    def _warn_once(self, kind: str, message: str) -> None:
        """Count something that went wrong, and log it the first time for its kind."""


class Current(NamedTuple):
    """A run that is current in a context, and what is current there once it has ended."""

    run: Callable[[], OpenRun | None]
    """A weak reference: contexts live long, and a run that has ended need not."""
    previous: Current | None


class Opener(NamedTuple):
    """Where a run was opened: a thread, and the asyncio task that it was at."""

    thread: threading.Thread
    task: Any

    @classmethod
    def here(cls) -> Opener:
        """The thread and task that call."""
        asyncio, task = sys.modules.get("asyncio"), None
        if asyncio is not None:
            with suppress(RuntimeError, AttributeError):  # no loop runs here; another thread is importing it just now
                task = asyncio.current_task()
        return cls(threading.current_thread(), task)

    def is_replaced_by(self, other: Opener) -> bool:
        """Whether what `other` opens comes after this, and not beside it."""
        return self.thread is other.thread and (self.task in {None, other.task} or self.task.done())


RunT = TypeVar("RunT", bound=OpenRun)

_current: ContextVar[Current | None] = ContextVar("stepspan.run", default=None)


class OpenRuns(Generic[RunT]):
    """The runs of this process that are open, in the order of their start. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may start a run, or end one
        self._openers: dict[RunT, Opener] = {}
        self._bare: set[RunT] = set()
        """Those that no `with` block is around, for all that is known."""
        self._all: tuple[RunT, ...] = ()
        self._thread_start: tuple[Callable[..., None], Callable[..., None]] | None = None
        """`Thread.start` as it was, and what wraps it; None where nothing does."""
        self._resting: dict[RunT, Opener] = {}
        self._parked: WeakSet[RunT] = WeakSet()

    def resting(self) -> tuple[RunT, ...]:
        """Those that have ended and whose session is open for what is evaluated, the latest last."""
        return tuple(self._resting)

    def resting_before(self, opener: Opener) -> list[RunT]:
        """Those of them that a run comes after, and not beside, that is opened there."""
        return [
            run for run, its in list(self._resting.items()) if its.is_replaced_by(opener) or not its.thread.is_alive()
        ]

    def thread_of(self, run: RunT) -> threading.Thread | None:
        """The thread that opened a run; None where it has ended for good."""
        opener = self._openers.get(run) or self._resting.get(run)
        return None if opener is None else opener.thread

    def all(self) -> tuple[RunT, ...]:
        """All of them, the oldest first."""
        return self._all

    def add(self, run: RunT) -> None:
        """Take a run that was opened here: it is current in this context from now on."""
        with self._lock:
            self._openers[run] = Opener.here()
            self._bare.add(run)
            self._all = tuple(self._openers)
            self._wrap_thread_start()
        self._make_current(run)

    def rest(self, run: RunT) -> None:
        """A run has ended and rests: it is current where it was, and where no other one is open."""
        with self._lock:
            opener = self._openers.get(run) or Opener.here()
            self.remove(run)
            self._resting = {**self._resting, run: opener}

    def park(self, run: RunT) -> None:
        """A run that rests has no open session any more."""
        with self._lock:
            self.remove(run)
            self._parked.add(run)

    def that_may_record(self) -> tuple[RunT, ...]:
        """All that something may be recorded in yet: open, resting and parked ones."""
        return *self._all, *self._resting, *self._parked

    def remove(self, run: RunT) -> None:
        """Forget a run that has ended."""
        with self._lock:
            self._resting = {each: its for each, its in self._resting.items() if each is not run}
            self._parked.discard(run)
            self._openers.pop(run, None)
            self._bare.discard(run)
            self._all = tuple(self._openers)
            if not self._all:
                self._unwrap_thread_start()

    def here(self) -> RunT | None:
        """The run that is current in this context, or was so where this thread was started; None where none is."""
        current = _here()
        return None if current is None else current.run()  # type: ignore[return-value] # put there by `add` or `enter`

    def current(self) -> RunT | None:
        """The run that is current here; None where none is open."""
        current = _here() or (_here(self._resting) if self._resting else None)
        if current is not None:
            return current.run()  # type: ignore[return-value] # put there by `add` or `enter`
        found = [run for run in self._all if not run.closed]  # one may be waiting for its delivery
        if len(found) > 1:
            oldest = found[0].identity
            found[0]._warn_once(
                "current_run",
                f"current_run() is {oldest.job_id}, the oldest of {len(found)} open runs, in a thread that none of them"
                " was opened in or around: log to the run itself, or start the thread within the run's `with` block",
            )
        return found[0] if found else next(reversed(self._resting), None)

    def hold(self, run: RunT) -> None:
        """Something looks after a run, and will end it: no other run does."""
        with self._lock:
            self._bare.discard(run)

    def enter(self, run: RunT) -> None:
        """Make a run current for a `with` block; from now on no other run ends it."""
        with self._lock:
            was_bare = run in self._bare
            self._bare.discard(run)
        current = _current.get()
        if not (was_bare and current is not None and current.run() is run):
            self._make_current(run)

    def leave(self, run: RunT) -> None:
        """End a run's `with` block: what was current before is so again."""
        current = _current.get()
        while current is not None and current.run() is not run:  # what was opened in the block, and is open still
            current = current.previous
        if current is not None:
            _current.set(current.previous)

    def bare_before(self, opener: Opener) -> list[RunT]:
        """The bare runs that one is in the place of, once it is used, that is opened there. Oldest first."""
        with self._lock:
            return [run for run, its in self._openers.items() if run in self._bare and its.is_replaced_by(opener)]

    def end_bare_before(self, run: RunT) -> None:
        """A run is used, and no `with` block is around it: end the bare ones that were opened there before it."""
        with self._lock:
            opener = self._openers.get(run)
            earlier = [] if opener is None else self.bare_before(opener)
            earlier = earlier[: earlier.index(run)] if run in earlier else []
        for other in earlier:
            other._warn_once(
                "replaced",
                f"run {other.identity.job_id} ends as interrupted, for {run.identity.job_id} was started in its thread:"
                " use `with stepspan.start_run()` for runs side by side",
            )
            other.close("interrupted")

    def after_fork(self) -> None:
        """In a forked child: what another thread of the parent was about to change stays as it was."""
        self._lock = threading.RLock()

    def _make_current(self, run: RunT) -> None:
        _current.set(Current(ref(run), _here()))

    def _wrap_thread_start(self) -> None:
        if self._thread_start is not None:
            return
        unwrapped = threading.Thread.start

        @wraps(unwrapped)
        def start(thread: threading.Thread) -> None:
            current = _here()
            if current is not None:
                with suppress(Exception):  # a class of its own kind
                    setattr(thread, INHERITED, current)
            IDLE_THREADS.others = True
            unwrapped(thread)

        threading.Thread.start = start  # type: ignore[method-assign,assignment]
        self._thread_start = unwrapped, start

    def _unwrap_thread_start(self) -> None:
        (unwrapped, start), self._thread_start = self._thread_start or (None, None), None
        if unwrapped is not None and threading.Thread.start is start:
            threading.Thread.start = unwrapped  # type: ignore[method-assign]
        # Otherwise somebody has wrapped it again: it goes on, and does nothing.


def _here(resting: Container[OpenRun] = ()) -> Current | None:
    """What is current and open in this context or, failing that, was so where this thread was started.

    Args:
        resting: Runs that rest, and are taken for open.

    """
    inherited = getattr(THREADS.get(get_ident()), INHERITED, None)
    return _first_open(_current.get(), resting) or _first_open(inherited, resting)


def _first_open(current: Current | None, resting: Container[OpenRun]) -> Current | None:
    while current is not None:
        run = current.run()
        if run is not None and not run.closed and (not run._rests or run in resting):
            return current
        current = current.previous
    return None


OPEN_RUNS: OpenRuns[Any] = OpenRuns()
"""The one registry of a process; `start_run` adds to it, `current_run` asks it."""
