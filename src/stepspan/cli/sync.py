"""`stepspan sync`: the deliverer, started by hand."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from stepspan.cli.delivering import deliver_until, delivery_failures, thinned_text
from stepspan.cli.options import require_directories, require_sessions
from stepspan.compat.stormlog.reader import Follower
from stepspan.compat.stormlog.sink import SEGMENTS
from stepspan.config import Settings, load
from stepspan.deliver.begun import Begun, read_begun
from stepspan.deliver.deliverer import SILENCE_LIMIT_S, Deliverer, caught_up
from stepspan.deliver.ledgers import cursors, first_pending_time, session_ledger, signal_ledger
from stepspan.deliver.lock import UNKNOWN, DeliveryLock
from stepspan.deliver.options import Options
from stepspan.deliver.routes import Route, route_of
from stepspan.deliver.sessions import SYNC, is_denied
from stepspan.errors import ConfigError, JournalError, StepspanError
from stepspan.exporters.otlp import OtlpExporter
from stepspan.identity import host_facts
from stepspan.journal.cursor import CursorState, Position
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.mapping.records import Signal
from stepspan.reading.sessions import SessionReader, state_path
from stepspan.values import format_seconds

T = TypeVar("T")

LOCK_TIMEOUT_S = SILENCE_LIMIT_S + 5.0
"""How long to wait for another deliverer, which gives up a silent receiver within this time."""
IMPORT_INTERVAL_S = 1.0
UNSENT_RECORDS = {
    "rejected": "rejected: they are in rejected.jsonl, `--rejected` sends them again",
    "partial": "rejected in part of a request: the receiver took the rest, and says not which",
    "left_out": "left out by rank (`--all-ranks` sends them)",
    "thinned": "thinned: logged faster than one a millisecond, for over 10 s",
    "filtered": "filtered: points of one millisecond of which the last went out, traces of steps beyond ten a second",
}
"""A ledger's count of records that do not go out -> what they are."""
UNSENT_LINES = {
    "damaged": "lines damaged in the journal",
    "pruned": "lines removed from the journal for want of disk space",
    "dropped": "lines that could not be written",
}
"""The same of lines, which each signal reads."""
NOT_BEGUN = CursorState(state="")
"""Of a signal whose delivery has not begun."""


