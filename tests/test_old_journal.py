"""A journal of schema 1.0 as stepspan 0.1 wrote it is read, mapped and delivered to the last record, whatever changes.

`data/journal-0.1` was written before the journal had any reader but its own version: two ranks of one job by a fixed
clock, with an event of every tag, two segments, a disk that was full for a while, a session that ended ("failed") and
one whose process was killed. Beside them stands the OTLP that version made of each. Neither is ever written again: what
does not fit them breaks the journals that users have.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.journals import lines
from harness.received import decode, logs, points, spans
from harness.receiver import ScriptedReceiver
from harness.runs import command

from stepspan import __version__
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.journal.liveness import Closed, read_closed
from stepspan.mapping.mapper import mapper
from stepspan.mapping.records import SIGNALS
from stepspan.otlp.json import encode

OLD = Path(__file__).parent / "data" / "journal-0.1"
SESSIONS = dict(enumerate(sorted(find_sessions(OLD), key=lambda session: session.path)))


def otlp(rank: int) -> dict[str, Any]:
    """Signal -> the request that holds all of a rank's session."""
    text = (OLD / f"rank-{rank}.otlp.json").read_text().replace('"version":"0.1.0"', f'"version":"{__version__}"')
    found: dict[str, Any] = json.loads(text)
    return found


def end_of(session: SessionPath) -> Closed:
    last = lines(session.path)[-1]
    return read_closed(session.path) or Closed(last["seq"], last["ts"], "interrupted")


def test_it_has_an_event_of_every_tag() -> None:
    scopes = {f"{scope}_{edge}" for scope in ("run", "epoch", "step", "span") for edge in ("begin", "end")}
    others = {"metrics", "hyperparams", "artifact", "event", "error", "log", "progress", "sample", "memory", "otel"}
    assert {event["tag"] for session in SESSIONS.values() for event in lines(session.path)} == {
        *scopes,
        *others,
        *("header", "device_time", "gap"),
    }


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("rank", [0, 1])
def test_its_events_are_the_same_records(rank: int, signal: Any) -> None:
    header, *events = lines(SESSIONS[rank].path)
    fold = mapper(signal, header)
    records = [*fold.map([header, *events]), *fold.finish(end_of(SESSIONS[rank]))]
    assert in_order(json.loads(encode(signal, header["resource"], records))) == in_order(otlp(rank)[signal])


def in_order(request: dict[str, Any]) -> dict[str, Any]:
    """A request with its metrics by name: the order of series is no part of what a receiver gets."""
    for scope in request.get("resourceMetrics", [{"scopeMetrics": ()}])[0]["scopeMetrics"]:
        scope["metrics"].sort(key=lambda metric: metric["name"])
    return request


def test_it_is_delivered(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "runs")
    for segment in tmp_path.rglob("*.jsonl"):
        os.utime(segment, (0, 0))  # long silent: the killed session is over
    with ScriptedReceiver() as receiver:
        done = command("sync", tmp_path / "runs", "--endpoint", receiver.url)
        assert done.returncode == 0, done.stdout + done.stderr
        sent = [{s: decode(s, json.dumps(otlp(rank)[s]).encode(), from_json=True) for s in SIGNALS} for rank in (0, 1)]
        assert receiver.points() == {point for rank in sent for point in points(rank["metrics"])}
        for found, expected in (
            (receiver.spans(), [span for rank in sent for span in spans(rank["traces"])]),
            (receiver.logs(), [log for rank in sent for log in logs(rank["logs"])]),
        ):
            assert sorted(map(repr, found)) == sorted(map(repr, expected))
