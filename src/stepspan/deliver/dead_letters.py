"""Dead letters: the records that a receiver refused for good, kept beside the journal, and sending them again.

    <session>/rejected.jsonl   one line a record: {"destination", "signal", "why", "request"}

`why` has the receiver's words, `request` is the record as a whole OTLP JSON request, so that it can be sent over any
protocol, by any version. A line that is something else stays where it is.

Deliverers of several destinations append, each under the file's flock. Who removes lines writes the rest to a new file
and puts it in the place of the old one, under the same flock; who waited for that sees that the file is another one
now, and opens it anew. So a crash leaves the old file or the new one, and no line is lost; an append that it cuts
leaves a torn line, after which the next append begins a new one. A record may stand there twice: letters are appended
before the cursor moves.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import Cursor, cursor_name
from stepspan.journal.layout import open_path, read_file, replace_file
from stepspan.mapping.records import SIGNALS, Attributes, Record, Signal
from stepspan.otlp import json as otlp_json
from stepspan.otlp.outcome import Verdict

NAME = "rejected.jsonl"
ANSWERED = frozenset({Verdict.DELIVERED, Verdict.ISOLATE, Verdict.HALVE})
"""The letter was taken, or is refused; another one may be taken."""
MAX_FAILURES = 3


def append(
    directory: Path, destination: str, signal: Signal, resource: Attributes, rejected: Sequence[tuple[Record, str]]
) -> None:
    """Keep records that were refused.

    Args:
        directory: The session's directory, or the one that keeps its cursors.
        destination: Where they were refused.
        signal: What they are.
        resource: The session's resource attributes.
        rejected: Each record with the receiver's words.

    Raises:
        OSError: They cannot be kept.

    """
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
    with _locked(directory / NAME, os.O_CREAT) as fd:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":  # a crash cut the last line
            lines = b"\n" + lines
        while lines:
            lines = lines[os.write(fd, lines) :]


def resend(directory: Path, exporter: OtlpExporter) -> tuple[int, int]:
    """Send an exporter's dead letters again, one by one.

    Those that are accepted are removed, and the ledger counts them as delivered. A receiver that does not answer, or
    needs a person, `MAX_FAILURES` times in a row is not asked about the rest of that signal; once may be the letter's
    fault. The caller holds the destination's `DeliveryLock`, so
    that nobody else moves its cursors.

    Args:
        directory: The session's directory, or the one that keeps its cursors.
        exporter: Sends them; letters of other destinations stay.

    Returns:
        How many were accepted, and how many are still there.

    Raises:
        OSError: The file of dead letters or a cursor cannot be written.

    """
    accepted: dict[bytes, Signal] = {}
    kept = 0
    failures: Counter[str] = Counter()
    for line in dict.fromkeys((read_file(directory / NAME) or b"").split(b"\n")):
        letter = _parse(line)
        if letter is None or letter["destination"] not in (exporter.destination, exporter.address):
            continue
        signal = letter["signal"]
        if failures[signal] < MAX_FAILURES and signal in exporter.signals:
            outcome = exporter.send_json(signal, orjson.dumps(letter["request"]))
            failures[signal] = 0 if outcome.verdict in ANSWERED else failures[signal] + 1
            if outcome.verdict is Verdict.DELIVERED and not outcome.rejected:
                accepted[line] = signal
                continue
        kept += 1
    if accepted:
        _remove(directory / NAME, accepted.keys())
        for name in (exporter.destination, exporter.address):
            if _count_delivered(directory, name, list(accepted.values())):
                break
    return len(accepted), kept


def _parse(line: bytes) -> dict[str, Any] | None:
    """A dead letter; None for what is none, which stays where it is."""
    try:
        letter = orjson.loads(line)
        if letter["signal"] in SIGNALS and isinstance(letter["request"], dict) and "destination" in letter:
            return dict(letter)
    except (ValueError, TypeError, KeyError):
        pass
    return None


def _count_delivered(directory: Path, destination: str, signals: Sequence[Signal]) -> bool:
    """Move records, of these signals, from rejected to delivered in the ledgers. Whether there are any."""
    paths = {signal: directory / "cursors" / cursor_name(destination, signal) for signal in set(signals)}
    found = {signal: path for signal, path in paths.items() if path.exists()}
    for signal, path in found.items():
        with closing(Cursor(path)) as cursor:
            state = cursor.state
            moved = min(signals.count(signal), state.ledger.rejected)
            if moved:
                delivered, rejected = state.ledger.delivered + moved, state.ledger.rejected - moved
                cursor.write(replace(state, ledger=replace(state.ledger, delivered=delivered, rejected=rejected)))
    return bool(found)


def _remove(path: Path, lines: Iterable[bytes]) -> None:
    """Remove lines from the file."""
    gone = frozenset(lines)
    with _locked(path) as fd:
        content = os.pread(fd, os.fstat(fd).st_size, 0)
        left = b"".join(line for line in content.splitlines(keepends=True) if line.rstrip(b"\n") not in gone)
        if left:
            replace_file(path, left, sync=True)
        else:
            path.unlink()


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[int]:
    """The descriptor of the file that has the name while its flock is held here. OSError."""
    while True:
        fd = open_path(path, os.O_RDWR | os.O_APPEND | flags)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_current(fd, path):
                yield fd
                return
        finally:
            os.close(fd)


def _is_current(fd: int, path: Path) -> bool:
    """Whether the file that is open here is still the one that has the name."""
    with suppress(FileNotFoundError):
        named, opened = path.lstat(), os.fstat(fd)
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
    return False
