"""Samplers beside a run: when they sample, what the host and the process say, and what they never do to training."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from harness import runs
from harness.processes import under_load, until
from harness.scripted_nvml import GPU, ScriptedNvml

import stepspan
from stepspan.errors import ConfigError
from stepspan.journal.layout import find_sessions
from stepspan.mapping.samples import METRICS
from stepspan.run import Run
from stepspan.samplers import Absent, Gone, Sampler, Sampling, sampled_by
from stepspan.samplers.cgroup import Cgroup, Cpu, MemoryUse
from stepspan.samplers.host import host, process
from stepspan.samplers.sampling import CumulativeSum, Utilization
from stepspan.samplers.torch import torch
from stepspan.testing import recorded_run

start = runs.start


def nothing(event: Any) -> None:
    raise AssertionError("no event was expected")


def read(source: Sampler, quantity: str, now: float = 0.0) -> dict[str, Any]:
    """`name`, or `name of the first attribute's value` -> value."""
    values = source.quantities[quantity](now)
    return {" ".join([name, *(str(text) for a in more for text in a.values())]): value for name, value, *more in values}


def sampler_of(*script: Any, name: str = "host") -> Callable[[Any], Sampler]:
    """A sampler whose one quantity does what the script says, reading by reading."""
    steps = iter(script)

    def step(now: float) -> Iterable[Any]:
        what = next(steps)
        if isinstance(what, BaseException):
            raise what
        return [("some.value", what)]

    return lambda emit: Sampler(name, {"quantity": step})


# ------------------------------------------------------------------------------------------------- the schedule


def test_the_schedule_is_now_soon_every_interval_and_at_the_end() -> None:
    now, delays = [0.0], []

    def wait(delay: float) -> bool:
        delays.append(delay)
        now[0] += delay
        return len(delays) == 5

    with recorded_run() as recording:
        opener = sampler_of(*map(float, range(9)))
        sampling = Sampling(recording.run._recorder, {"host": opener}, 10.0, clock=lambda: now[0], wait=wait)
        sampling.start()
        sampling.stop()
        assert delays == [0.02, 0.5, 10.0, 10.0, 10.0]
        assert [event["values"] for event in recording.events("sample")] == [[["some.value", n]] for n in range(5)]
        assert recording.run._recorder.background_events == 5, "no sign that training goes on"  # type: ignore[union-attr]


def test_a_run_that_ends_just_after_a_sample_takes_no_other() -> None:
    with recorded_run() as recording:
        sampling = Sampling(
            recording.run._recorder,
            {"host": sampler_of(1.0, 2.0)},
            10.0,
            clock=lambda: 5.0,
            wait=lambda delay: delay > 0.4,
        )
        sampling.start()
        sampling.stop()
        assert len(recording.events("sample")) == 1


def test_a_run_that_ends_at_once_takes_one_sample() -> None:
    with recorded_run() as recording:
        sampling = Sampling(recording.run._recorder, {"host": sampler_of(1.0, 2.0)}, 10.0, wait=lambda _: True)
        sampling.start()
        sampling.stop()
        assert len(recording.events("sample")) == 1


def test_what_fails_is_told_once_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    with recorded_run() as recording, caplog.at_level(logging.DEBUG, "stepspan"):
        script = (1.0, RuntimeError("first"), RuntimeError("second"), float("nan"), float("inf"))
        sampling = Sampling(recording.run._recorder, {"host": sampler_of(*script)}, 10.0)
        for _ in script:
            sampling.sample()
        assert [event["values"][0][1] for event in recording.events("sample")] == [1.0, "NaN", "Infinity"]
        assert recording.run.stats()["warnings"] == {"samplers.host.quantity": 2}
        [record] = caplog.records
        assert record.message == (
            "stepspan: host.quantity is not sampled: RuntimeError('first') (logged once; run.stats() counts)"
        )


@pytest.mark.parametrize(
    ("error", "level"),
    [
        pytest.param(Absent("no such thing"), logging.INFO, id="what is not there"),
        pytest.param(FileNotFoundError("/proc/diskstats"), logging.INFO, id="what the kernel does not tell"),
        pytest.param(Gone("it left"), logging.WARNING, id="what has gone"),
    ],
)
def test_what_is_not_there_is_asked_for_no_more(caplog: pytest.LogCaptureFixture, error: Any, level: Any) -> None:
    with recorded_run() as recording, caplog.at_level(logging.DEBUG, "stepspan"):
        sampling = Sampling(recording.run._recorder, {"host": sampler_of(error, 1.0)}, 10.0)
        sampling.sample()
        sampling.sample()
        assert recording.events("sample") == []
        assert [record.levelno for record in caplog.records] == [level]


def test_a_sampler_that_cannot_be_opened_costs_itself_alone(caplog: pytest.LogCaptureFixture) -> None:
    def broken(emit: Any) -> Sampler:
        raise OSError(19, "No such device")

    with recorded_run() as recording, caplog.at_level(logging.DEBUG, "stepspan"):
        sampling = Sampling(recording.run._recorder, {"gpu": broken, "host": sampler_of(1.0, 2.0)}, 10.0)
        sampling.sample()
        sampling.sample()
        assert len(recording.events("sample")) == 2
        assert recording.run.stats()["warnings"] == {"samplers.gpu": 1}


def test_a_driver_that_hangs_delays_the_end_by_a_second_and_records_no_more() -> None:
    entered, released, left = threading.Event(), threading.Event(), threading.Event()

    def hang(now: float) -> Iterable[Any]:
        entered.set()
        released.wait(30)
        return [("some.value", 1.0)]

    def opener(emit: Any) -> Sampler:
        return Sampler("gpu", {"quantity": hang}, close=left.set)

    with recorded_run() as recording:
        sampling = Sampling(recording.run._recorder, {"gpu": opener}, 10.0)
        recording.run._recorder.background_tasks.append(sampling)  # type: ignore[union-attr]
        sampling.start()
        assert entered.wait(10)
        began = time.monotonic()
        recording.run.close()
        assert time.monotonic() - began < 5
        released.set()
        assert left.wait(10), "the sampler is closed when the driver answers at last"
        assert recording.events("sample") == []
        assert recording.run.stats()["warnings"] == {}


# --------------------------------------------------------------------------------------------- rates and sums


def test_a_utilization_needs_two_readings_of_one_whole() -> None:
    utilization = Utilization()
    assert utilization("a", 1.0, 10.0) == []
    assert utilization("a", 4.0, 20.0) == [0.3]
    assert utilization("b", 5.0, 30.0) == [], "the limit has changed"
    assert utilization("b", 5.0, 30.0) == [], "no time has passed"
    assert utilization("b", 99.0, 40.0) == [1.0]
    assert utilization("b", 0.0, 50.0) == [0.0]


def test_a_cumulative_sum_is_from_the_first_reading_and_never_falls() -> None:
    cumulative = CumulativeSum()
    assert [cumulative("disk", count, of="sda") for count in (100, 130, 7, 10)] == [0.0, 30.0, 30.0, 33.0]
    assert cumulative("disk", 500, of="sdb") == 33.0, "a device that comes later counts from there"
    assert cumulative("disk", 502, of="sdb") == 35.0


# --------------------------------------------------------------------------------------------- host and process


def test_the_process_is_as_proc_says() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    source = process(0, nothing)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) * 1024
    assert read(source, "memory") == {"process.memory.usage": pytest.approx(resident, rel=0.1)}
    assert read(source, "threads") == {"process.thread.count": int(status["Threads"])}
    assert read(source, "files") == {
        "process.unix.file_descriptor.count": pytest.approx(len(os.listdir("/proc/self/fd")), abs=2)
    }


def test_the_cpu_of_the_process_is_of_the_cpus_that_it_may_use(tmp_path: Path) -> None:
    source = process(0, nothing, root=tmp_path)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    assert read(source, "cpu", 100.0) == {}
    before = time.process_time()
    while time.process_time() - before < 0.3:
        sum(range(1000))
    assert read(source, "cpu", 101.0)["process.cpu.utilization"] == pytest.approx(0.3 / usable, rel=0.3)  # type: ignore[operator]


def test_the_host_without_a_cgroup_is_the_whole_host(tmp_path: Path) -> None:
    source = host(0, nothing, root=tmp_path)
    memory = read(source, "memory")
    assert memory["system.memory.limit"] == psutil.virtual_memory().total
    states = {state: memory[f"system.memory.usage {state}"] for state in ("used", "free", "cached")}
    assert sum(states.values()) == pytest.approx(memory["system.memory.limit"], rel=0.01)
    assert memory["system.memory.utilization"] == pytest.approx(states["used"] / memory["system.memory.limit"])
    assert read(source, "cpu") == {}
    first = read(source, "disk"), read(source, "network")
    assert all(value == 0.0 for part in first for value in part.values()), "since the sampler's start"


def test_no_byte_counts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A RAID set, a loop device, a bridge and the loopback carry bytes that a device carries too."""
    for device in ("block/sda", "block/sdb", "class/net/eth0"):
        (tmp_path / "sys" / device / "device").mkdir(parents=True)
    factor = [0]

    def counters(names: str, field: str, other: str) -> Callable[..., Any]:
        return lambda **_: {
            name: SimpleNamespace(**{field: 10 * factor[0], other: 5 * factor[0]}) for name in names.split()
        }

    monkeypatch.setattr(psutil, "disk_io_counters", counters("sda sdb md0 loop0", "read_bytes", "write_bytes"))
    monkeypatch.setattr(psutil, "net_io_counters", counters("lo eth0 docker0 veth1", "bytes_recv", "bytes_sent"))
    source, container = host(0, nothing, root=tmp_path), host(0, nothing, root=tmp_path / "elsewhere")
    told = [
        {**read(source, "disk"), **read(source, "network"), "in a container": read(container, "network")}
        for factor[0] in (1, 101)
    ]
    assert told[1] == {
        "system.disk.io read": 2000.0,
        "system.disk.io write": 1000.0,
        "system.network.io receive": 1000.0,
        "system.network.io transmit": 500.0,
        "in a container": {"system.network.io receive": 3000.0, "system.network.io transmit": 1500.0},
    }


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


