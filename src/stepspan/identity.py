"""Who this process is: a launcher's variables -> job, rank, attempt -> the OpenTelemetry Resource.

Order, for each field by itself: the argument; STEPSPAN_JOB_ID, _RANK, _LOCAL_RANK, _WORLD_SIZE, _ATTEMPT; the first row
of `LAUNCHERS` that knows rank and size; a default. `Identity.sources` says which. A blank variable counts as unset.

Promise: all ranks of a launch get one `run_key` without talking to each other, and no two launches share one, not even
under one explicit job id. Two runs share a series (job id and instance) only where their job id was given, or where a
restart continues a job. Where several hosts have only an address and a port in common this cannot be kept: then
`may_merge` is set, and a warning says what to give.

Wrong arguments and STEPSPAN_* variables raise `ConfigError`. Wrong variables of a launcher, which no user has set, are
ignored with a warning. All here are pure functions but `host_facts`, which reads what the others are told.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

from stepspan.errors import ConfigError

__all__ = ["LAUNCHERS", "HostFacts", "Identity", "Launcher", "Process", "host_facts", "resolve", "resource_attributes"]

Scalar: TypeAlias = "str | bool | int | float"
Attribute: TypeAlias = "Scalar | list[Scalar]"

_DIGITS = re.compile(r"[0-9]{1,10}")  # `int` would take `1_000` and the digits of every script
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LARGEST = 2**31 - 1  # of any rank or count
_ADDRESS = "MASTER_ADDR, MASTER_PORT"  # the source of a job id where nothing better is known


@dataclass(frozen=True, slots=True)
class Identity:
    """One run in one process."""

    job_id: str
    rank: int
    local_rank: int
    world_size: int
    attempt: tuple[int, int]  # restarts by the scheduler (or the attempt given), restarts by the launcher
    ordinal: int  # of `start_run` in this process, from 0
    run_key: (
        str  # 32 hexadecimal digits, equal on all ranks of one run and on nothing else: it stands in every step's ids
    )
    role: str  # "", or "worker3" in a forked worker
    group: str | None
    host: str
    launcher: str  # the name of a row of LAUNCHERS, or "none"
    sources: Mapping[str, str]  # field -> "argument", variables, "launcher process", "journal", "generated", "default"
    warnings: tuple[str, ...]
    may_merge: bool = False  # nothing tells this launch from the next: `stepspan doctor` fails on it

    @property
    def instance(self) -> str:
        """`service.instance.id`: Prometheus folds sessions that share it into one series."""
        return f"{self.job_id}-{self.rank}" + (f"-{self.role}" if self.role else "")

    def for_worker(self, number: int) -> Identity:
        """The identity of a forked worker: the same run and rank, with series of its own."""
        return replace(self, role=f"worker{number}")


@dataclass(frozen=True, slots=True)
class Process:
    """An ancestor of this process. Pid and start time name it as long as its host is up."""

    pid: int
    start: str
    marks: frozenset[str] = frozenset()  # the launchers' marks in its environment; none if we may not read it


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Where and when `start_run` was called: all that `resolve` may know beside arguments and environment."""

    host: str
    boot_id: str
    ancestors: tuple[Process, ...]  # the parent first
    script: str  # `sys.argv[0]`
    now_ns: int  # Unix time
    token: str  # random hexadecimal digits, new for each `start_run`


class _Number(NamedTuple):
    value: int
    source: str


class _Text(NamedTuple):
    value: str
    source: str


