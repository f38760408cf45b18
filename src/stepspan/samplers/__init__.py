"""Samplers: what the host, the process and its GPU do, read every 10 s beside a training.

`Settings.samplers` names the wanted ones of host, process, gpu and torch, `Settings.sample_interval` the seconds
between two samples. Local rank 0 samples the host; every rank samples its own process, its own GPU and torch's
allocator. `stepspan.start_run` starts them.
"""

from __future__ import annotations

from stepspan.samplers.sampling import Absent, Gone, Sampler, Sampling, sampled_by, start_sampling

__all__ = ["Absent", "Gone", "Sampler", "Sampling", "sampled_by", "start_sampling"]
