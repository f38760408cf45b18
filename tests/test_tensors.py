"""Values that are tensors: numbers at once where they are, and later, with the call's time, where a device computes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from harness import runs
from harness.events_of import MS, START, SessionEvents, by_series, key_of, mapper, restored, values
from harness.processes import until
from harness.runs import events
from harness.scripted_torch import Bucket, Gpu, JaxArray
from hypothesis import given, settings
from hypothesis import strategies as st

from stepspan.integrations.torch import AllGather, ReduceScatter, StepWaits, watched
from stepspan.mapping import point_buffer
from stepspan.recording import deferred as tensors
from stepspan.recording import device_copies
from stepspan.run import Run
from stepspan.testing import recorded_run

start = runs.start


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The machine has one, and torch is at work on it."""
    found = Gpu()
    monkeypatch.setitem(sys.modules, "torch", found.torch)
    monkeypatch.setattr(device_copies, "_buffers", {})
    monkeypatch.setattr(tensors, "POLL_INTERVAL_S", 0.001)
    return found


@pytest.fixture
def run(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(tensors, "DRAIN_TIMEOUT_S", 0.05)  # a GPU that a test leaves behind
    return start(name="tensors")


def lines(run: Run) -> list[dict[str, Any]]:
    return [event["metrics"] for event in events(run, "metrics")]


def arrived(run: Run) -> list[dict[str, Any]]:
    """The values in the lines that came later, once nothing is on its way."""
    until(lambda: not run._recorder.deferring)
    return [event["metrics"] for event in events(run, "metrics") if "at" in event]


# ------------------------------------------------------------------------------------------------------ at once


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.int64(7), 7.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (np.array([[3]]), 3.0),
        (np.float64("nan"), "NaN"),
        (np.array(-np.inf), "-Infinity"),
        (np.ma.array([0.5], mask=[False]), 0.5),
        (JaxArray(0.5, ready=True), 0.5),
    ],
    ids=["float32", "float16", "int64", "bool", "0-d", "one element", "NaN", "infinity", "not masked", "jax, ready"],
)
def test_an_array_of_one_element_is_its_number(run: Run, value: Any, number: Any) -> None:
    run.log_metrics({"x": value})
    assert lines(run) == [{"x": number}]
    assert run.stats()["warnings"] == {}
    assert run._recorder.background_tasks == [] or not any(  # type: ignore[union-attr]
        isinstance(one, tensors.DeferredMetrics)
        for one in run._recorder.background_tasks  # type: ignore[union-attr]
    )


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.zeros(2), "metric x=[0. 0.]: not a number"),
        (np.array("0.5x"), "metric x=0.5x: not a number"),
        (np.array(1j), "metric x=1j: not a number"),
        (np.ma.masked, "metric x=--: not a number: masked"),
        (np.ma.array([0.5], mask=[True]), "metric x=[--]: not a number: masked"),
        (JaxArray(0.5, shape=(2,)), "metric x=JaxArray of shape (2,): not a number: not one element"),
        (Gpu().tensor(0.5, 0.6), "metric x=Tensor of shape (2,): not a number: not one element"),
    ],
    ids=[
        "two elements",
        "text",
        "complex",
        "masked",
        "an array that is masked",
        "jax, two elements",
        "torch, two elements",
    ],
)
def test_anything_else_is_counted_and_the_rest_of_the_call_is_kept(
    run: Run, value: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "stepspan"):
        run.log_metrics({"x": value, "y": 1.0})
    assert lines(run) == [{"y": 1.0}]
    assert run.stats()["warnings"] == {"value": 1}
    assert told in caplog.messages[0]


# ------------------------------------------------------------------------------------------------------ later


def test_a_value_on_a_gpu_is_written_later_with_the_time_and_step_of_its_call(run: Run, gpu: Gpu) -> None:
    loss = gpu.tensor(0.5)
    with run.epoch(0), run.step(7, split="val"):
        run.log_metrics({"loss": loss, "lr": 0.1})
        loss.add_(1.0)  # what comes next on the stream does not change what was logged
    assert lines(run) == [{"loss": None, "lr": 0.1}], "what is known is as durable as ever"
    gpu.catch_up()
    assert arrived(run) == [{"loss": 0.5}]
    call, later = events(run, "metrics")
    assert (later["at"], later["step"], later["split"]) == (call["ts"], 7, "val")
    assert gpu.waits == []


