"""An open run behind the LogStore contract of evsys (`stepspan.compat.evsys.contract`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar


class RunLogStore:
    """Passes what is logged on to an open run, as `run.as_log_store()` does.

    Nothing here raises. The run stays open: the code that started it closes it.

    Args:
        run: A `stepspan.Run`.

    """

    name: ClassVar[str] = "stepspan"

    def __init__(self, run: Any) -> None:
        self.run = run

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """Log a point of the gauge `training.<key>`."""
        self.run.log_scalar(key, value, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """Log a point of the gauge `training.<key>` for each key, with attribute `split`.

        A key that begins with `train/`, `val/` or `test/` names its own split.
        """
        self.run.log_metrics(metrics, step, split=split)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters: attributes of the run's span, labels of `training.run.info`, and a log record."""
        self.run.log_hyperparams(params)

    def log_artifact(self, name: str, path: str | os.PathLike[str], *, kind: str = "file") -> None:
        """Log that an artifact exists: a log record; `kind="checkpoint"` also feeds `training.run.checkpoint_time`."""
        self.run.log_artifact(name, path, kind=kind)

    def close(self) -> None:
        """Do nothing: the run goes on."""
