"""Fixed attributes on everything that can carry some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepspan.errors import ConfigError
from stepspan.events import Event
from stepspan.values import json_value


class Attributes:
    """Adds `values` to spans, events and errors, and with `metrics=True` to metrics, as attributes.

    What the event already says stays. On metrics an attribute with many values makes many series.
    """

    def __init__(self, values: Mapping[str, Any], *, metrics: bool = False) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError("attributes.values", values, "give a mapping: {name: value}")
        self.values: dict[str, Any] = json_value(values)
        self.tags = frozenset({"span_begin", "event", "error"} | ({"metrics"} if metrics else set()))
        self.spec = {"attributes": {"values": self.values, "metrics": metrics}}

    def __call__(self, event: Event) -> Event:
        """The event with the attributes."""
        event["attributes"] = {**self.values, **event.get("attributes", {})}
        return event
