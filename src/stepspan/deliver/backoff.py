"""When a request that was not taken is sent again: exponential delays with jitter, and what the receiver asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.values import format_seconds

MAX_RETRY_DELAY_S = 30.0
MAX_HOLD_DELAY_S = 300.0
"""Also the longest wait that a receiver can ask for."""
DELAYS_S = {"retry": (0.25, MAX_RETRY_DELAY_S), "hold": (15.0, MAX_HOLD_DELAY_S)}
"""State -> the first and the greatest delay."""
MAX_SERVER_ERRORS = 5
"""Failures of the "retry, then hold" kind in a row: the last of them holds."""
PASSING_TIMEOUT_S = 180.0
"""For which a receiver that has answered well before is tried as one that is away, where the reason may pass by itself
(a rollout, or a DNS server that is away). Then it holds."""


@dataclass(slots=True)
class ReceiverHistory:
    """What one receiver has made of one signal, over all sessions that are on their way to it."""

    has_answered: bool = False
    """Whether it has ever taken anything: as this deliverer has seen, or as a cursor says."""
    failing_since: float | None = None
    """Since when it has answered nothing but what may pass, by the deliverer's clock."""

    def delivered(self) -> None:
        """It has taken something."""
        self.has_answered, self.failing_since = True, None

    def judge(self, outcome: Outcome) -> Outcome:
        """An outcome in the light of all that: a hold that may pass is a retry where it has answered well before."""
        if outcome.verdict is Verdict.HOLD and outcome.may_pass and self.has_answered:
            return outcome._replace(verdict=Verdict.RETRY)
        return outcome


class Backoff:
    """The failures of one signal of one session since something was delivered.

    Args:
        jitter: Gives numbers in [0, 1).
        history: Of the receiver; what it has answered to other sessions counts, too.

    """

    def __init__(self, jitter: Callable[[], float], history: ReceiverHistory) -> None:
        self._jitter = jitter
        self._history = history
        self.reset()

    def reset(self) -> None:
        """Something was delivered."""
        self._state = ""
        self._failures = self._server_errors = 0
        self._passing_since: float | None = None

    def next_try(self, outcome: Outcome, now: float) -> tuple[str, float, str]:
        """Count a failure. Delays double while the state stays; a hold begins with its own first delay.

        Args:
            outcome: Of the request.
            now: By the deliverer's clock.

        Returns:
            What to do about it: the cursor's state, the seconds until the next try, and what to say.

        """
        self._server_errors = self._server_errors + 1 if outcome.verdict is Verdict.RETRY_THEN_HOLD else 0
        if not outcome.may_pass:
            self._passing_since = self._history.failing_since = None
        held = self._server_errors >= MAX_SERVER_ERRORS
        if outcome.verdict is Verdict.HOLD or outcome.may_pass:
            held = not self._may_pass(outcome, now)
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

    def _may_pass(self, outcome: Outcome, now: float) -> bool:
        """Whether a hold is put off: for minutes since this session, and since every session, has met it."""
        history = self._history
        if not outcome.may_pass or not history.has_answered:
            return False
        history.failing_since = now if history.failing_since is None else history.failing_since
        self._passing_since = now if self._passing_since is None else self._passing_since
        return now - min(self._passing_since, history.failing_since) < PASSING_TIMEOUT_S
