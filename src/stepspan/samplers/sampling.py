"""One thread a run reads its sources every interval, and writes what it read as `sample` events.

The first sample is written as soon as the sources are open, the second half a second later (a rate needs two), the
last as the run ends. All imports, drivers and files are opened on the thread: `start_run` waits for none of them.

Quantities are read one by one: what fails is counted and told once, the others go on. What a machine does not have
(a GPU, a counter that a driver does not keep) is counted too, told at INFO and not asked for again.

A forked child has no such thread. NVML is initialised in this process and used by this thread alone; a child that wants
NVML initialises its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, TypeAlias

from stepspan.events import Event
from stepspan.journal.writer import asleep
from stepspan.values import json_number

if TYPE_CHECKING:
    from stepspan.run import Run

Value: TypeAlias = "tuple[str, float] | tuple[str, float, Mapping[str, str | int]]"
"""A metric's name, its value and its attributes: `stepspan.mapping.samples` holds units and kinds."""
Quantity: TypeAlias = Callable[[float], Iterable[Value]]
"""The values at a time of the sampler's clock (s)."""
Emit: TypeAlias = Callable[[Event], None]

FIRST_SAMPLE = 0.02
"""Seconds after the start: `start_run` has returned before the thread wants the interpreter for its imports."""
SECOND_SAMPLE = 0.5
"""Seconds after the first."""
FRESH = 1.0
"""A sample of the last so many seconds is the last one."""
PATIENCE = 1.0
"""Seconds that the end of a run waits for a source that does not answer."""

SOURCES: Mapping[str, str] = {
    "host": "stepspan.samplers.host:host",
    "process": "stepspan.samplers.host:process",
    "gpu": "stepspan.samplers.gpu:gpu",
    "torch": "stepspan.samplers.torch:torch",
}
"""Name in the settings -> who opens it, given the local rank and how to emit an event."""


class Absent(Exception):
    """There is no such thing here, and nothing is wrong with that."""


class Gone(Exception):
    """The source has gone and does not come back."""


ABSENT = (Absent, FileNotFoundError, NotImplementedError)
"""The latter two: what psutil raises where the kernel does not tell."""


@dataclass
class Source:
    """What is read together: its quantities by name, and how it is let go."""

    name: str
    quantities: dict[str, Quantity]
    close: Callable[[], None] = lambda: None
    about: str = ""
    """Which one it is, in words."""


Opener: TypeAlias = Callable[[Emit], Source]


class Sampling:
    """A companion of a run. `sample()` reads and writes at once; `start()` has a thread do so until `stop()`."""

    def __init__(
        self,
        run: Run,
        openers: Mapping[str, Opener],
        interval: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._run = run
        self._openers = dict(openers)
        self._interval = interval
        self._clock = clock
        self._done = threading.Event()
        self._wait = wait or self._done.wait
        self._sources: list[Source] = []
        self._open = ExitStack()
        self._last: float | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._work, name="stepspan-samplers", daemon=True)

    def start(self) -> None:
        """Sample until told to stop."""
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end; what hangs in a driver is left behind."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)
        self._abandoned = True

    def sample(self) -> None:
        """Read all sources once, and write what they say. Opens those that are not open yet."""
        for name in list(self._openers):
            self._open_source(name, self._openers.pop(name))
        for source in list(self._sources):
            values = self._read(source)
            if values:
                self._emit({"ts": 0, "seq": 0, "tag": "sample", "source": source.name, "values": values})
        self._last = self._clock()

    def close(self) -> None:
        """Let the sources go."""
        self._sources.clear()
        try:
            self._open.close()
        except Exception as error:  # a driver may fail to the last
            self._warn("close", error)

    def _work(self) -> None:
        with asleep():
            self._sample_on()

    def _sample_on(self) -> None:
        try:
            for delay in chain((FIRST_SAMPLE, min(SECOND_SAMPLE, self._interval)), repeat(self._interval)):
                if self._wait(delay):
                    break
                self.sample()
            if self._last is None or self._clock() - self._last > FRESH:
                self.sample()
        except Exception as error:  # nothing that is sampled is worth a traceback in a training's output
            self._warn("thread", error)
        finally:
            self.close()

    def _open_source(self, name: str, opener: Opener) -> None:
        try:
            source = opener(self._emit)
        except (*ABSENT, ImportError) as why:
            self._warn(name, why, logging.INFO)
        except Exception as error:  # a driver may raise anything
            self._warn(name, error)
        else:
            self._open.callback(source.close)
            self._sources.append(source)

    def _read(self, source: Source) -> list[list[Any]]:
        values: list[list[Any]] = []
        for quantity, read in list(source.quantities.items()):
            kind = f"{source.name}.{quantity}"
            try:
                values += ([name, json_number(float(value)), *more] for name, value, *more in read(self._clock()))
            except ABSENT as why:
                del source.quantities[quantity]
                self._warn(kind, why, logging.INFO)
            except Gone as why:
                self._sources.remove(source)
                self._warn(source.name, why)
                break
            except Exception as error:  # as above
                self._warn(kind, error)
        return values

    def _emit(self, event: Event) -> None:
        if not self._abandoned:
            self._run.emit_background(event)

    def _warn(self, what: str, why: Exception, level: int = logging.WARNING) -> None:
        reason = str(why) if isinstance(why, (Absent, Gone)) else repr(why)
        self._run.warn_once(f"samplers.{what}", f"{what} is not sampled: {reason}", level)


def sampled_by(names: Sequence[str], local_rank: int) -> list[str]:
    """Those of the named samplers that a rank runs: one rank a host samples the host."""
    return [name for name in SOURCES if name in names and (name != "host" or local_rank == 0)]


def start_sampling(run: Run, names: Sequence[str], interval: float) -> None:
    """Sample beside a run until it ends."""
    local_rank = run.identity.local_rank

    def opener(name: str) -> Opener:
        def open_source(emit: Emit) -> Source:
            module, _, function = SOURCES[name].partition(":")
            source: Source = getattr(import_module(module), function)(local_rank, emit)
            return source

        return open_source

    chosen = sampled_by(names, local_rank)
    sampling = Sampling(run, {name: opener(name) for name in chosen}, interval)
    try:
        sampling.start()
    except RuntimeError as error:  # no thread is to be had
        run.warn_once("samplers", f"nothing is sampled: {error}")
    else:
        run.background_tasks.append(sampling)


class Share:
    """What part of a whole was used between two readings; nothing at the first one."""

    def __init__(self) -> None:
        self._before: tuple[object, float, float] | None = None

    def __call__(self, of: object, used: float, whole: float) -> list[float]:
        """`used` and `whole` have grown since the start of time; readings of another whole (`of`) do not compare."""
        before, self._before = self._before, (of, used, whole)
        if before is None or before[0] != of or whole <= before[2]:
            return []
        return [min(1.0, max(0.0, (used - before[1]) / (whole - before[2])))]


class Growth:
    """The sum of what counters have grown since they were first read. One that falls was reset, or wrapped."""

    def __init__(self) -> None:
        self._before: dict[object, float] = {}
        self._sums: dict[object, float] = {}

    def __call__(self, key: object, count: float, *, of: object = None) -> float:
        """The sum of the counters `of` under `key`."""
        grown = count - self._before.get((key, of), count)
        self._before[key, of] = count
        self._sums[key] = self._sums.get(key, 0.0) + max(0.0, grown)
        return self._sums[key]
