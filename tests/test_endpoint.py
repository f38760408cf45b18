"""From variables and arguments to endpoints: one row each, and what is refused."""

from __future__ import annotations

import base64
import logging
import re
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from stepspan.errors import ConfigError
from stepspan.exporters.otlp import otlp_exporters
from stepspan.otlp.endpoint import resolve_destination

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


# environment, arguments, field, what the fix says
WRONG = {
    "endpoint without scheme": ({f"{E}ENDPOINT": "c:4318"}, {}, f"{E}ENDPOINT", "http://host:4318"),
    "endpoint of a signal": ({f"{E}LOGS_ENDPOINT": "c:4318"}, {}, f"{E}LOGS_ENDPOINT", "http://host:4318"),
    "endpoint argument": ({}, {"endpoint": "ftp://c"}, "endpoint", "http or https"),
    "endpoint without host": ({f"{E}ENDPOINT": "http:///v1"}, {}, f"{E}ENDPOINT", "no host"),
    "endpoint with a bad port": ({f"{E}ENDPOINT": "http://c:http"}, {}, f"{E}ENDPOINT", "percent-encoding"),
    "endpoint with a high port": ({f"{E}ENDPOINT": "http://c:65536"}, {}, f"{E}ENDPOINT", "percent-encoding"),
    "endpoint with a space": ({f"{E}ENDPOINT": "http://c d"}, {}, f"{E}ENDPOINT", "percent-encoding"),
    "endpoint with a newline": ({f"{E}ENDPOINT": "http://c/\nd"}, {}, f"{E}ENDPOINT", "percent-encoding"),
    "Unix socket over HTTP": ({f"{E}ENDPOINT": "unix:/s"}, {}, f"{E}ENDPOINT", "PROTOCOL=grpc"),
    "protocol": (HTTP | {f"{E}PROTOCOL": "http"}, {}, f"{E}PROTOCOL", "http/protobuf, grpc, http/json"),
    "protocol of a signal": (HTTP | {f"{E}LOGS_PROTOCOL": "x"}, {}, f"{E}LOGS_PROTOCOL", "http/protobuf"),
    "protocol argument": (HTTP, {"protocol": "udp"}, "protocol", "http/protobuf"),
    "compression": (HTTP | {f"{E}COMPRESSION": "deflate"}, {}, f"{E}COMPRESSION", "none, gzip"),
    "timeout word": (HTTP | {f"{E}TIMEOUT": "10s"}, {}, f"{E}TIMEOUT", "above 0"),
    "timeout zero": (HTTP | {f"{E}TIMEOUT": "0"}, {}, f"{E}TIMEOUT", "above 0"),
    "timeout nan": (HTTP | {f"{E}TIMEOUT": "nan"}, {}, f"{E}TIMEOUT", "above 0"),
    "timeout inf": (HTTP, {"timeout": float("inf")}, "timeout", "above 0"),
    "timeout bool": (HTTP, {"timeout": True}, "timeout", "above 0"),
    "timeout None-like": (HTTP, {"timeout": [1]}, "timeout", "above 0"),
    "insecure": (GRPC | {f"{E}INSECURE": "yes"}, {}, f"{E}INSECURE", "true, false"),
    "headers without =": (HTTP | {f"{E}HEADERS": "a=1,secret"}, {}, f"{E}HEADERS", "entry 2"),
    "headers with a semicolon": (HTTP | {f"{E}HEADERS": "a=secret;b"}, {}, f"{E}HEADERS", "percent-encode"),
    "headers with a newline": (HTTP | {f"{E}HEADERS": "a=secret%0Ab:c"}, {}, f"{E}HEADERS", "printable ASCII"),
    "headers argument, value": (HTTP, {"headers": {"a": "sécret"}}, "headers", "header a"),
    "headers argument, not text": (HTTP, {"headers": {"a": 1}}, "headers", "header a"),
    "headers argument, name": (HTTP, {"headers": {"a b": "secret"}}, "headers", "name"),
    "client key alone": (HTTP | {f"{E}CLIENT_KEY": "/k"}, {}, f"{E}CLIENT_KEY", "CLIENT_CERTIFICATE"),
}


@pytest.mark.parametrize(("env", "arguments", "field", "fix"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_told(env: Any, arguments: Any, field: Any, fix: Any) -> None:
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
    ],
)
def test_no_error_shows_credentials_of_a_url(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_destination({f"{E}ENDPOINT": url})
    assert not re.search("me:|hun|ter2", "".join(traceback.format_exception(raised.value)).replace(repr(url), ""))


def test_no_repr_or_log_shows_credentials(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    env = {
        f"{E}ENDPOINT": "http://me:hunter2@c:4318/o?token=hunter2",
        f"{E}HEADERS": "api-key=hunter2",
    }
    endpoints = resolve_destination(env, headers={"X-Other": "hunter2"}).endpoints
    with pytest.raises(ConfigError):
        resolve_destination({**env, f"{E}HEADERS": 'api-key="hunter2"'})
    shown = f"{endpoints!r} {endpoints} {endpoints['logs'].display_url} {caplog.text}"
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
