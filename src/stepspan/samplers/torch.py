"""PyTorch's allocator of GPU memory, once the training has initialised CUDA; never imports torch or initialises CUDA.

One `memory` event for each GPU that this process holds memory of, and the allocator's retries and failures. It reads
only counters that the allocator keeps: no GPU waits.
https://docs.pytorch.org/docs/stable/generated/torch.cuda.memory.memory_stats.html
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from stepspan.samplers.sampling import CumulativeSum, Emit, Observation, Sampler

COUNTERS = {
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
    "active": "active_bytes.all.current",
    "inactive": "inactive_split_bytes.all.current",
}
"""Counter of a `memory` event (bytes) -> its name in `torch.cuda.memory_stats`."""
SUMS = {"training.memory.alloc_retries": "num_alloc_retries", "training.memory.ooms": "num_ooms"}
"""Metric -> the counter that it sums up, for each `device_id`."""


def torch(local_rank: int, emit: Emit) -> Sampler:
    """Open the sampler of torch's allocator in this process.

    Args:
        local_rank: Not used: all GPUs that the process has memory of are sampled.
        emit: Takes the `memory` events.

    """
    cumulative = CumulativeSum()

    def observe(now: float) -> Iterator[Observation]:
        module = sys.modules.get("torch")
        if module is None or getattr(module.__spec__, "_initializing", False):  # the main thread is importing it
            return
        cuda = module.cuda
        if not cuda.is_initialized():
            return
        for device in range(cuda.device_count()):
            stats = cuda.memory_stats(device)
            if stats.get("reserved_bytes.all.peak"):
                counters = {name: stats[key] for name, key in COUNTERS.items() if key in stats}
                emit({"ts": 0, "seq": 0, "tag": "memory", "device_id": device, "counters": counters})
                for name, key in SUMS.items():
                    yield name, cumulative((name, device), stats.get(key, 0)), {"device_id": device}

    return Sampler("torch", {"allocator": observe})
