"""`stepspan demo`: a training as the settings say, or what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.processes import under_load
from harness.receiver import ScriptedReceiver


def demo(*arguments: str, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "STEPSPAN_"))}
    program = f"import sys\n{before}\nfrom stepspan.cli import main\nif __name__ == '__main__': main()"
    return subprocess.run(
        [sys.executable, "-c", program, "demo", "--ranks", "1", "--epochs", "1", *arguments],
        env={**env, "STEPSPAN_SAMPLERS": "none", **variables},
        capture_output=True,
        text=True,
        timeout=under_load(120),
        check=False,
    )


def test_without_scikit_learn_it_says_what_to_install(tmp_path: Path) -> None:
    told = demo("--directory", str(tmp_path / "runs"), before="sys.modules['sklearn'] = None")
    assert told.returncode == 2
    assert "pip install 'stepspan[demo]'" in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "runs").exists()


def test_the_settings_say_where_the_journal_goes_and_who_gets_it(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    with ScriptedReceiver() as receiver:
        told = demo(STEPSPAN_DIRECTORY=str(tmp_path / "mine"), STEPSPAN_ENDPOINT=receiver.url)
        assert receiver.points("training.loss")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "delivering" in told.stdout
    assert "send it" not in told.stdout
    assert list((tmp_path / "mine").glob("demo-*"))
