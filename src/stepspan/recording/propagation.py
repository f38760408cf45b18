"""A scope as the current span of the OpenTelemetry context, so that spans made by the user's code are its children.

Imported only in a process that has imported OpenTelemetry itself. The ids are computed when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opentelemetry import trace
from opentelemetry.context import _RUNTIME_CONTEXT, Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.propagation import _SPAN_KEY

from stepspan.mapping.trace_context import PARENT, STATE

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)

KEEPS_ALL = ("AlwaysOnSampler", "ParentBased{root:AlwaysOnSampler,remoteParentSampled:AlwaysOnSampler,")
"""How the description of a sampler begins that a sampled parent cannot overrule: it keeps everything anyway."""


class ScopeSpan(NonRecordingSpan):
    """Stands for a span that the journal, not an SDK, records.

    Args:
        ids: Gives the trace id (16 bytes) and span id (8 bytes) that the mapping will give the scope.
        previous: The context that it was begun in.

    """

    def __init__(self, ids: Callable[[], tuple[bytes, bytes]], previous: Context) -> None:
        self._ids = ids
        self._known: SpanContext | None = None
        self.previous = previous
        self.token: Any = None
        self.ended = False

    def get_span_context(self) -> SpanContext:
        """The ids that the mapping will give this scope; sampled."""
        if self._known is None:
            trace_id, span_id = self._ids()
            self._known = SpanContext(
                int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big"), is_remote=True, trace_flags=_SAMPLED
            )
        return self._known

    def __repr__(self) -> str:
        return f"ScopeSpan({self.get_span_context()!r})"


_judged: tuple[object, bool] = (None, False)
"""A global TracerProvider, and whether a sampled parent would overrule its sampler."""


def sampler_would_be_overruled() -> bool:
    """Whether a global TracerProvider is installed whose sampler a sampled parent would overrule."""
    global _judged
    provider, overruled = _judged
    if provider is not trace._TRACER_PROVIDER:
        provider = trace._TRACER_PROVIDER
        _judged = provider, (overruled := not _keeps_all(provider))
    return overruled


def _keeps_all(provider: object) -> bool:
    sampler = getattr(provider, "sampler", None)
    try:
        return sampler is not None and str(sampler.get_description()).startswith(KEEPS_ALL)
    except Exception:  # a sampler that cannot describe itself may decide anything
        return False


def attach(ids: Callable[[], tuple[bytes, bytes]]) -> ScopeSpan:
    """Make a scope, known by its ids, the current span."""
    previous = _RUNTIME_CONTEXT.get_current()
    span = ScopeSpan(ids, previous)
    span.token = _RUNTIME_CONTEXT.attach(Context({**previous, _SPAN_KEY: span}))
    return span


def detach(span: ScopeSpan) -> None:
    """Restore the span before. A scope may end in another task than it began in: there is nothing to restore there.

    Nor is there while a scope of another run goes on that was begun inside this one: it restores what is open then.
    """
    span.ended = True
    current = _RUNTIME_CONTEXT.get_current().get(_SPAN_KEY)
    if current is not span and isinstance(current, ScopeSpan) and not current.ended:
        return
    try:  # `suppress` would cost a third of all that propagation costs
        _RUNTIME_CONTEXT.detach(span.token)
    except ValueError:
        return
    restored = _RUNTIME_CONTEXT.get_current().get(_SPAN_KEY)
    if isinstance(restored, ScopeSpan) and restored.ended:
        while isinstance(restored, ScopeSpan) and restored.ended:
            context = restored.previous
            restored = context.get(_SPAN_KEY)
        _RUNTIME_CONTEXT.attach(context)


def current_carrier() -> dict[str, str]:
    """The program's own current span as the variables would hand it over; empty where there is none but ours."""
    span = trace.get_current_span()
    context = span.get_span_context()
    if isinstance(span, ScopeSpan) or not context.is_valid:
        return {}
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return {PARENT: parent, STATE: context.trace_state.to_header()}
