"""Deltas: what a sum or histogram has come to since the point before, whose time is the delta's start.

For receivers that take no cumulative ones. A difference of what goes out, so it depends on the points alone and not on
batches: each increment is in one point, and a point that is sent again is the same one. Where a counter has begun anew
(it is less than before, or has another start) the delta is all of it.

A series of deltas has no end that would have to be said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, TypeAlias

import orjson

from stepspan.mapping.records import DELTA_OF, Histogram, Series, Sum
from stepspan.values import json_number, to_float

_Json: TypeAlias = dict[str, Any]

DELTAS = frozenset(DELTA_OF.values())
MAX_SDK_SERIES = 20_000
"""Of other instrumentation, that are remembered: of one that was forgotten the next delta is all it has come to."""
CUMULATIVE_TEMPORALITIES = (2, "AGGREGATION_TEMPORALITY_CUMULATIVE")
NO_RECORDED_VALUE = 1


class Deltas:
    """Cumulative values of our own series in, deltas out."""

    def __init__(self) -> None:
        self._before: dict[Series, tuple[int, Any]] = {}
        """A series -> the time and value of its last point."""

    def convert(self, points: list[Any]) -> None:
        """Replace the cumulative values of series of deltas, in place; each series' points are in time order."""
        for index, point in enumerate(points):
            series = point[0]
            if type(series) is Series and series.kind in DELTAS and point[2] is not None:
                time, value = point[1], point[2]
                before = self._before.get(series)
                points[index] = (series, time, value if before is None else self._delta(*before, value))
                self._before[series] = time, value

    def _delta(self, time: int, before: Any, now: Any) -> Any:
        return _sum_delta(time, before, now) if isinstance(now, Sum) else _histogram_delta(time, before, now)

    def state(self, index: Mapping[Series, int]) -> list[Any]:
        """What is carried on, as JSON. `index`: a series -> the number that stands for it."""
        return [[index[series], time, _fields(value)] for series, (time, value) in self._before.items()]

    def restore(self, state: Sequence[Any], series: Sequence[Series]) -> None:
        """Go on from what `state` returned; `series`: by the numbers that stand for them."""
        self._before = {series[number]: (time, _value(*fields)) for number, time, fields in state}


def _sum_delta(time: int, before: Sum, now: Sum) -> Sum:
    anew = now.start != before.start or not now.value >= before.value
    return Sum(time, now.value if anew else now.value - before.value)


def _histogram_delta(time: int, before: Histogram, now: Histogram) -> Histogram:
    earlier = dict(enumerate(before.counts, before.offset))
    counts = [count - earlier.get(index, 0) for index, count in enumerate(now.counts, now.offset)]
    offset = now.offset
    if not now.bounds:  # no empty buckets around the others
        used = [index for index, count in enumerate(counts) if count]
        offset, counts = (offset + used[0], counts[used[0] : used[-1] + 1]) if used else (0, [])
    minimum, maximum = now.recent or (None, None)
    return replace(
        now,
        start=time,
        count=now.count - before.count,
        sum=now.sum - before.sum,
        minimum=minimum,
        maximum=maximum,
        zero_count=now.zero_count - before.zero_count,
        offset=offset,
        counts=counts,
    )


def _fields(value: Sum | Histogram) -> list[Any]:
    """As JSON: of a histogram only what the next difference needs."""
    if isinstance(value, Sum):
        return ["sum", value.start, json_number(value.value)]
    return ["histogram", value.start, value.count, value.sum, value.zero_count, value.offset, list(value.counts)]


def _value(kind: str, start: int, *rest: Any) -> Sum | Histogram:
    if kind == "sum":
        return Sum(start, to_float(rest[0]) or 0.0)
    count, total, zero_count, offset, counts = rest
    return Histogram(start, count, total, None, None, 0, zero_count, offset, counts)


