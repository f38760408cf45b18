"""Importing an evsys run directory: every generation of its rows, at their own times."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.events_of import mapper
from hypothesis import given
from hypothesis import strategies as st

from stepspan.compat.evsys import reader
from stepspan.compat.importing import write_session
from stepspan.journal.liveness import read_closed
from stepspan.stores import JSONLLogStore

T = 1_760_000_000
"""Unix seconds."""
NS = 1_000_000_000


def lay(path: Path, *rows: object, mtime: float | None = None) -> Path:
    """A file of rows: objects, or lines as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    if mtime is not None:
        ns = int(mtime) * NS + round(mtime % 1 * 1e6) * 1000
        os.utime(path, ns=(ns, ns))
    return path


def imported(path: Path, directory: Path, **arguments: object) -> list[dict[str, Any]]:
    """The one session's events without its header, written and read back."""
    (session,) = reader.read_sessions(path, **arguments)  # type: ignore[arg-type]
    written, _ = write_session(directory, session)
    return runs.events(written)[1:]


def metrics(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """(seconds after T, step, split, metrics) of each metrics event."""
    return [
        ((event["ts"] - T * NS) / NS, event.get("step"), event["split"], event["metrics"])
        for event in events
        if event["tag"] == "metrics"
    ]


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 # the text is what the test compares
        list(reader.read_sessions(path))
    return str(refused.value)


# -------------------------------------------------------------------------------------------------------- generations


def test_what_a_store_wrote_is_imported_as_it_was_logged(tmp_path: Path) -> None:
    times = iter(T + n for n in range(1, 10))
    store = JSONLLogStore(log_dir=tmp_path / "run-7" / "logs", clock=lambda: next(times))
    store.log_hyperparams({"lr": 0.5})
    store.log_scalar("loss", 2.0, 0)
    store.log_metrics({"loss": 1.0, "lr": 0.5}, 1)
    store.log_metrics({"val/loss": 1.5}, 1, split="val")
    store.log_artifact("model", "out/model.pt", kind="checkpoint")
    events = imported(tmp_path / "run-7", tmp_path / "runs")
    assert [event["tag"] for event in events] == [
        "run_begin", "hyperparams", "metrics", "metrics", "metrics", "artifact", "run_end",
    ]  # fmt: skip
    assert events[0]["name"] == "run-7"
    assert events[1]["params"] == {"lr": 0.5}
    assert metrics(events) == [
        (1.0, 0, "train", {"loss": 2.0}),
        (2.0, 1, "train", {"loss": 1.0, "lr": 0.5}),
        (3.0, 1, "val", {"val/loss": 1.5}),
    ]
    artifact = events[5]
    assert (artifact["ts"], artifact["name"], artifact["path"], artifact["kind"]) == (
        (T + 4) * NS, "model", "out/model.pt", "checkpoint",
    )  # fmt: skip
    assert events[0]["ts"] < events[2]["ts"], "the run begins before its first row"
    assert (events[-1]["begin"], events[-1]["status"]) == (events[0]["seq"], "completed")


def test_rows_of_log_scalar_have_no_split(tmp_path: Path) -> None:
    lay(tmp_path / "metrics.jsonl", {"ts": T + 0.5, "step": 3, "metrics": {"loss": 1}})
    assert metrics(imported(tmp_path, tmp_path / "runs")) == [(0.5, 3, "train", {"loss": 1.0})]


def test_later_rows_stand_by_split_and_have_no_time(tmp_path: Path) -> None:
    logs = tmp_path / "arm0" / "logs"
    train = [{"step": n, "split": "train", "metrics": {"loss": float(n)}} for n in range(3)]
    lay(logs / "training" / "metrics.jsonl", *train, mtime=T + 10)
    lay(logs / "validation" / "metrics.jsonl", {"step": 2, "split": "val", "metrics": {"acc": 0.5}}, mtime=T + 9.9995)
    lay(logs / "test" / "metrics.jsonl", {"step": 0, "metrics": {"acc": 0.75}, "name": "full"}, mtime=T + 11)
    events = imported(tmp_path / "arm0", tmp_path / "runs")
    assert metrics(events) == [
        (9.998, 0, "train", {"loss": 0.0}),
        (9.999, 1, "train", {"loss": 1.0}),
        (9.9995, 2, "val", {"acc": 0.5}),
        (10.0, 2, "train", {"loss": 2.0}),
        (11.0, 0, "test", {"acc": 0.75}),
    ]
    assert [event.get("attributes") for event in events if event["tag"] == "metrics"][-1] == {"benchmark": "full"}


def test_every_row_without_a_time_becomes_a_point_of_its_own(tmp_path: Path) -> None:
    path = lay(tmp_path / "metrics.jsonl", *({"step": n, "metrics": {"loss": float(n)}} for n in range(2000)))
    (session,) = reader.read_sessions(path)
    written, _ = write_session(tmp_path / "runs", session)
    header, *events = runs.events(written)
    mapped = mapper("metrics", header)
    loss = [value for series, _, value in mapped.map(events) if series.name == "training.loss"]
    assert loss == [float(n) for n in range(2000)]
    assert mapped.filtered == 0


def test_rows_are_put_in_the_order_of_their_times(tmp_path: Path) -> None:
    rows = [{"ts": T + at, "step": step, "metrics": {"loss": 1.0}} for step, at in enumerate([3, 1, 2, 2])]
    lay(tmp_path / "metrics.jsonl", *rows)
    found = imported(tmp_path, tmp_path / "runs")
    assert [(event["step"], event["ts"] - T * NS) for event in found if event["tag"] == "metrics"] == [
        (1, NS), (2, 2 * NS), (3, 2 * NS + 1), (0, 3 * NS),
    ]  # fmt: skip


def test_a_row_without_a_time_among_others_has_that_of_the_row_before(tmp_path: Path) -> None:
    row = {"step": 0, "metrics": {"loss": 1.0}}
    lay(tmp_path / "metrics.jsonl", row, {"ts": T + 1, **row}, row, {"ts": T + 2, **row})
    times = [event["ts"] - T * NS for event in imported(tmp_path, tmp_path / "runs") if event["tag"] == "metrics"]
    assert times == [NS, NS + 1, NS + 2, 2 * NS]


def test_a_time_is_exactly_what_the_double_says(tmp_path: Path) -> None:
    at = 1_736_761_273.9100001
    lay(tmp_path / "metrics.jsonl", {"ts": at, "step": 0, "metrics": {"loss": 1.0}})
    (event,) = (event for event in imported(tmp_path, tmp_path / "runs") if event["tag"] == "metrics")
    assert abs(event["ts"] - int(at) * NS - (at - int(at)) * NS) <= 0.5


@pytest.mark.parametrize(
    ("conclusion", "status"),
    [
        (None, "completed"),
        ("# arm0\n\n- hypothesis: x\n- status: completed\n", "completed"),
        ("# arm0\n\n- status: failed\n", "failed"),
        ("- status: None", "completed"),
    ],
    ids=["none", "completed", "failed", "unknown"],
)
def test_the_conclusion_says_how_the_run_ended(tmp_path: Path, conclusion: str | None, status: str) -> None:
    lay(tmp_path / "metrics.jsonl", {"ts": T, "step": 0, "metrics": {"loss": 1.0}})
    if conclusion is not None:
        (tmp_path / "conclusion.md").write_text(conclusion)
    (session,) = reader.read_sessions(tmp_path)
    written, _ = write_session(tmp_path / "runs", session)
    assert runs.events(written, "run_end")[0]["status"] == status
    closed = read_closed(written)
    assert closed is not None
    assert closed.status == status


# ------------------------------------------------------------------------------------------------------- odd contents


@pytest.mark.parametrize("text", ['{"lr": 0.', "[1]", "", "\x00"], ids=["torn", "a list", "empty", "zeros"])
def test_corrupt_hyperparameters_and_artifacts_count_as_empty(tmp_path: Path, text: str) -> None:
    lay(tmp_path / "metrics.jsonl", {"ts": T, "step": 0, "metrics": {"loss": 1.0}})
    lay(tmp_path / "hyperparams.json", text)
    lay(tmp_path / "artifacts.json", text)
    tags = [event["tag"] for event in imported(tmp_path, tmp_path / "runs")]
    assert tags == ["run_begin", "metrics", "run_end"]


def test_values_that_are_no_numbers_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = '{"ts": 1760000000, "step": 0, "metrics": {"a": NaN, "b": null, "c": "x", "d": true, "e": 1e999}}\n'
    lay(tmp_path / "metrics.jsonl", row, {"ts": T + 1, "step": -1, "metrics": {"a": 1}}, {"step": 2.0, "metrics": {}})
    found = metrics(imported(tmp_path, tmp_path / "runs"))
    assert found == [
        (0.0, 0, "train", {"a": "NaN", "d": 1.0, "e": "Infinity"}),
        (1.0, None, "train", {"a": 1.0}),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"stepspan: {tmp_path}/metrics.jsonl: 2 values are not numbers, and were left out"
    ]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    lay(tmp_path / "metrics.jsonl", {"ts": T, "step": 0, "metrics": {"loss": 1.0}}, '{"ts": 17600')
    assert len(metrics(imported(tmp_path, tmp_path / "runs"))) == 1


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"ts": 17{"ts": 5}\n', "not JSON"),
        ("[1, 2]\n", "must be an object, not [1, 2]"),
        ('{"ts": 5, "step": 1}\n', "not a row of evsys"),
        ('{"ts": 5, "metrics": {}}\n', "not a row of evsys"),
        ('{"ts": "yesterday", "step": 1, "metrics": {}}\n', "not a row of evsys"),
        ('{"ts": -5, "step": 1, "metrics": {}}\n', "not a row of evsys"),
        ('{"ts": NaN, "step": 1, "metrics": {}}\n', "not a row of evsys"),
        ('{"ts": 1e300, "step": 1, "metrics": {}}\n', "not a row of evsys"),
        ('{"ts": 5, "step": 1, "metrics": [1]}\n', "not a row of evsys"),
    ],
)
def test_any_other_bad_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    path = lay(tmp_path / "metrics.jsonl", {"ts": T, "step": 0, "metrics": {"loss": 1.0}}, "\n", line, "{}\n")
    assert refusal(tmp_path).startswith(f"{path}, line 3: {why}")


