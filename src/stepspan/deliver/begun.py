"""What a session's header says of where it was begun for, and whether it is new to another destination."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from stepspan.deliver.routes import Route, lock_name
from stepspan.errors import JournalError
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.journal.liveness import is_alive_here
from stepspan.journal.reader import JournalReader
from stepspan.mapping.records import SIGNALS

COUNT_TIMEOUT_S = 0.05


class Begun(NamedTuple):
    """What a session's header says of its beginning."""

    destinations: frozenset[str]
    digests: Mapping[str, str]
    """Of the destinations' routes; earlier versions give none."""
    addresses: Mapping[str, str]
    """Of the destinations: the name that each one's address stands for."""
    tenants: Mapping[str, str]
    """Of the destinations: a digest of whose data it is, where that is known."""
    run_key: str
    started: int
    is_first_rank: bool
    header: Mapping[str, Any]

    def name_for(self, route: Route) -> str | None:
        """Which of a route's names the session was begun for: the destination's, or that of its address."""
        return next((name for name in (route.destination, route.address) if name in self.destinations), None)

    @property
    def lock_names(self) -> Mapping[str, str]:
        """By destination, the lock of whoever sends by the route that the session was begun with."""
        return {name: lock_name(name, digest) for name, digest in self.digests.items()}

    def goes_by(self, route: Route) -> bool:
        """Whether the session was begun with a route's credentials; of one that says nothing nobody knows better."""
        name = self.name_for(route) or ""
        mine = route.digest if name == route.destination else route.address_digest
        return self.digests.get(name, mine) == mine


def read_begun(session: SessionPath) -> Begun | None:
    """What the header says; None where it can't be read, or is not from our writer."""
    try:
        with closing(JournalReader(session)) as reader:
            header = reader.header
        listed = header.get("destinations")
        return Begun(
            destinations=frozenset(d for d in listed if isinstance(d, str))
            if isinstance(listed, list)
            else frozenset(),
            digests=_routes(header, "digest"),
            addresses=_routes(header, "address"),
            tenants=_routes(header, "tenant"),
            run_key=str(header["run_key"]),
            started=int(header["started"]),
            is_first_rank=header["rank"] == 0 and not header["role"],
            header=header,
        )
    except (OSError, JournalError, KeyError, TypeError, ValueError):
        return None


def _routes(header: Mapping[str, Any], field: str) -> dict[str, str]:
    """By destination, a field of what the header says of its route."""
    routes = header.get("routes")
    return {
        each["destination"]: each[field]
        for each in (routes if isinstance(routes, list) else [])
        if isinstance(each, dict) and isinstance(each.get("destination"), str) and isinstance(each.get(field), str)
    }


def is_new(session: SessionPath, begun: Begun, route: Route) -> bool:
    """Whether a session was begun for, or has gone to, other destinations only: at this one it would be sent anew."""
    known = cursor_destinations(session)
    return bool(begun.destinations or known) and known.isdisjoint(route.names)


def count_new(session: Path, route: Route, *, timeout: float = COUNT_TIMEOUT_S) -> int:
    """How many finished sessions of a run's job on its host are new to a route's destination.

    Args:
        session: The run's own.
        route: The route.
        timeout: Seconds after which those that have been found are the answer.

    """
    deadline = time.monotonic() + timeout
    count = 0
    for other in find_sessions(session.parent):
        if other.path == session:
            continue
        begun = read_begun(other) if time.monotonic() < deadline else None
        count += (
            begun is not None
            and begun.name_for(route) is None
            and not is_alive_here(other.path)
            and is_new(other, begun, route)
        )
    return count


def cursor_destinations(session: SessionPath) -> set[str]:
    """The destinations to which a session was sent, or was to be."""
    try:
        names = os.listdir(session.path / "cursors")
    except OSError:
        return set()
    return {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in SIGNALS}


def new_text(count: int, route: Route, directory: Path) -> str:
    """What is to be said of finished sessions that are new to an address."""
    sessions, them = ("1 finished session is", "it") if count == 1 else (f"{count:,} finished sessions are", "them")
    command = ["stepspan", "sync", str(directory)]
    if not {" ", ","}.intersection(route.url):
        command += ["--endpoint", route.url]
    if route.is_named:
        command += ["--destination", route.destination]
    hint = "" if route.is_named else "; a receiver that moves needs a name: STEPSPAN_DESTINATION"
    return (
        f"{sessions} new to {route.url} (destination {route.destination}): `{shlex.join(command)}` sends {them}{hint}"
    )
