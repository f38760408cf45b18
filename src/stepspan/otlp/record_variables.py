"""The variables that say which records are sent, and how much of each: samplers, limits, exemplars.

They are the destination's: the journal keeps everything, and a later `stepspan sync` without them sends the rest to a
destination that has not got it yet. A value that says nothing counts as unset, as the specification wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from stepspan.errors import ConfigError
from stepspan.mapping.limits import AttributeLimits, RecordLimits
from stepspan.mapping.options import MappingOptions
from stepspan.mapping.sampling import Sampler
from stepspan.values import to_float

SAMPLER, SAMPLER_ARGUMENT = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
EXEMPLAR_FILTER = "OTEL_METRICS_EXEMPLAR_FILTER"
COUNT, LENGTH = "ATTRIBUTE_COUNT_LIMIT", "ATTRIBUTE_VALUE_LENGTH_LIMIT"
NAMES = (
    *(SAMPLER, SAMPLER_ARGUMENT, EXEMPLAR_FILTER),
    *(f"OTEL_{kind}{COUNT}" for kind in ("", "SPAN_", "EVENT_", "LINK_", "LOGRECORD_")),
    *(f"OTEL_{kind}{LENGTH}" for kind in ("", "SPAN_", "LOGRECORD_")),
    *("OTEL_SPAN_EVENT_COUNT_LIMIT", "OTEL_SPAN_LINK_COUNT_LIMIT"),
)

RATIOS = {"always_on": 1.0, "always_off": 0.0, "traceidratio": -1.0}
SAMPLERS = {**RATIOS, **{f"parentbased_{name}": ratio for name, ratio in RATIOS.items()}}
"""Name -> the share of the traces; below 0: the argument says it. Ours have no parent, so both kinds are one."""
FILTERS = {"always_on": True, "always_off": False, "trace_based": True}

Value = TypeVar("Value")


class RecordVariables(NamedTuple):
    """What the variables say.

    Args:
        options: For the mapping.
        ignored: Those that say nothing, each with its value and the fix.

    """

    options: MappingOptions
    ignored: tuple[str, ...]


def read_record_variables(variables: Mapping[str, str]) -> RecordVariables:
    """What the variables say of the records that are sent.

    Args:
        variables: As `stepspan.otlp.endpoint.read_variables` has them.

    """
    reader = _Reader(variables)
    count = reader.read(f"OTEL_{COUNT}", _count, None, _COUNT_FIX)
    length = reader.read(f"OTEL_{LENGTH}", _count, None, _COUNT_FIX)

    def limits(kind: str) -> AttributeLimits:
        return AttributeLimits(
            reader.read(f"OTEL_{kind}_{COUNT}", _count, count, _COUNT_FIX),
            reader.read(f"OTEL_{kind}_{LENGTH}", _count, length, _COUNT_FIX),
        )

    ratio = reader.read(SAMPLER, SAMPLERS.get, 1.0, f"must be one of {', '.join(SAMPLERS)}")
    if ratio < 0:
        ratio = reader.read(SAMPLER_ARGUMENT, _ratio, 1.0, "must be a number from 0 to 1")
    options = MappingOptions(
        sampler=Sampler(ratio),
        exemplars=reader.read(EXEMPLAR_FILTER, FILTERS.get, True, f"must be one of {', '.join(FILTERS)}"),
        limits=RecordLimits(
            span=limits("SPAN"),
            event=limits("EVENT"),
            link=limits("LINK"),
            log=limits("LOGRECORD"),
            events=reader.read("OTEL_SPAN_EVENT_COUNT_LIMIT", _count, None, _COUNT_FIX),
            links=reader.read("OTEL_SPAN_LINK_COUNT_LIMIT", _count, None, _COUNT_FIX),
        ),
    )
    return RecordVariables(options, tuple(reader.ignored))


_COUNT_FIX = "must be a whole number from 0"


class _Reader:
    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self.ignored: list[str] = []

    def read(self, name: str, parse: Callable[[str], Value | None], default: Value, fix: str) -> Value:
        """What a variable says, or the default."""
        text = self._variables.get(name)
        if text is None:
            return default
        value = parse(text.strip().lower())
        if value is None:
            self.ignored.append(f"{ConfigError(name, text, fix)}; ignored")
            return default
        return value


def _count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _ratio(text: str) -> float | None:
    ratio = to_float(text)
    return ratio if ratio is not None and 0 <= ratio <= 1 else None
