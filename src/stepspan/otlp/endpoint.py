"""Where and how each signal goes: arguments and the standard `OTEL_EXPORTER_OTLP_*` variables.

An argument wins over the signal's variable, which wins over the general one; an empty value counts as unset. By the
specification (opentelemetry.io/docs/specs/otel/protocol/exporter), except where noted here:

- Without an endpoint there is no network at all: the specification's localhost is not assumed.
- An unset protocol is http/protobuf, but gRPC where the endpoint's port is 4317 or its scheme is gRPC's own.
- A timeout is seconds, as opentelemetry-python reads it; a variable's value of 1000 or more is the specification's
  milliseconds, because no one waits that many seconds. 0 is no limit: ten minutes.
- `http://` is plain text, `https://` is TLS, and without a scheme `OTEL_EXPORTER_OTLP_INSECURE` decides. Where that is
  unset too it is plain text to this machine itself (a loopback address or a Unix socket) without a certificate set:
  nothing leaves the host, and no one issues certificates for localhost. To others gRPC uses TLS, and HTTP is held.

A wrong argument is a `ConfigError`. A wrong variable never is one, for it must not keep training from starting:

- Spellings with one meaning have it: quotes around values, `10s`, `1` and `yes`, `http` for http/protobuf, a header as
  `name: value`.
- A word or number that says nothing counts as unset, as the specification wants it, and is among `Destination.ignored`.
- Where going on would send to a wrong place, or in a wrong way (an endpoint without a host, headers that can't be read,
  a key without its certificate), the signal is held: its endpoint has a `fault`, and sends nothing.
- What may not mean what it says is among `Destination.warnings`.

Headers that change while requests go out come from `Endpoint.credentials` (`stepspan.otlp.credentials`): a file, or a
provider. Each variable is read once, by `read_variables`; everything else works on what it returns.

Credentials leave a URL here, as the Basic authorization header they stand for, and no `repr`, error or name that this
module makes shows a header's value or a URL's query.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from stepspan.environment import unquoted
from stepspan.errors import ConfigError
from stepspan.mapping.records import SIGNALS, Signal
from stepspan.otlp import record_variables
from stepspan.otlp.credentials import (
    ChannelProvider,
    Credentials,
    CredentialsError,
    HeadersFile,
    HeadersFunction,
    HeaderSupply,
    SessionProvider,
    absolute_path,
    valid_headers,
)
from stepspan.values import to_float

Protocol: TypeAlias = Literal["http/protobuf", "grpc", "http/json"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
Compression: TypeAlias = Literal["none", "gzip", "deflate"]
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
Temporality: TypeAlias = Literal["cumulative", "delta", "lowmemory"]
TEMPORALITIES: tuple[Temporality, ...] = get_args(Temporality)
HistogramAggregation: TypeAlias = Literal["base2_exponential_bucket_histogram", "explicit_bucket_histogram"]
HISTOGRAM_AGGREGATIONS: tuple[HistogramAggregation, ...] = get_args(HistogramAggregation)

Choice = TypeVar("Choice")

DEFAULT_TIMEOUT_S = 10.0
"""Of a request, where nothing says otherwise: the OTLP exporter specification's default."""
MAX_TIMEOUT_S = 600.0
"""What "no limit" is, and what a larger number of seconds is warned of."""
_GRPC_PORT = 4317
_MIN_MILLISECONDS = 1000.0

_PATHS = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
HEADERS_FILE = "STEPSPAN_HEADERS_FILE"
_SETTINGS = ("ENDPOINT", "PROTOCOL", "HEADERS", "COMPRESSION", "TIMEOUT", "INSECURE", *_PATHS)
"""The last word of the variables that exist in general and for each signal."""
_TEMPORALITY = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
_HISTOGRAM_AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
_VARIABLES = (
    "OTEL_SDK_DISABLED",
    HEADERS_FILE,
    *(
        f"OTEL_PYTHON_EXPORTER_OTLP_{protocol}_{signal}CREDENTIAL_PROVIDER"
        for protocol in ("HTTP", "GRPC")
        for signal in ("", *(f"{signal.upper()}_" for signal in SIGNALS))
    ),
    *(f"OTEL_{signal.upper()}_EXPORTER" for signal in SIGNALS),
    *(f"OTEL_EXPORTER_OTLP_{name}" for name in _SETTINGS),
    *(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}" for signal in SIGNALS for name in _SETTINGS),
    _TEMPORALITY,
    _HISTOGRAM_AGGREGATION,
    *record_variables.NAMES,
)

