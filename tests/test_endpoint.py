"""From variables and arguments to endpoints: one row each, and what is refused."""

from __future__ import annotations

import base64
import logging
import re
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stepspan.errors import ConfigError
from stepspan.exporters.otlp import otlp_exporters
from stepspan.otlp.endpoint import resolve_destination
from stepspan.otlp.outcome import Verdict
from stepspan.otlp.transport import open_transport

E = "OTEL_EXPORTER_OTLP_"
HTTP = {f"{E}ENDPOINT": "http://c:4318"}
GRPC = {f"{E}ENDPOINT": "c:9999", f"{E}PROTOCOL": "grpc"}


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


# environment, arguments, signal, what the endpoint has (None: no such endpoint)
ROWS = {
    "nothing set": ({}, {}, "traces", None),
    "empty": ({f"{E}ENDPOINT": "", f"{E}TRACES_ENDPOINT": "  "}, {"endpoint": ""}, "traces", None),
    "defaults": (  # type: ignore[dict-item]
        HTTP,
        {},
        "metrics",
        {
            "url": "http://c:4318/v1/metrics",
            "protocol": "http/protobuf",
            "headers": {},
            "timeout": 10.0,
            "compression": "none",
            "certificate": None,
            "client_key": None,
            "client_certificate": None,
            "insecure": True,
        },
    ),
    "general, every signal has its path": (HTTP, {}, "logs", {"url": "http://c:4318/v1/logs"}),
    "general with a path and a slash": (
        {f"{E}ENDPOINT": "https://c/otlp/"},
        {},
        "traces",
        {"url": "https://c/otlp/v1/traces"},
    ),
    "general with a query": ({f"{E}ENDPOINT": "http://c/o?a=b"}, {}, "traces", {"url": "http://c/o/v1/traces?a=b"}),
    "IPv6": ({f"{E}ENDPOINT": "http://[::1]:4318"}, {}, "traces", {"url": "http://[::1]:4318/v1/traces"}),
    "a signal's own, as it is": (HTTP | {f"{E}TRACES_ENDPOINT": "http://t/x/"}, {}, "traces", {"url": "http://t/x/"}),
    "another signal's own": (
        HTTP | {f"{E}TRACES_ENDPOINT": "http://t/x"},
        {},
        "logs",
        {"url": "http://c:4318/v1/logs"},
    ),
    "only one signal has one": ({f"{E}TRACES_ENDPOINT": "http://t/x"}, {}, "logs", None),
    "the argument over all variables": (
        HTTP | {f"{E}TRACES_ENDPOINT": "http://t/x"},
        {"endpoint": "http://arg"},
        "traces",
        {"url": "http://arg/v1/traces"},
    ),
    "spaces around": ({f"{E}ENDPOINT": " http://c:4318 "}, {}, "traces", {"url": "http://c:4318/v1/traces"}),
    "exporter none": (HTTP | {"OTEL_TRACES_EXPORTER": "none"}, {}, "traces", None),
    "exporter none leaves the others": (HTTP | {"OTEL_TRACES_EXPORTER": "none"}, {}, "metrics", {}),
    "exporter console is not ours": (HTTP | {"OTEL_TRACES_EXPORTER": "console"}, {}, "traces", {}),
    "SDK disabled": (HTTP | {"OTEL_SDK_DISABLED": "TRUE"}, {"endpoint": "http://arg"}, "traces", None),
    "SDK not disabled": (HTTP | {"OTEL_SDK_DISABLED": "1"}, {}, "traces", {}),
    # protocol
    "port 4317 is gRPC": ({f"{E}ENDPOINT": "http://c:4317"}, {}, "traces", {"protocol": "grpc", "url": "c:4317"}),
    "port 4317 with a protocol": (
        {f"{E}ENDPOINT": "http://c:4317", f"{E}PROTOCOL": "http/json"},
        {},
        "traces",
        {"protocol": "http/json", "url": "http://c:4317/v1/traces"},
    ),
    "a signal's own protocol": (
        HTTP | {f"{E}PROTOCOL": "http/json", f"{E}LOGS_PROTOCOL": "grpc"},
        {},
        "logs",
        {"protocol": "grpc", "url": "c:4318"},
    ),
    "the protocol argument": (
        HTTP | {f"{E}LOGS_PROTOCOL": "grpc"},
        {"protocol": "HTTP/JSON"},
        "logs",
        {"protocol": "http/json"},
    ),
    # gRPC targets
    "gRPC http is plain": (GRPC | {f"{E}ENDPOINT": "http://c:1/p"}, {}, "logs", {"url": "c:1", "insecure": True}),
    "gRPC https is TLS": (
        GRPC | {f"{E}ENDPOINT": "https://c:1", f"{E}INSECURE": "true"},
        {},
        "logs",
        {"url": "c:1", "insecure": False},
    ),
    "gRPC without scheme is TLS": (GRPC, {}, "logs", {"url": "c:9999", "insecure": False}),
    "gRPC without scheme, port 4317": ({f"{E}ENDPOINT": "c:4317"}, {}, "logs", {"protocol": "grpc", "insecure": False}),
    "gRPC insecure": (GRPC | {f"{E}INSECURE": "true"}, {}, "logs", {"insecure": True}),
    "gRPC insecure, the signal's own": (
        GRPC | {f"{E}INSECURE": "true", f"{E}LOGS_INSECURE": "false"},
        {},
        "logs",
        {"insecure": False},
    ),
    "gRPC localhost": (GRPC | {f"{E}ENDPOINT": "localhost:9"}, {}, "logs", {"url": "localhost:9", "insecure": True}),
    "gRPC 127.0.0.1": (GRPC | {f"{E}ENDPOINT": "127.0.0.1:9"}, {}, "logs", {"insecure": True}),
    "gRPC [::1]": (GRPC | {f"{E}ENDPOINT": "[::1]:9"}, {}, "logs", {"url": "[::1]:9", "insecure": True}),
    "gRPC localhost with a certificate": (
        GRPC | {f"{E}ENDPOINT": "localhost:9", f"{E}CERTIFICATE": "/ca"},
        {},
        "logs",
        {"insecure": False},
    ),
    "gRPC localhost, insecure false": (
        GRPC | {f"{E}ENDPOINT": "localhost:9", f"{E}INSECURE": "False"},
        {},
        "logs",
        {"insecure": False},
    ),
    "gRPC localhost.evil.com": (GRPC | {f"{E}ENDPOINT": "localhost.evil.com:9"}, {}, "logs", {"insecure": False}),
    "gRPC Unix socket": (GRPC | {f"{E}ENDPOINT": "unix:/s"}, {}, "logs", {"url": "unix:/s", "insecure": True}),
    "gRPC Unix socket, long form": (GRPC | {f"{E}ENDPOINT": "unix:///s"}, {}, "logs", {"url": "unix:///s"}),
    "gRPC dns": (GRPC | {f"{E}ENDPOINT": "dns:///c:1"}, {}, "logs", {"url": "dns:///c:1", "insecure": False}),
    # the others
    "timeout in seconds": (HTTP | {f"{E}TIMEOUT": "2.5"}, {}, "logs", {"timeout": 2.5}),
    "timeout in milliseconds": (HTTP | {f"{E}TIMEOUT": "10000"}, {}, "logs", {"timeout": 10.0}),
    "timeout at the border": (HTTP | {f"{E}TIMEOUT": "999"}, {}, "logs", {"timeout": 999.0}),
    "timeout, the signal's own": (HTTP | {f"{E}TIMEOUT": "1", f"{E}LOGS_TIMEOUT": "2"}, {}, "logs", {"timeout": 2.0}),
    "timeout argument is seconds": (HTTP | {f"{E}TIMEOUT": "1"}, {"timeout": 1200}, "logs", {"timeout": 1200.0}),
    "gzip": (HTTP | {f"{E}COMPRESSION": "GZIP"}, {}, "logs", {"compression": "gzip"}),
    "compression none": (
        HTTP | {f"{E}COMPRESSION": "gzip", f"{E}LOGS_COMPRESSION": "none"},
        {},
        "logs",
        {"compression": "none"},
    ),
    "compression argument": (HTTP, {"compression": "gzip"}, "logs", {"compression": "gzip"}),
    "certificates": (
        {
            f"{E}ENDPOINT": "http://c:4318",
            f"{E}CERTIFICATE": "/ca",
            f"{E}LOGS_CERTIFICATE": "/l",
            f"{E}CLIENT_KEY": "/k",
            f"{E}CLIENT_CERTIFICATE": "/c",
        },
        {},
        "logs",
        {"certificate": "/l", "client_key": "/k", "client_certificate": "/c"},
    ),
    "headers": (
        HTTP | {f"{E}HEADERS": "Api-Key=a%20b, x-scope-orgid = t=1 ,,Authorization=Bearer x y"},
        {},
        "logs",
        {"headers": {"api-key": "a b", "x-scope-orgid": "t=1", "authorization": "Bearer x y"}},
    ),
    "headers, the signal's own instead": (
        HTTP | {f"{E}HEADERS": "a=1", f"{E}LOGS_HEADERS": "b=2"},
        {},
        "logs",
        {"headers": {"b": "2"}},
    ),
    "headers argument added": (
        HTTP | {f"{E}HEADERS": "a=1,b=2"},
        {"headers": {"B": "3"}},
        "logs",
        {"headers": {"a": "1", "b": "3"}},
    ),
    "credentials in the URL": (
        {f"{E}ENDPOINT": "https://me:p%40ss@c/o"},
        {},
        "logs",
        {"url": "https://c/o/v1/logs", "headers": {"authorization": basic("me:p@ss")}},
    ),
    "a token in the URL": (
        {f"{E}ENDPOINT": "https://tok@c"},
        {},
        "logs",
        {"headers": {"authorization": basic("tok:")}},
    ),
    "credentials in a gRPC target": (
        GRPC | {f"{E}ENDPOINT": "me:pw@c:1"},
        {},
        "logs",
        {"url": "c:1", "headers": {"authorization": basic("me:pw")}},
    ),
    "an argument's authorization over the URL's": (
        {f"{E}ENDPOINT": "https://me:pw@c"},
        {"headers": {"Authorization": "Bearer x"}},
        "logs",
        {"headers": {"authorization": "Bearer x"}},
    ),
}


