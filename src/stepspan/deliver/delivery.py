"""A run's delivery: none, or a deliverer process (`threads` has the third).

Call order: `start` once the run's journal is open, `watch` about once a second, `close` when the journal has ended. All
of it only reads cursors; what is sent, and when, is the deliverer's.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepspan.deliver import ledgers
from stepspan.deliver.lock import UNKNOWN, DeliveryLock, Outlook
from stepspan.deliver.routes import route_of
from stepspan.deliver.spawn import SEND_INTERVAL_VARIABLE, leave, log_path, spawn, with_absolute_paths
from stepspan.errors import Warn
from stepspan.journal.cursor import CursorState, cursor_is_open, cursor_name
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.journal.liveness import is_alive_here, quiet_for
from stepspan.values import format_seconds

if TYPE_CHECKING:
    from stepspan.exporters.otlp import OtlpExporter

log = logging.getLogger("stepspan")

POLL_INTERVAL_S = 0.02
CHECK_INTERVAL_S = 5.0
"""Between looks at the deliverer's lock."""
CLOSING_CHECK_INTERVAL_S = 0.25
"""The same while a run waits for its end to be delivered."""
ANSWER_TIMEOUT_S = 5.0
"""A receiver that took something this recently counts as answering."""
SLOW_ANSWER_TIMEOUT_S = 12.0
"""The same where `close_timeout` is longer: a request may take 10 s."""
FIRST_ANSWER_TIMEOUT_S = 0.5
"""For which the end of a run waits for the answer to a first request."""
NOTICE_TIMEOUT_S = 0.3
"""For which the end of a run waits until the deliverer has seen that it is to try once more."""
CLOSE_TIMEOUT_S = 5.0
"""The default of the setting `close_timeout`."""
REPEAT_INTERVAL_S = 60.0
"""What a rank has said of a run's undelivered lines, no other rank of the host says within this time."""
GIVEN_UP_AFTER_S = 30.0
"""As the deliverer's `SILENCE_LIMIT_S`, which training need not import."""
MAX_UNFOUND = 1000
"""Of such sessions, the latest."""
WORKER_LIMIT_S = 10.0
"""A forked worker's session that ended longer ago has been found."""
WARN_AFTER_S = 30.0
"""A signal that has failed for so long is worth a warning."""
MAX_RESTART_DELAY_S = 300.0
"""Before a deliverer that died without having delivered anything is started again."""


def log_warning(message: str) -> None:
    """Say something to whoever runs the program."""
    log.warning("stepspan: %s", message)


@dataclass(slots=True)
class _Closing:
    """The wait for a session's end: since when, until when, and for which wake-up of what delivers it."""

    session: Path
    begun: float  # Unix seconds
    deadline: float  # Unix seconds
    rung: float
    asked_until: dict[tuple[str, str], float] = field(default_factory=dict)
    """Target -> before when the receiver asked not to be tried (Retry-After): waited for once, and then rung again."""


