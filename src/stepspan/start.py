"""Starting a run: settings and identity in, an open `Run` out.

start_run ─► open_run: settings ─► journal ─► identity ─► resource ─► pipeline ─► session opened
                       ─► delivery.start() ─► Run, which writes its first event ─► background tasks

Several runs may be open in a process; `stepspan.recording.open_runs` has which of them is current where.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, lru_cache
from inspect import signature
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepspan.deliver.delivery import Delivery, ProcessDelivery
from stepspan.deliver.routes import route_of
from stepspan.environment import PREFIX, switched_off, unknown_variables, unquoted
from stepspan.errors import ConfigError
from stepspan.exporters import Exporter
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.journal.journal import Journal
from stepspan.journal.layout import sessions_of_rank
from stepspan.journal.liveness import is_process_alive, lock_is_held, read_closed
from stepspan.mapping.trace_context import variable_fields
from stepspan.pipeline import Pipeline
from stepspan.processors import Processor, Redact, build
from stepspan.recording.exits import note_exits
from stepspan.recording.open_runs import OPEN_RUNS, Opener
from stepspan.recording.outcomes import Outcomes
from stepspan.recording.recorder import JournalRecorder
from stepspan.recording.warnings import WarningSink
from stepspan.run import DISABLED, Run

if TYPE_CHECKING:
    from stepspan.config import DeliveryMode, Durability, SamplerName, Settings
    from stepspan.exporters.otlp import OtlpExporter
    from stepspan.identity import Identity
    from stepspan.otlp.endpoint import Protocol

log = logging.getLogger("stepspan")

IDENTITY = ("job_id", "rank", "local_rank", "world_size", "attempt")
"""The arguments of `start_run` that say which process this is. The others are settings, and `config`."""

DUPLICATE = "twin"
"""What the role of a run begins with that has its job id and rank in common with another live one."""

_numbering_lock = threading.RLock()
_numbers: dict[tuple[str, str | None], set[int]] = {}
"""Job id and name -> the numbers of this process's runs that had them."""
_announced: set[Path] = set()
"""The directories that were said to have a journal."""


