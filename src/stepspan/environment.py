"""The names of stepspan's own environment variables, and the one that switches everything off.

Imported by every process that may log, so it imports as good as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

PREFIX = "STEPSPAN_"
"""What the names of all of them begin with; the rest is a setting's name in capitals."""
OTHER_NAMES = frozenset(
    (
        *("DISABLED", "CONFIG", "JOB_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "ATTEMPT"),
        *("DELIVERER", "DELIVERER_LOCKS"),  # what a run hands to its deliverer
        *("STACK", "REQUIRE_STACK"),  # of stepspan's own tests
        *("GRAFANA_PORT", "GRAFANA_ROLE", "HEALTH_PORT", "LOKI_PORT", "OTLP_GRPC_PORT"),
        *("OTLP_HTTP_PORT", "PROMETHEUS_PORT", "RETENTION", "RETENTION_SIZE", "TEMPO_PORT"),  # of docker-compose.yml
    )
)
"""What else follows `PREFIX` in the names of variables that something reads."""
SIMILARITY = 0.6
"""How near, of 1, a known name must be in order to be suggested."""


def unquoted(value: str) -> str:
    """A variable's value without the space and the quotes around it: `docker --env-file` and YAML keep quotes."""
    value = value.strip()
    while len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and value[0] not in value[1:-1]:
        value = value[1:-1].strip()
    return value


def switched_off(env: Mapping[str, str]) -> bool:
    """Whether STEPSPAN_DISABLED is 1, true, yes or on: then nothing is recorded, whatever else is set."""
    return unquoted(env.get(f"{PREFIX}DISABLED", "")).lower() in {"1", "true", "yes", "on"}


def unknown_variables(env: Mapping[str, str], settings: Iterable[str]) -> dict[str, str]:
    """Variables that look like stepspan's, and that nothing reads.

    Args:
        env: The environment; a blank variable is none.
        settings: The names of all settings.

    Returns:
        Each one's name, and what is wrong with it, with the nearest name that is known.

    """
    names = [name for name, value in env.items() if name.upper().startswith(PREFIX) and value.strip()]
    known = {*OTHER_NAMES, *map(str.upper, settings)}
    return {
        name: f"{name} is no variable of stepspan, and has no effect{_suggestion(name[len(PREFIX) :].upper(), known)}"
        for name in names
        if not name.startswith(PREFIX) or name[len(PREFIX) :] not in known
    }


def _suggestion(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    return "".join(f": did you mean {PREFIX}{nearest}?" for nearest in get_close_matches(name, known, 1, SIMILARITY))
