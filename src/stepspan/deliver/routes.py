"""Routes: a destination, and how it is reached. Each has a deliverer of its own on a host.

What a run sends goes out with the run's own credentials: where a key decides the tenant, those of another run would
bring it to another account. So a lock, and the deliverer that holds it, are a route's. Cursors are the destination's: a
session goes on where it was, whoever sends it.

A route has a digest of all headers and certificates, of the address where the destination has a name of its own, and of
the variables that say what is sent (a sampler, a limit, a signal that is off): those of one run are not another's. It
is salted, by random bytes that the directory keeps for its user alone; nothing can be read in it. The header of a
session lists the routes that it was begun for.

    <directory>/.deliverers/salt    32 bytes, made by the first run that needs them
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stepspan.deliver.lock import DELIVERERS_DIRECTORY, open_deliverers_file
from stepspan.journal.layout import create_file, read_file

if TYPE_CHECKING:
    from stepspan.exporters import Exporter

SALT = "salt"
SALT_BYTES = 32
SALT_TIMEOUT_S = 0.5
"""For which another process may take to write a salt that it has begun."""


class Route(NamedTuple):
    """A destination, and how it is reached.

    Args:
        destination: Its name, which its cursors have.
        digest: Of credentials and, where the destination is named, the address; "": there is nothing to tell apart.
        address: The name that the address stands for; the destination's, if nobody has given it one.
        address_digest: The digest of the credentials alone.
        url: The address, for messages.
        tenant: A digest of whose data it is, where headers say so.

    """

    destination: str
    digest: str = ""
    address: str = ""
    address_digest: str = ""
    url: str = ""
    tenant: str = ""

    @property
    def is_named(self) -> bool:
        """Whether the destination has a name of its own."""
        return self.address not in ("", self.destination)

    @property
    def names(self) -> set[str]:
        """What its cursors may be called."""
        return {self.destination, self.address or self.destination}

    @property
    def lock_name(self) -> str:
        """The name of the lock of whoever sends by this route."""
        return lock_name(self.destination, self.digest)

    @property
    def header(self) -> dict[str, str]:
        """What the header of a session says of it."""
        found = {"destination": self.destination, "address": self.address, "digest": self.digest}
        return {**found, "tenant": self.tenant} if self.tenant else found


def lock_name(destination: str, digest: str) -> str:
    """The name of a route's lock."""
    return f"{destination}-{digest}" if digest else destination


def route_of(exporter: Exporter, directory: Path) -> Route:
    """The route of an exporter, for journals below a directory.

    Args:
        exporter: Any; only an `OtlpExporter` has credentials that are known.
        directory: Where the journals lie.

    """
    digest = getattr(exporter, "route_digest", None)
    if digest is None:
        return Route(exporter.destination)
    known: Any = exporter
    salt = read_salt(directory)
    urls = {endpoint.display_url.removesuffix(f"/v1/{signal}") for signal, endpoint in known.endpoints.items()}
    return Route(
        exporter.destination,
        digest(salt, with_address=known.is_named),
        known.address,
        digest(salt, with_address=False),
        ", ".join(sorted(urls)),
        known.tenant_digest(salt),
    )


def read_salt(directory: Path) -> bytes:
    """The directory's salt, made where it is missing; one of this process alone where none can be kept."""
    path = directory / DELIVERERS_DIRECTORY / SALT
    deadline = time.monotonic() + SALT_TIMEOUT_S
    while True:
        found = read_file(path, SALT_BYTES)
        if found is not None and len(found) == SALT_BYTES:
            return found
        if time.monotonic() >= deadline:
            return _salt_of_process()
        if found is None:
            try:
                _make_salt(directory)
            except OSError:
                return _salt_of_process()
        else:
            time.sleep(SALT_TIMEOUT_S / 50)


def _make_salt(directory: Path) -> None:
    path = directory / DELIVERERS_DIRECTORY
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = os.urandom(SALT_BYTES)
    try:
        create_file(path / SALT, content)
    except OSError:  # a file system without hard links: others may see it empty for a moment
        with suppress(FileExistsError):
            fd = open_deliverers_file(directory, SALT, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                os.write(fd, content)
            finally:
                os.close(fd)


@lru_cache(1)
def _salt_of_process() -> bytes:
    return os.urandom(SALT_BYTES)
