"""The `stepspan` store: a run behind the LogStore contract, so that one YAML line sends an evsys run to OpenTelemetry.

log_store: {kind: stepspan, params: {endpoint: "http://localhost:4318"}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict

from stepspan.compat.evsys.registry import StoreConfig, register_log_store
from stepspan.start import start_run

if TYPE_CHECKING:
    from stepspan.run import Run


class RunLogStore:
    """An open run as a log store: what `run.as_log_store()` gives. The run stays open; who started it closes it."""

    name: ClassVar[str] = "stepspan"

    def __init__(self, run: Run) -> None:
        self.run = run

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """One point."""
        self.run.log_scalar(key, value, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """A point per key; a leading `val/` of a key names the split of that key."""
        self.run.log_metrics(metrics, step, split=split)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Attributes of the run, and a log record."""
        self.run.log_hyperparams(params)

    def log_artifact(self, name: str, path: str | os.PathLike[str], *, kind: str = "file") -> None:
        """A log record."""
        self.run.log_artifact(name, path, kind=kind)

    def close(self) -> None:
        """Nothing: the run goes on."""


class StepspanLogStoreConfig(StoreConfig):
    """The arguments of `stepspan.start_run`."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # `job_id: 4711` is an int in YAML

    job_id: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None
    attempt: int | None = None
    service_name: str | None = None
    directory: Path | None = None
    endpoint: str | None = None
    resource: dict[str, Any] | None = None
    processors: list[Any] | None = None
    exporters: list[Any] | None = None
    config: Path | None = None
    enabled: bool | None = None


@register_log_store("stepspan")
class StepspanLogStore(RunLogStore):
    """A run of its own, started with the arguments of `stepspan.start_run`, which may raise, and ended by `close`."""

    Config: ClassVar[type] = StepspanLogStoreConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(start_run(**arguments))

    def close(self) -> None:
        """End the run. What is logged later is counted and told once by the run."""
        self.run.close()
