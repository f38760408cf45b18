"""A scope as the current span of the OpenTelemetry context, so that spans made by the user's code are its children.

Imported only in a process that has imported OpenTelemetry itself. The ids are computed when somebody asks for them.
"""

from __future__ import annotations

from contextvars import Token
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import _RUNTIME_CONTEXT, Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.propagation import _SPAN_KEY

if TYPE_CHECKING:
    from stepspan.scopes import Scope

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class ScopeSpan(NonRecordingSpan):
    """Stands for a span that the journal, not an SDK, records."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._known: SpanContext | None = None

    def get_span_context(self) -> SpanContext:
        """The ids that the mapping will give this scope; sampled."""
        if self._known is None:
            trace_id, span_id = self._scope.owner.ids(self._scope)
            self._known = SpanContext(
                int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big"), is_remote=True, trace_flags=_SAMPLED
            )
        return self._known

    def __repr__(self) -> str:
        return f"ScopeSpan({self.get_span_context()!r})"


_adopted: object = None


def adopt(provider: object) -> None:
    """Take a global TracerProvider for ours: it writes to our journal, and its sampler keeps everything anyway."""
    global _adopted
    _adopted = provider


def foreign_provider() -> bool:
    """Whether somebody has installed a global TracerProvider, whose sampler a sampled parent would overrule."""
    return trace._TRACER_PROVIDER is not None and trace._TRACER_PROVIDER is not _adopted


def attach(scope: Scope) -> Token[Context]:
    """Make a scope the current span."""
    return _RUNTIME_CONTEXT.attach(Context({**_RUNTIME_CONTEXT.get_current(), _SPAN_KEY: ScopeSpan(scope)}))


def detach(token: Token[Context]) -> None:
    """Take it back. A scope may end in another task than it began in: there nothing is to be taken back."""
    try:  # `suppress` would cost a third of all that propagation costs
        _RUNTIME_CONTEXT.detach(token)
    except ValueError:
        return
