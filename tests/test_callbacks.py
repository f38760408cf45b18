"""qmlhc callbacks: the hooks, the loggers' exact rows, no row lost or doubled, and the bridge to a run."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import runs
from harness.journals import handled
from harness.stack import Collector, Prometheus

import stepspan
from stepspan import callbacks
from stepspan.callbacks import Callback, CallbackList, MemoryLogger, RunCallback, TelemetryLogger
from stepspan.testing import recorded_run


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def train(callback: Any, epochs: int = 1, steps: int = 2) -> None:
    """A loop of qmlhc's."""
    for epoch in range(epochs):
        callback.on_epoch_begin(epoch, {"info": "start"})
        for step in range(steps):
            callback.on_step_begin(step, {"epoch": epoch, "depth": 1})
            callback.on_step_end(step, {"loss": 1.0 / (step + 1), "depth": 1, "note": "fine", "done": False})
        callback.on_epoch_end(epoch, {"accuracy": 0.5})


# -------------------------------------------------------------------------------------------------------------- hooks


def test_the_public_names_are_sorted_and_there() -> None:
    assert callbacks.__all__ == sorted(callbacks.__all__)
    assert all(hasattr(callbacks, name) for name in callbacks.__all__)


def test_a_callback_does_nothing() -> None:
    train(Callback())
    Callback().on_error(ValueError("x"), {})


def test_a_list_dispatches_each_hook_in_order() -> None:
    calls = []

    class Named(Callback):
        def __init__(self, name: str) -> None:
            for hook in ("on_step_begin", "on_step_end", "on_epoch_begin", "on_epoch_end", "on_error"):
                setattr(self, hook, lambda what, context, hook=hook: calls.append((name, hook, what, context)))

    both = CallbackList([Named("a")])
    both.append(Named("b"))
    error = ValueError("x")
    for hook, what in [("on_epoch_begin", 0), ("on_step_begin", 1), ("on_error", error), ("on_step_end", 1)]:
        getattr(both, hook)(what, {"k": 1})
    both.on_epoch_end(0, {})
    assert calls == [
        (name, hook, what, context)
        for hook, what, context in [
            ("on_epoch_begin", 0, {"k": 1}), ("on_step_begin", 1, {"k": 1}), ("on_error", error, {"k": 1}),
            ("on_step_end", 1, {"k": 1}), ("on_epoch_end", 0, {}),
        ]
        for name in "ab"
    ]  # fmt: skip
    assert len(both) == 2


# --------------------------------------------------------------------------------------------------------------- rows


def test_the_rows_are_those_of_qmlhc(tmp_path: Path) -> None:
    times = iter([0.0, 1.5, 1.5, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.25, 5.25])
    logger = TelemetryLogger(tmp_path / "run" / "t.jsonl", clock=lambda: next(times))
    logger.on_epoch_begin(0, {"backend": object()})
    logger.on_step_begin(7, {"depth": 2})
    logger.on_step_end(7, {"metric": 0.95, "depth": 1})
    logger.on_error(ValueError("bäd"), {"node": "N1"})
    logger.on_epoch_end(0, {"notes": "completed"})
    assert (tmp_path / "run" / "t.jsonl").read_text() == (
        '{"ts": 1.5, "tag": "epoch_begin", "epoch": 0}\n'
        '{"ts": 2.0, "tag": "step_begin", "step": 7}\n'
        '{"ts": 3.0, "tag": "step_end", "step": 7, "context": {"metric": 0.95, "depth": 1}}\n'
        '{"ts": 4.0, "tag": "error", "type": "ValueError", "message": "b\\u00e4d"}\n'
        '{"ts": 5.25, "tag": "epoch_end", "epoch": 0, "context": {"notes": "completed"}}\n'
    )


def test_the_memory_logger_keeps_the_same_rows_without_a_time() -> None:
    logger, context = MemoryLogger(), {"loss": 0.5, "state": [1]}
    logger.on_epoch_begin(0, {"a": 1})
    logger.on_step_begin(np.int64(3), {"a": 1})
    logger.on_step_end(3, context)
    context["loss"] = 9
    logger.on_error(ValueError("bad"), {})
    logger.on_epoch_end(0, {})
    assert logger.records == [
        {"tag": "epoch_begin", "epoch": 0},
        {"tag": "step_begin", "step": 3},
        {"tag": "step_end", "step": 3, "context": {"loss": 0.5, "state": [1]}},
        {"tag": "error", "type": "ValueError", "message": "bad"},
        {"tag": "epoch_end", "epoch": 0, "context": {}},
    ]
    assert logger.records[2]["context"]["state"] is context["state"], "the copy is shallow"


