"""Other names for metrics."""

from __future__ import annotations

from collections.abc import Mapping

from stepspan.errors import ConfigError
from stepspan.events import Event


class Rename:
    """Renames metric keys: `{"train_loss": "train/loss"}`. Two keys that become one: the later in the call wins."""

    tags = frozenset({"metrics"})

    def __init__(self, metrics: Mapping[str, str]) -> None:
        if not isinstance(metrics, Mapping) or not all(isinstance(new, str) for new in metrics.values()):
            raise ConfigError("rename.metrics", metrics, 'give a mapping: {"old name": "new name"}')
        self.metrics = dict(metrics)
        self.spec = {"rename": {"metrics": self.metrics}}

    def __call__(self, event: Event) -> Event:
        """The event under its new names."""
        names = self.metrics
        event["metrics"] = {names.get(key, key): value for key, value in event["metrics"].items()}
        return event
