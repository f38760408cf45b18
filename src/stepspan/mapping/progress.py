"""How far a session is: what `training.run.*` says of its start, its checkpoints and the time it still needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stepspan.events import SECOND_NS, Event
from stepspan.mapping.clock import EventTime
from stepspan.mapping.open_scopes import StepState
from stepspan.values import to_float

SMOOTHING = 0.7
"""How much of the pace before counts in the next: half of a change shows after two periods, nine tenths after seven."""


@dataclass(slots=True)
class RunProgress:
    """Its fields are what is carried on, as JSON.

    The pace is measured whenever it is asked for, which the mapper does at every period of event time.

    Attributes:
        started: When the session began, Unix s.
        checkpoint: When the last checkpoint was recorded, Unix s.
        total: How many training steps there will be.
        last_step: The number of the last training step.
        last_ended: When that ended, Unix ns.
        measured_step: The number of the step at which the pace was measured last.
        measured_at: When that ended, Unix ns.
        pace: Seconds for each training step, over all that lies between them: validation and checkpoints too.
        ended: Whether the training has ended, and needs no more time.

    """

    started: float | None = None
    checkpoint: float | None = None
    total: float | None = None
    last_step: float | None = None
    last_ended: int = 0
    measured_step: float | None = None
    measured_at: int = 0
    pace: float | None = None
    ended: bool = False

    def begin(self, started: int) -> None:
        """A run has begun in a session that started then (Unix ns)."""
        self.started = started / SECOND_NS

    def plan(self, event: Event) -> None:
        """Take how many steps there will be from a `progress` event."""
        self.total = to_float(event["total_steps"])

    def add(self, steps: Sequence[StepState]) -> None:
        """Add steps that have ended.

        Args:
            steps: Each step once, in the order in which they ended; those of other splits than "train" do not count.

        """
        for step in steps if self.measured_step is None else ():
            if step.begin["split"] == "train":
                self.measured_step, self.measured_at = step.begin["step"] - 1, step.begin["ts"]
                break
        for step in reversed(steps):
            if step.begin["split"] == "train":
                self.last_step, self.last_ended = step.begin["step"], step.end["ts"]
                break

    def artifact(self, event: Event) -> None:
        """Take an `artifact` event: one of kind "checkpoint" says when the last checkpoint was made."""
        if event["kind"] == "checkpoint":
            self.checkpoint = event["ts"] / SECOND_NS

    def shift(self, early: int) -> None:
        """Correct the times so far, which are too early by so many nanoseconds, or too late: the clock was set."""
        if self.started is not None:
            self.started += early / SECOND_NS
        if self.checkpoint is not None:
            self.checkpoint += early / SECOND_NS

    def values(self, ts: int, time: EventTime) -> Iterator[tuple[str, str, float]]:
        """The metrics of a run's progress that are known. Measures the pace.

        Args:
            ts: The time that they are for, Unix ns.
            time: What is known of the session's clock.

        Yields:
            Name, unit and value of each.

        """
        if self.started is not None:
            yield "training.run.start_time", "s", self.started
        if self.checkpoint is not None:
            yield "training.run.checkpoint_time", "s", self.checkpoint
        if self.total is not None:
            yield "training.run.total_steps", "", self.total
            remaining = None if self.ended else self._remaining(self.total, ts, time)
            if remaining is not None:
                yield "training.run.eta", "s", remaining

    def _remaining(self, total: float, ts: int, time: EventTime) -> float | None:
        """Seconds until the last step will have ended."""
        step = to_float(self.last_step)
        if step is None or self.measured_step is None:
            return None
        if step > self.measured_step:
            seconds = time.elapsed(self.measured_at, self.last_ended) / SECOND_NS
            pace = seconds / (step - self.measured_step)
            self.pace = pace if self.pace is None else SMOOTHING * self.pace + (1 - SMOOTHING) * pace
        self.measured_step, self.measured_at = step, self.last_ended
        return max(0.0, (self.pace or 0.0) * (total - step - 1) - time.elapsed(self.last_ended, ts) / SECOND_NS)
