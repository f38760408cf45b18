"""Finding the records that a receiver refuses among those it takes.

A batch that is refused is sent in halves until the refused record stands alone. Alone is not enough to call it bad: a
receiver that was set up wrongly refuses everything. So a record is rejected only if the receiver took another one of
the same signal meanwhile, if need be one that it has taken before and is sent again; and after `MAX_REFUSALS` single
refusals in a row the signal is held, with the server's words, unless the record that was taken before still is.

What a receiver refuses again and again, a series say, is remembered (`refused.py`) and travels apart.

A receiver may answer to one record what it answers when it is down: 500, 503, a closed connection, a code that nobody
knows. So what has failed for `MAX_TRIES` tries is put to the test: a record that was taken before, the **witness**,
goes ahead of it. Where the witness is taken and the batch is not, the reason is in the batch, and it is halved; what
fails alone for `STRIKES` such tries, with the witness taken each time, is rejected. Without a witness of its session a
part of the batch may become one. A receiver that is down, or whose disk is full, refuses the witness, too: then nothing
is rejected.

A Collector passes on that the backend behind it refused, and not why: too old, too far in the future and a second
value for one millisecond all look the same. A record whose time may be the reason is therefore never rejected on such
an answer, but holds the signal: widening a window brings it back, and nothing brings back what was thrown away.

Points whose time the user gave go in requests of their own, before the others: they are of the past, a receiver may
not take them, and then they alone are rejected, at once.

All this is one generator: it yields what is to be sent and is given the outcome. So it can stop anywhere, for the
receiver or for the other sessions, and goes on where it was.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from stepspan.deliver.refused import CONFIRMATIONS, Group, ReceiverMemory
from stepspan.mapping.columns import split_past
from stepspan.mapping.records import PastPoint, Record
from stepspan.otlp.outcome import Outcome, Verdict

MAX_REFUSALS = 16
MAX_TRIES = 3
"""Tries of what fails as a whole, before a witness is asked."""
STRIKES = 5
"""Tries of a record that fails alone while the witness is taken, before it is rejected."""
MAX_SINGLE_SEARCH = 4
"""Single records that are tried in search of a witness."""
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
_REFUSED = frozenset({Verdict.HALVE, Verdict.ISOLATE})
_ANSWERED = _REFUSED | {Verdict.DELIVERED}
_MAY_BE_DOWN = frozenset({Verdict.RETRY, Verdict.RETRY_THEN_HOLD})


@dataclass(frozen=True, slots=True)
class _Stop:
    """Nothing more can be sent now; `outcome` says what to do."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _AskAgain:
    """The witness is to be sent: a record that was taken before."""


_Step: TypeAlias = "Sequence[Record] | _AskAgain | _Stop"
_Steps: TypeAlias = "Generator[_Step, Outcome, None]"
_Answer: TypeAlias = "Generator[_Step, Outcome, Outcome]"
ASK_AGAIN = _AskAgain()


