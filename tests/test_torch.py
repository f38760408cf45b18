"""With the real PyTorch, on the CPU: its scalars, its streams' interface, and the wait for other ranks in DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import runs
from harness.runs import events

import stepspan
from stepspan.integrations.torch import watch_collectives, watched
from stepspan.recording.device_copies import PinnedBuffer
from stepspan.run import Run
from stepspan.testing import Recording, recorded_run

torch = pytest.importorskip("torch", reason="needs torch")
dist = torch.distributed
start = runs.start
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=["0-d", "one element", "1 x 1"])
def test_a_tensor_of_one_element_is_its_number(start: Callable[..., Run], dtype: str, shape: tuple[int, ...]) -> None:
    run = start()
    run.log_metrics({"x": torch.ones(shape, dtype=getattr(torch, dtype))})
    assert [event["metrics"] for event in events(run, "metrics")] == [{"x": 1.0}]


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.tensor(0.5, requires_grad=True),
        lambda: torch.nn.Parameter(torch.tensor([0.5])),
        lambda: torch.tensor(0.25, requires_grad=True) * 2,
        lambda: torch.nn.functional.mse_loss(torch.zeros(2, requires_grad=True), torch.tensor([0.0, 1.0])),
    ],
    ids=["leaf", "parameter", "product", "loss"],
)
def test_a_gradient_is_left_alone(start: Callable[..., Run], tensor: Callable[[], Any]) -> None:
    run = start()
    value = tensor()
    run.log_metrics({"x": value})
    assert [event["metrics"] for event in events(run, "metrics")] == [{"x": 0.5}]
    value.sum().backward()


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2), torch.tensor(1j), torch.empty(0), torch.empty((), device="meta"), torch.zeros(2, device="meta")],
    ids=["two elements", "complex", "empty", "on no device", "two on no device"],
)
def test_anything_else_is_counted(start: Callable[..., Run], tensor: Any) -> None:
    run = start()
    run.log_metrics({"x": tensor, "y": 1.0})
    assert run.flush()
    assert events(run, "metrics")[0]["metrics"]["y"] == 1.0
    assert sum(run.stats()["warnings"].values()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_through_streams_keep_what_was_logged(dtype: str) -> None:
    """`torch.cpu` has the interface of `torch.cuda`: what is launched is done at once."""
    place = PinnedBuffer(torch, torch.device("cpu"), torch.cpu, pinned=False)
    tensors = [torch.tensor(number, dtype=getattr(torch, dtype)) for number in (0, 1)]
    copies = [place.copy(tensors), place.copy(tensors[:1])]
    for tensor in tensors:
        tensor.fill_(1)
    assert [copy.numbers() for copy in copies] == [[0, 1], [0]]


def test_the_place_for_copies_is_used_again() -> None:
    place = PinnedBuffer(torch, torch.device("cpu"), torch.cpu, pinned=False)
    rows = len(place._free)
    with torch.inference_mode():
        for _ in range(3):
            copies = [place.copy([torch.tensor(1.0)]) for _ in range(rows)]
            with pytest.raises(RuntimeError, match="too many"):
                place.copy([torch.tensor(1.0)])
            assert all(copy.numbers() == [1.0] for copy in copies)
            del copies


# ------------------------------------------------------------------------------------------------------ DDP


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model(**options: Any) -> Any:
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    return torch.nn.parallel.DistributedDataParallel(layers, **options)


def train(recording: Recording, ddp: Any, steps: int = 3) -> None:
    for number in range(steps):
        with recording.run.step(number), recording.run.span("backward"):
            ddp(torch.ones(2, 64)).sum().backward()


@pytest.mark.parametrize("bucket_cap_mb", [25, 0.01], ids=["one bucket", "many buckets"])
def test_the_wait_of_a_backward_pass_is_a_collective_span_and_the_steps_wait(alone: None, bucket_cap_mb: float) -> None:
    with recorded_run() as recording:
        ddp = model(bucket_cap_mb=bucket_cap_mb)
        watch_collectives(ddp)
        train(recording, ddp)
        assert recording.run.stats()["warnings"] == {}
    waits = recording.spans("all_reduce")
    assert [span.attributes["collective"] for span in waits] == [True] * 3
    assert {span.parent_id for span in waits} == {span.span_id for span in recording.spans("backward")}
    assert len(recording.values("training.step.wait")) == 3
    assert [span.name for span in recording.spans() if span.error] == []


def test_the_watched_gradients_are_those_of_ddp(alone: None) -> None:
    plain, seen = model(), model()
    seen.load_state_dict(plain.state_dict())
    watch_collectives(seen)
    for ddp in (plain, seen):
        ddp(torch.ones(2, 64)).sum().backward()
    for one, other in zip(plain.parameters(), seen.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_steps_without_synchronisation_have_no_wait(alone: None) -> None:
    with recorded_run() as recording:
        ddp = model()
        watch_collectives(ddp, recording.run)
        with ddp.no_sync():
            train(recording, ddp, 1)
    assert recording.spans("all_reduce") == []


def test_a_hook_of_ones_own_is_watched_too(alone: None) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    with recorded_run() as recording:
        ddp = model()
        ddp.register_comm_hook(None, watched(bf16_compress_hook))
        train(recording, ddp)
    assert len(recording.spans("all_reduce")) == 3
    with pytest.raises(RuntimeError, match="register_comm_hook"):
        watch_collectives(ddp)


def test_without_a_run_nothing_is_recorded_and_training_goes_on(alone: None) -> None:
    ddp = model()
    watch_collectives(ddp)
    stepspan.current_run().close()
    ddp(torch.ones(2, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in ddp.parameters())


def test_a_pass_that_failed_leaves_nothing_behind(alone: None) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    with recorded_run() as recording:
        hook = watched(allreduce_hook)
        failing, well = model(bucket_cap_mb=0.01), model(bucket_cap_mb=0.01)
        for ddp in (failing, well):
            ddp.register_comm_hook(None, hook)
        failing.module[0].weight.register_hook(lambda grad: 1 / 0)  # the last gradient: other buckets are on their way
        with pytest.raises(ZeroDivisionError):
            train(recording, failing)
        train(recording, well)
    assert len(recording.values("training.step.wait")) == 3


def test_what_cannot_be_watched_is_named() -> None:
    with pytest.raises(TypeError, match=r"model=Linear: neither a DistributedDataParallel nor .* collective=True"):
        watch_collectives(torch.nn.Linear(1, 1))
