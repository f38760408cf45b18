"""The short way of what begins, ends and is logged as nearly always: it writes what the long way writes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.journals import ROOMY, HandClock, lines
from harness.runs import path_of

from stepspan import JsonlExporter
from stepspan.events import Event
from stepspan.journal.disk import Disk
from stepspan.recording.scopes import Scopes
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]

DIFFERS = frozenset({"ts", "crc", "data_wait", "ended", "stack", "session", "started", "run_key", "pid", "resource"})
"""What no two runs have in common."""


class Training:
    """A program that does what trainings do, in an order that chance decides."""

    def __init__(self, run: Run, seed: int) -> None:
        self._run, self._chance, self._number = run, random.Random(seed), 0

    def work(self, depth: int = 0) -> None:
        for _ in range(self._chance.randint(1, 4)):
            with suppress(KeyError):
                self._chance.choice(self._deeds() if depth < 3 else [self._log])(depth)

    def _deeds(self) -> list[Callable[[int], None]]:
        return [
            self._log,
            self._log,
            self._step,
            self._step,
            self._span,
            self._epoch,
            self._loop,
            self._evaluate,
            self._fail,
        ]

    def _log(self, depth: int) -> None:
        chance = self._chance
        values = {
            "loss": chance.random(),
            "val_loss": 0.5,
            "nan": float("nan"),
            "whole": 3,
            "flag": True,
            "é%d": 1e300,
            "\ud800": 1.0,
            "none": None,
        }
        logged = {key: values[key] for key in chance.sample(sorted(values), chance.choice([1, 1, 2, 3]))}
        split = chance.choice([None, None, None, "val"])
        self._run.log_metrics(logged, chance.choice([None, None, None, self._number, 3]), split=split)

    def _step(self, depth: int) -> None:
        self._number = max(0, self._number + self._chance.choice([1, 1, 1, 2, -1]))
        amount = self._chance.choice([None, None, 8])
        split = self._chance.choice(["train", "train", "train", "val", "%d"])
        with self._run.step(self._number, split=split, samples=amount) as step:
            self.work(depth + 1)
            if self._chance.random() < 0.2:
                step.tokens = 5.0

    def _span(self, depth: int) -> None:
        name = self._chance.choice(["forward", "validation", "checkpoint", "100%", "é", "\ud800", "password=hunter2"])
        attributes: dict[str, Any] = self._chance.choice([{}, {}, {"layer": 3}])
        with self._run.span(name, **attributes):
            self.work(depth + 1)

    def _epoch(self, depth: int) -> None:
        with self._run.epoch(self._chance.randint(0, 2)):
            self.work(depth + 1)

    def _loop(self, depth: int) -> None:
        accumulate, samples = self._chance.choice([1, 1, 2]), self._chance.choice([None, None, 4, float])
        for n in self._run.steps(range(self._chance.randint(1, 3)), accumulate=accumulate, samples=samples):
            self.work(depth + 1)
            if self._chance.random() < 0.2:
                break
            if n == 1 and self._chance.random() < 0.1:
                raise KeyError(n)

    def _evaluate(self, depth: int) -> None:
        for _ in self._run.steps(range(2), split="val"):
            self.work(depth + 1)

    def _fail(self, depth: int) -> None:
        if self._chance.random() < 0.5:
            raise KeyError(depth)


def recorded(start: Start, directory: Path, seed: int) -> list[Event]:
    with start(directory=directory, job_id="job") as run:
        run.log_metrics({"loss": 1.0})
        for number in range(3):
            with run.step(number):
                run.log_metrics({"loss": 0.5, "lr": 1e-3})
        Training(run, seed).work()
    assert run.stats()["warnings"].keys() <= {"value"}
    return [{name: value for name, value in line.items() if name not in DIFFERS} for line in lines(path_of(run))]


def differing(first: list[Event], second: list[Event]) -> list[tuple[Event, Event]]:
    nothing: Event = {}
    return [pair for pair in zip_longest(first, second, fillvalue=nothing) if pair[0] != pair[1]]


@pytest.mark.parametrize("seeds", range(4), ids=lambda part: f"seeds {part * 25} to {part * 25 + 24}")
def test_the_short_way_writes_what_the_long_way_does(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int
) -> None:
    short = [recorded(start, tmp_path / f"short-{n}", n) for n in range(seeds * 25, seeds * 25 + 25)]
    taken: list[bool] = []

    def look_around(scopes: Scopes) -> None:
        taken.append(scopes.usual)

    monkeypatch.setattr(Scopes, "_look_around", look_around)
    long = [recorded(start, tmp_path / f"long-{n}", n) for n in range(seeds * 25, seeds * 25 + 25)]
    assert taken
    assert not any(taken)
    for ours, theirs in zip(short, long, strict=True):
        assert differing(ours, theirs) == []
    assert sum(map(len, short)) > 500


class Counted:
    """A processor of a program, which may change its mind."""

    tags = frozenset({"span_begin"})

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, event: Event) -> Event:
        self.seen += 1
        return {**event, "name": f"{event['name']}-{self.seen}"}


def test_a_programs_own_processor_sees_every_span(start: Start) -> None:
    counted = Counted()
    with start(processors=[counted]) as run:
        for _ in range(3):
            with run.span("forward"):
                run.log_metrics({"loss": 0.5})
    names = [line["name"] for line in lines(path_of(run)) if line["tag"] == "span_begin"]
    assert names == ["forward-1", "forward-2", "forward-3"]


def test_a_secret_in_a_spans_name_is_redacted_each_time(start: Start) -> None:
    with start() as run:
        for _ in range(3):
            with run.span("password=hunter2"):
                pass
    begins = [line for line in lines(path_of(run)) if line["tag"] == "span_begin"]
    assert len(begins) == 3
    assert not any("hunter2" in line["name"] for line in begins)


def test_lines_keep_the_gil_from_the_moment_that_a_thread_starts(start: Start, tmp_path: Path) -> None:
    disk, kept, done = Disk(), list[int](), threading.Event()
    keep = disk.write_keeping_gil
    disk.write_keeping_gil = lambda fd, data, length: kept.append(length) or keep(fd, data, length)  # type: ignore[assignment, func-returns-value]
    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=ROOMY, clock=HandClock(), disk=disk)])
    for number in range(3):
        with run.step(number):
            run.log_metrics({"loss": 0.5})
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        before = len(kept)
        with run.step(3):
            run.log_metrics({"loss": 0.5})
        assert len(kept) == before + 3
    finally:
        done.set()
        thread.join()
    run.close()
