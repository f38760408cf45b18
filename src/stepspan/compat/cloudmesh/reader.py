"""Reads cloudmesh's telemetry, released or ours: a JSONL file, or a SQLite database with a table `telemetry`.

A record's numbers become metrics with attribute `command`; its event, command, status and message a milestone (and a
log record, of severity ERROR where it says "failed"); what starts and completes or fails, a span. Ours say which record
ends which; a release's are paired by command, the last that started first.

Ours are one session per job and rank, a release's all one, under job id `<file>-<6 hex digits of its path>` unless one
is given. A time without a zone is local time. Records without any time get the file's, 1 µs apart in their order.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson

from stepspan.compat.cloudmesh.context import resource
from stepspan.compat.cloudmesh.files import is_database
from stepspan.compat.cloudmesh.records import Record, edge, has_failed, instant, milestone, numbers, span_name
from stepspan.compat.cloudmesh.sqlite import COLUMNS, TEXTS
from stepspan.compat.importing import Imported, Mark
from stepspan.compat.jsonl import first_row, rows, whole
from stepspan.events import Event

KNOWN = {"timestamp", "command", "status", "metrics", "system"}
"""What a release writes into each record. Ours may lack the status, but name the job."""
MOST_READ = 1 << 20


def detect(path: Path) -> str | None:
    """What a path is taken for, in words; None where it is no telemetry of cloudmesh's."""
    try:
        if not path.is_file():
            return None
        if is_database(path):
            with closing(_database(path)) as database:
                if not _columns(database) >= KNOWN:
                    return None
                count = database.execute("SELECT count(*) FROM telemetry").fetchone()[0]
            return f"a cloudmesh telemetry database of {count} records"
        row = first_row(path)
        if not (row.keys() >= KNOWN or row.keys() >= (KNOWN - {"status"}) | {"job_id", "rank"}):
            return None
        with open(path, "rb") as file:
            count = sum(block.count(b"\n") for block in iter(lambda: file.read(MOST_READ), b""))
        return f"a cloudmesh telemetry log of {count} lines"
    except (OSError, ValueError, sqlite3.Error):
        return None


def read(path: Path, *, job_id: str | None = None) -> Iterator[Imported]:
    """The sessions of a file, by their beginning. Raises ValueError naming file and line or row; OSError."""
    modified = path.stat().st_mtime_ns
    parts: dict[tuple[str, int], _Part] = {}
    for place, (where, record) in enumerate(_records(path)):
        try:
            ts = instant(record.get("timestamp"))
            part = _part_of(record, parts)
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from None
        part.records.append((modified + place * 1000 if ts is None else ts, record))
    for part in parts.values():
        part.records.sort(key=lambda entry: entry[0])
    fallback = f"{path.stem}-{blake2b(str(path.resolve()).encode(), digest_size=3).hexdigest()}"
    for (job, rank), part in sorted(parts.items(), key=lambda entry: entry[1].records[0][0]):
        yield Imported(
            "cloudmesh",
            path,
            job_id or job or fallback,
            part.records[0][0] - 1000,
            part.lines,
            key=job,
            rank=rank,
            local_rank=part.local_rank,
            world_size=max(part.world_size, rank + 1),
            host=part.host or "imported",
            status=part.status,
            resource=part.resource,
        )


@dataclass(slots=True)
class _Part:
    """One session's records in the order of their times."""

    job: str
    name: str
    resource: dict[str, Any]
    host: str
    local_rank: int
    world_size: int
    records: list[tuple[int, Record]] = field(default_factory=list)

    def lines(self) -> Iterator[tuple[int, Event, Mark | None]]:
        """The events. What is open at the end stays so: it was interrupted."""
        run, begun = Mark(), _Begun()
        about = {"name": self.name, "group": None, "tags": [], "attempt": [0, 0]}
        yield self.records[0][0] - 1000, _event("run_begin", parent=0, **about), run
        for ts, record in self.records:
            values = numbers(record)
            if values:
                labels = {"attributes": {"command": str(record["command"])}} if record.get("command") else {}
                yield ts, _event("metrics", split="train", **labels, metrics=values), None
            told, step = milestone(record), edge(record)
            name, status, attributes = told or ("", None, {})
            span = begun.add(record) if step == "begin" else begun.take(record) if step == "end" else None
            if span is not None and step == "begin":
                yield ts, _event("span_begin", parent=run.seq, name=span_name(record), attributes=attributes), span
            if told:
                state = {} if status is None else {"status": status}
                parent = run.seq if span is None else span.seq
                yield ts, _event("event", parent=parent, name=name, **state, attributes=attributes), None
            if span is not None and step == "end":
                ended = {"status": "failed"} if has_failed(record) else {}
                yield ts, _event("span_end", begin=span.seq, **ended), span
        yield self.records[-1][0], _event("run_end", begin=run.seq, status=self.status), run

    @property
    def status(self) -> str:
        """How it ended, by the last record that says so. A release's log is of many runs: it has just ended."""
        if not self.job:
            return "completed"
        last = next((record for _, record in reversed(self.records) if edge(record) == "end"), {})
        return "failed" if has_failed(last) else "completed"


