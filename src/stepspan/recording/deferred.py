"""Values that are tensors: the numbers that some are, and those that a device still has to compute.

Imports neither torch nor JAX: a tensor is known by the module of its class.

- What lies in the CPU's memory (numpy, torch) or is ready (JAX) is a number at once.
- What a device still computes (torch on CUDA, XPU and others; a JAX array that is not ready) is copied asynchronously,
  and the training thread goes on. The call writes its line at once, with the values that are known and null for those
  that are not; another line, which names the call's (`call`, `at`), follows when the device has got there, written by
  one thread that asks the device now and then and never waits for it.
- A deferred value survives the process only from that second line on. Everything else of the call is as durable as
  ever.
- Values of a series keep the order of their calls: while one is deferred, later ones of its key wait behind it,
  whatever they are. So no point is ever older than one of its series that has been sent.
- At most `MAX_DEFERRED` calls and spans are deferred; what comes beyond, and what a closing run has waited
  `DRAIN_TIMEOUT_S` for in vain, is lost, counted and logged once.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stepspan.conversion import TEXTS, preview
from stepspan.events import Event
from stepspan.journal.writer import Emit
from stepspan.mapping.names import split_in_key
from stepspan.recording import device_copies
from stepspan.values import json_number, to_text

POLL_INTERVAL_S = 0.01
"""From asking the device to asking again. The values' times do not depend on it."""
DRAIN_TIMEOUT_S = 5.0
"""How long the end of a run waits for a device."""
MAX_DEFERRED = 1024
"""Calls and spans; a GPU is hardly ever that far behind, because its queue of launches is no longer."""
TOO_MANY = f"more than {MAX_DEFERRED} are pending"
LIBRARIES = {"torch": "torch", "jax": "jax", "jaxlib": "jax"}
"""The first name of a class's module, and the library that it belongs to."""
MAX_KNOWN_TYPES = 1000
VALUES_OF = ("split", "step", "own_step", "over", "steps")
"""What a line says of its values; the one that follows says it again."""
PAST_VALUES_OF = ("split", "time")
"""The same of values that have a time of their own: their steps are with the first line."""

LISTS = (list, tuple)
MAX_LISTS = 8
"""How often a list of one number may lie in a list of one."""
TEXT_ADVICE = "it is text: log the number itself, and format what is printed"

PENDING: Any = object()
"""In place of a number that a device still computes."""


class Drop(Protocol):
    """Takes a value that was dropped."""

    def __call__(self, kind: str, key: str, why: str, shown: str = "") -> None:
        """Take it, as `Recorder.drop_value` does."""


class AsyncCopy(Protocol):
    """Values of one call on their way from a device."""

    def ready(self) -> bool:
        """Whether they have arrived. Does not wait."""

    def numbers(self) -> list[Any]:
        """The values, in order. Raises whatever the device raises."""


class DeferredEvent(Protocol):
    """An event that can't be written yet."""

    series: Collection[Hashable]
    """The series of which nothing else may be written before it."""

    @property
    def keys(self) -> Collection[str]:
        """The metrics that it has values of."""

    @property
    def lost_keys(self) -> Collection[str]:
        """Those of them that `lost` goes without."""

    def ready(self) -> bool:
        """Whether it can be written. Does not wait."""

    def event(self) -> Event | None:
        """The event; None where nothing of it is left. Raises whatever the device raises."""

    def lost(self) -> Event | None:
        """What is written where `event` fails or never becomes ready."""


def library_of(value: Any) -> str | None:
    """The library of a value's class, of those whose values may lie on a device: "torch", "jax" or None."""
    kind = type(value)
    try:
        return _known_types[kind]
    except KeyError:
        if len(_known_types) > MAX_KNOWN_TYPES:  # a program that makes classes as it goes
            _known_types.clear()
        roots = (str(base.__module__).partition(".")[0] for base in kind.__mro__)
        found = _known_types[kind] = next((LIBRARIES[root] for root in roots if root in LIBRARIES), None)
        return found


_known_types: dict[type, str | None] = {}


def is_on_device(value: Any) -> bool:
    """Whether a device still has to compute a value, or to hand it over. Asks without waiting."""
    library = library_of(value)
    if library is None:
        return False
    if library == "torch":
        return bool(value.device.type != "cpu")
    return hasattr(value, "is_ready") and not value.is_ready()


