"""Reads cloudmesh's telemetry, released or ours: a JSONL file, or a SQLite database with a table `telemetry`.

A record's numbers become metrics with attribute `command`; its event, command, status and message an event (and a log
record, of severity ERROR where the status is a failure's); what starts and completes or fails, a span. Ours say which
record ends which; a release's are paired by command, the last that started first.

Ours are one session per job and rank, a release's all one, under job id `<file>-<6 hex digits of its path>` unless one
is given. A time without a zone is local time. Records without any time get the file's, 1 µs apart in their order.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import orjson

from stepspan.compat.cloudmesh.context import resource
from stepspan.compat.cloudmesh.files import is_database
from stepspan.compat.cloudmesh.records import Record, edge, has_failed, instant, milestone, numbers, span_name
from stepspan.compat.cloudmesh.sqlite import COLUMNS, JSON_COLUMNS, column_names
from stepspan.compat.importing import BeginLine, ImportedSession, Line, default_job_id, event
from stepspan.compat.rows import NS_PER_US, first_row, read_rows, row_index
from stepspan.errors import RecordError, short_repr

RELEASED_FIELDS = {"timestamp", "command", "status", "metrics", "system"}
"""What a release writes into each record. Ours may lack the status, but name the job."""
BLOCK_BYTES = 1 << 20


def detect(path: Path) -> str | None:
    """What a path is taken for, in words; None where it is not telemetry of cloudmesh. Never raises."""
    try:
        if not path.is_file():
            return None
        if is_database(path):
            with closing(_connect(path)) as database:
                if not column_names(database) >= RELEASED_FIELDS:
                    return None
                count = database.execute("SELECT count(*) FROM telemetry").fetchone()[0]
            return f"a cloudmesh telemetry database of {count} records"
        fields = first_row(path).keys()
        if not (fields >= RELEASED_FIELDS or fields >= (RELEASED_FIELDS - {"status"}) | {"job_id", "rank"}):
            return None
        with open(path, "rb") as file:
            count = sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK_BYTES), b""))
        return f"a cloudmesh telemetry log of {count} lines"
    except (OSError, ValueError, sqlite3.Error):
        return None


def read_sessions(path: Path, *, job_id: str | None = None) -> Iterator[ImportedSession]:
    """The sessions of a file.

    Args:
        path: The JSONL file or database.
        job_id: The run's id for all of them; what the records say where None.

    Yields:
        The sessions, by their beginning.

    Raises:
        RecordError: A record is not one of cloudmesh; it names file and line or row.
        OSError: The file cannot be read.

    """
    modified = path.stat().st_mtime_ns
    sessions: dict[tuple[str, int], _Session] = {}
    for index, (where, record) in enumerate(_records(path)):
        try:
            ts = instant(record.get("timestamp"))
            session = _session_of(record, sessions)
        except RecordError as error:
            raise error.at(f"{path}, {where}") from None
        session.records.append((modified + index * NS_PER_US if ts is None else ts, record))
    for session in sessions.values():
        session.records.sort(key=lambda entry: entry[0])
    for session in sorted(sessions.values(), key=lambda each: each.records[0][0]):
        first = session.first
        host = (first.get("system") or {}).get("host")
        yield ImportedSession(
            "cloudmesh",
            path,
            job_id=job_id or session.job or default_job_id(path, path.stem),
            name=str(first.get("command") or "telemetry"),
            started=session.records[0][0] - NS_PER_US,
            ended=session.records[-1][0],
            lines=session.lines,
            key=session.job,
            rank=session.rank,
            local_rank=row_index(first.get("local_rank")) or 0,
            world_size=max(row_index(first.get("world_size")) or 1, session.rank + 1),
            host=host if isinstance(host, str) and host else "imported",
            status=session.status,
            resource=resource(first),
        )


@dataclass(slots=True)
class _Session:
    """One session's records in the order of their times, and the first of them with the machine and the user."""

    job: str
    rank: int
    first: Record
    records: list[tuple[int, Record]] = field(default_factory=list)

    def lines(self, run: BeginLine) -> Iterator[Line]:
        """The events. What is open at the end stays so: it was interrupted."""
        open_spans: dict[tuple[str, str], list[BeginLine]] = {}
        for ts, record in self.records:
            metrics = numbers(record)
            if metrics:
                labels = {"attributes": {"command": str(record["command"])}} if record.get("command") else {}
                yield ts, event("metrics", split="train", **labels, metrics=metrics), None
            reported, end = milestone(record), edge(record)
            name, status, attributes = reported or ("", None, {})
            begun = open_spans.setdefault(_pairing_key(record), []) if end else []
            if end == "begin":
                begun.append(BeginLine())
                fields = {"parent": run.seq, "name": span_name(record), "attributes": attributes}
                yield ts, event("span_begin", **fields), begun[-1]
            span = begun[-1] if begun else None
            if reported:
                state = {} if status is None else {"status": status}
                parent = run.seq if span is None else span.seq
                yield ts, event("event", parent=parent, name=name, **state, attributes=attributes), None
            if end == "end" and span is not None:
                begun.pop()
                outcome = {"status": "failed"} if has_failed(record) else {}
                yield ts, event("span_end", begin=0, **outcome), span

    @property
    def status(self) -> str:
        """How it ended, by the last record of an end. A release's log is of many runs: it counts as completed."""
        if not self.job:
            return "completed"
        last = next((record for _, record in reversed(self.records) if edge(record) == "end"), {})
        return "failed" if has_failed(last) else "completed"


