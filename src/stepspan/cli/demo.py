"""`stepspan demo`: start the ranks of a small training, and show what became of their telemetry."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from stepspan.cli.status import print_ledgers
from stepspan.config import load
from stepspan.deliver.ledgers import session_ledger
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.layout import find_sessions, slug
from stepspan.start import _exporters_of

DELIVERY_TIMEOUT_S = 30.0
"""How long delivery may take after the training."""


def run_demo(ranks: int, epochs: int, directory: Path) -> int:
    """Train, then print where the journal is, or what has been delivered. The exit code. Raises `ConfigError`."""
    try:
        from stepspan.cli.demo_training import shared_memory  # needs scikit-learn
    except ImportError as error:
        print(f"stepspan: {error}: pip install 'stepspan[demo]'", file=sys.stderr)
        return 2
    job_id = f"demo-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    settings = load({}, os.environ)
    exporters = [] if settings.delivery == "off" else _exporters_of(settings)
    directory = directory.absolute()
    print(f"training in {ranks} ranks as job {job_id}", flush=True)
    context = multiprocessing.get_context("spawn")
    memory, barrier = shared_memory(ranks), context.Barrier(ranks)
    processes = [
        context.Process(target=_rank, args=(job_id, rank, ranks, epochs, directory, memory, barrier))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        print(f"stepspan: a rank ended with exit code {failed[0]}", file=sys.stderr)
        return 1
    job = Path(os.path.relpath(directory / slug(job_id)))
    if not exporters:
        print(f"\njournal: {job}\nsend it: {_program()} sync {job} --endpoint http://localhost:4318")
        return 0
    return _await_delivery(job, exporters)


def _rank(job_id: str, rank: int, ranks: int, epochs: int, directory: Path, memory: Any, barrier: Barrier) -> None:
    """The process of one rank: set what a launcher would set, and train."""
    os.environ.update(
        STEPSPAN_JOB_ID=job_id, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1"
    )
    from stepspan.cli.demo_training import train  # numpy reads OMP_NUM_THREADS as it is imported

    train(rank, ranks, epochs, directory, memory, barrier)


def _await_delivery(job: Path, exporters: Sequence[OtlpExporter]) -> int:
    """Wait while the deliverer works, then print the ledger."""
    deadline = time.monotonic() + DELIVERY_TIMEOUT_S
    print("\ndelivering ...", flush=True)
    while True:
        ledgers = [session_ledger(session) for session in find_sessions(job)]
        states = [
            ledger["destinations"].get(exporter.destination, {}).get(signal)
            for ledger in ledgers
            for exporter in exporters
            for signal in exporter.signals
        ]
        delivered = all(state and state["finished"] for state in states)
        if delivered or any(state and state["state"] == "hold" for state in states) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    print_ledgers(ledgers)
    if not delivered:
        print(f"\ndelivery is not complete: the deliverer continues; or later: {_program()} sync {job}")
    return 0 if delivered else 1


def _program() -> str:
    """How to call this program from here."""
    return "stepspan" if shutil.which("stepspan") else f"{os.path.relpath(sys.executable)} -m stepspan"
