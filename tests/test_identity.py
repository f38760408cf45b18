"""Identity as a specification: a launcher's environment in; job, rank, attempt and Resource out.

The environments are what launchers export, less what does not matter here, as printed by torchrun 2.15, Open MPI 4.1.4,
MPICH 4.0.2, SLURM 22.05 (sbatch, srun, srun --pty, salloc) and Ray Train 2; Kubernetes and Kubeflow by their sources.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations, count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepspan.errors import ConfigError
from stepspan.identity import (
    LAUNCHERS,
    HostFacts,
    Identity,
    Process,
    host_facts,
    resolve,
    resource_attributes,
)
from stepspan.identity.host import _from_psutil

SHELL, NEXT_SHELL = Process(100, "1000"), Process(101, "1100")
LAUNCHER, NEXT_LAUNCHER = Process(200, "2000"), Process(201, "2100")
UUID, NEXT_UUID = "ce2ef1e4-5bf9-4b48-8ebb-759e028d83d5", "22047c21-3fab-41c9-9758-5711fcd80dff"
NOW = 1_795_226_400_000_000_000  # 2026-11-21 02:00:00 UTC


@dataclass
class Session:
    """One process: what surrounds it, and who it must turn out to be."""

    job: str  # a pattern
    rank: int = 0
    env: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    parents: tuple[Process, ...] = (SHELL,)
    host: str = "node1"
    ordinal: int = 0
    worker: int | None = None
    # expected
    launcher: str = "none"
    world_size: int = 1
    local_rank: int | None = None  # None: the rank
    attempt: tuple[int, int] = (0, 0)
    group: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    may_merge: bool = False


@dataclass
class Run:
    """The sessions of one run key. Only runs of one `series` may share job id and instance."""

    sessions: list[Session]
    series: str = ""


def torchrun(
    rank: int, run_id: str = "none", *, nodes: int = 1, restarts: int = 0, port: int = 29500
) -> dict[str, str]:
    """Two ranks on each node, as `torchrun --nproc-per-node 2` has it."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(2 * nodes),
        "LOCAL_RANK": str(rank % 2),
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": str(rank // 2),
        "GROUP_WORLD_SIZE": str(nodes),
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(2 * nodes),
        "MASTER_ADDR": "127.0.0.1" if nodes == 1 else "10.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def batch(job: int, *, array: int | None = None, restarts: int | None = None) -> dict[str, str]:
    """Inside `sbatch --ntasks=2`: no step, and yet PROCID and NTASKS."""
    return {
        "HOSTNAME": "node1",
        "SLURM_CLUSTER_NAME": "toy",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOBID": str(job),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NPROCS": "2",
        "SLURM_PROCID": "0",
        **({"SLURM_ARRAY_JOB_ID": str(array), "SLURM_ARRAY_TASK_ID": "1"} if array else {}),
        **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
    }


def srun(job: int, step: int | str, rank: int = 0, tasks: int = 2, **more: int) -> dict[str, str]:
    return {
        **batch(job, **more),
        "SLURM_STEP_ID": str(step),
        "SLURM_STEPID": str(step),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def openmpi(rank: int, number: int = 640483329, *, local_size: int = 2) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local_size),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
        "OMPI_MCA_ess_base_jobid": str(number),
        "OMPI_MCA_orte_precondition_transports": f"abd48a42141bb6af-{number:016x}",
        "PMIX_NAMESPACE": str(number),
        "PMIX_RANK": str(rank),
    }


def mpich(rank: int) -> dict[str, str]:
    return {"PMI_RANK": str(rank), "PMI_SIZE": "2", "PMI_FD": "6", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}


def ray(rank: int, port: int) -> dict[str, str]:
    return {
        "RAY_JOB_ID": "01000000",
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": str(port),
    }


def pytorch_job(rank: int) -> dict[str, str]:
    pod = "digits-worker-0" if rank else "digits-master-0"
    return {
        "HOSTNAME": pod,
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "digits-master-0" if rank else "localhost",
        "MASTER_PORT": "23456",
    }


def two(job: str, env: Any, **expected: Any) -> list[Session]:
    """Ranks 0 and 1 of a world of two; `env` tells the environment of a rank."""
    expected = {"world_size": 2, **expected}
    return [Session(job, rank, env(rank), **expected) for rank in (0, 1)]


TORCHRUN: dict[str, Any] = {"launcher": "torchrun", "parents": (LAUNCHER, SHELL)}
NEXT_TORCHRUN: dict[str, Any] = {"launcher": "torchrun", "parents": (NEXT_LAUNCHER, SHELL)}
STEP: dict[str, Any] = {"launcher": "slurm", "parents": (Process(300, "3000"), Process(1, "1"))}
WRAPPED = [
    (Process(210 + rank, "2001", frozenset({"TORCHELASTIC_RUN_ID", "RANK"})), LAUNCHER, SHELL) for rank in (0, 1)
]
BY_PROCESS = {"sources": {"job_id": "launcher process"}}
MPI = {"launcher": "openmpi", **BY_PROCESS}
EXP = {"job_id": "exp"}

