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
    from stepspan.recording.scopes import Scope

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


KEEPS_ALL = ("AlwaysOnSampler", "ParentBased{root:AlwaysOnSampler,remoteParentSampled:AlwaysOnSampler,")
"""How the description of a sampler begins that a sampled parent cannot overrule: it keeps everything anyway."""

_judged: tuple[object, bool] = (None, False)
"""A global TracerProvider, and whether a sampled parent would overrule its sampler."""


def foreign_provider() -> bool:
    """Whether somebody has installed a global TracerProvider, whose sampler a sampled parent would overrule."""
    global _judged
    provider, foreign = _judged
    if provider is not trace._TRACER_PROVIDER:
        provider = trace._TRACER_PROVIDER
        _judged = provider, (foreign := not _keeps_all(provider))
    return foreign


def _keeps_all(provider: object) -> bool:
    sampler = getattr(provider, "sampler", None)
    try:
        return sampler is not None and str(sampler.get_description()).startswith(KEEPS_ALL)
    except Exception:  # somebody's sampler that describes nothing decides as it likes
        return False


def attach(scope: Scope) -> Token[Context]:
    """Make a scope the current span."""
    return _RUNTIME_CONTEXT.attach(Context({**_RUNTIME_CONTEXT.get_current(), _SPAN_KEY: ScopeSpan(scope)}))


def detach(token: Token[Context]) -> None:
    """Take it back. A scope may end in another task than it began in: there nothing is to be taken back."""
    try:  # `suppress` would cost a third of all that propagation costs
        _RUNTIME_CONTEXT.detach(token)
    except ValueError:
        return
