"""The training that the README's pictures show, and the servers that it is shown in. `make pictures` runs it.

Four ranks train the demo's classifier of digits, data-parallel. What befalls them is arranged, what is measured of it
is not: a first attempt ends when rank 3 raises, a second goes on from the last checkpoint; rank 2's GPU then runs hot,
so that its steps take longer; rank 1 meets one broken image, later a loss that is not a number. After the pictures of
the training the Collector is down for half a minute. GPUs and PyTorch's allocator are scripted; hosts, processes and
times are real.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from harness import grafana
from harness.processes import Ranks, until
from harness.runs import is_ours
from harness.scripted_nvml import GPU, ScriptedNvml
from harness.shown import scripted_torch
from harness.stack import Loki, StackCollector, StackPrometheus
from sklearn.datasets import load_digits

import stepspan
from stepspan.cli.demo_training import BATCH, CLASSES, PIXELS, AllReduce, Model, batches, shared_memory

JOB = "digits-4-ranks"
RANKS = 4
HOT, BROKEN, CRASHES = 2, 1, 3
STEPS_OF_ALL = 1500
CHECKPOINT_EVERY = 70
FIRST = 62.0
"""Seconds after which the first attempt ends."""
GROWS_HOT, IMAGE, NOT_A_NUMBER, SHOWN = 45.0, 25.0, 110.0, 128.0
"""Seconds after which, in the second attempt, things befall it, and it is looked at."""
OUTAGE, AFTER = 35.0, 45.0
"""Seconds for which the Collector is down, and until that is looked at."""
LEARNING_RATE = 0.06
PAUSE = 0.11
GIB = 1 << 30


# ------------------------------------------------------------------------------------------------------- a rank


@dataclass
class Hardware:
    """A rank's GPU and allocator: scripted, but they follow what the rank does."""

    rank: int
    gpus: list[GPU] = field(
        default_factory=lambda: [
            GPU(uuid=f"GPU-{rank}", temperature=58 + rank, ecc={0: 0, 1: 0}) for rank in range(RANKS)
        ]
    )
    stats: dict[str, int] = field(default_factory=dict)
    hot: float = 0.0
    """0: cool, 1: throttled."""

    def install(self) -> None:
        module = scripted_torch()
        self.stats = module.cuda.memory_stats(0)
        sys.modules |= {"pynvml": cast("ModuleType", ScriptedNvml(*self.gpus)), "torch": module}

    def follow(self, step: int, busy: float, lasted: float) -> None:
        """After a step that was busy for a share of its time."""
        gpu, noise = self.gpus[self.rank], np.random.default_rng([self.rank, step]).normal()
        goal = 61 + 2 * self.rank + 28 * self.hot
        gpu.temperature = round(gpu.temperature + 0.12 * (goal - gpu.temperature) + 0.6 * noise)
        gpu.utilization = round(min(99, max(0, 100 * busy + 3 * noise)))
        gpu.power = round(1000 * (140 + 430 * busy * (1 - 0.35 * self.hot) + 9 * noise))
        gpu.energy += round(gpu.power * lasted)
        gpu.used = round((92 + 0.7 * noise + 3 * self.rank) * GIB)
        gpu.reasons = 0x40 if self.hot else 0
        gpu.clocks = dict(zip(gpu.clocks, (round(1980 - 720 * self.hot + 6 * noise), 3201), strict=True))
        if self.hot and step % 50 == 0:
            gpu.ecc[0] += 1
        for number in gpu.fields:
            gpu.fields[number] += 900_000 + 200_000 * (number % 3)
        held = {"allocated_bytes": 61 + (step % 7) / 3, "active_bytes": 63, "reserved_bytes": 78 + step / 400}
        for name, gib in held.items():
            self.stats[f"{name}.all.current"] = round(gib * GIB)
            self.stats[f"{name}.all.peak"] = round((gib + 2) * GIB)


def rank_of(rank: int, attempt: int, directory: Path, endpoint: str, memory: Any, barrier: Any, enough: Any) -> None:
    """One rank's process."""
    for name in filter(is_ours, list(os.environ)):
        del os.environ[name]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), OMP_NUM_THREADS="1")
    os.environ.update(STEPSPAN_SAMPLERS="host,process,gpu,torch", STEPSPAN_SAMPLE_INTERVAL="1")
    hardware = Hardware(rank)
    hardware.install()
    (directory / f"{attempt}-{rank}.at-work").touch()  # until then the parent keeps the barrier
    training = Training(rank, attempt, directory, AllReduce(RANKS, rank, memory, barrier), enough, hardware)
    try:
        with stepspan.start_run(
            directory=directory, endpoint=endpoint, job_id=JOB, name="digits", group="classifier", attempt=attempt
        ) as run:
            training(run)
    except RuntimeError:  # the crash, and the collective that it breaks for the others
        sys.exit(1)


