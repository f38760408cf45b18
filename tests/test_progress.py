"""How far a run is: throughput, the time it still needs, its start and its checkpoints."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from harness.events_of import START, SessionEvents, by_series, restored, values

from stepspan.mapping.mapper import mapper
from stepspan.testing import recorded_run

STARTED = START / 1e9


def train(s: SessionEvents, steps: range, *, each: float, split: str = "train") -> None:
    for number in steps:
        begin = s.emit("step_begin", 0.0, parent=0, step=number, split=split)
        s.emit("step_end", each, begin=begin)


def eta(s: SessionEvents) -> list[float]:
    return [value for _, value in by_series(s.records("metrics"))[("training.run.eta",)]]


def test_eta_is_the_pace_times_what_is_left() -> None:
    s = SessionEvents()
    s.emit("progress", 0.0, total_steps=100)
    train(s, range(41), each=0.5)
    points = by_series(s.records("metrics"))
    assert points[("training.run.eta",)] == [
        (10.0, pytest.approx(0.5 * (100 - 20))),
        (20.0, pytest.approx(0.5 * (100 - 40))),
    ]
    assert points[("training.run.total_steps",)] == [(10.0, 100.0), (20.0, 100.0)]


def test_eta_counts_what_lies_between_steps() -> None:
    s = SessionEvents()
    s.emit("progress", 0.0, total_steps=10)
    train(s, range(1), each=1.0)
    train(s, range(4), each=1.0, split="val")  # 4 s of validation after the training step
    train(s, range(1, 2), each=1.0)
    train(s, range(1), each=10.0, split="val")
    assert eta(s) == [pytest.approx(8 * 3.0 - 4.0)]  # two steps took 6 s; 4 s of the rest have gone by


def test_a_run_that_rests_needs_no_more_time_and_says_at_once_what_is_cumulative() -> None:
    s = SessionEvents()
    run = s.run()
    s.emit("progress", 0.0, total_steps=100)
    train(s, range(41), each=0.5)
    s.emit("run_end", 0.001, begin=run, status="completed", rests=True)
    ended = (s.ts - START) / 1e9
    s.metrics({"accuracy": 0.5}, after=60.0, split="test")
    points = by_series(s.records("metrics"))
    (last,) = points[("training.run.eta",)][2:]
    assert last[1] is None
    assert last[0] == pytest.approx(ended, abs=0.001)
    assert points[("training.run.total_steps",)][2:] == [(pytest.approx(ended, abs=0.001), 100.0), (80.0, 100.0)]
    assert points[("training.step.duration", ("split", "train"))][2][1].count == 41


def test_eta_of_a_resumed_run_starts_at_its_first_step() -> None:
    s = SessionEvents()
    s.emit("progress", 0.0, total_steps=1000)
    train(s, range(900, 911), each=1.0)
    assert eta(s) == [pytest.approx(1000 - 910)]


def test_eta_follows_a_changed_pace_smoothly() -> None:
    s = SessionEvents()
    s.emit("progress", 0.0, total_steps=1_000_000)
    train(s, range(100), each=0.1)
    train(s, range(100, 400), each=0.2)
    paces = [left / (1_000_000 - step) for left, step in zip(eta(s), [100, 150, 200, 250, 300, 350, 400], strict=False)]
    assert paces[0] == pytest.approx(0.1, rel=0.01)
    assert paces[1] == pytest.approx(0.13, rel=0.01)
    assert paces == sorted(paces)
    assert 0.17 < paces[-1] < 0.2


def test_a_run_past_its_total_needs_no_time() -> None:
    s = SessionEvents()
    s.emit("progress", 0.0, total_steps=3)
    train(s, range(11), each=1.0)
    assert eta(s) == [0.0]


@pytest.mark.parametrize("total", ["many", None, {}])
def test_a_total_that_is_no_number_costs_the_eta_alone(total: Any) -> None:
    s = SessionEvents()
    s.run(name="n")
    s.emit("progress", 0.0, total_steps=total)
    train(s, range(11), each=1.0)
    points = by_series(s.records("metrics"))
    assert ("training.run.eta",) not in points
    assert ("training.run.start_time",) in points


def test_start_and_the_last_checkpoint_are_repeated() -> None:
    s = SessionEvents()
    s.run(name="n")
    s.emit("artifact", 1.0, name="a", path="a.pt", kind="checkpoint")
    s.emit("artifact", 1.0, name="plot", path="a.png", kind="plot")
    s.emit("event", 20.0, parent=0, name="later")
    points = by_series(s.records("metrics"))
    assert points[("training.run.start_time",)] == [(0.001, STARTED), (20.0, STARTED)]
    assert points[("training.run.checkpoint_time",)] == [(20.0, pytest.approx(STARTED + 1.001, abs=1e-6))]


def test_throughput_is_per_second_of_step_and_data_wait() -> None:
    s = SessionEvents()
    begin = s.emit("step_begin", parent=0, step=0, split="train")
    s.emit("step_end", 0.75, begin=begin, data_wait=0.25, samples=32, tokens=4096)
    points = s.records("metrics")
    assert values(points, "training.throughput", item="samples", split="train") == [32.0]
    assert values(points, "training.throughput", item="tokens", split="train") == [4096.0]
    assert {series.unit for series, _, _ in points if series.name == "training.throughput"} == {"{item}/s"}


def test_a_checkpoint_of_the_mapper_carries_the_progress() -> None:
    s = SessionEvents()
    s.run(name="n")
    s.emit("progress", 0.0, total_steps=100)
    s.emit("artifact", 1.0, name="a", path="a.pt", kind="checkpoint")
    train(s, range(60), each=0.5)
    at_once = mapper("metrics", s.header).map(s.events)
    for cut in range(1, len(s.events), 7):
        first = mapper("metrics", s.header)
        head = first.map(s.events[:cut])
        tail = restored("metrics", s.header, first.state()).map(s.events[cut:])
        assert by_series([*head, *tail]) == by_series(at_once)


def test_a_step_says_how_much_it_processed() -> None:
    with recorded_run() as recording:
        run = recording.run
        with run.step(0, samples=8):
            pass
        with run.step(1) as step:
            step.tokens = 512
        for _ in run.steps([[1, 2], [3]], samples=len, tokens=10, accumulate=2):
            pass
        ends = recording.events("step_end")
    assert [(end.get("samples"), end.get("tokens")) for end in ends] == [(8.0, None), (None, 512.0), (3.0, 20.0)]


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("amount", ["text", -1, float("nan"), Unspeakable(), lambda batch: batch.shape[0]])
def test_an_amount_that_is_none_is_told_once_and_the_loop_goes_on(
    amount: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with recorded_run() as recording, caplog.at_level(logging.WARNING, "stepspan"):
        run = recording.run
        assert list(run.steps([1, 2, 3], samples=amount)) == [1, 2, 3]
        with run.step(9, tokens=amount):
            pass
        assert [record.message.split("=")[0] for record in caplog.records] == ["stepspan: samples", "stepspan: tokens"]
        assert run.stats()["warnings"]["samples"] == 3
        assert not any("samples" in event or "tokens" in event for event in recording.events())


@pytest.mark.parametrize("total", [-1, 2.5, "10", None])
def test_a_total_that_is_no_count_is_told_and_left_out(
    total: float | str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with recorded_run() as recording, caplog.at_level(logging.WARNING, "stepspan"):
        recording.run.set_total_steps(total)  # type: ignore[arg-type]
        assert "total_steps=" in caplog.records[0].message
        assert recording.events("progress") == []
