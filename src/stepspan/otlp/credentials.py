"""Headers that are fetched anew while requests go out: from a file, a function, or a credential provider.

A token that expires belongs into one of these, not into a variable: what delivers lives for as long as the training.

    file       `STEPSPAN_HEADERS_FILE`: lines of `key=value` or `key: value`, or the syntax of
               OTEL_EXPORTER_OTLP_HEADERS. Looked at before each request, and read again when it has changed: also by a
               link that leads elsewhere now, as Kubernetes swaps its secrets. A file that can't be read, because it is
               being written, is passed over where it could be read before.
    function   called before each request; it belongs to this process, so delivery runs on threads.
    provider   an entry point of `opentelemetry_otlp_credential_provider`: a `requests.Session` that signs requests, or
               `grpc.ChannelCredentials`. Our own client sends what the session would have sent.

`Credentials` has all of an endpoint's headers. What a request is sent with is asked for by `Endpoint.request_headers`,
and after a receiver has refused it, `renew` says whether there is something else by now. No error and no `repr` here
shows a header's value.
"""

from __future__ import annotations

import operator
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from stepspan.environment import unquoted

MAX_FILE_BYTES = 64 << 10
ENTRY_POINTS = "opentelemetry_otlp_credential_provider"

_HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # what HTTP and gRPC both take
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
_FIELD = re.compile(r"([A-Za-z0-9_.-]+)\s*:(.*)")
_ENTRY = re.compile(r"([A-Za-z0-9_.-]+)\s*=(.*)")
_NEXT_ENTRY = re.compile(r",\s*(?=[A-Za-z0-9_.-]+\s*=)")
"""Where an entry of the variables' syntax ends, and another one begins."""


class CredentialsError(Exception):
    """No credentials can be had: the message says from where, and what to fix, and shows none."""


class HeaderSupply(Protocol):
    """Where headers come from that change. Equal ones give the same headers."""

    @property
    def identity(self) -> str:
        """Names where the headers come from, without any of them."""

    def headers(self, url: str, body: bytes) -> Mapping[str, str]:
        """The headers by lower-case name, the same object until they change. `CredentialsError`."""

    def renew(self) -> bool:
        """Fetch them anew the next time, whatever was kept. Whether only that tells if they are others."""


@dataclass(frozen=True)
class HeadersFile:
    """Headers in a file.

    Args:
        path: Of the file, absolute.

    """

    path: str
    _cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def identity(self) -> str:
        """Where the headers come from, as a route and messages have it: the file's path."""
        return f"file {self.path}"

    def headers(self, url: str = "", body: bytes = b"") -> Mapping[str, str]:
        """What the file says now, or said when it last could be read."""
        try:
            version = _version(os.stat(self.path))
            if version != self._cache.get("version"):
                self._cache["headers"] = _reused(self._cache.get("headers"), self._read())
                self._cache["version"] = version
        except (OSError, ValueError) as error:
            if "headers" not in self._cache:
                why = error.strerror if isinstance(error, OSError) and error.strerror else error
                raise CredentialsError(f"the headers file {self.path} cannot be used: {why}") from None
        headers: Mapping[str, str] = self._cache["headers"]
        return headers

    def renew(self) -> bool:
        """Read the file again, whatever its times say."""
        self._cache.pop("version", None)
        return False

    def _read(self) -> dict[str, str]:
        with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is not a regular file")
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 10} KiB")
        return parse_headers(content)


