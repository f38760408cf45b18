"""All signals of some destinations, a thread for each, so that one that hangs stops no other."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from stepspan.deliver.health import REQUEST_TIMEOUT_S, Health
from stepspan.deliver.lock import Outlook
from stepspan.deliver.options import Options
from stepspan.deliver.scheduler import Scheduler
from stepspan.exporters import Exporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.layout import SessionPath

log = logging.getLogger("stepspan.deliver")

POLL_INTERVAL_S = 0.1
BELL_INTERVAL_S = 0.2
"""The same where a bell rings for what is in a hurry."""
WAKING_INTERVAL_S = 0.01
"""Between looks whether the try that it wants is done."""
FIRST_ANSWER_TIMEOUT_S = 0.5
"""For which the end of a run waits for the answer to a request."""
SILENCE_LIMIT_S = 30.0
"""A receiver that has taken nothing for so long is given up, unless a session is still being written."""
STOP_TIMEOUT_S = 15.0
MAX_FILES = 1 << 20


class Deliverer:
    """Delivers sessions to exporters until `stop`.

    Args:
        exporters: Where to deliver to.
        find: Lists the sessions that go to a destination; called about once a second by each signal's thread.
        options: What all deliveries have in common.
        pace: Called with the CPU seconds of each run of a scheduler; may wait, where training shares the process.
        health: The host in whose name metrics about the delivery go to every OTLP destination that takes metrics; None:
            they don't.

    """

    def __init__(
        self,
        exporters: Sequence[Exporter],
        find: Callable[[str], Iterable[SessionPath]],
        options: Options,
        *,
        pace: Callable[[float], None] | None = None,
        health: str | None = None,
    ) -> None:
        self.schedulers = [
            Scheduler(signal, e, partial(find, e.destination), options) for e in exporters for signal in e.signals
        ]
        self._exporters = exporters
        self._sessions = options.sessions
        self._clock = options.clock
        self._watches = False
        self._grew_at = self._urgent_at = 0.0
        self._health = [
            Health(e, [s for s in self.schedulers if s.exporter is e], health, options)
            for e in exporters
            if health is not None and isinstance(e, OtlpExporter) and "metrics" in e.signals
        ]
        self._pace = pace
        self._started_at = 0.0  # Unix seconds
        self._noticed: dict[str, float] = {}
        """Destination -> the last wake-up, Unix seconds."""
        self._stop, self._stop_health = threading.Event(), threading.Event()
        self._threads = [_thread(f"{s.exporter.destination}-{s.signal}", self._run, s) for s in self.schedulers]
        self._health_threads = [_thread("health", report.run, self._stop_health) for report in self._health]

    def start(self) -> None:
        """Begin delivering, on threads."""
        self._started_at = time.time()
        for thread in (*self._threads, *self._health_threads):
            thread.start()

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stop after the requests that are under way; one that hangs is left behind after `timeout` seconds."""
        self.interrupt()
        for scheduler in self.schedulers:
            scheduler.waiting.set()
        _join(self._threads, timeout)
        self._stop_health.set()  # its last report is on what was delivered until now
        _join(self._health_threads, REQUEST_TIMEOUT_S)
        if not any(thread.is_alive() for thread in self._threads):
            for exporter in self._exporters:
                exporter.close()

    def wait(
        self,
        done: Callable[[Deliverer], bool],
        tick: Callable[[], None] = lambda: None,
        listen: Callable[[], None] = lambda: None,
        bells: Sequence[int] = (),
    ) -> bool:
        """Wait until `done(self)` or `interrupt()`.

        Args:
            done: Whether to stop waiting.
            tick: Called about ten times a second meanwhile, and more often after `wake`.
            listen: Called with it, and when a bell rings; may `wake`.
            bells: Descriptors that can be read when somebody rings.

        Returns:
            True: it is done. False: it was interrupted.

        """
        self._watches = True
        has_tried, interval = True, BELL_INTERVAL_S if bells else POLL_INTERVAL_S
        try:
            while not self._sleep(interval if has_tried else WAKING_INTERVAL_S, bells if has_tried else ()):
                listen()
                has_tried = self._has_tried()
                self._watch_journals()
                if done(self):
                    return True
                tick()
            return False
        finally:
            self._watches = False

    def _sleep(self, seconds: float, bells: Sequence[int]) -> bool:
        """Sleep until a bell rings, but no longer than so many seconds. Whether `interrupt` was called."""
        if not bells:
            return self._stop.wait(seconds)
        poll = select.poll()
        for bell in bells:
            poll.register(bell, select.POLLIN)
        for bell, _ in poll.poll(0 if self._stop.is_set() else seconds * 1000):
            with contextlib.suppress(OSError):
                os.read(bell, 4096)
        return self._stop.is_set()

    def _watch_journals(self) -> None:
        """Look for all signals whether any journal grows: threads that nobody needs to wake cost nothing."""
        grew_at, urgent_at = self._sessions.look(self._clock())
        for scheduler in self.schedulers:
            if urgent_at > self._urgent_at or (grew_at > self._grew_at and not scheduler.has_news):
                scheduler.waiting.set()
        self._grew_at, self._urgent_at = grew_at, urgent_at

    def _pause(self, scheduler: Scheduler) -> float:
        """Seconds until a scheduler is to look again, unless it is woken."""
        if not scheduler.rests_until:
            return POLL_INTERVAL_S
        rest = max(0.0, scheduler.rests_until - self._clock())
        return rest if self._watches else min(rest, POLL_INTERVAL_S)

    def wake(self, destination: str, at: float) -> None:
        """Let each signal of a destination send what there is at once, and try once more what was put off.

        Args:
            destination: Its name.
            at: When that was asked for, Unix seconds; `outlook` has it.

        """
        self._noticed[destination] = at
        for scheduler in self._of(destination):
            scheduler.wake(at)

    def _has_tried(self) -> bool:
        return all(self._tried(destination) == at for destination, at in self._noticed.items())

    def _tried(self, destination: str) -> float:
        """The last wake-up after which each signal has had its try, or one is under way that nobody waits for."""
        noticed, overdue = self._noticed.get(destination, 0.0), time.time() - FIRST_ANSWER_TIMEOUT_S
        return min(
            noticed if s.broken or (s.is_asking and s.asking_since < overdue) else s.woken
            for s in self._of(destination)
        )

    def _of(self, destination: str) -> list[Scheduler]:
        return [s for s in self.schedulers if s.exporter.destination == destination]

    def has_seen_all(self) -> bool:
        """Whether every signal has found all sessions that there are now."""
        return all(scheduler.has_seen_all() for scheduler in self.schedulers)

    def outlook(self, destination: str) -> Outlook:
        """What is known of a destination's receiver by now."""
        schedulers = self._of(destination)
        failure = next((s.failure for s in schedulers if s.failure), "")
        known = Outlook("", 0.0, self._noticed.get(destination, 0.0), self._tried(destination), os.getpid(), failure)
        asked = [s.asked_at for s in schedulers if s.asked_at is not None]
        if any(s.answers for s in schedulers):
            return known._replace(state="answering")
        if len(asked) < len(schedulers):
            return known._replace(state="starting", since=self._started_at)
        if asking := [s.asking_since for s in schedulers if s.is_asking]:
            return known._replace(state="asking", since=min(asking))
        if all(s.answers is None for s in schedulers):
            return known._replace(state="asking", since=min(asked))
        return known._replace(state="away")

    def interrupt(self) -> None:
        """End `wait` at once; may be called from a signal handler."""
        self._stop.set()

    def after_fork(self) -> None:
        """In a forked child, which has none of the threads: close its copies of their files, which would keep locks."""
        self._sessions.after_fork()
        for scheduler in self.schedulers:
            with contextlib.suppress(OSError):  # one that was being closed just then
                scheduler.close()

    def _run(self, scheduler: Scheduler) -> None:
        if isinstance(scheduler.exporter, OtlpExporter):
            with contextlib.suppress(Exception):  # it is said when something is sent
                scheduler.exporter.prepare(scheduler.signal)
        try:
            while not self._stop.is_set():
                before = time.thread_time()
                moved = scheduler.run_once()
                if self._pace:
                    self._pace(time.thread_time() - before)
                if not moved:
                    scheduler.waiting.wait(self._pause(scheduler))
                    scheduler.waiting.clear()
        except Exception:  # a defect in one signal: log it, and leave the others alone
            log.exception(
                "stepspan: delivery of %s to %s has stopped", scheduler.signal, scheduler.exporter.destination
            )
            scheduler.broken = True
        finally:
            scheduler.close()