class _Variables:
    """The environment. `names` is a list with spaces, of which the first that is set counts."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.warnings: list[str] = []

    def get(self, name: str) -> str:
        # Bytes that are not UTF-8 become `?`: neither JSON nor protobuf could carry them.
        return self._env.get(name, "").strip().encode("utf-8", "replace").decode()

    def text(self, names: str) -> _Text | None:
        return next((_Text(value, name) for name in names.split() if (value := self.get(name))), None)

    def number(self, names: str) -> _Number | None:
        found = self.text(names)
        if found and _DIGITS.fullmatch(found.value) and int(found.value) <= _LARGEST:
            return _Number(int(found.value), found.source)
        if found:
            self.warnings.append(f"{found.source}={found.value!r} is not a whole number: ignored")
        return None


# --- the table of launchers -------------------------------------------------------------------------------------------


def _run_id(env: _Variables) -> _Text | None:
    run_id = env.text("TORCHELASTIC_RUN_ID")
    return run_id if run_id and run_id.value != "none" else None


def _indexed_job(env: _Variables) -> _Text | None:
    """An indexed Job's pod has the host name `<job>-<index>`, unless its template says otherwise."""
    job, _, index = env.get("HOSTNAME").rpartition("-")
    return _Text(job, "HOSTNAME") if job and index == env.get("JOB_COMPLETION_INDEX") else None


def _pytorch_job(env: _Variables) -> _Text | None:
    """A PyTorchJob's pods are `<job>-master-0` and `<job>-worker-<n>`."""
    pod = re.fullmatch(r"(.+)-(?:master|worker)-[0-9]+", env.get("HOSTNAME"))
    return _Text(pod[1], "HOSTNAME") if pod else None


@dataclass(frozen=True, slots=True)
class Launcher:
    """A row: which variables a launcher gives its ranks, and what the ranks of one launch have in common."""

    name: str
    mark: str  # set in its ranks and in wrappers around them, not in the launcher itself; the row needs it set
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""
    job: Callable[[_Variables], _Text | None] = lambda _: None  # the job's name
    agents: str = ""  # how many processes started the ranks; a SLURM step of as many tasks is this launch, and names it
    must_name: bool = False  # the row applies only where job or step have a name
    restarts: str | None = None  # counts restarts; "" where the scheduler does; None: nobody but the journal
    unique: str = ""  # equal on all ranks, and any one of them on no other launch
    shared: str = ""  # equal on all ranks, but maybe on other launches as well
    batch: str = "SLURM_JOB_ID"  # names the job around it, if all ranks see it (ssh would not carry it)
    master: bool = True  # MASTER_ADDR and MASTER_PORT are the same on all ranks
    outlives: bool = False  # its process outlives one launch, as a shell or a daemon does


_TASKS = "SLURM_STEP_NUM_TASKS SLURM_NTASKS"

# fmt: off
LAUNCHERS: tuple[Launcher, ...] = (
    Launcher("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
             job=_run_id, agents="GROUP_WORLD_SIZE", restarts="TORCHELASTIC_RESTART_COUNT"),
    # Open MPI's job number has 16 random bits: too few to name a job, so the others are hashed in with it.
    Launcher("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
             "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", batch="", master=False,
             unique="OMPI_MCA_orte_precondition_transports PMIX_NAMESPACE OMPI_MCA_ess_base_jobid"),
    # MPICH, Intel MPI, Cray, MVAPICH. Before SLURM: in a SLURM job their mpirun starts one task a node, and all ranks
    # on it see that task's SLURM_PROCID.
    Launcher("pmi", "PMI_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID PMI_LOCAL_RANK SLURM_LOCALID",
             "MPI_LOCALNRANKS PMI_LOCAL_SIZE", agents="PMI_SIZE", unique="PMI_JOBID PALS_APID"),
    Launcher("slurm", "SLURM_STEP_ID", "SLURM_PROCID", _TASKS, "SLURM_LOCALID",
             agents=_TASKS, must_name=True, restarts="", shared="SLURM_CLUSTER_NAME", master=False),
    # Kubernetes tells no size: the manifest does. RANK comes first for pods that start several ranks.
    Launcher("kubernetes", "JOB_COMPLETION_INDEX", "RANK JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK",
             "LOCAL_WORLD_SIZE", job=_indexed_job, master=False),
    # MASTER_ADDR is `localhost` in the master's pod and the pod's name in the others.
    Launcher("kubeflow", "KUBERNETES_SERVICE_HOST", "RANK", "WORLD_SIZE", "LOCAL_RANK",
             job=_pytorch_job, must_name=True, master=False),
    # Every new local cluster begins with job 01000000, and concurrent trials share a job: not a name for one run.
    Launcher("ray", "RAY_JOB_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
             shared="MASTER_ADDR MASTER_PORT", batch="RAY_JOB_ID", outlives=True),
    # torch's env://, DeepSpeed, and whoever exports the same variables
    Launcher("env", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE LOCAL_SIZE",
             shared="MASTER_PORT", outlives=True),
)
# fmt: on
_NO_LAUNCHER = Launcher("none", "STEPSPAN_RANK", "", "", outlives=True)


