"""What a journal says of its run: one pass over each session, nothing but the journal.

`summarise` gives plain data, the same that `stepspan report --json` prints. Times are seconds; `None` is not known.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from stepspan.deliver.ledgers import session_ledger
from stepspan.errors import JournalError
from stepspan.events import Event
from stepspan.identity import host_facts
from stepspan.journal.cursor import Ledger, Position
from stepspan.journal.layout import SessionPath, segment_name
from stepspan.journal.liveness import DEAD_AFTER, Closed, is_dead, quiet_for, read_closed
from stepspan.journal.reader import JournalReader
from stepspan.mapping.names import SPLITS
from stepspan.mapping.values import MALFORMED, number

BATCH = 4 << 20
SECOND = 1_000_000_000
EVERYTHING = Closed((1 << 62) - 1, 0, "")
MOST_KEPT = 100
"""Errors, checkpoints and holes of a session that are told one by one."""
QUANTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}
DELIVERY = ("delivered", "rejected", "filtered", "pending")


class Session:
    """One session as a fold over its events."""

    def __init__(self, session: SessionPath, home: Path | None = None) -> None:
        self.session = session
        self.home = home or session.path
        self.job, self.role, self.rank = session.path.absolute().parents[1].name, "", session.rank
        self.host = ""
        self.started = self.last = 0
        self.attempt: list[int] | None = None
        self.name: str | None = None
        self.group: str | None = None
        self.tags: list[str] = []
        self.total_steps: int | None = None
        self.status = "unreadable"
        self.trouble = ""
        self.steps = self.failed_steps = 0
        self.last_step: int | None = None
        self.epoch: int | None = None
        self.times, self.data_waits, self.waits = array("d"), array("d"), array("d")
        """Of each training step: how long it took, waited for data, and for others in collectives (s)."""
        self.metrics: dict[str, dict[str, Any]] = {}
        self.hyperparams: dict[str, Any] = {}
        self.errors: list[dict[str, Any]] = []
        self.error_count = 0
        self.checkpoints: list[dict[str, Any]] = []
        self.stalls = 0
        self.holes = Ledger()
        self.why: dict[str, int] = {}
        self._open: dict[int, Event] = {}
        self._on_device: dict[int, Event] = {}
        """A collective whose time the device tells -> the step that it is a wait of."""
        self._handlers = {
            "run_begin": self._run_begin,
            "epoch_begin": self._epoch_begin,
            "step_begin": self._begin,
            "span_begin": self._begin,
            "step_end": self._step_end,
            "span_end": self._span_end,
            "device_time": self._device_time,
            "metrics": self._metrics,
            "hyperparams": lambda event: self.hyperparams.update(event["params"]),
            "progress": self._progress,
            "artifact": self._artifact,
            "error": self._error,
            "event": self._event,
            "gap": self._gap,
        }

    def read(self) -> None:
        """Read all of it; what cannot be read is said in `trouble`."""
        try:
            reader = JournalReader(self.session)
        except (OSError, JournalError) as error:
            self.trouble = str(error)
            return
        try:
            self._header(reader.header)
            closed = read_closed(self.session.path) or read_closed(self.home)
            self.status = closed.status if closed else "interrupted" if self._is_dead(reader.header) else "running"
            position = Position()
            while True:
                batch = reader.read(position, size=BATCH, closed=closed or EVERYTHING)
                for event in batch.events:
                    handler = self._handlers.get(event["tag"])
                    if handler is not None:
                        try:
                            handler(event)
                        except MALFORMED:
                            continue
                self.holes = self.holes.plus(batch.counts)
                position = batch.position
                if batch.at_end or not batch.events:
                    break
            self.last = position.ts
            if closed:
                self.holes.damaged += max(0, closed.seq - position.seq)
        except (OSError, JournalError) as error:
            self.trouble = str(error)
        finally:
            reader.close()

    def _is_dead(self, header: Event) -> bool:
        """What a deliverer would find; nothing is written."""
        newest = self.session.path / segment_name(self.session.segments()[-1])
        return is_dead(
            self.session.path,
            header,
            boot_id=host_facts().boot_id,
            quiet_for=quiet_for(newest),
            dead_after=DEAD_AFTER,
        )

    def _header(self, header: Event) -> None:
        self.job, self.role = str(header.get("job_id", self.job)), str(header.get("role", ""))
        self.host, self.started = str(header.get("host", "")), int(header.get("started", 0))

    def _run_begin(self, event: Event) -> None:
        self.name, self.group, self.tags = event.get("name"), event.get("group"), event.get("tags") or []
        self.attempt = event.get("attempt")

    def _epoch_begin(self, event: Event) -> None:
        self.epoch = event["epoch"]

    def _begin(self, event: Event) -> None:
        self._open[event["seq"]] = event

    def _step_end(self, event: Event) -> None:
        begin = self._open.pop(event["begin"])
        self.failed_steps += event.get("status") not in (None, "ok", "completed")
        if begin["split"] != "train":
            return
        self.steps += 1
        self.last_step = begin["step"]
        self.times.append(max(0, event.get("ended", event["ts"]) - begin["ts"]) / SECOND)
        self.data_waits.append(event.get("data_wait", 0.0))
        if "wait" in begin:
            begin["place"] = len(self.waits)
            self.waits.append(begin["wait"])

    def _span_end(self, event: Event) -> None:
        begin = self._open.pop(event["begin"])
        if not begin.get("collective"):
            return
        outer = self._open.get(begin["parent"])
        while outer is not None and outer["tag"] == "span_begin" and not outer.get("collective"):
            outer = self._open.get(outer["parent"])
        if outer is None or outer["tag"] != "step_begin":
            return
        host = (event["ts"] - begin["ts"]) / SECOND
        outer["wait"] = outer.get("wait", 0.0) + (0.0 if begin.get("cuda") else host)
        if begin.get("cuda"):
            self._on_device[begin["seq"]] = outer

    def _device_time(self, event: Event) -> None:
        step, seconds = self._on_device.pop(event["begin"], None), number(event["seconds"])
        if step is not None and seconds is not None:
            step["wait"] += seconds
            if "place" in step:
                self.waits[step["place"]] = step["wait"]

    def _metrics(self, event: Event) -> None:
        split = event.get("split", "train")
        for key, given in event["metrics"].items():
            value = number(given)
            if value is None:
                continue
            name = _named(key, split)
            known = self.metrics.get(name)
            if known is None:
                known = self.metrics[name] = {"points": 0, "nonfinite": 0, "min": None, "max": None}
            known["points"] += 1
            known["last"], known["last_step"], known["last_ts"] = value, event.get("step"), event["ts"]
            if not math.isfinite(value):
                known["nonfinite"] += 1
                continue
            if known["min"] is None or value < known["min"]:
                known["min"], known["min_step"] = value, event.get("step")
            if known["max"] is None or value > known["max"]:
                known["max"] = value

    def _progress(self, event: Event) -> None:
        self.total_steps = event["total_steps"]

    def _artifact(self, event: Event) -> None:
        if event["kind"] == "checkpoint":
            about = {"name": event["name"], "path": event["path"], "step": event.get("step"), "ts": event["ts"]}
            self.checkpoints = [*self.checkpoints[1 - MOST_KEPT :], about]

    def _error(self, event: Event) -> None:
        self.error_count += 1
        if len(self.errors) < MOST_KEPT:
            about = {"rank": self.rank, "type": event["type"], "message": event["message"], "ts": event["ts"]}
            self.errors.append({**about, "step": self._step_of(event.get("parent", 0))})

    def _step_of(self, scope: int) -> int | None:
        while scope in self._open:
            begin = self._open[scope]
            if begin["tag"] == "step_begin":
                return int(begin["step"])
            scope = begin["parent"]
        return None

    def _event(self, event: Event) -> None:
        self.stalls += event["name"] == "training.stall" and event.get("status") != "recovered"

    def _gap(self, event: Event) -> None:
        self.why[str(event["why"])] = self.why.get(str(event["why"]), 0) + int(event["dropped"])

    def told(self) -> dict[str, Any]:
        """As data."""
        pending = [event for event in self._open.values() if event["tag"] == "step_begin"]
        return {
            "rank": self.rank,
            "role": self.role,
            "session": self.session.session,
            "path": str(self.session.path),
            "host": self.host,
            "attempt": self.attempt,
            "status": self.status,
            "trouble": self.trouble,
            "started": self.started,
            "last_event": self.last,
            "seconds": max(0, self.last - self.started) / SECOND if self.last else None,
            "epoch": self.epoch,
            "steps": self.steps,
            "failed_steps": self.failed_steps,
            "last_step": self.last_step,
            "open_step": pending[-1]["step"] if pending else None,
            "step_time": quantiles(self.times),
            "data_wait": _mean(self.data_waits),
            "collective_wait": _median(self.waits),
            "errors": self.error_count,
            "stalls": self.stalls,
            "lines": {
                "read": self.holes.read,
                "damaged": self.holes.damaged,
                "dropped": self.holes.dropped,
                "pruned": self.holes.pruned,
                "why": self.why,
            },
        }


def _named(key: str, split: str) -> str:
    """A metric with its split, none for training; as `metric_name` has it, a key that names a split says it itself."""
    head, _, rest = key.partition("/")
    return (key if rest and head in SPLITS else f"{split}/{key}").removeprefix("train/")


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile (nearest rank) and maximum; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = {name: math.ceil(q * len(ordered)) - 1 for name, q in QUANTILES.items()}
    return {name: ordered[max(0, nth)] for name, nth in rank.items()}


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def summarise(sessions: Iterable[SessionPath], state_directory: Path | None = None) -> list[dict[str, Any]]:
    """Every job of some sessions, in the order in which they began."""
    jobs: dict[str, list[Session]] = {}
    for found in sessions:
        session = Session(found, state_directory / found.path.name if state_directory else None)
        session.read()
        jobs.setdefault(session.job, []).append(session)
    told = [_job(job, sorted(of, key=lambda s: (s.rank, s.role, s.started))) for job, of in jobs.items()]
    return sorted(told, key=lambda job: job["started"])


def _job(job: str, sessions: Sequence[Session]) -> dict[str, Any]:
    first = sessions[0]
    errors = sorted((e for s in sessions for e in s.errors), key=lambda e: e["ts"])
    checkpoints = sorted((c for s in sessions for c in s.checkpoints), key=lambda c: c["ts"])
    return {
        "job": job,
        "name": next((s.name for s in sessions if s.name), None),
        "group": next((s.group for s in sessions if s.group), None),
        "tags": first.tags,
        "started": min((s.started for s in sessions if s.started), default=0),
        "last_event": max(s.last for s in sessions),
        "ranks": len({(s.rank, s.role) for s in sessions}),
        "total_steps": max((s.total_steps for s in sessions if s.total_steps is not None), default=None),
        "sessions": [s.told() for s in sessions],
        "straggler": _straggler(sessions),
        "hyperparams": {key: value for s in sessions for key, value in s.hyperparams.items()},
        "metrics": _metrics_of(sessions),
        "errors": {"count": sum(s.error_count for s in sessions), "list": errors[:MOST_KEPT]},
        "checkpoints": checkpoints[-MOST_KEPT:],
        "delivery": _delivery(sessions),
    }


def _straggler(sessions: Sequence[Session]) -> dict[str, Any] | None:
    """The rank that waited least in collectives, as the others waited for it; None where nobody or only one waited."""
    waits: dict[int, array[float]] = {}
    for session in sessions:
        if len(session.waits):
            waits.setdefault(session.rank, array("d")).extend(session.waits)
    if len(waits) < 2:
        return None
    usual = {rank: median(values) for rank, values in waits.items()}  # a mean would tell of the first step alone
    slowest = min(usual, key=lambda rank: usual[rank])
    others = [wait for rank, wait in usual.items() if rank != slowest]
    return {"rank": slowest, "wait": usual[slowest], "others_wait": sum(others) / len(others)}


def _metrics_of(sessions: Sequence[Session]) -> dict[str, dict[str, Any]]:
    """Each metric: the last value of the lowest rank that has it, the extremes of all ranks."""
    found: dict[str, dict[str, Any]] = {}
    for session in sessions:
        for name, values in session.metrics.items():
            known = found.get(name)
            if known is None:
                found[name] = {"rank": session.rank, **values}
                continue
            if known["rank"] == session.rank and values["last_ts"] > known["last_ts"]:
                known |= {key: values[key] for key in ("last", "last_step", "last_ts")}
            known["points"] += values["points"]
            known["nonfinite"] += values["nonfinite"]
            if values["min"] is not None and (known["min"] is None or values["min"] < known["min"]):
                known |= {"min": values["min"], "min_step": values["min_step"]}
            if values["max"] is not None and (known["max"] is None or values["max"] > known["max"]):
                known["max"] = values["max"]
    return found


def _delivery(sessions: Sequence[Session]) -> list[dict[str, Any]]:
    """Each destination's signal over all sessions: records, lines that wait, sessions that are held, what was said."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for session in sessions:
        ledger = session_ledger(session.session, session.home)
        for destination, signals in ledger["destinations"].items():
            for signal, state in signals.items():
                row = found.setdefault(
                    (destination, signal),
                    {"destination": destination, "signal": signal, **dict.fromkeys(DELIVERY, 0), "sessions": 0,
                     "finished": 0, "held": 0, "lag": 0.0, "messages": []},
                )  # fmt: skip
                for name in DELIVERY:
                    row[name] += state[name]
                row["sessions"] += 1
                row["finished"] += state["finished"]
                row["held"] += state["state"] == "hold"
                row["lag"] = max(row["lag"], state["lag"])
                if state["message"] and state["message"] not in row["messages"]:
                    row["messages"].append(state["message"])
    return list(found.values())
