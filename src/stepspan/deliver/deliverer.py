"""All signals of some destinations, a thread for each, so that one that hangs stops nobody else."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stepspan.deliver.health import TIMEOUT, Health
from stepspan.deliver.scheduler import Scheduler
from stepspan.deliver.task import Options
from stepspan.exporters import Exporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.layout import SessionPath

log = logging.getLogger("stepspan.deliver")

POLL = 0.1
SILENCE = 30.0
MOST_FILES = 1 << 20


class Deliverer:
    """Delivers what `find` lists to `exporters` until told to stop, or until `done`.

    `pace` is called with the CPU seconds of each round, for a thread that shares its process with training. `health` is
    the host in whose name every OTLP destination that takes metrics is told how the delivery goes; None: it is not.
    """

    def __init__(
        self,
        exporters: Sequence[Exporter],
        find: Callable[[], Iterable[SessionPath]],
        options: Options,
        *,
        pace: Callable[[float], None] | None = None,
        health: str | None = None,
    ) -> None:
        self.shippers = [Scheduler(signal, e, find, options) for e in exporters for signal in e.signals]
        self._exporters = exporters
        self._health = [
            Health(e, [s for s in self.shippers if s.exporter is e], health, options)
            for e in exporters
            if health is not None and isinstance(e, OtlpExporter) and "metrics" in e.signals
        ]
        self._pace = pace
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._ship, args=(s,), name=f"stepspan-{s.exporter.destination}-{s.signal}", daemon=True
            )
            for s in self.shippers
        ]

    def start(self) -> None:
        """Begin delivering, on threads."""
        for thread in self._threads:
            thread.start()
        for health in self._health:
            health.start()

    def stop(self, timeout: float = 15.0) -> None:
        """Stop after the requests that are under way; a request that hangs is left behind after `timeout` seconds."""
        self._stop.set()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        last = time.monotonic() + TIMEOUT
        for health in self._health:
            health.stop(max(0.0, last - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            for exporter in self._exporters:
                exporter.close()

    def wait(self, done: Callable[[Deliverer], bool], tick: Callable[[], None] = lambda: None) -> bool:
        """Wait until `done(self)` or `interrupt()`, and say which; `tick` is called about ten times a second."""
        while not self._stop.wait(POLL):
            if done(self):
                return True
            tick()
        return False

    def knows(self, session: Path) -> bool:
        """Whether every signal has met this session."""
        return all(session in shipper.met for shipper in self.shippers)

    def interrupt(self) -> None:
        """End `wait` at once; may be called from a signal handler."""
        self._stop.set()

    def _ship(self, shipper: Scheduler) -> None:
        try:
            while not self._stop.is_set():
                before = time.thread_time()
                moved = shipper.round()
                if self._pace:
                    self._pace(time.thread_time() - before)
                if not moved:
                    self._stop.wait(POLL)
        except Exception:  # a defect of ours in one signal: say it where people look, and leave the others alone
            log.exception("delivery of %s to %s has stopped", shipper.signal, shipper.exporter.destination)
            shipper.broken = True
        finally:
            shipper.close()


def prepare_process() -> None:
    """In a process that only delivers.

    Events come and go by the thousand and hold no cycles, so look for those rarely: Python's own pace costs a third of
    the time of the mapping. And each live session holds nine files open, so allow as many as this user may.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def caught_up(deliverer: Deliverer) -> bool:
    """For `stepspan sync`: every session is at its end, held, or has met silence for too long."""
    return all(s.broken or (s.rounds > 0 and (s.idle or s.silent_for() >= SILENCE)) for s in deliverer.shippers)


def run_is_over(deliverer: Deliverer) -> bool:
    """For the deliverer that a run starts: all is delivered or held, or nobody lives and nobody answers."""
    return all(s.broken or (s.rounds > 0 and (s.over or s.abandoned(SILENCE))) for s in deliverer.shippers)
