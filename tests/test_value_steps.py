"""Which step a logged value belongs to, as a receiver gets it: the step number beside it, and one of its own."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.runs import path_of
from harness.stack import Prometheus
from hypothesis import given, settings
from hypothesis import strategies as st

import stepspan
from stepspan.journal.liveness import Closed, write_closed
from stepspan.recording.steps_in_force import StepsInForce
from stepspan.run import Run
from stepspan.testing import FixedClock, Recording, recorded_run

start = runs.start
STEP = "training.step.number"
OWN = "training.step.logged"


def steps(recording: Recording, *names: str) -> list[tuple[Any, ...]]:
    """(key, split, value, step number, own step) of each value, in the order of time: what shares its millisecond."""
    beside: dict[tuple[int, str, str], Any] = {}
    found: list[tuple[Any, ...]] = []
    for series, ts, value in recording.points():
        if value is not None and series.name in {STEP, OWN}:
            beside[ts, str(series.attributes["split"]), str(series.attributes.get("key", STEP))] = value
    for series, ts, value in recording.points():
        if value is None or "split" not in series.attributes or series.name.startswith(("training.step", "training.t")):
            continue
        split, key = str(series.attributes["split"]), str(series.attributes.get("key", series.name[len("training.") :]))
        found.append((ts, key, split, value, beside.get((ts, split, STEP)), beside.get((ts, split, key))))
    return [row[1:] for row in sorted(found, key=lambda row: row[0]) if not names or row[1] in names]


def test_a_value_after_an_epochs_loop_is_of_its_last_step() -> None:
    with recorded_run() as recording:
        run = recording.run
        for epoch in range(2):
            with run.epoch(epoch):
                for _ in run.steps(range(10)):
                    run.log_metrics({"loss": 1.0})
                run.log_metrics({"val/accuracy": 0.5 + epoch})
            run.log_artifact("model", "model.pt", kind="checkpoint")
    assert steps(recording, "val/accuracy") == [
        ("val/accuracy", "val", 0.5, 9, None),
        ("val/accuracy", "val", 1.5, 19, None),
    ]
    assert [event["step"] for event in recording.events("artifact")] == [9, 19]
    assert recording.points(OWN) == []


def test_a_late_score_has_its_own_step_and_moves_no_other() -> None:
    with recorded_run() as recording:
        run = recording.run

        def evaluate() -> None:
            run.log_metrics({"mmlu": 0.3}, step=100)

        for number in range(99, 123):
            with run.step(number):
                run.log_metrics({"loss": float(number)})
                if number == 120:
                    run.log_metrics({"gsm8k": 0.2, "val/loss": 0.5}, step=100)
                    run.log_metrics({"lr": 0.1}, step=120)
                if number == 121:
                    thread = threading.Thread(target=evaluate)
                    thread.start()
                    thread.join()
    assert [(value, step) for _, _, value, step, _ in steps(recording, "loss")] == [
        (number, number) for number in range(99, 123)
    ]
    assert steps(recording, "gsm8k", "val/loss", "lr", "mmlu") == [
        ("gsm8k", "train", 0.2, 120, 100),
        ("val/loss", "val", 0.5, 120, 100),
        ("lr", "train", 0.1, 120, None),
        ("mmlu", "train", 0.3, 121, 100),
    ]
    numbers = recording.values(STEP, split="train")
    assert numbers == sorted(numbers)


def test_a_validation_within_or_between_steps_stays_on_the_axis_of_training() -> None:
    with recorded_run() as recording:
        run = recording.run
        for epoch in range(2):
            with run.epoch(epoch):
                for _ in run.steps(range(3), start=None if epoch else 100):
                    run.log_metrics({"loss": 1.0})
                for batch in run.steps(range(2), split="val"):
                    run.log_metrics({"loss": batch})
                    run.log_metrics({"train/seen": batch})
                run.log_metrics({"val/accuracy": 0.5})
                with run.step(7, split="test"):
                    run.log_metrics({"accuracy": 0.5})
    assert recording.values(STEP, split="train") == [100, 101, 102, 102, 102, 103, 104, 105, 105, 105]
    assert recording.values(STEP, split="val") == [102, 102, 102, 105, 105, 105]
    assert recording.values(STEP, split="test") == [102, 105]
    assert recording.points(OWN) == []


def test_numbers_follow_steps_that_start_anew() -> None:
    with recorded_run() as recording:
        run = recording.run
        for epoch in range(2):
            with run.epoch(epoch):
                for number in range(2):
                    with run.step(number):
                        run.log_metrics({"loss": 1.0})
                run.log_metrics({"val/accuracy": 1.0})
    assert recording.values(STEP, split="train") == [0, 1, 0, 1]
    assert recording.values(STEP, split="val") == [1, 1]


def test_each_split_that_is_trained_in_has_its_own_number_and_others_take_trains() -> None:
    with recorded_run() as recording:
        run = recording.run
        with run.step(5, split="generator"):
            run.log_metrics({"g": 1.0, "val/fid": 1.0})
        with run.step(50, split="critic"):
            run.log_metrics({"c": 1.0, "val/fid": 2.0})
            run.log_metrics({"g": 2.0}, split="generator")
        run.log_metrics({"ema": 1.0, "val/fid": 3.0})  # `train` has stepped never: that which stepped last
        with run.step(900):
            run.log_metrics({"loss": 1.0})
        run.log_metrics({"g": 3.0, "train/lr": 1.0, "val/fid": 4.0}, split="generator")
        run.log_metrics({"c": 3.0, "train/lr": 2.0}, split="critic", step=49)
        run.log_metrics({"other": 1.0}, split="auxiliary")
    assert steps(recording) == [
        ("g", "generator", 1.0, 5, None),
        ("val/fid", "val", 1.0, 5, None),
        ("c", "critic", 1.0, 50, None),
        ("val/fid", "val", 2.0, 50, None),
        ("g", "generator", 2.0, 5, None),
        ("ema", "train", 1.0, 50, None),
        ("val/fid", "val", 3.0, 50, None),
        ("loss", "train", 1.0, 900, None),
        ("g", "generator", 3.0, 5, None),
        ("train/lr", "train", 1.0, 900, None),
        ("val/fid", "val", 4.0, 900, None),
        ("c", "critic", 3.0, 50, 49),
        ("train/lr", "train", 2.0, 900, 49),
        ("other", "auxiliary", 1.0, 900, None),
    ]


def test_where_nothing_is_trained_an_evaluations_own_steps_count() -> None:
    with recorded_run() as recording:
        run = recording.run
        for batch in run.steps(range(3), split="val"):
            run.log_metrics({"loss": batch})
        run.log_metrics({"val/accuracy": 0.5, "test/accuracy": 0.5})
        run.log_metrics({"val/accuracy": 0.75}, step=1000)
        with run.step(0, split="test"):
            run.log_metrics({"val/accuracy": 0.25, "accuracy": 0.5})
        with run.step(70):  # from here on it is a training
            run.log_metrics({"val/accuracy": 0.0})
    assert steps(recording) == [
        *(("loss", "val", float(batch), batch, None) for batch in range(3)),
        ("val/accuracy", "val", 0.5, 2, None),
        ("test/accuracy", "test", 0.5, 2, None),
        ("val/accuracy", "val", 0.75, 2, 1000),
        ("val/accuracy", "val", 0.25, 2, None),
        ("accuracy", "test", 0.5, 0, None),
        ("val/accuracy", "val", 0.0, 70, None),
    ]


def test_where_nothing_steps_the_calls_say_it() -> None:
    with recorded_run() as recording:
        run = recording.run
        run.log_metrics({"before": 1.0})
        for number in (3, 4, 2):
            run.log_metrics({"loss": 1.0, "val/loss": 2.0}, step=number)
        run.log_metrics({"val/accuracy": 0.5}, step=1)
        run.log_metrics({"val/f1": 0.5})
    assert steps(recording, "before", "val/loss", "val/accuracy", "val/f1") == [
        ("before", "train", 1.0, None, None),
        *(("val/loss", "val", 2.0, number, None) for number in (3, 4, 2)),
        ("val/accuracy", "val", 0.5, 1, None),
        ("val/f1", "val", 0.5, 2, None),
    ]
    assert recording.points(OWN) == []


def test_a_helper_thread_takes_the_main_threads_split_and_not_that_of_whoever_began_last() -> None:
    begun, done = threading.Event(), threading.Event()

    def actor(run: Run) -> None:
        with run.step(7, split="actor"):
            begun.set()
            done.wait()
            run.log_metrics({"reward": 1.0})

    with recorded_run() as recording:
        run = recording.run
        with run.step(3, split="learner"):
            other = threading.Thread(target=actor, args=(run,))
            other.start()
            begun.wait()
            helper = threading.Thread(target=run.log_metrics, args=({"queue": 1.0},))
            helper.start()
            helper.join()
            done.set()
            other.join()
    assert steps(recording) == [("queue", "learner", 1.0, 3, None), ("reward", "actor", 1.0, 7, None)]


def test_a_thread_between_its_steps_takes_the_main_threads_as_it_is_by_then() -> None:
    turn = threading.Semaphore(0), threading.Semaphore(0)

    def actor(run: Run) -> None:
        with run.step(7, split="actor"):
            run.log_metrics({"reward": 1.0})
        for _ in run.steps(range(9), split="rollout"):
            break
        turn[0].release()
        turn[1].acquire()
        run.log_metrics({"queue": 1.0})

    with recorded_run() as recording:
        run = recording.run
        with run.step(3, split="learner"):
            other = threading.Thread(target=actor, args=(run,))
            other.start()
            turn[0].acquire()
        with run.step(4, split="learner"):
            turn[1].release()
            other.join()
    assert steps(recording) == [("reward", "actor", 1.0, 7, None), ("queue", "learner", 1.0, 4, None)]


def test_where_the_runs_thread_trains_nothing_the_first_that_does_is_the_main_one() -> None:
    def train(run: Run, split: str) -> None:
        with run.step(3, split=split):
            thread = threading.Thread(target=run.log_metrics, args=({"queue": 1.0},))
            thread.start()
            thread.join()

    with recorded_run() as recording:
        for split in ("fold0", "fold1"):  # and once that has ended, the next one
            thread = threading.Thread(target=train, args=(recording.run, split))
            thread.start()
            thread.join()
    assert steps(recording) == [("queue", f"fold{number}", 1.0, 3, None) for number in range(2)]


def test_threads_that_step_at_once_log_at_their_own_step() -> None:
    begun, done = threading.Event(), threading.Event()

    def slow(run: Run) -> None:
        with run.step(5):
            begun.set()
            done.wait()
            run.log_metrics({"slow": 1.0})

    with recorded_run() as recording:
        thread = threading.Thread(target=slow, args=(recording.run,))
        thread.start()
        begun.wait()
        with recording.run.step(6):
            recording.run.log_metrics({"fast": 1.0})
        done.set()
        thread.join()
    assert steps(recording) == [("fast", "train", 1.0, 6, None), ("slow", "train", 1.0, 6, 5)]


@pytest.mark.parametrize("leave", ["exhausted", "broken off"])
def test_a_task_that_outlives_its_step_keeps_its_split_and_step(leave: str) -> None:
    async def score(run: Run, number: int, ready: asyncio.Event) -> None:
        await ready.wait()
        run.log_metrics({"score": number, "val/score": number})
        with run.span("judge"):
            run.log_metrics({"judged": number})

    async def main(run: Run) -> None:
        ready, tasks = asyncio.Event(), []
        for number in run.steps(range(3), split="rollout"):
            tasks.append(asyncio.create_task(score(run, number, ready)))
            await asyncio.sleep(0)
            if number == 1 and leave == "broken off":
                break
        ready.set()
        await asyncio.gather(*tasks)
        run.log_metrics({"after": 1.0})

    with recorded_run() as recording:
        asyncio.run(main(recording.run))
    last = 2 if leave == "exhausted" else 1
    own = [None if number == last else number for number in range(last + 1)]
    assert steps(recording) == [
        *(
            row
            for number in range(last + 1)
            for row in (
                ("score", "rollout", float(number), last, own[number]),
                ("val/score", "val", float(number), last, own[number]),
                ("judged", "rollout", float(number), last, own[number]),
            )
        ),
        ("after", "train", 1.0, last, None),
    ]


def test_an_executors_thread_with_a_copied_context_does_so_too() -> None:
    async def main(run: Run) -> None:
        go = threading.Event()

        def judge() -> None:
            go.wait()
            run.log_metrics({"score": 1.0})

        with run.step(0, split="rollout"):
            waiting = asyncio.create_task(asyncio.to_thread(judge))
            await asyncio.sleep(0)
        with run.step(1, split="rollout"):
            go.set()
            await waiting

    with recorded_run() as recording:
        asyncio.run(main(recording.run))
    assert steps(recording) == [("score", "rollout", 1.0, 1, 0)]


def test_a_forked_worker_goes_on_from_the_step_at_its_fork() -> None:
    with recorded_run() as recording:
        run = recording.run
        for number in run.steps(range(2)):
            if number == 1:
                child = os.fork()
                if child == 0:
                    run.log_metrics({"queue": 1.0})
                    with run.step(40):
                        run.log_metrics({"inner": 1.0})
                    run.log_metrics({"late": 1.0}, step=0)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        run.log_metrics({"after": 1.0})
    assert sorted(steps(recording)) == [
        ("after", "train", 1.0, 1, None),
        ("inner", "train", 1.0, 40, None),
        ("late", "train", 1.0, 40, 0),
        ("queue", "train", 1.0, 1, None),
    ]


def test_a_further_session_of_a_run_goes_on_from_its_step() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        with run.step(8):
            run.log_metrics({"loss": 1.0})
        first = path_of(run)
        write_closed(first, Closed(run.stats()["journaled"], clock.now, "interrupted"), by="another host")
        clock.advance(2)  # it is noticed within a second
        run.log_metrics({"val/accuracy": 0.5})
        assert path_of(run) != first
    assert steps(recording, "val/accuracy") == [("val/accuracy", "val", 0.5, 8, None)]


def test_a_loop_that_another_thread_pulls_ahead_gives_the_step_in_force() -> None:
    with recorded_run() as recording:
        run = recording.run
        with run.epoch(0):
            thread = threading.Thread(target=lambda: list(run.steps(range(4))))
            thread.start()
            thread.join()
            run.log_metrics({"loss": 1.0, "val/loss": 1.0})
    assert steps(recording) == [("loss", "train", 1.0, 3, None), ("val/loss", "val", 1.0, 3, None)]


def test_a_step_that_is_none_is_said_and_the_one_in_force_is_taken() -> None:
    with recorded_run() as recording:
        with recording.run.step(4):
            recording.run.log_metrics({"loss": 1.0}, step="last")  # type: ignore[arg-type]
        warnings = recording.run.stats()["warnings"]
    assert steps(recording) == [("loss", "train", 1.0, 4, None)]
    assert sum(count for kind, count in warnings.items() if kind.startswith("step")) == 1


def test_no_key_is_looked_at_while_one_split_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []

    def split_of(_: object, key: str) -> str:
        looked_at.append(key)
        return ""

    with recorded_run() as recording:
        run = recording.run
        monkeypatch.setattr(StepsInForce, "split_of", split_of)
        with run.step(0):
            run.log_metrics({"loss": 1.0, "val/loss": 1.0})
        assert looked_at == []
        with run.step(0, split="labeled"):
            run.log_metrics({"loss": 1.0})
        assert looked_at == ["loss"]


def test_runs_that_are_open_in_one_context_do_not_hide_each_other(tmp_path: Path) -> None:
    with recorded_run(job_id="study", directory=tmp_path / "study") as study:
        with study.run.step(3, split="trial"):
            with recorded_run(job_id="trial", directory=tmp_path / "trial") as trial:
                for number in trial.run.steps(range(2)):
                    trial.run.log_metrics({"loss": number})
                    study.run.log_metrics({"seen": number})
                    with study.run.span("inner"):
                        trial.run.log_metrics({"within": number})
                study.run.log_metrics({"between": 1.0})
                trial.run.log_metrics({"val/accuracy": 1.0})
            study.run.log_metrics({"score": 1.0})
        study.run.log_metrics({"best": 1.0})
    assert steps(trial) == [
        *(("loss", "train", number, number, None) for number in range(1)),
        ("within", "train", 0.0, 0, None),
        ("loss", "train", 1.0, 1, None),
        ("within", "train", 1.0, 1, None),
        ("val/accuracy", "val", 1.0, 1, None),
    ]
    assert steps(study) == [
        ("seen", "trial", 0.0, 3, None),
        ("seen", "trial", 1.0, 3, None),
        ("between", "trial", 1.0, 3, None),
        ("score", "trial", 1.0, 3, None),
        ("best", "train", 1.0, 3, None),
    ]
    (begun,) = study.events("step_begin")
    assert {event["parent"] for event in study.events("span_begin")} == {begun["seq"]}


def test_interleaved_runs_keep_their_own_scopes(tmp_path: Path) -> None:
    with (
        recorded_run(job_id="a", directory=tmp_path / "a") as a,
        recorded_run(job_id="b", directory=tmp_path / "b") as b,
    ):
        first, second = a.run.step(1, split="x"), b.run.step(2, split="y")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        third = a.run.step(2, split="x")
        third.__enter__()
        b.run.log_metrics({"inside": 1.0})
        second.__exit__(None, None, None)
        a.run.log_metrics({"inside": 1.0})
        third.__exit__(None, None, None)
        b.run.log_metrics({"after": 1.0})
    assert steps(a) == [("inside", "x", 1.0, 2, None)]
    assert steps(b) == [("inside", "y", 1.0, 2, None), ("after", "train", 1.0, 2, None)]


def test_a_context_keeps_no_run_that_has_ended() -> None:
    with recorded_run() as recording:
        scopes = weakref.ref(recording.run._scopes)
        with recording.run.step(0):
            pass
    del recording
    gc.collect()
    assert scopes() is None


class Model:
    """Which step a value belongs to, and which is in force."""

    def __init__(self) -> None:
        self.trained: dict[str, int] = {}
        self.evaluated: dict[str, int] = {}
        self.last = ""

    def begin(self, split: str, number: int) -> None:
        evaluation = split in {"val", "test"}
        (self.evaluated if evaluation else self.trained)[split] = number
        self.last = self.last if evaluation and self.trained else split

    def steps(self, split: str, given: int | None) -> tuple[int | None, int | None]:
        of = self.trained or self.evaluated
        number = of.get(split, of.get("train", of.get(self.last))) if of else given
        return number, given if given != number else None


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_schedule_of_steps_and_calls_gives_each_value_its_step(data: st.DataObject) -> None:
    splits = data.draw(st.lists(st.sampled_from(["train", "a", "b", "val", "test"]), min_size=1, max_size=3))
    calls = st.tuples(
        st.lists(st.sampled_from(["x", "val/x", "train/x"]), min_size=1, max_size=3, unique=True),
        st.sampled_from([None, *splits]),
        st.none() | st.integers(0, 9),
    )
    schedule = st.lists(
        st.tuples(st.sampled_from([None, *splits]), st.integers(0, 9), st.lists(calls, max_size=3)), max_size=8
    )
    model, expected = Model(), []
    with recorded_run() as recording:
        for split, number, logged in data.draw(schedule):
            with recording.run.step(number, split=split) if split else nullcontext():
                if split:
                    model.begin(split, number)
                for keys, given_split, step in logged:
                    step = 0 if step is None and not model.last else step  # otherwise that of the call before
                    recording.run.log_metrics(dict.fromkeys(keys, 1.0), step, split=given_split)
                    for key in keys:
                        of = key.partition("/")[0] if "/" in key else given_split or split or "train"
                        expected.append((key, of, 1.0, *model.steps(of, step)))
    assert sorted(steps(recording), key=repr) == sorted(expected, key=repr)


def test_report_tail_and_export_say_the_values_own_step(start: Callable[..., Run], tmp_path: Path) -> None:
    with start(job_id="job") as run:
        for number in run.steps(range(3)):
            run.log_metrics({"loss": 3.0 - number})
            if number == 2:
                run.log_metrics({"gsm8k": 0.25, "val/loss": 0.5}, step=1)
        run.log_metrics({"val/accuracy": 0.75})
    report, tail, export = (
        runs.command(*arguments, tmp_path / "stepspan-runs").stdout
        for arguments in (("report", "--json"), ("tail",), ("export", "--to", "otlp-json", "--signal", "metrics"))
    )
    (job,) = json.loads(report)["jobs"]
    last = {key: values["last_step"] for key, values in job["metrics"].items()}
    assert last == {"loss": 2, "gsm8k": 1, "val/loss": 1, "val/accuracy": 2}
    (line,) = (line for line in tail.splitlines() if "gsm8k" in line)
    assert line.split("gsm8k")[0].split()[-1] == "1"
    metrics = [
        metric
        for line in export.splitlines()
        for resource in json.loads(line)["resourceMetrics"]
        for scope in resource["scopeMetrics"]
        for metric in scope["metrics"]
        if metric["name"] == "training.step.logged"
    ]
    points = [point for metric in metrics for point in metric["gauge"]["dataPoints"] if "asDouble" in point]
    assert [point["asDouble"] for point in points] == [1.0, 1.0]


@pytest.mark.stack
def test_what_prometheus_holds_is_every_value_at_its_step(
    prometheus: Prometheus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: set[tuple[str, str, float, int]] = set()

    def log(key: str, value: float, of: int, split: str = "train", **given: Any) -> None:
        run.log_metrics({key: value}, **given)
        expected.add((key, split, value, of))

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{prometheus.otlp_endpoint}/v1/metrics")
    with stepspan.start_run(job_id="by-step", directory=tmp_path / "runs") as run:
        for epoch in range(3):
            with run.epoch(epoch):
                bar = enumerate(run.steps(range(100)))
                for number, _ in bar:
                    step = 10 * epoch + number
                    log("loss", 1000.0 + step, step)
                    if number == 5:
                        log("gsm8k", 2000.0 + step, epoch, step=epoch)
                        log("test/loss", 3000.0 + step, epoch, "test", step=epoch)
                    if number == 9:
                        break
                for batch in run.steps(range(4), split="val"):
                    log("loss", 4000.0 + 10 * epoch + batch, 10 * epoch + 9, "val")
                log("val/accuracy", 5000.0 + epoch, 10 * epoch + 9, "val")
        assert run.flush(30)

    # As the dashboards do: the own step where there is one at the value's time, else the step number of its split.
    selector = '{job_id="by-step",__name__=~"training_(loss|gsm8k|accuracy|step_number|step_logged)"}[1h]'
    series = prometheus.series(selector)
    at: dict[tuple[str, str, int], float] = {}
    for labels, samples in series:
        if labels["__name__"].startswith("training_step_"):
            at.update({(labels["split"], labels.get("key", ""), ms): value for ms, value in samples})
    held = set()
    for labels, samples in series:
        if not labels["__name__"].startswith("training_step_"):
            key, split = labels.get("key", labels["__name__"].removeprefix("training_")), labels["split"]
            held |= {(key, split, value, at.get((split, key, ms), at[split, "", ms])) for ms, value in samples}
    assert held == expected
    (progress,) = prometheus.query('max_over_time(training_step_number{job_id="by-step",split="train"}[1h])')
    assert progress["value"][1] == "29"