def test_the_training_thread_only_launches(run: Run, gpu: Gpu) -> None:
    for number in range(100):
        with run.step(number):
            run.log_metrics({"loss": gpu.tensor(float(number)), "norm": gpu.tensor(1.0)})
    assert len(gpu.queue) == 200, "a copy and an event for each call, whatever the number of its values"
    gpu.catch_up()
    assert arrived(run) == [{"loss": float(number), "norm": 1.0} for number in range(100)]
    assert gpu.waits == []
    assert run.stats()["warnings"] == {}


def test_calls_are_written_in_their_order_and_none_before_it_has_arrived(run: Run, gpu: Gpu) -> None:
    array = JaxArray(1.0, ready=False)
    run.log_metrics({"a": array})
    run.log_metrics({"b": gpu.tensor(2.0)})
    gpu.catch_up()
    assert array.copying
    assert not run.flush(0.05), "flush() says that something is on its way"
    assert not any("at" in event for event in events(run, "metrics"))
    array.ready = True
    assert arrived(run) == [{"a": 1.0}, {"b": 2.0}]
    assert run.flush()


def test_a_jax_array_that_is_donated_to_the_next_step_arrives_all_the_same(run: Run) -> None:
    state = JaxArray(1.0)
    run.log_metrics({"loss": state})
    state.donated = True
    state.ready = True
    assert arrived(run) == [{"loss": 1.0}]
    assert run.stats()["warnings"] == {}