def start_run(
    *,
    job_id: str | int | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] | None = None,
    rank: int | None = None,
    local_rank: int | None = None,
    world_size: int | None = None,
    attempt: int | None = None,
    service_name: str | None = None,
    resource: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
    endpoint: str | None = None,
    protocol: Protocol | None = None,
    destination: str | None = None,
    headers_file: str | Path | None = None,
    delivery: DeliveryMode | None = None,
    send_interval: float | None = None,
    close_timeout: float | None = None,
    metrics_ranks: str | int | Iterable[int] | None = None,
    traces_ranks: str | int | Iterable[int] | None = None,
    logs_ranks: str | int | Iterable[int] | None = None,
    health: bool | None = None,
    processors: Sequence[Processor] | Sequence[Mapping[str, Any]] | None = None,
    exporters: Sequence[Exporter | JsonlExporter] | Sequence[Mapping[str, Any]] | None = None,
    durability: Durability | None = None,
    sync_every: float | None = None,
    segment_bytes: int | None = None,
    session_bytes: int | None = None,
    free_bytes: int | None = None,
    free_ratio: float | None = None,
    group_readable: bool | None = None,
    redact: bool | None = None,
    redact_names: Sequence[str] | None = None,
    propagate: bool | None = None,
    interruptions: Sequence[str | type[BaseException]] | None = None,
    stall_after: float | None = None,
    samplers: Sequence[SamplerName] | str | None = None,
    sample_interval: float | None = None,
    config: str | Path | None = None,
    enabled: bool | None = None,
) -> Run:
    """Begin a run in this process, beside those that are open. All arguments are optional.

    Best is `with start_run():`, in which the run is `current_run()`, and whose end is the run's. A run that is first
    used otherwise, in a notebook for example, ends those that were used so in its thread before, as "interrupted".

    An argument that is None, or left out, is not given: then the variable `STEPSPAN_` with its name in capitals counts,
    then the file, then the default of `stepspan.config.Settings`.

    Args:
        job_id: What all ranks of the job have in common. By default this and the next four come from the launcher:
            torchrun, SLURM, MPI and others.
        rank: This process among all ranks, from 0.
        local_rank: This process among those of its host, from 0.
        world_size: How many ranks there are.
        attempt: How often the scheduler restarted the job.
        name: A name for people, the same on all ranks; the job id by default.
        group: What the job belongs to: a sweep, an experiment.
        tags: Words to find it by.
        service_name: `service.name` of the Resource; "training" by default.
        resource: Further attributes of the OpenTelemetry Resource.
        directory: Where the journal goes, "stepspan-runs" by default.
        endpoint: An OTLP endpoint. Without one, here or in the OTEL_EXPORTER_OTLP_* variables, nothing is sent.
        protocol: Of the endpoint: "http/protobuf", "grpc" or "http/json".
        destination: A name for the receiver that the endpoint leads to. Delivery goes on where it was, whatever address
            and credentials a later run gives. By default the address stands for it.
        headers_file: A file with further headers of each request, such as a token: `key=value` lines. Read again when
            it changes, and when the receiver refuses what it has said before.
        delivery: What sends the journal: "process", one for each host; "thread", this process; "off", nothing.
        send_interval: Seconds between two requests for what the ranks of a host have written, 1 by default; 0: one for
            each rank at once. Errors, `flush()` and the end never wait for it.
        close_timeout: Seconds that the end of the run waits for its delivery at most, 5 by default, and only while the
            receiver answers; then it says what waits, why, and what sends it.
        metrics_ranks: Whose metrics are sent: "all", "rank0", or ranks: `[0, 8]`, "0,8,16-23". Journals hold all.
        traces_ranks: Whose traces are sent, likewise; rank 0's spans of steps, their roots, go with any of them.
        logs_ranks: Whose logs are sent, likewise.
        health: Whether the deliverer sends metrics about the delivery.
        processors: Objects: called before the journal, after redaction and those of the settings. Or mappings
            `{name: {argument: value}}`: in place of those of the settings.
        exporters: Objects that follow the journal, in place of the endpoint and those of the settings: `OtlpExporter`,
            `SdkExporter` or your own; a `JsonlExporter` among them says where and how the journal is kept. Or mappings
            with `endpoint`, `headers` …: further OTLP destinations, in place of those of the settings.
        durability: What an event survives once its call has returned: "process", the process; "disk", the machine.
        sync_every: Seconds between fdatasync calls with durability "disk"; 0: after each event.
        segment_bytes: Size at which a journal's segment is complete and the next one begins.
        session_bytes: Size of a session beyond which its oldest segments are removed.
        free_bytes: The journal stops growing while less than this is free on its disk; its first 16 MiB are always
            written. By default 1 GiB, or a tenth of a smaller disk.
        free_ratio: The same, as a share of the disk. By default 2%, and no more than 10 GiB.
        group_readable: Whether the user's group may read the journal.
        redact: Whether secrets are removed from events before the journal.
        redact_names: Further names whose values are secrets.
        propagate: Whether steps are the parents of the program's own OpenTelemetry spans. By default they are, unless a
            global TracerProvider is installed whose sampler they would overrule.
        interruptions: Further exceptions, or names of them, that end a run as "interrupted" and are no failure.
        stall_after: Seconds without an event of training after which it counts as stalled; 0: no watch.
        samplers: What is sampled beside training, of "host", "process", "gpu", "torch": a list, or a text with commas;
            "none", or an empty list, is nothing.
        sample_interval: Seconds between two samples.
        config: A YAML file with any of the settings.
        enabled: False: a run that records nothing. STEPSPAN_DISABLED=1 disables it whatever the argument says.

    Returns:
        The run, open; use it as a context manager, or close it.

    Raises:
        ConfigError: An argument, a STEPSPAN_* variable or an entry of the file is wrong. Other variables never raise:
            what is wrong with them is said once, and where it could mislead what is sent, that waits in the journal.

    """
    given: dict[str, Any] = dict(locals())
    if enabled is False or switched_off(os.environ):
        return DISABLED
    from stepspan import config as configuration

    objects: dict[str, list[Any] | None] = {}
    for field in ("processors", "exporters"):
        given[field], objects[field] = _entries_or_objects(field, given[field])
    who = {field: given.pop(field) for field in IDENTITY}
    settings = configuration.load(given, os.environ, config=given.pop("config"), warn=_log_warning)
    if not settings.enabled:
        return DISABLED
    try:
        for resting in OPEN_RUNS.resting_before(Opener.here()):
            resting._park()
        run = open_run(settings, who, objects["processors"] or [], objects["exporters"])
    except OSError as error:
        log.warning("stepspan: no journal can be kept, so nothing is recorded: %s", error)
        return DISABLED
    _watch_exits()
    run._unused = True
    OPEN_RUNS.add(run)
    return run


