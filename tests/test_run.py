"""What a run can be told, how it ends, what its ledgers say, and the run that does nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import runs
from harness.runs import events, outline, path_of, status_of

import stepspan
from stepspan import JsonlExporter, MemoryExporter
from stepspan.mapping.records import Attributes, Log, Record, Signal
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


def test_metrics_are_written_before_the_call_returns(start: Start) -> None:
    run = start()
    run.log_metrics({"loss": 0.5, "val/accuracy": 0.25})
    (logged,) = events(run, "metrics")
    assert logged["metrics"] == {"loss": 0.5, "val/accuracy": 0.25}
    assert logged["split"] == "train"
    assert "step" not in logged


@pytest.mark.parametrize(
    ("value", "written"),
    [
        pytest.param(1, 1.0, id="int"),
        pytest.param(True, 1.0, id="bool"),
        pytest.param(2**70, float(2**70), id="huge int"),
        pytest.param(float("nan"), "NaN", id="nan"),
        pytest.param(float("inf"), "Infinity", id="inf"),
        pytest.param(float("-inf"), "-Infinity", id="-inf"),
        pytest.param(np.float32(0.5), 0.5, id="numpy float32"),
        pytest.param(np.float64("nan"), "NaN", id="numpy nan"),
        pytest.param(np.int64(7), 7.0, id="numpy int"),
        pytest.param(np.bool_(True), 1.0, id="numpy bool"),
        pytest.param(np.array(2.5), 2.5, id="0-d array"),
    ],
)
def test_a_number_of_any_kind_is_a_value(start: Start, value: Any, written: float | str) -> None:
    with start() as run:
        run.log_metrics({"x": value})
    assert events(run, "metrics")[0]["metrics"] == {"x": written}
    assert run.stats()["warnings"] == {}


def test_step_and_split_are_the_current_ones_unless_given(start: Start) -> None:
    with start() as run, run.step(3, split="val"):
        run.log_metrics({"a": 1.0})
        run.log_metrics({"b": 1.0}, 10)
        run.log_metrics({"c": 1.0}, step=11, split="test")
        run.log_scalar("d", 1.0, 12)
        run.log_scalar("e", 1.0)
    found = [(*e["metrics"], e["split"], e["step"], e.get("own_step")) for e in events(run, "metrics")]
    assert found == [
        *(("a", "val", 3, None), ("b", "val", 3, 10), ("c", "test", 3, 11), ("d", "val", 3, 12), ("e", "val", 3, None))
    ]


def test_hyperparams_artifacts_and_milestones(start: Start) -> None:
    with start() as run, run.step(5):
        run.log_hyperparams({"lr": 3e-4, "layers": [1, 2], "model": {"name": "mlp"}})
        run.log_artifact("last", Path("out") / "step-5.pt", kind="checkpoint")
        run.log_event("resumed", status="ok", source="step-4.pt")
    (params,), (artifact,), (event,) = (events(run, tag) for tag in ("hyperparams", "artifact", "event"))
    assert params["params"] == {"lr": 3e-4, "layers": [1, 2], "model": {"name": "mlp"}}
    assert {key: artifact[key] for key in ("name", "path", "kind", "step")} == {
        "name": "last",
        "path": "out/step-5.pt",
        "kind": "checkpoint",
        "step": 5,
    }
    assert (event["name"], event["status"], event["attributes"]) == ("resumed", "ok", {"source": "step-4.pt"})


def test_the_run_says_what_it_is(start: Start) -> None:
    with start(job_id="job-1", name="baseline", group="sweep", tags=("a", "b"), attempt=2) as run:
        pass
    (begin,) = events(run, "run_begin")
    assert {key: begin[key] for key in ("name", "group", "tags", "attempt")} == {
        "name": "baseline",
        "group": "sweep",
        "tags": ["a", "b"],
        "attempt": [2, 0],
    }
    assert "status" not in begin


def test_without_with_a_run_is_open_until_it_is_closed(start: Start) -> None:
    run = start()
    run.log_metrics({"x": 1.0})
    assert stepspan.current_run() is run
    assert status_of(path_of(run)) is None
    run.close()
    assert outline(run) == ["run", "train -: x=1.0", "end run completed"]
    assert status_of(path_of(run)) == "completed"
    assert not stepspan.current_run().stats()["journaled"]


@pytest.mark.parametrize("status", ["completed", "failed", "interrupted"])
def test_a_run_is_closed_once_and_as_told(start: Start, status: str) -> None:
    run = start()
    run.close(status)
    run.close("failed")
    assert outline(run) == ["run", f"end run {status}"]
    assert status_of(path_of(run)) == status


def test_what_comes_after_close_is_counted_and_told_once(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    run = start()
    run.close()
    before = events(run)
    calls: list[Callable[[], Any]] = [
        lambda: run.log_metrics({"x": 1.0}),
        lambda: run.log_scalar("x", 1.0),
        lambda: run.log_hyperparams({"lr": 1}),
        lambda: run.log_artifact("a", __file__),
        lambda: run.log_event("late"),
        lambda: run.log_error(ValueError("late")),
        lambda: run.epoch(1).__enter__(),
        lambda: run.step(1).__enter__(),
        lambda: run.span("late").__enter__(),
        lambda: next(run.steps("ab")),
    ]
    for count, call in enumerate(calls, 1):
        call()
        assert run.stats()["warnings"] == {"closed": count}
    assert run.flush(0.0)
    with run:
        pass
    assert events(run) == before
    (told,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "closed" in told.getMessage()


def test_batches_still_come_after_close(start: Start) -> None:
    run = start()
    run.close()
    assert list(run.steps("abc")) == ["a", "b", "c"]


def test_stats_are_the_ledgers(start: Start) -> None:
    run = start()
    run.log_metrics({"x": 1.0})
    assert {key: value for key, value in run.stats().items() if key != "journal"} == {
        "journaled": 3,  # header, run_begin, metrics
        "waiting": 0,
        "lost": 0,
        "durable": True,
        "warnings": {},
        "warning_keys": {},
        "delivery": {},
    }
    assert Path(run.stats()["journal"]).is_dir()


def test_flush_has_nothing_to_wait_for_without_a_destination(start: Start) -> None:
    run = start()
    run.log_metrics({"x": 1.0})
    assert run.flush(0.0)


def test_flush_waits_until_a_destination_has_everything(start: Start) -> None:
    memory = MemoryExporter()
    with start(exporters=[memory]) as run:
        for number in range(100):
            run.log_event(f"milestone {number}")
        assert run.flush(10.0)
        names = [record.event_name for _, record in memory.records["logs"] if isinstance(record, Log)]
        assert names == [f"milestone {number}" for number in range(100)]
        assert run.stats()["delivery"]["memory"]["logs"]["delivered"] == 100


def test_flush_says_when_the_time_did_not_suffice(start: Start) -> None:
    class Silent(MemoryExporter):
        def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
            return Outcome(Verdict.RETRY, message="busy")

    with start(exporters=[Silent()]) as run:
        run.log_event("milestone")
        assert run.flush(0.3) is False


def test_each_cause_is_counted_told_once_and_summed_up(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start() as run:
        run.log_metrics({"a": "one"})
        run.log_metrics({"a": "one", "b": "two"})
        run.step(-1)
    assert run.stats()["warnings"] == {"value": 3, "step": 1}
    assert run.stats()["warning_keys"] == {"value": {"a": 2, "b": 1}, "step": {"step": 1}}
    assert {(r.levelname, r.name) for r in caplog.records} == {("WARNING", "stepspan")}
    first, second, third, summary = caplog.messages
    assert first.startswith("stepspan: metric a='one': not a number: ")
    assert second.startswith("stepspan: metric b='two': not a number: ")
    assert third.startswith("stepspan: step=-1: ")
    assert summary == "stepspan: warnings of this run: value 3 (a 2, b 1), step 1 (step 1)"


def test_only_local_rank_0_warns(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "stepspan")
    with start(job_id="j", rank=3, world_size=4, local_rank=1) as run:
        run.log_metrics({"a": "one"})
    assert run.stats()["warnings"]["value"] == 1
    assert {r.levelno for r in caplog.records} == {logging.DEBUG}
    assert any("a='one'" in r.getMessage() for r in caplog.records)


def test_a_processor_that_fails_costs_nothing_but_its_work(start: Start, tmp_path: Path) -> None:
    class Fails:
        tags = frozenset({"metrics", "step_begin"})

        def __call__(self, event: Any) -> Any:
            raise KeyError("mine")

    class Nonsense:
        tags = frozenset({"metrics"})

        def __call__(self, event: Any) -> Any:
            return "no event"

    class Drops:
        tags = frozenset({"event"})

        def __call__(self, event: Any) -> Any:
            return None

    with start(processors=[Fails(), Nonsense(), Drops()]) as run, run.step(0):
        run.log_metrics({"x": 1.0})
        run.log_event("dropped")
    assert outline(run) == ["run", "  step 0", "train 0: x=1.0", "  end step", "end run completed"]
    assert run.stats()["warnings"] == {"processor": 3}


def test_a_journal_that_fails_under_a_run_is_told(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0]
    with start(exporters=[JsonlExporter(tmp_path / "runs", clock=lambda: now[0])]) as run:
        writer = run._pipeline.journal.session  # type: ignore[union-attr]
        assert writer is not None
        writer.error = OSError(28, "No space left on device")
        now[0] += 2_000_000_000
        run.log_metrics({"x": 1.0})
    assert run.stats()["warnings"] == {"journal": 1}
    assert "No space left on device" in caplog.text


# disabled

MEMBERS = sorted(name for name in vars(Run) if not name.startswith("_") and name != "as_log_store")
"""A log store of a run calls nothing but the others."""


@pytest.fixture
def disabled(start: Start) -> Run:
    return start(enabled=False)


def test_the_disabled_run_has_every_member(disabled: Run) -> None:
    assert type(disabled) is Run, "so that it takes the same arguments"
    assert [name for name in MEMBERS if name not in vars(type(disabled))] == []
    assert disabled.identity.rank == 0
    assert disabled.closed is False


def test_the_disabled_run_does_nothing(disabled: Run, tmp_path: Path) -> None:
    with disabled as run:
        run.log_metrics({"x": 1.0}, 3, split="val")
        run.log_scalar("x", 1.0, 3)
        run.log_hyperparams({"lr": 1})
        run.log_artifact("a", "b", kind="plot")
        run.log_event("e", status="ok", a=1)
        run.log_error(ValueError(), a=1)
        with run.epoch(0), run.step(0, split="val"), run.span("s", collective=True, a=1):
            pass
        steps = run.steps([1, 2, 3], start=5, accumulate=2, split="val")
        assert len(steps) == 3
        assert list(steps) == [1, 2, 3]
        assert list(steps) == [1, 2, 3]
        assert next(run.steps("ab")) == "a"
    assert run.flush(0.0) is True
    run.close()
    assert run.stats() == {
        "journaled": 0,
        "waiting": 0,
        "lost": 0,
        "durable": True,
        "journal": None,
        "warnings": {},
        "warning_keys": {},
        "delivery": {},
    }
    assert list(tmp_path.iterdir()) == []


def test_the_disabled_run_lets_exceptions_pass(disabled: Run) -> None:
    with pytest.raises(ValueError, match="mine"), disabled, disabled.step(0):
        raise ValueError("mine")


def test_current_run_without_a_run_does_nothing(start: Start, tmp_path: Path) -> None:
    run = stepspan.current_run()
    run.log_metrics({"x": 1.0})
    with run.step(0):
        pass
    assert run.stats()["journaled"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["1", "true", "YES", " on "])
def test_the_switch_in_the_environment_stops_everything(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    monkeypatch.setenv("STEPSPAN_DISABLED", value)
    with start(enabled=True, config="no-such-file.yaml", endpoint="http://127.0.0.1:9") as run:
        run.log_metrics({"x": 1.0})
    assert run.stats()["journaled"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_the_switch_that_is_off_stops_nothing(start: Start, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("STEPSPAN_DISABLED", value)
    assert start().stats()["journaled"] == 2


def test_the_sdk_switch_stops_delivery_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with start(endpoint="http://127.0.0.1:9") as run:
        run.log_metrics({"x": 1.0})
    assert outline(run) == ["run", "train -: x=1.0", "end run completed"]
    assert run._delivery.targets == frozenset()
