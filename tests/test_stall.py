"""The stall watch: training that stands still is reported once, with its place; what only takes long is not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.events_of import mapper
from harness.processes import under_load
from harness.runs import events, is_ours, python, sessions, spans

from stepspan.events import Event
from stepspan.recording.stall import MAX_STACKS_CHARS, REPEAT_INTERVAL_S, StallWatch
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]
AFTER = 600.0


class Watched:
    """A run, and a watch of it whose time a test moves by hand."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.now = 1000.0
        self.watch = StallWatch(run._recorder, AFTER, clock=lambda: self.now, start=False)
        self.watch.check()

    def passes(self, seconds: float) -> None:
        """Time, in which the watch looks as often as its thread would."""
        end = self.now + seconds
        while self.now < end:
            self.now += self.watch.every
            self.watch.check()

    def skips(self, seconds: float) -> None:
        """Time in which nobody in this process did anything."""
        self.now += seconds
        self.watch.check()

    @property
    def told(self) -> list[tuple[str, float]]:
        return [(event["status"], event["attributes"]["seconds"]) for event in events(self.run, "event")]


@pytest.fixture
def watched(start: Start, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setenv("STEPSPAN_STALL_AFTER", "0")
    return Watched(start())


def test_silence_is_a_stall_once_and_its_end_is_told(watched: Watched) -> None:
    watched.run.log_metrics({"loss": 1.0})
    watched.passes(AFTER)
    assert watched.told == []
    watched.passes(20)
    assert watched.told == [("stalled", 600.0)]
    watched.passes(5000)
    watched.run.log_metrics({"loss": 1.0})
    watched.passes(10)
    assert watched.told == [("stalled", 600.0), ("recovered", pytest.approx(5620, abs=20))]
    watched.passes(300)
    assert len(watched.told) == 2


def test_a_run_that_logs_never_stalls(watched: Watched) -> None:
    for _ in range(20):
        watched.passes(AFTER - 20)
        watched.run.log_metrics({"loss": 1.0})
    assert watched.told == []


def test_what_samplers_write_is_no_sign_of_training(watched: Watched) -> None:
    for _ in range(70):
        watched.run._recorder.emit_background({"ts": 0, "seq": 0, "tag": "sample", "source": "host", "values": []})
        watched.passes(10)
    assert watched.told == [("stalled", 600.0)]


def test_a_run_has_not_stalled_while_another_one_of_its_process_goes_on(start: Start) -> None:
    """A study waits for its trials, each of which is a run of its own and ends."""
    study = Watched(start(job_id="study", stall_after=0).__enter__())
    for number in range(4):
        with start(job_id=f"trial-{number}", stall_after=0) as trial:
            study.passes(AFTER / 2)
            trial.log_metrics({"loss": 1.0})
            study.passes(AFTER / 2)
    assert study.told == []
    study.passes(AFTER + 20)
    assert study.told == [("stalled", 600.0)]
    with start(job_id="trial", stall_after=0):
        study.passes(10)
    assert [status for status, _ in study.told] == ["stalled", "recovered"]


def test_runs_stall_together_and_each_says_where_it_stands(start: Start) -> None:
    both = [Watched(start(job_id=name, stall_after=0).__enter__()) for name in ("study", "trial")]
    with both[1].run.step(7):
        for watched in both:
            watched.passes(AFTER + 20)
    assert [watched.told for watched in both] == [[("stalled", 600.0)]] * 2
    assert [events(each.run, "event")[0]["attributes"].get("step") for each in both] == [None, 7]


def test_a_checkpoint_of_another_run_takes_its_time(start: Start) -> None:
    study = Watched(start(job_id="study", stall_after=0).__enter__())
    with start(job_id="trial", stall_after=0) as trial, trial.span("checkpoint"):
        study.passes(3 * AFTER)
        assert study.told == []


class DropSamples:
    tags = frozenset({"sample"})

    def __call__(self, event: dict[str, Any]) -> None:
        return None


def test_samples_that_a_processor_drops_hide_no_training(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPSPAN_STALL_AFTER", "0")
    watched = Watched(start(processors=[DropSamples()]))
    for _ in range(70):
        for _ in range(5):
            watched.run._recorder.emit_background({"ts": 0, "seq": 0, "tag": "sample", "source": "host", "values": []})
        watched.run.log_metrics({"loss": 1.0})
        watched.passes(10)
    assert watched.told == []


def test_at_most_one_stall_an_hour_is_told(watched: Watched) -> None:
    for _ in range(4):
        watched.run.log_metrics({"loss": 1.0})
        watched.passes(AFTER + 30)
    watched.run.log_metrics({"loss": 1.0})
    watched.passes(20)
    assert [status for status, _ in watched.told] == ["stalled", "recovered"]
    watched.passes(REPEAT_INTERVAL_S)
    assert [status for status, _ in watched.told] == ["stalled", "recovered", "stalled"]


def test_a_process_that_was_stopped_has_not_stalled(watched: Watched) -> None:
    watched.skips(10_000)
    watched.passes(AFTER - 50)
    assert watched.told == []


@pytest.mark.parametrize("name", ["checkpoint", "compile", "validation"])
def test_what_is_known_to_take_long_is_no_stall_for_an_hour(watched: Watched, name: str) -> None:
    with watched.run.step(0), watched.run.span(name), watched.run.span("write"):
        watched.passes(6 * AFTER - 20)
        assert watched.told == []
        watched.passes(40)
        assert watched.told == [("stalled", 3600.0)]


@pytest.mark.parametrize(
    ("file", "stalls"),
    [
        ("/env/site-packages/torch/_dynamo/convert_frame.py", False),
        ("/env/site-packages/jax/_src/compiler.py", False),
        ("/env/site-packages/torch/distributed/checkpoint/state_dict_saver.py", False),
        ("/env/site-packages/torch/_dynamo/eval_frame.py", True),
        ("/home/me/train.py", True),
    ],
    ids=lambda value: Path(value).name if isinstance(value, str) else "",
)
def test_a_compiler_at_work_is_no_stall_though_nobody_said_so(watched: Watched, file: str, stalls: bool) -> None:
    scope: dict[str, Any] = {}
    exec(compile("def through(work):\n    return work()", file, "exec"), scope)
    scope["through"](lambda: watched.passes(AFTER + 20))
    assert bool(watched.told) is stalls


def compiling(work: Callable[[], object]) -> None:
    """Do it in what looks like a compiler."""
    scope: dict[str, Any] = {}
    exec(compile("def through(work):\n    return work()", "/torch/_dynamo/convert_frame.py", "exec"), scope)
    scope["through"](work)


def test_the_time_of_a_compilation_still_counts_less_when_it_is_over(watched: Watched) -> None:
    with watched.run.step(0):
        compiling(lambda: watched.passes(AFTER + 60))
        watched.passes(AFTER - 120)
        assert watched.told == []
        watched.passes(30)
        assert watched.told == [("stalled", pytest.approx(2 * AFTER - 50, abs=20))]  # type: ignore[comparison-overlap]


def test_a_compiler_is_seen_however_deep_it_works(watched: Watched) -> None:
    def deep(calls: int) -> None:
        deep(calls - 1) if calls else watched.passes(AFTER + 20)

    compiling(lambda: deep(300))
    assert watched.told == []


def test_a_stall_says_where_it_is(watched: Watched) -> None:
    run = watched.run
    with run.epoch(2), run.step(7), run.span("backward"), run.span("all_reduce", collective=True):
        watched.passes(AFTER + 20)
    (stall,) = events(watched.run, "event")
    (span,) = [event for event in events(watched.run, "span_begin") if event["name"] == "all_reduce"]
    about = stall["attributes"]
    assert (stall["name"], stall["severity"], stall["parent"]) == ("training.stall", "error", span["seq"])
    assert (about["step"], about["split"], about["epoch"]) == (7, "train", 2)
    assert about["spans"] == [
        *("training.run", "training.epoch", "training.step", "backward", "all_reduce (collective)"),
    ]
    assert about["collective"] is True
    assert about["at"].endswith(" in _check")
    assert about["stacks"].startswith("MainThread (innermost call first):\n")
    assert "in test_a_stall_says_where_it_is\n" in about["stacks"]


def test_a_thread_that_trains_is_the_one_that_is_looked_at(watched: Watched) -> None:
    entered, compiled, done = threading.Event(), threading.Event(), threading.Event()

    def wait_for_data() -> None:
        entered.set()
        done.wait()

    def train() -> None:
        with watched.run.step(5):
            compiling(lambda: (entered.set(), compiled.wait()))  # type: ignore[func-returns-value]
            wait_for_data()

    thread = threading.Thread(target=train, name="trainer")
    thread.start()
    try:
        entered.wait()
        watched.passes(AFTER + 60)
        assert watched.told == []
        entered.clear()
        compiled.set()
        entered.wait()
        watched.passes(AFTER)
    finally:
        compiled.set()
        done.set()
        thread.join()
    (stall,) = events(watched.run, "event")
    assert stall["attributes"]["stacks"].startswith("trainer (innermost call first):\n")
    assert " in wait_for_data\n" in stall["attributes"]["stacks"]


def test_spans_that_have_ended_and_steps_that_were_left_are_not_open(watched: Watched) -> None:
    with watched.run.span("done", collective=True):
        pass
    for _ in watched.run.steps(range(3)):
        break
    watched.passes(AFTER + 20)
    (stall,) = events(watched.run, "event")
    assert stall["attributes"]["spans"] == ["training.run"]
    assert stall["attributes"]["collective"] is False
    assert "step" not in stall["attributes"]


def test_a_span_of_another_thread_is_seen(watched: Watched) -> None:
    entered, done = threading.Event(), threading.Event()

    def work() -> None:
        with watched.run.span("gather", collective=True):
            entered.set()
            done.wait()

    thread = threading.Thread(target=work, name="comms")
    with watched.run.step(0):
        thread.start()
        entered.wait()
        try:
            watched.passes(AFTER + 20)
        finally:
            done.set()
            thread.join()
    (stall,) = events(watched.run, "event")
    assert stall["attributes"]["spans"] == ["training.run", "training.step", "gather (collective)"]
    main, _, other = stall["attributes"]["stacks"].partition("comms (innermost call first):\n")
    assert main.startswith("MainThread")
    assert "in work\n" in other


def test_stacks_are_bounded_and_begin_with_the_innermost_call(watched: Watched) -> None:
    names = [f"worker-{number}-{'x' * 200}" for number in range(400)]
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, name=name) for name in names]
    for thread in threads:
        thread.start()

    def deep(calls: int) -> None:
        deep(calls - 1) if calls else watched.passes(AFTER + 20)

    try:
        deep(500)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    stacks = events(watched.run, "event")[0]["attributes"]["stacks"]
    assert len(stacks) == MAX_STACKS_CHARS
    main, _, others = stacks.partition("worker-")
    assert main.index(" in passes") < main.index(" in deep")
    assert main.count(" in deep") < 100
    assert "(innermost call first)" in others