@pytest.mark.parametrize(("env", "arguments", "signal", "expected"), ROWS.values(), ids=ROWS)
def test_resolution(env: Any, arguments: Any, signal: Any, expected: Any) -> None:
    endpoint = resolve_destination(env, **arguments).endpoints.get(signal)
    if expected is None:
        assert endpoint is None
    else:
        assert endpoint is not None
        assert endpoint.signal == signal
        assert {name: getattr(endpoint, name) for name in expected} == expected


LOCAL = {f"{E}ENDPOINT": "http://127.0.0.1:4318"}
# What others tolerate, or people write: environment, what the endpoint has.
TOLERATED = {
    "quotes that docker keeps": (
        {f"{E}ENDPOINT": '"http://c:4318"', f"{E}PROTOCOL": "'http/json'", f"{E}HEADERS": '"a=b%20c"'},
        {"url": "http://c:4318/v1/logs", "protocol": "http/json", "headers": {"a": "b c"}},
    ),
    "quotes and space": ({f"{E}ENDPOINT": " ' http://c:4318 ' "}, {"url": "http://c:4318/v1/logs"}),
    "quotes around nothing": (HTTP | {f"{E}LOGS_ENDPOINT": '""'}, {"url": "http://c:4318/v1/logs"}),
    "quotes around a certificate": (HTTP | {f"{E}CERTIFICATE": '"/ca"'}, {"certificate": "/ca"}),
    "capital letters": (
        {f"{E}ENDPOINT": "HTTP://c:4318", f"{E}PROTOCOL": "GRPC"},
        {"protocol": "grpc", "url": "c:4318"},
    ),
    "http is http/protobuf": (HTTP | {f"{E}PROTOCOL": "http"}, {"protocol": "http/protobuf"}),
    "http-json": (HTTP | {f"{E}PROTOCOL": "http-json"}, {"protocol": "http/json"}),
    "http_protobuf": (HTTP | {f"{E}PROTOCOL": "http_protobuf"}, {"protocol": "http/protobuf"}),
    "grpc as a scheme": ({f"{E}ENDPOINT": "grpc://c:9"}, {"protocol": "grpc", "url": "c:9", "insecure": True}),
    "grpcs as a scheme": ({f"{E}ENDPOINT": "grpcs://c:9"}, {"protocol": "grpc", "url": "c:9", "insecure": False}),
    "a Unix socket is gRPC": (
        {f"{E}ENDPOINT": "unix:///s"},
        {"protocol": "grpc", "url": "unix:///s", "insecure": True},
    ),
    "deflate": (HTTP | {f"{E}COMPRESSION": "deflate"}, {"compression": "deflate"}),
    "no compression": (HTTP | {f"{E}COMPRESSION": "false"}, {"compression": "none"}),
    "seconds": (HTTP | {f"{E}TIMEOUT": "10s"}, {"timeout": 10.0}),
    "seconds with a space": (HTTP | {f"{E}TIMEOUT": "2.5 s"}, {"timeout": 2.5}),
    "milliseconds": (HTTP | {f"{E}TIMEOUT": "500ms"}, {"timeout": 0.5}),
    "many milliseconds": (HTTP | {f"{E}TIMEOUT": "30000MS"}, {"timeout": 30.0}),
    "a minute": (HTTP | {f"{E}TIMEOUT": "1m"}, {"timeout": 60.0}),
    "many seconds": (HTTP | {f"{E}TIMEOUT": "900s"}, {"timeout": 900.0}),
    "no limit": (HTTP | {f"{E}TIMEOUT": "0"}, {"timeout": 600.0}),
    **{
        f"insecure {word}": (GRPC | {f"{E}INSECURE": word}, {"insecure": word in ("1", "TRUE", "yes", "On")})
        for word in ("1", "TRUE", "yes", "On", "0", "No", "off")
    },
    "a header as HTTP has it": (
        HTTP | {f"{E}HEADERS": "Authorization: Bearer abc"},
        {"headers": {"authorization": "Bearer abc"}},
    ),
    "a header in quotes": (HTTP | {f"{E}HEADERS": "a=\"b\",c='d'"}, {"headers": {"a": "b", "c": "d"}}),
    "a header that ends with =": (
        HTTP | {f"{E}HEADERS": "authorization=Basic YTpi=="},
        {"headers": {"authorization": "Basic YTpi=="}},
    ),
    "a value with a colon": (HTTP | {f"{E}HEADERS": "a=b: c"}, {"headers": {"a": "b: c"}}),
    "a key that is not used": (HTTP | {f"{E}CLIENT_KEY": "/k"}, {"client_key": "/k"}),
    "temporality": (
        HTTP | {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "Delta"},
        {"temporality": "cumulative"},
    ),
}


