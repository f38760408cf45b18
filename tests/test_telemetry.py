"""`stepspan.Telemetry`: cloudmesh's calls, what becomes of them in each backend, and that they never get in the way."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import multiprocessing
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness.runs import is_ours, python
from harness.stack import Collector

import stepspan
from stepspan import ConfigError, Telemetry
from stepspan.compat.cloudmesh import context
from stepspan.compat.cloudmesh.sqlite import SqliteBackend
from stepspan.testing import FixedClock, recorded_run

VARIABLE = "CLOUDMESH_AI_TELEMETRY_DISABLED"
CONTEXT = {"system", "user", "job_id", "rank", "local_rank", "world_size"}


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in filter(is_ours, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    stepspan.current_run().close()


class Kept:
    """A backend of one's own."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def emit(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def told(self) -> list[dict[str, Any]]:
        """The records without what is the same in all, and without times."""
        return [{k: v for k, v in record.items() if k not in CONTEXT | {"timestamp"}} for record in self.records]


def lines(path: str = "telemetry.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def table(path: str = "telemetry.db", query: str = "SELECT * FROM telemetry ORDER BY id") -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as database:
        cursor = database.execute(query)
        return [dict(zip([column[0] for column in cursor.description], row, strict=True)) for row in cursor]


def manual(telemetry: Telemetry) -> None:
    """The calls of the manual, as printed there."""
    t = telemetry
    t.emit(metric="inference_latency", value=0.125, status="completed")
    t.emit(metrics={"tokens_per_sec": 45.2, "gpu_util": 88}, status="completed")
    t.emit(event="model_load_start", status="started")
    t.emit(event="model_load_end", status="completed")
    t.emit(metric="accuracy", value=0.92)


MANUAL = [
    {"status": "completed", "metrics": {"inference_latency": 0.125}},
    {"status": "completed", "metrics": {"tokens_per_sec": 45.2, "gpu_util": 88}},
    {"status": "started", "metrics": {}, "event": "model_load_start"},
    {"status": "completed", "metrics": {}, "event": "model_load_end"},
    {"metrics": {"accuracy": 0.92}},
]


# ------------------------------------------------------------------------------------------------- what is recorded


def test_the_manual_works_without_arguments() -> None:
    manual(Telemetry(clock=FixedClock()))
    records = lines()
    assert [record["timestamp"] for record in records[:2]] == [
        "2025-10-09T08:53:20.000000+00:00",
        "2025-10-09T08:53:20.001000+00:00",
    ]
    told = [{k: v for k, v in r.items() if k not in CONTEXT | {"timestamp", "command", "span"}} for r in records]
    assert told == MANUAL
    start, end = (record["span"] for record in records[2:4])
    assert start == end
    assert all(record.keys() >= CONTEXT for record in records)
    assert {"cpu", "gpu_present", "gpu_model", "memory_total"} <= records[0]["system"].keys()
    assert records[0]["user"]["name"]


def test_the_manual_works_with_a_database() -> None:
    with Telemetry(backend="sqlite", path="telemetry.db") as t:
        manual(t)
    rows = table()
    names = ("status", "event")
    told = [{k: row[k] for k in names if row[k]} | {"metrics": json.loads(row["metrics"])} for row in rows]
    assert told == MANUAL
    assert json.loads(rows[0]["system"]).keys() >= {"cpu", "gpu_present", "gpu_model", "memory_total"}


def test_the_manual_works_with_opentelemetry() -> None:
    with recorded_run() as recording:
        manual(Telemetry("serve", backend="otel"))
    assert recording.values("training.inference_latency") == [0.125]
    assert recording.values("training.tokens_per_sec") == [45.2]
    assert recording.values("training.gpu_util") == [88.0]
    assert recording.values("training.accuracy") == [0.92]
    assert [log.body for log in recording.logs("serve")] == ["serve: completed", "serve: completed"]
    (load,) = recording.spans("model_load")
    assert not load.error
    (start,), (end,) = recording.logs("model_load_start"), recording.logs("model_load_end")
    assert {(log.trace_id, log.span_id) for log in (start, end)} == {(load.trace_id, load.span_id)}


def test_a_metric_may_stand_inside_metrics() -> None:
    kept = Kept()
    Telemetry("c", backend=kept).emit(metrics={"metric": "loss", "value": 0.5, "lr": 0.1})
    assert kept.told() == [{"command": "c", "metrics": {"lr": 0.1, "loss": 0.5}}]


@pytest.mark.parametrize(
    ("value", "kept", "point"),
    [
        pytest.param(3, 3, 3.0, id="int"),
        pytest.param(True, True, 1.0, id="bool"),
        pytest.param(np.float32(0.5), 0.5, 0.5, id="numpy"),
        pytest.param(np.array(2), 2.0, 2.0, id="0-d array"),
        pytest.param(2**70, float(2**70), float(2**70), id="beyond 64 bits"),
        pytest.param(math.nan, "NaN", None, id="NaN"),
        pytest.param(-math.inf, "-Infinity", -math.inf, id="infinity"),
        pytest.param("fast", "fast", ..., id="text"),
        pytest.param([1, 2], [1, 2], ..., id="list"),
        pytest.param({"a": 1}, {"a": 1}, ..., id="mapping"),
    ],
)
def test_values(value: Any, kept: Any, point: Any) -> None:
    backend = Kept()
    with Telemetry(backend=backend, backends=["jsonl", "sqlite"]) as t:
        t.emit(metric="x", value=value)
    assert backend.records[0]["metrics"] == {"x": kept}
    assert lines()[0]["metrics"] == json.loads(table()[0]["metrics"]) == {"x": kept}
    points = table(query="SELECT value FROM points")
    assert points == ([] if point is ... else [{"value": point}]), "SQL has no NaN: NULL stands for it"


def test_texts_and_attributes_become_attributes_of_the_milestone() -> None:
    with recorded_run() as recording:
        Telemetry("serve", backend="otel").emit("ready", {"model": "llama", "qps": 3}, "hi", name="n", self_hosted=True)
    (log,) = recording.logs("serve")
    assert log.attributes == {
        "model": "llama", "telemetry.name": "n", "self_hosted": True, "message": "hi",
        "command": "serve", "status": "ready",
    }  # fmt: skip
    assert recording.values("training.qps") == [3.0]


def test_a_measurement_alone_is_no_milestone() -> None:
    with recorded_run() as recording:
        Telemetry("serve", backend="otel").emit(metric="accuracy", value=0.92)
    assert not recording.logs("serve")


def test_job_and_rank_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "llm-7b", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(f"STEPSPAN_{name}", value)
    kept = Kept()
    Telemetry(backend=kept).emit("ready")
    assert {k: kept.records[0][k] for k in ("job_id", "rank", "local_rank", "world_size")} == {
        "job_id": "llm-7b", "rank": 5, "local_rank": 1, "world_size": 8,
    }  # fmt: skip


def test_job_and_rank_are_those_of_the_open_run() -> None:
    kept = Kept()
    t = Telemetry(backend=kept, job_id="mine")
    t.emit("before")
    with recorded_run(job_id="theirs", rank=2, world_size=4):
        t.emit("during")
    t.emit("after")
    assert [(r["job_id"], r["rank"]) for r in kept.records] == [("mine", 0), ("theirs", 2), ("mine", 0)]


def test_telemetries_of_a_process_share_the_job_they_make_up() -> None:
    kept = Kept()
    Telemetry(backend=kept).emit("a")
    Telemetry(backend=kept).emit("b")
    first, second = (record["job_id"] for record in kept.records)
    assert first == second


def test_secrets_stay_out_of_files() -> None:
    with Telemetry(backends=["jsonl", "sqlite"]) as t:
        t.emit("failed", message="login with password=hunter2 failed", api_key="abcdef", max_new_tokens=512)
    for record in (lines()[0], {**table()[0], "attributes": json.loads(table()[0]["attributes"])}):
        assert record["attributes"] == {"api_key": "[redacted]", "max_new_tokens": 512}
        assert record["message"] == "login with password=[redacted] failed"


# -------------------------------------------------------------------------------------------- what the releases offer


def test_the_calls_of_the_releases_work() -> None:
    t = Telemetry("train", telemetry_file="log.jsonl")
    t.start("begin", batch_size=32, model="llama")
    t.emit("running", metrics={"loss": 0.5}, message="half way")
    t.complete(metrics={"accuracy": 0.9}, duration_sec=1.5)
    t.start()
    t.fail("out of memory", {"gpu": 0})
    told = [(r["status"], r["metrics"], r.get("message"), r.get("attributes")) for r in lines("log.jsonl")]
    assert told == [
        ("started", {"batch_size": 32}, "begin", {"model": "llama"}),
        ("running", {"loss": 0.5}, "half way", None),
        ("completed", {"accuracy": 0.9, "duration_sec": 1.5}, "Command completed successfully", None),
        ("started", {}, None, None),
        ("failed", {"gpu": 0}, "out of memory", None),
    ]
    first, _, second, third, fourth = (r.get("span") for r in lines("log.jsonl"))
    assert first == second != third == fourth


def test_a_list_of_backends_is_exactly_that() -> None:
    first, second = Kept(), Kept()
    Telemetry("c", backends=[first, second]).emit("ready")
    Telemetry("c", backends=[]).emit("ready")
    assert first.told() == second.told() == [{"command": "c", "status": "ready", "metrics": {}}]
    assert os.listdir() == []


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Telemetry("train", backend="text", clock=FixedClock()).complete({"loss": 0.5})
    assert capsys.readouterr().out == (
        "[2025-10-09T08:53:20.000000+00:00] train | STATUS: COMPLETED | Metrics: loss=0.5\n"
        "Message: Command completed successfully\n" + "-" * 40 + "\n"
    )


def test_stdout_prints_the_record_too(capsys: pytest.CaptureFixture[str]) -> None:
    Telemetry("train").emit("ready", stdout=True)
    assert json.loads(capsys.readouterr().out) == lines()[0]


# ------------------------------------------------------------------------------------------------------------ track


def test_track_tells_start_completion_and_duration() -> None:
    kept = Kept()
    with Telemetry("train", backend=kept).track("go", {"batch_size": 32}, stage="warmup"):
        assert len(kept.records) == 1
    start, end = kept.told()
    assert start.pop("span") == end.pop("span")
    assert 0 <= end["metrics"].pop("duration_sec") < 10
    common = {"command": "train", "metrics": {"batch_size": 32}, "attributes": {"stage": "warmup"}}
    assert start == {**common, "status": "started", "message": "go"}
    assert end == {**common, "status": "completed", "message": "Command completed successfully"}


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        pytest.param(ValueError("bad batch"), "failed", "bad batch", id="exception"),
        pytest.param(KeyboardInterrupt(), "interrupted", "KeyboardInterrupt", id="Ctrl-C"),
        pytest.param(SystemExit(0), "completed", "Command completed successfully", id="a good exit"),
        pytest.param(SystemExit(3), "failed", "3", id="a bad exit"),
    ],
)
def test_track_tells_how_it_was_left(error: BaseException, status: str, message: str) -> None:
    kept = Kept()
    with pytest.raises(type(error)), Telemetry(backend=kept).track():
        raise error
    assert (kept.records[1]["status"], kept.records[1]["message"]) == (status, message)


