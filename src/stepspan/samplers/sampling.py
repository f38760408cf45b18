"""The thread that reads a run's samplers and writes what they observe, one `sample` event for each sampler.

When, in seconds:

    0.02               after `start()`: the first sample. `start_run` has returned before this thread imports anything.
    + 0.5              the second one, because a utilization needs two readings
    + interval, …      `Settings.sample_interval`, 10 by default
    at `stop()`        the last one, unless one was taken within the last second

Samplers are opened on the thread, with the first sample: `start_run` waits for no import, driver or file.

Each quantity is read by itself. One that fails is counted, warned of once and read again next time, and the others go
on. What a machine does not have (a GPU, a counter that its driver lacks) is counted too, logged at INFO and not read
again.

Of several runs in a process the oldest has its samplers; when it ends, the next one goes on with them.

A forked child has no such thread. NVML is initialised in this process and used by this thread alone; a child that wants
NVML initialises its own.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain, repeat
from typing import Any, TypeAlias

from stepspan.events import Event
from stepspan.journal.writer import mostly_idle
from stepspan.recording.recorder import Recorder
from stepspan.values import error_text, json_number

Observation: TypeAlias = "tuple[str, float] | tuple[str, float, Mapping[str, str | int]]"
"""A metric's name, its value and its attributes: `stepspan.mapping.samples` has the units and kinds."""
Quantity: TypeAlias = Callable[[float], Iterable[Observation]]
"""Reads the observations at a time of the thread's clock (s)."""
Emit: TypeAlias = Callable[[Event], None]

FIRST_SAMPLE_S = 0.02
"""From the start of sampling to the first sample."""
SECOND_SAMPLE_S = 0.5
"""From the first sample to the second."""
FRESH_S = 1.0
"""At the end of a run no sample is taken if one is no older than this."""
STOP_TIMEOUT_S = 1.0
"""How long the end of a run waits for a driver that does not answer."""

SAMPLERS: Mapping[str, str] = {
    "host": "stepspan.samplers.host",
    "process": "stepspan.samplers.host",
    "gpu": "stepspan.samplers.gpu",
    "torch": "stepspan.samplers.torch",
}
"""Name in the settings -> the module whose function of that name opens it, given a local rank and an `Emit`."""


class Absent(Exception):
    """What a sampler would read does not exist on this machine, and nothing is wrong with that."""


class Gone(Exception):
    """What a sampler reads was there and does not come back, such as a GPU that fell off the bus."""


ABSENT = (Absent, FileNotFoundError, NotImplementedError)
"""The latter two are what psutil raises where the kernel keeps no such file."""


@dataclass
class Sampler:
    """Quantities that are read together, of one host, process or device.

    Args:
        name: Its name in the settings and in the `source` field of its `sample` events.
        quantities: Name of each quantity, as warnings call it, and what reads it.
        close: Called once, after the last sample.
        description: Which device it is, for people: `stepspan doctor` prints it.

    """

    name: str
    quantities: dict[str, Quantity]
    close: Callable[[], None] = lambda: None
    description: str = ""


Opener: TypeAlias = Callable[[Emit], Sampler]
"""Opens a sampler; raises `Absent` where there is nothing to sample."""


