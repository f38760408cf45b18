"""The names of stepspan's own environment variables, and the one that switches everything off.

Imported by every process that may log, so it imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "STEPSPAN_"
"""What the names of all of them begin with; the rest is a setting's name in capitals."""


def switched_off(env: Mapping[str, str]) -> bool:
    """Whether STEPSPAN_DISABLED is 1, true, yes or on: then nothing is recorded, whatever else is set."""
    return env.get(f"{PREFIX}DISABLED", "").strip().lower() in {"1", "true", "yes", "on"}
