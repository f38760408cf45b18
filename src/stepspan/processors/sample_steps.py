"""Fewer steps for one exporter; the journal keeps them all."""

from __future__ import annotations

from stepspan.errors import ConfigError
from stepspan.events import Event


class SampleSteps:
    """Keeps the metrics and the trace of every n-th step only. Step time and its histogram still count every step.

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
        """The event, marked `thin` if it is a step whose trace is not wanted; None for metrics that are not."""
        if event.get("step", 0) % self.every == 0:
            return event
        return {**event, "thin": True} if event["tag"] == "step_begin" else None
