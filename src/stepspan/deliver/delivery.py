"""What a run holds of its delivery: nothing, a process of its own, or a thread."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepspan.deliver import ledgers
from stepspan.journal.cursor import CursorState
from stepspan.journal.layout import SessionPath, slug

if TYPE_CHECKING:
    from stepspan.deliver.deliverer import Deliverer
    from stepspan.exporters import Exporter
    from stepspan.exporters.otlp import OtlpExporter

log = logging.getLogger("stepspan")

PLACE = ".deliverers"  # below the journals: their locks and logs
POLL = 0.02
CHECK = 5.0  # seconds between looks at the deliverer's lock
LAST_CHECKS = 0.25  # the same while a run waits for its end to be delivered
ANSWERING = 5.0  # seconds since its last answer for which a receiver counts as there
LONGEST_PAUSE = 300.0  # seconds before a deliverer that dies without having done anything is started again
PATHS = frozenset(
    {
        *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"),
        *(
            f"OTEL_EXPORTER_OTLP_{signal}{what}"
            for signal in ("", "TRACES_", "METRICS_", "LOGS_")
            for what in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
        ),
    }
)


class Delivery:
    """No delivery: the journal is all there is. The base of the others; `targets` are (destination, signal)."""

    GRACE = 0.0
    """Seconds for which `close` believes in a receiver that has not answered yet."""

    def __init__(self, targets: Iterable[tuple[str, str]] = ()) -> None:
        self.targets = frozenset(targets)

    def watch(self) -> None:
        """Called about once a second by the thread that logs."""

    def wait(self, session: Path, seq: int, timeout: float) -> bool:
        """Wait until all targets have everything up to `seq`; whether they do."""
        return self._wait(session, lambda state: state.position.seq >= seq, timeout, only_while_answering=False)

    def _wait(
        self, session: Path, done: Callable[[CursorState], bool], timeout: float, *, only_while_answering: bool
    ) -> bool:
        deadline, patient = time.monotonic() + timeout, time.monotonic() + self.GRACE
        while True:
            states = self._states(session)
            waiting = [state for state in states if not done(state)]
            if not waiting and len(states) == len(self.targets):
                return True
            if time.monotonic() >= deadline:
                return False
            if only_while_answering and time.monotonic() >= patient:
                open_ones = waiting if len(states) == len(self.targets) else states
                answered = max((state.answered for state in open_ones if state.state != "hold"), default=0.0)
                if time.time() - answered > ANSWERING:
                    return False
            self.watch()  # a deliverer may die as the run ends, and then nobody else looks
            time.sleep(POLL)

    def close(self, session: Path | None, seq: int, timeout: float) -> None:
        """The run has ended: wait a little for a receiver that answers, until it has the end too."""
        if session is not None and self.targets:
            self._wait(session, lambda state: state.position.finished, timeout, only_while_answering=True)

    def after_fork(self) -> None:
        """In a forked child, which leaves all this to its parent."""

    def ledgers(self, session: Path) -> dict[str, Any]:
        """Destination -> signal -> ledger."""
        found = SessionPath.of(session)
        destinations: dict[str, Any] = ledgers.session_ledger(found)["destinations"] if found else {}
        return destinations

    def _states(self, session: Path) -> list[CursorState]:
        found = ledgers.cursors(session)
        return [found[d][s] for d, s in self.targets if s in found.get(d, {})]


class ProcessDelivery(Delivery):
    """A deliverer process for this host, started again by whoever finds its lock free."""

    check = CHECK
    patience = 30.0
    """Seconds of failing after which a person is told."""

    def __init__(
        self,
        directory: Path,
        host: str,
        exporters: Sequence[OtlpExporter],
        *,
        first: bool,
        health: bool,
        warn: Callable[[str, str], None],
        session: Callable[[], Path | None] = lambda: None,
    ) -> None:
        super().__init__([(e.destination, signal) for e in exporters for signal in e.signals])
        self._directory, self._host, self._exporters = directory, host, exporters
        self._health = health
        self._warn = warn
        self._session = session
        self._log = directory / PLACE / f"{slug(host)}.log"
        self._env = settled(os.environ)  # one that is started again later must not go elsewhere
        self._shown: dict[tuple[str, str], str] = {
            (e.destination, s): endpoint.display_url for e in exporters for s, endpoint in e.endpoints.items()
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._pause = self._again = 0.0
        self._failing: dict[tuple[str, str], float] = {}
        self._next = 0.0 if first else time.monotonic() + 2 * self.check

    def watch(self) -> None:
        """Start a deliverer where none is at work, and tell what a person has to put right."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self.check
        self._look(self._session(), now)
        try:
            self._start_where_free(now)
        except Exception as error:  # a run that can't start a process still has its journal
            self._warn("deliverer", f"no deliverer could be started: {error!r}; `stepspan sync` sends it later")

    def wait(self, session: Path, seq: int, timeout: float) -> bool:
        """As the base; starts the deliverer that nobody has started yet."""
        self._next = 0.0
        self.watch()
        return super().wait(session, seq, timeout)

    def close(self, session: Path | None, seq: int, timeout: float) -> None:
        """As the base; looks again and again whether a deliverer is at work, for nobody will after us."""
        self._next, self._again, self.check = 0.0, 0.0, LAST_CHECKS
        self.watch()
        super().close(session, seq, timeout)
        self._look(session, time.monotonic())
        if self._process is not None and self._process.poll() is None:
            self._process.returncode = 0  # it outlives us, and is nobody's zombie then

    def after_fork(self) -> None:
        """As the base: the deliverer is no child of this process."""
        if self._process is not None:
            self._process.returncode = 0

    def _look(self, session: Path | None, now: float) -> None:
        """Tell of a deliverer that died, and of signals that are held or keep failing, once each time it comes to that.

        Writes no event: it may be called while one is written.
        """
        found = {}
        with suppress(OSError):
            found = ledgers.cursors(session) if session is not None else {}
        status = self._process.poll() if self._process is not None else None
        if status is not None:
            self._process = None
        if status:
            worked = any(s.answered > self._began for signals in found.values() for s in signals.values())
            self._pause = 0.0 if worked else min(max(self.check, 2 * self._pause), LONGEST_PAUSE)
            self._again = now + self._pause
            self._warn("deliverer", f"the deliverer died (exit status {status}): {self._log} says why; {self._later()}")
        for target in self.targets:
            state = found.get(target[0], {}).get(target[1])
            if state is None or state.state not in {"retry", "hold"}:
                self._failing.pop(target, None)
                continue
            since = self._failing.setdefault(target, now)
            if state.state == "hold" or now - since >= self.patience:
                if since != float("inf"):
                    shown = f"{target[1]} to {self._shown[target]} (destination {target[0]})"
                    self._warn("delivery", f"{shown} cannot be delivered: {state.message}; {self._later()}")
                self._failing[target] = float("inf")

    def _later(self) -> str:
        where = self._directory
        return f"the journal keeps everything: see `stepspan status {where}`; `stepspan sync {where}` sends it later"

    def _start_where_free(self, now: float) -> None:
        from stepspan.deliver import process

        if self._process is not None or now < self._again:
            return
        free = []
        for exporter in self._exporters:
            lock = process.Lock(self._directory, self._host, exporter.destination)
            if lock.take():
                free.append(exporter)
                lock.release()
        if free:
            self._began = time.time()
            self._process = process.start(self._directory, self._host, free, health=self._health, env=self._env)


