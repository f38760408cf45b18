"""The connections of both transports: when they are kept, dropped and opened anew, and what is in between."""

from __future__ import annotations

import contextlib
import gc
import gzip
import os
import socket
import ssl
import sys
import threading
import time
import types
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.raw import OK, RawServer, answering, balancer, http2_page, proxy
from harness.receiver import CERTIFICATE, KEY, Answer, ScriptedReceiver
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from stepspan.otlp import answers
from stepspan.otlp.connection import TlsFiles, tls_context
from stepspan.otlp.endpoint import PROTOCOLS, resolve_destination
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.otlp.proxies import proxy_of_url
from stepspan.otlp.transport import open_transport

HTTP_PROTOCOLS = ("http/protobuf", "http/json")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy", "no_grpc_proxy")
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in CERTIFICATE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def receiver() -> Iterator[Any]:
    with ScriptedReceiver() as running:
        yield running


@contextlib.contextmanager
def transport(url: str, protocol: str = "http/protobuf", **arguments: Any) -> Iterator[Any]:
    env = arguments.pop("env", {})
    destination = resolve_destination(env, endpoint=url, protocol=protocol, **{"timeout": 20, **arguments})
    opened = open_transport(destination.endpoints["metrics"])
    try:
        yield opened
    finally:
        opened.close()


def send(url: str, protocol: str = "http/protobuf", **arguments: Any) -> Outcome:
    with transport(url, protocol, **arguments) as opened:
        outcome: Outcome = opened.send(b"{}" if protocol == "http/json" else b"")
        return outcome


def port_of(receiver: Any, protocol: str) -> int:
    return int((receiver.grpc_target if protocol == "grpc" else receiver.url).rpartition(":")[2])


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    (directory / "certificate.pem").write_text(CERTIFICATE)
    (directory / "key.pem").write_text(KEY)
    return directory


@pytest.fixture
def server_context(tls_files: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls_files / "certificate.pem", tls_files / "key.pem")
    return context


# One deadline for the whole exchange

DRIPS = {
    "status line": b"HTTP/1.1 200 " + b"O" * 1000,
    "headers": b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 90,
    "informational": b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
}


@pytest.mark.parametrize("drip", DRIPS.values(), ids=DRIPS)
def test_an_answer_whose_head_drips_is_a_timeout(drip: bytes) -> None:
    sent: list[int] = []

    def serve(connection: Any, _: int) -> None:
        server.request(connection)
        for number in range(len(drip)):
            connection.sendall(drip[number : number + 1])
            sent.append(number)
            time.sleep(0.02)

    with RawServer(serve) as server:
        outcome = send(server.url, timeout=0.4)
    assert outcome.verdict is Verdict.RETRY
    assert "in time" in outcome.message
    assert len(sent) < len(drip) / 2


def test_a_proxy_whose_answer_drips_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(connection: Any, _: int) -> None:
        server.request(connection)
        for _ in range(500):
            connection.sendall(b"H")
            time.sleep(0.02)

    with RawServer(serve) as server:
        monkeypatch.setenv("HTTPS_PROXY", server.url)
        outcome = send("https://collector.invalid", timeout=0.4)
    assert outcome.verdict is Verdict.RETRY
    assert "in time" in outcome.message
    assert f"through proxy {server.url}" in outcome.message


def test_a_tls_handshake_that_hangs_is_a_timeout() -> None:
    with RawServer(lambda connection, _: connection.recv(1 << 16) and connection.recv(1)) as server:
        outcome = send(f"https://127.0.0.1:{server.port}", timeout=0.3)
    assert outcome.verdict is Verdict.RETRY
    assert "in time" in outcome.message


def test_a_receiver_that_reads_nothing_is_a_timeout() -> None:
    over = threading.Event()
    with RawServer(lambda connection, _: over.wait(10)) as server, transport(server.url, timeout=0.3) as opened:
        outcome = opened.send(bytes(50_000_000))
        over.set()
    assert outcome.verdict is Verdict.RETRY
    assert "in time" in outcome.message