def test_track_decorates_functions_and_coroutine_functions() -> None:
    kept = Kept()
    t = Telemetry("c", backend=kept)

    @t.track(event="load")
    def load(n: int) -> int:
        """Doubles."""
        return load(n - 1) + 2 if n else 0

    @t.track(event="serve")
    async def serve() -> int:
        return 5

    assert (load(2), load.__doc__, asyncio.run(serve())) == (4, "Doubles.", 5)
    told = [(r["event"], r["status"], r["span"]) for r in kept.records]
    assert [entry[:2] for entry in told] == [("load", "started")] * 3 + [("load", "completed")] * 3 + [
        ("serve", "started"),
        ("serve", "completed"),
    ]
    assert [span for *_, span in told[:3]] == [span for *_, span in told[5:2:-1]], "calls in calls end inside out"


def test_a_tracked_block_is_a_span_around_what_happens_in_it() -> None:
    with recorded_run() as recording, suppress(ValueError):
        t = Telemetry("serve", backend="otel")
        with t.track(event="request"), recording.run.span("decode"):
            pass
        with t.track():
            raise ValueError("no such model")
    request, decode, failed = (recording.spans(name)[0] for name in ("request", "decode", "serve"))
    assert (decode.trace_id, decode.parent_id) == (request.trace_id, request.span_id)
    assert failed.error == "ValueError: no such model"
    (exception,) = recording.logs("exception")
    assert "raise ValueError" in exception.attributes["exception.stacktrace"]  # type: ignore[operator]
    assert [log.severity for log in recording.logs("serve")] == [9, 17]
    assert recording.values("training.duration_sec")[0] >= 0


