"""Secrets stay out of the journal: the values of fields named like one, and credentials inside any text.

Only strings are secrets: `max_new_tokens=512` stays, and so does `pad_token="<pad>"`, whose name is no secret's. Every
pattern takes time in proportion to the text: it begins at a fixed word, and nothing in it can match in two ways. How
much of an event is looked at is bounded, because the training thread waits for it; the rest is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from stepspan.conversion import MAX_ENTRIES, json_value
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
SECRET_NAME = re.compile(rf"(?:^|[_\-. /'\"])(?:{_NAME}|(?<![\s\S])token)\Z", re.IGNORECASE)
"""`token` is a secret's name only by itself: `pad_token` and `eos_token` are a tokenizer's."""
AROUND_KEYS = "()[]{}'\", "
"""What stands around the words of a key that was a tuple, say."""
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_VALUE = r"(?:(?:bearer|basic|token)\s+)?(?!\[redacted)(?:(?<=\")[^\"\n]+|(?<=')[^'\n]+|[^\s'\",;&)}\]\\]+)"
IN_TEXT: Sequence[tuple[Sequence[str], re.Pattern[str], str]] = (
    (["://"], re.compile(r"(\w://)[^\s/@:'\"]*:[^\s/?#'\"]+@"), rf"\1{REDACTED}@"),  # https://user:password@host
    ([":", "="], re.compile(rf"({_NAME}\\?['\"]?[ \t]*[:=][ \t]*\\?['\"]?){_VALUE}", re.I), rf"\1{REDACTED}"),
    (["--"], re.compile(rf"(--(?:[a-z0-9]+[_-])*{_NAME}\s+){_VALUE}", re.I), rf"\1{REDACTED}"),
    (["?", "&"], re.compile(r"([?&](?:token|key|sig|[\w-]*signature)=)[^\s'\"&]+", re.I), rf"\1{REDACTED}"),
    (["bearer", "basic"], re.compile(r"(\b(?:bearer|basic)\s+)(?=[\w.~+/-]*\d)[\w.~+/=-]{8,}", re.I), rf"\1{REDACTED}"),
    (
        ["hf_", "sk-", "gh", "glpat-", "xox", "akia"],
        re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA)[\w-]{16,}"),  # by their shape
        REDACTED,
    ),
)
"""What a text must hold, in lower case, for a pattern to match; the pattern; what replaces it."""
HINTS = ("pass", "secret", "cred", "auth", "key", "token", "bearer", "basic", "sig", "://", "hf_", "sk-", "gh", "glpat",
         "xox", "akia")  # fmt: skip
"""What a text must hold for any of them to match: most texts hold none of it, and are passed over quickly."""
HINT = re.compile("|".join(HINTS), re.IGNORECASE)
MAX_EXAMINED = MAX_ENTRIES + 100
"""Entries of mappings and lists of an event: what users may log at once, and what stepspan adds to it."""
MAX_CHARS = 16 << 20
"""Of the texts of an event."""
MAX_MATCHED_CHARS = 256 << 10
"""Of those texts of a field that hold a word of a credential: to match patterns takes fifty times as long as to find
that none can match."""
MAX_CREDENTIAL_CHARS = 4096
"""Of the end of a text that is cut: it may be the beginning of a credential, which no pattern knows without its end."""
MAX_NAME_CHARS = 200
"""Of the end of a key, where the word stands that makes it a secret's."""
PLAIN = frozenset({int, float, bool, type(None)})
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
        """A copy of the event without secrets, and without what is beyond the limits; then its `cut` says so."""
        examination = _Examination(self._names)
        if event.get("tag") == "otel":
            redacted = {key: examination.otlp(value) for key, value in event.items()}
        else:
            redacted = {key: examination.field(key, value) for key, value in event.items()}
        if examination.cut:
            redacted["cut"] = event.get("cut", 0) + examination.cut
        return redacted


