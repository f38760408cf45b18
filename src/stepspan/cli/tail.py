"""`stepspan tail`: the newest events of a run's sessions as lines, merged over ranks by time."""

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

from stepspan.cli.event_text import event_text, printable
from stepspan.cli.terminal import print_line, rank_label
from stepspan.errors import ConfigError, JournalError
from stepspan.events import TAGS, Event
from stepspan.journal.cursor import Position
from stepspan.journal.layout import SessionPath, find_sessions, segment_name
from stepspan.journal.liveness import Closed, read_closed
from stepspan.journal.reader import JournalReader
from stepspan.mapping.clock import EventTime
from stepspan.reading.sessions import ALL_LINES, read_batches

WINDOW_BYTES = 64 << 10
"""What is read from a session's end at first; four times as much whenever it holds too few lines."""
MAX_SESSIONS = 256
MAX_OPEN_SCOPES = 1000
POLL_INTERVAL_S = 0.25
RESCAN_INTERVAL_S = 2.0
"""Between looks for sessions that have appeared."""
SHOWN_WHILE_OPEN = frozenset({"step_begin", "span_begin"})
DIM_TAGS = SHOWN_WHILE_OPEN | {"sample", "memory"}
STYLES = {
    "error": "bold red",
    "gap": "yellow",
    "clock": "yellow",
    "metrics": "cyan",
    "run_begin": "bold",
    "run_end": "bold",
}


class TailLine(NamedTuple):
    """One event as it is shown."""

    ts: int
    job: str
    rank: str
    step: str
    tag: str
    text: str


class Tail:
    """One session, read from near its end on. Raises OSError or `JournalError` if it cannot be read."""

    def __init__(self, session: SessionPath) -> None:
        self.session = session
        self._reader = JournalReader(session)
        header = self._reader.header
        self.job = str(header.get("job_id", ""))
        self._rank = rank_label(session.rank, str(header.get("role", "")))
        self._begun: dict[int, Event] = {}
        self._time = EventTime()
        self._position = Position()

    def newest(self, count: int, tags: Collection[str]) -> list[TailLine]:
        """The last `count` lines; with `tags` only those of these kinds."""
        window = WINDOW_BYTES
        while True:
            self._begun.clear()
            self._time = EventTime()
            self._position, at_beginning = self._seek_back(window)
            lines = self.read_on(tags, closed=ALL_LINES)
            if at_beginning or len(lines) >= count:
                return lines[max(0, len(lines) - count) :]
            window *= 4

    def read_on(self, tags: Collection[str], closed: Closed | None = None) -> list[TailLine]:
        """The lines that have come since: of these kinds, or without `tags` all but the begin lines of what has ended.

        The end line of a step or span says all that its begin line said.
        """
        lines: list[tuple[int, TailLine]] = []
        for batch in read_batches(self._reader, self._position, closed=closed or read_closed(self.session.path)):
            self._position = batch.position
            for event in batch.events:
                line = self._line(event)
                if not tags or line.tag in tags:
                    lines.append((event["seq"], line))
        return [line for seq, line in lines if tags or line.tag not in SHOWN_WHILE_OPEN or seq in self._begun]

    def close(self) -> None:
        """Close the session's files."""
        self._reader.close()

    def _seek_back(self, window: int) -> tuple[Position, bool]:
        """The beginning of a line about `window` bytes before the end, and whether it is the first of all."""
        for number in reversed(self.session.segments()):
            size = os.stat(self.session.path / segment_name(number), follow_symlinks=False).st_size
            if size > window:
                start = size - window
                line_start = self.session.read(number, start, window).find(b"\n") + 1
                return Position(number, start + (line_start or window)), False
            window -= size
        return Position(), True

    def _line(self, event: Event) -> TailLine:
        begin = self._begun.get(event.get("begin", 0))
        if event["tag"].endswith("_end"):
            self._begun.pop(event["begin"], None)
        step = self._step_of(begin or event)
        if event["tag"].endswith("_begin"):
            self._begun[event["seq"]] = event
            if len(self._begun) > MAX_OPEN_SCOPES:
                del self._begun[next(iter(self._begun))]
        if event["tag"] == "clock":
            self._time.set(event)
        elif begin is not None and self._time.corrections:
            ended: int = event["ended"] if "ended" in event else event["ts"]
            begin = {**begin, "ts": ended - self._time.elapsed(begin["ts"], ended)}
        text = printable(event_text(event, begin))
        return TailLine(event["ts"], self.job, self._rank, "" if step is None else str(step), event["tag"], text)

    def _step_of(self, event: Event | None) -> Any:
        """The number of the step that an event belongs to; None for none."""
        while event is not None:
            step = event.get("own_step", event.get("step"))
            if step is not None:
                return step
            event = self._begun.get(event.get("parent", 0))
        return None


