"""Where a mapper gathers the points of a batch, such that of several of a series in one millisecond the last remains.

What always comes together (the keys of one `log_metrics` call, the times of a step) is laid into a table, a row each
time: that costs a tenth of what single points do, and a table's columns are what encoders want.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stepspan.mapping.columns import Column, Points
from stepspan.mapping.records import Point, Record, SdkRecord, Series
from stepspan.mapping.values import number

FLOAT, INT = {float}, {int}


@dataclass(slots=True, eq=False)
class Table:
    """Gauges whose points come together, no two of one series: a time (Unix ns) and a value for each, row by row."""

    series: Sequence[Series]
    times: list[int] = field(default_factory=list)
    rows: list[Sequence[Any]] = field(default_factory=list)
    """Numbers as the journal holds them; what is none is left out."""


class PointBuffer:
    """The points of one batch. Tables of one `kind` may share series, those of different kinds never do."""

    def __init__(self) -> None:
        self.filtered = 0
        self.singles: list[Point | SdkRecord] = []
        self._used: list[Table] = []
        self._now: dict[Series, int] = {}
        """Series -> the index of its single point of this millisecond."""
        self._laid: dict[str, Table | None] = {}
        """Kind -> the table whose last row is of this millisecond; None once that has been taken up again."""

    def next_millisecond(self) -> None:
        """What comes now shares no millisecond with what came before."""
        if self._now:
            self._now.clear()
        self._laid.clear()

    def lay(self, kind: str, table: Table, ts: int, row: Sequence[Any]) -> None:
        """A row of points."""
        if kind in self._laid or (self._now and not self._now.keys().isdisjoint(table.series)):
            self._take_up(kind)
            self.put_row(table.series, ts, row)
            return
        self._laid[kind] = table
        if not table.rows:
            self._used.append(table)
        table.times.append(ts)
        table.rows.append(row)

    def put_row(self, series: Sequence[Series], ts: int, row: Sequence[Any]) -> None:
        """Points that come together this time."""
        for one, value in zip(series, row, strict=True):
            known = number(value)
            if known is not None:
                self.put(one, ts, known)

    def put(self, series: Series, ts: int, value: Any) -> None:
        """One point."""
        for kind, table in self._laid.items():
            if table is not None and series in table.series:
                self._take_up(kind)
                break
        known = self._now.get(series)
        if known is None:
            self._now[series] = len(self.singles)
            self.singles.append((series, ts, value))
        else:
            self.singles[known] = (series, ts, value)
            self.filtered += 1

    def holds(self, series: Series) -> bool:
        """Whether it has a point of this millisecond."""
        return series in self._now or any(
            table is not None and series in table.series and table.rows[-1][table.series.index(series)] is not None
            for table in self._laid.values()
        )

    def take(self) -> Sequence[Record]:
        """All points since the last time."""
        self.next_millisecond()
        singles, self.singles = self.singles, []
        columns = [column for table in self._used for column in _columns(table)]
        self._used = []
        return Points(singles, columns) if columns else singles

    def _take_up(self, kind: str) -> None:
        """Make the last row single points, which others may replace."""
        table, self._laid[kind] = self._laid.get(kind), None
        if table is not None:
            self.put_row(table.series, table.times.pop(), table.rows.pop())


def _columns(table: Table) -> list[Column]:
    """A table's columns; the table is empty afterwards."""
    found: list[Column] = []
    for series, values in zip(table.series, zip(*table.rows, strict=True), strict=False):  # no rows, no columns
        kinds = set(map(type, values))
        if kinds == FLOAT:
            found.append((series, table.times, values))
        elif kinds == INT:
            found.append((series, table.times, [float(value) for value in values]))
        else:
            known = [(ts, n) for ts, value in zip(table.times, values, strict=True) if (n := number(value)) is not None]
            if known:
                found.append((series, [ts for ts, _ in known], [value for _, value in known]))
    table.times, table.rows = [], []
    return found
