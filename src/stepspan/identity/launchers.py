"""The table of launchers: which variables each gives its ranks, and what the ranks of one launch have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from stepspan.identity.variables import Text, Variables


def _run_id(env: Variables) -> Text | None:
    run_id = env.text("TORCHELASTIC_RUN_ID")
    return run_id if run_id and run_id.value != "none" else None


def _indexed_job(env: Variables) -> Text | None:
    """An indexed Job's pod has the host name `<job>-<index>`, unless its template says otherwise."""
    job, _, index = env.get("HOSTNAME").rpartition("-")
    return Text(job, "HOSTNAME") if job and index == env.get("JOB_COMPLETION_INDEX") else None


def _pytorch_job(env: Variables) -> Text | None:
    """A PyTorchJob's pods are `<job>-master-0` and `<job>-worker-<n>`."""
    pod = re.fullmatch(r"(.+)-(?:master|worker)-[0-9]+", env.get("HOSTNAME"))
    return Text(pod[1], "HOSTNAME") if pod else None


@dataclass(frozen=True, slots=True)
class Launcher:
    """A row: which variables a launcher gives its ranks, and what the ranks of one launch have in common."""

    name: str
    mark: str  # set in its ranks and in wrappers around them, not in the launcher itself; the row needs it set
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""
    job: Callable[[Variables], Text | None] = lambda _: None  # the job's name
    agents: str = ""  # how many processes started the ranks; a SLURM step of as many tasks is this launch, and names it
    must_name: bool = False  # the row applies only where job or step have a name
    restarts: str | None = None  # counts restarts; "" where the scheduler does; None: nobody but the journal
    unique: str = ""  # equal on all ranks, and any one of them on no other launch
    shared: str = ""  # equal on all ranks, but maybe on other launches as well
    batch: str = "SLURM_JOB_ID"  # names the job around it, if all ranks see it (ssh would not carry it)
    master: bool = True  # MASTER_ADDR and MASTER_PORT are the same on all ranks
    outlives: bool = False  # its process outlives one launch, as a shell or a daemon does


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
NO_LAUNCHER = Launcher("none", "STEPSPAN_RANK", "", "", outlives=True)
MARKS = frozenset(row.mark for row in (*LAUNCHERS, NO_LAUNCHER))
