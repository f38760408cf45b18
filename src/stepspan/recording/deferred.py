"""Values that are tensors: the numbers that some are, and those that a device still has to compute.

Imports neither torch nor JAX: a tensor is known by the module of its class.

- What lies in the CPU's memory (numpy, torch) or is ready (JAX) is a number at once.
- What a device still computes (torch on CUDA, XPU and others; a JAX array that is not ready) is copied asynchronously,
  and the training thread goes on. The call writes its line at once, with the values that are known and null for those
  that are not; another line with the call's time (`at`) follows when the device has got there, written by one thread
  that asks the device now and then and never waits for it.
- A value on its way survives the process only from that second line on. Everything else of the call is as durable as
  ever.
- Values of a series keep the order of their calls: while one is on its way, later ones of its key wait behind it,
  whatever they are. So no point is ever older than one of its series that has been sent.
- At most `MOST_LATE` are on their way; what comes beyond, and what a closing run has waited `DRAIN` seconds for in
  vain, is lost, counted and told once.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from stepspan.events import Event
from stepspan.values import json_number, json_value

if TYPE_CHECKING:
    from stepspan.run import Run

POLL = 0.01
"""Seconds from asking the device to asking again. The values' times do not depend on it."""
DRAIN = 5.0
"""Seconds that the end of a run waits for a device."""
MOST_LATE = 1024
"""Calls and spans; a GPU is hardly ever that far behind, because its queue of launches is no longer."""
TOO_MANY = f"more than {MOST_LATE} are on their way"
LIBRARIES = {"torch": "torch", "jax": "jax", "jaxlib": "jax"}
"""The first name of a class's module -> whose it is."""
MOST_KINDS = 1000


LATER: Any = object()
"""In place of a number that a device will tell."""


class Copying(Protocol):
    """Values of one call on their way from a device."""

    def ready(self) -> bool:
        """Whether they are here. Does not wait."""
        ...

    def numbers(self) -> list[Any]:
        """They, in order. Whatever the device raises."""
        ...


class Late(Protocol):
    """An event that can't be written yet."""

    series: Collection[Hashable]
    """What must not be written before it by others."""

    def ready(self) -> bool:
        """Whether it can be written. Does not wait."""
        ...

    def event(self) -> Event | None:
        """It; None where nothing of it is left. Whatever the device raises."""
        ...

    def lost(self) -> Event | None:
        """What is written where `event` is not to be had."""
        ...


def library(value: Any) -> str | None:
    """Whose class a value has, of those whose values may lie on a device."""
    kind = type(value)
    try:
        return _known[kind]
    except KeyError:
        if len(_known) > MOST_KINDS:  # somebody makes classes as he goes
            _known.clear()
        roots = (str(base.__module__).partition(".")[0] for base in kind.__mro__)
        found = _known[kind] = next((LIBRARIES[root] for root in roots if root in LIBRARIES), None)
        return found


_known: dict[type, str | None] = {}


def on_device(value: Any) -> bool:
    """Whether a device still has to compute a value, or to hand it over. Asks without waiting."""
    origin = library(value)
    if origin is None:
        return False
    if origin == "torch":
        return bool(value.device.type != "cpu")
    return hasattr(value, "is_ready") and not value.is_ready()


def number_of(key: Any, value: Any, warn: Callable[[str, str], None]) -> float | str | None:
    """The number in a number, or in an array or tensor of one element, as JSON can hold it; `LATER` of a device's.

    None for what is no one number: `tell` says so.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("text")
        late = on_device(value)
        if late and any(size != 1 for size in value.shape):
            raise ValueError("not one element")
        if hasattr(value, "placements"):
            value = whole(value)
        if late:
            return LATER  # type: ignore[no-any-return] # for its caller's eyes alone
        item = getattr(value, "item", None)
        if callable(item):
            mask = getattr(value, "mask", None)
            if not callable(mask) and mask:  # numpy's; pandas has a method of that name
                raise ValueError("masked")
            value = item()
        return json_number(float(value))
    except Exception as error:  # a user's __float__ may raise anything, and so may a device
        warn("value", f"metric {json_value(key)!s:.80}={about(value)}: not a number: {json_value(error)!s:.200}")
        return None


def whole(value: Any) -> Any:
    """A torch DTensor's tensor, where each rank has the whole of it: to gather it would be a collective. ValueError."""
    if all(placement.is_replicate() for placement in value.placements):
        return value.to_local()
    raise ValueError("a DTensor in parts: log its full_tensor(), which all ranks must call")


def about(value: Any) -> str:
    """A value in words, such that nobody waits for a device to say it."""
    if library(value) is None:
        return f"{json_value(value)!s:.80}"
    return f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"


def copying(values: Mapping[str, Any]) -> list[tuple[list[str], Copying]]:
    """Begin to copy values that lie on devices: which keys come together."""
    found: list[tuple[list[str], Copying]] = []
    ours = {key: value for key, value in values.items() if library(value) == "torch"}
    if ours:
        found += import_module("stepspan.integrations.torch.values").copying(ours)
    theirs = {key: value for key, value in values.items() if key not in ours}
    if theirs:
        found.append((list(theirs), Arrays(list(theirs.values()))))
    return found