@pytest.mark.parametrize(("env", "expected"), TOLERATED.values(), ids=TOLERATED)
def test_what_has_one_meaning_has_it_without_a_word(env: Any, expected: Any) -> None:
    found = resolve_destination(env)
    endpoint = found.endpoints["logs"]
    assert {name: getattr(endpoint, name) for name in expected} == expected
    assert (endpoint.fault, found.ignored, found.warnings) == ("", (), ())


# Without a scheme HTTP is said how it is taken: environment, the URL.
NO_SCHEME = {
    "localhost": ({f"{E}ENDPOINT": "localhost:4318"}, "http://localhost:4318"),
    "loopback": ({f"{E}ENDPOINT": "127.0.0.1:9/p"}, "http://127.0.0.1:9/p"),
    "insecure": ({f"{E}ENDPOINT": "c:4318", f"{E}INSECURE": "1"}, "http://c:4318"),
    "secure": ({f"{E}ENDPOINT": "me:cret@c:4318", f"{E}INSECURE": "false"}, "https://c:4318"),
}


@pytest.mark.parametrize(("env", "url"), NO_SCHEME.values(), ids=NO_SCHEME)
def test_http_without_a_scheme(env: Any, url: str) -> None:
    found = resolve_destination(env)
    assert found.endpoints["logs"].url == f"{url}/v1/logs"
    assert found.endpoints["logs"].fault == ""
    [warning] = found.warnings
    assert warning.startswith(f"{E}ENDPOINT=")
    assert f"taken as {url.removesuffix('/p')}" in warning
    assert "cret" not in warning


