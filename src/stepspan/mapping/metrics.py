"""Metrics: a gauge point for each logged value, and stepspan's own series of steps, phases and runs.

Cumulative points (errors, values that are no finite number, durations), and those that a join must find
(`training.run.*`), go out when event time crosses a multiple of `PERIOD_NS`, and after the last event; the first two
also at once, because the one that ends a run must not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any, cast

from stepspan.events import MILLISECOND_NS, SECOND_NS, Event
from stepspan.journal.liveness import Closed
from stepspan.mapping.attributes import MAX_TEXT_CHARS
from stepspan.mapping.columns import Points
from stepspan.mapping.dispatch import MALFORMED, warn_unmappable
from stepspan.mapping.durations import Durations
from stepspan.mapping.names import MetricName, metric_name, split_in_key
from stepspan.mapping.open_scopes import StepState
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.point_buffer import PointBuffer, Table
from stepspan.mapping.progress import RunProgress
from stepspan.mapping.records import (
    DELTA_OF,
    Attributes,
    Kind,
    PastPoint,
    Record,
    Series,
    Sum,
)
from stepspan.mapping.samples import sampled_values
from stepspan.mapping.sdk_records import SdkRecords
from stepspan.mapping.steps import StepFold, is_failed_sdk_span
from stepspan.mapping.temporality import DELTAS, Deltas, SdkDeltas
from stepspan.values import shorten, to_float

PERIOD_NS = 10 * SECOND_NS
END_OF_TIME_NS = 1 << 62
ITEMS = ("samples", "tokens")
"""What `training.throughput` counts."""
DATA_WAIT = "data_wait"
"""The phase that steps have a time of, and spans may have."""
INFO_HYPERPARAMS = (
    "model", "model_name", "model_name_or_path", "dataset", "optimizer", "lr", "learning_rate", "batch_size", "seed",
    "epochs", "max_steps",
)  # fmt: skip
"""Hyperparameters that are labels of `training.run.info`."""
MAX_LABEL_CHARS = 120
MAX_NONFINITE_AT_ONCE = 10
"""Of one key in a period."""
MAX_TABLES = 1000
MAX_UNCOUNTED = 1000
"""Steps that are kept uncounted from batch to batch."""
OWN_SERIES: dict[str, tuple[str, str, Kind]] = {
    "training.step.number": ("split", "", "gauge"),
    "training.step.time": ("split", "s", "gauge"),
    "training.step.wait": ("split", "s", "gauge"),
    "training.step.duration": ("split", "s", "histogram"),
    "training.phase.time": ("phase", "s", "gauge"),
    "training.phase.device_time": ("phase", "s", "gauge"),
    "training.run.errors": ("error.type", "{error}", "sum"),
    "training.run.dropped_values": ("key", "{value}", "sum"),
}
"""stepspan's own metrics that have one attribute: which, the unit and the kind."""


@dataclass(slots=True)
class MetricState:
    """What is carried on beside the series and the folds.

    Attributes:
        boundary: The next time at which cumulative points go out, Unix ns.
        epoch: The number of the last epoch that began.
        info: The labels of `training.run.info`.
        errors: An error's type -> how many.
        nonfinite: Split -> key -> how many of its values are NaN or infinite, and how many were at the boundary before.
        dropped: The key of values that could not be recorded -> how many.

    """

    boundary: int = 0
    epoch: float | None = None
    info: dict[str, str] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


