"""CUDA graphs that another thread captures while we ask the device how far it is."""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress
from sys import modules

RELAXED = 2
"""cudaStreamCaptureModeRelaxed"""

_thread = threading.local()


def leave_captures_alone() -> None:
    """Once for each thread that asks: a query must not spoil a CUDA graph that another thread captures.

    https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__STREAM.html: cudaThreadExchangeStreamCaptureMode
    """
    if getattr(_thread, "relaxed", False):
        return
    _thread.relaxed = True
    with suppress(AttributeError, OSError):  # no CUDA, or one that is linked in another way
        version = modules["torch"].version.cuda.partition(".")[0]
        runtime = ctypes.CDLL(f"libcudart.so.{version}")  # the one that torch has loaded
        runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))