MiB = 1 << 20
STAT = f"anon 1\nfile 2\ninactive_file {10 * MiB}\nactive_file 3"
V2 = {
    "proc/self/cgroup": "0::/pod/worker",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory",
    "sys/fs/cgroup/pod/memory.max": str(100 * MiB),
    "sys/fs/cgroup/pod/memory.current": str(60 * MiB),
    "sys/fs/cgroup/pod/memory.stat": STAT,
    "sys/fs/cgroup/pod/worker/memory.max": "max",
    "sys/fs/cgroup/pod/worker/memory.current": str(50 * MiB),
    "sys/fs/cgroup/pod/worker/memory.stat": STAT,
    "sys/fs/cgroup/pod/cpu.max": "max 100000",
    "sys/fs/cgroup/pod/worker/cpu.max": "50000 100000",
    "sys/fs/cgroup/pod/worker/cpu.stat": "usage_usec 2500000\nuser_usec 1",
    "sys/fs/cgroup/pod/worker/cpuset.cpus.effective": "0-2,7",
}
CONTAINER_V2 = {
    "proc/self/cgroup": "0::/../../elsewhere",
    "sys/fs/cgroup/cgroup.controllers": "cpu memory",
    "sys/fs/cgroup/memory.max": str(100 * MiB),
    "sys/fs/cgroup/memory.current": str(60 * MiB),
    "sys/fs/cgroup/memory.stat": STAT,
    "sys/fs/cgroup/cpu.max": "50000 100000",
    "sys/fs/cgroup/cpu.stat": "usage_usec 2500000",
    "sys/fs/cgroup/cpuset.cpus.effective": "0-2,7",
}
V1 = {
    "proc/self/cgroup": "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n3:cpuset:/docker/ab\n1:name=systemd:/x",
    "sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes": str(100 * MiB),
    "sys/fs/cgroup/memory/docker/ab/memory.usage_in_bytes": str(60 * MiB),
    "sys/fs/cgroup/memory/docker/ab/memory.stat": f"inactive_file 1\ntotal_inactive_file {10 * MiB}",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_quota_us": "50000",
    "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_period_us": "100000",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    "sys/fs/cgroup/cpuacct/docker/ab/cpuacct.usage": "2500000000",
    "sys/fs/cgroup/cpuset/docker/ab/cpuset.cpus": "0-2,7",
}
CONTAINER_V1 = {name.replace("/docker/ab/", "/"): text for name, text in reversed(V1.items())}