# --- from variables to an identity ------------------------------------------------------------------------------------


def resolve(
    arguments: Mapping[str, Any],
    env: Mapping[str, str],
    facts: HostFacts,
    *,
    earlier_sessions: Callable[[str, int], int],
    ordinal: int = 0,
) -> Identity:
    """The identity of this process.

    `arguments` are `job_id`, `rank`, `local_rank`, `world_size`, `attempt` and `group` of `start_run`; None is not
    given. `earlier_sessions` tells how many sessions of a job id and rank the journal directory holds, `ordinal` how
    many runs this process has started before. Raises `ConfigError` for an argument or STEPSPAN_* variable that is of
    the wrong type, out of range, or only half of rank and world size.
    """
    variables = _Variables(env)
    given = {field: _given(field, arguments, variables) for field in ("rank", "world_size", "local_rank", "attempt")}
    row = _row(variables, given)
    rank = given["rank"] or variables.number(row.rank) or _Number(0, "default")
    size = given["world_size"] or variables.number(row.size) or _Number(1, "default")
    _check(rank, size, given["local_rank"])
    launch = _launch(row, variables, facts, size.value)
    local_rank = given["local_rank"] or _local_rank(row, variables, rank, size, launch)
    group = _Text(_string("group", arguments["group"]), "argument") if arguments.get("group") is not None else None
    group = group or variables.text("SLURM_ARRAY_JOB_ID")
    job_id, job_source = _job_id(arguments, row, variables, launch, facts)
    if ordinal and job_source not in ("argument", "STEPSPAN_JOB_ID", "generated"):
        job_id = f"{job_id}-{ordinal + 1}"  # the ranks of a run count alike
    if job_source == _ADDRESS:
        variables.warnings.append(
            "nothing tells this launch from the next one on these hosts: traces and series of both may merge;"
            " give job_id or STEPSPAN_JOB_ID, new for each launch"
        )

    scheduler = given["attempt"] or variables.number("SLURM_RESTART_COUNT")
    launcher = variables.number(row.restarts or "")
    if row.restarts is None and not given["attempt"] and job_source != "generated":
        launcher = _Number(earlier_sessions(job_id, rank.value), "journal")
    attempt = scheduler.value if scheduler else 0, launcher.value if launcher else 0
    # Only what every rank knows alike goes into the key. A journal may hold sessions of one rank and not of another, so
    # its count is there only if nothing better tells launches apart; and ssh does not carry the scheduler's variables.
    by_scheduler = given["attempt"] is not None or row.batch == "SLURM_JOB_ID"
    by_launcher = row.restarts is not None or not launch.certain
    counted = attempt[0] if by_scheduler else 0, attempt[1] if by_launcher else 0
    return Identity(
        job_id=job_id,
        rank=rank.value,
        local_rank=local_rank.value,
        world_size=size.value,
        attempt=attempt,
        ordinal=ordinal,
        run_key=_digest(16, job_id, launch.known, counted, ordinal),
        role="",
        group=group.value if group else None,
        host=facts.host,
        launcher=row.name,
        sources={
            "job_id": job_source,
            "rank": rank.source,
            "local_rank": local_rank.source,
            "world_size": size.source,
            "attempt": ", ".join(count.source for count in (scheduler, launcher) if count) or "default",
            "group": group.source if group else "default",
        },
        warnings=tuple(dict.fromkeys(variables.warnings)),
        may_merge=job_source == _ADDRESS,
    )


