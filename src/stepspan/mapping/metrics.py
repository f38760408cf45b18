"""Metrics: a gauge point for each logged value, and stepspan's own series of steps, phases and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.mapping.deferred import Late
from stepspan.mapping.durations import Durations
from stepspan.mapping.names import metric_name
from stepspan.mapping.point_buffer import PointBuffer, Table
from stepspan.mapping.progress import Progress
from stepspan.mapping.records import Attributes, Record, Series, Sum
from stepspan.mapping.samples import sampled
from stepspan.mapping.sdk_records import SdkRecords
from stepspan.mapping.values import MALFORMED, number, short, warn_unmappable

MILLISECOND = 1_000_000
SECOND = 1_000_000_000
PERIOD = 10 * SECOND
MOST_OPEN = 10_000
CHOSEN = (
    "model", "model_name", "model_name_or_path", "dataset", "optimizer", "lr", "learning_rate", "batch_size", "seed",
    "epochs", "max_steps",
)  # fmt: skip
"""Hyperparameters that are labels of `training.run.info`."""
LONGEST_LABEL = 120
MOST_TABLES = 1000
OURS: dict[str, tuple[str, str, Any]] = {
    "training.step.number": ("split", "", "gauge"),
    "training.step.time": ("split", "s", "gauge"),
    "training.step.wait": ("split", "s", "gauge"),
    "training.step.duration": ("split", "s", "histogram"),
    "training.phase.time": ("phase", "s", "gauge"),
    "training.phase.device_time": ("phase", "s", "gauge"),
    "training.run.errors": ("error.type", "{error}", "sum"),
}
"""Our own metrics that have one attribute: which, the unit and the kind."""


class MetricMapper:
    """One session's events as points; each series' points in time order."""

    def __init__(self, header: Event) -> None:
        self._header = header
        self._start: int = header["started"]
        self._series: dict[Any, Series] = {}
        self._ours: dict[tuple[str, str], Series] = {}
        self._points = PointBuffer()
        self._put = self._points.put
        self._tables: dict[tuple[Any, ...], Table] = {}
        """A call's split, whether it has a step, and keys; or a step's split and which times it has -> their points."""
        self._foreign = SdkRecords("metrics")
        self._late = Late(self._start, self._points, self._own)
        self._millisecond = 0
        self._open: dict[int, Event] = {}
        self._boundary = 0
        self._epoch: float | None = None
        self._info: dict[str, str] = {}
        self._errors: dict[str, int] = {}
        self._durations = Durations(header)
        self._progress = Progress()
        self._handlers: dict[str, Callable[[Event], None]] = {
            "metrics": self._metrics,
            "step_begin": self._begin,
            "step_end": self._step_end,
            "span_begin": self._begin,
            "span_end": self._span_end,
            "device_time": self._late.device_time,
            "epoch_begin": self._epoch_begin,
            "run_begin": self._run_begin,
            "hyperparams": self._hyperparams,
            "error": self._error,
            "progress": self._progress.plan,
            "artifact": self._progress.artifact,
            "memory": self._memory,
            "sample": self._sample,
            "otel": lambda event: self._points.singles.extend(self._foreign.of(event)),
        }

    @property
    def filtered(self) -> int:
        """Points that were made and left out, so far."""
        return self._points.filtered

    def map(self, events: Sequence[Event]) -> Sequence[Record]:
        """The points of the next events. Of several of a series in one millisecond, the last."""
        handlers, points = self._handlers, self._points
        since = self._millisecond
        for event in events:
            ts = event["ts"]
            if not 0 <= ts - since < MILLISECOND:
                since = self._millisecond = ts - ts % MILLISECOND
                points.next_millisecond()
                if ts >= self._boundary:
                    self._cross(ts)
            handler = handlers.get(event["tag"])
            if handler:
                try:
                    handler(event)
                except MALFORMED as error:
                    warn_unmappable(event["tag"], repr(error))
        return points.take()

    def finish(self, closed: Closed) -> Sequence[Record]:
        """The cumulative points after the last event, and then the end of every series."""
        after = (closed.ts // MILLISECOND + 1) * MILLISECOND
        self._cumulative(after)
        info = self._of("training.run.info", self._info) if self._info else None
        live = (s for s in self._series.values() if s is info or s.name != "training.run.info")
        return [*self._points.take(), *((series, after + MILLISECOND, None) for series in live)]

    def state(self) -> dict[str, Any]:
        """What is carried on."""
        return {
            "filtered": self.filtered,
            "series": [[s.name, s.attributes, s.unit, s.kind] for s in self._series.values()],
            "open": list(self._open.values()),
            "boundary": self._boundary,
            "epoch": self._epoch,
            "info": self._info,
            "errors": self._errors,
            "durations": self._durations.state,
            "progress": self._progress.state,
            "late": self._late.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._points.filtered = state["filtered"]
        for series in state["series"]:
            self._of(*series)
        self._open = {event["seq"]: event for event in state["open"]}
        self._boundary, self._epoch = state["boundary"], state["epoch"]
        self._info, self._errors = state["info"], state["errors"]
        self._durations.state = state["durations"]
        self._progress.state = state["progress"]
        self._late.state = state["late"]

    def _of(self, name: str, attributes: Attributes, unit: str = "", kind: Any = "gauge") -> Series:
        """The series of that name and those attributes."""
        identity = (name, *sorted((key, str(value)) for key, value in attributes.items()))
        series = self._series.get(identity)
        if series is None:
            series = self._series[identity] = Series(name, attributes, unit, kind)
        return series

    def _own(self, name: str, label: str) -> Series:
        """One of `OURS`."""
        series = self._ours.get((name, label))
        if series is None:
            attribute, unit, kind = OURS[name]
            series = self._ours[name, label] = self._of(name, {attribute: label}, unit, kind)
        return series

    def _metrics(self, event: Event) -> None:
        metrics, step = event["metrics"], event.get("step")
        call = (event["split"], step is not None, *metrics)
        table = self._tables.get(call)
        if table is None or "attributes" in event or "at" in event or None in metrics.values():
            self._unusual(event, call)
            return
        row = [*metrics.values(), step]
        if len(row) != len(table.series):
            row[-1:] = repeat(step, len(table.series) - len(metrics))
        self._points.lay("metrics", table, event["ts"], row)

    def _unusual(self, event: Event, call: tuple[Any, ...]) -> None:
        """A call of keys that were not seen together before, with attributes, or with values that come late."""
        ts, attributes, metrics = event["ts"], event.get("attributes"), event["metrics"]
        late = "at" in event
        series = self._series_of((call[0], call[1] and not late, *metrics), attributes)
        if late:
            for one, value in zip(series, map(number, metrics.values()), strict=True):
                if value is not None:
                    self._late.put(one, event["at"], value, ts)
            return
        if None in metrics.values():
            self._late.expect(series, metrics, ts)
        self._points.put_row(series, ts, [*metrics.values(), *repeat(event.get("step"), len(series) - len(metrics))])
        if not attributes and len(set(series)) == len(series):
            if len(self._tables) >= MOST_TABLES:
                self._tables.clear()
            self._tables[call] = Table(series)

    def _series_of(self, call: tuple[Any, ...], attributes: Attributes | None) -> list[Series]:
        """The series of a call's keys; where it has a step, also those that tell the step of each split."""
        split, stepped, *keys = call
        names = [metric_name(key, split) for key in keys]
        series = [
            self._of(name, {**(attributes or {}), "split": of, **({} if key is None else {"key": key})})
            for name, of, key in names
        ]
        if stepped:
            splits = dict.fromkeys(name.split for name in names)
            series += [self._of("training.step.number", {**(attributes or {}), "split": of}) for of in splits]
        return series

    def _begin(self, event: Event) -> None:
        self._open[event["seq"]] = event

    def _step_end(self, event: Event) -> None:
        begin = self._open.pop(event["begin"], None)
        if begin is None:
            return
        ts, split = event["ts"], begin["split"]
        duration = (event.get("ended", ts) - begin["ts"]) / SECOND
        if duration < 0:
            duration = 0.0
        row = [duration]
        waited = "wait" in begin
        if self._late.steps:
            waited = not self._late.step_end(begin, ts) and waited
        if waited:
            row.append(begin["wait"])
        if "data_wait" in event:
            row.append(event["data_wait"])
        call = ("step", split, waited, "data_wait" in event)
        table = self._tables.get(call)
        if table is None:
            table = self._tables[call] = self._step_table(*call[1:])
        self._points.lay("step", table, ts, row)
        if "samples" in event:
            self._throughput("samples", split, event, duration)
        if "tokens" in event:
            self._throughput("tokens", split, event, duration)
        if split == "train":
            self._progress.step(begin, ts)
        self._durations.add(begin, event, duration)

    def _step_table(self, split: str, waited: bool, waited_for_data: bool) -> Table:
        series = [self._own("training.step.time", split)]
        if waited:
            series.append(self._own("training.step.wait", split))
        if waited_for_data:
            series.append(self._own("training.phase.time", "data_wait"))
        return Table(series)

    def _put_progress(self, ts: int) -> None:
        for name, unit, value in self._progress.values(ts):
            self._put(self._of(name, {}, unit), ts, value)

    def _throughput(self, item: str, split: str, event: Event, duration: float) -> None:
        amount, taken = number(event[item]), duration + event.get("data_wait", 0.0)
        if amount is not None and taken > 0:
            series = self._of("training.throughput", {"item": item, "split": split}, "{item}/s")
            self._put(series, event["ts"], amount / taken)

    def _span_end(self, event: Event) -> None:
        begin = self._open.pop(event["begin"], None)
        if begin is None:
            return
        duration = max(0, event["ts"] - begin["ts"]) / SECOND
        phase, step = short(begin["name"]), None
        self._put(self._own("training.phase.time", phase), event["ts"], duration)
        if begin.get("collective"):
            outer = self._open.get(begin["parent"])
            while outer is not None and outer["tag"] == "span_begin" and not outer.get("collective"):
                outer = self._open.get(outer["parent"])
            if outer is not None and outer["tag"] == "step_begin":
                step = outer
        if begin.get("cuda"):
            self._late.span_end(begin, event, phase, step)
        elif step is not None:
            self._open[step["seq"]] = {**step, "wait": step.get("wait", 0.0) + duration}

    def _memory(self, event: Event) -> None:
        device = {"device_id": event["device_id"]}
        for name, size in event["counters"].items():
            self._put(self._of(f"training.memory.{name}", device, "By"), event["ts"], float(size))

    def _sample(self, event: Event) -> None:
        for name, attributes, unit, kind, value in sampled(event):
            point = value if kind == "gauge" else Sum(self._start, value)
            self._put(self._of(name, attributes, unit, kind), event["ts"], point)

    def _epoch_begin(self, event: Event) -> None:
        self._epoch = float(event["epoch"])
        self._put(self._of("training.run.epoch", {}), event["ts"], self._epoch)

    def _run_begin(self, event: Event) -> None:
        self._warn(event["ts"], {"name": event["name"], "group": event["group"]})
        self._progress.begin(self._start)
        self._put_progress(event["ts"])

    def _hyperparams(self, event: Event) -> None:
        params = event["params"]
        self._warn(event["ts"], {key: params[key] for key in CHOSEN if isinstance(params.get(key), (str, int, float))})

    def _warn(self, ts: int, labels: dict[str, Any]) -> None:
        """Change what `training.run.info` says: one series ends, another begins."""
        told = {**self._info, **{key: str(value)[:LONGEST_LABEL] for key, value in labels.items() if value is not None}}
        if told == self._info:
            return
        if self._info:
            self._put(self._of("training.run.info", self._info), ts, None)
        self._info = told
        self._put(self._of("training.run.info", told), ts, 1.0)

    def _error(self, event: Event) -> None:
        kind = event["type"]
        self._errors[kind] = self._errors.get(kind, 0) + 1
        self._put(self._own("training.run.errors", kind), event["ts"], Sum(self._start, float(self._errors[kind])))

    def _cross(self, ts: int) -> None:
        """Event time has crossed a multiple of the period: say what has come together since the start."""
        while len(self._open) > MOST_OPEN:  # begun and never ended
            del self._open[next(iter(self._open))]
        boundary = ts // PERIOD * PERIOD
        if self._boundary:
            self._cumulative(boundary)
            if boundary != self._millisecond:
                self._points.next_millisecond()
        self._boundary = boundary + PERIOD

    def _cumulative(self, ts: int) -> None:
        if self._info:
            self._put(self._of("training.run.info", self._info), ts, 1.0)
        if self._epoch is not None:
            self._put(self._of("training.run.epoch", {}), ts, self._epoch)
        self._put_progress(ts)
        for kind, count in self._errors.items():
            self._put(self._own("training.run.errors", kind), ts, Sum(self._start, float(count)))
        for split, durations in self._durations.values(self._start):
            self._put(self._own("training.step.duration", split), ts, durations)
