"""Secrets stay out of the journal: the values of fields named like one, and credentials inside any text.

Only strings are secrets: `max_new_tokens=512` stays, and so does `pad_token="<pad>"`, whose name is no secret's. Every
pattern takes time in proportion to the text: it begins at a fixed word, and nothing in it can match in two ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from stepspan.errors import ConfigError
from stepspan.events import TAGS, Event

REDACTED = "[redacted]"
MAX_CACHED_CHARS = 100
"""A text of at most so many characters, such as the name of a span, is likely to come again: its result is cached."""

_NAME = (
    r"(?:passwords?|passwd|passphrase|secrets?|credentials?|authorization|secret[_-]?key|api[_-]?keys?"
    r"|access[_-]?key(?:[_-]?id)?|(?:account|private|signing|encryption)[_-]?key|(?:access|auth|api|hub|hf|bearer|refresh"
    r"|session|personal|github|gitlab|slack|wandb|neptune|comet|csrf|security|private|secret)[_-]?token)"
)
SECRET_NAME = re.compile(rf"(?:^|[_\-. /])(?:{_NAME}|(?<![\s\S])token)\Z", re.IGNORECASE)
"""`token` is a secret's name only by itself: `pad_token` and `eos_token` are a tokenizer's."""
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_VALUE = r"(?:(?:bearer|basic|token)\s+)?(?!\[redacted)(?:(?<=\")[^\"\n]+|(?<=')[^'\n]+|[^\s'\",;&)}\]\\]+)"
IN_TEXT: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r"(\w://)[^\s/@:'\"]*:[^\s/?#'\"]+@"), rf"\1{REDACTED}@"),  # https://user:password@host
    (re.compile(rf"({_NAME}\\?['\"]?[ \t]*[:=][ \t]*\\?['\"]?){_VALUE}", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(rf"(--(?:[a-z0-9]+[_-])*{_NAME}\s+){_VALUE}", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"([?&](?:token|key|sig|[\w-]*signature)=)[^\s'\"&]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"(\b(?:bearer|basic)\s+)(?=[\w.~+/-]*\d)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA)[\w-]{16,}"), REDACTED),  # by their shape
)


HINT = re.compile(r"pass|secret|cred|auth|key|token|bearer|basic|sig|://|hf_|sk-|gh|glpat|xox|AKIA", re.IGNORECASE)
"""What a text must hold for any of the patterns to match: most texts hold none of it, and are passed over quickly."""
NUMERIC_TAGS = {"metrics", "memory", "step_begin", "step_end", "epoch_begin", "epoch_end", "span_end", "gap"}
"""Tags of events that hold numbers only."""
KEY_VALUE = {"key", "value"}
"""The fields of a KeyValue in OTLP JSON."""
OTLP_PLAIN = frozenset(
    ("traceId", "spanId", "parentSpanId", "startTimeUnixNano", "endTimeUnixNano", "timeUnixNano", "intValue",
     "observedTimeUnixNano", "doubleValue", "boolValue", "asInt", "asDouble", "bucketCounts", "explicitBounds")
)  # fmt: skip
"""Fields of OTLP JSON that hold no text."""


class Redact:
    """Replaces secrets by "[redacted]": in names, values, messages, stack traces, and the header's resource.

    Every run begins with one, unless the setting `redact` is false.

    Args:
        names: Further field names whose string values are secret. Whole names; case does not matter.

    Raises:
        ConfigError: `names` is a string instead of a list.

    Example:
        In Python, `Redact(["account"])`; in a settings file, `redact_names: [account]`, or::

            processors:
              - redact: {names: [account]}

    """

    tags = frozenset(TAGS - NUMERIC_TAGS)

    def __init__(self, names: Sequence[str] = ()) -> None:
        if isinstance(names, str):
            raise ConfigError("redact.names", names, f"give a list: [{names!r}]")
        self._names = frozenset(name.lower() for name in names)
        self.spec = {"redact": {"names": list(names)}}

    def __call__(self, event: Event) -> Event:
        """A copy of the event without secrets."""
        if event.get("tag") == "otel":
            return {key: self._redacted_otlp(value) for key, value in event.items()}
        return {key: self._redacted_value(key, value) for key, value in event.items()}

    def _is_secret(self, name: str) -> bool:
        return is_secret_name(name) or name.lower() in self._names

    def _redacted_value(self, name: str, value: Any) -> Any:
        """The value of a field of this name, without secrets."""
        if isinstance(value, str):
            return REDACTED if value and self._is_secret(name) else redacted_text(value)
        if isinstance(value, Mapping):
            secret = self._is_secret(name)  # then so is all that is in it
            return {
                redacted_text(str(key)): self._redacted_value(name if secret else str(key), item)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._redacted_value(name, item) for item in value]
        return value

    def _redacted_otlp(self, value: Any) -> Any:
        """OTLP JSON, in which the name of an attribute is a value, too, and no other field is a secret."""
        if type(value) is str:
            return redacted_text(value)
        if type(value) is list:
            return [self._redacted_otlp(item) for item in value]
        if type(value) is not dict:
            return self._redacted_value("", value)
        if value.keys() != KEY_VALUE:
            return {name: item if name in OTLP_PLAIN else self._redacted_otlp(item) for name, item in value.items()}
        name, content = value["key"], value["value"]
        if self._is_secret(str(name)) and not (type(content) is dict and content.keys() <= OTLP_PLAIN):
            return {"key": name, "value": {"stringValue": REDACTED}}
        return {"key": name, "value": self._redacted_otlp(content)}


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret, if it holds a text."""
    return SECRET_NAME.search(CAMEL.sub("_", name)) is not None


def redacted_text(text: str) -> str:
    """A text without the credentials it may hold."""
    return _cached_replace(text) if len(text) <= MAX_CACHED_CHARS else _replace_credentials(text)


def _replace_credentials(text: str) -> str:
    if HINT.search(text) is None:
        return text
    for pattern, replacement in IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


_cached_replace = lru_cache(maxsize=4096)(_replace_credentials)
