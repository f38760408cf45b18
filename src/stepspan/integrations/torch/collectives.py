"""How long a rank waits for others in PyTorch's DDP and FSDP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from sys import modules
from typing import TYPE_CHECKING, Any, TypeVar

from stepspan.integrations.torch.times import NOT_YET, DeviceTimer, HostTimer, Timer
from stepspan.recording.scopes import Scope

if TYPE_CHECKING:
    from stepspan.run import Run

T = TypeVar("T")


def watch_collectives(model: Any, run: Run | None = None) -> None:
    """Time how long a rank waits for others, as a span and in `training.step.wait`. `run`: the current one.

    The rank with the least wait is the one that the others wait for. On CUDA what begins and ends a wait are events of
    the streams, resolved off the training thread.

    DDP (`DistributedDataParallel`), span "all_reduce": from where this rank hands over its last bucket of gradients,
    when its backward pass has nothing else to do, until all buckets are reduced. That is the communication that
    computing does not hide. The model gets a communication hook that all-reduces as DDP does without; one that has a
    hook of its own keeps it by `model.register_comm_hook(state, watched(hook))` instead.

    FSDP (`fully_shard`), span "collectives", one in a step: the time that all of the step's all-gathers and
    reduce-scatters take together, from where the device gets to one until all ranks have done it, whether computing
    hides it or not. A rank that computes more slowly than others comes late to each, and waits in none. The modules get
    communications that do as FSDP's own; whoever wants others (`set_custom_all_gather`, symmetric memory) sets them
    afterwards, and has those not timed.

    What is not timed: collectives elsewhere, such as SyncBatchNorm, the all-reduce between FSDP's replicas (HSDP), or
    your own. Put `run.span("all_gather", collective=True)` around those that wait, with `cuda=True` on a GPU.

    Raises TypeError where the model is neither (the older `FullyShardedDataParallel` has nowhere to measure),
    RuntimeError where DDP has a hook already, AttributeError where torch is too old to let FSDP's communications be
    set, and ValueError where a module's parameters lie on several meshes.
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
    steps = Steps(run)
    for module in shards:
        module.set_custom_all_gather(AllGather(steps))
        module.set_custom_reduce_scatter(ReduceScatter(steps))


# ------------------------------------------------------------------------------------------------------------- a wait


class DetachedSpan(Scope):
    """Begins in one thread and ends in another."""

    __slots__ = ()
    detached = True


class Wait:
    """A span that is a wait for other ranks, from now on. `timer`: what it is timed by; None: its own two ends."""

    def __init__(self, run: Run, name: str, inside: Scope | None, timer: Timer | None) -> None:
        told = {"cuda": True} if timer is not None else {}
        self.timer = timer
        self._scope = DetachedSpan(run.recorder.scopes, "span", {**NOT_YET, "name": name, "collective": True, **told})
        self._scope.parent = inside
        run.recorder.scopes.begin(self._scope)

    def end(self) -> None:
        """Until now."""
        home = self._scope.session
        self._scope.owner.end(self._scope, None)
        if self.timer is not None:
            self.timer.follow(self._scope.seq, home)


def recording(given: Run | None) -> Run | None:
    """The run that records, if any."""
    from stepspan.start import current_run

    run = given or current_run()
    return run if run.recorder.active else None


def device_timer(run: Run, tensor: Any) -> Timer | None:
    """That of a tensor's device; None where the host is its device."""
    return DeviceTimer(run, modules["torch"].cuda) if tensor.device.type == "cuda" else None


def failed(run: Run | None, error: Exception) -> None:
    """Tell of what must not reach the training."""
    if run is not None:
        run.warn_once("collectives", f"the wait for other ranks is not timed: {error!r}")


# ----------------------------------------------------------------------------------------------------------------- DDP


def watched(hook: Callable[[Any, Any], Any], run: Run | None = None) -> Callable[[Any, Any], Any]:
    """A DDP communication hook that does what `hook` does, and is timed as `watch_collectives` says."""
    watch = Watch()

    def timed(state: Any, bucket: Any) -> Any:
        nonlocal watch
        if bucket.index() == 0:  # the first one; of a pass before, which may have failed, nothing is left over
            watch = Watch()
        watch.launch(bucket, run)
        return hook(state, bucket).then(watch.arrived)

    # DDP checks both, and does not take them for what `from __future__ import annotations` makes of them.
    torch = modules["torch"]
    timed.__annotations__ = {
        "state": Any, "bucket": torch.distributed.GradBucket, "return": torch.futures.Future[torch.Tensor]
    }  # fmt: skip
    return timed


class Watch:
    """The buckets of one backward pass."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._missing = 0
        """Buckets that are on their way."""
        self._wait: Wait | None = None

    def launch(self, bucket: Any, given: Run | None) -> None:
        """A bucket is handed over."""
        with self._lock:
            self._missing += 1
        if bucket.is_last():
            run = None
            try:
                run = recording(given)
                if run is not None:
                    timer = device_timer(run, bucket.buffer())
                    if timer is not None:
                        timer.mark()
                    self._wait = Wait(run, "all_reduce", run.recorder.scopes.innermost(), timer)
            except Exception as error:
                failed(run, error)

    def arrived(self, future: Any) -> Any:
        """A bucket has been reduced: DDP goes on only after this."""
        with self._lock:
            self._missing -= 1
            wait = self._wait if self._missing == 0 else None
            if wait is not None:
                self._wait = None
        if wait is not None:  # on CUDA the current stream, which DDP's future has given us, waits for the reduction
            if wait.timer is not None:
                wait.timer.mark()
            wait.end()
        return future.value()


# ---------------------------------------------------------------------------------------------------------------- FSDP


class Steps:
    """The collectives of one model: a wait for each step in which there are any."""

    def __init__(self, run: Run | None) -> None:
        self._given = run
        self._step: Scope | None = None
        self._wait: Wait | None = None

    def timed(self, tensor: Any, call: Callable[[], T]) -> T:
        """What `call` gives, which communicates `tensor`."""
        timer = self._timer(tensor)
        if timer is None:
            return call()
        timer.mark()
        try:
            return call()
        finally:
            timer.mark()

    def _timer(self, tensor: Any) -> Timer | None:
        run = None
        try:
            run = recording(self._given)
            step = None if run is None else run.recorder.scopes.innermost()
            while step is not None and step.tag != "step":
                step = step.parent
            if run is None or step is None:
                return None
            if self._wait is None or step is not self._step:
                wait = Wait(run, "collectives", step, device_timer(run, tensor) or HostTimer(run))
                self._step, self._wait = step, wait
                step.on_exit += (wait.end,)
            return self._wait.timer
        except Exception as error:
            failed(run, error)
            return None


class Communication:
    """Does as FSDP's own does. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html describes it."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Any:
        """A tensor to communicate from, or to."""
        return modules["torch"].empty(*size, dtype=dtype, device=device)


class AllGather(Communication):
    """Parameters, before they are used."""

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        """The work, if `async_op`, which nobody times: who waits for it does so elsewhere."""

        def call() -> Any:
            gather = modules["torch"].distributed.all_gather_into_tensor
            return gather(output_tensor, input_tensor, group=group, async_op=async_op)

        return call() if async_op else self._steps.timed(input_tensor, call)


class ReduceScatter(Communication):
    """Gradients, once they are known."""

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        """The same."""

        def call() -> Any:
            scatter = modules["torch"].distributed.reduce_scatter_tensor
            return scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)

        return call() if async_op else self._steps.timed(input_tensor, call)
