"""evsys log stores: `make_log_store({"kind": "stepspan", "params": {...}})`, or `run.as_log_store()`."""

from __future__ import annotations

from stepspan.compat.evsys.contract import LogStore
from stepspan.compat.evsys.files import JSONLLogStore
from stepspan.compat.evsys.multiplex import MultiplexLogStore
from stepspan.compat.evsys.registry import get_log_store, list_log_stores, make_log_store, register_log_store
from stepspan.compat.evsys.stepspan_store import StepspanLogStore
from stepspan.compat.evsys.tensorboard import TensorBoardLogStore
from stepspan.recording.log_store import RunLogStore

__all__ = [
    "JSONLLogStore",
    "LogStore",
    "MultiplexLogStore",
    "RunLogStore",
    "StepspanLogStore",
    "TensorBoardLogStore",
    "get_log_store",
    "list_log_stores",
    "make_log_store",
    "register_log_store",
]
