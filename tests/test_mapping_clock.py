"""A clock that was set during a session: durations are those that really passed, whatever event time did meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from harness.events_of import MS, SECOND, START, SessionEvents, by_series, values

from stepspan.mapping.clock import EventTime, clock_text
from stepspan.mapping.records import Histogram

HOUR = 3600.0
TRAIN = ("split", "train")


def set_forward(s: SessionEvents, seconds: float) -> None:
    """The clock was behind by so much: the next line comes that much later, and says so."""
    s.emit("clock", seconds, forward=round(seconds * SECOND))


def set_ahead(s: SessionEvents, seconds: float) -> None:
    s.emit("clock", 0.0, ahead=round(seconds * SECOND))


@pytest.mark.parametrize(
    ("start", "end", "passed"),
    [
        pytest.param(0, 10, 10, id="before the jump"),
        pytest.param(0, 120, 20, id="across the jump"),
        pytest.param(110, 120, 10, id="after the jump"),
        pytest.param(50, 120, 10, id="from within what was skipped"),
        pytest.param(0, 210, 120, id="into half speed"),
        pytest.param(210, 220, 20, id="at half speed"),
        pytest.param(0, 300, 240, id="across both"),
        pytest.param(260, 300, 40, id="right again"),
    ],
)
def test_the_time_that_passed_between_two_event_times(start: int, end: int, passed: int) -> None:
    time = EventTime()
    assert time.set({"ts": 110, "forward": 100}) == 100
    assert time.set({"ts": 200, "ahead": 40}) == -40
    assert time.elapsed(start, end) == passed


def test_a_clock_that_is_set_again_before_it_was_right() -> None:
    time = EventTime()
    assert time.set({"ts": 100, "ahead": 1000}) == -1000
    assert time.set({"ts": 200, "ahead": 50}) == 850, "it was told to be 900 ahead, and is 50"
    assert time.elapsed(100, 200) == 200
    assert time.elapsed(200, 300) == 150
    assert time.set({"ts": 320, "forward": 90}) == 90 + 20, "20 of the 50 were left"
    assert time.elapsed(200, 320) == 60
    for ts in range(1000, 2000):
        time.set({"ts": ts, "forward": 1})
    assert len(time.corrections) <= 64


def test_jumps_that_overlap_count_once() -> None:
    time = EventTime()
    for ts, forward in (4, 3600), (6, 1), (7, 3600):  # more than has passed: no clock of ours, but a line that says so
        time.set({"ts": ts, "forward": forward})
    assert time.elapsed(2, 7) == 0


def test_steps_spans_and_the_run_do_not_count_a_jump() -> None:
    s = SessionEvents()
    run = s.run()
    step = s.emit("step_begin", 1.0, parent=run, step=0, split="train")
    early = s.emit("span_begin", 1.0, parent=step, name="early")
    s.emit("span_end", 1.0, begin=early)
    across = s.emit("span_begin", 1.0, parent=step, name="across")
    s.emit("event", 0.5, name="milestone", attributes={})
    set_forward(s, 72 * HOUR)
    s.emit("span_end", 1.0, begin=across)
    s.emit("step_end", 1.0, begin=step, samples=12)
    s.emit("run_end", 1.0, begin=run, status="completed")
    points = s.records("metrics", status="completed")
    assert values(points, "training.step.time") == [pytest.approx(5.5), None]
    assert values(points, "training.phase.time", phase="across") == [pytest.approx(1.5), None]
    assert values(points, "training.throughput") == [pytest.approx(12 / 5.5), None]
    (histogram, *_) = [value for value in values(points, "training.step.duration") if isinstance(value, Histogram)]
    assert histogram.sum == pytest.approx(5.5)
    spans = {span.name: span for span in s.records("traces", status="completed")}
    lasted = {name: (span.end - span.start) / SECOND for name, span in spans.items()}
    assert lasted == {
        "training.run": pytest.approx(7.5, abs=0.01),
        "training.step": pytest.approx(5.5),
        "early": pytest.approx(1.0),
        "across": pytest.approx(1.5),
    }
    for inner, outer in [("early", "training.step"), ("across", "training.step"), ("training.step", "training.run")]:
        assert spans[outer].start <= spans[inner].start <= spans[inner].end <= spans[outer].end, inner
    (milestone,) = spans["training.run"].events
    assert milestone.time == spans["across"].start + SECOND // 2


def test_durations_at_half_speed_are_the_real_ones() -> None:
    s = SessionEvents()
    run = s.run()
    s.step(0, lasts=2.0, parent=run)
    set_ahead(s, 3.0)
    for number in range(1, 5):  # each really takes 2 s: event time sees 1 of them, until 3 are made up
        s.step(number, lasts=1.0 if number < 4 else 2.0, parent=run)
    points = s.records("metrics")
    assert values(points, "training.step.time") == [pytest.approx(2.0, abs=0.01)] * 5


def test_the_time_of_the_start_and_of_a_checkpoint_are_corrected() -> None:
    s = SessionEvents()
    s.run()
    s.emit("progress", total_steps=100)
    for number in range(10):
        s.step(number, lasts=1.0)
    s.emit("artifact", name="c", path="p", kind="checkpoint")
    made = s.ts
    set_forward(s, HOUR)
    s.step(10, lasts=1.0)
    s.emit("event", 10.0, name="later")
    found = by_series(s.records("metrics"))
    assert found[("training.run.start_time",)][0][1] == START / SECOND
    assert found[("training.run.start_time",)][-1][1] == pytest.approx(START / SECOND + HOUR)
    assert found[("training.run.checkpoint_time",)][-1][1] == pytest.approx(made / SECOND + HOUR)
    assert found[("training.run.eta",)][-1][1] < 89 * 1.01, "a second a step, not an hour"


def test_a_wait_of_a_device_is_not_overdue_because_the_clock_was_set() -> None:
    s = SessionEvents()
    step = s.emit("step_begin", parent=0, step=0, split="train")
    span = s.emit("span_begin", parent=step, name="all_reduce", collective=True, cuda=True)
    s.emit("span_end", begin=span)
    s.emit("step_end", 0.1, begin=step)
    set_forward(s, HOUR)
    s.emit("device_time", begin=span, seconds=0.125)
    assert values(s.records("metrics"), "training.step.wait") == [0.125]


@pytest.mark.parametrize(
    ("fields", "ahead", "words"),
    [
        ({"forward": 259_200 * SECOND}, -259_200.0, "72 h 0 min behind"),
        ({"ahead": 1200 * SECOND}, 1200.0, "20 min 0 s ahead"),
        ({"before": 1200 * SECOND}, 1200.0, "20 min 0 s ahead"),
        ({"before": -1200 * SECOND}, -1200.0, "20 min 0 s behind"),
    ],
)
def test_a_log_record_says_by_how_much_the_clock_was_wrong(fields: dict[str, Any], ahead: float, words: str) -> None:
    s = SessionEvents()
    s.run()
    s.emit("clock", **fields)
    (record,) = s.records("logs")
    assert (record.event_name, record.attributes) == ("stepspan.clock", {"ahead": ahead})
    assert words in record.body
    assert record.body == clock_text(s.events[-1])


def test_a_session_without_such_events_is_not_touched() -> None:
    s = SessionEvents()
    s.step(0, lasts=0.25)
    (span,) = s.records("traces")
    assert (span.start, span.end) == (START + MS, START + MS + SECOND // 4)
