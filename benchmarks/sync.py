"""How fast `stepspan sync` moves a journal: beside the official exporter, which is handed ready-made SDK objects.

    python benchmarks/sync.py [--quick] [--rounds N] [--gigabyte]

Ours reads the journal, checks, maps, encodes, sends and moves its cursors: `stepspan.deliver.Deliverer`, as `sync` runs
it. Theirs is `export` of `MetricsData` that were built before the clock started: the same points, in requests of the
SDK's size and, which is the comparison that is hardest for us, in requests as large as ours. Both send, over protocols
of both, to a receiver in a process of its own that discards; each turn is a new process, and contenders take turns.

The official exporter for http/json is a beta that wants another version of the SDK than ours: it is compared with where
`--json-python` names the Python of an environment that has opentelemetry-exporter-otlp-json-http and stepspan's
dependencies other than the official exporters.

`--gigabyte` also delivers a journal of 1 GB and one of 50 MB, for the memory it takes. Writing it takes about a minute
or two, delivering it a few.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import measuring
from measuring import Receiver, Worker

if TYPE_CHECKING:
    from stepspan.journal.layout import SessionPath
    from stepspan.mapping.records import Signal

BETA = "(beta)"
STEP_BYTES = 412  # of journal, about
SDK_REQUEST = 512
"""Records in a request of the SDK's batch processors (OTEL_BSP_MAX_EXPORT_BATCH_SIZE). Its metric readers send less: a
point for each series."""


METRICS, ALL = ["metrics"], ["metrics", "traces", "logs"]
OURS = {"contender": "stepspan", "signals": METRICS}
THEIRS = {"contender": "official", "signals": METRICS}
CONTENDERS: dict[str, dict[str, Any]] = {
    "official http/protobuf": {**THEIRS, "protocol": "http/protobuf"},
    "official http/protobuf, gzip": {**THEIRS, "protocol": "http/protobuf", "gzip": 9},
    "official http/protobuf, gzip-1 (patched)": {**THEIRS, "protocol": "http/protobuf", "gzip": 1},
    "official http/json (beta)": {**THEIRS, "protocol": "http/json"},
    "official http/protobuf, 512 a request": {**THEIRS, "protocol": "http/protobuf", "request": SDK_REQUEST},
    "official http/json (beta), 512 a request": {**THEIRS, "protocol": "http/json", "request": SDK_REQUEST},
    "official grpc": {**THEIRS, "protocol": "grpc"},
    "stepspan http/json": {**OURS, "protocol": "http/json"},
    "stepspan http/json, gzip-1": {**OURS, "protocol": "http/json", "gzip": 1},
    "stepspan http/protobuf": {**OURS, "protocol": "http/protobuf"},
    "stepspan http/protobuf, gzip-1": {**OURS, "protocol": "http/protobuf", "gzip": 1},
    "stepspan grpc": {**OURS, "protocol": "grpc"},
    "all signals: official http/protobuf": {**THEIRS, "signals": ALL, "protocol": "http/protobuf"},
    "all signals: official http/json (beta)": {**THEIRS, "signals": ALL, "protocol": "http/json"},
    "all signals: stepspan http/json": {**OURS, "signals": ALL, "protocol": "http/json"},
    "all signals: stepspan http/protobuf": {**OURS, "signals": ALL, "protocol": "http/protobuf"},
}
"""Name -> what its process is told. Points alone, unless it says all signals."""


class Ratio(NamedTuple):
    """Two contenders, and how many times the other's rate ours is to be."""

    ours: str
    theirs: str
    promised: float | None = None


RATIOS = [
    Ratio("stepspan http/json", "official http/json (beta), 512 a request", 5),
    Ratio("stepspan http/json", "official http/json (beta)", 5),
    Ratio("stepspan http/protobuf", "official http/protobuf, 512 a request", 2),
    Ratio("stepspan http/protobuf", "official http/protobuf", 2),
    Ratio("stepspan http/protobuf, gzip-1", "official http/protobuf, gzip-1 (patched)", 2),
    Ratio("stepspan http/protobuf, gzip-1", "official http/protobuf, gzip"),
    Ratio("stepspan grpc", "official grpc"),
    Ratio("all signals: stepspan http/json", "all signals: official http/json (beta)"),
    Ratio("all signals: stepspan http/protobuf", "all signals: official http/protobuf"),
]


# --- a contender's process: one turn, then it is gone


