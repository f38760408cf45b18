"""From arguments, variables and the host to an identity."""

from __future__ import annotations

import json
import operator
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, NamedTuple

from stepspan.errors import ConfigError
from stepspan.identity.host import HostFacts
from stepspan.identity.launchers import LAUNCHERS, NO_LAUNCHER, TASKS, Launcher
from stepspan.identity.variables import DIGITS, LARGEST, Number, Text, Variables, text_of

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
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
        return replace(self, role=f"{self.role}worker{number}")


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
    variables = Variables(env)
    given = {field: _given(field, arguments, variables) for field in ("rank", "world_size", "local_rank", "attempt")}
    row = _row(variables, given)
    rank = given["rank"] or variables.number(row.rank) or Number(0, "default")
    size = given["world_size"] or variables.number(row.size) or Number(1, "default")
    _check(rank, size, given["local_rank"])
    launch = _launch(row, variables, facts, size.value)
    local_rank = given["local_rank"] or _local_rank(row, variables, rank, size, launch)
    group = Text(text_of("group", arguments["group"]), "argument") if arguments.get("group") is not None else None
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
        launcher = Number(earlier_sessions(job_id, rank.value), "journal")
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


def _given(field: str, arguments: Mapping[str, Any], env: Variables) -> Number | None:
    """The number that the user gave: as opposed to a launcher's, it raises where it is wrong."""
    least, number = 1 if field == "world_size" else 0, -1
    value, source = arguments.get(field), "argument"
    if value is not None:
        with suppress(TypeError):
            number = -1 if isinstance(value, bool) else operator.index(value)  # numpy's integers as well
    elif found := env.text(f"STEPSPAN_{field.upper()}"):
        value, source = found
        number = int(found.value) if DIGITS.fullmatch(found.value) else -1
    else:
        return None
    if not least <= number <= LARGEST:
        raise _wrong(field, source, value, f"give a whole number from {least} to {LARGEST}")
    return Number(number, source)


def _wrong(field: str, source: str, value: object, fix: str) -> ConfigError:
    return ConfigError(field if source == "argument" else source, value, fix)


def _row(env: Variables, given: Mapping[str, Number | None]) -> Launcher:
    """The first row that knows rank and size, or one of them if the user gave the other."""
    alone: list[Number] = []
    for row in LAUNCHERS:
        if not env.get(row.mark) or (row.must_name and not (row.job(env) or _step(row, env))):
            continue
        rank, size = env.number(row.rank), env.number(row.size)
        if rank and size and rank.value >= size.value:
            env.warnings.append(f"{rank.source}={rank.value} is not below {size.source}={size.value}: ignored")
        elif (rank and (size or given["world_size"])) or (size and size.value and given["rank"]):
            return row
        elif rank and rank.value and not size:
            alone.append(rank)
    if alone and not given["rank"]:
        first = alone[0]
        env.warnings.append(
            f"{first.source}={first.value}, but nothing tells the world size: taken for a run of one process;"
            " if it is not, give STEPSPAN_RANK and STEPSPAN_WORLD_SIZE"
        )
    return NO_LAUNCHER


def _check(rank: Number, size: Number, local_rank: Number | None) -> None:
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


def _step(row: Launcher, env: Variables) -> Text | None:
    """The SLURM step that this launch is. A shell (batch script, salloc, `srun --pty`) is none: it starts many runs.

    SLURM numbers its own steps (batch, extern, interactive) from 0xfffffff0 up; some versions print them as negative.
    """
    tasks, agents, job, step = env.text(TASKS), env.text(row.agents), env.get("SLURM_JOB_ID"), env.get("SLURM_STEP_ID")
    if not (tasks and agents and tasks.value == agents.value and job and DIGITS.fullmatch(step)):
        return None
    shell = int(step) >= 0xFFFFFFF0 or (tasks.value == "1" and env.get("SLURM_PTY_PORT"))
    return None if shell else Text(f"{job}.{step}", "SLURM_JOB_ID, SLURM_STEP_ID")


class _Launch(NamedTuple):
    known: list[str]  # what all ranks know alike about the launch
    certain: bool  # whether that tells it from every other launch
    process: str  # the launcher's process; "" if the ranks may have different ones
    one_host: bool | None  # whether all ranks are on this host; None: nothing says so or otherwise
    alone: bool  # one rank: there is nobody to agree with


def _launch(row: Launcher, env: Variables, facts: HostFacts, size: int) -> _Launch:
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
    if one_host and process and row is not NO_LAUNCHER:  # ranks that are told by argument may have started one another
        known.append(process)
    certain = bool(step or env.text(row.unique) or (process in known and not row.outlives))
    return _Launch(known, certain, process, one_host, False)


def _local_rank(row: Launcher, env: Variables, rank: Number, size: Number, launch: _Launch) -> Number:
    told, of_rank = env.number(row.local_rank), env.number(row.rank)
    if told and told.value >= size.value:
        env.warnings.append(f"{told.source}={told.value} is not below the world size {size.value}: ignored")
    elif told and of_rank and of_rank.value == rank.value:  # else it is of a process that started this one
        return told
    return Number(0 if launch.one_host is False else rank.value, "default")


def _job_id(
    arguments: Mapping[str, Any], row: Launcher, env: Variables, launch: _Launch, facts: HostFacts
) -> tuple[str, str]:
    if arguments.get("job_id") is not None:
        return text_of("job_id", arguments["job_id"]), "argument"
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
    prefix = batch or ("ranks" if row is NO_LAUNCHER else row.name)
    unique = ", ".join(name for name in row.unique.split() if env.get(name))
    source = "launcher process" if launch.process else unique or _ADDRESS
    return f"{prefix}-{_digest(6, [] if launch.alone else launch.known, launch.process)}", source


def _digest(size: int, *parts: object) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=size).hexdigest()
