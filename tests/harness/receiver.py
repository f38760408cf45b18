"""A scripted OTLP receiver on the loopback: HTTP (protobuf and JSON, gzip) and gRPC, telling what it was sent.

    with ScriptedReceiver() as receiver:
        receiver.script("metrics", [Answer(503, retry_after=2), RESET])  # then 200 again
        receiver.script("traces", lambda request: Answer(404))           # or by the decoded request
        ...                                                              # send to receiver.url or receiver.grpc_target
        assert receiver.points() == {...}

An `Answer` is the same for all protocols: over gRPC its status becomes a code, its text the details, `retry_after` a
RetryInfo. `requests` holds the requests that were accepted, `seen` all that were read. `stop()` and `start()` are a
receiver that dies and returns on the same ports. gRPC is imported and started by the first use of `grpc_target` only.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import ssl
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import psutil
from google.protobuf import json_format
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from harness.received import Point, attributes, decode, is_health, logs, once, points, spans
from harness.stack import free_address
from stepspan.mapping.records import SIGNALS, Signal

if TYPE_CHECKING:
    from typing_extensions import Self

PATHS: dict[str, Signal] = {f"/v1/{signal}": signal for signal in SIGNALS}
METHODS: dict[str, Signal] = {
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export": "metrics",
    "/opentelemetry.proto.collector.trace.v1.TraceService/Export": "traces",
    "/opentelemetry.proto.collector.logs.v1.LogsService/Export": "logs",
}
RESPONSES: dict[Signal, Any] = {
    "metrics": ExportMetricsServiceResponse,
    "traces": ExportTraceServiceResponse,
    "logs": ExportLogsServiceResponse,
}
DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda body: body,
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
}
REJECTED = {"metrics": "rejected_data_points", "traces": "rejected_spans", "logs": "rejected_log_records"}
# The code that the delivery table treats as it treats the status; FAILED_PRECONDITION for all others.
GRPC_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    415: "UNIMPLEMENTED",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}
# Signs itself, for localhost and 127.0.0.1, until 2120: server, client and authority of the tests, and of nothing else.
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgPq+hrUQ7ZRyRusnb
WIk2mt/bvkaBEfZK9wjfMsiLoQOhRANCAASPtjVe9f7xFP0idYMoam0ROmO2nkZL
ZW8gjg2kosiG6HfjywI7s8s3rknX2qnN9R8w24vP4lYdrkI7JPbSH0Og
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBwTCCAWegAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1zdGVwc3Bh
biB0ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1zdGVwc3BhbiB0ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEj7Y1
XvX+8RT9InWDKGptETpjtp5GS2VvII4NpKLIhuh348sCO7PLN65J19qpzfUfMNuL
z+JWHa5COyT20h9DoKOBnzCBnDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQE
AwIChDAdBgNVHSUEFjAUBggrBgEFBQcDAQYIKwYBBQUHAwIwGgYDVR0RBBMwEYIJ
bG9jYWxob3N0hwR/AAABMB0GA1UdDgQWBBQ54/RpHD7HvHgJ/mnxbz/1DY7rSjAf
BgNVHSMEGDAWgBQ54/RpHD7HvHgJ/mnxbz/1DY7rSjAKBggqhkjOPQQDAgNIADBF
AiEAhXYLsxHLpA9eG5BUOwQy+VgdLF4QXXGgLDUjVALnIGgCIBAo74jnkrsresl2
RD1MBXfWg7cZpS0QNNjiPajGo5aD
-----END CERTIFICATE-----
"""


