"""Which traces go to a destination, by OpenTelemetry's samplers. The trace's id decides, so all ranks decide alike."""

from __future__ import annotations

from dataclasses import dataclass

_TRACE_ID_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampler:
    """Keeps a share of the traces.

    Attributes:
        ratio: From 0, no trace, to 1, all of them.

    """

    ratio: float = 1.0

    def keeps(self, trace_id: bytes) -> bool:
        """Whether a trace goes out: as opentelemetry-python's TraceIdRatioBased decides.

        Args:
            trace_id: Its 16 bytes.

        """
        return int.from_bytes(trace_id, "big") & _TRACE_ID_MASK < round(self.ratio * (_TRACE_ID_MASK + 1))
