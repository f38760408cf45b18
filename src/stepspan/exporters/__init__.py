"""Where events go: `jsonl` (the journal, inline and durable), `otlp`, `sdk`, `memory` (each follows the journal)."""

from __future__ import annotations

from stepspan.exporters.exporter import Exporter

__all__ = ["Exporter"]
