"""The GPU of this rank, through NVML: the one that CUDA would give it by CUDA_VISIBLE_DEVICES and its local rank.

CUDA orders GPUs by speed unless CUDA_DEVICE_ORDER=PCI_BUS_ID, NVML by bus: on a host with unlike GPUs an index may mean
another one, a UUID never does. Ranks beyond the number of visible GPUs share them, round-robin.

Names: https://opentelemetry.io/docs/specs/semconv/hardware/gpu/. A counter that this driver or this GPU does not keep
is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import takewhile
from typing import Any

from stepspan.samplers.sampling import Absent, CumulativeSum, Emit, Gone, Observation, Quantity, Sampler

NO_GPUS = {"void", "none"}
"""NVIDIA_VISIBLE_DEVICES in a container without GPUs."""
UNSUPPORTED = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED")
"""NVML's errors where this machine does not have what is asked for."""
MIG_ENABLED = 1
ALL_LINKS = 0xFFFFFFFF
MAX_XIDS = 64
"""Read for one sample; a broken GPU may report thousands."""
CLOCKS = {"sm": "NVML_CLOCK_SM", "memory": "NVML_CLOCK_MEM"}
"""`hw.gpu.clock.domain` -> NVML's clock type."""
THROTTLE_REASONS = {"power": 0x04 | 0x80, "thermal": 0x20 | 0x40, "hardware": 0x08, "sync_boost": 0x10}
"""`reason` -> bits of nvmlClocksEventReasons: software power cap and power brake; software and hardware thermal
slowdown; hardware slowdown of any kind; held to the pace of other GPUs. Idle and chosen clocks are no throttling."""
ECC = {"corrected": "NVML_MEMORY_ERROR_TYPE_CORRECTED", "uncorrected": "NVML_MEMORY_ERROR_TYPE_UNCORRECTED"}
"""`error.type` -> NVML's memory error type."""
IO = {
    "pcie": (1, {"transmit": "NVML_FI_DEV_PCIE_COUNT_TX_BYTES", "receive": "NVML_FI_DEV_PCIE_COUNT_RX_BYTES"}),
    "nvlink": (
        1024,
        {"transmit": "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", "receive": "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX"},
    ),
}
"""`hw.gpu.link` -> bytes of the counters' unit; `network.io.direction` -> NVML's field."""


def gpu(local_rank: int, emit: Emit, *, nvml: Any = None, env: Mapping[str, str] = os.environ) -> Sampler:
    """Open the sampler of this rank's GPU.

    Args:
        local_rank: The rank's number on its host, which CUDA numbers its GPU by.
        emit: Takes the events `training.gpu.xid` and `training.gpu.lost`.
        nvml: The module `pynvml`, or what stands for it.
        env: The environment variables.

    Raises:
        Absent: There is no GPU, no driver, or none that this rank may use.
        ImportError: `pynvml` is not installed.
        Exception: Whatever else NVML raises.

    """
    if env.get("NVIDIA_VISIBLE_DEVICES", "").strip() in NO_GPUS:
        raise Absent("NVIDIA_VISIBLE_DEVICES says that there is no GPU")
    if nvml is None:
        nvml = import_module("pynvml")
    reader = _Gpu(nvml, emit)
    with reader.translated():
        nvml.nvmlInit()
    try:
        with reader.translated():
            return reader.open(env, local_rank)
    except BaseException:
        with suppress(Exception):
            nvml.nvmlShutdown()
        raise


