"""`stepspan report`: a run as a person reads it, from its journal alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from harness.delivery import Scripted, Training, deliver, options, trained
from harness.runs import command as run
from rich.console import Console

from stepspan.cli.report import Page
from stepspan.identity import host_facts
from stepspan.journal.layout import find_sessions, segment_name
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.reading.runs import summarise
from stepspan.reading.session_summary import quantiles


def two_ranks(directory: Path) -> None:
    """Rank 0 waits for rank 1, which is killed in step 3 and tried again."""
    for rank, wait, compute in ((0, 0.4, 0.1), (1, 0.1, 0.4)):
        training = Training(directory, rank=rank, session=f"00000000000000a{rank}", boot_id=host_facts().boot_id)
        training.emit("hyperparams", params={"lr": 0.1})
        training.emit("progress", total_steps=10)
        for loss in (3.0, "NaN", 1.0):
            training.collective_step(collective=wait, compute=compute, loss=loss)
        if rank == 0:
            training.emit("artifact", name="model", path="/ckpt/3", kind="checkpoint", step=3)
            training.end()
        else:
            step = training.emit("step_begin", parent=training.run, step=3, split="train")
            training.emit("error", parent=step, type="OSError", message="no disk", stack="", attributes={})
            training.die()
    again = Training(directory, rank=1, session="00000000000000b1", started=60.0)
    again.collective_step(collective=0.1, compute=0.4, loss=0.25)
    again.end()


def test_the_report_as_data(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    (job,) = summarise(find_sessions(tmp_path), boot_id=host_facts().boot_id)
    assert (job["job"], job["name"], job["ranks"], job["total_steps"]) == ("job", "demo", 2, 10)
    assert [(s["rank"], s["status"], s["steps"], s["last_step"], s["open_step"]) for s in job["sessions"]] == [
        (0, "completed", 3, 2, None),
        (1, "interrupted", 3, 2, 3),
        (1, "completed", 1, 0, None),
    ]
    assert job["sessions"][0]["step_time"] == pytest.approx({"p50": 0.5, "p99": 0.5, "max": 0.5}, abs=1e-4)
    assert job["sessions"][0]["data_wait"] == pytest.approx(0.002)
    assert job["straggler"] == {
        "rank": 1,
        "wait": pytest.approx(0.1, abs=1e-4),
        "others_wait": pytest.approx(0.4, abs=1e-4),
    }
    loss = job["metrics"]["loss"]
    assert (loss["last"], loss["min"], loss["min_step"], loss["max"]) == (1.0, 0.25, 0, 3.0)
    assert (loss["points"], loss["nonfinite"]) == (7, 2)
    assert [(e["rank"], e["step"], e["type"]) for e in job["errors"]["list"]] == [(1, 3, "OSError")]
    assert [(c["step"], c["path"]) for c in job["checkpoints"]] == [(3, "/ckpt/3")]
    assert job["hyperparams"] == {"lr": 0.1}
    assert job["delivery"] == []


def test_the_wait_of_a_collective_on_a_device_is_what_the_device_says(tmp_path: Path) -> None:
    for rank, seconds in ((0, 0.25), (1, 0.125)):
        training = Training(tmp_path, rank=rank, session=f"00000000000000a{rank}")
        step = training.emit("step_begin", parent=training.run, step=0, split="train")
        early, late = (
            training.emit("span_begin", parent=step, name="all_reduce", collective=True, cuda=True) for _ in range(2)
        )
        for span in (early, late):
            training.emit("span_end", begin=span)
        training.emit("device_time", begin=early, seconds=seconds)
        training.emit("step_end", begin=step)
        training.emit("device_time", begin=late, seconds=seconds)
        training.end()
    (job,) = summarise(find_sessions(tmp_path), boot_id=host_facts().boot_id)
    assert job["straggler"] == {"rank": 1, "wait": 0.25, "others_wait": 0.5}


def test_the_report_on_a_page(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    page = run("report", tmp_path, TZ="UTC").stdout
    for words in (
        "2 ranks, 3 sessions (2 completed, 1 interrupted); began 2026-11-21 12:00:00",
        "reached step 2 of 10",
        "least wait in collectives: rank 1, 100 ms a step; the others 400 ms: it holds them up",
        "rank 1, step 3  OSError: no disk",
        "step 3  model  /ckpt/3",
        "sent nowhere",
    ):
        assert words in page
    assert "Traceback" not in page


def test_the_report_in_a_terminal_of_80_columns(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    console = Console(file=io.StringIO(), width=80, highlight=False)
    (job,) = summarise(find_sessions(tmp_path), boot_id=host_facts().boot_id)
    Page(console).run(job)
    page = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in page
    for words in ("interrupted", "500 ms", "data (mean)", "in collectives (p50)", "errors", "all on node"):
        assert words in page
    assert page.count("00000000000000b1") == 2, "whole: its first 8 characters are those of another one"


def test_a_run_that_took_all_its_steps_is_told_so_and_named_once(tmp_path: Path) -> None:
    training = Training(tmp_path, job_id="demo")
    training.emit("progress", total_steps=2)
    for _ in range(2):
        training.collective_step()
    training.end()
    page = run("report", tmp_path, TZ="UTC").stdout
    assert page.splitlines()[0].split() == ["demo"]
    assert "took all 2 steps" in page


def test_each_series_has_a_row_of_its_own_in_the_report_by_the_name_of_its_key(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.emit("metrics", step=1, split="val", metrics={"val/loss": 9.0, "loss": 7.0, "val/": 3.0, "acc": 0.5})
    training.emit(
        "metrics", step=1, split="train", metrics={"loss": 2.0, "train/loss": 1.0, "train_loss": 3.0, "a/b": 0.5}
    )
    training.emit("metrics", step=1, split="test", metrics={"val/loss": 8.0, "train_loss": 4.0, "loss": 6.0})
    training.emit("metrics", step=1, split="probe", metrics={"loss": 0.5, "probe/x": 0.5})
    training.end()
    (job,) = summarise(find_sessions(tmp_path), boot_id=host_facts().boot_id)
    assert {name: (values["points"], values["last"]) for name, values in job["metrics"].items()} == {
        "val/loss": (2, 8.0),
        "loss (split val)": (1, 7.0),
        "test/loss": (1, 6.0),
        "val/val/": (1, 3.0),
        "val/acc": (1, 0.5),
        "loss": (1, 2.0),
        "train/loss": (1, 1.0),
        "train_loss": (2, 4.0),
        "a/b": (1, 0.5),
        "probe/loss": (1, 0.5),
        "probe/probe/x": (1, 0.5),
    }


def test_the_report_as_json_is_json_whatever_was_logged(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.collective_step(loss="NaN")
    training.end()

    def refuse(constant: Any) -> None:
        raise AssertionError(constant)

    (job,) = json.loads(run("report", tmp_path, "--json", TZ="UTC").stdout, parse_constant=refuse)["jobs"]
    assert job["metrics"]["loss"]["last"] == "NaN"


def test_what_is_lost_and_what_was_delivered(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    file = session.path / segment_name(1)
    content = file.read_bytes().splitlines(keepends=True)
    content[7] = b"garbage\n"
    file.write_bytes(b"".join(content))
    deliver(session, Scripted(), options())
    deliver(session, Scripted([Outcome(Verdict.HOLD, "404: check the path")]), options(), "traces")
    (job,) = summarise(find_sessions(tmp_path), boot_id=host_facts().boot_id)
    assert job["sessions"][0]["lines"]["damaged"] == 1
    rows = {row["signal"]: row for row in job["delivery"]}
    assert (rows["metrics"]["finished"], rows["metrics"]["pending"], rows["metrics"]["held"]) == (1, 0, 0)
    assert (rows["traces"]["finished"], rows["traces"]["held"]) == (0, 1)
    assert rows["traces"]["messages"] == ["404: check the path"]
    page = run("report", tmp_path, TZ="UTC").stdout
    assert "1 lines damaged" in page
    assert "404: check the path" in page


def test_a_session_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    session = trained(tmp_path, 1)
    (session.path / segment_name(1)).write_bytes(b"nothing\n")
    (job,) = summarise([session], boot_id="")
    assert job["sessions"][0]["status"] == "unreadable"
    assert "no segment begins with a header" in job["sessions"][0]["trouble"]
    assert "no segment begins with a header" in run("report", tmp_path, TZ="UTC").stdout


def test_many_ranks_stay_on_a_page(tmp_path: Path) -> None:
    for rank in range(40):
        training = Training(tmp_path, rank=rank, session=f"{rank:016}")
        training.collective_step(compute=5.0 if rank == 33 else 0.1)
        training.end()
    page = run("report", tmp_path, TZ="UTC").stdout
    assert "and 16 more" in page
    assert "\n33 " in page
    assert len(page.splitlines()) < 50


def test_quantiles_by_nearest_rank() -> None:
    assert quantiles([float(n) for n in range(1, 101)]) == {"p50": 50.0, "p99": 99.0, "max": 100.0}
    assert quantiles([]) is None
