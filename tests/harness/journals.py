"""Journals for tests: written by the real writer under a clock of the test, or laid down line by line."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from stepspan.events import SCHEMA, Event
from stepspan.journal.cursor import CursorState, Position, read_cursor
from stepspan.journal.disk import Disk, Limits
from stepspan.journal.format import decode, encode
from stepspan.journal.journal import Journal
from stepspan.journal.layout import SessionPath, segment_name, session_name
from stepspan.journal.liveness import Closed, read_closed
from stepspan.journal.reader import EventBatch, JournalReader
from stepspan.journal.writer import SessionWriter
from stepspan.reading.sessions import read_batches

NOON = 1_795_262_400_000_000_000  # 2026-11-21 12:00:00 UTC
SECOND, MILLISECOND = 1_000_000_000, 1_000_000
SESSION = "0123456789abcdef"
ROOMY = Limits(free_bytes=0, free_ratio=0.0)
"""Limits that don't depend on how full this machine's disk is."""
RUN = {"parent": 0, "name": "demo", "group": None, "tags": [], "attempt": [0, 0]}
"""What a `run_begin` event says of a run that says nothing of itself."""


class HandClock:
    """Noon, and a microsecond later with every look; `skip` moves it by hand."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> int:
        self.now += 1000
        return self.now

    def skip(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)


def header(session: str = SESSION, **fields: Any) -> Event:
    """The header of every session that a test builds, whether it is written by the real writer (`open_writer`,
    `delivery.Training`), laid down byte by byte (`lay_down`) or never written (`events_of.SessionEvents`)."""
    return {
        "ts": 0,
        "seq": 0,
        "tag": "header",
        "schema": SCHEMA,
        "session": session,
        "run_key": "job/0.0/0",
        "job_id": "job",
        "rank": 0,
        "world_size": 1,
        "role": "",
        "started": NOON,
        "boot_id": "boot",
        "pid": 1,
        "host": "node",
        "resource": {"service.name": "training"},
        **fields,
    }


def metrics(number: int, **fields: Any) -> Event:
    return {"ts": 0, "seq": 0, "tag": "metrics", "split": "train", "metrics": {"n": number}, **fields}


class OpenJournal(Journal):
    """A journal whose session is open, seen as that session."""

    def __init__(self, place: Path, about: Event, **arguments: Any) -> None:
        upkeep = arguments.pop("upkeep", None)
        super().__init__(place, **arguments)
        self.upkeep = upkeep
        self.open(lambda: about, job_id="job", host="node")

    @property
    def writer(self) -> SessionWriter:
        assert self.session is not None
        return self.session

    @property
    def path(self) -> Path:
        return self.writer.path

    @property
    def seq(self) -> int:
        return self.writer.seq

    @property
    def lost(self) -> int:
        return self.writer.lost

    @property
    def error(self) -> OSError | None:
        return self.writer.error

    def forget(self) -> None:
        self.writer.forget()


def open_writer(
    place: Path, *, limits: Limits = ROOMY, clock: HandClock | None = None, disk: Disk | None = None, **fields: Any
) -> OpenJournal:
    return OpenJournal(place, header(**fields), limits=limits, clock=clock or HandClock(), disk=disk)


def lay_down(place: Path, *segments: Iterable[Event | bytes], session: str = SESSION) -> SessionPath:
    """A session of exactly these segments: events, numbered and timed if they are not, and raw bytes.

    Each segment gets a header line of its own unless it begins with one or with bytes.
    """
    path = place / session_name(0, "", session)
    path.mkdir(parents=True)
    seq, ts = 0, NOON
    for number, content in enumerate(segments, 1):
        items = list(content)
        if not items or not (isinstance(items[0], bytes) or items[0]["tag"] == "header"):
            items.insert(0, header(session))
        with open(path / segment_name(number), "wb") as file:
            for item in items:
                if not isinstance(item, bytes):
                    seq, ts = item["seq"] or seq + 1, item["ts"] or ts + MILLISECOND
                    item = encode({**item, "ts": ts, "seq": seq})
                file.write(item)
    found = SessionPath.of(path)
    assert found is not None
    return found


def session_of(path: Path) -> SessionPath:
    found = SessionPath.of(path)
    assert found is not None
    return found


def closed_of(path: Path) -> Closed:
    """How a session was closed; fails where it was not."""
    found = read_closed(path)
    assert found is not None
    return found


def cursor_of(file: Path) -> CursorState:
    """What a cursor's file says; fails where there is none."""
    found = read_cursor(file)
    assert found is not None
    return found


def lines(path: Path) -> list[Event]:
    """Every line of a session; fails on one that is damaged or torn."""
    found = []
    for number in session_of(path).segments():
        raw = (path / segment_name(number)).read_bytes()
        assert raw.endswith(b"\n")
        found += [decode(line) for line in raw[:-1].split(b"\n")]
    return found


def logged(events: Iterable[Event]) -> list[int]:
    """The numbers that `metrics` events carry, in order."""
    return [event["metrics"]["n"] for event in events if event["tag"] == "metrics"]


def batches(reader: JournalReader, *, size: int = 1 << 18, closed: Closed | None = None) -> Iterator[EventBatch]:
    """All batches of a session, up to its end."""
    for batch in read_batches(reader, Position(), closed=closed, size=size):
        yield batch
    assert batch.at_end, "no progress"


class Scope:
    seq = ts = 0


class FaultyDisk(Disk):
    """A disk with room for `space` more bytes in segments (None: any), that then fails with `code`.

    Counts what was synced: the numbers of the files and directories, by inode.
    """

    def __init__(self, code: int = errno.ENOSPC) -> None:
        super().__init__()
        self.write_keeping_gil: Any = lambda fd, data, _: self.write(fd, data)
        self.space: int | None = None
        self.code = code
        self.is_low = False
        self.synced: list[int] = []

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override] # a method in place of a builtin
        if self.space is None:
            return os.write(fd, data)
        if not self.space:
            raise OSError(self.code, os.strerror(self.code))
        written = os.write(fd, data[: self.space])
        self.space -= written
        return written

    def sync(self, fd: int) -> None:
        self.synced.append(os.fstat(fd).st_ino)

    def free_and_size(self, fd: int) -> tuple[int, int]:
        os.fstat(fd)
        return -1 if self.is_low else 1 << 40, 1 << 50


def log(writer: Journal, numbers: range) -> None:
    for number in numbers:
        writer.append(metrics(number))


def assert_ordered(events: list[Event]) -> None:
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert all(a["ts"] < b["ts"] for a, b in pairwise(events))


class Interrupting:
    """A clock that is interrupted by a signal in the middle of a write, at its n-th look."""

    def __init__(self, looks: set[int]) -> None:
        self.clock, self.looks, self.count = HandClock(), looks, 0

    def __call__(self) -> int:
        self.count += 1
        if self.count in self.looks:
            signal.raise_signal(signal.SIGUSR1)
        return self.clock()


@contextmanager
def handled(number: int, handler: Callable[..., Any]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def small_file_system(place: Path, size: str) -> Iterator[Path]:
    """A file system that can really be full or read-only; skips the test where none can be mounted."""
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """Take all the room of a file system, with a file that may be removed."""
    ballast = place / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast
