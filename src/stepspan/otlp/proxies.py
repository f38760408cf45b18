"""The proxy that a request goes through, by the environment: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

Names in lower case win, as everywhere. An entry of NO_PROXY is `*`, a name (its subdomains included), an address, a
network (`10.0.0.0/8`), or one of the former with a port. macOS's own settings count where no variable is set.
"""

from __future__ import annotations

import base64
import ipaddress
import os
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from stepspan.environment import unquoted

_DEFAULT_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks4a": 1080, "socks5": 1080, "socks5h": 1080}
_GRPC_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # in lower case only
_GRPC_EXCLUDED = "no_grpc_proxy"


class Proxy(NamedTuple):
    """Where to connect to instead.

    Args:
        scheme: "http", "https" (TLS to the proxy itself), "socks4", "socks4a", "socks5" or "socks5h".
        host: Its name or address.
        port: Its port.
        user: "" for none.
        password: Of the user.

    """

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""

    @property
    def display_url(self) -> str:
        """As a message may show it: without the credentials."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def authorization(self) -> str:
        """What a Proxy-Authorization header says; "" for none."""
        if not self.user and not self.password:
            return ""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def proxy_of_url(url: str) -> Proxy | None:
    """The proxy for a URL; None: straight to its host.

    Raises:
        ValueError: The proxy's URL is none; it is not quoted, for it may hold a password.

    """
    from urllib.request import getproxies

    parts, proxies = urlsplit(url), getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or _is_bypassed(parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)):
        return None
    return parse_proxy(address)


def proxy_of_grpc(target: str) -> Proxy | None:
    """The proxy for a gRPC target: as gRPC itself has it, by variables in lower case, and http:// proxies only.

    NO_PROXY counts as it does for a URL, too: gRPC alone knows neither that name, nor `*`, nor a port in it.
    """
    address = next(filter(None, map(os.environ.get, _GRPC_VARIABLES)), "")
    if not address or target.lower().startswith("unix"):
        return None
    try:
        proxy, parts = parse_proxy(address), urlsplit("//" + target.rpartition("/")[2])
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:
        return None
    excluded = os.environ.get(_GRPC_EXCLUDED) or os.environ.get("no_proxy") or ""
    by_grpc = any(host.endswith(entry.strip().lower()) for entry in excluded.split(",") if entry.strip())
    bypassed = by_grpc or _is_bypassed(host, port, os.environ.get(_GRPC_EXCLUDED))
    return proxy if proxy.scheme == "http" and not bypassed else None


def parse_proxy(address: str) -> Proxy:
    """A proxy from the text of a variable, which may leave the scheme and the port out.

    Raises:
        ValueError: It is no URL of a proxy; does not quote it.

    """
    address = unquoted(address)
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if not parts.hostname or parts.scheme not in _DEFAULT_PORTS:
        raise ValueError("the URL of the proxy is none: write http://host:port")
    port = port or _DEFAULT_PORTS[parts.scheme]
    return Proxy(parts.scheme, parts.hostname, port, unquote(parts.username or ""), unquote(parts.password or ""))


def _is_bypassed(host: str, port: int, excluded: str | None = None) -> bool:
    from urllib.request import proxy_bypass

    if excluded is None:
        excluded = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    if excluded is None:
        return bool(proxy_bypass(host))  # macOS's settings
    return any(_fits(entry, host.lower(), port) for entry in excluded.lower().replace(",", " ").split())


def _fits(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY is about a host."""
    if entry == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:  # one of them is no address
        pass
    name, separator, only_port = entry.rpartition(":")
    if separator and only_port.isdigit():
        if int(only_port) != port:
            return False
        entry = name
    name = entry.strip("[]").removeprefix("*").lstrip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))