@pytest.mark.parametrize("files", [V2, CONTAINER_V2, V1, CONTAINER_V1], ids=["v2", "in v2", "v1", "in v1"])
def test_the_limits_of_a_cgroup_stand_for_the_host(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files)
    cgroup = Cgroup(root)
    assert cgroup.memory() == MemoryUse(100 * MiB, 50 * MiB, 10 * MiB)
    assert (found := cgroup.cpu()) == Cpu(0.5, 2.5, found.level if found else root)
    assert cgroup.cpus() == {0, 1, 2, 7}  # type: ignore[comparison-overlap]
    source = host(0, nothing, root=root)
    assert read(source, "memory") == {
        "system.memory.usage used": 50 * MiB,
        "system.memory.usage cached": 10 * MiB,
        "system.memory.usage free": 40 * MiB,
        "system.memory.limit": 100 * MiB,
        "system.memory.utilization": 0.5,
    }
    assert read(source, "cpu", 10.0) == {}
    for file in [*root.rglob("cpu.stat"), *root.rglob("cpuacct.usage")]:
        file.write_text(file.read_text().replace("25", "45"))  # 2 s of CPU in 10 s, where 5 are allowed
    assert read(source, "cpu", 20.0) == {"system.cpu.utilization": pytest.approx(0.4)}


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({}, id="no cgroup"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cgroup.controllers": ""}, id="the root of v2"),
        pytest.param(
            {**V1, **{name: "9223372036854771712" for name in V1 if name.endswith("limit_in_bytes")}}, id="v1 unlimited"
        ),
        pytest.param({**CONTAINER_V2, "sys/fs/cgroup/memory.max": "garbage"}, id="no number"),
        pytest.param({**CONTAINER_V2, "sys/fs/cgroup/memory.max": str(1 << 60)}, id="more than the host has"),
    ],
)
def test_no_limit_is_the_host(tmp_path: Path, files: dict[str, str]) -> None:
    source = host(0, nothing, root=tree(tmp_path, files))
    assert read(source, "memory")["system.memory.limit"] == psutil.virtual_memory().total


