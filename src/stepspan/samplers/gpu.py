"""The GPU of this rank, through NVML: the one that CUDA would give it by CUDA_VISIBLE_DEVICES and its local rank.

CUDA orders GPUs by speed unless CUDA_DEVICE_ORDER=PCI_BUS_ID, NVML by bus: on a host with unlike GPUs an index may mean
another one, a UUID never does. A rank beyond the visible GPUs shares: they are dealt in turn.

Names: https://opentelemetry.io/docs/specs/semconv/hardware/gpu/. A counter that only a newer driver keeps, or only
another GPU, is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from stepspan.samplers.sampling import Absent, Emit, Gone, Growth, Quantity, Source, Value

NO_GPUS = {"void", "none"}
"""NVIDIA_VISIBLE_DEVICES in a container that has none."""
MIG_ENABLED = 1
ALL_LINKS = 0xFFFFFFFF
MOST_XIDS = 64
"""Told of in one sample; a GPU in trouble may have thousands."""
CLOCKS = {"sm": "NVML_CLOCK_SM", "memory": "NVML_CLOCK_MEM"}
THROTTLED = {"power": 0x04 | 0x80, "thermal": 0x20 | 0x40, "hardware": 0x08, "sync_boost": 0x10}
"""Reason -> bits of nvmlClocksEventReasons: software power cap and power brake; software and hardware thermal
slowdown; hardware slowdown, whatever for; held to the pace of other GPUs. Idle and chosen clocks are no throttling."""
ECC = {"corrected": "NVML_MEMORY_ERROR_TYPE_CORRECTED", "uncorrected": "NVML_MEMORY_ERROR_TYPE_UNCORRECTED"}
COUNTED = {
    "pcie": (1, {"transmit": "NVML_FI_DEV_PCIE_COUNT_TX_BYTES", "receive": "NVML_FI_DEV_PCIE_COUNT_RX_BYTES"}),
    "nvlink": (
        1024,
        {"transmit": "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", "receive": "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX"},
    ),
}
"""Link -> bytes of its unit, and direction -> the field that counts them."""


def gpu(local_rank: int, emit: Emit, *, nvml: Any = None, env: Mapping[str, str] = os.environ) -> Source:
    """The GPU of this rank. Raises `Absent` where there is none, and what NVML raises where it fails."""
    if env.get("NVIDIA_VISIBLE_DEVICES", "").strip() in NO_GPUS:
        raise Absent("NVIDIA_VISIBLE_DEVICES says that there is no GPU")
    if nvml is None:
        nvml = import_module("pynvml")
    asking = _Asking(nvml, emit)
    asking(nvml.nvmlInit)
    try:
        source: Source = asking(lambda: _Gpu(nvml, _chosen(nvml, env, local_rank), asking).source())
    except BaseException:
        with suppress(Exception):
            nvml.nvmlShutdown()
        raise
    return source


class _Asking:
    """Calls NVML, and says what its errors mean."""

    def __init__(self, nvml: Any, emit: Emit) -> None:
        self._nvml = nvml
        self._emit = emit
        self.about: dict[str, str] = {}
        missing = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED")
        self._missing = {getattr(nvml, f"NVML_ERROR_{name}") for name in missing}

    def __call__(self, call: Any) -> Any:
        try:
            return call()
        except self._nvml.NVMLError as error:
            if error.value in self._missing:
                raise Absent(f"NVML says {error}") from error
            if error.value == self._nvml.NVML_ERROR_GPU_IS_LOST:
                self.warn_once("training.gpu.lost", {"message": f"NVML says {error}"})
                raise Gone(f"NVML says {error}: {self.about.get('hw.id', 'before it was known')}") from error
            raise
        except AttributeError as error:
            raise Absent(f"this nvidia-ml-py is too old: {error}") from error

    def warn_once(self, name: str, attributes: Mapping[str, Any]) -> None:
        """An event about the GPU."""
        about = {**self.about, **attributes}
        self._emit(
            {"ts": 0, "seq": 0, "tag": "event", "parent": 0, "name": name, "severity": "error", "attributes": about}
        )


class _Gpu:
    """`device` answers, or raises an NVMLError."""

    def __init__(self, nvml: Any, device: Any, asking: _Asking) -> None:
        self._nvml = nvml
        self._device = device
        self._asking = asking
        self._sum = Growth()
        self._xids = 0
        self._events: Any = None
        about = {"hw.id": _text(nvml.nvmlDeviceGetUUID(device)), "hw.name": _text(nvml.nvmlDeviceGetName(device))}
        self._about = asking.about = {**about, "hw.type": "gpu"}

    def source(self) -> Source:
        """All that it can be asked."""
        which = f"{self._about['hw.name']} ({self._about['hw.id']})"
        readings = {
            "utilization": self._utilization,
            "memory": self._memory,
            "power": self._power,
            "energy": self._energy,
            "temperature": self._temperature,
            "clocks": self._clocks,
            "throttling": self._throttling,
            "ecc": self._ecc,
            "xid": self._xid,
            "pcie": lambda: self._io("pcie"),
            "nvlink": lambda: self._io("nvlink"),
        }
        return Source("gpu", {name: self._asked(read) for name, read in readings.items()}, self._close, which)

    def _asked(self, read: Any) -> Quantity:
        def ask(now: float) -> Iterable[Value]:
            values: list[Value] = self._asking(lambda: list(read()))
            return values

        return ask

    def _value(self, name: str, value: float, attributes: Mapping[str, str] = MappingProxyType({})) -> Value:
        return name, value, {**self._about, **attributes}

    def _utilization(self) -> Iterator[Value]:
        yield self._value("hw.gpu.utilization", self._nvml.nvmlDeviceGetUtilizationRates(self._device).gpu / 100)

    def _memory(self) -> Iterator[Value]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._device)
        yield self._value("hw.gpu.memory.usage", memory.used)
        yield self._value("hw.gpu.memory.limit", memory.total)
        if memory.total:
            yield self._value("hw.gpu.memory.utilization", memory.used / memory.total)

    def _power(self) -> Iterator[Value]:
        yield self._value("hw.power", self._nvml.nvmlDeviceGetPowerUsage(self._device) / 1e3)

    def _energy(self) -> Iterator[Value]:
        millijoules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        yield self._value("hw.energy", self._sum("energy", millijoules) / 1e3)

    def _temperature(self) -> Iterator[Value]:
        nvml = self._nvml
        yield self._value("hw.temperature", nvml.nvmlDeviceGetTemperature(self._device, nvml.NVML_TEMPERATURE_GPU))

    def _clocks(self) -> Iterator[Value]:
        for domain, constant in CLOCKS.items():
            megahertz = self._nvml.nvmlDeviceGetClockInfo(self._device, getattr(self._nvml, constant))
            yield self._value("hw.gpu.clock", megahertz * 1e6, {"hw.gpu.clock.domain": domain})

    def _throttling(self) -> Iterator[Value]:
        nvml = self._nvml
        try:
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(self._device)
        except (AttributeError, nvml.NVMLError_FunctionNotFound):  # its name before driver 535
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._device)
        for reason, bits in THROTTLED.items():
            yield self._value("hw.gpu.throttled", float(bool(reasons & bits)), {"reason": reason})

    def _ecc(self) -> Iterator[Value]:
        nvml = self._nvml
        for kind, constant in ECC.items():
            count = nvml.nvmlDeviceGetTotalEccErrors(self._device, getattr(nvml, constant), nvml.NVML_VOLATILE_ECC)
            yield self._value("hw.errors", self._sum(kind, count), {"error.type": kind})

    def _xid(self) -> Iterator[Value]:
        """What the driver has reported of the GPU since: https://docs.nvidia.com/deploy/xid-errors/."""
        nvml = self._nvml
        if self._events is None:
            events = nvml.nvmlEventSetCreate()
            try:
                nvml.nvmlDeviceRegisterEvents(self._device, nvml.nvmlEventTypeXidCriticalError, events)
            except BaseException:
                nvml.nvmlEventSetFree(events)
                raise
            self._events = events
        codes: list[int] = []
        with suppress(nvml.NVMLError_Timeout):
            while len(codes) < MOST_XIDS:
                codes.append(int(nvml.nvmlEventSetWait_v2(self._events, 0).eventData))
        self._xids += len(codes)
        for code in dict.fromkeys(codes):
            self._asking.warn_once("training.gpu.xid", {"xid": code})
        yield self._value("hw.errors", self._xids, {"error.type": "xid"})

    def _io(self, link: str) -> Iterator[Value]:
        nvml = self._nvml
        unit, directions = COUNTED[link]
        wanted = [(getattr(nvml, name), ALL_LINKS if link == "nvlink" else 0) for name in directions.values()]
        counts = nvml.nvmlDeviceGetFieldValues(self._device, wanted)
        for direction, field in zip(directions, counts, strict=True):
            if field.nvmlReturn != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(field.nvmlReturn)
            if field.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_INT:
                raise Absent("a counter of 32 bits wraps between two samples, and nobody could tell")
            count = self._sum((link, direction), field.value.ullVal) * unit
            yield self._value("hw.gpu.io", count, {"network.io.direction": direction, "hw.gpu.link": link})

    def _close(self) -> None:
        if self._events is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._events)
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def _chosen(nvml: Any, env: Mapping[str, str], local_rank: int) -> Any:
    """The device that CUDA makes number `local_rank`, or the only one. Raises `Absent`."""
    count = nvml.nvmlDeviceGetCount()
    given = env.get("CUDA_VISIBLE_DEVICES")
    named = map(str, range(count)) if given is None else (name.strip() for name in given.split(","))
    visible = list(takewhile(lambda name: _is_device(name, count), named))  # as CUDA: up to the first it can't read
    if not visible:
        raise Absent("no GPU" if given is None else f"no GPU: CUDA_VISIBLE_DEVICES={given!r}")
    name = visible[local_rank % len(visible)]
    if name.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    if not name.startswith("GPU-"):
        return _or_its_instance(nvml, nvml.nvmlDeviceGetHandleByIndex(int(name)))
    matching = [device for uuid, device in _devices(nvml, count) if uuid.startswith(name)]
    if len(matching) != 1:
        raise Absent(f"{len(matching)} GPUs are {name} of CUDA_VISIBLE_DEVICES")
    return _or_its_instance(nvml, matching[0])


def _is_device(name: str, count: int) -> bool:
    if name.startswith(("GPU-", "MIG-")):
        return True
    return name.isascii() and name.isdigit() and int(name) < count


def _devices(nvml: Any, count: int) -> Iterator[tuple[str, Any]]:
    """UUID and handle of each that answers: another job's may be lost, or not ours to see, and this rank's well."""
    for index in range(count):
        with suppress(nvml.NVMLError_GpuIsLost, nvml.NVMLError_NoPermission):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            yield _text(nvml.nvmlDeviceGetUUID(device)), device


def _or_its_instance(nvml: Any, device: Any) -> Any:
    """The device; where it is cut up (MIG), its first instance: CUDA uses no other unless told."""
    with suppress(nvml.NVMLError, AttributeError):
        if nvml.nvmlDeviceGetMigMode(device)[0] == MIG_ENABLED:
            for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(device)):
                with suppress(nvml.NVMLError_NotFound):
                    return nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
    return device


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
