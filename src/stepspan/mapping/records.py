"""The neutral records: what an event becomes before an encoder writes it as OTLP JSON, protobuf or SDK objects.

Times are Unix nanoseconds, ids are bytes (16 for a trace, 8 for a span). A point is a plain tuple and its `Series` is
shared by all points of the series, because points are what there are most of: an encoder writes what a series has in
common once and keeps it in `Series.encoded`.
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


@dataclass(slots=True, eq=False)
class Series:
    """What all points of one series share. Compared by identity: a mapper keeps one object a series."""

    name: str
    attributes: Attributes
    unit: str = ""
    kind: Literal["gauge", "sum", "histogram"] = "gauge"
    """A sum is cumulative and monotonic; a histogram is cumulative and exponential."""
    description: str = ""
    encoded: dict[str, object] = field(default_factory=dict)
    """What encoders keep: encoder name -> its own form."""


@dataclass(frozen=True, slots=True)
class Sum:
    """The value of a cumulative sum since `start`."""

    start: int
    value: float


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One measurement that stands for others, with the span it was made in."""

    time: int
    value: float
    trace_id: bytes
    span_id: bytes


@dataclass(frozen=True, slots=True)
class Histogram:
    """A cumulative exponential histogram since `start`; positive values only, `counts[0]` is bucket `offset`."""

    start: int
    count: int
    sum: float
    minimum: float
    maximum: float
    scale: int
    zero_count: int
    offset: int
    counts: Sequence[int]
    exemplars: Sequence[Exemplar] = ()


Point: TypeAlias = "tuple[Series, int, float | Sum | Histogram | None]"
"""Series, time, value. None is "no recorded value": the series ends here."""


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened at one time within a span."""

    name: str
    time: int
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Link:
    """Another span that this one belongs with."""

    trace_id: bytes
    span_id: bytes
    attributes: Attributes


@dataclass(slots=True)
class Span:
    """A finished span of kind INTERNAL, sampled. `error` is the status message of a failed one ("" without text)."""

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


@dataclass(slots=True)
class Log:
    """A log record; `event_name` makes it an event. `severity`: 9 INFO, 13 WARN, 17 ERROR, 21 FATAL."""

    time: int
    severity: int
    body: AttributeValue
    event_name: str
    attributes: Attributes
    trace_id: bytes | None = None
    span_id: bytes | None = None


@dataclass(slots=True, eq=False)
class SdkScope:
    """What records of other instrumentation share, as OTLP JSON. Compared by identity, like a series."""

    scope: Mapping[str, Any]
    """Its InstrumentationScope."""
    schema_url: str = ""
    metric: Mapping[str, Any] | None = None
    """Of data points: their Metric, whose data has none."""


METRIC_DATA = frozenset({"gauge", "sum", "histogram", "exponentialHistogram", "summary"})
"""The fields of an OTLP JSON Metric that hold data points; a Metric has one of them."""


class SdkRecord(NamedTuple):
    """What an OpenTelemetry SDK handed over: one span, log record or data point, as OTLP JSON. Encoders change nothing.

    Begins like a point, so that points and these can be told apart by series and not one by one.
    """

    source: SdkScope
    time: int
    """Unix ns."""
    record: Mapping[str, Any]


Record: TypeAlias = "Point | Span | Log | SdkRecord"
