"""What the callbacks of training frameworks share: a training loop that the framework drives, followed hook by hook.

A hook may be missing or come twice: open scopes stand at levels, and entering a level closes what is open at it or
inside it. Nothing that goes wrong in a hook reaches training; only wrong arguments of `start_run` do, at its start.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial, wraps
from importlib import import_module
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from weakref import WeakSet

from stepspan.errors import ConfigError
from stepspan.recording.open_runs import OPEN_RUNS
from stepspan.recording.scope import Scope
from stepspan.run import DISABLED, Run, current_run
from stepspan.start import check_arguments, start_run
from stepspan.values import error_text

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("stepspan")

LEVELS = ("epoch", "phase", "step", "part")
"""Outermost first: a `phase` lies between steps, a `part` within one."""
MAX_ITEMS = 16
"""How many items of a list are looked at to count the samples of a batch."""

Class = TypeVar("Class", bound=type)


class Loop:
    """The run that a framework's training goes to, and the scopes that are open in it.

    Args:
        arguments: Of `start_run`, for the run that `begin` starts where none is open.

    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.run: Run = DISABLED
        self._arguments = arguments
        self._owns_run = False
        self._trained: Run = DISABLED
        """The run of the last training that `begin` started one for: it rests, and takes what is evaluated."""
        self._has_begun = False
        """Whether a training has begun, or it was said that what is evaluated without a run is not recorded."""
        self._state: object = None
        """`state` of what trains, where the framework does not report exceptions."""
        self._method = ""
        """The trainer's method that trains: `train`, mostly."""
        self._open: dict[str, Scope] = {}
        self._last_hook_ns = time.perf_counter_ns()
        """When the last hook ended: what passes until the next batch is the wait for it."""

    def begin(self, identity: Callable[[], Mapping[str, Any]] | None, state: object = None) -> None:
        """Follow the open run, or start one.

        Args:
            identity: Returns further arguments of `start_run`: what the framework knows of this process. None: where
                no run is open none is started.
            state: The object that the framework's trainer has as its attribute `state`. Once no thread is in a method
                of that trainer any more the training is over, reported or not, and the next loop to begin ends its run
                as "interrupted".

        Raises:
            ConfigError: As `start_run` does.

        """
        if self.run is not DISABLED:  # an exception ended the last training, and the framework did not report it
            self.end(status="interrupted")
        for loop in list(_STARTED.values()):
            if not loop._goes_on():
                loop.end(status="interrupted")
        here = OPEN_RUNS.here()  # the disabled one, where a block says that nothing is to be recorded
        self.run = here or self._run_elsewhere(evaluates=identity is None)
        if not self._has_begun:
            self._has_begun = True
            if self.run is DISABLED and here is None and identity is None and self._is_enabled():
                level = logging.WARNING if DISABLED.identity.local_rank == 0 else logging.DEBUG
                log.log(level, "stepspan: an evaluation is not recorded: put `with stepspan.start_run():` around it")
        if self.run is DISABLED and here is None and identity is not None:
            self.run, self._owns_run = start_run(**{**identity(), **self._arguments})._hold(), True
            _OWNED.add(self.run)
            if state is not None and self.run is not DISABLED:
                self._state, _STARTED[id(self.run)] = state, self
                self._method = next(reversed(list(self._methods(sys._getframe()))), "")

    def follow(self) -> bool:
        """Outside of a training: follow the run of the last training or else the open one.

        Returns:
            Whether there is one.

        """
        trains = self._state is None or self.scope_at("phase") is not None or self._goes_on(self._method)
        if not trains or self.run is DISABLED or self.run.closed:
            self.begin(None)
        return self.run is not DISABLED

    def end(self, error: BaseException | None = None, *, status: str | None = None) -> None:
        """Close all scopes, and let the run rest if `begin` started it: an evaluation may follow.

        Args:
            error: The exception that ended the training: the open scopes and the run have failed with it.
            status: Of the run, in place of "completed" or "failed".

        """
        for level in LEVELS:
            self.leave(level, error)
        run, owned = self.run, self._owns_run
        self.run, self._owns_run, self._state = DISABLED, False, None
        _STARTED.pop(id(run), None)
        if owned:
            self._trained = run
            run._rest(error, status)

    def enter(self, level: str, scope: Scope) -> None:
        """Open a scope at a level, after closing what is open at that level and inside it.

        Args:
            level: One of `LEVELS`.
            scope: Not open yet.

        """
        self.leave(level)
        self._open[level] = scope
        scope.__enter__()

    def leave(self, level: str, error: BaseException | None = None) -> None:
        """Close what is open at a level and inside it, if anything is.

        Args:
            level: One of `LEVELS`.
            error: What the scopes have failed with.

        """
        for each in reversed(LEVELS[LEVELS.index(level) :]):
            scope = self._open.pop(each, None)
            if scope is not None:
                _exit(scope, error)

    def scope_at(self, level: str) -> Scope | None:
        """The scope that is open at a level, one of `LEVELS`; None where none is."""
        return self._open.get(level)

    def batch(self, step: int, *, split: str = "train", samples: float | None = None) -> None:
        """Record that a batch has come, for which the loop waited since the last hook ended.

        Args:
            step: The number of the step that begins with it. Within an open step it is one more batch of that step.
            split: Of the step.
            samples: How many samples are in the batch.

        """
        if self.run is DISABLED:
            return
        waited_ns, scope = time.perf_counter_ns() - self._last_hook_ns, self.scope_at("step")
        if scope is None:
            scope = self.run.step(step, split=split)
            self.enter("step", scope)
        scope.waited = (scope.waited or 0) + waited_ns
        if samples is not None:
            scope.samples = (scope.samples or 0) + samples

    def log(self, metrics: Mapping[str, Any], step: int | None, split: str | None = None) -> None:
        """Log metrics.

        Args:
            metrics: Key -> value, as of `Run.log_metrics`.
            step: The step's number; None: that of the open step.
            split: The split of all keys that name no other; None: that of the open step.

        """
        self.run.log_metrics(metrics, step, split=split)

    def set_total_steps(self, steps: Any) -> None:
        """Set the run's total steps, where the framework knows them.

        Args:
            steps: What the framework says; infinity, -1 and the like stand for an unknown number.

        """
        total = known_total(steps)
        if total is not None:
            self.run.set_total_steps(total)

    def _is_enabled(self) -> bool:
        """Whether a run that was started now would record something."""
        from stepspan.config import load

        given = {name: self._arguments.get(name) for name in ("enabled", "config")}
        with suppress(ConfigError):
            return load({"enabled": given["enabled"]}, os.environ, config=given["config"]).enabled
        return True

    def _run_elsewhere(self, *, evaluates: bool) -> Run:
        """The run to follow where none is open around this code: of another loop only one that rests."""
        if evaluates and self._trained._rests and not self._trained.closed:
            return self._trained
        run = current_run()
        if run._rests:
            return run if evaluates else DISABLED
        return DISABLED if run in _OWNED else run

    def _goes_on(self, method: str = "") -> bool:
        """Whether a thread is in this method of the trainer; without a name: in any."""
        frames = sys._current_frames().values()
        return any(True for frame in frames for _ in self._methods(frame, method))

    def _methods(self, frame: FrameType | None, only: str = "") -> Iterator[str]:
        """The trainer's methods that a frame lies in, innermost first; with `only` those of that name."""
        while frame is not None:
            name = frame.f_code.co_name
            if only in {"", name} and getattr(frame.f_locals.get("self"), "__dict__", {}).get("state") is self._state:
                yield name
            frame = frame.f_back