def metric_value(value: Any) -> float | str:
    """The number of a metric as JSON can hold it.

    Args:
        value: A number, anything with `__float__`, an array or tensor of one element, or a list or tuple of one of
            these.

    Returns:
        The number; `PENDING` where a device still computes it.

    Raises:
        Exception: It is no single number; whatever a user's `__float__` or a device raises.

    """
    if type(value) in LISTS:
        value = _only_item(value)
    if isinstance(value, TEXTS):
        raise TypeError(TEXT_ADVICE)
    pending = is_on_device(value)
    if pending and any(size != 1 for size in value.shape):
        raise ValueError("not one element")
    if hasattr(value, "placements"):
        value = device_copies.local_tensor(value)
    if pending:
        return PENDING  # type: ignore[no-any-return] # for its caller's eyes alone
    item = getattr(value, "item", None)
    if callable(item):
        mask = getattr(value, "mask", None)
        if not callable(mask) and mask:  # numpy's; pandas has a method of that name
            raise ValueError("masked")
        value = item()
        if isinstance(value, TEXTS):
            raise TypeError(TEXT_ADVICE)
    return json_number(float(value))


def _only_item(value: Any) -> Any:
    """What lies alone in lists of one."""
    for _ in range(MAX_LISTS):
        if type(value) not in LISTS or len(value) != 1:
            break
        value = value[0]
    return value


def refusal(value: Any, error: Exception) -> tuple[str, str]:
    """Why a metric's value is not recorded, and the value, for a person."""
    reason = to_text(error)
    if reason.startswith("float() argument"):  # it goes on: "must be a string or a real number"
        reason = f"{type(value).__name__} holds no single number: log one number a key, and leave out what has none"
    return f"not a number: {reason}", summary(value)


def summary(value: Any) -> str:
    """A value in words, without waiting for a device to print it."""
    if library_of(value) is None:
        return preview(value)
    return f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"


def start_copies(values: Mapping[str, Any]) -> list[tuple[list[str], AsyncCopy]]:
    """Begin to copy values that lie on devices.

    Returns:
        For each copy the keys of the values that it brings, in its order.

    """
    copies: list[tuple[list[str], AsyncCopy]] = []
    tensors = {key: value for key, value in values.items() if library_of(value) == "torch"}
    if tensors:
        copies += device_copies.start_copies(tensors)
    arrays = {key: value for key, value in values.items() if key not in tensors}
    if arrays:
        copies.append((list(arrays), ArrayCopy(list(arrays.values()))))
    return copies


class ArrayCopy:
    """Copies of JAX arrays, which the device makes: it deletes an array that is donated to what comes next.

    One element lies whole on each device of its array, so one device's is copied: no other process takes part.
    """

    def __init__(self, arrays: list[Any]) -> None:
        self._arrays = [array.addressable_data(0).copy() for array in arrays]
        for array in self._arrays:
            array.copy_to_host_async()

    def ready(self) -> bool:
        """Whether all of them are computed."""
        return all(array.is_ready() for array in self._arrays)

    def numbers(self) -> list[Any]:
        """Their values, in order."""
        return [array.item() for array in self._arrays]


class WrittenAt:
    """Takes the number and time of a line as it is written; a signal handler's is written later."""

    seq = ts = 0


@dataclass(slots=True)
class DeferredCall:
    """The values of a `log_metrics` call that were not known yet."""

    fields: Event
    """What the call's event and the one that follows have in common."""
    line: WrittenAt
    """The line of the call."""
    known: Mapping[str, Any]
    """The values that are known, but wait behind others of their series."""
    copies: Sequence[tuple[list[str], AsyncCopy]]
    """The values that are on their way from devices."""
    series: Collection[Hashable]
    """The series of all these values, which nothing else may be written to before."""
    drop: Drop

    @property
    def keys(self) -> Collection[str]:
        """The keys of all values."""
        return [*self.known, *self.lost_keys]

    @property
    def lost_keys(self) -> Collection[str]:
        """The keys of the values that are on their way."""
        return [key for keys, _ in self.copies for key in keys]

    def ready(self) -> bool:
        """Whether all of them have arrived."""
        return all(copy.ready() for _, copy in self.copies)

    def event(self) -> Event | None:
        """The line that follows, with all that are numbers."""
        values = dict(self.known)
        for keys, copy in self.copies:
            for key, number in zip(keys, copy.numbers(), strict=True):
                try:
                    values[key] = metric_value(number)
                except Exception as error:
                    self.drop("value", key, *refusal(number, error))
        return self._follow(values)

    def lost(self) -> Event | None:
        """The line with the values that had been known."""
        return self._follow(dict(self.known))

    def _follow(self, values: Mapping[str, Any]) -> Event | None:
        if not values:
            return None
        event: Event = {"ts": 0, "seq": 0, "tag": "metrics", **self.fields}
        if "time" not in event:
            event |= {"call": self.line.seq, "at": self.line.ts}
        return {**event, "metrics": values}


