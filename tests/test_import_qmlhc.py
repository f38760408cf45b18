"""Importing qmlhc's telemetry: its rows become the spans, metrics and exceptions that they told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from hypothesis import given
from hypothesis import strategies as st

from stepspan.callbacks import CallbackList, RunCallback, TelemetryLogger
from stepspan.compat.importing import write_session
from stepspan.compat.qmlhc import reader as qmlhc
from stepspan.events import Event
from stepspan.mapping.mapper import mapper
from stepspan.testing import recorded_run

T = 1_760_000_000
NS = 1_000_000_000


def lay(path: Path, *rows: object) -> Path:
    """A file of rows, a second apart unless they have a time: objects, or lines as they are."""
    lines = []
    for second, row in enumerate(rows):
        lines.append(row if isinstance(row, str) else json.dumps({"ts": T + second, **row}) + "\n")  # type: ignore[dict-item]
    path.write_text("".join(lines))
    return path


def imported(path: Path, directory: Path) -> Path:
    (session,) = qmlhc.read_sessions(path)
    return write_session(directory, session)[0]


def begin(step: int, **more: Any) -> dict[str, Any]:
    return {"tag": "step_begin", "step": step, **more}


def end(step: int, **context: Any) -> dict[str, Any]:
    return {"tag": "step_end", "step": step, "context": context}


def epoch(number: int) -> dict[str, Any]:
    return {"tag": "epoch_begin", "epoch": number}


def epoch_end(number: int, **context: Any) -> dict[str, Any]:
    return {"tag": "epoch_end", "epoch": number, "context": context}


ERROR = {"tag": "error", "type": "ValueError", "message": "diverged"}


def test_rows_become_scopes_metrics_and_errors_at_their_times(tmp_path: Path) -> None:
    rows = [
        epoch(0),
        begin(0),
        end(0, loss=0.5, note="x", ok=True),
        begin(1),
        ERROR,
        end(1, loss=0.25),
        epoch_end(0, acc=1),
    ]
    session = imported(lay(tmp_path / "telemetry.jsonl", *rows), tmp_path / "runs")
    assert runs.outline(session) == [
        "run",
        "  epoch 0",
        "    step 0",
        "train 0: loss=0.5",
        "    end step",
        "    step 1",
        "      error ValueError",
        "train 1: loss=0.25",
        "    end step",
        "train 1: acc=1.0",
        "  end epoch",
        "end run completed",
    ]
    at = {event["tag"]: event["ts"] for event in runs.events(session)}
    first = {event["tag"]: event["ts"] for event in reversed(runs.events(session))}
    assert first["epoch_begin"] == T * NS
    assert [event["ts"] for event in runs.events(session, "metrics")] == [(T + n) * NS for n in (2, 5, 6)]
    assert at["epoch_end"] == (T + 6) * NS + 1, "the metrics of its row come first"
    assert first["run_begin"] < first["epoch_begin"]
    spans = runs.spans(session)
    assert spans["training.step 1"].error == "ValueError: diverged"
    assert spans["training.step 0"].end - spans["training.step 0"].start == NS + 1


def test_what_a_logger_wrote_is_what_the_run_beside_it_recorded(tmp_path: Path) -> None:
    with recorded_run() as recording:
        both = CallbackList([TelemetryLogger(tmp_path / "t.jsonl", flush_interval=4), RunCallback(recording.run)])
        for number in (0, 1):
            both.on_epoch_begin(number, {})
            for step in range(3):
                both.on_step_begin(step, {})
                both.on_step_end(step, {"loss": 1.0 / (step + 1), "bad": float("nan"), "state": object()})
            both.on_epoch_end(number, {"acc": 0.5})
        both.callbacks[0].flush()  # type: ignore[attr-defined]

    def told(events: list[Event]) -> list[Any]:
        kept = ("tag", "step", "epoch", "lap", "split", "metrics")
        return [
            {name: event[name] for name in kept if name in event}
            for event in events
            if event["tag"] not in {"header", "run_begin", "run_end"}
        ]

    assert told(runs.events(imported(tmp_path / "t.jsonl", tmp_path / "runs"))) == told(recording.events())


def test_laps_are_counted_as_a_run_counts_them(tmp_path: Path) -> None:
    rows = [row for step in (0, 1, 0, 0, 5) for row in (begin(step), end(step))]
    session = imported(lay(tmp_path / "t.jsonl", *rows), tmp_path / "runs")
    assert [(e["step"], e.get("lap", 0)) for e in runs.events(session, "step_begin")] == [
        (0, 0), (1, 0), (0, 1), (0, 2), (5, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "status", "ends"),
    [
        ([epoch(0), begin(0), end(0), epoch_end(0)], "completed", [None, None]),
        ([begin(0), end(0)], "completed", [None]),
        ([epoch(0), begin(0), end(0)], "interrupted", [None, "interrupted"]),
        ([epoch(0), begin(0)], "interrupted", ["interrupted", "interrupted"]),
        ([epoch(0), begin(0), ERROR], "failed", ["error", "error"]),
        ([ERROR], "failed", []),
        ([begin(0), ERROR, begin(1), end(1)], "completed", ["interrupted", None]),
        ([epoch(0), begin(0), epoch_end(0)], "completed", ["interrupted", None]),
        ([epoch(0), begin(0), epoch(0), epoch_end(0)], "completed", ["interrupted", "interrupted", None]),
        ([end(0, loss=1), epoch_end(0)], "completed", []),
    ],
    ids=[
        "whole", "no epochs", "killed between steps", "killed in a step", "raised", "only an error", "went on",
        "a step without an end", "appended by a second run", "ends only",
    ],
)  # fmt: skip
def test_how_a_file_ends_says_how_its_run_did(tmp_path: Path, rows: list[Any], status: str, ends: list[Any]) -> None:
    session = imported(lay(tmp_path / "t.jsonl", *rows), tmp_path / "runs")
    assert [event.get("status") for event in runs.events(session, "step_end", "epoch_end")] == ends
    assert [event["status"] for event in runs.events(session, "run_end")] == [status]
    assert runs.status_of(session) == status


def test_a_step_without_an_end_does_not_last_until_a_second_run(tmp_path: Path) -> None:
    rows = [begin(0), {**ERROR, "ts": T + 1}, begin(1, ts=T + 9000), {**end(1), "ts": T + 9001}]
    session = imported(lay(tmp_path / "t.jsonl", *rows), tmp_path / "runs")
    step = runs.spans(session)["training.step 0"]
    assert step.end == (T + 1) * NS + 1


def test_rows_that_go_back_in_time_keep_their_order(tmp_path: Path) -> None:
    session = imported(lay(tmp_path / "t.jsonl", begin(0, ts=T + 5), {**end(0), "ts": T + 3}), tmp_path / "runs")
    ts = [event["ts"] - (T + 5) * NS for event in runs.events(session, "step_begin", "step_end")]
    assert ts == [0, 1]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = lay(tmp_path / "t.jsonl", begin(0), end(0, loss=1), '{"ts": 17')
    assert len(runs.events(imported(path, tmp_path / "runs"), "step_end")) == 1


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"ts": 17{"ts": 5}\n', "not JSON"),
        ("3\n", "must be an object, not 3"),
        ('{"ts": 5, "tag": "step_middle", "step": 1}\n', "tag='step_middle' is not one of"),
        ('{"ts": 5, "tag": ["step_begin"], "step": 1}\n', "tag=['step_begin'] is not one of"),
        ('{"tag": "step_begin", "step": 1}\n', "ts=None"),
        ('{"ts": true, "tag": "step_begin", "step": 1}\n', "ts=True"),
        ('{"ts": 5, "tag": "step_begin"}\n', "step_begin: step=None"),
        ('{"ts": 5, "tag": "epoch_end", "epoch": -1}\n', "epoch_end: epoch=-1"),
    ],
)
def test_any_other_bad_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    path = lay(tmp_path / "t.jsonl", begin(0), line, end(0))
    with pytest.raises(ValueError) as refused:  # noqa: PT011 # the text is what the test compares
        list(qmlhc.read_sessions(path))
    assert str(refused.value).startswith(f"{path}, line 2: {why}")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        list(qmlhc.read_sessions(lay(tmp_path / "t.jsonl")))


def test_importing_twice_gives_the_same_ids_and_writes_nothing(tmp_path: Path) -> None:
    path = lay(tmp_path / "telemetry.jsonl", begin(0), end(0))
    first, second = (next(qmlhc.read_sessions(path)) for _ in range(2))
    assert first.header() == second.header()
    assert first.job_id.startswith("telemetry-")
    assert write_session(tmp_path / "runs", first)[1] == 4
    assert write_session(tmp_path / "runs", second)[1] == 0
    assert next(qmlhc.read_sessions(path, job_id="mine")).job_id == "mine"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (begin(0), "qmlhc telemetry that begins with step_begin"),
        (end(0, loss=1), "qmlhc telemetry that begins with step_end"),
        (epoch(0), "qmlhc telemetry that begins with epoch_begin"),
        (ERROR, "qmlhc telemetry that begins with error"),
        ({**begin(0), "seq": 3, "crc": 1, "parent": 1, "split": "train"}, None),
        ({"tag": "step_begin"}, None),
        ({**begin(0), "loss": 1}, None),
        ({"step": 0, "split": "train", "metrics": {"loss": 1}}, None),
        ({**begin(0), "ts": "now"}, None),
        ("[1]\n", None),
        ("", None),
    ],
    ids=["step", "step end", "epoch", "error", "a journal", "no step", "more", "evsys", "a time", "a list", "empty"],
)
def test_detection_says_what_it_takes_a_file_for(tmp_path: Path, row: Any, told: str | None) -> None:
    assert qmlhc.detect(lay(tmp_path / "t.jsonl", row)) == told
    assert qmlhc.detect(tmp_path) is None
    assert qmlhc.detect(tmp_path / "nowhere") is None


values = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3)
odd = st.fixed_dictionaries(
    {"ts": st.integers(1, 9) | st.floats(1, 9) | values, "tag": st.sampled_from([*sorted(qmlhc.TAGS), "x"])},
    optional={
        "step": st.integers(0, 3) | values,
        "epoch": st.integers(0, 3) | values,
        "context": values | st.dictionaries(st.text(max_size=3), values | st.lists(values, max_size=2), max_size=3),
        "type": values,
        "message": values,
    },
)


@given(st.lists(odd, max_size=8))
def test_any_content_ends_in_a_journal_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    place = tmp_path_factory.mktemp("qmlhc")
    path = lay(place / "t.jsonl", *rows)
    qmlhc.detect(path)
    try:
        sessions = list(qmlhc.read_sessions(path))
    except ValueError:
        return
    for session in sessions:
        written, _ = write_session(place / "runs", session)
        header, *events = runs.events(written)
        begun = [event["seq"] for event in events if event["tag"].endswith("_begin")]
        assert sorted(event["begin"] for event in events if "begin" in event) == begun
        for signal in ("metrics", "traces", "logs"):
            mapper(signal, header).map(events)