_OWNED: WeakSet[Run] = WeakSet()
"""The runs that loops have started."""
_STARTED: dict[int, Loop] = {}
"""`id` of an open run -> the loop that started it, whose framework does not report exceptions."""


def _exit(scope: Scope, error: BaseException | None) -> None:
    scope.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)


class FrameworkCallback:
    """Base of the callbacks. An instance is also one of the framework's own callback class.

    The framework is imported as the first one is made, not before.

    Args:
        **arguments: Of `stepspan.start_run`, for the run that is started where none is open.

    Raises:
        TypeError: An argument is none of `start_run`'s.

    """

    loop: Loop
    _packages: ClassVar[Sequence[str]]
    """Names of the packages that the framework comes in."""
    _base_name: ClassVar[str]
    """The name of the framework's own callback class in them."""
    _remake: partial[Any]

    def __new__(cls, **arguments: Any) -> Self:
        """Make one whose class has the framework's as a base."""
        own: type = cls
        callback: Self = object.__new__(with_framework_base(own, cls._framework_base()))
        callback._remake = partial(cls, **arguments)
        return callback

    def __init__(self, **arguments: Any) -> None:
        check_arguments(arguments)
        self.loop = Loop(arguments)

    def __deepcopy__(self, memo: object) -> Self:
        copied: Self = self._remake()  # with the same arguments, which may hold what cannot be copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return self._remake, ()

    @classmethod
    def _framework_base(cls) -> type:
        """The framework's class, of the package that is loaded; if none is, of the first that can be imported."""
        loaded = [name for name in cls._packages if name in sys.modules]
        for name in loaded or cls._packages:
            try:
                found: type = getattr(import_module(name), cls._base_name)
            except ModuleNotFoundError as error:
                missing = error
            else:
                return found
        raise missing