def _log_warning(message: str) -> None:
    log.warning("stepspan: %s", message)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Look over arguments of `start_run` that will be needed later. TypeError: one is none of them."""
    signature(start_run).bind(**arguments)


def open_run(
    settings: Settings,
    who: Mapping[str, Any] | None = None,
    processors: Sequence[Processor] = (),
    exporters: Sequence[Any] | None = None,
    *,
    label: str | None = None,
) -> Run:
    """Open a run that is not `current_run()`.

    Args:
        settings: In force.
        who: What is given of the identity: job_id, rank, local_rank, world_size, attempt.
        processors: Of the user's, after redaction and those of the settings.
        exporters: In place of those that settings and variables name.
        label: In place of the name where the process's runs are counted, so that this one is not among them.

    Raises:
        ConfigError: Something that was given is wrong.
        OSError: No journal can be kept.

    """
    from stepspan import identity as identities

    jsonl, followers = _exporters(settings, exporters)
    journal = jsonl.journal
    redact = [Redact(settings.redact_names)] if settings.redact else []
    facts = identities.host_facts()
    with _numbering() as ordinal:
        identity = identities.resolve(
            {**(who or {}), "group": settings.group},
            os.environ,
            facts,
            earlier_sessions=lambda job, rank: _earlier_sessions(journal.directory, job, rank),
            ordinal=ordinal,
            name=label or settings.name,
            in_order=_starts_in_order(),
        )
        resource, resource_warnings = identities.resource_attributes(
            identity, os.environ, service_name=settings.service_name, resource=settings.resource
        )
        warnings = WarningSink(audible=identity.local_rank == 0)
        pipeline = Pipeline(
            [*redact, *build(settings.processors), *processors], [jsonl, *followers], warn=warnings.warn_once
        )
        live = [follower for follower in pipeline.followers if follower.signals and settings.delivery != "off"]
        recorder = JournalRecorder(
            identity,
            resource,
            journal,
            pipeline.emitters,
            pipeline.process,
            leaves_alone=pipeline.leaves_alone,
            warnings=warnings,
            boot_id=facts.boot_id,
            left_out=_left_out(settings, identity),
            destinations=[follower.destination for follower in live],
            routes=[route_of(follower, journal.directory).header for follower in live],
            propagate=settings.propagate,
            outcomes=Outcomes(settings.interruptions),
            deduplicate=lambda identity: _deduplicate_instance(identity, journal.directory),
        )
        at_once = label is not None or not _replaces_its_own(identity, journal.directory)
        recorder.open(at_once=at_once)
        caller, caller_warning = ({}, "") if label else _caller(joins=settings.propagate is True)
    delivery = _delivery(settings, recorder, pipeline, facts.boot_id)
    delivery.start()
    run = Run(
        recorder,
        pipeline,
        delivery,
        name=settings.name,
        tags=settings.tags,
        caller=caller,
        close_timeout=settings.close_timeout,
        at_once=at_once,
        when_begun=lambda run: _complete_start(run, settings, [*resource_warnings, *filter(None, [caller_warning])]),
    )
    _announce(run, settings.directory, journal)
    return run


def _left_out(settings: Settings, identity: Identity) -> dict[str, Any]:
    """What is not sent of a rank, for its header: it is filtered wherever its journal is delivered."""
    from stepspan.config import sends, smallest

    ranks = settings.ranks()
    left_out = [signal for signal, named in ranks.items() if not sends(named, identity.rank)]
    if not left_out:
        return {}
    has_roots = identity.rank == 0 and "traces" in left_out and smallest(ranks["traces"]) < identity.world_size
    return {"left_out": left_out, **({"step_roots": True} if has_roots else {})}


def _caller(*, joins: bool) -> tuple[dict[str, Any], str]:
    """Which span has started a run: the current one of the program's own, else that of the variables."""
    carrier: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        with suppress(Exception):  # somebody else's span
            from stepspan.recording.propagation import current_carrier

            carrier = current_carrier()
    return variable_fields(carrier or os.environ, joins=joins)


