"""`stepspan sync`: the deliverer, started by hand."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stepspan.compat.stormlog.sink import SEGMENTS
from stepspan.config import load
from stepspan.deliver.deliverer import SILENCE_LIMIT_S, Deliverer, caught_up, interrupt_on_signal, prepare_process
from stepspan.deliver.ledgers import cursors, first_pending_time, session_ledger
from stepspan.deliver.lock import DeliveryLock
from stepspan.deliver.options import Options
from stepspan.errors import ConfigError, JournalError
from stepspan.exporters.otlp import OtlpExporter
from stepspan.identity import host_facts
from stepspan.journal.cursor import Position
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.journal.reader import JournalReader
from stepspan.values import format_seconds

if TYPE_CHECKING:
    from typing_extensions import Self

LOCK_PATIENCE = SILENCE_LIMIT_S + 5.0
IMPORT_EVERY = 1.0
REPORT_EVERY = 5.0  # seconds between lines where there is no terminal


class Sync:
    """One call of `stepspan sync`. Raises `ConfigError` on wrong arguments."""

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        endpoint: str | None,
        protocol: str | None,
        this_host: bool,
        destination: str | None,
        state_directory: Path | None,
        dead_after: float,
    ) -> None:
        for path in paths:
            if not path.is_dir():
                raise ConfigError("PATH", str(path), "not a directory: name a journal, a job or a session")
        settings = load({"endpoint": endpoint, "protocol": protocol}, os.environ)
        self._imported = settings.directory
        """Where the journals of foreign sinks go."""
        self._sinks = [path for path in paths if any(path.glob(SEGMENTS))]
        journals = [path for path in paths if path not in self._sinks]
        if self._sinks:
            self._imported.mkdir(mode=0o700, parents=True, exist_ok=True)
            journals.append(self._imported)
        self._paths = [path.absolute() for path in dict.fromkeys(journals)]
        facts = host_facts()
        self._host = facts.host
        self._only_host = facts.host if this_host else None
        self._exporter = OtlpExporter(settings.endpoint, protocol=settings.protocol, destination=destination)
        self._options = Options(boot_id=facts.boot_id, dead_after=dead_after, state_directory=state_directory)

    def run(self, *, follow: bool) -> int:
        """Deliver. The exit code."""
        self._need_endpoint()
        if self._sinks and not follow:
            raise ConfigError("PATH", str(self._sinks[0]), "a stormlog sink: `stepspan import` it, or --follow it")
        if not follow and not any(True for path in self._paths for _ in find_sessions(path)):
            raise ConfigError("PATH", ", ".join(map(str, self._paths)), "no journal at or below it")
        with self._locks(), self._imports():
            before = self._totals()
            health = self._host if follow and load({}, os.environ).health else None
            deliverer = Deliverer([self._exporter], self._sessions, self._options, health=health)
            interrupt_on_signal(deliverer)
            prepare_process()
            deliverer.start()
            total = None if follow else self._journaled() * len(deliverer.schedulers)
            with Progress(deliverer, total, verb="delivering") as progress:
                over = deliverer.wait((lambda _: False) if follow else caught_up, progress.tick)
            deliverer.stop()
            unreadable = {
                f"{p}: {why}" for scheduler in deliverer.schedulers for p, why in scheduler.unreadable.items()
            }
            unreadable |= {f"{s.signal}: stopped by a defect, see above" for s in deliverer.schedulers if s.broken}
            waiting = self._summary(before, unreadable)
            return 1 if unreadable or waiting["stuck"] or (waiting["lines"] and not over and not follow) else 0

    @contextmanager
    def _imports(self) -> Iterator[None]:
        """While foreign sinks grow, so do their journals."""
        from stepspan.compat.stormlog.reader import Follower

        followers = [Follower(sink, self._imported, boot_id=self._options.boot_id) for sink in self._sinks]
        over = threading.Event()

        def poll() -> None:
            for follower in followers:
                with suppress(OSError, ValueError):  # a sink in the middle of being written is read a second later
                    follower.poll()

        def go_on() -> None:
            while not over.wait(IMPORT_EVERY):
                poll()

        poll()  # before anybody could take an import that was cut short for dead
        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def resend(self) -> int:
        """Send again what was refused. The exit code."""
        from stepspan.deliver.dead_letters import resend

        self._need_endpoint()
        sent = kept = 0
        with self._locks():
            for session in self._sessions():
                taken, left = resend(self._home(session), self._exporter)
                sent, kept = sent + taken, kept + left
        print(f"sent again: {sent} taken, {kept} refused again or not answered")
        return 1 if kept else 0

    def dry_run(self) -> int:
        """Say what waits. The exit code."""
        oldest: float | None = None
        now = time.time()
        for session in self._sessions():
            states = cursors(self._home(session)).get(self._exporter.destination, {})
            ledger = session_ledger(session, self._options.state_directory and self._home(session))
            for signal in self._exporter.signals or ("all signals",):
                position = states[signal].position if signal in states else Position()
                waiting = max(0, ledger["journaled"] - position.seq)
                if not waiting:
                    continue
                try:
                    with closing(JournalReader(session)):  # which raises where nothing of it can be read
                        since = first_pending_time(session, position) / 1e9
                except (OSError, JournalError) as error:
                    print(f"{session.path}  {signal}: cannot be read: {error}")
                    continue
                age = max(0.0, now - (since or now))
                oldest = max(age, oldest or 0.0)
                print(f"{session.path}  {signal}: {waiting} lines wait, the oldest for {format_seconds(age)}")
        print("nothing waits" if oldest is None else f"the oldest pending point is {format_seconds(oldest)} old")
        return 0

    def _need_endpoint(self) -> None:
        if not self._exporter.signals:
            raise ConfigError("--endpoint", None, "nowhere to send: give it, or OTEL_EXPORTER_OTLP_ENDPOINT")

    def _sessions(self) -> Iterable[SessionPath]:
        for path in self._paths:
            yield from find_sessions(path, host=self._only_host)

    def _home(self, session: SessionPath) -> Path:
        """Where a session's cursors lie."""
        state = self._options.state_directory
        return state / session.path.name if state else session.path

    @contextmanager
    def _locks(self) -> Iterator[None]:
        """The right to deliver to this destination, for every journal directory that is touched."""
        state = self._options.state_directory
        roots = {state} if state else {_root(session) for session in self._sessions()}
        locks = [DeliveryLock(root, self._host, self._exporter.destination) for root in sorted(roots)]
        try:
            for lock in locks:
                self._take(lock)
            yield
        finally:
            for lock in locks:
                lock.release()

    def _take(self, lock: DeliveryLock) -> None:
        deadline, told = time.monotonic() + LOCK_PATIENCE, False
        while not self._taken(lock):
            if time.monotonic() > deadline:
                raise JournalError("another deliverer is still sending to this destination: let it, or end it first")
            if not told:
                print("another deliverer is sending to this destination: waiting for it to finish", file=sys.stderr)
                told = True
            time.sleep(0.2)

    @staticmethod
    def _taken(lock: DeliveryLock) -> bool:
        try:
            return lock.acquire()
        except OSError as error:
            raise JournalError(f"no place for a lock: name a --state-directory for the cursors: {error}") from error

    def _journaled(self) -> int:
        return sum(session_ledger(session)["journaled"] for session in self._sessions())

    def _totals(self) -> Counter[str]:
        totals: Counter[str] = Counter()
        for session in self._sessions():
            ledger = session_ledger(session, self._options.state_directory and self._home(session))
            states = ledger["destinations"].get(self._exporter.destination, {})
            for signal in self._exporter.signals:
                if signal not in states:  # nobody has begun
                    totals["pending"] += ledger["journaled"]
                    continue
                state = states[signal]
                totals[f"{signal} delivered"] += state["delivered"]
                totals["rejected"] += state["rejected"]
                totals["pending"] += state["pending"]
                totals[f"{signal}: {state['state']}: {state['message']}"] += state["state"] in {"hold", "retry"}
        return totals

    def _summary(self, before: Counter[str], unreadable: set[str]) -> dict[str, int]:
        """Say what was done, and how much waits: `lines`, of them signals that are `stuck`."""
        after = self._totals()
        sent = [f"{after[f'{s} delivered'] - before[f'{s} delivered']:,} {s}" for s in self._exporter.signals]
        rejected = after["rejected"] - before["rejected"]
        print(f"delivered {', '.join(sent)}; rejected {rejected:,}; {after['pending']:,} lines wait")
        stuck = [key for key, count in after.items() if count and (": hold: " in key or ": retry: " in key)]
        for line in (*stuck, *sorted(unreadable)):
            print(line)
        return {"lines": after["pending"], "stuck": len(stuck)}