class _Begun:
    """What has started, and not ended."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], list[Mark]] = {}

    def add(self, record: Record) -> Mark:
        mark = Mark()
        self._open.setdefault(self._key(record), []).append(mark)
        return mark

    def take(self, record: Record) -> Mark | None:
        marks = self._open.get(self._key(record))
        return marks.pop() if marks else None

    def _key(self, record: Record) -> tuple[str, str]:
        return ("span", str(record["span"])) if record.get("span") else (str(record.get("command")), span_name(record))


def _event(tag: str, **fields: Any) -> Event:
    return {"ts": 0, "seq": 0, "tag": tag, **fields}


def _part_of(record: Record, parts: dict[tuple[str, int], _Part]) -> _Part:
    """The session that a record belongs to. What only the first record says is taken out of the others."""
    if not record.keys() & {"command", "timestamp"}:
        raise ValueError("no record of cloudmesh's: neither command nor timestamp")
    for name in ("metrics", "attributes", "system", "user"):
        if not isinstance(record.get(name), (dict, type(None))):
            raise ValueError(f"{name} is no object")
    rank, job = record.get("rank"), record.get("job_id")
    if rank is not None and whole(rank) is None:
        raise ValueError(f"rank {rank!r:.80} is no rank")
    if not isinstance(job, (str, type(None))):
        raise ValueError(f"job_id {job!r:.80} is no text")
    key = job or "", whole(rank) or 0
    if key not in parts:
        host = (record.get("system") or {}).get("host")
        sizes = whole(record.get("local_rank")) or 0, whole(record.get("world_size")) or 1
        name = str(record.get("command") or "telemetry")
        parts[key] = _Part(key[0], name, resource(record), host if isinstance(host, str) else "", *sizes)
    record.pop("system", None)
    record.pop("user", None)
    return parts[key]


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    """(line or row, record) in the order of the file."""
    if not is_database(path):
        for number, row in rows(path):
            yield f"line {number}", row
        return
    try:
        with closing(_database(path)) as database:
            known = [name for name in COLUMNS if name in _columns(database)]
            if not {*known} >= KNOWN:
                raise ValueError(f"{path}: a database without cloudmesh's table telemetry")
            for number, *values in database.execute(f"SELECT id, {', '.join(known)} FROM telemetry ORDER BY id"):
                record = {name: value for name, value in zip(known, values, strict=True) if value is not None}
                for name in TEXTS:
                    if name in record:
                        record[name] = _parsed(f"{path}, row {number}: {name}", record[name])
                yield f"row {number}", record
    except sqlite3.Error as error:
        raise ValueError(f"{path}: {error}") from None


def _parsed(where: str, text: Any) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _database(path: Path) -> sqlite3.Connection:
    """A database to read only. Raises sqlite3.Error."""
    uri = f"file:{quote(str(path.resolve()))}?mode=ro"
    try:
        database = sqlite3.connect(uri, uri=True)
        try:
            database.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.Error:
            database.close()
            raise
    except sqlite3.OperationalError:  # a log in WAL mode, where we may not make the files that go with it
        database = sqlite3.connect(f"{uri}&immutable=1", uri=True)
    return database


def _columns(database: sqlite3.Connection) -> set[str]:
    return {row[1] for row in database.execute("PRAGMA table_info(telemetry)")}
