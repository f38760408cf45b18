"""The SQLite backend: cloudmesh's own table, with our columns at its end, and next to it every number by itself.

    telemetry (id, timestamp, command, status, metrics, system, message,
               event, attributes, span, user, job_id, rank, local_rank, world_size)
    points    (job_id, metric, ts, rank, value, record)   -- ts in Unix ns; value NULL for NaN; record: telemetry.id

The first seven columns are those of cloudmesh's release, JSON texts in `metrics` and `system`: its programs go on
reading the table, and writing it. A database that they began gets our columns when it is first written; points exist of
the records that were written here.

Metric X over time for run Y is one range of the primary key of `points`, and its answer comes in order:

    SELECT ts, rank, value FROM points WHERE job_id = 'Y' AND metric = 'X' ORDER BY ts;
    SELECT datetime(ts / 1000000000, 'unixepoch'), value FROM points
     WHERE job_id = 'Y' AND metric = 'X' AND ts >= 1760000000000000000 ORDER BY ts;
    SELECT DISTINCT metric FROM points WHERE job_id = 'Y';
    SELECT timestamp, event, status, message FROM telemetry WHERE job_id = 'Y' ORDER BY timestamp;

WAL: readers never wait for a writer, and writers wait up to `BUSY_TIMEOUT_S` for each other. A record is one
transaction; it survives the death of the process, but not a power failure.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import orjson

from stepspan.compat.cloudmesh.files import FILE_MODE, file_path, is_database
from stepspan.compat.cloudmesh.records import instant, numbers
from stepspan.compat.row_writer import open_append
from stepspan.conversion import json_value
from stepspan.errors import ConfigError

BUSY_TIMEOUT_S = 10.0
COLUMNS = {
    **dict.fromkeys(("timestamp", "command", "status", "metrics", "system", "message"), "TEXT"),
    **dict.fromkeys(("event", "attributes", "span", "user", "job_id"), "TEXT"),
    **dict.fromkeys(("rank", "local_rank", "world_size"), "INTEGER"),
}
"""Column -> its type: a release's six first, then those that stepspan adds."""
JSON_COLUMNS = ("metrics", "system", "attributes", "user")
INSERT = f"INSERT INTO telemetry ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
DEFINITIONS = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
SCHEMA = (
    f"CREATE TABLE IF NOT EXISTS telemetry (id INTEGER PRIMARY KEY AUTOINCREMENT, {DEFINITIONS})",
    """CREATE TABLE IF NOT EXISTS points (
        job_id TEXT NOT NULL, metric TEXT NOT NULL, ts INTEGER NOT NULL, rank INTEGER NOT NULL, value REAL,
        record INTEGER NOT NULL REFERENCES telemetry (id), PRIMARY KEY (job_id, metric, ts, rank, record)
    ) WITHOUT ROWID""",
)
INDEXES = (
    "CREATE INDEX IF NOT EXISTS telemetry_by_job ON telemetry (job_id, timestamp)",
    "CREATE INDEX IF NOT EXISTS telemetry_by_time ON telemetry (timestamp)",
)
_of_parents: list[sqlite3.Connection] = []
"""Connections of a forked child's parent, which the child may not even close."""


class SqliteBackend:
    """Records and their numbers in a database that any number of threads and processes may write."""

    def __init__(self, path: object = None) -> None:
        self.path = file_path(path, "telemetry.db")
        if self.path.exists() and self.path.stat().st_size and not is_database(self.path):
            raise ConfigError("path", str(path), "this is not a SQLite database: name another path, or a new file")
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._busy = False
        self._pending: deque[tuple[list[Any], list[tuple[Any, ...]]]] = deque()
        self._connection: sqlite3.Connection | None = None
        self._finalizer: Any = None

    def emit(self, record: Mapping[str, Any]) -> None:
        """Insert a record and its points. Raises sqlite3.Error, OSError."""
        texts = {
            key: orjson.dumps(json_value(record[key])).decode() for key in JSON_COLUMNS if record.get(key) is not None
        }
        row = [json_value(texts.get(name, record.get(name))) for name in COLUMNS]
        ts, job, rank = instant(record["timestamp"]), record["job_id"], record["rank"]
        values = [(job, json_value(key), ts, rank, float(value)) for key, value in numbers(record).items()]
        if self._pid != os.getpid():
            self._after_fork()
        with self._lock:
            self._pending.append((row, values))
            if self._busy:  # this thread is in here already: a signal handler emits
                return
            self._busy = True
            try:
                while self._pending:
                    self._insert(*self._pending.popleft())
            finally:
                self._busy = False

    def close(self) -> None:
        """Close the database; the next record opens it again."""
        with self._lock:
            if self._finalizer is not None and self._pid == os.getpid():
                self._finalizer()
                self._connection = None

    def _after_fork(self) -> None:
        if self._connection is not None:
            self._finalizer.detach()
            _of_parents.append(self._connection)
        self._lock, self._pid, self._busy, self._connection = threading.RLock(), os.getpid(), False, None
        self._pending.clear()

    def _insert(self, row: list[Any], values: list[tuple[Any, ...]]) -> None:
        connection = self._open()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            number = connection.execute(INSERT, row).lastrowid
            connection.executemany("INSERT INTO points VALUES (?, ?, ?, ?, ?, ?)", [(*v, number) for v in values])

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            os.close(open_append(self.path, mode=FILE_MODE))  # SQLite would create it for all to read
            connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self._finalizer = weakref.finalize(self, connection.close)
        return self._connection


def _prepare(connection: sqlite3.Connection) -> None:
    """WAL, and whatever is missing of the schema. Several processes may be here at once."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                break  # a file system without shared memory: it works, slower
        except sqlite3.OperationalError:  # changing it does not wait for others as all else does
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = NORMAL")
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            connection.execute(statement)
        known = column_names(connection)
        for name, kind in COLUMNS.items():
            if name not in known:
                connection.execute(f"ALTER TABLE telemetry ADD COLUMN {name} {kind}")
        for statement in INDEXES:
            connection.execute(statement)


def column_names(connection: sqlite3.Connection) -> set[str]:
    """The columns of the table `telemetry`; none where there is no such table."""
    return {row[1] for row in connection.execute("PRAGMA table_info(telemetry)")}
