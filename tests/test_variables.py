"""Variables: none keeps training from starting, and what is wrong with one is said where people look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import runs
from harness.processes import until
from harness.receiver import CERTIFICATE, ScriptedReceiver
from harness.runs import command, python

from stepspan.errors import ConfigError
from stepspan.identity import LAUNCHERS
from stepspan.otlp.endpoint import read_variables
from stepspan.otlp.record_variables import NAMES
from stepspan.run import Run

start = runs.start

E = "OTEL_EXPORTER_OTLP_"
TRAIN = """
import stepspan
with stepspan.start_run(job_id="job", directory="stepspan-runs") as run:
    for step in run.steps(range(3)):
        run.log_metrics({"loss": 1.0})
"""
NONSENSE = ['"', "-1", "\udcff", "\u00e9,=,a,b=%ff", "http://["]
RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}


class Lookups(dict[str, str]):
    """An environment that notes which names are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, name: str, default: str = "") -> str:  # type: ignore[override]
        self.names.add(name)
        return default


def names_read() -> list[str]:
    """The names of the variables that `start_run` reads, but stepspan's own."""
    env = Lookups()
    read_variables(env)
    rows = [row for launcher in LAUNCHERS for row in launcher if isinstance(row, str) and row.isupper()]
    others = ["OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME", "HTTP_PROXY", "HOSTNAME", "TRACEPARENT", "TRACESTATE"]
    return sorted({*env.names, *" ".join(rows).split(), *others, "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"})


def said(text: str, word: str) -> list[str]:
    """The lines that a run logs about something, but the summary at its end."""
    return [line for line in text.splitlines() if word in line and "warnings of this run" not in line]


@pytest.mark.parametrize("launched", [{}, RANKS], ids=["alone", "by torchrun"])
@pytest.mark.parametrize("value", NONSENSE, ids=ascii)
def test_no_variable_keeps_training_from_starting(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, launched: dict[str, str], value: str
) -> None:
    names = names_read()
    for name in [name for name in names if not name.startswith(E)] if launched else names:
        with monkeypatch.context() as patch:
            for variable, text in {f"{E}ENDPOINT": "http://127.0.0.1:9", **launched, name: value}.items():
                patch.setenv(variable, text)
            with start(delivery="off", samplers=[], stall_after=0) as run:
                run.log_metrics({"loss": 1.0})
            assert run.stats()["journaled"] >= 3, name


@pytest.mark.parametrize("protocol", ["http/json", "grpc"])
def test_what_a_variable_spoils_waits_in_the_journal_and_is_said_everywhere(tmp_path: Path, protocol: str) -> None:
    with ScriptedReceiver() as receiver:
        right = {f"{E}ENDPOINT": receiver.grpc_target if protocol == "grpc" else receiver.url, f"{E}PROTOCOL": protocol}
        wrong = {**right, f"{E}TRACES_HEADERS": "authorization=Bearer hunter2,hunter3"}
        trained = python(TRAIN, tmp_path, **wrong)
        assert trained.returncode == 0, trained.stderr
        told, *at_the_end = said(trained.stderr, f"{E}TRACES_HEADERS")
        assert "traces: nothing is sent" in told
        assert all(" for http" in line or " for 127" in line for line in at_the_end), "what waits, as the run ends"
        assert len(at_the_end) <= 1
        assert "%2C" in told or "percent-encode" in told
        assert f"stepspan sync {tmp_path / 'stepspan-runs'}" in told

        found = command("doctor", "--directory", tmp_path / "elsewhere", **wrong)
        assert found.returncode == 1
        [failed] = [line for line in found.stdout.splitlines() if "FAIL:" in line]
        assert failed.split()[0] == "traces"
        assert f"{E}TRACES_HEADERS" in failed

        synced = command("sync", tmp_path / "stepspan-runs", **wrong)
        assert synced.returncode == 1
        assert f"{E}TRACES_HEADERS" in synced.stdout
        assert receiver.points()
        assert not receiver.spans()
        texts = trained.stderr + found.stdout + synced.stdout + synced.stderr
        for file in (tmp_path / "stepspan-runs").rglob("*"):
            texts += file.read_bytes().decode("utf-8", "replace") if file.is_file() else ""
        assert "hunter" not in texts

        healed = command("sync", tmp_path / "stepspan-runs", **right)
        assert healed.returncode == 0, healed.stdout
        assert len(receiver.spans("training.step")) == 3


def test_sync_fails_at_once_where_nothing_can_be_sent(tmp_path: Path) -> None:
    assert python(TRAIN, tmp_path).returncode == 0
    synced = command("sync", tmp_path / "stepspan-runs", **{f"{E}ENDPOINT": "http://$(NODE_IP):4318"})
    assert synced.returncode == 2
    assert f"{E}ENDPOINT='http://$(NODE_IP):4318': a variable in it was not filled in" in synced.stderr