def test_a_late_value_that_is_no_number_costs_itself_and_nothing_else(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    loss, bad, alone = JaxArray(1.0), JaxArray(1j), JaxArray(2j)
    run.log_metrics({"loss": loss, "bad": bad})
    run.log_metrics({"bad": alone})
    loss.ready = bad.ready = alone.ready = True
    assert arrived(run) == [{"loss": 1.0}]
    assert run.stats()["warnings"] == {"value": 2}
    assert "metric bad=1j: not a number" in caplog.messages[0]


def test_later_values_of_a_key_wait_behind_the_one_on_its_way_and_others_do_not(run: Run, gpu: Gpu) -> None:
    run.log_metrics({"loss": gpu.tensor(1.0)}, split="train")
    run.log_metrics({"loss": 2.0, "lr": 0.1}, split="train")
    run.log_metrics({"train/loss": 3.0, "train_loss": gpu.tensor(3.5)}, split="val")
    run.log_metrics({"train_loss": 3.75}, split="test")
    run.log_metrics({"loss": 4.0}, split="val")
    assert lines(run) == [
        {"loss": None},
        {"loss": None, "lr": 0.1},
        {"train/loss": 3.0, "train_loss": None},
        {"train_loss": None},
        {"loss": 4.0},
    ]
    gpu.catch_up()
    assert arrived(run) == [{"loss": 1.0}, {"loss": 2.0}, {"train_loss": 3.5}, {"train_loss": 3.75}]
    run.log_metrics({"loss": 5.0}, split="train")
    assert lines(run)[-1] == {"loss": 5.0}


def test_a_gpu_that_fails_costs_its_values_and_nothing_else(run: Run, gpu: Gpu) -> None:
    run.log_metrics({"loss": gpu.tensor(1.0)})
    run.log_metrics({"loss": 2.0})
    gpu.fails = RuntimeError("CUDA error: device-side assert triggered")
    assert arrived(run) == [{"loss": 2.0}]
    assert run.stats()["warnings"] == {"late": 1}


def test_a_value_logged_while_a_graph_is_captured_is_counted(run: Run, gpu: Gpu) -> None:
    gpu.capturing = True
    run.log_metrics({"loss": gpu.tensor(1.0), "lr": 0.1})
    gpu.capturing = False
    assert lines(run) == [{"loss": None, "lr": 0.1}]
    assert run.stats()["warnings"] == {"value": 1}
    assert gpu.queue == gpu.queue.__class__()


def test_the_end_of_a_run_waits_for_the_gpu_within_bounds(run: Run, gpu: Gpu) -> None:
    run.log_metrics({"loss": gpu.tensor(1.0)})
    gpu.catch_up()
    run.log_metrics({"loss": gpu.tensor(2.0), "norm": gpu.tensor(2.0)})
    run.log_metrics({"loss": 3.0})
    run.close()
    assert [event["metrics"] for event in events(run, "metrics") if "at" in event] == [{"loss": 1.0}, {"loss": 3.0}]
    assert run.stats()["warnings"] == {"late": 2}


def test_more_than_may_be_on_their_way_are_lost_and_counted(
    run: Run, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "MAX_DEFERRED", 3)
    for number in range(5):
        run.log_metrics({"loss": gpu.tensor(float(number)), "lr": 0.1})
    gpu.catch_up()
    assert arrived(run) == [{"loss": 0.0}, {"loss": 1.0}, {"loss": 2.0}]
    assert [line["lr"] for line in lines(run) if "lr" in line] == [0.1] * 5
    assert run.stats()["warnings"] == {"late": 2}


def test_a_distributed_tensor_in_parts_is_not_gathered(run: Run, gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    def placed(*replicated: bool) -> Any:
        tensor: Any = gpu.tensor(1.0)
        tensor.placements = [type("Placement", (), {"is_replicate": lambda self, r=r: r})() for r in replicated]
        tensor.to_local = lambda: gpu.tensor(2.0)
        return tensor

    run.log_metrics({"norm": placed(True, True)})
    run.log_metrics({"loss": placed(True, False)})
    gpu.catch_up()
    assert arrived(run) == [{"norm": 2.0}]
    assert run.stats()["warnings"] == {"value": 1}
    assert "log its full_tensor(), which all ranks must call" in caplog.text


def test_a_device_without_streams_is_read_by_the_thread_that_resolves(run: Run, gpu: Gpu) -> None:
    class Mps(type(gpu.tensor(0.0))):  # type: ignore[misc]
        def tolist(self) -> Any:
            return self._values

    gpu.torch.stack = lambda tensors: Mps(gpu, [tensor._values[0] for tensor in tensors], (len(tensors),), "mps")
    run.log_metrics({"loss": gpu.tensor(0.5, kind="mps")})
    assert arrived(run) == [{"loss": 0.5}]


def test_values_that_arrive_are_no_sign_that_training_goes_on(run: Run, gpu: Gpu) -> None:
    run.log_metrics({"loss": gpu.tensor(1.0)})
    before = run._pipeline.journal.session.seq - run._recorder.background_events  # type: ignore[union-attr]
    gpu.catch_up()
    arrived(run)
    assert run._pipeline.journal.session.seq - run._recorder.background_events == before  # type: ignore[union-attr]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_waits_for_nothing_of_its_parent(run: Run, gpu: Gpu) -> None:
    run.log_metrics({"loss": gpu.tensor(1.0)})
    child = os.fork()
    if not child:
        run.log_metrics({"loss": 2.0})
        run.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    gpu.catch_up()
    assert arrived(run) == [{"loss": 1.0}]
    (theirs,) = (path for name, path in runs.sessions(run._pipeline.journal.directory).items() if name != "0")  # type: ignore[union-attr]
    assert [event["metrics"] for event in events(theirs, "metrics")] == [{"loss": 2.0}]


# ------------------------------------------------------------------------------------------------------ points


def test_points_have_the_time_of_the_call_and_the_steps_number_once(gpu: Gpu) -> None:
    with recorded_run() as recording:
        for number in range(3):
            with recording.run.step(number):
                recording.run.log_metrics({"loss": gpu.tensor(float(number)), "lr": 0.1})
        gpu.catch_up()
        until(lambda: not recording.run._recorder.deferring)
    points = {
        name: [ts for _, ts, value in recording.points(name) if value is not None]
        for name in ("training.loss", "training.lr", "training.step.number")
    }
    assert points["training.loss"] == points["training.lr"] == points["training.step.number"]
    assert recording.values("training.loss") == [0.0, 1.0, 2.0]
    assert recording.values("training.step.number") == [0.0, 1.0, 2.0]


def late(s: SessionEvents, values: dict[str, Any], at: int, after: float = 0.001, **fields: Any) -> int:
    return s.metrics(values, after, at=at, **fields)


def test_a_late_value_whose_call_is_in_no_line_of_its_session_comes_with_its_own_line() -> None:
    s = SessionEvents()
    late(s, {"early": 1.0}, at=START - 10**9)
    late(s, {"ahead": 1.0}, at=START + 10**12)
    points = by_series(s.records("metrics"))
    assert points["training.early", ("split", "train")] == [(0.001, 1.0)]
    assert points["training.ahead", ("split", "train")] == [(0.002, 1.0)]


def test_late_values_have_the_milliseconds_of_their_calls() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0, "n": 1.0}, 0.001)
    for number in (2.0, 3.0, 4.0):
        s.metrics({"loss": None, "n": number}, 1e-4)
    first = s.events[-3:]
    s.metrics({"n": 5.0}, 0.01)
    for number, call in zip((2.0, 3.0, 4.0), first, strict=True):
        late(s, {"loss": number}, at=call["ts"], **({"call": call["seq"]} if number > 2 else {}))
    points = by_series(s.records("metrics"))
    assert points["training.loss", ("split", "train")] == [(0.001, 1.0), (0.002, 2.0), (0.003, 3.0), (0.004, 4.0)]
    assert points["training.n", ("split", "train")] == [
        *((0.001, 1.0), (0.002, 2.0), (0.003, 3.0), (0.004, 4.0), (0.0113, 5.0))
    ]


