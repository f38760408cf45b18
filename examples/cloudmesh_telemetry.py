"""A model is loaded and serves requests, and reports it through cloudmesh-ai's Telemetry.

    python examples/cloudmesh_telemetry.py                                  # a database, and a journal to send later
    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 python examples/cloudmesh_telemetry.py      # sent as it happens

The one line to change in a program that uses `cloudmesh.ai.common.telemetry` is the import.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing

from stepspan import Telemetry

DATABASE = "telemetry.db"


async def serve(telemetry: Telemetry) -> None:
    """Serve twenty requests, four at a time; one of them fails."""
    telemetry.emit(event="model_load_start", status="started", model="llama-3-8b")
    await asyncio.sleep(0.2)
    telemetry.emit(event="model_load_end", status="completed")

    @telemetry.track(event="request")
    async def answer(number: int) -> None:
        latency = random.uniform(0.01, 0.05)
        await asyncio.sleep(latency)
        if number == 13:
            raise ValueError("the prompt is longer than the context")
        telemetry.emit(metric="inference_latency", value=latency, status="completed")
        telemetry.emit(metrics={"tokens_per_sec": random.gauss(45, 3), "gpu_util": random.randint(80, 99)})

    for first in range(0, 20, 4):
        await asyncio.gather(*(answer(number) for number in range(first, first + 4)), return_exceptions=True)
    await telemetry.emit(metric="accuracy", value=0.92)  # awaited: it is in the database now


def latencies() -> list[tuple[str, float]]:
    """The latencies of the latest run over time, in plain SQL."""
    with closing(sqlite3.connect(DATABASE)) as database:
        (job_id,) = database.execute("SELECT job_id FROM telemetry ORDER BY id DESC LIMIT 1").fetchone()
        query = """
            SELECT strftime('%H:%M:%f', ts / 1e9, 'unixepoch'), value FROM points
             WHERE job_id = ? AND metric = 'inference_latency' ORDER BY ts"""
        return database.execute(query, (job_id,)).fetchall()


def main() -> None:
    """Serve, and show how long it took."""
    with Telemetry("serve", backends=["sqlite", "otel"]) as telemetry:
        telemetry.start()  # opens the run: better before the event loop than in it
        asyncio.run(serve(telemetry))
        telemetry.complete()
    for time, seconds in latencies():
        print(f"{time}  {seconds * 1000:5.1f} ms  {'#' * round(seconds * 1000)}")


if __name__ == "__main__":
    main()
