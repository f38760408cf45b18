"""What a run does for its deliverer process: starts it with the right variables, and tells what a person must fix."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import processes
from harness.processes import under_load, until
from harness.receiver import CERTIFICATE, Answer, ScriptedReceiver
from harness.runs import python, start

import stepspan
from stepspan.deliver import delivery, spawn
from stepspan.deliver.delivery import ProcessDelivery
from stepspan.deliver.ledgers import cursors
from stepspan.errors import ConfigError
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.exporters.memory import MemoryExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import Cursor, CursorState, Ledger, cursor_name
from stepspan.journal.layout import find_sessions
from stepspan.processors import Drop
from stepspan.run import Run

start, ranks = start, processes.ranks

ENDPOINT = "http://127.0.0.1:9"


class Host:
    """A run's delivery whose clock, deliverers and cursors are the test's."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self._running = False
        self.started: list[dict[str, str]] = []
        self.exit_status: int | None = None
        self.told: list[tuple[str, str]] = []
        self.session = directory / "job" / "node" / "rank-00000-00000000000000a0"
        self.ended: list[str] = []
        (self.session / "cursors").mkdir(parents=True)
        clock = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now, sleep=lambda _: None)
        monkeypatch.setattr(delivery, "time", clock)
        monkeypatch.setattr(delivery, "spawn", self._spawn)
        monkeypatch.setattr(ProcessDelivery, "check_interval_s", 5.0)
        self.delivery = ProcessDelivery(
            directory, "node", [OtlpExporter(ENDPOINT, env={}, destination="there")],
            first=True, health=False, warn=lambda *told, key="": self.told.append(told),
            session=lambda: self.session, conclude=self.ended.append,
        )  # fmt: skip

    def watch(self, seconds: float) -> None:
        """Once a second, for so long; at first it is started."""
        for _ in range(int(seconds)):
            self.now += 1
            if self._running:
                self.delivery.watch()
            else:
                self._running = True
                self.delivery.start()

    def cursor(self, signal: str, **fields: object) -> None:
        cursor = Cursor(self.session / "cursors" / cursor_name("there", signal))
        cursor.write(CursorState(**fields))  # type: ignore[arg-type]
        cursor.close()

    def _spawn(self, *_: object, env: dict[str, str], **__: object) -> SimpleNamespace:
        self.started.append(env)
        return SimpleNamespace(poll=lambda: self.exit_status, returncode=None, pid=1 << 30)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


# ---------------------------------------------------------------- what a person must fix


def test_a_signal_that_is_held_is_told_once_with_what_to_do(host: Host, tmp_path: Path) -> None:
    host.watch(10)
    host.cursor("metrics", state="hold", message="401: set OTEL_EXPORTER_OTLP_HEADERS")
    host.watch(60)
    ((kind, message),) = host.told
    assert kind == "delivery"
    for said in (f"metrics to {ENDPOINT}/v1/metrics", "there", "401: set OTEL_EXPORTER_OTLP_HEADERS"):
        assert said in message
    assert f"stepspan status {tmp_path}" in message
    assert f"stepspan sync {tmp_path}" in message


def test_a_signal_that_fails_is_told_once_it_has_failed_for_half_a_minute(host: Host) -> None:
    host.cursor("traces", state="retry", message="no connection")
    host.watch(30)
    assert host.told == []
    host.watch(60)
    ((_, message),) = host.told
    assert "no connection" in message


def test_a_signal_that_recovers_in_time_is_not_told_and_its_time_begins_anew(host: Host) -> None:
    for _ in range(3):
        host.cursor("traces", state="retry", message="no connection")
        host.watch(20)
        host.cursor("traces", state="ok")
        host.watch(10)
    assert host.told == []


def test_a_hold_at_the_end_of_a_run_is_told_too(host: Host, tmp_path: Path) -> None:
    host.watch(1)
    host.cursor("logs", state="hold", message="404")
    host.delivery.close(host.session, 0.0)
    assert host.told == []
    (line,) = host.ended
    assert "metrics, traces: not sent yet; logs: 404; nobody goes on" in line
    assert f"`stepspan sync {tmp_path}/job --endpoint {ENDPOINT} --destination there`" in line


def test_that_values_are_thinned_is_told_once(host: Host) -> None:
    host.cursor("metrics", state="ok", ledger=Ledger(mapped=9, delivered=4, thinned=5))
    host.watch(60)
    assert [kind for kind, _ in host.told] == ["thinned"]
    assert "faster than one a millisecond" in host.told[0][1]


