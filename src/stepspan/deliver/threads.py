"""A run's delivery by threads of its own process: where exporters are objects, or the setting says so.

A forked worker has none of the threads: those of its parent deliver its session, for as long as it lives and the parent
does. Once the parent's run has ended and nobody has the worker's cursors open, the worker delivers its own session, to
the exporters that can be made anew: OTLP.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stepspan.deliver.begun import is_new, read_begun
from stepspan.deliver.deliverer import Deliverer
from stepspan.deliver.delivery import AT_EXIT, UNDELIVERED, Delivery, is_worker_of, log_warning, with_ended_workers
from stepspan.deliver.lock import UNKNOWN, Outlook
from stepspan.deliver.options import Options
from stepspan.deliver.routes import Route
from stepspan.deliver.shared_exporter import SharedExporter
from stepspan.deliver.undelivered import receiver_text, sync_command
from stepspan.exporters import Exporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import cursor_is_open, cursor_name
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.journal.liveness import is_alive_here, lock_is_held

log = logging.getLogger("stepspan")

WORKER_INTERVAL_S = 0.25
"""Between looks whether a forked worker of a run that has ended still lives."""


class ThreadDelivery(Delivery):
    """Exporters that are objects, on threads of this process that take at most a tenth of the time.

    Args:
        exporters: Where to deliver to.
        session: Gives the directory of the run's session, once there is one.
        boot_id: The boot of this host.
        conclude: Takes the line that says, as the run ends, what waits.
        is_worker: Whether only the session itself is delivered: of a forked worker, after its parent.

    """

    BATCH_BYTES = 16 << 10
    CPU_SHARE = 0.1
    STOP_TIMEOUT_S = 0.3
    _try_timeout_s = 0.35

    def __init__(
        self,
        exporters: Sequence[Exporter],
        session: Callable[[], Path | None],
        boot_id: str,
        conclude: Callable[[str], None] = log_warning,
        *,
        is_worker: bool = False,
    ) -> None:
        super().__init__([(e.destination, signal) for e in exporters for signal in e.signals], conclude=conclude)
        self._arguments = exporters, session, boot_id, conclude
        self._session, self._is_worker = session, is_worker
        self._addresses = {e.destination: getattr(e, "address", e.destination) for e in exporters}
        self._new: dict[tuple[str, Path], bool] = {}
        self._closing = threading.Event()
        self._cannot_start = False
        options = Options(boot_id=boot_id, batch_bytes=self.BATCH_BYTES)
        shared = [SharedExporter(exporter) for exporter in exporters]
        self._deliverer = Deliverer(shared, self._sessions, options, pace=self._pace)

    def start(self) -> None:
        """Start a thread for each destination and signal."""
        try:
            self._deliverer.start()
        except RuntimeError as error:  # no more threads: the run still has its journal
            self._cannot_start = True
            log.warning("stepspan: delivery cannot be started: %s", error)

    def pause(self, session: Path | None, timeout: float) -> None:
        """As `close`: a process may train often, and threads that nobody needs would add up."""
        self._deliver_rest(session, timeout)
        self._deliverer.stop(timeout=self.STOP_TIMEOUT_S)

    def resume(self) -> Delivery:
        """Other threads, with the same exporters."""
        fresh = ThreadDelivery(*self._arguments)
        fresh.start()
        return fresh

    def close(self, session: Path | None, timeout: float) -> None:
        """As the base, at full speed; then the threads end: with the last of the forked workers that still live."""
        self._deliver_rest(session, timeout)
        if session is not None and live_workers(session):
            self._await_workers(session, timeout)
        else:
            self._deliverer.stop(timeout=self.STOP_TIMEOUT_S)
        self._conclude_run(session)

    def _conclude_run(self, session: Path | None) -> None:
        waiting = next((each for each in with_ended_workers(session) if not self._is_delivered(each)), None)
        if waiting is not None:
            self.report_undelivered(waiting)
        else:
            UNDELIVERED.forget(destination for destination, _ in self.targets)

    def _deliver_rest(self, session: Path | None, timeout: float) -> None:
        """Wait for what has ended of a run."""
        self._closing.set()
        deadline = time.monotonic() + timeout
        for each in with_ended_workers(session):
            super().close(each, max(0.0, deadline - time.monotonic()))

    def _await_workers(self, session: Path, timeout: float) -> None:
        """Go on until no worker lives, or this process ends: a worker may outlive its run."""
        is_ending, is_over = threading.Event(), threading.Event()
        self._closing = threading.Event()

        def deliver() -> None:
            while live_workers(session) and not is_ending.wait(WORKER_INTERVAL_S):
                pass
            try:
                self._deliver_rest(session, timeout)
                self._deliverer.stop(timeout=self.STOP_TIMEOUT_S)
                self._conclude_run(session)
            finally:
                is_over.set()

        def end() -> None:
            is_ending.set()
            is_over.wait(timeout + self.STOP_TIMEOUT_S)

        AT_EXIT.append(end)
        try:
            threading.Thread(target=deliver, name="stepspan-last-workers", daemon=True).start()
        except RuntimeError:  # no more threads, or the interpreter ends
            is_over.set()
            self._deliverer.stop(timeout=self.STOP_TIMEOUT_S)

    def _urls(self) -> Mapping[tuple[str, str], str]:
        return _urls(self._arguments[0])

    def _remedy(self, session: SessionPath, destination: str) -> tuple[str, str]:
        return _remedy(self._arguments[0], session, destination)

    def after_fork(self) -> Delivery:
        """As the base: the threads are the parent's, and so are their cursors."""
        self._deliverer.after_fork()
        return WorkerDelivery(*self._arguments, parent=self._session())

    def _outlook(self, destination: str) -> Outlook:
        return UNKNOWN if self._cannot_start else self._deliverer.outlook(destination)

    def _ring(self) -> float:
        now = time.time()
        for destination in {destination for destination, _ in self.targets}:
            self._deliverer.wake(destination, now)
        return now

    def _sessions(self, destination: str) -> list[SessionPath]:
        """Those of this rank of the job that were written on this host: of this run, its workers, earlier attempts.

        Without those that were begun for other destinations, and would all be sent anew.
        """
        path = self._session()
        own = SessionPath.of(path) if path else None
        if path is None or own is None:
            return []
        if self._is_worker:
            return [own]
        of_rank = [session for session in find_sessions(path.parent) if session.rank == own.rank]
        return [session for session in of_rank if session.path == path or not self._is_new(session, destination)]

    def _is_new(self, session: SessionPath, destination: str) -> bool:
        key = destination, session.path
        if key not in self._new:
            begun = read_begun(session)
            route = Route(destination, address=self._addresses[destination])
            self._new[key] = begun is not None and begun.name_for(route) is None and is_new(session, begun, route)
        return self._new[key]

    def _pace(self, busy: float) -> None:
        self._closing.wait(busy * (1 / self.CPU_SHARE - 1))


