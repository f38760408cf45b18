"""Finding the records that a receiver refuses among those it takes.

A batch that is refused is sent in halves until the refused record stands alone. Alone is not enough to call it bad: a
receiver that was set up wrongly refuses everything. So a record is rejected only if the receiver took another one of
the same signal meanwhile, if need be one that it has taken before and is sent again; and after `MAX_REFUSALS` single
refusals in a row the signal is held, with the server's words.

A Collector passes on that the backend behind it refused, and not why: too old, too far in the future and a second
value for one millisecond all look the same. A record whose time may be the reason is therefore never rejected on such
an answer, but holds the signal: widening a window brings it back, and nothing brings back what was thrown away.

Points whose time the user gave go in requests of their own, before the others: they are of the past, a receiver may
not take them, and then they alone are rejected, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stepspan.mapping.columns import split_past
from stepspan.mapping.records import PastPoint, Record
from stepspan.otlp.outcome import Outcome, Verdict

MAX_REFUSALS = 16
OUT_OF_WINDOW = (
    "the backend behind the collector refuses points that are over an hour old or in its future, and the collector "
    "does not pass on why: look in the backend's log. If they are too old, widen "
    "storage.tsdb.out_of_order_time_window there, and they are delivered without a restart; if they are in the future, "
    "set the clocks. The collector said: "
)
PAST = (
    "the program gave this point its time, and the receiver does not take it; "
    "`stepspan sync --rejected` sends it again: "
)
WRONG_CLOCK = "the clock was wrong when this point was recorded, and the receiver does not take its time: "
STRIDE_DIVISOR = 8
"""Of points of one series that are too old, one is sent alone for every eighth part of those before it."""

Send = Callable[[Sequence[Record]], Outcome]


@dataclass(slots=True)
class Isolation:
    """One batch on its way. After `run`, an outcome of DELIVERED means that every record is accounted for."""

    send: Send
    known_good_record: Record | None = None
    """A record that the receiver has taken."""
    maybe_out_of_window: Callable[[Record], bool] = lambda record: False
    """Whether a record's time may be why it is refused."""
    wrong_before: int = 0
    """Unix ns: the clock of points before this is known to have been wrong. They go as those whose time was given."""
    delivered: int = 0
    dropped: int = 0
    """Records of accepted requests that the receiver says it did not take, without saying which."""
    rejected: list[tuple[Record, str]] = field(default_factory=list)
    accepted: bool = False
    """Whether the receiver took any of the batch."""
    _refusals: int = 0
    """Records that were refused one by one since the last one was taken."""
    _rejected_of_past: int = 0
    _partial_message: str = ""

    def run(self, records: Sequence[Record]) -> Outcome:
        """Send all of them; anything but DELIVERED means: nothing counts, do as it says."""
        past, records = split_past(records, self.wrong_before)
        stopped = (self._offer_past(past) if past else None) or (self._offer(records) if records else None)
        if stopped is not None:
            return stopped
        if len(self.rejected) > self._rejected_of_past and not self.accepted:
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
            if self._count_delivered(len(records), outcome):
                self.known_good_record, self._refusals = records[-1], 0
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

    def _offer_past(self, points: Sequence[PastPoint]) -> Outcome | None:
        """Send points whose time the user gave; as `_offer`, but what is refused is rejected."""
        outcome = self.send(points) if points else Outcome(Verdict.DELIVERED)
        if outcome.verdict is Verdict.DELIVERED:
            self._count_delivered(len(points), outcome)
            return None
        if outcome.verdict not in (Verdict.HALVE, Verdict.ISOLATE) and not outcome.too_old:
            return outcome
        if len(points) == 1:
            self._reject_past(points, outcome)
            return None
        if outcome.too_old and points[0].series is points[-1].series:
            return self._offer_oldest_first(points, outcome)
        half = len(points) // 2
        return self._offer_past(points[:half]) or self._offer_past(points[half:])

    def _offer_oldest_first(self, points: Sequence[PastPoint], outcome: Outcome) -> Outcome | None:
        """Send points of one series, of which the receiver has said (`outcome`) that some are too old.

        Where one is too old, so are those before it: the more have been, the larger is the next stride. They go in time
        order, because a receiver without an out-of-order window takes none that is older than one it has.
        """
        begin = 0
        while begin < len(points):
            tried = min(begin + begin // STRIDE_DIVISOR, len(points) - 1)
            rejected = self._rejected_of_past
            stopped = self._offer_past(points[tried : tried + 1])
            if stopped is not None:
                return stopped
            if self._rejected_of_past == rejected:
                return self._offer_past(points[begin:tried]) or self._offer_past(points[tried + 1 :])
            self._reject_past(points[begin:tried], outcome)
            begin = tried + 1
        return None

    def _reject_past(self, points: Sequence[PastPoint], outcome: Outcome) -> None:
        self.rejected += [
            (point, (WRONG_CLOCK if point.time < self.wrong_before else PAST) + outcome.message) for point in points
        ]
        self._rejected_of_past += len(points)

    def _count_delivered(self, records: int, outcome: Outcome) -> bool:
        """Count what a request has delivered. Whether that is anything."""
        dropped = min(outcome.rejected, records)
        self.delivered += records - dropped
        self.dropped += dropped
        self._partial_message = outcome.message if dropped else self._partial_message
        self.accepted |= dropped < records
        return dropped < records
