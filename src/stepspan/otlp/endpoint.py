"""Where and how each signal goes: arguments and the standard `OTEL_EXPORTER_OTLP_*` variables.

An argument wins over the signal's variable, which wins over the general one; an empty value counts as unset. By the
specification (opentelemetry.io/docs/specs/otel/protocol/exporter), except where noted here:

- Without an endpoint there is no network at all: the specification's localhost is not assumed.
- An unset protocol is http/protobuf, but gRPC where the endpoint's port is 4317.
- A timeout is seconds, as opentelemetry-python reads it; a variable's value of 1000 or more is the specification's
  milliseconds, because no one waits that many seconds.
- gRPC: `http://` is plain text, `https://` is TLS, and without a scheme `OTEL_EXPORTER_OTLP_INSECURE` decides. Where
  that is unset too it is TLS, except to this machine itself (a loopback address or a Unix socket) without a certificate
  set: nothing leaves the host, and no one issues certificates for localhost.
- A wrong value is a `ConfigError`, not a warning and a default: data that silently goes elsewhere is lost data.

Each variable is read once, by `read_variables`; everything else works on what it returns.

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
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from stepspan.errors import ConfigError
from stepspan.mapping.records import SIGNALS, Signal
from stepspan.values import to_float

Protocol: TypeAlias = Literal["http/protobuf", "grpc", "http/json"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
Compression: TypeAlias = Literal["none", "gzip"]
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

DEFAULT_TIMEOUT_S = 10.0
"""Of a request, where nothing says otherwise: the OTLP exporter specification's default."""
_GRPC_PORT = 4317
_MIN_MILLISECONDS = 1000.0

_PATHS = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
_SETTINGS = ("ENDPOINT", "PROTOCOL", "HEADERS", "COMPRESSION", "TIMEOUT", "INSECURE", *_PATHS)
"""The last word of the variables that exist in general and for each signal."""
_VARIABLES = (
    "OTEL_SDK_DISABLED",
    *(f"OTEL_{signal.upper()}_EXPORTER" for signal in SIGNALS),
    *(f"OTEL_EXPORTER_OTLP_{name}" for name in _SETTINGS),
    *(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}" for signal in SIGNALS for name in _SETTINGS),
)

_GRPC_SCHEME = re.compile(r"(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds):", re.IGNORECASE)
"""Targets in gRPC's own naming: handed to it as they are."""
_THIS_HOST = re.compile(r"(unix|unix-abstract):|(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$", re.IGNORECASE)
_USER_INFO = re.compile(r"^([a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)
_HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # what HTTP and gRPC both take
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
_HEADER_ENTRY = re.compile(r"[A-Za-z0-9_.%-]+[ \t]*=[ !#-+\--:<-\[\]-~]*")
"""What `parse_env_headers` takes; it would log anything else, with the credentials in it."""

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
    """Where and how one signal goes.

    Args:
        signal: "metrics", "traces" or "logs".
        url: The whole URL; for gRPC the target (`host:port`, `unix:…`). Holds no user or password, but maybe a query.
        protocol: "http/protobuf", "grpc" or "http/json".
        headers: Name in lower case -> value, the authorization included.
        timeout: Seconds for one request.
        compression: "none" or "gzip".
        certificate: Path of the certificate to trust; None for the system's.
        client_key: Path of the key for mutual TLS.
        client_certificate: Path of the certificate for mutual TLS; may hold the key, too.
        insecure: Whether there is no TLS.

    """

    signal: Signal
    url: str
    protocol: Protocol
    headers: Mapping[str, str] = field(hash=False)
    timeout: float
    compression: Compression
    certificate: str | None
    client_key: str | None
    client_certificate: str | None
    insecure: bool

    @property
    def display_url(self) -> str:
        """The URL as a message may show it: without its query."""
        return self.url.partition("?")[0]

    @property
    def secrets(self) -> list[str]:
        """What no message may show, longest first: header values, the token in each, the URL's query."""
        query = urlsplit(self.url).query
        secrets = {query, *(value for _, value in parse_qsl(query))}
        for value in self.headers.values():
            user, password = _basic_credentials(value)
            secrets |= {value, value.rpartition(" ")[2], f"{user}:{password}", password or user}
        return sorted((text for text in secrets if len(text) >= 4), key=len, reverse=True)

    def __repr__(self) -> str:
        return (
            f"Endpoint(signal={self.signal!r}, url={self.display_url!r}, protocol={self.protocol!r}, "
            f"headers=<{', '.join(sorted(self.headers))}>, timeout={self.timeout!r}, compression={self.compression!r}, "
            f"insecure={self.insecure!r})"
        )


class Destination(NamedTuple):
    """One receiver of OTLP, as arguments and variables describe it.

    Args:
        endpoints: The endpoint of each signal that is sent.
        name: A name for state files, as `_destination_name` makes it.

    """

    endpoints: dict[Signal, Endpoint]
    name: str


def read_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that say where OTLP goes, each looked up once, without blank ones and the space around values."""
    return {name: value for name in _VARIABLES if (value := env.get(name, "").strip())}


def resolve_destination(
    env: Mapping[str, str],
    *,
    endpoint: str | None = None,
    protocol: str | None = None,
    headers: Mapping[str, str] | None = None,
    compression: str | None = None,
    timeout: float | None = None,
) -> Destination:
    """Where each signal goes. Has no endpoints when delivery is off or nothing says where to.

    Args:
        env: The environment, or what `read_variables` made of it. `OTEL_<SIGNAL>_EXPORTER=none` switches a signal
            off, `OTEL_SDK_DISABLED=true` all of them.
        endpoint: A general endpoint, as `OTEL_EXPORTER_OTLP_ENDPOINT` is. Replaces every endpoint variable.
        protocol: Over the variables, as `compression` is.
        headers: Added to those of the variables, over which they win.
        compression: "none" or "gzip".
        timeout: Seconds for one request.

    Raises:
        ConfigError: A value is wrong; names the argument or the variable.

    """
    variables = read_variables(env)
    switched_off = frozenset(s for s in SIGNALS if variables.get(f"OTEL_{s.upper()}_EXPORTER", "").lower() == "none")
    if variables.get("OTEL_SDK_DISABLED", "").lower() == "true" or len(switched_off) == len(SIGNALS):
        return Destination({}, _destination_name({}))
    arguments = {"ENDPOINT": endpoint, "PROTOCOL": protocol, "COMPRESSION": compression, "TIMEOUT": timeout}
    given = {signal: _settings(signal, variables, arguments) for signal in SIGNALS}
    resolved = {s: _endpoint(s, settings, headers or {}) for s, settings in given.items() if "ENDPOINT" in settings}
    sent = {signal: endpoint for signal, endpoint in resolved.items() if signal not in switched_off}
    return Destination(sent, _destination_name(resolved))


class _Setting(NamedTuple):
    """A value and where it was found: `field` is the argument's or the variable's name."""

    value: Any
    field: str
    scope: Literal["argument", "signal", "general"]


def _settings(signal: Signal, variables: Mapping[str, str], arguments: Mapping[str, Any]) -> dict[str, _Setting]:
    """A signal's settings, by the last word of their variables. What is not set is not in it."""
    found: dict[str, _Setting] = {}
    for name in _SETTINGS:
        argument, general = arguments.get(name), f"OTEL_EXPORTER_OTLP_{name}"
        of_signal = f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}"
        if argument not in (None, ""):
            found[name] = _Setting(argument, name.lower(), "argument")
        elif of_signal in variables:
            found[name] = _Setting(variables[of_signal], of_signal, "signal")
        elif general in variables:
            found[name] = _Setting(variables[general], general, "general")
    return found


