"""Servers of raw bytes on the loopback, for what no well-behaved server does: proxies, balancers, and half answers."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class RawServer:
    """Calls `serve(connection, number)` on a thread for each connection, and closes that. A context manager.

    What `serve` reads by `request(connection)` stands in `requests`.
    """

    def __init__(
        self, serve: Callable[[Any, int], object], *, host: str = "127.0.0.1", context: ssl.SSLContext | None = None
    ) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._serve = serve
        self._context = context
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family)
        self.port: int = self._listening.getsockname()[1]
        self._open: list[Any] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    @property
    def url(self) -> str:
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    def request(self, connection: Any) -> bytes:
        """Read a request, head and body; b"" at the end."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += (more := connection.recv(65536))
            if not more:
                return b""
        head, _, body = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(body) < int(fields.get(b"content-length", 0)):
            body += connection.recv(65536)
        self.requests.append(head + b"\r\n\r\n" + body)
        return self.requests[-1]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count():
                connection, _ = self._listening.accept()
                self.connections += 1
                self._open.append(connection)
                self._threads.append(thread := threading.Thread(target=self._run, args=(connection, number)))
                thread.start()

    def _run(self, connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            if self._context is None:
                with connection:
                    self._serve(connection, number)
            else:
                with self._context.wrap_socket(connection, server_side=True) as encrypted:
                    self._open.append(encrypted)
                    self._serve(encrypted, number)


def answering(*answers: bytes, host: str = "127.0.0.1") -> RawServer:
    """Answers the requests of each connection by the list, then with success."""

    def serve(connection: Any, _: int) -> None:
        left = iter(answers)
        while server.request(connection):
            connection.sendall(next(left, OK))

    server = RawServer(serve, host=host)
    return server


def balancer(ports: Sequence[int]) -> RawServer:
    """Connects each new connection to the next of some local ports, as a balancer of connections does."""
    return RawServer(lambda connection, number: pump(connection, ports[number % len(ports)]))


def proxy(*, context: ssl.SSLContext | None = None, refusal: bytes = b"") -> RawServer:
    """A proxy for CONNECT and for plain requests, whatever host they name: all go to the same port of this host."""

    def serve(connection: Any, number: int) -> None:
        head = server.request(connection)
        if not head:
            return
        method, where = head.split(b" ", 2)[:2]
        if refusal:
            connection.sendall(refusal)
        elif method == b"CONNECT":
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            pump(connection, int(where.rpartition(b":")[2]))
        else:
            authority, _, path = where.removeprefix(b"http://").partition(b"/")
            head = head.replace(where, b"/" + path, 1)
            pump(connection, int(authority.rpartition(b":")[2]), head)

    server = RawServer(serve, context=context)
    return server


def pump(connection: Any, port: int, first: bytes = b"") -> None:
    """Pass bytes on between a connection and a local port, until both ends are over."""
    with socket.create_connection(("127.0.0.1", port)) as there:
        there.sendall(first)
        back = threading.Thread(target=_copy, args=(there, connection))
        back.start()
        _copy(connection, there)
        back.join()


def _copy(source: Any, sink: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def http2_page(status: str, content_type: str, content: bytes) -> RawServer:
    """An HTTP/2 server that is no gRPC: it answers every request with one page."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def serve(connection: Any, _: int) -> None:
        fields = ((b":status", status.encode()), (b"content-type", content_type.encode()))
        block = b"".join(b"\0" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in fields)
        with connection.makefile("rb") as incoming:
            incoming.read(24)  # the preface
            connection.sendall(frame(4, 0, 0))
            while head := incoming.read(9):
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                payload = incoming.read(int.from_bytes(head[:3], "big"))
                if kind in (4, 6) and not flags & 1:  # settings, ping: acknowledged
                    connection.sendall(frame(kind, 1, 0, payload if kind == 6 else b""))
                if kind in (0, 1) and flags & 1:  # the end of a request
                    connection.sendall(frame(1, 4, stream, block) + frame(0, 1, stream, content))

    return RawServer(serve)
