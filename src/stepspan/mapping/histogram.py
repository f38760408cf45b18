"""A cumulative exponential histogram of fixed scale, kept as plain JSON.

Scale 3: eight buckets for each doubling, 9% wide. Fixed, because a scale that adapts to the values would make the
points depend on when they were taken. From a microsecond to a day that is under 300 buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from typing import Any

from stepspan.mapping.records import Exemplar, Histogram

SCALE = 3


def empty() -> dict[str, Any]:
    """A histogram of nothing."""
    return {"count": 0, "sum": 0.0, "min": 0.0, "max": 0.0, "zero": 0, "buckets": {}}


def add(histogram: dict[str, Any], values: Sequence[float]) -> None:
    """Count values of 0 or more, at least one."""
    histogram["min"] = min(values) if not histogram["count"] else min(histogram["min"], min(values))
    histogram["max"] = max(histogram["max"], max(values))
    histogram["count"] += len(values)
    total, buckets = histogram["sum"], histogram["buckets"]
    for value in values:
        total += value
        if value > 0.0:
            bucket = str(ceil(log2(value) * 2**SCALE) - 1)
            buckets[bucket] = buckets.get(bucket, 0) + 1
        else:
            histogram["zero"] += 1
    histogram["sum"] = total


def value(histogram: dict[str, Any], start: int, exemplars: tuple[Exemplar, ...]) -> Histogram:
    """The histogram as a point's value."""
    buckets = {int(bucket): count for bucket, count in histogram["buckets"].items()}
    first, last = min(buckets, default=0), max(buckets, default=-1)
    return Histogram(
        start=start,
        count=histogram["count"],
        sum=histogram["sum"],
        minimum=histogram["min"],
        maximum=histogram["max"],
        scale=SCALE,
        zero_count=histogram["zero"],
        offset=first,
        counts=[buckets.get(bucket, 0) for bucket in range(first, last + 1)],
        exemplars=exemplars,
    )
