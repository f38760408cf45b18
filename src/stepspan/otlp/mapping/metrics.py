"""Metrics: a gauge point for each logged value, and stepspan's own series of steps, phases and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepspan.events import NONFINITE, Event
from stepspan.journal.liveness import Closed
from stepspan.otlp import ids
from stepspan.otlp.mapping import histogram
from stepspan.otlp.mapping.names import metric_name
from stepspan.otlp.mapping.thinning import Thinning
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


class MetricMapper:
    """One session's events as points; each series' points in time order."""

    def __init__(self, header: Event) -> None:
        self.filtered = 0
        self._header = header
        self._start: int = header["started"]
        self._series: dict[Any, Series] = {}
        self._by_key: dict[str, dict[str, tuple[Series, Series]]] = {}
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
        }

    def map(self, events: Sequence[Event]) -> list[Record]:
        """The points of the next events. Of several of a series in one millisecond, the last."""
        self._points = []
        handlers, now = self._handlers, self._now
        for event in events:
            ts = event["ts"]
            if ts // MILLISECOND != self._millisecond:
                self._millisecond = ts // MILLISECOND
                now.clear()
                if ts >= self._boundary:
                    self._cross(ts)
            handler = handlers.get(event["tag"])
            if handler:
                handler(event)
        return list(self._points)

    def finish(self, closed: Closed) -> list[Record]:
        """The cumulative points after the last event, and then the end of every series."""
        self._points = []
        self._now.clear()
        after = (closed.ts // MILLISECOND + 1) * MILLISECOND
        self._cumulative(after)
        return [*self._points, *((series, after + MILLISECOND, None) for series in self._series.values())]

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

    def _metrics(self, event: Event) -> None:
        ts, split, step, attributes = event["ts"], event["split"], event.get("step"), event.get("attributes")
        known = {} if attributes else self._by_key.setdefault(split, {})
        points, now = self._points, self._now
        numbered = None
        for key, value in event["metrics"].items():
            found = known.get(key)
            if found is None:
                found = known[key] = self._user_series(key, split, attributes)
            series, number = found
            if type(value) is not float:
                value = NONFINITE[value] if type(value) is str else float(value)
            index = now.get(series)
            if index is None:
                now[series] = len(points)
                points.append((series, ts, value))
            else:
                points[index] = (series, ts, value)
                self.filtered += 1
            if step is not None and number is not numbered:
                self._put(number, ts, float(step))
                numbered = number

    def _user_series(self, key: str, split: str, attributes: Attributes | None) -> tuple[Series, Series]:
        """A user's series, and that of the step numbers of its split."""
        name = metric_name(key, split)
        named = {"split": name.split} if name.key is None else {"split": name.split, "key": name.key}
        more = attributes or {}
        return (
            self._of(name.name, {**more, **named}),
            self._of("training.step.number", {**more, "split": name.split}),
        )

    def _begin(self, event: Event) -> None:
        self._open[event["seq"]] = event
        if len(self._open) > MOST_OPEN:  # begun and never ended
            del self._open[next(iter(self._open))]

    def _step_end(self, event: Event) -> None:
        begin = self._open.pop(event["begin"], None)
        if begin is None:
            return
        ts, split = event["ts"], begin["split"]
        duration = (event.get("ended", ts) - begin["ts"]) / SECOND
        self._put(self._of("training.step.time", {"split": split}, "s"), ts, duration)
        if "wait" in begin:
            self._put(self._of("training.step.wait", {"split": split}, "s"), ts, begin["wait"])
        if "data_wait" in event:
            self._put(self._of("training.phase.time", {"phase": "data_wait"}, "s"), ts, event["data_wait"])
        if split not in self._durations:
            self._durations[split] = histogram.empty()
        histogram.add(self._durations[split], duration)
        header = self._header
        trace_id = ids.step_trace_id(header["run_key"], split, begin.get("epoch"), begin.get("lap", 0), begin["step"])
        kept = self._thinning.keeps(begin, event, duration, trace_id)
        if kept and duration > self._slowest.get(split, (0.0,))[0]:
            span_id = ids.step_span_id(trace_id, header["rank"], header["role"])
            self._slowest[split] = [duration, ts, trace_id.hex(), span_id.hex()]

    def _span_end(self, event: Event) -> None:
        begin = self._open.pop(event["begin"], None)
        if begin is None:
            return
        duration = (event["ts"] - begin["ts"]) / SECOND
        self._put(self._of("training.phase.time", {"phase": begin["name"]}, "s"), event["ts"], duration)
        if begin.get("collective"):
            step = self._open.get(begin["parent"])
            while step is not None and step["tag"] != "step_begin":
                step = self._open.get(step["parent"])
            if step is not None:
                step["wait"] = step.get("wait", 0.0) + duration

    def _epoch_begin(self, event: Event) -> None:
        self._epoch = event["epoch"]
        self._put(self._of("training.run.epoch", {}), event["ts"], self._epoch)

    def _run_begin(self, event: Event) -> None:
        self._tell(event["ts"], {"name": event["name"], "group": event["group"]})

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
        if self._boundary:
            self._cumulative(ts // PERIOD * PERIOD)
        self._boundary = (ts // PERIOD + 1) * PERIOD

    def _cumulative(self, ts: int) -> None:
        if self._info:
            self._put(self._of("training.run.info", self._info), ts, 1.0)
        if self._epoch is not None:
            self._put(self._of("training.run.epoch", {}), ts, self._epoch)
        for kind, count in self._errors.items():
            series = self._of("training.run.errors", {"error.type": kind}, "{error}", "sum")
            self._put(series, ts, Sum(self._start, count))
        for split, durations in self._durations.items():
            series = self._of("training.step.duration", {"split": split}, "s", "histogram")
            exemplars: tuple[Exemplar, ...] = ()
            if split in self._slowest:
                value, time, trace_id, span_id = self._slowest.pop(split)
                exemplars = (Exemplar(time, value, bytes.fromhex(trace_id), bytes.fromhex(span_id)),)
            self._put(series, ts, histogram.value(durations, self._start, exemplars))