@dataclass(slots=True)
class Isolation:
    """One batch on its way. After `run`, an outcome of DELIVERED means that every record is accounted for."""

    send: Send
    known_good_record: Record | None = None
    """A record of this session that the receiver has taken."""
    maybe_out_of_window: Callable[[Record], bool] = lambda record: False
    """Whether a record's time may be why it is refused."""
    wrong_before: int = 0
    """Unix ns: the clock of points before this is known to have been wrong. They go as those whose time was given."""
    memory: ReceiverMemory | None = None
    """What is known of the receiver by all sessions."""
    owner: str = ""
    """The Resource that the session's series belong to."""
    send_known_good: Callable[[], Outcome | None] = lambda: None
    """Sends the record of any session that the receiver has taken last; None: there is none."""
    failures: int = 0
    """Tries in a row that were not taken, those of an earlier isolation of the batch included."""
    delivered: int = 0
    dropped: int = 0
    """Records of accepted requests that the receiver says it did not take, without saying which."""
    rejected: list[tuple[Record, str]] = field(default_factory=list)
    rejected_again: int = 0
    """Of `rejected`: those whose like was refused before."""
    refused_traits: list[str] = field(default_factory=list)
    """The names of what is refused from now on, and was not before."""
    accepted: bool = False
    """Whether the receiver took any of the batch."""
    first_request: Sequence[Record] = ()
    """After `begin`: what goes as one request, if nothing is refused."""
    goes_alone: bool = True
    """After `begin`: whether more than `first_request` is to be sent, or a part of it was."""
    _refusals: int = 0
    """Records that were refused one by one since the last one was taken."""
    _rejected_of_past: int = 0
    _partial_message: str = ""
    _again_message: str = ""
    _late: list[Group] = field(default_factory=list)
    """What turned out to be refused again and again on the way."""
    _is_suspicious: bool = False
    """Whether records are put to the test."""
    _took_again: bool = False
    """Whether the receiver has taken again what it had taken before."""
    receiver_takes: bool = False
    """Whether the receiver has taken anything in this round."""
    _last_was_taken: bool = False
    """Whether what was sent last, in this round, was taken."""
    _goes_on: Callable[[], bool] = lambda: True
    _steps: _Steps | None = None
    _step: _Step = ()

    def begin(self, records: Sequence[Record]) -> None:
        """Take a batch apart; nothing is sent. `records` are of one session, in time order."""
        if not records:
            self.first_request, self.goes_alone, self._steps = records, False, self._offer_all((), [], ())
            return
        past, rest = split_past(records, self.wrong_before)
        due: list[Group] = []
        if self.memory is not None:
            groups, rest = self.memory.split(self.owner, rest)
            due = self.memory.to_probe(groups)
            for group in groups:
                while group not in due and group.records:
                    self._reject_group(group, self.memory.why(group), probed=False)
        self._is_suspicious = self.failures >= MAX_TRIES
        self.first_request, self.goes_alone = rest, bool(past or due)
        self._steps = self._offer_all(past, due, rest)

    def run(self, records: Sequence[Record] = (), goes_on: Callable[[], bool] = lambda: True) -> Outcome | None:
        """Send all of a batch, or go on with what the last `run` has left.

        Args:
            records: The batch, where `begin` was not called.
            goes_on: Whether another request may be sent now.

        Returns:
            DELIVERED: each record is accounted for. None: it goes on with the next call. Anything else: do as it says,
            then call again, to go on where it was, or give this one up: then nothing counts.

        """
        if self._steps is None:
            self.begin(records)
        self._last_was_taken, self.receiver_takes, self._goes_on = False, False, goes_on
        step = self._step if self._step and not isinstance(self._step, _Stop) else self._next(None)
        while step is not None and not isinstance(step, _Stop):
            if not goes_on():
                return None
            outcome = self._send(step)
            self.goes_alone = True
            step = self._next(outcome)
        if step is None:
            rejected_message = self.rejected[-1][1] if self.rejected else ""
            return Outcome(Verdict.DELIVERED, self._again_message or rejected_message or self._partial_message)
        return step.outcome

    def _next(self, outcome: Outcome | None) -> _Step | None:
        """What is to be done after this outcome; None: nothing more."""
        assert self._steps is not None
        try:
            self._step = self._steps.send(outcome)  # type: ignore[arg-type]
        except StopIteration:
            return None
        return self._step

    def _send(self, step: Sequence[Record] | _AskAgain) -> Outcome:
        if not isinstance(step, _AskAgain):
            outcome = self.send(step)
        elif self.known_good_record is not None:
            outcome = self.send([self.known_good_record])
        else:
            outcome = self.send_known_good() or Outcome(Verdict.ISOLATE)
        self._last_was_taken = outcome.verdict is Verdict.DELIVERED
        self.receiver_takes |= self._last_was_taken
        self._took_again |= self._last_was_taken and isinstance(step, _AskAgain)
        return outcome

    @property
    def _has_known_good(self) -> bool:
        return self.known_good_record is not None or (self.memory is not None and self.memory.known_good is not None)

    @property
    def _is_own_fault(self) -> bool:
        """Whether a hold that a witness does not meet is about these records, and not about their session."""
        return self.known_good_record is not None or self.failures > MAX_TRIES

    def _forget_refusals(self) -> None:
        """It is the receiver that refuses everything, and no trait."""
        if self.memory is not None:
            self.memory.forget()

    def _forget_known_good(self) -> None:
        if self.known_good_record is not None:
            self.known_good_record = None
        elif self.memory is not None:
            self.memory.known_good = None

    def _offer_all(self, past: Sequence[PastPoint], due: list[Group], records: Sequence[Record]) -> _Steps:
        if past:
            yield from self._offer_past(past)
        yield from self._offer_with_probes(due, records)
        while self._late:  # to which what is offered may add
            yield from self._offer_late(self._late.pop(0))
        while len(self.rejected) > self._rejected_of_past and not self.accepted and not self._took_again:
            why = "the receiver has accepted nothing yet and refuses this"
            if self._has_known_good:
                if (yield ASK_AGAIN).verdict is Verdict.DELIVERED:
                    return
                why = "the receiver refuses a record that it accepted before"
            self._forget_refusals()
            yield _Stop(Outcome(Verdict.HOLD, f"{why}: {self._first_message()}"))

    def _offer(self, records: Sequence[Record]) -> _Steps:
        """Send some, in time order, until each was taken or refused alone."""
        while records := self._without_refused(records):
            outcome = yield from self._ask(records)
            if outcome.verdict is Verdict.DELIVERED:
                if self._count_delivered(records, outcome):
                    self.known_good_record, self._refusals = records[-1], 0
                return
            if outcome.verdict not in _ANSWERED and not (outcome.too_old or outcome.too_new):
                records = yield from self._search_known_good(records, outcome)
            elif hold := self._as_hold(records, outcome):
                yield _Stop(hold)
            elif len(records) == 1:
                yield from self._refuse(records[0], outcome)
                return
            else:
                for part in _parts(records, outcome):
                    yield from self._offer(part)
                return

    def _ask(self, records: Sequence[Record], *, known: str = "") -> _Answer:
        """Send records until they are taken, or refused for what they are.

        Args:
            records: At least one.
            known: The words with which their like was refused before: with these, no patience is needed.

        Returns:
            DELIVERED; ISOLATE or HALVE; a HOLD for their times; any other verdict where they are several, and the
            receiver has taken none of this session yet.

        """
        strikes = 0
        while True:
            if self._is_suspicious and self._has_known_good and not self._last_was_taken:
                answer = yield ASK_AGAIN
                if answer.verdict in _REFUSED or answer.too_old or answer.too_new:
                    self._forget_known_good()
                elif answer.verdict is not Verdict.DELIVERED:
                    yield _Stop(answer)
                    continue
            took_before = self._last_was_taken
            outcome = yield records
            if outcome.verdict in _ANSWERED or outcome.too_old or outcome.too_new:
                self.failures = 0 if outcome.verdict is Verdict.DELIVERED else self.failures
                return outcome
            self.failures += 1
            may_be_down, is_known = outcome.verdict in _MAY_BE_DOWN, known != "" and outcome.message == known
            if not self._is_suspicious and (is_known or not may_be_down or self.failures >= MAX_TRIES):
                self._is_suspicious = True
                took_before = self._last_was_taken = False
            if not self._is_suspicious or (outcome.retry_after and not took_before):
                yield _Stop(outcome)
            elif self._has_known_good and not took_before:
                continue
            elif took_before and (may_be_down or is_known or self._is_own_fault):
                strikes += 1
                is_found = is_known or len(records) > 1 or strikes >= self._strikes_of(records[0], outcome.message)
                if not is_found or outcome.retry_after:
                    yield _Stop(outcome._replace(verdict=Verdict.RETRY))
                if is_found:
                    return outcome._replace(verdict=Verdict.ISOLATE)
            elif len(records) > 1 and (took_before or (may_be_down and _is_power_of_two(self.failures))):
                return outcome
            else:
                yield _Stop(outcome)

    def _strikes_of(self, record: Record, why: str) -> int:
        """Tries after which a record that fails alone is rejected: fewer where its like was, with the same words."""
        known = self.memory.refusals_like(self.owner, record, why) if self.memory is not None else 0
        return STRIKES if not known else 1 if known >= CONFIRMATIONS else STRIKES // 2

    def _search_known_good(
        self, records: Sequence[Record], outcome: Outcome
    ) -> Generator[_Step, Outcome, Sequence[Record]]:
        """Send parts of what was not taken: one that is taken is a witness for the rest.

        A receiver that may be away is asked no more often than it would be anyway.

        Returns:
            The records that were not taken.

        """
        parts = [(0, len(records) // 2), *((n, n + 1) for n in range(min(MAX_SINGLE_SEARCH, len(records))))]
        for begin, end in parts:
            is_busy = outcome.verdict is Verdict.RETRY and not self._took_again
            if is_busy or outcome.retry_after or not self._goes_on():
                yield _Stop(outcome)
            answer = yield records[begin:end]
            if answer.verdict is Verdict.DELIVERED:
                if self._count_delivered(records[begin:end], answer):
                    self.known_good_record = records[end - 1]
                return [*records[:begin], *records[end:]]
            self.failures += 1
            outcome = outcome if answer.verdict in _ANSWERED else answer
        yield _Stop(outcome)
        return records

    def _refuse(self, record: Record, outcome: Outcome) -> _Steps:
        """A record was refused alone."""
        self.rejected.append((record, outcome.message))
        if self.memory is not None and (self.accepted or self._has_known_good):
            name = self.memory.refuse(self.owner, record, outcome.message)
            self.refused_traits += [name] if name else []
        self._refusals += outcome.verdict is not Verdict.HALVE  # which is too large, whatever else is refused
        while self._refusals >= MAX_REFUSALS:
            if self.known_good_record is not None and (yield ASK_AGAIN).verdict is Verdict.DELIVERED:
                self._refusals = 0
            else:
                self._forget_refusals()
                message = f"{MAX_REFUSALS} records in a row were refused one by one: {outcome.message}"
                yield _Stop(Outcome(Verdict.HOLD, message))

    # ------------------------------------------------------------------ what is refused again and again

    def _offer_with_probes(self, due: list[Group], records: Sequence[Record]) -> _Steps:
        """Send records, and among them, in time order, probes of what is refused again and again."""
        while due := [group for group in due if group.records]:
            group = min(due, key=lambda group: _time(group.records[0]))
            records = list(records)
            earlier = bisect_left(records, _time(group.records[0]), key=_time)
            yield from self._offer(records[:earlier])
            records = records[earlier:]
            outcome = yield from self._ask(group.records[:1], known=self._why(group))
            if outcome.verdict is Verdict.DELIVERED:
                self._count_delivered(group.records[:1], outcome)
                records = sorted([*group.records[1:], *records], key=_time)
                group.records = []
            elif hold := self._as_hold(group.records[:1], outcome):
                yield _Stop(hold)
            else:
                self._reject_group(group, outcome.message)
        yield from self._offer(records)

    def _offer_late(self, group: Group) -> _Steps:
        """As `_offer_with_probes`, of records that others of their time have gone before."""
        while group.records:
            outcome = yield from self._ask(group.records[:1], known=self._why(group))
            if outcome.verdict is Verdict.DELIVERED:
                self._count_delivered(group.records[:1], outcome)
                yield from self._offer(group.records[1:])
                return
            self._reject_group(group, outcome.message)

    def _why(self, group: Group) -> str:
        return self.memory.why(group) if self.memory is not None else ""

    def _reject_group(self, group: Group, why: str, *, probed: bool = True) -> None:
        if self.memory is not None:
            rejected = self.memory.reject(self.owner, group, why, probed=probed)
            self.rejected += [(record, why) for record in rejected]
            self.rejected_again += len(rejected)
            self._again_message = f"{group.name} is refused: {why}"

    def _without_refused(self, records: Sequence[Record]) -> Sequence[Record]:
        """Records without those of what has turned out to be refused on the way."""
        if self.memory is None or not self.refused_traits:
            return records
        groups, records = self.memory.split(self.owner, records)
        for group in groups:
            late = next((late for late in self._late if late.trait == group.trait), None)
            if late is None:
                self._late.append(group)
            else:
                late.records += group.records
        return records

    def _as_hold(self, records: Sequence[Record], outcome: Outcome) -> Outcome | None:
        """The hold that a refusal is, where the records' times are the reason or may be."""
        if outcome.verdict is Verdict.HOLD:
            return outcome
        if len(records) == 1 and outcome.reason_hidden and self.maybe_out_of_window(records[0]):
            return Outcome(Verdict.HOLD, OUT_OF_WINDOW + outcome.message)
        return None

    # ------------------------------------------------------------------ points whose time the user gave

    def _offer_past(self, points: Sequence[PastPoint]) -> _Steps:
        """Send points whose time the user gave; as `_offer`, but what is refused is rejected."""
        while points:
            outcome = yield from self._ask(points)
            if outcome.verdict is Verdict.DELIVERED:
                self._count_delivered(points, outcome)
                return
            if outcome.verdict not in _REFUSED and not outcome.too_old:
                yield _Stop(outcome)
            elif len(points) == 1:
                self._reject_past(points, outcome)
                return
            elif outcome.too_old and points[0].series is points[-1].series:
                yield from self._offer_oldest_first(points, outcome)
                return
            else:
                for part in _parts(points, outcome):
                    yield from self._offer_past(part)
                return

    def _offer_oldest_first(self, points: Sequence[PastPoint], outcome: Outcome) -> _Steps:
        """Send points of one series, of which the receiver has said (`outcome`) that some are too old.

        Where one is too old, so are those before it: the more have been, the larger is the next stride. They go in time
        order, because a receiver without an out-of-order window takes none that is older than one it has.
        """
        begin = 0
        while begin < len(points):
            tried = min(begin + begin // STRIDE_DIVISOR, len(points) - 1)
            rejected = self._rejected_of_past
            yield from self._offer_past(points[tried : tried + 1])
            if self._rejected_of_past == rejected:
                yield from self._offer_past(points[begin:tried])
                yield from self._offer_past(points[tried + 1 :])
                return
            self._reject_past(points[begin:tried], outcome)
            begin = tried + 1

    def _reject_past(self, points: Sequence[PastPoint], outcome: Outcome) -> None:
        self.rejected += [
            (point, (WRONG_CLOCK if point.time < self.wrong_before else PAST) + outcome.message) for point in points
        ]
        self._rejected_of_past += len(points)

    def _first_message(self) -> str:
        return self.rejected[self._rejected_of_past][1]

    def _count_delivered(self, records: Sequence[Record], outcome: Outcome) -> bool:
        """Count what a request has delivered. Whether that is anything."""
        dropped = min(outcome.rejected, len(records))
        self.delivered += len(records) - dropped
        self.dropped += dropped
        self._partial_message = outcome.message if dropped else self._partial_message
        self.accepted |= dropped < len(records)
        if self.memory is not None and not dropped:
            self.memory.note_taken(self.owner, records)
        return dropped < len(records)


def _parts(records: Sequence[Any], outcome: Outcome) -> list[Sequence[Any]]:
    """The two halves of what was refused; of what is too large as many parts as the receiver's limit asks for."""
    count = min(len(records), math.ceil(1 / outcome.max_ratio)) if outcome.max_ratio else 2
    ends = [len(records) * number // count for number in range(count + 1)]
    return [records[begin:end] for begin, end in pairwise(ends)]


def _is_power_of_two(number: int) -> bool:
    """Whether it is 1, 2, 4, 8, …: what takes long to end is asked for less and less."""
    return number.bit_count() == 1


def _time(record: Record) -> int:
    """A point's time; 0 of what may go in any order."""
    return record[1] if isinstance(record, tuple) else 0