# Connections that are kept, and those that are not


@pytest.mark.parametrize("moment", ["at once", "as the next request comes"])
def test_what_a_receiver_closed_meanwhile_is_opened_anew(moment: str) -> None:
    def serve(connection: Any, number: int) -> None:
        server.request(connection)
        connection.sendall(OK)
        if number or moment != "at once":
            server.request(connection)

    with RawServer(serve) as server, transport(server.url) as opened:
        assert [opened.send(b"x" * size).verdict for size in (1, 2)] == [Verdict.DELIVERED] * 2
        assert server.connections == 2
        assert server.requests[-1].endswith(b"\r\n\r\nxx")


def test_a_new_connection_that_is_cut_is_not_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(lambda connection, _: server.request(connection)) as server, transport(server.url) as opened:
        outcome = opened.send(b"x")
        assert outcome.verdict is Verdict.RETRY
        assert "closed the connection" in outcome.message
        assert len(server.requests) == 1


def test_what_was_answered_in_part_is_not_sent_again() -> None:
    def serve(connection: Any, _: int) -> None:
        server.request(connection)
        connection.sendall(OK)
        server.request(connection)
        connection.sendall(b"HTTP/1.1 20")

    with RawServer(serve) as server, transport(server.url) as opened:
        assert opened.send(b"x").verdict is Verdict.DELIVERED
        assert opened.send(b"x").verdict in (Verdict.RETRY, Verdict.HOLD)
        assert len(server.requests) == 2


