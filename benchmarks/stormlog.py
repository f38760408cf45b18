"""What stormlog's schema costs a record: stepspan.stormlog, and stormlog itself where it can be imported.

    python benchmarks/stormlog.py [--stormlog DIRECTORY] [--quick]

DIRECTORY is where stormlog is installed (`pip install --no-deps --target DIRECTORY stormlog==0.3.8`), if not beside
stepspan. The contenders take turns on the same records, each in a process of its own under the same interpreter, and a
ratio is taken within each round.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring

MODULES = {"stepspan": "stepspan.stormlog", "stormlog": "stormlog.telemetry"}
DISTINCT = 10_000
TASKS = {
    "validate": "`validate_telemetry_record`",
    "convert": "`telemetry_event_from_record`",
    "convert_v2": "`telemetry_event_from_record`, schema 2",
    "convert_legacy": "`telemetry_event_from_record`, legacy",
    "project": "`project_telemetry_event` of an event",
    "convert_and_project": "`project_telemetry_event` of a record",
    "to_dict": "`telemetry_event_to_dict`",
}
PROMISED = {"validate": 3.0, "convert": 3.0, "project": 3.0, "convert_and_project": 3.0}


def record(n: int) -> dict[str, Any]:
    """As a CUDA tracker writes it."""
    return {
        "schema_version": 3,
        "session_id": "a09129d8-e227-4843-b602-6ec293b6f8eb",
        "timestamp_ns": 1_700_000_000_000_000_000 + n * 100_000_000,
        "event_type": "sample",
        "collector": "stormlog.cuda_tracker",
        "sampling_interval_ms": 100,
        "pid": 1234,
        "host": "node-17",
        "job_id": "pretrain-7b",
        "rank": n % 8,
        "local_rank": n % 8,
        "world_size": 8,
        "device_id": n % 8,
        "allocator_allocated_bytes": 30_000_000_000 + n,
        "allocator_reserved_bytes": 40_000_000_000,
        "allocator_active_bytes": 31_000_000_000,
        "allocator_inactive_bytes": None,
        "allocator_change_bytes": -n,
        "device_used_bytes": 50_000_000_000,
        "device_free_bytes": 30_000_000_000,
        "device_total_bytes": 80_000_000_000,
        "context": None,
        "metadata": {"backend": "cuda", "step": n},
    }


def older(n: int) -> dict[str, Any]:
    """The same in schema 2."""
    return {name: value for name, value in record(n).items() if name != "session_id"} | {"schema_version": 2}


def legacy(n: int) -> dict[str, Any]:
    """As it was before the schema had versions."""
    return {
        "timestamp": 1_700_000_000.25 + n,
        "event_type": "allocation",
        "memory_allocated": 10_000 + n,
        "memory_reserved": 15_000,
        "memory_change": 512,
        "device_id": 0,
        "context": "forward",
        "metadata_usage_percent": 75.5,
    }


def look_in(path: list[str]) -> None:
    """Import from `path` as well, and not from this directory, where this script bears the package's name."""
    here = Path(__file__).parent
    sys.path[:] = [*(place for place in sys.path if Path(place).resolve() != here), *path]


def work(task: dict[str, Any]) -> None:
    """Be a contender: time a block of calls for each order."""
    look_in(task["path"])
    schema = importlib.import_module(MODULES[task["contender"]])
    records = [record(n) for n in range(DISTINCT)]
    events = [schema.telemetry_event_from_record(each) for each in records]
    blocks: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
        "validate": (schema.validate_telemetry_record, records),
        "convert": (schema.telemetry_event_from_record, records),
        "convert_v2": (schema.telemetry_event_from_record, [older(n) for n in range(DISTINCT)]),
        "convert_legacy": (schema.telemetry_event_from_record, [legacy(n) for n in range(DISTINCT)]),
        "project": (schema.project_telemetry_event, events),
        "convert_and_project": (schema.project_telemetry_event, records),
        "to_dict": (schema.telemetry_event_to_dict, events),
    }
    for order in measuring.orders():
        call, inputs = blocks[str(order["block"])]
        calls = int(str(order["calls"]))
        started = time.perf_counter()
        for n in range(calls):
            call(inputs[n % DISTINCT])
        measuring.answer(microseconds=(time.perf_counter() - started) / calls * 1e6)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--stormlog", metavar="DIRECTORY", help="where stormlog is installed, if not beside stepspan")
    options.add_argument("--records", type=int, default=100_000, help="in each turn")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="a smoke run: the figures mean nothing")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        work(json.loads(given.worker))
        return
    if given.quick:
        given.records, given.rounds = 100, 1
    path = [given.stormlog] if given.stormlog else []
    print(f"# What stormlog's schema costs a record\n\n{measuring.machine()}")
    print(f"{given.rounds} rounds of turns of {given.records:,} records; median [quartiles]")
    contenders = {"stepspan": measuring.Worker(__file__, {"contender": "stepspan", "path": []})}
    look_in(path)
    if importlib.util.find_spec("stormlog"):
        contenders["stormlog"] = measuring.Worker(__file__, {"contender": "stormlog", "path": path})
    else:
        print("stormlog itself is not installed here: only stepspan is measured")
    rows = []
    for block, title in TASKS.items():
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name, worker in contenders.items():
                taken[name].append(worker(block=block, calls=given.records)["microseconds"])
        rows.append([title, *(measuring.middle(figures, 2) for figures in taken.values())])
        if "stormlog" in taken:
            ratios = [a / b for a, b in zip(taken["stormlog"], taken["stepspan"], strict=True)]
            rows[-1].append(
                measuring.verdict(ratios, PROMISED[block]) if block in PROMISED else f"{measuring.middle(ratios)}x"
            )
    head = ["µs a record", *contenders, *(["stormlog's is"] if "stormlog" in contenders else [])]
    measuring.table("**one thread**", head, rows)
    for worker in contenders.values():
        worker.close()
    print(f"\n{measuring.machine()}")


if __name__ == "__main__":
    main()
