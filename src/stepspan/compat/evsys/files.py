"""The `jsonl` store: three files in a directory, as evsys writes them.

- `metrics.jsonl`: a row `{ts, step, split, metrics}` per call; `ts` in Unix seconds. Only ever appended to; what a full
  disk refuses is written once it takes more, at the latest by `close` or at exit.
- `hyperparams.json`: one object, merged (its own level only) with each call.
- `artifacts.json`: a list of `{name, path, kind, ts}`.

The latter two are replaced as a whole, so a crash leaves the old or the new one; a corrupt one counts as empty. Writers
of several processes may append to `metrics.jsonl`, but of two that replace a file at once the last one wins.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from stepspan.compat.evsys.registry import StoreConfig, register_log_store
from stepspan.compat.row_writer import RowWriter, to_json
from stepspan.compat.rows import read_json
from stepspan.copying import SharedByCopies
from stepspan.journal.layout import replace_file

log = logging.getLogger("stepspan")


@register_log_store("jsonl")
class JSONLLogStore(SharedByCopies):
    """Metrics, hyperparameters and artifacts as JSON files, which `stepspan import` makes a journal of.

    The files are those of evsys's own `jsonl` store. Unlike that one, this one does not raise where a file cannot be
    written, but logs it once and goes on, and takes values that JSON cannot hold: as numbers where they are numbers
    (numpy scalars, 0-d tensors), and as text otherwise. After `close` each write raises RuntimeError.

    Args:
        log_dir: The directory, which is created if need be.
        metrics_file: The name of the file of metrics.
        hyperparams_file: The name of the file of hyperparameters.
        artifacts_file: The name of the file of artifacts.
        clock: Gives the Unix time in seconds.

    Raises:
        OSError: The directory cannot be created.

    """

    name: ClassVar[str] = "jsonl"

    class Config(StoreConfig):
        """The parameters of the `jsonl` store in YAML: where the files are, and what they are called."""

        log_dir: str
        metrics_file: str = "metrics.jsonl"
        hyperparams_file: str = "hyperparams.json"
        artifacts_file: str = "artifacts.json"

    def __init__(
        self,
        *,
        log_dir: str | Path,
        metrics_file: str = "metrics.jsonl",
        hyperparams_file: str = "hyperparams.json",
        artifacts_file: str = "artifacts.json",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.log_dir = Path(os.path.expanduser(log_dir)).absolute()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = RowWriter(self.log_dir / metrics_file)
        self._hyperparams = self.log_dir / hyperparams_file
        self._artifacts = self.log_dir / artifacts_file
        self._clock = clock
        self._lock = threading.RLock()
        self._warned: set[tuple[str, int | None]] = set()
        """Names of files that could not be written, with the error's number: each was logged."""
        self._closed = False
        weakref.finalize(self, self._metrics.flush)

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """Append a row of one metric, with split "train"; the arguments are those of `log_metrics`."""
        self.log_metrics({key: value}, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """Append a row `{"ts": …, "step": step, "split": split, "metrics": metrics}`, and write it at once.

        Args:
            metrics: Names and values.
            step: The training step they belong to.
            split: The data they were measured on: "train", "val" or "test".

        Raises:
            RuntimeError: The store is closed.

        """
        self._check_open()
        self._metrics.add({"ts": self._clock(), "step": step, "split": split, "metrics": dict(metrics)})
        self._metrics.flush()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Merge hyperparameters into their file.

        Args:
            params: Names and values; a name that is there already gets the new value.

        Raises:
            RuntimeError: The store is closed.

        """
        self._check_open()
        self._replace(self._hyperparams, lambda: {**read_json(self._hyperparams, dict), **params})

    def log_artifact(self, name: str, path: str | os.PathLike[str], *, kind: str = "file") -> None:
        """Add `{"name": name, "path": path, "kind": kind, "ts": …}` to the list of artifacts.

        Args:
            name: What it is called.
            path: Where it is.
            kind: "file", "checkpoint" or your own.

        Raises:
            RuntimeError: The store is closed.

        """
        self._check_open()
        entry = {"name": name, "path": os.fspath(path), "kind": kind, "ts": self._clock()}
        self._replace(self._artifacts, lambda: [*read_json(self._artifacts, list), entry])

    def close(self) -> None:
        """Write the rows that wait, and refuse later calls."""
        self._closed = True
        self._metrics.flush()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the log store in {self.log_dir} is closed")

    def _replace(self, path: Path, value: Callable[[], Any]) -> None:
        with self._lock:
            try:
                target = path.parent.resolve() / path.name
                replace_file(target, to_json(value(), indent=2).encode(), mode=0o666)
            except OSError as error:
                if (path.name, error.errno) not in self._warned:
                    self._warned.add((path.name, error.errno))
                    log.warning("stepspan: %s cannot be written: %s (logged once)", path, error)