def test_a_value_from_the_session_before_takes_no_other_call_for_its_own() -> None:
    s = SessionEvents()
    s.metrics({"loss": None}, 0.001)
    own = s.events[-1]
    late(s, {"loss": 1.0}, at=START - 10**9, call=own["seq"])
    late(s, {"loss": 2.0}, at=own["ts"], call=own["seq"])
    assert values(s.records("metrics"), "training.loss") == [1.0, 2.0]


KEYS = st.sampled_from(["loss", "lr", "val/loss", "a.b"])
CALLS = st.lists(
    st.tuples(
        st.sampled_from([1e-5, 3e-4, 0.001, 0.02, 11.0]),
        st.dictionaries(KEYS, st.booleans(), min_size=1, max_size=3),  # whether it is a device's
        st.booleans(),  # whether it has a step
        st.lists(st.booleans(), max_size=2),  # collectives of a step before it, and whether they are a device's
        st.integers(0, 4),  # how many of those on their way arrive then
    ),
    max_size=25,
)


@st.composite
def sessions(draw: st.DrawFn) -> SessionEvents:
    """Calls as a run writes them: a key on its way keeps its later values behind it."""
    s = SessionEvents()
    s.header["not_before"] = START + draw(st.sampled_from([0, 5 * MS, 12 * 10**9]))
    s.run()
    way: list[tuple[Any, dict[str, float]] | int] = []
    named = draw(st.booleans())  # as journals of schema 1.0 do not

    def arrive(count: int) -> None:
        for known in way[:count]:
            if isinstance(known, int):
                s.emit("device_time", 1e-5, begin=known, seconds=float(known) if known % 5 else None)
            else:
                late(s, known[1], known[0]["ts"], 1e-5, **{"call": known[0]["seq"]} if named else {})
        del way[:count]

    for number, (after, keys, stepped, collectives, arriving) in enumerate(draw(CALLS)):
        if collectives:
            step = s.emit("step_begin", after, parent=0, step=number, split="train")
            for device in collectives:
                cuda = {"cuda": True} if device else {}
                span = s.emit("span_begin", after, parent=step, name="all_reduce", collective=True, **cuda)
                s.emit("span_end", after, begin=span)
                way += [span] * device
            arrive(arriving // 2)
            s.emit("step_end", after, begin=step)
        waiting = {key for known in way if isinstance(known, tuple) for key in known[1]}
        behind = {key for key, device in keys.items() if device or key in waiting}
        s.metrics(
            {key: None if key in behind else float(number) for key in keys},
            after,
            **{"step": number} if stepped else {},
        )
        if behind:
            way.append((s.events[-1], dict.fromkeys(behind, float(number))))
        arrive(arriving)
    arrive(len(way))
    return s


@settings(deadline=None, max_examples=200)
@given(s=sessions(), lead=st.sampled_from([2, 10_000]))
def test_late_points_keep_each_series_in_order_whatever_the_batches(s: SessionEvents, lead: int) -> None:
    with patch.object(point_buffer, "MAX_LEAD_MS", lead):
        compare_batches(s)


def compare_batches(s: SessionEvents) -> None:
    whole = mapper("metrics", s.header)
    records = [*whole.map(s.events), *whole.finish(s.closed())]
    expected = [(key_of(series), ts, value) for series, ts, value in records]
    fold, found, begin = mapper("metrics", s.header), [], 0
    times = [event["ts"] // MS for event in s.events]
    cuts = [place for place in range(1, len(times)) if times[place] != times[place - 1]]
    for end in [*cuts, len(s.events)]:
        fold = restored("metrics", s.header, fold.state())
        found += [(key_of(series), ts, value) for series, ts, value in fold.map(s.events[begin:end])]
        begin = end
    fold = restored("metrics", s.header, fold.state())
    found += [(key_of(series), ts, value) for series, ts, value in fold.finish(s.closed())]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert (fold.filtered, fold.thinned) == (whole.filtered, whole.thinned)
    for points in (expected, found):
        last: dict[Any, int] = {}
        for series, ts, _ in points:
            assert ts // MS > last.get(series, 0), series
            last[series] = ts // MS


# ------------------------------------------------------------------------------------------------------ spans


def test_a_span_is_timed_on_the_device(gpu: Gpu) -> None:
    with recorded_run() as recording:
        with recording.run.step(0), recording.run.span("forward", cuda=True):
            gpu.catch_up()
            gpu.now += 0.25
        gpu.catch_up()
        until(lambda: not recording.run._recorder.deferring)
    assert recording.values("training.phase.device_time", phase="forward") == [pytest.approx(0.25)]
    (point,) = (ts for _, ts, value in recording.points("training.phase.device_time") if value is not None)
    (end,) = (ts for _, ts, value in recording.points("training.phase.time") if value is not None)
    assert point == end, "at the time at which the span ended"
    assert recording.values("training.step.wait") == [], "it was no wait"
    assert gpu.waits == []


def test_the_wait_of_a_collective_is_the_devices_and_stands_at_the_end_of_its_step(gpu: Gpu) -> None:
    with recorded_run() as recording:
        run = recording.run
        for number, seconds in enumerate([0.25, 0.5]):
            with run.step(number):
                for _ in range(2):
                    with run.span("all_reduce", collective=True, cuda=True):
                        gpu.catch_up()
                        gpu.now += seconds
        with run.step(2), run.span("barrier", collective=True):
            pass
        gpu.catch_up()
        until(lambda: not run._recorder.deferring)
    waits = recording.values("training.step.wait")
    assert waits[:2] == [pytest.approx(0.5), pytest.approx(1.0)]
    assert 0 < waits[2] < 0.1
    ends = [ts for _, ts, value in recording.points("training.step.time") if value is not None]
    assert [ts for _, ts, value in recording.points("training.step.wait") if value is not None] == ends


def test_a_device_time_that_never_came_takes_its_steps_wait_along_and_no_other() -> None:
    s = SessionEvents()
    spans = []
    for number in range(3):
        step = s.emit("step_begin", parent=0, step=number, split="train")
        spans.append(s.emit("span_begin", parent=step, name="all_reduce", collective=True, cuda=True))
        s.emit("span_end", begin=spans[-1])
        s.emit("step_end", begin=step)
    s.emit("device_time", begin=spans[0], seconds=0.5)
    s.emit("device_time", begin=spans[1], seconds=None)
    s.emit("device_time", begin=spans[2], seconds=0.25)
    points = by_series(s.records("metrics"))
    assert [value for _, value in points["training.step.wait", ("split", "train")]] == [0.5, 0.25]
    assert [value for _, value in points["training.phase.device_time", ("phase", "all_reduce")]] == [0.5, 0.25]


@pytest.mark.parametrize("torch", [None, "without CUDA"], ids=["no torch", "no CUDA"])
def test_without_cuda_the_host_is_timed_and_it_is_said_once(
    gpu: Gpu, torch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.torch.cuda.is_initialized = lambda: False
    if torch is None:
        monkeypatch.delitem(sys.modules, "torch")
    with recorded_run() as recording:
        for number in range(2):
            with recording.run.step(number), recording.run.span("all_reduce", collective=True, cuda=True):
                pass
        assert recording.run.stats()["warnings"] == {"cuda": 2}
    assert len(recording.values("training.step.wait")) == 2
    assert recording.values("training.phase.device_time") == []
    assert len([message for message in caplog.messages if "timed on the host" in message]) == 1


def test_a_failing_gpu_does_not_reach_the_training(gpu: Gpu) -> None:
    gpu.torch.cuda.Event = lambda **_: 1 / 0
    with recorded_run() as recording:
        with recording.run.step(0), recording.run.span("all_reduce", collective=True, cuda=True):
            pass
        until(lambda: not recording.run._recorder.deferring)
        assert recording.run.stats()["warnings"] == {"cuda": 2}
    assert len(recording.values("training.phase.time", phase="all_reduce")) == 1
    assert recording.values("training.step.wait") == []


def test_the_wait_in_ddp_is_from_the_last_launch_to_the_last_arrival_on_the_device(gpu: Gpu) -> None:
    hook = watched(lambda state, bucket: bucket)
    with recorded_run() as recording:
        run = recording.run
        for number in range(2):
            buckets = [Bucket(gpu, one, 3) for one in range(3)]
            with run.step(number), run.span("backward"):
                for bucket in buckets:
                    gpu.now += 10.0  # computing
                    hook(None, bucket)
                gpu.catch_up()  # the device gets to the last launch
                gpu.now += 0.5
                for bucket in (buckets[2], buckets[0], buckets[1]):
                    bucket.complete()
                gpu.now += 0.25
            gpu.catch_up()
        until(lambda: not run._recorder.deferring)
    assert recording.values("training.step.wait") == [pytest.approx(0.75)] * 2
    assert recording.values("training.phase.device_time", phase="all_reduce") == [pytest.approx(0.75)] * 2
    assert gpu.waits == []


def test_a_hook_that_a_thread_of_torch_calls_records_to_the_run_that_it_was_made_in(gpu: Gpu) -> None:
    """A thread of C++ code has no current run, and several are open."""
    made = watched(lambda state, bucket: bucket)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(len, "").result()
        with recorded_run(job_id="a") as a, recorded_run(job_id="b") as b:
            hook = watched(lambda state, bucket: bucket)
            for number, (recording, call) in enumerate(((b, hook), (a, made))):  # the other was made in no run
                with recording.run.step(number):
                    bucket = Bucket(gpu, 0, 1)
                    thread.submit(call, None, bucket).result()
                    gpu.catch_up()
                    bucket.complete()
                gpu.catch_up()
            until(lambda: not any(each.run._recorder.deferring for each in (a, b)))
    assert [len(each.spans("all_reduce")) for each in (a, b)] == [1, 1]


def test_the_wait_in_fsdp_is_what_all_collectives_of_a_step_take_on_the_device(gpu: Gpu) -> None:
    def collective(*tensors: Any, group: Any, async_op: bool, **_: Any) -> None:
        gpu.queue.append(lambda: setattr(gpu, "now", gpu.now + group))

    gpu.torch.distributed.all_gather_into_tensor = gpu.torch.distributed.reduce_scatter_tensor = collective
    with recorded_run() as recording:
        run, x = recording.run, gpu.tensor(0.0)
        steps = StepWaits(run)
        gather, scatter = AllGather(steps), ReduceScatter(steps)
        for number in range(2):
            with run.step(number):
                with run.span("forward"):
                    gather(x, x, 0.25)
                    gpu.queue.append(lambda: setattr(gpu, "now", gpu.now + 10.0))  # computing
                    gather(x, x, 100.0, async_op=True)  # who waits for that does so elsewhere
                with run.span("backward"):
                    scatter(x, x, 0.5, "avg")
        assert recording.values("training.step.wait") == [], "the device has not got there"
        gpu.catch_up()
        until(lambda: not run._recorder.deferring)
        assert run.stats()["warnings"] == {}
    assert recording.values("training.step.wait") == [pytest.approx(0.75)] * 2
    assert recording.values("training.phase.device_time", phase="collectives") == [pytest.approx(0.75)] * 2
    assert gpu.waits == []
