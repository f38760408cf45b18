"""What a processor is, and processors by their names in settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from stepspan.errors import ConfigError
from stepspan.events import Event
from stepspan.processors.basic import Attributes, Drop, Rename, SampleSteps
from stepspan.processors.redact import Redact
from stepspan.values import error_text


class Processor(Protocol):
    """One stage of a pipeline: a callable that changes events or leaves them out.

    A processor that raises is skipped for that event, and the run warns once. One that has a `spec`, which is its entry
    in a settings file, can work in the deliverer process; an exporter with any other is served by a thread.

    Example:
        A processor of your own::

            class DropDebugEvents:
                tags = frozenset({"event"})

                def __call__(self, event):
                    return None if event["name"].startswith("debug.") else event

            stepspan.start_run(processors=[DropDebugEvents()])

    """

    tags: frozenset[str]
    """The tags of the events it is called for; `stepspan.events` lists them."""

    def __call__(self, event: Event) -> Event | None:
        """The event to go on with, which may be the same one, changed in place; None drops it."""


NAMED: Mapping[str, type] = {
    "attributes": Attributes,
    "drop": Drop,
    "redact": Redact,
    "rename": Rename,
    "sample_steps": SampleSteps,
}
"""Name in a settings file -> processor."""


def build(entries: Sequence[Mapping[str, Any]]) -> list[Processor]:
    """Make processors from settings.

    Args:
        entries: Each is `{name: {argument: value}}`, with a name of `NAMED`.

    Raises:
        ConfigError: An entry has another form, an unknown name, or arguments that its processor does not take.

    """
    processors: list[Processor] = []
    for entry in entries:
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise ConfigError("processors", entry, "each entry is one `name: {argument: value}`")
        name, arguments = next(iter(entry.items()))
        if name not in NAMED:
            raise ConfigError("processors", name, f"unknown; known are {', '.join(NAMED)}")
        try:
            processors.append(NAMED[name](**(arguments or {})))
        except TypeError as error:
            raise ConfigError(f"processors.{name}", arguments, str(error)) from None
    return processors


def apply(processor: Processor, event: Event, warn: Callable[[str, str], None]) -> Event | None:
    """Call one processor with an event.

    Args:
        processor: One that names the event's tag.
        event: What it is called with.
        warn: Called with the processor's class and a message where it fails.

    Returns:
        What it made of the event; None where it dropped it; the event itself where it failed.

    """
    try:
        processed: Any = processor(event)
        if processed is not None and not (isinstance(processed, dict) and "tag" in processed):
            raise TypeError("what it returned is no event")
    except Exception as error:  # a user's processor may raise anything; the event matters more
        name = type(processor).__name__
        warn(name, f"{name} failed on a {event['tag']} event: {error_text(error)}")
        return event
    return processed


def specs(processors: Sequence[Processor]) -> list[dict[str, Any]]:
    """What `build` would make processors from again.

    Args:
        processors: Of one that is not stepspan's own only the type is known.

    """
    return [getattr(p, "spec", None) or {f"{type(p).__module__}.{type(p).__qualname__}": {}} for p in processors]