def test_a_cpuset_without_a_quota_is_the_load_of_those_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs 0 and 1 of four: what runs on the others is somebody else's."""
    root = tree(
        tmp_path, {**CONTAINER_V2, "sys/fs/cgroup/cpu.max": "max 1", "sys/fs/cgroup/cpuset.cpus.effective": "0-1"}
    )
    ticks = [0.0]
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    source = host(0, nothing, root=root)
    times = type(psutil.cpu_times())
    zero = dict.fromkeys(times._fields, 0.0)
    parts = (0.5, 0.25, 1.0, 1.0)
    monkeypatch.setattr(
        psutil,
        "cpu_times",
        lambda percpu: [times(**{**zero, "user": ticks[0] * p, "idle": ticks[0] * (1 - p)}) for p in parts],
    )
    assert read(source, "cpu", 0.0) == {}
    ticks[0] = 10.0
    assert read(source, "cpu", 10.0) == {"system.cpu.utilization": pytest.approx(0.375)}


# ------------------------------------------------------------------------------------------------------- torch


def scripted_torch(monkeypatch: pytest.MonkeyPatch, **cuda: Any) -> SimpleNamespace:
    module = SimpleNamespace(__spec__=SimpleNamespace(_initializing=False), cuda=SimpleNamespace(**cuda))
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


STATS = {
    "allocated_bytes.all.current": 100,
    "reserved_bytes.all.current": 400,
    "reserved_bytes.all.peak": 400,
    "active_bytes.all.current": 150,
    "inactive_split_bytes.all.current": 50,
    "num_alloc_retries": 2,
    "num_ooms": 1,
}


def test_the_allocator_says_what_it_holds_of_each_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = [dict(STATS), {}, {**STATS, "num_ooms": 0}]
    scripted_torch(
        monkeypatch, is_initialized=lambda: True, device_count=lambda: 3, memory_stats=lambda device: stats[device]
    )
    events: list[Any] = []
    source = torch(0, events.append)
    assert set(read(source, "allocator").values()) == {0.0}
    counters = {"allocated": 100, "reserved": 400, "active": 150, "inactive": 50}
    assert [(e["tag"], e["device_id"], e["counters"]) for e in events] == [("memory", n, counters) for n in (0, 2)]
    stats[0] |= {"num_alloc_retries": 5}
    stats[2] |= {"num_ooms": 2}
    assert read(source, "allocator") == {
        "training.memory.alloc_retries 0": 3.0,
        "training.memory.ooms 0": 0.0,
        "training.memory.alloc_retries 2": 0.0,
        "training.memory.ooms 2": 2.0,
    }


