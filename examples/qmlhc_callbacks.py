"""A qmlhc loop with its own telemetry file, and the same hooks as spans and metrics of a run.

python examples/qmlhc_callbacks.py
stepspan sync stepspan-runs --endpoint http://localhost:4318
"""

from __future__ import annotations

import random

import stepspan
from stepspan.callbacks import Callback, CallbackList, RunCallback, TelemetryLogger


def train(callback: Callback, epochs: int = 2, steps: int = 10) -> None:
    """Train as a qmlhc loop does, calling its callbacks."""
    for epoch in range(epochs):
        callback.on_epoch_begin(epoch, {"epoch": epoch})
        loss = 1.0
        for step in range(steps):
            callback.on_step_begin(step, {"epoch": epoch})
            loss *= random.uniform(0.8, 0.95)
            try:
                if loss < 0.15:
                    raise ArithmeticError("the gradient vanished")
            except ArithmeticError as error:
                callback.on_error(error, {"epoch": epoch})
            callback.on_step_end(step, {"task_mse": loss, "depth": 1 + epoch})
        callback.on_epoch_end(epoch, {"final_mse": loss, "notes": "completed"})


def main() -> None:
    """Train with both callbacks."""
    with stepspan.start_run(name="qmlhc-example") as run:
        train(CallbackList([TelemetryLogger("telemetry.jsonl", flush_interval=10), RunCallback(run)]))


if __name__ == "__main__":
    main()