class _Examination:
    """Looks at one event. What it has no more time for, it leaves out: nothing is written that it has not seen."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._entries, self._chars, self._matched = MAX_EXAMINED, MAX_CHARS, MAX_MATCHED_CHARS
        self.cut = 0
        """How many entries were left out, and texts cut."""

    def field(self, name: str, value: Any) -> Any:
        """A field of the event itself: a long message leaves time for the stack trace that follows."""
        self._matched = MAX_MATCHED_CHARS
        return value if type(value) in PLAIN else self.value(name, value)

    def value(self, name: str, value: Any) -> Any:
        """The value of a field of this name, without secrets."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind is str:
            return REDACTED if value and self._is_secret(name) else self._text(value)
        if kind is dict or isinstance(value, Mapping):
            return self._mapping(value, name if self._is_secret(name) else None)
        if isinstance(value, (list, tuple)):
            kept = value[: self._entries]
            self._entries -= len(kept)
            self.cut += len(value) - len(kept)
            if any(type(item) is str and item.startswith("-") for item in kept):
                return self._arguments(name, kept)
            return [item if type(item) in PLAIN else self.value(name, item) for item in kept]
        if isinstance(value, str):
            return self.value(name, str.__str__(value))
        return self.value(name, json_value(value))  # what another processor has added

    def _arguments(self, name: str, items: Sequence[Any]) -> list[Any]:
        """A list that may be a command line: what follows `--password` is secret."""
        redacted, option = [], ""
        for item in items:
            redacted.append(self.value(option or name, item))
            is_option = type(item) is str and item.startswith("-")
            option = item.lstrip("-") if is_option and self._is_secret(item.lstrip("-")) else ""
        return redacted

    def otlp(self, value: Any) -> Any:
        """OTLP JSON, in which the name of an attribute is a value, too, and no other field is a secret."""
        kind = type(value)
        if kind is str:
            return self._text(value)
        if kind is list:
            return [self.otlp(item) for item in value if not (is_key_value(item) and self._is_used_up())]
        if kind is not dict:
            return self.value("", value)
        if value.keys() == {"values"} and type(value["values"]) is list:
            kept = value["values"][: self._entries]
            self._entries -= len(kept)
            self.cut += len(value["values"]) - len(kept)
            return {"values": [self.otlp(item) for item in kept]}
        if value.keys() != KEY_VALUE:
            return {name: item if name in OTLP_PLAIN else self.otlp(item) for name, item in value.items()}
        name, content = value["key"], value["value"]
        if self._is_secret(str(name)) and not (type(content) is dict and content.keys() <= OTLP_PLAIN):
            return {"key": name, "value": {"stringValue": REDACTED}}
        return {"key": name, "value": self.otlp(content)}

    def _mapping(self, value: Mapping[Any, Any], secret_name: str | None) -> dict[str, Any]:
        """A mapping; all that is in one with a secret's name is secret."""
        redacted: dict[str, Any] = {}
        for key, item in value.items():
            if self._is_used_up():
                self.cut += len(value) - len(redacted) - 1
                break
            name = key if type(key) is str else str(key)
            if type(item) in PLAIN:
                redacted[self._text(name)] = item
            elif type(item) is str and secret_name is None:
                clean = self._text(name)
                redacted[clean] = REDACTED if item and self._is_secret(name) else self._text(item)
            else:
                redacted[self._text(name)] = self.value(secret_name or name, item)
        return redacted

    def _is_used_up(self) -> bool:
        """Count an entry; whether it is one too many."""
        if self._entries > 0:
            self._entries -= 1
            return False
        self.cut += 1
        return True

    def _is_secret(self, name: str) -> bool:
        name = name[-MAX_NAME_CHARS:]
        return is_secret_name(name) or (bool(self._names) and name.lower() in self._names)

    def _text(self, text: str) -> str:
        """A text without the credentials it may hold."""
        length = len(text)
        if length <= MAX_CACHED_CHARS:
            return _cached_replace(text)
        kept = self._beginning(text, self._chars)
        self._chars -= len(kept)
        patterns = patterns_for(kept)
        if patterns:
            kept = self._beginning(kept, self._matched)
            self._matched -= len(kept)
        clean = replace_credentials(kept, patterns)
        if len(kept) == length:
            return clean
        self.cut += 1
        return f"{clean}[cut: {length - len(kept)} characters]"

    @staticmethod
    def _beginning(text: str, limit: int) -> str:
        """As much of a text as may be looked at, up to the last word that is certainly complete."""
        if len(text) <= limit:
            return text
        end = text[max(0, limit - MAX_CREDENTIAL_CHARS) : limit]
        last_word = len(end) - max(end.rfind(" "), end.rfind("\n"), -1) - 1
        return text[: limit - last_word]


def is_key_value(item: Any) -> bool:
    """Whether this is an attribute in OTLP JSON."""
    return type(item) is dict and item.keys() == KEY_VALUE


@lru_cache(maxsize=8192)
def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret, if it holds a text."""
    if HINT.search(name) is None:
        return False
    return SECRET_NAME.search(CAMEL.sub("_", name.strip(AROUND_KEYS))) is not None


def patterns_for(text: str) -> list[tuple[re.Pattern[str], str]]:
    """The patterns that may match a text, each with what replaces it."""
    folded = text.lower() if text.isascii() else text.casefold()
    if not any(hint in folded for hint in HINTS):
        return []
    return [
        (pattern, replacement) for needed, pattern, replacement in IN_TEXT if any(word in folded for word in needed)
    ]


def replace_credentials(text: str, patterns: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """A text without what the patterns find in it."""
    for pattern, replacement in patterns:
        text = pattern.sub(replacement, text)
    return text


def redacted_text(text: str) -> str:
    """A text without the credentials it may hold, whatever its length."""
    return replace_credentials(text, patterns_for(text))


@lru_cache(maxsize=8192)
def _cached_replace(text: str) -> str:
    return text if HINT.search(text) is None else redacted_text(text)
