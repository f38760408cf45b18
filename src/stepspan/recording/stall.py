"""The stall watch: says when training has stopped without ending, where each thread stands, and when it goes on.

A thread of its own looks now and then whether this process has written an event; what samplers write does not count.
It installs no signal handler, and reads no file: a stall may well be a file system that does not answer.

What is known to take long has `PATIENCE` times as long, for time counts for that much less while it goes on: while a
span named in `LONG_SPANS` is open, or while the thread that trains stands in one of `LONG_SOURCES`, which the compilers
of torch and JAX only pass through as they compile.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from stepspan.events import Event
from stepspan.journal.writer import asleep

if TYPE_CHECKING:
    from stepspan.recording.scopes import Scope
    from stepspan.run import Run

PATIENCE = 6
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
SELDOM = 3600.0
"""Seconds from one report of a stall to the next."""
OFTEN = 10.0
"""Seconds from look to look, at most; a twentieth of `stall_after` where that is less."""
LONGEST_STACKS = 64 << 10
MOST_FRAMES = 100
"""Of one thread, in the text."""
OURS = "stepspan"
"""What the names of our own threads begin with."""


class StallWatch:
    """Reports, as event `training.stall`, that `run` has written nothing for `stall_after` seconds, and its recovery.

    `start=False`: no thread; whoever holds it calls `look()` each `every` seconds of `clock`.
    """

    def __init__(
        self, run: Run, stall_after: float, *, clock: Callable[[], float] = time.monotonic, start: bool = True
    ) -> None:
        self.every = min(OFTEN, stall_after / 20)
        self._run = run
        self._stall_after = stall_after
        self._clock = clock
        self._seen: tuple[Any, int] = (None, 0)
        """The session that was written to, and how many events of training it held."""
        self._looked = clock()
        self._silent = 0.0
        self._long = 0.0
        """How much of that went by while something was known to take long."""
        self._told: float | None = None
        self._stalled = False
        self._stop = threading.Event()
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name=f"{OURS}-stall", daemon=True)
        if start:
            self._thread.start()

    def stop(self) -> None:
        """End; a stall that is over is said to be."""
        self._stop.set()
        if self._stalled:
            self.look()
        if self._thread.ident is not None:
            self._thread.join(0.5)

    def look(self) -> None:
        """Look once. Where another thread does, it will say what there is to say."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            self._look()
        except Exception as error:
            self._run.warn_once("stall", f"the stall watch failed: {error!r}")
        finally:
            self._looking.release()

    def _watch(self) -> None:
        with asleep():
            while not self._stop.wait(self.every):
                self.look()

    def _look(self) -> None:
        now = self._clock()
        # While nobody looked, the whole process stood (SIGSTOP, a laptop's lid): that is no stall of training.
        passed = min(now - self._looked, 2 * self.every)
        self._silent += passed
        self._looked = now
        if self._went_on():
            silent, self._silent, self._long = self._silent, 0.0, 0.0
            if self._stalled:
                self._stalled = False
                self._say("recovered", "info", {"seconds": round(silent, 1)}, self._run._scopes.open())
            return
        if self._stalled:
            return
        scopes = self._run._scopes.open()
        ident = trains(scopes)
        frame = sys._current_frames().get(ident)
        if takes_long(scopes, frame):
            self._long += passed
        counts = self._silent - self._long + self._long / PATIENCE
        if counts >= self._stall_after and not (self._told and now - self._told < SELDOM):
            self._stalled, self._told = True, now
            self._say(
                "stalled", "error", {"seconds": round(self._silent, 1), **_place(frame), **_stacks(ident)}, scopes
            )

    def _went_on(self) -> bool:
        writer = self._run.pipeline.journal.writer
        before, self._seen = self._seen, (writer, (writer.seq if writer else 0) - self._run.background_events)
        return before[0] is not writer or before[1] < self._seen[1]

    def _say(self, status: str, severity: str, attributes: Event, scopes: list[Scope]) -> None:
        inside: Event = {name: value for scope in scopes for name, value in _about(scope).items()}
        about = {**inside, "spans": [_title(scope) for scope in scopes], "collective": _in_collective(scopes)}
        self._run.emit_background(
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


def trains(scopes: list[Scope]) -> int:
    """The thread that trains: which began the innermost of run, epoch and step. The main one where none is open."""
    found = [scope.thread for scope in scopes if scope.tag != "span"]
    return found[-1] if found else threading.main_thread().ident or 0


def takes_long(scopes: list[Scope], frame: FrameType | None) -> bool:
    """Whether what goes on here is known to take long: compiling, or keeping a checkpoint."""
    return any(scope.begin.get("name") in LONG_SPANS for scope in scopes if scope.tag == "span") or any(
        source in code.co_filename for code, _ in _frames(frame) for source in LONG_SOURCES
    )


def _title(scope: Scope) -> str:
    if scope.tag != "span":
        return f"training.{scope.tag}"
    return f"{scope.begin['name']} (collective)" if scope.begin.get("collective") else str(scope.begin["name"])


def _in_collective(scopes: list[Scope]) -> bool:
    return any("collective" in scope.begin for scope in scopes)


def _about(scope: Scope) -> Event:
    return {name: scope.begin[name] for name in ("epoch", "step", "split") if name in scope.begin}


def _place(frame: FrameType | None) -> Event:
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
        if not name.startswith(OURS):
            lines = [
                f'  File "{code.co_filename}", line {line}, in {code.co_name}\n'
                for code, line in islice(_frames(frame), MOST_FRAMES)
            ]
            text += f"{name} (innermost call first):\n{''.join(lines)}"
    return {"stacks": text if len(text) <= LONGEST_STACKS else f"{text[: LONGEST_STACKS - 1]}…"}


def _frames(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    """Code and line, innermost call first. Without the line's text, which lies in a file."""
    while frame is not None:
        yield frame.f_code, frame.f_lineno
        frame = frame.f_back