class _Address(NamedTuple):
    """An endpoint's parts.

    Args:
        scheme: "" where there is none, "grpc" for a target in gRPC's own naming.
        authority: Host and port, without user and password.
        port: The port, if there is one.
        path: The path, with its leading slash.
        query: The query, without its question mark.
        credentials: `user:password`, decoded; "" for none.

    """

    scheme: str
    authority: str
    port: int | None = None
    path: str = ""
    query: str = ""
    credentials: str = ""


def _endpoint(signal: Signal, settings: Mapping[str, _Setting], more: Mapping[str, str]) -> Endpoint:
    target = settings["ENDPOINT"]
    address = _address(target)
    default: Protocol = "grpc" if address.port == _GRPC_PORT else "http/protobuf"
    protocol: Protocol = _choice(PROTOCOLS, settings.get("PROTOCOL")) or default
    paths = {name: settings[name].value if name in settings else None for name in _PATHS}
    if paths["CLIENT_KEY"] and not paths["CLIENT_CERTIFICATE"]:
        fix = "a key needs its certificate: set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"
        raise ConfigError(settings["CLIENT_KEY"].field, paths["CLIENT_KEY"], fix)
    return Endpoint(
        signal=signal,
        url=address.authority if protocol == "grpc" else _http_url(signal, target, address),
        protocol=protocol,
        headers=_headers(settings.get("HEADERS"), address, more),
        timeout=_timeout(settings.get("TIMEOUT")),
        compression=_choice(COMPRESSIONS, settings.get("COMPRESSION")) or "none",
        certificate=paths["CERTIFICATE"],
        client_key=paths["CLIENT_KEY"],
        client_certificate=paths["CLIENT_CERTIFICATE"],
        insecure=_insecure(settings.get("INSECURE"), address, paths["CERTIFICATE"]),
    )


