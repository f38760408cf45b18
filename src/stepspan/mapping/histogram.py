"""A cumulative exponential histogram of fixed scale.

Scale 3: eight buckets for each doubling, 9% wide. Fixed, because a scale that adapts to the values would make the
points depend on when they were taken. From a microsecond to a day that is under 300 buckets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2

from stepspan.mapping.records import Exemplar, Histogram

SCALE = 3
BUCKETS_PER_DOUBLING = 2**SCALE


@dataclass(slots=True)
class HistogramState:
    """What has been counted so far, such that its fields are JSON: the keys of `buckets` are indices as text."""

    count: int = 0
    sum: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0
    zero_count: int = 0
    buckets: dict[str, int] = field(default_factory=dict)

    def add(self, values: Sequence[float]) -> None:
        """Count values.

        Args:
            values: At least one; each is 0 or more.

        """
        self.minimum = min(values) if not self.count else min(self.minimum, min(values))
        self.maximum = max(self.maximum, max(values))
        self.count += len(values)
        total = self.sum
        for value in values:  # not sum(), whose result depends on how many there are at once
            total += value
        self.sum = total
        positive = [ceil(log2(value) * BUCKETS_PER_DOUBLING) - 1 for value in values if value > 0.0]
        self.zero_count += len(values) - len(positive)
        for bucket, count in Counter(positive).items():
            self.buckets[str(bucket)] = self.buckets.get(str(bucket), 0) + count

    def value(self, start: int, exemplars: tuple[Exemplar, ...] = ()) -> Histogram:
        """The value of a point.

        Args:
            start: Since when the histogram counts, Unix ns.
            exemplars: Go out with this point.

        """
        buckets = {int(bucket): count for bucket, count in self.buckets.items()}
        first, last = min(buckets, default=0), max(buckets, default=-1)
        return Histogram(
            start=start,
            count=self.count,
            sum=self.sum,
            minimum=self.minimum,
            maximum=self.maximum,
            scale=SCALE,
            zero_count=self.zero_count,
            offset=first,
            counts=[buckets.get(bucket, 0) for bucket in range(first, last + 1)],
            exemplars=exemplars,
        )
