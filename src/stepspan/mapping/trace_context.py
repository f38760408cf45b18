"""The span that has started a run, as whoever starts processes hands it over: W3C Trace Context in variables.

OpenTelemetry's "Environment Variables as Context Propagation Carriers" names them TRACEPARENT and TRACESTATE. They are
read where OTEL_PROPAGATORS has "tracecontext", as it has by default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from stepspan.environment import unquoted
from stepspan.errors import ConfigError

PARENT, STATE, PROPAGATORS = "TRACEPARENT", "TRACESTATE", "OTEL_PROPAGATORS"
MAX_STATE_CHARS = 512
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
_STATE = re.compile(r"[\x20-\x7e]*")


class TraceContext(NamedTuple):
    """A span of somebody else.

    Args:
        trace_id: 16 bytes.
        span_id: 8 bytes.
        state: What tracing systems have to say of the trace; "" for nothing.

    """

    trace_id: bytes
    span_id: bytes
    state: str


def variable_fields(env: Mapping[str, str], *, joins: bool) -> tuple[dict[str, Any], str]:
    """The fields of a `run_begin` event that say which span has started the run.

    Args:
        env: The environment, or what else carries the context by the same names.
        joins: Whether the run's span is that span's child, and not only linked to it.

    Returns:
        The fields, none where there is no such span; and what is wrong with the variable, "" for nothing.

    """
    parent = unquoted(env.get(PARENT, "")).lower()
    propagators = unquoted(env.get(PROPAGATORS, "")).lower() or "tracecontext"
    if not parent or "tracecontext" not in map(str.strip, propagators.split(",")):
        return {}, ""
    if not _PARENT.fullmatch(parent):
        shown = parent.encode("utf-8", "replace").decode()
        fix = "not a traceparent (00-<32 hex digits>-<16 hex digits>-01)"
        return {}, f"{ConfigError(PARENT, shown, fix)}; ignored"
    state = unquoted(env.get(STATE, ""))
    fields: dict[str, Any] = {"traceparent": parent}
    if state and len(state) <= MAX_STATE_CHARS and _STATE.fullmatch(state):
        fields["tracestate"] = state
    return {**fields, **({"joins": True} if joins else {})}, ""


def trace_context(run_begin: Mapping[str, Any]) -> TraceContext | None:
    """The span that has started a run.

    Args:
        run_begin: The event with which it began.

    """
    parent = run_begin.get("traceparent")
    found = _PARENT.fullmatch(parent) if isinstance(parent, str) else None
    if found is None:
        return None
    state = run_begin.get("tracestate", "")
    return TraceContext(bytes.fromhex(found[1]), bytes.fromhex(found[2]), state if isinstance(state, str) else "")


def remote_parent(run_begin: Mapping[str, Any]) -> TraceContext | None:
    """The span that is the parent of a run's own; None where the run has a trace of its own.

    Args:
        run_begin: The event with which it began.

    """
    return trace_context(run_begin) if run_begin.get("joins") else None
