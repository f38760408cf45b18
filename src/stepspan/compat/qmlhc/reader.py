"""Reads the rows that qmlhc's logger, or ours, wrote: each file is one session.

Rows that go back in time are moved up to the row before them. A step or epoch without an end row ends, interrupted,
with the last row before what begins next. A file that ends with an error is a run that failed; one that ends inside a
step or epoch is a run that was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stepspan.compat.importing import BeginLine, ImportedSession, Line, default_job_id, event
from stepspan.compat.rows import NS_PER_US, first_row, read_rows, row_index, row_numbers, unix_ns
from stepspan.errors import RecordError, short_repr
from stepspan.events import Event

COUNTED = {"step_begin": "step", "step_end": "step", "epoch_begin": "epoch", "epoch_end": "epoch"}
"""Tag -> the field that says which step or epoch."""
TAGS = frozenset({*COUNTED, "error"})
INNERMOST_FIRST = {"step": ("step",), "epoch": ("step", "epoch")}
"""Scope -> itself, and what may be open inside it."""


def detect(path: Path) -> str | None:
    """What a path is taken for, in words; None where it is not telemetry of qmlhc. Never raises."""
    row = first_row(path)
    if unix_ns(row.get("ts")) is None or "crc" in row or "seq" in row:
        return None
    tag = row.get("tag")
    if not isinstance(tag, str) or tag not in TAGS:
        return None
    expected = {"ts", "tag", *(("type", "message") if tag == "error" else (COUNTED[tag],))}
    if tag.endswith("_end"):
        expected.add("context")
    return f"qmlhc telemetry that begins with {tag}" if row.keys() == expected else None


def read_sessions(path: Path, *, job_id: str | None = None) -> Iterator[ImportedSession]:
    """The one session of a telemetry file.

    Args:
        path: The file.
        job_id: The run's id; the file's name and a hash of its path where None.

    Yields:
        The session, failed, interrupted or completed as the file ends.

    Raises:
        RecordError: The file has no rows, or a row that is not one of qmlhc; it names file and line.
        OSError: The file cannot be read.

    """
    first = last = 0
    unended: set[str] = set()
    failed = False
    for ts, row in _timed_rows(path):
        first, last = first or ts, ts
        scope, _, edge = row["tag"].partition("_")
        failed = scope == "error"
        if edge == "begin":
            unended.add(scope)
        elif edge == "end":
            unended.difference_update(INNERMOST_FIRST[scope])
    if not first:
        raise RecordError("no rows", where=str(path))
    status = "failed" if failed else "interrupted" if unended else "completed"
    job = job_id or default_job_id(path, path.stem)
    started = first - NS_PER_US

    def lines(run: BeginLine) -> Iterator[Line]:
        return _Translation(run, started).lines(path, last, "error" if failed else "interrupted")

    yield ImportedSession("qmlhc", path, job, job, started, last, lines, status=status)


def _timed_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows in the order of the file, with their times in Unix ns, which never go back."""
    last = 0
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        ts, tag = unix_ns(row.get("ts")), row.get("tag")
        if ts is None:
            raise RecordError(f"ts={short_repr(row.get('ts'))} is not a time in Unix seconds", "ts", where=where)
        if not isinstance(tag, str) or tag not in TAGS:
            raise RecordError(f"tag={short_repr(tag)} is not one of {', '.join(sorted(TAGS))}", "tag", where=where)
        field = COUNTED.get(tag)
        if field and row_index(row.get(field)) is None:
            given = short_repr(row.get(field))
            raise RecordError(f"{tag}: {field}={given} is not a whole number from 0", field, where=where)
        last = max(ts, last)
        yield last, row


class _Translation:
    """Turns the rows of a file into events."""

    def __init__(self, run: BeginLine, started: int) -> None:
        self._run = run
        self._open: dict[str, BeginLine] = {}
        """What is open: "step", "epoch", both or neither."""
        self._epoch: int | None = None
        self._last_step = (-1, -1)
        """Epoch and step of the last step that began."""
        self._lap = 0
        self._before = started
        """The time of the row before."""

    def lines(self, path: Path, last: int, left_open: str) -> Iterator[Line]:
        """All events; `left_open` is the status of a step or epoch that the file ends in, at `last`."""
        for ts, row in _timed_rows(path):
            scope, _, edge = row["tag"].partition("_")
            if scope == "error":
                fields = {"type": str(row.get("type")), "message": str(row.get("message"))}
                yield ts, event("error", parent=self._parent(), **fields, stack="", attributes={}), None
            elif edge == "begin":
                yield from self._end(INNERMOST_FIRST[scope], self._before, status="interrupted")
                begin = self._begin_event(scope, row_index(row[scope]) or 0)
                self._open[scope] = BeginLine()
                yield ts, begin, self._open[scope]
            else:
                yield from self._end(INNERMOST_FIRST[scope][:-1], self._before, status="interrupted")
                if metrics := _metrics(row.get("context")):
                    number = row_index(row["step"]) if scope == "step" else self._last_step[1]
                    of_step = {} if number == -1 else {"step": number}  # the step in force, as of a run
                    yield ts, event("metrics", split="train", **of_step, metrics=metrics), None
                yield from self._end((scope,), ts)
                if scope == "epoch":
                    self._epoch = None
            self._before = ts
        yield from self._end(INNERMOST_FIRST["epoch"], last, status=left_open)

    def _begin_event(self, scope: str, index: int) -> Event:
        parent = self._parent()
        if scope == "epoch":
            self._epoch = index
            return event("epoch_begin", parent=parent, epoch=index)
        current = (-1 if self._epoch is None else self._epoch, index)
        self._lap += current <= self._last_step  # as a run counts its laps
        self._last_step = current
        begin = event("step_begin", parent=parent, step=index, split="train")
        if self._epoch is not None:
            begin["epoch"] = self._epoch
        if self._lap:
            begin["lap"] = self._lap
        return begin

    def _end(self, scopes: Iterable[str], ts: int, **fields: Any) -> Iterator[Line]:
        for scope in scopes:
            if scope in self._open:
                yield ts, event(f"{scope}_end", begin=0, **fields), self._open.pop(scope)

    def _parent(self) -> int:
        return (self._open.get("step") or self._open.get("epoch") or self._run).seq


def _metrics(context: Any) -> dict[str, float | str]:
    """The numbers of a context, as `RunCallback` takes them."""
    if not isinstance(context, dict):
        return {}
    return row_numbers({key: value for key, value in context.items() if not isinstance(value, bool)})
