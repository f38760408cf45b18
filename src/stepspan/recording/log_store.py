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
        """Log one number: a point of the gauge `training.<key>`.

        Args:
            key: Its name. A leading `train/`, `val/`, `eval/` or `test/` is its split.
            value: The number, or an array of one element, also on a device.
            step: The training step it belongs to: not a label, but `training.step.number` at the same time; where
                another step is open, `training.step.logged`.

        """
        self.run.log_scalar(key, value, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """Log several numbers: for each a point of the gauge `training.<key>`, with attribute `split`.

        Args:
            metrics: Names and numbers, as `log_scalar` takes them.
            step: The training step they belong to.
            split: The split of names that do not begin with one.

        """
        self.run.log_metrics(metrics, step, split=split)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters: attributes of the run's span, labels of `training.run.info`, and a log record.

        Args:
            params: Names and values of any type; they are merged with those logged before.

        """
        self.run.log_hyperparams(params)

    def log_artifact(self, name: str, path: str | os.PathLike[str], *, kind: str = "file") -> None:
        """Log that there is an artifact: the log record `training.artifact`. The file is not read.

        Args:
            name: What it is called.
            path: Where it is.
            kind: "checkpoint" also feeds the gauge `training.run.checkpoint_time` (Unix s), and the alert on its age.

        """
        self.run.log_artifact(name, path, kind=kind)

    def close(self) -> None:
        """Do nothing: the run goes on."""
