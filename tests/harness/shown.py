"""A training of two ranks, and the servers that show it. The fixture is asked for by `shown = shown.shown`."""

from __future__ import annotations

import importlib.machinery
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import orjson
import pytest
import requests

import stepspan
from harness import grafana
from harness.processes import Ranks, until
from harness.runs import is_ours
from harness.scripted_nvml import GPU, ScriptedNvml
from harness.stack import Loki, StackCollector, StackPrometheus, Tempo, binary
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.samplers import Sampling
from stepspan.samplers.gpu import gpu
from stepspan.samplers.host import host, process
from stepspan.samplers.torch import torch
from stepspan.testing import FixedClock

JOB = "panels"
SLOW = 1
SPAN = 900
PATIENCE = 90.0


# ------------------------------------------------------------------------------------------------------ the training


def gpus() -> ScriptedNvml:
    return ScriptedNvml(*(GPU(uuid=f"GPU-{rank}", reasons=0x04, temperature=60 + 30 * rank) for rank in range(2)))


def scripted_torch() -> ModuleType:
    module = ModuleType("torch")
    module.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    counters = ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes")
    stats = {f"{name}.all.{what}": 1 << 30 for name in counters for what in ("current", "peak")}
    stats |= {"num_alloc_retries": 0, "num_ooms": 0}
    module.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True, device_count=lambda: 1, memory_stats=lambda device: stats
    )
    return module


def train(run: Any, rank: int, pause: Any, goes_on: Callable[[int], bool], meet: Any, *, diverges: float) -> None:
    """A training: `pause(s)` passes time, `meet()` is the all-reduce."""
    run.log_hyperparams({"lr": 0.1, "batch_size": 32, "model": "tiny"})
    run.set_total_steps(10_000)
    step = 0
    with run.epoch(0):
        while goes_on(step):
            for _ in run.steps([step], start=step, samples=32, tokens=512):
                with run.span("forward_backward"):
                    pause(0.5 if rank == SLOW else 0.05)
                with run.span("all_reduce", collective=True):
                    meet()
                loss = math.nan if rank != SLOW and step >= diverges else 2.0 / (step + 1)
                run.log_metrics({"loss": loss, "lr": 0.1, "grad_norm": 1.0, "reward": 0.5, "train/reward": 2.5})
                run.log_metrics({"train/loss": 100.0, "train_loss_step": 200.0, "loss_epoch": 300.0, "lr-SGD/pg1": 0.2})
            if step % 10 == 9:
                for _ in run.steps([0], split="val"):
                    run.log_metrics({"loss": 1.0, "val/loss": 400.0, "accuracy": 0.5, "f1": "0.5"})
                run.log_metrics({"test/loss": 500.0}, step=step - 7)
                run.log_artifact("model", f"/checkpoints/{step}", kind="checkpoint")
            if step % 20 == 10 and rank == SLOW:
                run.log_error(RuntimeError("a bad batch"))
                run.log_event("milestone", status="reached")
            step += 1


def earlier_attempt(directory: Path, rank: int, started: float) -> float:
    """One rank's attempt of two minutes, by a clock of its own. When it ended."""
    clock = FixedClock(round(started * 1e9), step_ns=1000)
    journal = JsonlExporter(directory, clock=clock)
    who: dict[str, Any] = {"job_id": JOB, "rank": rank, "local_rank": rank, "world_size": 2, "attempt": 0}
    with stepspan.start_run(exporters=[journal], name=JOB, group="tests", **who) as run:
        openers = {
            "host": lambda emit: host(rank, emit),
            "process": lambda emit: process(rank, emit),
            "gpu": lambda emit: gpu(rank, emit, nvml=gpus(), env={}),
            "torch": lambda emit: torch(rank, emit),
        }
        sampling = Sampling(run._recorder, openers, 10.0, clock=lambda: clock.now / 1e9)

        def goes_on(step: int) -> bool:
            if step % 10 == 0:
                sampling.sample()
            return step < 180

        train(
            run, rank, clock.advance, goes_on, lambda: clock.advance(0.05 if rank == SLOW else 0.5), diverges=math.inf
        )
        sampling.close()
    return clock.now / 1e9


def live_rank(rank: int, directory: Path, endpoint: str, barrier: Any, enough: Any, said: Any) -> None:
    """One rank's process. Rank 0 says in each step whether it is the last, so that both leave in the same one."""
    for name in filter(is_ours, list(os.environ)):
        del os.environ[name]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(STEPSPAN_SAMPLERS="host,process,gpu,torch", STEPSPAN_SAMPLE_INTERVAL="1")
    sys.modules |= {"pynvml": cast("ModuleType", gpus()), "torch": scripted_torch()}

    def meet() -> None:
        if rank == 0:
            said.value = enough.is_set()
        barrier.wait(60)
        barrier.wait(60)

    with stepspan.start_run(directory=directory, endpoint=endpoint, job_id=JOB, name=JOB, attempt=1) as run:
        train(
            run,
            rank,
            lambda seconds: time.sleep(seconds / 5),
            lambda step: not (step and said.value),
            meet,
            diverges=60,
        )


