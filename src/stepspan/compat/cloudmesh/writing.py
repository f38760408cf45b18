"""Writing without making an event loop wait: at once where there is none, else on one thread, in order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MAX_WAITING = 10_000
"""How many records may wait for the thread."""


class Emitted:
    """What `Telemetry.emit` and the like return. Awaiting it, which is optional, waits until the record is written."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[None] | None = None) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, None]:
        if self._future is not None:  # shielded: a task that is cancelled here does not take its record with it
            yield from asyncio.shield(asyncio.wrap_future(self._future)).__await__()


class Writing:
    """Runs jobs, which must not raise, in order: at once, or on a thread where an event loop would have to wait.

    Args:
        limit: How many jobs may wait for the thread.

    """

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self._limit = limit
        self._lock = threading.RLock()
        self._executor: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._worker = 0

    def do(self, job: Callable[[], None]) -> Emitted | None:
        """Run a job; None where too many wait already."""
        loop = in_event_loop()
        if (not loop and not self._waiting) or threading.get_ident() == self._worker:
            job()
            return Emitted()
        if self._waiting >= self._limit:
            return None
        with self._lock:
            self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="stepspan-telemetry")
            try:
                future = self._executor.submit(self._do, job)
                self._waiting += 1  # the thread counts down under the same lock
            except RuntimeError:  # the interpreter is ending, and takes no more work
                future = None
        if future is None:
            job()
        elif not loop:
            future.result()
        return Emitted(future)

    def wait(self, timeout: float) -> bool:
        """Wait until the jobs that wait now are done; False after `timeout` seconds."""
        executor = self._executor
        if executor is None or not self._waiting:
            return True
        done = threading.Event()
        executor.submit(done.set)
        return done.wait(timeout)

    def close(self) -> None:
        """Run the jobs that wait, and end the thread; a later job starts it again."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def _do(self, job: Callable[[], None]) -> None:
        self._worker = threading.get_ident()
        try:
            job()
        finally:
            with self._lock:
                self._waiting -= 1


def in_event_loop() -> bool:
    """Whether the calling thread is running an asyncio event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
