"""Where and how each signal goes: arguments and the standard `OTEL_EXPORTER_OTLP_*` variables.

An argument wins over the signal's variable, which wins over the general one; an empty value counts as unset. By the
specification (opentelemetry.io/docs/specs/otel/protocol/exporter), except where noted here:

- Without an endpoint there is no network at all: the specification's localhost is not assumed.
- An unset protocol is http/protobuf, but gRPC where the endpoint's port is 4317.
- A timeout is seconds, as opentelemetry-python reads it; a variable's value of 1000 or more is the specification's
  milliseconds, for nobody waits that many seconds.
- gRPC: `http://` is plain text, `https://` is TLS, and without a scheme `OTEL_EXPORTER_OTLP_INSECURE` decides. Where
  that is unset too it is TLS, except to this machine itself (a loopback address or a Unix socket) without a certificate
  set: nothing leaves the host, and no one issues certificates for localhost.
- A wrong value is a `ConfigError`, not a warning and a default: data that silently goes elsewhere is lost data.

Credentials leave a URL here, as the Basic authorization header they stand for, and no `repr`, error or name that this
module makes shows a header's value or a URL's query.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from stepspan.errors import ConfigError
from stepspan.mapping.records import SIGNALS, Signal

Protocol: TypeAlias = Literal["http/protobuf", "grpc", "http/json"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
Compression: TypeAlias = Literal["none", "gzip"]
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

DEFAULT_TIMEOUT = 10.0  # seconds, the specification's
_GRPC_PORT = 4317
_FIRST_MILLISECONDS = 1000.0

_OWN_SCHEME = re.compile(r"(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds):", re.IGNORECASE)
"""Targets in gRPC's own naming: handed to it as they are."""
_LOCAL = re.compile(r"(unix|unix-abstract):|(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$", re.IGNORECASE)
_USER_INFO = re.compile(r"^([a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)
_HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # what HTTP and gRPC both take
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
_HEADER_ENTRY = re.compile(r"[A-Za-z0-9_.%-]+[ \t]*=[ !#-+\--:<-\[\]-~]*")
"""What `parse_env_headers` takes; it would log anything else, with the credentials that stand in it."""

_TENANT_HEADERS = frozenset(
    {
        *("accountid", "projectid"),  # VictoriaLogs, VictoriaTraces
        *("organization", "stream-name"),  # OpenObserve
        *("tenant", "tenant-id", "x-tenant", "x-tenant-id", "x-project-id"),
        *("thanos-tenant", "x-axiom-dataset", "x-greptime-db-name", "x-honeycomb-dataset", "x-mlflow-experiment-id"),
        "x-scope-orgid",  # Mimir, Loki, Tempo
    }
)
"""Headers that say whose data it is, not who may write it."""


@dataclass(frozen=True, slots=True, repr=False)
class Endpoint:
    """Where and how one signal goes."""

    signal: Signal
    url: str
    """The whole URL, or for gRPC the target (`host:port`, `unix:…`). Holds no user or password, but maybe a query."""
    protocol: Protocol
    headers: Mapping[str, str] = field(hash=False)
    """By lower-case name, authorization included."""
    timeout: float
    """Seconds for one request."""
    compression: Compression
    certificate: str | None
    """Path of the certificate to trust, as `client_key` and `client_certificate` are paths."""
    client_key: str | None
    client_certificate: str | None
    insecure: bool
    """No TLS."""

    @property
    def display_url(self) -> str:
        """The URL as a message may show it."""
        return self.url.partition("?")[0]

    @property
    def secrets(self) -> list[str]:
        """What no message may show, longest first: header values, the token in each, the URL's query."""
        query = urlsplit(self.url).query
        said = {query, *(value for _, value in parse_qsl(query))}
        for value in self.headers.values():
            user, password = _basic(value)
            said |= {value, value.rpartition(" ")[2], f"{user}:{password}", password or user}
        return sorted((text for text in said if len(text) >= 4), key=len, reverse=True)

    def __repr__(self) -> str:
        return (
            f"Endpoint(signal={self.signal!r}, url={self.display_url!r}, protocol={self.protocol!r}, "
            f"headers=<{', '.join(sorted(self.headers))}>, timeout={self.timeout!r}, compression={self.compression!r}, "
            f"insecure={self.insecure!r})"
        )


def resolve_endpoints(
    env: Mapping[str, str],
    *,
    endpoint: str | None = None,
    protocol: str | None = None,
    headers: Mapping[str, str] | None = None,
    compression: str | None = None,
    timeout: float | None = None,
) -> dict[Signal, Endpoint]:
    """The endpoint of each signal that goes anywhere; empty when delivery is off or nothing says where to.

    `endpoint` is a general one, as `OTEL_EXPORTER_OTLP_ENDPOINT` is, and replaces every endpoint variable. `headers`
    are added to those of the variables. `timeout` is in seconds. `OTEL_<SIGNAL>_EXPORTER=none` takes a signal out,
    `OTEL_SDK_DISABLED=true` all of them. Raises `ConfigError` with the argument's or the variable's name.
    """
    if _word(env, "OTEL_SDK_DISABLED") == "true":
        return {}
    given = {"ENDPOINT": endpoint, "PROTOCOL": protocol, "COMPRESSION": compression, "TIMEOUT": timeout}
    found: dict[Signal, Endpoint] = {}
    for signal in SIGNALS:
        settings = _Settings(env, given, signal)
        target = settings.find("ENDPOINT")
        if target is not None and _word(env, f"OTEL_{signal.upper()}_EXPORTER") != "none":
            found[signal] = _endpoint(signal, target, settings, headers or {})
    return found


def destination_name(endpoints: Mapping[Signal, Endpoint]) -> str:
    """A name for state files: 12 hex digits of the URLs and of whose data it is; neither can be read in it.

    Credentials don't count (rotating them must not start delivery anew), but the user of a Basic authorization does:
    hosted receivers put the tenant there. Nor does the protocol: the receiver is the same.
    """
    urls = "\n".join(f"{signal} {endpoints[signal].url}" for signal in sorted(endpoints)).encode()
    tenants = "\n".join(f"{signal} {_tenant(endpoints[signal])}" for signal in sorted(endpoints)).encode()
    salt = hashlib.blake2b(urls, digest_size=16).digest()
    return hashlib.blake2b(urls + hashlib.blake2b(tenants, salt=salt).digest(), digest_size=6).hexdigest()


class _Setting(NamedTuple):
    """A value and where it was found."""

    value: Any
    field: str
    scope: Literal["argument", "signal", "general"]


@dataclass(frozen=True, slots=True)
class _Settings:
    """One signal's settings by their variables' last word."""

    env: Mapping[str, str]
    arguments: Mapping[str, Any]
    signal: Signal

    def find(self, name: str) -> _Setting | None:
        if (argument := self.arguments.get(name)) not in (None, ""):
            return _Setting(argument, name.lower(), "argument")
        if value := self.env.get(own := f"OTEL_EXPORTER_OTLP_{self.signal.upper()}_{name}", "").strip():
            return _Setting(value, own, "signal")
        if value := self.env.get(general := f"OTEL_EXPORTER_OTLP_{name}", "").strip():
            return _Setting(value, general, "general")
        return None

    def path(self, name: str) -> str | None:
        found = self.find(name)
        return None if found is None else str(found.value)


@dataclass(frozen=True, slots=True)
class _Address:
    """An endpoint's parts. `scheme` is "" where there is none, and "grpc" for a target in gRPC's own naming."""

    scheme: str
    place: str
    """Host and port, without user and password."""
    port: int | None = None
    path: str = ""
    query: str = ""
    credentials: str = ""
    """`user:password`, decoded; "" for none."""


def _endpoint(signal: Signal, target: _Setting, settings: _Settings, more: Mapping[str, str]) -> Endpoint:
    address = _address(target)
    protocol = _protocol(settings.find("PROTOCOL"), address)
    certificate, client_key = settings.path("CERTIFICATE"), settings.path("CLIENT_KEY")
    client_certificate = settings.path("CLIENT_CERTIFICATE")
    if client_key and not client_certificate:
        name = "OTEL_EXPORTER_OTLP_CLIENT_KEY"
        raise ConfigError(name, client_key, "a key needs its certificate: set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE")
    return Endpoint(
        signal=signal,
        url=address.place if protocol == "grpc" else _http_url(signal, target, address),
        protocol=protocol,
        headers=_headers(settings.find("HEADERS"), address, more),
        timeout=_timeout(settings.find("TIMEOUT")),
        compression=_one_of(COMPRESSIONS, settings.find("COMPRESSION")) or "none",
        certificate=certificate,
        client_key=client_key,
        client_certificate=client_certificate,
        insecure=_insecure(settings.find("INSECURE"), address, certificate),
    )


def _address(target: _Setting) -> _Address:
    text = str(target.value).strip()
    if _OWN_SCHEME.match(text):
        return _Address("grpc", text)
    try:
        if re.search(r"[\s\x00-\x1f\x7f]", text):
            raise ValueError("a space or control character")
        parts = urlsplit(text if "://" in text else f"//{text}")
        port = parts.port
    except ValueError:  # not told on: it quotes the URL, where a password may stand
        raise _wrong_endpoint(target, "write http://host:4318, percent-encoding what else stands in it") from None
    if parts.scheme not in ("http", "https", ""):
        raise _wrong_endpoint(target, "the scheme must be http or https")
    if not parts.hostname:
        raise _wrong_endpoint(target, "no host in it: write http://host:4318")
    user_info, _, place = parts.netloc.rpartition("@")
    credentials = unquote(user_info if ":" in user_info or not user_info else f"{user_info}:")
    return _Address(parts.scheme, place, port, parts.path, parts.query, credentials)


def _wrong_endpoint(target: _Setting, fix: str) -> ConfigError:
    harmless = _USER_INFO.sub(r"\1***@", str(target.value)).partition("?")[0]
    return ConfigError(target.field, harmless, fix)


def _http_url(signal: Signal, target: _Setting, address: _Address) -> str:
    if address.scheme not in ("http", "https"):
        fix = "HTTP needs a URL, as in http://host:4318; for gRPC set OTEL_EXPORTER_OTLP_PROTOCOL=grpc"
        raise _wrong_endpoint(target, fix)
    path = address.path if target.scope == "signal" else f"{address.path.rstrip('/')}/v1/{signal}"
    return f"{address.scheme}://{address.place}{path}" + (f"?{address.query}" if address.query else "")


def _protocol(found: _Setting | None, address: _Address) -> Protocol:
    return _one_of(PROTOCOLS, found) or ("grpc" if address.port == _GRPC_PORT else "http/protobuf")


def _insecure(found: _Setting | None, address: _Address, certificate: str | None) -> bool:
    if address.scheme in ("http", "https"):
        return address.scheme == "http"
    if found is not None:
        return bool(_one_of(("true", "false"), found) == "true")
    return certificate is None and _LOCAL.match(address.place) is not None


def _timeout(found: _Setting | None) -> float:
    if found is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = math.nan if isinstance(found.value, bool) else float(found.value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(found.field, found.value, "must be a number of seconds above 0")
    return seconds / 1000 if seconds >= _FIRST_MILLISECONDS and found.scope != "argument" else seconds


def _headers(found: _Setting | None, address: _Address, more: Mapping[str, str]) -> dict[str, str]:
    """The variable's headers, over them the URL's credentials, over them the argument's headers."""
    from opentelemetry.util.re import parse_env_headers

    headers: dict[str, str] = {}
    if found is not None:
        for number, entry in enumerate(filter(None, map(str.strip, str(found.value).split(","))), start=1):
            if not _HEADER_ENTRY.fullmatch(entry):
                fix = f"entry {number} is no key=value pair: percent-encode its value"
                raise ConfigError(found.field, "<hidden>", fix)
        headers.update(_checked(found.field, parse_env_headers(found.value, liberal=True)))
    if address.credentials:
        headers["authorization"] = "Basic " + base64.b64encode(address.credentials.encode()).decode()
    headers.update(_checked("headers", more))
    return headers


def _checked(name: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers by lower-case name, if HTTP and gRPC can both send them."""
    for key, value in headers.items():
        if not isinstance(key, str) or not _HEADER_NAME.fullmatch(key):
            raise ConfigError(name, key, "a header's name is letters, digits, '-', '_' and '.'")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ConfigError(name, "<hidden>", f"the value of header {key} must be a string of printable ASCII")
    return {key.lower(): value.strip() for key, value in headers.items()}


def _one_of(choices: tuple[Any, ...], found: _Setting | None) -> Any:
    if found is None:
        return None
    value = str(found.value).strip().lower()
    if value not in choices:
        raise ConfigError(found.field, found.value, f"must be one of {', '.join(choices)}")
    return value


def _word(env: Mapping[str, str], name: str) -> str:
    return env.get(name, "").strip().lower()


def _tenant(endpoint: Endpoint) -> list[tuple[str, str]]:
    user, password = _basic(endpoint.headers.get("authorization", ""))
    told = sorted((name, value) for name, value in endpoint.headers.items() if name in _TENANT_HEADERS)
    # A user without a password is a token.
    return [*told, ("authorization", user)] if password else told


def _basic(authorization: str) -> tuple[str, str]:
    """User and password of a Basic authorization, empty for any other."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return user, password