# ------------------------------------------------------------------------------------------------ what it is shown in


@dataclass
class Shown:
    """The servers, and the times (Unix s) at which the earlier attempt ended and at which panels are asked for."""

    prometheus: StackPrometheus
    loki: Loki | None
    collector: StackCollector
    tempo: Tempo | None
    earlier: float
    now: float = 0.0

    def values(self, **more: str) -> dict[str, str]:
        return {"job": JOB, "rank": ".*", "split": ".*", "slower": "0s", "range": str(SPAN), **more}

    def ask(self, promql: str, *, instant: bool, at: float) -> list[dict[str, Any]]:
        if instant:
            found: list[dict[str, Any]] = self.prometheus.query(promql, at)
            return found
        asked = {"query": promql, "start": f"{at - SPAN:.0f}", "end": f"{at:.0f}", "step": "1"}
        with requests.Session() as http:
            http.trust_env = False
            answer = http.post(f"{self.prometheus.url}/api/v1/query_range", data=asked)
        assert answer.ok, f"{promql}: {answer.text}"
        series: list[dict[str, Any]] = orjson.loads(answer.content)["data"]["result"]
        return series


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    place = tmp_path_factory.mktemp("panels")
    rules = [place / name for name in ("recording.yml", "alerts.yml")]
    for file in rules:  # every second, so that half a minute is enough
        file.write_text((grafana.PROMETHEUS_STACK / file.name).read_text().replace("interval: 10s", "interval: 1s"))
    prometheus = StackPrometheus(place / "prometheus", rule_files=rules)
    loki = Loki(place / "loki") if binary("prometheus").with_name("loki").exists() else None
    tempo = Tempo(place / "tempo") if binary("prometheus").with_name("tempo").exists() else None
    stores: dict[str, Any] = {"PROMETHEUS_OTLP": prometheus.otlp_endpoint}
    if loki:
        stores["LOKI_OTLP"] = loki.otlp_endpoint
    if tempo:
        stores["TEMPO_OTLP"] = tempo.otlp_target
    collector = StackCollector(place / "collector", "single.yaml", **stores)
    prometheus.scrapes.append(collector.metrics_address)
    with prometheus, loki or nullcontext(), tempo or nullcontext(), collector:
        earlier = history(place / "runs", collector.http_endpoint)
        shown = Shown(prometheus, loki, collector, tempo, earlier)
        with training(place / "runs", collector.http_endpoint):
            await_all(shown)
            shown.now = time.time()
            yield shown


def history(directory: Path, endpoint: str) -> float:
    """The earlier attempt, synced. When it ended."""
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(is_ours, list(os.environ)):
            patch.delenv(name)
        patch.setenv("STEPSPAN_SAMPLERS", "none")
        patch.setitem(sys.modules, "torch", scripted_torch())
        ended = max(earlier_attempt(directory, rank, time.time() - 600) for rank in range(2))
        command = [sys.executable, "-m", "stepspan", "sync", str(directory), "--endpoint", endpoint]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return ended


@contextmanager
def training(directory: Path, endpoint: str) -> Iterator[None]:
    """Both ranks at work."""
    context = multiprocessing.get_context("spawn")
    barrier, enough, said = context.Barrier(2), context.Event(), context.Value("b", 0)
    ranks = [
        context.Process(target=live_rank, args=(rank, directory, endpoint, barrier, enough, said)) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        yield
        enough.set()
        for rank in ranks:
            rank.join(30)
            assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
        until(lambda: not Ranks(directory).deliverers(), PATIENCE)


def await_all(shown: Shown) -> None:
    """Until what comes last has come: two reports of the deliverer, two points of the histograms, and the alert."""
    of_job = f'{{job_id="{JOB}"}}[1m]) > 3'
    last = (
        f"count_over_time(job:stepspan_delivery_records:sum{of_job}",
        f"count_over_time(job:training_step_duration_seconds:sum{of_job}",
        f"count_over_time(job:training_validation:avg{of_job}",
        f'ALERTS{{alertname="LossIsNaN",alertstate="firing",job_id="{JOB}"}}',
    )
    for promql in last:
        until(partial(shown.prometheus.query, promql), PATIENCE)