_PARTS = {signal: (f"{signal.upper()}_", "") for signal in SIGNALS}
"""What the variables of a signal have in their names, and then the general ones."""

_GRPC_NAMING = re.compile(r"(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds):", re.IGNORECASE)
"""Targets in gRPC's own naming: handed to it as they are."""
_THIS_HOST = re.compile(r"(unix|unix-abstract):|(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$", re.IGNORECASE)
_USER_INFO = re.compile(r"^([a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(r"\[[^\[\]]+\]|[^\[\]$(){}<>%,;:*|\\^`\"'&=]+")
_NOT_FILLED_IN = re.compile(r"\$[({]?\w|\{\{|<[\w-]+>")
"""What a template leaves where nobody has put a value."""
_GRPC_TARGET = "grpc target"
_GRPC_SCHEMES = frozenset((_GRPC_TARGET, "grpc", "grpcs"))
_INSECURE_SCHEMES = {"http": True, "grpc": True, "https": False, "grpcs": False}
"""Schemes that say whether there is no TLS."""
_HEADER_ENTRY = re.compile(r"(?P<name>[A-Za-z0-9_.%-]+)[ \t]*(?P<separator>=|:[ \t])(?P<value>.*)", re.DOTALL)
"""As the specification has it, or as a line of HTTP."""
_HEADER_TEXT = re.compile(r"[ !#-+\--:<-\[\]-~]*")
"""A value by W3C Baggage, or with spaces."""
_DURATION = re.compile(r"(?P<number>\+?[0-9.]+(?:e[+-]?[0-9]+)?) *(?P<unit>ms|s|m)?", re.IGNORECASE)
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0}

_SEPARATORS = re.compile(r"[-_/. ]")
"""Left out as words are compared."""
_PROTOCOL_WORDS: dict[str, Protocol] = {
    "http": "http/protobuf",
    "httpprotobuf": "http/protobuf",
    "httpproto": "http/protobuf",
    "protobuf": "http/protobuf",
    "grpc": "grpc",
    "httpjson": "http/json",
    "json": "http/json",
}
_BOOLEAN_WORDS = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}
_COMPRESSION_WORDS: dict[str, Compression] = {
    **{word: word for word in COMPRESSIONS},
    **dict.fromkeys(("identity", *(word for word, means in _BOOLEAN_WORDS.items() if not means)), "none"),
}
_TEMPORALITY_WORDS: dict[str, Temporality] = {word: word for word in TEMPORALITIES}
_HISTOGRAM_WORDS: dict[str, HistogramAggregation] = {word.replace("_", ""): word for word in HISTOGRAM_AGGREGATIONS}

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
        temporality: Of sums and histograms: "cumulative", "delta" or "lowmemory".
        histogram_aggregation: "base2_exponential_bucket_histogram" or "explicit_bucket_histogram".
        fault: Which variable is wrong, and how: then nothing is sent, and each request is held for this reason.
        credentials: Has all headers, where some of them may change at any time; None: `headers` are all.

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
    temporality: Temporality = "cumulative"
    histogram_aggregation: HistogramAggregation = "base2_exponential_bucket_histogram"
    fault: str = ""
    credentials: Credentials | None = None

    def request_headers(self, body: bytes = b"") -> Mapping[str, str]:
        """The headers of a request that is sent now: what a transport puts on it, beside its own.

        Args:
            body: What the request holds, as it is sent.

        Returns:
            Name in lower case -> value; the same object as before unless they have changed.

        Raises:
            CredentialsError: They can't be had; the message says why, and shows no credential.

        """
        return self.headers if self.credentials is None else self.credentials.headers(self.url, body)

    @property
    def display_url(self) -> str:
        """The URL as a message may show it: without its query."""
        return self.url.partition("?")[0]

    @property
    def secrets(self) -> list[str]:
        """What no message may show, longest first: header values, the token in each, the URL's query."""
        query = urlsplit(self.url).query
        secrets = {query, *(value for _, value in parse_qsl(query))}
        headers = self.headers
        if self.credentials is not None:
            with suppress(CredentialsError):
                headers = {**headers, **self.credentials.headers(self.url, b"")}
        for value in headers.values():
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
        ignored: Variables whose values say nothing and count as unset, each with its value and the fix.
        warnings: Variables that may not mean what they say, likewise.
        configured: The endpoints of all signals, those included that are switched off.

    """

    endpoints: dict[Signal, Endpoint]
    name: str
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    configured: Mapping[Signal, Endpoint] = MappingProxyType({})


def protocol_named(word: str) -> Protocol | None:
    """The protocol that a word stands for, in any spelling; None: it is none.

    Args:
        word: As in `http/protobuf`, `HTTP/JSON` or `http`.

    """
    return _PROTOCOL_WORDS.get(_spelling(word))


def _spelling(word: str) -> str:
    return _SEPARATORS.sub("", word.lower())


def read_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that say where OTLP goes, each looked up once: no blank ones, no space or quotes around values."""
    return {name: value for name in _VARIABLES if (value := unquoted(env.get(name, "")))}


def resolve_destination(
    env: Mapping[str, str],
    *,
    endpoint: str | None = None,
    protocol: str | None = None,
    headers: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
    headers_file: str | Path | None = None,
    compression: str | None = None,
    timeout: float | None = None,
    temporality: str | None = None,
    histogram_aggregation: str | None = None,
) -> Destination:
    """Where each signal goes. Has no endpoints when delivery is off or nothing says where to.

    Args:
        env: The environment, or what `read_variables` made of it. `OTEL_<SIGNAL>_EXPORTER=none` switches a signal
            off, `OTEL_SDK_DISABLED=true` all of them.
        endpoint: A general endpoint, as `OTEL_EXPORTER_OTLP_ENDPOINT` is. Replaces every endpoint variable.
        protocol: Over the variables, as `compression` is.
        headers: Added to those of the variables, over which they win; or a function that gives such headers.
        headers_file: A file with headers, in place of STEPSPAN_HEADERS_FILE: over the variables' headers.
        compression: "none" or "gzip".
        timeout: Seconds for one request.
        temporality: Of sums and histograms: "cumulative", "delta" or "lowmemory".
        histogram_aggregation: "base2_exponential_bucket_histogram" or "explicit_bucket_histogram".

    Raises:
        ConfigError: A value is wrong; names the argument or the variable.

    """
    variables = read_variables(env)
    switched_off = frozenset(s for s in SIGNALS if _is_none(variables.get(f"OTEL_{s.upper()}_EXPORTER", "")))
    disabled = variables.get("OTEL_SDK_DISABLED", "").lower()
    if disabled == "true" or len(switched_off) == len(SIGNALS):
        return Destination({}, _destination_name({}))
    findings = _Findings()
    if disabled not in ("", "false"):
        findings.ignore(_Setting(disabled, "OTEL_SDK_DISABLED", "general"), "only true switches the sending off")
    arguments = {"ENDPOINT": endpoint, "PROTOCOL": protocol, "COMPRESSION": compression, "TIMEOUT": timeout}
    preferences = {_TEMPORALITY: temporality, _HISTOGRAM_AGGREGATION: histogram_aggregation}
    given = {signal: _settings(signal, variables, arguments) for signal in SIGNALS}
    given["metrics"] |= _preferences(variables, preferences)
    more = {} if headers is None or callable(headers) else headers
    supplies: list[HeaderSupply] = [HeadersFunction(headers)] if callable(headers) else []
    if file := headers_file or variables.get(HEADERS_FILE):
        supplies.insert(0, HeadersFile(absolute_path(file)))
    resolved = {
        s: _supplied(
            _endpoint(s, settings, more, _Findings() if s in switched_off else findings), variables, supplies, more
        )
        for s, settings in given.items()
        if "ENDPOINT" in settings
    }
    sent = {signal: endpoint for signal, endpoint in resolved.items() if signal not in switched_off}
    ignored, warnings = (tuple(dict.fromkeys(each)) for each in (findings.ignored, findings.warnings))
    return Destination(sent, _destination_name(resolved), ignored, warnings, resolved)


def _is_none(exporters: str) -> bool:
    """Whether a list of exporters says that there is none."""
    return {word.strip().lower() for word in exporters.split(",")} == {"none"}


class _Setting(NamedTuple):
    """A value and where it was found: `field` is the argument's or the variable's name."""

    value: Any
    field: str
    scope: Literal["argument", "signal", "general"]


_Settings: TypeAlias = Mapping[str, Sequence[_Setting]]
"""The last word of a setting's variables -> where it is set, what wins first."""


class _Findings:
    """What is wrong with variables. What is wrong with an argument is raised."""

    def __init__(self) -> None:
        self.ignored: list[str] = []
        self.warnings: list[str] = []

    def ignore(self, setting: _Setting, fix: str) -> None:
        """The value says nothing. Raises `ConfigError` if it is an argument."""
        error = ConfigError(setting.field, setting.value, fix)
        if setting.scope == "argument":
            raise error
        self.ignored.append(f"{error}; ignored")

    def warn(self, setting: _Setting, meaning: str) -> None:
        """The value may not mean what it says."""
        self.warnings.append(str(ConfigError(setting.field, setting.value, meaning)))


def _settings(signal: Signal, variables: Mapping[str, str], arguments: Mapping[str, Any]) -> dict[str, list[_Setting]]:
    """A signal's settings. What is not set is not in it."""
    found: dict[str, list[_Setting]] = {}
    for name in _SETTINGS:
        argument, general = arguments.get(name), f"OTEL_EXPORTER_OTLP_{name}"
        of_signal = f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}"
        if argument not in (None, ""):
            found.setdefault(name, []).append(_Setting(argument, name.lower(), "argument"))
        if of_signal in variables:
            found.setdefault(name, []).append(_Setting(variables[of_signal], of_signal, "signal"))
        if general in variables:
            found.setdefault(name, []).append(_Setting(variables[general], general, "general"))
    return found


def _preferences(variables: Mapping[str, str], arguments: Mapping[str, str | None]) -> dict[str, list[_Setting]]:
    """What metrics are to be like: settings that no other signal has."""
    found: dict[str, list[_Setting]] = {}
    for name, argument in arguments.items():
        field = "temporality" if name == _TEMPORALITY else "histogram_aggregation"
        given = [_Setting(argument, field, "argument")] if argument not in (None, "") else []
        by_variable = [_Setting(variables[name], name, "signal")] if name in variables else []
        if given or by_variable:
            found[name] = given + by_variable
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


def _endpoint(signal: Signal, settings: _Settings, more: Mapping[str, str], findings: _Findings) -> Endpoint:
    faults: list[ConfigError] = []
    target = settings["ENDPOINT"][0]
    try:
        address = _address(target)
    except ConfigError as error:
        _add_fault(faults, error, target)
        address = _Address("http", str(error.value))
    given = _choice(_PROTOCOL_WORDS, PROTOCOLS, "PROTOCOL", settings, findings)
    by_address: Protocol = "grpc" if address.scheme in _GRPC_SCHEMES or address.port == _GRPC_PORT else "http/protobuf"
    protocol = given or by_address
    certificate, key, client_certificate = (settings[name][0].value if name in settings else None for name in _PATHS)
    insecure = _insecure(settings, address, certificate, findings)
    url = address.authority
    if protocol != "grpc" and not faults:
        url = _http_url(signal, target, address, insecure, findings, faults)
    if key and not client_certificate and not insecure:
        fix = "a key needs its certificate: set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"
        faults.append(ConfigError(settings["CLIENT_KEY"][0].field, key, fix))
    aggregation = _choice(_HISTOGRAM_WORDS, HISTOGRAM_AGGREGATIONS, _HISTOGRAM_AGGREGATION, settings, findings)
    return Endpoint(
        signal=signal,
        url=url,
        protocol=protocol,
        headers=_headers(settings.get("HEADERS"), address, more, faults),
        timeout=_timeout(settings, findings),
        compression=_choice(_COMPRESSION_WORDS, COMPRESSIONS, "COMPRESSION", settings, findings) or "none",
        certificate=certificate,
        client_key=key,
        client_certificate=client_certificate,
        insecure=bool(insecure),
        temporality=_choice(_TEMPORALITY_WORDS, TEMPORALITIES, _TEMPORALITY, settings, findings) or "cumulative",
        histogram_aggregation=aggregation or "base2_exponential_bucket_histogram",
        fault=str(faults[0]) if faults else "",
    )


def _supplied(
    endpoint: Endpoint, variables: Mapping[str, str], supplies: Sequence[HeaderSupply], over: Mapping[str, str]
) -> Endpoint:
    """The endpoint with what its changing headers come from, if there are any.

    Args:
        endpoint: With the headers that don't change.
        variables: As `read_variables` gives them.
        supplies: Of changing headers; the signal's credential provider comes to them.
        over: Headers that win over all.

    """
    transport, provider = ("GRPC", ChannelProvider) if endpoint.protocol == "grpc" else ("HTTP", SessionProvider)
    names = (f"OTEL_PYTHON_EXPORTER_OTLP_{transport}_{part}CREDENTIAL_PROVIDER" for part in _PARTS[endpoint.signal])
    variable = next((name for name in names if name in variables), None)
    given = [*supplies, *([provider(variables[variable], variable)] if variable else [])]
    if not given:
        return endpoint
    return replace(endpoint, credentials=Credentials(endpoint.headers, given, valid_headers(over)))


def _add_fault(faults: list[ConfigError], error: ConfigError, setting: _Setting) -> None:
    """Note that nothing may be sent. An argument's error is raised."""
    if setting.scope == "argument":
        raise error from None
    faults.append(error)


def _address(target: _Setting) -> _Address:
    """The parts of an endpoint. Raises `ConfigError` if it is none; whose value may be shown."""
    text = str(target.value).strip()
    if _GRPC_NAMING.match(text):
        return _Address(_GRPC_TARGET, text)
    if _NOT_FILLED_IN.search(text.partition("?")[0].rpartition("@")[2]):
        raise _endpoint_error(target, "a variable in it was not filled in: write http://host:4318")
    try:
        if re.search(r"[\s\x00-\x1f\x7f\ud800-\udfff]", text):
            raise ValueError("a space or control character")
        parts = urlsplit(text if "://" in text else f"//{text}")
        port = parts.port
    except ValueError:  # not chained: it quotes the URL, where a password may stand
        raise _endpoint_error(target, "write http://host:4318, percent-encoding everything else") from None
    if parts.scheme not in ("http", "https", "grpc", "grpcs", ""):
        raise _endpoint_error(target, "the scheme must be http or https")
    user_info, _, authority = parts.netloc.rpartition("@")
    host = authority if port is None else authority.rpartition(":")[0]
    if not host.rstrip(":"):
        raise _endpoint_error(target, "no host in it (is the variable that names it empty?): write http://host:4318")
    if not _HOST.fullmatch(host):
        raise _endpoint_error(target, "it names no one host and port: write http://host:4318")
    credentials = unquote(user_info if ":" in user_info or not user_info else f"{user_info}:")
    return _Address(parts.scheme, authority, port, parts.path, parts.query, credentials)


def _endpoint_error(target: _Setting, fix: str) -> ConfigError:
    text = str(target.value).encode("utf-8", "replace").decode()
    without_secrets = _USER_INFO.sub(r"\1***@", text).partition("?")[0]
    return ConfigError(target.field, without_secrets, fix)


def _http_url(
    signal: Signal,
    target: _Setting,
    address: _Address,
    insecure: bool | None,
    findings: _Findings,
    faults: list[ConfigError],
) -> str:
    scheme = address.scheme
    if not scheme and insecure is not None:
        scheme = "http" if insecure else "https"
        findings.warnings.append(str(_endpoint_error(target, f"taken as {scheme}://{address.authority}")))
    elif scheme not in ("http", "https"):
        fix = "HTTP needs a URL, as in http://host:4318; for gRPC set OTEL_EXPORTER_OTLP_PROTOCOL=grpc"
        _add_fault(faults, _endpoint_error(target, fix), target)
    path = address.path if target.scope == "signal" else f"{address.path.rstrip('/')}/v1/{signal}"
    return f"{scheme}://{address.authority}{path}" + (f"?{address.query}" if address.query else "")


def _insecure(settings: _Settings, address: _Address, certificate: str | None, findings: _Findings) -> bool | None:
    """Whether there is no TLS; None where nothing says it, and the receiver is not on this machine."""
    if address.scheme in _INSECURE_SCHEMES:
        return _INSECURE_SCHEMES[address.scheme]
    chosen = _choice(_BOOLEAN_WORDS, ("true", "false"), "INSECURE", settings, findings)
    if chosen is not None:
        return chosen
    return True if certificate is None and _THIS_HOST.match(address.authority) else None


def _timeout(settings: _Settings, findings: _Findings) -> float:
    for setting in settings.get("TIMEOUT", ()):
        seconds = _seconds(setting, findings)
        if seconds is not None:
            return seconds
        findings.ignore(setting, "must be a number of seconds above 0")
    return DEFAULT_TIMEOUT_S


def _seconds(setting: _Setting, findings: _Findings) -> float | None:
    """The seconds of a timeout; None where it is none."""
    if setting.scope == "argument":
        seconds = None if isinstance(setting.value, bool) else to_float(setting.value)
        return seconds if seconds is not None and 0 < seconds < math.inf else None
    duration = _DURATION.fullmatch(setting.value)
    number = to_float(duration["number"]) if duration else None
    if duration is None or number is None or not math.isfinite(number):
        return None
    if duration["unit"] or number <= MAX_TIMEOUT_S:
        return number * _UNITS_S[(duration["unit"] or "s").lower()] or MAX_TIMEOUT_S
    if number < _MIN_MILLISECONDS:
        findings.warn(setting, f"taken as seconds; write {number / 1000:g} where milliseconds are meant")
        return number
    findings.warn(setting, f"taken as milliseconds: it is seconds here; write {number / 1000:g}")
    return number / 1000


def _headers(
    found: Sequence[_Setting] | None, address: _Address, more: Mapping[str, str], faults: list[ConfigError]
) -> dict[str, str]:
    """The variable's headers, over them the URL's credentials, over them the argument's headers."""
    headers: dict[str, str] = {}
    if found:
        try:
            headers.update(_valid_headers(found[0].field, _parse_headers(found[0])))
        except ConfigError as error:
            faults.append(error)
    if address.credentials:
        headers["authorization"] = "Basic " + base64.b64encode(address.credentials.encode()).decode()
    headers.update(_valid_headers("headers", more))
    return headers


def _parse_headers(found: _Setting) -> dict[str, str]:
    """`name=value,name=value`, the values percent-encoded where they have no space. Raises `ConfigError`."""
    headers: dict[str, str] = {}
    for number, entry in enumerate(filter(None, map(str.strip, found.value.split(","))), start=1):
        pair = _HEADER_ENTRY.fullmatch(entry)
        value = unquoted(pair["value"]) if pair else ""
        if pair is None or not _HEADER_TEXT.fullmatch(value):
            fix = f"entry {number} is not a key=value pair: percent-encode its value"
            raise ConfigError(found.field, "<hidden>", fix)
        is_encoded = pair["separator"] == "=" and " " not in value
        headers[unquote(pair["name"])] = unquote(value) if is_encoded else value
    return headers


def _choice(
    words: Mapping[str, Choice], choices: Iterable[str], name: str, settings: _Settings, findings: _Findings
) -> Choice | None:
    """What the first setting of this name says that says anything; None: nothing is set."""
    for setting in settings.get(name, ()):
        word = _spelling(str(setting.value))
        if word in words:
            return words[word]
        findings.ignore(setting, f"must be one of {', '.join(choices)}")
    return None


def _valid_headers(name: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers by lower-case name, if HTTP and gRPC can both send them."""
    try:
        return valid_headers(headers)
    except ValueError as error:
        raise ConfigError(name, "<hidden>", str(error)) from None


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


def route_digest(
    configured: Mapping[Signal, Endpoint], salt: bytes, *, with_address: bool, options: Mapping[str, Any]
) -> str:
    """12 hex digits of how a receiver is reached: with which headers and certificates. None of them can be read in it.

    A variable that is wrong counts, too: a run whose variables are right must not wait for one whose are not. Headers
    that may change count as where they come from: a file's path, where a provider is imported from.

    Args:
        configured: The endpoints of all signals.
        salt: Random bytes: equal digests of two directories say nothing.
        with_address: Whether the address counts, too: where it is no part of the destination's name.
        options: What of all there is is sent, as JSON, where that is not everything: it counts as well.

    Returns:
        "" where there is nothing that counts.

    """
    found = [[str(signal), *_route(configured[signal], with_address)] for signal in sorted(configured)]
    if options:
        found.append(["options", options])
    if not any(any(parts[1:]) for parts in found):
        return ""
    return hashlib.blake2b(json.dumps(found).encode(), key=salt[:64], digest_size=6).hexdigest()


def tenant_digest(configured: Mapping[Signal, Endpoint], salt: bytes) -> str:
    """12 hex digits of whose data it is, by the headers that say so; "": none does. Arguments as `route_digest`."""
    found = [[str(signal), *found] for signal in sorted(configured) for found in _tenants(configured[signal])]
    return hashlib.blake2b(json.dumps(found).encode(), key=salt[:64], digest_size=6).hexdigest() if found else ""


def _route(endpoint: Endpoint, with_address: bool) -> list[Any]:
    paths = (endpoint.certificate, endpoint.client_certificate, endpoint.client_key)
    return [
        sorted(endpoint.headers.items()),
        [] if endpoint.credentials is None else endpoint.credentials.identity,
        [absolute_path(path) for path in paths if path],
        [endpoint.url, endpoint.protocol, endpoint.insecure] if with_address else [],
        *([endpoint.fault] if endpoint.fault else []),
    ]
