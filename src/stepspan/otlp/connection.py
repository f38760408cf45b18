"""One HTTP/1.1 connection that is kept: opened through a proxy if need be, and with one deadline for each exchange.

`http.client` reads the answers. The sockets are ours: `http.client`'s timeout starts anew with each byte that arrives,
so a receiver that lets its answer drip would keep a thread for ever; and what other libraries do to its connections
(instrumentation makes spans of them) must not reach telemetry.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import ssl
import time
import zlib
from functools import lru_cache
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import Any, NamedTuple

from stepspan.otlp.proxies import Proxy

MAX_ANSWER_BYTES = 64 * 1024
MIN_CONNECT_SHARE_S = 2.0
"""What an address is tried for at least; else the time that is left is shared among a name's addresses."""
_PEER_GONE = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_ANY_ENCODING_OF_ZLIB = 47  # zlib's own number for "gzip or zlib, look at its header"


class Origin(NamedTuple):
    """What a URL names: whom to talk to, and whether with TLS."""

    scheme: str
    host: str
    port: int


class TlsFiles(NamedTuple):
    """Paths of certificates; "" for none.

    Args:
        authority: What to trust, a file or a directory; "": the system's store and certifi's.
        certificate: Our own, for mutual TLS; may hold the key, too.
        key: Of our certificate.

    """

    authority: str = ""
    certificate: str = ""
    key: str = ""


class ProxyRefusal(Exception):
    """A proxy did not connect us: it answered with `status` and `reason`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class ProxyNameError(OSError):
    """The proxy's own name has no address."""


class ConnectionLost(ConnectionError):
    """A connection ended before anything of an answer had come."""


class Reply(NamedTuple):
    """What a receiver answered.

    Args:
        status: The HTTP status.
        headers: By name, in any case.
        content: The body, decoded, cut at `MAX_ANSWER_BYTES`.
        complete: Whether the body has neither broken off nor come too slowly.

    """

    status: int
    headers: HTTPMessage
    content: bytes
    complete: bool


class Connection:
    """An open connection, for one thread at a time.

    Args:
        stream: The connected socket, TLS included.
        address: Of the peer, as `socket.getaddrinfo` has it.

    """

    def __init__(self, stream: Any, address: Any) -> None:
        self.address = address
        self._stream = stream
        self._process = os.getpid()
        self._reusable = True
        self._poll = select.poll()
        self._poll.register(stream.fileno(), select.POLLIN)

    def is_usable(self) -> bool:
        """Whether another request may go over it: the last answer was read to its end, and nothing has come since.

        What comes unasked is the peer's end, or an answer to nothing. A connection of the process that we were forked
        from is the parent's.
        """
        return self._reusable and self._process == os.getpid() and not self._poll.poll(0)

    def exchange(self, request: bytes, deadline: float) -> Reply:
        """Send a request and read its answer.

        Args:
            request: Head and body.
            deadline: By `time.monotonic`, for all of it.

        Raises:
            ConnectionLost: It ended before any of an answer had come.
            OSError: So did a network or a TLS fault, later.
            HTTPException: What answers does not speak HTTP.

        """
        self._reusable = False
        incoming = _Incoming(self._stream, deadline)
        try:
            try:
                self._stream.settimeout(_seconds_left(deadline))
                self._stream.sendall(request)
            except _PEER_GONE:
                with contextlib.suppress(TimeoutError):
                    return self._receive(incoming)  # it may have answered before it had read all: 413
                raise
            return self._receive(incoming)
        except _PEER_GONE as error:
            if incoming.received:
                raise
            raise ConnectionLost(str(error)) from error

    def _receive(self, incoming: _Incoming) -> Reply:
        response = _read_head(incoming, "POST")
        content, complete = _body(response)
        # What an answer without a length ends with is the end of the connection.
        self._reusable = complete and (response.length == 0 or response.isclosed()) and not response.will_close
        content = _decoded(content, response.headers.get("content-encoding", ""))
        return Reply(response.status, response.headers, content, complete)

    def close(self) -> None:
        """Close it; nothing is said to the peer."""
        self._stream.close()

    def __del__(self) -> None:
        self.close()  # without the warning of a socket that is left open: an exporter may be dropped as it is


