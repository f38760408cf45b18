"""Traces: steps, epochs, phases and the run as spans, including those that a crash left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepspan.events import Event
from stepspan.journal.liveness import Closed
from stepspan.mapping.open_scopes import OpenScopes
from stepspan.mapping.records import Attributes, Link, Record, SdkRecord, Span, SpanEvent
from stepspan.mapping.sdk_records import SdkRecords
from stepspan.mapping.thinning import Thinning
from stepspan.mapping.values import ARTIFACT, MALFORMED, flat, short, warn_unmappable

SECOND = 1_000_000_000
MOST_EVENTS = 128  # of a span, as the SDK's default
STATUS_ERROR = 2  # in OTLP JSON
MOST_CHILDREN = 512  # of a step, until it is known whether its trace goes out


class TraceMapper:
    """One session's events as finished spans."""

    def __init__(self, header: Event) -> None:
        self.filtered = 0
        self._header = header
        self._scopes = OpenScopes(header)
        self._thinning = Thinning(header)
        self._foreign = SdkRecords("traces")
        self._spans: list[Span | SdkRecord] = []
        self._run: int = 0
        """The run scope's `seq`."""
        self._to_run: list[Link] = []
        self._handlers: dict[str, Callable[[Event], None]] = {
            "run_begin": self._run_begin,
            "epoch_begin": self._begin,
            "step_begin": self._begin,
            "span_begin": self._begin,
            "run_end": self._end,
            "epoch_end": self._end,
            "step_end": self._end,
            "span_end": self._end,
            "hyperparams": self._hyperparams,
            "artifact": self._on_run,
            "event": self._on_run,
            "error": self._error,
            "otel": self._otel,
        }

    def map(self, events: Sequence[Event]) -> list[Record]:
        """The spans that the next events end."""
        self._spans = []
        for event in events:
            handler = self._handlers.get(event["tag"])
            if handler:
                try:
                    handler(event)
                except MALFORMED as error:
                    warn_unmappable(event["tag"], repr(error))
        return list(self._spans)

    def finish(self, closed: Closed) -> list[Record]:
        """What stands open in a session that has ended, innermost first: ERROR, ended at the last event."""
        self._spans = []
        for seq in sorted(self._scopes.open, reverse=True):
            status = closed.status if seq == self._run else "interrupted"
            self._end({"tag": "", "begin": seq, "ts": closed.ts, "status": status})
        return list(self._spans)

    def state(self) -> dict[str, Any]:
        """What is carried on."""
        return {
            "filtered": self.filtered,
            "scopes": self._scopes.state(),
            "thinning": self._thinning.state,
            "run": self._run,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.filtered = state["filtered"]
        self._scopes.restore(state["scopes"])
        self._thinning.state = state["thinning"]
        self._run = state["run"]

    def _begin(self, event: Event) -> None:
        self._scopes.begin(event)

    def _run_begin(self, event: Event) -> None:
        self._run = event["seq"]
        self._begin(event)

    def _end(self, event: Event) -> None:
        scope = self._scopes.end(event["begin"])
        if scope is None:
            return
        if scope["begin"]["tag"] == "step_begin":
            self._step_end(scope, event)
            return
        if scope.get("thinned"):  # it has outlived its step
            self.filtered += 1
            return
        step = self._scopes.step_of(scope)
        if step is None:
            self._spans.append(self._span(scope, event))
            return
        begin = scope["begin"]
        if begin.get("collective") and not begin.get("cuda") and not self._scopes.in_collective(scope):
            step["wait"] = step.get("wait", 0.0) + max(0, event["ts"] - begin["ts"]) / SECOND
        self._await(step, scope, event)

    def _await(self, step: dict[str, Any], scope: dict[str, Any], end: Event) -> None:
        """A span goes out with its step."""
        children = step.setdefault("children", [])
        if len(children) < MOST_CHILDREN:
            children.append([scope, end])
        else:
            self.filtered += 1

    def _step_end(self, scope: dict[str, Any], end: Event) -> None:
        begin = scope["begin"]
        duration = max(0, end.get("ended", end["ts"]) - begin["ts"]) / SECOND
        children = scope.get("children", ())
        kept = self._thinning.keeps(begin, end, duration)
        failed = "error" in scope or any("error" in child for child, _ in children)
        if not kept and (begin.get("thin") or not failed):
            self.filtered += 1 + len(children)
            for left in self._scopes.left_in(begin["seq"]):
                left["thinned"] = True
            return
        self._spans.append(self._span(scope, end))
        for child, child_end in children:
            self._spans += self._foreign.of(child_end) if "foreign" in child else [self._span(child, child_end)]

    def _otel(self, event: Event) -> None:
        """A span of other instrumentation waits, as our own do, for the end of the step whose trace it is in."""
        for span in self._foreign.of(event):
            scope = self._scopes.open.get(event.get("parent", 0))
            step = self._scopes.step_of(scope) if scope is not None else None
            if step is not None:
                self._scopes.name(step)
            if step is None or step["trace"] != span.record["traceId"]:
                self._spans.append(span)
                continue
            failed = {"error": ""} if span.record.get("status", {}).get("code") == STATUS_ERROR else {}
            self._await(step, {"foreign": True, **failed}, event)

    def _span(self, scope: dict[str, Any], end: Event) -> Span:
        begin, status = scope["begin"], end.get("status", "")
        kind = begin["tag"].removesuffix("_begin")
        finish = max(end.get("ended", end["ts"]), begin["ts"])
        failed = "error" in scope or status in {"error", "failed", "interrupted"}
        self._scopes.name(scope)
        parent = scope["parent"]
        return Span(
            trace_id=bytes.fromhex(scope["trace"]),
            span_id=bytes.fromhex(scope["span"]),
            parent_id=bytes.fromhex(parent) if parent else None,
            name=short(begin["name"]) if kind == "span" else f"training.{kind}",
            start=begin["ts"],
            end=finish,
            attributes=self._attributes(kind, scope, end),
            error=scope.get("error", status) if failed else None,
            events=[SpanEvent(name, ts, attributes) for name, ts, attributes in scope.get("events", ())],
            links=self._links(kind, scope),
        )

    def _attributes(self, kind: str, scope: dict[str, Any], end: Event) -> Attributes:
        begin, header = scope["begin"], self._header
        if kind == "step":
            fields = {name: begin[name] for name in ("step", "split", "epoch", "lap") if name in begin}
            if "data_wait" in end:
                fields["data_wait"] = end["data_wait"]
            if "wait" in scope:
                fields["wait"] = scope["wait"]
            return fields
        if kind == "epoch":
            return {"epoch": begin["epoch"]}
        if kind == "run":
            return {
                "name": short(begin["name"]),
                **({"group": begin["group"]} if begin.get("group") else {}),
                "tags": [short(str(tag)) for tag in begin.get("tags", ())],
                "attempt": begin["attempt"],
                "session": header["session"],
                "process.pid": header["pid"],
                "status": end.get("status", ""),
                **scope.get("hyperparams", {}),
            }
        collective = {"collective": True} if begin.get("collective") else {}
        return {**flat(begin.get("attributes", {})), **collective}

    def _links(self, kind: str, scope: dict[str, Any]) -> list[Link]:
        """Each span that begins a part of a trace leads to its run."""
        if kind == "run" or (kind == "span" and scope["parent"]):
            return []
        if not self._to_run and self._scopes.run_ids:
            self._to_run = [Link(*self._scopes.run_ids, {"relation": "run"})]
        return self._to_run

    def _hyperparams(self, event: Event) -> None:
        run = self._scopes.open.get(self._run)
        if run is not None:
            params = run.setdefault("hyperparams", {})
            params.update({f"hyperparams.{key}": value for key, value in flat(event["params"]).items()})
            for key in list(params)[MOST_EVENTS:]:
                del params[key]

    def _on_run(self, event: Event) -> None:
        run = self._scopes.open.get(self._run)
        if run is None:
            return
        if event["tag"] == "artifact":
            fields: dict[str, Any] = {name: event[name] for name in ARTIFACT if name in event}
            self._add(run, "training.artifact", event["ts"], flat(fields))
        else:
            status = {"status": event["status"]} if "status" in event else {}
            self._add(run, event["name"], event["ts"], {**flat(event.get("attributes", {})), **status})

    def _error(self, event: Event) -> None:
        scope = self._scopes.open.get(event["parent"])
        if scope is None:
            return
        scope["error"] = short(f"{event['type']}: {event['message']}")
        exception = {
            "exception.type": event["type"],
            "exception.message": short(event["message"]),
            "exception.stacktrace": short(event["stack"]),
        }
        self._add(scope, "exception", event["ts"], {**flat(event.get("attributes", {})), **exception})

    @staticmethod
    def _add(scope: dict[str, Any], name: str, ts: int, attributes: Attributes) -> None:
        events = scope.setdefault("events", [])
        if len(events) < MOST_EVENTS:
            events.append([name, ts, attributes])