def test_what_is_refused_for_good_is_told_once_a_signal(host: Host, tmp_path: Path) -> None:
    for rejected in 3, 4:
        host.cursor(
            "metrics", state="ok", message="label too long", ledger=Ledger(mapped=9, delivered=5, rejected=rejected)
        )
        host.watch(30)
    ((kind, message),) = host.told
    assert kind == "rejected"
    assert "there: refused for good, of metrics: 3 so far: label too long" in message
    assert f"`stepspan sync --rejected {tmp_path}`" in message


def test_a_training_process_says_that_its_receiver_refuses_it(ranks: processes.Ranks) -> None:
    with ScriptedReceiver() as receiver:
        receiver.script("all", lambda _: Answer(401, text="no token"))
        rank = ranks.start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)

        def held() -> bool:
            states = [cursors(session.path) for session in find_sessions(ranks.directory)]
            return any(s.state == "hold" for found in states for signals in found.values() for s in signals.values())

        until(held)
        (ranks.directory / "stop").touch()
        _, err = rank.communicate(timeout=under_load(30))
    assert err.count("cannot be delivered") <= 1, "while it runs, if it runs for long enough"
    (line,) = [line for line in err.splitlines() if " wait for " in line]
    assert "no token" in line, "and as it ends"


# ---------------------------------------------------------------- a deliverer that dies


def test_a_deliverer_that_dies_at_once_is_told_and_started_again_ever_more_rarely(host: Host, tmp_path: Path) -> None:
    host.exit_status = 3
    host.watch(60)
    assert len(host.started) == 4, "after 1, 11, 26 and 51 s"
    kind, message = host.told[0]
    assert kind == "deliverer"
    assert "exit status 3" in message
    assert f"{tmp_path}/.deliverers/node.log" in message
    host.watch(3600)
    before = len(host.started)
    host.watch(3600)
    assert 11 <= len(host.started) - before <= 12, "five minutes at most"


def test_one_that_died_after_it_delivered_is_started_again_without_a_pause(host: Host) -> None:
    host.watch(5)
    host.cursor("metrics", state="ok", answered=host.now + 1)
    host.exit_status = -9
    host.watch(5)
    assert len(host.started) == 2


def test_one_that_ended_well_is_not_told(host: Host) -> None:
    host.exit_status = 0
    host.watch(20)
    assert host.told == []
    assert len(host.started) == 4


# ---------------------------------------------------------------- its variables


def test_deliverers_that_have_ended_do_not_stay_as_zombies() -> None:
    first = subprocess.Popen([sys.executable, "-c", ""])
    second = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    spawn.leave(first)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    spawn.leave(second)
    with pytest.raises(ChildProcessError):
        os.waitpid(first.pid, 0)
    assert second.stdin is not None
    second.stdin.close()
    os.waitpid(second.pid, 0)