class Delivery:
    """No delivery: the journal is all there is. The base of the others.

    Args:
        targets: The (destination, signal) pairs that are delivered to.
        conclude: Takes the line that says, as a run ends, what waits.

    """

    _waits_to_be_found = True
    """Whether the end of a run waits for a deliverer at work that has not found the session yet."""
    _try_timeout_s = NOTICE_TIMEOUT_S + FIRST_ANSWER_TIMEOUT_S
    """For which it waits for what becomes of one more try."""

    def __init__(
        self, targets: Iterable[tuple[str, str]] = (), *, conclude: Callable[[str], None] = log_warning
    ) -> None:
        self.targets = frozenset(targets)
        self._conclude = conclude

    def start(self) -> None:
        """Begin delivering, once the run's journal is open. Raises nothing."""

    def watch(self) -> None:
        """Restart what `start` started, if it died; called about once a second by the thread that logs."""

    def wait(self, session: Path, seq: int, timeout: float) -> bool:
        """Wait until all targets have everything up to an event, points that run ahead of it included.

        Args:
            session: The directory of the run's session.
            seq: The event's `seq`.
            timeout: Seconds.

        Returns:
            Whether they have it.

        """
        self._ring()
        return self._wait(session, lambda state: _has_all(state, seq), timeout)

    def pause(self, session: Path | None, timeout: float) -> None:
        """The session has ended, and another one may follow or not. Arguments as of `close`."""

    def resume(self) -> Delivery:
        """What delivers the session that follows after a pause."""
        return self

    def close(self, session: Path | None, timeout: float) -> None:
        """Wait until the end of the run is delivered, as long as the receivers answer, or may be about to.

        Args:
            session: The directory of the run's session; None where it has none.
            timeout: The longest wait, in seconds.

        """
        if session is not None and self.targets:
            now = time.time()
            closing = _Closing(session, now, now + timeout, self._ring())
            self._wait(session, _is_finished, timeout, lambda states: self._is_worthwhile(closing, states))

    def _wait(
        self,
        session: Path,
        done: Callable[[CursorState], bool],
        timeout: float,
        worthwhile: Callable[[Mapping[tuple[str, str], CursorState]], bool] = lambda _: True,
    ) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            states = self._states(session)
            if len(states) == len(self.targets) and all(map(done, states.values())):
                return True
            if time.monotonic() >= deadline or not worthwhile(states):
                return False
            self.watch()  # a deliverer may die as the run ends, when no log call looks after it any more
            time.sleep(POLL_INTERVAL_S)

    def _is_delivered(self, session: Path) -> bool:
        states = self._states(session)
        return len(states) == len(self.targets) and all(map(_is_finished, states.values()))

    def _is_worthwhile(self, closing: _Closing, states: Mapping[tuple[str, str], CursorState]) -> bool:
        """Whether the end of a session may soon be delivered to a target that has not got it.

        Args:
            closing: The wait for it.
            states: What the cursors say that there are.

        """
        destinations = {destination for destination, _ in self.targets}
        return any(self._destination_may_answer(closing, each, states) for each in destinations)

    def _destination_may_answer(
        self, closing: _Closing, destination: str, states: Mapping[tuple[str, str], CursorState]
    ) -> bool:
        targets = {target for target in self.targets if target[0] == destination}
        waiting = {target for target in targets if target not in states or not _is_finished(states[target])}
        known = [states[target] for target in (waiting if targets <= states.keys() else targets & states.keys())]
        if waiting and _any_answers(known, closing.deadline - closing.begun):
            return True
        failing = {target: states[target] for target in waiting if target in states and states[target].failing}
        if waiting and self._may_be_tried(closing, destination, failing):
            return True
        untried = [target for target in waiting if target not in states or states[target].state == "ok"]
        return any(self._may_answer(closing.session, *target, closing.begun) for target in untried)

    def _may_be_tried(
        self, closing: _Closing, destination: str, failing: Mapping[tuple[str, str], CursorState]
    ) -> bool:
        """Whether the try is still to come, or under way, that was asked for as the run ended."""
        outlook = self._outlook(destination)
        if failing and outlook.state == "starting":
            return True
        if outlook.state == "" or not (failing or outlook.state == "away"):
            return False
        now = time.time()
        if outlook.noticed < closing.rung:
            return now - closing.rung < NOTICE_TIMEOUT_S
        if outlook.tried < closing.rung:
            return now - closing.rung < self._try_timeout_s
        for target, state in failing.items():
            if closing.begun < state.asked_until < closing.deadline:
                closing.asked_until.setdefault(target, state.asked_until)
        if any(closing.rung < until <= now for until in closing.asked_until.values()):
            closing.rung = self._ring()
            return True
        return any(now < until for until in closing.asked_until.values())

    def _may_answer(self, session: Path, destination: str, signal: str, begun: float) -> bool:
        """Whether a receiver may soon take what it has not refused: it has not been asked for long."""
        state, since, *_ = self._outlook(destination)
        if state == "asking":
            return time.time() - since < FIRST_ANSWER_TIMEOUT_S
        if state == "answering" and (session / "cursors" / cursor_name(destination, signal)).exists():
            return time.time() - begun < FIRST_ANSWER_TIMEOUT_S
        return state == "starting" or (state == "answering" and self._waits_to_be_found)

    def _outlook(self, _destination: str) -> Outlook:
        """What the deliverer says of a receiver."""
        return UNKNOWN

    def _ring(self) -> float:
        """Let what delivers send at once what there is, and try once more what was put off: when, Unix seconds."""
        return 0.0

    def report_undelivered(self, session: Path) -> None:
        """Say in one line what of a run was not delivered: why, who goes on, and what sends it.

        Args:
            session: The directory of the run's session, or of a worker's.

        """
        own = SessionPath.of(session)
        if own is None:
            return
        from stepspan.deliver.undelivered import find_undelivered, launch_of, undelivered_text

        launch = launch_of(own)
        if launch.leader is not None and launch.leader != own and self._will_report(launch.leader.path, session):
            return
        texts = []
        for found in find_undelivered(launch.sessions, self.targets, self._urls(), self._why_untried):
            where, command = self._remedy(own, found.destination)
            goes_on = "" if found.needs_a_person else self._goes_on(found.destination)
            text = undelivered_text(found, where, goes_on, command)
            if self._may_report(session, found.destination, launch.run_key) and UNDELIVERED.is_first(
                found.destination, text
            ):
                texts.append(text)
        if texts:
            self._conclude("; ".join(texts))

    def _will_report(self, leader: Path, session: Path) -> bool:
        """Whether local rank 0 still lives, and waits for all that another session waits for."""
        own, others = self._states(session), self._states(leader)
        waiting = [target for target in self.targets if target not in own or not _is_finished(own[target])]
        return is_alive_here(leader) and all(others[target].failing for target in waiting if target in others)

    def _may_report(self, session: Path, destination: str, run_key: str) -> bool:
        """Whether no other rank of this host has said it, and what this one says is heard."""
        if not log.isEnabledFor(logging.WARNING):
            return False
        try:
            return self._lock_for(session, destination).claim(run_key, REPEAT_INTERVAL_S)
        except OSError:
            return True

    def _lock_for(self, session: Path, destination: str) -> DeliveryLock:
        return DeliveryLock(session.parents[2], session.parent.name, destination)

    def _urls(self) -> Mapping[tuple[str, str], str]:
        """Where each target leads, as messages have it."""
        return {}

    def _remedy(self, _session: SessionPath, destination: str) -> tuple[str, str]:
        """How people know a receiver, and the command that sends what it has not got."""
        return destination, "`stepspan sync`"

    def _goes_on(self, _destination: str) -> str:
        """Who goes on delivering, now that the run has ended; "" for nobody."""
        return ""

    def _why_untried(self, destination: str) -> str:
        """Why a receiver may not have got what it has not refused; "" where nobody knows."""
        state, since, *_, message = self._outlook(destination)
        if state == "asking":
            return message or f"no answer for {format_seconds(max(0.0, time.time() - since))}"
        words = {"starting": "the deliverer has only just started", "answering": "not all was taken in time"}
        return words.get(state, message)

    def after_fork(self) -> Delivery:
        """Leave to the parent what is its own. Returns what delivers the session of the forked child that this is."""
        return Delivery(self.targets)

    def ledgers(self, session: Path) -> dict[str, Any]:
        """The ledgers of a session, by destination and signal."""
        found = SessionPath.of(session)
        destinations: dict[str, Any] = ledgers.session_ledger(found)["destinations"] if found else {}
        return destinations

    def _states(self, session: Path) -> dict[tuple[str, str], CursorState]:
        found = ledgers.cursors(session)
        return {(d, s): found[d][s] for d, s in self.targets if s in found.get(d, {})}