def connect(origin: Origin, proxy: Proxy | None, files: TlsFiles, deadline: float, avoid: Any = None) -> Connection:
    """Open a connection.

    Args:
        origin: Whom to talk to.
        proxy: Whom to ask for it.
        files: For TLS.
        deadline: By `time.monotonic`.
        avoid: An address to try last, for something failed there.

    Raises:
        ProxyRefusal: The proxy does not connect us.
        OSError: Anything else: `ssl.SSLError`, `socket.gaierror`, `ProxyNameError`, TimeoutError …
        HTTPException: The proxy does not speak HTTP.

    """
    stream: Any
    with contextlib.ExitStack() as undo:
        if proxy is None:
            stream, address = _open_socket(origin.host, origin.port, deadline, avoid)
        elif proxy.scheme.startswith("socks"):
            stream, address = _through_socks(origin, proxy, deadline), None
        else:
            try:
                stream, address = _open_socket(proxy.host, proxy.port, deadline, avoid)
            except socket.gaierror as error:
                raise ProxyNameError(*error.args) from error
        undo.callback(lambda: stream.close())
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.settimeout(_seconds_left(deadline))
        if proxy is not None and proxy.scheme == "https":
            stream = tls_context(files).wrap_socket(stream, server_hostname=_name_in_certificate(proxy.host))
        if origin.scheme == "https":
            if proxy is not None and proxy.scheme in ("http", "https"):
                _ask_for_tunnel(stream, origin, proxy, deadline)
            context = tls_context(files)
            stream.settimeout(_seconds_left(deadline))
            if isinstance(stream, ssl.SSLSocket):
                stream = _TlsInTls(stream, context, _name_in_certificate(origin.host))
            else:
                stream = context.wrap_socket(stream, server_hostname=_name_in_certificate(origin.host))
        undo.pop_all()
    return Connection(stream, address)


def _name_in_certificate(host: str) -> str:
    return host.partition("%")[0]  # without an IPv6 zone


def _open_socket(host: str, port: int, deadline: float, avoid: Any) -> tuple[socket.socket, Any]:
    """A socket to the first of a host's addresses that takes it, and that address."""
    found = socket.getaddrinfo(host.replace("%25", "%"), port, type=socket.SOCK_STREAM)
    found.sort(key=lambda entry: entry[4] == avoid)
    for left, (family, kind, protocol, _, address) in zip(range(len(found), 0, -1), found, strict=True):
        opened = socket.socket(family, kind, protocol)
        try:
            seconds = _seconds_left(deadline)
            opened.settimeout(max(seconds / left, min(seconds, MIN_CONNECT_SHARE_S)))
            opened.connect(address)
        except OSError:
            opened.close()
            if left == 1:
                raise
        else:
            return opened, address
    raise socket.gaierror(socket.EAI_NONAME, "no address")


def _through_socks(origin: Origin, proxy: Proxy, deadline: float) -> socket.socket:
    try:
        import socks
    except ImportError:
        raise ValueError("a SOCKS proxy needs the package PySocks") from None
    version = socks.SOCKS4 if proxy.scheme.startswith("socks4") else socks.SOCKS5
    try:
        opened: socket.socket = socks.create_connection(
            (origin.host, origin.port),
            timeout=_seconds_left(deadline),
            proxy_type=version,
            proxy_addr=proxy.host,
            proxy_port=proxy.port,
            proxy_rdns=proxy.scheme in ("socks4a", "socks5h"),
            proxy_username=proxy.user or None,
            proxy_password=proxy.password or None,
        )
    except socks.ProxyError as error:
        raise ConnectionError(str(error)) from error
    return opened


def _ask_for_tunnel(stream: Any, origin: Origin, proxy: Proxy, deadline: float) -> None:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    stream.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    response = _read_head(_Incoming(stream, deadline), "CONNECT")
    if not 200 <= response.status < 300:
        raise ProxyRefusal(response.status, response.reason)


def _read_head(incoming: _Incoming, method: str) -> HTTPResponse:
    """The status and headers of the answer that comes in; its body is still to be read."""
    lines = io.BufferedReader(incoming)
    while True:
        response = HTTPResponse(_File(lines), method=method)  # type: ignore[arg-type]
        response.begin()
        if response.status >= 200 or response.status == 101:
            return response
        response.fp = None  # type: ignore[assignment] # or its end would close what all of them read from


