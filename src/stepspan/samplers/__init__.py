"""Samplers: what the host, the process and its GPU do, every 10 s. `stepspan.start_run` starts them.

`Settings.samplers` names those wanted of host, process, gpu and torch, `Settings.sample_interval` the seconds between
two samples. Local rank 0 samples the host; every rank samples itself and the GPU that is its own.
"""

from __future__ import annotations

from stepspan.samplers.sampling import Absent, Gone, Sampling, Source, sampled_by, start_sampling

__all__ = ["Absent", "Gone", "Sampling", "Source", "sampled_by", "start_sampling"]
