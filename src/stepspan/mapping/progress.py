"""How far a session is: what `training.run.*` says of its start, its checkpoints and the time it still needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepspan.events import Event
from stepspan.mapping.values import number

SECOND = 1_000_000_000
SMOOTH = 0.7
"""How much of the pace before counts in the next: half of a change shows after two periods, nine tenths after seven."""


class Progress:
    """The pace is seconds for each training step, over all that lies between them: validation and checkpoints too.

    It is measured whenever it is asked for, which the mapper does at every period of event time.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._checkpoint: float | None = None
        self._total: float | None = None
        self._last: tuple[Event, int] | None = None
        """The begin event of the last training step, and when that ended (ns)."""
        self._measured: tuple[float, int] | None = None
        """The step's number and end (ns) at which the pace was measured last."""
        self._pace: float | None = None

    def begin(self, started: int) -> None:
        """A run has begun in a session that started then (Unix ns)."""
        self._started = started / SECOND

    def plan(self, event: Event) -> None:
        """How many steps there will be."""
        self._total = number(event["total_steps"])

    def step(self, begin: Event, ended: int) -> None:
        """A training step has ended."""
        if self._measured is None:
            self._measured = begin["step"] - 1, begin["ts"]
        self._last = begin, ended

    def artifact(self, event: Event) -> None:
        """An artifact was recorded."""
        if event["kind"] == "checkpoint":
            self._checkpoint = event["ts"] / SECOND

    def values(self, ts: int) -> Iterator[tuple[str, str, float]]:
        """Name, unit and value of each metric at a time (Unix ns)."""
        if self._started is not None:
            yield "training.run.start_time", "s", self._started
        if self._checkpoint is not None:
            yield "training.run.checkpoint_time", "s", self._checkpoint
        if self._total is not None:
            yield "training.run.total_steps", "", self._total
            left = self._left(self._total, ts)
            if left is not None:
                yield "training.run.eta", "s", left

    def _left(self, total: float, ts: int) -> float | None:
        """Seconds until the last step has ended."""
        step = number(self._last[0]["step"]) if self._last else None
        if self._last is None or self._measured is None or step is None:
            return None
        ended, (before, since) = self._last[1], self._measured
        if step > before:
            pace = (ended - since) / SECOND / (step - before)
            self._pace = pace if self._pace is None else SMOOTH * self._pace + (1 - SMOOTH) * pace
        self._measured = step, ended
        return max(0.0, (self._pace or 0.0) * (total - step - 1) - (ts - ended) / SECOND)

    @property
    def state(self) -> list[Any]:
        """What is carried on, as JSON."""
        return [self._started, self._checkpoint, self._total, self._last, self._measured, self._pace]

    @state.setter
    def state(self, state: list[Any]) -> None:
        self._started, self._checkpoint, self._total, self._last, self._measured, self._pace = state
