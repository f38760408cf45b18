"""The LogStore contract of evsys: what a log store must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable


@runtime_checkable
class LogStore(Protocol):
    """Where a training loop's metrics, hyperparameters and artifacts go.

    As in evsys, any class with these methods is a log store.
    """

    name: ClassVar[str]
    """The store's `kind` in YAML."""

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """Log one named number.

        Args:
            key: Its name, such as "loss" or "val/loss".
            value: The number.
            step: The training step it belongs to.

        """

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """Log several named numbers.

        Args:
            metrics: Names and numbers.
            step: The training step they belong to.
            split: The data they were measured on: "train", "val" or "test".

        """

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters.

        Args:
            params: Names and values; they are merged with those logged before.

        """

    def log_artifact(self, name: str, path: str, *, kind: str = "file") -> None:
        """Log that there is an artifact; the store does not read it.

        Args:
            name: What it is called.
            path: Where it is.
            kind: "file", "checkpoint" or your own.

        """

    def close(self) -> None:
        """Write out what waits, and release what the store holds."""
