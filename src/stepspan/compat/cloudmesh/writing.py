"""Writing without making an event loop wait: at once where there is none, else on one thread, in order."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MOST_WAITING = 10_000


class Emitted:
    """What `emit` returns. Awaiting it waits until the record is written; nobody has to."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[None] | None = None) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, None]:
        if self._future is not None:  # shielded: a task that is cancelled here does not take its record with it
            yield from asyncio.shield(asyncio.wrap_future(self._future)).__await__()


class Writing:
    """Calls jobs that must not raise. Called in an event loop they wait for a thread; nothing passes those that wait."""

    def __init__(self) -> None:
        self._reset()

    def do(self, job: Callable[[], None]) -> Emitted | None:
        """Have a job done; None where too many wait already."""
        if self._pid != os.getpid():
            self._reset()
        loop = in_event_loop()
        if not loop and not self._waiting:
            job()
            return Emitted()
        if self._waiting >= MOST_WAITING:
            return None
        try:
            with self._lock:
                self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="stepspan-telemetry")
                self._waiting += 1
                future = self._executor.submit(self._done, job)
        except RuntimeError:  # the interpreter is ending
            self._waiting -= 1
            job()
            return Emitted()
        if not loop:
            future.result()
        return Emitted(future)

    def wait(self, timeout: float) -> bool:
        """Until all that waits now is done; False where `timeout` seconds did not suffice."""
        if self._pid != os.getpid() or self._executor is None or not self._waiting:
            return True
        done = threading.Event()
        self._executor.submit(done.set)
        return done.wait(timeout)

    def close(self) -> None:
        """Do what waits. Later jobs are done all the same."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None and self._pid == os.getpid():
            executor.shutdown()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._waiting = 0

    def _done(self, job: Callable[[], None]) -> None:
        try:
            job()
        finally:
            with self._lock:
                self._waiting -= 1


def in_event_loop() -> bool:
    """Whether the caller runs in asyncio's loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
