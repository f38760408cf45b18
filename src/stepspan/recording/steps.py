"""The loop over batches that makes steps, `for batch in run.steps(loader)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from stepspan.recording.scopes import NullScopes, Scope, Scopes

T = TypeVar("T")

Amount: TypeAlias = "float | Callable[[Any], float] | None"
"""How much is in a batch: a number, or a function of the batch that counts it."""


class Steps(Generic[T]):
    """Iterates over batches: waits for one, opens the step, hands the batch out, and ends the step when asked for more.

    An object and not a generator: it has a length, and its loop can be left in any way. A loop over one that was
    exhausted begins again, as a loop over the iterable would. A copy iterates over the batches and makes no steps.

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
        self._scope: Scope | None = None
        self._scopes = scopes
        self._clock = scopes.clock
        self._iterable = iterable
        self._iterator: Iterator[T] | None = None
        self._exhausted = False
        self._start = start
        self._accumulate = accumulate
        self._split = split
        self._samples = samples
        self._tokens = tokens
        self._batches = 0

    def __iter__(self) -> Iterator[T]:
        self._exhausted = False
        return self

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type] # as long as what it iterates over, if that has a length

    def __next__(self) -> T:
        if self._batches >= self._accumulate:
            self._finish(None)
        before = self._clock()
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
        waited = self._clock() - before
        self._batches += 1
        scope = self._scope
        if scope is None:
            scope = self._scope = self._scopes.step(self._start, self._split)
            scope.waited, self._start = waited, None
            self._scopes.begin(scope)
        else:
            scope.waited = (scope.waited or 0) + waited
        if self._samples is not None:
            scope.samples = self._scopes.amount("samples", self._samples, batch, scope.samples)
        if self._tokens is not None:
            scope.tokens = self._scopes.amount("tokens", self._tokens, batch, scope.tokens)
        return batch

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also one that was pickled, iterates over the batches and makes no steps."""
        return partial(_unrecorded, self._iterable, accumulate=self._accumulate, split=self._split), ()

    def _finish(self, error: BaseException | None) -> None:
        scope, self._scope = self._scope, None
        self._batches = 0
        if scope is not None:
            self._scopes.end(scope, error)

    def __del__(self) -> None:
        scope = self._scope
        if scope is not None:
            scope.abandoned_at = self._clock()  # the loop was left; how, the scope around it will find out


def _unrecorded(iterable: Iterable[T], accumulate: int, split: str) -> Steps[T]:
    """Steps of a run that records nothing."""
    return Steps(NullScopes(), iterable, start=None, accumulate=accumulate, split=split)
