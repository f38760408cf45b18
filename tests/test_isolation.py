"""Finding the refused records of a batch: what is sent, what is rejected, and when nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from harness.delivery import OK

from stepspan.deliver.isolation import MAX_REFUSALS, Isolation
from stepspan.mapping.records import PastPoint, Series
from stepspan.otlp.outcome import Outcome, Verdict

REFUSED = Outcome(Verdict.ISOLATE, "400: bad value")
OPAQUE = Outcome(Verdict.ISOLATE, "400: responded with HTTP Status Code 400", reason_hidden=True)
LARGE = Outcome(Verdict.HALVE, "larger than the receiver takes")


class Receiver:
    """Takes a request unless it holds one of `bad`."""

    def __init__(self, *bad: Any, refusal: Any = REFUSED, most: int = 10**9) -> None:
        self.bad, self.refusal, self.most = set(bad), refusal, most
        self.requests: list[Any] = []

    def __call__(self, records: Any) -> Any:
        self.requests.append(list(records))
        if len(records) > self.most:
            return LARGE
        return self.refusal if self.bad & set(records) else OK


def run(receiver: Any, records: Any, **fields: Any) -> tuple[Any, ...]:
    isolation = Isolation(receiver, **fields)
    return isolation, isolation.run(records)


def verdict(outcome: Outcome | None) -> Verdict | None:
    return outcome.verdict if outcome else None


def test_a_batch_that_is_taken_is_one_request() -> None:
    isolation, outcome = run(receiver := Receiver(), range(100))
    assert outcome.verdict is Verdict.DELIVERED
    assert (isolation.delivered, isolation.rejected, len(receiver.requests)) == (100, [], 1)
    assert isolation.known_good_record == 99


@pytest.mark.parametrize("bad", [0, 1, 499, 500, 999])
def test_one_bad_record_costs_one_record_and_some_twenty_requests(bad: int) -> None:
    isolation, outcome = run(receiver := Receiver(bad), range(1000))
    assert outcome.verdict is Verdict.DELIVERED
    assert isolation.rejected == [(bad, "400: bad value")]
    assert isolation.delivered == 999
    assert len(receiver.requests) <= 21
    assert outcome.message == "400: bad value"


def test_bad_records_far_apart_are_all_found() -> None:
    bad = [3, 77, 78, 640, 999]
    isolation, outcome = run(Receiver(*bad), range(1000))
    assert outcome.verdict is Verdict.DELIVERED
    assert [record for record, _ in isolation.rejected] == bad
    assert isolation.delivered == 995


def test_halves_go_out_in_order() -> None:
    receiver = Receiver(6)
    run(receiver, range(8))
    assert receiver.requests == [[*range(8)], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [6, 7], [6], [7]]


def test_too_large_is_halved_until_it_fits_and_nothing_is_rejected() -> None:
    isolation, outcome = run(receiver := Receiver(most=300), range(1000))
    assert outcome.verdict is Verdict.DELIVERED
    assert (isolation.delivered, isolation.rejected) == (1000, [])
    assert [len(r) for r in receiver.requests] == [1000, 500, 250, 250, 500, 250, 250]


def test_a_record_that_is_too_large_alone_is_rejected() -> None:
    isolation, outcome = run(lambda records: LARGE if 5 in records else OK, range(10))
    assert outcome.verdict is Verdict.DELIVERED
    assert isolation.rejected == [(5, LARGE.message)]


def test_sixteen_single_refusals_in_a_row_hold() -> None:
    _, outcome = run(receiver := Receiver(*range(100)), range(100))
    assert outcome.verdict is Verdict.HOLD
    assert f"{MAX_REFUSALS} records in a row" in outcome.message
    assert "400: bad value" in outcome.message
    assert sum(len(request) == 1 for request in receiver.requests) == MAX_REFUSALS


def test_fifteen_in_a_row_are_rejected_if_the_receiver_took_another() -> None:
    isolation, outcome = run(Receiver(*range(15)), range(16))
    assert outcome.verdict is Verdict.DELIVERED
    assert [record for record, _ in isolation.rejected] == [*range(15)]


def test_a_row_is_broken_by_a_record_that_is_taken() -> None:
    bad = [number for number in range(48) if number % 12]
    isolation, outcome = run(Receiver(*bad), range(48))
    assert outcome.verdict is Verdict.DELIVERED
    assert len(isolation.rejected) == 44


def test_a_first_record_that_is_refused_is_held_for_the_receiver_has_taken_nothing_yet() -> None:
    _, outcome = run(receiver := Receiver(1), [1])
    assert outcome.verdict is Verdict.HOLD
    assert "the receiver has accepted nothing yet" in outcome.message
    assert "400: bad value" in outcome.message
    assert receiver.requests == [[1]]


def test_a_record_is_rejected_if_a_witness_is_taken_again() -> None:
    isolation, outcome = run(receiver := Receiver(1), [1], known_good_record=0)
    assert outcome.verdict is Verdict.DELIVERED
    assert isolation.rejected == [(1, "400: bad value")]
    assert receiver.requests == [[1], [0]]
    assert (isolation.delivered, isolation.known_good_record) == (0, 0), "the known_good_record is not counted again"


def test_a_witness_that_is_refused_now_holds() -> None:
    _, outcome = run(Receiver(0, 1), [1], known_good_record=0)
    assert outcome.verdict is Verdict.HOLD
    assert "the receiver refuses a record that it accepted before" in outcome.message


def test_a_witness_is_not_asked_where_another_record_was_taken() -> None:
    receiver = Receiver(1)
    isolation, _ = run(receiver, [1, 2], known_good_record=0)
    assert [0] not in receiver.requests
    assert isolation.rejected == [(1, "400: bad value")]


@pytest.mark.parametrize("verdict", [Verdict.RETRY, Verdict.RETRY_THEN_HOLD, Verdict.HOLD])
def test_trouble_in_the_middle_stops_and_says_so(verdict: Any) -> None:
    trouble = Outcome(verdict, "trouble", retry_after=7.0)
    answers = iter([REFUSED, OK])
    _, outcome = run(lambda records: next(answers, trouble), range(8))
    assert outcome == trouble


def test_partial_success_is_counted() -> None:
    isolation, outcome = run(lambda records: Outcome(Verdict.DELIVERED, "2 rejected", rejected=2), range(10))
    assert outcome == Outcome(Verdict.DELIVERED, "2 rejected")
    assert (isolation.delivered, isolation.dropped, isolation.rejected) == (8, 2, [])


def test_a_receiver_that_took_none_of_a_request_has_taken_nothing() -> None:
    answers = iter([REFUSED, Outcome(Verdict.DELIVERED, rejected=1), REFUSED])
    isolation, outcome = run(lambda records: next(answers), [0, 1])
    assert outcome.verdict is Verdict.HOLD
    assert isolation.known_good_record is None


def test_an_opaque_refusal_holds_where_time_may_be_the_reason() -> None:
    isolation, outcome = run(Receiver(3, refusal=OPAQUE), range(8), maybe_out_of_window=lambda record: record == 3)
    assert outcome.verdict is Verdict.HOLD
    assert isolation.rejected == []
    for words in ("storage.tsdb.out_of_order_time_window", "look in the backend's log", OPAQUE.message):
        assert words in outcome.message


def test_an_opaque_refusal_of_a_timely_record_rejects_it() -> None:
    isolation, outcome = run(Receiver(3, refusal=OPAQUE), range(8), maybe_out_of_window=lambda record: record != 3)
    assert outcome.verdict is Verdict.DELIVERED
    assert isolation.rejected == [(3, OPAQUE.message)]


def test_a_refusal_with_a_reason_rejects_whatever_the_time() -> None:
    isolation, outcome = run(Receiver(3), range(8), maybe_out_of_window=lambda record: True)
    assert outcome.verdict is Verdict.DELIVERED
    assert isolation.rejected == [(3, "400: bad value")]


# ------------------------------------------------------------------------------------------ points of the user's times


class PastReceiver:
    """Takes points of a series from a time on; with `ordered`, none that is older than one it has."""

    def __init__(self, since: dict[str, int], *, ordered: bool = False, hidden: bool = False) -> None:
        self.since, self.ordered, self.requests = dict(since), ordered, 0
        self.refusal = OPAQUE if hidden else Outcome(Verdict.HOLD, "out of order sample", too_old=True)

    def __call__(self, records: Sequence[Any]) -> Outcome:
        self.requests += 1
        if any(ts < self.since.get(series.name, 0) for series, ts, _ in records):
            return self.refusal
        if self.ordered:
            self.since |= {series.name: ts for series, ts, _ in records}
        return Outcome(Verdict.DELIVERED)


PAST_A, PAST_B, LIVE = Series("a", {}), Series("b", {}), Series("live", {})


def past(count: int, *series: Series) -> list[Any]:
    return [PastPoint(one, number, 1.0) for number in range(count) for one in series]


@pytest.mark.parametrize("since", [0, 1, 5, 9, 10])
@pytest.mark.parametrize("hidden", [False, True])
def test_points_of_the_past_are_rejected_where_they_are_too_old_and_hold_nothing(since: int, hidden: bool) -> None:
    receiver = PastReceiver({"a": since, "b": 3}, ordered=True, hidden=hidden)
    isolation = Isolation(receiver, maybe_out_of_window=lambda record: True)
    live = [(LIVE, 100, 1.0), (LIVE, 101, 1.0)]
    assert verdict(isolation.run([live[0], *past(10, PAST_A, PAST_B), live[1]])) is Verdict.DELIVERED
    rejected: list[Any] = isolation.rejected
    refused = [(point.series.name, point.time) for point, _ in rejected]
    assert sorted(refused) == [*(("a", n) for n in range(since)), *(("b", n) for n in range(3))]
    assert isolation.delivered == 2 + 20 - len(refused)
    assert all("sync --rejected" in why for _, why in rejected)


def test_a_curve_that_is_too_old_costs_few_requests() -> None:
    receiver = PastReceiver({"a": 10**9})
    isolation = Isolation(receiver)
    assert verdict(isolation.run(past(10_000, PAST_A))) is Verdict.DELIVERED
    assert len(isolation.rejected) == 10_000
    assert receiver.requests < 100


def test_a_curve_of_the_past_waits_for_a_receiver_that_is_away() -> None:
    isolation = Isolation(lambda records: Outcome(Verdict.RETRY, "away"))
    assert verdict(isolation.run(past(10, PAST_A))) is Verdict.RETRY
    assert not isolation.rejected


def test_points_of_a_wrong_clock_are_rejected_where_they_are_too_old_and_hold_nothing() -> None:
    receiver = PastReceiver({"a": 10**9, "live": 50})
    isolation = Isolation(receiver, wrong_before=60)
    points: list[Any] = [(LIVE, 40, 1.0), (PAST_A, 41, 1.0), (LIVE, 55, 1.0), (LIVE, 100, 1.0)]
    assert verdict(isolation.run(points)) is Verdict.DELIVERED
    rejected: list[Any] = isolation.rejected
    assert [(point.series.name, point.time) for point, _ in rejected] == [("live", 40), ("a", 41)]
    assert all("the clock was wrong" in why for _, why in rejected)
    assert isolation.delivered == 2
