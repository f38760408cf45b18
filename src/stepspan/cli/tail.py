"""`stepspan tail`: the newest events of a run's sessions, readable, merged over ranks by time."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from stepspan.cli.describe import describe, printable
from stepspan.errors import ConfigError, JournalError
from stepspan.events import FIELDS, Event
from stepspan.journal.cursor import Position
from stepspan.journal.layout import SessionPath, find_sessions, segment_name
from stepspan.journal.liveness import Closed, read_closed
from stepspan.journal.reader import JournalReader

WINDOW = 64 << 10
"""Bytes that are read from a session's end at first; four times as many whenever they hold too few lines."""
BATCH = 1 << 20
MOST_SESSIONS = 256
POLL, RESCAN = 0.25, 2.0
MOST_OPEN = 1000
EVERYTHING = Closed((1 << 62) - 1, 0, "")
"""For a reader that is to wait for nothing: what stands there is what there is."""
BRIEF = frozenset({"step_begin", "span_begin"})
QUIET = BRIEF | {"sample", "memory"}
STYLES = {"error": "bold red", "gap": "yellow", "metrics": "cyan", "run_begin": "bold", "run_end": "bold"}


class Line(NamedTuple):
    """One event as it is shown."""

    ts: int
    job: str
    rank: str
    step: str
    tag: str
    what: str


class Tail:
    """One session, read from near its end on. Raises OSError or `JournalError` where it can't be read."""

    def __init__(self, session: SessionPath) -> None:
        self.session = session
        self._reader = JournalReader(session)
        self._header = self._reader.header
        self.job = str(self._header.get("job_id", ""))
        self._begun: dict[int, Event] = {}
        self._position = Position()

    def newest(self, count: int, tags: Collection[str]) -> list[Line]:
        """The last `count` lines that are wanted."""
        window = WINDOW
        while True:
            self._begun.clear()
            self._position, whole = self._back(window)
            found = self.more(tags, closed=EVERYTHING)
            if whole or len(found) >= count:
                return found[max(0, len(found) - count) :]
            window *= 4

    def more(self, tags: Collection[str], closed: Closed | None = None) -> list[Line]:
        """The lines that are wanted among those that have come since: without `tags` all, less what only begins.

        The beginning of a step or span is told while it is open: its end says all of it again.
        """
        found: list[tuple[int, Line]] = []
        closed = closed or read_closed(self.session.path)
        while True:
            batch = self._reader.read(self._position, size=BATCH, closed=closed)
            self._position = batch.position
            lines = [(event["seq"], self._line(event)) for event in batch.events]
            found += [entry for entry in lines if not tags or entry[1].tag in tags]
            if batch.at_end or not batch.events:
                open_now = self._begun
                return [line for seq, line in found if tags or line.tag not in BRIEF or seq in open_now]

    def close(self) -> None:
        """Release the files."""
        self._reader.close()

    def _back(self, window: int) -> tuple[Position, bool]:
        """The beginning of a line about `window` bytes before the end, and whether it is the first of all."""
        for number in reversed(self.session.segments()):
            size = os.stat(self.session.path / segment_name(number), follow_symlinks=False).st_size
            if size > window:
                start = size - window
                cut = self.session.read(number, start, window).find(b"\n") + 1
                return Position(number, start + (cut or window)), False
            window -= size
        return Position(), True

    def _line(self, event: Event) -> Line:
        begin = self._begun.get(event.get("begin", 0))
        if event["tag"].endswith("_end"):
            self._begun.pop(event["begin"], None)
        step = self._step_of(begin or event)
        if event["tag"].endswith("_begin"):
            self._begun[event["seq"]] = event
            if len(self._begun) > MOST_OPEN:
                del self._begun[next(iter(self._begun))]
        role = self._header.get("role")
        return Line(
            event["ts"],
            self.job,
            f"{self.session.rank}{'.' + role if role else ''}",
            "" if step is None else str(step),
            event["tag"],
            printable(describe(event, begin)),
        )

    def _step_of(self, event: Event | None) -> Any:
        """The step that an event belongs to, None for none."""
        while event is not None:
            if "step" in event:
                return event["step"]
            event = self._begun.get(event.get("parent", 0))
        return None