def test_a_directory_with_nothing_of_evsys_is_an_error(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path)
        == f"{tmp_path}: no metrics.jsonl, hyperparams.json or artifacts.json of evsys with anything in it"
    )


def test_hyperparameters_alone_are_a_run(tmp_path: Path) -> None:
    lay(tmp_path / "hyperparams.json", {"lr": 1}, mtime=T)
    events = imported(tmp_path, tmp_path / "runs")
    assert [event["tag"] for event in events] == ["run_begin", "hyperparams", "run_end"]
    assert events[-1]["ts"] == T * NS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["ts", "step", "split", "metrics", "name", "path", "kind"])
odd_rows = st.dictionaries(fields, json_values, max_size=5)


@given(st.lists(odd_rows | json_values, max_size=4), st.lists(odd_rows, max_size=3) | json_values, json_values)
def test_any_content_ends_in_a_journal_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, artifacts: Any, hyperparams: Any
) -> None:
    place = tmp_path_factory.mktemp("run")
    lay(place / "metrics.jsonl", *(json.dumps(row) + "\n" for row in rows))
    lay(place / "artifacts.json", artifacts)
    lay(place / "hyperparams.json", hyperparams)
    reader.detect(place)
    try:
        sessions = list(reader.read_sessions(place))
    except ValueError:
        return
    for session in sessions:
        written, _ = write_session(place / "runs", session)
        header, *events = runs.events(written)
        for signal in ("metrics", "traces", "logs"):
            mapper(signal, header).map(events)


