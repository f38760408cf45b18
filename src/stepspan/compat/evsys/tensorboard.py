"""The `tensorboard` store. `pip install 'stepspan[tensorboard]'` brings a writer of event files that needs no torch."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from stepspan.compat.evsys.registry import StoreConfig, register_log_store
from stepspan.copying import SharedByCopies


@register_log_store("tensorboard")
class TensorBoardLogStore(SharedByCopies):
    """An event file for TensorBoard: metrics as scalars, hyperparameters and artifacts as texts.

    As in evsys, the split is not written: it is in the key, as in `val/loss`. What was logged is in the file after
    `close`, or at the interpreter's exit. After `close` each write raises RuntimeError.

    Args:
        log_dir: The directory of the event file.
        flush_secs: Seconds between two flushes of the file.

    Raises:
        ImportError: tensorboardX is not installed.

    """

    name: ClassVar[str] = "tensorboard"

    class Config(StoreConfig):
        """The parameters of the `tensorboard` store in YAML."""

        log_dir: str
        flush_secs: int = Field(default=30, gt=0)

    def __init__(self, *, log_dir: str, flush_secs: int = 30) -> None:
        try:
            writers = importlib.import_module("tensorboardX")
        except ImportError as error:
            raise ImportError(f"log store tensorboard needs `pip install 'stepspan[tensorboard]'`: {error}") from error
        self.log_dir = log_dir
        self._writer: Any = writers.SummaryWriter(log_dir, flush_secs=flush_secs)
        self._close = weakref.finalize(self, self._writer.close)

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """Add the scalar `key` at a step. Raises RuntimeError after `close`."""
        self._open().add_scalar(key, value, global_step=step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """Add a scalar for each key at a step; `split` is not written. Raises RuntimeError after `close`."""
        writer = self._open()
        for key, value in metrics.items():
            writer.add_scalar(key, value, global_step=step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Add the text `hparams`: the mapping as Python prints it. Raises RuntimeError after `close`."""
        self._open().add_text("hparams", str(params))

    def log_artifact(self, name: str, path: str, *, kind: str = "file") -> None:
        """Add the text `artifact/<name>`: the artifact's kind and path. Raises RuntimeError after `close`."""
        self._open().add_text(f"artifact/{name}", f"[{kind}] {path}")

    def close(self) -> None:
        """Write out what waits, and refuse later calls; calling it again does nothing."""
        self._close()

    def _open(self) -> Any:
        if not self._close.alive:
            raise RuntimeError(f"the log store in {self.log_dir} is closed")
        return self._writer