def _thread(name: str, work: Callable[..., None], argument: object) -> threading.Thread:
    return threading.Thread(target=work, args=(argument,), name=f"stepspan-{name}", daemon=True)


def _join(threads: Iterable[threading.Thread], timeout: float) -> None:
    """Wait for threads, if they were started, for so many seconds in all."""
    deadline = time.monotonic() + timeout
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, deadline - time.monotonic()))


def prepare_process() -> None:
    """Tune a process that only delivers.

    Events come and go by the thousand and hold no cycles, so look for those rarely: Python's own pace costs a third of
    the time of the mapping. And each live session holds five files open, so allow as many as this user may have.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
        if soft != resource.RLIM_INFINITY and soft < limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def interrupt_on_signal(deliverer: Deliverer) -> None:
    """Let SIGTERM, SIGINT and SIGHUP stop a deliverer between two requests. Replaces the process's handlers."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: deliverer.interrupt())


def caught_up(deliverer: Deliverer) -> bool:
    """Whether `stepspan sync` is done: each session is at its end or held, or the receiver has been silent too long."""
    return all(s.broken or s.idle or s.silent_for() >= SILENCE_LIMIT_S for s in deliverer.schedulers)


def run_is_over(deliverer: Deliverer) -> bool:
    """Whether a run's deliverer is done: all is delivered or held, or no writer lives and the receiver is silent."""
    return all(s.broken or s.over or s.receiver_unreachable(SILENCE_LIMIT_S) for s in deliverer.schedulers)
