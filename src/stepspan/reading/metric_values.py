"""What was logged of each metric: its last value and its extremes, as users wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from stepspan.events import Event
from stepspan.mapping.names import SPLITS
from stepspan.values import to_float


@dataclass(slots=True)
class MetricValues:
    """One metric of one rank, or of all ranks after `merge`."""

    rank: int
    """The rank that `last` is of."""
    points: int = 0
    nonfinite: int = 0
    """Points that are NaN or infinite; they are in no extreme."""
    min: float | None = None
    max: float | None = None
    last: float = math.nan
    last_step: int | None = None
    last_ts: int = 0
    """Unix ns."""
    min_step: int | None = None

    def add(self, value: float, step: int | None, ts: int) -> None:
        """Take in the next value of this rank, logged at `ts` (Unix ns)."""
        self.points += 1
        self.last, self.last_step, self.last_ts = value, step, ts
        if not math.isfinite(value):
            self.nonfinite += 1
            return
        if self.min is None or value < self.min:
            self.min, self.min_step = value, step
        if self.max is None or value > self.max:
            self.max = value

    def merge(self, other: MetricValues) -> None:
        """Take in another session of the same rank, or another rank: its extremes, but not its last value."""
        if other.rank == self.rank and other.last_ts > self.last_ts:
            self.last, self.last_step, self.last_ts = other.last, other.last_step, other.last_ts
        self.points += other.points
        self.nonfinite += other.nonfinite
        if other.min is not None and (self.min is None or other.min < self.min):
            self.min, self.min_step = other.min, other.min_step
        if other.max is not None and (self.max is None or other.max > self.max):
            self.max = other.max


def logged_values(event: Event) -> Iterator[tuple[str, float]]:
    """The name and value of each number in a `metrics` event.

    A name carries its split, but for training: "loss", "val/loss". As in a receiver, a key that begins with the name of
    a split says it itself. What a device still computes is left out: a later event has it.
    """
    split = event.get("split", "train")
    for key, given in event["metrics"].items():
        value = to_float(given)
        if value is not None:
            head, _, rest = key.partition("/")
            name = key if rest and head in SPLITS else f"{split}/{key}"
            yield name.removeprefix("train/"), value