def test_an_async_tracked_block_writes_before_it_goes_on() -> None:
    kept = Kept()

    async def main() -> None:
        async with Telemetry(backend=kept).track():
            assert [r["status"] for r in kept.records] == ["started"]
        assert [r["status"] for r in kept.records] == ["started", "completed"]

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------ spans


def test_what_starts_lasts_until_it_ends_though_others_overlap() -> None:
    with recorded_run() as recording:
        t = Telemetry("serve", backend="otel")
        t.start()
        t.emit(event="load_start", status="started")
        t.emit(event="warmup_begin", status="started")
        with recording.run.step(0):
            t.emit(metric="latency", value=1.0, status="completed")  # a measurement, not the end of the command
        t.emit(event="load_done", status="completed")
        t.emit(event="warmup_end", status="failed")
        t.fail("no more memory")
        t.emit(event="load_done", status="completed")
    spans = {span.name: span for span in recording.spans()}
    assert {name: span.error for name, span in spans.items()} == {
        "load": None, "warmup": "failed", "serve": "failed", "training.step": None, "training.run": None,
    }  # fmt: skip
    ends = [spans[name].end for name in ("training.step", "load", "warmup", "serve")]
    assert ends == sorted(ends)
    assert max(spans[name].start for name in ("serve", "load", "warmup")) < spans["training.step"].start
    (step,) = recording.events("step_begin")
    assert step["parent"] == recording.events("run_begin")[0]["seq"], "none of them is in the way of a step"


