"""How a `requests.Session` of a credential provider would sign a request, so that our own client can send it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import BaseAdapter


class _Recorder(BaseAdapter):
    """Sends nothing, and keeps the request that it was to send."""

    def __init__(self) -> None:
        super().__init__()
        self.request: requests.PreparedRequest | None = None

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        """Keep the request as it would have been sent, and answer 200 without sending it."""
        self.request = request
        response = requests.Response()
        response.status_code, response.url, response.request = 200, request.url or "", request
        response._content = b""
        return response

    def close(self) -> None:
        """Do nothing: there is no connection."""


def session_of(provider: Callable[[], Any]) -> requests.Session:
    """The session that a provider gives. ValueError: it gives something else."""
    session = provider()
    if not isinstance(session, requests.Session):
        raise ValueError(f"it gave a {type(session).__name__}, and not a requests.Session")
    recorder = _Recorder()
    for prefix in list(session.adapters):
        session.mount(prefix, recorder)
    return session


def signed_headers(session: requests.Session, url: str, body: bytes) -> dict[str, str]:
    """The headers that the session adds to a POST, beyond those of every request.

    Args:
        session: As `session_of` gives it.
        url: Where the request goes.
        body: What it holds, as it is sent.

    """
    recorder = session.get_adapter(url)
    session.post(url, data=body, headers=dict.fromkeys(_OF_EVERY_REQUEST), allow_redirects=False)
    request = getattr(recorder, "request", None)
    found = {} if request is None else request.headers
    return {str(name).lower(): _to_text(value) for name, value in found.items() if name.lower() not in _OWN}


def _to_text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


_OF_EVERY_REQUEST = ("User-Agent", "Accept", "Accept-Encoding", "Connection")
"""What requests sets by itself, and does not where the value is None."""
_OWN = frozenset({*map(str.lower, _OF_EVERY_REQUEST), "content-length", "content-type", "content-encoding", "host"})