def _urls(exporters: Sequence[Exporter]) -> dict[tuple[str, str], str]:
    endpoints = {e.destination: e.endpoints for e in exporters if isinstance(e, OtlpExporter)}
    return {(name, signal): each.display_url for name, of in endpoints.items() for signal, each in of.items()}


def _remedy(exporters: Sequence[Exporter], session: SessionPath, destination: str) -> tuple[str, str]:
    exporter = next(exporter for exporter in exporters if exporter.destination == destination)
    if isinstance(exporter, OtlpExporter):
        return receiver_text(exporter), sync_command(session, exporter, os.environ)
    name = f"{type(exporter).__name__} {destination!r}"
    return name, f"a later run of this job with that exporter, or `stepspan sync {session.path.parents[1]}`,"


def live_workers(session: Path) -> list[SessionPath]:
    """The sessions of forked workers of a run's process that are being written."""
    own = SessionPath.of(session)
    found = find_sessions(session.parent) if own is not None else ()
    return [each for each in found if own is not None and is_worker_of(each, own) and is_alive_here(each.path)]


class WorkerDelivery(Delivery):
    """A forked worker's: its parent's threads and, once these are gone, its own.

    Args:
        exporters: Of the parent's run.
        session: Gives the directory of the worker's session, once there is one.
        boot_id: The boot of this host.
        conclude: Takes the line that says, as the worker's run ends, what waits.
        parent: The directory of the parent's session.

    """

    def __init__(
        self,
        exporters: Sequence[Exporter],
        session: Callable[[], Path | None],
        boot_id: str,
        conclude: Callable[[str], None],
        *,
        parent: Path | None,
    ) -> None:
        super().__init__([(e.destination, signal) for e in exporters for signal in e.signals], conclude=conclude)
        self._arguments = exporters, session, boot_id, conclude
        self._session, self._parent = session, parent
        self._own: ThreadDelivery | None = None

    def watch(self) -> None:
        """Begin to deliver if nobody else does."""
        session = self._session()
        if self._own is not None or session is None or not self._is_left_alone(session):
            return
        exporters = [each.clone(math.inf) for each in self._arguments[0] if isinstance(each, OtlpExporter)]
        if exporters:
            self._own = ThreadDelivery(exporters, *self._arguments[1:], is_worker=True)
            self._own.start()

    def close(self, session: Path | None, timeout: float) -> None:
        """As the base, by whoever delivers."""
        self.watch()
        if self._own is not None:
            self._own.close(session, timeout)
            return
        super().close(session, timeout)
        if session is not None and not self._is_delivered(session) and self._is_left_alone(session):
            self.report_undelivered(session)

    def after_fork(self) -> Delivery:
        """As the base: for the child of a worker, too, the run's own process delivers."""
        if self._own is not None:
            return self._own.after_fork()
        return WorkerDelivery(*self._arguments, parent=self._parent)

    def _is_left_alone(self, session: Path) -> bool:
        """Whether the parent's run has ended, and nobody delivers the worker's session."""
        try:
            if self._parent is None or lock_is_held(self._parent):
                return False
        except OSError:  # it is gone, or there are no locks that would tell
            return False
        return not any(cursor_is_open(session / "cursors" / cursor_name(*target)) for target in self.targets)

    def _urls(self) -> Mapping[tuple[str, str], str]:
        return _urls(self._arguments[0])

    def _remedy(self, session: SessionPath, destination: str) -> tuple[str, str]:
        return _remedy(self._arguments[0], session, destination)

    def _ring(self) -> float:
        return self._own._ring() if self._own is not None else 0.0
