"""How long a session's steps take: a histogram for each split, the slowest step with a trace as its exemplar."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from stepspan.events import Event
from stepspan.mapping import ids
from stepspan.mapping.histogram import BOUNDS_S, HistogramState
from stepspan.mapping.open_scopes import StepState, step_trace_id
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Exemplar, Histogram
from stepspan.mapping.thinning import Thinning


class Durations:
    """Steps in, histograms out."""

    def __init__(self, header: Event, options: MappingOptions = DEFAULT_OPTIONS) -> None:
        self._options = None if options == DEFAULT_OPTIONS else options
        is_exponential = options.histogram_aggregation == DEFAULT_OPTIONS.histogram_aggregation
        self._bounds = () if is_exponential else BOUNDS_S
        self._thinning = Thinning(header)
        self._histograms: dict[str, HistogramState] = {}
        self._slowest: dict[str, tuple[float, int, Event]] = {}
        """Of each split since the last point: duration (s), end (Unix ns) and begin event of the slowest step of those
        whose traces go out."""

    def add(self, steps: Sequence[StepState]) -> None:
        """Add steps that have ended. Many at once cost less than each by itself.

        Args:
            steps: Each step of the session once, in the order in which they ended.

        """
        slowest = self._slowest
        durations: defaultdict[str, list[float]] = defaultdict(list)
        for step in steps:
            durations[step.begin["split"]].append(step.duration)
        for split, values in durations.items():
            if split not in self._histograms:
                self._histograms[split] = HistogramState(bounds=self._bounds)
            self._histograms[split].add(values)
        for step in self._thinning.filter(steps):
            split = step.begin["split"]
            if (split not in slowest or step.duration > slowest[split][0]) and self._has_trace(step):
                slowest[split] = step.duration, step.end["ts"], step.begin

    def _has_trace(self, step: StepState) -> bool:
        """Whether a step may be an exemplar: its trace goes out."""
        if self._options is None:
            return True
        trace_id = step_trace_id(self._thinning.header, step.begin)
        return self._options.exemplars and self._options.sampler.keeps(trace_id)

    def values(self, start: int) -> Iterator[tuple[str, Histogram]]:
        """The histograms so far. An exemplar goes out once, so the next call has those of the time since.

        Args:
            start: When the session began, Unix ns.

        Yields:
            Each split and its histogram.

        """
        for split, histogram in self._histograms.items():
            slowest = self._slowest.pop(split, None)
            yield split, histogram.value(start, () if slowest is None else (self._exemplar(*slowest),))

    def state(self) -> dict[str, Any]:
        """What is carried on, as JSON."""
        histograms = {split: asdict(histogram) for split, histogram in self._histograms.items()}
        return {"thinning": asdict(self._thinning), "histograms": histograms, "slowest": self._slowest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, of an equal journal."""
        self._thinning, self._slowest = Thinning(**state["thinning"]), state["slowest"]
        self._histograms = {split: HistogramState(**counted) for split, counted in state["histograms"].items()}

    def _exemplar(self, duration: float, ended: int, begin: Event) -> Exemplar:
        header = self._thinning.header
        trace_id = step_trace_id(header, begin)
        role = ids.unique_role(header["role"], header["session"], header["schema"])
        span_id = ids.step_span_id(trace_id, header["rank"], role)
        return Exemplar(ended, duration, trace_id, span_id)
