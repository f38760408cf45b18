"""What happens to events on their way: shared processors before the journal, an exporter's own after it.

A processor is a callable `Event -> Event | None` (None: drop it) that names the `tags` it wants to see. It may change
the event in place. One that raises is skipped for that event, counted, and told once.
"""

from __future__ import annotations

from typing import Protocol

from stepspan.events import Event
from stepspan.processors.attributes import Attributes
from stepspan.processors.drop import Drop
from stepspan.processors.redact import Redact
from stepspan.processors.rename import Rename
from stepspan.processors.sample_steps import SampleSteps

__all__ = ["Attributes", "Drop", "Processor", "Redact", "Rename", "SampleSteps"]


class Processor(Protocol):
    """One stage of a pipeline."""

    tags: frozenset[str]
    """The tags it is called for; `stepspan.events.FIELDS` lists them."""

    def __call__(self, event: Event) -> Event | None:
        """The event to go on with."""
        ...
