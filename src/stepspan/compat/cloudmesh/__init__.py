"""cloudmesh-ai's Telemetry: the calls of its manual, its files and databases, and OpenTelemetry behind them."""

from __future__ import annotations

from stepspan.compat.cloudmesh.telemetry import Backend, Telemetry
from stepspan.compat.cloudmesh.writing import Emitted

__all__ = ["Backend", "Emitted", "Telemetry"]