class SdkDeltas:
    """Cumulative data points of other instrumentation in, deltas out; both as OTLP JSON.

    Monotonic sums and histograms. Which counters were read from elsewhere, and so would stay cumulative for
    "lowmemory", OTLP does not say. Sums that go up and down stay as they are, as OpenTelemetry has it; so do deltas.
    """

    def __init__(self) -> None:
        self._before: dict[str, _Json] = {}
        """A hash of what makes a series -> its last point, less its attributes."""

    @staticmethod
    def takes(kind: str, data: Mapping[str, Any]) -> bool:
        """Whether the points of a metric are to become deltas: by its kind (the field in OTLP JSON) and its data."""
        if kind not in ("sum", "histogram", "exponentialHistogram"):
            return False
        return data.get("aggregationTemporality") in CUMULATIVE_TEMPORALITIES and (
            kind != "sum" or data.get("isMonotonic") is True
        )

    def convert(self, kind: str, source: bytes, points: Sequence[Mapping[str, Any]]) -> list[_Json]:
        """The deltas of a metric's points.

        Args:
            kind: The metric's field: "sum", "histogram" or "exponentialHistogram".
            source: Names scope and metric.
            points: As they were handed over, in time order.

        """
        return [self._convert(kind, source, dict(point)) for point in points]

    def _convert(self, kind: str, source: bytes, point: _Json) -> _Json:
        attributes = orjson.dumps(point.get("attributes", []))
        series = blake2b(source + b"\0" + attributes, digest_size=16).hexdigest()
        before = self._before.pop(series, None)
        if int(point.get("flags", 0)) & NO_RECORDED_VALUE:
            return point
        if len(self._before) >= MAX_SDK_SERIES:
            del self._before[next(iter(self._before))]
        self._before[series] = {name: point[name] for name in CARRIED if name in point}
        if before is None:
            return point
        if before.get("startTimeUnixNano") == point.get("startTimeUnixNano"):
            delta = (_number_delta if kind == "sum" else _buckets_delta)(before, point)
            if delta is not None:
                kept = {name: value for name, value in point.items() if name not in VALUES}
                return {**kept, **delta, "startTimeUnixNano": before["timeUnixNano"]}
        later = max(int(before["timeUnixNano"]), int(point.get("startTimeUnixNano", 0)))
        return {**point, "startTimeUnixNano": str(later)}

    def state(self) -> dict[str, _Json]:
        """What is carried on, as JSON."""
        return self._before

    def restore(self, state: dict[str, _Json]) -> None:
        """Go on from what `state` returned."""
        self._before = state


CARRIED = (
    *("timeUnixNano", "startTimeUnixNano", "asInt", "asDouble", "count", "sum"),
    *("bucketCounts", "explicitBounds", "scale", "zeroCount", "positive", "negative"),
)
"""Of a point: what the next difference needs."""


VALUES = ("asInt", "asDouble", "min", "max")
"""Of a point: what its delta has in another form, or not at all."""


def _number_delta(before: Mapping[str, Any], now: Mapping[str, Any]) -> _Json | None:
    """None: the counter has begun anew."""
    if "asInt" in before and "asInt" in now:
        difference = int(now["asInt"]) - int(before["asInt"])
        return None if difference < 0 else {"asInt": str(difference)}
    earlier, later = (to_float(point.get("asDouble", point.get("asInt"))) for point in (before, now))
    if earlier is None or later is None or not later >= earlier:
        return None
    return {"asDouble": json_number(later - earlier)}


def _buckets_delta(before: Mapping[str, Any], now: Mapping[str, Any]) -> _Json | None:
    """None: the histogram has begun anew, or its buckets are others."""
    shift = int(before.get("scale", 0)) - int(now.get("scale", 0))
    if shift < 0 or before.get("explicitBounds") != now.get("explicitBounds"):
        return None
    numbers = {name: _integer(now.get(name)) - _integer(before.get(name)) for name in ("count", "zeroCount")}
    delta: _Json = {name: str(number) for name, number in numbers.items() if name in now}
    if "sum" in now:
        delta["sum"] = json_number((to_float(now["sum"]) or 0.0) - (to_float(before.get("sum", 0.0)) or 0.0))
    differences = list(numbers.values())
    if "bucketCounts" in now:
        counts = _bucket_differences(before, now, 0)
        delta["bucketCounts"] = [str(count) for count in counts]
        differences += counts
    for side in ("positive", "negative"):
        if side in now or side in before:
            counts = _bucket_differences(before.get(side, {}), now.get(side, {}), shift)
            delta[side] = {**now.get(side, {}), "bucketCounts": [str(count) for count in counts]}
            differences += counts
    return None if min(differences) < 0 else delta


def _bucket_differences(before: Mapping[str, Any], now: Mapping[str, Any], shift: int) -> list[int]:
    """The difference of each bucket; one that is below 0 where there was one that is not there any more.

    Args:
        before: With an offset and counts.
        now: Likewise.
        shift: How many times two buckets of before have become one.

    """
    earlier: dict[int, int] = {}
    for index, count in enumerate(before.get("bucketCounts", ()), int(before.get("offset", 0))):
        earlier[index >> shift] = earlier.get(index >> shift, 0) + int(count)
    counts = [
        int(count) - earlier.pop(index, 0)
        for index, count in enumerate(now.get("bucketCounts", ()), int(now.get("offset", 0)))
    ]
    return [*counts, -1] if any(earlier.values()) else counts


def _integer(value: Any) -> int:
    return int(value or 0)
