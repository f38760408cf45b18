"""Metrics: a gauge point for each logged value, and stepspan's own series of steps, phases and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.otlp import ids
from stepspan.otlp.mapping import histogram
from stepspan.otlp.mapping.names import metric_name
from stepspan.otlp.mapping.open_scopes import step_trace_id
from stepspan.otlp.mapping.progress import Progress
from stepspan.otlp.mapping.thinning import Thinning
from stepspan.otlp.mapping.values import MALFORMED, number, short, tell_unmappable
from stepspan.otlp.records import Attributes, Exemplar, Point, Record, Series, Sum

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
MOST_PLANS = 1000
ITEMS = ("samples", "tokens")
"""What throughput is told of."""
OURS: dict[str, tuple[str, str, Any]] = {
    "training.step.number": ("split", "", "gauge"),
    "training.step.time": ("split", "s", "gauge"),
    "training.step.wait": ("split", "s", "gauge"),
    "training.step.duration": ("split", "s", "histogram"),
    "training.phase.time": ("phase", "s", "gauge"),
    "training.run.errors": ("error.type", "{error}", "sum"),
}
"""Our own metrics that have one attribute: which, the unit and the kind."""


class MetricMapper:
    """One session's events as points; each series' points in time order."""

    def __init__(self, header: Event) -> None:
        self.filtered = 0
        self._header = header
        self._start: int = header["started"]
        self._series: dict[Any, Series] = {}
        self._ours: dict[tuple[str, str], Series] = {}
        self._plans: dict[tuple[str, ...], tuple[list[Series], list[str]]] = {}
        """A call's split and keys -> their series, and the splits whose step number it tells."""
        self._points: list[Point] = []
        self._now: dict[Series, int] = {}
        """Series -> the index of its point of this millisecond."""
        self._millisecond = 0
        self._open: dict[int, Event] = {}
        self._boundary = 0
        self._epoch: float | None = None
        self._info: dict[str, str] = {}
        self._errors: dict[str, int] = {}
        self._durations: dict[str, dict[str, Any]] = {}
        self._slowest: dict[str, list[Any]] = {}
        self._thinning = Thinning(header)
        self._progress = Progress()
        self._handlers: dict[str, Callable[[Event], None]] = {
            "metrics": self._metrics,
            "step_begin": self._begin,
            "step_end": self._step_end,
            "span_begin": self._begin,
            "span_end": self._span_end,
            "epoch_begin": self._epoch_begin,
            "run_begin": self._run_begin,
            "hyperparams": self._hyperparams,
            "error": self._error,
            "progress": self._progress.plan,
            "artifact": self._progress.artifact,
            "memory": self._memory,
        }

    def map(self, events: Sequence[Event]) -> list[Record]:
        """The points of the next events. Of several of a series in one millisecond, the last."""
        self._points = []
        handlers, now = self._handlers, self._now
        now.clear()
        for event in events:
            ts = event["ts"]
            if ts // MILLISECOND != self._millisecond:
                self._millisecond = ts // MILLISECOND
                now.clear()
                if ts >= self._boundary:
                    self._cross(ts)
            handler = handlers.get(event["tag"])
            if handler:
                try:
                    handler(event)
                except MALFORMED as error:
                    tell_unmappable(event["tag"], repr(error))
        return list(self._points)

    def finish(self, closed: Closed) -> list[Record]:
        """The cumulative points after the last event, and then the end of every series."""
        self._points = []
        self._now.clear()
        after = (closed.ts // MILLISECOND + 1) * MILLISECOND
        self._cumulative(after)
        info = self._of("training.run.info", self._info) if self._info else None
        live = (s for s in self._series.values() if s is info or s.name != "training.run.info")
        return [*self._points, *((series, after + MILLISECOND, None) for series in live)]

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
            "durations": self._durations,
            "slowest": self._slowest,
            "thinning": self._thinning.state,
            "progress": self._progress.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.filtered = state["filtered"]
        for series in state["series"]:
            self._of(*series)
        self._open = {event["seq"]: event for event in state["open"]}
        self._boundary, self._epoch = state["boundary"], state["epoch"]
        self._info, self._errors = state["info"], state["errors"]
        self._durations, self._slowest = state["durations"], state["slowest"]
        self._thinning.state = state["thinning"]
        self._progress.state = state["progress"]

    def _of(self, name: str, attributes: Attributes, unit: str = "", kind: Any = "gauge") -> Series:
        """The series of that name and those attributes."""
        identity = (name, *sorted((key, str(value)) for key, value in attributes.items()))
        series = self._series.get(identity)
        if series is None:
            series = self._series[identity] = Series(name, attributes, unit, kind)
        return series

    def _put(self, series: Series, ts: int, value: Any) -> None:
        known = self._now.get(series)
        if known is None:
            self._now[series] = len(self._points)
            self._points.append((series, ts, value))
        else:
            self._points[known] = (series, ts, value)
            self.filtered += 1

    def _own(self, name: str, label: str) -> Series:
        """One of `OURS`."""
        series = self._ours.get((name, label))
        if series is None:
            attribute, unit, kind = OURS[name]
            series = self._ours[name, label] = self._of(name, {attribute: label}, unit, kind)
        return series

    def _metrics(self, event: Event) -> None:
        ts, split, attributes, metrics = event["ts"], event["split"], event.get("attributes"), event["metrics"]
        call = (split, *metrics)
        plan = None if attributes else self._plans.get(call)
        if plan is None:
            plan = self._plan(call, attributes)
        points, now = self._points, self._now
        for series, value in zip(plan[0], metrics.values(), strict=True):
            if type(value) is not float:
                value = number(value)
                if value is None:
                    continue
            index = now.get(series)
            if index is None:
                now[series] = len(points)
                points.append((series, ts, value))
            else:
                points[index] = (series, ts, value)
                self.filtered += 1
        step = number(event.get("step"))
        if step is not None:
            for name in plan[1]:
                if attributes:
                    series = self._of("training.step.number", {**attributes, "split": name})
                else:
                    series = self._own("training.step.number", name)
                self._put(series, ts, step)

    def _plan(self, call: tuple[str, ...], attributes: Attributes | None) -> tuple[list[Series], list[str]]:
        """The series of a call's keys, and the splits they are of."""
        split, *keys = call
        found: list[Series] = []
        splits: dict[str, None] = {}
        for key in keys:
            name = metric_name(key, split)
            named = {"split": name.split} if name.key is None else {"split": name.split, "key": name.key}
            found.append(self._of(name.name, {**(attributes or {}), **named}))
            splits[name.split] = None
        plan = found, list(splits)
        if not attributes:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[call] = plan
        return plan

    def _begin(self, event: Event) -> None:
        self._open[event["seq"]] = event
        if len(self._open) > MOST_OPEN:  # begun and never ended
            del self._open[next(iter(self._open))]

    def _step_end(self, event: Event) -> None:
        begin = self._open.pop(event["begin"], None)
        if begin is None:
            return
        ts, split = event["ts"], begin["split"]
        duration = max(0, event.get("ended", ts) - begin["ts"]) / SECOND
        self._put(self._own("training.step.time", split), ts, duration)
        if "wait" in begin:
            self._put(self._own("training.step.wait", split), ts, begin["wait"])
        if "data_wait" in event:
            self._put(self._own("training.phase.time", "data_wait"), ts, event["data_wait"])
        for item in ITEMS:
            if item in event:
                self._throughput(item, split, event, duration)
        self._progress.step(begin, ts)
        if split not in self._durations:
            self._durations[split] = histogram.empty()
        histogram.add(self._durations[split], duration)
        kept = self._thinning.keeps(begin, event, duration)
        if kept and (split not in self._slowest or duration > self._slowest[split][0]):
            trace_id = step_trace_id(self._header, begin)
            span_id = ids.step_span_id(trace_id, self._header["rank"], self._header["role"])
            self._slowest[split] = [duration, ts, trace_id.hex(), span_id.hex()]

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
        self._put(self._own("training.phase.time", short(begin["name"])), event["ts"], duration)
        if begin.get("collective"):
            outer = self._open.get(begin["parent"])
            while outer is not None and outer["tag"] == "span_begin" and not outer.get("collective"):
                outer = self._open.get(outer["parent"])
            if outer is not None and outer["tag"] == "step_begin":
                self._open[outer["seq"]] = {**outer, "wait": outer.get("wait", 0.0) + duration}

    def _memory(self, event: Event) -> None:
        device = {"device_id": event["device_id"]}
        for name, size in event["counters"].items():
            self._put(self._of(f"training.memory.{name}", device, "By"), event["ts"], float(size))

    def _epoch_begin(self, event: Event) -> None:
        self._epoch = float(event["epoch"])
        self._put(self._of("training.run.epoch", {}), event["ts"], self._epoch)

    def _run_begin(self, event: Event) -> None:
        self._tell(event["ts"], {"name": event["name"], "group": event["group"]})
        self._progress.begin(self._start)
        self._put_progress(event["ts"])

    def _hyperparams(self, event: Event) -> None:
        params = event["params"]
        self._tell(event["ts"], {key: params[key] for key in CHOSEN if isinstance(params.get(key), (str, int, float))})

    def _tell(self, ts: int, labels: dict[str, Any]) -> None:
        """Change what `training.run.info` says: one series ends, another begins."""
        told = {**self._info, **{key: str(value)[:LONGEST_LABEL] for key, value in labels.items() if value is not None}}
        if told == self._info:
            return
        if self._info:
            self._put(self._of("training.run.info", self._info), ts, None)
        self._info = told
        self._put(self._of("training.run.info", told), ts, 1.0)

    def _error(self, event: Event) -> None:
        self._errors[event["type"]] = self._errors.get(event["type"], 0) + 1

    def _cross(self, ts: int) -> None:
        """Event time has crossed a multiple of the period: say what has come together since the start."""
        boundary = ts // PERIOD * PERIOD
        if self._boundary:
            self._cumulative(boundary)
            if boundary // MILLISECOND != self._millisecond:
                self._now.clear()
        self._boundary = boundary + PERIOD

    def _cumulative(self, ts: int) -> None:
        if self._info:
            self._put(self._of("training.run.info", self._info), ts, 1.0)
        if self._epoch is not None:
            self._put(self._of("training.run.epoch", {}), ts, self._epoch)
        self._put_progress(ts)
        for kind, count in self._errors.items():
            self._put(self._own("training.run.errors", kind), ts, Sum(self._start, float(count)))
        for split, durations in self._durations.items():
            series = self._own("training.step.duration", split)
            exemplars: tuple[Exemplar, ...] = ()
            if split in self._slowest:
                value, time, trace_id, span_id = self._slowest.pop(split)
                exemplars = (Exemplar(time, value, bytes.fromhex(trace_id), bytes.fromhex(span_id)),)
            self._put(series, ts, histogram.value(durations, self._start, exemplars))
