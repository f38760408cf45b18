"""Several runs open side by side in a process: which one is current where, which one ends when, and what they share."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from harness import runs
from harness.processes import until
from harness.receiver import ScriptedReceiver
from harness.runs import events, is_ours, outline, path_of, python, sessions, status_of
from harness.stack import Prometheus

import stepspan
from stepspan.deliver.delivery import Delivery
from stepspan.integrations.loop import Loop
from stepspan.integrations.opentelemetry import configure
from stepspan.journal.layout import find_sessions
from stepspan.recording.open_runs import OPEN_RUNS
from stepspan.run import DISABLED, Run
from stepspan.testing import recorded_run

start = runs.start
Start = Callable[..., Run]
T = TypeVar("T")


def in_thread(call: Callable[[], T]) -> T:
    """What a call returns in a thread that is started here."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


class Worker:
    """A thread that makes one call after the other, started here and now."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self(lambda: None)

    def __call__(self, call: Callable[[], T]) -> T:
        return self._pool.submit(call).result(30)


def values(run: Run, key: str) -> list[Any]:
    return [event["metrics"][key] for event in events(run, "metrics") if key in event["metrics"]]


# side by side


def test_trials_in_threads_keep_what_is_theirs(start: Start) -> None:
    """As Optuna's n_jobs=3: nobody is closed, and current_run() is the trial's own."""
    all_open, all_logged = threading.Barrier(3, timeout=30), threading.Barrier(3, timeout=30)

    def trial(number: int) -> Run:
        with start(job_id=f"trial-{number}") as run:
            all_open.wait()
            for step in run.steps(range(20)):
                stepspan.current_run().log_metrics({"trial": number})
                run.log_metrics({"loss": step})
            all_logged.wait()
        return run

    with ThreadPoolExecutor(3) as pool:
        trials = list(pool.map(trial, range(3)))
    for number, run in enumerate(trials):
        assert values(run, "trial") == [number] * 20
        assert values(run, "loss") == list(range(20))
        assert status_of(path_of(run)) == "completed"
        assert run.stats()["warnings"] == {}
    assert stepspan.current_run() is DISABLED


def test_what_trials_log_arrives_as_each_one_s_own(start: Start) -> None:
    """One deliverer sends all of them, whichever run has started it, and ends when all is sent."""
    ready = threading.Barrier(3, timeout=30)

    def trial(number: int, endpoint: str) -> None:
        with start(job_id=f"trial-{number}", endpoint=endpoint, samplers="none") as run:
            ready.wait()
            for step in run.steps(range(20)):
                stepspan.current_run().log_metrics({"loss": 100 * number + step})

    with ScriptedReceiver() as receiver, start(job_id="study", endpoint=receiver.url, samplers="none") as study:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(trial, range(3), [receiver.url] * 3))
        study.log_metrics({"best": 1.0})
        expected = {("study", 1.0), *((f"trial-{n}", 100.0 * n + step) for n in range(3) for step in range(20))}

        def arrived() -> set[tuple[str, float]]:
            points = receiver.points("training.loss") | receiver.points("training.best")
            return {(point.job, point.number) for point in points if isinstance(point.value, int)}

        until(lambda: len(arrived()) >= len(expected))
        assert arrived() == expected


def test_a_study_goes_on_around_its_trials(start: Start) -> None:
    with start(job_id="study") as study, study.span("search"):
        for number in range(2):
            with start(job_id=f"trial-{number}") as trial, trial.step(number):
                stepspan.current_run().log_metrics({"loss": 1.0})
                study.log_metrics({"running": number})
            assert stepspan.current_run() is study
            study.log_event("trial", number=number)
            assert outline(trial) == [
                "run", f"  step {number}", f"train {number}: loss=1.0", "  end step", "end run completed",
            ]  # fmt: skip
    assert outline(study) == [
        "run",
        "  span search",
        *("train -: running=0.0", "    event trial"),
        *("train -: running=1.0", "    event trial"),
        "  end span",
        "end run completed",
    ]


def test_the_end_of_a_block_restores_what_was_current_before(start: Start) -> None:
    with start(job_id="a") as a:
        with start(job_id="b") as b, start(job_id="c") as c:
            assert stepspan.current_run() is c
            c.close()
            assert stepspan.current_run() is b
            inside = start(job_id="inside")
        assert stepspan.current_run() is a
        assert not inside.closed
    assert stepspan.current_run() is inside, "the only one that is open"


def test_a_block_of_a_run_that_was_started_earlier(start: Start) -> None:
    first, second = start(job_id="first"), start(job_id="second")
    assert stepspan.current_run() is second
    with first:
        assert stepspan.current_run() is first
    assert (first.closed, stepspan.current_run()) == (True, second)


def test_a_trial_that_is_switched_off_logs_to_no_other_run(start: Start) -> None:
    with start(job_id="study") as study:
        with start(enabled=False):
            stepspan.current_run().log_metrics({"loss": 1.0})
            with start(enabled=False):
                assert stepspan.current_run() is DISABLED
            assert stepspan.current_run() is DISABLED
        assert stepspan.current_run() is study
    assert outline(study) == ["run", "end run completed"]


def test_integrations_begin_no_run_where_a_block_says_that_nothing_is_recorded(start: Start) -> None:
    with start(enabled=False):
        with configure() as configured:
            assert configured.run is DISABLED
        with stepspan.Telemetry("serve", backend="otel") as telemetry:
            telemetry.emit(metrics={"latency": 1.0})
        loop = Loop({})
        loop.begin(dict)
        assert loop.run is DISABLED
    assert not Path("stepspan-runs").exists()


def test_an_exception_fails_the_run_it_leaves(start: Start) -> None:
    with start(job_id="study") as study:
        with pytest.raises(ValueError, match="x"), start(job_id="trial") as trial:
            raise ValueError("x")
        study.log_metrics({"loss": 1.0})
    assert outline(trial)[-2:] == ["  error ValueError", "end run failed"]
    assert outline(study) == ["run", "train -: loss=1.0", "end run completed"]


# threads and tasks


def test_a_thread_takes_the_run_of_its_starter(start: Start) -> None:
    with start(job_id="a"), start(job_id="b") as b, start(job_id="c") as c:
        assert in_thread(stepspan.current_run) is c
        with b:
            assert in_thread(stepspan.current_run) is b
            assert in_thread(lambda: in_thread(stepspan.current_run)) is b
            worker = Worker()
            assert worker(stepspan.current_run) is b
            timed: list[Run] = []
            timer = threading.Timer(0, lambda: timed.append(stepspan.current_run()))
            timer.start()
            timer.join()
            assert timed == [b]
        assert all("current_run" not in run.stats()["warnings"] for run in (b, c))


def test_a_worker_of_a_study_has_its_own_trials_and_between_them_the_study(start: Start) -> None:
    with start(job_id="study") as study:
        other = Worker()(lambda: start(job_id="other"))
        worker = Worker()

        def trial() -> None:
            assert stepspan.current_run() is study
            with start(job_id="trial") as run:
                assert stepspan.current_run() is run
                assert in_thread(stepspan.current_run) is run
            assert stepspan.current_run() is study

        worker(trial)
        worker(trial)
        other.close()


def test_a_run_that_rests_is_current_where_it_was_and_takes_nothing_of_others(start: Start) -> None:
    """A callback's run, after its training, in a thread beside another one that trains."""
    one, other = Worker(), Worker()
    trained = one(lambda: start(job_id="trained")._hold())
    goes_on = other(lambda: start(job_id="goes on")._hold())
    one(trained._rest)
    one(lambda: stepspan.current_run().log_metrics({"score": 1.0}))
    other(lambda: stepspan.current_run().log_metrics({"loss": 1.0}))
    assert (values(trained, "score"), values(goes_on, "loss")) == ([1.0], [1.0])
    path = path_of(trained)
    other(lambda: start(job_id="beside").close())
    one(lambda: stepspan.current_run().log_metrics({"score": 2.0}))
    assert path_of(trained) == path, "a run of another thread does not come after it"
    one(lambda: start(job_id="after").close())
    assert status_of(path) == "completed"


