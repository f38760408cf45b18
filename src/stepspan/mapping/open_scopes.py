"""What is open at a point of the journal, and its ids: the same that the process which began it computes."""

from __future__ import annotations

from itertools import islice
from typing import Any

from stepspan.events import Event
from stepspan.mapping import ids

MOST_OPEN = 10_000


def step_trace_id(header: Event, begin: Event) -> bytes:
    """The trace of the step that begins with `begin`."""
    return ids.step_trace_id(header["run_key"], begin["split"], begin.get("epoch"), begin.get("lap", 0), begin["step"])


class OpenScopes:
    """Folds begin and end events. A scope is plain JSON: its begin event and, once it is named, its ids in hex."""

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
            scope["step"] = seq
        else:
            scope["span"] = ids.span_id(header["session"], seq).hex()
            if tag == "epoch_begin":
                scope["epoch"] = event["epoch"]
            if tag == "span_begin" and outer is not None and outer["begin"]["tag"] in {"span_begin", "step_begin"}:
                self.name(outer)
                scope["trace"], scope["parent"] = outer["trace"], outer["span"]
            else:
                scope["trace"] = ids.outside_trace_id(
                    header["run_key"], header["rank"], header["role"], scope["epoch"], event["ts"]
                ).hex()
                if outer is not None and outer.get("trace") == scope["trace"]:
                    scope["parent"] = outer["span"]
            if tag == "run_begin":
                self.run = [scope["trace"], scope["span"]]
        self.open[seq] = scope
        if len(self.open) > MOST_OPEN:  # begun and never ended; the run, the first, stays
            del self.open[next(islice(self.open, 1, None))]

    def name(self, scope: dict[str, Any]) -> None:
        """Give a step its ids. They cost three hashes, and most steps of a fast run are never asked for theirs."""
        if "trace" not in scope:
            rank, role = self._header["rank"], self._header["role"]
            trace_id = step_trace_id(self._header, scope["begin"])
            scope["trace"], scope["span"] = trace_id.hex(), ids.step_span_id(trace_id, rank, role).hex()
            if rank or role:
                scope["parent"] = ids.step_span_id(trace_id, 0).hex()

    def end(self, seq: int) -> dict[str, Any] | None:
        """Close a scope and return it; None for one that we never saw begin."""
        return self.open.pop(seq, None)

    def step_of(self, scope: dict[str, Any]) -> dict[str, Any] | None:
        """The open step around a scope that is no step itself."""
        return self.open.get(scope["step"]) if scope["step"] else None

    def left_in(self, step: int) -> list[dict[str, Any]]:
        """What is still open in a step that has ended."""
        return [scope for scope in self.open.values() if scope["step"] == step]

    def in_collective(self, scope: dict[str, Any]) -> bool:
        """Whether a wait lies within another one of the same step."""
        outer = self.open.get(scope["begin"]["parent"])
        while outer is not None and outer["begin"]["tag"] == "span_begin":
            if outer["begin"].get("collective"):
                return True
            outer = self.open.get(outer["begin"]["parent"])
        return False

    def ids_of(self, seq: int) -> tuple[bytes, bytes] | None:
        """Trace and span id of an open scope."""
        scope = self.open.get(seq)
        if scope:
            self.name(scope)
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
