"""What happens to events on their way: shared processors before the journal, an exporter's own after it.

A processor is a callable `Event -> Event | None` (None: drop it) that names the `tags` it wants to see. It may change
the event in place. One that raises is skipped for that event, counted, and told once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stepspan.errors import ConfigError
from stepspan.events import Event
from stepspan.processors.attributes import Attributes
from stepspan.processors.drop import Drop
from stepspan.processors.redact import Redact
from stepspan.processors.rename import Rename
from stepspan.processors.sample_steps import SampleSteps

__all__ = ["Attributes", "Drop", "Processor", "Redact", "Rename", "SampleSteps", "build", "specs"]


class Processor(Protocol):
    """One stage of a pipeline."""

    tags: frozenset[str]
    """The tags it is called for; `stepspan.events.FIELDS` lists them."""

    def __call__(self, event: Event) -> Event | None:
        """The event to go on with."""
        ...


NAMED: Mapping[str, type] = {
    "attributes": Attributes,
    "drop": Drop,
    "redact": Redact,
    "rename": Rename,
    "sample_steps": SampleSteps,
}
"""Name in a settings file -> processor."""


def build(entries: Sequence[Mapping[str, Any]]) -> list[Processor]:
    """Processors from settings: each entry is `{name: {argument: value}}`. Raises `ConfigError`."""
    found: list[Processor] = []
    for entry in entries:
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise ConfigError("processors", entry, "each entry is one `name: {argument: value}`")
        name, arguments = next(iter(entry.items()))
        if name not in NAMED:
            raise ConfigError("processors", name, f"unknown; known are {', '.join(NAMED)}")
        try:
            found.append(NAMED[name](**(arguments or {})))
        except TypeError as error:
            raise ConfigError(f"processors.{name}", arguments, str(error)) from None
    return found


def specs(processors: Sequence[Processor]) -> list[dict[str, Any]]:
    """What `build` would make them from again; of somebody else's only the type is known."""
    return [getattr(p, "spec", None) or {f"{type(p).__module__}.{type(p).__qualname__}": {}} for p in processors]
