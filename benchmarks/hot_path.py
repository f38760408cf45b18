"""What telemetry costs the training thread: stepspan beside the OpenTelemetry SDK, a step span and five metrics.

    python benchmarks/hot_path.py [--quick] [--rounds N]

There are two programs with the SDK: the leanest (one attribute in all), and one whose spans and values have the
attributes that stepspan gives its own. Each contender is a process of its own; they take turns of about a second, so
that none measures while another works.

A turn back to back is blocks of 2,000 steps, timed as a whole: wall time, which contains everything the training thread
waits for, and the CPU time of that thread. A turn's figure is the median of its blocks. A paced turn is 200 steps a
second, each after some milliseconds of real work (numpy: a matrix is multiplied, and 32 MiB are gone through), which is
what a training step does to caches. There a turn's figure is the median of its steps, and beside the training thread's
part stands all the CPU time of the process and its children, but for that work.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
from contenders import JOB_ID, Block, sdk, stepspan_run
from measuring import Receiver, Worker

STEPS = 2000
"""In a block: no more than a BatchSpanProcessor's queue takes, so that it drops none."""
LEANEST, EQUAL = 4.0, 6.5
"""How many times as much CPU time of the training thread the SDK's programs take, as promised: back to back."""
PACED = 1.8
"""How many times as much the leanest takes, paced: ours is at most 0.55 of it."""
PERIOD_S = 1 / 200
MATRIX, STREAM_BYTES = 768, 32 << 20
"""What is multiplied, and gone through, between paced steps: some milliseconds that leave no cache as it was."""

# --- a contender's process


def work(task: dict[str, Any]) -> None:
    theirs = task["contender"] != "stepspan"
    n = steps = task["steps"]
    with sdk(task) if theirs else stepspan_run(task) as (blocks, settle):
        blocks["step"](range(steps))  # warm: caches, branches, connections, a deliverer
        if not task.get("abandon"):
            settle()
        measuring.answer(ready=True)
        for order in measuring.orders():
            turn, block = TURNS[str(order["kind"])], blocks[str(order["block"])]
            between = settle if theirs else lambda: None  # otherwise its queue overflows, and what it drops is cheap
            gc.collect()
            with beside_a_busy_thread() if order.get("busy") else contextlib.nullcontext():
                if order.get("busy"):  # the journal's writer looks once a second whether it is alone
                    n, _ = turn(block, n, steps, 1.2, between)
                n, results = turn(block, n, steps, order["seconds"], between)
            if not task.get("abandon"):
                settle()
            measuring.answer(**results)


Turn = tuple[int, dict[str, float]]
"""The number of the next step, and the results."""


def blocks_of_steps(block: Block, n: int, steps: int, seconds: float, between: Callable[[], object]) -> Turn:
    """Blocks back to back for some seconds: microseconds a step."""
    wall: list[float] = []
    cpu: list[float] = []
    end = time.monotonic() + seconds
    while not wall or time.monotonic() < end:
        cpu_before, before = time.thread_time_ns(), time.perf_counter_ns()
        block(range(n, n + steps))
        wall.append((time.perf_counter_ns() - before) / steps / 1000)
        cpu.append((time.thread_time_ns() - cpu_before) / steps / 1000)
        n += steps
        between()
    return n, {"wall": statistics.median(wall), "mean": statistics.mean(wall), "cpu": statistics.median(cpu)}


def paced_steps(block: Block, n: int, steps: int, seconds: float, between: Callable[[], object]) -> Turn:
    """One step at a time, 200 a second, each after real work: microseconds a step."""
    wall: list[float] = []
    cpu: list[float] = []
    work, worked = other_work(), 0

    def numbers() -> Iterator[int]:
        nonlocal worked
        end = due = time.monotonic()
        while not wall or due < end + seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due + PERIOD_S, time.monotonic())
            before_work = time.thread_time_ns()
            work()
            cpu_before, before = time.thread_time_ns(), time.perf_counter_ns()
            worked += cpu_before - before_work
            yield n + len(wall)
            wall.append((time.perf_counter_ns() - before) / 1000)
            cpu.append((time.thread_time_ns() - cpu_before) / 1000)

    used = cpu_of_all()
    block(numbers())
    between()
    used = cpu_of_all() - used - worked / 1e9
    results = {"wall": statistics.median(wall), "mean": statistics.mean(wall), "cpu": statistics.median(cpu)}
    return n + len(wall), {**results, "all": used / len(wall) * 1e6}


