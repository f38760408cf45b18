"""`stepspan.testing`: a run in memory and a fixed clock, as users' tests take them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stepspan
from stepspan.testing import FixedClock, recorded_run


def train(run: Any) -> None:
    run.log_hyperparams({"lr": 0.5})
    for number in range(3):
        with run.step(number):
            run.log_metrics({"loss": 1.0 / (number + 1)})
    run.log_artifact("model", "model.pt", kind="checkpoint")


def test_what_a_run_recorded_can_be_asked_after_it() -> None:
    with recorded_run() as recording:
        train(recording.run)
    assert recording.values("training.loss") == [1.0, 0.5, 1 / 3]
    assert recording.values("training.loss", split="val") == []
    assert recording.values("training.loss", key=None) == [1.0, 0.5, 1 / 3]
    assert recording.values("training.loss", key="train/loss") == []
    assert [span.attributes["step"] for span in recording.spans("training.step")] == [0, 1, 2]
    assert [span.name for span in recording.spans()] == ["training.step"] * 3 + ["training.run"]
    assert [log.event_name for log in recording.logs()] == ["training.hyperparams", "training.artifact"]
    assert [log.attributes["path"] for log in recording.logs("training.artifact")] == ["model.pt"]
    assert [event["step"] for event in recording.events("metrics")] == [0, 1, 2]
    assert [event["seq"] for event in recording.events()] == list(range(1, 15))


def test_it_can_be_asked_while_the_run_goes_on() -> None:
    with recorded_run() as recording:
        with recording.run.step(0):
            recording.run.log_metrics({"loss": 0.5})
            assert recording.values("training.loss") == [0.5]
            assert recording.spans() == []
        assert [span.name for span in recording.spans()] == ["training.step"]
        recording.run.log_metrics({"loss": 0.25})
        assert recording.values("training.loss") == [0.5, 0.25]


def test_it_takes_the_arguments_of_a_run() -> None:
    exporter = stepspan.MemoryExporter()
    with recorded_run(
        name="baseline", samplers=["process"], segment_bytes=4096, redact_names=["codeword"], exporters=[exporter]
    ) as recording:
        for _ in range(100):
            recording.run.log_metrics({"loss": 1.0})
        recording.run.log_hyperparams({"codeword": "sesame"})
        assert recording.run.flush(30)
    assert {event["source"] for event in recording.events("sample")} == {"process"}
    assert len(recording.events("header")) > 1, "several segments"
    assert recording.events("hyperparams")[0]["params"] == {"codeword": "[redacted]"}
    assert recording.events("run_begin")[0]["name"] == "baseline"
    assert exporter.records["metrics"]
    with pytest.raises(TypeError), recorded_run(sampler=[]):
        pass


def test_the_run_is_the_current_one_while_it_lasts() -> None:
    with recorded_run() as recording:
        assert stepspan.current_run() is recording.run
        stepspan.current_run().log_metrics({"loss": 0.5})
    assert stepspan.current_run() is not recording.run
    assert recording.values("training.loss") == [0.5]


def test_a_fixed_clock_gives_exact_times() -> None:
    clock = FixedClock(start_ns=1_000_000_000_000, step_ns=2_000_000)
    with recorded_run(clock=clock) as recording, recording.run.step(0):
        clock.advance(1.5)
    (step,) = recording.spans("training.step")
    assert step.end - step.start == pytest.approx(1.502e9, abs=4e6)  # the journal looks at the clock once a second, too
    assert all(event["ts"] % 2_000_000 == 0 for event in recording.events())


def test_two_recordings_have_the_same_times_and_values() -> None:
    found = []
    for _ in range(2):
        with recorded_run() as recording:
            train(recording.run)
        found.append([(series.name, ts, value) for series, ts, value in recording.points() if series.kind == "gauge"])
    assert found[0] == found[1]


def test_an_exception_of_the_code_under_test_comes_through_and_is_recorded() -> None:
    with pytest.raises(ValueError, match="boom"), recorded_run() as recording, recording.run.step(3):
        raise ValueError("boom")
    (log,) = recording.logs("exception")
    assert log.attributes["exception.message"] == "boom"
    step, run = recording.spans()
    assert (step.error, run.error) == ("ValueError: boom", "failed")


def test_arguments_are_those_of_start_run() -> None:
    with recorded_run(job_id="mine", rank=3, local_rank=1, world_size=4, name="n", tags=["t"]) as recording:
        recording.run.log_metrics({"loss": 1.0})
    (session,) = recording.sessions()
    assert (session.header["job_id"], session.header["rank"], session.header["world_size"]) == ("mine", 3, 4)
    assert session.header["resource"]["service.instance.id"] == "mine-3"
    (run,) = recording.spans("training.run")
    assert (run.attributes["name"], run.attributes["tags"]) == ("n", ["t"])


def test_wrong_arguments_are_refused_as_by_start_run() -> None:
    with pytest.raises(stepspan.ConfigError), recorded_run(rank=4, world_size=2):
        pass


def test_the_environment_neither_switches_it_off_nor_sends_it_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "STEPSPAN_DISABLED": "1",
        "STEPSPAN_ENDPOINT": "http://192.0.2.1:4318",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://192.0.2.1:4318",
        "RANK": "1",
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket.socket, "connect", None)
    with recorded_run() as recording:
        train(recording.run)
    assert recording.events()[0]["rank"] == 0
    assert recording.run._delivery.targets == frozenset()
    assert len(recording.values("training.loss")) == 3


def test_the_journal_is_gone_afterwards_unless_a_directory_was_named(tmp_path: Path) -> None:
    with recorded_run() as recording:
        place = recording.run._pipeline.journal.directory  # type: ignore[union-attr]
        assert place.exists()
    assert not place.exists()
    with recorded_run(directory=tmp_path / "runs"):
        pass
    assert list((tmp_path / "runs").rglob("000001.jsonl"))


def test_a_forked_childs_session_is_recorded_too() -> None:
    with recorded_run() as recording:
        recording.run.log_metrics({"loss": 1.0})
        child = os.fork()
        if child == 0:
            recording.run.log_metrics({"loss": 2.0})
            os._exit(0)
        os.waitpid(child, 0)
    assert [session.header["role"] != "" for session in recording.sessions()] == [False, True]
    assert recording.values("training.loss") == [1.0, 2.0]


@pytest.fixture
def recording() -> Iterator[Any]:
    with recorded_run() as recording:
        yield recording


def test_it_is_a_fixture(recording: Any) -> None:
    train(recording.run)
    assert len(recording.spans("training.step")) == 3
