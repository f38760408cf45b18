"""Where events go: `jsonl` (the journal, inline and durable), `otlp`, `sdk`, `memory` (each follows the journal)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from stepspan.mapping.records import Attributes, Record, Signal
    from stepspan.otlp.outcome import Outcome
    from stepspan.processors import Processor


class Exporter(Protocol):
    """Something that follows the journal. Each signal is used by one thread at a time."""

    @property
    def destination(self) -> str:
        """Names its cursors: letters, digits, `-` and `_`; the same after a restart."""
        ...

    @property
    def signals(self) -> Sequence[Signal]:
        """What it takes."""
        ...

    @property
    def processors(self) -> Sequence[Processor]:
        """Its own, after the journal."""
        ...

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """Send records of one session, once, and say what became of them."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...
