"""An exporter that keeps what it is given: for tests, and for looking at what a journal maps to."""

from __future__ import annotations

from collections.abc import Sequence

from stepspan.mapping.records import SIGNALS, Attributes, Record, Signal
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.processors import Processor


class MemoryExporter:
    """Keeps records in memory.

    Args:
        processors: Run on the events of this exporter alone, after the journal.
        destination: Names its cursors: letters, digits, "-" and "_".

    Attributes:
        records: Signal -> (resource, record) in the order of arrival. The records are those of
            `stepspan.mapping.records`.

    """

    def __init__(self, *, processors: Sequence[Processor] = (), destination: str = "memory") -> None:
        self.destination = destination
        self.signals = SIGNALS
        self.processors = tuple(processors)
        self.records: dict[Signal, list[tuple[Attributes, Record]]] = {signal: [] for signal in SIGNALS}

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """Keep the records. Always DELIVERED."""
        self.records[signal].extend((resource, record) for record in records)
        return Outcome(Verdict.DELIVERED)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