def test_an_exception_that_failed_keeps_its_stack_trace() -> None:
    with recorded_run() as recording:
        t = Telemetry("serve", backend="otel")
        t.start()
        try:
            raise RuntimeError("lost the GPU")
        except RuntimeError as error:
            t.fail(error)
    assert recording.spans("serve")[0].error == "RuntimeError: lost the GPU"
    assert "lost the GPU" in recording.logs("exception")[0].attributes["exception.stacktrace"]  # type: ignore[operator]
    assert recording.logs("serve")[1].attributes["message"] == "lost the GPU"


# ---------------------------------------------------------------------------------------------------- the run behind it


def test_the_machine_and_the_user_are_told_once_to_a_run_of_somebody_else() -> None:
    with recorded_run() as recording:
        t = Telemetry(backend="otel")
        t.emit("a")
        t.emit("b")
    (log,) = recording.logs("telemetry.context")
    assert log.attributes["user.name"]
    assert log.attributes["system.memory_total"] > 0  # type: ignore[operator]


def test_without_a_run_it_opens_one_and_closes_it(tmp_path: Path) -> None:
    t = Telemetry("serve", backend="otel", path=tmp_path / "runs", job_id="served")
    assert not (tmp_path / "runs").exists(), "nothing is made before there is something to say"
    with t:
        t.emit(metric="accuracy", value=0.92)
        run = stepspan.current_run()
        assert run.identity.job_id == "served"
    assert run.closed
    resource = json.loads(next((tmp_path / "runs").rglob("000001.jsonl")).read_bytes().splitlines()[0])["resource"]
    assert resource.keys() >= {"host.cpu.count", "host.memory.total", "host.gpu.present", "user.name"}


def test_after_somebody_elses_run_has_ended_nothing_opens_another(tmp_path: Path) -> None:
    with recorded_run(directory=tmp_path / "runs") as recording:
        t = Telemetry(backend="otel")
        t.emit("in time")
    t.emit("late")
    assert stepspan.current_run() is not recording.run
    assert recording.run.stats()["warnings"] == {"closed": 1}
    assert not Path("stepspan-runs").exists()


# ------------------------------------------------------------------------------------------------------- switched off


