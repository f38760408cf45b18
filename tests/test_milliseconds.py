"""What a real Prometheus, which keeps milliseconds, holds of values that were logged less than a millisecond apart.

Any schedule of calls: for each call one value per series at one common millisecond, in order, with that value's step.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import runs
from harness.delivery import assert_true, sync
from harness.processes import under_load
from harness.stack import Prometheus

import stepspan
from stepspan.deliver.ledgers import cursors
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.journal.cursor import CursorState
from stepspan.journal.layout import find_sessions
from stepspan.run import Run
from stepspan.testing import FixedClock

pytestmark = pytest.mark.stack
start = runs.start
Start = Callable[..., Run]
S = 1_000_000_000
ONLY_METRICS = {"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
SERIES = {
    "loss": ("training_loss", None, None),
    "train/loss": ("training_loss", "train", "train/loss"),
    "val/loss": ("training_loss", "val", "val/loss"),
    "val_loss": ("training_loss", "val", "val_loss"),
    "test.f1": ("training_f1", "test", "test.f1"),
    "grad.norm": ("training_grad_norm", None, "grad.norm"),
    "lr": ("training_lr", None, None),
}
"""A key -> the metric, the split that the key names, and its attribute `key`."""


class Call(NamedTuple):
    values: dict[str, float]
    split: str
    step: int | None


class Clock:
    """Goes on by some nanoseconds with each look, and by hand."""

    def __init__(self, chance: random.Random) -> None:
        self.now = time.time_ns() - 300 * S
        self._chance = chance

    def __call__(self) -> int:
        self.now += self._chance.choice((1, 50, 20_000, 400_000))
        return self.now


class OnDevice:
    """A value that a device computes when a test says so: what stepspan takes for a JAX array."""

    __module__ = "jax"
    shape = ()

    def __init__(self, value: float, done: threading.Event) -> None:
        self.value, self.done = value, done

    def is_ready(self) -> bool:
        return self.done.is_set()

    def addressable_data(self, _: int = 0) -> OnDevice:
        return self

    copy = addressable_data

    def copy_to_host_async(self) -> None:
        pass

    def item(self) -> float:
        return self.value


class Schedule:
    """What programs do with runs of one job, one after the other, at random; and the calls, in order."""

    def __init__(self, directory: Path, job: str, seed: int) -> None:
        self.job, self.directory = job, directory
        self.calls: list[Call] = []
        self._chance = random.Random(seed)
        self._clock = Clock(self._chance)
        self._value = 0
        self._steps = 0
        self._current: int | None = None
        self._devices: list[threading.Event] = []

    def run(self) -> None:
        moves = (self.step, self.step, self.log, self.burst, self.threads, self.arrive, self.wait)
        for _ in range(self._chance.choice((1, 1, 2, 4))):
            keeper = JsonlExporter(self.directory, clock=self._clock)
            self._current = None
            with stepspan.start_run(job_id=self.job, exporters=[keeper]) as run:
                for do in self._chance.choices(moves, k=self._chance.randint(0, 25)):
                    do(run)
                self.arrive(run)

    def log(self, run: Run, *keys: str) -> None:
        """One call, of some keys, maybe with a step and a split of its own, maybe of values on a device."""
        chance = self._chance
        keys = keys or tuple(chance.sample(sorted(SERIES), chance.randint(1, 4)))
        self._value += len(keys)
        values = {key: float(self._value - index) for index, key in enumerate(keys)}
        step = chance.choice((None, None, 3, self._value))
        split = chance.choice((None, None, "val", "labeled"))
        self.calls.append(Call(values, split or "train", self._current if step is None else step))
        done = threading.Event()
        self._devices.append(done)
        on_device = chance.random() < 0.2
        given: Any = {key: OnDevice(v, done) if on_device and chance.random() < 0.5 else v for key, v in values.items()}
        run.log_metrics(given, step, split=split)

    def step(self, run: Run) -> None:
        number = self._steps = self._steps + 1
        with run.step(number):
            self._current = number
            for _ in range(self._chance.randint(0, 3)):
                self.log(run)

    def burst(self, run: Run) -> None:
        for _ in range(self._chance.choice((5, 60))):
            self.log(run, "loss", "val_loss")

    def threads(self, run: Run) -> None:
        """Two threads with a series each."""

        def work(key: str) -> None:
            for _ in range(5):
                self.log(run, key)

        pair = [threading.Thread(target=work, args=[key]) for key in ("lr", "test.f1")]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join()

    def arrive(self, run: Run) -> None:
        """What was on a device is there."""
        while self._devices:
            self._devices.pop().set()

    def wait(self, run: Run) -> None:
        self._clock.now += self._chance.choice((10**6, 10**8, 11 * S))


def missing(prometheus: Prometheus, job: str, calls: list[Call]) -> list[Call]:
    """The calls that a server does not hold; fails where it holds one in another way than it was made."""
    held = prometheus.series(f'{{job_id="{job}",__name__=~"training_.*"}}[1h]', at=time.time() + 60)
    names = [(labels["__name__"], labels.get("split"), labels.get("key")) for labels, _ in held]
    at = {name: dict(samples) for name, (_, samples) in zip(names, held, strict=True)}
    time_of = {name: {value: ms for ms, value in samples} for name, (_, samples) in zip(names, held, strict=True)}
    last: Counter[Any] = Counter()
    absent = []
    for call in calls:
        of_call = {key: (name, split or call.split, k) for key in call.values for name, split, k in [SERIES[key]]}
        times = {time_of.get(series, {}).get(call.values[key]) for key, series in of_call.items()}
        assert len(times) == 1, call
        if (ms := times.pop()) is None:
            absent.append(call)
            continue
        for key, (name, split, k) in of_call.items():
            assert ms > last[name, split, k], call
            last[name, split, k] = ms
            steps = at.get(("training_step_logged", split, key), {}), at.get(("training_step_number", split, None), {})
            assert call.step in {None, steps[0].get(ms, steps[1].get(ms))}, call
    return absent


@pytest.fixture(params=["48h", "0s"], ids=["out-of-order window", "no window"])
def either(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Prometheus]:
    """A Prometheus with an out-of-order window, and one as it comes."""
    with Prometheus(tmp_path / "prometheus", request.param) as server:
        yield server


def test_each_call_of_any_schedule_arrives_at_one_millisecond_in_order_with_its_step(
    start: Start, tmp_path: Path, either: Prometheus
) -> None:
    schedules = [Schedule(tmp_path / "runs", f"job-{seed}", seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as pool:  # so many runs are open side by side
        list(pool.map(Schedule.run, schedules))
    sync(tmp_path / "runs", either.otlp_endpoint)
    assert sum(len(schedule.calls) for schedule in schedules) > 1000
    for schedule in schedules:
        assert missing(either, schedule.job, schedule.calls) == []


def test_what_exceeds_ten_seconds_of_a_burst_is_missing_and_counted(
    start: Start, tmp_path: Path, prometheus: Prometheus
) -> None:
    keys, calls = ("loss", "val_loss"), []
    keeper = JsonlExporter(tmp_path / "runs", clock=FixedClock((time.time_ns() // S - 60) * S, step_ns=10))
    with start(job_id="job", exporters=[keeper]) as run:
        for step in range(10_500):
            for sign, key in zip((1, -1), keys, strict=True):
                calls.append(Call({key: sign * (step + 1.0)}, "train", step))
                run.log_metrics(calls[-1].values, step)
    (state,) = sync(tmp_path / "runs", prometheus.otlp_endpoint).values()
    absent = missing(prometheus, "job", calls)
    assert absent == calls[2 * 10_001 : -2]
    assert state.ledger.thinned == 2 * len(absent)
    assert_true(state.ledger, run.stats()["journaled"])


# ------------------------------------------------------------------------------------------------- live


@pytest.fixture
def live(start: Start, tmp_path: Path, either: Prometheus, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Run]:
    """`start_run` of one instance, whose metrics go to Prometheus."""
    for name, value in ONLY_METRICS.items():
        monkeypatch.setenv(name, value)
    return lambda: start(job_id="job", directory=tmp_path / "runs", endpoint=either.otlp_endpoint)


def delivered(directory: Path, prometheus: Prometheus) -> list[CursorState]:
    """The cursors of sessions that have ended, once what a deliverer left to others is delivered; fails on a hold."""
    done = runs.command("sync", directory, "--endpoint", prometheus.otlp_endpoint, **ONLY_METRICS)
    assert done.returncode == 0, done.stdout
    states = [state for s in find_sessions(directory) for of in cursors(s.path).values() for state in of.values()]
    assert all(state.position.finished for state in states), states
    return states


def test_runs_of_one_instance_that_follow_at_once_arrive_whole(
    live: Callable[[], Run], tmp_path: Path, either: Prometheus
) -> None:
    calls = []
    for number in range(3):
        with live() as run:
            for step in range(150):
                calls.append(Call({"loss": 1000.0 * number + step}, "train", step))
                run.log_metrics(calls[-1].values, step)
    assert len(delivered(tmp_path / "runs", either)) == 3
    assert missing(either, "job", calls) == []


def test_a_killed_run_that_is_started_again_at_once_arrives_whole(
    live: Callable[[], Run], tmp_path: Path, either: Prometheus
) -> None:
    code = f"""
        import os, signal, time, stepspan
        run = stepspan.start_run(job_id="job", directory={str(tmp_path / "runs")!r})
        for step in range(40):
            for part in range(30):
                run.log_metrics({{"loss": 30.0 * step + part}}, step=step)
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = runs.python(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=either.otlp_endpoint, **ONLY_METRICS)
    assert done.returncode == -signal.SIGKILL, done.stderr
    calls = [Call({"loss": 30.0 * step + part}, "train", step) for step in range(40) for part in range(30)]
    with live() as run:
        for step in range(40, 80):
            calls.append(Call({"loss": 30.0 * step}, "train", step))
            run.log_metrics(calls[-1].values, step)
    assert len(delivered(tmp_path / "runs", either)) == 2
    assert missing(either, "job", calls) == []


