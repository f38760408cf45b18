"""One warning does not hide the next: each cause is told by its key, counted, summed up, and known to the receiver."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import runs
from harness.events_of import SessionEvents
from harness.receiver import ScriptedReceiver
from harness.runs import events

from stepspan.config import Settings
from stepspan.environment import PREFIX, unknown_variables
from stepspan.recording.warnings import MAX_KEYS, OTHER_KEYS, WarningSink
from stepspan.run import Run
from stepspan.testing import recorded_run

start = runs.start
Start = Callable[..., Run]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(start: Start) -> Run:
    return start(job_id="job")


def logged(run: Run) -> list[Mapping[str, Any]]:
    return [event["metrics"] for event in events(run, "metrics")]


# what is told


def test_a_loss_that_becomes_text_is_told_after_a_harmless_none(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start(job_id="job") as run:
        for i in range(20):
            with run.step(i):
                loss = 0.5 if i < 3 else f"{0.5:.3f}"
                run.log_metrics({"val_loss": None if i < 1 else 0.2, "loss": loss, "f1": {"cat": 0.5, "dog": 0.6}})
    assert run.stats()["warnings"] == {"value": 18}
    assert run.stats()["warning_keys"] == {"value": {"val_loss": 1, "loss": 17}}
    assert [message.partition(": not")[0] for message in caplog.messages] == [
        "stepspan: metric val_loss=None",
        "stepspan: metric loss='0.500'",
        "stepspan: warnings of this run: value 18 (loss 17, val_loss 1)",
    ]
    assert "NoneType holds no single number: log one number a key, and leave out what has none" in caplog.messages[0]
    assert "it is text: log the number itself, and format what is printed" in caplog.messages[1]
    assert len([line for line in logged(run) if {"f1/cat", "f1/dog"} <= line.keys()]) == 20
    assert [(event["key"], event["count"]) for event in events(run, "dropped")] == [
        *(("val_loss", 1), ("loss", 1), ("loss", 1), ("loss", 2), ("loss", 4), ("loss", 8)),
        ("loss", 1),  # as the run ends
    ]


def test_the_receiver_gets_a_log_record_and_a_counter_by_key(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedReceiver() as receiver:
        monkeypatch.setenv("STEPSPAN_DELIVERY", "thread")
        with start(job_id="job", endpoint=receiver.url) as run:
            for _ in range(5):
                run.log_metrics({"loss": "0.5", "val/f1": [1.0, 2.0]})
            run.log_hyperparams({"model": Broken()})
        points = sorted(receiver.points("training.run.dropped_values"), key=lambda point: point.time)
        counted = {dict(point.attributes)["key"]: point.number for point in points if point.value is not None}
        assert counted == {"loss": 5.0, "val/f1": 5.0, "hyperparams.model.lr": 1.0}
        records = receiver.logs("stepspan.dropped_value")
        assert sum(log["attributes"]["count"] for log in records if log["attributes"]["key"] == "loss") == 5
        assert {log["attributes"]["key"] for log in records} == set(counted)
        assert all(log["severity"] == 13 for log in records)


class Broken(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise LookupError(key)

    def __iter__(self) -> Iterator[str]:
        yield "lr"

    def __len__(self) -> int:
        return 1


def test_a_value_that_is_wrong_in_every_step_costs_few_lines(run: Run) -> None:
    for _ in range(1000):
        run.log_metrics({"loss": "0.5"})
    run.close()
    counts = [event["count"] for event in events(run, "dropped")]
    assert sum(counts) == 1000
    assert len(counts) == 11, "at 1, 2, 4 … 512, and the rest at the end"


def test_keys_are_bounded_and_the_rest_is_counted_together(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(3 * MAX_KEYS):
        run.log_metrics({f"k{n}": "x", "k0": "x"})
    run.close()
    keys = run.stats()["warning_keys"]["value"]
    assert len(keys) == MAX_KEYS + 1
    assert (keys["k0"], keys["k99"], keys[OTHER_KEYS]) == (3 * MAX_KEYS, 1, 2 * MAX_KEYS)
    assert sum(keys.values()) == run.stats()["warnings"]["value"] == 6 * MAX_KEYS - 1
    assert len(caplog.messages) == MAX_KEYS + 2
    assert sum(event["count"] for event in events(run, "dropped")) == 6 * MAX_KEYS - 1
    assert len({event["key"] for event in events(run, "dropped")}) == MAX_KEYS + 1
    assert "and 96 more" in caplog.messages[-1]


def test_each_kind_and_key_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    sink = WarningSink(audible=True)
    for kind, key in (("a", ""), ("a", "x"), ("b", "x"), ("a", "x"), ("a", ""), ("a", "y")):
        sink.warn_once(kind, f"{kind} {key}", key=key)
    sink.warn_once("c", "information", logging.INFO)
    sink.log_summary()
    above_info = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert [message.partition(" (logged")[0] for message in above_info] == [
        "stepspan: a ", "stepspan: a x", "stepspan: b x", "stepspan: a y",
        "stepspan: warnings of this run: a 5 (x 2, y 1), b 1 (x 1)",
    ]  # fmt: skip
    assert sink.key_counts() == {"a": {"x": 2, "y": 1}, "b": {"x": 1}}


def test_a_run_without_warnings_ends_in_silence(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start() as run:
        run.log_metrics({"loss": 0.5})
    assert caplog.messages == []
    assert events(run, "dropped") == []


def test_several_settings_that_go_wrong_are_each_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.log_metrics({"x": 1.0}, step=1.5)  # type: ignore[arg-type]
    with run.epoch("two"):  # type: ignore[arg-type]
        pass
    run.log_event("e", a=Broken())
    run.log_event("e", b=Broken())
    assert run.stats()["warning_keys"] == {"step": {"step": 1, "epoch": 1}, "event": {"a.lr": 1, "b.lr": 1}}
    assert len(caplog.messages) == 4


def test_counters_of_dropped_values_are_those_of_a_session() -> None:
    s = SessionEvents()
    s.run()
    s.emit("dropped", key="loss", count=1, why="text")
    s.emit("dropped", key="loss", count=3, why="text")
    points = [
        (dict(series.attributes), value.value)
        for series, _, value in s.records("metrics")
        if series.name == "training.run.dropped_values" and value
    ]
    assert points[:2] == [({"key": "loss"}, 1.0), ({"key": "loss"}, 4.0)]


# what is a number


def test_nested_metrics_are_flat(run: Run) -> None:
    run.log_metrics(
        {"f1": {"cat": 0.5, "per": {"class": {1: np.float32(0.25)}}}, "val": {"loss": 2.0}, "empty": {}, "x": 1}
    )
    assert logged(run) == [{"f1/cat": 0.5, "f1/per/class/1": 0.25, "val/loss": 2.0, "x": 1.0}]
    assert run.stats()["warnings"] == {}
    with recorded_run() as recording:
        recording.run.log_metrics({"val": {"loss": 2.0}})
    assert recording.values("training.loss", split="val", key="val/loss") == [2.0]


def test_metrics_are_flattened_so_deep_and_no_circle_is_followed(run: Run) -> None:
    deep: dict[str, Any] = {"n": 1.0}
    for _ in range(12):
        deep = {"d": deep}
    loop: dict[str, Any] = {"here": 1.0}
    loop["self"] = loop
    run.log_metrics({"deep": deep, "loop": loop, "d7": {"a": {"b": {"c": {"d": {"e": {"f": 7.0}}}}}}})
    assert logged(run) == [{"loop/here": 1.0, "d7/a/b/c/d/e/f": 7.0}]
    assert run.stats()["warning_keys"]["value"] == {"loop/self": 1, "deep" + "/d" * 7: 1}


def test_two_metrics_of_one_key_in_one_call_are_told(run: Run) -> None:
    run.log_metrics({"f1/cat": 1.0, "f1": {"cat": 2.0}, "x": 3.0})
    run.log_metrics({1: "no", "1": 5.0})  # type: ignore[dict-item]
    assert logged(run) == [{"f1/cat": 2.0, "x": 3.0}, {"1": 5.0}]
    assert run.stats()["warning_keys"]["value"] == {"f1/cat": 1, "1": 1}


def test_a_nested_mapping_that_raises_costs_its_values(run: Run) -> None:
    run.log_metrics({"good": 1.0, "bad": Broken(), "None": None, "more": {"f": "text", "g": 2.0}})
    assert logged(run) == [{"good": 1.0, "more/g": 2.0}]
    assert run.stats()["warning_keys"]["value"] == {"bad/lr": 1, "None": 1, "more/f": 1}


def test_a_mapping_of_metrics_that_raises_for_one_costs_that_one(run: Run) -> None:
    class Config(Broken):
        def __getitem__(self, key: str) -> Any:
            return 0.5 if key == "loss" else super().__getitem__(key)

        def __iter__(self) -> Iterator[str]:
            yield from ("lr", "loss")

    run.log_metrics(Config(), step=3)
    run.log_metrics({"nested": Config()})
    assert logged(run) == [{"loss": 0.5}, {"nested/loss": 0.5}]
    assert events(run, "metrics")[0]["step"] == 3
    assert run.stats()["warning_keys"] == {"value": {"lr": 1, "nested/lr": 1}}


@pytest.mark.parametrize(
    "value",
    [[0.5], (0.5,), [[0.5]], np.array([[0.5]]), [np.array([0.5])], [np.float32(0.5)], ([(0.5,)],)],
    ids=["list", "tuple", "list in a list", "array", "array in a list", "numpy in a list", "mixed"],
)
def test_a_list_of_one_number_is_a_number(run: Run, value: Any) -> None:
    run.log_metrics({"x": value})
    assert logged(run) == [{"x": 0.5}]
    assert run.stats()["warnings"] == {}


def test_a_list_that_holds_itself_is_no_number(run: Run) -> None:
    loop: list[Any] = []
    loop.append(loop)
    run.log_metrics({"x": loop, "y": 1.0})
    assert logged(run) == [{"y": 1.0}]


# what was meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [("collectve", "collective"), ("Collective", "collective"), ("cudda", "cuda"), ("CUDA", "cuda")],
)
def test_an_attribute_that_is_nearly_a_parameter_is_told(
    run: Run, name: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with run.span("reduce", **{name: True}):
            pass
    assert [event["attributes"] for event in events(run, "span_begin")] == [{name: True}] * 3
    assert run.stats()["warning_keys"] == {"span": {name: 3}}
    (message,) = caplog.messages
    assert f"{name}=True: did you mean {meant}=True?" in message


def test_other_attributes_are_nobodys_mistake(run: Run) -> None:
    with run.span("reduce", collectve="all", cudnn=True, compiled=False, cuda_graph=True, bucket=3):
        run.log_event("e", state="ok", stage="one", code=3)
    run.log_event("e", staus="ok")
    assert run.stats()["warning_keys"] == {"event": {"staus": 1}}


def test_variables_that_nothing_reads_are_told_with_the_nearest(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STEPSPAN_JOBID", "7")
    monkeypatch.setenv("STEPSPAN_DIRECTROY", "/elsewhere")
    monkeypatch.setenv("stepspan_rank", "0")
    monkeypatch.setenv("STEPSPAN_BLANK", " ")
    with start() as run:
        pass
    assert set(run.stats()["warning_keys"]["environment"]) == {"STEPSPAN_JOBID", "STEPSPAN_DIRECTROY", "stepspan_rank"}
    for name, meant in (("STEPSPAN_JOBID", "JOB_ID"), ("STEPSPAN_DIRECTROY", "DIRECTORY"), ("stepspan_rank", "RANK")):
        expected = f"stepspan: {name} is no variable of stepspan, and has no effect: did you mean STEPSPAN_{meant}?"
        assert any(message.startswith(expected) for message in caplog.messages)


def test_every_variable_that_anything_here_names_is_known() -> None:
    named: set[str] = set()
    for pattern in ("src/**/*.py", "tests/harness/*.py", "tests/conftest.py", "Makefile", "README.md", "docs/*.md",
                    "docker-compose.yml", "collector-config/**/*", "examples/**/*.py", "benchmarks/*.py"):  # fmt: skip
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            named |= set(
                re.findall(rf"\b{PREFIX}[A-Z][A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8", errors="replace"))
            )
    named |= {PREFIX + name.upper() for name in Settings.model_fields}
    assert len(named) > 40
    mistyped = f"{PREFIX}JOBID"  # the README's example of one that is not
    assert set(unknown_variables(dict.fromkeys(named, "1"), Settings.model_fields)) <= {mistyped}


def test_an_artifact_that_is_not_there_is_recorded_and_told(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.pt").touch()
    run.log_artifact("here", tmp_path / "model.pt")
    run.log_artifact("bucket", "s3://bucket/model.pt")
    run.log_artifact("directory", tmp_path)
    assert caplog.messages == []
    run.log_artifact("model", tmp_path / "modle.pt", kind="checkpoint")
    run.log_artifact("model", tmp_path / "modle.pt", kind="checkpoint")
    assert [event["name"] for event in events(run, "artifact")] == ["here", "bucket", "directory", "model", "model"]
    assert run.stats()["warning_keys"] == {"artifact": {"model": 2}}
    assert f"stepspan: artifact model: there is no {tmp_path}/modle.pt" in caplog.messages[0]
