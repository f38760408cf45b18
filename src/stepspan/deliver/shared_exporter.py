"""An exporter object that several runs of a process were given: trials with one `SdkExporter`, say.

What an exporter is promised holds for all of them together: each signal is used by one thread at a time, and it is
closed once, when the last of them has ended.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Attributes, Record, Signal
from stepspan.otlp.outcome import Outcome

if TYPE_CHECKING:
    from stepspan.exporters import Exporter
    from stepspan.processors import Processor


class _Uses:
    """How many runs use an exporter, and the lock of each signal that it sends one at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.locks: defaultdict[Signal, threading.Lock] = defaultdict(threading.Lock)


class SharedExporter:
    """One run's use of an exporter, an exporter itself.

    Args:
        exporter: May be in use by other runs.

    """

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        with _lock:
            self._uses = _uses.setdefault(id(exporter), _Uses())
            self._uses.count += 1

    @property
    def destination(self) -> str:
        """Where the exporter sends to."""
        return self._exporter.destination

    @property
    def address(self) -> str:
        """The name that the destination has where none is given."""
        return getattr(self._exporter, "address", self.destination)

    @property
    def signals(self) -> Sequence[Signal]:
        """The signals that the exporter sends."""
        return self._exporter.signals

    @property
    def processors(self) -> Sequence[Processor]:
        """What changes or drops events for the exporter alone."""
        return self._exporter.processors

    @property
    def mapping_options(self) -> MappingOptions:
        """What the exporter wants of the mapping."""
        options: MappingOptions = getattr(self._exporter, "mapping_options", DEFAULT_OPTIONS)
        return options

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """Send records once, when no other run sends any of this signal. Arguments and result are the exporter's."""
        with self._uses.locks[signal]:
            return self._exporter.export(signal, resource, records)

    def has_new_credentials(self, signal: Signal) -> bool:
        """Whether the exporter would send with other credentials now; most have none that are known."""
        check = getattr(self._exporter, "has_new_credentials", None)
        return check is not None and bool(check(signal))

    def close(self) -> None:
        """Close the exporter, if no other run uses it."""
        with _lock:
            self._uses.count -= 1
            is_last = self._uses.count == 0
            if is_last:
                _uses.pop(id(self._exporter), None)
        if is_last:
            self._exporter.close()


_lock = threading.Lock()
_uses: dict[int, _Uses] = {}
"""`id` of an exporter that is in use -> by how many runs."""


def _after_fork_in_child() -> None:
    global _lock, _uses
    _lock, _uses = threading.Lock(), {}  # the parent's runs are its own to deliver


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
