"""What is known only later: values that a GPU still computed when they were logged, and the time that it took.

A point of these carries the time of what it tells of, and comes behind others of that time. Each series' points are in
time order all the same, one in a millisecond: whoever writes the journal writes late values of a series in the order of
their calls, and no other value of that series in between. What would break this all the same is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepspan.events import Event
from stepspan.mapping.point_buffer import PointBuffer
from stepspan.mapping.records import Series
from stepspan.mapping.values import number

MILLISECOND = 1_000_000
MOST_SPANS = 10_000
MOST_STEPS = 1000
Own = Callable[[str, str], Series]


class Late:
    """Of one session that began at `started` (Unix ns). `own` gives one of our own series by its name and label."""

    def __init__(self, started: int, points: PointBuffer, own: Own) -> None:
        self._started = started
        self._points = points
        self._own = own
        self._last: dict[str, int] = {}
        """Series -> the millisecond after which its next late point must lie."""
        self._spans: dict[int, list[Any]] = {}
        """The `seq` of a span's begin -> its phase, when it ended (ns), and its step's `seq` if its time is a wait."""
        self.steps: dict[int, list[Any]] = {}
        """The `seq` of a step's begin -> split, when it ended (ns; 0: not yet), wait (s; None: lost), spans to come."""

    def expect(self, series: Sequence[Series], metrics: Mapping[str, Any], now: int) -> None:
        """A call's values, before their points are made: what is None follows."""
        for one, value in zip(series, metrics.values(), strict=False):
            if value is None:
                self._not_twice(one, now)

    def put(self, series: Series, at: int, value: Any, now: int) -> None:
        """One point of a time before `now`, the event's."""
        at = min(max(at, self._started), now)
        millisecond, name = at // MILLISECOND, _name(series)
        if millisecond <= self._last.get(name, 0):
            self._points.filtered += 1
            return
        self._last[name] = millisecond
        if millisecond == now // MILLISECOND:
            self._points.put(series, at, value)
        else:
            self._points.singles.append((series, at, value))

    def span_end(self, begin: Event, end: Event, phase: str, step: Event | None) -> None:
        """A span has ended whose time the device will tell; `step`: the one whose wait it is part of."""
        self._spans[begin["seq"]] = [phase, end["ts"], 0 if step is None else step["seq"]]
        _bound(self._spans, MOST_SPANS)
        if step is not None:
            entry = self.steps.setdefault(step["seq"], [step["split"], 0, 0.0, 0])
            entry[3] += 1

    def step_end(self, begin: Event, ended: int) -> bool:
        """Whether a step's wait comes later: with the device's part of it, and after those of the steps before."""
        entry = self.steps.get(begin["seq"])
        if entry is None:
            if not self.steps or "wait" not in begin:
                return False
            entry = self.steps[begin["seq"]] = [begin["split"], 0, 0.0, 0]
        entry[1] = ended
        self._not_twice(self._own("training.step.wait", begin["split"]), ended)
        if entry[2] is not None:
            entry[2] += begin.get("wait", 0.0)
        _bound(self.steps, MOST_STEPS)
        self._warn(ended)
        return True

    def device_time(self, event: Event) -> None:
        """How long a span took on the device."""
        phase, ended, step = self._spans.pop(event["begin"], (None, 0, 0))
        if phase is None:
            return
        seconds = number(event["seconds"])
        if seconds is not None:
            self.put(self._own("training.phase.device_time", phase), ended, seconds, event["ts"])
        entry = self.steps.get(step)
        if entry is not None:
            entry[2] = None if seconds is None or entry[2] is None else entry[2] + seconds
            entry[3] -= 1
            self._warn(event["ts"])

    def _not_twice(self, series: Series, now: int) -> None:
        """A series that has a point of this millisecond gets none that is late."""
        if self._points.holds(series):
            self._last[_name(series)] = now // MILLISECOND

    def _warn(self, now: int) -> None:
        while self.steps:
            step = next(iter(self.steps))
            split, ended, wait, missing = self.steps[step]
            if not ended or missing > 0:
                return
            del self.steps[step]
            if wait is not None:
                self.put(self._own("training.step.wait", split), ended, wait, now)

    @property
    def state(self) -> list[Any]:
        """What is carried on, as JSON."""
        return [self._last, list(self._spans.items()), list(self.steps.items())]

    @state.setter
    def state(self, state: list[Any]) -> None:
        last, spans, steps = state
        self._last, self._spans, self.steps = last, dict(spans), dict(steps)


def _bound(entries: dict[int, list[Any]], most: int) -> None:
    """What was never told makes room."""
    while len(entries) > most:
        del entries[next(iter(entries))]


def _name(series: Series) -> str:
    return repr((series.name, sorted(series.attributes.items(), key=str)))
