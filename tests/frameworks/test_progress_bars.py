"""Loops behind a real progress bar: the step that `break` leaves ends there, whoever holds the bar."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from stepspan.testing import FixedClock, recorded_run

tqdm = pytest.importorskip("tqdm", reason="no tqdm here: `make test-frameworks`").tqdm


@pytest.mark.parametrize(
    "hold",
    [
        lambda steps: tqdm(steps, file=io.StringIO()),
        lambda steps: tqdm(steps, disable=True),
        lambda steps: iter(tqdm(steps, file=io.StringIO())),
        lambda steps: enumerate(tqdm(steps, file=io.StringIO())),
    ],
    ids=["bar", "disabled", "iterator", "enumerate"],
)
@pytest.mark.parametrize("epochs", [False, True], ids=["no epochs", "epochs"])
def test_a_step_ends_where_its_loop_was_left(hold: Callable[[Iterable[int]], Iterable[Any]], epochs: bool) -> None:
    clock, bars = FixedClock(), []
    with recorded_run(clock=clock) as recording:
        run = recording.run

        def epoch() -> None:
            bars.append(hold(run.steps(range(100))))
            for number, _ in enumerate(bars[-1]):
                run.log_metrics({"loss": 1.0})
                if number == 4:
                    break
            clock.advance(10)
            run.log_metrics({"val/accuracy": 0.9})

        for number in range(3):
            if epochs:
                with run.epoch(number):
                    epoch()
            else:
                epoch()
    assert len(recording.values("training.step.time", split="train")) == 15
    assert max(recording.values("training.step.time", split="train")) < 0.01
    assert recording.values("training.step.number", split="val") == [4, 9, 14]
    around = {event["seq"] for event in recording.events("epoch_begin" if epochs else "run_begin")}
    assert {event["parent"] for event in recording.events("step_begin")} == around


def test_a_validation_within_a_step_behind_a_bar_is_a_part_of_it() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        bar = tqdm(run.steps(range(3)), file=io.StringIO())
        for _ in bar:
            run.log_metrics({"loss": 1.0})
            for _ in tqdm(run.steps(range(2), split="val"), file=io.StringIO()):
                run.log_metrics({"loss": 2.0})
            clock.advance(10)
            bar.set_postfix(loss=1.0)
    assert [round(seconds) for seconds in recording.values("training.step.time", split="train")] == [10, 10, 10]
    assert recording.values("training.step.number", split="val") == [0, 0, 1, 1, 2, 2]
