"""Which steps' traces go out: all of them up to 10 a second, then every 2^k-th, and the slow and the failed ones.

- The sets nest (every 4th is among every 2nd), so ranks that chose different k still share the traces of the larger
  one: a trace that one rank sends is not without the others.
- Decided from the journal's own times, so the same journal keeps the same traces. A window of 10 s takes its k from the
  number of steps in the one before; should that be too little, k grows with every trace above the bound.
- A slow step takes twice the moving mean of its split. The first 10 of a window go out, whatever their number.
- A step that a processor marked `thin` never goes out.
- Above `MAX_RANKS` ranks a trace holds a hashed subset of them, and always rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from stepspan.events import SECOND_NS, Event
from stepspan.mapping.open_scopes import StepState, step_trace_id

WINDOW_NS = 10 * SECOND_NS
TRACES_PER_WINDOW = 100
SLOW_FACTOR = 2.0
"""Times the moving mean of a split's durations."""
SLOW_PER_WINDOW = 10
SLOW_MIN_STEPS = 16
"""Steps of a split before "slow" means anything."""
MEAN_STEPS = 32
"""A step counts 1 / this in the moving mean."""
MAX_RANKS = 2000


@dataclass(slots=True)
class Thinning:
    """Keeps or leaves out each step of a session as it ends. Its fields are what is carried on, as JSON.

    Attributes:
        header: The session's header.
        window: The number of the window of 10 s.
        seen: Steps in it so far.
        kept: Those that went out for their number.
        slow: Those that went out for their duration.
        k: The logarithm to base 2 of which steps go out.
        means: Split -> number of its steps, and the moving mean of their durations (s).

    """

    header: Event
    window: int = 0
    seen: int = 0
    kept: int = 0
    slow: int = 0
    k: int = 0
    means: dict[str, tuple[int, float]] = field(default_factory=dict)

    def keeps(self, step: StepState) -> bool:
        """Whether the trace of a step that has ended goes out. Call it once for each step, in order."""
        return bool(self.filter((step,)))

    def filter(self, steps: Sequence[StepState]) -> list[StepState]:
        """Decide for many steps, as `keeps` does for each.

        Args:
            steps: The next steps, in the order in which they ended.

        Returns:
            Those whose traces go out.

        """
        found: list[StepState] = []
        means, last, seen, header = self.means, self.window, self.seen, self.header
        all_ranks = header["world_size"] <= MAX_RANKS or header["rank"] == 0
        for step in steps:
            begin, duration = step.begin, step.duration
            window, split = step.end["ts"] // WINDOW_NS, begin["split"]
            if window != last:
                self._begin_window(window, seen if window == last + 1 else 0)
                last, seen = window, 0
            seen += 1
            count, mean = means.get(split) or (0, duration)
            slow = duration > SLOW_FACTOR * mean and count >= SLOW_MIN_STEPS and self.slow < SLOW_PER_WINDOW
            means[split] = count + 1, mean + (duration - mean) / MEAN_STEPS
            if begin.get("thin"):
                continue
            if slow or step.has_failure:
                self.slow += slow
                found.append(step)
            elif not (self.k and begin["step"] % (1 << self.k)):
                self.kept += 1
                if self.kept > TRACES_PER_WINDOW:
                    self.k += 1
                if all_ranks or self._is_drawn(step_trace_id(header, begin)):
                    found.append(step)
        self.seen = seen
        return found

    def _begin_window(self, window: int, before: int) -> None:
        """`before`: how many steps were in the window before."""
        self.window, self.kept, self.slow = window, 0, 0
        self.k = (max(0, before - 1) // TRACES_PER_WINDOW).bit_length()

    def _is_drawn(self, trace_id: bytes) -> bool:
        """Whether this rank is in a trace that holds `MAX_RANKS` of them."""
        rank, world_size = self.header["rank"], self.header["world_size"]
        hashed = blake2b(trace_id + rank.to_bytes(8, "big"), digest_size=8).digest()
        return bool(int.from_bytes(hashed, "big") * world_size < MAX_RANKS << 64)