class Follow:
    """All sessions at or below a path, and those that appear there."""

    def __init__(self, path: Path, rank: int | None, tags: Collection[str]) -> None:
        self._path, self._rank, self._tags = path, rank, tags
        self._tails: dict[Path, Tail] = {}
        self.passed_over = 0
        """Sessions that were not looked at because there are so many newer ones."""

    @property
    def several(self) -> bool:
        """Whether they are of more than one job."""
        return len({tail.job for tail in self._tails.values()}) > 1

    def newest(self, count: int) -> list[Line]:
        """The last lines of all sessions."""
        found: list[Line] = []
        for tail in self._open():
            found += tail.newest(count, self._tags)
        return sorted(found)[max(0, len(found) - count) :]

    def more(self, *, rescan: bool) -> list[Line]:
        """What has come since."""
        found: list[Line] = []
        for tail in self._open() if rescan else []:
            found += tail.newest(MOST_OPEN, self._tags)
        for path, tail in list(self._tails.items()):
            try:
                found += tail.more(self._tags)
            except (OSError, JournalError):  # pruned, moved or removed under us
                self._tails.pop(path).close()
        return sorted(found)

    def _open(self) -> list[Tail]:
        """The sessions that are not open yet, the newest ones."""
        found = [s for s in find_sessions(self._path) if self._rank in (None, s.rank)]
        found.sort(key=written, reverse=True)
        self.passed_over = max(0, len(found) - MOST_SESSIONS)
        opened = []
        for session in found[:MOST_SESSIONS]:
            if session.path not in self._tails:
                with contextlib.suppress(OSError, JournalError):
                    self._tails[session.path] = Tail(session)
                    opened.append(self._tails[session.path])
        return opened


def written(session: SessionPath) -> float:
    """When something was last written to a session, Unix seconds."""
    try:
        return os.stat(session.path / segment_name(session.segments()[-1])).st_mtime
    except (OSError, IndexError):
        return 0.0


def show_tail(path: Path, *, count: int, follow: bool, rank: int | None, tags: Collection[str]) -> int:
    """Print the newest lines, and go on where that is asked for. The exit code. Raises `ConfigError`."""
    unknown = [tag for tag in tags if tag not in FIELDS]
    if unknown:
        raise ConfigError("--tag", unknown[0], f"unknown; known are {', '.join(FIELDS)}")
    sessions = Follow(path, rank, frozenset(tags))
    console = Console(highlight=False)
    lines = sessions.newest(count)
    if not lines and not follow:
        which = f" of rank {rank}" if rank is not None else ""
        print(f"stepspan tail: no such line{which} at or below {path}", file=sys.stderr)
        return 2
    if sessions.passed_over:
        print(f"stepspan tail: {sessions.passed_over} sessions that were written earlier are left out", file=sys.stderr)
    try:
        job = show(console, lines, several=sessions.several)
        scanned = time.monotonic()
        while follow:
            time.sleep(POLL)
            rescan = time.monotonic() - scanned >= RESCAN
            scanned = time.monotonic() if rescan else scanned
            job = show(console, sessions.more(rescan=rescan), several=sessions.several, job=job)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    return 0


def show(console: Console, lines: Sequence[Line], *, several: bool, job: str = "") -> str:
    """Print lines: time, rank, step, what. The job of the last one; `job` is that of the line before.

    Of several jobs each has a heading in a terminal, where room is short; elsewhere each line names its own.
    """
    for line in lines:
        moment = datetime.fromtimestamp(line.ts / 1e9).isoformat(" ", "milliseconds")
        place = f"rank {line.rank:<3} {line.step:>7}  "
        if not console.is_terminal:
            print(f"{moment}  {f'{printable(line.job)}  ' if several else ''}{place}{line.what}", flush=True)
            continue
        if several and line.job != job:
            console.print(Text(printable(line.job), style="bold"), soft_wrap=True)
        job = line.job
        text = Text(f"{moment}  {place}", style="dim")
        text.append(line.what, style="dim" if line.tag in QUIET else f"not dim {STYLES.get(line.tag, '')}")
        console.print(text, no_wrap=True, overflow="ellipsis")
    return job