class Arrays:
    """Copies of JAX arrays, which the device makes: it deletes an array that is donated to what comes next.

    One element lies whole on each device of its array, so one device's is copied: no other process takes part.
    """

    def __init__(self, arrays: list[Any]) -> None:
        self._arrays = [array.addressable_data(0).copy() for array in arrays]
        for array in self._arrays:
            array.copy_to_host_async()

    def ready(self) -> bool:
        """Whether they are computed."""
        return all(array.is_ready() for array in self._arrays)

    def numbers(self) -> list[Any]:
        """They."""
        return [array.item() for array in self._arrays]


class LateMetrics:
    """A call's values that were not known yet. `event`: the call's, less them, with its time as `at`."""

    def __init__(
        self,
        event: Event,
        known: Mapping[str, Any],
        copies: Iterable[tuple[list[str], Copying]],
        series: Collection[Hashable],
        warn: Callable[[str, str], None],
    ) -> None:
        self.series: Collection[Hashable] = series
        self._warn = warn
        self._event = event
        self._known = known
        self._copies = list(copies)

    def ready(self) -> bool:
        """Whether all of them have arrived."""
        return all(copy.ready() for _, copy in self._copies)

    def event(self) -> Event | None:
        """The line that follows, with all that are numbers."""
        values = dict(self._known)
        for keys, copy in self._copies:
            for key, number in zip(keys, copy.numbers(), strict=True):
                if (found := number_of(key, number, self._warn)) is not None:
                    values[key] = found
        return {**self._event, "metrics": values} if values else None

    def lost(self) -> Event | None:
        """The line with what had been known."""
        return {**self._event, "metrics": dict(self._known)} if self._known else None


def resolver_of(run: Run) -> Resolver:
    """The run's own, made when it is first needed."""
    if run._late is None:
        run._late = Resolver(run)
        run.background_tasks.append(run._late)
    return run._late


class Stamp:
    """Takes the place and time of a line as it is written."""

    seq = ts = 0


class Resolver:
    """A companion of a run: writes what is late as soon as it is known, in the order in which it came."""

    def __init__(self, run: Run) -> None:
        from stepspan.mapping.names import metric_name  # which loads all of the mapping

        self._run = run
        self._name = metric_name
        self._changed = threading.Condition()  # on a lock that a signal handler which logs may take again
        self._queue: deque[Late] = deque()
        self._series: Counter[Hashable] = Counter()
        self._ended = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._queue)

    def metrics(self, event: Event, late: Mapping[str, Any]) -> None:
        """Write a call's event, in whose `metrics` those of `late` are None, and have them follow."""
        with self._changed:
            values, split = event["metrics"], event["split"]
            names: dict[str, Hashable] = {key: self._name(key, split) for key in values}
            behind = {key: value for key, value in values.items() if value is not None and names[key] in self._series}
            copies = self._copies(late)
            values.update(dict.fromkeys(behind))
            stamp = Stamp()
            if not self._run.pipeline.emit(event, stamp):
                return
            at = stamp.ts or self._run.pipeline.journal.clock()  # 0: it is a signal handler's, and not written yet
            follows = [*behind, *(key for keys, _ in copies for key in keys)]
            if follows:
                fields: Event = {name: event[name] for name in ("split", "step") if name in event}
                event = {"ts": 0, "seq": 0, "tag": "metrics", **fields, "at": at}
                self.add(LateMetrics(event, behind, copies, {names[key] for key in follows}, self._run.warn_once))

    def add(self, late: Late) -> None:
        """Have an event follow."""
        with self._changed:
            if self._ended or len(self._queue) >= MOST_LATE:
                self._warn("the run has ended" if self._ended else TOO_MANY)
                if not late.series:  # otherwise what is on its way comes before
                    self._write(late.lost())
                return
            self._queue.append(late)
            self._series.update(late.series)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="stepspan-late", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is on its way; False where `timeout` seconds did not suffice."""
        deadline = time.monotonic() + timeout
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Write what arrives in `DRAIN` seconds, and end."""
        self.drain(DRAIN)
        with self._changed:
            self._ended = True
            while self._queue:
                self._warn(f"the device did not get there in {DRAIN:g} s")
                self._write(self._queue.popleft().lost())
            self._changed.notify_all()

    def _copies(self, late: Mapping[str, Any]) -> list[tuple[list[str], Copying]]:
        if late and len(self._queue) >= MOST_LATE:
            self._warn(TOO_MANY)
            return []
        try:
            return copying(late) if late else []
        except Exception as error:  # whatever a device raises
            self._run.warn_once("value", f"{', '.join(late):.80}: {error!s:.200}")
            return []

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ended)
                if self._ended:
                    return
                head = self._queue[0]
            try:
                if not head.ready():
                    time.sleep(POLL)
                    continue
                event = head.event()
            except Exception as error:  # as above
                event = head.lost()
                self._warn(error)
            if not self._ended:
                self._write(event)
            with self._changed:
                if self._queue and self._queue[0] is head:
                    self._queue.popleft()
                    self._series -= Counter(head.series)
                    self._changed.notify_all()

    def _write(self, event: Event | None) -> None:
        if event is not None:
            self._run.emit_background(event)

    def _warn(self, why: object) -> None:
        self._run.warn_once("late", f"a value of a device was lost: {why!s:.200}")
