"""What the frameworks' callbacks share, without a framework: hooks that are missing, come twice, or fail."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from harness import runs
from harness.runs import events, outline, python

from stepspan.integrations.loop import FrameworkCallback, Loop, hooks, known_total, samples_of
from stepspan.run import DISABLED, Run

start = runs.start
Start = Callable[..., Run]


@hooks
class Hooks:
    """A callback as the frameworks' are made."""

    def __init__(self) -> None:
        self.loop = Loop({"job_id": "job"})

    def begins(self) -> None:
        self.loop.begin(dict)

    def fails(self) -> None:
        raise AttributeError("another version of the framework")


def test_entering_a_level_closes_what_is_open_at_it_and_inside_it(start: Start) -> None:
    loop = Loop({})
    with start() as run:
        loop.begin(dict)
        loop.enter("epoch", run.epoch(0))
        loop.batch(0)
        loop.batch(0)
        loop.enter("part", run.span("validation"))
        loop.enter("phase", run.span("checkpoint"))
        loop.enter("epoch", run.epoch(1))
        loop.leave("step")
        loop.leave("epoch")
        loop.leave("epoch")
    recorded = [line for line in outline(run) if line != "sample"]
    assert recorded == [
        *("run", "  epoch 0", "    step 0", "      span validation", "      end span", "    end step"),
        *("    span checkpoint", "    end span", "  end epoch", "  epoch 1", "  end epoch", "end run completed"),
    ]


def test_a_hook_that_fails_is_one_warning_and_training_goes_on(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    hooks = Hooks()
    with start() as run:
        hooks.begins()
        hooks.fails()
        hooks.fails()
    assert run.stats()["warnings"] == {"fails": 2}
    message, _summary = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Hooks.fails failed: AttributeError('another version of the framework')" in message


class FrameworksOwn:
    """What a framework wants its callbacks to be."""

    def begins(self) -> None:
        raise AssertionError("the callback's own comes first")


@hooks
class Callback(FrameworkCallback):
    def begins(self) -> None:
        self.loop.begin(dict)

    @staticmethod
    def _framework_base() -> type:
        return FrameworksOwn


@pytest.mark.parametrize(
    "copied", [lambda it: it, copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))],
    ids=["itself", "a copy", "a deep copy", "pickled"],
)  # fmt: skip
def test_a_callback_is_one_of_the_frameworks_however_it_is_copied(start: Start, copied: Callable[..., Any]) -> None:
    callback = copied(Callback(job_id="job"))
    assert isinstance(callback, FrameworksOwn)
    assert isinstance(callback, Callback)
    assert type(callback) is type(Callback())
    callback.begins()
    assert callback.loop.run.identity.job_id == "job"
    callback.loop.end()


def ended(run: Run) -> str:
    (end,) = events(run, "run_end")
    return str(end["status"])


def test_a_run_is_started_only_where_there_is_none_and_ended_only_by_who_started_it(start: Start) -> None:
    loop = Loop({"job_id": "ours"})
    with start(job_id="theirs") as run:
        loop.begin(dict)
        assert loop.run is run
        loop.end()
        assert not run.closed
    loop.begin(lambda: {"job_id": "launcher", "rank": 1, "world_size": 2})
    own = loop.run
    assert (own.identity.job_id, own.identity.rank) == ("ours", 1)
    loop.end()
    assert ended(own) == "completed"
    assert loop.run is DISABLED


@pytest.mark.parametrize(
    ("error", "status"), [(None, "completed"), (ValueError("x"), "failed")], ids=["well", "by an exception"]
)
def test_a_run_ends_as_its_loop_did(start: Start, error: BaseException | None, status: str) -> None:
    loop = Loop({})
    loop.begin(dict)
    run = loop.run
    loop.batch(0)
    loop.end(error)
    assert ended(run) == status
    assert len(events(run, "error")) == (error is not None)


