"""Starting a run: settings and identity in, an open `Run` out; and which run is open in this process."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepspan.disabled import DISABLED, switched_off
from stepspan.errors import ConfigError
from stepspan.run import Run

if TYPE_CHECKING:
    from stepspan.config import Settings
    from stepspan.deliver.delivery import Delivery
    from stepspan.exporters.jsonl import JsonlExporter
    from stepspan.exporters.otlp import OtlpExporter
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
    others. `directory` is where the journal goes, "stepspan-runs" by default. `endpoint` is an OTLP endpoint; without
    one, here or in the OTEL_EXPORTER_OTLP_* variables, nothing is sent. `resource` adds resource attributes.
    `processors` run before the journal, after redaction. `exporters` follow the journal: `OtlpExporter`, `SdkExporter`
    or your own; a `JsonlExporter` in the first place says where and how the journal is kept. `config` is a YAML file
    with any of `stepspan.config.Settings`. `enabled=False`, or STEPSPAN_DISABLED=1 whatever the argument says: a run
    that does nothing.

    Raises `ConfigError` where an argument, variable or file entry is wrong.
    """
    global _open, _started
    if enabled is False or switched_off(os.environ):
        return DISABLED
    from stepspan import config as settings_of

    settings = settings_of.load(
        {
            "name": name,
            "group": group,
            "tags": tags,
            "service_name": service_name,
            "directory": directory,
            "endpoint": endpoint,
            "resource": resource,
            "enabled": enabled,
        },
        os.environ,
        config=config,
    )
    if not settings.enabled:
        return DISABLED
    before, after = _listed("processors", processors) or [], _listed("exporters", exporters)
    if _open is not None and not _open.closed:
        _open.warn_once("replaced", f"start_run() closes the run that was open: {_open.identity.job_id}")
        _open.close()
    who = {
        "job_id": job_id,
        "rank": rank,
        "local_rank": local_rank,
        "world_size": world_size,
        "attempt": attempt,
        "group": settings.group,
    }
    try:
        _open = _assemble(settings, who, before, after)
    except OSError as error:
        log.warning("no journal can be kept, so nothing is recorded: %s", error)
        return DISABLED
    _started += 1
    return _open


def current_run() -> Run:
    """The open run, or one that does nothing."""
    return _open if _open is not None and not _open.closed else DISABLED


def _assemble(
    settings: Settings, who: Mapping[str, Any], processors: Sequence[Processor], exporters: Sequence[Any] | None
) -> Run:
    from stepspan import identity as identity_of
    from stepspan.exporters.jsonl import JsonlExporter
    from stepspan.journal.layout import sessions_of_rank
    from stepspan.pipeline import Pipeline
    from stepspan.processors import Redact, build

    journal: JsonlExporter
    if exporters and isinstance(exporters[0], JsonlExporter):
        journal, followers = exporters[0], list(exporters[1:])
    else:
        journal = JsonlExporter(settings.directory, limits=settings.limits())
        followers = list(exporters) if exporters is not None else _exporters_of(settings)
    facts = identity_of.host_facts()
    identity = identity_of.resolve(
        who,
        os.environ,
        facts,
        earlier_sessions=lambda job, rank: len(sessions_of_rank(journal.directory, job, rank)),
        ordinal=_started,
    )
    identity = _apart_from_living(identity, journal, facts.boot_id)
    attributes, warnings = identity_of.resource_attributes(
        identity, os.environ, service_name=settings.service_name, resource=settings.resource
    )
    redact = [Redact(settings.redact_names)] if settings.redact else []
    sink = _WarningSink()
    pipeline = Pipeline([*redact, *build(settings.processors), *processors], [journal, *followers], warn=sink)
    delivery = _delivery(settings, identity, journal, followers, facts.boot_id, sink)
    run = Run(
        identity,
        attributes,
        pipeline,
        delivery,
        boot_id=facts.boot_id,
        name=settings.name,
        tags=settings.tags,
        propagate=settings.propagate,
    )
    sink.run = run
    if settings.stall_after:
        from stepspan.recording.stall import StallWatch

        run.background_tasks.append(StallWatch(run, settings.stall_after))
    if settings.samplers:
        from stepspan.samplers import start_sampling

        start_sampling(run, settings.samplers, settings.sample_interval)
    for warning in (*identity.warnings, *warnings):
        run.warn_once(warning, warning)
    if not journal.durable:
        run.warn_once(
            "memory", f"{settings.directory} cannot be written: the journal lies in memory, at {journal.directory}"
        )
    elif identity.rank == 0 and not _started and sys.stderr is not None:
        with suppress(Exception):  # somebody else's stream
            sys.stderr.write(f"stepspan: the journal lies in {journal.directory}\n")
    return run


def _listed(field: str, value: Any) -> list[Any] | None:
    if isinstance(value, str) or not (value is None or hasattr(value, "__iter__")):
        raise ConfigError(field, value, "give a list of objects")
    return None if value is None else list(value)


class _WarningSink:
    """Passes on what goes wrong in the parts of a run to the run, once there is one."""

    run: Run | None = None

    def __call__(self, kind: str, message: str) -> None:
        if self.run is not None:
            self.run.warn_once(kind, message)
        else:
            log.warning("%s", message)


def _exporters_of(settings: Settings) -> list[OtlpExporter]:
    """The destinations that settings and standard variables name. None: no network at all."""
    from stepspan.exporters.otlp import otlp_exporters

    further = [entry.model_dump() for entry in settings.exporters]
    return otlp_exporters(os.environ, endpoint=settings.endpoint, protocol=settings.protocol, further=further)


def _delivery(
    settings: Settings,
    identity: Identity,
    journal: JsonlExporter,
    followers: Sequence[Any],
    boot_id: str,
    warn: Any,
) -> Delivery:
    from stepspan.deliver.delivery import Delivery, ProcessDelivery, ThreadDelivery

    if settings.delivery == "off" or not followers:
        return Delivery()
    from stepspan.exporters.otlp import OtlpExporter

    def session() -> Path | None:
        return journal.writer.path if journal.writer else None

    portable = all(isinstance(e, OtlpExporter) and all(hasattr(p, "spec") for p in e.processors) for e in followers)
    if settings.delivery == "process" and portable:
        return ProcessDelivery(
            journal.directory,
            identity.host,
            followers,
            first=identity.local_rank == 0,
            health=settings.health,
            warn=warn,
            session=session,
        )
    return ThreadDelivery(followers, session, boot_id)


def _apart_from_living(identity: Identity, journal: JsonlExporter, boot_id: str) -> Identity:
    """A series identity of its own where another live process has this job id and rank: two would mix in one series."""
    from stepspan.journal.layout import sessions_of_rank
    from stepspan.journal.liveness import is_alive_here

    for session in sessions_of_rank(journal.directory, identity.job_id, identity.rank):
        if is_alive_here(session.path):
            warning = f"another live process is rank {identity.rank} of {identity.job_id}: {session.path}"
            role = f"twin{os.getpid()}"
            return replace(identity, role=role, warnings=(*identity.warnings, f"{warning}; this one goes by {role}"))
    return identity


def _close_at_exit() -> None:
    if _open is not None and not _open.closed:
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # what ended the interpreter
        if hasattr(sys, "ps1"):  # or, where somebody types, what went wrong in some line before
            error = None
        _open.__exit__(type(error) if error else None, error, None)


def _count_fork() -> None:
    global _forks
    _forks += 1


def _after_fork_in_child() -> None:
    if _open is not None and not _open.closed:
        _open.delivery.after_fork()
        _open.after_fork(_forks)


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_fork, after_in_child=_after_fork_in_child)
