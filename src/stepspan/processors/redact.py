"""Secrets stay out of the journal: the values of fields named like one, and credentials inside any text.

Only strings are secrets: `max_new_tokens=512` stays, and so does `pad_token="<pad>"`, whose name is no secret's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepspan.events import FIELDS, Event

REDACTED = "[redacted]"

_NAME = (
    r"(?:passwords?|passwd|passphrase|secrets?|credentials?|authorization|secret_?key|api_?keys?|access_?key(?:_?id)?"
    r"|private_?key|signing_?key|encryption_?key|(?:access|auth|api|hub|hf|bearer|refresh|session|personal|github|gitlab"
    r"|slack|wandb|neptune|comet|csrf|security|private|secret)_?token)"
)
SECRET_NAME = re.compile(rf"(?:^|.*[_\-. /]){_NAME}$", re.IGNORECASE)
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
IN_TEXT: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r"(\w://)[^\s/@:'\"]*:[^\s/@'\"]+@"), rf"\1{REDACTED}@"),  # https://user:password@host
    (re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{REDACTED}"),
    (
        re.compile(
            rf"((?<![A-Za-z0-9])[\w-]*?{_NAME}['\"]?\s*[:=]\s*['\"]?)(?!\[redacted)[^\s'\",;&)]+", re.IGNORECASE
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|glpat-|xox[abprs]-|AKIA)[\w-]{16,}"), REDACTED),  # tokens by their shape
)


class Redact:
    """Replaces secrets by "[redacted]", in names, values, messages, stack traces, and the header's resource.

    `names`: further field names (whole, case does not matter) whose string values are secret.
    """

    tags = frozenset(FIELDS) - {"metrics", "step_begin", "step_end", "epoch_begin", "epoch_end", "span_end", "gap"}

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = frozenset(name.lower() for name in names)
        self.spec = {"redact": {"names": list(names)}}

    def __call__(self, event: Event) -> Event:
        """The event without secrets."""
        return {key: self._clean(key, value) for key, value in event.items()}

    def text(self, value: str) -> str:
        """A text without the credentials it may hold."""
        for pattern, replacement in IN_TEXT:
            value = pattern.sub(replacement, value)
        return value

    def _is_secret(self, name: str) -> bool:
        return name.lower() in self._names or SECRET_NAME.match(CAMEL.sub("_", name)) is not None

    def _clean(self, name: str, value: Any) -> Any:
        if isinstance(value, str):
            return REDACTED if value and self._is_secret(name) else self.text(value)
        if isinstance(value, Mapping):
            return {key: self._clean(str(key), item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._clean(name, item) for item in value]
        return value
