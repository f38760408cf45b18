"""How long a session's training steps took and what they waited for: the mapping's points, gathered for statistics."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import cast

from stepspan.events import Event
from stepspan.mapping.mapper import mapper
from stepspan.mapping.records import Point

SCOPE_TAGS = frozenset({"step_begin", "step_end", "span_begin", "span_end", "device_time"})
"""What the points of steps are made from. To map nothing else saves half of the time."""
TIMED_TAGS = frozenset({"step_end", "device_time"})
QUANTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


class StepTimes:
    """The training steps of one session; memory: at most 16 bytes a step.

    A receiver gets one point of a series in a millisecond, the last that one call of the mapper makes. Here each step
    is mapped by a call of its own, so that none is left out however fast they are.

    Args:
        header: The session's header.

    Raises:
        KeyError: The header lacks a field that the mapping needs.

    """

    def __init__(self, header: Event) -> None:
        self.times = array("d")
        """How long each step took, in seconds."""
        self.collective_waits = array("d")
        """How long each step with collectives waited in them, in seconds. Those that a device times come later."""
        self._mapper = mapper("metrics", header)
        self._values = {"training.step.time": self.times, "training.step.wait": self.collective_waits}

    def add(self, events: Sequence[Event]) -> None:
        """Take in the next events of the session, in order."""
        unmapped: list[Event] = []
        for event in events:
            if event["tag"] in SCOPE_TAGS:
                unmapped.append(event)
                if event["tag"] in TIMED_TAGS:
                    self._map(unmapped)
                    unmapped = []
        self._map(unmapped)

    def _map(self, events: Sequence[Event]) -> None:
        for series, _, value in cast("Sequence[Point]", self._mapper.map(events)):
            values = self._values.get(series.name)
            if values is not None and series.attributes["split"] == "train":
                values.append(cast("float", value))


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile (both by nearest rank) and maximum of some values; None without any."""
    if not values:
        return None
    ordered = sorted(values)
    return {name: ordered[max(0, math.ceil(q * len(ordered)) - 1)] for name, q in QUANTILES.items()}
