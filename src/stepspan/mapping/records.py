"""The neutral records: what an event becomes before an encoder writes it as OTLP JSON, protobuf or SDK objects.

Times are Unix nanoseconds, durations seconds, ids bytes (16 for a trace, 8 for a span). A point is a plain tuple and
its `Series` is shared by all points of the series, because points are what there are most of: an encoder writes what a
series has in common once and keeps it in `Series.encoded`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

Signal: TypeAlias = Literal["metrics", "traces", "logs"]
SIGNALS: tuple[Signal, ...] = ("metrics", "traces", "logs")

Scalar: TypeAlias = "str | bool | int | float"
AttributeValue: TypeAlias = "Scalar | Sequence[Scalar] | Mapping[str, AttributeValue]"
"""Integers beyond 64 bits are written as strings; a mapping as a key-value list (log bodies and attributes)."""
Attributes: TypeAlias = Mapping[str, AttributeValue]
Kind: TypeAlias = Literal[
    "gauge", "sum", "histogram", "explicit_histogram", "delta_sum", "delta_histogram", "delta_explicit_histogram"
]
"""A sum is monotonic; "histogram" is an exponential one. They are cumulative, or deltas: what has come on since the
point before, whose time is their start."""
DELTA_OF: Mapping[Kind, Kind] = {
    "sum": "delta_sum", "histogram": "delta_histogram", "explicit_histogram": "delta_explicit_histogram",
}  # fmt: skip
"""Cumulative kind -> the kind of its deltas."""

METRIC_DATA = frozenset({"gauge", "sum", "histogram", "exponentialHistogram", "summary"})
"""The fields of an OTLP JSON Metric that hold data points; a Metric has one of them."""


MAX_LEAD_MS = 10_000
"""How far ahead of its line a row of points may be placed, in `point_buffer`."""
MAX_WAITING = 1000
"""Rows that wait there for a place: one of each table, in each of three timelines."""


@dataclass(slots=True, eq=False)
class Series:
    """What all points of one series share. Compared by identity: a mapper keeps one object for each series.

    Attributes:
        name: The metric's name, as in `training.loss`.
        attributes: The attributes of each of its points.
        unit: By UCUM ("s", "By", "{sample}/s"); "" for a user's metric, whose unit is not known.
        kind: What the values are: floats of a gauge, each a `Sum`, or each a `Histogram`.
        description: For people.
        encoded: What encoders keep: encoder name -> its own form.

    """

    name: str
    attributes: Attributes
    unit: str = ""
    kind: Kind = "gauge"
    description: str = ""
    encoded: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sum:
    """What a monotonic sum has come to since `start` (Unix ns)."""

    start: int
    value: float


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One measurement that stands for others, with the span it was made in; `time` in Unix ns."""

    time: int
    value: float
    trace_id: bytes
    span_id: bytes


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram of values that are 0 or more, as OTLP defines it: an exponential one, or one with bounds.

    Attributes:
        start: Since when it counts, Unix ns.
        count: Number of values, those of 0 included.
        sum: Of all values.
        minimum: Of all values; None where there are none.
        maximum: Likewise.
        scale: Each bucket is 2 ** 2 ** -scale times as wide as the one before.
        zero_count: Number of values that are 0.
        offset: The index of the bucket of `counts[0]`. Bucket i holds values in (base ** i, base ** (i + 1)].
        counts: Number of values in each bucket, without a hole.
        exemplars: Values with a trace.
        bounds: Of one with bounds: bucket i holds values in (bounds[i - 1], bounds[i]], and the last one those beyond.
            `scale`, `zero_count` and `offset` are 0 there.
        recent: Of a cumulative one: minimum and maximum of the values since the point before; None: there are none.

    """

    start: int
    count: int
    sum: float
    minimum: float | None
    maximum: float | None
    scale: int
    zero_count: int
    offset: int
    counts: Sequence[int]
    exemplars: Sequence[Exemplar] = ()
    bounds: Sequence[float] = ()
    recent: Sequence[float] | None = None


Point: TypeAlias = "tuple[Series, int, float | Sum | Histogram | None]"
"""Series, time (Unix ns), value. None is "no recorded value": the series ends here."""


class PastPoint(NamedTuple):
    """A point whose time the user gave: it may be older than a receiver takes, and then is a receiver's to refuse.

    Attributes:
        series: A gauge.
        time: Unix ns.
        value: A float.

    """

    series: Series
    time: int
    value: float


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened at one time (Unix ns) within a span."""

    name: str
    time: int
    attributes: Attributes
    dropped_attributes: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """Another span that this one belongs with. `encoded`: what encoders keep, as `Series.encoded`."""

    trace_id: bytes
    span_id: bytes
    attributes: Attributes
    dropped_attributes: int = 0
    trace_state: str = ""
    encoded: dict[str, object] = field(default_factory=dict, compare=False, repr=False)


@dataclass(slots=True)
class Span:
    """A finished span of kind INTERNAL, sampled.

    Attributes:
        trace_id: 16 bytes.
        span_id: 8 bytes.
        parent_id: 8 bytes; None for the root of its trace.
        name: As in `training.step`.
        start: Unix ns.
        end: Unix ns, not before `start`.
        attributes: Flat.
        dropped_attributes: How many more there were.
        error: The status message of a failed span ("" without text); None for one that has not failed.
        events: In the order of their times.
        dropped_events: How many more there were.
        links: To other traces.
        dropped_links: How many more there were.
        trace_state: What others have to say of its trace, as W3C Trace Context writes it.

    """

    trace_id: bytes
    span_id: bytes
    parent_id: bytes | None
    name: str
    start: int
    end: int
    attributes: Attributes
    error: str | None = None
    events: Sequence[SpanEvent] = ()
    links: Sequence[Link] = ()
    dropped_attributes: int = 0
    dropped_events: int = 0
    dropped_links: int = 0
    trace_state: str = ""


@dataclass(slots=True)
class Log:
    """A log record.

    Attributes:
        time: Unix ns.
        severity: OTLP's severity number: 1 TRACE, 5 DEBUG, 9 INFO, 13 WARN, 17 ERROR, 21 FATAL.
        body: The message.
        event_name: What makes it an event; "" for a line of a log.
        attributes: Flat.
        dropped_attributes: How many more there were.
        trace_id: Of the span that it was logged in, if there is one.
        span_id: Likewise.

    """

    time: int
    severity: int
    body: AttributeValue
    event_name: str
    attributes: Attributes
    trace_id: bytes | None = None
    span_id: bytes | None = None
    dropped_attributes: int = 0


@dataclass(slots=True, eq=False)
class SdkScope:
    """What records of other instrumentation share, as OTLP JSON. Compared by identity, like a series.

    Attributes:
        scope: Their InstrumentationScope.
        schema_url: Of the scope.
        metric: Of data points: their Metric, without the points. None for spans and log records.

    """

    scope: Mapping[str, Any]
    schema_url: str = ""
    metric: Mapping[str, Any] | None = None


class SdkRecord(NamedTuple):
    """What an OpenTelemetry SDK handed over: one span, log record or data point, as OTLP JSON. Encoders change nothing.

    Begins like a point, so that points and these are separated by series and not one by one.

    Attributes:
        source: What it shares with others.
        time: Unix ns.
        record: The Span, LogRecord or data point.

    """

    source: SdkScope
    time: int
    record: Mapping[str, Any]


Record: TypeAlias = "Point | Span | Log | SdkRecord"
