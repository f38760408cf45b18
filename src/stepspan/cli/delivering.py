"""A deliverer in this process, and how far it is: what `stepspan sync` and `stepspan export` have in common."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from stepspan.deliver.deliverer import Deliverer, caught_up, interrupt_on_signal, prepare_process

REPORT_INTERVAL_S = 5.0
"""Between lines of progress where there is no terminal."""


def deliver_until(
    done: Callable[[Deliverer], bool],
    deliverer: Deliverer,
    *,
    lines: int | None,
    verb: str,
    stream: TextIO | None = None,
) -> bool:
    """Run a deliverer until it is done or a signal interrupts it, and show its progress.

    Args:
        done: Whether nothing is left to do.
        deliverer: It is stopped afterwards.
        lines: Journal lines that there are; None: there is no end.
        verb: What is done, for the progress: "delivering".
        stream: Where the progress is shown; by default standard output.

    Returns:
        Whether it is done; False: it was interrupted.

    """
    interrupt_on_signal(deliverer)
    prepare_process()
    deliverer.start()
    total = None if lines is None else lines * len(deliverer.schedulers)
    with _progress(deliverer, total, verb, stream or sys.stdout) as show:
        complete = deliverer.wait(done, show)
    deliverer.stop()
    return complete


def delivery_failures(deliverer: Deliverer) -> list[str]:
    """A line for each session that could not be read and each signal that a defect has stopped."""
    unreadable = {f"{path}: {why}" for scheduler in deliverer.schedulers for path, why in scheduler.unreadable.items()}
    broken = {f"{s.signal}: stopped by a defect, see above" for s in deliverer.schedulers if s.broken}
    return sorted(unreadable | broken)


def thinned_text(points: int) -> str:
    """Of a summary, what it says of points that were thinned; nothing where there are none."""
    return f"; thinned {points:,} (logged faster than one a millisecond, for over 10 s)" if points else ""


@contextmanager
def _progress(deliverer: Deliverer, total: int | None, verb: str, stream: TextIO) -> Iterator[Callable[[], None]]:
    """What shows how many lines of `total` are done: a bar on a terminal, a line now and then in a log."""
    positions: dict[tuple[str, Path], int] = {}

    def done() -> int:
        for scheduler in deliverer.schedulers:
            for path, task in list(scheduler.tasks.items()):
                positions[scheduler.signal, path] = task.position.seq
        return sum(positions.values())

    if stream.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("lines"), TimeRemainingColumn())
        with Progress(*columns, console=Console(file=stream)) as bar:
            task = bar.add_task("", total=total)
            yield lambda: bar.update(task, completed=done())
            if total is not None and caught_up(deliverer):
                bar.update(task, completed=total)
        return
    reported_at = time.monotonic()

    def report() -> None:
        nonlocal reported_at
        if time.monotonic() - reported_at >= REPORT_INTERVAL_S:
            reported_at = time.monotonic()
            of_total = "" if total is None else f" of {total:,}"
            print(f"{verb}: {done():,}{of_total} lines", file=stream, flush=True)

    yield report