def test_secrets_among_the_attributes_are_redacted(watched: Watched) -> None:
    with watched.run.span("fetch https://me:hunter2@host"):
        watched.passes(AFTER + 20)
    assert "hunter2" not in str(events(watched.run))


def test_a_stall_arrives_as_an_error_and_its_end_as_information(watched: Watched) -> None:
    with watched.run.step(3):
        watched.passes(AFTER + 20)
        watched.run.log_metrics({"loss": 1.0})
        watched.passes(20)
    watched.run.close()
    lines = events(watched.run)
    stalled, recovered = [log for log in mapper("logs", lines[0]).map(lines) if log.event_name == "training.stall"]
    assert (stalled.severity, stalled.body) == (17, "training.stall: stalled")
    assert (recovered.severity, recovered.body) == (9, "training.stall: recovered")
    step = spans(watched.run)["training.step 3"]
    assert stalled.trace_id == recovered.trace_id == step.trace_id
    assert (stalled.attributes["status"], stalled.attributes["step"]) == ("stalled", 3)
    assert "stacks" in stalled.attributes
    assert "stacks" not in recovered.attributes


def test_a_stall_that_ends_with_the_run_is_said_to_be_over(watched: Watched) -> None:
    watched.run._recorder.background_tasks.append(watched.watch)  # type: ignore[union-attr]
    watched.passes(AFTER + 20)
    watched.run.log_metrics({"loss": 1.0})
    watched.run.close()
    assert [status for status, _ in watched.told] == ["stalled", "recovered"]
    assert events(watched.run)[-1]["tag"] == "run_end"


