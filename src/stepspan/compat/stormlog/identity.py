"""Which job and rank a stormlog record comes from, by stormlog's rules.

These are not the rules of `stepspan.identity`: a record is read as its writer meant it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepspan.compat.stormlog.schema import FIELDS, IDENTITY, SCHEMA_VERSION_LATEST, check_ranks
from stepspan.errors import RecordError, short_repr

LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)
"""Rank, local rank and world size, as a launcher names them; it counts where the first and the last are set."""
JOBS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
_CHECKED = {field.name: field for field in FIELDS if field.name in IDENTITY}


def resolve_distributed_identity(
    *,
    job_id: Any = None,
    rank: Any = None,
    local_rank: Any = None,
    world_size: Any = None,
    metadata: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The job and rank that a record belongs to, as stormlog's function of that name gives them.

    Each comes from its argument, else from `metadata`, else from `env`.

    Args:
        job_id: The job; None: not given.
        rank: The rank, from 0; None: not given.
        local_rank: The rank on its host, from 0; None: not given.
        world_size: How many ranks there are; None: not given.
        metadata: A record's metadata.
        env: A launcher's variables (torchrun, Open MPI, SLURM); None is no variables, not this process's.

    Returns:
        `job_id`, `rank`, `local_rank` and `world_size`; by default no job, rank 0, a local rank equal to the rank, and
        a world of 1.

    Raises:
        RecordError: A value is of the wrong type, or a rank outside its world.

    """
    if metadata and not isinstance(metadata, Mapping):
        raise RecordError(f"metadata must be an object, not {short_repr(metadata)}", "metadata")
    given = {"job_id": job_id, "rank": rank, "local_rank": local_rank, "world_size": world_size}
    found = {name: (metadata or {}).get(name) if value is None else value for name, value in given.items()}
    if env and None in found.values():
        known = _of_launcher(env) if None in (found["rank"], found["local_rank"], found["world_size"]) else {}
        known["job_id"] = next((job for name in JOBS if (job := _variable(env, name))), None)
        found = {name: known.get(name) if value is None else value for name, value in found.items()}
    if found["local_rank"] is None:
        found["local_rank"] = found["rank"]
    identity: dict[str, Any] = {name: IDENTITY[name] if value is None else value for name, value in found.items()}
    for name, field in _CHECKED.items():
        field.check_type(identity[name], SCHEMA_VERSION_LATEST)
        field.check_range(identity[name], SCHEMA_VERSION_LATEST)
    check_ranks(identity["rank"], identity["local_rank"], identity["world_size"])
    return identity


def _of_launcher(env: Mapping[str, str]) -> dict[str, Any]:
    for rank, local_rank, world_size in LAUNCHERS:
        if env.get(rank) is not None and env.get(world_size) is not None:
            found = {
                "rank": _int_variable(env, rank, "rank"),
                "local_rank": _int_variable(env, local_rank if _variable(env, local_rank) else rank, "local_rank"),
                "world_size": _int_variable(env, world_size, "world_size"),
            }
            for name, number in found.items():
                _CHECKED[name].check_range(number, SCHEMA_VERSION_LATEST)
            return found
    return {}


def _variable(env: Mapping[str, str], name: str) -> str:
    value = env.get(name)
    return "" if value is None else str(value).strip()


def _int_variable(env: Mapping[str, str], name: str, field: str) -> int:
    try:
        return int(_variable(env, name))
    except ValueError:
        raise RecordError(f"{field} must be an integer, not {name}={short_repr(env[name])}", field) from None
