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
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest.mock import patch

from stepspan.config import load
from stepspan.events import Event
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.journal.layout import find_sessions
from stepspan.mapping.records import Log, Point, Record, Signal, Span
from stepspan.reading.sessions import Session, read_session
from stepspan.run import Run
from stepspan.start import start_run

__all__ = ["FixedClock", "Recording", "recorded_run"]

_ENVIRONMENT = threading.Lock()
"""Held while the process's environment is another one."""
START_NS = 1_760_000_000_000_000_000  # 2025-10-09T08:53:20Z
IDENTITY = {"job_id": "test", "rank": 0, "local_rank": 0, "world_size": 1, "enabled": True}
NO_LIMITS = {"free_bytes": 0, "free_ratio": 0.0}
LIMITS = ("durability", "sync_every", "segment_bytes", "session_bytes", "free_bytes", "free_ratio", "group_readable")
"""The arguments that say how the journal is kept."""


class FixedClock:
    """A clock that only its own readings and `advance` move, so that times are the same in every test run.

    Args:
        start_ns: Its first reading, Unix ns.
        step_ns: How much later each next reading is, ns.

    """

    def __init__(self, start_ns: int = START_NS, step_ns: int = 1_000_000) -> None:
        self.now = start_ns
        self.step = step_ns

    def __call__(self) -> int:
        """The time now, Unix ns; each call moves the clock on by one step."""
        now = self.now
        self.now += self.step
        return now

    def advance(self, seconds: float) -> None:
        """Let time pass before the next reading.

        Args:
            seconds: How much; fractions count.

        """
        self.now += round(seconds * 1e9)


class Recording:
    """A run and what it has recorded: by now or, after the `with` block of `recorded_run`, in all.

    What a method returns is read from the journal and mapped anew at each call, all of it in memory. Sessions of forked
    children come after that of their parent.

    Attributes:
        run: The run that is recorded.

    """

    def __init__(self, run: Run, directory: Path) -> None:
        self.run = run
        self._directory = directory
        self._sessions: list[Session] | None = None

    def sessions(self) -> list[Session]:
        """The sessions in the order in which they began: each has `header`, `events`, `closed`, `records(signal)`."""
        if self._sessions is not None:
            return self._sessions
        sessions = [read_session(path) for path in find_sessions(self._directory)]
        return sorted(sessions, key=lambda session: int(session.header["started"]))

    def events(self, tag: str | None = None) -> list[Event]:
        """The journal's events.

        Args:
            tag: Only events of this tag, such as "metrics" or "step_end".

        Returns:
            Events in the order in which they were written, the sessions' headers included.

        """
        return [event for s in self.sessions() for event in s.events if tag in {None, event["tag"]}]

    def points(self, name: str | None = None) -> list[Point]:
        """The data points, as a receiver gets them.

        Args:
            name: Only points of this metric, such as "training.loss".

        Returns:
            (series, Unix ns, value) in time order; a value of None ends its series.

        """
        points = cast("list[Point]", self._records("metrics"))
        return [point for point in points if name in {None, point[0].name}]

    def values(self, name: str, **attributes: Any) -> list[Any]:
        """The values of a metric.

        Args:
            name: The metric, such as "training.loss".
            **attributes: Only values of series with these attributes, such as `split="val"`; None: without this one,
                as `key=None` for `loss` itself beside `train/loss`.

        Returns:
            Values in time order, without the ends of series.

        """
        return [
            value
            for series, _, value in self.points(name)
            if value is not None and all(series.attributes.get(name) == of for name, of in attributes.items())
        ]

    def spans(self, name: str | None = None) -> list[Span]:
        """The spans that have ended.

        Args:
            name: Only spans of this name, such as "training.step".

        Returns:
            Spans in the order of their ends, those of a step after the step. What was open when the run ended is an
            error.

        """
        return [span for span in cast("list[Span]", self._records("traces")) if name in {None, span.name}]

    def logs(self, name: str | None = None) -> list[Log]:
        """The log records.

        Args:
            name: Only events of this name, such as "exception" or "training.artifact".

        Returns:
            Log records in time order.

        """
        return [log for log in cast("list[Log]", self._records("logs")) if name in {None, log.event_name}]

    def _records(self, signal: Signal) -> list[Record]:
        return [record for session in self.sessions() for record in session.records(signal)]


@contextmanager
def recorded_run(*, clock: FixedClock | None = None, **arguments: Any) -> Iterator[Recording]:
    """An open run, as `stepspan.start_run` gives it, and what it records.

    Nothing is sent but to `exporters`, and STEPSPAN_* and OTEL_* variables are ignored. The run is
    `stepspan.current_run()` in the block; others that are open stay so.

    Args:
        clock: Gives the events' times; by default a new `FixedClock`, whose readings are a millisecond apart (values
            of a series that are logged less than that apart get one millisecond after the other). Waits for data are
            measured in real time.
        **arguments: Those of `stepspan.start_run`. By default rank 0 of 1 in job "test", no samplers, and a temporary
            `directory` for the journal, which is written however full the disk is.

    Yields:
        The recording. It can be asked while the run goes on and after the block.

    Raises:
        ConfigError: An argument is wrong.

    """
    with ExitStack() as stack:
        directory = arguments.pop("directory", None) or stack.enter_context(TemporaryDirectory(prefix="stepspan-"))
        limits = {**NO_LIMITS, **{name: arguments[name] for name in LIMITS if arguments.get(name) is not None}}
        journal = JsonlExporter(directory, limits=load(limits, {}).limits(), clock=clock or FixedClock())
        exporters = [journal, *(arguments.pop("exporters", None) or ())]
        with _ENVIRONMENT, patch.dict(os.environ):
            for name in [name for name in os.environ if name.startswith(("STEPSPAN_", "OTEL_"))]:
                del os.environ[name]
            os.environ["STEPSPAN_SAMPLERS"] = "none"
            run = start_run(exporters=exporters, **{**IDENTITY, **arguments})
        recording = Recording(run, journal.journal.directory)
        try:
            with run:
                yield recording
        finally:
            recording._sessions = recording.sessions()