def _root(session: SessionPath) -> Path:
    """Where the deliverer of its run keeps the lock; a session that lies too high for any run keeps its own."""
    return session.path.parents[2] if len(session.path.parents) > 2 else session.path


class Progress:
    """How far a deliverer is: a bar on a terminal, a line now and then in a log. `total`: lines; None: no end."""

    def __init__(self, deliverer: Deliverer, total: int | None, *, verb: str, stream: TextIO | None = None) -> None:
        self._deliverer = deliverer
        self._total = total
        self._verb = verb
        self._stream = stream or sys.stdout
        self._seen: dict[tuple[str, Path], int] = {}
        self._reported = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("lines"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=self._stream))

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self

    def tick(self) -> None:
        """Show where delivery stands now."""
        for scheduler in self._deliverer.schedulers:
            for path, task in list(scheduler.tasks.items()):
                self._seen[scheduler.signal, path] = task.position.seq
        done = sum(self._seen.values())
        if self._bar:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._reported >= REPORT_EVERY:
            self._reported = time.monotonic()
            of = "" if self._total is None else f" of {self._total:,}"
            print(f"{self._verb}: {done:,}{of} lines", file=self._stream, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar:
            if self._total is not None and caught_up(self._deliverer):
                self._bar.update(self._task, completed=self._total)
            self._bar.stop()