def test_a_burst_is_visible_without_another_line(live: Callable[[], Run], either: Prometheus) -> None:
    with live() as run:
        calls = [Call({"loss": float(step)}, "train", step) for step in range(200)]
        for call in calls:
            run.log_metrics(call.values, call.step)
        assert run.flush(under_load(5.0))
        assert missing(either, "job", calls) == []


def test_values_of_a_device_that_is_some_steps_behind_arrive_live(
    live: Callable[[], Run], tmp_path: Path, either: Prometheus
) -> None:
    calls, devices = [], deque[threading.Event]()
    with live() as run:
        for step in range(60):
            with run.step(step), run.span("forward"):
                devices.append(threading.Event())
                calls.append(Call({"loss": float(step), "lr": step + 0.5}, "train", step))
                run.log_metrics({**calls[-1].values, "loss": OnDevice(float(step), devices[-1])})
                time.sleep(0.02)
            if len(devices) > 3:
                devices.popleft().set()
        for device in devices:
            device.set()
        assert run.flush(under_load(5.0))
        assert missing(either, "job", calls) == []
    assert len(delivered(tmp_path / "runs", either)) == 1


def test_values_of_the_past_arrive_where_they_are_taken_and_hold_nothing_where_they_are_not(
    live: Callable[[], Run], tmp_path: Path, either: Prometheus
) -> None:
    now = time.time_ns() // 10**6 * 10**6
    curve = {now - minutes * 60 * S: float(minutes) for minutes in (600, 300, 10)}
    with live() as run:
        run.log_metrics({"loss": 0.5})
        assert run.flush(under_load(5.0))
        for ns, value in curve.items():
            run.log_metrics({"curve": value}, step=int(value), time=ns)
        run.log_metrics({"loss": 0.25})
        rejected = Path(run.stats()["journal"]) / "rejected.jsonl"
    (state,) = delivered(tmp_path / "runs", either)
    taken = {labels["__name__"]: dict(found) for labels, found in either.series('{split="train"}[1d]')}
    assert list(taken["training_loss"].values()) == [0.5, 0.25]
    if either.window == "0s":
        assert set(taken) == {"training_loss"}
        assert state.ledger.rejected == len(rejected.read_text().splitlines()) == 2 * len(curve)
    else:
        at = {ns // 10**6: value for ns, value in curve.items()}
        assert taken["training_curve"] == taken["training_step_logged"] == at
        assert state.ledger.rejected == 0