def _address(target: _Setting) -> _Address:
    text = str(target.value).strip()
    if _GRPC_SCHEME.match(text):
        return _Address("grpc", text)
    try:
        if re.search(r"[\s\x00-\x1f\x7f]", text):
            raise ValueError("a space or control character")
        parts = urlsplit(text if "://" in text else f"//{text}")
        port = parts.port
    except ValueError:  # not chained: it quotes the URL, where a password may stand
        raise _endpoint_error(target, "write http://host:4318, percent-encoding everything else") from None
    if parts.scheme not in ("http", "https", ""):
        raise _endpoint_error(target, "the scheme must be http or https")
    if not parts.hostname:
        raise _endpoint_error(target, "no host in it: write http://host:4318")
    user_info, _, authority = parts.netloc.rpartition("@")
    credentials = unquote(user_info if ":" in user_info or not user_info else f"{user_info}:")
    return _Address(parts.scheme, authority, port, parts.path, parts.query, credentials)


def _endpoint_error(target: _Setting, fix: str) -> ConfigError:
    without_secrets = _USER_INFO.sub(r"\1***@", str(target.value)).partition("?")[0]
    return ConfigError(target.field, without_secrets, fix)


def _http_url(signal: Signal, target: _Setting, address: _Address) -> str:
    if address.scheme not in ("http", "https"):
        fix = "HTTP needs a URL, as in http://host:4318; for gRPC set OTEL_EXPORTER_OTLP_PROTOCOL=grpc"
        raise _endpoint_error(target, fix)
    path = address.path if target.scope == "signal" else f"{address.path.rstrip('/')}/v1/{signal}"
    return f"{address.scheme}://{address.authority}{path}" + (f"?{address.query}" if address.query else "")


def _insecure(found: _Setting | None, address: _Address, certificate: str | None) -> bool:
    if address.scheme in ("http", "https"):
        return address.scheme == "http"
    if found is not None:
        return bool(_choice(("true", "false"), found) == "true")
    return certificate is None and _THIS_HOST.match(address.authority) is not None


def _timeout(found: _Setting | None) -> float:
    if found is None:
        return DEFAULT_TIMEOUT_S
    seconds = None if isinstance(found.value, bool) else to_float(found.value)
    if seconds is None or not 0 < seconds < math.inf:
        raise ConfigError(found.field, found.value, "must be a number of seconds above 0")
    return seconds / 1000 if seconds >= _MIN_MILLISECONDS and found.scope != "argument" else seconds


def _headers(found: _Setting | None, address: _Address, more: Mapping[str, str]) -> dict[str, str]:
    """The variable's headers, over them the URL's credentials, over them the argument's headers."""
    headers: dict[str, str] = {}
    if found is not None:
        from opentelemetry.util.re import parse_env_headers

        for number, entry in enumerate(filter(None, map(str.strip, found.value.split(","))), start=1):
            if not _HEADER_ENTRY.fullmatch(entry):
                fix = f"entry {number} is not a key=value pair: percent-encode its value"
                raise ConfigError(found.field, "<hidden>", fix)
        headers.update(_valid_headers(found.field, parse_env_headers(found.value, liberal=True)))
    if address.credentials:
        headers["authorization"] = "Basic " + base64.b64encode(address.credentials.encode()).decode()
    headers.update(_valid_headers("headers", more))
    return headers


def _valid_headers(name: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers by lower-case name, if HTTP and gRPC can both send them."""
    for key, value in headers.items():
        if not isinstance(key, str) or not _HEADER_NAME.fullmatch(key):
            raise ConfigError(name, key, "a header's name is letters, digits, '-', '_' and '.'")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ConfigError(name, "<hidden>", f"the value of header {key} must be a string of printable ASCII")
    return {key.lower(): value.strip() for key, value in headers.items()}


def _choice(choices: tuple[Any, ...], found: _Setting | None) -> Any:
    if found is None:
        return None
    value = str(found.value).strip().lower()
    if value not in choices:
        raise ConfigError(found.field, found.value, f"must be one of {', '.join(choices)}")
    return value


def _destination_name(endpoints: Mapping[Signal, Endpoint]) -> str:
    """12 hex digits of the URLs and the tenants. Neither can be read in them.

    Signals that are switched off count: switching one must not start the others anew. Credentials don't (rotating them
    must not, either), but the user of a Basic authorization does: hosted receivers put the tenant there. Nor does the
    protocol: the receiver is the same.
    """
    urls = "\n".join(f"{signal} {endpoints[signal].url}" for signal in sorted(endpoints)).encode()
    tenants = "\n".join(f"{signal} {_tenants(endpoints[signal])}" for signal in sorted(endpoints)).encode()
    salt = hashlib.blake2b(urls, digest_size=16).digest()
    return hashlib.blake2b(urls + hashlib.blake2b(tenants, salt=salt).digest(), digest_size=6).hexdigest()


def _tenants(endpoint: Endpoint) -> list[tuple[str, str]]:
    user, password = _basic_credentials(endpoint.headers.get("authorization", ""))
    tenants = sorted((name, value) for name, value in endpoint.headers.items() if name in _TENANT_HEADERS)
    # A user without a password is a token.
    return [*tenants, ("authorization", user)] if password else tenants


def _basic_credentials(authorization: str) -> tuple[str, str]:
    """User and password of a Basic authorization, empty for any other."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() == "basic":
        with suppress(binascii.Error, UnicodeDecodeError):
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
            return user, password
    return "", ""
