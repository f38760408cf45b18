"""Fixed attributes on everything that can carry some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepspan.errors import ConfigError
from stepspan.events import Event
from stepspan.values import json_value


class Attributes:
    """Adds attributes to spans, events and errors, and if asked to, to metrics.

    An attribute that the event has already stays as it is.

    Args:
        values: Name -> value.
        metrics: Whether metrics get them, too. There an attribute with many values makes many series.

    Raises:
        ConfigError: `values` is not a mapping.

    Example:
        In Python, `Attributes({"team": "vision"}, metrics=True)`; in a settings file::

            processors:
              - attributes: {values: {team: vision}, metrics: true}

    """

    def __init__(self, values: Mapping[str, Any], *, metrics: bool = False) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError("attributes.values", values, "give a mapping: {name: value}")
        self.values: dict[str, Any] = json_value(values)
        self.tags = frozenset({"span_begin", "event", "error"} | ({"metrics"} if metrics else set()))
        self.spec = {"attributes": {"values": self.values, "metrics": metrics}}

    def __call__(self, event: Event) -> Event:
        """The event with the attributes, changed in place."""
        event["attributes"] = {**self.values, **event.get("attributes", {})}
        return event
