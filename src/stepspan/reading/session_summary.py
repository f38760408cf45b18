"""All that one session says of its run, in one pass over its lines.

What a step took, what it waited for and whether it failed is what `mapping.steps` finds, as for metrics and traces.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from stepspan.errors import JournalError
from stepspan.events import SECOND_NS, Event
from stepspan.journal.cursor import Ledger
from stepspan.journal.layout import SessionPath
from stepspan.mapping.dispatch import dispatch
from stepspan.mapping.names import split_in_key
from stepspan.mapping.open_scopes import StepState
from stepspan.mapping.steps import StepFold
from stepspan.reading.sessions import SessionReader, job_folder
from stepspan.values import to_float

MAX_LISTED = 100
"""Errors and checkpoints of a session that are kept one by one; the first errors, the last checkpoints."""
REPORTED = ("rank", "role", "host", "attempt", "status", "started", "last_event", "epoch", "last_step", "stalls")
"""Attributes of a summary that are in its JSON under the same name."""
LINE_COUNTS = ("read", "damaged", "dropped", "pruned")
"""Counts of a session's ledger that are in its JSON."""
QUANTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


@dataclass(slots=True)
class MetricValues:
    """One metric of one rank, or of all ranks after `merge`."""

    rank: int
    """The rank that `last` is of."""
    points: int = 0
    nonfinite: int = 0
    """Points that are NaN or infinite; they are in no extreme."""
    min: float | None = None
    max: float | None = None
    last: float = math.nan
    last_step: int | None = None
    last_ts: int = 0
    """The time of the last value, Unix ns."""
    min_step: int | None = None

    def add(self, value: float, step: int | None, ts: int) -> None:
        """Take in the next value of this rank, logged at `ts` (Unix ns)."""
        self.points += 1
        self.last, self.last_step, self.last_ts = value, step, ts
        if not math.isfinite(value):
            self.nonfinite += 1
            return
        if self.min is None or value < self.min:
            self.min, self.min_step = value, step
        if self.max is None or value > self.max:
            self.max = value

    def merge(self, other: MetricValues) -> None:
        """Take in another session of the same rank, or another rank: its extremes, but not its last value."""
        if other.rank == self.rank and other.last_ts > self.last_ts:
            self.last, self.last_step, self.last_ts = other.last, other.last_step, other.last_ts
        self.points += other.points
        self.nonfinite += other.nonfinite
        if other.min is not None and (self.min is None or other.min < self.min):
            self.min, self.min_step = other.min, other.min_step
        if other.max is not None and (self.max is None or other.max > self.max):
            self.max = other.max


