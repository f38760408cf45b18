"""Writing down what a session did, as the events of its journal: time, `seq` and the header are filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from harness.journals import RUN, header
from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.mapping import mapper as mappers
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Series, Signal

MS = 1_000_000
SECOND = 1_000_000_000
mapper: Any = mappers.mapper
"""Untyped: a test knows of which kind the records of a signal are."""
START = 1_760_000_000 * SECOND
"""A multiple of 10 s, but not of an hour: 2025-10-09T08:53:20Z."""


class SessionEvents:
    """`events`, beginning with the header. Each `emit` comes 1 ms after the one before, or `after` seconds."""

    def __init__(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        role: str = "",
        run_key: str = "job/0.0/0",
        session: str = "00000000000000aa",
        started: int = START,
    ) -> None:
        self.ts = started
        about = {"rank": rank, "world_size": world_size, "role": role, "run_key": run_key, "started": started}
        resource = {"service.name": "training", "rank": rank}
        self.events: list[Event] = [header(session, **about, pid=42, resource=resource, ts=started, seq=1)]

    @property
    def header(self) -> Event:
        return self.events[0]

    def emit(self, tag: str, /, after: float = 0.001, **fields: Any) -> int:
        """Add an event; its `seq`."""
        self.ts += round(after * SECOND)
        seq = len(self.events) + 1
        self.events.append({"ts": self.ts, "seq": seq, "tag": tag, **fields})
        return seq

    def run(self, **fields: Any) -> int:
        return self.emit("run_begin", **{**RUN, **fields})

    def step(self, number: int, *, lasts: float = 0.01, parent: int = 0, **fields: Any) -> int:
        """A step from its begin to its end; the `seq` of its beginning."""
        end = {name: fields.pop(name) for name in ("status", "data_wait", "ended") if name in fields}
        begin = self.emit("step_begin", parent=parent, step=number, **{"split": "train", **fields})
        self.emit("step_end", lasts, begin=begin, **end)
        return begin

    def metrics(self, values: dict[str, Any], after: float = 0.001, **fields: Any) -> int:
        return self.emit("metrics", after, **{"split": "train", **fields}, metrics=values)

    def closed(self, status: str = "completed") -> Closed:
        return Closed(self.events[-1]["seq"], self.events[-1]["ts"], status)

    def records(self, signal: Signal, *, status: str | None = None) -> list[Any]:
        """What the session maps to; `status`: with its end."""
        fold = mapper(signal, self.header)
        return [*fold.map(self.events), *(fold.finish(self.closed(status)) if status else fold.release())]


def by_series(points: Sequence[Any]) -> dict[tuple[Any, ...], list[tuple[float, Any]]]:
    """(name, *(label, value)…) -> (seconds since START, value) of its points, in order."""
    found: dict[tuple[Any, ...], list[tuple[float, Any]]] = {}
    for series, ts, value in points:
        found.setdefault(key_of(series), []).append(((ts - START) / SECOND, value))
    return found


def key_of(series: Series) -> tuple[Any, ...]:
    return (series.name, *sorted(series.attributes.items()))


def values(points: Sequence[Any], name: str, **attributes: Any) -> list[Any]:
    """The values of one series, in order."""
    return [
        value
        for series, _, value in points
        if series.name == name and attributes.items() <= dict(series.attributes).items()
    ]


def restored(signal: Signal, header: Event, state: dict[str, Any], options: MappingOptions = DEFAULT_OPTIONS) -> Any:
    """A new mapper that goes on from a state that has been a file."""
    fold = mapper(signal, header, options)
    fold.restore(orjson.loads(orjson.dumps(state)))
    return fold


def whole_run() -> SessionEvents:
    """A small run with one of most things: the same one for all three signals."""
    s = SessionEvents()
    run = s.run(name="digits", group="ablation", tags=["cnn"])
    s.emit("hyperparams", params={"lr": 0.5, "model": {"width": 8}})
    epoch = s.emit("epoch_begin", parent=run, epoch=0)
    step = s.emit("step_begin", 0.5, parent=epoch, step=0, split="train", epoch=0)
    span = s.emit("span_begin", parent=step, name="all_reduce", collective=True)
    s.emit("span_end", 0.25, begin=span)
    s.metrics({"loss": 0.75, "val/loss": "NaN"}, step=0)
    s.emit("step_end", 0.25, begin=step, data_wait=0.125)
    s.emit("artifact", name="ckpt", path="/tmp/ckpt.pt", kind="checkpoint", step=0)
    s.emit("epoch_end", begin=epoch)
    s.emit("run_end", begin=run, status="completed")
    return s