def work(task: dict[str, Any]) -> None:
    from stepspan.journal.layout import find_sessions

    (session,) = find_sessions(Path(task["directory"]))
    prepare = {"stepspan": stepspan_delivery, "official": official_export}[task["contender"]]
    deliver = prepare(session, task)
    measuring.answer(ready=True)
    for _ in measuring.orders():
        gc.collect()
        gc.freeze()  # objects that were built before must not be looked at again and again
        wall, cpu = time.perf_counter(), time.process_time()
        records = deliver()
        results = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        measuring.answer(records=records, memory=measuring.peak_memory(), **results)


def stepspan_delivery(session: SessionPath, task: dict[str, Any]) -> Callable[[], int]:
    from stepspan.deliver.deliverer import Deliverer, prepare_process
    from stepspan.deliver.ledgers import cursors
    from stepspan.deliver.options import Options
    from stepspan.exporters.otlp import OtlpExporter

    for signal in set(ALL) - set(task["signals"]):
        os.environ[f"OTEL_{signal.upper()}_EXPORTER"] = "none"
    compression = "gzip" if task.get("gzip") else None
    exporter = OtlpExporter(task["endpoint"], protocol=task["protocol"], compression=compression)
    options = Options(boot_id="", state_directory=Path(task["state"]))
    deliverer = Deliverer([exporter], lambda _: [session], options)

    def deliver() -> int:
        prepare_process()
        deliverer.start()
        while not all(scheduler.idle or scheduler.broken for scheduler in deliverer.schedulers):
            time.sleep(0.005)
        deliverer.stop()
        states = cursors(Path(task["state"], session.path.name))[exporter.destination].values()
        assert all(state.position.finished for state in states), states
        return sum(state.ledger.delivered for state in states)

    return deliver


