"""A `pynvml` whose GPUs are a table: it has the real one's errors and constants, and answers, fails and counts as told.

nvml = ScriptedNvml(GPU(power=250_000), GPU())
nvml.fails["nvmlDeviceGetPowerUsage"] = pynvml.NVMLError_Unknown()
nvml.gpus[0].lost = True
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

ERRORS = sorted(
    (error for error in vars(pynvml).values() if isinstance(error, type) and issubclass(error, pynvml.NVMLError)),
    key=lambda error: error.__name__,
)
"""Every error class of the real one, the root too."""


def raised(error: type[pynvml.NVMLError]) -> pynvml.NVMLError:
    """One of a class; the root with a code that nobody knows."""
    return error(12345) if error is pynvml.NVMLError else error()


@dataclass
class GPU:
    """Units as NVML has them: %, bytes, mW, mJ, degrees, MHz."""

    uuid: str = "GPU-aaaa0000-0000-0000-0000-000000000000"
    name: str | bytes = "NVIDIA H200"
    utilization: int = 75
    used: int = 40 << 30
    total: int = 160 << 30
    power: int = 350_500
    energy: int = 1_000_000
    temperature: int = 61
    clocks: dict[int, int] = field(default_factory=lambda: {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201})
    reasons: int = 0
    ecc: dict[int, int] = field(default_factory=lambda: {0: 3, 1: 0})
    fields: dict[int, int] = field(
        default_factory=lambda: {
            pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES: 1000,
            pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES: 2000,
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: 10,
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: 20,
        }
    )
    xids: list[int] = field(default_factory=list)
    instances: list[GPU] = field(default_factory=list)
    lost: bool = False


INSTANCE_ANSWERS = {"nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode"}
"""What a MIG instance can be asked; the rest is the whole GPU's."""


class ScriptedNvml:
    """Put it in `sys.modules["pynvml"]`, or hand it over."""

    def __init__(self, *gpus: GPU) -> None:
        self.gpus = list(gpus)
        self.fails: dict[str, BaseException] = {}
        self.lacks: set[str] = set()
        """Names that this binding is too old for."""
        self.calls: Counter[str] = Counter()
        self.value_type = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
        self.open = 0
        """How often it is initialised and not shut down."""

    def __getattr__(self, name: str) -> Any:
        if name in self.lacks:
            raise AttributeError(f"module 'pynvml' has no attribute {name!r}")
        if not name.startswith("nvml") or not callable(getattr(pynvml, name)):
            return getattr(pynvml, name)

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            if name in self.fails:
                raise self.fails[name]
            for argument in arguments:
                if isinstance(argument, GPU):
                    if argument.lost:
                        raise pynvml.NVMLError_GpuIsLost()
                    if argument.uuid.startswith("MIG-") and name not in INSTANCE_ANSWERS:
                        raise pynvml.NVMLError_NotSupported()
            return getattr(self, f"_{name}")(*arguments)

        return call

    def _nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def _nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def _nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> GPU:  # noqa: N802
        return self.gpus[index]

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> GPU:  # noqa: N802
        for device in (each for gpu in self.gpus for each in (gpu, *gpu.instances)):
            if device.uuid == uuid:
                return device
        raise pynvml.NVMLError_NotFound()

    def _nvmlDeviceGetUUID(self, gpu: GPU) -> str:  # noqa: N802
        return gpu.uuid

    def _nvmlDeviceGetName(self, gpu: GPU) -> str | bytes:  # noqa: N802
        return gpu.name

    def _nvmlDeviceGetMigMode(self, gpu: GPU) -> list[int]:  # noqa: N802
        return [int(bool(gpu.instances))] * 2

    def _nvmlDeviceGetMaxMigDeviceCount(self, gpu: GPU) -> int:  # noqa: N802
        return 7

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: GPU, index: int) -> GPU:  # noqa: N802
        places = [None, *gpu.instances]  # the first place is free, as after an instance was destroyed
        found = places[index] if index < len(places) else None
        if found is None:
            raise pynvml.NVMLError_NotFound()
        return found

    def _nvmlDeviceGetUtilizationRates(self, gpu: GPU) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=gpu.utilization, memory=0)

    def _nvmlDeviceGetMemoryInfo(self, gpu: GPU) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=gpu.used, total=gpu.total, free=gpu.total - gpu.used)

    def _nvmlDeviceGetPowerUsage(self, gpu: GPU) -> int:  # noqa: N802
        return gpu.power

    def _nvmlDeviceGetTotalEnergyConsumption(self, gpu: GPU) -> int:  # noqa: N802
        return gpu.energy

    def _nvmlDeviceGetTemperature(self, gpu: GPU, sensor: int) -> int:  # noqa: N802
        return {pynvml.NVML_TEMPERATURE_GPU: gpu.temperature}[sensor]

    def _nvmlDeviceGetClockInfo(self, gpu: GPU, domain: int) -> int:  # noqa: N802
        return gpu.clocks[domain]

    def _nvmlDeviceGetCurrentClocksEventReasons(self, gpu: GPU) -> int:  # noqa: N802
        return gpu.reasons

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: GPU) -> int:  # noqa: N802
        return gpu.reasons

    def _nvmlDeviceGetTotalEccErrors(self, gpu: GPU, kind: int, counter: int) -> int:  # noqa: N802
        assert counter == pynvml.NVML_VOLATILE_ECC
        return gpu.ecc[kind]

    def _nvmlDeviceGetFieldValues(self, gpu: GPU, wanted: list[tuple[int, int]]) -> list[SimpleNamespace]:  # noqa: N802
        found = []
        for number, _ in wanted:
            code = pynvml.NVML_SUCCESS if number in gpu.fields else pynvml.NVML_ERROR_NOT_SUPPORTED
            value = SimpleNamespace(ullVal=gpu.fields.get(number, 0))
            found.append(SimpleNamespace(nvmlReturn=code, valueType=self.value_type, value=value))
        return found

    def _nvmlEventSetCreate(self) -> list[GPU]:  # noqa: N802
        return []

    def _nvmlDeviceRegisterEvents(self, gpu: GPU, kinds: int, events: list[GPU]) -> None:  # noqa: N802
        assert kinds == pynvml.nvmlEventTypeXidCriticalError
        events.append(gpu)

    def _nvmlEventSetWait_v2(self, events: list[GPU], milliseconds: int) -> SimpleNamespace:  # noqa: N802
        assert milliseconds == 0
        for gpu in events:
            if gpu.xids:
                return SimpleNamespace(eventData=gpu.xids.pop(0))
        raise pynvml.NVMLError_Timeout()

    def _nvmlEventSetFree(self, events: list[GPU]) -> None:  # noqa: N802
        events.clear()
