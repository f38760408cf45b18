"""How much slower a 5 ms torch step is that is seen: a step, a span and three metrics each, with live delivery.

    python benchmarks/torch_step.py [--pairs 40] [--python PYTHON]

A pair is two processes, one after the other, which train the same small model on the CPU in one thread: one with
stepspan, which delivers to a receiver that takes everything, and one without; which of them goes first changes from
pair to pair. A process's figure is the median of its steps; the heap's layout alone moves it by 1 to 2%, so what is
reported is the median of many pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
from measuring import Receiver, Worker

STEP_S = 0.005
PROMISED = 0.012
"""How much longer a step may take."""

# --- a process


def work(task: dict[str, Any]) -> None:
    if "seconds_a_step" in task:
        measuring.answer(updates=updates_in(task["seconds_a_step"]))
        return
    step = training(task["updates"])
    with recorded(task) if task["contender"] == "stepspan" else contextlib.nullcontext(None) as run:
        taken = train(step, task["steps"], run)
        measuring.answer(step=statistics.median(taken) * 1000, mean=statistics.mean(taken) * 1000)


def train(step: Callable[[], float], steps: int, run: Any) -> list[float]:
    """Train, and return what each step took, in seconds; the first tenth warms up."""
    taken: list[float] = []
    for number in range(steps):
        before = time.perf_counter()
        if run is None:
            loss = step()
        else:
            with run.step(number):
                with run.span("forward_backward"):
                    loss = step()
                run.log_metrics({"loss": loss, "lr": 3e-4, "progress": number / steps})
        taken.append(time.perf_counter() - before)
    return taken[steps // 10 :]


def training(updates: int) -> Callable[[], float]:
    """A step: forward, backward and the optimizer of a small model, so many times."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, target = torch.randn(64, 256), torch.randn(64, 16)
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 16)
    )
    optimizer = torch.optim.Adam(model.parameters())

    def once() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(batch), target)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    def step() -> float:
        for _ in range(updates):
            loss = once()
        return loss

    return step


def updates_in(seconds: float) -> int:
    """How many updates of the model take about so long here."""
    step = training(updates=20)
    step()
    before = time.perf_counter()
    step()
    return max(1, round(20 * seconds / (time.perf_counter() - before)))


@contextlib.contextmanager
def recorded(task: dict[str, Any]) -> Iterator[Any]:
    import stepspan

    with stepspan.start_run(job_id="torch-step", directory=task["directory"], endpoint=task["endpoint"]) as run:
        yield run


# --- the pairs


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--pairs", type=int, default=40)
    options.add_argument("--steps", type=int, default=1000, help="of a process")
    options.add_argument("--seconds-a-step", type=float, default=STEP_S)
    options.add_argument(
        "--python", default=sys.executable, help="an interpreter that has torch, and what stepspan needs"
    )
    options.add_argument("--directory", help="where the journals go")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    given = options.parse_args()
    measuring.clean_environment()
    if given.worker:
        work(json.loads(given.worker))
        return
    print(f"# A torch step with telemetry and without\n\n{measuring.machine()}")
    slower: list[float] = []
    steps: dict[str, list[float]] = {"stepspan": [], "nothing": []}
    with tempfile.TemporaryDirectory(dir=given.directory) as place, Receiver() as receiver:
        calibration = Worker(__file__, {"seconds_a_step": given.seconds_a_step}, python=given.python)
        task = {"steps": given.steps, "endpoint": receiver.endpoint, **calibration.result()}
        calibration.close()
        for pair in range(given.pairs):
            for name in ("stepspan", "nothing") if pair % 2 else ("nothing", "stepspan"):
                directory = str(Path(place) / str(pair))
                worker = Worker(__file__, {**task, "contender": name, "directory": directory}, python=given.python)
                steps[name].append(worker.result()["step"])
                worker.close()
            slower.append(100 * (steps["stepspan"][-1] / steps["nothing"][-1] - 1))
            print(f"pair {pair + 1}: {slower[-1]:+.2f}%", file=sys.stderr, flush=True)
    rows = [[name, measuring.middle(figures, 3)] for name, figures in steps.items()]
    measuring.table(f"**{given.pairs} pairs of processes, {given.steps} steps each**", ["", "ms a step"], rows)
    kept = "yes" if statistics.median(slower) <= 100 * PROMISED else "NO"
    print(f"\nslower by {measuring.middle(slower, 2)}%, at most {100 * PROMISED:g}% promised: {kept}")
    print(f"\n{measuring.machine()}")


if __name__ == "__main__":
    main()
