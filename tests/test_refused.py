"""What a receiver refuses again and again: how few requests that costs, and that nothing else is rejected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from harness.delivery import OK, Time

from stepspan.deliver.isolation import MAX_TRIES, STRIKES, Isolation
from stepspan.deliver.refused import MAX_PROBES, MAX_TRAITS, MEMORY_S, ReceiverMemory
from stepspan.mapping.columns import Points
from stepspan.mapping.records import Log, Series, Span
from stepspan.otlp.outcome import Outcome, Verdict

REFUSED = Outcome(Verdict.ISOLATE, "400: label value too long")
FAILED = Outcome(Verdict.RETRY_THEN_HOLD, "500: cannot store this")
BUSY = Outcome(Verdict.RETRY, "503: busy")
FORBIDDEN = Outcome(Verdict.HOLD, "403: forbidden", may_pass=True)


class Receiver:
    """Takes a request unless a record of it is `bad`."""

    def __init__(self, bad: Callable[[Any], bool], refusal: Outcome = REFUSED) -> None:
        self.bad, self.refusal = bad, refusal
        self.requests: list[list[Any]] = []
        self.away: Outcome | None = None

    def __call__(self, records: Sequence[Any]) -> Outcome:
        self.requests.append(list(records))
        return self.away or (self.refusal if any(self.bad(record) for record in records) else OK)


class Session:
    """Batches of one session, delivered one after the other."""

    def __init__(self, receiver: Receiver, memory: ReceiverMemory, owner: str = "rank 0") -> None:
        self.receiver, self.memory, self.owner = receiver, memory, owner
        self.known_good: Any = None
        self.rejected: list[Any] = []
        self.names: list[str] = []
        self.message = ""

    def deliver(self, records: Sequence[Any]) -> int:
        """The number of requests."""
        before = len(self.receiver.requests)
        isolation = Isolation(self.receiver, self.known_good, memory=self.memory, owner=self.owner)
        outcome = isolation.run(records)
        assert outcome is not None
        for _ in range(50):
            if outcome.verdict is Verdict.DELIVERED:
                break
            outcome = isolation.run()
            assert outcome is not None
        assert outcome.verdict is Verdict.DELIVERED
        assert isolation.delivered + len(isolation.rejected) == len(records)
        self.known_good = isolation.known_good_record
        self.rejected += [record for record, _ in isolation.rejected]
        self.names += isolation.refused_traits
        self.message = outcome.message
        return len(self.receiver.requests) - before


GOOD, BAD = Series("training.loss", {"split": "train"}), Series("training.lr", {"tag": "x" * 99})


def points(begin: int, count: int, *series: Series, value: Any = 1.0) -> list[Any]:
    return [(one, 1000 * number, value) for number in range(begin, begin + count) for one in series]


def is_bad_series(record: Any) -> bool:
    return bool(record[0].name == BAD.name)


@pytest.mark.parametrize("in_columns", [False, True])
def test_a_refused_series_costs_its_own_points_and_then_one_probe_a_batch(in_columns: bool) -> None:
    receiver = Receiver(is_bad_series)
    session = Session(receiver, ReceiverMemory(Time()))

    def batch(begin: int) -> Sequence[Any]:
        times = [1000 * number for number in range(begin, begin + 1000)]
        columns = [(series, times, [1.0] * 1000) for series in (GOOD, BAD)]
        return Points([], columns) if in_columns else points(begin, 1000, GOOD, BAD)  # type: ignore[arg-type]

    assert session.deliver(batch(0)) < 60
    assert [session.deliver(batch(1000 * number)) for number in range(1, 5)][1:] == [2, 2, 2], "a probe, and all others"
    assert len(session.rejected) == 5000
    assert all(map(is_bad_series, session.rejected))
    assert session.names == [f"series training.lr (tag={'x' * 99})"], "named once"
    assert session.message.startswith("series training.lr (tag=xxx")
    assert session.message.endswith(REFUSED.message)


def test_when_a_probe_is_taken_the_series_is_forgotten_and_its_points_go_out_in_time_order() -> None:
    receiver = Receiver(is_bad_series)
    session = Session(receiver, ReceiverMemory(Time()))
    session.deliver(points(0, 100, GOOD, BAD))
    receiver.bad = lambda record: False
    rejected = len(session.rejected)
    begin = len(receiver.requests)
    session.deliver(points(100, 100, GOOD, BAD))
    assert len(session.rejected) == rejected
    times = [record[1] for request in receiver.requests[begin:] for record in request]
    assert times == sorted(times)
    assert session.deliver(points(200, 100, GOOD, BAD)) == 1


def test_what_was_refused_is_tried_again_after_ten_minutes() -> None:
    clock = Time()
    receiver = Receiver(is_bad_series)
    session = Session(receiver, ReceiverMemory(clock))
    session.deliver(points(0, 100, GOOD, BAD))
    clock.skip(MEMORY_S + 1)
    before = len(receiver.requests)
    session.deliver(points(100, 100, GOOD, BAD))
    assert len(receiver.requests[before]) == 200, "all together"


def test_points_of_a_series_that_is_taken_are_not_rejected_with_those_that_are_not() -> None:
    values = [float("nan") if number % 3 else 1.0 for number in range(300)]
    receiver = Receiver(lambda record: record[2] != record[2])
    session = Session(receiver, ReceiverMemory(Time()))
    for begin in range(0, 300, 50):
        batch = [(GOOD, 1000 * number, values[number]) for number in range(begin, begin + 50)]
        session.deliver([(BAD, 1000 * begin, 1.0), *batch])
    assert all(record[2] != record[2] for record in session.rejected)
    assert len(receiver.requests) < 150


def test_eight_ranks_with_one_bad_series_are_a_handful_of_requests() -> None:
    clock = Time()
    memory, receiver = ReceiverMemory(clock), Receiver(is_bad_series)
    ranks = [Session(receiver, memory, f"rank {number}") for number in range(8)]
    for number in range(8):  # each rank has series of its own
        series = [Series(one.name, dict(one.attributes)) for one in (GOOD, BAD)]
        ranks[number].deliver(points(0, 100, *series))
    assert len(receiver.requests) < 80, "learnt once: the others ask one probe"
    for _ in range(3):
        clock.skip(1.5)
        before = len(receiver.requests)
        for rank in ranks:
            rank.deliver(points(100, 1, GOOD, BAD))
        assert len(receiver.requests) - before <= 8 + 2
    assert all(is_bad_series(record) for rank in ranks for record in rank.rejected)


def test_a_kind_that_is_refused_costs_each_further_series_one_request() -> None:
    histograms = [Series(f"h{number}", {}, kind="histogram") for number in range(20)]
    receiver = Receiver(lambda record: record[0].kind == "histogram")
    session = Session(receiver, ReceiverMemory(Time()))
    cost = session.deliver(points(0, 20, GOOD, *histograms))
    assert cost < 150
    assert session.deliver(points(20, 20, GOOD, *histograms)) <= 2 * MAX_PROBES + 1
    assert len(session.rejected) == 2 * 20 * 20


def test_memory_is_bounded() -> None:
    memory = ReceiverMemory(Time())
    for number in range(3 * MAX_TRAITS):
        for _ in range(3):
            memory.refuse("rank 0", (Series(f"s{number}", {}), 0, 1.0), "why")
    assert len(memory._refusals) == MAX_TRAITS
    assert len(memory._shared) <= MAX_TRAITS


def span(name: str, number: int, **fields: Any) -> Span:
    return Span(bytes([number % 256]) * 16, bytes([number % 256]) * 8, None, name, number, number + 1, {}, **fields)


def test_spans_that_are_refused_for_what_they_have_in_common_are_a_handful_of_requests() -> None:
    receiver = Receiver(lambda record: record.error is not None)
    session = Session(receiver, ReceiverMemory(Time()))
    for begin in range(0, 400, 100):
        session.deliver([span("step", n, error="failed" if n % 2 else None) for n in range(begin, begin + 100)])
    assert len(receiver.requests) < 100
    assert len(session.rejected) == 200


def test_all_spans_of_a_trace_that_is_too_large_are_a_handful_of_requests() -> None:
    receiver = Receiver(lambda record: record.trace_id[0] == 7)
    session = Session(receiver, ReceiverMemory(Time()))
    session.deliver([span("step", 7 if n % 2 else n % 100 + 10) for n in range(400)])
    assert len(receiver.requests) < 100
    assert len(session.rejected) == 200


def test_log_records_of_one_event_are_a_handful_of_requests() -> None:
    receiver = Receiver(lambda record: record.event_name == "bad")
    session = Session(receiver, ReceiverMemory(Time()))
    logs = [Log(n, 9, "text", "bad" if n % 2 else "good", {}) for n in range(400)]
    session.deliver(logs)
    session.deliver(logs)
    assert len(receiver.requests) < 100
    assert len(session.rejected) == 400


# ------------------------------------------------------------------------------------------ one record, under any code


@pytest.mark.parametrize("refusal", [FAILED, BUSY, FORBIDDEN], ids=lambda outcome: outcome.message[:3])
@pytest.mark.parametrize("known", [False, True], ids=["first batch", "later batch"])
def test_one_record_is_found_under_any_code(refusal: Outcome, known: bool) -> None:
    if refusal is FORBIDDEN and not known:
        pytest.skip("without anything taken a 403 is about all")
    receiver = Receiver(lambda record: record == 700, refusal)
    known_good: Any = -1 if known else None
    isolation = Isolation(receiver, known_good)
    stops = []
    for _ in range(100):
        outcome = isolation.run(range(1000))  # type: ignore[arg-type]
        assert outcome is not None
        if outcome.verdict is Verdict.DELIVERED:
            break
        stops.append(outcome.verdict)
    assert [*map(list, isolation.rejected)] == [[700, refusal.message]]
    assert isolation.delivered == 999
    assert len(receiver.requests) < 60
    assert len(stops) <= MAX_TRIES + STRIKES + 2, "tries, each after a pause"


@pytest.mark.parametrize("refusal", [FAILED, BUSY, FORBIDDEN], ids=lambda outcome: outcome.message[:3])
@pytest.mark.parametrize("known", [False, True], ids=["first batch", "later batch"])
def test_nothing_is_rejected_while_the_receiver_takes_nothing(refusal: Outcome, known: bool) -> None:
    receiver = Receiver(lambda record: True, refusal)
    known_good: Any = -1 if known else None
    isolation = Isolation(receiver, known_good)
    for _ in range(60):
        outcome = isolation.run(range(1000))  # type: ignore[arg-type]
        assert outcome is not None
        assert outcome.verdict is refusal.verdict
    assert not isolation.rejected
    assert len(receiver.requests) <= 60 + 60
    receiver.bad = lambda record: False
    outcome = isolation.run()
    while outcome is not None and outcome.verdict is not Verdict.DELIVERED:
        outcome = isolation.run()
    assert isolation.delivered == 1000


def test_a_receiver_that_asks_to_wait_is_asked_nothing_at_once() -> None:
    receiver = Receiver(lambda record: record == 700, BUSY._replace(retry_after=30.0))
    known_good: Any = -1
    isolation = Isolation(receiver, known_good)
    for _ in range(100):
        before = len(receiver.requests)
        outcome = isolation.run(range(1000))  # type: ignore[arg-type]
        sent = receiver.requests[before:]
        assert not any(700 in request for request in sent[:-1]), "after a 429 nothing follows in the same round"
        if outcome is not None and outcome.verdict is Verdict.DELIVERED:
            break
    assert [*map(list, isolation.rejected)] == [[700, BUSY.message]]


def test_a_receiver_that_dies_of_one_record_is_asked_for_another_before_it() -> None:
    receiver = Receiver(lambda record: record == 5, BUSY)

    def send(records: Sequence[Any]) -> Outcome:
        outcome = receiver(records)
        receiver.away = BUSY if outcome is not OK else None
        return outcome

    known_good: Any = -1
    isolation = Isolation(send, known_good)
    for _ in range(100):
        receiver.away = None  # it is back with each try
        outcome = isolation.run(range(8))  # type: ignore[arg-type]
        assert outcome is not None
        if outcome.verdict is Verdict.DELIVERED:
            break
    assert [*map(list, isolation.rejected)] == [[5, BUSY.message]]


def test_a_round_is_bounded_and_the_next_one_goes_on_where_it_was() -> None:
    receiver = Receiver(lambda record: record % 10 == 0)
    isolation = Isolation(receiver)
    rounds = 0
    outcome = None
    while outcome is None:
        budget = iter(range(20))
        outcome = isolation.run(range(1000), lambda budget=budget: next(budget, None) is not None)  # type: ignore[arg-type, misc]
        rounds += 1
        assert len(receiver.requests) <= 20 * rounds
    assert outcome.verdict is Verdict.DELIVERED
    assert [record for record, _ in isolation.rejected] == [*range(0, 1000, 10)]
    assert len({tuple(request) for request in receiver.requests}) == len(receiver.requests), "nothing twice"


def test_a_receiver_that_refuses_everything_for_a_while_teaches_nothing() -> None:
    clock = Time()
    receiver = Receiver(lambda record: False)
    session = Session(receiver, ReceiverMemory(clock))
    series = [Series(f"s{number}", {}) for number in range(30)]
    session.deliver(points(0, 10, *series))
    receiver.bad = lambda record: True
    isolation = Isolation(receiver, session.known_good, memory=session.memory, owner=session.owner)
    outcome = isolation.run(points(10, 10, *series))
    assert outcome is not None
    assert outcome.verdict is Verdict.HOLD
    receiver.bad = lambda record: False
    assert session.deliver(points(10, 10, *series)) == 1
    assert not session.rejected


def test_where_one_of_several_series_is_taken_again_all_are_probed() -> None:
    receiver = Receiver(lambda record: record[0].name != GOOD.name)
    session = Session(receiver, ReceiverMemory(Time()))
    series = [Series(f"s{number}", {}) for number in range(20)]
    for begin in range(0, 100, 10):
        session.deliver(points(begin, 10, GOOD, *series))
    receiver.bad = lambda record: False
    session.deliver(points(100, 10, GOOD, *series))
    rejected = len(session.rejected)
    session.deliver(points(110, 10, GOOD, *series))
    assert len(session.rejected) == rejected, "from the next batch on"
