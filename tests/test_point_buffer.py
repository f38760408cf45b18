"""Points of a batch: columns for what comes together, and of several of a series in one millisecond the last."""

from __future__ import annotations

from typing import Any

import pytest

from stepspan.mapping.columns import Points
from stepspan.mapping.point_buffer import PointBuffer, Table
from stepspan.mapping.records import Series
from stepspan.otlp import json, protobuf
from stepspan.otlp.rules import by_metric

A, B, C = Series("a", {}), Series("b", {}), Series("c", {})


def by_series(records: Any) -> dict[str, list[tuple[int, float]]]:
    metrics, _ = by_metric(records)
    return {
        series.name: list(zip(times, values, strict=True))
        for found in metrics.values()
        for series, times, values in found
    }


def add_rows(buffer: PointBuffer, table: Table, *rows: tuple[Any, ...]) -> None:
    for ts, *row in rows:
        buffer.next_millisecond()
        buffer.add_row("metrics", table, ts, row)


def test_rows_leave_as_columns_that_share_their_times() -> None:
    buffer = PointBuffer()
    add_rows(buffer, Table([A, B]), (1, 0.5, 2), (2, 0.25, 3))
    points: Any = buffer.flush()
    assert points.columns == [(A, [1, 2], (0.5, 0.25)), (B, [1, 2], [2.0, 3.0])]
    assert points.columns[0][1] is points.columns[1][1]
    assert list(points) == [(A, 1, 0.5), (B, 1, 2.0), (A, 2, 0.25), (B, 2, 3.0)]
    assert (len(points), points[-1], points[:2]) == (4, (B, 2, 3.0), [(A, 1, 0.5), (B, 1, 2.0)])
    assert buffer.flush() == []


@pytest.mark.parametrize("value", ["1e", None, {}, []])
def test_what_is_no_number_costs_its_point_alone(value: Any) -> None:
    buffer = PointBuffer()
    add_rows(buffer, Table([A, B]), (1, 0.5, value), (2, "NaN", 3))
    assert str(by_series(buffer.flush())) == "{'a': [(1, 0.5), (2, nan)], 'b': [(2, 3.0)]}"


def test_a_column_of_nothing_is_none() -> None:
    buffer = PointBuffer()
    add_rows(buffer, Table([A, B]), (1, 0.5, None))
    assert by_series(buffer.flush()) == {"a": [(1, 0.5)]}


AB, BC = Table([A, B]), Table([B, C])


@pytest.mark.parametrize(
    ("calls", "expected", "filtered"),
    [
        pytest.param(
            [("add_row", AB, 1, (1.0, 2.0)), ("add_row", AB, 2, (3.0, 4.0))],
            {"a": [(2, 3.0)], "b": [(2, 4.0)]},
            2,
            id="the same row twice",
        ),
        pytest.param(
            [("add_row", AB, 1, (1.0, 2.0)), ("add_row", BC, 2, (3.0, 4.0))],
            {"a": [(1, 1.0)], "b": [(2, 3.0)], "c": [(2, 4.0)]},
            1,
            id="rows that share a series",
        ),
        pytest.param(
            [("add_row", AB, 1, (1.0, 2.0)), ("add", B, 2, 9.0)],
            {"a": [(1, 1.0)], "b": [(2, 9.0)]},
            1,
            id="a point after a row",
        ),
        pytest.param(
            [("add", B, 1, 9.0), ("add_row", AB, 2, (1.0, 2.0))],
            {"a": [(2, 1.0)], "b": [(2, 2.0)]},
            1,
            id="a row after a point",
        ),
        pytest.param(
            [("add", C, 1, 9.0), ("add_row", AB, 2, (1.0, 2.0)), ("add", C, 3, 8.0)],
            {"a": [(2, 1.0)], "b": [(2, 2.0)], "c": [(3, 8.0)]},
            1,
            id="points beside a row",
        ),
        pytest.param(
            [("add_row", AB, 1, (1.0, 2.0)), ("add_row", AB, 2, ("x", 4.0))],
            {"a": [(1, 1.0)], "b": [(2, 4.0)]},
            1,
            id="what is no number replaces nothing",
        ),
    ],
)
def test_within_a_millisecond_the_last_point_of_a_series_remains(
    calls: list[Any], expected: dict[str, Any], filtered: int
) -> None:
    buffer = PointBuffer()
    for call, *given in calls:
        if call == "add_row":
            buffer.add_row("metrics", *given)
        else:
            buffer.add(*given)
    assert by_series(buffer.flush()) == expected
    assert buffer.filtered == filtered


def test_a_series_with_columns_and_single_points_leaves_in_time_order() -> None:
    buffer = PointBuffer()
    add_rows(buffer, AB, (1, 1.0, 1.0))
    buffer.next_millisecond()
    buffer.add(B, 2, 2.0)
    add_rows(buffer, BC, (3, 3.0, 3.0))
    add_rows(buffer, AB, (4, 4.0, 4.0))
    points: Any = buffer.flush()
    assert isinstance(points, Points)
    assert by_series(points)["b"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [ts for _, ts, _ in points] == [1, 1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("encode", [json.encode, protobuf.encode], ids=["json", "protobuf"])
@pytest.mark.parametrize("value", [0.5, "NaN", "-Infinity"])
def test_encoders_write_columns_as_they_write_points(encode: Any, value: float | str) -> None:
    buffer = PointBuffer()
    add_rows(buffer, AB, (1, 1.0, value), (2, 2.0, 5))
    points: Any = buffer.flush()
    assert encode("metrics", {}, points) == encode("metrics", {}, list(points))
