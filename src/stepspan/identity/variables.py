"""The environment as `resolve` reads it: blank is unset, and a launcher's nonsense is told and passed over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from stepspan.errors import ConfigError

DIGITS = re.compile(r"[0-9]{1,10}")  # `int` would take `1_000` and the digits of every script
LARGEST = 2**31 - 1  # of any rank or count


class Number(NamedTuple):
    """A count, and where it came from."""

    value: int
    source: str


class Text(NamedTuple):
    """A text, and where it came from."""

    value: str
    source: str


class Variables:
    """The environment. `names` is a list with spaces, of which the first that is set counts."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.warnings: list[str] = []

    def get(self, name: str) -> str:
        """The value of one variable; "" where it is blank or unset."""
        # Bytes that are not UTF-8 become `?`: neither JSON nor protobuf could carry them.
        return self._env.get(name, "").strip().encode("utf-8", "replace").decode()

    def text(self, names: str) -> Text | None:
        """The first of some variables that is set."""
        return next((Text(value, name) for name in names.split() if (value := self.get(name))), None)

    def number(self, names: str) -> Number | None:
        """The first of some variables that is set, if it is a whole number."""
        found = self.text(names)
        if found and DIGITS.fullmatch(found.value) and int(found.value) <= LARGEST:
            return Number(int(found.value), found.source)
        if found:
            self.warnings.append(f"{found.source}={found.value!r} is not a whole number: ignored")
        return None


def text_of(field: str, value: object) -> str:
    """A text that somebody gave. Raises `ConfigError`."""
    if not isinstance(value, str) or not value.strip() or value != value.encode("utf-8", "replace").decode():
        raise ConfigError(field, value, "give a string that is not blank and can be written as UTF-8")
    return value
