"""Starting a run: settings and identity in, an open `Run` out; and which run is open in this process.

start_run ─► open_run: settings ─► journal ─► identity ─► resource ─► pipeline ─► session opened
                       ─► delivery.start() ─► Run, which writes its first event ─► background tasks
"""

from __future__ import annotations

import atexit
import copyreg
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepspan.deliver.delivery import Delivery, ProcessDelivery, ThreadDelivery
from stepspan.environment import switched_off
from stepspan.errors import ConfigError
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.journal.journal import Journal
from stepspan.journal.layout import sessions_of_rank
from stepspan.journal.liveness import is_alive_here
from stepspan.pipeline import Pipeline
from stepspan.processors import Processor, Redact, build
from stepspan.recording.exits import note_exits
from stepspan.recording.outcomes import Outcomes
from stepspan.recording.recorder import JournalRecorder
from stepspan.recording.warnings import WarningSink
from stepspan.run import DISABLED, Run

if TYPE_CHECKING:
    from stepspan.config import Settings
    from stepspan.exporters.otlp import OtlpExporter
    from stepspan.identity import Identity

log = logging.getLogger("stepspan")

_open: Run | None = None
_runs_opened = 0


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

    Args:
        job_id: What all ranks of the job have in common. By default this and the next four come from the launcher:
            torchrun, SLURM, MPI and others.
        name: A name for people; the job id by default.
        group: What the job belongs to: a sweep, an experiment.
        tags: Words to find it by.
        rank: This process among all ranks, from 0.
        local_rank: This process among those of its host, from 0.
        world_size: How many ranks there are.
        attempt: How often the scheduler restarted the job.
        service_name: `service.name` of the Resource; "training" by default.
        directory: Where the journal goes, "stepspan-runs" by default.
        endpoint: An OTLP endpoint. Without one, here or in the OTEL_EXPORTER_OTLP_* variables, nothing is sent.
        resource: Further attributes of the OpenTelemetry Resource.
        processors: Called before the journal, after redaction.
        exporters: Follow the journal: `OtlpExporter`, `SdkExporter` or your own. A `JsonlExporter` among them says
            where and how the journal is kept.
        config: A YAML file with any of `stepspan.config.Settings`.
        enabled: False: a run that records nothing. STEPSPAN_DISABLED=1 disables it whatever the argument says.

    Returns:
        The run, open; use it as a context manager, or close it.

    Raises:
        ConfigError: An argument, variable or file entry is wrong.

    """
    global _open, _runs_opened
    if enabled is False or switched_off(os.environ):
        return DISABLED
    from stepspan import config as configuration

    settings = configuration.load(
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
    given_processors, given_exporters = _listed("processors", processors) or [], _listed("exporters", exporters)
    if _open is not None and not _open.closed:
        _open._warn_once("replaced", f"start_run() closes the run that was open: {_open.identity.job_id}")
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
        _open = open_run(settings, who, given_processors, given_exporters)
    except OSError as error:
        log.warning("stepspan: no journal can be kept, so nothing is recorded: %s", error)
        return DISABLED
    if not _runs_opened:
        note_exits(_note_exit)
    _runs_opened += 1
    return _open


def current_run() -> Run:
    """The open run, or one that records nothing."""
    return _open if _open is not None and not _open.closed else DISABLED


copyreg.pickle(Run, lambda run: (current_run, ()))  # of whoever unpickles it


def open_run(
    settings: Settings,
    who: Mapping[str, Any] | None = None,
    processors: Sequence[Processor] = (),
    exporters: Sequence[Any] | None = None,
) -> Run:
    """Open a run that is not `current_run()`.

    Args:
        settings: In force.
        who: What is given of the identity: job_id, rank, local_rank, world_size, attempt, group.
        processors: Of the user's, after redaction and those of the settings.
        exporters: In place of those that settings and variables name.

    Raises:
        ConfigError: Something that was given is wrong.
        OSError: No journal can be kept.

    """
    from stepspan import identity as identities

    jsonl, followers = _exporters(settings, exporters)
    journal = jsonl.journal
    facts = identities.host_facts()
    identity = identities.resolve(
        who or {},
        os.environ,
        facts,
        earlier_sessions=lambda job, rank: len(sessions_of_rank(journal.directory, job, rank)),
        ordinal=_runs_opened,
    )
    identity, identity_warnings = _deduplicate_instance(identity, journal.directory)
    resource, resource_warnings = identities.resource_attributes(
        identity, os.environ, service_name=settings.service_name, resource=settings.resource
    )
    warnings = WarningSink(audible=identity.local_rank == 0)
    redact = [Redact(settings.redact_names)] if settings.redact else []
    pipeline = Pipeline(
        [*redact, *build(settings.processors), *processors], [jsonl, *followers], warn=warnings.warn_once
    )
    recorder = JournalRecorder(
        identity,
        resource,
        journal,
        pipeline.emit,
        pipeline.process,
        warnings=warnings,
        boot_id=facts.boot_id,
        destinations=[e.destination for e in pipeline.followers if e.signals and settings.delivery != "off"],
        propagate=settings.propagate,
        outcomes=Outcomes(settings.interruptions),
    )
    recorder.open()
    delivery = _delivery(settings, recorder, pipeline, facts.boot_id)
    delivery.start()
    run = Run(recorder, pipeline, delivery, name=settings.name, tags=settings.tags)
    _start_background_tasks(run, settings)
    for warning in (*identity_warnings, *resource_warnings):
        run._warn_once(warning, warning)
    _announce(run, settings.directory, journal)
    return run


def _listed(field: str, value: Any) -> list[Any] | None:
    if isinstance(value, str) or not (value is None or hasattr(value, "__iter__")):
        raise ConfigError(field, value, "give a list of objects")
    return None if value is None else list(value)


def _exporters(settings: Settings, given: Sequence[Any] | None) -> tuple[JsonlExporter, list[Any]]:
    """What keeps the journal, and what follows it."""
    keeper = next((exporter for exporter in given or () if isinstance(exporter, JsonlExporter)), None)
    if keeper is None:
        keeper = JsonlExporter(settings.directory, limits=settings.limits())
    if given is None:
        return keeper, _exporters_of(settings)
    return keeper, [exporter for exporter in given if exporter is not keeper]


def _exporters_of(settings: Settings) -> list[OtlpExporter]:
    """The destinations that settings and standard variables name. None: no network at all."""
    from stepspan.exporters.otlp import otlp_exporters

    further = [entry.model_dump() for entry in settings.exporters]
    return otlp_exporters(os.environ, endpoint=settings.endpoint, protocol=settings.protocol, further=further)


def _deduplicate_instance(identity: Identity, directory: Path) -> tuple[Identity, tuple[str, ...]]:
    """A series identity of its own where another live process has this job id and rank: two would mix in one series."""
    for session in sessions_of_rank(directory, identity.job_id, identity.rank):
        if is_alive_here(session.path):
            role = f"twin{os.getpid()}"
            duplicate = f"another live process is rank {identity.rank} of {identity.job_id}: {session.path}"
            return replace(identity, role=role), (*identity.warnings, f"{duplicate}; this one goes by {role}")
    return identity, identity.warnings


def _delivery(settings: Settings, recorder: JournalRecorder, pipeline: Pipeline, boot_id: str) -> Delivery:
    """What sends the journal to the followers: nothing, a process, or threads where a follower can't leave this one."""
    journal, followers = pipeline.journal, pipeline.followers
    if settings.delivery == "off" or not followers:
        return Delivery()
    from stepspan.exporters.otlp import OtlpExporter

    def session() -> Path | None:
        return journal.session.path if journal.session else None

    portable = [e for e in followers if isinstance(e, OtlpExporter) and all(hasattr(p, "spec") for p in e.processors)]
    if settings.delivery == "process" and len(portable) == len(followers):
        return ProcessDelivery(
            journal.directory,
            recorder.identity.host,
            portable,
            first=recorder.identity.local_rank == 0,
            health=settings.health,
            warn=recorder.warn_once,
            session=session,
        )
    return ThreadDelivery(followers, session, boot_id)


