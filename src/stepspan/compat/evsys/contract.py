"""The LogStore contract of evsys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable


@runtime_checkable
class LogStore(Protocol):
    """Where a training loop's metrics, hyperparameters and artifacts go."""

    name: ClassVar[str]
    """The `kind` in YAML."""

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """One named number at a step."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """Named numbers at a step."""
        ...

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Hyperparameters, merged with those logged before."""
        ...

    def log_artifact(self, name: str, path: str, *, kind: str = "file") -> None:
        """That an artifact lies at `path`."""
        ...

    def close(self) -> None:
        """Write out what waits, and let go."""
        ...