def _entries_or_objects(field: str, value: Any) -> tuple[list[Mapping[str, Any]] | None, list[Any] | None]:
    """The setting of this name, or the objects that were given in its place."""
    if value is None:
        return None, None
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        raise ConfigError(field, value, "give a list of objects")
    found = list(value)
    entries = [item for item in found if isinstance(item, Mapping)]
    if entries and len(entries) < len(found):
        raise ConfigError(field, value, "give either objects or mappings of settings, not both in one list")
    return (entries, None) if entries else (None, found)


def _starts_in_order() -> bool:
    """Whether the run that starts here is one of a sequence: by the main thread, and no asyncio task's."""
    opener = Opener.here()
    return opener.thread is threading.main_thread() and opener.task is None


@lru_cache(4096)
def _earlier_sessions(directory: Path, job_id: str, rank: int) -> int:
    """How many sessions of a rank there were when this process first asked: those of its own runs are no restarts."""
    return len(sessions_of_rank(directory, job_id, rank))


@contextmanager
def _numbering() -> Iterator[Callable[[str, str | None], int]]:
    """Within it, what it yields numbers a run among those of this process with a job id and name, unless it fails."""
    used: set[int] = set()
    number = 0

    def ordinal(job_id: str, name: str | None) -> int:
        nonlocal used, number
        with _numbering_lock:
            used = _numbers.setdefault((job_id, name), set())
            number = next(free for free in count() if free not in used)
            used.add(number)
        return number

    try:
        yield ordinal
    except BaseException:
        used.discard(number)
        raise


def _exporters(settings: Settings, given: Sequence[Any] | None) -> tuple[JsonlExporter, list[Any]]:
    """What keeps the journal, and what follows it."""
    if given is None:
        return JsonlExporter(settings.directory, limits=settings.limits()), _exporters_of(settings)
    keeper = next((exporter for exporter in given if isinstance(exporter, JsonlExporter)), None)
    followers = [exporter for exporter in given if exporter is not keeper]
    unnamed = [exporter for exporter in followers if getattr(exporter, "is_named", True) is False]
    if settings.destination and len(unnamed) == 1:
        unnamed[0].name(settings.destination)
    return (keeper.for_run() if keeper else JsonlExporter(settings.directory, limits=settings.limits())), followers


def _exporters_of(settings: Settings) -> list[OtlpExporter]:
    """The destinations that settings and standard variables name. None: no network at all."""
    from stepspan.exporters.otlp import otlp_exporters

    further = [entry.model_dump() for entry in settings.exporters]
    try:
        return otlp_exporters(
            os.environ,
            endpoint=settings.endpoint,
            protocol=settings.protocol,
            destination=settings.destination,
            headers_file=settings.headers_file,
            further=further,
        )
    except ConfigError as error:
        variable = f"{PREFIX}{error.field.upper()}"
        if unquoted(os.environ.get(variable, "")) != error.value:
            raise
        raise ConfigError(variable, error.value, error.fix) from None


def _alive(identity: Identity, directory: Path) -> dict[str, Path]:
    """The live sessions of a job id and rank, by their roles."""
    sessions = sessions_of_rank(directory, identity.job_id, identity.rank)
    return {session.role: session.path for session in sessions if _is_alive(session.path)}


def _is_alive(session: Path) -> bool:
    """Whether a session is being written, as far as this host knows: by its process where there are no locks."""
    try:
        return lock_is_held(session)
    except FileNotFoundError:
        return False
    except OSError:
        from stepspan.identity import host_facts

        return read_closed(session) is None and is_process_alive(session, host_facts().boot_id)


def _deduplicate_instance(identity: Identity, directory: Path) -> Identity:
    """A series identity of its own where another live run has this job id and rank: two would mix in one series."""
    alive = _alive(identity, directory)
    if "" not in alive:
        return identity
    role = next(role for role in (f"{DUPLICATE}{number}" for number in count(1)) if role not in alive)
    other = "another open run" if alive[""] in _sessions(OPEN_RUNS.that_may_record()) else "another live process"
    duplicate = f"{other} is rank {identity.rank} of {identity.job_id}: {alive['']}"
    warning = f"{duplicate}; this one goes by {role}: give each run a job_id of its own"
    return replace(identity, role=role, warnings=(*identity.warnings, warning))


def _replaces_its_own(identity: Identity, directory: Path) -> bool:
    """Whether what has this job id and rank is a bare run that ends when the new one is used, if that is one as well.

    A notebook's cell that is run again goes on with the same series. So the new run begins when it is known.
    """
    bare = _sessions(OPEN_RUNS.bare_before(Opener.here()))
    return bool(bare) and not bare.isdisjoint(_alive(identity, directory).values())


