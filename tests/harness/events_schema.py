"""Whether events are as the classes of `stepspan.events` have them: no field of another type, missing or more."""

from __future__ import annotations

from functools import cache

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stepspan.events import BY_TAG, Event


def violations(event: Event) -> list[str]:
    """What is wrong with an event that is to be written; nothing is known of a tag that the schema does not have."""
    if event["tag"] not in BY_TAG:
        return []
    try:
        _adapter(event["tag"]).validate_python(event, strict=True)
    except ValidationError as error:
        return [f"{event['tag']}.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return []


@cache
def _adapter(tag: str) -> TypeAdapter[Event]:
    kind = BY_TAG[tag]
    kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return TypeAdapter(kind)
