"""The deliverer as a process: one for each host and destination, started by a run, outliving it until all is delivered.

A busy Python thread in the training process makes every GIL-releasing call wait for the switch interval; a process does
not. It is started with exec, in a session of its own (Ctrl-C ends the run, not the delivery), niced, and holds an flock
for each destination; any rank that finds the lock free starts another. What it is to do reaches it by environment,
because headers may hold secrets and arguments are seen by everyone.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepspan.deliver.deliverer import Deliverer, prepare_process, run_is_over
from stepspan.deliver.delivery import PLACE
from stepspan.deliver.task import Options
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.layout import find_sessions, open_directory, open_file, slug
from stepspan.processors import build

log = logging.getLogger("stepspan.deliver")

TASK = "STEPSPAN_DELIVERER"
HEALTH = "STEPSPAN_HEALTH"
LONGEST_LOG = 1 << 20
TRIES = 5


class Lock:
    """The right to deliver to one destination from one host."""

    def __init__(self, directory: Path, host: str, destination: str) -> None:
        self._place = directory / PLACE
        self._name = f"{slug(host)}-{destination}.lock"
        self._fd = -1

    def take(self) -> bool:
        """Whether it is ours now. OSError where there is no place for it."""
        self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = open_directory(self._place)
        try:
            fd = open_file(self._name, os.O_RDWR | os.O_CREAT, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Let somebody else have it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def start(
    directory: Path, host: str, exporters: Sequence[OtlpExporter], *, health: bool, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a deliverer for the sessions of this host below `directory`, that tells of itself or not. OSError.

    `env`: the variables that the exporters were made with.
    """
    task = [
        {**e.settings, "destination": e.destination, "processors": [p.spec for p in e.processors]}  # type: ignore[attr-defined]
        for e in exporters
    ]
    place = directory / PLACE
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(_log_file(place, f"{slug(host)}.log"), "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "stepspan.deliver.process", str(directory), host],
            env={**_environment(env, task), HEALTH: str(int(health))},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _log_file(place: Path, name: str) -> int:
    directory = open_directory(place)
    try:
        fd = open_file(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, dir_fd=directory)
    finally:
        os.close(directory)
    if os.fstat(fd).st_size > LONGEST_LOG:
        os.truncate(fd, 0)
    return fd


def _environment(env: Mapping[str, str], task: Any) -> dict[str, str]:
    """Ours, with this package importable, and without what would instrument the deliverer."""
    package = str(Path(__file__).parents[2])
    kept = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and "auto_instrumentation" not in path]
    found_anyway = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    if os.path.realpath(package) not in map(os.path.realpath, found_anyway):
        kept.append(package)  # what else lies beside it would go before the standard library
    return {**env, "PYTHONPATH": os.pathsep.join(kept), TASK: json.dumps(task), "OTEL_PYTHON_CONFIGURATOR": ""}


def serve(directory: Path, host: str, task: Sequence[Mapping[str, Any]], boot_id: str, *, health: bool = False) -> None:
    """Deliver until the run is over."""
    exporters = [OtlpExporter(**{**entry, "processors": build(entry["processors"])}) for entry in task]
    locks = {e.destination: Lock(directory, host, e.destination) for e in exporters}
    ours = [e for e in exporters if _take(locks[e.destination])]
    while ours:
        log.info("delivering %s for %s to %s", directory, host, ", ".join(e.destination for e in ours))
        find = lambda: find_sessions(directory, host=host)  # noqa: E731
        deliverer = Deliverer(ours, find, Options(boot_id=boot_id), health=host if health else None)
        on_signal(deliverer.interrupt)
        deliverer.start()
        over = deliverer.wait(run_is_over)
        deliverer.stop()
        for lock in locks.values():
            lock.release()
        log.info("done")
        # A run that came and went just now has seen our lock, and relied on us.
        if not over or all(deliverer.knows(session.path) for session in find_sessions(directory, host=host)):
            return
        ours = [e for e in ours if locks[e.destination].take()]


def _take(lock: Lock) -> bool:
    """Take a lock that a rank may hold for the moment in which it looks whether it is free."""
    for _ in range(TRIES):
        if lock.take():
            return True
        time.sleep(0.1)
    return False


def on_signal(interrupt: Callable[[], None]) -> None:
    """Stop between two requests when asked to."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: interrupt())


def main() -> None:
    """`python -m stepspan.deliver.process DIRECTORY HOST`, with the task in the environment."""
    from stepspan.identity import host_facts

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    os.nice(10)
    prepare_process()
    health = os.environ.get(HEALTH) == "1"
    serve(Path(sys.argv[1]), sys.argv[2], json.loads(os.environ[TASK]), host_facts().boot_id, health=health)


if __name__ == "__main__":
    main()
