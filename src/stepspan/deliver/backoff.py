"""When a request that was not taken is sent again: exponential delays with jitter, and what the receiver asks for."""

from __future__ import annotations

from collections.abc import Callable

from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.values import format_seconds

MAX_RETRY_DELAY_S = 30.0
MAX_HOLD_DELAY_S = 300.0
"""Also the longest wait that a receiver can ask for."""
DELAYS_S = {"retry": (0.25, MAX_RETRY_DELAY_S), "hold": (15.0, MAX_HOLD_DELAY_S)}
"""State -> the first and the greatest delay."""
MAX_SERVER_ERRORS = 5
"""Failures of the "retry, then hold" kind in a row: the last of them holds."""


class Backoff:
    """The failures of one signal of one session since something was delivered. `jitter` gives numbers in [0, 1)."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.reset()

    def reset(self) -> None:
        """Something was delivered."""
        self._state = ""
        self._failures = self._server_errors = 0

    def next_try(self, outcome: Outcome) -> tuple[str, float, str]:
        """Count a failure. Delays double while the state stays; a hold begins with its own first delay.

        Returns:
            What to do about it: the cursor's state, the seconds until the next try, and what to say.

        """
        self._server_errors = self._server_errors + 1 if outcome.verdict is Verdict.RETRY_THEN_HOLD else 0
        held = outcome.verdict is Verdict.HOLD or self._server_errors >= MAX_SERVER_ERRORS
        state = "hold" if held else "retry"
        self._failures = self._failures + 1 if state == self._state else 1
        self._state = state
        first, maximum = DELAYS_S[state]
        delay = min(maximum, first * 2 ** min(self._failures - 1, 16)) * (0.5 + self._jitter() / 2)
        asked, message = outcome.retry_after or 0.0, outcome.message
        delay = max(delay, min(asked, MAX_HOLD_DELAY_S))
        if asked > MAX_RETRY_DELAY_S:
            message += f"; the receiver asks to wait {format_seconds(asked)}: next try in {format_seconds(delay)}"
        return state, delay, message
