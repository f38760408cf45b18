"""qmlhc callbacks: `RunCallback(run)` beside or instead of `TelemetryLogger("telemetry.jsonl")`."""

from __future__ import annotations

from stepspan.compat.qmlhc import Callback, CallbackList, MemoryLogger, RunCallback, TelemetryLogger

__all__ = ["Callback", "CallbackList", "MemoryLogger", "RunCallback", "TelemetryLogger"]
