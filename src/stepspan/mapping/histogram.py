"""A cumulative histogram: an exponential one of fixed scale, or one with bounds.

Scale 3: eight buckets for each doubling, 9% wide. Fixed, because a scale that adapts to the values would make the
points depend on when they were taken. From a microsecond to a day that is under 300 buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2

from stepspan.mapping.records import Exemplar, Histogram

SCALE = 3
BUCKETS_PER_DOUBLING = 2**SCALE
BOUNDS_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""Of a histogram of durations with bounds, in seconds: those that OpenTelemetry's semantic conventions advise for
`gen_ai.client.operation.duration`, which take about as long as steps do. (The SDK's own are made for milliseconds.)"""


@dataclass(slots=True)
class HistogramState:
    """What has been counted so far, such that its fields are JSON: the keys of `buckets` are indices as text.

    `bounds` are those of its buckets; none: it is an exponential one. `recent` is of the values since the last point.
    """

    count: int = 0
    sum: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0
    zero_count: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    bounds: Sequence[float] = ()
    recent: Sequence[float] | None = None

    def add(self, values: Sequence[float]) -> None:
        """Count values.

        Args:
            values: At least one; each is 0 or more.

        """
        low, high = min(values), max(values)
        self.recent = (low, high) if self.recent is None else (min(self.recent[0], low), max(self.recent[1], high))
        self.minimum = low if not self.count else min(self.minimum, low)
        self.maximum = max(self.maximum, high)
        self.count += len(values)
        total = self.sum
        for value in values:  # not sum(), whose result depends on how many there are at once
            total += value
        self.sum = total
        if self.bounds:
            buckets = [bisect_left(self.bounds, value) for value in values]
        else:
            buckets = [ceil(log2(value) * BUCKETS_PER_DOUBLING) - 1 for value in values if value > 0.0]
            self.zero_count += len(values) - len(buckets)
        for bucket, count in Counter(buckets).items():
            self.buckets[str(bucket)] = self.buckets.get(str(bucket), 0) + count

    def value(self, start: int, exemplars: tuple[Exemplar, ...] = ()) -> Histogram:
        """The value of a point. From here on what is recent is what follows it.

        Args:
            start: Since when the histogram counts, Unix ns.
            exemplars: Go out with this point.

        """
        buckets = {int(bucket): count for bucket, count in self.buckets.items()}
        first, last = min(buckets, default=0), max(buckets, default=-1)
        if self.bounds:
            first, last = 0, len(self.bounds)
        recent, self.recent = self.recent, None
        return Histogram(
            start=start,
            count=self.count,
            sum=self.sum,
            minimum=self.minimum if self.count else None,
            maximum=self.maximum if self.count else None,
            scale=0 if self.bounds else SCALE,
            zero_count=self.zero_count,
            offset=first,
            counts=[buckets.get(bucket, 0) for bucket in range(first, last + 1)],
            exemplars=exemplars,
            bounds=tuple(self.bounds),
            recent=recent and tuple(recent),
        )