def test_what_counts_as_unset_is_said_once_and_fails_the_doctor(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        wrong = {f"{E}ENDPOINT": receiver.url, f"{E}COMPRESSION": "zstd", f"{E}TIMEOUT": "700"}
        trained = python(TRAIN, tmp_path, **wrong)
        assert receiver.points()
        found = command("doctor", "--directory", tmp_path / "elsewhere", **wrong)
    assert trained.returncode == 0
    assert len(said(trained.stderr, "COMPRESSION")) == 1
    assert found.returncode == 1
    assert any("FAIL" in line and "COMPRESSION='zstd'" in line for line in found.stdout.splitlines())
    assert any(line.startswith("  warning") and "TIMEOUT='700'" in line for line in found.stdout.splitlines())


def test_deflate_and_quotes_reach_the_receiver(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        spelled = {
            f"{E}ENDPOINT": f'"{receiver.url}"',
            f"{E}COMPRESSION": "deflate",
            f"{E}TIMEOUT": "10s",
            f"{E}HEADERS": '"X-Team: a b"',
        }
        trained = python(TRAIN, tmp_path, **spelled)
        assert receiver.points()
        assert {seen.headers["content-encoding"] for seen in receiver.seen} == {"deflate"}
        assert {seen.headers["x-team"] for seen in receiver.seen} == {"a b"}
    assert [line for line in trained.stderr.splitlines() if "the journal is in" not in line] == []


def test_a_certificate_that_appears_later_heals(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    with ScriptedReceiver(tls=True) as receiver:
        variables = {f"{E}ENDPOINT": receiver.url, f"{E}CERTIFICATE": str(certificate)}
        trained = python(TRAIN, tmp_path, **variables)
        assert trained.returncode == 0
        assert not receiver.points()
        failed = command("sync", tmp_path / "stepspan-runs", **variables)
        assert failed.returncode == 1
        assert str(certificate) in failed.stdout
        certificate.write_text(CERTIFICATE)
        healed = command("sync", tmp_path / "stepspan-runs", **variables)
        assert healed.returncode == 0, healed.stdout
        assert receiver.points()


def test_a_run_does_not_wait_for_another_one_whose_variables_are_wrong(tmp_path: Path) -> None:
    """At the same receiver and from the same directory; and what that has left is sent once they are right."""
    code = """
    import os, stepspan, sys
    with stepspan.start_run(job_id="broken", directory="stepspan-runs") as run:
        run.log_metrics({"loss": 1.0})
        start = 'stepspan.start_run(job_id="right")'
        neighbour = f"import stepspan\\nwith {start} as run: run.log_metrics({{'loss': 2.0}}); run.flush(20)"
        run.flush(2)
        env = {name: value for name, value in os.environ.items() if not name.endswith(("HEADERS", "SAMPLER"))}
        import subprocess
        subprocess.run([sys.executable, "-c", neighbour], env=env, check=True)
    """
    with ScriptedReceiver() as receiver:
        right = {f"{E}ENDPOINT": receiver.url}
        wrong = {**right, f"{E}HEADERS": "a=b,c", "OTEL_TRACES_SAMPLER": "always_off"}
        trained = python(code, tmp_path, **wrong)
        assert trained.returncode == 0, trained.stderr
        assert {point.job for point in receiver.points("training.loss")} == {"right"}
        assert {span["job"] for span in receiver.spans("training.run")} == {"right"}
        again = python(TRAIN.replace('"job"', '"broken"') + "    run.flush(20)\n", tmp_path, **right)
        assert again.returncode == 0, again.stderr
        series = "training.loss"
        until(lambda: len([p for p in receiver.points(series) if p.job == "broken" and p.value]) == 4)


def test_a_setting_that_is_wrong_everywhere_is_refused_by_its_variable(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPSPAN_ENDPOINT", "http://:4318")
    with pytest.raises(ConfigError, match=r"^STEPSPAN_ENDPOINT='http://:4318': no host"):
        start()
    with pytest.raises(ConfigError, match=r"^endpoint='http://': no host"):
        start(endpoint="http://")


@pytest.mark.parametrize("value", ["abc", "-1"])
def test_no_variable_keeps_configure_from_setting_up(tmp_path: Path, value: str) -> None:
    """The SDK raises for these, for some as it is imported."""
    code = """
    import stepspan
    from stepspan.integrations.opentelemetry import configure
    with stepspan.start_run(job_id="job", directory="stepspan-runs"):
        configure()
        from opentelemetry import trace, metrics
        with trace.get_tracer("x").start_as_current_span("there"):
            pass
        metrics.get_meter("x").create_counter("c").add(1)
    """
    names = [*NAMES, "OTEL_METRIC_EXPORT_INTERVAL", "OTEL_BSP_MAX_QUEUE_SIZE"]
    done = python(code, tmp_path, **dict.fromkeys(names, value))
    assert done.returncode == 0, done.stderr
    assert len(said(done.stderr, "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT")) == 1
    assert '"there"' in next((tmp_path / "stepspan-runs").rglob("000001.jsonl")).read_text()
