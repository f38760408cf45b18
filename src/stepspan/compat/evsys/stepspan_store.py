"""The `stepspan` store: a run behind the LogStore contract, so that one YAML line sends an evsys run to OpenTelemetry.

log_store: {kind: stepspan, params: {endpoint: "http://localhost:4318"}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from stepspan.compat.evsys.registry import StoreConfig, register_log_store
from stepspan.recording.log_store import RunLogStore
from stepspan.start import start_run


@register_log_store("stepspan")
class StepspanLogStore(RunLogStore):
    """A log store that is a run: the constructor starts it, and `close` ends it. evsys has no such store.

    Args:
        arguments: The arguments of `stepspan.start_run`.

    Raises:
        ConfigError: An argument or variable is wrong.

    """

    class Config(StoreConfig):
        """The parameters of the `stepspan` store in YAML: the arguments of `stepspan.start_run`."""

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

    def __init__(self, **arguments: Any) -> None:
        super().__init__(start_run(**arguments))

    def close(self) -> None:
        """End the run as completed. What is logged later is counted by the run, which warns once."""
        self.run.close()