@dataclass(frozen=True)
class HeadersFunction:
    """Headers that a function of the program gives.

    Args:
        function: Called without arguments, before each request; gives a mapping.

    """

    function: Callable[[], Mapping[str, str]]

    @property
    def identity(self) -> str:
        """Where the headers come from, as a route and messages have it: the function's name."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return f"function {getattr(self.function, '__module__', '')}.{name}"

    def headers(self, url: str, body: bytes) -> Mapping[str, str]:
        """What the function gives."""
        try:
            return valid_headers(dict(self.function()))
        except Exception as error:  # the program's own; its words may show a secret
            raise CredentialsError(f"headers={self.identity} failed: {_cause(error)}") from None

    def renew(self) -> bool:
        """Say that the next request may have other headers: the function is called for each."""
        return True


@dataclass(frozen=True)
class SessionProvider:
    """Headers by which a `requests.Session` of an entry point signs a request.

    Args:
        name: Of the entry point.
        variable: That names it.

    """

    name: str
    variable: str = field(compare=False)
    _cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def identity(self) -> str:
        """Where the provider is imported from."""
        return f"provider {provider_path(self.name)}"

    def headers(self, url: str, body: bytes) -> Mapping[str, str]:
        """What the session would have sent, beyond what each request has."""
        from stepspan.otlp.request_signing import session_of, signed_headers

        try:
            if "session" not in self._cache:
                self._cache["session"] = session_of(load_provider(self.name, self.variable))
            return valid_headers(signed_headers(self._cache["session"], url, body))
        except CredentialsError:
            raise
        except Exception as error:  # the provider's own
            raise CredentialsError(f"{self.variable}={self.name} failed: {_cause(error)}") from None

    def renew(self) -> bool:
        """Take another session."""
        return self._cache.pop("session", None) is not None


@dataclass(frozen=True)
class ChannelProvider:
    """`grpc.ChannelCredentials` of an entry point, which are the channel's and no headers.

    Args:
        name: Of the entry point.
        variable: That names it.

    """

    name: str
    variable: str = field(compare=False)

    @property
    def identity(self) -> str:
        """Where the provider is imported from."""
        return f"provider {provider_path(self.name)}"

    def headers(self, url: str, body: bytes) -> Mapping[str, str]:
        """No headers: gRPC asks the provider itself, for each call."""
        return {}

    def renew(self) -> bool:
        """The credentials of a channel renew themselves."""
        return False

    def channel_credentials(self) -> Any:
        """What the provider gives. `CredentialsError`."""
        import grpc

        try:
            found = load_provider(self.name, self.variable)()
        except CredentialsError:
            raise
        except Exception as error:
            raise CredentialsError(f"{self.variable}={self.name} failed: {_cause(error)}") from None
        if not isinstance(found, grpc.ChannelCredentials):
            kind = type(found).__name__
            raise CredentialsError(f"{self.variable}={self.name} gave a {kind}, and not grpc.ChannelCredentials")
        return found


class Credentials:
    """All headers of an endpoint, of which some come from elsewhere and change. Of one thread; equal ones are the same.

    Args:
        headers: That don't change.
        supplies: Whose headers win over those.
        over: Headers that don't change and win over all.

    """

    def __init__(
        self, headers: Mapping[str, str], supplies: Sequence[HeaderSupply], over: Mapping[str, str] | None = None
    ) -> None:
        self._headers, self._supplies, self._over = dict(headers), tuple(supplies), dict(over or {})
        self._parts: tuple[Mapping[str, str], ...] = ()
        self._merged: Mapping[str, str] | None = None

    @property
    def identity(self) -> list[str]:
        """Names where the headers come from, without any of them."""
        return [supply.identity for supply in self._supplies]

    @property
    def names(self) -> str:
        """The same, for a message."""
        return " and ".join(self.identity)

    def headers(self, url: str, body: bytes) -> Mapping[str, str]:
        """The headers of a request; as of `Endpoint.request_headers`."""
        parts = tuple(supply.headers(url, body) for supply in self._supplies)
        if self._merged is None or any(map(operator.is_not, parts, self._parts)):
            merged = self._headers.copy()
            for part in (*parts, self._over):
                merged |= part
            self._parts, self._merged = parts, merged
        return self._merged

    def renew(self) -> bool:
        """Fetch the headers anew: whether they are others now than those of the last request, or may be."""
        return True in [supply.renew() for supply in self._supplies] or self.have_changed()

    def have_changed(self) -> bool:
        """Whether a file or function gives other headers now than those of the last request."""
        with suppress(CredentialsError):
            now = [s.headers("", b"") if isinstance(s, (HeadersFile, HeadersFunction)) else {} for s in self._supplies]
            return not self._parts or any(new and new != old for new, old in zip(now, self._parts, strict=True))
        return False

    def channel_credentials(self) -> Any:
        """A provider's `grpc.ChannelCredentials`; None: there is no provider. `CredentialsError`."""
        found = (each.channel_credentials() for each in self._supplies if isinstance(each, ChannelProvider))
        return next(found, None)

    @property
    def is_portable(self) -> bool:
        """Whether another process can have them, too."""
        return not any(isinstance(supply, HeadersFunction) for supply in self._supplies)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credentials) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._supplies)

    def _key(self) -> tuple[Any, ...]:
        return self._headers, self._supplies, self._over