def _is_finished(state: CursorState) -> bool:
    return state.position.finished


def _has_all(state: CursorState, seq: int) -> bool:
    return state.position.seq >= seq and not state.position.held_until


def _any_answers(states: Iterable[CursorState], timeout: float) -> bool:
    """Whether a receiver took something just now, for a signal that is not held.

    Where a run may wait for long, one that answers slowly may take as long as a request, unless it has failed since.
    """
    slow, now = max(ANSWER_TIMEOUT_S, min(timeout, SLOW_ANSWER_TIMEOUT_S)), time.time()
    return any(
        now - state.answered <= (ANSWER_TIMEOUT_S if state.failing else slow)
        for state in states
        if state.state != "hold"
    )


class ProcessDelivery(Delivery):
    """A deliverer process for this host, restarted by any rank that finds its lock free.

    Args:
        directory: The directory of the journals.
        host: The name of this host.
        exporters: Where to deliver to.
        first: Whether `start` starts the process (local rank 0); the other ranks look for it later.
        health: Whether the process reports metrics about the delivery.
        send_interval: Seconds between its requests, as `Options.send_interval`; None: the usual.
        warn: Called with a kind and a message for what a person has to put right. Must write no event: `watch` may be
            called while one is written.
        session: Gives the directory of the run's session, once there is one.
        conclude: Takes the line that says, as the run ends, what waits.

    """

    check_interval_s = CHECK_INTERVAL_S
    _waits_to_be_found = False

    def __init__(
        self,
        directory: Path,
        host: str,
        exporters: Sequence[OtlpExporter],
        *,
        first: bool,
        health: bool,
        warn: Warn,
        session: Callable[[], Path | None] = lambda: None,
        send_interval: float | None = None,
        conclude: Callable[[str], None] = log_warning,
    ) -> None:
        super().__init__([(e.destination, signal) for e in exporters for signal in e.signals], conclude=conclude)
        self._directory, self._host, self._exporters = directory, host, exporters
        self._leaves_it_to_first_rank, self._health = not first, health
        self._warn = warn
        self._session = session
        self._env = with_absolute_paths(os.environ)  # a deliverer that is started again must not go elsewhere
        if send_interval is not None:
            self._env[SEND_INTERVAL_VARIABLE] = repr(send_interval)
        self._routes = {e.destination: route_of(e, directory) for e in exporters}
        self._parent: Path | None = None
        """The run's session in the process that this one was forked from; None: it is none."""
        self._closing_timeout: float | None = None
        """For which the end of the run may wait; None: it has not come."""
        self._faulty = {(e.destination, s) for e in exporters for signals in e.faults.values() for s in signals}
        """Held from the start, for a variable is wrong, which was said there."""
        self._is_first_start = first
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0  # Unix seconds
        self._cannot_start = False
        self._restart_delay = self._restart_at = 0.0
        self._failing_since: dict[tuple[str, str], float] = {}
        self._next_check = 0.0
        self._warned_of_thinned = False
        self._rejected: set[tuple[str, str]] = set()
        """The targets of which it was told that they refuse records."""

    def start(self) -> None:
        """Start the deliverer process where none is at work; a rank that is not its host's first leaves it time to."""
        self._next_check = time.monotonic() + self.check_interval_s
        if self._leaves_it_to_first_rank:
            self._leaves_it_to_first_rank = False
            self._next_check += self.check_interval_s
            return
        self._warn_of_new_address()
        try:
            self._cannot_start = True
            with self._free_locks() as locks:
                if locks:
                    free = [exporter for exporter in self._exporters if exporter.destination in locks]
                    self._process = spawn(
                        self._directory,
                        self._host,
                        free,
                        locks,
                        routes=self._routes,
                        health=self._health,
                        env=self._env,
                    )
            self._cannot_start = False
        except Exception as error:  # a run that can't start a process still has its journal
            self._warn("deliverer", f"no deliverer could be started: {error!r}; `stepspan sync` sends it later")

    def _warn_of_new_address(self) -> None:
        """Say once how many finished sessions of the job an address does not get by itself: all would be sent anew."""
        session = self._session()
        if session is None or not self._is_first_start:
            return
        self._is_first_start = False
        with suppress(Exception):  # the deliverer finds out for itself
            from stepspan.deliver.begun import count_new, new_text

            for route in self._routes.values():
                if count := count_new(session, route):
                    self._warn("new address", new_text(count, route, self._directory), key=route.destination)

    def watch(self) -> None:
        """Restart a deliverer that died, and warn about signals that need a person. Looks every few seconds."""
        if time.monotonic() >= self._next_check:
            self._check()

    def wait(self, session: Path, seq: int, timeout: float) -> bool:
        """As the base; starts the deliverer where none is at work."""
        self._check()
        return super().wait(session, seq, timeout)

    def close(self, session: Path | None, timeout: float) -> None:
        """As the base; keeps looking whether a deliverer is at work, for afterwards no rank may.

        A session that a deliverer at work has not found yet is waited for as the process ends, not here: that would
        cost each of many short runs a second.
        """
        self.check_interval_s, self._restart_at = CLOSING_CHECK_INTERVAL_S, 0.0
        self._leaves_it_to_first_rank = False
        self._closing_timeout = timeout
        if self._parent is not None and is_alive_here(self._parent):  # whose run has its workers in mind
            super().close(session, timeout)
            return
        self._check()
        super().close(session, timeout)
        waiting = [each for each in with_ended_workers(session) if not self._is_delivered(each)]
        if session is None or not waiting:
            UNDELIVERED.forget(destination for destination, _ in self.targets)
        elif any(map(self._may_be_found, waiting)):
            for each in waiting:
                _await_at_exit(self, each, timeout)
        else:
            self.report_undelivered(waiting[0])
        if self._process is not None:
            leave(self._process)

    def _may_be_found(self, session: Path) -> bool:
        """Whether a deliverer, at work or about to be, may not have come to a session yet: nothing is against it."""
        states = self._states(session)
        waiting = [target for target in self.targets if target not in states or not _is_finished(states[target])]
        untried = {target[0] for target in waiting if target not in states or not states[target].failing}
        return any(self._outlook(destination).state in {"answering", "starting"} for destination in untried)

    def await_found(self, session: Path, timeout: float) -> bool:
        """As `close`, for a session that the deliverer had not found then. Whether it is delivered."""
        self._waits_to_be_found = True
        super().close(session, timeout)
        return self._is_delivered(session)

    def _urls(self) -> Mapping[tuple[str, str], str]:
        return {(e.destination, s): each.display_url for e in self._exporters for s, each in e.endpoints.items()}

    def _remedy(self, session: SessionPath, destination: str) -> tuple[str, str]:
        from stepspan.deliver.undelivered import receiver_text, sync_command

        exporter = next(exporter for exporter in self._exporters if exporter.destination == destination)
        return receiver_text(exporter), sync_command(session, exporter, self._env)

    def _goes_on(self, destination: str) -> str:
        from stepspan.deliver.undelivered import is_in_container

        outlook = self._outlook(destination)
        if outlook.state == "" or os.getpid() == 1:  # the first process of a container takes all others with it
            return ""
        process = f", process {outlook.pid}," if outlook.pid else ""
        lives = " (if this container does)" if is_in_container() else ""
        return f"the deliverer{process} goes on{lives} until nothing was taken for {GIVEN_UP_AFTER_S:g} s"

    def _lock_for(self, _session: Path, destination: str) -> DeliveryLock:
        return self._lock(destination)

    def _outlook(self, destination: str) -> Outlook:
        if self._cannot_start or self._restart_delay:  # it died without having delivered anything
            return UNKNOWN
        return self._lock(destination).outlook()

    def _ring(self) -> float:
        rung = 0.0
        for destination in {destination for destination, _ in self.targets}:
            with suppress(OSError):  # a full disk: it comes when its time has come
                rung = self._lock(destination).ring()
        return rung

    def _lock(self, destination: str) -> DeliveryLock:
        return DeliveryLock(self._directory, self._host, self._routes[destination].lock_name)

    def after_fork(self) -> Delivery:
        """As the base: the parent's deliverer finds the child's session, too.

        A child that outlives its parent's run goes on as a rank of its own.
        """
        child = copy(self)
        if self._process is not None:
            self._process.returncode = 0  # it is no child of this process
        child._process, child._leaves_it_to_first_rank = None, True
        child._parent = self._parent or self._session()
        child._failing_since = {}
        return child

    def _check(self) -> None:
        now = time.monotonic()
        self._next_check = now + self.check_interval_s
        self._warn_of_failures(self._session())
        if self._process is None and now >= self._restart_at:
            self.start()

    def _warn_of_failures(self, session: Path | None) -> None:
        """Warn once about a deliverer that died, and about each signal that is held or keeps failing."""
        found = {}
        with suppress(OSError):
            found = ledgers.cursors(session) if session is not None else {}
        self._reap(max((state.answered for signals in found.values() for state in signals.values()), default=0.0))
        now, urls = time.monotonic(), self._urls()
        for destination, signal in self.targets:
            target, state = (destination, signal), found.get(destination, {}).get(signal)
            if state is not None and state.ledger.thinned and not self._warned_of_thinned:
                self._warned_of_thinned = True
                self._warn("thinned", ledgers.THINNED)
            if state is not None and state.ledger.rejected and state.state == "ok" and target not in self._rejected:
                self._rejected.add(target)
                refused = f"{destination}: refused for good, of {signal}: {state.ledger.rejected} so far"
                self._warn("rejected", f"{refused}: {state.message}; {self._advice_on_rejected()}", key=state.message)
            if state is None or not state.failing or target in self._faulty:
                self._failing_since.pop(target, None)
                continue
            if self._closing_timeout is not None:  # the run's last line says it
                continue
            since = self._failing_since.setdefault(target, now)
            if since != float("inf") and (state.state == "hold" or now - since >= WARN_AFTER_S):
                self._failing_since[target] = float("inf")
                cause = f"{destination}: {state.message}"
                failed = f"{signal} to {urls[target]} (destination {destination})"
                self._warn("delivery", f"{failed} cannot be delivered: {state.message}; {self._advice()}", key=cause)

    def _reap(self, answered: float) -> None:
        """Notice that the deliverer ended. `answered`: when a receiver last took something, Unix seconds."""
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return
        self._process = None
        if status:
            delay = min(max(self.check_interval_s, 2 * self._restart_delay), MAX_RESTART_DELAY_S)
            self._restart_delay = 0.0 if answered > self._spawned_at else delay
            self._restart_at = time.monotonic() + self._restart_delay
            log_file = log_path(self._directory, self._host)
            died = f"the deliverer died (exit status {status}): {log_file} says why"
            self._warn("deliverer", f"{died}; {self._advice()}")

    def _advice(self) -> str:
        where = self._directory
        return f"the journal keeps everything: see `stepspan status {where}`; `stepspan sync {where}` sends it later"

    def _advice_on_rejected(self) -> str:
        sends = f"`stepspan sync --rejected {self._directory}` sends it again once the cause is gone"
        return f"what was refused record by record is kept, and {sends}"

    @contextmanager
    def _free_locks(self) -> Iterator[dict[str, DeliveryLock]]:
        """The locks of the destinations that have no deliverer on this host, held: a process inherits them. OSError."""
        locks: dict[str, DeliveryLock] = {}
        try:
            for destination in dict.fromkeys(exporter.destination for exporter in self._exporters):
                lock = self._lock(destination)
                if lock.acquire():
                    locks[destination] = lock
                if lock.is_held and self._is_sent_by_others(destination):
                    locks.pop(destination).release()
            if locks:
                self._spawned_at = time.time()
            for lock in locks.values():
                lock.report(Outlook("starting", self._spawned_at))
            yield locks
        finally:
            for lock in locks.values():
                lock.release()

    def _is_sent_by_others(self, destination: str) -> bool:
        """Whether a deliverer with later credentials has taken the run's session over, which ours were refused for."""
        session = self._session()
        signals = [signal for name, signal in self.targets if name == destination]
        return session is not None and all(
            cursor_is_open(session / "cursors" / cursor_name(destination, signal)) for signal in signals
        )