def test_an_answer_to_nothing_is_no_answer_to_the_next_request() -> None:
    def serve(connection: Any, number: int) -> None:
        server.request(connection)
        connection.sendall(OK)
        if number == 0:
            connection.sendall(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        server.request(connection)
        connection.sendall(OK)

    with RawServer(serve) as server, transport(server.url) as opened:
        assert opened.send(b"x").verdict is Verdict.DELIVERED
        time.sleep(0.05)  # for the second answer to arrive; without it nothing is tested, and nothing fails
        assert opened.send(b"x").verdict is Verdict.DELIVERED


DROPPED = (408, 429, 500, 501, 502, 503, 504, 520, 522, 530, 404)
KEPT = (200, 202, 400, 413, 422, 401, 302)


@pytest.mark.parametrize("status", [*DROPPED, *KEPT])
def test_a_connection_is_dropped_where_another_replica_may_do_better(status: int) -> None:
    answer = b"HTTP/1.1 %d So\r\nContent-Length: 0\r\n\r\n" % status
    with answering(answer, answer) as server, transport(server.url) as opened:
        for _ in range(3):
            opened.send(b"")
        assert server.connections == (3 if status in DROPPED else 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_replica_that_fails_is_left_for_another_one(protocol: Any, status: int) -> None:
    with ScriptedReceiver() as bad, ScriptedReceiver() as good:
        bad.script("metrics", lambda _: Answer(status))
        with (
            balancer([port_of(bad, protocol), port_of(good, protocol)]) as middle,
            transport(f"http://127.0.0.1:{middle.port}", protocol) as opened,
        ):
            outcomes = [opened.send(b"{}" if protocol == "http/json" else b"").verdict for _ in range(6)]
        assert outcomes == [outcomes[0], *[Verdict.DELIVERED] * 5]
        assert (len(bad.seen), len(good.seen)) == (1, 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_replica_that_refuses_the_content_is_kept(protocol: Any) -> None:
    with ScriptedReceiver() as one, ScriptedReceiver() as other:
        one.script("metrics", [Answer(400), Answer(400)])
        ports = [port_of(one, protocol), port_of(other, protocol)]
        with balancer(ports) as middle, transport(f"http://127.0.0.1:{middle.port}", protocol) as opened:
            for _ in range(3):
                opened.send(b"{}" if protocol == "http/json" else b"")
        assert (len(one.seen), len(other.seen)) == (3, 0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_connections_age(protocol: Any, receiver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with balancer([port_of(receiver, protocol)]) as middle:
        with transport(f"http://127.0.0.1:{middle.port}", protocol) as opened:
            for _ in range(3):
                assert opened.send(b"{}" if protocol == "http/json" else b"").verdict is Verdict.DELIVERED
            assert middle.connections == 1
        monkeypatch.setattr(answers, "MAX_CONNECTION_AGE_S", 0.0)
        with transport(f"http://127.0.0.1:{middle.port}", protocol) as opened:
            for _ in range(3):
                assert opened.send(b"{}" if protocol == "http/json" else b"").verdict is Verdict.DELIVERED
            assert middle.connections == 4


def test_a_name_of_several_addresses_is_tried_elsewhere_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    with answering(busy, busy, busy) as bad, answering() as good:
        entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (bad.port, good.port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
        with transport("http://collector.invalid:4318") as opened:
            assert [opened.send(b"").verdict for _ in range(3)] == [Verdict.RETRY, *[Verdict.DELIVERED] * 2]


def test_a_name_is_looked_up_again_for_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as one, answering() as other:
        found = [one.port]
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", found[0]))],
        )
        monkeypatch.setattr(answers, "MAX_CONNECTION_AGE_S", 0.0)
        with transport("http://collector.invalid:4318") as opened:
            assert opened.send(b"").verdict is Verdict.DELIVERED
            found[0] = other.port
            assert opened.send(b"").verdict is Verdict.DELIVERED
        assert (one.connections, other.connections) == (1, 1)


def test_a_grpc_name_of_several_addresses_is_tried_elsewhere_after_a_failure() -> None:
    with ScriptedReceiver() as bad, ScriptedReceiver() as good:
        bad.script("metrics", lambda _: Answer(503))
        where, env = f"ipv4:{bad.grpc_target},{good.grpc_target}", {"OTEL_EXPORTER_OTLP_INSECURE": "true"}
        with transport(where, "grpc", env=env) as opened:
            verdicts = [opened.send(b"").verdict for _ in range(30)]  # the first address is any of them, each time
        assert Verdict.DELIVERED in verdicts


def test_an_address_that_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as server:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", each)) for each in (port, server.port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
        assert send("http://collector.invalid:4318").verdict is Verdict.DELIVERED


@pytest.mark.parametrize("protocol", HTTP_PROTOCOLS)
def test_a_forked_child_has_a_connection_of_its_own(protocol: Any, receiver: Any) -> None:
    content = b"{}" if protocol == "http/json" else b""
    with transport(receiver.url, protocol) as opened:
        assert opened.send(content).verdict is Verdict.DELIVERED
        child = os.fork()
        if child == 0:
            os._exit(0 if opened.send(content).verdict is Verdict.DELIVERED else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert opened.send(content).verdict is Verdict.DELIVERED
        assert len(receiver.seen) == 3
        assert receiver.connections == 2


def test_a_transport_that_is_dropped_leaves_no_socket_open(receiver: Any) -> None:
    endpoint = resolve_destination({}, endpoint=receiver.url).endpoints["metrics"]
    opened: Any = open_transport(endpoint)
    assert opened.send(b"").verdict is Verdict.DELIVERED
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del opened
        gc.collect()
    assert not [warning for warning in caught if warning.category is ResourceWarning]


def test_ipv6() -> None:
    try:
        server = answering(host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        assert send(f"http://[::1]:{server.port}").verdict is Verdict.DELIVERED
        assert b"\r\nhost: [::1]:%d\r\n" % server.port in server.requests[0]


# Answers as servers write them

PARTIAL = ExportMetricsServiceResponse()
PARTIAL.partial_success.rejected_data_points = 3
CONTENT = PARTIAL.SerializeToString()
RAW = zlib.compressobj(wbits=-zlib.MAX_WBITS)
ENCODED = {
    "gzip": gzip.compress(CONTENT),
    "x-gzip": gzip.compress(CONTENT),
    "deflate": zlib.compress(CONTENT),
    "Deflate": RAW.compress(CONTENT) + RAW.flush(),
    "identity": CONTENT,
}
FORMS = {
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT, 1),
    "chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(CONTENT), CONTENT),
        1,
    ),
    "close": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT, 2),
    "1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT, 2),
    "100 first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + CONTENT[:0] + b"\n\n",
        1,
    ),
    "hints first": (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", 1),
}


@pytest.mark.parametrize(("answer", "connections"), FORMS.values(), ids=FORMS)
def test_the_forms_of_an_answer(answer: bytes, connections: int) -> None:
    with answering(answer) as server, transport(server.url) as opened:
        outcomes = [opened.send(b"") for _ in range(2)]
        assert [outcome.verdict for outcome in outcomes] == [Verdict.DELIVERED] * 2
        assert outcomes[0].rejected == (3 if CONTENT in answer else 0)
        assert server.connections == connections


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    def serve(connection: Any, _: int) -> None:
        server.request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + CONTENT)

    with RawServer(serve) as server, transport(server.url) as opened:
        assert [opened.send(b"").rejected for _ in range(2)] == [3, 3]


@pytest.mark.parametrize(("encoding", "content"), ENCODED.items())
def test_an_answer_that_is_encoded(encoding: str, content: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(content)}\r\n\r\n"
    with answering(head.encode() + content) as server:
        assert send(server.url).rejected == 3


def test_an_encoded_answer_is_not_unpacked_beyond_its_limit() -> None:
    content = gzip.compress(bytes(20_000_000), 1)
    head = f"HTTP/1.1 503 Busy\r\nContent-Encoding: gzip\r\nContent-Length: {len(content)}\r\n\r\n"
    with answering(head.encode() + content) as server:
        assert send(server.url).verdict is Verdict.RETRY


def test_an_answer_that_comes_before_the_request_was_read() -> None:
    def serve(connection: Any, _: int) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with RawServer(serve) as server, transport(server.url) as opened:
        verdicts = {opened.send(bytes(20_000_000)).verdict for _ in range(3)}
    assert verdicts <= {Verdict.ISOLATE, Verdict.HALVE, Verdict.RETRY}, "a reset may overtake the answer"
    assert verdicts != {Verdict.RETRY}


def test_too_many_headers_are_no_answer() -> None:
    with answering(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n") as server:
        assert send(server.url).verdict is Verdict.HOLD


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_deflate(receiver: Any, protocol: Any) -> None:
    target = receiver.grpc_target if protocol == "grpc" else receiver.url
    outcome = send(target, protocol, compression="deflate")
    assert outcome == Outcome(Verdict.DELIVERED)
    if protocol != "grpc":
        assert receiver.seen[0].headers["content-encoding"] == "deflate"


# Web pages

PAGES = {
    "by its type": ("text/html; charset=utf-8", b"Welcome", "Welcome"),
    "by its type alone": ("Text/HTML", b"ok", "ok"),
    "xhtml": ("application/xhtml+xml", PAGE, "Sign in"),
    "by its text": ("application/x-protobuf", PAGE, "Sign in"),
    "without a type": ("", PAGE, "Sign in"),
    "after white space and a mark": ("text/plain", b"\xef\xbb\xbf\r\n\t <html>hello", "hello"),
    "xml": ("application/xml", b"<?xml version='1.0'?><error/>", "error"),
    "utf-16": ("", "\ufeff<html>".encode("utf-16-le"), "web page"),
}


@pytest.mark.parametrize("status", [200, 202, 203])
@pytest.mark.parametrize("protocol", HTTP_PROTOCOLS)
@pytest.mark.parametrize(("kind", "content", "named"), PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_a_web_page_is_no_delivery(
    protocol: Any, status: int, kind: str, content: bytes, named: str, encoding: str
) -> None:
    fields = {"Content-Type": kind, "Content-Encoding": encoding}
    content = gzip.compress(content) if encoding else content
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    head = f"HTTP/1.1 {status} OK\r\n{lines}Content-Length: {len(content)}\r\n\r\n"
    with answering(head.encode() + content) as server:
        outcome = send(server.url, protocol)
    assert (outcome.verdict, outcome.may_pass) == (Verdict.HOLD, False)
    assert outcome.message.startswith(f"{status}: {server.url}/v1/metrics answers with a web page")
    assert named in outcome.message


NO_PAGES = {
    "empty": (200, "", b""),
    "empty, of a framework for pages": (200, "text/html; charset=utf-8", b""),
    "nothing, of one": (204, "text/html", b""),
    "nothing": (204, "", b""),
    "text": (200, "text/plain", b"ok"),
    "json": (200, "application/json", b"{}"),
    "an error as json": (200, "application/json", b'{"error": "x < y"}'),
    "unknown encoding": (200, "text/plain", b"\x28\xb5\x2f\xfd"),
}


@pytest.mark.parametrize("protocol", HTTP_PROTOCOLS)
@pytest.mark.parametrize(("status", "kind", "content"), NO_PAGES.values(), ids=NO_PAGES)
def test_what_is_no_web_page_is_delivered(protocol: Any, status: int, kind: str, content: bytes) -> None:
    body = b"" if status == 204 else b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    answer = b"HTTP/1.1 %d OK\r\nContent-Type: %b\r\n" % (status, kind.encode()) + (body or b"\r\n")
    with answering(answer) as server:
        assert send(server.url, protocol).verdict is Verdict.DELIVERED


def test_a_page_in_an_unknown_encoding_is_one() -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: br\r\nContent-Length: 4\r\n\r\n\x0b\x02\x80h"
    )
    with answering(answer) as server:
        assert send(server.url).verdict is Verdict.HOLD


def test_a_page_that_breaks_off_is_one() -> None:
    def serve(connection: Any, _: int) -> None:
        server.request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100\r\n\r\n")

    with RawServer(serve) as server:
        assert send(server.url).verdict is Verdict.HOLD


def test_an_error_page_is_shown_by_its_title() -> None:
    page = b"<html><head><title>502 Bad Gateway</title></head><body><hr>nginx</body></html>"
    with answering(b"HTTP/1.1 502 Bad\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page)) as server:
        outcome = send(server.url)
    assert outcome.verdict is Verdict.RETRY
    assert outcome.message.endswith('("502 Bad Gateway")')


def test_a_network_that_wants_a_login_holds() -> None:
    with answering(b"HTTP/1.1 511 Network Authentication Required\r\nContent-Length: 0\r\n\r\n") as server:
        outcome = send(server.url)
    assert outcome.verdict is Verdict.HOLD
    assert "login" in outcome.message


@pytest.mark.parametrize(
    "text", ["Client sent an HTTP request to an HTTPS server.", "The plain HTTP request was sent to HTTPS port"]
)
def test_plain_http_to_a_tls_port_says_so(text: str) -> None:
    with answering(b"HTTP/1.0 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text.encode())) as server:
        outcome = send(server.url)
    assert outcome.verdict is Verdict.HOLD
    assert "https://" in outcome.message


@pytest.mark.parametrize("protocol", HTTP_PROTOCOLS)
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("application/json", b'{"partialSuccess": {"rejectedDataPoints": "3", "errorMessage": "too many"}}'),
        ("application/x-protobuf", CONTENT),
    ],
)
def test_a_partial_success_counts_in_whatever_form_it_comes(protocol: Any, kind: str, content: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
    with answering(answer % (kind.encode(), len(content), content)) as server:
        assert send(server.url, protocol).rejected == 3


def test_a_web_page_over_grpc_is_no_passing_failure() -> None:
    for kind in ("text/html", "text/plain"):
        with http2_page("200", kind, PAGE) as server:
            outcome = send(f"http://127.0.0.1:{server.port}", "grpc")
        assert (outcome.verdict, outcome.may_pass) == (Verdict.HOLD, False)
        assert "web page" in outcome.message


BEHIND_GRPC = {
    "302": (Verdict.HOLD, "redirects"),
    "522": (Verdict.HOLD, "content delivery network"),
    "413": (Verdict.HALVE, "larger"),
    "503": (Verdict.RETRY, "busy"),
}


@pytest.mark.parametrize(("status", "verdict", "named"), [(s, *rest) for s, rest in BEHIND_GRPC.items()])
def test_a_status_of_http_behind_grpc_means_what_it_means(status: str, verdict: Verdict, named: str) -> None:
    with http2_page(status, "text/html", PAGE) as server:
        outcome = send(f"http://127.0.0.1:{server.port}", "grpc")
    assert outcome.verdict is verdict
    assert named in outcome.message


# Proxies


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_plain_request_through_a_proxy(receiver: Any, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    with proxy() as between:
        monkeypatch.setenv(variable, f"http://me:p%40ss@127.0.0.1:{between.port}")
        with transport(f"http://collector.invalid:{port_of(receiver, 'http/json')}") as opened:
            assert opened.proxy == between.url
            assert opened.send(b"").verdict is Verdict.DELIVERED
        head = between.requests[0].lower()
        assert head.startswith(b"post http://collector.invalid:")
        assert b"\r\nhost: collector.invalid:" in head
        assert b"\r\nproxy-authorization: basic bwu6cebzcw==\r\n" in head


@pytest.mark.parametrize("tls_to_proxy", [False, True])
def test_an_encrypted_request_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, tls_to_proxy: bool, server_context: ssl.SSLContext, tls_files: Path
) -> None:
    with ScriptedReceiver(tls=True) as receiver, proxy(context=server_context if tls_to_proxy else None) as between:
        scheme = "https" if tls_to_proxy else "http"
        monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://me:pass@127.0.0.1:{between.port}")
        env = {"OTEL_EXPORTER_OTLP_CERTIFICATE": str(tls_files / "certificate.pem")}
        with transport(receiver.url.replace("127.0.0.1", "localhost"), env=env) as opened:
            assert [opened.send(b"").verdict for _ in range(2)] == [Verdict.DELIVERED] * 2
        assert between.connections == receiver.connections == 1
        assert between.requests[0].startswith(b"CONNECT localhost:")
        assert b"Proxy-Authorization: Basic bWU6cGFzcw==" in between.requests[0]
        assert not any("proxy-authorization" in seen.headers for seen in receiver.seen)


def test_grpc_through_a_proxy(receiver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"http://collector.invalid:{port_of(receiver, 'grpc')}"
    with proxy() as between:
        monkeypatch.setenv("https_proxy", f"http://me:pass@127.0.0.1:{between.port}")
        with transport(where, "grpc") as opened:
            assert opened.proxy == between.url
            assert opened.send(b"").verdict is Verdict.DELIVERED
        assert b"Proxy-Authorization: Basic bWU6cGFzcw==" in between.requests[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("NO_PROXY", "127.0.0.1"), ("no_proxy", "*"), ("no_grpc_proxy", "127.0.0.1"), ("no_proxy", "0.1")],
)
def test_grpc_past_a_proxy(receiver: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with proxy(refusal=b"HTTP/1.1 403 No\r\n\r\n") as between:
        monkeypatch.setenv("http_proxy", between.url)
        assert send(receiver.grpc_target, "grpc").verdict is Verdict.HOLD
        monkeypatch.setenv(name, value)
        with transport(receiver.grpc_target, "grpc") as opened:
            assert opened.proxy == ""
            assert opened.send(b"").verdict is Verdict.DELIVERED


PROXY_REFUSALS = {
    407: (Verdict.HOLD, "wants credentials"),
    403: (Verdict.HOLD, "refuses to connect"),
    503: (Verdict.RETRY, "does not reach"),
}


@pytest.mark.parametrize(("status", "verdict", "named"), [(s, *rest) for s, rest in PROXY_REFUSALS.items()])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_proxy_that_refuses(
    monkeypatch: pytest.MonkeyPatch, protocol: Any, status: int, verdict: Verdict, named: str
) -> None:
    with proxy(refusal=b"HTTP/1.1 %d So it is\r\nContent-Length: 0\r\n\r\n" % status) as between:
        monkeypatch.setenv("https_proxy", f"http://me:s3cret@127.0.0.1:{between.port}")
        outcome = send("https://collector.invalid:4317", protocol)
    assert outcome.verdict is verdict
    assert named in outcome.message or (protocol, status) == ("grpc", 503)
    assert f"through proxy {between.url}" in outcome.message
    assert "s3cret" not in outcome.message


def test_a_proxy_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:s3cret@proxy.invalid:3128")
    outcome = send("http://127.0.0.1:4318")
    assert outcome.verdict is Verdict.HOLD
    assert "the name of the proxy has no address" in outcome.message
    assert "through proxy http://proxy.invalid:3128" in outcome.message
    assert "s3cret" not in outcome.message


@pytest.mark.parametrize(
    "value", ["http://[junk", "http://", "ftp://proxy:21", "http://proxy:nan", "http://s3cret@:80"]
)
def test_a_proxy_that_is_none_holds_and_shows_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    outcome = send("http://127.0.0.1:4318")
    assert outcome.verdict is Verdict.HOLD
    assert "the proxy's URL" in outcome.message
    assert "s3cret" not in outcome.message


def test_the_page_of_a_proxy_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nlogin"
    with proxy(refusal=page) as between:
        monkeypatch.setenv("HTTP_PROXY", between.url)
        outcome = send("http://collector.invalid:4318")
    assert outcome.verdict is Verdict.HOLD
    assert f"through proxy {between.url}" in outcome.message


EXCLUDED = {
    "*": True,
    "collector.example.com": True,
    "example.com": True,
    ".example.com": True,
    "*.example.com": True,
    "other.org, EXAMPLE.com:4318": True,
    "example.com:4317": False,
    "ample.com": False,
    "collector": False,
    "10.0.0.0/8": False,
    "": False,
}


@pytest.mark.parametrize(("value", "bypassed"), EXCLUDED.items())
def test_no_proxy(monkeypatch: pytest.MonkeyPatch, value: str, bypassed: bool) -> None:
    monkeypatch.setenv("HTTP_PROXY", "proxy:3128")
    monkeypatch.setenv("NO_PROXY", value)
    assert (proxy_of_url("http://collector.example.com:4318/v1/metrics") is None) is bypassed


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("10.1.0.0/16", "http://10.1.2.3:4318"),
        ("10.1.2.3", "http://10.1.2.3:4318"),
        ("::1", "http://[::1]:4318"),
        ("[::1]:4318", "http://[::1]:4318"),
        ("fd00::/8", "http://[fd00::7]"),
    ],
)
def test_no_proxy_by_address(monkeypatch: pytest.MonkeyPatch, value: str, url: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "proxy:3128")
    assert proxy_of_url(url) is not None
    monkeypatch.setenv("NO_PROXY", value)
    assert proxy_of_url(url) is None


def test_a_socks_proxy(monkeypatch: pytest.MonkeyPatch, receiver: Any) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://me:pass@127.0.0.1:1081")
    monkeypatch.setitem(sys.modules, "socks", None)
    missing = send("http://collector.invalid:4318")
    assert missing.verdict is Verdict.HOLD
    assert "PySocks" in missing.message

    asked = []

    def create_connection(address: Any, **arguments: Any) -> socket.socket:
        asked.append((address, arguments["proxy_addr"], arguments["proxy_port"], arguments["proxy_rdns"]))
        return socket.create_connection(("127.0.0.1", port_of(receiver, "http/json")))

    fake = types.SimpleNamespace(SOCKS4=1, SOCKS5=2, ProxyError=OSError, create_connection=create_connection)
    monkeypatch.setitem(sys.modules, "socks", fake)
    assert send("http://collector.invalid:4318").verdict is Verdict.DELIVERED
    assert asked == [(("collector.invalid", 4318), "127.0.0.1", 1081, True)]


def test_the_name_of_a_host_in_other_letters(monkeypatch: pytest.MonkeyPatch, receiver: Any) -> None:
    with proxy() as between:
        monkeypatch.setenv("HTTP_PROXY", between.url)
        outcome = send(f"http://b\u00fccher.invalid:{port_of(receiver, 'http/json')}")
        assert outcome.verdict is Verdict.DELIVERED
        assert b"\r\nhost: xn--bcher-kva.invalid:" in between.requests[0]


# Certificates


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates_of_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str, tls_files: Path) -> None:
    with ScriptedReceiver(tls=True) as receiver:
        assert send(receiver.url).verdict is Verdict.HOLD
        monkeypatch.setenv(variable, str(tls_files / "certificate.pem"))
        assert send(receiver.url) == Outcome(Verdict.DELIVERED)
        if variable == "SSL_CERT_FILE":
            assert send(f"https://{receiver.grpc_target}", "grpc") == Outcome(Verdict.DELIVERED)


def test_a_certificate_that_was_renewed_is_read_again(tls_files: Path, tmp_path: Path) -> None:
    path = tmp_path / "certificate.pem"
    path.write_text(CERTIFICATE)
    files = TlsFiles(authority=str(path))
    before = tls_context(files)
    assert tls_context(files) is before
    path.write_text(CERTIFICATE + "\n")
    assert tls_context(files) is not before


def test_a_key_with_a_password_is_not_asked_for(tmp_path: Path, tls_files: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIH\n-----END ENCRYPTED PRIVATE KEY-----\n")
    env = {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tls_files / "certificate.pem"),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(tls_files / "certificate.pem"),
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(key),
    }
    with ScriptedReceiver(tls=True) as receiver:
        outcome = send(receiver.url, env=env)
    assert outcome.verdict is Verdict.HOLD
    assert str(key) in outcome.message


# What may pass by itself


@pytest.mark.parametrize("status", [403, 404, 520, 522, 530])
@pytest.mark.parametrize("protocol", HTTP_PROTOCOLS)
def test_statuses_that_may_pass(protocol: Any, status: int) -> None:
    with answering(b"HTTP/1.1 %d So\r\nContent-Length: 0\r\n\r\n" % status) as server:
        outcome = send(server.url, protocol)
    assert (outcome.verdict, outcome.may_pass) == (Verdict.HOLD, True)


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNIMPLEMENTED", "NOT_FOUND"])
def test_grpc_codes_that_may_pass(receiver: Any, code: str) -> None:
    receiver.script("metrics", [Answer(500, code=code)])
    outcome = send(receiver.grpc_target, "grpc")
    assert (outcome.verdict, outcome.may_pass) == (Verdict.HOLD, True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("where", ["https://127.0.0.1:{port}", "http://nowhere.invalid:{port}"], ids=["TLS", "DNS"])
def test_faults_that_may_pass(receiver: Any, protocol: Any, where: str) -> None:
    outcome = send(where.format(port=port_of(receiver, protocol)), protocol)
    assert (outcome.verdict, outcome.may_pass) == (Verdict.HOLD, True)


def test_a_name_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    outcome = send("http://collector.invalid:4318")
    assert (outcome.verdict, outcome.may_pass) == (Verdict.HOLD, True)
    assert "Temporary failure" in outcome.message


@pytest.mark.parametrize("status", [401, 405, 415, 302])
def test_statuses_that_do_not_pass(status: int) -> None:
    with answering(b"HTTP/1.1 %d So\r\nContent-Length: 0\r\n\r\n" % status) as server:
        outcome = send(server.url)
    assert (outcome.verdict, outcome.may_pass) == (Verdict.HOLD, False)