def parse_headers(content: bytes) -> dict[str, str]:
    """The headers that a file holds.

    Args:
        content: Lines of `key=value` or `key: value`, of which blank ones and those that begin with # are passed over;
            or `key=value,key=value` as in OTEL_EXPORTER_OTLP_HEADERS. Values after "=" are percent-decoded, as there.

    Returns:
        Name in lower case -> value.

    Raises:
        ValueError: It is something else, or empty; the message names the line and shows nothing of it.

    """
    headers: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, content.decode("utf-8-sig").splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        if match := _FIELD.fullmatch(line):
            headers[match[1].lower()] = unquoted(match[2])
            continue
        for entry in _NEXT_ENTRY.split(line.rstrip(",")):
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise ValueError(f"line {number} is neither key=value nor key: value")
            headers[match[1].lower()] = unquote(unquoted(match[2])).strip()
    if not headers:
        raise ValueError("no header is in it")
    return valid_headers(headers)


def valid_headers(headers: Mapping[Any, Any]) -> dict[str, str]:
    """The headers by lower-case name, if HTTP and gRPC can both send them.

    Raises:
        ValueError: They can't; the message shows no value.

    """
    for key, value in headers.items():
        if not isinstance(key, str) or not _HEADER_NAME.fullmatch(key):
            raise ValueError("a header's name is letters, digits, '-', '_' and '.'")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"the value of header {key} must be a string of printable ASCII")
    return {key.lower(): value.strip() for key, value in headers.items()}


def load_provider(name: str, variable: str) -> Callable[[], Any]:
    """The entry point of a credential provider. `CredentialsError`: there is none, or it can't be loaded."""
    entry = _entry_point(name)
    if entry is None:
        raise CredentialsError(f"{variable}={name}: no installed package has an entry point of {ENTRY_POINTS} named so")
    try:
        loaded: Callable[[], Any] = entry.load()
    except Exception as error:
        raise CredentialsError(f"{variable}={name} cannot be imported: {_cause(error)}") from None
    return loaded


def provider_path(name: str) -> str:
    """Where a provider is imported from, `module:attribute`; its name where none is installed."""
    entry = _entry_point(name)
    return name if entry is None else str(entry.value)


@lru_cache(64)
def _entry_point(name: str) -> Any:
    from importlib.metadata import entry_points

    return next(iter(entry_points(group=ENTRY_POINTS, name=name)), None)


def absolute_path(path: str | Path) -> str:
    """A path that means the same in every working directory."""
    expanded = os.path.expanduser(str(path))
    with suppress(OSError):  # the working directory is gone
        return os.path.abspath(expanded)
    return expanded


def _version(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _reused(old: Any, new: dict[str, str]) -> dict[str, str]:
    """The old headers where the new ones are equal: who holds them sees that nothing changed."""
    return old if old == new else new


def _cause(error: Exception) -> str:
    """A foreign error as a message may show it: its words may hold a secret."""
    return (
        str(error)
        if isinstance(error, ValueError) and error.args and type(error) is ValueError
        else type(error).__name__
    )
