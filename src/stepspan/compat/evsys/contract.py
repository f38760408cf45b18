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
        """Log one named number at a step."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """Log named numbers at a step; `split` is "train", "val" or "test"."""
        ...

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters, merged with those logged before."""
        ...

    def log_artifact(self, name: str, path: str, *, kind: str = "file") -> None:
        """Log that there is an artifact at `path`; `kind` is "file", "checkpoint" or your own."""
        ...

    def close(self) -> None:
        """Write out what waits, and release what the store holds."""
        ...