class DeferredMetrics:
    """A background task of a run: writes deferred events as soon as they are ready, in the order in which they came.

    Args:
        emit: Writes the line of a call.
        emit_background: Writes the lines that follow.
        drop: Takes a kind, a key and a message of a value that was dropped.

    """

    def __init__(self, emit: Emit, emit_background: Callable[[Event], None], drop: Drop) -> None:
        self._emit = emit
        self._emit_background = emit_background
        self._drop = drop
        self._changed = threading.Condition()  # on a lock that a signal handler which logs may take again
        self.queue: deque[DeferredEvent] = deque()
        """What is pending."""
        self._series: Counter[Hashable] = Counter()
        self._ended = False
        self._thread: threading.Thread | None = None

    def write_metrics(self, event: Event, pending: Mapping[str, Any]) -> None:
        """Write a call's event now, and have the values that are missing follow.

        Args:
            event: Of the call; its values of `pending` are None.
            pending: The values that devices still compute.

        """
        with self._changed:
            values, split = event["metrics"], event["split"]
            series: dict[str, Hashable] = {key: (key, split_in_key(key)[0] or split) for key in values}
            behind = {key: value for key, value in values.items() if value is not None and series[key] in self._series}
            copies = self._start_copies(pending)
            values.update(dict.fromkeys(behind))
            written = WrittenAt()
            if not self._emit(event, written):
                return
            follows = [*behind, *(key for keys, _ in copies for key in keys)]
            if follows:
                kept = PAST_VALUES_OF if "time" in event else VALUES_OF
                fields: Event = {name: event[name] for name in kept if name in event}
                self.add(DeferredCall(fields, written, behind, copies, {series[key] for key in follows}, self._drop))

    def add(self, deferred: DeferredEvent) -> None:
        """Have an event follow when it is ready."""
        with self._changed:
            if self._ended or len(self.queue) >= MAX_DEFERRED:
                self._drop_lost(deferred.keys, "the run has ended" if self._ended else TOO_MANY)
                if not deferred.series:  # otherwise what is pending comes first
                    self._write(deferred.lost())
                return
            self.queue.append(deferred)
            self._series.update(deferred.series)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="stepspan-deferred", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is pending; False where `timeout` seconds did not suffice."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.queue, max(0.0, timeout))

    def stop(self) -> None:
        """Write what arrives within `DRAIN_TIMEOUT_S`, and end."""
        self.drain(DRAIN_TIMEOUT_S)
        with self._changed:
            self._ended = True
            while self.queue:
                deferred = self.queue.popleft()
                self._drop_lost(deferred.lost_keys, f"the device did not get there in {DRAIN_TIMEOUT_S:g} s")
                self._write(deferred.lost())
            self._changed.notify_all()

    def _start_copies(self, pending: Mapping[str, Any]) -> list[tuple[list[str], AsyncCopy]]:
        if pending and len(self.queue) >= MAX_DEFERRED:
            self._drop_lost(pending, TOO_MANY)
            return []
        try:
            return start_copies(pending) if pending else []
        except Exception as error:  # whatever a device raises
            for key, value in pending.items():
                self._drop("value", key, *refusal(value, error))
            return []

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.queue or self._ended)
                if self._ended:
                    return
                head = self.queue[0]
            try:
                if not head.ready():
                    time.sleep(POLL_INTERVAL_S)
                    continue
                event = head.event()
            except Exception as error:  # whatever a device raises
                event = head.lost()
                self._drop_lost(head.lost_keys, error)
            if not self._ended:
                self._write(event)
            with self._changed:
                if self.queue and self.queue[0] is head:
                    self.queue.popleft()
                    self._series -= Counter(head.series)
                    self._changed.notify_all()

    def _write(self, event: Event | None) -> None:
        if event is not None:
            self._emit_background(event)

    def _drop_lost(self, keys: Collection[str], why: object) -> None:
        for key in keys:
            self._drop("late", key, f"its value was lost on a device: {to_text(why)}")
