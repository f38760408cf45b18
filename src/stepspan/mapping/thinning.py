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

from stepspan.events import Event
from stepspan.mapping.open_scopes import Step, step_trace_id
from stepspan.mapping.records import SECOND_NS

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
class ThinningState:
    """What is carried on: the window's number, what was in it so far, its k; split -> its steps and their mean (s)."""

    window: int = 0
    seen: int = 0
    kept: int = 0
    slow: int = 0
    k: int = 0
    means: dict[str, tuple[int, float]] = field(default_factory=dict)


class Thinning:
    """Keeps or leaves out each step of a session as it ends."""

    def __init__(self, header: Event) -> None:
        self._header = header
        self._rank: int = header["rank"]
        self._world: int = header["world_size"]
        self.state = ThinningState()

    def keeps(self, step: Step) -> bool:
        """Whether the trace of a step that has ended goes out. Call it once for each step, in order."""
        return bool(self.kept([step]))

    def kept(self, steps: Sequence[Step]) -> list[Step]:
        """Those of the next steps whose traces go out. The same as `keeps` for each of them."""
        found: list[Step] = []
        state, all_ranks = self.state, self._world <= MAX_RANKS or self._rank == 0
        means, last, seen = state.means, state.window, state.seen
        for step in steps:
            begin, duration = step.begin, step.duration
            window, split = step.end["ts"] // WINDOW_NS, begin["split"]
            if window != last:
                self._begin_window(window, seen if window == last + 1 else 0)
                last, seen = window, 0
            seen += 1
            count, mean = means.get(split, (0, duration))
            slow = duration > SLOW_FACTOR * mean and count >= SLOW_MIN_STEPS and state.slow < SLOW_PER_WINDOW
            means[split] = count + 1, mean + (duration - mean) / MEAN_STEPS
            if begin.get("thin"):
                continue
            if slow or step.has_failure:
                state.slow += slow
                found.append(step)
            elif not (state.k and begin["step"] % (1 << state.k)):
                state.kept += 1
                if state.kept > TRACES_PER_WINDOW:
                    state.k += 1
                if all_ranks or self._is_drawn(step_trace_id(self._header, begin)):
                    found.append(step)
        state.seen = seen
        return found

    def _begin_window(self, window: int, before: int) -> None:
        """`before`: how many steps were in the window before."""
        state = self.state
        state.window, state.kept, state.slow = window, 0, 0
        state.k = (max(0, before - 1) // TRACES_PER_WINDOW).bit_length()

    def _is_drawn(self, trace_id: bytes) -> bool:
        """Whether this rank is in a trace that holds `MAX_RANKS` of them."""
        hashed = blake2b(trace_id + self._rank.to_bytes(8, "big"), digest_size=8).digest()
        return int.from_bytes(hashed, "big") * self._world < MAX_RANKS << 64