def test_metrics_alone_have_a_temporality_and_an_aggregation() -> None:
    variables = {
        f"{E}METRICS_TEMPORALITY_PREFERENCE": "LowMemory",
        f"{E}METRICS_DEFAULT_HISTOGRAM_AGGREGATION": "explicit_bucket_histogram",
    }
    endpoints = resolve_destination(HTTP | variables).endpoints
    assert endpoints["metrics"].temporality == "lowmemory"
    assert endpoints["metrics"].histogram_aggregation == "explicit_bucket_histogram"
    default = resolve_destination(HTTP).endpoints
    assert endpoints["traces"] == default["traces"]
    assert default["metrics"].temporality == "cumulative"
    assert default["metrics"].histogram_aggregation == "base2_exponential_bucket_histogram"


# What counts as unset: environment, the variable, what the fix says, what the endpoint has instead.
IGNORED = {
    "protocol": (
        HTTP | {f"{E}PROTOCOL": "zipkin"},
        f"{E}PROTOCOL",
        "http/protobuf, grpc, http/json",
        {"protocol": "http/protobuf"},
    ),
    "protocol, by the port": (
        {f"{E}ENDPOINT": "http://c:4317", f"{E}PROTOCOL": "udp"},
        f"{E}PROTOCOL",
        "grpc",
        {"protocol": "grpc"},
    ),
    "protocol of a signal": (
        HTTP | {f"{E}LOGS_PROTOCOL": "x", f"{E}PROTOCOL": "http/json"},
        f"{E}LOGS_PROTOCOL",
        "grpc",
        {"protocol": "http/json"},
    ),
    "compression": (
        HTTP | {f"{E}COMPRESSION": "zstd"},
        f"{E}COMPRESSION",
        "none, gzip, deflate",
        {"compression": "none"},
    ),
    "timeout word": (HTTP | {f"{E}TIMEOUT": "soon"}, f"{E}TIMEOUT", "seconds", {"timeout": 10.0}),
    "timeout of a signal": (
        HTTP | {f"{E}TIMEOUT": "3", f"{E}LOGS_TIMEOUT": "-1"},
        f"{E}LOGS_TIMEOUT",
        "above 0",
        {"timeout": 3.0},
    ),
    "timeout nan": (HTTP | {f"{E}TIMEOUT": "nan"}, f"{E}TIMEOUT", "above 0", {"timeout": 10.0}),
    "timeout inf": (HTTP | {f"{E}TIMEOUT": "1e999"}, f"{E}TIMEOUT", "above 0", {"timeout": 10.0}),
    "timeout dots": (HTTP | {f"{E}TIMEOUT": "1.2.3"}, f"{E}TIMEOUT", "above 0", {"timeout": 10.0}),
    "insecure": (GRPC | {f"{E}INSECURE": "maybe"}, f"{E}INSECURE", "true, false", {"insecure": False}),
    "disabled": (HTTP | {"OTEL_SDK_DISABLED": "1"}, "OTEL_SDK_DISABLED", "only true", {}),
}


