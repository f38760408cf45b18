"""Leaving out events and metrics that one exporter need not send."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from stepspan.errors import ConfigError
from stepspan.events import TAGS, Event


class Drop:
    """Leaves out metrics by their key, and whole events by their tag or name.

    Args:
        metrics: Patterns of metric keys, such as `"grad/*"`: `*`, `?` and `[…]` as in file names, case matters.
        tags: Tags of events that go nowhere, as `stepspan.events` lists them: `"sample"`, `"log"`.
        events: Patterns of the names of `log_event`.

    Raises:
        ConfigError: An argument is a string instead of a list, or a tag is unknown.

    Example:
        In Python, `OtlpExporter(processors=[Drop(["grad/*"], tags=["sample"])])`; in a settings file::

            exporters:
              - endpoint: https://otlp.example.com
                processors:
                  - drop: {metrics: ["grad/*"], tags: [sample]}

    """

    def __init__(self, metrics: Sequence[str] = (), *, tags: Sequence[str] = (), events: Sequence[str] = ()) -> None:
        for field, given in (("metrics", metrics), ("tags", tags), ("events", events)):
            if isinstance(given, str):
                raise ConfigError(f"drop.{field}", given, f"give a list: [{given!r}]")
        for tag in tags:
            if tag not in TAGS:
                raise ConfigError("drop.tags", tag, f"unknown; known are {', '.join(TAGS)}")
        self.patterns = tuple(metrics)
        self.dropped_tags = frozenset(tags)
        self.names = tuple(events)
        self.tags = self.dropped_tags | ({"metrics"} if metrics else set()) | ({"event"} if events else set())
        self.spec = {"drop": {"metrics": list(metrics), "tags": list(tags), "events": list(events)}}
        self._dropped: dict[str, bool] = {}  # metric key -> whether a pattern matches

    def __call__(self, event: Event) -> Event | None:
        """The event without what is dropped; None where nothing is left."""
        tag = event["tag"]
        if tag in self.dropped_tags:
            return None
        if tag == "event":
            return None if any(fnmatchcase(event["name"], name) for name in self.names) else event
        kept = {key: value for key, value in event["metrics"].items() if not self._is_dropped(key)}
        return {**event, "metrics": kept} if kept else None

    def _is_dropped(self, key: str) -> bool:
        dropped = self._dropped.get(key)
        if dropped is None:
            dropped = self._dropped[key] = any(fnmatchcase(key, pattern) for pattern in self.patterns)
        return dropped
