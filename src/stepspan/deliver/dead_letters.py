"""Dead letters: the records that a receiver refused for good, kept beside the journal, and sending them again.

`rejected.jsonl` holds one line a record: `destination`, `signal`, `why` (the receiver's words) and `request`, the
record as a whole OTLP JSON request. Deliverers of several destinations append to it, each under the file's flock. Who
removes lines writes the rest to a new file and puts it in the place of the old one, under the same flock; who waited
for that sees that the file is another one now, and opens it anew. So a crash leaves either file, and no line is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from stepspan.journal.cursor import Cursor, cursor_name
from stepspan.journal.layout import open_directory, open_file, read_file
from stepspan.mapping.records import SIGNALS, Attributes, Record, Signal
from stepspan.otlp import json as otlp_json
from stepspan.otlp.outcome import Verdict

if TYPE_CHECKING:
    from stepspan.exporters.otlp import OtlpExporter

NAME = "rejected.jsonl"
REFUSED = frozenset({Verdict.ISOLATE, Verdict.HALVE})
"""This record is refused; another one may be taken."""


def append(
    home: Path, destination: str, signal: Signal, resource: Attributes, rejected: Sequence[tuple[Record, str]]
) -> None:
    """Keep records of one session with the reason why each was refused. OSError."""
    lines = b"".join(
        orjson.dumps(
            {
                "destination": destination,
                "signal": signal,
                "why": why,
                "request": orjson.Fragment(otlp_json.encode(signal, resource, [record])),
            }
        )
        + b"\n"
        for record, why in rejected
    )
    with _locked(home, os.O_CREAT) as (_, fd):
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":  # a crash cut the last line
            lines = b"\n" + lines
        while lines:
            lines = lines[os.write(fd, lines) :]


def resend(home: Path, exporter: OtlpExporter) -> tuple[int, int]:
    """Send the dead letters below `home` that are the exporter's again, one by one: (taken, still there).

    Those that are taken are removed, and the ledger counts them as delivered. A receiver that does not answer, or wants
    a person, is not asked about the rest of that signal. The caller holds the lock of the destination, so that nobody
    else moves its cursors. OSError.
    """
    taken: dict[bytes, Signal] = {}
    kept = 0
    stopped: set[str] = set()
    for line in dict.fromkeys((read_file(home / NAME) or b"").split(b"\n")):
        letter = _read(line)
        if letter is None or letter["destination"] != exporter.destination:
            continue
        signal = letter["signal"]
        if signal not in stopped and signal in exporter.signals:
            outcome = exporter.send_json(signal, orjson.dumps(letter["request"]))
            if outcome.verdict is Verdict.DELIVERED and not outcome.rejected:
                taken[line] = signal
                continue
            if outcome.verdict is not Verdict.DELIVERED and outcome.verdict not in REFUSED:
                stopped.add(signal)
        kept += 1
    if taken:
        _remove(home, taken.keys())
        _count(home, exporter.destination, list(taken.values()))
    return len(taken), kept


def _read(line: bytes) -> dict[str, Any] | None:
    """A dead letter; None for what is none, which stays where it is."""
    try:
        letter = orjson.loads(line)
        if letter["signal"] in SIGNALS and isinstance(letter["request"], dict) and "destination" in letter:
            return dict(letter)
    except (ValueError, TypeError, KeyError):
        pass
    return None


def _count(home: Path, destination: str, signals: Sequence[Signal]) -> None:
    """Move what was taken from rejected to delivered."""
    for signal in set(signals):
        path = home / "cursors" / cursor_name(destination, signal)
        if not path.exists():
            continue
        cursor = Cursor(path)
        try:
            state = cursor.state
            moved = min(signals.count(signal), state.ledger.rejected)
            if not moved:
                continue
            delivered, rejected = state.ledger.delivered + moved, state.ledger.rejected - moved
            cursor.write(replace(state, ledger=replace(state.ledger, delivered=delivered, rejected=rejected)))
        finally:
            cursor.close()


def _remove(home: Path, lines: Iterable[bytes]) -> None:
    """Take lines out of the file."""
    gone = frozenset(lines)
    with _locked(home) as (directory, fd):
        content = os.pread(fd, os.fstat(fd).st_size, 0)
        left = b"".join(line for line in content.splitlines(keepends=True) if line.rstrip(b"\n") not in gone)
        if not left:
            os.unlink(NAME, dir_fd=directory)
            return
        draft = f".{NAME}.{os.getpid()}"
        with open(open_file(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, dir_fd=directory), "wb") as file:
            file.write(left)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, NAME, src_dir_fd=directory, dst_dir_fd=directory)


@contextlib.contextmanager
def _locked(home: Path, flags: int = 0) -> Iterator[tuple[int, int]]:
    """The descriptors of the directory and of the file that has the name while we hold its flock."""
    directory = open_directory(home)
    fd = -1
    try:
        while True:
            fd = open_file(NAME, os.O_RDWR | os.O_APPEND | flags, dir_fd=directory)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if _same(fd, directory):
                    break
            os.close(fd)
            fd = -1
        yield directory, fd
    finally:
        if fd >= 0:
            os.close(fd)
        os.close(directory)


def _same(fd: int, directory: int) -> bool:
    there, ours = os.stat(NAME, dir_fd=directory, follow_symlinks=False), os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
