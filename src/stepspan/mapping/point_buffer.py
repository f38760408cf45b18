"""Where a mapper buffers points until they go out, such that each series has at most one in a millisecond.

Why at most one: Prometheus keeps times in milliseconds, and refuses a second value of a series for a time it has.

**Rows.** What comes together (the values of one call, the times of one step) is a row of a `Table`, and keeps one time.
Calls that lie less than a millisecond apart are other data, and nothing replaces anything: a row takes the first
millisecond, not before its line's own, in which none of its series has a point, or a later one. Rows of one step may
share a point of the step's number. That is a function of the lines alone, so it does not depend on batches. A row is a
tenth of the work of as many single points, and a table's columns are what encoders want.

**Thinning.** A row runs at most `MAX_LEAD_MS` ahead of its line. Beyond that the newest row of each table waits, and
what it replaces counts as `thinned`. A row that waits goes out, before anything later of its series, once there is
room, or at the end: a curve never loses its last value.

**Holding back.** Rows that were placed later than the last event wait in their tables for their time to come, so that
requests follow one another in time: Prometheus stamps its own `target_info` with the times of each request, and without
an out-of-order window it refuses one that goes back behind the request before. So does all that follows a value which a
device still computes, for up to `MAX_MISSING_NS`.

**Single points** repeat what stepspan knows (an epoch, an ETA, a count of errors, a sample): of several of a series in
one millisecond the last goes out, and the others count as `filtered`.

Nothing lies before `not_before`, the end of what the instance's session before this one may have sent: rows begin
there, and the last single point of each series before it goes out then.

The order of calls: `next_millisecond` before the first point of each millisecond, `add` and the timelines' `add_row` as
the events come, `flush` at the end of a batch, which is between two milliseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from stepspan.events import MILLISECOND_NS, SECOND_NS
from stepspan.mapping.columns import Column, Points
from stepspan.mapping.records import (
    MAX_LEAD_MS,
    MAX_WAITING,
    Exemplar,
    Histogram,
    Point,
    Record,
    SdkRecord,
    Series,
    Sum,
)
from stepspan.values import json_number, to_float

ALL_FLOATS, ALL_INTEGERS = {float}, {int}
NUMBERS = ALL_FLOATS | ALL_INTEGERS
STEP_NUMBER = "training.step.number"
MAX_TABLES = 1000
MAX_MISSING_NS = 10 * SECOND_NS
"""How long what follows a missing value is held back for it; a GPU is hardly ever that far behind."""
MAX_RESERVED = 16_384
"""Rows whose missing values may still come."""
WAITS, THINNED = 0, -1
"""In place of a row's time: it has none yet, and it will have none."""


@dataclass(slots=True, eq=False)
class Table:
    """Gauges whose points come together, no two of one series.

    Attributes:
        series: n series; those of step numbers come last.
        times: Of each row, Unix ns, ascending by the millisecond.
        rows: n values each, as the journal holds them; what is no number is left out when the table is flushed.

    """

    series: tuple[Series, ...]
    times: list[int] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    values: tuple[Series, ...] = field(init=False)
    """Those of `series` that are no step numbers."""
    step_numbers: tuple[tuple[int, Series], ...] = field(init=False)
    """Those that are, with their places in `series`."""

    def __post_init__(self) -> None:
        self.values = tuple(series for series in self.series if series.name != STEP_NUMBER)
        self.step_numbers = tuple(enumerate(self.series))[len(self.values) :]


@dataclass(slots=True)
class Reserved:
    """A row some of whose values are missing, and may come later.

    Attributes:
        line: The time of its line, Unix ns.
        time: The row's time, Unix ns; `WAITS` or `THINNED`.

    """

    line: int
    time: int


@dataclass(slots=True)
class WaitingRow:
    """A row that has no place yet.

    Attributes:
        table: Whose row it is.
        line: The millisecond of its line.
        row: Its values.
        key: By which its missing values come; 0: none is missing.

    """

    table: Table
    line: int
    row: list[Any]
    key: int


class PointBuffer:
    """The points of one session that have not gone out.

    Args:
        not_before: The first time that a point may have, Unix ns.

    Attributes:
        metrics: Timeline of what users log.
        steps: Timeline of the times of steps.
        spans: Timeline of the times of phases.
        filtered: Single points that gave way to a later one, since the beginning of the session.
        thinned: Points of rows that gave way to a later row, since the beginning of the session.
        points: Single points of this batch. What needs no look at the current millisecond may be appended to it.
        reserved: The key of a row -> what is known of it, for the values that are missing in it.
        current_points: Series -> the index of its single point of the current millisecond. Where there are none, and no
            row waits, `next_millisecond` has nothing to do.
        are_waiting: Whether any row waits for a place.

    """

    def __init__(self, not_before: int = 0) -> None:
        self.not_before = -(-not_before // MILLISECOND_NS) * MILLISECOND_NS
        self.filtered = self.thinned = 0
        self.points: list[Point | SdkRecord] = []
        self.reserved: dict[int, Reserved] = {}
        self.metrics, self.steps, self.spans = self.timelines = tuple(Timeline(self) for _ in range(3))
        self._tables: dict[tuple[Series, ...], Table] = {}
        self._used: list[Table] = []
        """Tables that have rows."""
        self.current_points: dict[Series, int] = {}
        self._late: dict[Series, Table] = {}
        """Of each series the values that were missing in their rows."""
        self._displaced: dict[Series, int] = {}
        """Series -> the time up to which no missing value may have its row's time any more, Unix ns."""
        self.are_waiting = False
        self._early: dict[Series, Any] = {}
        """Series -> the value of its last single point before `not_before`."""

    def table(self, series: Sequence[Series]) -> Table:
        """The table of these series, which are all different; those of step numbers come last."""
        key = tuple(series)
        table = self._tables.get(key)
        if table is None:
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            table = self._tables[key] = Table(key)
        return table

    def next_millisecond(self, ts: int) -> None:
        """Begin the millisecond of `ts` (Unix ns): what comes now shares none with what came before."""
        if self.current_points:
            self.current_points.clear()
        if self.are_waiting:
            for timeline in self.timelines:
                timeline.place_waiting(ts // MILLISECOND_NS + MAX_LEAD_MS)
            self.are_waiting = any(timeline.waiting for timeline in self.timelines)

    def add(self, series: Series, ts: int, value: Any) -> None:
        """Add a single point of the current millisecond, at `ts` (Unix ns); it replaces the series' one there."""
        if ts < self.not_before:
            if series in self._early:
                self.filtered += 1
                value = _in_place_of(self._early[series], value)
            self._early[series] = value
            return
        if self._early:
            self._add_early(ts)
        index = self.current_points.get(series)
        if index is None:
            self.current_points[series] = len(self.points)
            self.points.append((series, ts, value))
        else:
            self.points[index] = (series, ts, _in_place_of(self.points[index][2], value))
            self.filtered += 1

    def reserved_row(self, call: int | None, line: int) -> int:
        """The key of a row of `metrics`, in which values are missing.

        Args:
            call: The `seq` of its line; None in journals of schema 1.0, which have no more than its time.
            line: The time of its line, Unix ns.

        Returns:
            The key; 0 where that row is not known: its line lies in another session, say.

        """
        if call is None:
            return next((key for key, row in self.reserved.items() if row.line == line), 0)
        return call if call in self.reserved and self.reserved[call].line == line else 0

    def add_late(self, key: int, series: Series, value: Any, ts: int) -> None:
        """Add a value that was missing in a row, at the row's time; a row that waits or was thinned keeps its fate.

        Args:
            key: Of the row.
            series: Which of its values.
            value: What it is; no number is no value.
            ts: The time of the line that has it, Unix ns.

        """
        time = self.reserved[key].time
        if time == WAITS:
            for timeline in self.timelines:
                timeline.fill_waiting(key, series, value)
        elif time == THINNED:
            self.thinned += to_float(value) is not None
        elif time <= self._displaced.get(series, 0):
            self.metrics.add_row(self.table([series]), ts, [value])
        else:
            if len(self._late) >= MAX_TABLES:
                self._late.clear()
            self._append(self._late.setdefault(series, Table((series,))), time, [value])

    def add_stray(self, series: Sequence[Series], ts: int, row: list[Any]) -> None:
        """Add values that were missing in a row which is not known, as a row of their own; as `Timeline.add_row`."""
        self.metrics.add_row(self.table(series), ts, row)
        self._displaced.update(dict.fromkeys(series, self.metrics.free_from))

    def place_all(self) -> int:
        """Place all that waits, at the end of a session. The end of the last row's millisecond, Unix ns."""
        for timeline in self.timelines:
            timeline.place_waiting(None)
        return max(timeline.free_from for timeline in self.timelines)

    def flush(self, until: int, now: int | None = None) -> Sequence[Record]:
        """Take points, and begin a millisecond.

        Args:
            until: The time before which they lie, Unix ns.
            now: The present, Unix ns: what follows a value that is missing now is held back for it. None: nothing is.

        Returns:
            The points. Those of the user's times and of an SDK are never held back.

        """
        missing: list[int] = []
        if now is not None and self.reserved:
            reserved = self.reserved.values()
            missing = [row.time for row in reserved if row.time > 0 and now - row.line <= MAX_MISSING_NS]
        if missing:
            until = min(until, min(missing) // MILLISECOND_NS * MILLISECOND_NS)
        if self._early and until > self.not_before:
            self._add_early(until)
        self.current_points.clear()
        points, self.points = self.points, []
        if missing:
            self.points = [point for point in points if type(point) is tuple and point[1] >= until]
            points = [point for point in points if type(point) is not tuple or point[1] < until]
        columns: list[Column] = []
        used, self._used = self._used, []
        for table in used:
            times, rows = table.times, table.rows
            if times[-1] < until:
                table.times, table.rows = [], []
            else:
                cut = bisect_left(times, until)
                table.times, table.rows = times[cut:], rows[cut:]
                times, rows = times[:cut], rows[:cut]
                self._used.append(table)
            columns += _columns(table.series, times, rows)
        return Points(points, columns) if columns else points

    def held_until(self) -> int:
        """The time of the last point that is held back, Unix ns; 0: none is."""
        return max([*(table.times[-1] for table in self._used), *(point[1] for point in self.points)], default=0)

    def state(self, index: Mapping[Series, int], now: int) -> dict[str, Any]:
        """What is carried on, as JSON: only of series that are ahead of the last event.

        Args:
            index: A series -> the number that stands for it.
            now: The millisecond of the last event, Unix ns.

        """
        return {
            "filtered": self.filtered,
            "thinned": self.thinned,
            "reserved": [[key, row.line, row.time] for key, row in self.reserved.items()],
            "timelines": [timeline.state(index, now // MILLISECOND_NS) for timeline in self.timelines],
            "held": [[[index[s] for s in t.series], t.times, list(map(_to_json, t.rows))] for t in self._used],
            "points": [[index[series], ts, _fields(value)] for series, ts, value in cast("list[Point]", self.points)],
            "displaced": [[index[series], ts] for series, ts in self._displaced.items()],
            "early": [[index[series], _fields(value)] for series, value in self._early.items()],
        }

    def restore(self, state: dict[str, Any], series: Sequence[Series]) -> None:
        """Go on from what `state` returned; `series`: by the numbers that stand for them."""
        self.filtered, self.thinned = state["filtered"], state["thinned"]
        self.reserved = {key: Reserved(line, time) for key, line, time in state["reserved"]}
        for timeline, content in zip(self.timelines, state["timelines"], strict=True):
            timeline.restore(content, series)
        for indices, times, rows in state["held"]:
            self._used.append(Table(tuple(series[index] for index in indices), times, rows))
        self._displaced = {series[index]: ts for index, ts in state["displaced"]}
        self._early = {series[index]: _value(*fields) for index, fields in state["early"]}
        self.points = [(series[index], ts, _value(*fields)) for index, ts, fields in state["points"]]

    def _append(self, table: Table, ts: int, row: list[Any]) -> None:
        if not table.times:
            self._used.append(table)
        table.times.append(ts)
        table.rows.append(row)

    def _add_early(self, ts: int) -> None:
        """Add the points that came before `not_before`; `ts`: of what comes next."""
        early, self._early = self._early, {}
        for series, value in early.items():
            self.current_points[series] = len(self.points)
            self.points.append((series, self.not_before, value))
        if ts - self.not_before >= MILLISECOND_NS:
            self.current_points.clear()


class Timeline:
    """Places the rows of tables that may share series; no two timelines have a series in common.

    Usually lines lie apart, and a row is where its line is: that costs one comparison. Which series has a point where
    is looked up from the second row of a millisecond on, and while rows run ahead.

    Args:
        buffer: Whose timeline it is.

    Attributes:
        free_from: The end of the last millisecond that has a row, Unix ns: from here on nothing can meet a row.
        waiting: The rows that have no place yet, by their series, in the order of their lines.

    """

    def __init__(self, buffer: PointBuffer) -> None:
        self._buffer = buffer
        self.free_from = self._not_before = buffer.not_before
        self.waiting: dict[tuple[Series, ...], WaitingRow] = {}
        self._last: dict[Series, int] = {}
        """Series -> the last millisecond in which it has a point; all that have one in or after the current one."""
        self._step_numbers: dict[Series, Any] = {}
        """The number of the step that a series of those has there."""
        self._newest: tuple[Table, list[Any]] | None = None
        """The row that was placed without a look at `_last`, which does not have it yet."""

    def add_row(self, table: Table, ts: int, row: list[Any], key: int = 0) -> None:
        """Add a point of each of a table's series.

        Args:
            table: Of the buffer.
            ts: The time of their line, Unix ns.
            row: A value for each series; what is no number is no point, but keeps its place.
            key: By which `PointBuffer.add_late` knows the row, if a value of it is missing.

        """
        if ts < self.free_from or self.waiting:
            self._add_colliding(table, ts, row, key)
        else:
            self.free_from = ts - ts % MILLISECOND_NS + MILLISECOND_NS
            self._newest = table, row
            if self._last:
                self._last.clear()
            times = table.times
            if not times:
                self._buffer._used.append(table)
            times.append(ts)
            table.rows.append(row)
        if key:
            self._reserve(key, table, ts)

    def place_waiting(self, limit: int | None) -> None:
        """Place the rows that wait, in the order of their lines, as far as there is room.

        Args:
            limit: The last millisecond that a row may have; None: any.

        """
        if limit is not None:
            limit = max(limit, self._not_before // MILLISECOND_NS + MAX_LEAD_MS)
        blocked: set[Series] = set()
        for series, waiting in list(self.waiting.items()):
            millisecond = self._first_free(waiting.table, waiting.row, waiting.line)
            if limit is not None and (millisecond > limit or not blocked.isdisjoint(series)):
                blocked.update(series)
                continue
            del self.waiting[series]
            self._insert(waiting.table, millisecond, millisecond * MILLISECOND_NS, waiting.row)
            if waiting.key in self._buffer.reserved:
                self._buffer.reserved[waiting.key].time = millisecond * MILLISECOND_NS

    def fill_waiting(self, key: int, series: Series, value: Any) -> None:
        """Give a row that waits a value that was missing in it."""
        for waiting in self.waiting.values():
            if waiting.key == key:
                waiting.row[waiting.table.series.index(series)] = value

    def state(self, index: Mapping[Series, int], now: int) -> dict[str, Any]:
        """What is carried on, as JSON; `now`: the millisecond of the last event."""
        ahead, rows = {s: last for s, last in self._last.items() if last > now}, self.waiting.values()
        return {
            "last": [[index[series], last, self._step_numbers.get(series)] for series, last in ahead.items()],
            "free_from": self.free_from,
            "waiting": [[[index[s] for s in r.table.series], r.line, _to_json(r.row), r.key] for r in rows],
        }

    def restore(self, state: dict[str, Any], series: Sequence[Series]) -> None:
        """Go on from what `state` returned; `series`: by the numbers that stand for them."""
        self._last = {series[index]: last for index, last, _ in state["last"]}
        self._step_numbers = {series[index]: value for index, _, value in state["last"] if value is not None}
        self.free_from = state["free_from"]
        for indices, *rest in state["waiting"]:
            table = self._buffer.table([series[index] for index in indices])
            self.waiting[table.series] = WaitingRow(table, *rest)
            self._buffer.are_waiting = True

    def _add_colliding(self, table: Table, ts: int, row: list[Any], key: int) -> None:
        """Add a row whose series may have points in the millisecond of its line or later."""
        if self._newest is not None:
            self._note(*self._newest, self.free_from // MILLISECOND_NS - 1)
            self._newest = None
        line = max(ts, self._not_before) // MILLISECOND_NS
        if not self._must_wait(table):
            millisecond = self._first_free(table, row, line)
            if millisecond <= line + MAX_LEAD_MS:
                unmoved = millisecond == ts // MILLISECOND_NS
                self._insert(table, millisecond, ts if unmoved else millisecond * MILLISECOND_NS, row)
                return
        before = self.waiting.pop(table.series, None)
        if before is None and len(self.waiting) >= MAX_WAITING:
            before = self.waiting.pop(next(iter(self.waiting)))
        if before is not None:
            self._thin(before)
        self.waiting[table.series] = WaitingRow(table, line, row, key)
        self._buffer.are_waiting = True

    def _must_wait(self, table: Table) -> bool:
        """Whether a row of a table would overtake one that waits."""
        if not self.waiting or table.series in self.waiting:
            return bool(self.waiting)
        series = set(table.series)
        return not all(series.isdisjoint(waiting) for waiting in self.waiting)

    def _first_free(self, table: Table, row: list[Any], millisecond: int) -> int:
        """The first millisecond, not before this one, that a row may have."""
        last_of = self._last.get
        for series in table.values:
            last = last_of(series, 0)
            if last >= millisecond:
                millisecond = last + 1
        for index, series in table.step_numbers:
            last = last_of(series, 0)
            if last >= millisecond:
                millisecond = last if self._step_numbers[series] == row[index] else last + 1
        return millisecond

    def _insert(self, table: Table, millisecond: int, ts: int, row: list[Any]) -> None:
        """Put a row where `_first_free` said."""
        shared = [index for index, series in table.step_numbers if self._last.get(series) == millisecond]
        self._note(table, row, millisecond)
        if shared:  # there is a point with this number
            row = row.copy()
            for index in shared:
                row[index] = None
        end = (millisecond + 1) * MILLISECOND_NS
        if end > self.free_from:
            self.free_from = end
        self._buffer._append(table, ts, row)

    def _note(self, table: Table, row: list[Any], millisecond: int) -> None:
        """Keep in mind where a row's series have their last points."""
        self._last.update(dict.fromkeys(table.series, millisecond))
        for index, series in table.step_numbers:
            self._step_numbers[series] = row[index]

    def _thin(self, waiting: WaitingRow) -> None:
        """Give up a row that waits, for a later one."""
        buffer = self._buffer
        buffer.thinned += sum(type(value) in NUMBERS or to_float(value) is not None for value in waiting.row)
        if waiting.key in buffer.reserved:
            buffer.reserved[waiting.key].time = THINNED

    def _reserve(self, key: int, table: Table, line: int) -> None:
        """Keep a row in mind whose missing values may still come."""
        waiting, reserved = self.waiting.get(table.series), self._buffer.reserved
        waits = waiting is not None and waiting.key == key
        if len(reserved) >= MAX_RESERVED:
            del reserved[next(iter(reserved))]
        reserved[key] = Reserved(line, WAITS if waits else table.times[-1])


def _in_place_of(before: Any, now: Any) -> Any:
    """The value that goes out in place of another one of its series: what was recent there is so here."""
    if type(now) is not Histogram or type(before) is not Histogram or before.recent is None:
        return now
    recent = before.recent if now.recent is None else (*before.recent, *now.recent)
    return replace(now, recent=(min(recent), max(recent)))


def _fields(value: float | Sum | Histogram | None) -> list[Any]:
    """The value of a single point as JSON: its kind, and its fields."""
    if isinstance(value, Sum):
        return ["sum", value.start, *_to_json([value.value])]
    if isinstance(value, Histogram):
        exemplars = [[e.time, e.value, e.trace_id.hex(), e.span_id.hex()] for e in value.exemplars]
        return ["histogram", {**{f.name: getattr(value, f.name) for f in fields(value)}, "exemplars": exemplars}]
    return ["gauge", *_to_json([value])]


def _value(kind: str, *of_kind: Any) -> float | Sum | Histogram | None:
    """The value that has these fields."""
    if kind == "sum":
        return Sum(of_kind[0], float(of_kind[1]))
    if kind == "histogram":
        exemplars = tuple(
            Exemplar(time, value, bytes.fromhex(trace_id), bytes.fromhex(span_id))
            for time, value, trace_id, span_id in of_kind[0]["exemplars"]
        )
        recent, bounds = of_kind[0]["recent"], tuple(of_kind[0]["bounds"])
        return Histogram(**{**of_kind[0], "exemplars": exemplars, "bounds": bounds, "recent": recent and tuple(recent)})
    return to_float(of_kind[0])


def _to_json(values: Iterable[Any]) -> list[Any]:
    return [json_number(value) if type(value) is float else value for value in values]


def _columns(series: Iterable[Series], times: list[int], rows: list[list[Any]]) -> list[Column]:
    """Transpose a table's rows: for each series its times and numbers, without what is no number."""
    columns: list[Column] = []
    for one, values in zip(series, zip(*rows, strict=True), strict=False):  # no rows, no columns
        types = set(map(type, values))
        if types == ALL_FLOATS:
            columns.append((one, times, values))
        elif types == ALL_INTEGERS:
            columns.append((one, times, [float(value) for value in values]))
        else:
            numbers = [
                (ts, number) for ts, value in zip(times, values, strict=True) if (number := to_float(value)) is not None
            ]
            if numbers:
                columns.append((one, [ts for ts, _ in numbers], [number for _, number in numbers]))
    return columns
