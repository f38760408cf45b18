"""The rules every encoder keeps, so that one record is the same telemetry in JSON, in protobuf and as SDK objects.

An encoder that had its own idea of one of these would make "the same set at the receiver over another protocol" false.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from stepspan.mapping.columns import Column, Points, merged
from stepspan.mapping.records import Point, Record, SdkRecord, SdkScope, Series

SCOPE_NAME = "stepspan"

NAN: float = struct.unpack("<d", (0x7FF8000000000001).to_bytes(8, "little"))[0]
"""The one NaN that is sent. Prometheus compares bits, and this is what Go's math.NaN, hence its JSON decoder, makes of
"NaN"; Python's float("nan") ends in 0, so one point sent over two protocols would be refused as two values."""

NO_RECORDED_VALUE = 1
"""DataPointFlags: the series ends here."""

SPAN_FLAGS = 0x100
"""SpanFlags CONTEXT_HAS_IS_REMOTE without IS_REMOTE, as the official encoder writes for a span made here."""

SAMPLED = 1
"""W3C trace flags of a log record that stands in a span: all our spans are sampled."""

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
"""What an attribute's intValue can hold; integers beyond are written as strings."""

MAX_DEPTH = 16
"""Attribute values nested deeper than this are written as text. Each level is three protobuf messages, and a parser
that meets 100 within each other refuses the whole request."""

SEVERITY_TEXT = {
    number: name + ("" if nth == 1 else str(nth))
    for first, name in enumerate(("TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"))
    for nth, number in enumerate(range(first * 4 + 1, first * 4 + 5), start=1)
}
"""Severity number -> the short name of the log data model: 9 INFO, 10 INFO2 … 24 FATAL4."""

MetricKey: TypeAlias = tuple[str, str, Literal["gauge", "sum", "histogram"]]


def utf8(text: str) -> bytes:
    """The text as UTF-8; a lone surrogate (a file name, a torn string) becomes "?" rather than an error."""
    return text.encode("utf-8", "replace")


def by_metric(points: Sequence[Point | SdkRecord]) -> tuple[dict[MetricKey, list[Column]], list[SdkRecord]]:
    """Points in time order, mixed over series -> metric by (name, unit, kind) -> its series, each in time order.

    And beside them the data points of other instrumentation, by metric.
    """
    singles, columns = (points.singles, points.columns) if isinstance(points, Points) else (points, ())
    by_series: defaultdict[Series | SdkScope, list[Any]] = defaultdict(list)
    for point in singles:
        by_series[point[0]].append(point)
    found: dict[Series, Column] = {}
    foreign: list[SdkRecord] = []
    for series, its_points in by_series.items():
        if isinstance(series, SdkScope):
            foreign += its_points
        else:
            _, times, values = zip(*its_points, strict=True)
            found[series] = series, times, values
    for column in columns:
        series = column[0]
        found[series] = merged(found[series], column) if series in found else column
    metrics: dict[MetricKey, list[Column]] = {}
    for series, column in found.items():
        metrics.setdefault((series.name, series.unit, series.kind), []).append(column)
    return metrics, foreign


def partition(records: Sequence[Record]) -> tuple[list[Record], list[SdkRecord]]:
    """Our own spans or logs, and those of other instrumentation."""
    ours = [record for record in records if type(record) is not SdkRecord]
    return ours, [record for record in records if type(record) is SdkRecord] if len(ours) < len(records) else []
