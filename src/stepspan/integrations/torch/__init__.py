"""PyTorch: how long a rank waits for the others in DDP and FSDP. Imports no torch: who has a model has imported it."""

from __future__ import annotations

from stepspan.integrations.torch.collectives import watch_collectives, watched

__all__ = ["watch_collectives", "watched"]