def _sessions(runs: Iterable[Run]) -> set[Path]:
    return {run._session.path for run in runs if run._session is not None}


def _delivery(settings: Settings, recorder: JournalRecorder, pipeline: Pipeline, boot_id: str) -> Delivery:
    """What sends the journal to the followers: nothing, a process, or threads where a follower can't leave this one."""
    journal, followers = pipeline.journal, pipeline.followers
    if settings.delivery == "off" or not followers:
        return Delivery()
    from stepspan.exporters.otlp import OtlpExporter

    def session() -> Path | None:
        return journal.session.path if journal.session else None

    def conclude(message: str) -> None:
        recorder.warnings.conclude("undelivered", message)

    otlp = [e for e in followers if isinstance(e, OtlpExporter) and e.is_portable]
    portable = [e for e in otlp if all(hasattr(p, "spec") for p in e.processors)]
    if settings.delivery == "process" and len(portable) == len(followers):
        return ProcessDelivery(
            journal.directory,
            recorder.identity.host,
            portable,
            first=recorder.identity.local_rank == 0,
            health=settings.health,
            send_interval=settings.send_interval,
            warn=recorder.warn_once,
            session=session,
            conclude=conclude,
        )
    from stepspan.deliver.threads import ThreadDelivery

    return ThreadDelivery(followers, session, boot_id, conclude)


def _complete_start(run: Run, settings: Settings, warnings: Iterable[str]) -> None:
    """What is left to do when a run has begun: say what was noticed on the way, and start what works beside it."""
    for warning in (*run.identity.warnings, *warnings):
        run._warn_once("identity", warning, key=warning)
    for variable, warning in unknown_variables(os.environ, type(settings).model_fields).items():
        run._warn_once("environment", warning, key=variable)
    if settings.delivery != "off":
        _warn_of_variables(run)
    _start_background_tasks(run, settings)


def _warn_of_variables(run: Run) -> None:
    """Say what is wrong with the variables that say where the journal is sent."""
    from stepspan.exporters.otlp import OtlpExporter

    for exporter in run._pipeline.followers if run._pipeline else ():
        if isinstance(exporter, OtlpExporter):
            for warning in (*exporter.ignored, *exporter.warnings):
                run._warn_once("environment", warning, key=warning)
            for fault, signals in exporter.faults.items():
                held = f"{', '.join(signals)}: nothing is sent: {fault}"
                advice = f"the journal keeps everything: `stepspan sync {run.directory}` sends it later"
                run._warn_once("delivery", f"{held}; {advice}", key=fault)


def _start_background_tasks(run: Run, settings: Settings) -> None:
    if settings.stall_after:
        from stepspan.recording.stall import StallWatch

        try:
            run._recorder.add_background_task(StallWatch(run._recorder, settings.stall_after))
        except RuntimeError as error:
            run._warn_once("stall", f"no stall will be noticed: {error}")
    if settings.samplers:
        from stepspan.samplers import start_sampling

        start_sampling(run._recorder, settings.samplers, settings.sample_interval)


def _announce(run: Run, wanted: Path, journal: Journal) -> None:
    """Say where the journal is."""
    if not journal.durable:
        run._warn_once("memory", f"{wanted} cannot be written: the journal is kept in memory, at {journal.directory}")
    elif run.identity.rank == 0 and journal.directory not in _announced and sys.stderr is not None:
        _announced.add(journal.directory)
        with suppress(Exception):  # somebody else's stream
            sys.stderr.write(f"stepspan: the journal is in {journal.directory}\n")


@cache
def _watch_exits() -> None:
    note_exits(_note_exit)


def _note_exit(exit_: SystemExit) -> None:
    for run in OPEN_RUNS.all():
        run._recorder.scopes.note_exit(exit_)


def _close_at_exit() -> None:
    # What ended the interpreter or, in an interactive session, what went wrong in some earlier line.
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    open_runs = reversed((*OPEN_RUNS.resting(), *OPEN_RUNS.all()))
    Run._close_at_exit(open_runs, error, of_earlier_line=hasattr(sys, "ps1"))


def _after_fork_in_child() -> None:
    global _numbering_lock
    _numbering_lock = threading.RLock()
    OPEN_RUNS.after_fork()
    for run in OPEN_RUNS.that_may_record():
        run._after_fork()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
