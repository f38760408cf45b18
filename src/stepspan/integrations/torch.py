"""PyTorch: how long a rank waits for others in DDP and FSDP. Imports no torch: who has a model has imported it.

The rank with the least wait is the one that the others wait for. On CUDA what begins and ends a wait are events of the
streams, resolved off the training thread (`stepspan.recording.cuda_spans`).

- **DDP** (`DistributedDataParallel`), span "all_reduce": from where this rank hands over its last bucket of gradients,
  when its backward pass has nothing else to do, until all buckets are reduced. That is the communication that computing
  does not hide.
- **FSDP** (`fully_shard`), span "collectives", one in a step: the time that all of the step's all-gathers and
  reduce-scatters take together, from where the device gets to one until all ranks have done it, whether computing hides
  it or not. A rank that computes more slowly than others comes late to each, and waits in none.

Collectives elsewhere are not timed: SyncBatchNorm's, the all-reduce between FSDP's replicas (HSDP), or your own. Put
`run.span("all_gather", collective=True)` around those that wait, with `cuda=True` on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from sys import modules
from typing import Any, TypeVar
from weakref import ref

from stepspan.recording.cuda_spans import SPAN_BEGIN, DeviceTimer, Timer
from stepspan.recording.recorder import Recorder
from stepspan.recording.scope import DetachedSpan, Scope
from stepspan.run import Run, current_run
from stepspan.values import error_text

T = TypeVar("T")


def watch_collectives(model: Any, run: Run | None = None) -> None:
    """Time how long a rank waits for others, as a span and in `training.step.wait` (s).

    Args:
        model: A `DistributedDataParallel`, which gets a communication hook that all-reduces as DDP does without (one
            that has a hook already keeps it by `model.register_comm_hook(state, watched(hook))` instead); or a model
            sharded by `fully_shard`, whose modules get communications that do as FSDP's own. Custom ones
            (`set_custom_all_gather`, symmetric memory) are set afterwards, and are not timed.
        run: The run to record to; by default the one that is current here, and once it has ended the one that is
            current where the model is trained.

    Raises:
        TypeError: The model is neither (the older `FullyShardedDataParallel` has nowhere to measure).
        RuntimeError: DDP has a hook already.
        AttributeError: This torch does not let FSDP's communications be set.
        ValueError: A module's parameters lie on several meshes.

    """
    torch = modules["torch"]
    if isinstance(getattr(model, "_orig_mod", model), torch.nn.parallel.DistributedDataParallel):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (  # type: ignore[import-not-found,unused-ignore]
            allreduce_hook,
        )

        model.register_comm_hook(model.process_group, watched(allreduce_hook, run))
        return
    kind = getattr(torch.distributed.fsdp, "FSDPModule", ())
    shards = [module for module in model.modules() if isinstance(module, kind)]
    if not shards:
        raise TypeError(
            f"model={type(model).__name__}: neither a DistributedDataParallel nor sharded by fully_shard; "
            "put run.span(..., collective=True) around what waits for other ranks"
        )
    waits = StepWaits(run)
    for module in shards:
        module.set_custom_all_gather(AllGather(waits))
        module.set_custom_reduce_scatter(ReduceScatter(waits))


# ------------------------------------------------------------------------------------------------------------- a wait


class Wait:
    """A span that is a wait for other ranks, from now on.

    Args:
        recorder: Of the run.
        name: Of the span.
        parent: The scope that it lies in.
        timer: What it is timed by; None: its own begin and end.

    """

    def __init__(self, recorder: Recorder, name: str, parent: Scope | None, timer: Timer | None) -> None:
        cuda = {"cuda": True} if timer is not None else {}
        self.timer = timer
        self._span = DetachedSpan(recorder.scopes, "span", {**SPAN_BEGIN, "name": name, "collective": True, **cuda})
        self._span.parent = parent
        recorder.scopes.begin(self._span)

    def end(self) -> None:
        """End the span of the wait now; its time on the device follows, if it is timed there."""
        if self.timer is not None:
            self.timer.end(self._span)
        else:
            self._span.owner.end(self._span, None)


def following(run: Run | None) -> Callable[[], Recorder | None]:
    """Find out later where to record: hooks are called by threads of torch's own, which have no current run.

    Args:
        run: The run to record to; None: the one that is current now, while it is open, else the one that is then.

    Returns:
        Gives the recorder; None where nothing is recorded.

    """
    here = ref(run or current_run())

    def active_recorder() -> Recorder | None:
        found = run or here()
        if found is None or (run is None and (found.closed or not found._recorder.active)):
            found = current_run()
        return found._recorder if found._recorder.active else None

    return active_recorder


def device_timer(recorder: Recorder, tensor: Any) -> Timer | None:
    """A timer of a tensor's device; None where the host is its device."""
    return DeviceTimer(recorder, modules["torch"].cuda) if tensor.device.type == "cuda" else None


