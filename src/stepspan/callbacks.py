"""qmlhc callbacks: `RunCallback(run)` next to, or instead of, `TelemetryLogger("telemetry.jsonl")`."""

from __future__ import annotations

from stepspan.compat.qmlhc.callbacks import Callback, CallbackList, MemoryLogger, RunCallback, TelemetryLogger

__all__ = ["Callback", "CallbackList", "MemoryLogger", "RunCallback", "TelemetryLogger"]
