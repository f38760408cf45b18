"""The benchmarks run and print their rows; what they measure is for benchmarks/README.md, not for a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness.processes import under_load

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "tables", "rows"),
    [
        pytest.param(
            "hot_path.py",
            [
                "idle:",
                "idle, paced",
                "live delivery:",
                "live delivery, paced",
                "catching up",
                "beside a busy Python thread",
            ],
            [
                "stepspan: `with run.step(n)",
                "stepspan: `for batch in run.steps",
                "OpenTelemetry SDK: span and five gauges",
                "OpenTelemetry SDK: the same with one attribute in all",
            ],
            id="hot_path",
        ),
        pytest.param(
            "sync.py",
            ["delivering a journal", "memory"],
            [
                "stepspan http/json",
                "stepspan http/protobuf",
                "stepspan http/protobuf, gzip-1",
                "stepspan grpc",
                "official http/protobuf",
                "official grpc",
                "all signals: stepspan http/protobuf",
            ],
            id="sync",
        ),
    ],
)
def test_benchmark_measures_every_contender(tmp_path: Path, script: str, tables: list[str], rows: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick", "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=under_load(120),
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    printed = done.stdout.splitlines()
    for table in tables:
        assert any(line.startswith(f"**{table}") for line in printed), table
    for row in rows:
        figures = [line.split("|")[2:-1] for line in printed if line.startswith(f"| {row}")]
        assert figures, row
        assert all(any(character.isdigit() for character in cells[0]) for cells in figures), row
    assert not list(tmp_path.iterdir()), "it leaves something behind"
