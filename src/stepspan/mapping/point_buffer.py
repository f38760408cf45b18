"""Where a mapper buffers the points of a batch, such that each series has at most one in a millisecond.

Why at most one: Prometheus keeps times in milliseconds, and refuses a second value of a series for a time it has. So of
several points of a series in one millisecond the **last** goes out; those before it count as `filtered`. A batch never
ends within a millisecond, so which one is the last does not depend on the batches.

Why rows: what always comes together (the keys of one `log_metrics` call, the times of a step) is added to a `Table`, a
row each time. A row costs a tenth of what as many single points do, and a table's columns are what encoders want. Only
where a row of the current millisecond gives way to a later point of one of its series is it demoted to single points.

The order of calls: `next_millisecond` before the first point of each millisecond, `add` and `add_row` as the events
come, `flush` at the end of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stepspan.mapping.columns import Column, Points
from stepspan.mapping.records import Point, Record, SdkRecord, Series
from stepspan.values import to_float

ALL_FLOATS, ALL_INTEGERS = {float}, {int}


@dataclass(slots=True, eq=False)
class Table:
    """Gauges whose points come together, no two of one series.

    Attributes:
        series: n series.
        times: Of each row, Unix ns.
        rows: n values each, as the journal holds them; what is no number is left out when the table is flushed.

    """

    series: Sequence[Series]
    times: list[int] = field(default_factory=list)
    rows: list[Sequence[Any]] = field(default_factory=list)


class PointBuffer:
    """The points of one batch. Tables of one kind may share series, those of different kinds never do.

    Attributes:
        filtered: Points that gave way to a later one, since the beginning of the session.
        points: Single points of this batch. What needs no look at the current millisecond may be appended to it.

    """

    def __init__(self) -> None:
        self.filtered = 0
        self.points: list[Point | SdkRecord] = []
        self._tables: list[Table] = []
        """Those that have rows."""
        self._current_points: dict[Series, int] = {}
        """Series -> the index of its single point of the current millisecond."""
        self._current_rows: dict[str, Table | None] = {}
        """Kind -> the table whose last row is of the current millisecond; None once that row was demoted."""

    def next_millisecond(self) -> None:
        """Begin a millisecond: what comes now shares none with what came before."""
        if self._current_points:
            self._current_points.clear()
        if self._current_rows:
            self._current_rows.clear()

    def add_row(self, kind: str, table: Table, ts: int, row: Sequence[Any]) -> None:
        """Add a point of each of a table's series.

        Args:
            kind: What the table is of; of each kind one row is kept as a row in a millisecond.
            table: The table, which is emptied by `flush`.
            ts: Their time, Unix ns.
            row: A value for each series; what is no number is no point.

        """
        if kind in self._current_rows or (
            self._current_points and not self._current_points.keys().isdisjoint(table.series)
        ):
            self._demote_row(kind)
            self.add_each(table.series, ts, row)
            return
        self._current_rows[kind] = table
        if not table.rows:
            self._tables.append(table)
        table.times.append(ts)
        table.rows.append(row)

    def add_each(self, series: Sequence[Series], ts: int, row: Sequence[Any]) -> None:
        """Add single points that come together this time; `row` as for `add_row`."""
        for one, value in zip(series, row, strict=True):
            number = to_float(value)
            if number is not None:
                self.add(one, ts, number)

    def add(self, series: Series, ts: int, value: Any) -> None:
        """Add a point of the current millisecond, at `ts` (Unix ns); it replaces the one that the series has there."""
        for kind, table in self._current_rows.items() if self._current_rows else ():
            if table is not None and series in table.series:
                self._demote_row(kind)
                break
        index = self._current_points.get(series)
        if index is None:
            self._current_points[series] = len(self.points)
            self.points.append((series, ts, value))
        else:
            self.points[index] = (series, ts, value)
            self.filtered += 1

    def has_current(self, series: Series) -> bool:
        """Whether a series has a point of the current millisecond."""
        return series in self._current_points or any(
            table is not None and series in table.series and table.rows[-1][table.series.index(series)] is not None
            for table in self._current_rows.values()
        )

    def flush(self) -> Sequence[Record]:
        """Return all points since the last flush, and begin a millisecond."""
        self.next_millisecond()
        points, self.points = self.points, []
        columns = [column for table in self._tables for column in _flush_columns(table)]
        self._tables = []
        return Points(points, columns) if columns else points

    def _demote_row(self, kind: str) -> None:
        """Make the current row single points, which others may replace."""
        table, self._current_rows[kind] = self._current_rows.get(kind), None
        if table is not None:
            self.add_each(table.series, table.times.pop(), table.rows.pop())


def _flush_columns(table: Table) -> list[Column]:
    """Empty a table into its columns."""
    columns: list[Column] = []
    for series, values in zip(table.series, zip(*table.rows, strict=True), strict=False):  # no rows, no columns
        types = set(map(type, values))
        if types == ALL_FLOATS:
            columns.append((series, table.times, values))
        elif types == ALL_INTEGERS:
            columns.append((series, table.times, [float(value) for value in values]))
        else:
            numbers = [
                (ts, number)
                for ts, value in zip(table.times, values, strict=True)
                if (number := to_float(value)) is not None
            ]
            if numbers:
                columns.append((series, [ts for ts, _ in numbers], [number for _, number in numbers]))
    table.times, table.rows = [], []
    return columns