class Follow:
    """All sessions at or below a path, and those that appear there; the newest `MAX_SESSIONS` of them."""

    def __init__(self, path: Path, rank: int | None, tags: Collection[str]) -> None:
        self._path, self._rank, self._tags = path, rank, tags
        self._tails: dict[Path, Tail] = {}
        self.skipped = 0
        """Sessions that are left out because so many have been written since."""

    @property
    def several_jobs(self) -> bool:
        """Whether the sessions belong to more than one job."""
        return len({tail.job for tail in self._tails.values()}) > 1

    def newest(self, count: int) -> list[TailLine]:
        """The last lines of all sessions together."""
        lines = sorted(line for tail in self._open() for line in tail.newest(count, self._tags))
        return lines[max(0, len(lines) - count) :]

    def read_on(self, *, rescan: bool) -> list[TailLine]:
        """What has come since; with `rescan` also of sessions that have appeared."""
        lines = [line for tail in (self._open() if rescan else ()) for line in tail.newest(MAX_OPEN_SCOPES, self._tags)]
        for path, tail in list(self._tails.items()):
            try:
                lines += tail.read_on(self._tags)
            except (OSError, JournalError):  # it was pruned, moved or removed
                self._tails.pop(path).close()
        return sorted(lines)

    def _open(self) -> list[Tail]:
        """Open the sessions that are not open yet."""
        sessions = [session for session in find_sessions(self._path) if self._rank in (None, session.rank)]
        sessions.sort(key=_written_at, reverse=True)
        self.skipped = max(0, len(sessions) - MAX_SESSIONS)
        opened = []
        for session in sessions[:MAX_SESSIONS]:
            if session.path not in self._tails:
                with contextlib.suppress(OSError, JournalError):
                    self._tails[session.path] = Tail(session)
                    opened.append(self._tails[session.path])
        return opened


def _written_at(session: SessionPath) -> float:
    """When a session was last written to, Unix seconds."""
    try:
        return os.stat(session.path / segment_name(session.segments()[-1])).st_mtime
    except (OSError, IndexError):
        return 0.0


def show_tail(path: Path, *, count: int, follow: bool, rank: int | None, tags: Collection[str]) -> None:
    """Print the newest lines, and with `follow` those that come. Raises `ConfigError`; `JournalError` without any."""
    unknown = [tag for tag in tags if tag not in TAGS]
    if unknown:
        raise ConfigError("--tag", unknown[0], f"unknown; known are {', '.join(TAGS)}")
    sessions = Follow(path, rank, frozenset(tags))
    console = Console(highlight=False)
    lines = sessions.newest(count)
    if not lines and not follow:
        of_rank = f" of rank {rank}" if rank is not None else ""
        raise JournalError(f"no such line{of_rank} at or below {path}")
    if sessions.skipped:
        print(f"stepspan: {sessions.skipped} sessions that were written earlier are left out", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        job = show(console, lines, several_jobs=sessions.several_jobs)
        scanned_at = time.monotonic()
        while follow:
            time.sleep(POLL_INTERVAL_S)
            rescan = time.monotonic() - scanned_at >= RESCAN_INTERVAL_S
            scanned_at = time.monotonic() if rescan else scanned_at
            job = show(console, sessions.read_on(rescan=rescan), several_jobs=sessions.several_jobs, job=job)


def show(console: Console, lines: Sequence[TailLine], *, several_jobs: bool, job: str = "") -> str:
    """Print lines: time, rank, step, what happened.

    Of several jobs each has a heading in a terminal, where lines are short; elsewhere each line names its own.

    Args:
        console: The terminal, or what else standard output is.
        lines: The lines, in order.
        several_jobs: Whether to name jobs.
        job: The job of the line before the first.

    Returns:
        The job of the last line.

    """
    for line in lines:
        moment = datetime.fromtimestamp(line.ts / 1e9).isoformat(" ", "milliseconds")
        columns = f"rank {line.rank:<3} {line.step:>7}  "
        if not console.is_terminal:
            print(f"{moment}  {f'{printable(line.job)}  ' if several_jobs else ''}{columns}{line.text}", flush=True)
            continue
        if several_jobs and line.job != job:
            print_line(console, line.job, "bold")
        job = line.job
        text = Text(f"{moment}  {columns}", style="dim")
        text.append(line.text, style="dim" if line.tag in DIM_TAGS else f"not dim {STYLES.get(line.tag, '')}")
        console.print(text, no_wrap=True, overflow="ellipsis")
    return job
