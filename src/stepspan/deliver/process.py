"""The deliverer as a process: what runs inside it.

One for each host and route, started by a run (`spawn`) and outliving it until all is delivered. It is a process
because a busy Python thread in the training process makes every GIL-releasing call wait for the switch interval. It is
niced, holds the lock of each route that it delivers by, and ends when another deliverer holds all of them.

    python -m stepspan.deliver.process DIRECTORY HOST      with the exporters' settings in the environment
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stepspan.deliver.deliverer import Deliverer, interrupt_on_signal, prepare_process, run_is_over
from stepspan.deliver.lock import UNKNOWN, DeliveryLock
from stepspan.deliver.options import SEND_INTERVAL_S, Options
from stepspan.deliver.routes import Route, route_of
from stepspan.deliver.sessions import LiveSessions
from stepspan.deliver.spawn import EXPORTERS_VARIABLE, HEALTH_VARIABLE, LOCKS_VARIABLE, SEND_INTERVAL_VARIABLE
from stepspan.exporters.otlp import OtlpExporter
from stepspan.identity import host_facts
from stepspan.processors import build

log = logging.getLogger("stepspan.deliver")

LOCK_TIMEOUT_S = 0.5
"""A rank may hold a lock for the moment in which it looks whether it is free."""


def serve(
    directory: Path,
    host: str,
    settings: Sequence[Mapping[str, Any]],
    boot_id: str,
    *,
    health: bool = False,
    inherited: Mapping[str, int] | None = None,
    send_interval: float = SEND_INTERVAL_S,
) -> None:
    """Deliver until the run is over, to each destination whose lock is free.

    Args:
        directory: The directory of the journals.
        host: The host whose sessions are delivered.
        settings: An `OtlpExporter`'s arguments for each destination, its processors as settings, and its route.
        boot_id: The boot of this host.
        health: Whether metrics about the delivery are reported.
        inherited: Destination -> the descriptor that has its lock already.
        send_interval: As `Options.send_interval`.

    """
    exporters, routes = [], {}
    for entry in settings:
        arguments = {**entry, "processors": build(entry["processors"])}
        route = arguments.pop("route", None)
        exporter = OtlpExporter(**arguments)
        exporters.append(exporter)
        routes[exporter.destination] = found = Route(*route) if route else route_of(exporter, directory)
        exporter.address, exporter.digest = found.address, found.digest
    locks = {name: DeliveryLock(directory, host, route.lock_name) for name, route in routes.items()}
    for destination, fd in (inherited or {}).items():
        locks[destination].adopt(fd)
    exporters = _with_lock(exporters, locks, LOCK_TIMEOUT_S)
    options = Options(boot_id=boot_id, send_interval=send_interval)
    sessions = LiveSessions(directory, host, options, routes)
    while exporters:
        log.info("stepspan: delivering %s for %s to %s", directory, host, ", ".join(e.destination for e in exporters))
        deliverer = Deliverer(exporters, sessions, options, health=host if health else None)
        interrupt_on_signal(deliverer)
        deliverer.start()
        bells = [bell for lock in locks.values() if lock.is_held and (bell := lock.bell()) >= 0]
        report, listen = partial(_report, deliverer, locks), partial(_listen, deliverer, locks)
        over = deliverer.wait(run_is_over, report, listen, bells)
        _report(deliverer, locks)
        deliverer.stop()
        # A run that came and went just now found the locks held, and relied on this process.
        if over and not deliverer.has_seen_all():
            continue
        for lock in locks.values():
            if lock.is_held:
                lock.report(UNKNOWN)
                lock.release()
        log.info("stepspan: done")
        if not over or (deliverer.has_seen_all() and run_is_over(deliverer)):
            return
        exporters = _with_lock(exporters, locks)


def _with_lock(
    exporters: Sequence[OtlpExporter], locks: Mapping[str, DeliveryLock], timeout: float = 0.0
) -> list[OtlpExporter]:
    """The exporters whose destinations this process has the right to deliver to."""
    for lock in locks.values():
        if not lock.is_held:
            lock.acquire(timeout)
    return [exporter for exporter in exporters if locks[exporter.destination].is_held]


def _report(deliverer: Deliverer, locks: Mapping[str, DeliveryLock]) -> None:
    """Say in the lock files how things stand: runs that end read it there."""
    for destination in {scheduler.exporter.destination for scheduler in deliverer.schedulers}:
        outlook = deliverer.outlook(destination)
        if outlook.state != "starting" or locks[destination].reported in {None, UNKNOWN}:  # else it knows from before
            locks[destination].report(outlook)


def _listen(deliverer: Deliverer, locks: Mapping[str, DeliveryLock]) -> None:
    """Wake what runs have rung for."""
    for destination, lock in locks.items():
        now = time.time()
        if lock.is_held and lock.was_rung():
            deliverer.wake(destination, now)


def main() -> None:
    """The entry point: arguments and environment as `spawn` sets them."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    os.nice(10)
    prepare_process()
    settings = json.loads(os.environ[EXPORTERS_VARIABLE])
    health = os.environ.get(HEALTH_VARIABLE) == "1"
    inherited = json.loads(os.environ.get(LOCKS_VARIABLE, "{}"))
    serve(
        Path(sys.argv[1]),
        sys.argv[2],
        settings,
        host_facts().boot_id,
        health=health,
        inherited=inherited,
        send_interval=float(os.environ.get(SEND_INTERVAL_VARIABLE, SEND_INTERVAL_S)),
    )


if __name__ == "__main__":
    main()
