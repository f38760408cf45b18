"""The stall watch: says when training has stopped without ending, where each thread stands, and when it goes on.

One thread of the process looks now and then whether one of its open runs has written an event; what samplers write does
not count. Where none has, each run that is watched has stalled: a study waits for its trial.
It installs no signal handler, and reads no file: a stall may well be a file system that does not answer.

Time counts for `SLOW_WORK_FACTOR` times less while something goes on that is known to take long: while a span named in
`LONG_SPANS` is open, or while the thread that trains stands in one of `LONG_SOURCES`, which the compilers of torch and
JAX only pass through as they compile.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from types import CodeType, FrameType

from stepspan.events import Event
from stepspan.journal.writer import mostly_idle
from stepspan.recording.open_runs import OPEN_RUNS
from stepspan.recording.recorder import Recorder
from stepspan.recording.scope import Scope
from stepspan.values import error_text

SLOW_WORK_FACTOR = 6
LONG_SPANS = frozenset(
    {"compile", "compilation", "checkpoint", "save_checkpoint", "load_checkpoint", "validation", "predict"}
)
LONG_SOURCES = (
    "/torch/_dynamo/convert_frame.py",
    "/torch/utils/cpp_extension.py",
    "/triton/compiler/compiler.py",
    "/jax/_src/compiler.py",
    "/torch/serialization.py",
    "/torch/distributed/checkpoint/",
)
REPEAT_INTERVAL_S = 3600.0
"""From one report of a stall to the next, at least."""
CHECK_INTERVAL_S = 10.0
"""From check to check, at most; a twentieth of `stall_after` where that is less."""
MAX_STACKS_CHARS = 64 << 10
"""Of the text of all stacks."""
MAX_FRAMES = 100
"""Of one thread, in that text."""
THREAD_PREFIX = "stepspan"
"""What the names of stepspan's own threads begin with."""


class StallWatch:
    """Reports, as event `training.stall`, that training has written nothing for a while, and its recovery.

    Args:
        recorder: Of the run that is watched.
        stall_after: Seconds without an event of training after which it counts as stalled.
        clock: Gives seconds that only grow.
        start: False: no thread calls `check()` each `every` seconds of `clock`.

    """

    def __init__(
        self, recorder: Recorder, stall_after: float, *, clock: Callable[[], float] = time.monotonic, start: bool = True
    ) -> None:
        self.every = min(CHECK_INTERVAL_S, stall_after / 20)
        self._recorder = recorder
        self._stall_after = stall_after
        self._clock = clock
        self._seen: dict[object, int] = {}
        """The sessions that are written to, and how many events of training they held."""
        self._checked_at = clock()
        self._silent = 0.0
        self._slow = 0.0
        """How much of that went by while something was known to take long."""
        self._reported_at: float | None = None
        self._stalled = False
        self._checking = threading.Lock()
        if start:
            _THREAD.add(self)

    def stop(self) -> None:
        """End; a stall that is over is said to be."""
        _THREAD.remove(self)
        if self._stalled:
            self.check()

    def check(self) -> None:
        """Look once. Where another thread does, it will say what there is to say."""
        if not self._checking.acquire(blocking=False):
            return
        try:
            self._check()
        except Exception as error:
            self._recorder.warn_once("stall", f"the stall watch failed: {error_text(error)}")
        finally:
            self._checking.release()

    def _check(self) -> None:
        now = self._clock()
        # While nobody looked, the whole process stood (SIGSTOP, a laptop's lid): that is no stall of training.
        passed = min(now - self._checked_at, 2 * self.every)
        self._silent += passed
        self._checked_at = now
        if self._went_on():
            silent, self._silent, self._slow = self._silent, 0.0, 0.0
            if self._stalled:
                self._stalled = False
                self._report("recovered", "info", {"seconds": round(silent, 1)}, self._recorder.scopes.open())
            return
        if self._stalled:
            return
        scopes = self._recorder.scopes.open()
        ident = training_thread(scopes)
        frame = sys._current_frames().get(ident)
        if is_slow_work(scopes, frame) or any(map(does_slow_work, self._others())):
            self._slow += passed
        counts = self._silent - self._slow + self._slow / SLOW_WORK_FACTOR
        if counts >= self._stall_after and not (self._reported_at and now - self._reported_at < REPEAT_INTERVAL_S):
            self._stalled, self._reported_at = True, now
            self._report(
                "stalled", "error", {"seconds": round(self._silent, 1), **_location(frame), **_stacks(ident)}, scopes
            )

    def _went_on(self) -> bool:
        before, self._seen = self._seen, dict(each.training_events() for each in (self._recorder, *self._others()))
        ended = before.keys() - self._seen.keys()
        return bool(ended) or any(count > before.get(session, -1) for session, count in self._seen.items())

    def _others(self) -> list[Recorder]:
        """Those of the other open runs."""
        return [run._recorder for run in OPEN_RUNS.all() if run._recorder is not self._recorder]

    def _report(self, status: str, severity: str, attributes: Event, scopes: list[Scope]) -> None:
        labels = ("epoch", "step", "split")
        about: Event = {name: scope.begin[name] for scope in scopes for name in labels if name in scope.begin}
        about["spans"] = [_title(scope) for scope in scopes]
        about["collective"] = any("collective" in scope.begin for scope in scopes)
        self._recorder.emit_background(
            {
                "ts": 0,
                "seq": 0,
                "tag": "event",
                "parent": scopes[-1].seq if scopes else 0,
                "name": "training.stall",
                "status": status,
                "severity": severity,
                "attributes": {**about, **attributes},
            }
        )


