"""The rules every encoder keeps, so that one record is the same telemetry in JSON, in protobuf and as SDK objects.

An encoder that had its own idea of one of these would make "the same set at the receiver over another protocol" false.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from stepspan.mapping.columns import Column, Points, merge_columns
from stepspan.mapping.records import Kind, Point, Record, SdkRecord, SdkScope, Series, Signal

SCOPE_NAME = "stepspan"


class RequestFields(NamedTuple):
    """The names, in OTLP JSON, of what lies around the records of a signal.

    Args:
        resources: The field of a request.
        scopes: The field of a resource.
        records: The field of a scope.

    """

    resources: str
    scopes: str
    records: str


FIELDS: Mapping[Signal, RequestFields] = {
    "metrics": RequestFields("resourceMetrics", "scopeMetrics", "metrics"),
    "traces": RequestFields("resourceSpans", "scopeSpans", "spans"),
    "logs": RequestFields("resourceLogs", "scopeLogs", "logRecords"),
}

NAN: float = struct.unpack("<d", (0x7FF8000000000001).to_bytes(8, "little"))[0]
"""The one NaN that is sent. Prometheus compares bits, and this is what Go's math.NaN, hence its JSON decoder, makes of
"NaN"; Python's float("nan") ends in 0, so one point sent over two protocols would be refused as two values."""


def double(value: float | str) -> float:
    """The float of a number in OTLP JSON. Every NaN becomes `NAN`. Raises ValueError if it is none."""
    number = float(value)
    return number if number == number else NAN


NO_RECORDED_VALUE = 1
"""DataPointFlags: the series ends here."""

HAS_IS_REMOTE, IS_REMOTE = 0x100, 0x200
"""SpanFlags: whether IS_REMOTE means anything, and whether the parent's or link's context came from another process.
Our own spans have the first alone, as the official encoder writes for a span made here."""

SAMPLED = 1
"""W3C trace flags of a log record that lies in a span: all our spans are sampled."""

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
"""What an attribute's intValue can hold; integers beyond are written as strings."""

MAX_ATTRIBUTE_NESTING = 16
"""Attribute values nested deeper than this are written as text. Each level is three protobuf messages, and a parser
that meets 100 within each other refuses the whole request."""

SEVERITY_TEXT = {
    number: name + ("" if nth == 1 else str(nth))
    for first, name in enumerate(("TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"))
    for nth, number in enumerate(range(first * 4 + 1, first * 4 + 5), start=1)
}
"""Severity number -> the short name of the log data model: 9 INFO, 10 INFO2 … 24 FATAL4."""

MetricKey: TypeAlias = tuple[str, str, Kind]
"""What makes points one metric of a request: name, unit and kind."""
Metric: TypeAlias = tuple[MetricKey, list[Column]]
"""The points of one metric, a column for each series."""


def partition(signal: Signal, records: Sequence[Record]) -> tuple[list[Any], list[SdkRecord]]:
    """The records that stepspan made, and those that an OpenTelemetry SDK handed over.

    Args:
        signal: The signal of all records.
        records: As an encoder takes them: points in time order, mixed over series.

    Returns:
        Spans or logs in their order, for metrics a `Metric` each; and the SDK's records in their order.

    """
    if signal == "metrics":
        metrics, sdk_records = by_metric(cast("Sequence[Point | SdkRecord]", records))
        return list(metrics.items()), sdk_records
    own = [record for record in records if type(record) is not SdkRecord]
    return own, [record for record in records if type(record) is SdkRecord] if len(own) < len(records) else []


def by_metric(points: Sequence[Point | SdkRecord]) -> tuple[dict[MetricKey, list[Column]], list[SdkRecord]]:
    """Points, mixed over series -> metric -> its series, each in time order; and the data points of an SDK."""
    single_points, columns = (points.points, points.columns) if isinstance(points, Points) else (points, ())
    by_series: defaultdict[Series | SdkScope, list[Any]] = defaultdict(list)
    for point in single_points:
        by_series[point[0]].append(point)
    found: dict[Series, list[Column]] = {}
    sdk_records: list[SdkRecord] = []
    for series, its_points in by_series.items():
        if isinstance(series, SdkScope):
            sdk_records += its_points
        else:
            _, times, values = zip(*its_points, strict=True)
            found[series] = [(series, times, values)]
    for column in columns:
        found.setdefault(column[0], []).append(column)
    metrics: dict[MetricKey, list[Column]] = {}
    for series, its_columns in found.items():
        metrics.setdefault((series.name, series.unit, series.kind), []).append(merge_columns(its_columns))
    return metrics, sdk_records
