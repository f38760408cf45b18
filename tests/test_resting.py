"""The score after the training: a run that a framework's callback has started takes what is evaluated afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.processes import status_of_child, until
from harness.received import bits
from harness.receiver import ScriptedReceiver
from harness.runs import command, events, outline, path_of, python, sessions, status_of
from harness.stack import Prometheus

import stepspan
from stepspan.integrations.loop import Loop
from stepspan.journal.layout import find_sessions
from stepspan.journal.liveness import read_resting
from stepspan.reading.sessions import read_session
from stepspan.run import DISABLED, Run

start = runs.start
Start = Callable[..., Run]


class Trainer:
    """As a framework's, with the callback's loop."""

    def __init__(self, **arguments: Any) -> None:
        self.loop, self.state = Loop(arguments), object()

    def train(self, failure: BaseException | None = None, during: Callable[[], object] = lambda: None) -> Run:
        self.loop.begin(dict, self.state)
        during()
        run = self.loop.run
        for step in range(2):
            self.loop.batch(step)
            self.loop.log({"loss": 1.0}, step)
            if failure is not None:
                raise failure
            self.loop.leave("step")
        self.loop.end()
        return run

    def evaluate(self, failure: BaseException | None = None, score: float = 2.0) -> None:
        if self.loop.follow():
            self.loop.enter("phase", self.loop.run.span("validation"))
        if failure is not None:
            raise failure
        if self.loop.follow():
            self.loop.leave("phase")
            self.loop.log({"test_loss": score}, 1)


TRAINED = [
    "run",
    *("  step 0", "train 0: loss=1.0", "  end step", "  step 1", "train 1: loss=1.0", "  end step"),
    "end run completed",
]
EVALUATED = ["span validation", "end span", "train 1: test_loss=2.0"]


def test_a_trainer_may_call_its_method_anything(start: Start) -> None:
    class Fits(Trainer):
        def fit(self) -> Run:
            self.loop.begin(dict, self.state)
            run = self.loop.run
            self.loop.batch(0)
            assert self.loop.follow()
            self.loop.leave("step")
            self.loop.end()
            return run

    assert outline(Fits().fit()) == ["run", "  step 0", "  end step", "end run completed"]


def test_what_is_evaluated_after_the_training_is_the_runs(start: Start) -> None:
    trainer = Trainer()
    run = trainer.train()
    assert outline(run) == TRAINED
    assert events(run, "run_end")[0]["rests"] is True
    assert not run.closed
    assert "completed" in repr(run)
    trainer.evaluate()
    trainer.evaluate()
    assert outline(run) == [*TRAINED, *EVALUATED, *EVALUATED]
    run.close("failed")
    assert status_of(path_of(run)) == "completed", "as the training ended"
    assert len(events(run, "run_end")) == 1
    assert trainer.loop.follow() is False


def test_a_run_that_rests_is_current_only_where_no_other_is_open(start: Start) -> None:
    run = Trainer().train()
    stepspan.current_run().log_metrics({"mine": 1.0})
    assert outline(run)[-1] == "train 1: mine=1.0"
    with start(job_id="other") as other:
        assert stepspan.current_run() is other
    assert stepspan.current_run() is DISABLED, "another run has begun since"


def test_nothing_works_beside_a_run_that_rests(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPSPAN_SAMPLERS", "process")
    trainer = Trainer(stall_after=60)
    run = trainer.train()
    assert run._recorder.background_tasks == []  # type: ignore[union-attr]
    assert not {thread.name for thread in threading.enumerate()} & {"stepspan-stall", "stepspan-samplers"}


def test_another_training_closes_it(start: Start) -> None:
    trainer = Trainer()
    first = trainer.train()
    second = trainer.train()
    assert status_of(path_of(first)) == "completed"
    assert status_of(path_of(second)) is None
    trainer.evaluate()
    assert outline(second)[-3:] == EVALUATED
    assert outline(first) == TRAINED


def test_models_that_are_trained_first_and_evaluated_then_keep_their_scores_apart(start: Start, tmp_path: Path) -> None:
    one, two = Trainer(job_id="one"), Trainer(job_id="two")
    first, second = one.train(), two.train()
    one.evaluate()
    two.evaluate()
    assert outline(second) == [*TRAINED, *EVALUATED]
    assert outline(first) == EVALUATED, "in a session of its own"
    assert read_resting(path_of(first)) == "completed"
    first.close()
    second.close()
    assert {
        (read.header["job_id"], read.closed and read.closed.status)
        for read in map(read_session, find_sessions(tmp_path / "stepspan-runs"))
    } == {
        ("one", "completed"),
        ("two", "completed"),
    }


def test_a_run_of_the_same_job_is_no_duplicate_of_one_that_rests(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(job_id="job")
    trainer.train()
    with start(job_id="job") as run:
        assert run.identity.role == ""
        trainer.evaluate()
    assert outline(run)[1:4] == ["  span validation", "  end span", "train 1: test_loss=2.0"], (
        "the open one is asked for"
    )
    assert not caplog.records


def test_threads_do_not_take_each_others_runs(start: Start) -> None:
    found: dict[str, Run] = {}
    barrier = threading.Barrier(2, timeout=20)

    def work(name: str) -> None:
        trainer = Trainer(job_id=name)
        found[name] = trainer.train(during=barrier.wait)
        trainer.evaluate()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: run.job_id for name, run in found.items()} == {"a": "a", "b": "b"}
    for run in found.values():
        assert outline(run) == [*TRAINED, *EVALUATED]


def test_a_training_that_failed_is_closed_at_once_and_evaluated_all_the_same(start: Start, tmp_path: Path) -> None:
    trainer = Trainer()
    with pytest.raises(MemoryError):
        trainer.train(failure=MemoryError())
    run = trainer.loop.run
    trainer.evaluate()  # nobody has reported the exception
    assert trainer.loop.run is run
    found = sorted(map(read_session, find_sessions(tmp_path / "stepspan-runs")), key=lambda s: int(s.header["started"]))
    assert [session.closed and session.closed.status for session in found] == ["interrupted", "interrupted"]
    assert status_of(path_of(run)) is None
    assert outline(run) == [*EVALUATED[:2], "train 0: test_loss=2.0"]


def test_an_evaluation_that_fails_leaves_the_end_of_the_training(start: Start, tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys
        sys.path[:0] = {path!r}
        from test_resting import Trainer
        trainer = Trainer()
        trainer.train()
        trainer.evaluate(failure=ValueError("no such checkpoint"))
    """)
    found = python(code.format(path=[str(Path(__file__).parent)]), tmp_path)
    assert found.returncode == 1
    (session,) = sessions(tmp_path / "stepspan-runs").values()
    assert outline(session) == [*TRAINED, "span validation", "  error ValueError", "end span error"]
    assert status_of(session) == "completed"


