"""Events become records: a pure function of the journal, one mapper for each signal.

Same lines, same points, same ids, whatever the batches, the protocol or the number of restarts. A mapper is a fold: it
keeps what is open and what is cumulative, all of it plain JSON (`state()`, `restore()`), so that a checkpoint is a file
and a restart reads on from it. Cumulative points come out when event time crosses a multiple of 10 s and at the end of
a session, never because a batch ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.mapping.logs import LogMapper
from stepspan.mapping.metrics import MetricMapper
from stepspan.mapping.records import Record, Signal
from stepspan.mapping.traces import TraceMapper

VERSION = 1
"""Of the mapping: state kept by another version is rebuilt from the journal."""


class Mapper(Protocol):
    """One session's events as one signal's records."""

    @property
    def filtered(self) -> int:
        """Records that were made and left out, so far."""
        ...

    def map(self, events: Sequence[Event]) -> Sequence[Record]:
        """The records of the next events, which end between two milliseconds."""
        ...

    def finish(self, closed: Closed) -> Sequence[Record]:
        """The records of the session's end."""
        ...

    def state(self) -> dict[str, Any]:
        """All that is carried from batch to batch, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...


def mapper(signal: Signal, header: Event) -> Mapper:
    """A mapper for one signal of the session that begins with `header`."""
    return MAPPERS[signal](header)


MAPPERS: dict[Signal, Callable[[Event], Mapper]] = {"metrics": MetricMapper, "traces": TraceMapper, "logs": LogMapper}