def settled(env: Mapping[str, str]) -> dict[str, str]:
    """A copy in which the paths of certificates are absolute: a deliverer works in another directory."""
    found = dict(env)
    with suppress(OSError):  # the working directory is gone
        for name in PATHS & found.keys():
            paths = found[name].strip().split(os.pathsep if name == "SSL_CERT_DIR" else "\0")
            found[name] = os.pathsep.join(os.path.abspath(path) if path else "" for path in paths)
    return found


class ThreadDelivery(Delivery):
    """Exporters that are objects, on threads of this process that take at most a tenth of the time."""

    BATCH = 16 << 10
    SHARE = 0.1
    GRACE = 0.4  # nothing outlives the process, so a short run would end before its first request

    def __init__(self, exporters: Sequence[Exporter], session: Callable[[], Path | None], boot_id: str) -> None:
        super().__init__([(e.destination, signal) for e in exporters for signal in e.signals])
        self._exporters, self._session, self._boot_id = exporters, session, boot_id
        self._deliverer: Deliverer | None = None
        self._closing = threading.Event()

    def watch(self) -> None:
        """Start the threads, once."""
        if self._deliverer is None:
            from stepspan.deliver.deliverer import Deliverer
            from stepspan.deliver.task import Options

            options = Options(boot_id=self._boot_id, batch=self.BATCH)
            self._deliverer = Deliverer(self._exporters, self._sessions, options, pace=self._pace)
            self._deliverer.start()

    def close(self, session: Path | None, seq: int, timeout: float) -> None:
        """As the base, at full speed; then the threads end."""
        self._closing.set()
        self.watch()
        super().close(session, seq, timeout)
        if self._deliverer is not None:
            self._deliverer.stop(timeout=0.4)

    def _sessions(self) -> list[SessionPath]:
        path = self._session()
        found = SessionPath.of(path) if path else None
        return [found] if found else []

    def _pace(self, busy: float) -> None:
        self._closing.wait(busy * (1 / self.SHARE - 1))