def _given(field: str, arguments: Mapping[str, Any], env: _Variables) -> _Number | None:
    """The number that the user gave: as opposed to a launcher's, it raises where it is wrong."""
    least, number = 1 if field == "world_size" else 0, -1
    value, source = arguments.get(field), "argument"
    if value is not None:
        with suppress(TypeError):
            number = -1 if isinstance(value, bool) else operator.index(value)  # numpy's integers as well
    elif found := env.text(f"STEPSPAN_{field.upper()}"):
        value, source = found
        number = int(found.value) if _DIGITS.fullmatch(found.value) else -1
    else:
        return None
    if not least <= number <= _LARGEST:
        raise _wrong(field, source, value, f"give a whole number from {least} to {_LARGEST}")
    return _Number(number, source)


def _wrong(field: str, source: str, value: object, fix: str) -> ConfigError:
    return ConfigError(field if source == "argument" else source, value, fix)


def _row(env: _Variables, given: Mapping[str, _Number | None]) -> Launcher:
    """The first row that knows rank and size, or one of them if the user gave the other."""
    for row in LAUNCHERS:
        if not env.get(row.mark) or (row.must_name and not (row.job(env) or _step(row, env))):
            continue
        rank, size = env.number(row.rank), env.number(row.size)
        if rank and size and rank.value >= size.value:
            env.warnings.append(f"{rank.source}={rank.value} is not below {size.source}={size.value}: ignored")
        elif (rank and (size or given["world_size"])) or (size and size.value and given["rank"]):
            return row
    return _NO_LAUNCHER


def _check(rank: _Number, size: _Number, local_rank: _Number | None) -> None:
    if rank.value and size.source == "default":
        raise _wrong("rank", rank.source, rank.value, "give world_size as well (or STEPSPAN_WORLD_SIZE)")
    if size.value > 1 and rank.source == "default":
        raise _wrong("world_size", size.source, size.value, "give rank as well (or STEPSPAN_RANK)")
    below = f"below the world size, which is {size.value} ({size.source})"
    if rank.value >= size.value and rank.source in ("argument", "STEPSPAN_RANK"):
        raise _wrong("rank", rank.source, rank.value, f"ranks count from 0 and stay {below}")
    if rank.value >= size.value:
        raise _wrong("world_size", size.source, size.value, f"it must be above the rank, {rank.value} ({rank.source})")
    if local_rank and local_rank.value >= size.value:
        raise _wrong("local_rank", local_rank.source, local_rank.value, f"local ranks count from 0 and stay {below}")


def _step(row: Launcher, env: _Variables) -> _Text | None:
    """The SLURM step that this launch is. A shell (batch script, salloc, `srun --pty`) is none: it starts many runs.

    SLURM numbers its own steps (batch, extern, interactive) from 0xfffffff0 up; some versions print them as negative.
    """
    tasks, agents, job, step = env.text(_TASKS), env.text(row.agents), env.get("SLURM_JOB_ID"), env.get("SLURM_STEP_ID")
    if not (tasks and agents and tasks.value == agents.value and job and _DIGITS.fullmatch(step)):
        return None
    shell = int(step) >= 0xFFFFFFF0 or (tasks.value == "1" and env.get("SLURM_PTY_PORT"))
    return None if shell else _Text(f"{job}.{step}", "SLURM_JOB_ID, SLURM_STEP_ID")


class _Launch(NamedTuple):
    known: list[str]  # what all ranks know alike about the launch
    certain: bool  # whether that tells it from every other launch
    process: str  # the launcher's process; "" if the ranks may have different ones
    one_host: bool | None  # whether all ranks are on this host; None: nothing says so or otherwise
    alone: bool  # one rank: there is nobody to agree with


