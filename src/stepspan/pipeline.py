"""The whole data path of an event, on one page.

    event ─► shared processors ─► first exporter (durable, inline: the journal) ─► the call returns
                                        ▲
                                        └── every other exporter follows the journal from a cursor of its own

`Pipeline(processors=[Redact()], exporters=[JsonlExporter(directory), OtlpExporter(endpoint)])`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepspan.errors import ConfigError
from stepspan.events import FIELDS, Event
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.journal.writer import Scope
from stepspan.processors import Processor

FOLLOWER = ("destination", "signals", "processors", "export", "close")


class Pipeline:
    """Processors in order, then exporters; the first exporter must be a `JsonlExporter`.

    `tell(kind, message)` is called for each thing that goes wrong.
    """

    def __init__(
        self,
        processors: Sequence[Processor],
        exporters: Sequence[Any],
        *,
        warn: Callable[[str, str], None] = lambda kind, message: None,
    ) -> None:
        if not exporters or not isinstance(exporters[0], JsonlExporter):
            raise ConfigError("exporters", exporters, "the first exporter keeps the journal: put a JsonlExporter there")
        for exporter in exporters[1:]:
            missing = [name for name in FOLLOWER if not hasattr(exporter, name)]
            if missing:
                fix = f"an exporter that follows the journal has {', '.join(FOLLOWER)}; it lacks {', '.join(missing)}"
                raise ConfigError("exporters", exporter, fix)
        taken: set[tuple[str, str]] = set()
        for exporter in exporters[1:]:
            targets = {(exporter.destination, signal) for signal in exporter.signals}
            if targets & taken:  # they would share a cursor, and the second never get anything
                fix = "two exporters go to this destination: leave one out, or name one with destination= in code"
                raise ConfigError("exporters", exporter.destination, fix)
            taken |= targets
        for processor in processors:
            unknown = set(getattr(processor, "tags", ("no tags",))) - FIELDS.keys()
            if unknown or isinstance(processor, type) or not callable(processor):
                fix = "give an object to call with an event, that names the `tags` it wants to see: some of "
                raise ConfigError("processors", processor, fix + ", ".join(FIELDS))
        self.journal: JsonlExporter = exporters[0]
        self.followers = tuple(exporters[1:])
        self._warn = warn
        self._stages = {tag: tuple(p for p in processors if tag in p.tags) for tag in FIELDS}
        self._append = self.journal.append

    def emit(self, event: Event, scope: Scope | None = None) -> bool:
        """Take one event to the journal; False: a processor dropped it. When this returns it survives the process."""
        stages = self._stages[event["tag"]]
        if stages:
            processed = self.process(event)
            if processed is None:
                return False
            event = processed
        self._append(event, scope)
        return True

    def process(self, event: Event) -> Event | None:
        """The event after the shared processors; None where one dropped it."""
        for stage in self._stages[event["tag"]]:
            try:
                processed = stage(event)
            except Exception as error:  # a user's processor may raise anything; the event matters more
                self._warn("processor", f"{type(stage).__name__} failed on a {event['tag']} event: {error!r}")
                continue
            if processed is None:
                return None
            if not isinstance(processed, dict) or "tag" not in processed:
                self._warn("processor", f"{type(stage).__name__} made no event of a {event['tag']} event: ignored")
                continue
            event = processed
        return event

    def close(self, status: str) -> None:
        """End the journal. What comes later is lost, counted and told."""
        self._append = self._late
        self.journal.close(status)

    def _late(self, event: Event, scope: Scope | None = None) -> None:
        self._warn("closed", f"the run is closed: {event['tag']} was lost, as is all that comes later")
