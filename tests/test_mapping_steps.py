"""What is said of a step is computed once: its metrics, its span and its histogram agree on duration, wait and failure.

Also where a device tells only later how long a collective took, whatever the batches and restarts.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness.events_of import MS, SECOND, SessionEvents, by_series, restored, values
from hypothesis import given, settings
from hypothesis import strategies as st

from stepspan.mapping import steps
from stepspan.mapping.mapper import mapper
from stepspan.mapping.records import Histogram, Span

TRAIN = ("split", "train")


def step_spans(spans: Any) -> dict[int, Span]:
    return {span.attributes["step"]: span for span in spans if span.name == "training.step"}


def device_step(s: SessionEvents, number: int, *, lasts: float = 0.1, collectives: int = 1, **end: Any) -> list[int]:
    """A step with collectives that are timed on the device; the `seq` of their begins."""
    step = s.emit("step_begin", parent=0, step=number, split="train")
    spans = []
    for _ in range(collectives):
        spans.append(s.emit("span_begin", parent=step, name="all_reduce", collective=True, cuda=True))
        s.emit("span_end", begin=spans[-1])
    s.emit("step_end", lasts, begin=step, **end)
    return spans


def host_step(s: SessionEvents, number: int, wait: float) -> None:
    step = s.emit("step_begin", parent=0, step=number, split="train")
    span = s.emit("span_begin", parent=step, name="barrier", collective=True)
    s.emit("span_end", wait, begin=span)
    s.emit("step_end", begin=step)


# --- the wait


def test_a_wait_that_the_device_tells_before_the_step_ends_is_in_both() -> None:
    s = SessionEvents()
    step = s.emit("step_begin", parent=0, step=0, split="train")
    span = s.emit("span_begin", parent=step, name="all_reduce", collective=True, cuda=True)
    s.emit("span_end", begin=span)
    s.emit("device_time", begin=span, seconds=0.125)
    s.emit("step_end", begin=step)
    (point,) = by_series(s.records("metrics"))["training.step.wait", TRAIN]
    assert point == (0.005, 0.125)
    assert step_spans(s.records("traces"))[0].attributes["wait"] == 0.125


def test_a_wait_that_the_device_tells_after_the_step_has_ended_is_in_both() -> None:
    s = SessionEvents()
    first, second = device_step(s, 0, collectives=2)
    ended = s.ts
    s.emit("device_time", begin=first, seconds=0.125)
    s.metrics({"loss": 1.0})
    assert s.records("traces") == [], "the wait is not known yet"
    s.emit("device_time", begin=second, seconds=0.25)
    span, *children = s.records("traces")
    assert (span.attributes["wait"], span.end) == (0.375, ended)
    assert [child.name for child in children] == ["all_reduce", "all_reduce"]
    assert values(s.records("metrics"), "training.step.wait") == [0.375]


def test_host_and_device_add_up() -> None:
    s = SessionEvents()
    step = s.emit("step_begin", parent=0, step=0, split="train")
    barrier = s.emit("span_begin", parent=step, name="barrier", collective=True)
    s.emit("span_end", 0.5, begin=barrier)
    reduce = s.emit("span_begin", parent=step, name="all_reduce", collective=True, cuda=True)
    s.emit("span_end", begin=reduce)
    s.emit("step_end", begin=step)
    s.emit("device_time", begin=reduce, seconds=0.25)
    assert values(s.records("metrics"), "training.step.wait") == [0.75]
    assert step_spans(s.records("traces"))[0].attributes["wait"] == 0.75


def test_a_step_behind_one_whose_wait_is_not_known_waits_for_it_only_if_it_has_a_wait_itself() -> None:
    s = SessionEvents()
    (span,) = device_step(s, 0)
    host_step(s, 1, 0.5)
    s.step(2)
    assert step_spans(s.records("traces")).keys() == {2}
    s.emit("device_time", begin=span, seconds=0.25)
    assert [(n, span.attributes.get("wait")) for n, span in step_spans(s.records("traces")).items()] == [
        (2, None), (0, 0.25), (1, 0.5),
    ]  # fmt: skip
    assert values(s.records("metrics"), "training.step.wait") == [0.25, 0.5]


@pytest.mark.parametrize("seconds", [None, "x"])
def test_a_device_time_that_was_lost_takes_its_steps_wait_along_and_no_other(seconds: str | None) -> None:
    s = SessionEvents()
    spans = [device_step(s, number)[0] for number in range(3)]
    for span, written in zip(spans, (0.5, seconds, 0.25), strict=True):
        s.emit("device_time", begin=span, seconds=written)
    found = step_spans(s.records("traces"))
    assert [found[number].attributes.get("wait") for number in range(3)] == [0.5, None, 0.25]
    assert values(s.records("metrics"), "training.step.wait") == [0.5, 0.25]


def test_a_session_that_ends_before_its_device_times_sends_its_steps_without_them() -> None:
    s = SessionEvents()
    (lost,) = device_step(s, 0)
    host_step(s, 1, 0.5)
    ended = step_spans(s.records("traces", status="interrupted"))
    assert [(span.error, span.attributes.get("wait")) for span in ended.values()] == [(None, None), (None, 0.5)]
    assert values(s.records("metrics", status="interrupted"), "training.step.wait") == [0.5, None]
    s.emit("device_time", begin=lost, seconds=0.25)
    found = step_spans(s.records("traces", status="interrupted"))
    assert [span.attributes["wait"] for span in found.values()] == [0.25, 0.5]


def test_a_device_time_whose_line_was_lost_holds_up_so_many_steps_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MAX_PENDING_STEPS", 3)
    s = SessionEvents()
    device_step(s, 0)
    for number in range(1, 6):
        host_step(s, number, 0.5)
    found = step_spans(s.records("traces"))
    assert [(number, span.attributes.get("wait")) for number, span in found.items()] == [
        (0, None), *((number, 0.5) for number in range(1, 6)),
    ]  # fmt: skip
    assert values(s.records("metrics"), "training.step.wait") == [0.5] * 5


def test_a_device_time_whose_line_was_lost_holds_up_steps_for_ten_minutes_at_most() -> None:
    s = SessionEvents()
    device_step(s, 0)
    for number in (1, 2, 3):
        host_step(s, number, 250.0)
    found = step_spans(s.records("traces"))
    assert [(number, span.attributes.get("wait")) for number, span in found.items()] == [
        (0, None), (1, 250.0), (2, 250.0), (3, 250.0),
    ]  # fmt: skip
    assert values(s.records("metrics"), "training.step.wait") == [250.0] * 3


def test_device_spans_beyond_those_that_are_remembered_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MAX_DEVICE_SPANS", 2)
    s = SessionEvents()
    spans = device_step(s, 0, collectives=2) + device_step(s, 1)
    for span in spans:
        s.emit("device_time", begin=span, seconds=0.25)
    found = step_spans(s.records("traces"))
    assert [found[number].attributes.get("wait") for number in range(2)] == [None, 0.25]
    assert values(s.records("metrics"), "training.step.wait") == [0.25]


def test_a_span_that_ends_while_its_step_waits_goes_out_and_a_thinned_step_takes_it_along() -> None:
    s = SessionEvents()
    for number in range(3000):
        s.step(number, lasts=0.0005)
    for number in (3000, 3001):
        step = s.emit("step_begin", parent=0, step=number, split="train", **({"thin": True} if number % 2 else {}))
        span = s.emit("span_begin", parent=step, name="all_reduce", collective=True, cuda=True)
        s.emit("span_end", begin=span)
        save = s.emit("span_begin", parent=step, name=f"save {number}")
        s.emit("step_end", 0.001, begin=step, **({} if number % 2 else {"status": "error"}))
        s.emit("span_end", begin=save)
        s.emit("device_time", begin=span, seconds=0.125)
    fold = mapper("traces", s.header)
    found: Any = fold.map(s.events)
    assert step_spans(found)[3000].attributes["wait"] == 0.125
    assert 3001 not in step_spans(found)
    assert {span.name for span in found} == {"training.step", "all_reduce", "save 3000"}
    assert fold.filtered == 3000 + 2 + 4 - len(found)


# --- metrics, traces and the histogram agree

STEPS: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.fixed_dictionaries(
        {
            "lasts": st.sampled_from([0.0002, 0.003, 0.05, 2.0]),
            "collectives": st.lists(st.booleans(), max_size=3),
            "fails": st.sampled_from(["", "", "", "status", "caught", "in a span", "in another's span"]),
            "arrive": st.integers(0, 4),
            "split": st.sampled_from(["train", "train", "val"]),
        }
    ),
    max_size=12,
)


@st.composite
def sessions(draw: st.DrawFn) -> SessionEvents:
    """Steps whose collectives are timed on the host or on a device; its times come late, are lost, or never come."""
    s = SessionEvents(world_size=2)
    s.run()
    missing: list[int] = []

    def arrive(count: int) -> None:
        for span in missing[:count]:
            if span % 7:
                s.emit("device_time", 1e-4, begin=span, seconds=None if span % 5 == 0 else span / 64)
        del missing[:count]

    for number, about in enumerate(draw(STEPS)):
        step = s.emit("step_begin", parent=0, step=number, split=about["split"])
        for device in about["collectives"]:
            outside = s.emit("span_begin", 1e-4, parent=step, name="backward")
            cuda = {"cuda": True} if device else {}
            span = s.emit("span_begin", 1e-4, parent=outside, name="all_reduce", collective=True, **cuda)
            s.emit("span_end", about["lasts"], begin=span)
            s.emit("span_end", 1e-4, begin=outside)
            missing += [span] * device
        if about["fails"] in {"caught", "in a span"}:
            within = s.emit("span_begin", parent=step, name="forward")
            parent = step if about["fails"] == "caught" else within
            s.emit("error", parent=parent, type="ValueError", message="m", stack="", attributes={})
            s.emit("span_end", begin=within)
        if about["fails"] == "in another's span":
            trace = steps.StepFold(s.header)
            trace.begin_step(s.events[step - 1])
            record = {
                "traceId": trace.name(trace.open[step]).trace_id,
                "spanId": "00" * 8,
                "endTimeUnixNano": "1",
                "status": {"code": 2},
            }
            s.emit("otel", parent=step, signal="traces", scope={"name": "lib"}, record=record)
        arrive(about["arrive"] // 2)
        s.emit("step_end", about["lasts"], begin=step, **({"status": "error"} if about["fails"] == "status" else {}))
        arrive(about["arrive"])
    return s


@settings(deadline=None, max_examples=200)
@given(s=sessions())
def test_metrics_trace_and_histogram_agree(s: SessionEvents) -> None:
    points = s.records("metrics", status="completed")
    spans = step_spans([r for r in s.records("traces", status="completed") if isinstance(r, Span)])
    series = by_series(points)
    ended: dict[Any, dict[float, Span]] = {split: {} for split in ("train", "val")}
    for span in spans.values():
        ended[span.attributes["split"]][round((span.end - s.header["started"]) / SECOND, 9)] = span
    for split, by_end in ended.items():
        times = {
            at: value for at, value in series.get(("training.step.time", ("split", split)), []) if value is not None
        }
        waits = {
            at: value for at, value in series.get(("training.step.wait", ("split", split)), []) if value is not None
        }
        assert times == {at: pytest.approx((span.end - span.start) / SECOND) for at, span in by_end.items()}
        assert waits == {at: span.attributes["wait"] for at, span in by_end.items() if "wait" in span.attributes}
        counted = [value for value in values(points, "training.step.duration", split=split) if value is not None]
        assert sum(times.values()) == pytest.approx(counted[-1].sum if counted else 0)
        assert len(times) == (counted[-1].count if counted else 0)
    sent = {(span.trace_id, span.span_id): span for span in spans.values()}
    for _, _, value in points:
        for exemplar in value.exemplars if isinstance(value, Histogram) else ():
            span = sent[exemplar.trace_id, exemplar.span_id]
            assert exemplar.value == pytest.approx((span.end - span.start) / SECOND)
            assert exemplar.time == span.end


@pytest.mark.parametrize("signal", ["metrics", "traces"])
@settings(deadline=None, max_examples=200)
@given(s=sessions())
def test_they_are_the_same_whatever_the_batches_and_restarts(signal: Any, s: SessionEvents) -> None:
    def plain(records: Any) -> list[str]:
        if signal == "metrics":
            return sorted(f"{r[0].name} {r[0].attributes} {r[1:]}" for r in records)
        return [str(r) if isinstance(r, Span) else str(r.record) for r in records]

    at_once = mapper(signal, s.header)
    expected = [*at_once.map(s.events), *at_once.finish(s.closed())]
    times = [event["ts"] // MS for event in s.events]
    cuts = [place for place in range(1, len(times)) if times[place] != times[place - 1]]
    fold, found, begin = mapper(signal, s.header), [], 0
    for end in [*cuts, len(s.events)]:
        fold = restored(signal, s.header, fold.state())
        found += fold.map(s.events[begin:end])
        begin = end
    again = restored(signal, s.header, fold.state())
    found += again.finish(s.closed())
    assert plain(found) == plain(expected)
    assert again.filtered == at_once.filtered


def test_a_step_in_which_something_failed_goes_out_however_many_there_are() -> None:
    s = SessionEvents()
    for number in range(3001):
        step = s.emit("step_begin", 1e-4, parent=0, step=number, split="train")
        span = s.emit("span_begin", 1e-4, parent=step, name="forward")
        if number == 2777:
            s.emit("error", 1e-4, parent=span, type="ValueError", message="boom", stack="", attributes={})
        s.emit("span_end", 1e-4, begin=span)
        s.emit("step_end", 1e-4, begin=step)
    found = s.records("traces")
    assert 2777 in step_spans(found)
    assert 2779 not in step_spans(found)
    assert [span.error for span in found if span.name == "forward" and span.error] == ["ValueError: boom"]


@pytest.mark.parametrize("field", ["step", "split", "name"])
def test_what_a_processor_has_taken_the_name_of_costs_that_and_not_the_end_of_its_session(field: str) -> None:
    s = SessionEvents()
    s.run()
    for number in range(2000):  # so many that steps are thinned
        s.step(number, lasts=0.0001, split="val")
    device_step(s, 2000, collectives=3, status="error")
    for event in s.events[-8:]:
        if field in event:
            del event[field]
            break
    s.emit("step_begin", parent=0, step=2001, split="train")
    fold = mapper("traces", s.header)
    fold.map(s.events)
    found = restored("traces", s.header, fold.state()).finish(s.closed())
    assert {2001} <= step_spans(found).keys() <= {2000, 2001}
    assert [span.name for span in found].count("all_reduce") == (2 if field == "name" else 0)
    assert values(s.records("metrics", status="completed"), "training.step.duration", split="val")[-1] is None