@pytest.mark.parametrize("value", ["1", "true", "yes", "TRUE", " Yes "])
@pytest.mark.parametrize("name", [VARIABLE, "STEPSPAN_DISABLED"])
def test_switched_off_it_touches_nothing(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with Telemetry(backend="sqlite", backends=["jsonl", "otel"]) as t, t.track():
        manual(t)
        asyncio.run(_await(t))
    assert os.listdir() == []
    assert t.stats() == {"records": 0, "warnings": {}}


async def _await(t: Telemetry) -> None:
    await t.emit("ready")


@pytest.mark.parametrize("value", ["", "0", "false", "no"])
def test_other_values_do_not_switch_it_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    Telemetry().emit("ready")
    assert len(lines()) == 1


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        pytest.param({"backend": "parquet"}, "backend", id="unknown backend"),
        pytest.param({"backend": object()}, "backend", id="an object without emit"),
        pytest.param({"backend": Kept}, "backend", id="a class"),
        pytest.param({"backend": ""}, "backend", id="no name"),
        pytest.param({"backends": "jsonl"}, "backends", id="no list"),
        pytest.param({"backends": [3]}, "backend", id="a number in the list"),
        pytest.param({"backend": Kept(), "path": "x"}, "path", id="a path for one's own"),
        pytest.param({"backends": [], "path": "x"}, "path", id="a path for nobody"),
        pytest.param({"path": 3}, "path", id="no path"),
        pytest.param({"path": "a\0b"}, "path", id="a NUL in the path"),
        pytest.param({"path": "directory"}, "path", id="a directory"),
        pytest.param({"path": "file/telemetry.jsonl"}, "path", id="below a file"),
        pytest.param({"path": "database"}, "path", id="lines into a database"),
        pytest.param({"backend": "sqlite", "path": "file"}, "path", id="a database in a text"),
        pytest.param({"backend": "otel", "path": "file"}, "path", id="a journal in a file"),
        pytest.param({"endpoint": "http://localhost:4318"}, "endpoint", id="an endpoint for a file"),
        pytest.param({"command_name": 3}, "command_name", id="no name for the command"),
        pytest.param({"job_id": 3.5}, "job_id", id="no name for the job"),
    ],
)
def test_wrong_arguments_say_field_and_fix(arguments: dict[str, Any], field: str) -> None:
    Path("directory").mkdir()
    Path("file").write_text("no database\n")
    with closing(sqlite3.connect("database")) as database:
        database.execute("CREATE TABLE t (x)")
    with pytest.raises(ConfigError) as caught:
        Telemetry(**arguments)
    assert caught.value.field == field
    assert caught.value.fix


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__

    def __float__(self) -> float:
        raise RuntimeError("no number")


class Broken:
    def emit(self, record: dict[str, Any]) -> None:
        raise OSError("no room")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda t: t.emit(metrics=[1, 2]), id="metrics that are a list"),
        pytest.param(lambda t: t.emit(metric="x"), id="a metric without a value"),
        pytest.param(lambda t: t.emit(value=3), id="a value without a metric"),
        pytest.param(lambda t: t.emit(metrics={Hostile(): 1}), id="a key that is no text"),
        pytest.param(lambda t: t.complete(metrics=3), id="complete with a number"),
        pytest.param(lambda t: t.track(metrics=3).__enter__(), id="track with a number"),
    ],
)
def test_wrong_calls_are_counted_and_told_once(call: Any, caplog: pytest.LogCaptureFixture) -> None:
    t = Telemetry(backends=["jsonl", "otel"])
    call(t)
    call(t)
    (count,) = t.stats()["warnings"].values()
    assert count == 2
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([message for message in warnings if message.startswith("stepspan: telemetry of")]) == 1


def test_objects_that_json_does_not_take_are_written_as_text() -> None:
    circle: list[Any] = []
    circle.append(circle)
    t = Telemetry("c", backends=["jsonl", "sqlite"])
    t.emit(Hostile(), {"x": Hostile()}, Hostile(), event="\ud800", a=circle, b={1, 2}, c=2**80)  # type: ignore[arg-type]
    t.close()
    assert t.stats() == {"records": 1, "warnings": {}}
    assert lines()[0]["attributes"]["b"] == [1, 2]
    assert json.loads(table()[0]["attributes"])["c"] == str(2**80)


