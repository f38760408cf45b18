"""Logs: hyperparameters, artifacts, milestones, errors and gaps as log records with an event name; log lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.mapping.open_scopes import OpenScopes
from stepspan.mapping.records import Log, Record, SdkRecord
from stepspan.mapping.sdk_records import SdkRecords
from stepspan.mapping.values import ARTIFACT, MALFORMED, flat, short, warn_unmappable

TRACE, DEBUG, INFO, WARN, ERROR, FATAL = 1, 5, 9, 13, 17, 21
SEVERITIES = {"trace": TRACE, "debug": DEBUG, "info": INFO, "warning": WARN, "error": ERROR, "critical": FATAL}
FAILED = frozenset({"failed", "error", "failure"})


class LogMapper:
    """One session's events as log records, each with the ids of the span it was logged in."""

    def __init__(self, header: Event) -> None:
        self.filtered = 0
        self._scopes = OpenScopes(header)
        self._logs: list[Log | SdkRecord] = []
        self._foreign = SdkRecords("logs")
        self._handlers: dict[str, Callable[[Event], None]] = {
            "hyperparams": self._hyperparams,
            "artifact": self._artifact,
            "event": self._event,
            "error": self._error,
            "log": self._log,
            "gap": self._gap,
            "otel": lambda event: self._logs.extend(self._foreign.of(event)),
            **dict.fromkeys(("run_begin", "epoch_begin", "step_begin", "span_begin"), self._scopes.begin),
            **dict.fromkeys(("run_end", "epoch_end", "step_end", "span_end"), self._end),
        }

    def map(self, events: Sequence[Event]) -> list[Record]:
        """The log records of the next events."""
        self._logs = []
        for event in events:
            handler = self._handlers.get(event["tag"])
            if handler:
                try:
                    handler(event)
                except MALFORMED as error:
                    warn_unmappable(event["tag"], repr(error))
        return list(self._logs)

    def finish(self, closed: Closed) -> list[Record]:
        """Nothing: the run's span says how the session ended."""
        return []

    def state(self) -> dict[str, Any]:
        """What is carried on."""
        return {"filtered": self.filtered, "scopes": self._scopes.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.filtered = state["filtered"]
        self._scopes.restore(state["scopes"])

    def _end(self, event: Event) -> None:
        self._scopes.end(event["begin"])

    def _add(self, event: Event, severity: int, name: str, body: str, attributes: dict[str, Any]) -> None:
        trace_id, span_id = self._scopes.ids_of(event.get("parent", 0)) or self._scopes.run_ids or (None, None)
        self._logs.append(Log(event["ts"], severity, short(body), name, attributes, trace_id, span_id))

    def _hyperparams(self, event: Event) -> None:
        params = event["params"]
        self._add(event, INFO, "training.hyperparams", orjson.dumps(params).decode(), flat(params))

    def _artifact(self, event: Event) -> None:
        fields: dict[str, Any] = {name: event[name] for name in ARTIFACT if name in event}
        self._add(event, INFO, "training.artifact", f"{event['kind']} {event['name']}: {event['path']}", flat(fields))

    def _event(self, event: Event) -> None:
        status = event.get("status")
        severity = ERROR if status is not None and status.lower() in FAILED else INFO
        severity = SEVERITIES.get(event.get("severity", ""), severity)
        told = {"status": status} if status is not None else {}
        body = event["name"] if status is None else f"{event['name']}: {status}"
        self._add(event, severity, event["name"], body, {**flat(event.get("attributes", {})), **told})

    def _error(self, event: Event) -> None:
        body = f"{event['type']}: {event['message']}"
        self._add(event, ERROR, "exception", body, {**flat(event.get("attributes", {})), **_exception(event)})

    def _log(self, event: Event) -> None:
        about = {"logger": short(event["logger"]), **(_exception(event["exception"]) if "exception" in event else {})}
        severity = SEVERITIES.get(event["severity"], INFO)
        self._add(event, severity, "", event["message"], {**flat(event.get("attributes", {})), **about})

    def _gap(self, event: Event) -> None:
        body = f"{event['dropped']} events could not be written: {event['why']}"
        self._add(event, WARN, "stepspan.gap", body, {"dropped": event["dropped"]})


def _exception(error: Mapping[str, str]) -> dict[str, str]:
    """By the semantic conventions."""
    return {
        "exception.type": error["type"],
        "exception.message": short(error["message"]),
        "exception.stacktrace": short(error["stack"]),
    }
