"""The variables that the OpenTelemetry SDK raises for, as it is imported and as its providers are made."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from stepspan.environment import unquoted
from stepspan.errors import ConfigError
from stepspan.otlp import record_variables
from stepspan.values import to_float

log = logging.getLogger("stepspan")

INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
"""Of the SDK's metrics; the other variables that it raises for are those of `record_variables`."""
_warned: set[str] = set()


@contextmanager
def readable_variables() -> Iterator[None]:
    """Within it the variables that the SDK would raise for are unset, with a warning, and the others have no quotes.

    The SDK reads them as it is imported, and as its providers are made.
    """
    found = {name: text for name in (*record_variables.NAMES, INTERVAL) if (text := os.environ.get(name))}
    plain = {name: unquoted(text) for name, text in found.items()}
    wrong = {ignored.partition("=")[0]: ignored for ignored in record_variables.read_record_variables(plain).ignored}
    if plain.get(INTERVAL) and not (to_float(plain[INTERVAL]) or 0) > 0:
        wrong[INTERVAL] = f"{ConfigError(INTERVAL, plain[INTERVAL], 'must be milliseconds above 0')}; ignored"
    for warning in set(wrong.values()) - _warned:
        log.warning("stepspan: %s", warning)
    _warned.update(wrong.values())
    try:
        for name in found:
            if name in wrong:
                del os.environ[name]
            else:
                os.environ[name] = plain[name]
        yield
    finally:
        os.environ.update(found)
