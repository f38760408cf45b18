"""The demo's training: softmax regression of digit images, data-parallel over processes, with scikit-learn and numpy.

Each rank takes its share of every batch, and the gradients are averaged across the ranks through shared memory: what
`all_reduce` does on a cluster.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss
from sklearn.utils.extmath import softmax

import stepspan

Array = NDArray[np.float64]

CLASSES, PIXELS = 10, 64
LEARNING_RATE, BATCH, SEED = 0.8, 96, 7


@dataclass
class AllReduce:
    """The mean of an array over all ranks. Shared memory of `ranks` rows and a barrier."""

    ranks: int
    rank: int
    memory: Any
    barrier: Barrier

    def __call__(self, values: Array) -> Array:
        """Every rank's `values` in, their mean out."""
        rows: Array = np.frombuffer(self.memory).reshape(self.ranks, *values.shape)
        rows[self.rank] = values
        self.barrier.wait()
        mean: Array = rows.mean(axis=0)
        self.barrier.wait()  # no rank writes its next values before all have read these
        return mean


def shared_memory(ranks: int) -> Any:
    """Memory for the gradients of all ranks, for `AllReduce`."""
    return RawArray(ctypes.c_double, ranks * PIXELS * CLASSES)


class Model:
    """Pixels to the probability of each class, by one matrix of weights."""

    def __init__(self) -> None:
        self.weights = np.zeros((PIXELS, CLASSES))

    def forward(self, pixels: Array) -> Array:
        """The probability of each class."""
        probability: Array = softmax(pixels @ self.weights)
        return probability

    def gradients(self, pixels: Array, labels: NDArray[np.int64]) -> tuple[float, Array]:
        """Mean cross-entropy, and its gradient by the weights."""
        probability = self.forward(pixels)
        error = (probability - np.eye(CLASSES)[labels]) / len(labels)
        return float(log_loss(labels, probability, labels=range(CLASSES))), pixels.T @ error

    def evaluate(self, pixels: Array, labels: NDArray[np.int64]) -> tuple[float, float]:
        """Mean cross-entropy and accuracy."""
        loss, _ = self.gradients(pixels, labels)
        return loss, float(accuracy_score(labels, self.forward(pixels).argmax(axis=1)))


def batches(pixels: Array, labels: NDArray[np.int64], epoch: int, rank: int, ranks: int) -> Iterator[Any]:
    """One rank's share of each batch, in an order that all ranks agree on."""
    order = np.random.default_rng([SEED, epoch]).permutation(len(labels))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        mine = order[start : start + BATCH][rank::ranks]
        yield pixels[mine], labels[mine]


def train(
    rank: int, ranks: int, epochs: int, directory: Path, memory: Any, barrier: Barrier, exporters: Any = None
) -> None:
    """One rank's training, instrumented."""
    digits = load_digits()
    pixels, labels = digits.data / 16.0, digits.target
    held_out = len(labels) // 5
    all_reduce = AllReduce(ranks, rank, memory, barrier)
    model = Model()

    with stepspan.start_run(directory=directory, name="digits", tags=["demo"], exporters=exporters) as run:
        run.log_hyperparams({"learning_rate": LEARNING_RATE, "batch_size": BATCH, "seed": SEED, "epochs": epochs})
        run.set_total_steps(epochs * ((len(labels) - held_out) // BATCH))
        for epoch in range(epochs):
            with run.epoch(epoch):
                learning_rate = LEARNING_RATE * 0.5 * (1.0 + np.cos(np.pi * epoch / epochs))
                loader = batches(pixels[held_out:], labels[held_out:], epoch, rank, ranks)
                for x, y in run.steps(loader, samples=lambda batch: len(batch[1])):
                    with run.span("forward_backward"):
                        loss, gradient = model.gradients(x, y)
                    with run.span("all_reduce", collective=True):
                        gradient = all_reduce(gradient)
                    with run.span("optimizer"):
                        model.weights -= learning_rate * gradient
                    norm = float(np.linalg.norm(gradient))
                    run.log_metrics({"loss": loss, "learning_rate": learning_rate, "grad_norm": norm})
                for x, y in run.steps([(pixels[:held_out], labels[:held_out])], split="val"):
                    loss, accuracy = model.evaluate(x, y)
                    run.log_metrics({"loss": loss, "accuracy": accuracy})
                if rank == 0:
                    print(f"epoch {epoch + 1}/{epochs}  val loss {loss:.3f}  accuracy {accuracy:.1%}", flush=True)
        if rank == 0:
            checkpoint = directory / "demo-checkpoint.npz"
            with run.span("checkpoint"):
                np.savez(checkpoint, weights=model.weights)
            run.log_artifact("model", checkpoint, kind="checkpoint")
