"""Events become records: a pure function of the journal, one mapper for each signal.

The same lines give the same points, times and ids, whatever the batches, the protocol or the number of restarts. A
mapper is a fold: it keeps what is open and what is cumulative, and hands it out as plain JSON, so that a checkpoint is
a file and a restart reads on from it. Cumulative points come out when event time crosses a multiple of 10 s and at the
end of a session, never because a batch ended.

The order of calls: `restore`, if there is a state; `map` with all events of the session in order, in batches that end
between two milliseconds, and between them `release` where the time of points has come without another event; `finish`
once, after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.mapping.logs import LogMapper
from stepspan.mapping.metrics import MetricMapper
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Record, Signal
from stepspan.mapping.traces import TraceMapper

VERSION = 4
"""Of the mappers' state. A checkpoint of another version is not used: the state is rebuilt from the journal."""


class Mapper(Protocol):
    """One session's events as one signal's records."""

    @property
    def tags(self) -> Collection[str]:
        """The tags of the events that it makes anything of."""

    @property
    def filtered(self) -> int:
        """Records that were made and left out, since the beginning of the session or the state."""

    @property
    def thinned(self) -> int:
        """Points that gave way to later ones, for want of milliseconds; likewise."""

    @property
    def held_until(self) -> int:
        """The time of the last point that is held back, Unix ns; 0: none is."""

    def map(self, events: Sequence[Event]) -> Sequence[Record]:
        """Map a batch.

        Args:
            events: The next events. The last one of a millisecond is in the same batch as the first.

        Returns:
            Their records, and those that were waiting for them. Points that lie after the last event, or after a value
            that is still missing, are held back.

        """

    def release(self, until: int | None = None) -> Sequence[Record]:
        """Take points that were held back.

        Args:
            until: The time of the last one, which is the present, Unix ns; None: all that have a place.

        Returns:
            Points that no other call returns.

        """

    def finish(self, closed: Closed) -> Sequence[Record]:
        """Map the session's end.

        Args:
            closed: When and how it ended.

        Returns:
            The records of what was still open, cumulative or waiting.

        """

    def state(self) -> dict[str, Any]:
        """All that is carried from batch to batch, as JSON. Valid until the next batch."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same `VERSION`, which now belongs to the mapper."""


MAPPERS: dict[Signal, Callable[[Event, MappingOptions], Mapper]] = {
    "metrics": MetricMapper,
    "traces": TraceMapper,
    "logs": LogMapper,
}


def mapper(signal: Signal, header: Event, options: MappingOptions = DEFAULT_OPTIONS) -> Mapper:
    """A mapper that has seen nothing yet.

    Args:
        signal: What it makes: points, spans or log records.
        header: The header of the session.
        options: What the records' destination wants.

    """
    return MAPPERS[signal](header, options)