def test_torch_is_neither_imported_nor_its_cuda_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    source = torch(0, nothing)
    assert read(source, "allocator") == {}
    assert "torch" not in sys.modules
    half = scripted_torch(monkeypatch)  # the training is importing it
    half.__spec__._initializing = True
    assert read(source, "allocator") == {}
    scripted_torch(monkeypatch, is_initialized=lambda: False)
    assert read(source, "allocator") == {}


# ---------------------------------------------------------------------------------------------- a run with samplers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("host,gpu", ["host", "gpu"], id="some"),
        pytest.param("none", [], id="none"),
        pytest.param("", ["host", "process", "gpu", "torch"], id="blank is not given"),
    ],
)
def test_samplers_are_chosen_by_name(value: str, expected: list[str]) -> None:
    from stepspan.config import load

    assert load({}, {"STEPSPAN_SAMPLERS": value}).samplers == expected


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        pytest.param({"STEPSPAN_SAMPLERS": "host,gpus"}, "STEPSPAN_SAMPLERS.1='gpus': .*'host'.*'gpu'", id="a name"),
        pytest.param({"STEPSPAN_SAMPLE_INTERVAL": "0"}, "STEPSPAN_SAMPLE_INTERVAL='0': .*0.1", id="no interval"),
        pytest.param({"STEPSPAN_SAMPLE_INTERVAL": "often"}, "STEPSPAN_SAMPLE_INTERVAL='often'", id="no number"),
    ],
)
def test_a_wrong_choice_names_the_fix(
    start: Any, monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any], told: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        start()


def test_one_rank_of_a_host_samples_the_host() -> None:
    assert sampled_by(["torch", "host", "gpu"], 0) == ["host", "gpu", "torch"]
    assert sampled_by(["torch", "host", "gpu"], 3) == ["gpu", "torch"]


def samples(run: stepspan.Run | Path, source: str) -> list[dict[str, Any]]:
    return [event for event in runs.events(run, "sample") if event["source"] == source]


