"""The ranks that `scale.py` measures with, all in one process: a `Run` and a journal of its own for each of them."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

JOB = "scale"
DESTINATION = "agent"
"""The name by which deliverers find what is theirs."""
PERIOD = 10  # seconds between samples, as the samplers have it
LOCAL = 8  # ranks a node: one of them samples the host
METRICS = ("loss", "lr", "grad_norm", "accuracy", "tokens_seen", "aux_loss", "z_loss", "weight_norm", "mfu", "beta")


class Clock:
    """Event time: moved by hand while history is written, this machine's afterwards."""

    def __init__(self) -> None:
        self.by_hand: int | None = None

    def __call__(self) -> int:
        if self.by_hand is None:
            return time.time_ns()
        self.by_hand += 1000
        return self.by_hand


class Rank:
    """One rank: a `Run` of its own, and what it logs in a step."""

    def __init__(self, number: int, directory: Path, clock: Clock, options: SimpleNamespace, attempt: int) -> None:
        from stepspan import identity
        from stepspan.exporters.jsonl import JsonlExporter
        from stepspan.pipeline import Pipeline
        from stepspan.recording.recorder import JournalRecorder
        from stepspan.recording.warnings import WarningSink
        from stepspan.run import Run

        local, host = number % LOCAL, f"host-{number * options.hosts // options.ranks}"
        who = {"job_id": JOB, "rank": number, "local_rank": local, "world_size": options.ranks, "attempt": attempt}
        who["group"] = None
        facts = options.facts._replace(host=host)
        me = identity.resolve(who, {}, facts, earlier_sessions=lambda *_: 0)
        resource_of, _ = identity.resource_attributes(me, {})
        exporter, warnings = JsonlExporter(directory, clock=clock), WarningSink(audible=False)
        pipeline = Pipeline([], [exporter])
        recorder = JournalRecorder(
            me,
            resource_of,
            exporter.journal,
            pipeline.emitters,
            pipeline.process,
            warnings=warnings,
            boot_id=facts.boot_id,
            destinations=[DESTINATION],
        )
        recorder.open()
        self.run = Run(recorder, pipeline, name=JOB)
        self.run.log_hyperparams({"lr": 3e-4, "batch_size": 32, "model": "none"})
        self.run.set_total_steps(1_000_000)
        self._clock, self._samples, self._local = clock, options.samples, local
        self._values = {key: random.random() for key in METRICS}
        self._next_sample = 0

    def step(self, number: int) -> None:
        """A step of ten metrics, with a wait for data and one for the other ranks."""
        for key in self._values:
            self._values[key] *= random.uniform(0.98, 1.02)
        for _ in self.run.steps([number], start=number, samples=32):
            with self.run.span("all_reduce", collective=True):
                pass
            self.run.log_metrics(self._values)
        now = self._clock()
        if now >= self._next_sample:
            self._next_sample = now + PERIOD * 1_000_000_000
            for event in self._samples:
                if event["source"] != "host" or self._local == 0:
                    self.run._recorder.emit_background({**event})


def samples() -> list[dict[str, Any]]:
    """What the real samplers write for this host, this process and a scripted GPU."""
    from harness.scripted_nvml import GPU, ScriptedNvml

    from stepspan.samplers import Sampling
    from stepspan.samplers.gpu import gpu
    from stepspan.samplers.host import host, process

    events: list[dict[str, Any]] = []
    recorder: Any = SimpleNamespace(emit_background=events.append, warn_once=lambda *_: None)
    openers = {
        "host": lambda emit: host(0, emit),
        "process": lambda emit: process(0, emit),
        "gpu": lambda emit: gpu(0, emit, nvml=ScriptedNvml(GPU()), env={}),
    }
    sampling = Sampling(recorder, openers, float(PERIOD))
    for _ in range(3):
        sampling.sample()
        time.sleep(0.2)
    sampling.close()
    return events[-len(openers) :]


def generate(task: dict[str, Any]) -> None:
    """Be the generator: `history` (seconds) once, then `live` (steps a second a rank, seconds) as often as told."""
    from stepspan.identity import host_facts

    raise_limit()
    options = SimpleNamespace(**task, facts=host_facts(), samples=samples())
    clock, place = Clock(), Path(task["place"])
    ranks: list[Rank] = []
    steps = 0

    def begin(directory: Path, attempt: int) -> None:
        ranks[:] = [Rank(number, directory, clock, options, attempt) for number in range(options.ranks)]

    measuring.answer(ready=True)
    for order in measuring.orders():
        if "history" in order:
            past = int(str(order["history"]))
            now = time.time_ns()
            clock.by_hand = now - past * 1_000_000_000
            begin(place / "history", 0)
            for _ in range(past):
                second = clock.by_hand
                for rank in ranks:
                    rank.step(steps)
                clock.by_hand = max(clock.by_hand, second + 1_000_000_000)
                steps += 1
            for rank in ranks:
                rank.run.close()
            clock.by_hand = None
            measuring.answer(steps=steps * len(ranks))
        elif "live" in order:
            rate, seconds = float(str(order["live"])), float(str(order["seconds"]))
            if ranks[0].run.closed:
                begin(place / "live", 1)
            done, began = 0, time.perf_counter()
            while done < int(rate * seconds) * len(ranks):  # evenly spread: each rank has its own moment in a step
                due = min((time.perf_counter() - began) * rate, int(rate * seconds)) * len(ranks)
                while done < due:
                    ranks[done % len(ranks)].step(steps + done // len(ranks))
                    done += 1
                time.sleep(0.01)
            steps += done // len(ranks)
            measuring.answer(steps=done, late=time.perf_counter() - began - seconds)
        else:
            for rank in ranks:
                rank.run.close()
            measuring.answer(closed=True)


def raise_limit() -> None:
    """As many open files as we may have: a writer holds three, a deliverer three for each session and signal."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    measuring.clean_environment()
    generate(json.loads(sys.argv[2]))
