"""The JSONL exporter: says where and how a run keeps its journal (`stepspan.journal`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path

from stepspan.copying import SharedByCopies
from stepspan.journal.disk import Disk, Limits
from stepspan.journal.journal import Journal


class JsonlExporter(SharedByCopies):
    """Keeps the journal: JSON lines below `directory`, each on its way to the disk before the logging call returns.

    Args:
        directory: Where journals go. One that can't be written is replaced by shared memory, with a warning.
        limits: How much of the disk a session may take.
        clock: Gives the events' times, Unix ns.
        disk: The system calls; tests inject faults here.

    Raises:
        ConfigError: `directory` is, or lies below, something that is not a directory.

    """

    def __init__(
        self,
        directory: str | Path = "stepspan-runs",
        *,
        limits: Limits | None = None,
        clock: Callable[[], int] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._make_journal = partial(Journal, directory, limits=limits, clock=clock, disk=disk)
        self.journal = self._make_journal()
        self._claimed = threading.Lock()

    def for_run(self) -> JsonlExporter:
        """Give a run a journal of its own: this exporter's for the first one, one like it for each further run."""
        if self._claimed.acquire(blocking=False):
            return self
        another = copy(self)
        another.journal = self._make_journal()
        return another