ROWS: dict[str, list[Run]] = {
    "bare python, twice": [
        Run([Session("train-20261121T020000-[0-9a-f]{6}", sources={"job_id": "generated", "rank": "default"})]),
        Run([Session("train-20261121T020000-[0-9a-f]{6}", sources={"world_size": "default", "attempt": "default"})]),
    ],
    "bare python, two runs in one process": [
        Run([Session("train-.*")]),
        Run([Session("train-.*", ordinal=1)]),
    ],
    "bare python, the same explicit job id": [
        Run([Session("exp", arguments=EXP, sources={"job_id": "argument"})], series="exp"),
        Run(
            [Session("exp", env={"STEPSPAN_JOB_ID": "exp"}, attempt=(0, 1), sources={"attempt": "journal"})],
            series="exp",
        ),
        Run([Session("exp", arguments=EXP, ordinal=1, attempt=(0, 2))], series="exp"),
    ],
    "torchrun without an id": [
        Run(two("torchrun-[0-9a-f]{12}", torchrun, **TORCHRUN, **BY_PROCESS)),
        Run(two("torchrun-[0-9a-f]{12}", torchrun, **NEXT_TORCHRUN)),
    ],
    "torchrun without an id, restarted": [
        Run(two("torchrun-.*", torchrun, **TORCHRUN), series="job"),
        Run(two("torchrun-.*", lambda rank: torchrun(rank, restarts=1), **TORCHRUN, attempt=(0, 1)), series="job"),
    ],
    "torchrun without an id, two runs in one process": [
        Run(two("torchrun-[0-9a-f]{12}", torchrun, **TORCHRUN)),
        Run(two("torchrun-[0-9a-f]{12}-2", torchrun, **TORCHRUN, ordinal=1)),
    ],
    "torchrun behind a wrapper for each rank": [
        Run(
            [dataclasses.replace(s, parents=WRAPPED[s.rank]) for s in two("torchrun-.*", torchrun, launcher="torchrun")]
        ),
    ],
    "torchrun, one process": [
        Run([Session("torchrun-.*", 0, {**torchrun(0), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, **TORCHRUN)]),
        Run([Session("torchrun-.*", 0, {**torchrun(0), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, **NEXT_TORCHRUN)]),
    ],
    "torchrun that made up an id": [
        Run(two(UUID, lambda rank: torchrun(rank, UUID, port=39285), **TORCHRUN)),
    ],
    "torchrun with an id": [
        Run(two("resnet", lambda rank: torchrun(rank, "resnet"), **TORCHRUN), series="resnet"),
        Run(
            two("resnet", lambda rank: torchrun(rank, "resnet", restarts=1), **TORCHRUN, attempt=(0, 1)),
            series="resnet",
        ),
        Run(two("resnet", lambda rank: torchrun(rank, "resnet"), **NEXT_TORCHRUN), series="resnet"),
    ],
    "torchrun, the same explicit job id": [
        Run(two("exp", lambda rank: torchrun(rank, UUID), **TORCHRUN, arguments=EXP), series="exp"),
        Run(two("exp", lambda rank: torchrun(rank, NEXT_UUID), **NEXT_TORCHRUN, arguments=EXP), series="exp"),
        Run(two("exp", torchrun, **TORCHRUN, arguments=EXP), series="exp"),
        Run(two("exp", torchrun, **NEXT_TORCHRUN, arguments=EXP), series="exp"),
        Run(two("exp", torchrun, **NEXT_TORCHRUN, arguments=EXP, ordinal=1), series="exp"),
    ],
    "torchrun on two nodes": [
        Run(
            [
                Session(
                    "torchrun-.*",
                    rank,
                    torchrun(rank, nodes=2),
                    host=f"node{rank // 2}",
                    parents=(Process(400 + rank // 2, "4000"),),
                    launcher="torchrun",
                    world_size=4,
                    local_rank=rank % 2,
                    sources={"job_id": "MASTER_ADDR, MASTER_PORT"},
                    may_merge=True,
                )
                for rank in range(4)
            ]
        )
    ],
    "SLURM step": [
        Run(two("71[.]0", lambda rank: srun(71, 0, rank), **STEP, sources={"job_id": "SLURM_JOB_ID, SLURM_STEP_ID"})),
        Run(two("72[.]0", lambda rank: srun(72, 0, rank), **STEP)),
    ],
    "SLURM array": [
        Run(two("74[.]0", lambda rank: srun(74, 0, rank, array=73), **STEP, group="73")),
        Run(two("73[.]0", lambda rank: srun(73, 0, rank, array=73), **STEP, group="73")),
        Run([Session("75-train-.*", 0, batch(75, array=73), group="73", sources={"group": "SLURM_ARRAY_JOB_ID"})]),
    ],
    "SLURM step, requeued": [
        Run(two("76[.]0", lambda rank: srun(76, 0, rank), **STEP), series="76.0"),
        Run(two("76[.]0", lambda rank: srun(76, 0, rank, restarts=1), **STEP, attempt=(1, 0)), series="76.0"),
    ],
    "packed srun steps of one job": [
        Run([Session("77[.]0", 0, srun(77, 0, tasks=1), **STEP)]),
        Run([Session("77[.]1", 0, srun(77, 1, tasks=1), **STEP)]),
        Run(two("77[.]2", lambda rank: srun(77, 2, rank), **STEP)),
    ],
    "python in a SLURM shell: sbatch, salloc, srun --pty": [
        Run([Session("78-train-[0-9a-f]{6}", 0, batch(78))]),
        Run([Session("78-train-[0-9a-f]{6}", 0, batch(78))]),
        Run([Session("78-train-[0-9a-f]{6}", 0, srun(78, "4294967291", tasks=1))]),
        Run([Session("78-train-[0-9a-f]{6}", 0, srun(78, "-5", tasks=1))]),
        Run([Session("78-train-[0-9a-f]{6}", 0, {**srun(78, 0, tasks=1), "SLURM_PTY_PORT": "43125"})]),
        Run([Session("78-train-[0-9a-f]{6}", 0, {**srun(78, 0, tasks=1), "SLURM_PTY_PORT": "43125"})]),
    ],
    "ranks spawned by the one task of a SLURM step": [
        Run(
            [
                Session(
                    "79[.]0",
                    rank,
                    srun(79, 0, tasks=1),
                    {"rank": rank, "world_size": 2},
                    launcher="slurm",
                    world_size=2,
                    local_rank=0,
                )
                for rank in (0, 1)
            ]
        ),
    ],
    "torchrun in SLURM, requeued": [
        Run(two("81", lambda rank: {**batch(81), **torchrun(rank, "81")}, **TORCHRUN), series="81"),
        Run(
            two(
                "81",
                lambda rank: {**batch(81, restarts=1), **torchrun(rank, "81")},
                **NEXT_TORCHRUN,
                attempt=(1, 0),
                sources={"attempt": "SLURM_RESTART_COUNT, TORCHELASTIC_RESTART_COUNT"},
            ),
            series="81",
        ),
        Run(
            two(
                "81",
                lambda rank: {**batch(81, restarts=1), **torchrun(rank, "81", restarts=1)},
                **NEXT_TORCHRUN,
                attempt=(1, 1),
            ),
            series="81",
        ),
    ],
    "torchrun by srun, with an id of its own making, requeued": [
        Run(two("82[.]0", lambda rank: {**srun(82, 0, tasks=1), **torchrun(rank, UUID)}, **TORCHRUN), series="82.0"),
        Run(
            two(
                "82[.]0",
                lambda rank: {**srun(82, 0, tasks=1, restarts=1), **torchrun(rank, NEXT_UUID)},
                **NEXT_TORCHRUN,
                attempt=(1, 0),
            ),
            series="82.0",
        ),
    ],
    "torchrun by two sruns of one job, on two nodes, under one id": [
        Run(
            [
                Session(
                    "101",
                    rank,
                    {**srun(83, step, rank // 2), **torchrun(rank, "101", nodes=2)},
                    launcher="torchrun",
                    world_size=4,
                    local_rank=rank % 2,
                )
                for rank in range(4)
            ],
            series="101",
        )
        for step in (0, 1)
    ],
    "torchrun twice in an sbatch script": [
        Run(two("84-[0-9a-f]{12}", lambda rank: {**batch(84), **torchrun(rank)}, **TORCHRUN)),
        Run(two("84-[0-9a-f]{12}", lambda rank: {**batch(84), **torchrun(rank)}, **NEXT_TORCHRUN)),
    ],
    "Open MPI": [
        Run(two("openmpi-.*", openmpi, **MPI, parents=(LAUNCHER, SHELL))),
        Run(two("openmpi-.*", lambda rank: openmpi(rank, 585760769), **MPI, parents=(NEXT_LAUNCHER, SHELL))),
        Run(two("openmpi-.*", lambda rank: {**batch(85), **openmpi(rank, 7)}, **MPI, parents=(LAUNCHER, SHELL))),
    ],
    "Open MPI on two hosts": [
        Run(
            [
                Session(
                    "openmpi-.*",
                    rank,
                    # mpirun runs its far daemons by srun, in a step that the ranks beside it are not in
                    {**(srun(86, 0, tasks=1) if rank else batch(86)), **openmpi(rank, 9, local_size=1)},
                    host=f"node{rank}",
                    launcher="openmpi",
                    world_size=2,
                    local_rank=0,
                )
                for rank in (0, 1)
            ]
        )
    ],
    "Open MPI, the same explicit job id": [
        Run(two("exp", openmpi, launcher="openmpi", parents=(LAUNCHER,), arguments=EXP), series="exp"),
        Run(
            two("exp", openmpi, launcher="openmpi", parents=(NEXT_LAUNCHER,), arguments=EXP, attempt=(0, 1)),
            series="exp",
        ),
    ],
    "MPICH": [
        Run(two("pmi-.*", mpich, launcher="pmi", parents=(LAUNCHER, SHELL), **BY_PROCESS)),
        Run(two("pmi-.*", mpich, launcher="pmi", parents=(NEXT_LAUNCHER, SHELL), **BY_PROCESS)),
        # by one task of a step, whose rank 0 all ranks see
        Run(
            two(
                "87-.*", lambda rank: {**srun(87, 3, tasks=1), **mpich(rank)}, launcher="pmi", parents=(LAUNCHER, SHELL)
            )
        ),
    ],
    "srun --mpi=pmi2": [
        Run(
            two(
                "88[.]1",
                lambda rank: {**srun(88, 1, rank), "PMI_RANK": str(rank), "PMI_SIZE": "2", "PMI_JOBID": "88.1"},
                launcher="pmi",
                sources={"local_rank": "SLURM_LOCALID"},
            )
        )
    ],
    "Kubernetes indexed job": [
        Run(
            two(
                "digits",
                lambda rank: {"HOSTNAME": f"digits-{rank}", "JOB_COMPLETION_INDEX": str(rank), "WORLD_SIZE": "2"},
                launcher="kubernetes",
                local_rank=0,
                sources={"job_id": "HOSTNAME", "rank": "JOB_COMPLETION_INDEX", "world_size": "WORLD_SIZE"},
            ),
            series="digits",
        ),
        Run(  # the Job again, with the same volume
            two(
                "digits",
                lambda rank: {
                    "HOSTNAME": f"digits-{rank}",
                    "JOB_COMPLETION_INDEX": str(rank),
                    "STEPSPAN_WORLD_SIZE": "2",
                },
                launcher="kubernetes",
                local_rank=0,
                attempt=(0, 1),
                sources={"world_size": "STEPSPAN_WORLD_SIZE"},
            ),
            series="digits",
        ),
    ],
    "Kubernetes indexed job on the host's network": [
        Run(
            two(
                "kubernetes-.*",
                lambda rank: {"HOSTNAME": f"metal{rank}", "JOB_COMPLETION_INDEX": str(rank), "WORLD_SIZE": "2"},
                launcher="kubernetes",
                local_rank=0,
                may_merge=True,
            )
        )
    ],
    "Kubeflow PyTorchJob": [
        Run(two("digits", pytorch_job, launcher="kubeflow", local_rank=0), series="digits"),
        Run(two("digits", pytorch_job, launcher="kubeflow", local_rank=0, attempt=(0, 1)), series="digits"),
    ],
    "Ray, two local clusters and two trials": [
        Run(two("01000000-.*", lambda rank: ray(rank, 37311), launcher="ray", parents=(LAUNCHER,))),
        Run(two("01000000-.*", lambda rank: ray(rank, 37311), launcher="ray", parents=(NEXT_LAUNCHER,))),
        Run(two("01000000-.*", lambda rank: ray(rank, 40001), launcher="ray", parents=(LAUNCHER,))),
    ],
    "env://, two shells": [
        Run(
            two(
                "env-.*",
                lambda rank: {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "12355"},
                launcher="env",
                parents=(shell,),
            )
        )
        for shell in (SHELL, NEXT_SHELL)
    ],
    "env://, twice in one shell: a second attempt": [
        Run(
            two(
                "env-.*",
                lambda rank: {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
                launcher="env",
                attempt=(0, attempt),
            ),
            series="shell",
        )
        for attempt in (0, 1)
    ],
    "ranks by argument: mp.spawn, from two parents": [
        Run(
            [
                Session("ranks-.*", rank, {}, {"rank": rank, "world_size": 2}, (parent, SHELL), world_size=2)
                for rank in (0, 1)
            ]
        )
        for parent in (LAUNCHER, NEXT_LAUNCHER)
    ],
    "ranks by STEPSPAN_*, the same explicit job id": [
        Run(
            [
                Session(
                    "exp",
                    rank,
                    {"STEPSPAN_JOB_ID": "exp", "STEPSPAN_RANK": str(rank), "STEPSPAN_WORLD_SIZE": "2"},
                    host=f"node{rank}",
                    parents=(Process(500 + rank, "5000"),),
                    world_size=2,
                    attempt=(0, attempt),
                    sources={"job_id": "STEPSPAN_JOB_ID", "rank": "STEPSPAN_RANK", "world_size": "STEPSPAN_WORLD_SIZE"},
                )
                for rank in (0, 1)
            ],
            series="exp",
        )
        for attempt in (0, 1)
    ],
    "a forked worker": [
        Run(
            [
                *two("torchrun-.*", torchrun, **TORCHRUN),
                *(Session("torchrun-.*", 0, torchrun(0), **TORCHRUN, world_size=2, worker=number) for number in (3, 4)),
            ]
        ),
    ],
}


def resolved(session: Session, boot_id: str, journal: Counter[tuple[str, int]], token: str) -> Identity:
    facts = HostFacts(session.host, boot_id, session.parents, "/home/me/train.py", NOW, token)
    identity = resolve(
        session.arguments,
        session.env,
        facts,
        earlier_sessions=lambda job, rank: journal[job, rank],
        ordinal=lambda job, name: session.ordinal,
    )
    return identity if session.worker is None else identity.for_worker(session.worker)


def resolved_rows() -> dict[str, list[tuple[Run, list[Identity]]]]:
    """Each row with hosts and a journal of its own, into which the ranks of a run go together."""
    tokens = (f"{number * 2654435761 % 2**32:08x}" for number in count(1))
    rows: dict[str, list[tuple[Run, list[Identity]]]] = {}
    for name, runs in ROWS.items():
        journal: Counter[tuple[str, int]] = Counter()
        rows[name] = []
        for run in runs:
            identities = [resolved(session, name, journal, next(tokens)) for session in run.sessions]
            journal.update((each.job_id, each.rank) for each in identities if not each.role)
            rows[name].append((run, identities))
    return rows


RESOLVED = resolved_rows()


@pytest.mark.parametrize("row", ROWS)
def test_each_session_knows_who_it_is(row: Any) -> None:
    for run, identities in RESOLVED[row]:
        for session, identity in zip(run.sessions, identities, strict=True):
            assert re.fullmatch(session.job, identity.job_id)
            assert identity.rank == session.rank
            assert identity.world_size == session.world_size
            assert identity.local_rank == (session.rank if session.local_rank is None else session.local_rank)
            assert identity.attempt == session.attempt
            assert identity.launcher == session.launcher
            assert identity.group == session.group
            assert identity.sources.items() >= session.sources.items()
            assert identity.may_merge == session.may_merge == any("may merge" in text for text in identity.warnings)
            assert len(identity.warnings) == session.may_merge
            assert re.fullmatch("[0-9a-f]{32}", identity.run_key)


@pytest.mark.parametrize("row", ROWS)
def test_ranks_of_a_run_share_key_and_job_and_no_series(row: Any) -> None:
    for _, identities in RESOLVED[row]:
        assert len({identity.run_key for identity in identities}) == 1
        assert len({identity.job_id for identity in identities}) == 1
        assert len({identity.instance for identity in identities}) == len(identities)


def test_different_runs_share_no_key_and_no_series() -> None:
    """Across all rows. Series only where runs continue a job, or were given one job id."""
    runs = [(row, run, identities) for row, runs in RESOLVED.items() for run, identities in runs]
    for (row, run, identities), (other_row, other, others) in combinations(runs, 2):
        assert {each.run_key for each in identities}.isdisjoint(each.run_key for each in others), (row, other_row)
        series = {(each.job_id, each.instance) for each in identities}
        shared = series & {(each.job_id, each.instance) for each in others}
        if run.series and run.series == other.series:
            assert shared == series, (row, other_row)  # a restart goes on in the same series
        elif not {"digits", "exp"} & {run.series, other.series}:
            assert not shared, (row, other_row)


def test_a_worker_has_series_of_its_own() -> None:
    _, identities = RESOLVED["a forked worker"][0]
    assert [each.instance.removeprefix(each.job_id) for each in identities] == ["-0", "-1", "-0-worker3", "-0-worker4"]


def who(
    env: Any = None, /, *, ordinal: int = 0, earlier: int = 0, parents: Any = (SHELL,), **arguments: Any
) -> Identity:
    facts = HostFacts("node1", "boot", parents, "train.py", NOW, "0123456789ab")
    return resolve(
        arguments, env or {}, facts, earlier_sessions=lambda job, rank: earlier, ordinal=lambda job, name: ordinal
    )


@pytest.mark.parametrize("field_name", ["job_id", "rank", "local_rank", "world_size", "attempt"])
def test_argument_before_variable_before_launcher_for_each_field_by_itself(field_name: str) -> None:
    env = {**torchrun(1, "launched"), "WORLD_SIZE": "100", "TORCHELASTIC_RESTART_COUNT": "1"}
    told = {"job_id": "launched", "rank": 1, "local_rank": 1, "world_size": 100, "attempt": (0, 1)}
    variable = f"STEPSPAN_{field_name.upper()}"

    def values(identity: Identity) -> dict[str, Any]:
        return {name: getattr(identity, name) for name in told}

    def as_given(number: int) -> Any:
        return {"job_id": str(number), "attempt": (number, 1)}.get(field_name, number)

    assert values(who(env)) == told
    by_variable = who({**env, variable: "42"})
    assert values(by_variable)[field_name] == as_given(42)
    assert by_variable.sources[field_name].startswith(variable)
    by_argument = who({**env, variable: "42"}, **{field_name: "43" if field_name == "job_id" else 43})  # type: ignore[arg-type]
    assert values(by_argument)[field_name] == as_given(43)
    assert by_argument.sources[field_name].startswith("argument")
    others = told.keys() - {field_name} - ({"local_rank"} if field_name == "rank" else set())
    assert all(values(by_argument)[name] == told[name] for name in others)


def test_a_blank_variable_is_unset() -> None:
    identity = who({"STEPSPAN_RANK": " ", "STEPSPAN_JOB_ID": "", "RANK": "", "WORLD_SIZE": "2", "SLURM_JOB_ID": ""})
    assert (identity.launcher, identity.rank, identity.world_size) == ("none", 0, 1)
    assert identity.warnings == ()


@pytest.mark.parametrize("given", [12345, np.int64(12345), np.uint8(7), -1])
def test_a_whole_number_is_a_job_id(given: Any) -> None:
    assert who(job_id=given).job_id == str(int(given))


def numbered(*runs: dict[str, Any], env: Any = None) -> dict[Any, Identity]:
    """The runs of one process in the order of their start, by name."""
    used: Counter[tuple[str, str | None]] = Counter()

    def ordinal(job: str, name: str | None) -> int:
        used[job, name] += 1
        return used[job, name] - 1

    facts = HostFacts("node1", "boot", (SHELL,), "train.py", NOW, "0123456789ab")
    return {
        run.get("name"): resolve(
            {"job_id": run.get("job_id")}, env or {}, facts, earlier_sessions=lambda job, rank: 0, ordinal=ordinal,
            name=run.get("name"), in_order=run.get("in_order", True),
        )
        for run in runs
    }  # fmt: skip


def test_ranks_agree_on_the_runs_of_threads_in_whatever_order_these_start_them() -> None:
    runs = [{"name": name, "in_order": False} for name in ("a", "b", "c")]
    ranks = [numbered(*order, env=torchrun(rank, "job")) for rank, order in enumerate((runs, runs[::-1]))]
    for name in "abc":
        first, second = (rank[name] for rank in ranks)
        assert (first.job_id, first.run_key) == (second.job_id, second.run_key)
    assert len({identity.run_key for identity in ranks[0].values()}) == 3
    assert all(identity.warnings == () for rank in ranks for identity in rank.values())


def test_runs_of_threads_without_a_name_are_warned_of_where_ranks_have_to_agree() -> None:
    runs: list[dict[str, Any]] = [{"name": None, "in_order": False}] * 2
    assert "give each a name" in numbered(*runs, env=torchrun(0, "job"))[None].warnings[0]
    alone = {**torchrun(0, "job"), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert numbered(*runs, env=alone)[None].warnings == ()


def test_runs_of_one_process_have_job_ids_of_their_own_in_the_order_of_their_start() -> None:
    env = {"SLURM_JOB_ID": "7", **torchrun(0, "job"), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    runs = [{"name": name, "in_order": False} for name in ("a", "b", "c")]
    assert [identity.job_id for identity in numbered(*runs, env=env).values()] == ["job", "job-2", "job-3"]
    runs = [{"name": name} for name in ("a", "b")]
    assert [each.job_id for each in numbered(*runs, env=torchrun(0, "job")).values()] == ["job", "job-2"]


def test_ranks_agree_on_runs_of_one_explicit_job_id_by_their_names() -> None:
    runs = [{"name": name, "job_id": "exp"} for name in ("a", "b")]
    ranks = [numbered(*order, env=torchrun(rank, "job")) for rank, order in enumerate((runs, runs[::-1]))]
    assert all(ranks[0][name].run_key == ranks[1][name].run_key for name in "ab")
    assert ranks[0]["a"].run_key != ranks[0]["b"].run_key


def test_any_job_id_is_kept_as_given() -> None:
    for job_id in ("a/b", "..", "C:\\x", " padded ", "x" * 300, "größe-😀", "a\nb"):
        assert who(job_id=job_id).job_id == job_id


def test_integers_of_numpy_are_integers() -> None:
    class Int64:
        def __index__(self) -> int:
            return 1

    assert who(rank=Int64(), world_size=2).rank == 1


def test_the_attempt_that_was_given_is_trusted_more_than_the_journal() -> None:
    first, again = (
        who(job_id="exp", rank=0, world_size=2, attempt=0, earlier=5),
        who(job_id="exp", rank=0, world_size=2, attempt=1),
    )
    assert (first.attempt, again.attempt) == ((0, 0), (1, 0))
    assert first.run_key != again.run_key


def test_in_place_restarts_count_beside_the_attempt_that_was_given() -> None:
    first, again = who(torchrun(0), attempt=0), who(torchrun(0, restarts=1), attempt=0)
    assert again.attempt == (0, 1)
    assert first.run_key != again.run_key


def test_without_a_visible_launcher_one_host_is_as_uncertain_as_many() -> None:
    assert who(torchrun(0), parents=()).may_merge


@pytest.mark.parametrize(
    ("script", "begin"), [("", "python"), ("-c", "python"), ("/a b/fit.v2.py", "fit.v2"), ("fit", "fit")]
)
def test_a_generated_job_id_begins_with_the_script(script: str, begin: str) -> None:
    facts = HostFacts("node1", "boot", (), script, NOW, "0123456789ab")
    identity = resolve({}, {}, facts, earlier_sessions=lambda job, rank: 0)
    assert identity.job_id == f"{begin}-20261121T020000-012345"


BAD = {
    "rank is a string": ({"rank": "3"}, {}, "rank='3': give a whole number from 0"),
    "rank is a boolean": ({"rank": True, "world_size": 2}, {}, "rank=True: give a whole number"),
    "rank is a float": ({"rank": 1.0, "world_size": 2}, {}, "rank=1.0: give a whole number"),
    "rank is a type": ({"rank": int, "world_size": 2}, {}, "rank=<class 'int'>: give a whole number"),
    "rank is negative": ({"rank": -1, "world_size": 2}, {}, "rank=-1: give a whole number from 0"),
    "rank is too large": ({"rank": 2**31, "world_size": 2}, {}, "rank=2147483648: give a whole number"),
    "rank at world size": (
        {"rank": 2, "world_size": 2},
        {},
        "rank=2: ranks count from 0 and stay below the world size",
    ),
    "rank at a launcher's world size": ({"rank": 2}, torchrun(0), r"rank=2: .* which is 2 \(WORLD_SIZE\)"),
    "rank without world size": ({"rank": 1}, {}, r"rank=1: give world_size as well \(or STEPSPAN_WORLD_SIZE\)"),
    "world size without rank": ({"world_size": 2}, {}, r"world_size=2: give rank as well \(or STEPSPAN_RANK\)"),
    "world size below a launcher's rank": (
        {"world_size": 1},
        torchrun(1),
        r"world_size=1: .* above the rank, 1 \(RANK\)",
    ),
    "world size of none": ({"world_size": 0}, {}, "world_size=0: give a whole number from 1"),
    "local rank at world size": ({"local_rank": 1}, {}, "local_rank=1: local ranks count from 0 and stay below"),
    "local rank is negative": ({"local_rank": -1}, {}, "local_rank=-1: give a whole number from 0"),
    "attempt is negative": ({"attempt": -1}, {}, "attempt=-1: give a whole number from 0"),
    "attempt is a pair": ({"attempt": (1, 0)}, {}, r"attempt=\(1, 0\): give a whole number from 0"),
    "STEPSPAN_RANK is a word": ({}, {"STEPSPAN_RANK": "abc"}, "STEPSPAN_RANK='abc': give a whole number from 0"),
    "STEPSPAN_RANK is negative": ({}, {"STEPSPAN_RANK": "-1"}, "STEPSPAN_RANK='-1': give a whole number"),
    "STEPSPAN_RANK at world size": ({"world_size": 2}, {"STEPSPAN_RANK": "2"}, "STEPSPAN_RANK=2: ranks count from 0"),
    "STEPSPAN_RANK alone": ({}, {"STEPSPAN_RANK": "1"}, "STEPSPAN_RANK=1: give world_size as well"),
    "STEPSPAN_WORLD_SIZE alone": ({}, {"STEPSPAN_WORLD_SIZE": "2"}, "STEPSPAN_WORLD_SIZE=2: give rank as well"),
    "STEPSPAN_WORLD_SIZE is zero": (
        {},
        {"STEPSPAN_WORLD_SIZE": "0"},
        "STEPSPAN_WORLD_SIZE='0': give a whole number from 1",
    ),
    "STEPSPAN_LOCAL_RANK at world size": ({}, {"STEPSPAN_LOCAL_RANK": "1"}, "STEPSPAN_LOCAL_RANK=1: local ranks count"),
    "STEPSPAN_ATTEMPT is 1_0": ({}, {"STEPSPAN_ATTEMPT": "1_0"}, "STEPSPAN_ATTEMPT='1_0': give a whole number"),
    "job id is blank": ({"job_id": " "}, {}, "job_id=' ': give a string that is not blank"),
    "job id is a fraction": (
        {"job_id": 7.5},
        {},
        "job_id=7.5: give a string that is not blank and can be written as UTF-8, or a whole number",
    ),
    "job id is a truth value": ({"job_id": True}, {}, "job_id=True: give a string"),
    "job id is half an emoji": ({"job_id": "\ud83d"}, {}, "job_id='.*': give a string .* UTF-8"),
    "group is a number": ({"group": 7}, {}, "group=7: give a string"),
}


@pytest.mark.parametrize(("arguments", "env", "message"), BAD.values(), ids=BAD.keys())
def test_what_the_user_said_wrongly_is_refused_with_field_value_and_fix(arguments: Any, env: Any, message: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        who(env, **arguments)
    assert caught.value.field in message


# A variable of ours that a launcher's contradict, which may be right on another machine: what is said, rank and size.
CONTRADICTED = {
    "world size": (
        {**torchrun(1), "STEPSPAN_WORLD_SIZE": "1"}, "STEPSPAN_WORLD_SIZE=1: it is not above RANK=1: ignored", (1, 2)
    ),
    "rank": ({**torchrun(0), "STEPSPAN_RANK": "2"}, "STEPSPAN_RANK=2: it is not below WORLD_SIZE=2: ignored", (0, 2)),
    "local rank": (
        {**torchrun(0), "STEPSPAN_LOCAL_RANK": "7"},
        "STEPSPAN_LOCAL_RANK=7: it is not below WORLD_SIZE=2: ignored",
        (0, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("env", "message", "found"), CONTRADICTED.values(), ids=CONTRADICTED)
def test_a_variable_that_a_launcher_contradicts_is_ignored_with_a_warning(env: Any, message: Any, found: Any) -> None:
    identity = who(env)
    assert message in identity.warnings
    assert (identity.rank, identity.world_size) == found


def test_quotes_around_a_variable_are_none_of_it() -> None:
    identity = who({name: f'"{value}"' for name, value in torchrun(1).items()})
    assert (identity.rank, identity.world_size, identity.launcher) == (1, 2, "torchrun")
    assert identity.warnings == ()


MALFORMED = {
    "rank is a word": ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK='abc' is not a whole number: ignored"),
    "rank is negative": ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a whole number: ignored"),
    "rank at size": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2: ignored"),
    "size is zero": ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not below WORLD_SIZE=0: ignored"),
    "size is 1e3": ({"RANK": "0", "WORLD_SIZE": "1e3"}, "WORLD_SIZE='1e3' is not a whole number: ignored"),
    "no size": (
        {"RANK": "1"},
        (
            "RANK=1, but nothing gives the world size: taken for a run of one process; "
            "if it is not, give STEPSPAN_RANK and STEPSPAN_WORLD_SIZE"
        ),
    ),
    "torchrun's": ({**torchrun(0), "RANK": "x"}, "RANK='x' is not a whole number: ignored"),
}


@pytest.mark.parametrize(("env", "warning"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_launcher_that_speaks_nonsense_is_ignored_with_one_warning(env: Any, warning: Any) -> None:
    identity = who(env)
    assert (identity.launcher, identity.rank, identity.world_size) == ("none", 0, 1)
    assert identity.warnings == (warning,)


def test_the_next_launcher_is_asked_when_one_speaks_nonsense() -> None:
    identity = who({**openmpi(1), "OMPI_COMM_WORLD_RANK": "9", **srun(1, 0, 1)})
    assert (identity.launcher, identity.job_id, identity.rank) == ("slurm", "1.0", 1)
    assert identity.warnings == ("OMPI_COMM_WORLD_RANK=9 is not below OMPI_COMM_WORLD_SIZE=2: ignored",)


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("LOCAL_RANK", "x", "LOCAL_RANK='x' is not a whole number: ignored"),
        ("LOCAL_RANK", "2", "LOCAL_RANK=2 is not below the world size 2: ignored"),
        ("TORCHELASTIC_RESTART_COUNT", "x", "TORCHELASTIC_RESTART_COUNT='x' is not a whole number: ignored"),
        ("SLURM_RESTART_COUNT", "x", "SLURM_RESTART_COUNT='x' is not a whole number: ignored"),
    ],
)
def test_one_wrong_detail_does_not_cost_the_rank(name: str, value: str, warning: str) -> None:
    identity = who({**torchrun(1), name: value})
    assert (identity.launcher, identity.rank, identity.local_rank, identity.attempt) == ("torchrun", 1, 1, (0, 0))
    assert identity.warnings == (warning,)


NAMES = sorted(
    {
        name
        for row in LAUNCHERS
        for text in (row.mark, row.rank, row.size, row.local_rank, row.local_size, row.agents, row.restarts, row.unique)
        for name in (text or "").split()
    }
    | {"HOSTNAME", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PTY_PORT"}
    | {f"STEPSPAN_{name}" for name in ("JOB_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "ATTEMPT")}
    | {"KUBERNETES_SERVICE_HOST", "SLURM_ARRAY_JOB_ID"}
)
VALUES = st.one_of(st.integers(-2, 5).map(str), st.integers().map(str), st.text(st.characters(), max_size=8))


@given(st.dictionaries(st.sampled_from(NAMES), VALUES), st.integers(0, 2))
def test_every_environment_gives_an_identity_or_a_config_error(env: Any, ordinal: Any) -> None:
    try:
        identity = who(env, ordinal=ordinal)
    except ConfigError:
        return
    assert 0 <= identity.rank < identity.world_size
    assert 0 <= identity.local_rank < identity.world_size
    assert min(identity.attempt) >= 0
    assert identity.job_id.strip()
    assert identity.instance.encode()


# --- the Resource -----------------------------------------------------------------------------------------------------

RANK_1 = who(torchrun(1, "resnet"))
OURS = {
    "service.name": "training",
    "service.instance.id": "resnet-1",
    "job_id": "resnet",
    "rank": 1,
    "local_rank": 1,
    "world_size": 2,
    "host.name": "node1",
}


def test_resource() -> None:
    assert resource_attributes(RANK_1, {}) == (OURS, ())


@pytest.mark.parametrize(
    ("env", "arguments", "name"),
    [
        ({}, {}, "training"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=attributes"}, {}, "attributes"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name="}, {}, "training"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=a", "OTEL_SERVICE_NAME": "variable"}, {}, "variable"),
        ({"OTEL_SERVICE_NAME": "variable"}, {"resource": {"service.name": "resource"}}, "resource"),
        ({"OTEL_SERVICE_NAME": "v"}, {"resource": {"service.name": "r"}, "service_name": "argument"}, "argument"),
    ],
)
def test_service_name(env: dict[str, Any], arguments: dict[str, Any], name: str) -> None:
    attributes, warnings = resource_attributes(RANK_1, env, **arguments)
    assert (attributes["service.name"], warnings) == (name, ())


def test_the_users_attributes_come_after_the_environments() -> None:
    env = {"OTEL_RESOURCE_ATTRIBUTES": " team=vision ,host.name=metal%2D7,note=a%3Db=c%20d,discount=5%,zone="}
    attributes, warnings = resource_attributes(RANK_1, env, resource={"team": "audio", "gpus": [0, 1], "beta": True})
    assert attributes == {
        **OURS,
        "team": "audio",
        "host.name": "metal-7",
        "note": "a=b=c d",
        "discount": "5%",
        "zone": "",
        "gpus": [0, 1],
        "beta": True,
    }
    assert warnings == ()


def test_nobody_overrides_which_job_and_rank_it_is() -> None:
    env = {"OTEL_RESOURCE_ATTRIBUTES": "rank=7,service.instance.id=pod-7,job_id=resnet"}
    attributes, warnings = resource_attributes(RANK_1, env, resource={"world_size": 9})
    assert attributes == OURS
    assert sorted(warnings) == [
        "resource attribute rank='7' ignored: it is 1 here",
        "resource attribute service.instance.id='pod-7' ignored: it is 'resnet-1' here",
        "resource attribute world_size=9 ignored: it is 2 here",
    ]


def test_a_malformed_pair_costs_that_pair() -> None:
    attributes, warnings = resource_attributes(RANK_1, {"OTEL_RESOURCE_ATTRIBUTES": "nonsense,=x,bad=%ff,team=vision,"})
    assert attributes == {**OURS, "team": "vision"}
    assert [text.split("'")[1] for text in warnings] == ["nonsense", "=x", "bad=%ff"]


def test_plain_values_leave_enums_and_subclasses_behind() -> None:
    class Tier(str, Enum):
        GOLD = "gold"

    class Float64(float):
        pass

    attributes, _ = resource_attributes(
        RANK_1, {}, resource={"tier": Tier.GOLD, "share": Float64(0.5), "list": ("a", Tier.GOLD)}
    )
    assert [(type(attributes[key]), attributes[key]) for key in ("tier", "share")] == [(str, "gold"), (float, 0.5)]
    assert attributes["list"] == ["a", "gold"]
    assert type(attributes["list"][1]) is str


@pytest.mark.parametrize(
    "value", [None, {}, {"a": 1}, object(), b"x", 2**63, float("nan"), [1, "a"], [1, True], [None], [[1]], {1}, 1j]
)
def test_an_attribute_that_opentelemetry_has_no_type_for_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^resource\['team'\]=.*: give a string, boolean, 64-bit integer"):
        resource_attributes(RANK_1, {}, resource={"team": value})


@pytest.mark.parametrize("arguments", [{"service_name": ""}, {"service_name": 3}, {"resource": {"service.name": 3}}])
def test_a_service_name_is_a_string(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^service_name="):
        resource_attributes(RANK_1, {}, **arguments)


@pytest.mark.parametrize("key", ["", 3, None])
def test_an_attribute_key_is_a_string(key: int | str | None) -> None:
    with pytest.raises(ConfigError, match=r"^resource key="):
        resource_attributes(RANK_1, {}, resource={key: 1})  # type: ignore[dict-item]


# --- the host ---------------------------------------------------------------------------------------------------------


def test_host_facts_of_this_process() -> None:
    facts, again = host_facts(), host_facts()
    assert facts.host
    assert facts.boot_id
    assert facts.ancestors[0].pid == os.getppid()
    assert facts.ancestors == again.ancestors
    assert facts.token != again.token
    assert facts.now_ns <= again.now_ns


def test_psutil_sees_the_same_ancestors() -> None:
    assert [each.pid for each in _from_psutil(frozenset())] == [each.pid for each in host_facts().ancestors]


def test_a_wrapper_around_a_rank_is_not_its_launcher() -> None:
    """Two ranks in a shell each: the key agrees although their parents differ."""
    script = """
import os
from stepspan.identity import host_facts, resolve
print(os.getppid(), resolve({}, os.environ, host_facts(), earlier_sessions=lambda job, rank: 0).run_key)
"""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PATH": os.environ["PATH"], "SECRET": "s3cret"}
    command = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, script]
    answers = [
        subprocess.run(command, env={**env, "RANK": rank}, capture_output=True, text=True, check=True).stdout.split()
        for rank in ("0", "1")
    ]
    assert answers[0][0] != answers[1][0]
    assert answers[0][1] == answers[1][1]


def test_only_the_names_of_marks_are_kept_of_other_environments() -> None:
    script = "from stepspan.identity import host_facts; print(host_facts())"
    env = {"RANK": "0", "SECRET": "s3cret", "PATH": os.environ["PATH"]}
    command = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, script]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert "marks=frozenset({'RANK'})" in shown
    assert "SECRET" not in shown


def test_importing_identity_is_cheap() -> None:
    code = "import sys, stepspan.identity; print({'pydantic', 'opentelemetry', 'psutil'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
