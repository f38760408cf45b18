"""A stormlog sink becomes a journal, and its records a run's memory metrics.

    python examples/stormlog_memory.py
    stepspan status stepspan-runs

With a real stormlog run, `stepspan import SINK` does the same, and `stepspan sync --follow SINK` sends it as it grows.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from stepspan.compat.importing import write_session
from stepspan.compat.stormlog.reader import read_sessions
from stepspan.stormlog import TelemetryEvent, load_telemetry_events, telemetry_event_to_dict

MIB = 1 << 20


def sample(number: int, event_type: str) -> TelemetryEvent:
    """What stormlog's tracker writes: an event of schema 3."""
    return TelemetryEvent(
        schema_version=3,
        session_id="example",
        timestamp_ns=time.time_ns() + number * 1_000_000_000,
        event_type=event_type,
        collector="stormlog.cuda_tracker",
        sampling_interval_ms=1000,
        pid=-1,
        host="example-host",
        device_id=0,
        allocator_allocated_bytes=(100 + number) * MIB,
        allocator_reserved_bytes=512 * MIB,
        allocator_active_bytes=None,
        allocator_inactive_bytes=None,
        allocator_change_bytes=MIB,
        device_used_bytes=700 * MIB,
        device_free_bytes=300 * MIB,
        device_total_bytes=1000 * MIB,
        context=None,
        job_id="stormlog-example",
    )


def main() -> None:
    """Write a sink, read it back as stormlog would, and import it."""
    kinds = ["start", *["sample"] * 8, "stop"]
    with TemporaryDirectory() as place:
        sink = Path(place)
        lines = [json.dumps(telemetry_event_to_dict(sample(number, kind))) for number, kind in enumerate(kinds)]
        (sink / "segment-000001.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{len(load_telemetry_events(sink))} events in the sink")
        for session in read_sessions(sink):
            journal, events = write_session(Path("stepspan-runs"), session)
            print(f"{events} events in {journal}")
    print("send it: stepspan sync stepspan-runs --endpoint http://localhost:4318")


if __name__ == "__main__":
    main()
