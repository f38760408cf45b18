"""The GPU sampler against a scripted NVML: which GPU it takes, what it says, and what a failing driver costs."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
from harness.scripted_nvml import ERRORS, GPU, ScriptedNvml, raised

from stepspan.mapping.samples import METRICS
from stepspan.samplers import Sampling
from stepspan.samplers.gpu import gpu
from stepspan.testing import Recording, recorded_run

MISSING = {"NVMLError_NotSupported", "NVMLError_FunctionNotFound", "NVMLError_LibraryNotFound"} | {
    "NVMLError_DriverNotLoaded"
}
QUANTITIES = {
    "utilization": ("nvmlDeviceGetUtilizationRates", {"hw.gpu.utilization"}),
    "memory": ("nvmlDeviceGetMemoryInfo", {"hw.gpu.memory.usage", "hw.gpu.memory.limit", "hw.gpu.memory.utilization"}),
    "power": ("nvmlDeviceGetPowerUsage", {"hw.power"}),
    "energy": ("nvmlDeviceGetTotalEnergyConsumption", {"hw.energy"}),
    "temperature": ("nvmlDeviceGetTemperature", {"hw.temperature"}),
    "clocks": ("nvmlDeviceGetClockInfo", {"hw.gpu.clock"}),
    "throttling": ("nvmlDeviceGetCurrentClocksEventReasons", {"hw.gpu.throttled"}),
    "ecc": ("nvmlDeviceGetTotalEccErrors", {"hw.errors corrected", "hw.errors uncorrected"}),
    "xid": ("nvmlEventSetWait_v2", {"hw.errors xid"}),
    "pcie": ("nvmlDeviceGetFieldValues", {"hw.gpu.io"}),
}
"""Quantity -> the call that it rests on, and the metrics that are its alone."""
OPENING = ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetName"]


class Sampled:
    """A run and a sampler of its GPU, sampled by hand."""

    def __init__(self, recording: Recording, nvml: ScriptedNvml, env: dict[str, str], local_rank: int) -> None:
        self.recording = recording
        openers = {"gpu": lambda emit: gpu(local_rank, emit, nvml=nvml, env=env)}
        self.sampling = Sampling(recording.run._recorder, openers, 10.0)
        self.sample = self.sampling.sample

    def values(self) -> list[list[Any]]:
        """Of the last sample."""
        samples = self.recording.events("sample")
        return samples[-1]["values"] if samples else []

    def names(self) -> set[str]:
        return {f"{name} {about.get('error.type', '')}".strip() for name, _, about in self.values()}

    def get(self, name: str, **attributes: str) -> Any:
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        found = [value for known, value, about in self.values() if known == name and wanted.items() <= about.items()]
        assert len(found) == 1, f"{name} {wanted}: {found}"
        return found[0]

    def warnings(self) -> Any:
        return self.recording.run.stats()["warnings"]


@pytest.fixture
def sampled() -> Iterator[Any]:
    with recorded_run() as recording:

        def make(nvml: ScriptedNvml, env: dict[str, str] | None = None, local_rank: int = 0) -> Sampled:
            return Sampled(recording, nvml, env or {}, local_rank)

        yield make


def test_everything_a_gpu_says(sampled: Any) -> None:
    device = GPU(name=b"NVIDIA H200", reasons=0x20 | 0x01)
    s = sampled(ScriptedNvml(device))
    s.sample()
    device.energy += 2500
    device.ecc[1] += 2
    device.xids += [31, 79, 31]
    device.fields[pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX] += 4
    device.fields[pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES] += 500
    s.sample()
    assert {tuple(sorted(about.items()))[:3] for _, _, about in s.values() if len(about) == 3} == {
        (("hw.id", device.uuid), ("hw.name", "NVIDIA H200"), ("hw.type", "gpu"))
    }
    assert s.get("hw.gpu.utilization") == 0.75
    assert s.get("hw.gpu.memory.usage") == 40 << 30
    assert s.get("hw.gpu.memory.limit") == 160 << 30
    assert s.get("hw.gpu.memory.utilization") == 0.25
    assert s.get("hw.power") == 350.5
    assert s.get("hw.energy") == 2.5, "since the sampler's start"
    assert s.get("hw.temperature") == 61
    assert s.get("hw.gpu.clock", hw__gpu__clock__domain="sm") == 1.98e9
    assert s.get("hw.gpu.clock", hw__gpu__clock__domain="memory") == 3.201e9
    assert {about["reason"]: value for name, value, about in s.values() if name == "hw.gpu.throttled"} == {
        "power": 0.0,
        "thermal": 1.0,
        "hardware": 0.0,
        "sync_boost": 0.0,
    }
    assert s.get("hw.errors", error__type="corrected") == 0, "those before the run are another's"
    assert s.get("hw.errors", error__type="uncorrected") == 2
    assert s.get("hw.errors", error__type="xid") == 3
    assert s.get("hw.gpu.io", hw__gpu__link="nvlink", network__io__direction="transmit") == 4096
    assert s.get("hw.gpu.io", hw__gpu__link="pcie", network__io__direction="receive") == 500
    assert s.warnings() == {}
    assert {name for name, _, _ in s.values()} <= METRICS.keys()
    told = s.recording.logs("training.gpu.xid")
    assert [log.attributes["xid"] for log in told] == [31, 79], "each kind once a sample"
    assert {log.severity for log in told} == {17}


def three(**more: Any) -> ScriptedNvml:
    uuids = ["GPU-aaaa1111-0", "GPU-aaaa2222-0", "GPU-bbbb3333-0"]
    return ScriptedNvml(*(GPU(uuid=uuid) for uuid in uuids), **more)


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"),
    [
        pytest.param(None, 0, "aaaa1111", id="all, rank 0"),
        pytest.param(None, 2, "bbbb3333", id="all, rank 2"),
        pytest.param(None, 4, "aaaa2222", id="more ranks than GPUs share"),
        pytest.param("2", 0, "bbbb3333", id="one index"),
        pytest.param("2", 5, "bbbb3333", id="one index is everybody's"),
        pytest.param("2, 0", 1, "aaaa1111", id="a list in its own order"),
        pytest.param("GPU-bbbb3333-0", 0, "bbbb3333", id="uuid"),
        pytest.param("GPU-bbbb", 0, "bbbb3333", id="beginning of a uuid"),
        pytest.param("GPU-b,GPU-aaaa2", 1, "aaaa2222", id="beginnings of uuids"),
        pytest.param("1,-1,2", 1, "aaaa2222", id="nothing counts after -1"),
        pytest.param("0,9,1", 1, "aaaa1111", id="nothing counts after an index that is not there"),
        pytest.param("GPU-aaaa", 0, None, id="an ambiguous beginning"),
        pytest.param("GPU-cccc", 0, None, id="a uuid of another host"),
        pytest.param("", 0, None, id="empty"),
        pytest.param("-1", 0, None, id="-1"),
        pytest.param("NoDevFiles", 0, None, id="as SLURM says none"),
        pytest.param("\u00b2", 0, None, id="no ASCII digit"),
    ],
)
def test_the_gpu_is_the_one_that_cuda_would_give(
    sampled: Any, visible: str | None, local_rank: int, expected: str | None
) -> None:
    s = sampled(three(), {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, local_rank)
    s.sample()
    ids = {about["hw.id"] for _, _, about in s.values()}
    assert ids == ({f"GPU-{expected}-0"} if expected else set())
    assert s.warnings() == ({} if expected else {"samplers.gpu": 1})


@pytest.mark.parametrize("value", ["void", "none"])
def test_a_container_without_gpus_asks_no_driver(sampled: Any, value: str) -> None:
    nvml = three()
    s = sampled(nvml, {"NVIDIA_VISIBLE_DEVICES": value})
    s.sample()
    assert s.values() == []
    assert not nvml.calls
    assert s.warnings() == {"samplers.gpu": 1}


@pytest.mark.parametrize("visible", [None, "0", "MIG-2222", "GPU-aaaa"], ids=str)
def test_of_a_gpu_that_is_cut_up_the_instance_is_sampled(sampled: Any, visible: str | None) -> None:
    instances = [GPU(uuid=f"MIG-{n}", name="NVIDIA H200 MIG 1g.18gb", total=18 << 30) for n in (1111, 2222)]
    s = sampled(ScriptedNvml(GPU(instances=instances)), {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    s.sample()
    assert {about["hw.id"] for _, _, about in s.values()} == {"MIG-2222" if visible == "MIG-2222" else "MIG-1111"}
    assert s.names() == QUANTITIES["memory"][1], "power, clocks and errors are the whole GPU's, not one rank's"
    assert s.get("hw.gpu.memory.limit") == 18 << 30


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_any_error_costs_that_quantity_alone(
    sampled: Any, caplog: pytest.LogCaptureFixture, quantity: Any, error: Any
) -> None:
    call, names = QUANTITIES[quantity]
    nvml = ScriptedNvml(GPU())
    s = sampled(nvml)
    s.sample()
    before = s.names()
    if quantity == "xid" and error is pynvml.NVMLError_Timeout:
        return  # means: no error
    with caplog.at_level(logging.DEBUG, "stepspan"):
        nvml.fails[call] = raised(error)
        for _ in range(3):
            s.sample()
    if error is pynvml.NVMLError_GpuIsLost:
        assert s.warnings() == {"samplers.gpu": 1}
        assert len(s.recording.events("event")) == 1
        return
    kinds = ["pcie", "nvlink"] if quantity == "pcie" else [quantity]
    if error is pynvml.NVMLError_FunctionNotFound and quantity == "throttling":
        assert s.warnings() == {}, "its old name answers"
        return
    assert s.names() == before - names
    times = 1 if error.__name__ in MISSING else 3
    assert s.warnings() == {f"samplers.gpu.{kind}": times for kind in kinds}
    assert len(caplog.records) == len(kinds), "told once"
    assert {r.levelno for r in caplog.records} == {logging.INFO if error.__name__ in MISSING else logging.WARNING}
    assert not any(record.exc_info for record in caplog.records)
    del nvml.fails[call]
    s.sample()
    assert s.names() == (before - names if times == 1 else before), (
        "what failed is asked again, what is not there never"
    )


@pytest.mark.parametrize("error", [*ERRORS, OSError, AttributeError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("call", OPENING)
def test_a_driver_that_does_not_open_is_a_counted_condition(
    sampled: Any, caplog: pytest.LogCaptureFixture, call: Any, error: Any
) -> None:
    nvml = ScriptedNvml(GPU())
    nvml.fails[call] = raised(error) if issubclass(error, pynvml.NVMLError) else error("no driver")
    s = sampled(nvml)
    with caplog.at_level(logging.DEBUG, "stepspan"):
        s.sample()
        s.sample()
    assert s.values() == []
    assert s.warnings() == {"samplers.gpu": 1}
    assert len(caplog.records) == 1
    assert nvml.open == 0, "what was initialised is shut down"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("odd"), RuntimeError()], ids=repr)
def test_other_errors_of_a_driver_midway(sampled: Any, error: Any) -> None:
    nvml = ScriptedNvml(GPU())
    s = sampled(nvml)
    nvml.fails["nvmlDeviceGetPowerUsage"] = error
    s.sample()
    s.sample()
    assert "hw.power" not in s.names()
    assert "hw.temperature" in s.names()
    assert s.warnings() == {"samplers.gpu.power": 2}


def test_an_old_binding_costs_what_it_lacks(sampled: Any) -> None:
    nvml = ScriptedNvml(GPU(reasons=0x04))
    nvml.lacks = {
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetTotalEnergyConsumption",
        "NVML_FI_DEV_PCIE_COUNT_TX_BYTES",
        "nvmlDeviceGetMigMode",
    }
    s = sampled(nvml)
    s.sample()
    s.sample()
    assert s.get("hw.gpu.throttled", reason="power") == 1.0
    assert s.warnings() == {"samplers.gpu.energy": 1, "samplers.gpu.pcie": 1}


def test_a_gpu_that_keeps_no_counter_leaves_it_out(sampled: Any) -> None:
    s = sampled(ScriptedNvml(GPU(fields={})))
    s.sample()
    s.sample()
    assert "hw.gpu.io" not in s.names()
    assert s.warnings() == {"samplers.gpu.pcie": 1, "samplers.gpu.nvlink": 1}


def test_a_counter_of_32_bits_is_left_out(sampled: Any) -> None:
    nvml = ScriptedNvml(GPU())
    nvml.value_type = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
    s = sampled(nvml)
    s.sample()
    assert "hw.gpu.io" not in s.names()
    assert s.warnings() == {"samplers.gpu.pcie": 1, "samplers.gpu.nvlink": 1}


def test_a_gpu_that_falls_off_the_bus_is_told_once_and_asked_no_more(
    sampled: Any, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = ScriptedNvml(GPU())
    s = sampled(nvml)
    s.sample()
    nvml.gpus[0].lost = True
    with caplog.at_level(logging.WARNING, "stepspan"):
        s.sample()
        calls = nvml.calls.total()
        s.sample()
    assert nvml.calls.total() == calls
    assert len(s.recording.events("sample")) == 1
    [lost] = s.recording.logs("training.gpu.lost")
    assert lost.severity == 17
    assert lost.attributes["hw.id"] == nvml.gpus[0].uuid
    assert s.warnings() == {"samplers.gpu": 1}
    assert [re.sub(r"\(.*", "", record.message) for record in caplog.records] == [
        f"stepspan: gpu is not sampled: NVML says GPU is lost: {nvml.gpus[0].uuid} "
    ]
    s.sampling.close()
    assert nvml.open == 0


def test_a_lost_gpu_of_another_rank_costs_nothing(sampled: Any) -> None:
    nvml = three()
    nvml.gpus[0].lost = True
    s = sampled(nvml, {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"})
    s.sample()
    assert {about["hw.id"] for _, _, about in s.values()} == {"GPU-bbbb3333-0"}


@pytest.mark.any_events  # doctor's trial of the directory
def test_doctor_names_the_samplers_and_the_gpu_of_this_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stepspan.cli.doctor import examine

    nvml = three()
    nvml.fails["nvmlDeviceGetPowerUsage"] = pynvml.NVMLError_Unknown()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for name, value in {
        "SAMPLERS": "host,gpu",
        "JOB_ID": "j",
        "RANK": "2",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "3",
    }.items():
        monkeypatch.setenv(f"STEPSPAN_{name}", value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert examine(tmp_path / "runs", None) == 0
    printed = capsys.readouterr().out
    assert "10 s: gpu\n" in printed, "local rank 0 samples the host"
    assert "NVIDIA H200 (GPU-bbbb3333-0): utilization, memory, energy, temperature" in printed
    assert nvml.open == 0


def test_a_storm_of_xids_is_told_of_in_pieces(sampled: Any) -> None:
    device = GPU(xids=[13] * 150)
    s = sampled(ScriptedNvml(device))
    counts = []
    for _ in range(4):
        s.sample()
        counts.append(s.get("hw.errors", error__type="xid"))
    assert counts == [64, 128, 150, 150]
    assert len(s.recording.events("event")) == 3