# --------------------------------------------------------------------------------------------------- ids and detection


def test_importing_twice_gives_the_same_ids_and_writes_nothing(tmp_path: Path) -> None:
    lay(tmp_path / "arm0" / "logs" / "metrics.jsonl", {"ts": T, "step": 0, "metrics": {"loss": 1.0}})
    first, second = (next(reader.read_sessions(tmp_path / "arm0")) for _ in range(2))
    assert first.header() == second.header()
    assert first.job_id.startswith("arm0-")
    assert write_session(tmp_path / "runs", first)[1] == 3
    assert write_session(tmp_path / "runs", second)[1] == 0
    assert next(reader.read_sessions(tmp_path / "arm0", job_id="mine")).job_id == "mine"


def test_runs_of_one_name_are_different_jobs(tmp_path: Path) -> None:
    for experiment in "ab":
        lay(tmp_path / experiment / "arm0" / "metrics.jsonl", {"ts": T, "step": 0, "metrics": {"loss": 1.0}})
    jobs = {next(reader.read_sessions(tmp_path / experiment / "arm0")).job_id for experiment in "ab"}
    assert len(jobs) == 2


@pytest.mark.parametrize(
    ("files", "given", "told"),
    [
        (["logs/metrics.jsonl", "logs/hyperparams.json"], ".", "logs/metrics.jsonl, logs/hyperparams.json"),
        (["metrics.jsonl"], ".", "an evsys run directory: metrics.jsonl"),
        (["metrics.jsonl"], "metrics.jsonl", "evsys metrics: metrics.jsonl"),
        (["logs/training/metrics.jsonl", "logs/test/metrics.jsonl"], ".", "logs/training/metrics.jsonl, logs/test"),
        (["training/metrics.jsonl"], ".", "training/metrics.jsonl"),
        (["hyperparams.json"], ".", None),
        ([], ".", None),
        ([], "nowhere", None),
    ],
)
def test_detection_says_what_it_takes_a_path_for(
    tmp_path: Path, files: list[Any], given: str, told: str | None
) -> None:
    for file in files:
        lay(tmp_path / file, {"ts": T, "step": 0, "split": "train", "metrics": {"loss": 1.0}})
    found = reader.detect(tmp_path / given)
    assert found is None if told is None else told in found  # type: ignore[operator]


@pytest.mark.parametrize(
    "row",
    [
        {"timestamp": "2025-01-01T00:00:00", "command": "emit", "status": "ok", "metrics": {"a": 1}, "system": {}},
        {"ts": 1.5, "tag": "step_begin", "step": 0},
        {"ts": 1, "seq": 1, "tag": "header", "crc": 5},
        {"step": 0, "metrics": {"a": 1}, "rank": 0},
        {"step": 0, "loss": 0.5},
        "not JSON\n",
        "",
    ],
    ids=["cloudmesh", "qmlhc", "a journal", "somebody else's", "flat", "text", "empty"],
)
def test_detection_takes_no_other_file_for_evsys(tmp_path: Path, row: Any) -> None:
    path = lay(tmp_path / "metrics.jsonl", row)
    assert reader.detect(path) is None
    assert reader.detect(tmp_path) is None
