"""Which steps' traces go out: all of them up to 10 a second, then every 2^k-th, and the slow and the failed ones.

The sets nest (every 4th is among every 2nd), so ranks that chose different k still share the traces of the larger one.
Decided from the journal's own times, so the same journal keeps the same traces. A window of 10 s takes its k from the
steps of the one before; should that be too little, k grows with every trace over the bound. Above `RANKS` ranks a trace
holds a hashed subset of them.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from stepspan.events import Event
from stepspan.otlp.mapping.open_scopes import step_trace_id

WINDOW = 10_000_000_000  # ns
KEPT = 100  # a window
SLOW = 2.0  # times the moving mean
SLOW_KEPT = 10  # a window
LEARNING = 16  # steps before "slow" means anything
RANKS = 2000


class Thinning:
    """Keeps or leaves out each step as it ends. `state` is plain JSON."""

    def __init__(self, header: Event) -> None:
        self._header = header
        self._rank: int = header["rank"]
        self._world: int = header["world_size"]
        self.state: dict[str, Any] = {"window": 0, "seen": 0, "kept": 0, "slow": 0, "k": 0, "means": {}}

    def keeps(self, begin: Event, end: Event, duration: float) -> bool:
        """Whether the trace of this step goes out. Call it once for each step, in order."""
        state, window = self.state, end["ts"] // WINDOW
        if window != state["window"]:
            seen = state["seen"] if window == state["window"] + 1 else 0
            state.update(window=window, seen=0, kept=0, slow=0, k=(max(0, seen - 1) // KEPT).bit_length())
        state["seen"] += 1
        count, mean = state["means"].get(begin["split"], (0, duration))
        slow = count >= LEARNING and duration > SLOW * mean and state["slow"] < SLOW_KEPT
        state["means"][begin["split"]] = (count + 1, mean + (duration - mean) / 32)
        if begin.get("thin"):
            return False
        if slow or "status" in end:
            state["slow"] += slow
            return True
        if begin["step"] % (1 << state["k"]):
            return False
        state["kept"] += 1
        if state["kept"] > KEPT:
            state["k"] += 1
        return self._world <= RANKS or self._rank == 0 or self._drawn(step_trace_id(self._header, begin))

    def _drawn(self, trace_id: bytes) -> bool:
        hashed = blake2b(trace_id + self._rank.to_bytes(8, "big"), digest_size=8).digest()
        return int.from_bytes(hashed, "big") * self._world < RANKS << 64