def _launch(row: Launcher, env: _Variables, facts: HostFacts, size: int) -> _Launch:
    local_size, master, process = env.number(row.local_size), env.get("MASTER_ADDR"), ""
    one_host: bool | None = None
    if local_size or not row.master:
        one_host = local_size is not None and local_size.value == size
    elif master:
        one_host = master in ("localhost", "::1") or master.startswith("127.")
    if one_host is not False and facts.ancestors:
        # Between the launcher and its ranks there may be wrappers, one a rank: a shell, `uv run`, a profiler.
        launcher = next((each for each in facts.ancestors if row.mark not in each.marks), facts.ancestors[-1])
        process = f"{facts.host}/{facts.boot_id}/{launcher.pid}/{launcher.start}"
    if size == 1:
        return _Launch([facts.token], True, process, one_host, True)

    names = f"{row.unique} {row.shared} {row.batch}"
    names += " MASTER_ADDR MASTER_PORT" if one_host is False and row.master else ""
    step, job = _step(row, env), row.job(env)
    known = [row.name, *(f"{name}={env.get(name)}" for name in names.split() if env.get(name))]
    known += [name.value for name in (job, step) if name]
    if one_host and process and row is not _NO_LAUNCHER:  # ranks that are told by argument may have started one another
        known.append(process)
    certain = bool(step or env.text(row.unique) or (process in known and not row.outlives))
    return _Launch(known, certain, process, one_host, False)


def _local_rank(row: Launcher, env: _Variables, rank: _Number, size: _Number, launch: _Launch) -> _Number:
    told, of_rank = env.number(row.local_rank), env.number(row.rank)
    if told and told.value >= size.value:
        env.warnings.append(f"{told.source}={told.value} is not below the world size {size.value}: ignored")
    elif told and of_rank and of_rank.value == rank.value:  # else it is of a process that started this one
        return told
    return _Number(0 if launch.one_host is False else rank.value, "default")


