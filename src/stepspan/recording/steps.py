"""The loop over batches that makes steps, `for batch in run.steps(loader)`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from stepspan.recording.scope import is_plain_amount
from stepspan.recording.scopes import NullScopes, Scopes

T = TypeVar("T")

MAX_FRAMES = 32
"""That are looked at when a loop asks for its first batch."""

Amount: TypeAlias = "float | Callable[[Any], float] | None"
"""How much is in a batch: a number, or a function of the batch that counts it."""


class Steps(Generic[T]):
    """Iterates over batches: waits for one, opens the step, hands the batch out, and ends the step when asked for more.

    An object and not a generator: it has a length, and its loop can be left in any way. A loop over one that was
    exhausted begins again, as a loop over the iterable would. Each loop has an iterator of its own, so that a loop
    that was left can be told although somebody holds what it went over, as a progress bar does. A copy iterates over
    the batches and makes no steps.

    Args:
        scopes: Of the run.
        iterable: The batches.
        start: The first step's number; None: the one after the last of this split.
        accumulate: How many batches make one step.
        split: What the steps are of: "train", "val", …
        samples: How many samples a batch holds.
        tokens: How many tokens.

    """

    def __init__(
        self,
        scopes: Scopes,
        iterable: Iterable[T],
        *,
        start: int | None,
        accumulate: int,
        split: str,
        samples: Amount = None,
        tokens: Amount = None,
    ) -> None:
        self._scopes = scopes
        self._clock, self._stopwatch = scopes.clock, scopes.stopwatch
        self._loop = scopes.loop(split)
        self._iterable = iterable
        self._iterator: Iterator[T] | None = None
        self._exhausted = False
        self._start = start
        self._accumulate = accumulate
        self._amounts = {
            name: amount for name, amount in (("samples", samples), ("tokens", tokens)) if amount is not None
        }
        self._fixed: dict[str, Any] | None = {
            name: amount for name, amount in self._amounts.items() if is_plain_amount(amount)
        } or None
        """What every step has of them as it begins: the others are counted in its batch."""
        self._counted = {name: amount for name, amount in self._amounts.items() if name not in (self._fixed or ())}
        self._batches = 0
        """How many the open step has, or would have had."""
        self._asked_by = 0
        """The id of the iterator that the last batch went to; 0 of none."""

    def __iter__(self) -> Iterator[T]:
        self._exhausted = False
        self._loop.order, self._loop.is_new = self._scopes.loops.begun, True
        return StepsIterator(self)

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type] # as long as what it iterates over, if that has a length

    def __next__(self) -> T:
        return self._next(0)

    def _next(self, asked_by: int) -> T:
        """The next batch, in a step of its own or one that is open."""
        scopes, loop = self._scopes, self._loop
        self._asked_by = asked_by
        if self._batches >= self._accumulate:
            self._finish(None)
        elif loop.step is not None:
            loop.go_on()
            loop.step.abandoned_at = 0
        begun, before = scopes.loops.begun, self._stopwatch()
        try:
            if self._iterator is None:
                if self._exhausted:
                    raise StopIteration
                self._iterator = iter(self._iterable)
            batch = next(self._iterator)
        except StopIteration:
            self._iterator, self._exhausted = None, True
            self._finish(None)
            raise
        except BaseException as error:
            self._finish(error)
            raise
        waited = self._stopwatch() - before
        self._batches += 1
        scope = loop.step
        if scope is None:
            if loop.is_new or loop.asked_from:
                loop.asked_from = _calls() if loop.is_new else {}
            scope = scopes.begin_loop_step(loop, self._start, waited, begun, self._fixed)
            self._start, loop.is_new = None, False
            amounts = self._counted
        else:
            scope.waited = (scope.waited or 0) + waited
            loop.ts = self._clock()
            amounts = self._amounts
        for name, amount in amounts.items():
            setattr(scope, name, scopes.amount(name, amount, batch, getattr(scope, name)))
        return batch

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also one that was pickled, iterates over the batches and makes no steps."""
        return partial(_unrecorded, self._iterable, accumulate=self._accumulate, split=self._loop.split), ()

    def _finish(self, error: BaseException | None) -> None:
        loop, self._batches = self._loop, 0
        if loop.step is not None:
            loop.maybe_left_at = loop.followed = 0  # it goes on
            self._scopes.end(loop.step, error)
            loop.step = None

    def _was_left(self, batches: int) -> None:
        """An iterator is gone that the last batch went to; so is its loop, but for `next(iter(steps))`."""
        loop, step = self._loop, self._loop.step
        if step is None or step.session is None:
            return
        if batches == 1 and loop.ts == step.ts:  # and nothing was recorded in the step
            loop.maybe_left_at = loop.maybe_left_at or self._clock()
        else:
            step.abandoned_at = self._clock()  # how, the scope around it will find out
        self._scopes.loops.maybe_left[step] = None

    def __del__(self) -> None:
        step = self._loop.step
        if step is not None and step.session is not None and not step.abandoned_at:
            step.abandoned_at = self._clock()
            self._scopes.loops.maybe_left[step] = None


class StepsIterator(Generic[T]):
    """The iterator of one loop over `Steps`."""

    __slots__ = ("_batches", "_id", "_next", "_steps")

    def __init__(self, steps: Steps[T]) -> None:
        self._steps, self._next, self._id = steps, steps._next, id(self)
        self._batches = 0
        """How many it handed out."""

    def __iter__(self) -> Iterator[T]:
        return self

    def __len__(self) -> int:
        return len(self._steps)

    def __next__(self) -> T:
        batch = self._next(self._id)
        self._batches += 1
        return batch

    def __reduce__(self) -> tuple[Any, ...]:
        return iter, (self._steps,)

    def __del__(self) -> None:
        if self._steps._asked_by == id(self):
            self._steps._was_left(self._batches)


def _calls() -> dict[int, int]:
    """The id of each Python frame that is at work on a call for a batch, the innermost first, and where it stands."""
    frame, found = sys._getframe(2).f_back, dict[int, int]()
    while frame is not None and len(found) < MAX_FRAMES:
        found[id(frame)] = frame.f_lasti
        frame = frame.f_back
    return found


def _unrecorded(iterable: Iterable[T], accumulate: int, split: str) -> Steps[T]:
    """Steps of a run that records nothing."""
    return Steps(NullScopes(), iterable, start=None, accumulate=accumulate, split=split)
