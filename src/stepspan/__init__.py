"""stepspan: the bridge between machine-learning training and OpenTelemetry.

with stepspan.start_run() as run:
    for batch in run.steps(loader):
        run.log_metrics({"loss": train(batch)})
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepspan._version import __version__ as __version__

if TYPE_CHECKING:
    from stepspan.compat.cloudmesh.telemetry import Telemetry as Telemetry
    from stepspan.errors import ConfigError as ConfigError
    from stepspan.errors import StepspanError as StepspanError
    from stepspan.exporters.jsonl import JsonlExporter as JsonlExporter
    from stepspan.exporters.memory import MemoryExporter as MemoryExporter
    from stepspan.exporters.otlp import OtlpExporter as OtlpExporter
    from stepspan.exporters.sdk import SdkExporter as SdkExporter
    from stepspan.pipeline import Pipeline as Pipeline
    from stepspan.run import Run as Run
    from stepspan.run import current_run as current_run
    from stepspan.start import start_run as start_run

_DEFINED_IN = {
    "ConfigError": "stepspan.errors",
    "JsonlExporter": "stepspan.exporters.jsonl",
    "MemoryExporter": "stepspan.exporters.memory",
    "OtlpExporter": "stepspan.exporters.otlp",
    "Pipeline": "stepspan.pipeline",
    "Run": "stepspan.run",
    "SdkExporter": "stepspan.exporters.sdk",
    "StepspanError": "stepspan.errors",
    "Telemetry": "stepspan.compat.cloudmesh.telemetry",
    "current_run": "stepspan.run",
    "start_run": "stepspan.start",
}
__all__ = sorted(_DEFINED_IN)


def __getattr__(name: str) -> Any:
    if name in _DEFINED_IN:
        return getattr(import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module 'stepspan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