class Hostile(Mapping[str, Any]):
    def __getitem__(self, key: str) -> None:
        raise RuntimeError("no")

    __iter__ = __len__ = __str__ = __repr__ = __getitem__  # type: ignore[assignment]


circle: list[Any] = []
circle.append(circle)


@pytest.mark.parametrize(
    ("context", "written"),
    [
        ({"backend": Path("a/b")}, {"backend": "a/b"}),
        ({"state": np.array([1.0, 2.0])}, {"state": [1.0, 2.0]}),
        ({"loss": np.float32(0.5), "n": np.int64(2)}, {"loss": 0.5, "n": 2}),
        ({"circle": circle}, {"circle": ["[cut: contains itself]"]}),
        ({("a", 1): 2}, {"('a', 1)": 2}),
        ({"half": "\ud800"}, {"half": "\ud800"}),
        ({"deep": Hostile()}, {"deep": "<Hostile: TypeError in __str__>"}),
        (None, {}),
        (3, {"context": 3}),
        (Hostile(), {"context": "<Hostile: TypeError in __str__>"}),
    ],
    ids=["object", "array", "numpy", "circle", "key", "surrogate", "hostile", "none", "number", "hostile whole"],
)
def test_a_context_that_json_cannot_take_is_written_as_text(
    tmp_path: Path, context: Any, written: dict[str, Any]
) -> None:
    logger = TelemetryLogger(tmp_path / "t.jsonl")
    logger.on_step_end(1, context)
    logger.on_step_end(2, {"loss": 0.5})
    first, second = rows(tmp_path / "t.jsonl")
    assert first["context"] == written
    assert second["context"] == {"loss": 0.5}


def test_rows_wait_for_the_interval_or_five_seconds(tmp_path: Path) -> None:
    now = [100.0]
    logger = TelemetryLogger(tmp_path / "t.jsonl", flush_interval=3, clock=lambda: now[0])
    assert not (tmp_path / "t.jsonl").exists()
    logger.on_step_begin(0, {})
    logger.on_step_end(0, {})
    assert not (tmp_path / "t.jsonl").exists()
    logger.on_step_begin(1, {})
    assert len(rows(tmp_path / "t.jsonl")) == 3
    now[0] += 5.1
    logger.on_step_end(1, {})
    assert len(rows(tmp_path / "t.jsonl")) == 4
    logger.on_step_begin(2, {})
    logger.flush()
    assert len(rows(tmp_path / "t.jsonl")) == 5


# ------------------------------------------------------------------------------------------------ not lost, not doubled


def test_a_flush_that_fails_half_way_doubles_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = [False]

    def write(fd: Any, data: Any) -> Any:
        if not broken[0]:
            return os.write(fd, data)
        broken[0] = None  # type: ignore[call-overload] # cut in the middle of a row, and then nothing more
        if len(data) > 10:
            return os.write(fd, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    def faulty(fd: Any, data: Any) -> Any:
        if broken[0] is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    logger = TelemetryLogger(tmp_path / "t.jsonl", write=faulty)
    for step in range(3):
        logger.on_step_begin(step, {})
    broken[0] = True
    for step in range(3, 6):
        logger.on_step_begin(step, {})
    assert not (tmp_path / "t.jsonl").read_text().endswith("\n")
    broken[0] = False
    for step in range(6, 9):
        logger.on_step_begin(step, {})
    assert [row["step"] for row in rows(tmp_path / "t.jsonl")] == list(range(9))
    assert len(caplog.records) == 1, "told once"


def test_a_file_that_cannot_be_made_costs_the_file_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    logger = TelemetryLogger(tmp_path / "file" / "t.jsonl")
    train(logger)
    (record,) = caplog.records
    assert "t.jsonl cannot be written: " in record.getMessage()
    (tmp_path / "file").unlink()
    logger.flush()
    assert len(rows(tmp_path / "file" / "t.jsonl")) == 6, "and not even that, once it can be made"


EXITS = {
    "returns": "",
    "raises": "raise ValueError('diverged')",
    "exits": "raise SystemExit(3)",
    "changes directory": "import os; os.mkdir('elsewhere'); os.chdir('elsewhere')",
    "drops the logger": "del logger; import os; os._exit(0)",
}


@pytest.mark.parametrize("end", EXITS, ids=EXITS)
def test_no_row_is_lost_at_exit(tmp_path: Path, end: Any) -> None:
    code = f"""
    from stepspan.callbacks import TelemetryLogger
    logger = TelemetryLogger(flush_interval=1000)
    for step in range(10):
        logger.on_step_end(step, {{"loss": 0.5}})
    {EXITS[end]}
    """
    runs.python(code, tmp_path)
    assert [row["step"] for row in rows(tmp_path / "telemetry.jsonl")] == list(range(10))


@pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])
def test_a_forked_child_writes_its_own_rows_and_not_its_parents(tmp_path: Path, how: str) -> None:
    child = """
        logger.on_step_end(100, {})
    """
    code = f"""
    import multiprocessing, os, sys
    from stepspan.callbacks import TelemetryLogger
    logger = TelemetryLogger(flush_interval=1000)
    logger.on_step_end(0, {{}})

    def child():
        {child.strip()}

    if {how!r} == "os.fork":
        pid = os.fork()
        if not pid:
            child()
            sys.exit()
        os.waitpid(pid, 0)
    else:
        worker = multiprocessing.get_context("fork").Process(target=child)
        worker.start()
        worker.join()
    logger.on_step_end(1, {{}})
    """
    done = runs.python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(row["step"] for row in rows(tmp_path / "telemetry.jsonl")) == [0, 1, 100]


