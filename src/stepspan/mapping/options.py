"""What a destination wants of the mapping. The same options and journal give the same records, always."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stepspan.mapping.limits import RecordLimits
from stepspan.mapping.sampling import Sampler


@dataclass(frozen=True, slots=True)
class MappingOptions:
    """How the events of a session become the records of one destination.

    Attributes:
        sampler: Which traces go out.
        exemplars: Whether histograms have exemplars.
        limits: How much of a span or log record goes out.
        temporality: What sums and histograms are. "delta": deltas, of all monotonic sums and of histograms.
            "lowmemory": the same, but what is read from the system's own counters (`sample` events) stays cumulative.
        histogram_aggregation: What `training.step.duration` is.

    """

    sampler: Sampler = field(default_factory=Sampler)
    exemplars: bool = True
    limits: RecordLimits = field(default_factory=RecordLimits)
    temporality: Literal["cumulative", "delta", "lowmemory"] = "cumulative"
    histogram_aggregation: Literal["base2_exponential_bucket_histogram", "explicit_bucket_histogram"] = (
        "base2_exponential_bucket_histogram"
    )

    def key(self) -> dict[str, Any]:
        """What a checkpoint must agree with, as JSON; empty by default."""
        found = asdict(self)
        default = asdict(DEFAULT_OPTIONS)
        return {name: value for name, value in found.items() if value != default[name]}


DEFAULT_OPTIONS = MappingOptions()
