"""How far a session is: what `training.run.*` says of its start, its checkpoints and the time it still needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepspan.events import Event
from stepspan.otlp.mapping.values import number

SECOND = 1_000_000_000
SMOOTH = 0.7
"""How much of the pace before counts in the next: half of a change shows after two periods, nine tenths after seven."""


class Progress:
    """The pace is seconds for each training step, over all that lies between them: validation and checkpoints too.

    It is measured whenever it is asked for, which the mapper does at every period of event time. `state` is what is
    carried on: the run's start (s), total steps, the last step's number and end (ns), the same when the pace was
    last measured, the pace (s), and when the last checkpoint was recorded (ns).
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def begin(self, started: int) -> None:
        """A run has begun in a session that started then (Unix ns)."""
        self.state["start"] = started / SECOND

    def plan(self, event: Event) -> None:
        """How many steps there will be."""
        self.state["total"] = event["total_steps"]

    def step(self, begin: Event, ended: int) -> None:
        """A step has ended."""
        step = number(begin["step"])
        if begin["split"] == "train" and step is not None:
            self.state["last"] = [step, ended]
            self.state.setdefault("measured", [step - 1, begin["ts"]])

    def artifact(self, event: Event) -> None:
        """An artifact was recorded."""
        if event["kind"] == "checkpoint":
            self.state["checkpoint"] = event["ts"]

    def values(self, ts: int) -> Iterator[tuple[str, str, float]]:
        """Name, unit and value of each metric at a time (Unix ns)."""
        state = self.state
        if "start" in state:
            yield "training.run.start_time", "s", state["start"]
        if "checkpoint" in state:
            yield "training.run.checkpoint_time", "s", state["checkpoint"] / SECOND
        total = number(state.get("total"))
        if total is None:
            return
        yield "training.run.total_steps", "", total
        if "last" in state:
            last, ended = state["last"]
            left = self._pace(last, ended) * (total - last - 1) - (ts - ended) / SECOND
            yield "training.run.eta", "s", max(0.0, left)

    def _pace(self, last: float, ended: int) -> float:
        before, since = self.state["measured"]
        if last > before:
            pace = (ended - since) / SECOND / (last - before)
            known = self.state.get("pace")
            self.state["pace"] = pace if known is None else SMOOTH * known + (1 - SMOOTH) * pace
        self.state["measured"] = [last, ended]
        return float(self.state.get("pace", 0.0))