def other_work() -> Callable[[], object]:
    """What a training step does beside telemetry, in one thread."""
    try:
        import numpy as np
    except ImportError:
        print("numpy is missing: a checksum stands for a step's work, and leaves the caches warmer", file=sys.stderr)
        data = bytes(8 << 20)
        return lambda: zlib.crc32(data)
    factors = np.random.default_rng(0).random((2, MATRIX, MATRIX), dtype=np.float32)
    stream = np.ones(STREAM_BYTES // 4, dtype=np.float32)

    def step() -> None:
        np.matmul(factors[0], factors[1])
        np.add(stream, 1.0, out=stream)

    return step


def cpu_of_all() -> float:
    """CPU seconds of this process and its children, those that have ended included."""
    import psutil

    own = os.times()
    used = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


def single_calls(block: Block, n: int, steps: int, seconds: float, between: Callable[[], object]) -> Turn:
    """Call by call: what the slowest ones take."""
    taken: list[int] = []
    clock = time.perf_counter_ns
    end = time.monotonic() + seconds
    while not taken or time.monotonic() < end:
        for _ in range(steps):
            number = (n,)
            before = clock()
            block(number)
            taken.append(clock() - before)
            n += 1
        between()
    taken.sort()
    places = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    return n, {"max": taken[-1] / 1000, **{name: taken[int(len(taken) * q)] / 1000 for name, q in places.items()}}


TURNS: dict[str, Callable[..., Turn]] = {"blocks": blocks_of_steps, "paced": paced_steps, "calls": single_calls}


@contextlib.contextmanager
def beside_a_busy_thread() -> Iterator[None]:
    """Another thread of this process runs Python and gives up the GIL only when it must."""
    stop = False

    def spin() -> None:
        while not stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


# --- the states


class Figures(dict[str, list[dict[str, float]]]):
    """Row -> the results of its turns, a round each."""

    def take(self, name: str, worker: Worker, **order: object) -> None:
        self.setdefault(name, []).append(worker(**order))

    def of(self, name: str, what: str = "wall") -> list[float]:
        return [turn[what] for turn in self[name]]

    def ratios(self, name: str, beside: str, what: str = "cpu") -> list[float]:
        """How many times as much a step of another contender costs, round by round."""
        return [theirs / ours for theirs, ours in zip(self.of(beside, what), self.of(name, what), strict=True)]


def measure(state: str, workers: dict[str, Worker], options: argparse.Namespace, **order: object) -> Figures:
    """Rounds of the step block, and its table."""
    figures = Figures()
    for _ in range(options.rounds):
        for name, worker in workers.items():
            block = name if name == "steps" else "step"
            figures.take(name, worker, block=block, seconds=options.seconds, **{"kind": "blocks", **order})
    report(state, figures)
    return figures


NAMES = {
    "step": "stepspan: `with run.step(n): run.log_metrics(...)`",
    "steps": "stepspan: `for batch in run.steps(...)`",
    "propagating": "stepspan, steps being the SDK's current span as well",
    "disabled": "stepspan, disabled",
    "sdk": "OpenTelemetry SDK: span and five gauges",
    "leanest": "OpenTelemetry SDK: the same with one attribute in all",
}


def report(state: str, figures: Figures) -> None:
    is_paced = "all" in figures["step"][0]
    rows = []
    for name in figures:
        beside = [(other, "cpu") for other in ("leanest", "sdk") if other in figures]
        measured = ["wall", "mean", "cpu"]
        if is_paced:
            measured, beside = ["wall", "cpu", "all"], [("leanest", "cpu"), ("leanest", "all")]
        ratios = [measuring.quartiles(figures.ratios(name, *other))[1] for other in beside]
        is_ours = name not in {"leanest", "sdk"}
        rows.append(
            [NAMES[name], *(measuring.middle(figures.of(name, what), 2) for what in measured)]
            + [f"{ratio:.1f}x" if is_ours else "" for ratio in ratios]
        )
    head = ["a step span and five metrics", "wall µs", "mean wall µs", "CPU µs", "leanest SDK's", "SDK's"]
    if is_paced:
        head = [head[0], "wall µs", "training thread's CPU µs", "all CPU µs", "leanest SDK's", "of all, leanest SDK's"]
    measuring.table(f"**{state}**", head[: len(rows[0])], rows)
    for name, promised in (("leanest", PACED if is_paced else LEANEST), ("sdk", EQUAL)):
        if name in figures and not (is_paced and name == "sdk"):
            print(f"\nratio to {NAMES[name]}: {measuring.verdict(figures.ratios('step', name), promised)}")


def ready(*tasks: dict[str, Any]) -> list[Worker]:
    workers = [Worker(__file__, task) for task in tasks]
    for worker in workers:
        worker.result()
    return workers


def idle(options: argparse.Namespace, place: Path) -> None:
    base = {"steps": options.steps, "directory": str(place / "idle")}
    ours, propagating, disabled, theirs, leanest = ready(
        {**base, "contender": "stepspan"},
        {**base, "contender": "stepspan", "with_sdk": True, "directory": str(place / "idle-propagating")},
        {**base, "contender": "stepspan", "disabled": True},
        {**base, "contender": "sdk"},
        {**base, "contender": "leanest"},
    )
    contenders = {"step": ours, "steps": ours, "leanest": leanest, "sdk": theirs}
    also = {"propagating": propagating, "disabled": disabled}
    measure("idle: a journal and no delivery; the SDK's exporters discard", {**contenders, **also}, options)
    measure("idle, paced: 200 steps a second, each after real work", contenders, options, kind="paced")
    parts(options, ours, theirs)
    measure("beside a busy Python thread (the GIL changes hands every 5 ms)", contenders, options, busy=True)
    calls(options, {"stepspan": ours, "SDK": theirs})
    for worker in (ours, propagating, disabled, theirs, leanest):
        worker.close()


def parts(options: argparse.Namespace, ours: Worker, theirs: Worker) -> None:
    """The halves of a step by themselves."""
    figures = Figures()
    for _ in range(options.rounds):
        for block in ("metrics", "span"):
            figures.take(f"stepspan {block}", ours, kind="blocks", block=block, seconds=options.seconds / 2)
            figures.take(f"sdk {block}", theirs, kind="blocks", block=block, seconds=options.seconds / 2)
    rows = []
    for block, name in (("metrics", "five metrics: `log_metrics`, five `gauge.set`"), ("span", "a span without more")):
        ratios = [a / b for a, b in zip(figures.of(f"sdk {block}"), figures.of(f"stepspan {block}"), strict=True)]
        rows.append(
            [
                name,
                measuring.middle(figures.of(f"stepspan {block}"), 2),
                measuring.middle(figures.of(f"sdk {block}"), 2),
                f"{measuring.quartiles(ratios)[1]:.1f}x",
            ]
        )
    measuring.table("**idle: the parts**", ["wall µs", "stepspan", "SDK", "the SDK's is"], rows)


def calls(options: argparse.Namespace, workers: dict[str, Worker]) -> None:
    """The slowest single calls that log five metrics."""
    figures = Figures()
    for busy in (False, True):
        for _ in range(options.rounds):
            for name, worker in workers.items():
                row = f"{name}{', beside a busy thread' if busy else ''}"
                figures.take(row, worker, kind="calls", block="metrics", busy=busy, seconds=options.seconds / 2)
    places = ("p50", "p99", "p999", "max")
    rows = [[name, *(measuring.middle(figures.of(name, place), 1) for place in places)] for name in figures]
    measuring.table("**one call that logs five metrics**", ["µs", "p50", "p99", "p99.9", "slowest"], rows)


def live(options: argparse.Namespace, place: Path, receiver: Receiver) -> None:
    base = {"steps": options.steps, "endpoint": receiver.endpoint}
    ours, theirs, leanest = ready(
        {**base, "contender": "stepspan", "directory": str(place / "live")},
        {**base, "contender": "sdk"},
        {**base, "contender": "leanest"},
    )
    receiver.counts()
    workers = {"step": ours, "steps": ours, "leanest": leanest, "sdk": theirs}
    measure("live delivery: both send to a receiver, while steps come as fast as they can", workers, options)
    measure("live delivery, paced: 200 steps a second, each after real work", workers, options, kind="paced")
    counts = receiver.counts()
    print(f"\nthe receiver took {counts['requests']:,.0f} requests, {counts['bytes'] / 1e6:,.0f} MB meanwhile")
    for worker in (ours, theirs, leanest):
        worker.close()


def backlog(options: argparse.Namespace, place: Path, receiver: Receiver) -> None:
    """Each turn of ours begins with a fresh copy of the backlog, and ends before all of that is delivered."""
    prepared = place / "hour"
    ranks = options.backlog_ranks + 1  # the others of the contender's job: a run delivers its own job's
    for rank in range(1, ranks):
        measuring.write_journal(prepared, options.backlog_steps, rank=rank, world_size=ranks, job_id=JOB_ID)
    base = {"steps": options.steps, "endpoint": receiver.endpoint}
    (theirs,) = ready({**base, "contender": "sdk"})
    figures, shares = Figures(), []
    for _ in range(options.rounds):
        for name in ("step", "steps"):
            directory = place / "backlog"
            shutil.copytree(prepared, directory)
            receiver.counts()
            (ours,) = ready({**base, "contender": "stepspan", "directory": str(directory), "abandon": True})
            while not receiver.counts().get("requests"):
                time.sleep(0.01)
            figures.take(name, ours, kind="blocks", block=name, seconds=options.seconds)
            shares.append(delivered(directory))
            ours.close()
            shutil.rmtree(directory)
        figures.take("sdk", theirs, kind="blocks", block="step", seconds=options.seconds)
    theirs.close()
    report(
        "catching up: an hour's backlog is being delivered meanwhile; the SDK, which keeps none, sends live",
        figures,
    )
    print(f"\nof the backlog's lines {measuring.middle(shares)}% had been delivered after a turn")


def delivered(directory: Path) -> float:
    """How much of the backlog's metrics is delivered, in percent."""
    from stepspan.deliver.ledgers import session_ledger
    from stepspan.journal.layout import find_sessions

    read = journaled = 0
    for session in find_sessions(directory):
        ledger = session_ledger(session)
        if ledger["status"] == "completed":
            journaled += ledger["journaled"]
            read += sum(
                signals["metrics"]["read"] for signals in ledger["destinations"].values() if "metrics" in signals
            )
    return 100 * read / journaled


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--quick", action="store_true", help="a smoke run: the figures mean nothing")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    options.add_argument("--steps", type=int, default=STEPS, help="of a block")
    options.add_argument("--backlog-ranks", type=int, default=8)
    options.add_argument("--backlog-steps", type=int, default=36_000, help="of a rank: an hour at 10 a second")
    options.add_argument("--directory", help="where the journals go: the disk that is measured")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    given = options.parse_args()
    measuring.clean_environment()
    if given.worker:
        work(json.loads(given.worker))
        return
    if given.quick:
        given.rounds, given.seconds, given.steps, given.backlog_ranks, given.backlog_steps = 1, 0.02, 100, 2, 2000
    print(f"# What telemetry costs the training thread\n\n{measuring.machine()}")
    print(f"{given.rounds} rounds of turns of {given.seconds:g} s, blocks of {given.steps:,} steps; median [quartiles]")
    with tempfile.TemporaryDirectory(dir=given.directory) as place, Receiver() as receiver:
        idle(given, Path(place))
        live(given, Path(place), receiver)
        backlog(given, Path(place), receiver)
    print(f"\n{measuring.machine()}")


if __name__ == "__main__":
    main()
