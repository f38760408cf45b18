"""Finding the records that a receiver refuses among those it takes.

A batch that is refused is sent in halves until the refused record stands alone. Alone is not enough to call it bad: a
receiver that was set up wrongly refuses everything. So a record is rejected only if the receiver took another one of
the same signal meanwhile, if need be one that it has taken before and is sent again; and after `MAX_REFUSALS` single
refusals in a row the signal is held, with the server's words.

A Collector passes on that the backend behind it refused, and not why: too old, too far in the future and a second
value for one millisecond all look the same. A record whose time may be the reason is therefore never rejected on such
an answer, but holds the signal: widening a window brings it back, and nothing brings back what was thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stepspan.mapping.records import Record
from stepspan.otlp.outcome import Outcome, Verdict

MAX_REFUSALS = 16
OUT_OF_WINDOW = (
    "the backend behind the collector refuses points that are over an hour old or in its future, and the collector "
    "does not pass on why: look in the backend's log. If they are too old, widen "
    "storage.tsdb.out_of_order_time_window there, and they are delivered without a restart; if they are in the future, "
    "set the clocks. The collector said: "
)

Send = Callable[[Sequence[Record]], Outcome]


@dataclass(slots=True)
class Isolation:
    """One batch on its way. After `run`, an outcome of DELIVERED means that every record is accounted for."""

    send: Send
    known_good_record: Record | None = None
    """A record that the receiver has taken."""
    maybe_out_of_window: Callable[[Record], bool] = lambda record: False
    """Whether a record's time may be why it is refused."""
    delivered: int = 0
    dropped: int = 0
    """Records of accepted requests that the receiver says it did not take, without saying which."""
    rejected: list[tuple[Record, str]] = field(default_factory=list)
    accepted: bool = False
    """Whether the receiver took any of the batch."""
    _refusals: int = 0
    """Records that were refused one by one since the last one was taken."""
    _partial_message: str = ""

    def run(self, records: Sequence[Record]) -> Outcome:
        """Send all of them; anything but DELIVERED means: nothing counts, do as it says."""
        stopped = self._offer(records)
        if stopped is not None:
            return stopped
        if self.rejected and not self.accepted:
            message = self.rejected[0][1]
            if self.known_good_record is None:
                return Outcome(Verdict.HOLD, f"the receiver has accepted nothing yet and refuses this: {message}")
            answer = self.send([self.known_good_record])
            if answer.verdict is not Verdict.DELIVERED:
                return Outcome(Verdict.HOLD, f"the receiver refuses a record that it accepted before: {message}")
        return Outcome(Verdict.DELIVERED, self.rejected[-1][1] if self.rejected else self._partial_message)

    def _offer(self, records: Sequence[Record]) -> Outcome | None:
        """Send some; None when each was taken or refused alone, an outcome to stop with otherwise."""
        outcome = self.send(records)
        if outcome.verdict is Verdict.DELIVERED:
            dropped = min(outcome.rejected, len(records))
            self.delivered += len(records) - dropped
            self.dropped += dropped
            self._partial_message = outcome.message if dropped else self._partial_message
            if dropped < len(records):
                self.known_good_record, self.accepted, self._refusals = records[-1], True, 0
            return None
        if outcome.verdict not in (Verdict.HALVE, Verdict.ISOLATE):
            return outcome
        if len(records) == 1:
            if outcome.reason_hidden and self.maybe_out_of_window(records[0]):
                return Outcome(Verdict.HOLD, OUT_OF_WINDOW + outcome.message)
            self.rejected.append((records[0], outcome.message))
            self._refusals += 1
            if self._refusals == MAX_REFUSALS:
                return Outcome(
                    Verdict.HOLD, f"{MAX_REFUSALS} records in a row were refused one by one: {outcome.message}"
                )
            return None
        half = len(records) // 2
        return self._offer(records[:half]) or self._offer(records[half:])