def test_a_short_run_shows_its_host_its_process_and_its_gpu(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = ScriptedNvml(GPU(uuid="GPU-0"), GPU(uuid="GPU-1"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("STEPSPAN_SAMPLERS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with start(rank=1, local_rank=1, world_size=2) as run:
        path = runs.path_of(run)
        until(lambda: len(samples(run, "gpu")) > 1)
    assert samples(path, "host") == [], "local rank 0 samples it"
    for source in ("process", "gpu"):
        names = {name for name, *_ in samples(path, source)[-1]["values"]}
        assert names <= METRICS.keys()
        assert f"{source.replace('gpu', 'hw.gpu')}.{'cpu.' if source == 'process' else ''}utilization" in names
    assert {value[2]["hw.id"] for value in samples(path, "gpu")[0]["values"]} == {"GPU-1"}
    assert runs.events(path)[-1]["tag"] == "run_end"
    assert nvml.open == 0
    assert not any(thread.name == "stepspan-samplers" for thread in threading.enumerate())


def test_local_rank_0_samples_the_host(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPSPAN_SAMPLERS", "host")
    with start() as run:
        until(lambda: len(samples(run, "host")) > 1)
        last = samples(run, "host")[-1]
    assert {name for name, *_ in last["values"]} >= {"system.cpu.utilization", "system.memory.usage"}
    assert {name for name, *_ in last["values"]} <= METRICS.keys()


def sources(run: Run) -> set[str]:
    return {event["source"] for event in runs.events(run, "sample")}


def samplers_at_work() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stepspan-samplers"]


def test_a_process_is_sampled_once_for_the_oldest_of_its_runs(start: Callable[..., Run]) -> None:
    """And for the next one when that one has ended."""
    with start(job_id="none", samplers="none"), start(job_id="a", samplers=["process"], sample_interval=0.1) as a:
        with start(job_id="b", samplers=["process"], sample_interval=0.1) as b:
            with start(job_id="c", samplers=["process"], sample_interval=0.1) as c:
                until(lambda: sources(a))
                assert len(samplers_at_work()) == 1
            a.close()
            until(lambda: sources(b))
            assert len(samplers_at_work()) == 1
        assert samplers_at_work() == []
    assert [sources(run) for run in (a, b, c)] == [{"process"}, {"process"}, set()]
    times = [[event["ts"] for event in runs.events(run, "sample")] for run in (a, b)]
    assert max(times[0]) < min(times[1])


def test_each_run_has_the_samplers_that_no_older_one_has(start: Callable[..., Run]) -> None:
    with start(job_id="a", samplers=["process"]) as a, start(job_id="b", samplers=["process", "host"]) as b:
        until(lambda: sources(a) and sources(b))
        assert [sources(run) for run in (a, b)] == [{"process"}, {"host"}]
        a.close()
        until(lambda: len(sources(b)) == 2)


def test_a_child_that_starts_a_run_samples_it(tmp_path: Path) -> None:
    told = runs.python(
        """
        import os, stepspan
        with stepspan.start_run(job_id="parent", samplers="process"):
            child = os.fork()
            if child == 0:
                with stepspan.start_run(job_id="child", samplers="process"):
                    pass
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        tmp_path,
    )
    assert told.returncode == 0, told.stderr
    found = [runs.events(session.path) for session in find_sessions(tmp_path / "stepspan-runs")]
    sampled = {lines[0]["job_id"]: any(event["tag"] == "sample" for event in lines) for lines in found}
    assert sampled == {"parent": True, "child": True}


def test_the_run_starts_before_any_sampler_is_imported(tmp_path: Path) -> None:
    """What start_run itself loads: nothing of it, for it has all been opened on the thread."""
    told = runs.python(
        """
        import sys, threading, stepspan
        hold = threading.Event()
        class Slow:
            def find_spec(self, name, path=None, target=None):
                if name in {"psutil", "pynvml"}:
                    hold.wait(20)
        sys.meta_path.insert(0, Slow())
        run = stepspan.start_run()
        run.log_metrics({"loss": 1.0})
        print("running")
        hold.set()
        run.close()
        """,
        tmp_path,
        STEPSPAN_SAMPLERS="host,process,gpu",
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == "running\n"


def test_a_fork_while_samplers_work_hangs_nobody(tmp_path: Path) -> None:
    told = runs.python(
        """
        import os, time, warnings, stepspan
        from stepspan.journal import numbers
        from stepspan.samplers import Sampling
        from stepspan.samplers.host import host, process
        warnings.simplefilter("ignore", DeprecationWarning)  # that forking beside threads is unwise
        numbers.MAX_RESTING = 32  # each child has a number of its own
        run = stepspan.start_run(job_id="job")
        openers = {"host": lambda emit: host(0, emit), "process": lambda emit: process(0, emit)}
        for _ in range(2):
            sampling = Sampling(run._recorder, openers, 0.001)
            run._recorder.background_tasks.append(sampling)
            sampling.start()
        for _ in range(30):
            child = os.fork()
            if child == 0:
                assert run._recorder.background_tasks == []
                run.log_metrics({"child": 1.0})
                import psutil
                psutil.disk_io_counters(), psutil.net_io_counters()
                run.close()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        run.close()
        assert run.stats()["warnings"] == {}, run.stats()
        """,
        tmp_path,
    )
    assert told.returncode == 0, told.stderr
    found = runs.sessions(tmp_path / "stepspan-runs")
    assert set(found) == {"0", *(f"0-worker{n}" for n in range(1, 31))}
    assert all(runs.events(path, "sample") == [] for name, path in found.items() if name != "0")
    assert len(runs.events(found["0"], "sample")) > 4


def test_the_benchmark_prints_its_rows(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "samplers.py"
    command = [sys.executable, str(script), "--quick", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=under_load(120))
    assert done.returncode == 0, done.stderr
    for row in ("host", "process", "torch", "gpu", "host,process,gpu,torch"):
        cells = [line.split("|")[2] for line in done.stdout.splitlines() if line.startswith(f"| {row}")]
        assert any(character.isdigit() for character in "".join(cells)), row
    assert not list(tmp_path.iterdir()), "it leaves something behind"


def test_a_script_without_a_gpu_prints_nothing_about_it(tmp_path: Path) -> None:
    """Exactly what a first user on a laptop sees: where the journal lies, and nothing else."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a GPU is here")
    file = tmp_path / "train.py"
    file.write_text("import stepspan\nwith stepspan.start_run() as run:\n    run.log_metrics({'loss': 1.0})\n")
    env = {name: value for name, value in os.environ.items() if name != "STEPSPAN_SAMPLERS"}
    done = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == f"stepspan: the journal is in {tmp_path / 'stepspan-runs'}\n"
    [path] = runs.sessions(tmp_path / "stepspan-runs").values()
    assert {event["source"] for event in runs.events(path, "sample")} >= {"host", "process"}