class Sync:
    """One call of `stepspan sync`; the arguments are those of the command. Raises `ConfigError` on wrong ones."""

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
        all_ranks: bool = False,
    ) -> None:
        require_directories(paths)
        settings = load({"endpoint": endpoint, "protocol": protocol, "destination": destination}, os.environ)
        self._health = settings.health
        imported = settings.directory  # where the journals of stormlog sinks go
        self._sinks = [path for path in paths if any(path.glob(SEGMENTS))]
        journals = [path for path in paths if path not in self._sinks]
        if self._sinks:
            imported.mkdir(mode=0o700, parents=True, exist_ok=True)
            journals.append(imported)
        self._paths = [path.absolute() for path in dict.fromkeys(journals)]
        facts = host_facts()
        self._host = facts.host
        self._only_host = facts.host if this_host else None
        self._state_directory = state_directory
        self._refused: set[Path] = set()
        """The directories that this user may not list."""
        self._begun: dict[Path, Begun | None] = {}
        self._routes: dict[Path, Route] = {}
        self._left: set[Path] = set()
        """The sessions that their runs' own deliverers send, by another route than this one."""
        self._exporter = self._exporter_of(settings)
        if (
            destination is not None and self._exporter.is_named
        ):  # a person who names other cursors wants everything sent that these don't know
            self._exporter.address = self._exporter.destination
        self._options = Options(
            boot_id=facts.boot_id, dead_after=dead_after, state_directory=state_directory, all_ranks=all_ranks
        )
        self._send_interval = settings.send_interval
        self._followers = [Follower(sink, imported, boot_id=facts.boot_id) for sink in self._sinks]
        self._next_import = 0.0
        """On the monotonic clock."""

    def run(self, *, follow: bool) -> int:
        """Deliver what is pending, and with `follow` what is written until a signal comes. The exit code."""
        self._require_endpoint()
        if self._sinks and not follow:
            raise ConfigError("PATH", str(self._sinks[0]), "a stormlog sink: `stepspan import` it, or --follow it")
        if not follow:
            require_sessions(*self._paths)
        with self._locks():
            self._poll_sinks()  # before an import that was cut short is taken for dead
            before = self._totals()
            health = self._host if follow and self._health else None
            options = replace(self._options, send_interval=self._send_interval if follow else 0.0)
            other_routes = self._count_other_routes()
            deliverer = Deliverer([self._exporter], lambda _: self._own_sessions(), options, health=health)
            lines = None if follow else sum(self._ledger(session)["journaled"] for session in self._sessions())
            complete = deliver_until(
                self._poll_sinks if follow else caught_up, deliverer, lines=lines, verb="delivering"
            )
            after = self._totals()
        now = after - before  # never below 0: a cursor may have begun anew
        sent = [f"{now[f'{signal} delivered']:,} {signal}" for signal in self._exporter.signals]
        rest = f"; rejected {now['rejected']:,}{thinned_text(now['thinned'])}; {after['pending']:,} lines wait"
        print(f"delivered {', '.join(sent)}{rest}")
        if other_routes:
            print(
                f"begun with other credentials or at another address, and sent as given here: {other_routes} sessions"
            )
        if unsent := self._unsent(after):
            print(f"did not go out, of these journals in all: {'; '.join(unsent)}")
        problems = self._failing()
        problems += delivery_failures(deliverer)
        problems += self._left_to_others()
        problems += [f"{path}: passed over: this user may not read it" for path in self._passed_over()]
        for fault, signals in self._exporter.faults.items():
            problems += [f"{signal}: nothing is sent: {fault}" for signal in signals if fault not in str(problems)]
        for problem in problems:
            print(problem)
        if self._only_host:
            others = sum(len(list(find_sessions(path))) for path in self._paths) - len(list(self._sessions()))
            if others:
                print(f"sessions of other hosts, left alone (--this-host): {others}")
        return 1 if problems or (after["pending"] and not complete and not follow) else 0

    def resend(self) -> int:
        """Send the dead letters again. The exit code."""
        from stepspan.deliver.dead_letters import resend

        self._require_endpoint()
        accepted = kept = 0
        with self._locks():
            for session in self._own_sessions():
                counts = resend(state_path(session, self._state_directory), self._exporter)
                accepted, kept = accepted + counts[0], kept + counts[1]
        print(f"sent again: {accepted} accepted, {kept} rejected again or not answered")
        return 1 if kept else 0

    def dry_run(self) -> int:
        """Print what is pending and how old it is. The exit code."""
        ages: list[float] = []
        now = time.time()
        for session in self._sessions():
            states = self._of_destination(cursors(state_path(session, self._state_directory)))
            journaled = self._ledger(session)["journaled"]
            for signal in self._exporter.signals or ("all signals",):
                position = states[signal].position if signal in states else Position()
                if journaled <= position.seq:
                    continue
                try:
                    with SessionReader(session):  # raises if nothing of it can be read
                        since = first_pending_time(session, position) / 1e9
                except (OSError, JournalError) as error:
                    print(f"{session.path}  {signal}: cannot be read: {error}")
                    continue
                ages.append(max(0.0, now - (since or now)))
                pending = journaled - position.seq
                print(f"{session.path}  {signal}: {pending} lines wait, the oldest for {format_seconds(ages[-1])}")
        print(f"the oldest pending point is {format_seconds(max(ages))} old" if ages else "nothing waits")
        for path in self._passed_over():
            print(f"{path}: passed over: this user may not read it")
        return 0

    def _require_endpoint(self) -> None:
        if not self._exporter.signals:
            raise ConfigError("--endpoint", None, "nowhere to send: give it, or OTEL_EXPORTER_OTLP_ENDPOINT")
        for text in (*self._exporter.ignored, *self._exporter.warnings):
            print(f"stepspan: {text}", file=sys.stderr)
        faults = self._exporter.faults
        if sum(map(len, faults.values())) == len(self._exporter.signals):
            raise StepspanError(f"nothing can be sent: {'; '.join(faults)}")

    def _exporter_of(self, settings: Settings) -> OtlpExporter:
        """The receiver; a name that runs have given its address is its name here, too: cursors have it."""

        def named(destination: str | None) -> OtlpExporter:
            return OtlpExporter(
                settings.endpoint,
                protocol=settings.protocol,
                headers_file=settings.headers_file,
                destination=destination,
            )

        exporter = named(settings.destination)
        if exporter.is_named or not exporter.signals:
            return exporter
        names = [
            (begun.started, name)
            for session in self._sessions()
            if (begun := self._begun_of(session))
            for name in begun.addresses
            if begun.addresses[name] == exporter.address != name
        ]
        if not names:
            return exporter
        name = max(names)[1]
        print(f"stepspan: runs call this receiver {name}: going on where they were", file=sys.stderr)
        return named(name)

    def _sessions(self) -> Iterator[SessionPath]:
        for path in self._paths:
            yield from find_sessions(path, host=self._only_host, refused=self._refused.add)

    def _own_sessions(self) -> Iterator[SessionPath]:
        """The sessions that are sent here: not those that a deliverer sends with credentials of its own."""
        at_work = {lock: DeliveryLock(*lock).is_taken() for lock in self._other_locks()}
        for session in self._sessions():
            lock = self._lock_of(session) if at_work else None
            if lock is not None and at_work.get(lock) and not is_denied(session, self._name_of(session)):
                self._left.add(session.path)
            else:
                self._left.discard(session.path)
                yield session

    def _other_locks(self) -> set[tuple[Path, str, str]]:
        """The directory, host and name of the lock of each other route by which a session was begun."""
        locks = {(session, self._lock_of(session)) for session in self._sessions()}
        return {lock for session, lock in locks if lock and lock[2] != self._route(self._root(session)).lock_name}

    def _lock_of(self, session: SessionPath) -> tuple[Path, str, str] | None:
        """Of the route by which a session was begun for this destination; None: it was not."""
        begun, name = self._begun_of(session), self._name_of(session)
        if begun is None or not name:
            return None
        return self._root(session), session.path.parent.name, begun.lock_names.get(name, name)

    def _name_of(self, session: SessionPath) -> str:
        """What this destination was called as a session began; "": it was not begun for it."""
        begun = self._begun_of(session)
        return (begun and begun.name_for(self._route(self._root(session)))) or ""

    def _route(self, root: Path) -> Route:
        if root not in self._routes:
            self._routes[root] = route_of(self._exporter, root)
        return self._routes[root]

    def _begun_of(self, session: SessionPath) -> Begun | None:
        if session.path not in self._begun:
            self._begun[session.path] = read_begun(session)
        return self._begun[session.path]

    def _count_other_routes(self) -> int:
        """How many sessions with something to send were begun by another route to this destination."""
        count = 0
        for session in self._own_sessions():
            begun = self._begun_of(session)
            if begun is not None and not begun.goes_by(self._route(self._root(session))):
                states = self._of_destination(self._ledger(session)["destinations"])
                count += not all(signal in states and states[signal]["finished"] for signal in self._exporter.signals)
        return count

    def _left_to_others(self) -> list[str]:
        """A line on the sessions that others send, if something of them waits."""
        lines = sum(
            max((state["pending"] for state in self._states_of(session).values()), default=0)
            for session in self._sessions()
            if session.path in self._left
        )
        if not lines:
            return []
        return [f"left to the deliverers of their runs, which have other credentials: {len(self._left)} sessions"]

    def _of_destination(self, by_destination: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
        """By signal, what there is of the destination, or of its address where that has got the name here."""
        names = (self._exporter.address, self._exporter.destination)
        return {signal: found for name in names for signal, found in by_destination.get(name, {}).items()}

    def _passed_over(self) -> list[Path]:
        return sorted(path for path in self._refused if path.parent not in self._refused)

    def _ledger(self, session: SessionPath) -> dict[str, Any]:
        return session_ledger(session, state_path(session, self._state_directory))

    def _states(self) -> Iterator[dict[Signal, dict[str, Any]]]:
        """Each session's ledgers, by signal."""
        yield from map(self._states_of, self._sessions())

    def _states_of(self, session: SessionPath) -> dict[Signal, dict[str, Any]]:
        ledger = self._ledger(session)
        states = self._of_destination(ledger["destinations"])
        not_begun = signal_ledger(NOT_BEGUN, ledger["journaled"], ledger["last_event"])
        return {signal: states.get(signal, not_begun) for signal in self._exporter.signals}

    def _totals(self) -> Counter[str]:
        """Of all sessions: records and lines by what became of them."""
        totals: Counter[str] = Counter()
        for states in self._states():
            for signal, state in states.items():
                totals[f"{signal} delivered"] += state["delivered"]
                totals.update({name: state[name] for name in (*UNSENT_RECORDS, "pending")})
            totals.update({name: max(state[name] for state in states.values()) for name in UNSENT_LINES})
        return totals

    @staticmethod
    def _unsent(totals: Counter[str]) -> list[str]:
        """What will not go out by itself, each with the reason and what can be done."""
        counts = Counter(totals)
        counts["filtered"] -= counts["left_out"]
        counts["rejected"] -= counts["partial"]
        return [f"{counts[name]:,} {why}" for name, why in (UNSENT_RECORDS | UNSENT_LINES).items() if counts[name]]

    def _failing(self) -> list[str]:
        """A line for each reason for which signals wait."""
        sessions: Counter[str] = Counter()
        lines: Counter[str] = Counter()
        for states in self._states():
            for signal, state in states.items():
                if state["state"] in {"hold", "retry"}:
                    reason = f"{signal}: {state['state']}: {state['message']}"
                    sessions[reason] += 1
                    lines[reason] += state["pending"]
        return [f"{why} ({lines[why]:,} lines in {count:,} sessions wait)" for why, count in sessions.items()]

    @contextmanager
    def _locks(self) -> Iterator[None]:
        """Hold the right to deliver by this route, for every journal directory that is touched.

        A deliverer whose credentials were refused sees that there is a sync, and lets go of its sessions.
        """
        with ExitStack() as locks:
            for root in sorted({self._root(session) for session in self._sessions()}):
                route = self._route(root)
                for name in (route.lock_name, route.destination + SYNC):
                    lock = DeliveryLock(root, self._host, name)
                    _wait_for(lock)
                    lock.report(UNKNOWN)  # what a run's deliverer has said there holds no more
                    locks.callback(lock.release)
            for place in self._other_locks():
                other = DeliveryLock(*place)
                if other.is_taken():
                    with suppress(OSError):
                        other.ring()
            yield

    def _root(self, session: SessionPath) -> Path:
        """Where the deliverer of a session keeps its lock."""
        return self._state_directory or _deliverer_root(session)

    def _poll_sinks(self, _: Deliverer | None = None) -> bool:
        """While stormlog sinks grow, let their journals grow as well. False: whoever follows is never done."""
        if time.monotonic() >= self._next_import:
            self._next_import = time.monotonic() + IMPORT_INTERVAL_S
            for follower in self._followers:
                with suppress(OSError, ValueError):  # a sink in the middle of being written is read a second later
                    follower.poll()
        return False


def _deliverer_root(session: SessionPath) -> Path:
    """Where the deliverer of a session's run keeps its lock; a session that lies too high for any run keeps its own."""
    return session.path.parents[2] if len(session.path.parents) > 2 else session.path


def _wait_for(lock: DeliveryLock) -> None:
    """Acquire a lock, after the deliverer that holds it. Raises `JournalError` if it can't be had."""
    try:
        if lock.acquire():
            return
        print("stepspan: another deliverer is sending to this destination: waiting for it to finish", file=sys.stderr)
        if not lock.acquire(LOCK_TIMEOUT_S):
            raise JournalError("another deliverer is still sending to this destination: wait for it, or stop it")
    except OSError as error:
        raise JournalError(f"no lock can be kept: name a --state-directory for the cursors: {error}") from error