def test_a_loop_whose_end_was_not_reported_was_interrupted(start: Start) -> None:
    loop = Loop({})
    loop.begin(dict)
    first = loop.run
    loop.batch(3)
    loop.begin(dict)
    assert loop.run is not first
    loop.end()
    assert runs.status_of(runs.path_of(first)) == "interrupted"


class Trains:
    """As a framework does that does not report exceptions to callbacks."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.state = loop, object()

    def train(self, within: Callable[[], None]) -> None:
        self.loop.begin(dict, self.state)
        self.loop.batch(0)
        within()
        self.loop.end()


def test_a_run_that_another_loop_was_left_in_ends_before_the_next(start: Start) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    stopped, again = Trains(Loop({})), Trains(Loop({}))
    with pytest.raises(KeyboardInterrupt):
        stopped.train(interrupt)
    first = stopped.loop.run
    ran: list[Run] = []
    again.train(lambda: ran.append(again.loop.run))
    assert ended(first) == "interrupted"
    assert ended(ran[0]) == "completed"


def test_a_training_within_another_lies_in_its_run(start: Start) -> None:
    outer, inner = Trains(Loop({})), Trains(Loop({}))
    ran: list[Run] = []

    def nested() -> None:
        inner.train(lambda: ran.extend([outer.loop.run, inner.loop.run]))
        assert not ran[0].closed

    outer.train(nested)
    assert ran[0] is ran[1]
    assert ended(ran[0]) == "completed"


def test_batches_of_one_step_add_up(start: Start) -> None:
    loop = Loop({})
    with start() as run:
        loop.begin(dict)
        for _ in range(3):
            loop.batch(0, samples=2)
        loop.leave("step")
    (end,) = events(run, "step_end")
    assert end["samples"] == 6.0
    assert end["data_wait"] > 0


def test_metrics_keep_the_names_that_the_framework_gives_them(start: Start) -> None:
    loop = Loop({})
    with start() as run:
        loop.begin(dict)
        loop.log({"val_loss": 1.0, "loss": 2.0}, 7, "val")
    (event,) = events(run, "metrics")
    assert (event["metrics"], event["split"], event["step"]) == ({"val_loss": 1.0, "loss": 2.0}, "val", 7)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (np.zeros((4, 3)), 4),
        ([np.zeros((4, 3)), np.zeros(4)], 4),
        ({"input_ids": np.zeros((5, 3)), "labels": np.zeros(5)}, 5),
        (({"x": [np.zeros((2, 3))]}, None), 2),
        ([[np.zeros((3, 8, 8))] * 5, [{"boxes": np.zeros((2, 4))}] * 5], None),
        ({"epoch": np.float64(1.0), "x": np.zeros((6, 2))}, 6),
        (np.float64(1.0), None),
        (["a", "b"], None),
        ([], None),
        ({}, None),
        (None, None),
    ],
    ids=[
        "array",
        "list",
        "mapping",
        "nested",
        "images to detect in",
        "beside a scalar",
        "scalar",
        "texts",
        "empty list",
        "empty mapping",
        "nothing",
    ],
)
def test_samples_of_a_batch(batch: Any, samples: int | None) -> None:
    assert samples_of(batch) == samples


@pytest.mark.parametrize(
    ("number", "known"), [(10, 10), (10.0, 10), (-1, None), (0, None), (float("inf"), None), (None, None)]
)
def test_an_unknown_total_of_steps_is_not_set(number: Any, known: int | None) -> None:
    assert known_total(number) == known


def test_switched_off_everything_does_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPSPAN_DISABLED", "1")
    loop = Loop({})
    loop.begin(dict)
    loop.batch(0, samples=3)
    loop.log({"loss": 1.0}, 0)
    loop.end(ValueError("x"))
    assert loop.run is DISABLED


def test_asking_for_a_callback_loads_no_framework(tmp_path: Any) -> None:
    code = """
    import sys
    import stepspan.integrations.lightning, stepspan.integrations.huggingface
    assert not {"torch", "lightning", "pytorch_lightning", "transformers"} & set(sys.modules)
    """
    assert python(code, tmp_path).returncode == 0
