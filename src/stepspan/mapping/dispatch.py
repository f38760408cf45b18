"""Events to handlers: an event that a processor has bent out of shape costs that event, not the session.

And what the mappers of spans and logs have in common: records without a place in time that they could run ahead of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from stepspan.events import Event
from stepspan.mapping.records import Record

log = logging.getLogger("stepspan.mapping")

MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
"""What handling an event raises whose fields are not as the schema says."""


def dispatch(handlers: Mapping[str, Callable[[Event], object]], events: Iterable[Event]) -> None:
    """Hand each event to the handler of its tag, if there is one; warn of those that cannot be mapped."""
    for event in events:
        handler = handlers.get(event["tag"])
        if handler is not None:
            try:
                handler(event)
            except MALFORMED as error:
                warn_unmappable(event["tag"], repr(error))


class NothingAhead:
    """Of a mapper whose records are all of the past: none is thinned or held back."""

    thinned = 0
    held_until = 0

    def release(self, until: int | None = None) -> Sequence[Record]:
        """Nothing: no record is held back."""
        return ()


@lru_cache(maxsize=256)
def warn_unmappable(tag: str, why: str) -> None:
    """Log that events of a tag cannot be mapped, once for each reason."""
    log.warning("stepspan: a %s event could not be mapped: %s (logged once)", tag, why)
