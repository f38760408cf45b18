"""Starting a deliverer process: with which variables, where its log goes, and what it must not inherit.

The process is started with exec, in a session of its own: Ctrl-C ends the run, not the delivery. Its exporters'
settings reach it by environment, because headers may hold secrets and everyone can see arguments. It works in `/`, so
paths that are relative to the run's working directory are made absolute (`with_absolute_paths`).

Training imports this module and `lock`; what delivers is imported by the process alone (`process`).
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stepspan.deliver.lock import DELIVERERS_DIRECTORY, DeliveryLock, open_deliverers_file
from stepspan.deliver.routes import Route
from stepspan.environment import PREFIX, unquoted
from stepspan.journal.layout import slug
from stepspan.processors import specs

if TYPE_CHECKING:
    from stepspan.exporters.otlp import OtlpExporter

EXPORTERS_VARIABLE = "STEPSPAN_DELIVERER"
"""Holds the exporters' settings as a JSON list."""
LOCKS_VARIABLE = "STEPSPAN_DELIVERER_LOCKS"
"""Holds JSON: destination -> the descriptor that has its lock."""
HEALTH_VARIABLE = "STEPSPAN_HEALTH"
SEND_INTERVAL_VARIABLE = "STEPSPAN_SEND_INTERVAL"
"""Holds the setting, whatever the run has it from."""
LOG_LIMIT_BYTES = 1 << 20
"""A log that is longer is emptied when the next deliverer starts."""
PATH_VARIABLES = frozenset(
    {
        f"{PREFIX}HEADERS_FILE",
        *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"),
        *(
            f"OTEL_EXPORTER_OTLP_{signal}{file}"
            for signal in ("", "TRACES_", "METRICS_", "LOGS_")
            for file in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
        ),
    }
)

_left: set[int] = set()
"""The pids of deliverers that outlive their runs: until somebody asks for it, one that has ended is a zombie."""
os.register_at_fork(after_in_child=_left.clear)


def spawn(
    directory: Path,
    host: str,
    exporters: Sequence[OtlpExporter],
    locks: Mapping[str, DeliveryLock],
    *,
    routes: Mapping[str, Route] | None = None,
    health: bool,
    env: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    """Start a deliverer process.

    Args:
        directory: The directory of the journals.
        host: The host whose sessions it delivers; journals keep it as a folder's name.
        exporters: Where it delivers to.
        locks: The locks of their destinations, which it inherits; it takes those that are missing itself.
        routes: How each destination is reached; None: the process finds it out.
        health: Whether it reports metrics about the delivery to its destinations.
        env: The environment that the exporters were made with.

    Returns:
        The process, which outlives this one until everything is delivered.

    Raises:
        OSError: The log file cannot be opened, or no process started.

    """
    settings = [
        {
            **e.settings,
            "destination": e.destination,
            "processors": specs(e.processors),
            "route": (routes or {}).get(e.destination),
        }
        for e in exporters
    ]
    descriptors = {destination: lock.fileno() for destination, lock in locks.items()}
    with open(_open_log(directory, host), "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "stepspan.deliver.process", str(directory), host],
            env={
                **env,
                "PYTHONPATH": _python_path(env),
                "OTEL_PYTHON_CONFIGURATOR": "",
                EXPORTERS_VARIABLE: json.dumps(settings),
                LOCKS_VARIABLE: json.dumps(descriptors),
                HEALTH_VARIABLE: str(int(health)),
            },
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=list(descriptors.values()),
        )


def leave(process: subprocess.Popen[bytes]) -> None:
    """Look after a deliverer no more: it outlives its run. Once it has ended, a later call clears it away."""
    if process.returncode is None:
        process.returncode = 0  # keeps Popen from waiting for it, and from complaining
        _left.add(process.pid)
    for pid in list(_left):
        try:
            has_ended = os.waitpid(pid, os.WNOHANG) != (0, 0)
        except ChildProcessError:  # somebody else has cleared it away
            has_ended = True
        if has_ended:
            _left.discard(pid)


def with_absolute_paths(env: Mapping[str, str]) -> dict[str, str]:
    """A copy of an environment in which the paths of certificates and of the headers' file are absolute."""
    found = dict(env)
    with suppress(OSError):  # the working directory is gone
        for name in PATH_VARIABLES & found.keys():
            paths = unquoted(found[name]).split(os.pathsep if name == "SSL_CERT_DIR" else "\0")
            found[name] = os.pathsep.join(os.path.abspath(path) if path else "" for path in paths)
    return found


def log_path(directory: Path, host: str) -> Path:
    """Where the deliverers of a host log."""
    return directory / DELIVERERS_DIRECTORY / f"{slug(host)}.log"


def _open_log(directory: Path, host: str) -> int:
    fd = open_deliverers_file(directory, log_path(directory, host).name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if os.fstat(fd).st_size > LOG_LIMIT_BYTES:
        os.truncate(fd, 0)
    return fd


def _python_path(env: Mapping[str, str]) -> str:
    """The run's PYTHONPATH, without what would instrument the deliverer, and with this package where it needs that."""
    package = str(Path(__file__).parents[2])
    kept = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and "auto_instrumentation" not in path]
    installed = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    if os.path.realpath(package) not in map(os.path.realpath, installed):
        kept.append(package)  # an installed one must not: what lies beside it would go before the standard library
    return os.pathsep.join(kept)