def _body(response: HTTPResponse) -> tuple[bytes, bool]:
    """The body as it is on the wire, up to `MAX_ANSWER_BYTES`, and whether it neither broke off nor took too long."""
    content = b""
    try:
        while len(content) < MAX_ANSWER_BYTES and response.length != 0:
            piece = response.read1(MAX_ANSWER_BYTES - len(content))
            if not piece:
                return content, not response.length
            content += piece
    except (OSError, HTTPException):
        return content, False
    return content, True


def _decoded(content: bytes, encoding: str) -> bytes:
    """The body without its Content-Encoding, where that is one we know."""
    if encoding.strip().lower() in ("gzip", "x-gzip", "deflate"):
        for window in (_ANY_ENCODING_OF_ZLIB, -zlib.MAX_WBITS):  # some send deflate without zlib's header
            with contextlib.suppress(zlib.error):
                return zlib.decompressobj(window).decompress(content, MAX_ANSWER_BYTES)
    return content


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _File:
    """What `HTTPResponse` asks a socket for, and all that it asks."""

    def __init__(self, lines: io.BufferedReader) -> None:
        self._lines = lines

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._lines


class _Incoming(io.RawIOBase):
    """A socket's bytes until a deadline; `received` counts them. Closing it leaves the socket open."""

    def __init__(self, stream: Any, deadline: float) -> None:
        self.received = 0
        self._stream, self._deadline = stream, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._stream.settimeout(_seconds_left(self._deadline))
        count: int = self._stream.recv_into(buffer)
        self.received += count
        return count


class _TlsInTls:
    """A socket's interface over TLS that goes through a proxy's own TLS, which `ssl` does not do on sockets."""

    def __init__(self, carrier: ssl.SSLSocket, context: ssl.SSLContext, host: str) -> None:
        self._carrier = carrier
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self.fileno, self.close = carrier.fileno, carrier.close
        self.settimeout(carrier.gettimeout() or 0.0)
        self._do(self._tls.do_handshake)

    def settimeout(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def sendall(self, data: bytes) -> None:
        self._do(self._tls.write, data)

    def recv_into(self, buffer: Any) -> int:
        try:
            count: int = self._do(self._tls.read, len(buffer), buffer)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return 0
        return count

    def _do(self, call: Any, *arguments: Any) -> Any:
        while True:
            try:
                result = call(*arguments)
            except ssl.SSLWantReadError:
                self._flush()
                self._carrier.settimeout(_seconds_left(self._deadline))
                if data := self._carrier.recv(io.DEFAULT_BUFFER_SIZE):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._carrier.settimeout(_seconds_left(self._deadline))
            self._carrier.sendall(data)


def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """The TLS settings that some files make. A file that has changed is read again.

    Raises:
        ssl.SSLError: A file is missing, or not what it should be; names it.

    """
    return _tls_context(files, tuple(map(_version, files)))


@lru_cache(maxsize=8)
def _tls_context(files: TlsFiles, _: tuple[object, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the authority that is given need not be a root
    current = files.authority
    try:
        if not files.authority:
            _trust_the_usual(context)
        elif os.path.isdir(files.authority):
            context.load_verify_locations(capath=files.authority)
        else:
            context.load_verify_locations(cafile=files.authority)
        if files.certificate:
            current = files.certificate if not files.key else f"{files.certificate} and {files.key}"
            context.load_cert_chain(files.certificate, files.key or None, password=_no_password)
    except OSError as error:  # ssl.SSLError is one
        raise ssl.SSLError(f"{current}: {error.strerror or error}") from error
    return context


def _trust_the_usual(context: ssl.SSLContext) -> None:
    """The system's store, or what SSL_CERT_FILE and SSL_CERT_DIR name; and certifi's, for images without one."""
    context.load_default_certs()
    import certifi

    with contextlib.suppress(OSError):
        context.load_verify_locations(cafile=certifi.where())


def _no_password() -> str:
    """OpenSSL would ask at the terminal."""
    raise ssl.SSLError("the key is encrypted: give one without a password")


def _version(path: str) -> object:
    if not path:
        return os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
