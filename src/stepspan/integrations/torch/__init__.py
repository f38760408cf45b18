"""PyTorch: values and times of a GPU without waiting for it, and the wait for other ranks in DDP and FSDP.

Nothing here imports torch: who has a tensor or a model has imported it.
"""

from stepspan.integrations.torch.collectives import watch_collectives, watched

__all__ = ["watch_collectives", "watched"]
