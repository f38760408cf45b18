"""`stepspan sync`: the deliverer, started by hand."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepspan.cli.delivering import deliver_until, delivery_failures, thinned_text
from stepspan.cli.options import require_directories, require_sessions
from stepspan.compat.stormlog.reader import Follower
from stepspan.compat.stormlog.sink import SEGMENTS
from stepspan.config import load
from stepspan.deliver.deliverer import SILENCE_LIMIT_S, Deliverer, caught_up
from stepspan.deliver.ledgers import cursors, first_pending_time, session_ledger, signal_ledger
from stepspan.deliver.lock import UNKNOWN, DeliveryLock
from stepspan.deliver.options import Options
from stepspan.errors import ConfigError, JournalError, StepspanError
from stepspan.exporters.otlp import OtlpExporter
from stepspan.identity import host_facts
from stepspan.journal.cursor import CursorState, Position
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.mapping.records import Signal
from stepspan.reading.sessions import SessionReader, state_path
from stepspan.values import format_seconds

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
        settings = load({"endpoint": endpoint, "protocol": protocol}, os.environ)
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
        self._exporter = OtlpExporter(settings.endpoint, protocol=settings.protocol, destination=destination)
        self._state_directory = state_directory
        self._refused: set[Path] = set()
        """The directories that this user may not list."""
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
            deliverer = Deliverer([self._exporter], lambda _: self._sessions(), options, health=health)
            lines = None if follow else sum(self._ledger(session)["journaled"] for session in self._sessions())
            complete = deliver_until(
                self._poll_sinks if follow else caught_up, deliverer, lines=lines, verb="delivering"
            )
            after = self._totals()
        now = after - before  # never below 0: a cursor may have begun anew
        sent = [f"{now[f'{signal} delivered']:,} {signal}" for signal in self._exporter.signals]
        told = f"; rejected {now['rejected']:,}{thinned_text(now['thinned'])}; {after['pending']:,} lines wait"
        print(f"delivered {', '.join(sent)}{told}")
        if unsent := self._unsent(after):
            print(f"did not go out, of these journals in all: {'; '.join(unsent)}")
        problems = self._failing()
        problems += delivery_failures(deliverer)
        problems += [f"{path}: passed over: this user may not read it" for path in sorted(self._refused)]
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
            for session in self._sessions():
                counts = resend(state_path(session, self._state_directory), self._exporter)
                accepted, kept = accepted + counts[0], kept + counts[1]
        print(f"sent again: {accepted} accepted, {kept} rejected again or not answered")
        return 1 if kept else 0

    def dry_run(self) -> int:
        """Print what is pending and how old it is. The exit code."""
        ages: list[float] = []
        now = time.time()
        for session in self._sessions():
            states = cursors(state_path(session, self._state_directory)).get(self._exporter.destination, {})
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
        for path in sorted(self._refused):
            print(f"{path}: this user may not read it")
        return 0

    def _require_endpoint(self) -> None:
        if not self._exporter.signals:
            raise ConfigError("--endpoint", None, "nowhere to send: give it, or OTEL_EXPORTER_OTLP_ENDPOINT")
        for text in (*self._exporter.ignored, *self._exporter.warnings):
            print(f"stepspan: {text}", file=sys.stderr)
        faults = self._exporter.faults
        if sum(map(len, faults.values())) == len(self._exporter.signals):
            raise StepspanError(f"nothing can be sent: {'; '.join(faults)}")

    def _sessions(self) -> Iterator[SessionPath]:
        for path in self._paths:
            yield from find_sessions(path, host=self._only_host, refused=self._refused.add)

    def _ledger(self, session: SessionPath) -> dict[str, Any]:
        return session_ledger(session, state_path(session, self._state_directory))

    def _states(self) -> Iterator[dict[Signal, dict[str, Any]]]:
        """Each session's ledgers, by signal."""
        for session in self._sessions():
            ledger = self._ledger(session)
            states = ledger["destinations"].get(self._exporter.destination, {})
            not_begun = signal_ledger(NOT_BEGUN, ledger["journaled"], ledger["last_event"])
            yield {signal: states.get(signal, not_begun) for signal in self._exporter.signals}

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
        """Hold the right to deliver to this destination, for every journal directory that is touched."""
        if self._state_directory:
            roots = {self._state_directory}
        else:
            roots = {_deliverer_root(session) for session in self._sessions()}
        with ExitStack() as locks:
            for root in sorted(roots):
                lock = DeliveryLock(root, self._host, self._exporter.destination)
                _wait_for(lock)
                lock.report(UNKNOWN)  # what a run's deliverer has said there holds no more
                locks.callback(lock.release)
            yield

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