def _start_background_tasks(run: Run, settings: Settings) -> None:
    if settings.stall_after:
        from stepspan.recording.stall import StallWatch

        run._recorder.add_background_task(StallWatch(run._recorder, settings.stall_after))
    if settings.samplers:
        from stepspan.samplers import start_sampling

        start_sampling(run._recorder, settings.samplers, settings.sample_interval)


def _announce(run: Run, wanted: Path, journal: Journal) -> None:
    """Say where the journal is."""
    if not journal.durable:
        run._warn_once("memory", f"{wanted} cannot be written: the journal is kept in memory, at {journal.directory}")
    elif run.identity.rank == 0 and not _runs_opened and sys.stderr is not None:
        with suppress(Exception):  # somebody else's stream
            sys.stderr.write(f"stepspan: the journal is in {journal.directory}\n")


def _note_exit(exit_: SystemExit) -> None:
    if _open is not None and not _open.closed:
        _open._recorder.scopes.note_exit(exit_)


def _close_at_exit() -> None:
    if _open is not None and not _open.closed:
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # what ended the interpreter
        if hasattr(sys, "ps1"):  # or, in an interactive session, what went wrong in some earlier line
            error = None
        _open._close_at_exit(error)


def _after_fork_in_child() -> None:
    if _open is not None and not _open.closed:
        _open._after_fork()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