def test_a_signal_handler_that_logs_in_the_middle_of_a_write_doubles_no_row(tmp_path: Path) -> None:
    raised: list[Any] = []

    def write(fd: Any, data: Any) -> Any:
        written = os.write(fd, data)
        if not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGUSR1)
        return written

    logger = TelemetryLogger(tmp_path / "t.jsonl", write=write)
    with handled(signal.SIGUSR1, lambda *_: logger.on_error(KeyError("x"), {})):
        for step in range(3):
            logger.on_step_begin(step, {})
    assert [row.get("step", "error") for row in rows(tmp_path / "t.jsonl")] == [0, "error", 1, 2]


# ----------------------------------------------------------------------------------------------------------- the bridge


def test_the_hooks_become_spans_and_metrics() -> None:
    with recorded_run() as recording:
        train(RunCallback(recording.run), epochs=2)
    steps = recording.spans("training.step")
    assert [(span.attributes["epoch"], span.attributes["step"], span.error) for span in steps] == [
        (0, 0, None), (0, 1, None), (1, 0, None), (1, 1, None),
    ]  # fmt: skip
    assert [span.attributes["epoch"] for span in recording.spans("training.epoch")] == [0, 1]
    assert recording.values("training.loss") == [1.0, 0.5, 1.0, 0.5]
    assert recording.values("training.depth") == [1.0] * 4, "of the ends only"
    assert recording.values("training.accuracy") == [0.5, 0.5]
    metrics = recording.events("metrics")
    assert [(event.get("step"), sorted(event["metrics"])) for event in metrics[:3]] == [
        (0, ["depth", "loss"]), (1, ["depth", "loss"]), (1, ["accuracy"]),
    ]  # fmt: skip


def test_only_what_is_a_number_becomes_a_metric() -> None:
    class Unwilling:
        def __float__(self) -> None:
            raise RuntimeError("no")

    context = {
        "a": 1, "b": np.float32(0.5), "c": np.array(2.0), "text": "1", "flag": True, "array": np.ones(1),
        "none": None, "nested": {"d": 1}, "unwilling": Unwilling(), "nan": float("nan"),
    }  # fmt: skip
    with recorded_run() as recording:
        RunCallback(recording.run).on_step_end(4, context)
        RunCallback(recording.run).on_step_end(5, None)  # type: ignore[arg-type]
        assert recording.run.stats()["warnings"] == {}
    (event,) = recording.events("metrics")
    assert event["metrics"] == {"a": 1.0, "b": 0.5, "c": 2.0, "nan": "NaN"}
    assert event["step"] == 4