@dataclass(frozen=True)
class Answer:
    """What a request gets. Without arguments: success."""

    status: int = 200
    text: str = ""
    """The error's text, or the message of a partial success."""
    rejected: int = 0
    """Records that a partial success leaves out."""
    retry_after: float | str | None = None
    """Seconds; over HTTP also a date."""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Over HTTP (and in a gRPC success): instead of what status, text and rejected make."""
    code: str | None = None
    """Over gRPC: the code's name, instead of the status'."""
    delay: float = 0.0
    """Seconds before the answer."""
    then: Literal["answer", "reset", "hang"] = "answer"
    taken: bool | None = None
    """Whether the request counts as accepted, if not by the status."""

    @property
    def accepted(self) -> bool:
        """Whether the request is recorded in `requests`."""
        good = self.then == "answer" and 200 <= self.status < 300 and self.code in (None, "OK")
        return good if self.taken is None else self.taken

    @property
    def grpc_code(self) -> str:
        """The code's name over gRPC."""
        return self.code or ("OK" if 200 <= self.status < 300 else GRPC_CODES.get(self.status, "FAILED_PRECONDITION"))


OK = Answer()
RESET = Answer(then="reset")
"""Reads the request and cuts the connection."""
RESET_TAKEN = Answer(then="reset", taken=True)
"""The same, but the request was taken: the sender can't know."""
HANG = Answer(then="hang")
"""Accepts, reads, and never answers until the receiver stops."""

Script: TypeAlias = "Iterable[Answer] | Callable[[Any], Answer]"


@dataclass(frozen=True)
class Seen:
    """A request as it was read."""

    signal: Signal
    request: Any
    protocol: Literal["http/protobuf", "http/json", "grpc"]
    headers: Mapping[str, str]
    size: int
    """Bytes of the body on the wire; over gRPC after decompression."""
    answer: Answer


