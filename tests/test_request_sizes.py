"""A size that a receiver refused: later requests stay below it, over each transport."""

from __future__ import annotations

from typing import Any

import pytest
from harness.delivery import Time, sync, trained
from harness.received import points
from harness.receiver import Answer, ScriptedReceiver

from stepspan.otlp.endpoint import PROTOCOLS
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.otlp.request_sizes import MEMORY_S, SMALLEST_LIMIT_BYTES, RequestSizes

HALVE = Outcome(Verdict.HALVE, "413")
DELIVERED = Outcome(Verdict.DELIVERED)


def sizes() -> tuple[RequestSizes, Time]:
    clock = Time()
    return RequestSizes(clock), clock


def test_half_of_what_was_refused_is_kept_to_for_ten_minutes() -> None:
    known, clock = sizes()
    known.learn(100_000, HALVE, can_be_cut=True)
    assert known.check(50_000) is None
    outcome = known.check(50_001)
    assert outcome is not None
    assert outcome.verdict is Verdict.HALVE
    clock.skip(MEMORY_S)
    assert known.check(50_001) is None


def test_the_size_that_a_receiver_names_is_kept_to_whatever_it_counts_in() -> None:
    known, _ = sizes()
    known.learn(100_000, HALVE._replace(max_ratio=0.9), can_be_cut=True)
    assert known.check(90_000) is None
    assert known.check(90_001) is not None


def test_a_larger_one_that_is_taken_is_the_new_limit() -> None:
    known, _ = sizes()
    known.learn(100_000, HALVE, can_be_cut=True)
    known.learn(70_000, DELIVERED, can_be_cut=False)
    assert known.check(70_000) is None
    assert known.check(70_001) is not None


def test_one_record_that_is_too_large_says_nothing_of_several() -> None:
    known, _ = sizes()
    known.learn(100_000, HALVE, can_be_cut=False)
    assert known.check(60_000) is None


def test_a_receiver_that_calls_small_records_too_large_means_something_else() -> None:
    known, clock = sizes()
    known.learn(1000, HALVE, can_be_cut=True)
    known.learn(100, HALVE, can_be_cut=False)
    known.learn(1000, HALVE, can_be_cut=True)
    assert known.check(1000) is None
    clock.skip(MEMORY_S)
    known.learn(1000, HALVE, can_be_cut=True)
    assert known.check(1000) is not None
    assert SMALLEST_LIMIT_BYTES > 1000


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("says", ["nothing", "sizes"])
def test_a_refused_size_is_met_once_and_nothing_is_lost(tmp_path: Any, protocol: str, says: str) -> None:
    for rank in range(3):
        trained(tmp_path / "runs", 300, rank=rank, session=f"00000000000000a{rank}")
    with ScriptedReceiver() as receiver:

        def answer(request: Any) -> Answer:
            count = len(list(points(request)))
            text = f"received message larger than max ({count} vs. 300)" if says == "sizes" else ""
            status = 429 if says == "sizes" and protocol == "grpc" else 413
            return Answer(status, text, code="RESOURCE_EXHAUSTED" if text else None) if count > 300 else Answer()

        if protocol == "grpc" and says == "nothing":
            pytest.skip("gRPC has no 413")
        receiver.script("metrics", answer)
        where = receiver.grpc_target if protocol == "grpc" else receiver.url
        states = sync(tmp_path / "runs", where, protocol)
        refused = sum(not seen.answer.accepted for seen in receiver.seen)
    assert all(state.position.finished and not state.ledger.rejected for state in states.values())
    assert refused <= 4, "the first ones; all later requests were cut before they were sent"
