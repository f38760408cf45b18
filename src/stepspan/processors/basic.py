"""The processors that take a few lines each: fixed attributes, other names, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from stepspan.conversion import json_value
from stepspan.errors import ConfigError
from stepspan.events import TAGS, Event
from stepspan.mapping.names import EVALUATION_SPLITS, split_in_key


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


class Rename:
    """Renames metric keys.

    Args:
        metrics: Old key -> new key. Where two keys of one call become the same, the later one wins.

    Raises:
        ConfigError: `metrics` is not a mapping to strings.

    Example:
        In Python, `Rename({"acc": "accuracy"})`; in a settings file::

            processors:
              - rename: {metrics: {acc: accuracy}}

    """

    tags = frozenset({"metrics"})

    def __init__(self, metrics: Mapping[str, str]) -> None:
        if not isinstance(metrics, Mapping) or not all(isinstance(new, str) for new in metrics.values()):
            raise ConfigError("rename.metrics", metrics, 'give a mapping: {"old name": "new name"}')
        self.metrics = dict(metrics)
        self.spec = {"rename": {"metrics": self.metrics}}

    def __call__(self, event: Event) -> Event:
        """The event with the new keys, changed in place."""
        names = self.metrics
        event["metrics"] = {names.get(key, key): value for key, value in event["metrics"].items()}
        return event


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
        self._is_dropped = cache(lambda key: any(fnmatchcase(key, pattern) for pattern in self.patterns))

    def __call__(self, event: Event) -> Event | None:
        """The event without what is dropped; None where nothing is left."""
        tag = event["tag"]
        if tag in self.dropped_tags:
            return None
        if tag == "event":
            return None if any(fnmatchcase(event["name"], name) for name in self.names) else event
        kept = {key: value for key, value in event["metrics"].items() if not self._is_dropped(key)}
        return {**event, "metrics": kept} if kept else None


class SampleSteps:
    """Keeps the metrics and the trace of every n-th step only. Step time and its histogram still count every step.

    Values of evaluations, and those that are logged after a step, are kept: they do not come with every step.

    Args:
        every: n, at least 1. Steps whose number it divides are kept.

    Raises:
        ConfigError: `every` is not a whole number of at least 1.

    Example:
        In Python, `OtlpExporter(processors=[SampleSteps(every=10)])`; in a settings file::

            exporters:
              - endpoint: https://otlp.example.com
                processors:
                  - sample_steps: {every: 10}

    """

    tags = frozenset({"metrics", "step_begin"})

    def __init__(self, every: int) -> None:
        if type(every) is not int or every < 1:
            raise ConfigError("sample_steps.every", every, "give a whole number of at least 1")
        self.every = every
        self.spec = {"sample_steps": {"every": every}}

    def __call__(self, event: Event) -> Event | None:
        """The event, marked `thin` if it is a step whose trace is not wanted; metrics without those that are not."""
        number = event["own_step"] if "own_step" in event else event.get("step", 0)
        if number % self.every == 0 or "over" in event:
            return event
        if event["tag"] == "step_begin":
            return {**event, "thin": True}
        split = event["split"]
        kept = {key: v for key, v in event["metrics"].items() if (split_in_key(key)[0] or split) in EVALUATION_SPLITS}
        return {**event, "metrics": kept} if kept else None