@dataclass
class Training:
    """The demo's training, made slow enough to be looked at."""

    rank: int
    attempt: int
    directory: Path
    all_reduce: AllReduce
    enough: Any
    hardware: Hardware

    def __call__(self, run: Any) -> None:
        digits = load_digits()
        pixels, labels = digits.data / 16.0, digits.target
        held_out = len(labels) // 5
        self.model, self.noise = Model(), np.random.default_rng([self.rank, self.attempt])
        a_epoch = (len(labels) - held_out) // BATCH
        first = self.restore() if self.attempt else 0
        run.log_hyperparams({"lr": LEARNING_RATE, "batch_size": BATCH, "model": "softmax", "seed": 7})
        run.set_total_steps(STEPS_OF_ALL)
        self.all_reduce(np.zeros((PIXELS, CLASSES)))  # all are there
        self.begun, told = time.monotonic(), False
        for epoch in range(first // a_epoch, STEPS_OF_ALL // a_epoch):
            with run.epoch(epoch):
                shares = list(batches(pixels[held_out:], labels[held_out:], epoch, self.rank, RANKS))
                start = max(first, epoch * a_epoch)
                loader = self.loaded(shares[start - epoch * a_epoch :])
                for step, (x, y) in enumerate(run.steps(loader, start=start, samples=BATCH // RANKS), start):
                    if self.learn(run, step, x, y):
                        return
                    if self.rank == BROKEN and self.attempt and not told and self.age > IMAGE:
                        told = True
                        run.log_error(ValueError("cannot identify image file 'shard-017/004211.png'"))
                    if self.rank == 0 and step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
                        path = self.save(step)
                        run.log_artifact(f"step-{step}", path, kind="checkpoint")
                for _ in run.steps([0], split="val"):
                    loss, accuracy = self.model.evaluate(pixels[:held_out], labels[:held_out])
                    time.sleep(0.05)
                    run.log_metrics({"loss": loss, "accuracy": accuracy})
                if self.rank == 0 and epoch % 10 == 9:
                    run.log_event("milestone", message=f"epoch {epoch + 1} done", status="reached")

    @property
    def age(self) -> float:
        return time.monotonic() - self.begun

    def loaded(self, shares: list[Any]) -> Iterator[Any]:
        """As a loader that has to wait for its store."""
        for share in shares:
            time.sleep(0.008 + 0.01 * self.noise.random())
            yield share

    def learn(self, run: Any, step: int, x: Any, y: Any) -> bool:
        """One step. Whether it was the last."""
        begun = time.monotonic()
        rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS_OF_ALL))
        hot = self.attempt and self.rank == HOT and self.age > GROWS_HOT
        self.hardware.hot = min(1.0, self.hardware.hot + 0.02) if hot else 0.0
        with run.span("forward_backward"):
            loss, gradient = self.model.gradients(x, y)
            time.sleep(PAUSE * (1 + 0.12 * self.noise.random() + 0.75 * self.hardware.hot))
        busy = time.monotonic() - begun
        if not self.attempt and self.rank == CRASHES and self.age > FIRST:
            self.all_reduce.barrier.abort()  # as NCCL's watchdog does for a rank that is gone
            raise RuntimeError("a loader's worker died (arranged for this picture)")
        with run.span("all_reduce", collective=True):
            gradient = self.all_reduce(gradient)
        with run.span("optimizer"):
            self.model.weights -= rate * gradient
            time.sleep(0.012)
        broken = self.attempt and self.rank == BROKEN and self.age > NOT_A_NUMBER
        norm = float(np.linalg.norm(gradient))
        seen = {"loss": math.nan if broken else loss, "lr": rate, "grad_norm": norm}
        seen["accuracy"] = float((self.model.forward(x).argmax(axis=1) == y).mean())
        run.log_metrics(seen)
        lasted = time.monotonic() - begun
        self.hardware.follow(step, busy / lasted, lasted)
        last = np.full((PIXELS, CLASSES), float(self.enough.is_set()))
        return bool(self.all_reduce(last)[0, 0])

    def save(self, step: int) -> Path:
        path = self.directory / f"step-{step}.npz"
        np.savez(path, weights=self.model.weights)
        time.sleep(0.15)
        return path

    def restore(self) -> int:
        """The step to go on with."""
        newest = max(self.directory.glob("step-*.npz"), key=lambda path: path.stat().st_mtime)
        self.model.weights = np.load(newest)["weights"]
        return int(newest.stem.removeprefix("step-")) + 1


# -------------------------------------------------------------------------------------------------- all of them


@dataclass
class Servers:
    """What of the stack can be had here."""

    prometheus: StackPrometheus
    loki: Loki
    collector: StackCollector


@contextmanager
def servers(place: Path) -> Iterator[Servers]:
    """Prometheus with the committed rules, Loki, and the Collector in front of them."""
    rules = [place / name for name in ("recording.yml", "alerts.yml")]
    for file in rules:  # every second: ten seconds are long in four minutes
        file.write_text((grafana.PROMETHEUS_STACK / file.name).read_text().replace("interval: 10s", "interval: 1s"))
    prometheus, loki = StackPrometheus(place / "prometheus", rule_files=rules), Loki(place / "loki")
    stores: dict[str, Any] = {"PROMETHEUS_OTLP": prometheus.otlp_endpoint, "LOKI_OTLP": loki.otlp_endpoint}
    collector = StackCollector(place / "collector", "single.yaml", **stores)
    prometheus.scrapes.append(collector.metrics_address)
    with prometheus, loki, collector:
        yield Servers(prometheus, loki, collector)


def attempt(number: int, directory: Path, endpoint: str, enough: Any) -> list[Any]:
    """The ranks of an attempt, at work."""
    context = multiprocessing.get_context("spawn")
    memory, barrier = shared_memory(RANKS), context.Barrier(RANKS)
    given = (number, directory, endpoint, memory, barrier, enough)
    ranks = [context.Process(target=rank_of, args=(rank, *given)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    until(lambda: all((directory / f"{number}-{rank}.at-work").exists() for rank in range(RANKS)), 60.0)
    return ranks


@contextmanager
def trained(directory: Path, endpoint: str) -> Iterator[None]:
    """The first attempt is over; the second goes on."""
    directory.mkdir()
    enough = multiprocessing.get_context("spawn").Event()
    for rank in attempt(0, directory, endpoint, enough):
        rank.join(FIRST + 60)
    ranks = attempt(1, directory, endpoint, enough)
    try:
        yield
        enough.set()
        for rank in ranks:
            rank.join(30)
    finally:
        for rank in ranks:
            rank.kill()
        until(lambda: not Ranks(directory).deliverers(), 60.0)
