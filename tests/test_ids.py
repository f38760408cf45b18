"""Trace and span ids: what shares one, what must not, and that no random seed has a part in it."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stepspan.mapping import ids

HOUR = 3600 * 1_000_000_000
TEXT = st.text(max_size=4)
WHOLE = st.integers(0, 2)
STEP = st.tuples(TEXT, TEXT, st.none() | WHOLE, WHOLE, WHOLE)
OUTSIDE = st.tuples(TEXT, WHOLE, TEXT, st.none() | WHOLE, st.integers(0, 3).map(lambda hour: hour * HOUR))


@settings(deadline=None)
@given(STEP, STEP)
def test_two_steps_share_a_trace_only_if_nothing_tells_them_apart(one: Any, other: Any) -> None:
    assert (ids.step_trace_id(*one) == ids.step_trace_id(*other)) == (one == other)


@settings(deadline=None)
@given(OUTSIDE, OUTSIDE)
def test_what_lies_outside_steps_shares_a_trace_only_within_run_rank_role_epoch_and_hour(one: Any, other: Any) -> None:
    assert (ids.outside_trace_id(*one) == ids.outside_trace_id(*other)) == (one == other)


@settings(deadline=None)
@given(STEP, OUTSIDE)
def test_a_step_shares_no_trace_with_what_lies_outside(step: int, outside: Any) -> None:
    assert ids.step_trace_id(*step) != ids.outside_trace_id(*outside)  # type: ignore[misc]


@settings(deadline=None)
@given(st.tuples(WHOLE, TEXT), st.tuples(WHOLE, TEXT))
def test_two_processes_spans_of_a_step_differ(one: Any, other: Any) -> None:
    trace_id = ids.step_trace_id("run", "train", None, 0, 7)
    assert (ids.step_span_id(trace_id, *one) == ids.step_span_id(trace_id, *other)) == (one == other)


@settings(deadline=None)
@given(st.tuples(st.text("0123456789abcdef", min_size=16, max_size=16), st.integers(1, 30)), st.data())
def test_two_begin_lines_have_two_span_ids(one: Any, data: Any) -> None:
    other = data.draw(st.tuples(st.just(one[0]), st.integers(1, 30)))
    assert (ids.span_id(*one) == ids.span_id(*other)) == (one == other)


def test_the_hour_is_that_of_the_clock() -> None:
    assert ids.outside_trace_id("r", 0, "", 1, 5 * HOUR) == ids.outside_trace_id("r", 0, "", 1, 6 * HOUR - 1)
    assert ids.outside_trace_id("r", 0, "", 1, 6 * HOUR - 1) != ids.outside_trace_id("r", 0, "", 1, 6 * HOUR)


def test_ids_have_the_sizes_of_opentelemetry_and_no_randomness() -> None:
    random.seed(42)
    trace_id = ids.step_trace_id("job/0.0/0", "train", 1, 0, 812)
    assert (len(trace_id), len(ids.step_span_id(trace_id, 0)), len(ids.span_id("s", 1))) == (16, 8, 8)
    random.seed(7)
    assert ids.step_trace_id("job/0.0/0", "train", 1, 0, 812) == trace_id


def test_a_name_that_utf8_cannot_hold_has_the_ids_of_what_the_journal_makes_of_it() -> None:
    assert ids.step_trace_id("run\udc80", "train", 0, 0, 0) == ids.step_trace_id("run?", "train", 0, 0, 0)
    assert ids.step_span_id(b"t" * 16, 0, "w\udc80") == ids.step_span_id(b"t" * 16, 0, "w?")


def test_a_role_that_is_taken_again_stands_for_its_session_and_in_old_journals_for_itself() -> None:
    assert ids.unique_role("worker1", "a0", "1.1") == "worker1-a0"
    assert ids.unique_role("worker1", "a0", "1.0") == "worker1"
    assert ids.unique_role("", "a0", "1.1") == "", "a rank's own steps are known to the other ranks"
