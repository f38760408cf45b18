"""How large a receiver's requests may be: what one has refused for its size is not tried again for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from stepspan.otlp.outcome import Outcome, Verdict

MEMORY_S = 600.0
SMALLEST_LIMIT_BYTES = 16 << 10
"""A record that is refused alone as too large, and is smaller, is refused for something else."""


class RequestSizes:
    """What is known of one signal's receiver. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._max_bytes = 0
        """The largest request that the receiver is known to take; 0: none was refused for its size."""
        self._until = 0.0
        """When it is forgotten."""
        self._means_nothing_until = 0.0
        """The receiver says that of records of any size."""

    def check(self, size: int) -> Outcome | None:
        """What becomes of a request that can be cut, and is larger than the receiver takes; None: send it.

        Args:
            size: Bytes, not compressed.

        """
        if not self._max_bytes or size <= self._max_bytes or self._clock() >= self._until:
            return None
        message = f"larger than the receiver takes: {size} bytes, and it has refused over {self._max_bytes}"
        return Outcome(Verdict.HALVE, message, max_ratio=self._max_bytes / size)

    def learn(self, size: int, outcome: Outcome, *, can_be_cut: bool) -> None:
        """Note what became of a request that was sent.

        Args:
            size: Bytes, not compressed.
            outcome: The receiver's.
            can_be_cut: Whether it held several records.

        """
        now = self._clock()
        if outcome.verdict is Verdict.DELIVERED and self._max_bytes:
            self._max_bytes = max(self._max_bytes, size)
        elif outcome.verdict is Verdict.HALVE and not can_be_cut and size < SMALLEST_LIMIT_BYTES:
            self._max_bytes, self._means_nothing_until = 0, now + MEMORY_S
        elif outcome.verdict is Verdict.HALVE and can_be_cut and now >= self._means_nothing_until:
            self._max_bytes, self._until = max(1, int(size * (outcome.max_ratio or 0.5))), now + MEMORY_S