@pytest.mark.parametrize(("env", "field", "fix", "expected"), IGNORED.values(), ids=IGNORED)
def test_what_says_nothing_counts_as_unset_and_is_told(env: Any, field: str, fix: str, expected: Any) -> None:
    found = resolve_destination(env)
    endpoint = found.endpoints["logs"]
    assert {name: getattr(endpoint, name) for name in expected} == expected
    assert endpoint.fault == ""
    [ignored] = found.ignored  # once, though three signals read it
    assert ignored.startswith(f"{field}=")
    assert fix in ignored
    assert ignored.endswith("ignored")


@pytest.mark.parametrize(
    ("text", "seconds", "says"),
    [("601", 601.0, "write 0.601"), ("999", 999.0, "seconds"), ("10000", 10.0, "write 10"), ("1000", 1.0, "write 1")],
)
def test_a_timeout_that_may_be_milliseconds_is_warned_of(text: str, seconds: float, says: str) -> None:
    found = resolve_destination(HTTP | {f"{E}TIMEOUT": text})
    assert found.endpoints["logs"].timeout == seconds
    [warning] = found.warnings
    assert warning.startswith(f"{E}TIMEOUT='{text}': taken as ")
    assert says in warning
    assert resolve_destination(HTTP | {f"{E}TIMEOUT": "600"}).warnings == ()


