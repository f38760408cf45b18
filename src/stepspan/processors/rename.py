"""Other names for metrics."""

from __future__ import annotations

from collections.abc import Mapping

from stepspan.errors import ConfigError
from stepspan.events import Event


class Rename:
    """Renames metric keys.

    Args:
        metrics: Old key -> new key. Where two keys of one call become the same, the later one wins.

    Raises:
        ConfigError: `metrics` is not a mapping to strings.

    Example:
        In Python, `Rename({"train_loss": "train/loss"})`; in a settings file::

            processors:
              - rename: {metrics: {train_loss: train/loss}}

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
