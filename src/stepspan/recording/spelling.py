"""Attributes whose names are nearly those of parameters: `span("reduce", collectve=True)` is accepted, and wrong."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache

SIMILARITY = 0.8
"""How near, of 1, the names must be."""


@lru_cache(maxsize=1024)
def nearest_parameter(name: str, parameters: tuple[str, ...]) -> str | None:
    """The parameter that an attribute's name is nearly the name of.

    Args:
        name: Of the attribute.
        parameters: In lower case.

    Returns:
        The nearest one; None where none is near.

    """
    return next(iter(get_close_matches(name.lower(), parameters, 1, SIMILARITY)), None)