def _pairing_key(record: Record) -> tuple[str, str]:
    """What the record of a span's begin and that of its end have in common."""
    return ("span", str(record["span"])) if record.get("span") else (str(record.get("command")), span_name(record))


def _session_of(record: Record, sessions: dict[tuple[str, int], _Session]) -> _Session:
    """The session that a record belongs to. What only the first record says is taken out of the others."""
    if not record.keys() & {"command", "timestamp"}:
        raise RecordError("not a record of cloudmesh: neither command nor timestamp", "command", "timestamp")
    for name in ("metrics", "attributes", "system", "user"):
        if not isinstance(record.get(name), (dict, type(None))):
            raise RecordError(f"{name}={short_repr(record[name])} is not an object", name)
    rank, job = record.get("rank"), record.get("job_id")
    if rank is not None and row_index(rank) is None:
        raise RecordError(f"rank={short_repr(rank)} is not a whole number from 0", "rank")
    if not isinstance(job, (str, type(None))):
        raise RecordError(f"job_id={short_repr(job)} is not a text", "job_id")
    key = job or "", row_index(rank) or 0
    if key not in sessions:
        sessions[key] = _Session(*key, first=record.copy())
    record.pop("system", None)
    record.pop("user", None)
    return sessions[key]


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    """(line or row, record) in the order of the file."""
    if not is_database(path):
        for number, row in read_rows(path):
            yield f"line {number}", row
        return
    try:
        with closing(_connect(path)) as database:
            found = column_names(database)
            known = [name for name in COLUMNS if name in found]
            if not {*known} >= RELEASED_FIELDS:
                raise RecordError("a database without cloudmesh's table telemetry", where=str(path))
            for number, *values in database.execute(f"SELECT id, {', '.join(known)} FROM telemetry ORDER BY id"):
                where = f"row {number}"
                record = {name: value for name, value in zip(known, values, strict=True) if value is not None}
                for name in [name for name in JSON_COLUMNS if name in record]:
                    try:
                        record[name] = orjson.loads(record[name])
                    except ValueError as error:
                        raise RecordError(f"{name} is not JSON: {error}", name, where=f"{path}, {where}") from None
                yield where, record
    except sqlite3.Error as error:
        raise RecordError(str(error), where=str(path)) from None


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that only reads. Raises sqlite3.Error."""
    uri = f"file:{quote(str(path.resolve()))}?mode=ro"
    database = sqlite3.connect(uri, uri=True)
    try:
        database.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error:  # a log in WAL mode, where we may not make the files that go with it
        database.close()
        database = sqlite3.connect(f"{uri}&immutable=1", uri=True)
    return database
