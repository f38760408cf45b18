"""What sampling costs: CPU of the sampler's thread a sample and an hour, lines in the journal, and memory.

    python benchmarks/samplers.py [--samples 300]

Each source is sampled by hand, into a real journal, and the CPU is that thread's own (CLOCK_THREAD_CPUTIME_ID),
encoding and writing included. Where no GPU answers, the GPU's row is the cost of our own code against a scripted
driver. Memory is the peak of a process with a run and two samples against one with a run and no samplers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring import answer, clean_environment, machine, middle, peak_memory, table

TESTS = str(Path(__file__).parents[1] / "tests")
INTERVAL = 10.0
HOUR = 3600 / INTERVAL
BLOCK = 10


def sources() -> dict[str, Any]:
    """Row -> how it is opened."""
    from stepspan.samplers.gpu import gpu
    from stepspan.samplers.host import host, process
    from stepspan.samplers.torch import torch

    found: dict[str, Any] = {
        "host": lambda emit: host(0, emit),
        "process": lambda emit: process(0, emit),
        "torch, before CUDA is initialised": lambda emit: torch(0, emit),
    }
    try:
        gpu(0, lambda event: None).close()
        found["gpu"] = lambda emit: gpu(0, emit)
    except Exception:  # none here
        sys.path.insert(0, TESTS)
        from harness.scripted_nvml import GPU, ScriptedNvml

        found["gpu, scripted: without the driver's own time"] = lambda emit: gpu(
            0, emit, nvml=ScriptedNvml(GPU()), env={}
        )
    return found


def cost(opener: Any, directory: Path, samples: int) -> list[str]:
    """CPU and wall time of a sample, in ms; CPU of an hour, in s; bytes of an hour in the journal, in KiB."""
    import stepspan
    from stepspan.exporters.jsonl import JsonlExporter
    from stepspan.samplers import Sampling

    with stepspan.start_run(job_id="sampled", exporters=[JsonlExporter(directory)]) as run:
        sampling = Sampling(run._recorder, {"source": opener}, INTERVAL)
        sampling.sample()
        file = Path(run.stats()["journal"]) / "000001.jsonl"
        before = file.stat().st_size
        cpu, wall = [], []
        for _ in range(max(2, samples // BLOCK)):
            began, started = time.thread_time(), time.perf_counter()
            for _ in range(BLOCK):
                sampling.sample()
            cpu.append((time.thread_time() - began) / BLOCK * 1e3)
            wall.append((time.perf_counter() - started) / BLOCK * 1e3)
        line = (file.stat().st_size - before) / (len(cpu) * BLOCK)
        sampling.close()
    hour = [each / 1e3 * HOUR for each in cpu]
    return [middle(cpu, 3), middle(wall, 3), middle(hour, 2), f"{line * HOUR / 1024:,.0f}"]


def memory(samplers: str, directory: Path) -> float:
    """The peak of a process that has a run, MiB."""
    command = [sys.executable, __file__, "--worker", samplers, "--directory", str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.partition(":")[2].strip(" }\n"))


def work(samplers: str, directory: Path) -> None:
    """In a worker: a run that lasts for two samples."""
    os.environ["STEPSPAN_SAMPLERS"] = samplers
    import stepspan

    with stepspan.start_run(directory=directory, job_id=samplers.replace(",", "-")):
        time.sleep(1.0)
    answer(mebibytes=peak_memory())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="a few samples: does it work?")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    clean_environment()
    if given.worker:
        work(given.worker, given.directory)
        return
    print(machine())
    with TemporaryDirectory(dir=given.directory) as place:
        quiet = Path(place)
        rows = [
            [name, *cost(opener, quiet / str(n), 20 if given.quick else given.samples)]
            for n, (name, opener) in enumerate(sources().items())
        ]
        table(
            f"**samplers, every {INTERVAL:g} s** (median [quartiles] of blocks of {BLOCK} samples)",
            ["source", "CPU a sample, ms", "wall time a sample, ms", "CPU an hour, s", "journal an hour, KiB"],
            rows,
        )
        without = [memory("none", quiet / "none") for _ in range(1 if given.quick else 5)]
        kept = [
            [name, middle([memory(name, quiet / "memory") - base for base in without], 1)]
            for name in ("host,process", "host,process,gpu,torch")
        ]
        table("**memory**", ["samplers", "added to the process, MiB"], kept)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