# Going on would send elsewhere, or otherwise than was meant: environment, the variable, what the fix says.
HELD = {
    "no scheme": ({f"{E}ENDPOINT": "c:4318"}, f"{E}ENDPOINT", "http://host:4318"),
    "of a signal": (HTTP | {f"{E}LOGS_ENDPOINT": "c:4318"}, f"{E}LOGS_ENDPOINT", "http://host:4318"),
    "another scheme": ({f"{E}ENDPOINT": "ftp://c"}, f"{E}ENDPOINT", "http or https"),
    "no host": ({f"{E}ENDPOINT": "http:///v1"}, f"{E}ENDPOINT", "no host"),
    "no host, a port": ({f"{E}ENDPOINT": "http://:4318"}, f"{E}ENDPOINT", "no host"),
    "no host, gRPC": ({f"{E}ENDPOINT": ":4317"}, f"{E}ENDPOINT", "no host"),
    "no port": ({f"{E}ENDPOINT": "http://c:"}, f"{E}ENDPOINT", "no one host and port"),
    "neither": ({f"{E}ENDPOINT": "http://:"}, f"{E}ENDPOINT", "no host"),
    "a bad port": ({f"{E}ENDPOINT": "http://c:http"}, f"{E}ENDPOINT", "percent-encoding"),
    "a high port": ({f"{E}ENDPOINT": "http://c:65536"}, f"{E}ENDPOINT", "percent-encoding"),
    "a space": ({f"{E}ENDPOINT": "http://c d"}, f"{E}ENDPOINT", "percent-encoding"),
    "a newline": ({f"{E}ENDPOINT": "http://c/\nd"}, f"{E}ENDPOINT", "percent-encoding"),
    "two of them": ({f"{E}ENDPOINT": "http://c:1,http://d:1"}, f"{E}ENDPOINT", "percent-encoding"),
    "two hosts": ({f"{E}ENDPOINT": "http://c,d:1"}, f"{E}ENDPOINT", "no one host"),
    "IPv6 without brackets": ({f"{E}ENDPOINT": "http://::1:4318"}, f"{E}ENDPOINT", "percent-encoding"),
    **{
        f"not filled in, {text}": ({f"{E}ENDPOINT": f"http://{text}:4318"}, f"{E}ENDPOINT", "not filled in")
        for text in ("$(HOST_IP)", "${HOST_IP}", "$HOST_IP", "{{ host }}".replace(" ", ""), "<your-host>")
    },
    "HTTP to a Unix socket": ({f"{E}ENDPOINT": "unix:/s", f"{E}PROTOCOL": "http/json"}, f"{E}ENDPOINT", "=grpc"),
    "HTTP to grpc://": ({f"{E}ENDPOINT": "grpc://c:1", f"{E}PROTOCOL": "http/json"}, f"{E}ENDPOINT", "=grpc"),
    "headers without =": (HTTP | {f"{E}HEADERS": "a=1,secret"}, f"{E}HEADERS", "entry 2"),
    "headers with a comma": (HTTP | {f"{E}HEADERS": "authorization=Bearer a,secret"}, f"{E}HEADERS", "entry 2"),
    "headers with a semicolon": (HTTP | {f"{E}HEADERS": "a=secret;b=c"}, f"{E}HEADERS", "percent-encode"),
    "headers with a newline": (HTTP | {f"{E}HEADERS": "a=secret%0Ab:c"}, f"{E}HEADERS", "printable ASCII"),
    "headers beyond ASCII": (HTTP | {f"{E}HEADERS": "a=s\u00e9cret"}, f"{E}HEADERS", "percent-encode"),
    "headers as JSON": (HTTP | {f"{E}HEADERS": '{"a": "secret"}'}, f"{E}HEADERS", "entry 1"),
    "a key alone": ({f"{E}ENDPOINT": "https://c", f"{E}CLIENT_KEY": "/k"}, f"{E}CLIENT_KEY", "CLIENT_CERTIFICATE"),
    "a key alone, gRPC": (GRPC | {f"{E}LOGS_CLIENT_KEY": "/k"}, f"{E}LOGS_CLIENT_KEY", "CLIENT_CERTIFICATE"),
}


@pytest.mark.parametrize(("env", "field", "fix"), HELD.values(), ids=HELD)
def test_a_variable_that_would_mislead_holds_its_signal(env: Any, field: str, fix: str) -> None:
    endpoint = resolve_destination(env).endpoints["logs"]
    assert endpoint.fault.startswith(f"{field}=")
    assert fix in endpoint.fault
    assert "cret" not in endpoint.fault
    outcome = open_transport(endpoint).send(b"")
    assert (outcome.verdict, outcome.message) == (Verdict.HOLD, endpoint.fault)


