"""The table of launchers: which variables each gives its ranks, and what the ranks of one launch have in common.

The first row counts whose `mark` is set and whose variables hold rank and size. To add a launcher:

1. Print the environment of its ranks: two ranks, two hosts if it can, two launches, and a restart.
2. Add a `Launcher` above every row whose variables it exports, too ("env" matches almost everything).
3. `mark`, `rank`, `size` and `local_rank` are names of variables. Where several may be set, separate them by spaces,
   the preferred one first.
4. In `unique` name a variable that two launches never share; in `shared` what all ranks have but launches may share. In
   neither a variable that differs between ranks: they would get different run keys and never meet in one trace.
5. Add its environment to tests/test_identity.py, with who each rank must turn out to be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from stepspan.identity.variables import FoundText, Variables


def _run_id(env: Variables) -> FoundText | None:
    run_id = env.first_text("TORCHELASTIC_RUN_ID")
    return run_id if run_id and run_id.value != "none" else None


def _indexed_job(env: Variables) -> FoundText | None:
    """An indexed Job's pod has the host name `<job>-<index>`, unless its template says otherwise."""
    job, _, index = env.get("HOSTNAME").rpartition("-")
    return FoundText(job, "HOSTNAME") if job and index == env.get("JOB_COMPLETION_INDEX") else None


def _pytorch_job(env: Variables) -> FoundText | None:
    """A PyTorchJob's pods are `<job>-master-0` and `<job>-worker-<n>`."""
    pod = re.fullmatch(r"(.+)-(?:master|worker)-[0-9]+", env.get("HOSTNAME"))
    return FoundText(pod[1], "HOSTNAME") if pod else None


class Launcher(NamedTuple):
    """A row: which variables a launcher gives its ranks, and what the ranks of one launch have in common.

    Args:
        name: Goes into `Identity.launcher` and into generated job ids.
        mark: Variable that is set in the ranks and in wrappers around them, but not in the launcher itself.
        rank: Variables of the rank, from 0.
        size: Variables of the world size, the number of ranks.
        local_rank: Variables of the rank on its host, from 0.
        local_size: Variables of the number of ranks on this host.
        job: Gives the job's name, if the launcher has one.
        agents: Variables of how many processes started the ranks. A SLURM step of as many tasks is this launch, and
            names it.
        must_name: The row applies only where job or step have a name.
        restarts: Variables that count the launcher's restarts; "" where the scheduler does that; None where only the
            journal can tell.
        unique: Variables that are equal on all ranks, and any one of them on no other launch.
        shared: Variables that are equal on all ranks, but maybe on other launches as well.
        batch: Variable that names the job around it, if all ranks see it (ssh would not carry it).
        master: Whether MASTER_ADDR and MASTER_PORT are the same on all ranks.
        outlives: Whether its process outlives one launch, as a shell or a daemon does.

    """

    name: str
    mark: str
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""
    job: Callable[[Variables], FoundText | None] = lambda _: None
    agents: str = ""
    must_name: bool = False
    restarts: str | None = None
    unique: str = ""
    shared: str = ""
    batch: str = "SLURM_JOB_ID"
    master: bool = True
    outlives: bool = False


TASKS = "SLURM_STEP_NUMTASKS SLURM_NTASKS"

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
    Launcher("slurm", "SLURM_STEP_ID", "SLURM_PROCID", TASKS, "SLURM_LOCALID",
             agents=TASKS, must_name=True, restarts="", shared="SLURM_CLUSTER_NAME", master=False),
    # Kubernetes gives no size: the manifest does. RANK comes first for pods that start several ranks.
    Launcher("kubernetes", "JOB_COMPLETION_INDEX", "RANK JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK",
             "LOCAL_WORLD_SIZE", job=_indexed_job, master=False),
    # MASTER_ADDR is `localhost` in the master's pod and the pod's name in the others.
    Launcher("kubeflow", "KUBERNETES_SERVICE_HOST", "RANK", "WORLD_SIZE", "LOCAL_RANK",
             job=_pytorch_job, must_name=True, master=False),
    # Every new local cluster begins with job 01000000, and concurrent trials share a job: not a name for one run.
    Launcher("ray", "RAY_JOB_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
             shared="MASTER_ADDR MASTER_PORT", batch="RAY_JOB_ID", outlives=True),
    # torch's env://, DeepSpeed, and everything else that exports the same variables
    Launcher("env", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE LOCAL_SIZE",
             shared="MASTER_PORT", outlives=True),
)
# fmt: on
NO_LAUNCHER = Launcher("none", "STEPSPAN_RANK", "", "", outlives=True)
MARKS = frozenset(row.mark for row in (*LAUNCHERS, NO_LAUNCHER))
