"""How long a session's steps take: a histogram for each split, the slowest step with a trace as its exemplar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepspan.events import Event
from stepspan.mapping import histogram, ids
from stepspan.mapping.open_scopes import step_trace_id
from stepspan.mapping.records import Exemplar, Histogram
from stepspan.mapping.thinning import Step, Thinning

TOGETHER = 4096


class Durations:
    """Steps in, histograms out."""

    def __init__(self, header: Event) -> None:
        self._header = header
        self._thinning = Thinning(header)
        self._histograms: dict[str, dict[str, Any]] = {}
        self._ended: list[Step] = []
        """Steps that are not counted yet: that is done for many at once."""
        self._slowest: dict[str, list[Any]] = {}
        """Split -> duration (s), end (ns) and begin event."""

    def add(self, begin: Event, end: Event, duration: float) -> None:
        """A step of `duration` seconds has ended. Call it once for each step, in order."""
        self._ended.append((begin, end, duration))
        if len(self._ended) == TOGETHER:
            self._count()

    def values(self, start: int) -> Iterator[tuple[str, Histogram]]:
        """Each split and its histogram since `start` (Unix ns). An exemplar goes out once."""
        self._count()
        for split, counted in self._histograms.items():
            slowest = self._slowest.pop(split, None)
            exemplars = () if slowest is None else (self._exemplar(*slowest),)
            yield split, histogram.value(counted, start, exemplars)

    @property
    def state(self) -> dict[str, Any]:
        """What is carried on, as JSON."""
        self._count()
        return {"histograms": self._histograms, "slowest": self._slowest, "thinning": self._thinning.state}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._histograms, self._slowest = state["histograms"], state["slowest"]
        self._thinning.state = state["thinning"]

    def _count(self) -> None:
        durations: dict[str, list[float]] = {}
        for begin, _, duration in self._ended:
            durations.setdefault(begin["split"], []).append(duration)
        for split, found in durations.items():
            if split not in self._histograms:
                self._histograms[split] = histogram.empty()
            histogram.add(self._histograms[split], found)
        for begin, end, duration in self._thinning.kept(self._ended):
            slowest = self._slowest.get(begin["split"])
            if slowest is None or duration > slowest[0]:
                self._slowest[begin["split"]] = [duration, end["ts"], begin]
        self._ended = []

    def _exemplar(self, duration: float, ended: int, begin: Event) -> Exemplar:
        trace_id = step_trace_id(self._header, begin)
        return Exemplar(
            ended, duration, trace_id, ids.step_span_id(trace_id, self._header["rank"], self._header["role"])
        )
