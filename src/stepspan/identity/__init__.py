"""Who this process is: a launcher's variables -> job, rank, attempt -> the OpenTelemetry Resource.

Each field by itself comes from the first of these that has it: the argument; STEPSPAN_JOB_ID, _RANK, _LOCAL_RANK,
_WORLD_SIZE, _ATTEMPT; the first row of `LAUNCHERS` whose variables hold rank and size; a default. `Identity.sources`
says which. A blank variable counts as unset. To add a launcher, see `stepspan.identity.launchers`.

Promise: all ranks of a launch get one `run_key` without talking to each other, and no two launches share one, not even
under one explicit job id. Of several runs in a process each has its own: they are counted under their job id and name,
so that ranks agree in whatever order their threads start them. Two runs share a series (job id and instance) only where
their job id was given, or where a restart continues a job. Where several hosts have only an address and a port in
common this cannot be kept: then `may_merge` is set, and a warning says what to give.

Wrong arguments and STEPSPAN_* variables raise `ConfigError`. Wrong variables of a launcher, which no user has set, are
ignored with a warning. Everything here is a pure function but `host_facts`, which reads what the others are given.
"""

from __future__ import annotations

from stepspan.identity.host import HostFacts, Process, host_facts
from stepspan.identity.launchers import LAUNCHERS, Launcher
from stepspan.identity.resolution import Identity, resolve
from stepspan.identity.resource import resource_attributes

__all__ = ["LAUNCHERS", "HostFacts", "Identity", "Launcher", "Process", "host_facts", "resolve", "resource_attributes"]
