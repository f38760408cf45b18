"""Two ranks under torchrun, against a real Collector and a real Prometheus: who is slow, by a query alone."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from harness.runs import is_ours
from harness.stack import Collector, Prometheus

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("sklearn", reason="needs scikit-learn")

EXAMPLE = Path(__file__).parent.parent / "examples" / "torch_ddp.py"
SLOW_BY = 0.05
EPOCHS, STEPS = 2, 15
"""Two ranks share 1,438 digits in batches of 48."""


def torchrun(cwd: Path, *arguments: str, program: Path = EXAMPLE, **variables: str) -> str:
    """Two ranks of a program; what they printed."""
    inherited = {name: value for name, value in os.environ.items() if not is_ours(name) and name != "PYTHONPATH"}
    only_here = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, *arguments],
        cwd=cwd, env={**inherited, **only_here, **variables}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_slow_rank_is_the_one_with_the_least_wait_although_steps_take_equally_long(
    collector: Collector, prometheus: Prometheus, tmp_path: Path
) -> None:
    printed = torchrun(
        tmp_path, f"--epochs={EPOCHS}", "--slow-rank=1", f"--slow-by={SLOW_BY}",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_endpoint,
    )  # fmt: skip
    assert f"epoch {EPOCHS}/{EPOCHS}" in printed

    by_rank = partial(values_by_rank, prometheus)
    assert by_rank('count_over_time(training_step_wait_seconds{split="train"}[1h])') == {"0": 30, "1": 30}
    times = by_rank(average("training_step_time_seconds"))
    assert times["0"] == pytest.approx(times["1"], rel=0.1)
    assert min(times.values()) > SLOW_BY
    (slowest,) = by_rank(f"bottomk(1, {average('training_step_wait_seconds')})")
    assert slowest == "1"
    waits = by_rank(average("training_step_wait_seconds"))
    assert waits["0"] - waits["1"] == pytest.approx(SLOW_BY, rel=0.4)

    paces = by_rank('avg by (rank) (avg_over_time(training_throughput_per_second{item="samples"}[1h]))')
    assert paces == {rank: pytest.approx(48 / SLOW_BY, rel=0.3) for rank in times}
    assert_one_trace_a_step(collector)
    assert_all_kinds(collector)


SHARDED = """
import sys, time, torch
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
import stepspan
from stepspan.integrations.torch import watch_collectives

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def sharded():
    torch.manual_seed(7)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh, mp_policy=bfloat16)
    return model


model, plain = sharded(), sharded()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with stepspan.start_run() as run:
    watch_collectives(model)
    for each in (model, plain):  # outside of steps: nobody's wait
        each(torch.ones(2, 64)).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad.full_tensor())
    with run.step(0, split="val"), torch.no_grad():
        model(torch.ones(2, 64))
    for batch in run.steps(torch.ones(10, 2, 64)):
        loss = model(batch).sum()
        if dist.get_rank() == 1:
            time.sleep(float(sys.argv[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
dist.destroy_process_group()
"""


def test_the_slow_rank_of_a_sharded_model_waits_least_as_well(
    collector: Collector, prometheus: Prometheus, tmp_path: Path
) -> None:
    program = tmp_path / "sharded.py"
    program.write_text(SHARDED)
    torchrun(tmp_path, str(SLOW_BY), program=program, OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_endpoint)
    by_rank = partial(values_by_rank, prometheus)
    assert by_rank('count_over_time(training_step_wait_seconds{split="train"}[1h])') == {"0": 10, "1": 10}
    waits = by_rank(average("training_step_wait_seconds"))
    assert min(waits, key=waits.__getitem__) == "1"
    assert waits["0"] - waits["1"] == pytest.approx(SLOW_BY, rel=0.4)
    spans = {span["spanId"]: span for span in collector.spans()}
    parents = [spans[span["parentSpanId"]]["name"] for span in spans.values() if span["name"] == "collectives"]
    assert parents == ["training.step"] * 2 * (10 + 1), "one for each step of training and validation"


def values_by_rank(prometheus: Prometheus, query: str) -> dict[str, float]:
    return {one["metric"]["rank"]: float(one["value"][1]) for one in prometheus.query(query)}


def average(metric: str) -> str:
    return f'avg by (rank) (avg_over_time({metric}{{split="train"}}[1h]))'


def assert_one_trace_a_step(collector: Collector) -> None:
    ranks: dict[str, set[int]] = {}
    for span in collector.spans():
        if span["name"] in {"training.step", "all_reduce"} and span["resource"]["rank"] == 1:
            ranks.setdefault(span["traceId"], set()).add(1)
        elif span["name"] == "training.step":
            ranks.setdefault(span["traceId"], set()).add(0)
    assert len(ranks) == EPOCHS * (STEPS + 1), "a trace for each training and validation step"
    assert set(map(frozenset, ranks.values())) == {frozenset({0, 1})}, "which both ranks are in"


def assert_all_kinds(collector: Collector) -> None:
    """That the spans are those that the example makes, and its checkpoint is told of once."""
    spans = collector.spans()
    assert {span["name"] for span in spans} == {
        "training.run", "training.epoch", "training.step", "forward", "backward", "all_reduce", "optimizer",
        "checkpoint",
    }  # fmt: skip
    steps = {span["spanId"]: span["traceId"] for span in spans}
    backwards = {span["spanId"] for span in spans if span["name"] == "backward"}
    reduces = [span for span in spans if span["name"] == "all_reduce"]
    assert {span["parentSpanId"] for span in reduces} <= backwards
    assert all(steps[span["parentSpanId"]] == span["traceId"] for span in reduces)
    assert [log["resource"]["rank"] for log in collector.logs() if log["eventName"] == "training.artifact"] == [0]
