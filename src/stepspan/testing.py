"""For tests of code that logs to stepspan: a run that touches no network, and what it recorded.

```python
from stepspan.testing import recorded_run

def test_training_logs_its_loss():
    with recorded_run() as recording:
        train(steps=3)                                   # logs to stepspan.current_run(), or pass it recording.run
    assert recording.values("training.loss") == [0.5, 0.4, 0.3]
    assert [span.attributes["step"] for span in recording.spans("training.step")] == [0, 1, 2]
    assert not recording.logs("exception")
```

What comes back has gone the whole way: processors, a journal on disk, its reader and the mapping, as a receiver would
get it. As a fixture:

```python
@pytest.fixture
def recording():
    with recorded_run() as recording:
        yield recording
```
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest.mock import patch

from stepspan.events import Event
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.journal.layout import find_sessions
from stepspan.journal.writer import Limits
from stepspan.mapping.records import Log, Point, Record, Signal, Span
from stepspan.reading.sessions import Session, read_session
from stepspan.run import Run
from stepspan.start import start_run

__all__ = ["FixedClock", "Recording", "recorded_run"]

START = 1_760_000_000_000_000_000  # 2025-10-09T08:53:20Z
WHO = {"job_id": "test", "rank": 0, "local_rank": 0, "world_size": 1, "enabled": True}
ROOM = Limits(free_bytes=0, free_ratio=0.0)


class FixedClock:
    """A clock in Unix ns that goes `step_ns` further each time it is read, beginning at `start_ns`."""

    def __init__(self, start_ns: int = START, step_ns: int = 1_000_000) -> None:
        self.now = start_ns
        self.step = step_ns

    def __call__(self) -> int:
        """What it shows now."""
        shown = self.now
        self.now += self.step
        return shown

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += round(seconds * 1e9)


class Recording:
    """A run and what it has recorded, by now or, after its `with` block, in all. Forked children's sessions follow."""

    def __init__(self, run: Run, directory: Path) -> None:
        self.run = run
        self._directory = directory
        self._sessions: list[Session] | None = None

    def sessions(self) -> list[Session]:
        """The sessions in the order in which they began."""
        if self._sessions is not None:
            return self._sessions
        return sorted(
            map(read_session, find_sessions(self._directory)), key=lambda session: int(session.header["started"])
        )

    def events(self, tag: str | None = None) -> list[Event]:
        """The journal's events, `stepspan.events.FIELDS` says of what; only those of `tag`, if given."""
        return [event for s in self.sessions() for event in s.events if tag in {None, event["tag"]}]

    def points(self, name: str | None = None) -> list[Point]:
        """(series, Unix ns, value) in time order; a value of None ends the series. Only metric `name`, if given."""
        points = cast("list[Point]", self._records("metrics"))
        return [point for point in points if name in {None, point[0].name}]

    def values(self, name: str, **attributes: Any) -> list[Any]:
        """The values of a metric's points in time order, of the series with these attributes."""
        return [
            value
            for series, _, value in self.points(name)
            if value is not None and attributes.items() <= dict(series.attributes).items()
        ]

    def spans(self, name: str | None = None) -> list[Span]:
        """The spans that have ended, in the order of their ends. Those still open when the run ended are errors."""
        return [span for span in cast("list[Span]", self._records("traces")) if name in {None, span.name}]

    def logs(self, name: str | None = None) -> list[Log]:
        """The log records; `name` is that of an event, "exception" or "training.artifact" for example."""
        return [log for log in cast("list[Log]", self._records("logs")) if name in {None, log.event_name}]

    def _records(self, signal: Signal) -> list[Record]:
        return [record for session in self.sessions() for record in session.records(signal)]


@contextmanager
def recorded_run(*, clock: FixedClock | None = None, **arguments: Any) -> Iterator[Recording]:
    """An open run as `stepspan.start_run(**arguments)` gives it, and what it records.

    Nothing is sent anywhere, and the journal goes to a temporary directory unless `directory` says where to keep it.
    Rank 0 of 1 in job "test" unless said otherwise; STEPSPAN_* and OTEL_* variables count for nothing. The run is
    `stepspan.current_run()`; one that is open is closed first. `clock` gives the events' times, by default one each
    millisecond: of several points of a series in one millisecond a receiver gets the last. Waits for data are measured.
    """
    with ExitStack() as stack:
        directory = arguments.pop("directory", None) or stack.enter_context(TemporaryDirectory(prefix="stepspan-"))
        journal = JsonlExporter(directory, limits=ROOM, clock=clock or FixedClock())
        with patch.dict(os.environ):
            for name in [name for name in os.environ if name.startswith(("STEPSPAN_", "OTEL_"))]:
                del os.environ[name]
            os.environ["STEPSPAN_SAMPLERS"] = "none"
            run = start_run(exporters=[journal], **{**WHO, **arguments})
        recording = Recording(run, journal.directory)
        try:
            with run:
                yield recording
        finally:
            recording._sessions = recording.sessions()
