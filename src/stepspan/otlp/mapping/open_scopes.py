"""What is open at a point of the journal, and its ids: the same that the process which began it computes."""

from __future__ import annotations

from typing import Any

from stepspan.events import Event
from stepspan.otlp import ids

MOST_OPEN = 10_000


class OpenScopes:
    """Folds begin and end events. A scope is plain JSON: its begin event and its ids, in hex."""

    def __init__(self, header: Event) -> None:
        self._header = header
        self.open: dict[int, dict[str, Any]] = {}
        self.run: list[str] | None = None

    def begin(self, event: Event) -> None:
        """Open a scope."""
        seq, header, tag = event["seq"], self._header, event["tag"]
        outer = self.open.get(event["parent"])
        scope: dict[str, Any] = {"begin": event, "parent": "", "step": 0, "epoch": None}
        if outer is not None:
            scope["epoch"], scope["step"] = outer["epoch"], outer["step"]
        if tag == "step_begin":
            trace_id = ids.step_trace_id(
                header["run_key"], event["split"], event.get("epoch"), event.get("lap", 0), event["step"]
            )
            scope["span"] = ids.step_span_id(trace_id, header["rank"], header["role"]).hex()
            scope["step"] = seq
            if header["rank"] or header["role"]:
                scope["parent"] = ids.step_span_id(trace_id, 0).hex()
            scope["trace"] = trace_id.hex()
        else:
            scope["span"] = ids.span_id(header["session"], seq).hex()
            if tag == "epoch_begin":
                scope["epoch"] = event["epoch"]
            if tag == "span_begin" and outer is not None and outer["begin"]["tag"] in {"span_begin", "step_begin"}:
                scope["trace"], scope["parent"] = outer["trace"], outer["span"]
            else:
                scope["trace"] = ids.outside_trace_id(
                    header["run_key"], header["rank"], header["role"], scope["epoch"], event["ts"]
                ).hex()
                if outer is not None and outer["trace"] == scope["trace"]:
                    scope["parent"] = outer["span"]
            if tag == "run_begin":
                self.run = [scope["trace"], scope["span"]]
        self.open[seq] = scope
        if len(self.open) > MOST_OPEN:  # begun and never ended; the run, the first, stays
            del self.open[list(self.open)[1]]

    def end(self, seq: int) -> dict[str, Any] | None:
        """Close a scope and return it; None for one that we never saw begin."""
        return self.open.pop(seq, None)

    def step_of(self, scope: dict[str, Any]) -> dict[str, Any] | None:
        """The open step around a scope that is no step itself."""
        return self.open.get(scope["step"]) if scope["step"] else None

    def ids_of(self, seq: int) -> tuple[bytes, bytes] | None:
        """Trace and span id of an open scope."""
        scope = self.open.get(seq)
        return (bytes.fromhex(scope["trace"]), bytes.fromhex(scope["span"])) if scope else None

    @property
    def run_ids(self) -> tuple[bytes, bytes] | None:
        """Trace and span id of the session's run."""
        return (bytes.fromhex(self.run[0]), bytes.fromhex(self.run[1])) if self.run else None

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {"open": [[seq, scope] for seq, scope in self.open.items()], "run": self.run}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.open = dict(state["open"])
        self.run = state["run"]
