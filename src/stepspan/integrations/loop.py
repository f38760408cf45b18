"""What the callbacks of training frameworks share: a loop that somebody else drives, told hook by hook.

A hook may be missing or come twice: what is entered stands in levels, and entering one closes all that is open at it
or inside it. Nothing that goes wrong in a hook reaches training; only wrong arguments of `start_run` do, at its start.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import islice
from types import FrameType
from typing import Any, TypeVar

from stepspan.disabled import DISABLED
from stepspan.errors import ConfigError
from stepspan.recording.scopes import Scope
from stepspan.run import Run
from stepspan.start import current_run, start_run

LEVELS = ("epoch", "phase", "step", "part")
"""Outermost first: a `phase` lies between steps, a `part` within one."""

SAMPLED = 16
"""How many items of a list are looked at for the samples of a batch."""

Method = TypeVar("Method", bound=Callable[..., None])


class Loop:
    """A run and what is open in it. `arguments`: of `start_run`, where it has to start one."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.run: Run = DISABLED
        self._arguments = arguments
        self._ours = False
        self._state: object = None
        """The `state` of what trains, where an exception is not told."""
        self._open: dict[str, Scope] = {}
        self._moment = time.perf_counter_ns()
        """When the loop was heard of last."""

    def begin(self, who: Callable[[], Mapping[str, Any]] | None, state: object = None) -> None:
        """Follow the open run. Where there is none start one, with what `who()` knows of this process; None: don't.

        `state`: the attribute of that name of what trains. Once no thread is in a method of it any more the training
        is over, told or not, and the next loop to begin ends its run.
        """
        if self.run is not DISABLED:  # the last loop was left by an exception that nobody told us
            self.end(status="interrupted")
        if (left := _STARTED.get(id(current_run()))) is not None and left._is_left():
            left.end(status="interrupted")
        self.run = current_run()
        if self.run is DISABLED and who is not None:
            self.run, self._ours = start_run(**{**who(), **self._arguments}), True
            if state is not None and self.run is not DISABLED:
                self._state, _STARTED[id(self.run)] = state, self

    def follow(self) -> bool:
        """Outside of a training: whether there is an open run to tell."""
        if self.run is DISABLED or self.run.closed:
            self.begin(None)
        return self.run is not DISABLED

    def end(self, error: BaseException | None = None, *, status: str | None = None) -> None:
        """Leave everything; a run that we started ends too."""
        for level in LEVELS:
            self.leave(level, error)
        run, ours = self.run, self._ours
        self.run, self._ours, self._state = DISABLED, False, None
        _STARTED.pop(id(run), None)
        if ours and status is not None:
            run.close(status)
        elif ours:
            run.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def enter(self, level: str, scope: Scope) -> None:
        """Open a scope at a level."""
        self.leave(level)
        self._open[level] = scope
        scope.__enter__()

    def leave(self, level: str, error: BaseException | None = None) -> None:
        """Close what is open at a level and inside it."""
        for each in reversed(LEVELS[LEVELS.index(level) :]):
            scope = self._open.pop(each, None)
            if scope is not None:
                scope.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def at(self, level: str) -> Scope | None:
        """What is open at a level."""
        return self._open.get(level)

    def batch(self, number: int, *, split: str = "train", samples: float | None = None) -> None:
        """A batch comes: the first of step `number`, or one more of the open step. Waited for since the last hook."""
        if self.run is DISABLED:
            return
        waited, scope = time.perf_counter_ns() - self._moment, self.at("step")
        if scope is None:
            scope = self.run.step(number, split=split)
            self.enter("step", scope)
        scope.waited = (scope.waited or 0) + waited
        if samples is not None:
            scope.samples = (scope.samples or 0) + samples

    def log(self, metrics: Mapping[str, Any], step: int | None, split: str | None = None) -> None:
        """Log metrics. An evaluation's `val_loss` is its `val/loss`, unless it has a `loss` too."""
        self.run.log_metrics({_key(key, metrics, split): value for key, value in metrics.items()}, step, split=split)

    def _is_left(self) -> bool:
        for frame in sys._current_frames().values():
            inner: FrameType | None = frame
            while inner is not None:
                if getattr(inner.f_locals.get("self"), "__dict__", {}).get("state") is self._state:
                    return False
                inner = inner.f_back
        return True


_STARTED: dict[int, Loop] = {}
"""`id` of an open run -> the loop that started it and may be left without a word."""


def _key(key: str, among: Mapping[str, Any], split: str | None) -> str:
    head, _, rest = key.partition("_")
    return f"{head}/{rest}" if rest and head == split != "train" and rest not in among else key


def hook(method: Method) -> Method:
    """A hook of a callback that has a `loop`: raises nothing, and ends the last thing heard of the loop."""

    @wraps(method)
    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        loop: Loop = self.loop
        try:
            method(self, *args, **kwargs)
        except ConfigError:
            raise
        except Exception as error:  # another version of the framework, a model's own attributes
            loop.run.warn_once(method.__name__, f"{type(self).__name__}.{method.__name__} failed: {error!r}")
        finally:
            loop._moment = time.perf_counter_ns()

    return told  # type: ignore[return-value]


_FRAMEWORK_BASE: dict[tuple[type, type], type] = {}


def joined(ours: type, base: type) -> type:
    """Our class and a framework's in one, made when the framework is there."""
    if (ours, base) not in _FRAMEWORK_BASE:
        about = {"__module__": ours.__module__, "__doc__": ours.__doc__}
        _FRAMEWORK_BASE[ours, base] = type(ours.__name__, (ours, base), about)
    return _FRAMEWORK_BASE[ours, base]


def samples_of(batch: Any) -> int | None:
    """How many samples a batch holds: the first dimension of the arrays in it; None unless all have the same."""
    found = set(_first_dimensions(batch, 3))
    return found.pop() if len(found) == 1 else None


def _first_dimensions(batch: Any, depth: int) -> Iterator[int]:
    shape = getattr(batch, "shape", None)
    if shape is not None:
        if len(shape):
            yield int(shape[0])
    elif depth and isinstance(batch, (Mapping, list, tuple)):
        inside = batch.values() if isinstance(batch, Mapping) else batch
        for each in islice(inside, SAMPLED):
            yield from _first_dimensions(each, depth - 1)


def finite(number: Any) -> int | None:
    """A number of steps that is known; None for infinity, -1 and the like."""
    known = isinstance(number, (int, float)) and math.isfinite(number) and number > 0
    return int(number) if known else None