class UndeliveredRuns:
    """What ended runs of this process have said: a thousand trials without a receiver say it twice, not each."""

    def __init__(self) -> None:
        self._further: dict[str, tuple[int, str]] = {}
        """Destination -> how many runs came after the one that said what waits for it, and what the last would say."""

    def is_first(self, destination: str, text: str) -> bool:
        """Whether nothing was said of a destination since it last got everything of a run."""
        count, _ = self._further.get(destination, (-1, ""))
        self._further[destination] = count + 1, text
        return count < 0

    def forget(self, destinations: Iterable[str]) -> None:
        """These have got everything of a run."""
        for destination in destinations:
            self._say(destination)

    def say_all(self) -> None:
        """Say of each destination how many runs were not told of."""
        for destination in list(self._further):
            self._say(destination)

    def clear(self) -> None:
        """Forget everything, in a forked child."""
        self._further.clear()

    def _say(self, destination: str) -> None:
        count, last = self._further.pop(destination, (0, ""))
        if count > 0:
            log_warning(f"{count:,} more run{'s' if count > 1 else ''} of this process ended so, last: {last}")


UNDELIVERED = UndeliveredRuns()
AT_EXIT: list[Callable[[], None]] = []
"""What is left to do of ended runs as the process ends."""
_unfound: deque[tuple[ProcessDelivery, Path, float]] = deque(maxlen=MAX_UNFOUND)
"""What was not delivered as its run ended, perhaps because no deliverer had found it; and how long that may take."""