RESTING = """
import sys
sys.path[:0] = {path!r}
from test_resting import Trainer
trainer = Trainer(job_id="job")
trainer.train()
trainer.evaluate()
print("rests", flush=True)
sys.stdin.readline()
trainer.evaluate()
"""


def resting(cwd: Path, endpoint: str = "") -> subprocess.Popen[str]:
    file = cwd / "train.py"
    file.write_text(RESTING.format(path=[str(Path(__file__).parent)]))
    env = {name: value for name, value in os.environ.items() if not runs.is_ours(name)}
    env["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
    process = subprocess.Popen(
        [sys.executable, str(file)], cwd=cwd, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "rests\n"
    return process


def show(directory: Path) -> list[str]:
    return [command("report", "--json", directory).stdout, command("status", directory).stdout]


def test_killed_as_it_rests_it_has_ended_as_the_training_did(start: Start, tmp_path: Path) -> None:
    with resting(tmp_path) as process:
        (session,) = sessions(tmp_path / "stepspan-runs").values()
        shown = [
            command("report", "--json", tmp_path / "stepspan-runs").stdout,
            command("status", tmp_path / "stepspan-runs").stdout,
        ]
        process.send_signal(signal.SIGKILL)
    shown += [
        command("report", "--json", tmp_path / "stepspan-runs").stdout,
        command("status", tmp_path / "stepspan-runs").stdout,
    ]
    for text in shown:
        assert "completed" in text
        assert "running" not in text
        assert "interrupted" not in text
    with ScriptedReceiver() as receiver:
        assert command("sync", tmp_path / "stepspan-runs", "--endpoint", receiver.url).returncode == 0
    assert status_of(session) == "completed"


def test_the_end_of_the_training_arrives_while_it_rests_and_the_scores_after_it(start: Start, tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        with resting(tmp_path, receiver.url) as process:
            until(lambda: receiver.spans("training.run") and scores(receiver))
            (span,) = receiver.spans("training.run")
            assert span["attributes"]["status"] == "completed"
            until(lambda: receiver.points("training.step.duration"))
            (session,) = sessions(tmp_path / "stepspan-runs").values()
            assert status_of(session) is None
            process.communicate("go on\n", timeout=60)
        assert status_of(session) == "completed"
        until(lambda: len(scores(receiver)) == 2)
        assert len(receiver.spans("training.run")) == 1


def scores(receiver: ScriptedReceiver) -> list[float]:
    points = [point for point in receiver.points("training.loss") if ("split", "test") in point.attributes]
    return [point.number for point in points if point.value == bits(2.0)]


def test_an_evaluation_in_a_forked_worker_has_a_session_of_its_own(start: Start, tmp_path: Path) -> None:
    trainer = Trainer()
    run = trainer.train()
    pid = os.fork()
    if not pid:
        stepspan.current_run().log_metrics({"worker": 1.0})
        os._exit(0)
    assert status_of_child(pid) == 0
    trainer.evaluate()
    assert outline(run) == [*TRAINED, *EVALUATED]
    worker = sessions(tmp_path / "stepspan-runs")["0-worker1"]
    assert outline(worker) == ["train 1: worker=1.0"]


def test_prometheus_has_the_scores_of_models_that_were_trained_first_and_evaluated_then(
    start: Start, prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{prometheus.otlp_endpoint}/v1/metrics")
    one, two = Trainer(job_id="one"), Trainer(job_id="two")
    trained = [one.train(), two.train()]
    one.evaluate(score=1.5)
    two.evaluate(score=2.5)
    for run in trained:
        assert run.flush(20)
        run.close()
    found = prometheus.series('training_loss{split="test"}[1h]')
    assert {labels["job_id"]: values_of(samples) for labels, samples in found} == {"one": [1.5], "two": [2.5]}
    found = prometheus.series('training_loss{split="train"}[1h]')
    assert {labels["job_id"]: values_of(samples) for labels, samples in found} == {"one": [1.0, 1.0], "two": [1.0, 1.0]}


def values_of(samples: list[tuple[int, float]]) -> list[float]:
    return [value for _, value in samples if value == value]


def test_threads_deliver_before_a_run_is_parked_and_again_when_it_is_evaluated(start: Start) -> None:
    exporter = stepspan.MemoryExporter()
    one = Trainer(job_id="one", exporters=[exporter])
    first = one.train()
    two = Trainer(job_id="two").train()
    runs_told = [span for _, span in exporter.records["traces"] if span.name == "training.run"]  # type: ignore[union-attr]
    assert [span.attributes["status"] for span in runs_told] == ["completed"]  # type: ignore[union-attr]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stepspan-memory")]
    one.evaluate()
    first.close()
    two.close()
    points: list[Any] = [point for _, point in exporter.records["metrics"]]
    assert 2.0 in [value for series, _, value in points if dict(series.attributes).get("split") == "test"]


@pytest.mark.parametrize("off", [{}, {"STEPSPAN_DISABLED": "1"}, {"STEPSPAN_ENABLED": "0"}], ids=str)
def test_an_evaluation_without_a_run_is_told_once_where_runs_are_on(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, off: dict[str, str]
) -> None:
    for name, value in off.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer()
    trainer.evaluate()
    trainer.evaluate()
    assert len(caplog.records) == (not off)
    Trainer(enabled=False).evaluate()
    assert len(caplog.records) == (not off)
