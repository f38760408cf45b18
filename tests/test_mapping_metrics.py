"""Metrics: given these events, exactly these points. `whole_run` as OTLP JSON stands here in full.

Rows of the mapping's table: metrics, step, epoch and run, span, error, the end of a session.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from harness.events_of import MS, SECOND, START, SessionEvents, by_series, key_of, restored, values, whole_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stepspan import __version__
from stepspan.mapping import metrics as mapping
from stepspan.mapping import open_scopes
from stepspan.mapping.histogram import HistogramState
from stepspan.mapping.mapper import mapper
from stepspan.mapping.records import Histogram, Sum
from stepspan.otlp import json as otlp_json

TRAIN = ("split", "train")
STARTED = START / SECOND
WHOLE_RUN = """
{"resourceMetrics": [
  {"resource": {"attributes": [
     {"key": "service.name", "value": {"stringValue": "training"}},
     {"key": "rank", "value": {"intValue": "0"}}]},
   "scopeMetrics": [
    {"scope": {"name": "stepspan", "version": "VERSION"},
     "metrics": [
      {"name": "training.run.info",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000000001000000",
          "asDouble": 1.0,
          "attributes": [
           {"key": "name", "value": {"stringValue": "digits"}},
           {"key": "group", "value": {"stringValue": "ablation"}}]},
         {"timeUnixNano": "1760000000002000000",
          "flags": 1,
          "attributes": [
           {"key": "name", "value": {"stringValue": "digits"}},
           {"key": "group", "value": {"stringValue": "ablation"}}]},
         {"timeUnixNano": "1760000000002000000",
          "asDouble": 1.0,
          "attributes": [
           {"key": "name", "value": {"stringValue": "digits"}},
           {"key": "group", "value": {"stringValue": "ablation"}},
           {"key": "lr", "value": {"stringValue": "0.5"}}]},
         {"timeUnixNano": "1760000001009000000",
          "asDouble": 1.0,
          "attributes": [
           {"key": "name", "value": {"stringValue": "digits"}},
           {"key": "group", "value": {"stringValue": "ablation"}},
           {"key": "lr", "value": {"stringValue": "0.5"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [
           {"key": "name", "value": {"stringValue": "digits"}},
           {"key": "group", "value": {"stringValue": "ablation"}},
           {"key": "lr", "value": {"stringValue": "0.5"}}]}]}},
      {"name": "training.run.start_time",
       "unit": "s",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000000001000000", "asDouble": 1760000000.0, "attributes": []},
         {"timeUnixNano": "1760000001009000000", "asDouble": 1760000000.0, "attributes": []},
         {"timeUnixNano": "1760000001010000000", "flags": 1, "attributes": []}]}},
      {"name": "training.run.epoch",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000000003000000", "asDouble": 0.0, "attributes": []},
         {"timeUnixNano": "1760000001009000000", "asDouble": 0.0, "attributes": []},
         {"timeUnixNano": "1760000001010000000", "flags": 1, "attributes": []}]}},
      {"name": "training.phase.time",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000000754000000",
          "asDouble": 0.25,
          "attributes": [{"key": "phase", "value": {"stringValue": "all_reduce"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [{"key": "phase", "value": {"stringValue": "all_reduce"}}]},
         {"timeUnixNano": "1760000001005000000",
          "asDouble": 0.125,
          "attributes": [{"key": "phase", "value": {"stringValue": "data_wait"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [{"key": "phase", "value": {"stringValue": "data_wait"}}]}]},
       "unit": "s"},
      {"name": "training.nonfinite",
       "unit": "{value}",
       "sum": {"aggregationTemporality": 2, "isMonotonic": true, "dataPoints": [
         {"timeUnixNano": "1760000000755000000",
          "startTimeUnixNano": "1760000000000000000",
          "asDouble": 1.0,
          "attributes": [
           {"key": "split", "value": {"stringValue": "val"}},
           {"key": "key", "value": {"stringValue": "val/loss"}}]},
         {"timeUnixNano": "1760000001009000000",
          "startTimeUnixNano": "1760000000000000000",
          "asDouble": 1.0,
          "attributes": [
           {"key": "split", "value": {"stringValue": "val"}},
           {"key": "key", "value": {"stringValue": "val/loss"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [
           {"key": "split", "value": {"stringValue": "val"}},
           {"key": "key", "value": {"stringValue": "val/loss"}}]}]}},
      {"name": "training.loss",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000000755000000",
          "asDouble": 0.75,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]},
         {"timeUnixNano": "1760000000755000000",
          "asDouble": "NaN",
          "attributes": [
           {"key": "split", "value": {"stringValue": "val"}},
           {"key": "key", "value": {"stringValue": "val/loss"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [
           {"key": "split", "value": {"stringValue": "val"}},
           {"key": "key", "value": {"stringValue": "val/loss"}}]}]}},
      {"name": "training.step.number",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000000755000000",
          "asDouble": 0.0,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]},
         {"timeUnixNano": "1760000000755000000",
          "asDouble": 0.0,
          "attributes": [{"key": "split", "value": {"stringValue": "val"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [{"key": "split", "value": {"stringValue": "val"}}]}]}},
      {"name": "training.step.time",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000001005000000",
          "asDouble": 0.502,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]}]},
       "unit": "s"},
      {"name": "training.step.wait",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000001005000000",
          "asDouble": 0.25,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]}]},
       "unit": "s"},
      {"name": "training.run.checkpoint_time",
       "unit": "s",
       "gauge": {"dataPoints": [
         {"timeUnixNano": "1760000001009000000", "asDouble": 1760000001.006, "attributes": []},
         {"timeUnixNano": "1760000001010000000", "flags": 1, "attributes": []}]}},
      {"name": "training.step.duration",
       "exponentialHistogram": {"dataPoints": [
         {"timeUnixNano": "1760000001009000000",
          "startTimeUnixNano": "1760000000000000000",
          "count": "1",
          "sum": 0.502,
          "min": 0.502,
          "max": 0.502,
          "scale": 3,
          "zeroCount": "0",
          "positive": {"offset": -8, "bucketCounts": ["1"]},
          "exemplars": [
           {"timeUnixNano": "1760000001005000000",
            "asDouble": 0.502,
            "traceId": "7070b321ebea69086b068ebb7ce9611e",
            "spanId": "2f2dd9359bd46f6e"}],
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]},
         {"timeUnixNano": "1760000001010000000",
          "flags": 1,
          "attributes": [{"key": "split", "value": {"stringValue": "train"}}]}],
        "aggregationTemporality": 2},
       "unit": "s"}]}]}]}"""


def test_a_whole_run_is_exactly_this_otlp() -> None:
    s = whole_run()
    body = otlp_json.encode("metrics", s.header["resource"], s.records("metrics", status="completed"))
    assert json.loads(body) == json.loads(WHOLE_RUN.replace("VERSION", __version__))


# --- logged values


def test_each_key_is_a_gauge_of_its_split_and_the_step_number_comes_with_it() -> None:
    s = SessionEvents()
    s.metrics({"loss": 0.5, "val/loss": 0.75, "a.b": 2}, step=7)
    assert by_series(s.records("metrics")) == {
        ("training.loss", TRAIN): [(0.001, 0.5)],
        ("training.loss", ("key", "val/loss"), ("split", "val")): [(0.001, 0.75)],
        ("training.a.b", ("key", "a.b"), TRAIN): [(0.001, 2.0)],
        ("training.step.number", TRAIN): [(0.001, 7.0)],
        ("training.step.number", ("split", "val")): [(0.001, 7.0)],
    }
    assert {(p[0].unit, p[0].kind) for p in s.records("metrics")} == {("", "gauge")}


def test_metrics_without_a_step_have_no_step_number_not_even_at_the_end() -> None:
    s = SessionEvents()
    s.metrics({"loss": 0.5})
    assert by_series(s.records("metrics", status="completed")) == {
        ("training.loss", TRAIN): [(0.001, 0.5), (0.003, None)]
    }


@pytest.mark.parametrize("calls", [1, 3], ids=["first call", "further calls"])
def test_a_step_of_its_own_stands_beside_each_value_and_not_in_the_step_number(calls: int) -> None:
    s = SessionEvents()
    for call in range(calls):
        s.metrics({"gsm8k": 0.25, "val/loss": 0.5}, step=120 + call, own_step=100)
    times = [0.001 * (1 + call) for call in range(calls)]
    assert by_series(s.records("metrics")) == {
        ("training.gsm8k", TRAIN): [(at, 0.25) for at in times],
        ("training.loss", ("key", "val/loss"), ("split", "val")): [(at, 0.5) for at in times],
        ("training.step.number", TRAIN): [(at, 120.0 + call) for call, at in enumerate(times)],
        ("training.step.number", ("split", "val")): [(at, 120.0 + call) for call, at in enumerate(times)],
        ("training.step.logged", ("key", "gsm8k"), TRAIN): [(at, 100.0) for at in times],
        ("training.step.logged", ("key", "val/loss"), ("split", "val")): [(at, 100.0) for at in times],
    }


def test_splits_that_are_at_other_steps_have_theirs_in_the_line() -> None:
    s = SessionEvents()
    s.metrics({"loss": 0.5, "train/loss": 0.25, "val/loss": 1.0}, step=7, split="labeled", steps={"train": [90, 88]})
    assert by_series(s.records("metrics")) == {
        ("training.loss", ("split", "labeled")): [(0.001, 0.5)],
        ("training.loss", ("key", "train/loss"), TRAIN): [(0.001, 0.25)],
        ("training.loss", ("key", "val/loss"), ("split", "val")): [(0.001, 1.0)],
        ("training.step.number", ("split", "labeled")): [(0.001, 7.0)],
        ("training.step.number", TRAIN): [(0.001, 90.0)],
        ("training.step.number", ("split", "val")): [(0.001, 7.0)],
        ("training.step.logged", ("key", "train/loss"), TRAIN): [(0.001, 88.0)],
    }


def test_a_step_of_its_own_without_one_in_force_is_still_the_values() -> None:
    s = SessionEvents()
    for _ in range(2):  # a processor has taken `step` away
        s.metrics({"loss": 0.5}, own_step=3)
    assert values(s.records("metrics"), "training.step.logged") == [3, 3]
    assert values(s.records("metrics"), "training.step.number") == []


def test_the_splits_of_calls_stay_apart() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0}, step=1, split="train")
    s.metrics({"loss": 2.0}, step=1, split="val")
    assert values(s.records("metrics"), "training.loss", split="train") == [1.0]
    assert values(s.records("metrics"), "training.loss", split="val") == [2.0]


def test_calls_less_than_a_millisecond_apart_take_one_millisecond_after_the_other() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0, "lr": 9.0}, step=1)
    s.metrics({"loss": 2.0}, after=0.0004, step=2)
    s.metrics({"loss": 3.0}, after=0.0005, step=3)
    s.metrics({"loss": 4.0}, after=0.0001, step=4)
    s.metrics({"lr": 8.0}, after=0.0001, step=4)
    fold = mapper("metrics", s.header)
    assert by_series([*fold.map(s.events), *fold.release()]) == {
        ("training.loss", TRAIN): [(0.001, 1.0), (0.002, 2.0), (0.003, 3.0), (0.004, 4.0)],
        ("training.lr", TRAIN): [(0.001, 9.0), (0.004, 8.0)],
        ("training.step.number", TRAIN): [(0.001, 1.0), (0.002, 2.0), (0.003, 3.0), (0.004, 4.0)],
    }
    assert (fold.filtered, fold.thinned) == (0, 0)


def test_a_row_keeps_the_time_of_its_line_where_nothing_is_in_its_way() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0}, after=0.0013)
    s.metrics({"lr": 9.0}, after=0.0002)
    s.metrics({"loss": 2.0}, after=0.0001)
    s.metrics({"loss": 3.0}, after=0.0017)
    assert by_series(s.records("metrics")) == {
        ("training.loss", TRAIN): [(0.0013, 1.0), (0.002, 2.0), (0.0033, 3.0)],
        ("training.lr", TRAIN): [(0.0015, 9.0)],
    }


def test_keys_that_differ_by_their_prefix_only_are_series_of_their_own() -> None:
    s = SessionEvents()
    for number in range(2):
        s.metrics({"train/loss": 1.0 + number, "loss": 2.0 + number, "train_loss": 3.0 + number, "val/loss": 9.0})
        s.metrics({"loss": 7.0, "val/loss": 8.0}, split="val")
    fold = mapper("metrics", s.header)
    found = by_series(fold.map(s.events))
    assert {series: [value for _, value in points] for series, points in found.items()} == {
        ("training.loss", TRAIN): [2.0, 3.0],
        ("training.loss", ("key", "train/loss"), TRAIN): [1.0, 2.0],
        ("training.loss", ("key", "train_loss"), TRAIN): [3.0, 4.0],
        ("training.loss", ("split", "val")): [7.0, 7.0],
        ("training.loss", ("key", "val/loss"), ("split", "val")): [9.0, 8.0, 9.0, 8.0],
    }
    assert fold.filtered == 0


@pytest.mark.parametrize(
    ("written", "value"), [("Infinity", math.inf), ("-Infinity", -math.inf), (True, 1.0), (3, 3.0), ("0.125", 0.125)]
)
def test_a_value_as_the_journal_writes_it(written: bool | int | str, value: Any) -> None:
    s = SessionEvents()
    s.metrics({"loss": written})
    (found,) = values(s.records("metrics"), "training.loss")
    assert found == value
    assert type(found) is float


def test_nan_is_a_value() -> None:
    s = SessionEvents()
    s.metrics({"loss": "NaN"})
    (found,) = values(s.records("metrics"), "training.loss")
    assert math.isnan(found)


@pytest.mark.parametrize("junk", ["abc", None, [1], {"a": 1}], ids=str)
def test_what_a_processor_made_no_number_costs_only_that_value(junk: Any) -> None:
    s = SessionEvents()
    s.metrics({"before": 1.0, "junk": junk, "after": 2.0}, step=junk)
    assert by_series(s.records("metrics")) == {
        ("training.before", TRAIN): [(0.001, 1.0)],
        ("training.after", TRAIN): [(0.001, 2.0)],
    }


@pytest.mark.parametrize(
    "bent",
    [{"metrics": [1]}, {"metrics": {}}, {"split": None}, {"split": ["x"]}, {"attributes": 3}],
    ids=str,
)
def test_an_event_bent_out_of_shape_costs_that_event(bent: dict[str, Any]) -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0})
    s.metrics({"loss": 2.0})
    s.events[-1].update(bent)
    s.metrics({"loss": 3.0})
    assert {1.0, 3.0} <= set(values(s.records("metrics"), "training.loss"))


def test_attributes_that_a_processor_added_make_series_of_their_own() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0}, step=1, attributes={"tier": "a"})
    s.metrics({"loss": 2.0}, step=2, attributes={"tier": "b", "split": "mine"})
    s.metrics({"loss": 3.0}, step=3)
    assert by_series(s.records("metrics")) == {
        ("training.loss", TRAIN, ("tier", "a")): [(0.001, 1.0)],
        ("training.step.number", TRAIN, ("tier", "a")): [(0.001, 1.0)],
        ("training.loss", TRAIN, ("tier", "b")): [(0.002, 2.0)],
        ("training.step.number", TRAIN, ("tier", "b")): [(0.002, 2.0)],
        ("training.loss", TRAIN): [(0.003, 3.0)],
        ("training.step.number", TRAIN): [(0.003, 3.0)],
    }


def test_an_attribute_does_not_pass_for_a_key() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0, "train/loss": 2.0}, attributes={"key": "train/loss"})
    assert by_series(s.records("metrics")) == {
        ("training.loss", TRAIN): [(0.001, 1.0)],
        ("training.loss", ("key", "train/loss"), TRAIN): [(0.001, 2.0)],
    }


def test_many_sets_of_keys_are_not_all_remembered_and_still_are_the_same_series(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mapping, "MAX_TABLES", 2)
    s = SessionEvents()
    for number in range(9):
        s.metrics({"loss": float(number), f"other_{number % 4}": 1.0})
    points = s.records("metrics")
    assert values(points, "training.loss") == [float(number) for number in range(9)]
    assert len({id(series) for series, _, _ in points}) == 5


def test_the_step_is_no_label() -> None:
    s = SessionEvents()
    run = s.run()
    for number in range(50):
        step = s.emit("step_begin", parent=run, step=number, split="train")
        s.metrics({"loss": 1.0, "step": 2.0}, step=number)
        s.emit("step_end", begin=step)
    points = s.records("metrics", status="completed")
    assert len({key_of(series) for series, _, _ in points}) == 7
    assert {label for series, _, _ in points for label in series.attributes} == {"split", "name"}


# --- steps and phases


def test_a_step_has_its_time_its_waits_and_a_histogram() -> None:
    s = SessionEvents()
    run = s.run()
    step = s.emit("step_begin", parent=run, step=3, split="val")
    s.emit("step_end", 0.25, begin=step, data_wait=0.5)
    points = s.records("metrics", status="completed")
    assert by_series(points)["training.step.time", ("split", "val")] == [(0.252, 0.25), (0.254, None)]
    assert by_series(points)["training.phase.time", ("phase", "data_wait")] == [(0.252, 0.5), (0.254, None)]
    assert ("training.step.wait", ("split", "val")) not in by_series(points)
    (durations, end) = values(points, "training.step.duration", split="val")
    assert (durations.start, durations.count, durations.sum, end) == (START, 1, 0.25, None)


def test_a_step_whose_loop_was_left_ended_then_and_not_when_it_was_written() -> None:
    s = SessionEvents()
    step = s.emit("step_begin", parent=0, step=0, split="train")
    s.emit("step_end", 5.0, begin=step, ended=s.ts + 2 * SECOND)
    assert by_series(s.records("metrics"))["training.step.time", TRAIN] == [(5.001, 2.0)]


def test_collectives_add_up_to_the_steps_wait_however_deep_and_once_each() -> None:
    s = SessionEvents()
    step = s.emit("step_begin", parent=0, step=0, split="train")
    backward = s.emit("span_begin", parent=step, name="backward")
    reduce = s.emit("span_begin", parent=backward, name="all_reduce", collective=True)
    inner = s.emit("span_begin", parent=reduce, name="bucket", collective=True)
    s.emit("span_end", 0.5, begin=inner)
    s.emit("span_end", 0.499, begin=reduce)
    s.emit("span_end", begin=backward)
    barrier = s.emit("span_begin", parent=step, name="barrier", collective=True)
    s.emit("span_end", 2.0, begin=barrier)
    s.emit("step_end", begin=step)
    outside = s.emit("span_begin", parent=0, name="barrier", collective=True)
    s.emit("span_end", 4.0, begin=outside)
    s.step(1)
    points = s.records("metrics")
    assert values(points, "training.step.wait") == [3.0]
    assert values(points, "training.phase.time", phase="barrier") == [2.0, 4.0]
    assert values(points, "training.phase.time", phase="bucket") == [0.5]


def test_the_end_of_what_nobody_saw_begin_is_no_point() -> None:
    s = SessionEvents()
    s.emit("step_end", begin=77, data_wait=1.0)
    s.emit("span_end", begin=78)
    assert s.records("metrics") == []


def test_what_never_ends_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_scopes, "MAX_OPEN", 5)
    s = SessionEvents()
    for number in range(20):
        s.emit("step_begin", parent=0, step=number, split="train")
    s.emit("event", 10.0, parent=0, name="later")
    fold = mapper("metrics", s.header)
    fold.map(s.events)
    assert [scope["begin"]["step"] for scope in fold.state()["steps"]["open"]] == [15, 16, 17, 18, 19]


def test_mapping_leaves_the_events_as_they_are() -> None:
    s = whole_run()
    before = copy.deepcopy(s.events)
    for signal in ("metrics", "traces", "logs"):
        s.records(signal, status="completed")
    assert s.events == before


# --- the histogram


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e5), min_size=1, max_size=40))
def test_each_duration_is_counted_in_the_bucket_between_whose_bounds_it_lies(durations: Any) -> None:
    bounds = [2 ** (index / 8) for index in range(-170, 150)]
    assume(all(abs(d / b - 1) > 1e-12 for d in durations for b in bounds))
    state = HistogramState()
    for duration in durations:
        state.add([duration])
    found = HistogramState(**json.loads(json.dumps(asdict(state)))).value(START)
    assert (found.count, found.sum, found.minimum, found.maximum, found.zero_count) == (
        len(durations), sum(durations), min(durations), max(durations), 0
    )  # fmt: skip
    assert sum(found.counts) == len(durations)
    for place, count in enumerate(found.counts):
        low, high = 2 ** ((found.offset + place) / 8), 2 ** ((found.offset + place + 1) / 8)
        assert count == sum(low < duration <= high for duration in durations)


@pytest.mark.parametrize(
    ("duration", "bucket"), [(1.0, -1), (2.0, 7), (0.5, -9), (math.nextafter(1.0, 2.0), 0), (1.05, 0)]
)
def test_a_bucket_has_its_upper_bound_and_not_its_lower_one(duration: Any, bucket: int) -> None:
    state = HistogramState()
    state.add([duration])
    assert (state.value(START).offset, state.buckets) == (bucket, {str(bucket): 1})


def test_a_duration_of_zero_is_counted_as_zero() -> None:
    state = HistogramState()
    state.add([0.0])
    found = state.value(START)
    assert (found.count, found.zero_count, list(found.counts), found.maximum) == (1, 1, [], 0.0)


# --- what is cumulative


def test_errors_are_told_at_once_at_multiples_of_ten_seconds_and_at_the_end() -> None:
    s = SessionEvents(started=START + 3 * SECOND)
    s.emit("error", parent=0, type="ValueError", message="", stack="", attributes={})
    s.emit("error", 8.0, parent=0, type="ValueError", message="", stack="", attributes={})
    s.emit("error", 0.5, parent=0, type="OSError", message="", stack="", attributes={})
    s.emit("event", 35.0, parent=0, name="later")
    points = s.records("metrics", status="completed")
    begin = START + 3 * SECOND
    assert by_series(points) == {
        ("training.run.errors", ("error.type", "ValueError")): [
            (3.001, Sum(begin, 1.0)), (10.0, Sum(begin, 1.0)), (11.001, Sum(begin, 2.0)), (40.0, Sum(begin, 2.0)),
            (46.502, Sum(begin, 2.0)), (46.503, None),
        ],
        ("training.run.errors", ("error.type", "OSError")): [
            (11.501, Sum(begin, 1.0)), (40.0, Sum(begin, 1.0)), (46.502, Sum(begin, 1.0)), (46.503, None),
        ],
    }  # fmt: skip
    assert {(p[0].unit, p[0].kind) for p in points} == {("{error}", "sum")}


def test_values_that_are_no_finite_number_are_counted_by_key_at_once_and_cumulatively() -> None:
    s = SessionEvents(started=START + 3 * SECOND)
    s.metrics({"loss": 0.5, "lr": 0.1, "val/loss": 1, "flag": True})
    s.metrics({"loss": "NaN", "lr": 0.1, "val/loss": "Infinity"})
    s.metrics({"loss": "-Infinity", "lr": None, "val/loss": 1.0}, 8.0)
    s.metrics({"lr": "NaN"}, at=s.ts)
    s.metrics({"loss": "NaN"}, split="val")
    s.emit("event", 5.0, parent=0, name="later")
    points = [p for p in s.records("metrics", status="completed") if p[0].name == "training.nonfinite"]
    begin = START + 3 * SECOND

    def counted(*seconds_and_counts: tuple[float, float]) -> list[tuple[float, Any]]:
        counts = [(seconds, Sum(begin, count)) for seconds, count in seconds_and_counts]
        return [*counts, (16.006, None)]

    of = "training.nonfinite"
    assert by_series(points) == {
        (of, ("key", "loss"), TRAIN): counted((3.002, 1.0), (10.0, 1.0), (11.002, 2.0), (16.005, 2.0)),
        (of, ("key", "val/loss"), ("split", "val")): counted((3.002, 1.0), (10.0, 1.0), (16.005, 1.0)),
        (of, ("key", "lr"), TRAIN): counted((11.003, 1.0), (16.005, 1.0)),
        (of, ("key", "loss"), ("split", "val")): counted((11.004, 1.0), (16.005, 1.0)),
    }
    assert {(p[0].unit, p[0].kind) for p in points} == {("{value}", "sum")}


def test_of_many_values_that_are_no_finite_number_only_some_are_told_at_once() -> None:
    s = SessionEvents()
    for _ in range(50):
        s.metrics({"loss": "NaN"})
    s.metrics({"loss": "NaN"}, 10.0)
    s.metrics({"loss": "NaN"})
    counts = [value.value for value in values(s.records("metrics"), "training.nonfinite") if value is not None]
    assert counts == [*range(1, 11), 50, 51, 52]


def test_the_histogram_grows_and_keeps_its_start() -> None:
    s = SessionEvents()
    for number in range(25):
        s.step(number, lasts=0.999)
    found = values(s.records("metrics", status="completed"), "training.step.duration")
    assert [(h.start, h.count, h.zero_count) for h in found if isinstance(h, Histogram)] == [
        (START, 9, 0), (START, 19, 0), (START, 25, 0),
    ]  # fmt: skip
    assert found[-1] is None


def test_an_event_just_on_the_boundary_is_counted_after_it() -> None:
    s = SessionEvents()
    s.step(0, lasts=0.998)
    step = s.emit("step_begin", parent=0, step=1, split="train")
    s.emit("step_end", 9.0, begin=step)
    assert s.ts == START + 10 * SECOND
    (found,) = values(s.records("metrics"), "training.step.duration")
    assert found.count == 1


def test_an_epoch_that_begins_with_the_crossing_takes_no_point_from_the_boundary() -> None:
    s = SessionEvents()
    s.emit("epoch_begin", parent=0, epoch=1)
    s.emit("epoch_begin", 12.0, parent=0, epoch=2)
    assert by_series(s.records("metrics")) == {("training.run.epoch",): [(0.001, 1.0), (10.0, 1.0), (12.001, 2.0)]}


def test_an_epoch_that_begins_in_the_boundarys_own_millisecond_is_its_point() -> None:
    s = SessionEvents()
    s.emit("epoch_begin", parent=0, epoch=1)
    s.emit("epoch_begin", 9.9994, parent=0, epoch=2)
    assert by_series(s.records("metrics")) == {("training.run.epoch",): [(0.001, 1.0), (10.0004, 2.0)]}


def test_exemplars_show_the_slowest_step_of_a_period_whose_trace_goes_out() -> None:
    s = SessionEvents()
    for number, lasts in enumerate([0.5, 3.0, 1.0, 6.0, 0.25, 2.0]):
        s.step(number, lasts=lasts)
    points, spans = s.records("metrics", status="completed"), s.records("traces")
    found = [h.exemplars for h in values(points, "training.step.duration") if h]
    assert [[exemplar.value for exemplar in exemplars] for exemplars in found] == [[3.0], [6.0]]
    sent = {(span.trace_id, span.span_id): span.attributes["step"] for span in spans}
    assert [sent[e[0].trace_id, e[0].span_id] for e in found] == [1, 3]


def test_a_step_whose_trace_does_not_go_out_is_no_exemplar_however_slow() -> None:
    s = SessionEvents()
    s.step(0, lasts=1.0)
    s.step(1, lasts=3.0, thin=True)
    (durations,) = [
        value for value in values(s.records("metrics", status="completed"), "training.step.duration") if value
    ]
    assert (durations.maximum, [exemplar.value for exemplar in durations.exemplars]) == (3.0, [1.0])


@settings(deadline=None)
@given(st.integers(0, 3), st.lists(st.sampled_from([0.0005, 0.002, 0.004, 0.3]), min_size=300, max_size=600))
def test_an_exemplars_trace_was_sent(rank: int, durations: Any) -> None:
    s = SessionEvents(rank=rank, world_size=4)
    for number, lasts in enumerate(durations):
        s.step(number, lasts=lasts, **({"status": "error"} if number % 97 == 0 else {}))  # type: ignore[arg-type]
    sent = {(span.trace_id, span.span_id) for span in s.records("traces", status="completed")}
    shown = [e for p in s.records("metrics", status="completed") if isinstance(p[2], Histogram) for e in p[2].exemplars]
    assert shown
    assert {(e.trace_id, e.span_id) for e in shown} <= sent


# --- the run


def test_the_runs_info_has_the_chosen_hyperparameters_and_ends_when_it_changes() -> None:
    s = SessionEvents()
    s.run(name="n", group="g")
    s.emit("hyperparams", params={"lr": 0.5, "secret_sauce": 1, "model": {"width": 8}, "optimizer": "adam" * 99})
    s.emit("hyperparams", params={"lr": 0.5})
    s.emit("hyperparams", params={"lr": 0.25})
    about = (("group", "g"), ("name", "n"))
    optimizer = ("optimizer", ("adam" * 99)[:120])
    first = ("training.run.info", *about)
    second = ("training.run.info", ("group", "g"), ("lr", "0.5"), ("name", "n"), optimizer)
    third = ("training.run.info", ("group", "g"), ("lr", "0.25"), ("name", "n"), optimizer)
    assert by_series(s.records("metrics", status="completed")) == {
        ("training.run.start_time",): [(0.001, STARTED), (0.005, STARTED), (0.006, None)],
        first: [(0.001, 1.0), (0.002, None)],
        second: [(0.002, 1.0), (0.004, None)],
        third: [(0.004, 1.0), (0.005, 1.0), (0.006, None)],
    }


def test_info_that_comes_back_is_the_same_series_again() -> None:
    s = SessionEvents()
    s.run(name="n")
    for lr in (1, 2, 1):
        s.emit("hyperparams", params={"lr": lr})
    points = s.records("metrics", status="completed")
    assert values(points, "training.run.info", lr="1") == [1.0, None, 1.0, 1.0, None]
    assert len({id(series) for series, _, _ in points if series.name == "training.run.info"}) == 3


def test_the_info_is_repeated_every_ten_seconds_so_that_a_join_finds_it() -> None:
    s = SessionEvents()
    s.run(name="n")
    s.emit("event", 21.0, parent=0, name="later")
    assert by_series(s.records("metrics")) == {
        ("training.run.info", ("name", "n")): [(0.001, 1.0), (20.0, 1.0)],
        ("training.run.start_time",): [(0.001, STARTED), (20.0, STARTED)],
    }


# --- the end


def test_every_live_series_ends_once_after_its_last_point() -> None:
    s = whole_run()
    points = s.records("metrics", status="interrupted")
    for key, found in by_series(points).items():
        assert [value for _, value in found].count(None) == 1, key
        assert found[-1][1] is None
        assert [time for time, _ in found] == sorted({time for time, _ in found})
    assert max(ts for _, ts, _ in points) // MS == s.ts // MS + 2


def test_a_session_of_nothing_ends_with_nothing() -> None:
    assert SessionEvents().records("metrics", status="interrupted") == []


def test_the_end_knows_the_series_from_before_a_restart() -> None:
    s = whole_run()
    fold = mapper("metrics", s.header)
    fold.map(s.events)
    again = restored("metrics", s.header, fold.state())
    assert by_series(again.finish(s.closed())) == by_series(fold.finish(s.closed()))


# ------------------------------------------------------------------------------------------------ values of the past


def test_values_of_the_past_keep_their_time_and_their_step_and_move_nothing() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0}, step=7)
    s.metrics({"loss": 2.0}, 1e-5, step=7, own_step=3, time=START - SECOND + 1)
    s.metrics({"loss": 3.0}, 1e-5, own_step=4, time=START - SECOND + 2)
    s.metrics({"loss": 4.0, "lr": None}, 1e-5, time=s.ts)
    s.metrics({"loss": 5.0}, 1e-5, step=7)
    points = by_series(s.records("metrics"))
    assert points["training.loss", TRAIN] == [
        (-0.999999999, 2.0),
        (-0.999999998, 3.0),
        (0.001, 1.0),
        (0.00102, 4.0),
        (0.002, 5.0),
    ]
    assert points["training.step.logged", ("key", "loss"), TRAIN] == [(-0.999999999, 3.0), (-0.999999998, 4.0)]
    assert points["training.step.number", TRAIN] == [(0.001, 7.0), (0.002, 7.0)]


@pytest.mark.parametrize("ahead", [0, 1, SECOND])
def test_a_time_that_is_not_before_its_line_is_that_of_the_line(ahead: int) -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0}, time=s.ts + MS + ahead)
    assert by_series(s.records("metrics"))["training.loss", TRAIN] == [(0.001, 1.0)]


def test_a_time_that_is_none_costs_its_line_alone() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0}, time="yesterday")
    s.metrics({"loss": 2.0})
    assert values(s.records("metrics"), "training.loss") == [2.0]