def test_a_run_that_ends_while_it_stalls_has_not_recovered(watched: Watched) -> None:
    watched.run._recorder.background_tasks.append(watched.watch)  # type: ignore[union-attr]
    watched.passes(AFTER + 20)
    watched.run.close("interrupted")
    assert [status for status, _ in watched.told] == ["stalled"]


# the thread


def watches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stepspan-stall"]


def test_runs_side_by_side_have_one_thread_and_leave_none(start: Start) -> None:
    runs = [start(job_id=f"job-{number}") for number in range(5)]
    assert len(watches()) == 1
    with start():
        assert len(watches()) == 1
    for run in runs:
        assert len(watches()) == 1
        run.close()
    assert watches() == []


def test_zero_is_no_watch(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPSPAN_STALL_AFTER", "0")
    with start() as run:
        assert watches() == []
        assert run._recorder.background_tasks == [] or all(  # type: ignore[union-attr]
            "Stall" not in type(each).__name__
            for each in run._recorder.background_tasks  # type: ignore[union-attr]
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_no_watch_and_its_parent_keeps_its_own(tmp_path: Path) -> None:
    code = """
    import os, threading, time, stepspan
    names = lambda: [thread.name for thread in threading.enumerate()]
    with stepspan.start_run(job_id="job") as run:
        with run.span("before"):
            child = os.fork()
            if child == 0:
                assert names() == ["MainThread"] and run._recorder.background_tasks == []
                run.log_metrics({"x": 1.0})
                run.close()
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert "stepspan-stall" in names()
    """
    found = python(code, tmp_path, STEPSPAN_STALL_AFTER="0.5")
    assert found.returncode == 0, found.stderr


def test_no_signal_handler_is_installed_and_the_end_is_not_delayed(tmp_path: Path) -> None:
    code = """
    import signal, time, stepspan
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    run = stepspan.start_run()
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
    before = time.monotonic()
    run.close()
    assert time.monotonic() - before < 0.4
    """
    found = python(code, tmp_path)
    assert found.returncode == 0, found.stderr


# two ranks, for real

RANK = """
import os, socket, struct, sys, time
import stepspan

rank, link = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))


def all_reduce(value):
    link.sendall(struct.pack("d", value))
    return value + struct.unpack("d", link.recv(8))[0]


def read_a_shard_that_never_comes():
    while True:
        time.sleep(0.05)


with stepspan.start_run(directory="runs", job_id="job", rank=rank, local_rank=rank, world_size=2) as run:
    for step in run.steps(range(10)):
        with run.span("all_reduce", collective=True):
            if (step, rank) == (3, 1):
                read_a_shard_that_never_comes()
            all_reduce(1.0)
"""


def test_a_rank_that_stops_in_the_middle_of_a_collective_is_named_by_itself_and_those_that_wait(tmp_path: Path) -> None:
    ends = socket.socketpair()
    env = {name: value for name, value in os.environ.items() if not is_ours(name)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(end.fileno())],
            cwd=tmp_path, env={**env, "STEPSPAN_STALL_AFTER": "1"}, pass_fds=[end.fileno()],
        )
        for rank, end in enumerate(ends)
    ]  # fmt: skip
    try:
        found = stalls_of_two(tmp_path / "runs")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for end in ends:
            end.close()
    about = {rank: stall["attributes"] for rank, stall in found.items()}
    for each in about.values():
        assert (each["step"], each["spans"][-1], each["collective"]) == (3, "all_reduce (collective)", True)
        assert each["seconds"] >= 1
    assert about["0"]["at"].endswith(" in all_reduce"), "waits for the others"
    assert about["1"]["at"].endswith(" in read_a_shard_that_never_comes"), "is waited for"
    assert "read_a_shard_that_never_comes" not in about["0"]["stacks"]
    logs = {
        rank: next(log for log in mapper("logs", lines[0]).map(lines) if log.event_name == "training.stall")
        for rank, lines in ((rank, events(path)) for rank, path in sessions(tmp_path / "runs").items())
    }
    assert logs["0"].trace_id == logs["1"].trace_id, "both are found in the trace of the step"


def stalls_of_two(directory: Path) -> dict[str, Event]:
    """Rank -> its stall, once both have told theirs."""
    deadline = time.monotonic() + under_load(30)
    while sum(b"training.stall" in file.read_bytes() for file in directory.rglob("000001.jsonl")) < 2:
        assert time.monotonic() < deadline, "no stall was told"
        time.sleep(0.1)
    return {rank: events(path, "event")[0] for rank, path in sessions(directory).items()}
