"""What a tensor costs the training thread: `log_metrics({"loss": loss})` of a torch scalar, on the CPU and on a GPU.

    python benchmarks/tensors.py [--rounds N]

Needs torch. On the CPU: a call with a tensor beside a call with a float. On a GPU: steps of matrix products with and
without five logged scalars of the GPU, and with the same five through `.item()`; and a profile of the training thread,
which must show no synchronisation of stepspan's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import stepspan
from stepspan.run import Run

CALLS = 20_000
SIZE, PRODUCTS, STEPS = 4096, 6, 200
KEYS = ("loss", "grad_norm", "accuracy", "entropy", "scale")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls that wait for the GPU."""


def calls(run: Run, value: Any) -> float:
    """Microseconds that a call with one value takes."""
    log = run.log_metrics
    before = time.perf_counter_ns()
    for _ in range(CALLS):
        log({"loss": value})
    return (time.perf_counter_ns() - before) / CALLS / 1000


def on_the_cpu(run: Run, rounds: int) -> None:
    """Turns of each kind of value."""
    values = {
        "float": 0.5,
        "torch, 0-d": torch.tensor(0.5),
        "torch, with a gradient": torch.tensor(0.5).requires_grad_(),
    }
    values["torch, bfloat16"] = torch.tensor(0.5, dtype=torch.bfloat16)
    found: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(rounds):
        for name, value in values.items():
            found[name].append(calls(run, value))
    print(f"\n{'one call of log_metrics, us':32} median  quartiles")
    for name, taken in found.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        print(f"{name:32} {middle:6.2f}  {low:.2f}-{high:.2f}")


class Training:
    """Steps of products on the GPU, which are launched far faster than they are done."""

    def __init__(self) -> None:
        self.left = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
        self.right = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) / SIZE**0.5

    def step(self) -> Any:
        """A scalar on the GPU."""
        product = self.left
        for _ in range(PRODUCTS):
            product = product @ self.right
        return product.float().mean()

    def steps(self, log: Callable[[Any], None]) -> float:
        """Milliseconds a step, all of it done."""
        torch.cuda.synchronize()
        before = time.perf_counter()
        for _ in range(STEPS):
            log(self.step())
        torch.cuda.synchronize()
        return (time.perf_counter() - before) / STEPS * 1000


def on_a_gpu(run: Run, rounds: int) -> None:
    """Turns of each way to log, and who waits."""
    training = Training()
    ways: dict[str, Callable[[Any], None]] = {
        "nothing logged": lambda scalar: None,
        "five scalars of the GPU": lambda scalar: run.log_metrics(dict.fromkeys(KEYS, scalar)),
        "five scalars through .item()": lambda scalar: run.log_metrics({key: scalar.item() for key in KEYS}),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, log in ways.items():
            lasted = training.steps(log)
            if number:  # the first one warms up
                found[name].append(lasted)
    print(
        f"\n{torch.cuda.get_device_name()}: a step, ms (median of {rounds} rounds of {STEPS} steps), to nothing logged"
    )
    for name, taken in found.items():
        ratios = [one / other for one, other in zip(taken, found["nothing logged"], strict=True)]
        print(f"{name:32} {statistics.median(taken):8.4f}  {statistics.median(ratios) - 1:+.2%}")
    run.flush()
    for name in ("five scalars of the GPU", "five scalars through .item()"):
        print(f"{name}: calls of the training thread that wait: {dict(waits(training, ways[name])) or 'none'}")
    print("lost:", {kind: count for kind, count in run.stats()["warnings"].items() if kind in {"late", "value"}} or 0)


def waits(training: Training, log: Callable[[Any], None]) -> Counter[str]:
    """Calls by the training thread that wait for the GPU, from a profile of ten steps."""
    kinds = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        for _ in range(10):
            log(training.step())
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "profile.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    thread = threading.get_native_id()
    names = [event["name"] for event in events if event.get("tid") == thread and event.get("name") in WAITS]
    return Counter(names) - Counter({"cudaDeviceSynchronize": 1})  # the benchmark's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    os.environ["STEPSPAN_SAMPLERS"] = "none"
    print(f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as directory, stepspan.start_run(directory=directory) as run:
        on_the_cpu(run, rounds)
        if torch.cuda.is_available():
            on_a_gpu(run, rounds)
        else:
            print("\nno GPU here: the path of its tensors is not measured")


if __name__ == "__main__":
    main()