def test_an_exception_marks_the_step_it_was_raised_in() -> None:
    with recorded_run() as recording:
        callback = RunCallback(recording.run)
        callback.on_epoch_begin(0, {})
        callback.on_step_begin(0, {})
        try:
            raise ValueError("diverged")
        except ValueError as error:
            callback.on_error(error, {"node": "N1", "error": "x", "self": 1, 3: 4, "state": object()})  # type: ignore[dict-item]
        callback.on_step_begin(1, {})  # the loop goes on without an end of step 0
        callback.on_step_end(1, {"loss": 0.5})
        callback.on_epoch_end(0, {})
    steps = recording.spans("training.step")
    assert [(span.attributes["step"], span.error) for span in steps] == [(0, "ValueError: diverged"), (1, None)]
    (log,) = recording.logs("exception")
    assert log.attributes["exception.type"] == "ValueError"
    assert "raise ValueError" in log.attributes["exception.stacktrace"]  # type: ignore[operator]
    assert {key: value for key, value in log.attributes.items() if "." not in key} == {"node": "N1"}
    assert log.span_id == steps[0].span_id


def test_what_stays_open_ends_with_the_run() -> None:
    with recorded_run() as recording:
        callback = RunCallback(recording.run)
        callback.on_epoch_begin(0, {})
        callback.on_step_begin(0, {})
        error = ValueError("diverged")
        callback.on_error(error, {})
        recording.run.__exit__(ValueError, error, None)  # as its `with` block does
    assert {span.name: span.error for span in recording.spans()} == {
        "training.step": "ValueError: diverged", "training.epoch": "error", "training.run": "failed",
    }  # fmt: skip
    assert len(recording.logs("exception")) == 1


def test_ends_without_a_beginning_and_late_hooks_raise_nothing() -> None:
    with recorded_run() as recording:
        callback = RunCallback(recording.run)
        callback.on_epoch_end(0, {"accuracy": 1})
        callback.on_step_end(0, {"loss": 1})
        callback.on_error("no exception", None)  # type: ignore[arg-type]
    train(callback)
    train(RunCallback(stepspan.current_run()))
    assert recording.values("training.loss") == [1.0]


def test_the_logger_and_the_run_say_the_same(tmp_path: Path) -> None:
    with recorded_run() as recording:
        train(CallbackList([TelemetryLogger(tmp_path / "t.jsonl"), RunCallback(recording.run)]))
    logged = [row["tag"] for row in rows(tmp_path / "t.jsonl")]
    assert logged == [event["tag"] for event in recording.events() if event["tag"] in set(logged)]


# ------------------------------------------------------------------------------------------------------- the whole way


def test_what_a_qmlhc_loop_reports_arrives(collector: Collector, prometheus: Prometheus, tmp_path: Path) -> None:
    who: dict[str, Any] = {"job_id": "qmlhc", "rank": 2, "local_rank": 0, "world_size": 4}
    with stepspan.start_run(**who, directory=tmp_path / "runs", endpoint=collector.http_endpoint) as run:
        callback = CallbackList([RunCallback(run)])
        train(callback, epochs=2)
        callback.on_step_begin(9, {})
        callback.on_error(ValueError("diverged"), {})
        assert run.flush(20)
    spans = collector.spans()
    assert {(span["resource"]["job_id"], span["resource"]["rank"]) for span in spans} == {("qmlhc", 2)}
    steps = [span for span in spans if span["name"] == "training.step"]
    assert [(span["attributes"].get("epoch"), span["attributes"]["step"]) for span in steps] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (None, 9),
    ]  # fmt: skip
    assert [span["status"].get("code") for span in steps] == [None, None, None, None, 2]
    (log,) = collector.logs()
    assert (log["eventName"], log["resource"]["rank"], log["spanId"]) == ("exception", 2, steps[-1]["spanId"])
    (session,) = runs.sessions(tmp_path / "runs").values()
    ((labels, samples),) = prometheus.series('training_loss{job_id="qmlhc"}[1h]')
    assert labels["rank"] == "2"
    logged = [e["metrics"]["loss"] for e in runs.events(session, "metrics") if "loss" in e["metrics"]]
    assert [value for _, value in sorted(samples)] == logged


def test_the_example_runs(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "qmlhc_callbacks.py"
    done = runs.python(example.read_text(), tmp_path)
    assert done.returncode == 0, done.stderr
    (session,) = runs.sessions(tmp_path / "stepspan-runs").values()
    tags = [row["tag"] for row in rows(tmp_path / "telemetry.jsonl")]
    assert tags == [event["tag"] for event in runs.events(session) if event["tag"] in set(tags)]
