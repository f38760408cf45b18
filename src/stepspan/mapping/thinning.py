"""Which steps' traces go out: all of them up to 10 a second, then every 2^k-th, and the slow and the failed ones.

The sets nest (every 4th is among every 2nd), so ranks that chose different k still share the traces of the larger one.
Decided from the journal's own times, so the same journal keeps the same traces. A window of 10 s takes its k from the
steps of the one before; should that be too little, k grows with every trace over the bound. Above `RANKS` ranks a trace
holds a hashed subset of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

from stepspan.events import Event
from stepspan.mapping.open_scopes import step_trace_id

WINDOW = 10_000_000_000  # ns
KEPT = 100  # a window
SLOW = 2.0  # times the moving mean
SLOW_KEPT = 10  # a window
LEARNING = 16  # steps before "slow" means anything
RANKS = 2000

Step: TypeAlias = tuple[Event, Event, float]
"""A step's begin and end event, and its duration in seconds."""


class Thinning:
    """Keeps or leaves out each step as it ends."""

    def __init__(self, header: Event) -> None:
        self._header = header
        self._rank: int = header["rank"]
        self._world: int = header["world_size"]
        self._window = self._seen = self._kept = self._slow = self._k = 0
        self._means: dict[str, tuple[int, float]] = {}

    def keeps(self, begin: Event, end: Event, duration: float) -> bool:
        """Whether the trace of this step goes out. Call it once for each step, in order."""
        return bool(self.kept([(begin, end, duration)]))

    def kept(self, steps: Sequence[Step]) -> list[Step]:
        """Those of the next steps whose traces go out."""
        found: list[Step] = []
        means, all_ranks = self._means, self._world <= RANKS or self._rank == 0
        for step in steps:
            begin, end, duration = step
            window, split = end["ts"] // WINDOW, begin["split"]
            if window != self._window:
                self._begin_window(window)
            self._seen += 1
            count, mean = means.get(split, (0, duration))
            slow = duration > SLOW * mean and count >= LEARNING and self._slow < SLOW_KEPT
            means[split] = count + 1, mean + (duration - mean) / 32
            if begin.get("thin"):
                continue
            if slow or "status" in end:
                self._slow += slow
                found.append(step)
            elif not (self._k and begin["step"] % (1 << self._k)):
                self._kept += 1
                if self._kept > KEPT:
                    self._k += 1
                if all_ranks or self._drawn(step_trace_id(self._header, begin)):
                    found.append(step)
        return found

    def _begin_window(self, window: int) -> None:
        seen = self._seen if window == self._window + 1 else 0
        self._window, self._seen, self._kept, self._slow = window, 0, 0, 0
        self._k = (max(0, seen - 1) // KEPT).bit_length()

    @property
    def state(self) -> dict[str, Any]:
        """What is carried on, as JSON."""
        return {"counts": [self._window, self._seen, self._kept, self._slow, self._k], "means": self._means}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._window, self._seen, self._kept, self._slow, self._k = state["counts"]
        self._means = {split: (count, mean) for split, (count, mean) in state["means"].items()}

    def _drawn(self, trace_id: bytes) -> bool:
        hashed = blake2b(trace_id + self._rank.to_bytes(8, "big"), digest_size=8).digest()
        return int.from_bytes(hashed, "big") * self._world < RANKS << 64