def test_a_fault_is_of_its_signal_and_leaves_the_destination_its_name() -> None:
    broken = resolve_destination(HTTP | {f"{E}TRACES_HEADERS": "secret"})
    assert [signal for signal, endpoint in broken.endpoints.items() if endpoint.fault] == ["traces"]
    assert broken.name == resolve_destination(HTTP).name
    off = resolve_destination(
        HTTP | {f"{E}TRACES_HEADERS": "secret", f"{E}TRACES_TIMEOUT": "x", "OTEL_TRACES_EXPORTER": "none"}
    )
    assert (off.ignored, off.warnings) == ((), ())
    assert not any(endpoint.fault for endpoint in off.endpoints.values())


# arguments, field, what the fix says
WRONG = {
    "endpoint": ({"endpoint": "ftp://c"}, "endpoint", "http or https"),
    "endpoint without scheme": ({"endpoint": "c:4318"}, "endpoint", "http://host:4318"),
    "endpoint without host": ({"endpoint": "http://:4318"}, "endpoint", "no host"),
    "protocol": ({"protocol": "udp"}, "protocol", "http/protobuf"),
    "compression": ({"compression": "zstd"}, "compression", "none, gzip, deflate"),
    "timeout inf": ({"timeout": float("inf")}, "timeout", "above 0"),
    "timeout zero": ({"timeout": 0}, "timeout", "above 0"),
    "timeout bool": ({"timeout": True}, "timeout", "above 0"),
    "timeout None-like": ({"timeout": [1]}, "timeout", "above 0"),
    "headers, value": ({"headers": {"a": "s\u00e9cret"}}, "headers", "header a"),
    "headers, not text": ({"headers": {"a": 1}}, "headers", "header a"),
    "headers, name": ({"headers": {"a b": "secret"}}, "headers", "name"),
}


