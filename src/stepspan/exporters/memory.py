"""Keeps what it is given: for tests, and for looking at what a journal maps to."""

from __future__ import annotations

from collections.abc import Sequence

from stepspan.mapping.records import SIGNALS, Attributes, Record, Signal
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.processors import Processor


class MemoryExporter:
    """`records[signal]`: (resource, record) in the order of arrival."""

    def __init__(self, *, processors: Sequence[Processor] = (), destination: str = "memory") -> None:
        self.destination = destination
        self.signals = SIGNALS
        self.processors = tuple(processors)
        self.records: dict[Signal, list[tuple[Attributes, Record]]] = {signal: [] for signal in SIGNALS}

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """Keep them."""
        self.records[signal].extend((resource, record) for record in records)
        return Outcome(Verdict.DELIVERED)

    def close(self) -> None:
        """Nothing to release."""