def test_a_context_is_inherited_by_who_copies_it(start: Start) -> None:
    with start(job_id="a"), start(job_id="b") as b:
        context = contextvars.copy_context()
        with start(job_id="c"):
            assert in_thread(lambda: context.run(stepspan.current_run)) is b


def test_tasks_have_runs_of_their_own(start: Start) -> None:
    async def trial(number: int) -> Run:
        with start(job_id=f"trial-{number}") as run:
            for _ in range(3):
                await asyncio.sleep(0)
                assert stepspan.current_run() is run
                assert await asyncio.to_thread(stepspan.current_run) is run
                assert await asyncio.create_task(current()) is run
        return run

    async def current() -> Run:
        return stepspan.current_run()

    async def study() -> list[Run]:
        return await asyncio.gather(*(trial(number) for number in range(3)))

    assert [status_of(path_of(run)) for run in asyncio.run(study())] == ["completed"] * 3


def test_a_thread_without_a_run_takes_the_only_open_one(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    stranger = Worker()
    assert stranger(stepspan.current_run) is DISABLED
    with start() as run:
        assert stranger(stepspan.current_run) is run
    assert stranger(stepspan.current_run) is DISABLED
    assert caplog.records == []


def test_a_thread_without_a_run_takes_the_oldest_of_several_with_a_warning(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Worker()
    with start(job_id="oldest") as oldest, start(job_id="youngest"):
        for _ in range(3):
            assert stranger(stepspan.current_run) is oldest
        assert oldest.stats()["warnings"] == {"current_run": 3}
        (told,) = [record.getMessage() for record in caplog.records]
        assert "current_run() is oldest, the oldest of 2 open runs" in told


def test_threads_are_started_as_before_once_no_run_is_open(start: Start) -> None:
    before = threading.Thread.start
    with start(), start(job_id="other"):
        assert threading.Thread.start.__name__ == before.__name__
    assert threading.Thread.start is before


def test_a_wrapper_of_somebody_else_stays_in_its_place(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    with start():
        below = threading.Thread.start

        def theirs(self: threading.Thread) -> None:
            started.append(self)
            below(self)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", theirs)
            for _ in range(2):
                with start(job_id="other") as run:
                    assert in_thread(stepspan.current_run) is run
                    OPEN_RUNS.all()[0].close()
                assert threading.Thread.start is theirs
    assert len([thread for thread in started if not thread.name.startswith("stepspan")]) == 2


def test_a_wrapper_that_is_taken_away_from_below_is_put_on_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread, start=threading.Thread.start: start(thread))
        first = start()
    first.close()  # what was put on it, the patch has taken away
    with start(job_id="other"), start() as run:
        stranger = Worker()
        assert stranger(stepspan.current_run) is run
        assert run.stats()["warnings"] == {}


# what a bare run ends


def test_a_cell_that_is_run_again_ends_its_earlier_run_as_it_is_used(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    first.log_metrics({"x": 1.0})
    second = start()
    assert (first.closed, stepspan.current_run()) == (False, second)
    second.log_metrics({"x": 2.0})
    assert first.closed
    assert outline(first) == ["run", "train -: x=1.0", "end run interrupted"]
    assert first.identity.job_id in caplog.messages[0]
    assert first.stats()["warnings"] == {"replaced": 1}


def test_a_cell_that_is_run_again_goes_on_with_the_series_of_its_job_id(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """The new run begins once it is known whether the earlier one ends, and takes its place."""
    cells = []
    for number in range(3):
        run = start(job_id="job", samplers="process", sample_interval=0.1)
        run.log_metrics({"x": number})
        cells.append(run)
    assert [run.identity.instance for run in cells] == ["job-0"] * 3
    assert [run.closed for run in cells] == [True, True, False]
    assert [outline(run)[:2] for run in cells] == [["run", f"train -: x={number}.0"] for number in range(3)]
    assert not [line for line in caplog.messages if "twin" in line]
    assert len({run.trace_id for run in cells}) == 3


def test_a_run_in_a_block_beside_a_bare_one_of_its_job_id_has_series_of_its_own(start: Start) -> None:
    bare = start(job_id="job")
    bare.log_metrics({"x": 1.0})
    with start(job_id="job") as run:
        run.log_metrics({"x": 2.0})
    assert (bare.closed, run.identity.instance) == (False, "job-0-twin1")
    assert outline(run) == ["run", "train -: x=2.0", "end run completed"]
    unused = start(job_id="job")
    unused.close()
    assert outline(unused) == ["run", "end run completed"]
    asked = start(job_id="job")
    assert asked.stats()["journal"]
    assert bare.closed
    asked.close()
    never_used = start(job_id="job")
    assert never_used.trace_id
    assert (never_used.identity.instance, outline(never_used)) == ("job-0", ["run"])


USES: dict[str, Callable[[Run], object]] = {
    "log_metrics": lambda run: run.log_metrics({"x": 1.0}),
    "log_scalar": lambda run: run.log_scalar("x", 1.0),
    "log_hyperparams": lambda run: run.log_hyperparams({"lr": 1.0}),
    "log_artifact": lambda run: run.log_artifact("model", "model.pt"),
    "log_event": lambda run: run.log_event("x"),
    "log_error": lambda run: run.log_error(ValueError("x")),
    "epoch": lambda run: run.epoch(0),
    "step": lambda run: run.step(0),
    "span": lambda run: run.span("x"),
    "steps": lambda run: run.steps([1]),
    "set_total_steps": lambda run: run.set_total_steps(5),
    "a log store": lambda run: run.as_log_store().log_scalar("x", 1.0, 0),
}


@pytest.mark.parametrize("use", USES)
def test_each_way_to_record_is_a_use(start: Start, use: str) -> None:
    first, second = start(), start(job_id="second")
    USES[use](second)
    assert (first.closed, second.closed) == (True, False)


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_is_only_used_by_with_ends_no_other(start: Start, number: int) -> None:
    bare = start(job_id="bare")
    bare.log_metrics({"x": 1.0})
    for _ in range(number):
        run = start(job_id="run")
        with run:
            run.log_metrics({"x": 1.0})
            assert stepspan.current_run() is run
    assert stepspan.current_run() is bare
    assert not bare.closed
    bare.log_metrics({"x": 2.0})
    assert values(bare, "x") == [1.0, 2.0]


def test_a_bare_run_ends_none_that_a_block_is_around(start: Start) -> None:
    with start(job_id="around") as around:
        bare = start(job_id="bare")
        bare.log_metrics({"x": 1.0})
        assert not around.closed
    entered = start(job_id="entered")
    with entered:
        again = start(job_id="again")
        again.log_metrics({"x": 1.0})
        assert (bare.closed, entered.closed) == (True, False)


def test_bare_runs_of_other_threads_and_tasks_go_on(start: Start) -> None:
    def bare(name: str) -> Run:
        run = start(job_id=name)
        run.log_metrics({"x": 1.0})
        return run

    mine, worker = bare("mine"), Worker()
    other = worker(lambda: bare("other"))
    assert (mine.closed, other.closed) == (False, False)
    worker(lambda: bare("another"))
    assert (mine.closed, other.closed) == (False, True)

    async def task(name: str) -> Run:
        run = bare(name)
        for _ in range(3):
            await asyncio.sleep(0)
            assert not run.closed
        return run

    async def side_by_side() -> list[Run]:
        return list(await asyncio.gather(task("a"), task("b")))

    found = asyncio.run(side_by_side())
    assert [run.closed for run in found] == [False, False]
    bare("after the tasks")
    assert [run.closed for run in (mine, *found)] == [True, True, True]


def test_a_store_s_run_is_its_own(start: Start) -> None:
    from stepspan.stores import StepspanLogStore

    bare = start(job_id="bare")
    bare.log_metrics({"x": 1.0})
    first, second = StepspanLogStore(job_id="first"), StepspanLogStore(job_id="second")
    for store in (first, second, first):
        store.log_scalar("x", 1.0, 0)
    assert [run.closed for run in (bare, first.run, second.run)] == [False] * 3
    bare_again = start(job_id="bare")
    bare_again.log_metrics({"x": 1.0})
    assert (bare.closed, first.run.closed, second.run.closed) == (True, False, False)
    for store in (first, second):
        store.close()


@pytest.mark.stack
@pytest.mark.parametrize("window", ["48h", "0s"])
def test_a_real_prometheus_takes_all_runs_of_one_job_id(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: str
) -> None:
    """A cell that is run again and again, and two runs in blocks beside it, within milliseconds of each other."""
    with Prometheus(tmp_path / "prometheus", out_of_order_time_window=window) as prometheus:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{prometheus.otlp_endpoint}/v1/metrics")
        for cell in range(3):
            bare = start(job_id="job", samplers="none")
            for step in range(5):
                bare.log_metrics({"loss": 100 * cell + step})
            with start(job_id="job", samplers="none") as beside:
                for step in range(5):
                    beside.log_metrics({"loss": 1000 + 100 * cell + step})
        bare.close()

        def stored() -> dict[str, list[float]]:
            found = prometheus.series('training_loss{job_id="job"}[1h]')
            return {labels["instance"]: [value for _, value in samples if value == value] for labels, samples in found}

        expected = [100.0 * cell + step for cell in range(3) for step in range(5)]
        until(lambda: sum(map(len, stored().values())) >= 2 * len(expected))
        assert stored() == {"job-0": expected, "job-0-twin1": [1000 + value for value in expected]}


# the end of the process, and its forks


def test_all_open_runs_end_with_the_process(tmp_path: Path) -> None:
    code = """
    import stepspan, threading
    study = stepspan.start_run(job_id="study")
    study.log_metrics({"x": 1.0})
    def work():
        run = stepspan.start_run(job_id="worker")
        run.log_metrics({"x": 2.0})
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    trial = stepspan.start_run(job_id="trial").__enter__()
    """
    found = python(code, tmp_path)
    assert (found.returncode, found.stderr.count("\n")) == (0, 1), found.stderr
    ended = {
        events(s.path)[0]["job_id"]: (status_of(s.path), events(s.path)[-1]["tag"])
        for s in find_sessions(tmp_path / "stepspan-runs")
    }
    assert ended == dict.fromkeys(("study", "worker", "trial"), ("completed", "run_end"))


def test_an_exception_that_ends_the_process_fails_the_runs_of_its_thread(tmp_path: Path) -> None:
    code = """
    import stepspan, threading
    begun, never = threading.Event(), threading.Event()
    def goes_on():
        with stepspan.start_run(job_id="goes on") as run:
            begun.set()
            never.wait()
    def is_over():
        stepspan.start_run(job_id="is over").log_metrics({"x": 1.0})
    study = stepspan.start_run(job_id="study")
    study.log_metrics({"x": 1.0})
    threading.Thread(target=goes_on, daemon=True).start()
    begun.wait()
    thread = threading.Thread(target=is_over)
    thread.start()
    thread.join()
    raise ValueError("x")
    """
    found = python(code, tmp_path)
    assert "ValueError" in found.stderr
    paths = {events(s.path)[0]["job_id"]: s.path for s in find_sessions(tmp_path / "stepspan-runs")}
    ended = {job: (status_of(path), len(events(path, "error"))) for job, path in paths.items()}
    assert ended == {"study": ("failed", 1), "goes on": ("interrupted", 0), "is over": ("completed", 0)}


class SlowDelivery(Delivery):
    """A delivery whose receiver takes its time, which a test moves by hand."""

    now = 1000.0

    def __init__(self, runs: list[Run]) -> None:
        super().__init__()
        self.runs = runs
        self.waited: list[float] = []

    def close(self, session: Path | None, timeout: float) -> None:
        assert [status_of(path_of(run)) for run in self.runs] == ["completed"] * len(self.runs)
        self.waited.append(timeout)
        SlowDelivery.now += 3.0


def test_the_process_waits_for_all_deliveries_as_long_as_for_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every journal has its end before."""
    open_now = [start(job_id=f"job-{number}", stall_after=0, samplers="none") for number in range(3)]
    delivery = SlowDelivery(open_now)
    for run in open_now:
        run._delivery = delivery
    monkeypatch.setattr("stepspan.run.time.monotonic", lambda: SlowDelivery.now)
    Run._close_at_exit(open_now, None)
    assert delivery.waited == [5.0, 2.0, 0.0]


def test_a_forked_child_goes_on_in_all_open_runs(start: Start, tmp_path: Path) -> None:
    code = """
    import os, stepspan, threading
    with stepspan.start_run(job_id="study") as study, stepspan.start_run(job_id="trial") as trial:
        child = os.fork()
        if child == 0:
            assert stepspan.current_run() is trial
            found = []
            thread = threading.Thread(target=lambda: found.append(stepspan.current_run()))
            thread.start()
            thread.join()
            assert found == [trial]
            for run in (study, trial):
                run.log_metrics({"child": 1.0})
                run.close()
            with stepspan.start_run(job_id="another") as run:
                run.log_metrics({"child": 2.0})
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        study.log_metrics({"parent": 1.0})
        trial.log_metrics({"parent": 2.0})
    """
    found = python(code, tmp_path)
    assert found.returncode == 0, found.stderr
    kept = {
        (header["job_id"], header["role"][:6], *event["metrics"].items())
        for header, *rest in (events(session.path) for session in find_sessions(tmp_path / "stepspan-runs"))
        for event in rest
        if event["tag"] == "metrics"
    }
    assert kept == {
        ("study", "", ("parent", 1.0)),
        ("trial", "", ("parent", 2.0)),
        ("study", "worker", ("child", 1.0)),
        ("trial", "worker", ("child", 1.0)),
        ("another", "", ("child", 2.0)),
    }


def test_all_open_runs_end_with_a_worker_of_multiprocessing(tmp_path: Path) -> None:
    code = """
    import multiprocessing, stepspan
    def work():
        for run in (study, trial):
            run.log_metrics({"x": 1.0})
    with stepspan.start_run(job_id="study") as study, stepspan.start_run(job_id="trial") as trial:
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join()
    """
    found = python(code, tmp_path)
    assert found.returncode == 0, found.stderr
    statuses = [status_of(session.path) for session in find_sessions(tmp_path / "stepspan-runs")]
    assert statuses == ["completed"] * 4


# one job id


def test_runs_of_one_job_id_and_rank_have_series_of_their_own(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with start(job_id="job") as a, start(job_id="job") as b, start(job_id="job") as c:
            assert [run.identity.instance for run in (a, b, c)] == ["job-0", "job-0-twin1", "job-0-twin2"]
            assert len({run.identity.run_key for run in (a, b, c)}) == 3
        told = [line for line in caplog.messages if "warnings of this run" not in line]
        assert len(told) == 2
        assert all("another open run is rank 0 of job" in line and "give each run a job_id" in line for line in told)
        caplog.clear()


def test_threads_that_start_at_once_do_not_share_a_series(start: Start) -> None:
    ready = threading.Barrier(8, timeout=30)

    def one(_: int) -> Run:
        ready.wait()
        run = start(job_id="job", samplers="none")
        ready.wait()
        return run

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(8)))
    assert len({run.identity.instance for run in found}) == 8
    assert len({run.identity.run_key for run in found}) == 8


AT_ONCE = """
import os, sys, stepspan
from stepspan import config, journal
import stepspan.run, stepspan.identity
ready, go = (int(number) for number in sys.argv[1:])
os.write(ready, b".")
os.read(go, 1)
run = stepspan.start_run(job_id="job", samplers="none", delivery="off")
os.write(ready, b".")
os.read(go, 1)
"""


def test_processes_that_start_at_once_do_not_share_a_series(tmp_path: Path) -> None:
    processes, (ready, tell_ready), (go, tell_go) = 4, os.pipe(), os.pipe()
    env = {name: value for name, value in os.environ.items() if not is_ours(name)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, str(tell_ready), str(go)], cwd=tmp_path, env=env, pass_fds=[tell_ready, go]
        )
        for _ in range(processes)
    ]
    try:
        for _ in range(2):
            for _ in range(processes):
                assert os.read(ready, 1) == b"."
            os.write(tell_go, b"." * processes)
        assert [process.wait(30) for process in started] == [0] * processes
    finally:
        for process in started:
            process.kill()
            process.wait()
        for fd in (ready, tell_ready, go, tell_go):
            os.close(fd)
    assert set(sessions(tmp_path / "stepspan-runs")) == {"0", "0-twin1", "0-twin2", "0-twin3"}


def test_ranks_agree_on_runs_that_their_threads_start_in_any_order(tmp_path: Path) -> None:
    code = textwrap.dedent("""
    import sys, threading, stepspan
    def run(name):
        with stepspan.start_run(name=name) as run:
            run.log_metrics({"x": 1.0})
    for name in sys.argv[1:]:
        thread = threading.Thread(target=run, args=[name])
        thread.start()
        thread.join()
    """)
    env = {name: value for name, value in os.environ.items() if not is_ours(name)}
    variables = {"STEPSPAN_WORLD_SIZE": "2", "STEPSPAN_JOB_ID": "job", "STEPSPAN_SAMPLERS": "none"}
    for rank, order in enumerate(("abca", "cbaa")):
        arguments = [sys.executable, "-c", code, *order]
        subprocess.run(
            arguments, cwd=tmp_path, env={**env, **variables, "STEPSPAN_RANK": str(rank)}, check=True, timeout=60
        )
    keys: dict[int, dict[str, set[str]]] = {0: {}, 1: {}}
    for session in find_sessions(tmp_path / "stepspan-runs"):
        header, begin, *_ = events(session.path)
        keys[header["rank"]].setdefault(begin["name"], set()).add(header["run_key"])
    assert keys[0] == keys[1]
    assert {name: len(found) for name, found in keys[0].items()} == {"a": 2, "b": 1, "c": 1}
    assert len(set.union(*keys[0].values())) == 4


# what the runs of a process share


def test_a_journal_s_settings_serve_several_runs(start: Start, tmp_path: Path) -> None:
    journal = stepspan.JsonlExporter(tmp_path / "journals")
    with start(job_id="a", exporters=[journal]) as a, start(job_id="b", exporters=[journal]) as b:
        for run in (a, b, a):
            run.log_metrics({"x": 1.0})
    assert (len(values(a, "x")), len(values(b, "x"))) == (2, 1)


class Counting(stepspan.MemoryExporter):
    """Says how it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = 0
        self.signal_in_use: set[str] = set()

    def export(self, signal: Any, resource: Any, records: Any) -> Any:
        assert not self.closed
        assert signal not in self.signal_in_use
        self.signal_in_use.add(signal)
        outcome = super().export(signal, resource, records)
        self.signal_in_use.discard(signal)
        return outcome

    def close(self) -> None:
        self.closed += 1


def test_an_exporter_of_several_runs_is_closed_by_the_last(start: Start) -> None:
    exporter = Counting()
    with start(job_id="a", exporters=[exporter]) as a:
        with start(job_id="b", exporters=[exporter]) as b:
            for run in (a, b):
                run.log_metrics({"loss": 1.0})
        assert exporter.closed == 0
        a.log_metrics({"loss": 2.0})
        assert a.flush(30)
        assert exporter.closed == 0
    assert exporter.closed == 1
    points: list[Any] = exporter.records["metrics"]
    kept = [(resource["service.instance.id"], value) for resource, (series, _, value) in points
            if series.name == "training.loss" and value is not None]  # fmt: skip
    assert sorted(kept) == [("a-0", 1.0), ("a-0", 2.0), ("b-0", 1.0)]


def test_recorded_runs_side_by_side() -> None:
    with recorded_run(job_id="a") as a, recorded_run(job_id="b") as b:
        stepspan.current_run().log_metrics({"loss": 1.0})
        a.run.log_metrics({"loss": 2.0})
    assert (a.values("training.loss"), b.values("training.loss")) == ([2.0], [1.0])


def test_log_lines_go_to_the_run_of_their_context(start: Start) -> None:
    from stepspan.integrations.logging import StepspanHandler

    logger = logging.Logger("user")
    logger.addHandler(StepspanHandler())
    with start(job_id="a") as a:
        with start(job_id="b") as b:
            logger.warning("in b")
            in_thread(lambda: logger.warning("in a thread of b"))
        logger.warning("in a")
    assert [event["message"] for event in events(a, "log")] == ["in a"]
    assert [event["message"] for event in events(b, "log")] == ["in b", "in a thread of b"]


@pytest.mark.parametrize("module", ["asyncio", "multiprocessing.process", "multiprocessing.util"])
def test_a_module_that_another_thread_is_importing_stops_no_run(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    with start() as run:
        run.log_metrics({"loss": 1.0})
        monkeypatch.undo()
    assert run.stats()["warnings"] == {}