class ScriptedReceiver:
    """The receiver, a context manager. With `tls` both ports speak TLS; `client_certificate` asks clients for one."""

    def __init__(self, *, tls: bool = False, client_certificate: bool = False) -> None:
        self.requests: dict[Signal, list[Any]] = {signal: [] for signal in SIGNALS}
        self.seen: list[Seen] = []
        self.health: list[Any] = []
        """What deliverers told of themselves: taken apart from the run's requests, without a script."""
        self.keys: set[str] | None = None
        """The authorizations that it takes: others get a 401. None: it asks for none."""
        self.connections = 0
        """HTTP connections accepted so far."""
        self.failures: list[BaseException] = []
        """What went wrong in the receiver itself; the first is raised at the end."""
        self._scripts: dict[Signal, Callable[[Any], Answer]] = {}
        self._lock = threading.RLock()  # a script may look at what arrived so far
        self._released: set[threading.Event] = set()
        self._tls, self._client_certificate = tls, client_certificate
        self._http: _HttpServer | None = None
        self._http_port, self._grpc_port = _free_port(), 0
        self._grpc: tuple[Any, ThreadPoolExecutor] | None = None
        self._files = tempfile.TemporaryDirectory(prefix="receiver-")
        self.certificate_file = self._write("certificate.pem", CERTIFICATE)
        self.key_file = self._write("key.pem", KEY)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.stop()
        self._files.cleanup()
        if self.failures and kind is None:
            raise self.failures[0]

    @property
    def url(self) -> str:
        """The general HTTP endpoint."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._http_port}"

    @property
    def grpc_target(self) -> str:
        """`host:port` of the gRPC endpoint."""
        if self._grpc is None and self._http is not None:
            self._start_grpc()
        return f"127.0.0.1:{self._grpc_port}"

    def script(self, signal: Signal | Literal["all"], answers: Script) -> None:
        """Answer the signal's requests by a list, in order and then with success, or by the decoded request."""
        listed = None if callable(answers) else tuple(answers)
        with self._lock:
            for name in SIGNALS if signal == "all" else (signal,):
                self._scripts[name] = answers if callable(answers) else _in_order(listed or ())

    def start(self) -> None:
        """Listen; after a `stop`, on the same ports."""
        if self._http is None:
            self._http = _HttpServer(self, self._http_port, self._server_context() if self._tls else None)
        if self._grpc_port:
            self._start_grpc()

    def stop(self) -> None:
        """Close every port and connection."""
        with self._lock:
            for released in self._released:
                released.set()
        if self._http is not None:
            self._http.stop()
            self._http = None
        if self._grpc is not None:
            server, pool = self._grpc
            server.stop(None).wait()
            pool.shutdown(wait=True)
            self._grpc = None

    def points(self, name: str | None = None) -> set[Point]:
        """The accepted data points, of one metric or all; what was sent twice counts once."""
        return {point for request in self._taken("metrics") for point in points(request) if name in (None, point.name)}

    def spans(self, name: str | None = None) -> list[dict[str, Any]]:
        """The accepted spans in order of arrival, with hex ids; what was sent twice stands once."""
        return once(
            span for request in self._taken("traces") for span in spans(request) if name in (None, span["name"])
        )

    def logs(self, event_name: str | None = None) -> list[dict[str, Any]]:
        """The accepted log records in order of arrival; what was sent twice stands once."""
        records = (log for request in self._taken("logs") for log in logs(request))
        return once(log for log in records if event_name in (None, log["event_name"]))

    def resources(self, signal: Signal) -> list[dict[str, Any]]:
        """The attributes of the accepted requests' resources, each once."""
        field_name = {"metrics": "resource_metrics", "traces": "resource_spans", "logs": "resource_logs"}[signal]
        return once(attributes(r.resource) for request in self._taken(signal) for r in getattr(request, field_name))

    def _taken(self, signal: Signal) -> list[Any]:
        with self._lock:
            return list(self.requests[signal])

    def _write(self, name: str, text: str) -> str:
        path = Path(self._files.name, name)
        path.write_text(text)
        return str(path)

    def _server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate_file, self.key_file)
        if self._client_certificate:
            context.load_verify_locations(self.certificate_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def decide(self, signal: Signal, request: Any, protocol: Any, headers: Mapping[str, str], size: int) -> Answer:
        """Record a request and look up what it gets."""
        with self._lock:
            if self.keys is not None and headers.get("authorization") not in self.keys:
                answer = Answer(401, "token expired")
                self.seen.append(Seen(signal, request, protocol, headers, size, answer))
                return answer
            if signal == "metrics" and is_health(request):
                self.health.append(request)
                return OK
            answer = self._scripts.get(signal, lambda _: OK)(request)
            self.seen.append(Seen(signal, request, protocol, headers, size, answer))
            if answer.accepted:
                self.requests[signal].append(request)
            return answer

    def wait(self, seconds: float | None, on_gone: Callable[[Callable[[], None]], Any] | None = None) -> None:
        """Wait, but not beyond the receiver's or the caller's end."""
        released = threading.Event()
        if on_gone is not None:
            on_gone(released.set)
        with self._lock:
            self._released.add(released)
        released.wait(seconds)
        with self._lock:
            self._released.discard(released)

    def _start_grpc(self) -> None:
        import grpc

        self._grpc_port = self._grpc_port or _free_port()
        pool = ThreadPoolExecutor(8, "receiver-grpc")
        server = grpc.server(pool, options=(("grpc.so_reuseport", 0),))
        for method, signal in METHODS.items():
            service, _, call = method[1:].partition("/")
            handler = grpc.unary_unary_rpc_method_handler(_grpc_call(self, signal))
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {call: handler}),))
        address = f"127.0.0.1:{self._grpc_port}"
        if self._tls:
            credentials = grpc.ssl_server_credentials(
                [(KEY.encode(), CERTIFICATE.encode())],
                root_certificates=CERTIFICATE.encode() if self._client_certificate else None,
                require_client_auth=self._client_certificate,
            )
            server.add_secure_port(address, credentials)
        else:
            server.add_insecure_port(address)
        server.start()
        self._grpc = server, pool


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() joins them
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, receiver: ScriptedReceiver, port: int, context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.receiver = receiver
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="receiver-http")
        self._thread.start()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        self.receiver.connections += 1
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        self.close_request(request)  # without the shutdown that would put a FIN before a reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.receiver.failures.append(error)

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # it is gone already
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HttpServer

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        receiver, body = self.server.receiver, self.rfile.read(int(self.headers.get("content-length", 0)))
        signal = PATHS.get(self.path.partition("?")[0])
        kind = self.headers.get("content-type", "")
        if signal is None or kind not in ("application/x-protobuf", "application/json"):
            return self._send(404 if signal is None else 415, {"Content-Type": "text/plain"}, b"not here")
        as_json = kind == "application/json"
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            plain = DECOMPRESSORS[headers.get("content-encoding", "")](body)
            request = decode(signal, plain, from_json=as_json)
        except (ValueError, OSError, EOFError, zlib.error) as error:
            return self._send(400, {"Content-Type": "text/plain"}, str(error).encode())
        answer = receiver.decide(signal, request, "http/json" if as_json else "http/protobuf", headers, len(body))
        if answer.delay or answer.then == "hang":
            receiver.wait(None if answer.then == "hang" else answer.delay)
        if answer.then == "answer":
            return self._send(answer.status, *_http_answer(signal, answer, as_json))
        if answer.then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        return None

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or "Content-Length" in headers


