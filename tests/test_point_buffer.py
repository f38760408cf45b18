"""Points of a batch: columns for what comes together, and a millisecond of its own for each row of a series."""

from __future__ import annotations

from typing import Any

import pytest

from stepspan.events import MILLISECOND_NS as MS
from stepspan.mapping.columns import Points
from stepspan.mapping.point_buffer import PointBuffer, Table
from stepspan.mapping.records import MAX_LEAD_MS, Series
from stepspan.otlp import json, protobuf
from stepspan.otlp.rules import by_metric

A, B, C, STEP = Series("a", {}), Series("b", {}), Series("c", {}), Series("training.step.number", {})
ALL = 1 << 62


def by_series(records: Any) -> dict[str, list[tuple[int, float]]]:
    metrics, _ = by_metric(records)
    return {
        series.name: list(zip(times, values, strict=True))
        for found in metrics.values()
        for series, times, values in found
    }


def add_rows(buffer: PointBuffer, table: Table, *rows: tuple[Any, ...]) -> None:
    for ts, *row in rows:
        buffer.metrics.add_row(table, ts * MS, row)


def milliseconds(records: Any) -> dict[str, list[tuple[int, float]]]:
    return {name: [(ts // MS, value) for ts, value in points] for name, points in by_series(records).items()}


def test_rows_leave_as_columns_that_share_their_times() -> None:
    buffer = PointBuffer()
    add_rows(buffer, buffer.table([A, B]), (1, 0.5, 2), (2, 0.25, 3))
    points: Any = buffer.flush(ALL)
    assert points.columns == [(A, [MS, 2 * MS], (0.5, 0.25)), (B, [MS, 2 * MS], [2.0, 3.0])]
    assert points.columns[0][1] is points.columns[1][1]
    assert list(points) == [(A, MS, 0.5), (B, MS, 2.0), (A, 2 * MS, 0.25), (B, 2 * MS, 3.0)]
    assert (len(points), points[-1], points[:2]) == (4, (B, 2 * MS, 3.0), [(A, MS, 0.5), (B, MS, 2.0)])
    assert buffer.flush(ALL) == []


@pytest.mark.parametrize("value", ["1e", None, {}, []])
def test_what_is_no_number_costs_its_point_alone(value: Any) -> None:
    buffer = PointBuffer()
    add_rows(buffer, buffer.table([A, B]), (1, 0.5, value), (2, "NaN", 3))
    assert str(milliseconds(buffer.flush(ALL))) == "{'a': [(1, 0.5), (2, nan)], 'b': [(2, 3.0)]}"


def test_a_column_of_nothing_is_none() -> None:
    buffer = PointBuffer()
    add_rows(buffer, buffer.table([A, B]), (1, 0.5, None))
    assert milliseconds(buffer.flush(ALL)) == {"a": [(1, 0.5)]}


AB, BC, AS, BS = (A, B), (B, C), (A, STEP), (B, STEP)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([(AB, 1, 2), (AB, 3, 4)], {"a": [(5, 1), (6, 3)], "b": [(5, 2), (6, 4)]}, id="the same row twice"),
        pytest.param(
            [(AB, 1, 2), (BC, 3, 4), (AB, 5, 6)],
            {"a": [(5, 1), (7, 5)], "b": [(5, 2), (6, 3), (7, 6)], "c": [(6, 4)]},
            id="rows that share a series",
        ),
        pytest.param([((A,), 1), ((B,), 2)], {"a": [(5, 1)], "b": [(5, 2)]}, id="no series twice"),
        pytest.param(
            [(AS, 1, 7), (BS, 2, 7), (BS, 3, 7)],
            {"a": [(5, 1)], "b": [(5, 2), (6, 3)], "training.step.number": [(5, 7), (6, 7)]},
            id="one step, one point of its number where one will do",
        ),
        pytest.param(
            [(AS, 1, 7), (BS, 2, 8), (AS, 3, 8)],
            {"a": [(5, 1), (6, 3)], "b": [(6, 2)], "training.step.number": [(5, 7), (6, 8)]},
            id="another step, another millisecond",
        ),
        pytest.param([(AB, "x", 2), (AB, 3, "y")], {"a": [(6, 3)], "b": [(5, 2)]}, id="no number, but a place"),
    ],
)  # fmt: skip
def test_each_row_takes_the_first_millisecond_in_which_it_meets_no_other_point(
    rows: list[Any], expected: dict[str, Any]
) -> None:
    buffer = PointBuffer()
    for series, *row in rows:
        add_rows(buffer, buffer.table(series), (5, *row))
    assert milliseconds(buffer.flush(ALL)) == expected
    assert (buffer.filtered, buffer.thinned) == (0, 0)


def burst(buffer: PointBuffer, series: tuple[Series, ...], count: int, at: int = 5) -> None:
    for number in range(count):
        buffer.metrics.add_row(buffer.table(series), at * MS, [float(number)] * len(series))


def test_beyond_the_limit_the_newest_row_waits_and_goes_out_at_the_end() -> None:
    buffer = PointBuffer()
    burst(buffer, AB, MAX_LEAD_MS + 100)
    assert buffer.thinned == 2 * 98
    assert len(milliseconds(buffer.flush(ALL))["a"]) == MAX_LEAD_MS + 1
    buffer.place_all()
    last = (MAX_LEAD_MS + 6, float(MAX_LEAD_MS + 99))
    assert milliseconds(buffer.flush(ALL)) == {"a": [last], "b": [last]}


def test_a_row_that_waits_goes_out_before_later_ones_once_there_is_room() -> None:
    buffer = PointBuffer()
    burst(buffer, (A,), MAX_LEAD_MS + 2)
    add_rows(buffer, buffer.table(AB), (5, -1.0, -1.0))  # would overtake what waits of a
    add_rows(buffer, buffer.table((B,)), (5, -2.0))  # and this one, what waits of b
    add_rows(buffer, buffer.table((C,)), (5, -3.0))
    assert milliseconds(buffer.flush(ALL))["c"] == [(5, -3.0)]
    buffer.next_millisecond(7 * MS)
    found = milliseconds(buffer.flush(ALL))
    assert found == {
        "a": [(MAX_LEAD_MS + 6, float(MAX_LEAD_MS + 1)), (MAX_LEAD_MS + 7, -1.0)],
        "b": [(MAX_LEAD_MS + 7, -1.0)],
    }
    buffer.next_millisecond(8 * MS)
    assert milliseconds(buffer.flush(ALL)) == {"b": [(MAX_LEAD_MS + 8, -2.0)]}
    assert buffer.thinned == 0


def test_rows_are_held_back_until_their_time_has_come() -> None:
    buffer = PointBuffer()
    burst(buffer, AB, 4)
    assert milliseconds(buffer.flush(6 * MS))["a"] == [(5, 0.0)]
    assert buffer.held_until() == 8 * MS
    assert milliseconds(buffer.flush(8 * MS))["b"] == [(6, 1.0), (7, 2.0)]
    assert milliseconds(buffer.flush(ALL))["a"] == [(8, 3.0)]
    assert buffer.held_until() == 0


def test_what_follows_a_missing_value_is_held_back_for_it_but_not_for_ever() -> None:
    buffer = PointBuffer()
    buffer.metrics.add_row(buffer.table([A, B]), 5 * MS, [1.0, None], 17)
    buffer.add(C, 6 * MS, 3.0)
    assert buffer.flush(7 * MS, 6 * MS) == []
    assert buffer.held_until() == 6 * MS
    assert milliseconds(buffer.flush(7 * MS, 5 * MS + 10_001 * MS)) == {"a": [(5, 1.0)], "c": [(6, 3.0)]}
    del buffer.reserved[17]
    buffer.metrics.add_row(buffer.table([A, B]), 8 * MS, [2.0, None], 18)
    assert buffer.flush(9 * MS, 8 * MS) == []
    buffer.add_late(18, B, 4.0, 9 * MS)
    del buffer.reserved[18]
    assert milliseconds(buffer.flush(9 * MS, 8 * MS)) == {"a": [(8, 2.0)], "b": [(8, 4.0)]}
    assert buffer.held_until() == 0


def test_nothing_lies_before_the_session_begins() -> None:
    buffer = PointBuffer(not_before=7 * MS + 1)
    for ts in (5, 6):
        buffer.next_millisecond(ts * MS)
        buffer.add(C, ts * MS, float(ts))
        add_rows(buffer, buffer.table(AB), (ts, 1.0, 2.0))
    assert buffer.flush(7 * MS) == []
    buffer.next_millisecond(8 * MS)
    buffer.add(C, 8 * MS + 1, 8.0)
    buffer.next_millisecond(9 * MS)
    buffer.add(C, 9 * MS, 9.0)
    assert milliseconds(buffer.flush(ALL)) == {
        "a": [(8, 1.0), (9, 1.0)],
        "b": [(8, 2.0), (9, 2.0)],
        "c": [(8, 8.0), (9, 9.0)],
    }
    assert buffer.filtered == 2


def test_of_single_points_of_a_millisecond_the_last_remains() -> None:
    buffer = PointBuffer()
    buffer.next_millisecond(MS)
    buffer.add(A, MS, 1.0)
    buffer.add(B, MS, 2.0)
    buffer.add(A, MS + 1, 3.0)
    buffer.next_millisecond(2 * MS)
    buffer.add(A, 2 * MS, 4.0)
    assert by_series(buffer.flush(ALL)) == {"a": [(MS + 1, 3.0), (2 * MS, 4.0)], "b": [(MS, 2.0)]}
    assert buffer.filtered == 1


def test_a_series_with_columns_and_single_points_leaves_in_time_order() -> None:
    buffer = PointBuffer()
    add_rows(buffer, buffer.table(AB), (1, 1.0, 1.0))
    buffer.add(B, 2 * MS, 2.0)
    add_rows(buffer, buffer.table(BC), (3, 3.0, 3.0))
    add_rows(buffer, buffer.table(AB), (4, 4.0, 4.0))
    points: Any = buffer.flush(ALL)
    assert isinstance(points, Points)
    assert milliseconds(points)["b"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [ts // MS for _, ts, _ in points] == [1, 1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("encode", [json.encode, protobuf.encode], ids=["json", "protobuf"])
@pytest.mark.parametrize("value", [0.5, "NaN", "-Infinity"])
def test_encoders_write_columns_as_they_write_points(encode: Any, value: float | str) -> None:
    buffer = PointBuffer()
    add_rows(buffer, buffer.table(AB), (1, 1.0, value), (2, 2.0, 5))
    points: Any = buffer.flush(ALL)
    assert encode("metrics", {}, points) == encode("metrics", {}, list(points))