def test_a_deliverer_that_is_started_again_goes_where_the_first_one_went(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.exit_status = 0
    host.watch(5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere:4318")
    host.watch(10)
    first, *later = host.started
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in first
    assert later
    assert all(env == first for env in later)


def test_a_relative_path_of_a_certificate_is_the_run_s_not_the_deliverer_s(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text(CERTIFICATE)
    with ScriptedReceiver(tls=True) as receiver:
        ran = python(
            """
            import os, stepspan
            with stepspan.start_run(job_id="job") as run:
                os.chdir("/")
                run.log_metrics({"loss": 0.5})
                print(run.flush(20))
            """,
            tmp_path,
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
            OTEL_EXPORTER_OTLP_CERTIFICATE="ca.pem",
            NO_PROXY="*",
        )
        assert (ran.returncode, ran.stdout.strip()) == (0, "True"), ran.stderr
        assert receiver.points("training.loss")


def test_certificates_are_found_by_whatever_variable_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "OTEL_EXPORTER_OTLP_LOGS_CLIENT_KEY": "key.pem",
        "REQUESTS_CA_BUNDLE": "/etc/ca.pem",
        "SSL_CERT_FILE": "",
        "SSL_CERT_DIR": "a:/b",
        "HOME": "home",
    }
    here = os.getcwd()
    assert spawn.with_absolute_paths(given) == {
        **given,
        "OTEL_EXPORTER_OTLP_LOGS_CLIENT_KEY": f"{here}/key.pem",
        "SSL_CERT_DIR": f"{here}/a:/b",
    }


def path_of_the_deliverer(directory: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> list[str]:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(spawn.subprocess, "Popen", lambda *_, env, **__: seen.append(env))  # type: ignore[attr-defined]
    spawn.spawn(directory, "node", [], {}, health=False, env=env)
    assert json.loads(seen[0][spawn.EXPORTERS_VARIABLE]) == []
    return seen[0]["PYTHONPATH"].split(os.pathsep)


def test_nothing_that_is_installed_goes_before_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = str(Path(stepspan.__file__).parents[1])
    monkeypatch.setattr(site, "getsitepackages", lambda: ["/somewhere"])
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    assert path_of_the_deliverer(tmp_path, monkeypatch, {"PYTHONPATH": "/mine"}) == ["/mine", package]
    monkeypatch.setattr(site, "getsitepackages", lambda: [package])
    assert path_of_the_deliverer(tmp_path, monkeypatch, {"PYTHONPATH": "/mine"}) == ["/mine"]
    assert path_of_the_deliverer(tmp_path, monkeypatch, {}) == [""]


# ---------------------------------------------------------------- what training imports for it


def test_a_training_process_imports_what_starts_a_deliverer_and_nothing_that_delivers(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        ran = python(
            """
            import json, os, sys, stepspan
            with stepspan.start_run(job_id="job", endpoint=os.environ["RECEIVER"]) as run:
                run.log_metrics({"loss": 0.5})
                print(run.flush(20))
                print(json.dumps([*sys.modules]))
            """,
            tmp_path,
            RECEIVER=receiver.url,
            NO_PROXY="*",
        )
        assert ran.returncode == 0, ran.stderr
        delivered, modules = ran.stdout.splitlines()
        assert delivered == "True"
    below = [name.removeprefix("stepspan.") for name in json.loads(modules) if name.startswith("stepspan.")]
    assert {name for name in below if name.startswith("deliver.")} == {
        "deliver.delivery",
        "deliver.begun",
        "deliver.ledgers",
        "deliver.lock",
        "deliver.routes",
        "deliver.spawn",
    }
    assert {name for name in below if name.startswith("mapping.")} <= {
        "mapping.clock",
        "mapping.ids",
        "mapping.limits",
        "mapping.names",
        "mapping.options",
        "mapping.records",
        "mapping.sampling",
        "mapping.trace_context",
    }, "settings and names, and nothing that maps"
    assert not {"otlp.grpc", "otlp.http", "otlp.json", "otlp.protobuf"} & set(below)


# ---------------------------------------------------------------- one cursor, one exporter


def test_two_exporters_of_one_destination_are_refused(start: Callable[..., Run], tmp_path: Path) -> None:
    pairs = [
        [OtlpExporter(ENDPOINT, env={}, processors=[Drop(metrics=["loss"])]), OtlpExporter(ENDPOINT, env={})],
        [MemoryExporter(), MemoryExporter()],
    ]
    for pair in pairs:
        with pytest.raises(ConfigError, match=f"exporters='{pair[0].destination}'.*destination="):  # type: ignore[index]
            start(exporters=[JsonlExporter(tmp_path / "runs"), *pair])  # type: ignore[misc]
    start(exporters=[JsonlExporter(tmp_path / "runs"), MemoryExporter(), MemoryExporter(destination="other")])


def test_an_endpoint_that_variables_argument_and_file_name_is_one_exporter(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", ENDPOINT)
    monkeypatch.setenv("STEPSPAN_DELIVERY", "off")
    monkeypatch.setenv("STEPSPAN_EXPORTERS", json.dumps([{"endpoint": ENDPOINT}]))
    run = start(endpoint=ENDPOINT)
    assert len(run._pipeline.followers) == 1  # type: ignore[union-attr]
    run.close()
    monkeypatch.setenv("STEPSPAN_EXPORTERS", json.dumps([{"processors": [{"drop": {"metrics": ["loss"]}}]}]))
    with pytest.raises(ConfigError, match="two exporters go to this destination"):
        start()


# ---------------------------------------------------------------- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_says_nothing_of_its_parent_s_deliverer(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        ran = python(
            """
            import os, sys, stepspan
            with stepspan.start_run(job_id="job") as run:
                run.log_metrics({"loss": 0.5})
                run._delivery.watch()
                child = os.fork()
                if child == 0:
                    run.log_metrics({"loss": 0.25})
                    sys.exit(0)
                os.waitpid(child, 0)
            """,
            tmp_path,
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
            PYTHONDEVMODE="1",
            NO_PROXY="*",
        )
        until(lambda: len(receiver.spans("training.run")) == 1 and len(receiver.points("training.loss")) > 2)
    assert ran.returncode == 0, ran.stderr
    assert "ResourceWarning" not in ran.stderr