class StallThread:
    """The thread that looks after all watches of a process. There is none while there are no watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: list[StallWatch] = []
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, watch: StallWatch) -> None:
        """Look after one more. RuntimeError: the system allows no further thread."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name=f"{THREAD_PREFIX}-stall", daemon=True)
                thread.start()
                self._thread = thread
            self._watches.append(watch)
        self._changed.set()  # it may have to look more often now

    def remove(self, watch: StallWatch) -> None:
        """Stop watching a run; the thread ends with the last one."""
        with self._lock:
            if watch not in self._watches:
                return
            self._watches.remove(watch)
            thread = None if self._watches else self._thread
            if thread is not None:
                self._thread = None
        if thread is not None:
            self._changed.set()
            thread.join(0.5)

    def _work(self) -> None:
        with mostly_idle():
            while True:
                with self._lock:
                    watches = list(self._watches) if self._thread is threading.current_thread() else []
                if not watches:
                    return
                if self._changed.wait(min(watch.every for watch in watches)):
                    self._changed.clear()
                    continue
                for watch in watches:
                    watch.check()


_THREAD = StallThread()


def _after_fork_in_child() -> None:
    global _THREAD
    _THREAD = StallThread()  # the other one is the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def training_thread(scopes: list[Scope]) -> int:
    """The thread that trains: which began the innermost of run, epoch and step. The main one where none is open."""
    found = [scope.thread for scope in scopes if scope.tag != "span"]
    return found[-1] if found else threading.main_thread().ident or 0


def does_slow_work(recorder: Recorder) -> bool:
    """Whether what goes on in a run is known to take long."""
    scopes = recorder.scopes.open()
    return is_slow_work(scopes, sys._current_frames().get(training_thread(scopes)))


def is_slow_work(scopes: list[Scope], frame: FrameType | None) -> bool:
    """Whether what goes on here is known to take long: compiling, or keeping a checkpoint."""
    return any(scope.begin.get("name") in LONG_SPANS for scope in scopes if scope.tag == "span") or any(
        source in code.co_filename for code, _ in _frames(frame) for source in LONG_SOURCES
    )


def _title(scope: Scope) -> str:
    if scope.tag != "span":
        return f"training.{scope.tag}"
    return f"{scope.begin['name']} (collective)" if scope.begin.get("collective") else str(scope.begin["name"])


def _location(frame: FrameType | None) -> Event:
    """Where the training thread stands, in a word: ranks that wait for another stand alike, that one elsewhere."""
    for code, line in _frames(frame):
        return {"at": f"{code.co_filename}:{line} in {code.co_name}"}
    return {}


def _stacks(first: int) -> Event:
    """The stacks of all Python threads but our own, that which trains first, the innermost call first, as text."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    text = ""
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != first):
        name = threads[ident].name if ident in threads else f"thread {ident}"
        if not name.startswith(THREAD_PREFIX):
            lines = [
                f'  File "{code.co_filename}", line {line}, in {code.co_name}\n'
                for code, line in islice(_frames(frame), MAX_FRAMES)
            ]
            text += f"{name} (innermost call first):\n{''.join(lines)}"
    return {"stacks": text if len(text) <= MAX_STACKS_CHARS else f"{text[: MAX_STACKS_CHARS - 1]}…"}


def _frames(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    """Code and line, innermost call first. Without the line's text, which lies in a file."""
    while frame is not None:
        yield frame.f_code, frame.f_lineno
        frame = frame.f_back
