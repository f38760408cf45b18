"""Traces: given these events, exactly these spans. `whole_run` as OTLP JSON stands here in full.

Rows of the mapping's table: step, epoch and run, span, hyperparams, artifact, event, error, the end of a session; and
which traces go out at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.events_of import MS, SECOND, START, SessionEvents, mapper, restored, whole_run
from opentelemetry import trace

from stepspan import __version__
from stepspan.mapping import open_scopes, thinning, traces
from stepspan.mapping.records import Link
from stepspan.otlp import json as otlp_json
from stepspan.testing import recorded_run

HOUR = 3600 * SECOND
WHOLE_RUN = """
{"resourceSpans": [
  {"resource": {"attributes": [
     {"key": "service.name", "value": {"stringValue": "training"}},
     {"key": "rank", "value": {"intValue": "0"}}]},
   "scopeSpans": [
    {"scope": {"name": "stepspan", "version": "VERSION"},
     "spans": [
      {"traceId": "7070b321ebea69086b068ebb7ce9611e",
       "spanId": "2f2dd9359bd46f6e",
       "name": "training.step",
       "kind": 1,
       "startTimeUnixNano": "1760000000503000000",
       "endTimeUnixNano": "1760000001005000000",
       "attributes": [
        {"key": "step", "value": {"intValue": "0"}},
        {"key": "split", "value": {"stringValue": "train"}},
        {"key": "epoch", "value": {"intValue": "0"}},
        {"key": "data_wait", "value": {"doubleValue": 0.125}},
        {"key": "wait", "value": {"doubleValue": 0.25}}],
       "flags": 256,
       "links": [
        {"traceId": "aea4eb54eb251bd937e988143f204e4d",
         "spanId": "732a36b52b908bea",
         "attributes": [{"key": "relation", "value": {"stringValue": "run"}}],
         "flags": 256}]},
      {"traceId": "7070b321ebea69086b068ebb7ce9611e",
       "spanId": "21042e1001861bd9",
       "name": "all_reduce",
       "kind": 1,
       "startTimeUnixNano": "1760000000504000000",
       "endTimeUnixNano": "1760000000754000000",
       "attributes": [{"key": "collective", "value": {"boolValue": true}}],
       "flags": 256,
       "parentSpanId": "2f2dd9359bd46f6e"},
      {"traceId": "7566091271a8d882aef021d6e1694b5c",
       "spanId": "f3e6d466fd0c1466",
       "name": "training.epoch",
       "kind": 1,
       "startTimeUnixNano": "1760000000003000000",
       "endTimeUnixNano": "1760000001007000000",
       "attributes": [{"key": "epoch", "value": {"intValue": "0"}}],
       "flags": 256,
       "links": [
        {"traceId": "aea4eb54eb251bd937e988143f204e4d",
         "spanId": "732a36b52b908bea",
         "attributes": [{"key": "relation", "value": {"stringValue": "run"}}],
         "flags": 256}]},
      {"traceId": "aea4eb54eb251bd937e988143f204e4d",
       "spanId": "732a36b52b908bea",
       "name": "training.run",
       "kind": 1,
       "startTimeUnixNano": "1760000000001000000",
       "endTimeUnixNano": "1760000001008000000",
       "attributes": [
        {"key": "name", "value": {"stringValue": "digits"}},
        {"key": "group", "value": {"stringValue": "ablation"}},
        {"key": "tags", "value": {"arrayValue": {"values": [{"stringValue": "cnn"}]}}},
        {"key": "attempt", "value": {"arrayValue": {"values": [{"intValue": "0"}, {"intValue": "0"}]}}},
        {"key": "session", "value": {"stringValue": "00000000000000aa"}},
        {"key": "process.pid", "value": {"intValue": "42"}},
        {"key": "status", "value": {"stringValue": "completed"}},
        {"key": "hyperparams.lr", "value": {"doubleValue": 0.5}},
        {"key": "hyperparams.model.width", "value": {"intValue": "8"}}],
       "flags": 256,
       "events": [
        {"timeUnixNano": "1760000001006000000",
         "name": "training.artifact",
         "attributes": [
          {"key": "name", "value": {"stringValue": "ckpt"}},
          {"key": "path", "value": {"stringValue": "/tmp/ckpt.pt"}},
          {"key": "kind", "value": {"stringValue": "checkpoint"}},
          {"key": "step", "value": {"intValue": "0"}}]}]}]}]}]}"""


def test_a_whole_run_is_exactly_this_otlp() -> None:
    s = whole_run()
    body = otlp_json.encode("traces", s.header["resource"], s.records("traces", status="completed"))
    assert json.loads(body) == json.loads(WHOLE_RUN.replace("VERSION", __version__))


def spans_of(s: Any, status: Any = None) -> Any:
    return s.records("traces", status=status)


def only(spans: Any, name: str) -> Any:
    (found,) = [span for span in spans if span.name == name]
    return found


# --- who shares a trace


def step_of(*, step: int = 7, header: Any = None, **fields: Any) -> Any:
    s = SessionEvents(**(header or {}))
    s.step(step, **fields)
    (span,) = spans_of(s)
    return span


def test_all_ranks_steps_of_a_number_share_a_trace_whose_root_is_rank_0s() -> None:
    root, *others = (step_of(header={"rank": rank, "world_size": 4}) for rank in range(4))
    assert {span.trace_id for span in (root, *others)} == {root.trace_id}
    assert len({span.span_id for span in (root, *others)}) == 4
    assert root.parent_id is None
    assert {span.parent_id for span in others} == {root.span_id}


def test_a_forked_workers_step_lies_under_the_same_root() -> None:
    root, worker = step_of(), step_of(header={"role": "worker1"})
    assert (worker.trace_id, worker.parent_id) == (root.trace_id, root.span_id)
    assert worker.span_id != root.span_id


@pytest.mark.parametrize(
    "other",
    [
        {"step": 8},
        {"split": "val"},
        {"epoch": 0},
        {"lap": 1},
        {"header": {"run_key": "job/0.1/0"}},
        {"header": {"run_key": "job/0.0/1"}},
    ],
    ids=["number", "split", "epoch", "lap", "restart", "second run"],
)
def test_steps_that_are_not_the_same_share_neither_trace_nor_span(other: dict[str, Any]) -> None:
    one, two = step_of(), step_of(**other)
    assert one.trace_id != two.trace_id
    assert one.span_id != two.span_id


def test_a_session_more_or_less_changes_no_steps_ids() -> None:
    one, two = step_of(), step_of(header={"session": "00000000000000bb"})
    assert (one.trace_id, one.span_id) == (two.trace_id, two.span_id)


# --- what lies in what


def test_spans_nest_below_their_step_and_follow_it() -> None:
    s = SessionEvents()
    run = s.run()
    epoch = s.emit("epoch_begin", parent=run, epoch=3)
    step = s.emit("step_begin", parent=epoch, step=0, split="train", epoch=3)
    backward = s.emit("span_begin", parent=step, name="backward", attributes={"layers": {"n": 2}, "names": ["a"]})
    inner = s.emit("span_begin", parent=backward, name="all_reduce", collective=True)
    s.emit("span_end", begin=inner)
    s.emit("span_end", begin=backward)
    s.emit("step_end", begin=step)
    found = spans_of(s)
    assert [span.name for span in found] == ["training.step", "all_reduce", "backward"]
    step_span, inner_span, backward_span = found
    assert {span.trace_id for span in found} == {step_span.trace_id}
    assert (backward_span.parent_id, inner_span.parent_id) == (step_span.span_id, backward_span.span_id)
    assert backward_span.attributes == {"layers.n": 2, "names": ["a"]}
    assert inner_span.attributes == {"collective": True}
    assert step_span.attributes == {"step": 0, "split": "train", "epoch": 3, "wait": 0.001}
    assert backward_span.links == inner_span.links == []
    assert [link.attributes for link in step_span.links] == [{"relation": "run"}]


def test_a_validation_step_within_a_span_within_a_training_step_has_its_own_trace() -> None:
    s = SessionEvents()
    train = s.emit("step_begin", parent=0, step=0, split="train")
    evaluate = s.emit("span_begin", parent=train, name="evaluate")
    val = s.emit("step_begin", parent=evaluate, step=0, split="val")
    forward = s.emit("span_begin", parent=val, name="forward")
    for tag, begin in (("span", forward), ("step", val), ("span", evaluate), ("step", train)):
        s.emit(f"{tag}_end", begin=begin)
    found = spans_of(s)
    assert [span.name for span in found] == ["training.step", "forward", "training.step", "evaluate"]
    assert found[0].trace_id == found[1].trace_id != found[2].trace_id == found[3].trace_id
    assert found[0].parent_id is None


def test_a_span_in_an_epoch_is_its_child_and_every_root_leads_to_the_run() -> None:
    s = SessionEvents()
    run = s.run()
    load = s.emit("span_begin", parent=run, name="load")
    s.emit("span_end", begin=load)
    epoch = s.emit("epoch_begin", parent=run, epoch=0)
    save = s.emit("span_begin", parent=epoch, name="save")
    s.emit("span_end", begin=save)
    s.emit("epoch_end", begin=epoch)
    s.emit("run_end", begin=run, status="completed")
    found = spans_of(s)
    run_span, epoch_span = only(found, "training.run"), only(found, "training.epoch")
    assert (only(found, "load").trace_id, only(found, "load").parent_id) == (run_span.trace_id, run_span.span_id)
    assert (only(found, "save").trace_id, only(found, "save").parent_id) == (epoch_span.trace_id, epoch_span.span_id)
    assert epoch_span.trace_id != run_span.trace_id
    assert epoch_span.parent_id is run_span.parent_id is None
    assert epoch_span.links == [Link(run_span.trace_id, run_span.span_id, {"relation": "run"})]
    assert run_span.links == only(found, "save").links == []


def test_each_hour_has_a_trace_of_its_own_but_a_span_takes_its_children_along() -> None:
    started = START // HOUR * HOUR + HOUR - 10 * SECOND
    s = SessionEvents(started=started)
    run = s.run()
    epoch = s.emit("epoch_begin", parent=run, epoch=0)
    long = s.emit("span_begin", parent=epoch, name="long")
    within = s.emit("span_begin", 20.0, parent=long, name="within")
    s.emit("span_end", begin=within)
    s.emit("span_end", begin=long)
    late = s.emit("span_begin", parent=epoch, name="late")
    s.emit("span_end", begin=late)
    s.emit("epoch_end", begin=epoch)
    found = spans_of(s)
    epoch_span, long_span = only(found, "training.epoch"), only(found, "long")
    assert long_span.trace_id == only(found, "within").trace_id == epoch_span.trace_id
    assert only(found, "within").parent_id == long_span.span_id
    assert only(found, "late").trace_id not in {epoch_span.trace_id, long_span.trace_id}
    assert only(found, "late").parent_id is None
    assert len(only(found, "late").links) == 1


def test_the_runs_span_says_what_the_run_is() -> None:
    s = whole_run()
    assert only(spans_of(s), "training.run").attributes == {
        "name": "digits",
        "group": "ablation",
        "tags": ["cnn"],
        "attempt": [0, 0],
        "session": "00000000000000aa",
        "process.pid": 42,
        "status": "completed",
        "hyperparams.lr": 0.5,
        "hyperparams.model.width": 8,
    }


def test_milestones_are_events_of_the_run_with_what_was_said() -> None:
    s = SessionEvents()
    run = s.run()
    step = s.emit("step_begin", parent=run, step=0, split="train")
    s.emit("event", parent=step, name="restored", status="ok", attributes={"from": {"step": 7}})
    s.emit("event", parent=0, name="plain")
    s.emit("run_end", begin=run, status="completed")
    (run_span,) = spans_of(s)
    assert [(event.name, event.time - START, event.attributes) for event in run_span.events] == [
        ("restored", 3 * MS, {"from.step": 7, "status": "ok"}),
        ("plain", 4 * MS, {}),
    ]


def test_a_span_holds_no_more_than_opentelemetry_takes() -> None:
    s = SessionEvents()
    run = s.run(name="n" * 20_000)
    for number in range(200):
        s.emit("event", parent=run, name=f"event {number}")
    s.emit("hyperparams", params={f"p{number}": number for number in range(300)})
    s.emit("hyperparams", params={"one": {f"p{number}": number for number in range(300)}})
    s.emit("run_end", begin=run, status="completed")
    (span,) = spans_of(s)
    assert len(span.events) == 128
    assert len(span.attributes) < 140
    assert len(span.attributes["name"]) < 17_000


# --- errors


def fail(s: Any, parent: Any, **fields: Any) -> None:
    about = {"type": "ValueError", "message": "boom", "stack": "Traceback …", "attributes": {"batch": 3}}
    s.emit("error", parent=parent, **{**about, **fields})


def test_an_exception_stands_on_the_span_it_was_raised_in_and_fails_those_it_passed_through() -> None:
    s = SessionEvents()
    run = s.run()
    step = s.emit("step_begin", parent=run, step=0, split="train")
    forward = s.emit("span_begin", parent=step, name="forward")
    fail(s, forward)
    s.emit("span_end", begin=forward, status="error")
    s.emit("step_end", begin=step, status="error")
    s.emit("run_end", begin=run, status="failed")
    step_span, forward_span, run_span = spans_of(s)
    assert (forward_span.error, step_span.error, run_span.error) == ("ValueError: boom", "error", "failed")
    (event,) = forward_span.events
    assert (event.name, event.attributes) == (
        "exception",
        {
            "batch": 3,
            "exception.type": "ValueError",
            "exception.message": "boom",
            "exception.stacktrace": "Traceback …",
        },
    )


def test_an_error_that_was_caught_fails_its_span_only() -> None:
    s = SessionEvents()
    run = s.run()
    step = s.emit("step_begin", parent=run, step=0, split="train")
    fail(s, step)
    s.emit("step_end", begin=step)
    s.emit("run_end", begin=run, status="completed")
    step_span, run_span = spans_of(s)
    assert (step_span.error, run_span.error) == ("ValueError: boom", None)


def test_an_error_outside_of_everything_is_no_span() -> None:
    s = SessionEvents()
    fail(s, 0)
    fail(s, 99)
    assert spans_of(s) == []


# --- ends that did not come


def test_what_a_killed_session_left_open_is_an_error_that_ends_with_its_last_event() -> None:
    s = SessionEvents()
    run = s.run()
    epoch = s.emit("epoch_begin", parent=run, epoch=0)
    step = s.emit("step_begin", parent=epoch, step=812, split="train", epoch=0)
    s.emit("span_begin", parent=step, name="forward")
    s.metrics({"loss": 1.0}, after=2.0, step=812)
    found = spans_of(s, status="interrupted")
    assert [span.name for span in found] == ["training.step", "forward", "training.epoch", "training.run"]
    assert {(span.error, span.end) for span in found} == {("interrupted", s.ts)}
    assert found[0].attributes["step"] == 812
    assert found[1].parent_id == found[0].span_id
    assert found[3].attributes["status"] == "interrupted"


def test_what_stands_open_when_a_run_has_ended_was_interrupted_but_the_run_was_not() -> None:
    s = SessionEvents()
    run = s.run()
    s.emit("span_begin", parent=run, name="writer thread")
    s.emit("run_end", begin=run, status="completed")
    run_span, left = spans_of(s, status="completed")
    assert (run_span.name, run_span.error) == ("training.run", None)
    assert (left.name, left.error, left.end) == ("writer thread", "interrupted", s.ts)


def test_a_run_whose_last_line_was_damaged_ended_as_the_session_says() -> None:
    s = SessionEvents()
    s.run()
    (span,) = spans_of(s, status="completed")
    assert (span.error, span.attributes["status"]) == (None, "completed")


def test_an_end_without_a_beginning_is_no_span() -> None:
    s = SessionEvents()
    for tag in ("run", "epoch", "step", "span"):
        s.emit(f"{tag}_end", begin=77)
    assert spans_of(s, status="completed") == []


def test_a_step_whose_first_line_was_damaged_costs_that_span_and_not_what_lies_in_it() -> None:
    s = SessionEvents()
    run = s.run()
    step = s.emit("step_begin", parent=run, step=0, split="train")
    forward = s.emit("span_begin", parent=step, name="forward")
    s.emit("span_end", begin=forward)
    s.emit("step_end", begin=step)
    s.emit("run_end", begin=run, status="completed")
    del s.events[step - 1]
    forward_span, run_span = spans_of(s, status="completed")
    assert (forward_span.name, forward_span.parent_id, forward_span.error) == ("forward", None, None)
    assert forward_span.links == [Link(run_span.trace_id, run_span.span_id, {"relation": "run"})]


def test_a_span_that_outlives_its_step_is_still_its_child() -> None:
    s = SessionEvents()
    step = s.emit("step_begin", parent=0, step=0, split="train")
    save = s.emit("span_begin", parent=step, name="save")
    s.emit("step_end", begin=step)
    s.emit("span_end", 2.0, begin=save)
    step_span, save_span = spans_of(s)
    assert (save_span.trace_id, save_span.parent_id) == (step_span.trace_id, step_span.span_id)
    assert save_span.end > step_span.end


def test_a_clock_that_went_back_makes_no_span_of_negative_length() -> None:
    s = SessionEvents()
    step = s.emit("step_begin", parent=0, step=0, split="train")
    s.emit("step_end", begin=step, ended=START - SECOND)
    (span,) = spans_of(s)
    assert span.start == span.end
    (duration,) = [value for series, _, value in s.records("metrics") if series.name == "training.step.time"]
    assert duration == 0.0


def test_what_never_ends_is_not_kept_for_ever_but_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_scopes, "MAX_OPEN", 4)
    s = SessionEvents()
    run = s.run()
    for number in range(20):
        s.emit("span_begin", parent=run, name=f"leak {number}")
    found = spans_of(s, status="interrupted")
    assert [span.name for span in found] == ["leak 19", "leak 18", "leak 17", "training.run"]


@pytest.mark.parametrize("bent", [{"step": "7"}, {"step": None}, {"parent": [1]}, {"split": 3}, {"epoch": {}}], ids=str)
def test_an_event_bent_out_of_shape_costs_that_step_at_most(bent: dict[str, Any]) -> None:
    s = SessionEvents(world_size=1)
    s.step(0)
    s.step(1, **bent) if "step" not in bent else s.step(bent["step"])
    s.step(2)
    numbers = [span.attributes["step"] for span in spans_of(s, status="completed")]
    assert {0, 2} <= set(numbers)


# --- which traces go out


def fast(
    steps: int = 3000, lasts: float = 0.0005, *, rank: int = 0, world_size: int = 2, first: int = 0, **fields: Any
) -> Any:
    s = SessionEvents(rank=rank, world_size=world_size)
    for number in range(first, first + steps):
        s.step(number, lasts=lasts, **fields)
    return s


def numbers(spans: Any) -> list[Any]:
    return [span.attributes["step"] for span in spans if span.name == "training.step"]


@pytest.mark.parametrize("every", [0.0011, 0.01, 0.05, 0.09])
def test_no_more_than_ten_traces_a_second_go_out_and_not_far_fewer(every: float) -> None:
    steps = round(60 / every)
    found = spans_of(fast(steps, lasts=every - 0.001))
    for window in range(6):
        begin = START + window * 10 * SECOND
        sent = sum(begin <= span.end < begin + 10 * SECOND for span in found)
        assert 50 <= sent <= 100 + 14, (window, sent)  # one more for each doubling of the pace, in the first window


def test_slower_than_ten_a_second_all_traces_go_out() -> None:
    assert numbers(spans_of(fast(600, lasts=0.1))) == list(range(600))


def test_after_a_fast_part_all_traces_go_out_again() -> None:
    s = fast(9000, lasts=0.001)
    s.emit("event", 20.0, parent=0, name="pause")
    for number in range(9000, 9050):
        s.step(number, lasts=0.01)
    assert numbers(spans_of(s))[-50:] == list(range(9000, 9050))


def test_ranks_at_different_paces_send_nested_sets() -> None:
    quick = set(numbers(spans_of(fast(8000, lasts=0.0015, rank=1))))
    slow = set(numbers(spans_of(fast(8000, lasts=0.0120, rank=0))))
    after_first_window = {number for number in slow if number >= 2000}
    assert {number for number in quick if number >= 5000} <= {n for n in range(8000) if n % 32 == 0}
    assert {number for number in quick if number >= 5000} <= after_first_window


def test_slow_steps_go_out_whatever_their_number() -> None:
    s = SessionEvents()
    for number in range(6001):
        s.step(number, lasts=0.02 if number == 4321 else 0.001)
    assert 4321 in numbers(spans_of(s))
    assert 4323 not in numbers(spans_of(s))


def test_when_many_are_slow_only_some_are_news() -> None:
    s = SessionEvents()
    for number in range(9000):
        s.step(number, lasts=0.009 if number % 10 == 1 else 0.0001)
    odd = [number for number in numbers(spans_of(s)) if number % 2 and number > 200]
    assert 10 <= len(odd) <= 30


def test_failed_steps_go_out_with_their_children() -> None:
    s = fast()
    raised = s.emit("step_begin", parent=0, step=3001, split="train")
    fail(s, raised)
    s.emit("step_end", begin=raised, status="error")
    caught = s.emit("step_begin", parent=0, step=3003, split="train")
    span = s.emit("span_begin", parent=caught, name="forward")
    fail(s, span)
    s.emit("span_end", begin=span)
    s.emit("step_end", begin=caught)
    s.step(3005, lasts=0.0005)
    found = spans_of(s)
    assert numbers(found)[-2:] == [3001, 3003]
    assert only(found, "forward").error == "ValueError: boom"


def test_children_go_with_their_step_also_those_that_outlive_it() -> None:
    s = fast()
    for number in range(3000, 3064):
        step = s.emit("step_begin", parent=0, step=number, split="train")
        forward = s.emit("span_begin", parent=step, name="forward")
        s.emit("span_end", 0.0001, begin=forward)
        save = s.emit("span_begin", 0.0001, parent=step, name="save")
        within = s.emit("span_begin", 0.0001, parent=save, name="within")
        s.emit("step_end", 0.0001, begin=step)
        s.emit("span_end", 0.0001, begin=within)
        s.emit("span_end", 0.0001, begin=save)
    fold = mapper("traces", s.header)
    found = fold.map(s.events)
    steps = {span.trace_id for span in found if span.name == "training.step"}
    named = [span for span in found if span.name != "training.step"]
    assert 3 <= len(named) < 3 * 64
    assert len(named) % 3 == 0
    assert {span.trace_id for span in named} <= steps
    assert fold.filtered == 3000 + 4 * 64 - len(found)


def test_steps_that_a_processor_marked_thin_do_not_go_out_not_even_slow_or_failed() -> None:
    s = SessionEvents()
    for number in range(40):
        s.step(number, lasts=5.0 if number == 30 else 0.2, **({"thin": True} if number % 4 else {}))
    s.step(41, thin=True, status="error")
    caught = s.emit("step_begin", parent=0, step=42, split="train", thin=True)
    fail(s, caught)
    s.emit("step_end", begin=caught)
    fold = mapper("traces", s.header)
    assert numbers(fold.map(s.events)) == list(range(0, 40, 4))
    assert fold.filtered == 32


def test_above_2000_ranks_a_trace_holds_a_subset_of_them_and_always_rank_0() -> None:
    world = 10_000
    s = SessionEvents(rank=0, world_size=world)
    steps = [open_scopes.StepState(s.events[s.step(number) - 1]) for number in range(3)]
    for step in steps:
        step.end = {"ts": START, "begin": 0}
        kept = [rank for rank in range(world) if thinning.Thinning({**s.header, "rank": rank}).keeps(step)]
        assert kept[0] == 0
        assert len(kept) == pytest.approx(2000, rel=0.1)
    assert len(spans_of(s)) == 3


def test_at_2000_ranks_all_of_them_are_in_the_trace() -> None:
    s = SessionEvents(rank=1999, world_size=2000)
    for number in range(50):
        s.step(number, lasts=0.2)
    assert len(spans_of(s)) == 50


def test_a_step_of_very_many_spans_keeps_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_CHILDREN", 3)
    s = SessionEvents()
    step = s.emit("step_begin", parent=0, step=0, split="train")
    for number in range(5):
        span = s.emit("span_begin", parent=step, name=str(number))
        s.emit("span_end", begin=span)
    s.emit("step_end", begin=step)
    fold = mapper("traces", s.header)
    assert [span.name for span in fold.map(s.events)] == ["training.step", "0", "1", "2"]
    assert fold.filtered == 2


# --- what is carried on


def test_a_restart_in_the_middle_of_everything_changes_no_span() -> None:
    s = whole_run()
    at_once = spans_of(s, status="completed")
    for cut in range(len(s.events) + 1):
        fold = mapper("traces", s.header)
        first = fold.map(s.events[:cut])
        again = restored("traces", s.header, fold.state())
        assert first + again.map(s.events[cut:]) + again.finish(s.closed()) == at_once


def test_spans_have_the_ids_that_their_process_gave_to_opentelemetry(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("propagate: true")
    given = {}

    def warn(name: str) -> None:
        context = trace.get_current_span().get_span_context()
        given[name] = (context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big"))

    with recorded_run(rank=3, world_size=4, config=tmp_path / "settings.yaml") as recording:
        run = recording.run
        with run.epoch(2):
            warn("training.epoch")
            with run.span("save"):
                warn("save")
            with run.step(5):
                warn("training.step")
                with run.span("forward"), run.span("attention"):
                    warn("attention")
    assert {span.name: (span.trace_id, span.span_id) for span in recording.spans() if span.name in given} == given
    assert len(given) == 4


def test_what_a_span_cannot_hold_is_counted() -> None:
    s = SessionEvents()
    run = s.run()
    s.emit("hyperparams", params={f"p{n}": n for n in range(150)})
    s.emit("hyperparams", params={**{f"p{n}": -n for n in range(150)}, "lr": 0.5}, cut=7)
    for number in range(130):
        s.emit("event", parent=run, name="e", attributes={f"a{n}": number for n in range(129)})
    span = s.emit("span_begin", parent=run, name="phase", attributes={f"a{n}": n for n in range(140)}, cut=1)
    s.emit("span_end", begin=span)
    phase, whole = s.records("traces", status="completed")
    assert (len(phase.attributes), phase.dropped_attributes) == (128, 13)
    params = {name: value for name, value in whole.attributes.items() if name.startswith("hyperparams.")}
    assert params == {f"hyperparams.p{n}": -n for n in range(128)}, "the later value of a name, and no name moves"
    assert whole.dropped_attributes == 22 + 1 + 7
    assert (len(whole.events), whole.dropped_events) == (128, 2)
    assert {event.dropped_attributes for event in whole.events} == {1}