class _Gpu:
    """Reads one device. Its methods raise NVMLError, which `translated` turns into what the sampling knows."""

    def __init__(self, nvml: Any, emit: Emit) -> None:
        self._nvml = nvml
        self._emit = emit
        self._device: Any = None
        self._attributes: dict[str, str] = {}
        """Of the GPU, once it is known."""
        self._cumulative = CumulativeSum()
        self._xids = 0
        self._event_set: Any = None
        self._unsupported = {getattr(nvml, f"NVML_ERROR_{name}") for name in UNSUPPORTED}

    def open(self, env: Mapping[str, str], local_rank: int) -> Sampler:
        """Find the device. The sampler has all quantities that NVML may know of a GPU; it gives percent and mW."""
        nvml = self._nvml
        device = self._device = _visible_device(nvml, env, local_rank)
        uuid, name = _to_str(nvml.nvmlDeviceGetUUID(device)), _to_str(nvml.nvmlDeviceGetName(device))
        self._attributes = {"hw.id": uuid, "hw.name": name, "hw.type": "gpu"}
        quantities: dict[str, Callable[[], Iterable[Observation]]] = {
            "utilization": lambda: [("hw.gpu.utilization", nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)],
            "memory": self._memory,
            "power": lambda: [("hw.power", nvml.nvmlDeviceGetPowerUsage(device) / 1e3)],
            "energy": self._energy,
            "temperature": lambda: [
                ("hw.temperature", nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU))
            ],
            "clocks": self._clocks,
            "throttling": self._throttling,
            "ecc": self._ecc,
            "xid": self._xid,
            "pcie": lambda: self._io("pcie"),
            "nvlink": lambda: self._io("nvlink"),
        }
        guarded = {quantity: self._guard(read) for quantity, read in quantities.items()}
        return Sampler("gpu", guarded, self._close, f"{name} ({uuid})")

    def _guard(self, read: Callable[[], Iterable[Observation]]) -> Quantity:
        """A quantity whose observations have the GPU's attributes too."""

        def guarded(now: float) -> Iterable[Observation]:
            with self.translated():
                return [(name, value, {**self._attributes, **dict(*more)}) for name, value, *more in read()]

        return guarded

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Translate NVML's errors: `Absent` for what is not supported here, `Gone` for a lost GPU."""
        try:
            yield
        except self._nvml.NVMLError as error:
            if error.value in self._unsupported:
                raise Absent(f"NVML says {error}") from error
            if error.value == self._nvml.NVML_ERROR_GPU_IS_LOST:
                self._emit_error("training.gpu.lost", {"message": f"NVML says {error}"})
                raise Gone(f"NVML says {error}: {self._attributes.get('hw.id', 'before it was identified')}") from error
            raise
        except AttributeError as error:
            raise Absent(f"this nvidia-ml-py is too old: {error}") from error

    def _emit_error(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Emit an event of severity "error" with the GPU's attributes."""
        attributes = {**self._attributes, **attributes}
        event = {"ts": 0, "seq": 0, "tag": "event", "parent": 0, "name": name, "severity": "error"}
        self._emit({**event, "attributes": attributes})

    def _memory(self) -> Iterator[Observation]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._device)
        yield "hw.gpu.memory.usage", memory.used
        yield "hw.gpu.memory.limit", memory.total
        if memory.total:
            yield "hw.gpu.memory.utilization", memory.used / memory.total

    def _energy(self) -> Iterator[Observation]:
        millijoules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        yield "hw.energy", self._cumulative("energy", millijoules) / 1e3

    def _clocks(self) -> Iterator[Observation]:
        for domain, constant in CLOCKS.items():
            megahertz = self._nvml.nvmlDeviceGetClockInfo(self._device, getattr(self._nvml, constant))
            yield "hw.gpu.clock", megahertz * 1e6, {"hw.gpu.clock.domain": domain}

    def _throttling(self) -> Iterator[Observation]:
        nvml = self._nvml
        try:
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(self._device)
        except (AttributeError, nvml.NVMLError_FunctionNotFound):  # its name before driver 535
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._device)
        for reason, bits in THROTTLE_REASONS.items():
            yield "hw.gpu.throttled", float(bool(reasons & bits)), {"reason": reason}

    def _ecc(self) -> Iterator[Observation]:
        nvml = self._nvml
        for kind, constant in ECC.items():
            count = nvml.nvmlDeviceGetTotalEccErrors(self._device, getattr(nvml, constant), nvml.NVML_VOLATILE_ECC)
            yield "hw.errors", self._cumulative(kind, count), {"error.type": kind}

    def _xid(self) -> Iterator[Observation]:
        """Errors that the driver reported since the first sample: https://docs.nvidia.com/deploy/xid-errors/."""
        nvml = self._nvml
        if self._event_set is None:
            event_set = nvml.nvmlEventSetCreate()
            try:
                nvml.nvmlDeviceRegisterEvents(self._device, nvml.nvmlEventTypeXidCriticalError, event_set)
            except BaseException:
                nvml.nvmlEventSetFree(event_set)
                raise
            self._event_set = event_set
        codes: list[int] = []
        with suppress(nvml.NVMLError_Timeout):
            while len(codes) < MAX_XIDS:
                codes.append(int(nvml.nvmlEventSetWait_v2(self._event_set, 0).eventData))
        self._xids += len(codes)
        for code in dict.fromkeys(codes):
            self._emit_error("training.gpu.xid", {"xid": code})
        yield "hw.errors", self._xids, {"error.type": "xid"}

    def _io(self, link: str) -> Iterator[Observation]:
        nvml = self._nvml
        unit, directions = IO[link]
        wanted = [(getattr(nvml, name), ALL_LINKS if link == "nvlink" else 0) for name in directions.values()]
        fields = nvml.nvmlDeviceGetFieldValues(self._device, wanted)
        for direction, field in zip(directions, fields, strict=True):
            if field.nvmlReturn != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(field.nvmlReturn)
            if field.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_INT:
                raise Absent("a 32-bit counter may wrap around between two samples unnoticed")
            count = self._cumulative((link, direction), field.value.ullVal) * unit
            yield "hw.gpu.io", count, {"network.io.direction": direction, "hw.gpu.link": link}

    def _close(self) -> None:
        if self._event_set is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._event_set)
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def _visible_device(nvml: Any, env: Mapping[str, str], local_rank: int) -> Any:
    """The device that CUDA makes number `local_rank`, or the only one. Raises `Absent`."""
    count = nvml.nvmlDeviceGetCount()
    given = env.get("CUDA_VISIBLE_DEVICES")
    named = map(str, range(count)) if given is None else (name.strip() for name in given.split(","))
    visible = list(takewhile(lambda name: _is_visible(name, count), named))  # as CUDA: up to the first it can't read
    if not visible:
        raise Absent("no GPU" if given is None else f"no GPU: CUDA_VISIBLE_DEVICES={given!r}")
    name = visible[local_rank % len(visible)]
    if name.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    if not name.startswith("GPU-"):
        return _or_first_instance(nvml, nvml.nvmlDeviceGetHandleByIndex(int(name)))
    matching = [device for uuid, device in _devices(nvml, count) if uuid.startswith(name)]
    if len(matching) != 1:
        raise Absent(f"{len(matching)} GPUs match {name} in CUDA_VISIBLE_DEVICES")
    return _or_first_instance(nvml, matching[0])


def _is_visible(name: str, count: int) -> bool:
    if name.startswith(("GPU-", "MIG-")):
        return True
    return name.isascii() and name.isdigit() and int(name) < count


def _devices(nvml: Any, count: int) -> Iterator[tuple[str, Any]]:
    """UUID and handle of each GPU that answers: one of another job may be lost, or not permitted to be seen."""
    for index in range(count):
        with suppress(nvml.NVMLError_GpuIsLost, nvml.NVMLError_NoPermission):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            yield _to_str(nvml.nvmlDeviceGetUUID(device)), device


def _or_first_instance(nvml: Any, device: Any) -> Any:
    """The device; where it is partitioned (MIG) its first instance, which CUDA uses unless another is named."""
    with suppress(nvml.NVMLError, AttributeError):
        if nvml.nvmlDeviceGetMigMode(device)[0] == MIG_ENABLED:
            for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(device)):
                with suppress(nvml.NVMLError_NotFound):
                    return nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
    return device


def _to_str(value: str | bytes) -> str:
    """Text of NVML, which older bindings return as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
