"""`stepspan tail`: the events of a run's sessions as lines, merged by time."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.delivery import Training, trained
from harness.journals import SECOND, header, lay_down
from harness.processes import under_load, until
from harness.runs import command as run
from rich.console import Console
from typer.testing import CliRunner

from stepspan.cli import tail as tails
from stepspan.cli.app import app
from stepspan.cli.event_text import ROWS, event_text, printable
from stepspan.cli.tail import SHOWN_WHILE_OPEN, Follow
from stepspan.events import TAGS
from stepspan.journal.layout import segment_name
from stepspan.values import format_seconds


def tail(path: Path, count: int = 1000, rank: int | None = None, tags: tuple[str, ...] = ()) -> list[str]:
    return [f"{line.rank}|{line.step}|{line.text}" for line in Follow(path, rank, tags).newest(count)]


def test_lines_are_merged_over_ranks_by_time(tmp_path: Path) -> None:
    for rank in range(2):
        training = Training(tmp_path, rank=rank, session=f"00000000000000a{rank}", started=rank * 0.25)
        training.emit("metrics", step=1, split="train", metrics={"loss": 0.123456789, "lr": 0.1})
        training.now += SECOND
        training.emit("metrics", step=1, split="val", metrics={"loss": "NaN"})
        training.end("failed")
    assert tail(tmp_path) == [
        "0||session 00000000000000a0 on node, pid 1",
        "0||run demo begins",
        "0|1|loss=0.123457 lr=0.1",
        "1||session 00000000000000a1 on node, pid 1",
        "1||run demo begins",
        "1|1|loss=0.123457 lr=0.1",
        "0|1|val  loss=NaN",
        "0||run demo took 1.00 s: failed",
        "1|1|val  loss=NaN",
        "1||run demo took 1.00 s: failed",
    ]
    assert tail(tmp_path, 2) == ["1|1|val  loss=NaN", "1||run demo took 1.00 s: failed"]
    assert tail(tmp_path, rank=0, tags=("metrics",)) == ["0|1|loss=0.123457 lr=0.1", "0|1|val  loss=NaN"]
    assert tail(tmp_path, 0) == []


def test_a_step_is_told_by_its_end_and_by_its_beginning_while_it_is_open(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.collective_step(collective=0.005, compute=0.25)
    step = training.emit("step_begin", parent=training.run, step=1, split="train")
    training.emit("span_begin", parent=step, name="all_reduce", collective=True)
    training.die()
    assert tail(tmp_path)[2:] == [
        "0|0|all_reduce took 5 ms",
        "0|0|loss=0.5",
        "0|0|step 0 took 255 ms, waited 2 ms for data",
        "0|1|step 1 begins",
        "0|1|all_reduce begins",
    ]
    assert tail(tmp_path, tags=tuple(SHOWN_WHILE_OPEN))[0] == "0|0|step 0 begins", "who asks for them gets all"


def test_a_long_journal_is_read_from_its_end(tmp_path: Path) -> None:
    session = trained(tmp_path, 3000)
    read = []
    follow = Follow(tmp_path, None, frozenset())
    (one,) = follow._open()
    original = one._reader._pread
    one._reader._pread = lambda *where: read.append(original(*where)) or read[-1]  # type: ignore[func-returns-value, method-assign]
    lines = one.newest(10, frozenset())
    assert lines[-1].text == "run ended: completed"
    size = sum((session.path / segment_name(n)).stat().st_size for n in session.segments())
    assert sum(map(len, read)) < size / 3


def test_a_rare_line_is_looked_for_further_back(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.emit("error", parent=training.run, type="ValueError", message="early", stack="", attributes={})
    training.steps(3000)
    assert tail(tmp_path, tags=("error",)) == ["0||ValueError: early"]


def test_follow_shows_what_comes_once_also_of_sessions_that_appear(tmp_path: Path) -> None:
    first = Training(tmp_path)
    follow = Follow(tmp_path, None, frozenset({"metrics"}))
    assert follow.newest(5) == []
    first.emit("metrics", step=1, split="train", metrics={"loss": 1.0})
    second = Training(tmp_path, rank=1, session="00000000000000a1")
    second.emit("metrics", step=1, split="train", metrics={"loss": 2.0})
    found: list[str] = []

    def look() -> bool:
        found.extend(f"{line.rank} {line.text}" for line in follow.read_on(rescan=True))
        return len(found) >= 2

    until(look)
    first.emit("metrics", step=2, split="train", metrics={"loss": 3.0})
    first.end()
    until(lambda: look() and len(found) == 3)
    assert sorted(found) == ["0 loss=1", "0 loss=3", "1 loss=2"]
    assert follow.read_on(rescan=True) == []


def test_following_ends_when_interrupted(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.emit("metrics", step=1, split="train", metrics={"loss": 1.0})
    command = [sys.executable, "-m", "stepspan", "tail", str(tmp_path), "--follow", "--tag", "metrics"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("loss=1\n")
        training.emit("metrics", step=2, split="train", metrics={"loss": 2.0})
        training.end()
        assert process.stdout.readline().endswith("loss=2\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=under_load(20)) == 0


def test_following_rests_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Training(tmp_path)
    rests: list[float] = []

    def sleep(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tails.time, "sleep", sleep)  # type: ignore[attr-defined]
    told = CliRunner().invoke(app, ["tail", str(tmp_path), "-n", "5", "--follow"])
    assert told.exit_code == 0
    assert rests == [tails.POLL_INTERVAL_S] * 3
    assert len(told.stdout.splitlines()) == 2


def test_the_command_prints_time_rank_step_and_what(tmp_path: Path) -> None:
    training = Training(tmp_path, rank=3)
    training.emit("metrics", step=12, split="train", metrics={"loss": 0.5})
    training.die()
    told = run("tail", tmp_path, "-n", 1, TZ="UTC")
    assert told.stdout == "2026-11-21 12:00:00.000  rank 3        12  loss=0.5\n"
    assert run("tail", tmp_path, "--tag", "error").returncode == 2


def test_several_jobs_are_named(tmp_path: Path) -> None:
    for number, job in enumerate(("one", "two")):
        lay_down(tmp_path / job / "node", [header(job_id=job, session=f"{number:016}")], session=f"{number:016}")
    assert [line.split()[2] for line in run("tail", tmp_path).stdout.splitlines()] == ["one", "two"]


def test_in_a_terminal_several_jobs_have_headings(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, highlight=False)
    long = "a-job-whose-name-takes-all-the-room-that-there-is-for-the-rest-of-a-line-in-a-terminal"
    lines = [tails.TailLine(n, job, "0", str(n), "metrics", f"loss={n}") for n, job in enumerate((long, long, "two"))]
    job = tails.show(console, lines, several_jobs=True)
    tails.show(console, lines[2:], several_jobs=True, job=job)
    told = [" ".join(line.split()[2:]) or line for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    step = "rank 0 {0} loss={0}".format
    assert told == [long, step(0), step(1), "two", step(2), step(2)]


def test_a_tag_that_nobody_knows_is_told_with_those_that_are_known(tmp_path: Path) -> None:
    trained(tmp_path, 1)
    told = run("tail", tmp_path, "--tag", "metric")
    assert told.returncode == 2
    assert "metric" in told.stderr
    assert all(tag in told.stderr for tag in TAGS)


def test_nothing_in_a_journal_reaches_the_terminal_as_a_command(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.emit("event", parent=1, name="\x1b[31mred\n[bold]fake line", attributes={"bell": "\x07"})
    training.die()
    for command in (["tail", tmp_path], ["report", tmp_path]):
        assert "\x1b" not in run(*command).stdout
    assert tail(tmp_path)[-1] == "0|| [31mred [bold]fake line bell= "
    assert printable("é✓") == "é✓"


# ---------------------------------------------------------------- one line


def test_every_tag_has_words() -> None:
    assert set(ROWS) == set(TAGS)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"tag": "artifact", "kind": "checkpoint", "name": "model", "path": "/a b.pt"}, "checkpoint model: /a b.pt"),
        ({"tag": "event", "name": "eval", "status": "ok", "attributes": {"n": 3}}, "eval [ok] n=3"),
        ({"tag": "log", "severity": "warning", "logger": "root", "message": "low disk"}, "WARNING root: low disk"),
        ({"tag": "memory", "device_id": 0, "counters": {"allocated": 5}}, "device 0: allocated=5"),
        ({"tag": "dropped", "key": "loss", "count": 4, "why": "it is text"}, "4 of loss not recorded: it is text"),
        (
            {"tag": "hyperparams", "params": {"a": "x" * 10**6}},
            f"hyperparameters a={'x' * 100} … {'x' * 100}".replace("a=x", "a='x") + "'",
        ),
        ({"tag": "gap", "dropped": 7, "why": "disk full"}, "7 events before this one could not be written: disk full"),
        (
            {"tag": "sample", "source": "gpu", "values": [["hw.power", 300.0, {"hw.id": "0"}], ["x", 1]]},
            "gpu: hw.power{0}=300 x=1",
        ),
        ({"tag": "step_end", "begin": 3, "status": "error"}, "step ended, error"),
        ({"tag": "device_time", "begin": 3, "seconds": 0.0123}, "a span on the device: 12.3 ms"),
        ({"tag": "metrics"}, "metrics"),
        ({"tag": "metrics", "split": "val", "metrics": {"val/loss": 0.5}}, "val/loss=0.5"),
        ({"tag": "tomorrow", "seq": 3, "mood": "good"}, "tomorrow mood=good"),
    ],
    ids=lambda value: value["tag"] if isinstance(value, dict) else "",
)
def test_an_event_in_words(event: dict[str, Any], words: str) -> None:
    assert event_text({"ts": 0, "seq": 1, "crc": 1, **event}) == words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2e-5, "20 µs"),
        (0.0123, "12.3 ms"),
        (1.5, "1.50 s"),
        (45.23, "45.2 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("command", ["tail", "report"])
def test_help_and_an_empty_place(tmp_path: Path, command: str) -> None:
    assert run(command, "--help").stdout.count(".") >= 3
    told = run(command, tmp_path)
    assert told.returncode == 2
    assert str(tmp_path) in told.stderr