def _http_answer(signal: Signal, answer: Answer, as_json: bool) -> tuple[dict[str, str], bytes]:
    headers = {"Content-Type": "application/json" if as_json else "application/x-protobuf"}
    if answer.status >= 300:
        headers["Content-Type"], body = "text/plain; charset=utf-8", answer.text.encode()
    elif as_json:
        body = json.dumps(json_format.MessageToDict(_response(signal, answer))).encode()
    else:
        body = _response(signal, answer).SerializeToString()
    if answer.retry_after is not None:
        headers["Retry-After"] = str(answer.retry_after)
    return headers | dict(answer.headers), body if answer.body is None else answer.body


def _response(signal: Signal, answer: Answer) -> Message:
    response = RESPONSES[signal]()
    if answer.rejected or answer.text:
        setattr(response.partial_success, REJECTED[signal], answer.rejected)
        response.partial_success.error_message = answer.text
    return response  # type: ignore[no-any-return]


def _grpc_call(receiver: ScriptedReceiver, signal: Signal) -> Callable[[bytes, Any], bytes]:
    def export(body: bytes, context: Any) -> bytes:
        import grpc

        headers = {name: str(value) for name, value in context.invocation_metadata()}
        answer = receiver.decide(signal, decode(signal, body), "grpc", headers, len(body))
        if answer.delay or answer.then == "hang":
            receiver.wait(None if answer.then == "hang" else answer.delay, context.add_callback)
        if answer.then == "reset":
            _cut(context.peer())
        if answer.grpc_code != "OK":
            context.set_code(grpc.StatusCode[answer.grpc_code])
            context.set_details(answer.text)
            if answer.retry_after is not None:
                context.set_trailing_metadata((("grpc-status-details-bin", _retry_info(answer)),))
            return b""
        return _response(signal, answer).SerializeToString() if answer.body is None else answer.body

    return export


def _retry_info(answer: Answer) -> bytes:
    from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

    retry = RetryInfo()
    retry.retry_delay.FromNanoseconds(int(float(answer.retry_after or 0) * 1e9))
    status = Status(message=answer.text)
    status.details.add().Pack(retry)
    encoded: bytes = status.SerializeToString()
    return encoded


def _cut(peer: str) -> None:
    """Shut down this process' end of the connection with `peer`: gRPC itself has no way to."""
    port = int(peer.rpartition(":")[2])
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port and connection.fd >= 0:
            with socket.socket(fileno=os.dup(connection.fd)) as end:
                end.shutdown(socket.SHUT_RDWR)


def _free_port() -> int:
    return int(free_address().rpartition(":")[2])


def _in_order(answers: tuple[Answer, ...]) -> Callable[[Any], Answer]:
    left = iter(answers)
    return lambda _: next(left, OK)


def losses(receiver: ScriptedReceiver) -> dict[Any, set[float]]:
    """Job -> the values of `training.loss` that arrived."""
    found: dict[Any, set[float]] = {}
    for point in receiver.points("training.loss"):
        if point.value is not None:
            found.setdefault(point.job, set()).add(point.number)
    return found