def is_worker_of(found: SessionPath, own: SessionPath) -> bool:
    """Whether a session is that of a forked worker of another one's process."""
    return found.rank == own.rank and found.role.startswith(f"{own.role}worker")


def with_ended_workers(session: Path | None) -> Iterator[Path]:
    """A run's session, if it has one, and those of its forked workers that have ended just now."""
    own = SessionPath.of(session) if session else None
    if session is None or own is None:
        return
    yield session
    for found in find_sessions(session.parent):
        if is_worker_of(found, own) and quiet_for(found.path) < WORKER_LIMIT_S and not is_alive_here(found.path):
            yield found.path


def _await_at_exit(delivery: ProcessDelivery, session: Path, timeout: float) -> None:
    if not _unfound:  # a process of multiprocessing leaves past atexit, once its own finalizers have run
        parent = getattr(sys.modules.get("multiprocessing.process"), "parent_process", None)
        finalize = getattr(sys.modules.get("multiprocessing.util"), "Finalize", None)
        if parent and finalize and parent():
            finalize(None, _await_unfound, exitpriority=-1)
    _unfound.append((delivery, session, timeout))


def _await_unfound() -> None:
    """As the process ends: wait for what no deliverer had found yet, for it may end with this process."""
    begun = time.monotonic()
    left: dict[ProcessDelivery, Path] = {}
    while _unfound:
        delivery, session, timeout = _unfound.popleft()
        with suppress(Exception):
            if not delivery.await_found(session, max(0.0, begun + timeout - time.monotonic())):
                left.setdefault(delivery, session)
    for delivery, session in left.items():
        with suppress(Exception):
            delivery.report_undelivered(session)
    while AT_EXIT:
        with suppress(Exception):
            AT_EXIT.pop(0)()
    with suppress(Exception):
        UNDELIVERED.say_all()


def _forget_in_child() -> None:
    _unfound.clear()
    AT_EXIT.clear()
    UNDELIVERED.clear()


atexit.register(_await_unfound)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
