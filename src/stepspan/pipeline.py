"""The whole data path of an event, on one page.

    event ─► shared processors ─► journal (durable, inline) ─► the call returns
                                     ▲
                                     └── followers: every other exporter reads the journal from a cursor of its own

`Pipeline(processors=[Redact()], exporters=[JsonlExporter(directory), OtlpExporter(endpoint)])`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepspan.errors import ConfigError, Warn
from stepspan.events import TAGS, Event
from stepspan.exporters import Exporter
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.journal.journal import Journal
from stepspan.journal.writer import Begun, Emit
from stepspan.processors import Processor, apply
from stepspan.processors.registry import NAMED

FOLLOWER_ATTRIBUTES = ("destination", "signals", "processors", "export", "close")


def _ignore(kind: str, message: str, *, key: str = "") -> None:
    """Nobody wants to know."""


class Pipeline:
    """Processors in order, then the journal; followers read the journal.

    Args:
        processors: Called in order with each event whose tag they name, before it is written.
        exporters: One `JsonlExporter`, which keeps the journal, and any number of followers.
        warn: Called with a kind, a message and a key for each thing that goes wrong.

    Raises:
        ConfigError: There is no `JsonlExporter` or more than one, an exporter or processor lacks what it needs, or two
            exporters share a destination.

    """

    def __init__(
        self,
        processors: Sequence[Processor],
        exporters: Sequence[JsonlExporter | Exporter],
        *,
        warn: Warn = _ignore,
    ) -> None:
        journals = [exporter.journal for exporter in exporters if isinstance(exporter, JsonlExporter)]
        if len(journals) != 1:
            raise ConfigError(
                "exporters", exporters, "exactly one JsonlExporter keeps the journal: add it, or leave the others out"
            )
        self.journal: Journal = journals[0]
        self.followers = tuple(exporter for exporter in exporters if not isinstance(exporter, JsonlExporter))
        _check_followers(self.followers)
        _check_processors(processors)
        self._warn = warn
        self._stages = {tag: tuple(p for p in processors if tag in p.tags) for tag in TAGS}
        self.emitters: dict[str, Emit] = {
            tag: self._emit_processed if stages else self.journal.append for tag, stages in self._stages.items()
        }
        """What takes the events of a tag to the journal: straight there, where no processor wants them."""

    def emit(self, event: Event, begun: Begun | None = None) -> bool:
        """Take one event to the journal. When this returns the event survives the process.

        Args:
            event: With `ts` and `seq` 0, which the journal fills in.
            begun: What begins or ends by this event.

        Returns:
            False where a processor dropped it.

        """
        return self.emitters[event["tag"]](event, begun)

    def process(self, event: Event) -> Event | None:
        """Take an event through the shared processors.

        Args:
            event: Of any tag.

        Returns:
            What they made of it; None where one dropped it.

        """
        cut = event.get("cut")
        for processor in self._stages[event["tag"]]:
            processed = apply(processor, event, self._warn_of_processor)
            if processed is None:
                return None
            event = processed
        if event.get("cut") != cut:
            message = f"{event['tag']}: more than redaction looks at was logged at once, and the rest was left out"
            self._warn("cut", message, key=event["tag"])
        return event

    def leaves_alone(self, event: Event) -> bool:
        """Whether an event of these fields is written as it is, whenever it comes.

        Args:
            event: As it would be emitted.

        Returns:
            False where a processor changes or drops it, or where one of the program's own wants it, which may change.

        """
        is_own = all(type(processor) in NAMED.values() for processor in self._stages[event["tag"]])
        return is_own and self.process({**event}) == event

    def close(self, status: str) -> None:
        """End the journal. Events that come later are lost, with a warning."""
        self.emitters.update(dict.fromkeys(TAGS, self._refuse))
        self.journal.close(status)

    def _emit_processed(self, event: Event, begun: Begun | None = None) -> bool:
        processed = self.process(event)
        return processed is not None and self.journal.append(processed, begun)

    def _warn_of_processor(self, name: str, message: str) -> None:
        self._warn("processor", message, key=name)

    def _refuse(self, event: Event, begun: Begun | None = None) -> bool:
        self._warn("closed", f"the run is closed: {event['tag']} was lost, as is every later event")
        return True


def _check_followers(followers: Sequence[Any]) -> None:
    targets: set[tuple[str, str]] = set()
    for follower in followers:
        missing = [name for name in FOLLOWER_ATTRIBUTES if not hasattr(follower, name)]
        if missing:
            needed = ", ".join(FOLLOWER_ATTRIBUTES)
            fix = f"an exporter that follows the journal has {needed}; it lacks {', '.join(missing)}"
            raise ConfigError("exporters", follower, fix)
        its_targets = {(follower.destination, signal) for signal in follower.signals}
        if its_targets & targets:  # they would share a cursor, and the second never get anything
            fix = "two exporters go to this destination: leave one out, or name one with destination= in code"
            raise ConfigError("exporters", follower.destination, fix)
        targets |= its_targets


def _check_processors(processors: Sequence[Any]) -> None:
    for processor in processors:
        unknown = set(getattr(processor, "tags", ("no tags",))) - TAGS
        if unknown or isinstance(processor, type) or not callable(processor):
            fix = "give an object to call with an event, that names the `tags` it wants to see: some of "
            raise ConfigError("processors", processor, fix + ", ".join(TAGS))