def test_a_backend_that_fails_does_not_take_the_others_down(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    t = Telemetry(backends=[Broken(), kept])
    t.emit("a")
    t.emit("b")
    assert [record["status"] for record in kept.records] == ["a", "b"]
    assert t.stats() == {"records": 2, "warnings": {"Broken": 2}}
    assert [r.getMessage() for r in caplog.records] == [
        f"stepspan: telemetry of {t.command_name}: Broken: OSError('no room') (logged once; stats() counts)"
    ]


@pytest.mark.parametrize("backend", ["jsonl", "sqlite", "text"])
def test_a_place_that_is_gone_costs_records_not_the_caller(backend: str) -> None:
    t = Telemetry(backend=backend, path="below/telemetry")
    Path("below").write_text("in the way")
    t.emit("lost")
    (count,) = t.stats()["warnings"].values()
    assert count == 1
    Path("below").unlink()
    t.emit("kept")
    t.close()
    assert Path("below/telemetry").stat().st_mode & 0o777 == 0o600


def test_a_line_that_was_cut_is_ended_first() -> None:
    Path("telemetry.jsonl").write_text('{"timestamp": "2025')
    Telemetry().emit("ready")
    torn, line = Path("telemetry.jsonl").read_text().splitlines()
    assert torn == '{"timestamp": "2025'
    assert json.loads(line)["status"] == "ready"


# ---------------------------------------------------------------------------------------------------------- event loops


class Slow(Kept):
    """Takes nothing until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def emit(self, record: dict[str, Any]) -> None:
        assert self.let.wait(20)
        super().emit(record)


def test_an_event_loop_does_not_wait_and_order_is_kept() -> None:
    slow = Slow()
    t = Telemetry(backend=slow)

    async def main() -> None:
        for n in range(5):
            t.emit(str(n))
        assert not slow.records
        last = t.emit("5")
        slow.let.set()
        await last
        assert [r["status"] for r in slow.records] == ["0", "1", "2", "3", "4", "5"]
        t.emit("6")

    asyncio.run(main())
    t.emit("7")
    assert [r["status"] for r in slow.records] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    t.close()


def test_a_task_that_is_cancelled_does_not_take_its_record_with_it() -> None:
    slow = Slow()
    t = Telemetry(backend=slow)

    async def main() -> None:
        t.emit("before")
        task = asyncio.create_task(_await(t))
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        slow.let.set()

    asyncio.run(main())
    assert t.flush(20)
    assert [r["status"] for r in slow.records] == ["before", "ready"]
    t.close()


def test_too_much_for_a_slow_place_is_counted() -> None:
    slow = Slow()
    t = Telemetry(backend=slow)
    t._writing._limit = 3

    async def main() -> None:
        for n in range(5):
            t.emit(str(n))
        slow.let.set()

    asyncio.run(main())
    t.close()
    assert [r["status"] for r in slow.records] == ["0", "1", "2"]
    assert t.stats() == {"records": 5, "warnings": {"Slow": 2}}


def test_awaited_writes_of_many_tasks_are_all_there() -> None:
    t = Telemetry(backends=["jsonl", "sqlite"])

    async def main() -> None:
        await asyncio.gather(*(_await(t) for _ in range(100)))
        assert len(lines()) == len(table()) == 100

    asyncio.run(main())
    t.close()


def test_a_backend_may_tell_telemetry_itself() -> None:
    kept = Kept()

    class Chatty:
        def emit(self, record: dict[str, Any]) -> None:
            if record["status"] == "outer":
                t.emit("inner")
            kept.emit(record)

    t = Telemetry(backend=Chatty())

    async def main() -> None:
        await t.emit("outer")

    asyncio.run(main())
    t.emit("outer")
    assert [r["status"] for r in kept.records] == ["inner", "outer", "inner", "outer"]
    t.close()


def test_what_waits_at_the_end_of_the_interpreter_is_written(tmp_path: Path) -> None:
    code = """
        import asyncio, stepspan
        t = stepspan.Telemetry(backends=["jsonl", "sqlite"])
        async def main():
            for _ in range(50):
                t.emit("ready")
        asyncio.run(main())
    """
    done = python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines()) == len(table()) == 50


# ------------------------------------------------------------------------------------------- many writers of one file

WRITERS, THREADS, EACH = 4, 3, 60


def _write(backend: str, path: str, number: int) -> None:
    with Telemetry(f"writer{number}", backend=backend, path=path) as t:
        emit = lambda thread: [t.emit(metric=f"t{thread}", value=n, note="x" * 500) for n in range(EACH)]  # noqa: E731
        threads = [threading.Thread(target=emit, args=(n,)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if t.stats() != {"records": THREADS * EACH, "warnings": {}}:
            raise RuntimeError(t.stats())


@pytest.mark.parametrize("backend", ["jsonl", "sqlite"])
def test_threads_of_several_processes_write_one_file(backend: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    path = str(Path("shared").absolute())
    processes = [spawn.Process(target=_write, args=(backend, path, n)) for n in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
        process.close()
    if backend == "jsonl":
        found = [(r["command"], name, value) for r in lines(path) for name, value in r["metrics"].items()]
    else:
        query = "SELECT command, metric, value FROM points JOIN telemetry ON record = id ORDER BY record"
        found = [tuple(row.values()) for row in table(path, query)]
    assert len(found) == len(set(found)) == WRITERS * THREADS * EACH
    assert [value for command, name, value in found if (command, name) == ("writer1", "t2")] == list(range(EACH))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("backend", ["jsonl", "sqlite"])
def test_a_forked_child_writes_on(backend: str, tmp_path: Path) -> None:
    code = f"""
        import os, stepspan
        t = stepspan.Telemetry(backend="{backend}", path="shared")
        t.emit("before")
        child = os.fork()
        t.emit("child" if child == 0 else "parent")
        if child:
            assert os.waitpid(child, 0)[1] == 0
        t.close()
        assert t.stats()["warnings"] == {{}}, t.stats()
    """
    done = python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = lines("shared") if backend == "jsonl" else table("shared")
    assert sorted(row["status"] for row in rows) == ["before", "child", "parent"]
    assert len({row["job_id"] for row in rows}) == 1


def test_a_signal_handler_that_tells_while_a_record_is_written_waits_for_it_not_for_itself() -> None:
    backend = SqliteBackend("telemetry.db")
    t = Telemetry(backend=backend)
    insert, told = backend._insert, []  # type: ignore[var-annotated]

    def interrupted(*args: Any) -> None:
        if not told:
            told.append(t.emit("from the handler"))
        insert(*args)

    backend._insert = interrupted  # type: ignore[assignment, method-assign] # where a signal may come
    t.emit("interrupted")
    t.close()
    assert [row["status"] for row in table()] == ["interrupted", "from the handler"]
    assert t.stats()["warnings"] == {}


# --------------------------------------------------------------------------------------------------------------- SQLite

OVER_TIME = "SELECT ts, rank, value FROM points WHERE job_id = 'Y' AND metric = 'X' ORDER BY ts"


def test_a_metric_over_time_is_one_search_of_an_index() -> None:
    clock = FixedClock()
    for job in ("Y", "Z"):
        with Telemetry(backend="sqlite", job_id=job, clock=clock) as t:
            for n in range(3):
                t.emit(metrics={"X": n, "other": -1})
    start = 1_760_000_000_000_000_000
    assert table(query=OVER_TIME) == [{"ts": start + n * 1_000_000, "rank": 0, "value": float(n)} for n in range(3)]
    for query, index in (
        (OVER_TIME, "SEARCH points USING PRIMARY KEY (job_id=? AND metric=?)"),
        (f"SELECT value FROM points WHERE job_id = 'Y' AND metric = 'X' AND ts >= {start} ORDER BY ts",
         "SEARCH points USING PRIMARY KEY (job_id=? AND metric=? AND ts>?)"),
        ("SELECT event, status FROM telemetry WHERE job_id = 'Y' ORDER BY timestamp",
         "SEARCH telemetry USING INDEX telemetry_by_job (job_id=?)"),
    ):  # fmt: skip
        assert [row["detail"] for row in table(query=f"EXPLAIN QUERY PLAN {query}")] == [index], "and nothing is sorted"


def test_the_database_is_in_wal_mode_and_read_while_it_is_written() -> None:
    with Telemetry(backend="sqlite") as t, closing(sqlite3.connect("telemetry.db")) as reader:
        t.emit("a")
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM telemetry").fetchone() == (1,)
        t.emit("b")
        assert reader.execute("SELECT count(*) FROM telemetry").fetchone() == (1,), "as of its beginning"
        assert t.stats()["warnings"] == {}


RELEASED = (
    "CREATE TABLE IF NOT EXISTS telemetry (id INTEGER PRIMARY KEY AUTOINCREMENT, timestamp TEXT, command TEXT,"
    " status TEXT, metrics TEXT, system TEXT, message TEXT)"
)


def test_the_releases_go_on_with_our_table_and_we_with_theirs() -> None:
    def theirs() -> None:
        with closing(sqlite3.connect("telemetry.db")) as database, database:
            database.execute(RELEASED)
            database.execute(
                "INSERT INTO telemetry (timestamp, command, status, metrics, system, message) VALUES (?,?,?,?,?,?)",
                ("2025-10-09T10:53:20.000001", "llm", "completed", '{"a": 1}', "{}", None),
            )

    theirs()
    with Telemetry("ours", backend="sqlite") as t:
        t.emit(metric="a", value=2, status="completed")
        theirs()
        t.emit(metric="a", value=3)
        assert t.stats()["warnings"] == {}
    query = "SELECT id, command, status, metrics FROM telemetry"
    assert [tuple(row.values()) for row in table(query=query)] == [
        (1, "llm", "completed", '{"a": 1}'),
        (2, "ours", "completed", '{"a":2}'),
        (3, "llm", "completed", '{"a": 1}'),
        (4, "ours", None, '{"a":3}'),
    ]


# -------------------------------------------------------------------------------------------------- machine and user


@pytest.fixture
def _fresh_context() -> Iterator[None]:
    context.system.cache_clear()
    yield
    context.system.cache_clear()


@pytest.mark.usefixtures("_fresh_context")
def test_the_machine_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(context, "gpu_models", lambda: looks.append(1) or ["H200", "H200"])  # type: ignore[func-returns-value]
    kept = Kept()
    t = Telemetry(backend=kept)
    assert not looks, "not before there is something to say"
    t.emit("a")
    t.emit("b")
    assert len(looks) == 1
    assert [r["system"]["gpu_model"] for r in kept.records] == ["H200", "H200"]
    assert (kept.records[0]["system"]["gpu_present"], kept.records[0]["system"]["gpu_count"]) == (True, 2)


class NoDriver(Exception):
    pass


def _no_driver() -> None:
    raise NoDriver("Driver Not Loaded")


NVML = {
    "no library": (None, []),
    "no driver": (SimpleNamespace(nvmlInit=_no_driver), []),
    "two GPUs": (
        SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetCount=lambda: 2,
            nvmlDeviceGetHandleByIndex=lambda n: n,
            nvmlDeviceGetName=lambda n: b"NVIDIA H200" if n else "NVIDIA H100",
        ),
        ["NVIDIA H100", "NVIDIA H200"],
    ),
    "a GPU that fell off the bus": (
        SimpleNamespace(nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=_no_driver),
        [],
    ),
}


@pytest.mark.parametrize("case", NVML)
def test_gpus(case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    library, models = NVML[case]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert context.gpu_models() == models
    assert capfd.readouterr() == ("", "")


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: EPYC 9654 96-Core\nmodel name\t: other\n")
    assert context.cpu_model(tmp_path / "cpuinfo") == "EPYC 9654 96-Core"
    assert context.cpu_model(tmp_path / "none")


def test_importing_stepspan_does_not_import_telemetry(tmp_path: Path) -> None:
    code = """
        import sys, stepspan
        assert "stepspan.compat" not in sys.modules and "asyncio" not in sys.modules
        stepspan.Telemetry
        assert not {"pydantic", "opentelemetry", "typer", "psutil", "sqlite3"} & sys.modules.keys()
    """
    done = python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize("opened", ["by the user", "by Telemetry"])
def test_what_was_emitted_arrives_at_a_collector(
    opened: str, collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"JOB_ID": "served", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "HEALTH": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"STEPSPAN_{name}", value)
    place = tmp_path / "runs"
    if opened == "by the user":
        stepspan.start_run(directory=place, endpoint=collector.http_endpoint)
        t = Telemetry("serve", backend="otel")
    else:
        t = Telemetry("serve", backend="otel", path=place, endpoint=collector.http_endpoint)
    before = time.time_ns()
    manual(t)
    with suppress(ValueError), t.track("a request", model="llama"):
        raise ValueError("too long")
    assert t.flush(20)
    stepspan.current_run().close()
    points = {(p["metric"], p.get("asDouble")): p for p in collector.metric_points()}
    expected = {("inference_latency", 0.125), ("tokens_per_sec", 45.2), ("gpu_util", 88.0), ("accuracy", 0.92)}
    assert {(f"training.{name}", value) for name, value in expected} <= points.keys()
    assert points["training.accuracy", 0.92]["timeUnixNano"] >= before
    spans = {span["name"]: span for span in collector.spans()}
    assert spans.keys() >= {"model_load", "serve"}
    assert spans["serve"]["status"] == {"code": 2, "message": "ValueError: too long"}
    assert spans["serve"]["attributes"]["model"] == "llama"
    logs = collector.logs()
    told = [(log["eventName"], log["severityNumber"]) for log in logs if log["eventName"] != "telemetry.context"]
    assert told == [
        ("serve", 9), ("serve", 9), ("model_load_start", 9), ("model_load_end", 9),
        ("serve", 9), ("serve", 17), ("exception", 17),
    ]  # fmt: skip
    for record in (*points.values(), *spans.values(), *logs):
        assert (record["resource"]["job_id"], record["resource"]["rank"]) == ("served", 1)