def official_export(session: SessionPath, task: dict[str, Any]) -> Callable[[], int]:
    """The exporters as they are installed; with `gzip` 1 their level, which they don't let one choose, is changed."""
    from stepspan.otlp import sdk_objects

    exporters = official_exporters(task)
    make: dict[str, Callable[..., Any]] = {
        "metrics": sdk_objects.metrics_data,
        "traces": sdk_objects.readable_spans,
        "logs": sdk_objects.log_records,
    }
    requests: dict[str, list[Any]] = {}
    records = 0
    for signal in task["signals"]:
        requests[signal] = []
        for resource, batch in batches(session, signal):
            batch = [record for record in batch if signal != "metrics" or record[2] is not None]  # it can't say None
            records += len(batch)
            size = task.get("request") or len(batch)
            for first in range(0, len(batch), size or 1):
                requests[signal].append(make[signal](resource, batch[first : first + size]))

    def export(signal: str) -> None:
        for request in requests[signal]:
            assert exporters[signal].export(request).name == "SUCCESS"

    def deliver() -> int:
        threads = [threading.Thread(target=export, args=(signal,)) for signal in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return records

    return deliver


def official_exporters(task: dict[str, Any]) -> dict[str, Any]:
    if task["protocol"] == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

        return {"metrics": Grpc(task["endpoint"], insecure=True)}
    flavour = task["protocol"].replace("http/protobuf", "proto").removeprefix("http/")
    package = f"opentelemetry.exporter.otlp.{flavour}.http"
    kinds = {
        "metrics": ("metric_exporter", "OTLPMetricExporter"),
        "traces": ("trace_exporter", "OTLPSpanExporter"),
        "logs": ("_log_exporter", "OTLPLogExporter"),
    }
    if task.get("gzip"):
        os.environ["OTEL_EXPORTER_OTLP_COMPRESSION"] = "gzip"
    if task.get("gzip") == 1:
        gzip.GzipFile = partial(gzip.GzipFile, compresslevel=1)  # type: ignore[misc,assignment]
    return {
        signal: getattr(import_module(f"{package}.{module}"), name)(f"{task['endpoint']}/v1/{signal}")
        for signal, (module, name) in kinds.items()
    }


def batches(session: SessionPath, signal: Signal) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The records of a journal as delivery would send them, request by request."""
    from stepspan.deliver.options import BATCH_BYTES
    from stepspan.mapping.mapper import mapper
    from stepspan.reading.sessions import SessionReader

    with SessionReader(session) as reader:
        assert reader.closed is not None
        fold = mapper(signal, reader.header)
        for batch in reader.batches(size=BATCH_BYTES):
            records = fold.map(batch.events)
            if batch.at_end:
                records = [*records, *fold.finish(reader.closed)]
            yield reader.header["resource"], records


# --- the rounds


def turn(name: str, journal: Path, receiver: Receiver, json_python: str | None = None) -> dict[str, float]:
    """One delivery of a journal."""
    about = CONTENDERS[name]
    python = json_python if BETA in name else None
    with tempfile.TemporaryDirectory(dir=journal.parent) as state:
        endpoint = receiver.grpc_endpoint if about["protocol"] == "grpc" else receiver.endpoint
        worker = Worker(
            __file__, {**about, "directory": str(journal), "state": state, "endpoint": endpoint}, python=python
        )
        worker.result()
        before = receiver.counts()
        results = worker()
        after = receiver.counts()
        worker.close()
    results["rate"] = results["records"] / results["wall"]
    results["cpu_rate"] = results["records"] / results["cpu"]
    results["bytes"] = after["bytes"] / results["records"]
    results["receiver"] = (after["cpu"] - before["cpu"]) / results["wall"]
    return results


def rates(options: argparse.Namespace, place: Path, receiver: Receiver) -> None:
    journal = place / "journal"
    measuring.write_journal(journal, options.steps)
    names = [name for name in CONTENDERS if options.json_python or BETA not in name]
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            turns[name].append(turn(name, journal, receiver, options.json_python))
    records = {name: int(results[0]["records"]) for name, results in turns.items()}
    print(f"\n{options.steps:,} steps: {records['stepspan http/json']:,} points", end="")
    print(f", {records['all signals: stepspan http/json']:,} records of all signals")
    rows = []
    for ours, theirs, promised in RATIOS:
        if theirs not in turns:
            continue
        rate, cpu = (
            [a[what] / b[what] for a, b in zip(turns[ours], turns[theirs], strict=True)]
            for what in ("rate", "cpu_rate")
        )
        kept = "" if not promised else f"{promised:g}x: {'yes' if measuring.quartiles(rate)[1] >= promised else 'NO'}"
        rows.append([f"{ours} / {theirs}", f"{measuring.middle(rate)}x", f"{measuring.middle(cpu)}x", kept])
    measuring.table("**ratios**", ["", "records/s", "records per CPU second", "promised"], rows)
    rows = []
    for name in names:
        of = {what: [result[what] for result in turns[name]] for what in turns[name][0]}
        rows.append(
            [
                name,
                measuring.middle(of["rate"], 0),
                measuring.middle(of["cpu_rate"], 0),
                f"{measuring.quartiles(of['bytes'])[1]:.0f}",
                f"{100 * measuring.quartiles(of['receiver'])[1]:.0f}%",
            ]
        )
    head = ["", "records/s", "records per CPU second", "bytes a record", "receiver busy"]
    measuring.table("**delivering a journal**", head, rows)


def memory(options: argparse.Namespace, place: Path, receiver: Receiver) -> None:
    """The most memory that delivery holds, by the journal's size."""
    rows = []
    for size in options.sizes:
        journal = place / f"{size}"
        started = time.perf_counter()
        measuring.write_journal(journal, size // STEP_BYTES)
        written = time.perf_counter() - started
        found = sum(path.stat().st_size for path in journal.rglob("*.jsonl"))
        results = turn("all signals: stepspan http/protobuf", journal, receiver)
        rows.append(
            [
                f"{found / 1e6:,.0f} MB",
                f"{written:,.0f} s",
                f"{results['wall']:,.0f} s",
                f"{results['records'] / results['wall']:,.0f}",
                f"{results['memory']:.1f} MiB",
            ]
        )
    head = ["journal", "written in", "delivered in", "records/s", "most memory"]
    measuring.table("**memory: all signals over http/protobuf**", head, rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--quick", action="store_true", help="a smoke run: the figures mean nothing")
    options.add_argument("--rounds", type=int, default=5, help="0: only the memory")
    options.add_argument("--steps", type=int, default=200_000, help="of the journal that contenders deliver")
    options.add_argument("--gigabyte", action="store_true", help="memory with a journal of 1 GB, beside one of 50 MB")
    options.add_argument(
        "--json-python", help="a Python with the beta of the official http/json exporter, to compare with"
    )
    options.add_argument("--directory", help="where the journals go")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    given = options.parse_args()
    measuring.clean_environment()
    if given.worker:
        work(json.loads(given.worker))
        return
    given.sizes = [50_000_000, 1_000_000_000] if given.gigabyte else [5_000_000, 50_000_000]
    if given.quick:
        given.rounds, given.steps, given.sizes = 1, 1000, [100_000, 200_000]
    print(f"# How fast a journal is delivered\n\n{measuring.machine()}")
    print(f"{given.rounds} rounds; median [quartiles]", flush=True)
    with tempfile.TemporaryDirectory(dir=given.directory) as place, Receiver() as receiver:
        if given.rounds:
            rates(given, Path(place), receiver)
        memory(given, Path(place), receiver)
    print(f"\n{measuring.machine()}")


if __name__ == "__main__":
    main()
