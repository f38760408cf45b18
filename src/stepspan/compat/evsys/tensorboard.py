"""The `tensorboard` store, for which `stepspan[tensorboard]` brings a writer of event files without torch."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from stepspan.compat.evsys.registry import StoreConfig, register_log_store


class TensorBoardLogStoreConfig(StoreConfig):
    """Where the event file goes, and how often it is written out (seconds)."""

    log_dir: str
    flush_secs: int = Field(default=30, gt=0)


@register_log_store("tensorboard")
class TensorBoardLogStore:
    """Metrics as scalars, hyperparameters (`hparams`) and artifacts (`artifact/<name>`) as text.

    The split is not written: evsys has it in the key, as in `val/loss`. What was logged is in the file after `close`,
    or at the interpreter's exit. After `close` each write raises RuntimeError. The constructor raises ImportError
    without the extra.
    """

    name: ClassVar[str] = "tensorboard"
    Config: ClassVar[type] = TensorBoardLogStoreConfig

    def __init__(self, *, log_dir: str, flush_secs: int = 30) -> None:
        try:
            writers = importlib.import_module("tensorboardX")
        except ImportError as error:
            raise ImportError(f"log store tensorboard needs `pip install 'stepspan[tensorboard]'`: {error}") from error
        self.log_dir = log_dir
        self._writer: Any = writers.SummaryWriter(log_dir, flush_secs=flush_secs)
        self._close = weakref.finalize(self, self._writer.close)

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """A scalar."""
        self._open().add_scalar(key, value, global_step=step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """A scalar per key."""
        writer = self._open()
        for key, value in metrics.items():
            writer.add_scalar(key, value, global_step=step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """A text."""
        self._open().add_text("hparams", str(params))

    def log_artifact(self, name: str, path: str, *, kind: str = "file") -> None:
        """A text."""
        self._open().add_text(f"artifact/{name}", f"[{kind}] {path}")

    def close(self) -> None:
        """Write the file out. Later calls do nothing."""
        self._close()

    def _open(self) -> Any:
        if not self._close.alive:
            raise RuntimeError(f"the log store in {self.log_dir} is closed")
        return self._writer
