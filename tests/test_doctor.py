"""`stepspan doctor`: what it says is what a run would do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness.raw import proxy
from harness.receiver import Answer, ScriptedReceiver
from harness.runs import command

from stepspan.mapping.records import SIGNALS


def doctor(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return command("doctor", *arguments, **variables)


def test_doctor_says_where_each_field_comes_from(tmp_path: Path) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "STEPSPAN_JOB_ID": "mine"}
    told = doctor("--directory", tmp_path / "runs", **variables)
    assert told.returncode == 0, told.stdout
    lines = {" ".join(line.split()) for line in told.stdout.splitlines()}
    assert {"job_id mine (STEPSPAN_JOB_ID)", "rank 1 (RANK)", "world_size 2 (WORLD_SIZE)"} <= lines
    assert not (tmp_path / "runs").exists(), "it leaves nothing behind"


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"STEPSPAN_RANK": "2", "STEPSPAN_WORLD_SIZE": "2"}, "rank"),
        ({"STEPSPAN_DELIVERY": "pigeon"}, "pigeon"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"}, "smoke"),
    ],
    ids=["rank", "setting", "protocol"],
)
def test_doctor_fails_where_a_run_would(tmp_path: Path, variables: dict[str, str], told: str) -> None:
    found = doctor("--directory", tmp_path / "runs", **variables)
    assert found.returncode == 1
    assert told in next(line for line in found.stdout.splitlines() if "FAIL" in line)


def test_doctor_tries_each_endpoint(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        receiver.script("traces", lambda _: Answer(404))
        told = doctor("--directory", tmp_path / "runs", "--endpoint", receiver.url)
    lines = {line.split()[0]: line for line in told.stdout.splitlines() if line.strip()}
    assert told.returncode == 1
    assert "answers" in lines["metrics"]
    assert "FAIL" in lines["traces"]
    assert "404" in lines["traces"]


def test_doctor_says_that_a_web_page_is_no_receiver(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        page = b"<!DOCTYPE html><title>Sign in</title>"
        receiver.script("all", lambda _: Answer(200, body=page, headers={"Content-Type": "text/html"}))
        told = doctor("--directory", tmp_path / "runs", "--endpoint", receiver.url)
    lines = {line.split()[0]: line for line in told.stdout.splitlines() if line.strip()}
    assert told.returncode == 1
    for signal in SIGNALS:
        assert "FAIL" in lines[signal]
        assert "web page" in lines[signal]
        assert "Sign in" in lines[signal]


def test_doctor_names_the_proxy_in_between(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver, proxy() as between:
        url = receiver.url.replace("127.0.0.1", "collector.invalid")
        variables = {"HTTP_PROXY": f"http://me:s3cret@127.0.0.1:{between.port}", "NO_PROXY": ""}
        told = doctor("--directory", tmp_path / "runs", "--endpoint", url, **variables)
    assert told.returncode == 0, told.stdout
    assert told.stdout.count(f"through proxy {between.url}  answers") == len(SIGNALS)
    assert "s3cret" not in told.stdout


@pytest.mark.parametrize(
    "content",
    [
        "processors: [{renam: {}}]",
        "exporters: [{endpoint: 'http://127.0.0.1:1', processors: [{renam: {}}]}]",
    ],
    ids=["shared", "an exporter's"],
)
def test_processors_that_nobody_knows_are_told(tmp_path: Path, content: str) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "config.yaml").write_text(content)
    told = doctor("--directory", tmp_path / "runs", STEPSPAN_CONFIG=str(tmp_path / "config.yaml"))
    assert told.returncode == 1
    assert "renam" in next(line for line in told.stdout.splitlines() if "FAIL" in line)


def test_further_exporters_are_tried_too(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    with ScriptedReceiver() as receiver:
        (tmp_path / "config.yaml").write_text(f"exporters: [{{endpoint: '{receiver.url}'}}]")
        told = doctor("--directory", tmp_path / "runs", STEPSPAN_CONFIG=str(tmp_path / "config.yaml"))
        assert sorted(seen.signal for seen in receiver.seen) == ["logs", "metrics", "traces"]
    assert told.returncode == 0, told.stdout
    assert told.stdout.count("answers") == 3
    assert "nothing is sent" not in told.stdout


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    assert doctor("--directory", tmp_path / "a" / "b" / "c").returncode == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    assert doctor("--directory", tmp_path / "a" / "b").returncode == 0
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"], "but what was there stays"