@pytest.mark.parametrize("env", [HTTP, HTTP | {f"{E}HEADERS": "secret"}], ids=["", "beside a wrong variable"])
@pytest.mark.parametrize(("arguments", "field", "fix"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused(env: Any, arguments: Any, field: str, fix: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_destination(env, **arguments)
    assert raised.value.field == field
    assert fix in raised.value.fix
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://me:hunter2@c",
        "http://me:hun/ter2@c:4318",
        "me:hunter2@c:4318",
        "http://me:hunter2@:1?key=hunter2",
        "http://me:hunter2@c d",
        "http://me:$hunter2@$c:1",
    ],
)
def test_no_error_shows_credentials_of_a_url(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_destination({}, endpoint=url)
    endpoint = resolve_destination({f"{E}ENDPOINT": url}).endpoints["logs"]
    shown = f"{endpoint} {endpoint.display_url} {endpoint.fault}"
    shown += "".join(traceback.format_exception(raised.value)).replace(repr(url), "")
    assert not re.search("me:|hun|ter2", shown)


def test_no_repr_or_log_shows_credentials(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    env = {
        f"{E}ENDPOINT": "http://me:hunter2@c:4318/o?token=hunter2",
        f"{E}HEADERS": "api-key=hunter2",
    }
    endpoints = resolve_destination(env, headers={"X-Other": "hunter2"}).endpoints
    broken = resolve_destination({**env, f"{E}HEADERS": "api-key=hunter2;x"}).endpoints
    shown = f"{broken} {broken['logs'].fault} {endpoints!r} {endpoints} {endpoints['logs'].display_url} {caplog.text}"
    assert "hunter2" not in shown
    assert basic("me:hunter2") not in shown
    assert "http://c:4318/o/v1/logs" in shown
    assert "api-key" in shown
    assert endpoints["logs"].secrets[0] == basic("me:hunter2")
    assert {"hunter2", "token=hunter2"} <= set(endpoints["logs"].secrets)


def test_an_endpoint_can_be_a_key() -> None:
    one, other = resolve_destination(HTTP).endpoints["logs"], resolve_destination(HTTP).endpoints["logs"]
    assert {one: 1}[other] == 1


def name(env: dict[str, str]) -> str:
    return resolve_destination(env).name


def test_a_destination_name_tells_receivers_and_tenants_apart_and_nothing_else() -> None:
    url = {f"{E}ENDPOINT": "http://c:4318"}
    here = name(url)
    assert re.fullmatch("[0-9a-f]{12}", here)
    assert name(url) == here == "cddf4ccc5200"
    assert name({f"{E}ENDPOINT": "http://d:4318"}) != here
    assert name(url | {f"{E}HEADERS": "authorization=Bearer a"}) == here
    assert name(url | {f"{E}HEADERS": "authorization=Bearer b,x-other=1"}) == here
    assert name(url | {f"{E}TIMEOUT": "3", f"{E}COMPRESSION": "gzip", f"{E}PROTOCOL": "http/json"}) == here
    tenants = {name(url | {f"{E}HEADERS": f"X-Scope-OrgID={tenant}"}) for tenant in "ab"}
    assert len(tenants | {here}) == 3


def test_a_rotated_password_is_the_same_destination_and_another_user_is_not() -> None:
    def of(user_info: str) -> str:
        return name({f"{E}ENDPOINT": f"http://{user_info}c:4318"})

    assert of("123:old@") == of("123:new@") != of("456:old@")
    assert of("token-a@") == of("token-b@") == of("")


def test_the_stores_of_the_readme_are_where_its_variables_lead() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme[readme.index("| store | variables |") :].partition("\n\n")[0].splitlines()[2:]
    found = {}
    for row in table:
        store, variables = row.strip("| ").split(" | ", 1)
        env = dict(re.findall(r"`OTLP_([A-Z_]+)=([^`]+)`", variables))
        destination = resolve_destination({f"{E}{name}": value for name, value in env.items()})
        assert destination.ignored == destination.warnings == ()
        assert not any(endpoint.fault for endpoint in destination.endpoints.values())
        endpoint = destination.endpoints["metrics"]
        found[store.partition(",")[0]] = endpoint.url, endpoint.temporality, sorted(endpoint.headers)
    assert found == {
        "Prometheus": ("http://prometheus:9090/api/v1/otlp/v1/metrics", "cumulative", []),
        "VictoriaMetrics": ("http://victoria:8428/opentelemetry/v1/metrics", "cumulative", []),
        "Datadog": ("https://otlp.datadoghq.com/v1/metrics", "delta", ["dd-api-key"]),
        "Dynatrace": ("https://ENVIRONMENT.live.dynatrace.com/api/v2/otlp/v1/metrics", "delta", ["authorization"]),
        "Honeycomb": ("https://api.honeycomb.io/v1/metrics", "cumulative", ["x-honeycomb-team"]),
    }


class CountedLookups(Mapping[str, str]):
    """An environment that counts how often each name is looked up."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.variables = variables
        self.lookups: Counter[str] = Counter()

    def __getitem__(self, name: str) -> str:
        self.lookups[name] += 1
        return self.variables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.variables)

    def __len__(self) -> int:
        return len(self.variables)


def test_each_variable_is_read_once_for_all_exporters() -> None:
    env = CountedLookups(HTTP | {"OTEL_LOGS_EXPORTER": "none", f"{E}TRACES_TIMEOUT": "3", f"{E}HEADERS": "a=1"})
    further = [
        {"endpoint": "http://d:4318", "processors": []},
        {"endpoint": "http://d:4318", "processors": [{"drop": {"metrics": ["grad/*"]}}]},
        {"endpoint": None, "processors": []},
    ]
    exporters = otlp_exporters(env, endpoint=None, protocol=None, further=further)  # type: ignore[arg-type]
    assert [(e.signals, e.endpoints["traces"].url, e.endpoints["traces"].timeout) for e in exporters] == [
        (("metrics", "traces"), "http://c:4318/v1/traces", 3.0),
        (("metrics", "traces"), "http://d:4318/v1/traces", 3.0),
        (("metrics", "traces"), "http://d:4318/v1/traces", 3.0),
    ]
    assert {"OTEL_SDK_DISABLED", "OTEL_LOGS_EXPORTER", f"{E}ENDPOINT", f"{E}LOGS_HEADERS"} <= env.lookups.keys()
    assert set(env.lookups.values()) == {1}


def test_a_signal_that_is_switched_off_leaves_the_destination_its_name() -> None:
    assert name(HTTP | {"OTEL_LOGS_EXPORTER": "none"}) == name(HTTP)
    assert name(HTTP | {f"{E}LOGS_ENDPOINT": "http://d:4318/v1/logs"}) != name(HTTP)


def test_nothing_is_resolved_where_all_signals_are_switched_off() -> None:
    off = {f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "TRACES", "LOGS")}
    assert otlp_exporters({f"{E}ENDPOINT": "ftp://c", **off}, endpoint=None, protocol=None) == []
