"""The OpenTelemetry Resource of a session: what every signal carries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias
from urllib.parse import unquote

from stepspan.environment import unquoted
from stepspan.errors import ConfigError
from stepspan.identity.resolution import Identity
from stepspan.identity.variables import Variables, valid_text

Scalar: TypeAlias = "str | bool | int | float"
Attribute: TypeAlias = "Scalar | list[Scalar]"


def resource_attributes(
    identity: Identity,
    env: Mapping[str, str],
    *,
    service_name: str | None = None,
    resource: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Attribute], tuple[str, ...]]:
    """The attributes of the Resource of every signal of this session.

    stepspan's own, over them those of OTEL_RESOURCE_ATTRIBUTES, over them `resource`; but nothing overrides job and
    rank. Attempt, process and session do not belong to it: each restart would begin new series.

    Args:
        identity: Who this process is.
        env: The environment.
        service_name: The service's name. None: that of `resource`, else OTEL_SERVICE_NAME, else that of
            OTEL_RESOURCE_ATTRIBUTES, else "training".
        resource: Further attributes: strings, booleans, 64-bit integers, finite numbers, or lists of one of them.

    Returns:
        The attributes, and warnings about what was left out.

    Raises:
        ConfigError: `service_name`, or a key or value of `resource`, cannot be sent.

    """
    variables = Variables(env)
    given: dict[str, Attribute] = {**_from_variable(variables)}
    if not str(given.get("service.name", "")).strip():
        given.pop("service.name", None)
    if name := variables.get("OTEL_SERVICE_NAME"):
        given["service.name"] = name
    for key, value in (resource or {}).items():
        given[valid_text("resource key", key)] = _attribute(f"resource[{key!r}]", value)
    if service_name is not None:
        given["service.name"] = valid_text("service_name", service_name)
    own: dict[str, Attribute] = {
        "service.name": valid_text("service_name", given.get("service.name") or "training"),
        "service.instance.id": identity.instance,
        "job_id": identity.job_id,
        "rank": identity.rank,
        "local_rank": identity.local_rank,
        "world_size": identity.world_size,
    }
    for key in own.keys() & given.keys() - {"service.name"}:
        if given[key] != own[key]:
            variables.warnings.append(f"resource attribute {key}={given[key]!r} ignored: it is {own[key]!r} here")
    return {**own, "host.name": identity.host, **given, **own}, tuple(variables.warnings)


def _from_variable(env: Variables) -> dict[str, str]:
    """OTEL_RESOURCE_ATTRIBUTES: `key=value,...`, the values percent-encoded, and strings by specification."""
    found: dict[str, str] = {}
    for pair in filter(str.strip, env.get("OTEL_RESOURCE_ATTRIBUTES").split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        try:
            if not (key and equals):
                raise ValueError
            found[key] = unquote(unquoted(value), errors="strict")
        except ValueError:
            env.warnings.append(f"OTEL_RESOURCE_ATTRIBUTES: {pair.strip()!r} is not key=value: ignored")
    return found


def _attribute(field: str, value: object) -> Attribute:
    """The value of a resource attribute that the user gave."""
    items = [_scalar(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    known = [item for item in items if item is not None]
    if len(known) < len(items) or len({type(item) for item in known}) > 1:
        raise ConfigError(
            field, value, "give a string, boolean, 64-bit integer or finite number, or a list of one of them"
        )
    return known if isinstance(value, (list, tuple)) else known[0]


def _scalar(value: object) -> Scalar | None:
    """The plain value, also of a subclass (numpy's float64, an enum's member), which JSON encoders refuse."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else None
    return float(value) if isinstance(value, float) and math.isfinite(value) else None
