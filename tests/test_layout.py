"""Where sessions lie: which are found, and what a host looks at."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.delivery import Training
from harness.received import points
from harness.receiver import ScriptedReceiver

from stepspan.journal.layout import SessionPath, find_sessions


def session(root: Path, job: str, host: str, rank: int) -> Path:
    path = root / job / host / f"rank-{rank:05d}-00000000000000a{rank}"
    path.mkdir(parents=True)
    return path


def found(path: Path, host: str | None = None) -> list[str]:
    return [f"{s.path.parent.parent.name}/{s.path.parent.name}/{s.rank}" for s in find_sessions(path, host=host)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two jobs on two hosts, and one job that is named as a host is."""
    for job, host, rank in (("a", "n1", 0), ("a", "n2", 1), ("b", "n2", 0), ("n1", "n1", 0), ("n1", "n2", 1)):
        session(tmp_path, job, host, rank)
    return tmp_path


def test_all_sessions_below_a_path(root: Path) -> None:
    assert found(root) == ["a/n1/0", "a/n2/1", "b/n2/0", "n1/n1/0", "n1/n2/1"]
    assert found(root / "a") == ["a/n1/0", "a/n2/1"]
    assert found(root / "a" / "n2") == ["a/n2/1"]
    assert found(root / "a" / "n2" / "rank-00001-00000000000000a1") == ["a/n2/1"]


def test_those_of_a_host(root: Path) -> None:
    assert found(root, "n1") == ["a/n1/0", "n1/n1/0"]
    assert found(root, "n2") == ["a/n2/1", "b/n2/0", "n1/n2/1"]
    assert found(root / "a", "n1") == ["a/n1/0"]
    assert found(root / "a" / "n1", "n1") == ["a/n1/0"]
    assert found(root, "n3") == []


def test_a_host_looks_into_no_others_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (looked.append(Path(path).name), scandir(path))[1])  # type: ignore[func-returns-value]
    assert found(root / "a", "n1") == ["a/n1/0"]
    assert looked == ["n1"]


@pytest.mark.parametrize(("trouble", "raised"), [(FileNotFoundError, False), (PermissionError, True), (OSError, True)])
def test_only_a_session_that_is_gone_has_no_segments(
    root: Path, monkeypatch: pytest.MonkeyPatch, trouble: Any, raised: bool
) -> None:
    def listdir(path: Path) -> list[str]:
        raise trouble(path)

    monkeypatch.setattr(os, "listdir", listdir)
    here = SessionPath.of(session(root, "c", "n1", 0))
    if raised:
        with pytest.raises(trouble):
            here.segments()  # type: ignore[union-attr]
    else:
        assert here.segments() == []  # type: ignore[union-attr]


def test_more_sessions_than_a_shell_allows_files_are_delivered(tmp_path: Path) -> None:
    for rank in range(40):
        training = Training(tmp_path, rank=rank, session=f"{rank:016x}")
        training.emit("metrics", step=1, split="train", metrics={"loss": 0.5})
        training.end()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with ScriptedReceiver() as receiver:
        command = [sys.executable, "-m", "stepspan", "sync", str(tmp_path), "--endpoint", receiver.url]
        done = subprocess.run(
            ["sh", "-c", 'ulimit -S -n 96 && exec "$@"', "sh", *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        losses = [point for request in receiver.requests["metrics"] for point in points(request)]
    assert hard > 40 * 9
    assert {point.rank for point in losses if point.name == "training.loss"} == set(range(40))