class Sampling:
    """A background task that samples a run. `sample()` samples once; `start()` does so on a thread until `stop()`.

    Args:
        recorder: Takes the `sample` events as background events: they are no sign that training goes on.
        openers: Name of each sampler and what opens it.
        interval: Seconds from sample to sample.
        clock: Seconds, for utilizations.
        wait: Waits for so many seconds; True ends the sampling. By default it ends at `stop()`.

    """

    def __init__(
        self,
        recorder: Recorder,
        openers: Mapping[str, Opener],
        interval: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._recorder = recorder
        self._openers = dict(openers)
        self._interval = interval
        self._clock = clock
        self._stopping = threading.Event()
        self._wait = wait or self._stopping.wait
        self._samplers: list[Sampler] = []
        self._resources = ExitStack()
        self._last_sample: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="stepspan-samplers", daemon=True)

    def start(self) -> None:
        """Sample on a thread until `stop()`.

        Raises:
            RuntimeError: The system allows no further thread.

        """
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end. A thread that hangs in a driver is left behind, and records nothing any more."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        self._stopped = True

    def sample(self) -> None:
        """Read every sampler once and write what it observed. Opens those that are not open yet."""
        for name in list(self._openers):
            self._open(name, self._openers.pop(name))
        for sampler in list(self._samplers):
            values = self._read(sampler)
            if values:
                self._emit({"ts": 0, "seq": 0, "tag": "sample", "source": sampler.name, "values": values})
        self._last_sample = self._clock()

    def close(self) -> None:
        """Close the samplers; nothing is read afterwards."""
        self._samplers.clear()
        try:
            self._resources.close()
        except Exception as error:  # a driver may fail to the last
            self._warn("close", error)

    def _work(self) -> None:
        with mostly_idle():
            try:
                for delay in chain((FIRST_SAMPLE_S, min(SECOND_SAMPLE_S, self._interval)), repeat(self._interval)):
                    if self._wait(delay):
                        break
                    self.sample()
                if self._last_sample is None or self._clock() - self._last_sample > FRESH_S:
                    self.sample()
            except Exception as error:  # no sample is worth a traceback in a training's output
                self._warn("thread", error)
            finally:
                self.close()

    def _open(self, name: str, opener: Opener) -> None:
        try:
            sampler = opener(self._emit)
        except Exception as error:  # a driver may raise anything
            self._warn(name, error)
        else:
            self._resources.callback(sampler.close)
            self._samplers.append(sampler)

    def _read(self, sampler: Sampler) -> list[list[Any]]:
        values: list[list[Any]] = []
        for quantity, read in list(sampler.quantities.items()):
            kind = f"{sampler.name}.{quantity}"
            try:
                values += ([name, json_number(float(value)), *more] for name, value, *more in read(self._clock()))
            except ABSENT as error:
                del sampler.quantities[quantity]
                self._warn(kind, error)
            except Gone as error:
                self._samplers.remove(sampler)
                self._warn(sampler.name, error)
                break
            except Exception as error:  # a driver, again
                self._warn(kind, error)
        return values

    def _emit(self, event: Event) -> None:
        if not self._stopped:
            self._recorder.emit_background(event)

    def _warn(self, name: str, error: Exception) -> None:
        level = logging.INFO if isinstance(error, (*ABSENT, ImportError)) else logging.WARNING
        reason = str(error) if isinstance(error, (Absent, Gone)) else error_text(error)
        self._recorder.warn_once(
            f"samplers.{name}", f"{name} is not sampled: {reason}", level, key=type(error).__name__
        )


def sampled_by(names: Sequence[str], local_rank: int) -> list[str]:
    """Choose the samplers that a rank runs.

    Args:
        names: The wanted ones.
        local_rank: Only rank 0 of a host samples the host.

    Returns:
        Keys of `SAMPLERS`, in their order.

    """
    return [name for name in SAMPLERS if name in names and (name != "host" or local_rank == 0)]


def start_sampling(recorder: Recorder, names: Sequence[str], interval: float) -> None:
    """Sample for a run until it ends, whatever no other run of this process has sampled already.

    Args:
        recorder: Takes the samples, and a warning where no thread can be started.
        names: The wanted samplers, keys of `SAMPLERS`.
        interval: Seconds between two samples.

    """
    wanted = sampled_by(names, recorder.identity.local_rank)
    if wanted:
        _SHARED.join(SamplingShare(recorder, wanted, interval))


