"""All that one session says of its run, in one pass over its lines."""

from __future__ import annotations

from array import array
from pathlib import Path
from statistics import fmean, median
from typing import Any

from stepspan.errors import JournalError
from stepspan.events import Event
from stepspan.journal.cursor import Ledger, Position
from stepspan.journal.layout import SessionPath
from stepspan.mapping.dispatch import MALFORMED
from stepspan.mapping.open_scopes import OpenScopes, Step
from stepspan.reading.metric_values import MetricValues, logged_values
from stepspan.reading.sessions import SessionReader, job_folder
from stepspan.reading.step_times import StepTimes, quantiles

SECOND_NS = 1_000_000_000
MAX_LISTED = 100
"""Errors and checkpoints of a session that are kept one by one; the first errors, the last checkpoints."""
SUCCEEDED = frozenset({None, "ok", "completed"})


class SessionSummary:
    """One session's part in a run. Memory: 24 bytes a training step, and what `MAX_LISTED` says.

    Times are Unix ns, durations seconds; None is not known.
    """

    def __init__(self, path: SessionPath) -> None:
        self.path = path
        self.job, self.role, self.rank, self.host = job_folder(path.path), "", path.rank, ""
        self.started = self.last_event = 0
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
        self.open_step: int | None = None
        """The number of the innermost step that has not ended, of any split."""
        self.failed_steps = 0
        self.stalls = 0
        self.metrics: dict[str, MetricValues] = {}
        self.hyperparams: dict[str, Any] = {}
        self.error_count = 0
        self.errors: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.lines = Ledger()
        self.gaps: dict[str, int] = {}
        """Why events could not be written -> how many."""
        self.data_waits = array("d")
        """How long each training step waited for its data, in seconds."""
        self.step_time: dict[str, float] | None = None
        """Quantiles of the training steps' times, in seconds."""
        self.collective_waits = array("d")
        """How long each training step with collectives waited in them, in seconds."""
        self._scopes: OpenScopes

    @classmethod
    def read(cls, path: SessionPath, *, boot_id: str, state_directory: Path | None = None) -> SessionSummary:
        """Read a session to its end. One that cannot be read says so in `problem`, with what was read of it.

        Args:
            path: The session.
            boot_id: This host's boot, to tell whether the session's writer lives.
            state_directory: Where delivery keeps its cursors if it may not write to the journal.

        """
        summary = cls(path)
        try:
            with SessionReader(path, state_directory) as reader:
                summary._read(reader, boot_id)
        except (OSError, JournalError) as error:
            summary.problem = str(error)
        return summary

    def _read(self, reader: SessionReader, boot_id: str) -> None:
        header = reader.header
        self.job, self.role = str(header.get("job_id", self.job)), str(header.get("role", ""))
        self.host, self.started = str(header.get("host", "")), int(header.get("started", 0))
        self.status = reader.status(boot_id)
        try:
            steps = StepTimes(header)
        except KeyError as missing:
            raise JournalError(f"{self.path.path}: its header lacks {missing}") from None
        scopes = self._scopes = OpenScopes(header)
        handlers = {
            "run_begin": self._run_begin,
            "epoch_begin": self._epoch_begin,
            "step_begin": scopes.begin_step,
            "step_end": self._step_end,
            "span_begin": scopes.begin,
            "span_end": scopes.close,
            "metrics": self._metrics,
            "hyperparams": lambda event: self.hyperparams.update(event["params"]),
            "progress": self._progress,
            "artifact": self._artifact,
            "error": self._error,
            "event": self._event,
            "gap": self._gap,
        }
        position = Position()
        try:
            for batch in reader.batches():
                for event in batch.events:
                    handler = handlers.get(event["tag"])
                    if handler is not None:
                        try:
                            handler(event)
                        except MALFORMED:
                            continue
                steps.add(batch.events)
                self.lines = self.lines.plus(batch.counts)
                position = batch.position
            if reader.closed is not None:  # lines before the end that no later line shows to be missing
                self.lines.damaged += max(0, reader.closed.seq - position.seq)
        finally:
            self.last_event = position.ts
            self.step_time, self.collective_waits = quantiles(steps.times), steps.collective_waits
            open_steps = [scope for scope in scopes.open.values() if isinstance(scope, Step)]
            self.open_step = open_steps[-1].begin["step"] if open_steps else None

    def as_dict(self) -> dict[str, Any]:
        """What `stepspan report --json` prints of a session."""
        return {
            "rank": self.rank,
            "role": self.role,
            "session": self.path.session,
            "path": str(self.path.path),
            "host": self.host,
            "attempt": self.attempt,
            "status": self.status,
            "trouble": self.problem,
            "started": self.started,
            "last_event": self.last_event,
            "seconds": max(0, self.last_event - self.started) / SECOND_NS if self.last_event else None,
            "epoch": self.epoch,
            "steps": len(self.data_waits),
            "failed_steps": self.failed_steps,
            "last_step": self.last_step,
            "open_step": self.open_step,
            "step_time": self.step_time,
            "data_wait": fmean(self.data_waits) if self.data_waits else None,
            "collective_wait": median(self.collective_waits) if self.collective_waits else None,
            "errors": self.error_count,
            "stalls": self.stalls,
            "lines": {
                "read": self.lines.read,
                "damaged": self.lines.damaged,
                "dropped": self.lines.dropped,
                "pruned": self.lines.pruned,
                "why": self.gaps,
            },
        }

    def _run_begin(self, event: Event) -> None:
        self.name, self.group, self.tags = event.get("name"), event.get("group"), event.get("tags") or []
        self.attempt = event.get("attempt")

    def _epoch_begin(self, event: Event) -> None:
        self.epoch = event["epoch"]

    def _step_end(self, event: Event) -> None:
        scope = self._scopes.close(event)
        if scope is None:
            return
        begin = scope.begin
        self.failed_steps += event.get("status") not in SUCCEEDED
        if begin["split"] == "train":
            self.last_step = begin["step"]
            self.data_waits.append(event.get("data_wait", 0.0))

    def _metrics(self, event: Event) -> None:
        for name, value in logged_values(event):
            if name not in self.metrics:
                self.metrics[name] = MetricValues(self.rank)
            self.metrics[name].add(value, event.get("step"), event["ts"])

    def _progress(self, event: Event) -> None:
        self.total_steps = event["total_steps"]

    def _artifact(self, event: Event) -> None:
        if event["kind"] == "checkpoint":
            checkpoint = {"name": event["name"], "path": event["path"], "step": event.get("step"), "ts": event["ts"]}
            self.checkpoints = [*self.checkpoints[1 - MAX_LISTED :], checkpoint]

    def _error(self, event: Event) -> None:
        self.error_count += 1
        if len(self.errors) == MAX_LISTED:
            return
        scope = self._scopes.open.get(event.get("parent", 0))
        step = self._scopes.open_step(scope) if scope else None
        error = {"rank": self.rank, "type": event["type"], "message": event["message"], "ts": event["ts"]}
        self.errors.append({**error, "step": int(step.begin["step"]) if step else None})

    def _event(self, event: Event) -> None:
        self.stalls += event["name"] == "training.stall" and event.get("status") != "recovered"

    def _gap(self, event: Event) -> None:
        reason = str(event["why"])
        self.gaps[reason] = self.gaps.get(reason, 0) + int(event["dropped"])
