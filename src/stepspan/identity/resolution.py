"""From arguments, variables and the host to an identity. `stepspan.identity` has the order and the promises."""

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
from stepspan.identity.variables import DIGITS, MAX_COUNT, FoundCount, FoundText, Variables, valid_text

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_COUNTS = ("rank", "world_size", "local_rank", "attempt")
_ADDRESS = "MASTER_ADDR, MASTER_PORT"
"""The source of a job id where nothing better is known."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is: one run in one process.

    Args:
        job_id: Names the job; ranks and restarts share it.
        rank: From 0.
        local_rank: The rank on its host, from 0.
        world_size: The number of ranks.
        attempt: Restarts by the scheduler (or the attempt given), and restarts by the launcher.
        ordinal: How many runs this process had started under its job id and name before.
        run_key: 32 hexadecimal digits, equal on all ranks of one run and on nothing else. Every step's ids hash it.
        role: "" or, in a forked worker, "worker3".
        group: Names what several jobs belong to, such as a sweep.
        host: The host's name.
        launcher: The name of a row of LAUNCHERS, or "none".
        sources: Field -> "argument", variables, "launcher process", "journal", "generated" or "default".
        warnings: What was ignored, and what may go wrong.
        may_merge: Nothing distinguishes this launch from the next: `stepspan doctor` fails on it.

    """

    job_id: str
    rank: int
    local_rank: int
    world_size: int
    attempt: tuple[int, int]
    ordinal: int
    run_key: str
    role: str
    group: str | None
    host: str
    launcher: str
    sources: Mapping[str, str]
    warnings: tuple[str, ...]
    may_merge: bool = False

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
    ordinal: Callable[[str, str | None], int] = lambda job, name: 0,
    name: str | None = None,
    in_order: bool = True,
) -> Identity:
    """Find out who this process is.

    Each field by itself comes from the argument, else from its STEPSPAN_* variable, else from the launcher's variables,
    else it has a default: rank 0 of 1, a job id that is generated.

    Args:
        arguments: `job_id`, `rank`, `local_rank`, `world_size`, `attempt` and `group` of `start_run`. None means not
            given.
        env: The environment.
        facts: What the host says about this process.
        earlier_sessions: Counts the sessions of a job id and rank in the journal directory: a restart that no launcher
            counts is one more of them.
        ordinal: How many runs this process has started before under a job id and a name.
        name: Of the run: the same on all ranks.
        in_order: Whether all ranks start their runs in one order. Threads may not: their runs are counted by name.

    Raises:
        ConfigError: An argument or STEPSPAN_* variable is of the wrong type, out of range, or only one of rank and
            world size.

    """
    variables = Variables(env)
    given = {field: _given_count(field, arguments, variables) for field in _COUNTS}
    row = _find_launcher(variables, given)
    if _drop_contradicted(given, row, variables):
        row = _find_launcher(variables, given)
    rank = given["rank"] or variables.first_count(row.rank) or FoundCount(0, "default")
    size = given["world_size"] or variables.first_count(row.size) or FoundCount(1, "default")
    _check_ranks(rank, size, given["local_rank"])
    launch = _describe_launch(row, variables, facts, size.value)
    local_rank = given["local_rank"] or _local_rank(row, variables, rank, size, launch)
    group = variables.first_text("SLURM_ARRAY_JOB_ID")
    if arguments.get("group") is not None:
        group = FoundText(valid_text("group", arguments["group"]), "argument")
    job_id, job_source = _job_id(arguments, row, variables, launch, facts)
    is_given = job_source in ("argument", "STEPSPAN_JOB_ID", "generated")
    by_name = is_given or not (in_order or size.value == 1)  # what is of one process need not agree with another
    number = ordinal(job_id, name if by_name else None)
    run: tuple[object, ...] = (number, name) if by_name and name else (number,)
    if number and not in_order and not name and size.value > 1:
        variables.warnings.append(
            "several runs without a name are started by threads or asyncio tasks: ranks may take one for another; give"
            " each a name, the same on all ranks"
        )
    if number and not is_given:
        job_id = f"{job_id}-{number + 1}"
    if job_source == _ADDRESS:
        variables.warnings.append(
            "nothing distinguishes this launch from the next one on these hosts: traces and series of both may merge;"
            " give job_id or STEPSPAN_JOB_ID, new for each launch"
        )
    scheduler = given["attempt"] or variables.first_count("SLURM_RESTART_COUNT")
    launcher = variables.first_count(row.restarts or "")
    if row.restarts is None and not given["attempt"] and job_source != "generated":
        launcher = FoundCount(earlier_sessions(job_id, rank.value), "journal")
    attempt = scheduler.value if scheduler else 0, launcher.value if launcher else 0
    # Only what every rank knows alike goes into the key. A journal may hold sessions of one rank and not of another, so
    # its count is in it only if nothing better distinguishes launches. And ssh carries no scheduler's variables.
    by_scheduler = given["attempt"] is not None or row.batch == "SLURM_JOB_ID"
    by_launcher = row.restarts is not None or not launch.is_unique
    counted = attempt[0] if by_scheduler else 0, attempt[1] if by_launcher else 0
    return Identity(
        job_id=job_id,
        rank=rank.value,
        local_rank=local_rank.value,
        world_size=size.value,
        attempt=attempt,
        ordinal=number,
        run_key=_digest(16, job_id, launch.common, counted, *run),
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


def _given_count(field: str, arguments: Mapping[str, Any], env: Variables) -> FoundCount | None:
    """The count that the user gave: unlike a launcher's, it raises where it is wrong."""
    minimum, number = 1 if field == "world_size" else 0, -1
    value, source = arguments.get(field), "argument"
    if value is not None:
        with suppress(TypeError):
            number = -1 if isinstance(value, bool) else operator.index(value)  # numpy's integers as well
    elif found := env.first_text(f"STEPSPAN_{field.upper()}"):
        value, source = found
        number = int(found.value) if DIGITS.fullmatch(found.value) else -1
    else:
        return None
    if not minimum <= number <= MAX_COUNT:
        fix = f"give a whole number from {minimum} to {MAX_COUNT}"
        raise ConfigError(field if source == "argument" else source, value, fix)
    return FoundCount(number, source)


def _find_launcher(env: Variables, given: Mapping[str, FoundCount | None]) -> Launcher:
    """The first row that knows rank and size, or one of them if the user gave the other."""
    without_size: list[FoundCount] = []
    for row in LAUNCHERS:
        if not env.get(row.mark) or (row.must_name and not (row.job(env) or _slurm_step(row, env))):
            continue
        rank, size = env.first_count(row.rank), env.first_count(row.size)
        if rank and size and rank.value >= size.value:
            env.warnings.append(f"{rank.source}={rank.value} is not below {size.source}={size.value}: ignored")
        elif (rank and (size or given["world_size"])) or (size and size.value and given["rank"]):
            return row
        elif rank and rank.value and not size:
            without_size.append(rank)
    if without_size and not given["rank"]:
        first = without_size[0]
        env.warnings.append(
            f"{first.source}={first.value}, but nothing gives the world size: taken for a run of one process;"
            " if it is not, give STEPSPAN_RANK and STEPSPAN_WORLD_SIZE"
        )
    return NO_LAUNCHER


def _drop_contradicted(given: dict[str, FoundCount | None], row: Launcher, env: Variables) -> bool:
    """Leave out our variables that a launcher's contradict: they may be right elsewhere. Whether there are any."""
    launched, size = env.first_count(row.rank), given["world_size"] or env.first_count(row.size)
    rank = given["rank"] or launched
    limit = f"{size.source}={size.value}" if size else ""
    contradicted: dict[str, str] = {}
    if rank and size and rank.value >= size.value:
        if _is_variable(given["world_size"]) and rank is launched:
            contradicted["world_size"] = f"it is not above {rank.source}={rank.value}"
        elif _is_variable(given["rank"]) and size is not given["world_size"]:
            contradicted["rank"] = f"it is not below {limit}"
    local = given["local_rank"]
    if local and size and _is_variable(local) and size is not given["world_size"] and local.value >= size.value:
        contradicted["local_rank"] = f"it is not below {limit}"
    for field, why in contradicted.items():
        env.warnings.append(f"STEPSPAN_{field.upper()}={given[field].value}: {why}: ignored")  # type: ignore[union-attr]
        given[field] = None
    return bool(contradicted)


def _is_variable(found: FoundCount | None) -> bool:
    return found is not None and found.source.startswith("STEPSPAN_")


def _check_ranks(rank: FoundCount, size: FoundCount, local_rank: FoundCount | None) -> None:
    if rank.value and size.source == "default":
        raise rank.error("rank", "give world_size as well (or STEPSPAN_WORLD_SIZE)")
    if size.value > 1 and rank.source == "default":
        raise size.error("world_size", "give rank as well (or STEPSPAN_RANK)")
    below = f"below the world size, which is {size.value} ({size.source})"
    if rank.value >= size.value and rank.source in ("argument", "STEPSPAN_RANK"):
        raise rank.error("rank", f"ranks count from 0 and stay {below}")
    if rank.value >= size.value:
        raise size.error("world_size", f"it must be above the rank, {rank.value} ({rank.source})")
    if local_rank and local_rank.value >= size.value:
        raise local_rank.error("local_rank", f"local ranks count from 0 and stay {below}")


def _slurm_step(row: Launcher, env: Variables) -> FoundText | None:
    """The SLURM step that this launch is. A shell (batch script, salloc, `srun --pty`) is none: it starts many runs.

    SLURM numbers its own steps (batch, extern, interactive) from 0xfffffff0 up; some versions print them as negative.
    """
    tasks, agents = env.first_text(TASKS), env.first_text(row.agents)
    job, step = env.get("SLURM_JOB_ID"), env.get("SLURM_STEP_ID")
    if not (tasks and agents and tasks.value == agents.value and job and DIGITS.fullmatch(step)):
        return None
    shell = int(step) >= 0xFFFFFFF0 or (tasks.value == "1" and env.get("SLURM_PTY_PORT"))
    return None if shell else FoundText(f"{job}.{step}", "SLURM_JOB_ID, SLURM_STEP_ID")


class _Launch(NamedTuple):
    """What there is to know about the launch that this rank belongs to.

    Args:
        common: What all ranks know alike about it.
        is_unique: Whether `common` distinguishes it from every other launch.
        process: The launcher's process; "" if the ranks may have different ones.
        one_host: Whether all ranks are on this host; None: nothing says so or otherwise.
        single: There is one rank, hence no other to agree with.

    """

    common: list[str]
    is_unique: bool
    process: str
    one_host: bool | None
    single: bool


def _describe_launch(row: Launcher, env: Variables, facts: HostFacts, size: int) -> _Launch:
    local_size, master, process = env.first_count(row.local_size), env.get("MASTER_ADDR"), ""
    one_host: bool | None = None
    if local_size or not row.master:
        one_host = local_size is not None and local_size.value == size
    elif master:
        one_host = master in ("localhost", "::1") or master.startswith("127.")
    if one_host is not False and facts.ancestors:
        # Between the launcher and its ranks there may be wrappers, one a rank: a shell, `uv run`, a profiler.
        unmarked = (ancestor for ancestor in facts.ancestors if row.mark not in ancestor.marks)
        launcher = next(unmarked, facts.ancestors[-1])
        process = f"{facts.host}/{facts.boot_id}/{launcher.pid}/{launcher.start}"
    if size == 1:
        return _Launch([facts.token], True, process, one_host, True)

    names = f"{row.unique} {row.shared} {row.batch}"
    names += " MASTER_ADDR MASTER_PORT" if one_host is False and row.master else ""
    step, job = _slurm_step(row, env), row.job(env)
    common = [row.name, *(f"{name}={env.get(name)}" for name in names.split() if env.get(name))]
    common += [name.value for name in (job, step) if name]
    if one_host and process and row is not NO_LAUNCHER:  # ranks given by argument may have started one another
        common.append(process)
    is_unique = bool(step or env.first_text(row.unique) or (process in common and not row.outlives))
    return _Launch(common, is_unique, process, one_host, False)


def _local_rank(row: Launcher, env: Variables, rank: FoundCount, size: FoundCount, launch: _Launch) -> FoundCount:
    local, of_rank = env.first_count(row.local_rank), env.first_count(row.rank)
    if local and local.value >= size.value:
        env.warnings.append(f"{local.source}={local.value} is not below the world size {size.value}: ignored")
    elif local and of_rank and of_rank.value == rank.value:  # else it is of a process that started this one
        return local
    return FoundCount(0 if launch.one_host is False else rank.value, "default")


def _job_id(
    arguments: Mapping[str, Any], row: Launcher, env: Variables, launch: _Launch, facts: HostFacts
) -> tuple[str, str]:
    """The job id and its source."""
    given = arguments.get("job_id")
    if given is not None:
        with suppress(TypeError):
            given = given if isinstance(given, bool) else str(operator.index(given))  # numpy's integers as well
        return valid_text("job_id", given, ", or a whole number"), "argument"
    job, step = row.job(env), _slurm_step(row, env)
    if job and step and _UUID.fullmatch(job.value):
        job = step  # torchrun made that id up, and makes up another one after a requeue; the step stays the same
    if found := env.first_text("STEPSPAN_JOB_ID") or job or step:
        return found
    batch = env.get(row.batch)
    if launch.single and not (row.restarts and launch.process):
        script = PurePath(facts.script).stem if facts.script and not facts.script.startswith("-") else "python"
        begin = (script, time.strftime("%Y%m%dT%H%M%S", time.gmtime(facts.now_ns // 10**9)))
        return "-".join((*((batch, script) if batch else begin), facts.token[:6])), "generated"
    prefix = batch or ("ranks" if row is NO_LAUNCHER else row.name)
    unique = ", ".join(name for name in row.unique.split() if env.get(name))
    source = "launcher process" if launch.process else unique or _ADDRESS
    return f"{prefix}-{_digest(6, [] if launch.single else launch.common, launch.process)}", source


def _digest(size: int, *parts: object) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=size).hexdigest()
