"""What one exporter need not send."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from stepspan.errors import ConfigError
from stepspan.events import FIELDS, Event


class Drop:
    """Drops metrics whose key matches a pattern (`"grad/*"`), and whole events by `tag` or by `name`."""

    def __init__(self, metrics: Sequence[str] = (), *, tags: Sequence[str] = (), events: Sequence[str] = ()) -> None:
        for field, given in (("metrics", metrics), ("tags", tags), ("events", events)):
            if isinstance(given, str):
                raise ConfigError(f"drop.{field}", given, f"give a list: [{given!r}]")
        for tag in tags:
            if tag not in FIELDS:
                raise ConfigError("drop.tags", tag, f"unknown; known are {', '.join(FIELDS)}")
        self.patterns = tuple(metrics)
        self.dropped_tags = frozenset(tags)
        self.names = tuple(events)
        wanted = {"metrics"} if metrics else set()
        self.tags = frozenset(wanted | ({"event"} if events else set()) | self.dropped_tags)
        self.spec = {"drop": {"metrics": list(metrics), "tags": list(tags), "events": list(events)}}
        self._known: dict[str, bool] = {}

    def __call__(self, event: Event) -> Event | None:
        """The event without what is dropped; None where nothing is left."""
        tag = event["tag"]
        if tag in self.dropped_tags:
            return None
        if tag == "event":
            return None if any(fnmatchcase(event["name"], name) for name in self.names) else event
        kept = {key: value for key, value in event["metrics"].items() if not self._matches(key)}
        return {**event, "metrics": kept} if kept else None

    def _matches(self, key: str) -> bool:
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = any(fnmatchcase(key, pattern) for pattern in self.patterns)
        return found
