"""Logs: hyperparameters, artifacts, milestones, errors and gaps as log records with an event name; log lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.mapping.attributes import (
    MAX_ATTRIBUTES,
    MAX_TEXT_CHARS,
    Flat,
    artifact_attributes,
    event_attributes,
    exception_attributes,
    flatten,
    json_text,
)
from stepspan.mapping.clock import clock_text, seconds_ahead
from stepspan.mapping.dispatch import NothingAhead, dispatch
from stepspan.mapping.open_scopes import OpenScopes
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Log, Record, SdkRecord
from stepspan.mapping.sdk_records import SdkRecords
from stepspan.values import shorten

TRACE, DEBUG, INFO, WARN, ERROR, FATAL = 1, 5, 9, 13, 17, 21
SEVERITIES = {"trace": TRACE, "debug": DEBUG, "info": INFO, "warning": WARN, "error": ERROR, "critical": FATAL}
"""An event's `severity` -> OTLP's severity number."""
FAILED_STATUSES = frozenset({"failed", "error", "failure"})
"""Of a milestone, in lower case: what makes its severity ERROR."""


class LogMapper(NothingAhead):
    """One session's events as log records, each with the ids of the span it was logged in."""

    def __init__(self, header: Event, options: MappingOptions = DEFAULT_OPTIONS) -> None:
        self.filtered = 0
        self._limits = options.limits if options.limits != DEFAULT_OPTIONS.limits else None
        self._max_attributes = max(MAX_ATTRIBUTES, options.limits.log.count or 0)
        self._scopes = OpenScopes(header)
        self._logs: list[Log | SdkRecord] = []
        self._sdk_records = SdkRecords("logs")
        self._handlers: dict[str, Callable[[Event], Any]] = {
            "hyperparams": self._hyperparams,
            "artifact": self._artifact,
            "event": self._event,
            "error": self._error,
            "log": self._log,
            "gap": self._gap,
            "clock": self._clock,
            "dropped": self._dropped,
            "otel": lambda event: self._logs.extend(self._sdk_records.of(event)),
            "run_begin": self._scopes.begin_run,
            **dict.fromkeys(("epoch_begin", "span_begin"), self._scopes.begin),
            "step_begin": self._scopes.begin_step,
            **dict.fromkeys(("run_end", "epoch_end", "step_end", "span_end"), self._scopes.close),
        }
        self.tags = self._handlers.keys()

    def map(self, events: Sequence[Event]) -> list[Record]:
        """The log records of the next events."""
        self._logs = []
        dispatch(self._handlers, events)
        limits = self._limits
        return list(self._logs) if limits is None else [limits.apply("logs", record) for record in self._logs]

    def finish(self, closed: Closed) -> list[Record]:
        """Nothing: the run's span says how the session ended."""
        return []

    def state(self) -> dict[str, Any]:
        """What is carried on, as JSON."""
        return {"scopes": self._scopes.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, of an equal journal."""
        self._scopes.restore(state["scopes"])

    def _add(
        self, event: Event, severity: int, name: str, body: str, attributes: dict[str, Any], dropped: int = 0
    ) -> None:
        scope = self._scopes.open.get(event.get("parent", 0))
        ids = self._scopes.run_ids or ()
        if scope is not None:
            self._scopes.name(scope)
            ids = scope.trace_id, scope.span_id
        body = shorten(body, MAX_TEXT_CHARS)
        trace_id, span_id = map(bytes.fromhex, ids) if ids else (None, None)
        self._logs.append(Log(event["ts"], severity, body, name, attributes, trace_id, span_id, dropped))

    def _flatten(self, values: Mapping[str, Any], event: Event) -> Flat:
        return flatten(values, cut=event.get("cut", 0), limit=self._max_attributes)

    def _hyperparams(self, event: Event) -> None:
        params = event["params"]
        self._add(event, INFO, "training.hyperparams", json_text(params), *self._flatten(params, event))

    def _artifact(self, event: Event) -> None:
        body = f"{event['kind']} {event['name']}: {event['path']}"
        self._add(event, INFO, "training.artifact", body, artifact_attributes(event))

    def _event(self, event: Event) -> None:
        status = event.get("status")
        severity = ERROR if status is not None and status.lower() in FAILED_STATUSES else INFO
        severity = SEVERITIES.get(event.get("severity", ""), severity)
        body = event["name"] if status is None else f"{event['name']}: {status}"
        self._add(event, severity, event["name"], body, *event_attributes(event, self._max_attributes))

    def _error(self, event: Event) -> None:
        attributes = exception_attributes(event, self._max_attributes)
        self._add(event, ERROR, "exception", f"{event['type']}: {event['message']}", *attributes)

    def _log(self, event: Event) -> None:
        severity = SEVERITIES.get(event["severity"], INFO)
        attributes, dropped = self._flatten(event.get("attributes", {}), event)
        attributes["logger"] = shorten(event["logger"], MAX_TEXT_CHARS)
        if "exception" in event:
            attributes |= exception_attributes(event["exception"]).attributes
        self._add(event, severity, "", event["message"], attributes, dropped)

    def _gap(self, event: Event) -> None:
        body = f"{event['dropped']} events could not be written: {event['why']}"
        self._add(event, WARN, "stepspan.gap", body, {"dropped": event["dropped"]})

    def _clock(self, event: Event) -> None:
        self._add(event, WARN, "stepspan.clock", clock_text(event), {"ahead": seconds_ahead(event)})

    def _dropped(self, event: Event) -> None:
        count = event["count"]
        body = f"{count} {'value' if count == 1 else 'values'} of {event['key']} not recorded: {event['why']}"
        attributes = {"key": shorten(event["key"], MAX_TEXT_CHARS), "count": count}
        self._add(event, WARN, "stepspan.dropped_value", body, attributes)
