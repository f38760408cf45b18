"""The `jsonl` store: three files in a directory, as evsys writes them.

- `metrics.jsonl`: a row `{ts, step, split, metrics}` per call; `ts` in Unix seconds. Appended, never rewritten; what a
  full disk refuses is written once it takes more, at the latest by `close` or at exit.
- `hyperparams.json`: one object, merged (its own level only) with each call.
- `artifacts.json`: a list of `{name, path, kind, ts}`.

The latter two are replaced as a whole, so a crash leaves the old or the new one; a corrupt one counts as empty.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from stepspan.compat.evsys.registry import StoreConfig, register_log_store
from stepspan.compat.jsonl import content, dumps
from stepspan.compat.lines import Lines

log = logging.getLogger("stepspan")


class JSONLLogStoreConfig(StoreConfig):
    """Where the files go, and what they are called."""

    log_dir: str
    metrics_file: str = "metrics.jsonl"
    hyperparams_file: str = "hyperparams.json"
    artifacts_file: str = "artifacts.json"


@register_log_store("jsonl")
class JSONLLogStore:
    """Metrics, hyperparameters and artifacts as JSON files in `log_dir`, which is made if need be.

    After `close` each write raises RuntimeError. A file that cannot be written is logged once and costs the call, not
    the training. The constructor raises OSError where the directory cannot be made.
    """

    name: ClassVar[str] = "jsonl"
    Config: ClassVar[type] = JSONLLogStoreConfig

    def __init__(
        self,
        *,
        log_dir: str | Path,
        metrics_file: str = "metrics.jsonl",
        hyperparams_file: str = "hyperparams.json",
        artifacts_file: str = "artifacts.json",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.log_dir = Path(log_dir).expanduser().absolute()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = Lines(self.log_dir / metrics_file)
        self._hyperparams = self.log_dir / hyperparams_file
        self._artifacts = self.log_dir / artifacts_file
        self._clock = clock
        self._lock = threading.RLock()
        self._told = False
        self._closed = False
        weakref.finalize(self, self._metrics.flush)

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """A row of one metric."""
        self.log_metrics({key: value}, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """A row."""
        self._refuse_late()
        row = {"ts": self._clock(), "step": step, "split": split, "metrics": dict(metrics)}
        self._metrics.add(f"{dumps(row)}\n".encode())
        self._metrics.flush()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Merge into the file."""
        self._refuse_late()
        self._rewrite(self._hyperparams, lambda: {**content(self._hyperparams, dict), **params})

    def log_artifact(self, name: str, path: str | os.PathLike[str], *, kind: str = "file") -> None:
        """Add to the list."""
        self._refuse_late()
        entry = {"name": name, "path": os.fspath(path), "kind": kind, "ts": self._clock()}
        self._rewrite(self._artifacts, lambda: [*content(self._artifacts, list), entry])

    def close(self) -> None:
        """Take no more."""
        self._closed = True
        self._metrics.flush()

    def _refuse_late(self) -> None:
        if self._closed:
            raise RuntimeError(f"the log store in {self.log_dir} is closed")

    def _rewrite(self, path: Path, value: Callable[[], Any]) -> None:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with self._lock:
            try:
                draft.write_text(dumps(value(), indent=2), encoding="utf-8")
                draft.replace(path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    draft.unlink()
                if not self._told:
                    self._told = True
                    log.warning("%s cannot be written: %s (told once)", path, error)
