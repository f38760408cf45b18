"""The environment as `resolve` reads it: blank is unset, and a launcher's nonsense is ignored with a warning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from stepspan.environment import unquoted
from stepspan.errors import ConfigError

DIGITS = re.compile(r"[0-9]{1,10}")  # `int` would take `1_000` and the digits of every script
MAX_COUNT = 2**31 - 1
"""The largest rank, size or number of restarts."""


class FoundCount(NamedTuple):
    """A count, and where it came from."""

    value: int
    source: str

    def error(self, field: str, fix: str) -> ConfigError:
        """The error that this count is wrong for `field`, by the name it was given by."""
        return ConfigError(field if self.source == "argument" else self.source, self.value, fix)


class FoundText(NamedTuple):
    """A text, and where it came from."""

    value: str
    source: str


class Variables:
    """The environment. `warnings` collects what was ignored in it.

    `names` below are one or more variables, separated by spaces; the first that is set counts.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.warnings: list[str] = []

    def get(self, name: str) -> str:
        """The value of one variable; "" where it is blank or unset."""
        # Bytes that are not UTF-8 become `?`: neither JSON nor protobuf could carry them.
        return unquoted(self._env.get(name, "")).encode("utf-8", "replace").decode()

    def first_text(self, names: str) -> FoundText | None:
        """The first of these variables that is set."""
        return next((FoundText(value, name) for name in names.split() if (value := self.get(name))), None)

    def first_count(self, names: str) -> FoundCount | None:
        """The first of these variables that is set; None, with a warning, if it is not a whole number."""
        found = self.first_text(names)
        if found and DIGITS.fullmatch(found.value) and int(found.value) <= MAX_COUNT:
            return FoundCount(int(found.value), found.source)
        if found:
            self.warnings.append(f"{found.source}={found.value!r} is not a whole number: ignored")
        return None


def valid_text(field: str, value: object, alternative: str = "") -> str:
    """The text that the user gave for this field. Raises `ConfigError` if it is none, blank, or not UTF-8."""
    if not isinstance(value, str) or not value.strip() or value != value.encode("utf-8", "replace").decode():
        raise ConfigError(field, value, f"give a string that is not blank and can be written as UTF-8{alternative}")
    return value