def _job_id(
    arguments: Mapping[str, Any], row: Launcher, env: _Variables, launch: _Launch, facts: HostFacts
) -> tuple[str, str]:
    if arguments.get("job_id") is not None:
        return _string("job_id", arguments["job_id"]), "argument"
    job, step = row.job(env), _step(row, env)
    if job and step and _UUID.fullmatch(job.value):
        job = step  # torchrun made that id up, and makes up another one after a requeue; the step stays the same
    if named := env.text("STEPSPAN_JOB_ID") or job or step:
        return named
    batch = env.get(row.batch)
    if launch.alone and not (row.restarts and launch.process):
        script = PurePath(facts.script).stem if facts.script and not facts.script.startswith("-") else "python"
        begin = (script, time.strftime("%Y%m%dT%H%M%S", time.gmtime(facts.now_ns // 10**9)))
        return "-".join((*((batch, script) if batch else begin), facts.token[:6])), "generated"
    prefix = batch or ("ranks" if row is _NO_LAUNCHER else row.name)
    unique = ", ".join(name for name in row.unique.split() if env.get(name))
    source = "launcher process" if launch.process else unique or _ADDRESS
    return f"{prefix}-{_digest(6, [] if launch.alone else launch.known, launch.process)}", source


def _string(field: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or value != value.encode("utf-8", "replace").decode():
        raise ConfigError(field, value, "give a string that is not blank and can be written as UTF-8")
    return value


def _digest(size: int, *parts: object) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=size).hexdigest()


# --- the Resource -----------------------------------------------------------------------------------------------------


def resource_attributes(
    identity: Identity,
    env: Mapping[str, str],
    *,
    service_name: str | None = None,
    resource: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Attribute], tuple[str, ...]]:
    """The attributes of every signal of this session, and warnings about what was left out.

    Ours, then OTEL_RESOURCE_ATTRIBUTES, then `resource`; but nobody overrides which job and rank it is. The service's
    name: `service_name`, `resource`, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, "training". Attempt, process and
    session are no part of it: each restart would begin new series. Raises `ConfigError` for a value of no OTLP type.
    """
    variables = _Variables(env)
    theirs: dict[str, Attribute] = {**_from_variable(variables)}
    if name := variables.get("OTEL_SERVICE_NAME"):
        theirs["service.name"] = name
    for key, value in (resource or {}).items():
        theirs[_string("resource key", key)] = _attribute(f"resource[{key!r}]", value)
    if service_name is not None:
        theirs["service.name"] = _string("service_name", service_name)
    ours: dict[str, Attribute] = {
        "service.name": _string("service_name", theirs.get("service.name") or "training"),
        "service.instance.id": identity.instance,
        "job_id": identity.job_id,
        "rank": identity.rank,
        "local_rank": identity.local_rank,
        "world_size": identity.world_size,
    }
    for key in ours.keys() & theirs.keys() - {"service.name"}:
        if theirs[key] != ours[key]:
            variables.warnings.append(f"resource attribute {key}={theirs[key]!r} ignored: it is {ours[key]!r} here")
    return {**ours, "host.name": identity.host, **theirs, **ours}, tuple(variables.warnings)


def _from_variable(env: _Variables) -> dict[str, str]:
    """OTEL_RESOURCE_ATTRIBUTES: `key=value,...`, the values percent-encoded, and strings by specification."""
    found: dict[str, str] = {}
    for pair in filter(str.strip, env.get("OTEL_RESOURCE_ATTRIBUTES").split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        try:
            if not (key and equals):
                raise ValueError
            found[key] = unquote(value, errors="strict")
        except ValueError:
            env.warnings.append(f"OTEL_RESOURCE_ATTRIBUTES: {pair.strip()!r} is not key=value: ignored")
    return found


def _attribute(field: str, value: object) -> Attribute:
    items = [_scalar(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    known = [item for item in items if item is not None]
    if len(known) < len(items) or len({type(item) for item in known}) > 1:
        raise ConfigError(
            field, value, "give a string, boolean, 64-bit integer or finite number, or a list of one of them"
        )
    return known if isinstance(value, (list, tuple)) else known[0]


def _scalar(value: object) -> Scalar | None:
    """The plain value, also of a subclass (numpy's float64, an enum's member), which JSON encoders refuse."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else None
    return float(value) if isinstance(value, float) and math.isfinite(value) else None


# --- the host ---------------------------------------------------------------------------------------------------------


def host_facts() -> HostFacts:
    """The facts of this call. Of other processes' environments only the names of launchers' marks are kept."""
    marks = frozenset(row.mark for row in (*LAUNCHERS, _NO_LAUNCHER))
    boot_file = Path("/proc/sys/kernel/random/boot_id")
    linux = boot_file.exists()
    return HostFacts(
        host=socket.gethostname(),
        boot_id=boot_file.read_text().strip() if linux else _boot_time(),
        ancestors=tuple(_from_proc(os.getppid(), marks) if linux else _from_psutil(marks)),
        script=sys.argv[0] if sys.argv else "",
        now_ns=time.time_ns(),
        token=secrets.token_hex(16),
    )


def _from_proc(pid: int, marks: frozenset[str]) -> Iterator[Process]:
    """From `pid` up to the first process of this PID namespace, or to one that we may not see."""
    while pid:
        try:
            # After the program's name, which may hold spaces and brackets: state, parent, ..., start time (field 22).
            stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # somebody else's
            environ = b""
        names = {os.fsdecode(variable.partition(b"=")[0]) for variable in environ.split(b"\0")}
        yield Process(pid, stat[19].decode(), marks & names)
        pid = int(stat[1])


def _from_psutil(marks: frozenset[str]) -> Iterator[Process]:
    """The same where there is no /proc (macOS)."""
    import psutil

    for process in psutil.Process().parents():
        try:
            names = set(process.environ())
        except psutil.Error:
            names = set()
        yield Process(process.pid, str(process.create_time()), marks & names)


def _boot_time() -> str:
    import psutil

    return str(int(psutil.boot_time()))