class SessionSummary:
    """One session's part in a run. Memory: 24 bytes a training step, and what `MAX_LISTED` says.

    Times are Unix ns, durations seconds; None is not known.

    Args:
        path: The session.
        header: Its header; empty if that cannot be read.

    """

    def __init__(self, path: SessionPath, header: Event) -> None:
        self.path = path
        self.rank = path.rank
        self.job = str(header.get("job_id", job_folder(path.path)))
        self.role = str(header.get("role", ""))
        self.host = str(header.get("host", ""))
        self.started = int(header.get("started", 0))
        self.last_event = 0
        self.status = "unreadable"
        self.problem = ""
        """Why the session, or the rest of it, cannot be read."""
        self.name: str | None = None
        self.group: str | None = None
        self.tags: list[str] = []
        self.attempt: list[int] | None = None
        self.total_steps: int | None = None
        self.epoch: int | None = None
        self.last_step: int | None = None
        """The number of the last training step that has ended."""
        self.failed_steps = 0
        """Steps of any split that have failed."""
        self.step_times, self.data_waits, self.collective_waits = array("d"), array("d"), array("d")
        """Of each training step: how long it took, waited for its data, and waited in collectives if it had any."""
        self.stalls = 0
        self.metrics: dict[tuple[str, str], MetricValues] = {}
        """By split and key, as `logged_values` gives them."""
        self.hyperparams: dict[str, Any] = {}
        self.error_count = 0
        self.errors: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.lines = Ledger()
        self.gaps: dict[str, int] = {}
        """Why events could not be written -> how many."""
        self._steps = StepFold(header)
        self._handlers: Mapping[str, Callable[[Event], object]] = {
            "run_begin": self._run_begin,
            "epoch_begin": self._epoch_begin,
            "step_begin": self._steps.begin_step,
            "step_end": self._step_end,
            "span_begin": self._steps.begin,
            "span_end": self._steps.end,
            "device_time": self._device_time,
            "metrics": self._metrics,
            "hyperparams": lambda event: self.hyperparams.update(event["params"]),
            "progress": self._progress,
            "artifact": self._artifact,
            "error": self._error,
            "event": self._event,
            "gap": self._gap,
            "clock": self._steps.time.set,
        }

    @classmethod
    def read(cls, path: SessionPath, *, boot_id: str, state_directory: Path | None = None) -> SessionSummary:
        """Read a session to its end. One that cannot be read says so in `problem`, with what was read of it.

        Args:
            path: The session.
            boot_id: This host's boot, to tell whether the session's writer lives.
            state_directory: Where delivery keeps its cursors if it may not write to the journal.

        """
        summary = cls(path, {})
        try:
            with SessionReader(path, state_directory) as reader:
                summary = cls(path, reader.header)
                summary._read(reader, boot_id)
        except (OSError, JournalError) as error:
            summary.problem = str(error)
        return summary

    def _read(self, reader: SessionReader, boot_id: str) -> None:
        self.status = reader.status(boot_id)
        last_seq = 0
        for batch in reader.batches():
            dispatch(self._handlers, batch.events)
            self.lines = self.lines.plus(batch.counts)
            self.last_event, last_seq = batch.position.ts, batch.position.seq
        if reader.closed is not None:  # lines before the end that no later line shows to be missing
            missing, lost = max(0, reader.closed.seq - last_seq), reader.closed.lost
            self.lines.dropped += min(missing, lost)
            self.lines.damaged += max(0, missing - lost)
        if self._steps.time.corrections:  # the clock was set: it had begun earlier, or later, than it thought
            self.started = self.last_event - self._steps.time.elapsed(self.started, self.last_event)
        self._steps.give_up_device_times()
        self._add_waits(self._steps.settle())

    def as_dict(self) -> dict[str, Any]:
        """What `stepspan report --json` prints of a session."""
        open_steps = [scope for scope in self._steps.open.values() if isinstance(scope, StepState)]
        return {
            **{name: getattr(self, name) for name in REPORTED},
            "session": self.path.session,
            "path": str(self.path.path),
            "trouble": self.problem,
            "seconds": max(0, self.last_event - self.started) / SECOND_NS if self.last_event else None,
            "steps": len(self.step_times),
            "failed_steps": self.failed_steps,
            "open_step": open_steps[-1].begin["step"] if open_steps else None,
            "step_time": quantiles(self.step_times),
            "data_wait": fmean(self.data_waits) if self.data_waits else None,
            "collective_wait": median(self.collective_waits) if self.collective_waits else None,
            "errors": self.error_count,
            "lines": {**{name: getattr(self.lines, name) for name in LINE_COUNTS}, "why": self.gaps},
        }

    def _run_begin(self, event: Event) -> None:
        self.name, self.group, self.tags = event.get("name"), event.get("group"), event.get("tags") or []
        self.attempt = event.get("attempt")

    def _epoch_begin(self, event: Event) -> None:
        self.epoch = event["epoch"]

    def _step_end(self, event: Event) -> None:
        step = self._steps.end(event)
        if not isinstance(step, StepState):  # its begin was never seen
            return
        self.failed_steps += step.failed
        if step.begin["split"] == "train":
            self.last_step = step.begin["step"]
            self.step_times.append(step.duration)
            self.data_waits.append(event.get("data_wait", 0.0))
        self._add_waits(self._steps.settle() if step.pending else [step])

    def _device_time(self, event: Event) -> None:
        self._steps.device_time(event)
        self._add_waits(self._steps.settle())

    def _add_waits(self, steps: Iterable[StepState]) -> None:
        """Take in steps whose waits are known by now."""
        waits = (step.wait for step in steps if step.begin["split"] == "train")
        self.collective_waits.extend(wait for wait in waits if wait is not None)

    def _metrics(self, event: Event) -> None:
        for metric, value, step in logged_values(event):
            self.metrics.setdefault(metric, MetricValues(self.rank)).add(value, step, event["ts"])

    def _progress(self, event: Event) -> None:
        self.total_steps = event["total_steps"]

    def _artifact(self, event: Event) -> None:
        if event["kind"] == "checkpoint":
            checkpoint = {"name": event["name"], "path": event["path"], "step": event.get("step"), "ts": event["ts"]}
            self.checkpoints = [*self.checkpoints[1 - MAX_LISTED :], checkpoint]

    def _error(self, event: Event) -> None:
        self.error_count += 1
        scope = self._steps.error(event)
        if len(self.errors) < MAX_LISTED:
            step = self._steps.open_step(scope) if scope else None
            error = {"rank": self.rank, "type": event["type"], "message": event["message"], "ts": event["ts"]}
            self.errors.append({**error, "step": int(step.begin["step"]) if step else None})

    def _event(self, event: Event) -> None:
        self.stalls += event["name"] == "training.stall" and event.get("status") != "recovered"

    def _gap(self, event: Event) -> None:
        reason = str(event["why"])
        self.gaps[reason] = self.gaps.get(reason, 0) + int(event["dropped"])


def logged_values(event: Event) -> Iterator[tuple[tuple[str, str], float, int | None]]:
    """Each number in a `metrics` event, with the split and the key of its series, and the step that it belongs to.

    The split is "" where the key says it, whatever the call's is. What a device still computes is left out: a later
    event has it.
    """
    split = event.get("split", "train")
    step, steps = event.get("own_step", event.get("step")), event.get("steps", {})
    for key, given in event["metrics"].items():
        value = to_float(given)
        if value is not None:
            named = split_in_key(key)[0]
            own = steps[named][1] if named in steps else step
            yield (split if named is None else "", key), value, own


def metric_labels(metrics: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What a report calls each metric: its key, after its split where that is not training's and not in the key.

    Args:
        metrics: Pairs as `logged_values` gives them.

    Returns:
        Pair -> "loss", "val_loss", or "val/loss" for `loss` of split "val"; "loss (split val)" where another metric of
        these has that name: there is a key `val/loss`, too.

    """
    labels: dict[tuple[str, str], str] = {}
    taken: set[str] = set()
    for split, key in sorted(metrics, key=lambda metric: metric[0] not in {"", "train"}):
        name = key if split in {"", "train"} else f"{split}/{key}"
        labels[split, key] = label = name if name not in taken else f"{key} (split {split})"
        taken.add(label)
    return labels


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile (both by nearest rank) and maximum of some values; None without any."""
    if not values:
        return None
    ordered = sorted(values)
    return {name: ordered[max(0, math.ceil(q * len(ordered)) - 1)] for name, q in QUANTILES.items()}