class SamplingShare:
    """A background task: what a run has of the sampling of its process."""

    def __init__(self, recorder: Recorder, wanted: Sequence[str], interval: float) -> None:
        self.recorder = recorder
        self.wanted = wanted
        self._interval = interval
        self._names: list[str] = []
        self._sampling: Sampling | None = None

    def assign(self, names: list[str]) -> Callable[[], None] | None:
        """Give a run its samplers.

        Args:
            names: Of the samplers.

        Returns:
            Starts them, once those that other runs had have stopped; None where nothing changes.

        """
        if names == self._names:
            return None
        self._names = names
        if self._sampling is not None:
            self._sampling.stop()
        self._sampling = None
        return self._start

    def stop(self) -> None:
        """Take a last sample, and leave the samplers to the process's other runs."""
        _SHARED.leave(self)

    def _start(self) -> None:
        if not self._names:
            return
        local_rank = self.recorder.identity.local_rank
        openers = {name: partial(_open_by_name, name, local_rank) for name in self._names}
        sampling = Sampling(self.recorder, openers, self._interval)
        try:
            sampling.start()
        except RuntimeError as error:
            self.recorder.warn_once("samplers", f"nothing is sampled: {error}")
        else:
            self._sampling = sampling


class SharedSampling:
    """Each sampler is read once a process: for the oldest of the open runs that want it, substitutes last."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._shares: list[SamplingShare] = []

    def join(self, share: SamplingShare) -> None:
        """Sample for one more run."""
        share.recorder.add_background_task(share)
        with self._lock:
            self._shares.append(share)
            self._assign()

    def leave(self, share: SamplingShare) -> None:
        """Sample no more for a run, but for the others."""
        with self._lock:
            if share in self._shares:
                self._shares.remove(share)
                share.assign([])
                if threading.main_thread().is_alive():  # otherwise the interpreter exits, and all of them end
                    self._assign()

    def _assign(self) -> None:
        names = list(SAMPLERS)
        starts = []
        for share in sorted(self._shares, key=lambda share: share.recorder.is_substitute):
            own = [name for name in names if name in share.wanted]
            names = [name for name in names if name not in own]
            starts.append(share.assign(own))
        for start in filter(None, starts):
            start()


_SHARED = SharedSampling()


def _after_fork_in_child() -> None:
    global _SHARED
    _SHARED = SharedSampling()  # the other one is the parent's, and so are its threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _open_by_name(name: str, local_rank: int, emit: Emit) -> Sampler:
    sampler: Sampler = getattr(import_module(SAMPLERS[name]), name)(local_rank, emit)
    return sampler


class Utilization:
    """The part of something that was used between two readings, from 0 to 1."""

    def __init__(self) -> None:
        self._before: tuple[object, float, float] | None = None

    def __call__(self, of: object, used: float, available: float) -> list[float]:
        """Take a reading.

        Args:
            of: What the readings are of. Readings of different things are not compared.
            used: How much has been used so far, ever growing.
            available: How much could have been used so far, in the same unit.

        Returns:
            The utilization since the last reading; none at the first one, and where nothing became available since.

        """
        before, self._before = self._before, (of, used, available)
        if before is None or before[0] != of or available <= before[2]:
            return []
        return [min(1.0, max(0.0, (used - before[1]) / (available - before[2])))]


class CumulativeSum:
    """How much counters have increased since they were first read. One that falls was reset, or wrapped around."""

    def __init__(self) -> None:
        self._before: dict[object, float] = {}
        self._sums: dict[object, float] = {}

    def __call__(self, key: object, count: float, *, of: object = None) -> float:
        """Take a reading of one counter.

        Args:
            key: What is summed up.
            count: The counter's reading.
            of: Which of several counters under `key` it is, such as a disk's name.

        Returns:
            The sum of the increases of all counters under `key`.

        """
        increase = count - self._before.get((key, of), count)
        self._before[key, of] = count
        self._sums[key] = self._sums.get(key, 0.0) + max(0.0, increase)
        return self._sums[key]
