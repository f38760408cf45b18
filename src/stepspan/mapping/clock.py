"""How much time has passed between two event times: their difference, unless the journal's clock was set in between.

Where a clock was behind, event time skips what was missing (`forward` of a `clock` event): nothing has passed there.
Where it was ahead, event time runs at half speed until it is right (`ahead`): twice as much has passed there.
"""

from __future__ import annotations

from stepspan.events import SECOND_NS, Event
from stepspan.values import format_seconds

MAX_CORRECTIONS = 64
"""Of a session, the latest; what was open before that is measured a little wrong."""


class EventTime:
    """What `clock` events say of a session's time.

    Attributes:
        corrections: Begin and end of each stretch of event time that is not what it seems, Unix ns, and by how much it
            counts more: -1, or 1. JSON; empty in almost every session.

    """

    def __init__(self) -> None:
        self.corrections: list[list[int]] = []

    def set(self, event: Event) -> int:
        """Take in a `clock` event.

        Returns:
            Nanoseconds by which all times before it are too early; negative: too late.

        """
        ts: int = event["ts"]
        forward, ahead = int(event.get("forward", 0)), int(event.get("ahead", 0))
        if not (forward or ahead):
            return 0
        begin, end, weight = (ts, ts + ahead, 1) if ahead > 0 else (ts - forward, ts, -1)
        left = 0
        if self.corrections:
            last = self.corrections[-1]
            left = max(0, last[1] - begin) if last[2] > 0 else 0
        for each in self.corrections:
            each[1] = min(each[1], begin)  # what was to be made up is what this event says
        self.corrections = [*self.corrections[1 - MAX_CORRECTIONS :], [begin, end, weight]]
        return left - weight * (end - begin)

    def elapsed(self, start: int, end: int) -> int:
        """The nanoseconds between two event times (Unix ns); negative where the end lies before the start."""
        passed = end - start
        for begin, until, weight in self.corrections:
            overlap = min(end, until) - max(start, begin)
            if overlap > 0:
                passed += weight * overlap
        return passed


def seconds_ahead(event: Event) -> float:
    """By how many seconds a `clock` event says that the clock was ahead; negative: behind."""
    return float(event.get("ahead") or -event.get("forward", 0) or event["before"]) / SECOND_NS


def clock_text(event: Event) -> str:
    """What a `clock` event says, in words."""
    ahead = seconds_ahead(event)
    amount = format_seconds(abs(ahead))
    if "before" in event:
        return f"the clock was {amount} {'ahead' if ahead > 0 else 'behind'} as the run began: its times were set right"
    if ahead > 0:
        return f"the clock is {amount} ahead: event time runs at half speed until it is right"
    return f"the clock was {amount} behind: event time is right from here on, and durations do not count that"