class MetricMapper:
    """One session's events as points; each series' points in time order."""

    def __init__(self, header: Event, options: MappingOptions = DEFAULT_OPTIONS) -> None:
        self._start: int = header["started"]
        is_delta = options.temporality != "cumulative"
        is_exponential = options.histogram_aggregation == DEFAULT_OPTIONS.histogram_aggregation
        histogram: Kind = "histogram" if is_exponential else "explicit_histogram"
        kinds: dict[Kind, Kind] = {"gauge": "gauge", "sum": "sum", "histogram": histogram}
        self._kinds = {kind: DELTA_OF.get(its, its) if is_delta else its for kind, its in kinds.items()}
        self._sampled_kinds = kinds if options.temporality == "lowmemory" else self._kinds
        self._deltas = Deltas() if is_delta else None
        self._sdk_deltas = SdkDeltas() if is_delta else None
        self._series: dict[Any, Series] = {}
        """By name and attributes."""
        self._own_series: dict[tuple[str, str], Series] = {}
        """Those of `OWN_SERIES`, by name and label."""
        not_before = header.get("not_before")
        self._points = PointBuffer(not_before if type(not_before) is int else 0)
        self._add = self._points.add
        self._add_metrics, self._add_step, self._add_span = (each.add_row for each in self._points.timelines)
        self._tables: dict[tuple[Any, ...], Table] = {}
        """A call's split, whether it has a step and one of its own, and keys; or a step's split and times -> points."""
        self._step_tables: dict[tuple[Any, ...], Table] = {}
        """A step's split, and which times it has -> those."""
        self._phases: dict[str, Table] = {}
        """A span's name -> its time."""
        self._device_phases: dict[str, Table] = {}
        """The same of spans that are timed on the device, too."""
        self._millisecond = 0
        self._state = MetricState()
        self._steps = StepFold(header)
        self._durations = Durations(header, options)
        self._progress = RunProgress()
        self._uncounted: list[StepState] = []
        self._sdk_records = SdkRecords("metrics", self._sdk_deltas)
        self._handlers: dict[str, Callable[[Event], Any]] = {
            "metrics": self._metrics,
            "step_begin": self._steps.begin_step,
            "step_end": self._step_end,
            "span_begin": self._steps.begin,
            "span_end": self._span_end,
            "device_time": self._device_time,
            "epoch_begin": self._epoch_begin,
            "epoch_end": self._steps.close,
            "run_begin": self._run_begin,
            "run_end": self._run_end,
            "hyperparams": self._hyperparams,
            "error": self._error,
            "dropped": self._dropped,
            "progress": lambda event: self._progress.plan(event),
            "artifact": lambda event: self._progress.artifact(event),
            "memory": self._memory,
            "sample": self._sample,
            "otel": self._otel,
            "clock": lambda event: self._progress.shift(self._steps.time.set(event)),
        }
        self.tags = self._handlers.keys()

    @property
    def filtered(self) -> int:
        """Points that were made and left out, so far."""
        return self._points.filtered

    @property
    def thinned(self) -> int:
        """Points of rows that gave way to later ones, as there were more rows than milliseconds for them, so far."""
        return self._points.thinned

    @property
    def held_until(self) -> int:
        """The time of the last point that is held back, Unix ns; 0: none is."""
        return self._points.held_until()

    def map(self, events: Sequence[Event]) -> Sequence[Record]:
        """The points of the next events, up to the time of the last of them."""
        handler_of, points = self._handlers.get, self._points
        since, boundary = self._millisecond, self._state.boundary
        for event in events:
            ts = event["ts"]
            if not 0 <= ts - since < MILLISECOND_NS:
                since = self._millisecond = ts - ts % MILLISECOND_NS
                if points.current_points or points.are_waiting:
                    points.next_millisecond(since)
                if ts >= boundary:
                    boundary = self._cross_boundary(ts)
            handler = handler_of(event["tag"])
            if handler:
                try:
                    handler(event)
                except MALFORMED as error:
                    warn_unmappable(event["tag"], repr(error))
        if len(self._uncounted) > MAX_UNCOUNTED:
            self._count_steps()
        return self._leave(self._points.flush(self._millisecond + MILLISECOND_NS, self._millisecond))

    def release(self, until: int | None = None) -> Sequence[Record]:
        """The points that lie after the last event, up to a time."""
        return self._leave(self._points.flush(END_OF_TIME_NS if until is None else until + 1, until))

    def finish(self, closed: Closed) -> Sequence[Record]:
        """What waits, the cumulative points after the last event, and then the end of every series."""
        self._steps.give_up_device_times()
        self._settle(closed.ts)
        after = max(closed.ts // MILLISECOND_NS * MILLISECOND_NS + MILLISECOND_NS, self._points.place_all())
        self._points.next_millisecond(after)
        self._add_cumulative(after)
        info = self._of("training.run.info", self._state.info) if self._state.info else None
        live = (s for s in self._series.values() if s is info or s.name != "training.run.info")
        ends = [(series, after + MILLISECOND_NS, None) for series in live if series.kind not in DELTAS]
        return [*self._leave(self._points.flush(END_OF_TIME_NS)), *ends]

    def _leave(self, points: Sequence[Record]) -> Sequence[Record]:
        """Points on their way out; what is said as deltas becomes such."""
        if self._deltas is not None:
            self._deltas.convert(points.points if isinstance(points, Points) else cast("list[Any]", points))
        return points

    def state(self) -> dict[str, Any]:
        """What is carried on, as JSON."""
        self._count_steps()
        index = {series: number for number, series in enumerate(self._series.values())}
        return {
            "series": [[s.name, s.attributes, s.unit, s.kind] for s in self._series.values()],
            "metrics": asdict(self._state),
            "steps": self._steps.state(),
            "durations": self._durations.state(),
            "progress": asdict(self._progress),
            "points": self._points.state(index, self._millisecond),
            "deltas": None if self._deltas is None else self._deltas.state(index),
            "sdk_deltas": None if self._sdk_deltas is None else self._sdk_deltas.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, of an equal journal."""
        series = [self._of(*each) for each in state["series"]]
        self._points.restore(state["points"], series)
        self._state = MetricState(**state["metrics"])
        self._steps.restore(state["steps"])
        self._durations.restore(state["durations"])
        self._progress = RunProgress(**state["progress"])
        if self._deltas is not None and self._sdk_deltas is not None:
            self._deltas.restore(state["deltas"], series)
            self._sdk_deltas.restore(state["sdk_deltas"])

    def _of(self, name: str, attributes: Attributes, unit: str = "", kind: Kind = "gauge") -> Series:
        """The series of that name and those attributes."""
        identity = (name, *sorted((key, str(value)) for key, value in attributes.items()))
        series = self._series.get(identity)
        if series is None:
            series = self._series[identity] = Series(name, attributes, unit, kind)
        return series

    def _own(self, name: str, label: str) -> Series:
        """The series of one of stepspan's own metrics (`OWN_SERIES`) with this label."""
        series = self._own_series.get((name, label))
        if series is None:
            attribute, unit, kind = OWN_SERIES[name]
            value = shorten(label, MAX_TEXT_CHARS)
            series = self._own_series[name, label] = self._of(name, {attribute: value}, unit, self._kinds[kind])
        return series

    def _metrics(self, event: Event) -> None:
        metrics, step, own_step = event["metrics"], event.get("step"), event.get("own_step")
        call = (event["split"], step is not None, own_step is not None, *metrics)
        table = self._tables.get(call)
        try:
            sum(metrics.values())
            finite = True
        except TypeError:  # there is a text, as NaN and infinity are in a line, or None: no faster way to see it
            finite = False
            self._count_nonfinite(event)
        if (
            (table is None or (not finite and None in metrics.values()))
            or ("attributes" in event or "steps" in event)
            or ("at" in event or "time" in event)
        ):
            self._unusual_metrics(event, call)
            return
        row = [*metrics.values(), step]
        if own_step is not None or len(row) != len(table.series):
            own = [] if own_step is None else [own_step] * len(metrics)
            row[-1:] = own + [step] * (len(table.series) - len(metrics) - len(own))
        self._add_metrics(table, event["ts"], row)

    def _unusual_metrics(self, event: Event, call: tuple[Any, ...]) -> None:
        """A call of keys that were not seen together before, with attributes, several steps, or deferred values."""
        ts, attributes, metrics = event["ts"], event.get("attributes"), event["metrics"]
        names = [metric_name(key, call[0]) for key in metrics]
        series = self._value_series(names, attributes)
        if "at" in event:
            self._late_metrics(event, series)
            return
        time = int(event["time"]) if "time" in event else ts
        steps = self._steps_of(event, names, attributes, is_past=time < ts)
        if time < ts:
            numbers = zip([*series, *steps], map(to_float, [*metrics.values(), *steps.values()]), strict=True)
            self._points.points += [PastPoint(one, max(time, 0), value) for one, value in numbers if value is not None]
            return
        row = dict(zip(series, metrics.values(), strict=True)) | steps
        self._points.filtered += len(series) + len(steps) - len(row)  # of keys of one series the last counts
        table = self._points.table(list(row))
        self._add_metrics(table, ts, list(row.values()), event["seq"] if None in row.values() else 0)
        complete = len(metrics) * (1 + call[2]) + len({name.split for name in names}) * call[1]
        if not attributes and "steps" not in event and len(row) == complete:
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            self._tables[call] = table

    def _late_metrics(self, event: Event, series: list[Series]) -> None:
        """Values that were missing in their call's line."""
        ts, points, values = event["ts"], self._points, event["metrics"].values()
        key = points.reserved_row(event.get("call"), event["at"])
        if not key:
            points.add_stray(series, ts, list(values))
            return
        for one, value in zip(series, values, strict=True):
            points.add_late(key, one, value, ts)
        del points.reserved[key]

    def _value_series(self, names: Iterable[MetricName], attributes: Attributes | None) -> list[Series]:
        """The series of a call's values."""
        if attributes and "key" in attributes:  # would pass for the key of another series
            attributes = {name: value for name, value in attributes.items() if name != "key"}
        return [
            self._of(name, {**(attributes or {}), "split": of, **({} if key is None else {"key": key})})
            for name, of, key in names
        ]

    def _steps_of(
        self, event: Event, names: Iterable[MetricName], attributes: Attributes | None, *, is_past: bool
    ) -> dict[Series, Any]:
        """The points of a call's steps: the one in force in each split, and each value's own where that is another."""
        about, other_splits = attributes or {}, event.get("steps", {})
        in_force: dict[Series, Any] = {}
        own: dict[Series, Any] = {}
        for name, key in zip(names, event["metrics"], strict=True):
            step, own_step = other_splits.get(name.split) or (event.get("step"), event.get("own_step"))
            if is_past:  # what is in force is so at present
                step = None
            if step is not None:
                in_force[self._of("training.step.number", {**about, "split": name.split})] = step
            if own_step is not None and own_step != step:
                labels = {**about, "split": name.split, "key": key}
                own[self._of("training.step.logged", labels)] = own_step
        return own | in_force  # what rows may share comes last

    def _count_nonfinite(self, event: Event) -> None:
        """Count the NaN and infinities of a call, for stores that do not keep them, and say so at once.

        Where a whole model has become NaN, each of its keys is, in each step: after some of them in a period, what is
        said at its end has to do.
        """
        for key, value in event["metrics"].items():
            if type(value) is float or value is None:
                continue
            number = to_float(value)
            if number is not None and number - number != 0.0:
                split = split_in_key(key)[0] or str(event["split"])
                counts = self._state.nonfinite.setdefault(split, {}).setdefault(key, [0, 0])
                counts[0] += 1
                if counts[0] - counts[1] <= MAX_NONFINITE_AT_ONCE:
                    self._add_nonfinite(split, key, counts[0], event["ts"])

    def _add_nonfinite(self, split: str, key: str, count: int, ts: int) -> None:
        series = self._of("training.nonfinite", {"split": split, "key": key}, "{value}", self._kinds["sum"])
        self._add(series, ts, Sum(self._start, float(count)))

    def _step_end(self, event: Event) -> None:
        step = self._steps.end(event)
        if not isinstance(step, StepState):
            return
        wait, key = step.wait, 0
        call = (step.begin["split"], wait is not None, "data_wait" in event, "samples" in event, "tokens" in event)
        row: list[Any] = [step.duration]
        if wait is not None:
            if step.pending:
                wait, key = None, step.begin["seq"]
            row.append(wait)
        if call[2]:
            row.append(event["data_wait"])
        if call[3] or call[4]:
            seconds = step.duration + event.get("data_wait", 0.0)
            for amount in (to_float(event[item]) for item in ITEMS if item in event):
                row.append(amount / seconds if amount is not None and seconds > 0 else None)
        table = self._step_tables.get(call)
        if table is None:
            table = self._step_tables[call] = self._step_table(*call)
        self._add_step(table, event["ts"], row, key)
        if key:
            self._settle(event["ts"])
        self._uncounted.append(step)

    def _step_table(self, split: str, has_wait: bool, has_data_wait: bool, *has_items: bool) -> Table:
        series = [self._own("training.step.time", split)]
        if has_wait:
            series.append(self._own("training.step.wait", split))
        if has_data_wait:
            series.append(self._own("training.phase.time", DATA_WAIT))
        for item in compress(ITEMS, has_items):
            series.append(self._of("training.throughput", {"item": item, "split": split}, "{item}/s"))
        return self._points.table(series)

    def _settle(self, now: int) -> None:
        """Add the waits of steps that are known now."""
        for step in self._steps.settle():
            key, wait = step.begin["seq"], step.wait
            if wait is not None and key in self._points.reserved:
                self._points.add_late(key, self._own("training.step.wait", step.begin["split"]), wait, now)
            self._points.reserved.pop(key, None)

    def _span_end(self, event: Event) -> None:
        span = self._steps.end(event)
        if span is None:
            return
        name, on_device = span.begin["name"], "cuda" in span.begin
        tables = self._device_phases if on_device else self._phases
        table = tables.get(name)
        if table is None:
            metrics = ["training.phase.time", "training.phase.device_time"][: 1 + on_device]
            table = tables[name] = self._points.table([self._own(metric, name) for metric in metrics])
        add_row = self._add_step if name == DATA_WAIT else self._add_span
        if on_device:
            add_row(table, event["ts"], [span.duration, None], span.begin["seq"])
        else:
            add_row(table, event["ts"], [span.duration])

    def _device_time(self, event: Event) -> None:
        span, seconds, key = self._steps.device_time(event), to_float(event.get("seconds")), event["begin"]
        if span is not None and seconds is not None and key in self._points.reserved:
            self._points.add_late(key, self._own("training.phase.device_time", span.phase), seconds, event["ts"])
        self._points.reserved.pop(key, None)
        self._settle(event["ts"])

    def _memory(self, event: Event) -> None:
        device = {"device_id": event["device_id"]}
        for name, size in event["counters"].items():
            self._add(self._of(f"training.memory.{name}", device, "By"), event["ts"], float(size))

    def _sample(self, event: Event) -> None:
        for name, attributes, unit, kind, value in sampled_values(event):
            point = value if kind == "gauge" else Sum(self._start, value)
            self._add(self._of(name, attributes, unit, self._sampled_kinds[kind]), event["ts"], point)

    def _otel(self, event: Event) -> None:
        self._points.points += self._sdk_records.of(event)
        if event["signal"] == "traces" and is_failed_sdk_span(event["record"]):
            self._steps.sdk_span(event)

    def _epoch_begin(self, event: Event) -> None:
        self._steps.begin(event)
        self._state.epoch = float(event["epoch"])
        self._add(self._of("training.run.epoch", {}), event["ts"], self._state.epoch)

    def _run_begin(self, event: Event) -> None:
        self._steps.begin_run(event)
        self._set_info(event["ts"], {"name": event["name"], "group": event["group"]})
        self._progress.begin(self._start)
        self._add_progress(event["ts"])

    def _run_end(self, event: Event) -> None:
        self._steps.close(event)
        if event.get("rests"):  # the last event for long, maybe: nothing may wait for the next one
            self._progress.ended = True
            self._add_cumulative(event["ts"])
            if ("training.run.eta",) in self._series:
                self._add(self._of("training.run.eta", {}, "s"), event["ts"], None)

    def _hyperparams(self, event: Event) -> None:
        params = event["params"]
        chosen = {key: params[key] for key in INFO_HYPERPARAMS if isinstance(params.get(key), (str, int, float))}
        self._set_info(event["ts"], chosen)

    def _set_info(self, ts: int, labels: dict[str, Any]) -> None:
        """Change the labels of `training.run.info`: one series ends, another begins."""
        before = self._state.info
        info = {**before, **{key: str(value)[:MAX_LABEL_CHARS] for key, value in labels.items() if value is not None}}
        if info == before:
            return
        if before:
            self._add(self._of("training.run.info", before), ts, None)
        self._state.info = info
        self._add(self._of("training.run.info", info), ts, 1.0)

    def _error(self, event: Event) -> None:
        kind, errors = event["type"], self._state.errors
        errors[kind] = errors.get(kind, 0) + 1
        self._add(self._own("training.run.errors", kind), event["ts"], Sum(self._start, float(errors[kind])))
        self._steps.error(event)

    def _dropped(self, event: Event) -> None:
        key, dropped = event["key"], self._state.dropped
        dropped[key] = dropped.get(key, 0) + event["count"]
        self._add(self._own("training.run.dropped_values", key), event["ts"], Sum(self._start, float(dropped[key])))

    def _cross_boundary(self, ts: int) -> int:
        """Event time has crossed a multiple of the period: add what is cumulative as of then. Returns the next one."""
        boundary = ts // PERIOD_NS * PERIOD_NS
        if self._state.boundary:
            self._add_cumulative(boundary)
            if boundary != self._millisecond:
                self._points.next_millisecond(self._millisecond)
        self._state.boundary = boundary + PERIOD_NS
        return self._state.boundary

    def _count_steps(self) -> None:
        """Count the steps that have ended: many at once, as that costs less than to count each as it ends."""
        steps, self._uncounted = self._uncounted, []
        self._progress.add(steps)
        self._durations.add(steps)

    def _add_progress(self, ts: int) -> None:
        self._count_steps()
        for name, unit, value in self._progress.values(ts, self._steps.time):
            self._add(self._of(name, {}, unit), ts, value)

    def _add_cumulative(self, ts: int) -> None:
        state = self._state
        if state.info:
            self._add(self._of("training.run.info", state.info), ts, 1.0)
        if state.epoch is not None:
            self._add(self._of("training.run.epoch", {}), ts, state.epoch)
        self._add_progress(ts)
        for kind, count in state.errors.items():
            self._add(self._own("training.run.errors", kind), ts, Sum(self._start, float(count)))
        for split, keys in state.nonfinite.items():
            for key, counts in keys.items():
                self._add_nonfinite(split, key, counts[0], ts)
                counts[1] = counts[0]
        for key, count in state.dropped.items():
            self._add(self._own("training.run.dropped_values", key), ts, Sum(self._start, float(count)))
        for split, durations in self._durations.values(self._start):
            self._add(self._own("training.step.duration", split), ts, durations)