@cache
def with_framework_base(cls: type, base: type) -> type:
    """The class that derives from two others: one and the same each time.

    Args:
        cls: Comes first; the new class has its name and docstring.
        base: A framework's.

    """
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def hooks(cls: Class) -> Class:
    """Make each public method of a class that has a `loop` a hook of that loop.

    A hook raises nothing but `ConfigError`: what fails in it (another version of the framework, a model's own
    attributes) is a warning of the run. Its end is where the wait for the next batch begins.
    """
    for name, method in list(vars(cls).items()):
        if callable(method) and not name.startswith("_"):
            setattr(cls, name, _hook(name, method))
    return cls


def _hook(name: str, method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def hook(self: Any, *args: Any, **kwargs: Any) -> None:
        loop: Loop = self.loop
        try:
            method(self, *args, **kwargs)
        except ConfigError:
            raise
        except Exception as error:
            message = f"{type(self).__name__}.{name} failed: {error_text(error)}"
            loop.run._warn_once(name, message, key=type(error).__name__)
        finally:
            loop._last_hook_ns = time.perf_counter_ns()

    return hook


def samples_of(batch: Any) -> int | None:
    """How many samples a batch holds: the first dimension of the arrays in it.

    Args:
        batch: An array or tensor, or mappings, lists and tuples of them, up to three deep.

    Returns:
        The number; None unless all arrays have the same first dimension.

    """
    found = set(_first_dimensions(batch, 3))
    return found.pop() if len(found) == 1 else None


def _first_dimensions(batch: Any, depth: int) -> Iterator[int]:
    shape = getattr(batch, "shape", None)
    if shape is not None:
        if len(shape):
            yield int(shape[0])
    elif depth and isinstance(batch, (Mapping, list, tuple)):
        items = batch.values() if isinstance(batch, Mapping) else batch
        for item in islice(items, MAX_ITEMS):
            yield from _first_dimensions(item, depth - 1)


def known_total(steps: Any) -> int | None:
    """A total number of steps; None where the framework gives infinity, -1 and the like for an unknown one."""
    known = isinstance(steps, (int, float)) and math.isfinite(steps) and steps > 0
    return int(steps) if known else None