def warn(recorder: Recorder | None, error: Exception) -> None:
    """Log what must not reach the training."""
    if recorder is not None:
        message = f"the wait for other ranks is not timed: {error_text(error)}"
        recorder.warn_once("collectives", message, key=type(error).__name__)


# ----------------------------------------------------------------------------------------------------------------- DDP


def watched(hook: Callable[[Any, Any], Any], run: Run | None = None) -> Callable[[Any, Any], Any]:
    """Make a timed DDP communication hook of another one.

    Args:
        hook: What the returned hook does.
        run: The run to record to; by default as `watch_collectives` says.

    Returns:
        A hook for `model.register_comm_hook`, timed as `watch_collectives` says.

    """
    backward, recorder = BackwardPass(), following(run)

    def timed(state: Any, bucket: Any) -> Any:
        nonlocal backward
        if bucket.index() == 0:  # the first bucket; a pass before, which may have failed, leaves nothing behind
            backward = BackwardPass()
        backward.launch(bucket, recorder)
        return hook(state, bucket).then(backward.reduced)

    # DDP checks both, and does not take them for what `from __future__ import annotations` makes of them.
    torch = modules["torch"]
    timed.__annotations__ = {
        "state": Any, "bucket": torch.distributed.GradBucket, "return": torch.futures.Future[torch.Tensor]
    }  # fmt: skip
    return timed


class BackwardPass:
    """The buckets of one backward pass."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        """Buckets that are being reduced."""
        self._wait: Wait | None = None

    def launch(self, bucket: Any, active_recorder: Callable[[], Recorder | None]) -> None:
        """Begin the wait with the last bucket that is handed over."""
        with self._lock:
            self._in_flight += 1
        if bucket.is_last():
            recorder = None
            try:
                recorder = active_recorder()
                if recorder is not None:
                    timer = device_timer(recorder, bucket.buffer())
                    if timer is not None:
                        timer.mark()
                    self._wait = Wait(recorder, "all_reduce", recorder.scopes.innermost(), timer)
            except Exception as error:
                warn(recorder, error)

    def reduced(self, future: Any) -> Any:
        """End the wait with the last bucket that has been reduced: DDP goes on only after this."""
        with self._lock:
            self._in_flight -= 1
            wait = self._wait if self._in_flight == 0 else None
            if wait is not None:
                self._wait = None
        if wait is not None:  # on CUDA the current stream, which DDP's future has given us, waits for the reduction
            if wait.timer is not None:
                wait.timer.mark()
            wait.end()
        return future.value()


# ---------------------------------------------------------------------------------------------------------------- FSDP


class StepWaits:
    """The collectives of one sharded model: a wait for each step in which there are any."""

    def __init__(self, run: Run | None) -> None:
        self._run = run
        self._active_recorder = following(run)
        self._step: Scope | None = None
        self._wait: Wait | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return StepWaits, (self._run,)

    def timed(self, tensor: Any, call: Callable[[], T]) -> T:
        """Communicate, timed.

        Args:
            tensor: What is communicated.
            call: Communicates it.

        Returns:
            What `call` returns.

        """
        timer = self._timer(tensor)
        if timer is None:
            return call()
        timer.mark()
        try:
            return call()
        finally:
            timer.mark()

    def _timer(self, tensor: Any) -> Timer | None:
        recorder = None
        try:
            recorder = self._active_recorder()
            step = None if recorder is None else recorder.scopes.innermost()
            while step is not None and step.tag != "step":
                step = step.parent
            if recorder is None or step is None:
                return None
            if self._wait is None or step is not self._step:
                wait = Wait(recorder, "collectives", step, device_timer(recorder, tensor) or Timer(recorder))
                self._step, self._wait = step, wait
                step.on_exit += (wait.end,)
            return self._wait.timer
        except Exception as error:
            warn(recorder, error)
            return None


class Communication:
    """Communicates as FSDP's own does. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html."""

    def __init__(self, waits: StepWaits) -> None:
        self._waits = waits

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Any:
        """Return an empty tensor to communicate from, or to."""
        return modules["torch"].empty(*size, dtype=dtype, device=device)

    def _call(self, collective: Callable[[], Any], tensor: Any, async_op: bool) -> Any:
        """Communicate `tensor`; an asynchronous collective is not timed, for the wait for it happens elsewhere."""
        return collective() if async_op else self._waits.timed(tensor, collective)


class AllGather(Communication):
    """Gathers parameters before they are used."""

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        """Gather; with `async_op` the work to wait for is returned."""
        gather = modules["torch"].distributed.all_gather_into_tensor
        collective = partial(gather, output_tensor, input_tensor, group=group, async_op=async_op)
        return self._call(collective, input_tensor, async_op)


class ReduceScatter(Communication):
    """Reduces gradients once they are known."""

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        """Reduce; with `async_op` the work to wait for is returned."""
        scatter = modules["torch"].distributed.reduce_scatter_tensor
        collective = partial(scatter, output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        return self._call(collective, input_tensor, async_op)
