"""Samples as points: names, units, kinds, and what Prometheus calls them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.events_of import START, SessionEvents, by_series, mapper, restored, values
from harness.scripted_nvml import GPU, ScriptedNvml
from harness.stack import Collector, Prometheus

from stepspan.exporters.jsonl import JsonlExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.mapping.records import Sum
from stepspan.mapping.samples import METRICS
from stepspan.run import Run
from stepspan.samplers import Sampling
from stepspan.samplers.gpu import gpu
from stepspan.samplers.host import host, process
from stepspan.testing import FixedClock, recorded_run

start = runs.start


def sample(s: SessionEvents, *samples: list[Any], after: float = 1.0) -> None:
    s.emit("sample", after, source="host", values=list(samples))


def test_a_gauge_is_its_value_and_a_sum_counts_from_the_sessions_start() -> None:
    s = SessionEvents()
    sample(s, ["system.cpu.utilization", 0.5], ["system.disk.io", 100.0, {"disk.io.direction": "read"}])
    sample(s, ["system.cpu.utilization", 0.25], ["system.disk.io", 400.0, {"disk.io.direction": "read"}])
    assert by_series(s.records("metrics")) == {
        ("system.cpu.utilization",): [(1.0, 0.5), (2.0, 0.25)],
        ("system.disk.io", ("disk.io.direction", "read")): [(1.0, Sum(START, 100.0)), (2.0, Sum(START, 400.0))],
    }


def test_the_table_says_unit_and_kind() -> None:
    s = SessionEvents()
    sample(s, *([name, 1.0] for name in METRICS), ["some.new.name", 1.0])
    found = {series.name: (series.unit, series.kind) for series, _, _ in s.records("metrics")}
    assert found == {**METRICS, "some.new.name": ("", "gauge")}


def test_of_two_samples_in_a_millisecond_the_last_goes_out() -> None:
    s = SessionEvents()
    sample(s, ["hw.power", 100.0])
    sample(s, ["hw.power", 200.0], after=0.0001)
    fold = mapper("metrics", s.header)
    assert [value for _, _, value in fold.map(s.events)] == [200.0]
    assert fold.filtered == 1


def test_nan_is_a_value_and_text_is_none() -> None:
    s = SessionEvents()
    sample(s, ["hw.power", "NaN"], ["hw.temperature", "hot"], ["hw.energy", None], ["hw.gpu.clock", "Infinity"])
    found = {series.name: value for series, _, value in s.records("metrics")}
    assert found.keys() == {"hw.power", "hw.gpu.clock"}
    assert math.isnan(found["hw.power"])
    assert found["hw.gpu.clock"] == math.inf


@pytest.mark.parametrize("bent", [[["hw.power"]], ["x"], None, 7, [[]], [["hw.power", 1.0, "no table"]]], ids=repr)
def test_a_sample_that_a_processor_has_bent_costs_itself_alone(bent: Any) -> None:
    s = SessionEvents()
    s.emit("sample", source="gpu", values=bent)
    sample(s, ["hw.power", 2.0])
    assert values(s.records("metrics"), "hw.power") == [2.0]


def test_points_do_not_depend_on_batches() -> None:
    s = SessionEvents()
    for n in range(12):
        sample(s, ["hw.power", float(n)], ["hw.energy", n * 10.0], after=4.0)
        s.metrics({"loss": 1.0 / (n + 1)})
    at_once = by_series(mapper("metrics", s.header).map(s.events))
    for cut in range(1, len(s.events), 3):
        first = mapper("metrics", s.header)
        head = first.map(s.events[:cut])
        tail = restored("metrics", s.header, first.state()).map(s.events[cut:])
        assert by_series([*head, *tail]) == at_once


def test_a_run_with_a_sampler_gives_exactly_these_points() -> None:
    device = GPU(fields={}, uuid="GPU-1")
    nvml = ScriptedNvml(device)
    nvml.lacks = {"nvmlDeviceGetClockInfo", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlEventSetCreate"}
    nvml.lacks |= {"nvmlDeviceGetCurrentClocksThrottleReasons"}
    with recorded_run(clock=FixedClock()) as recording:
        sampling = Sampling(recording.run._recorder, {"gpu": lambda emit: gpu(0, emit, nvml=nvml, env={})}, 10.0)
        sampling.sample()
        device.energy += 5000
        device.power = 100_000
        sampling.sample()
        [session] = recording.sessions()
        started = session.header["started"]
    about = (("hw.id", "GPU-1"), ("hw.name", "NVIDIA H200"), ("hw.type", "gpu"))
    found: dict[tuple[Any, ...], list[Any]] = {}
    for series, _, value in recording.points():
        if series.name.startswith("hw."):
            found.setdefault((series.name, series.unit, *sorted(series.attributes.items())), []).append(value)
    assert found == {
        ("hw.gpu.utilization", "1", *about): [0.75, 0.75, None],
        ("hw.gpu.memory.usage", "By", *about): [float(40 << 30)] * 2 + [None],
        ("hw.gpu.memory.limit", "By", *about): [float(160 << 30)] * 2 + [None],
        ("hw.gpu.memory.utilization", "1", *about): [0.25, 0.25, None],
        ("hw.power", "W", *about): [350.5, 100.0, None],
        ("hw.energy", "J", *about): [Sum(started, 0.0), Sum(started, 5.0), None],
        ("hw.temperature", "Cel", *about): [61.0, 61.0, None],
        ("hw.errors", "{error}", ("error.type", "corrected"), *about): [Sum(started, 0.0), Sum(started, 0.0), None],
        ("hw.errors", "{error}", ("error.type", "uncorrected"), *about): [Sum(started, 0.0), Sum(started, 0.0), None],
    }


GPU_LABELS = {"hw_id", "hw_name", "hw_type"}
NAMES = {
    "system_cpu_utilization_ratio": set(),
    "system_memory_usage_bytes": {"system_memory_state"},
    "system_memory_limit_bytes": set(),
    "system_memory_utilization_ratio": set(),
    "system_disk_io_bytes_total": {"disk_io_direction"},
    "system_network_io_bytes_total": {"network_io_direction"},
    "process_cpu_utilization_ratio": set(),
    "process_memory_usage_bytes": set(),
    "process_unix_file_descriptor_count": set(),
    "process_thread_count": set(),
    "hw_gpu_utilization_ratio": GPU_LABELS,
    "hw_gpu_memory_usage_bytes": GPU_LABELS,
    "hw_gpu_memory_limit_bytes": GPU_LABELS,
    "hw_gpu_memory_utilization_ratio": GPU_LABELS,
    "hw_gpu_io_bytes_total": {*GPU_LABELS, "hw_gpu_link", "network_io_direction"},
    "hw_gpu_clock_hertz": {*GPU_LABELS, "hw_gpu_clock_domain"},
    "hw_gpu_throttled_ratio": {*GPU_LABELS, "reason"},
    "hw_power_watts": GPU_LABELS,
    "hw_energy_joules_total": GPU_LABELS,
    "hw_temperature_celsius": GPU_LABELS,
    "hw_errors_total": {*GPU_LABELS, "error_type"},
    "training_memory_alloc_retries_total": {"device_id"},
    "training_memory_ooms_total": {"device_id"},
    "training_memory_allocated_bytes": {"device_id"},
}
"""What Prometheus calls them -> their labels beside those of the rank: dashboards and alerts rest on it."""


@pytest.mark.stack
def test_prometheus_has_them_by_these_names(
    start: Callable[..., Run], collector: Collector, prometheus: Prometheus, tmp_path: Path
) -> None:
    nvml = ScriptedNvml(GPU())
    exporters = [JsonlExporter(tmp_path / "runs"), OtlpExporter(collector.http_endpoint, protocol="http/protobuf")]
    with start(job_id="sampled", exporters=exporters) as run:
        openers = {
            "host": lambda emit: host(0, emit),
            "process": lambda emit: process(0, emit),
            "gpu": lambda emit: gpu(0, emit, nvml=nvml, env={}),
        }
        sampling = Sampling(run._recorder, openers, 10.0, clock=iter(float(n) for n in range(1000)).__next__)
        sampling.sample()
        while "system.cpu.utilization" not in {name for name, *_ in runs.events(run, "sample")[-3]["values"]}:
            sampling.sample()  # until the kernel's clock of 10 ms has ticked
        device = {"device_id": 0}
        retries = [["training.memory.alloc_retries", 1.0, device], ["training.memory.ooms", 0.0, device]]
        run._recorder.emit_background({"ts": 0, "seq": 0, "tag": "sample", "source": "torch", "values": retries})
        run._recorder.emit_background({"ts": 0, "seq": 0, "tag": "memory", **device, "counters": {"allocated": 5}})
        assert run.flush(20)
        expected = {
            re.sub(r"\W", "_", name)
            for name in {name for event in runs.events(run, "sample") for name, *_ in event["values"]}
        }
    found: dict[str, set[str]] = {}
    for labels, _ in prometheus.series('{job_id="sampled",__name__=~"(system|process|hw|training_memory)_.*"}[1h]'):
        assert labels["rank"] == "0"
        common = {"__name__", "job", "instance", "job_id", "rank", "local_rank", "world_size"}
        found.setdefault(labels["__name__"], set()).update(
            name for name in labels.keys() - common if not name.startswith(("otel_scope", "host_name", "service_"))
        )
    assert found.items() <= NAMES.items()
    missing = {name for name in NAMES if name not in found}
    assert missing <= {"system_disk_io_bytes_total", "system_network_io_bytes_total"}, "a machine may have neither"
    assert len(expected) == len(found) - 1, "all that was sampled arrived, and the memory event"
