"""Starting a run: settings and identity in, an open `Run` out; and which run is open in this process."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepspan.errors import StepspanError
from stepspan.journal.layout import sessions_of_rank, slug
from stepspan.journal.liveness import is_held
from stepspan.run import Run

if TYPE_CHECKING:
    from stepspan.identity import Identity
    from stepspan.processors import Processor

log = logging.getLogger("stepspan")

_open: Run | None = None
_started = 0
_forks = 0


def start_run(
    *,
    job_id: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] | None = None,
    rank: int | None = None,
    local_rank: int | None = None,
    world_size: int | None = None,
    attempt: int | None = None,
    service_name: str | None = None,
    directory: str | Path | None = None,
    endpoint: str | None = None,
    resource: Mapping[str, Any] | None = None,
    processors: Sequence[Processor] | None = None,
    exporters: Sequence[Any] | None = None,
    config: str | Path | None = None,
    enabled: bool | None = None,
) -> Run:
    """Begin a run in this process. All arguments are optional; a run that is still open is closed first.

    Identity (`job_id`, `rank`, `local_rank`, `world_size`, `attempt`) comes from the launcher: torchrun, SLURM, MPI and
    others. `directory` is where the journal goes (default `stepspan-runs`). `endpoint` is an OTLP endpoint; without one,
    here or in the OTEL_EXPORTER_OTLP_* variables, nothing is sent. `resource` adds resource attributes. `processors` run
    before the journal, after redaction. `exporters` follow the journal: `OtlpExporter`, `SdkExporter`, or your own.
    `config` is a YAML file with any of `stepspan.config.Settings`.

    Raises `ConfigError` where an argument, variable or file entry is wrong.
    """
    from stepspan import assemble

    global _open, _started
    identity_arguments = {
        "job_id": job_id,
        "rank": rank,
        "local_rank": local_rank,
        "world_size": world_size,
        "attempt": attempt,
        "group": group,
    }
    settings = assemble.settings(
        {
            "name": name,
            "group": group,
            "tags": None if tags is None else list(tags),
            "service_name": service_name,
            "directory": directory,
            "endpoint": endpoint,
            "resource": None if resource is None else dict(resource),
            "enabled": enabled,
        },
        config,
    )
    if not settings.enabled:
        return DISABLED
    if _open is not None:
        log.warning("start_run() closes the run that was open: %s", _open.identity.job_id)
        _open.close()
    _open = assemble.run(settings, identity_arguments, processors=processors, exporters=exporters, ordinal=_started)
    _started += 1
    return _open


def current_run() -> Run:
    """The open run, or one that does nothing."""
    return _open if _open is not None and not _open.closed else DISABLED
