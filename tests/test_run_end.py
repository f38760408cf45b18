"""No run ends in silence: every lane tries once more, and one line says what waits, why, who goes on, what sends it."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.delivery import Scripted, Time, Training, options
from harness.processes import Ranks, under_load, until
from harness.receiver import HANG, Answer, ScriptedReceiver
from harness.runs import command
from test_short_runs import CONTAINER, losses, program

from stepspan.deliver import delivery
from stepspan.deliver.deliverer import SILENCE_LIMIT_S
from stepspan.deliver.lock import DeliveryLock
from stepspan.deliver.scheduler import Scheduler
from stepspan.deliver.threads import ThreadDelivery
from stepspan.journal.cursor import CursorState
from stepspan.journal.layout import find_sessions
from stepspan.mapping.records import SIGNALS
from stepspan.otlp.outcome import Outcome, Verdict

SHORT = """
import stepspan
with stepspan.start_run(job_id="j") as run:
    for _ in run.steps(range(3)):
        run.log_metrics({"loss": 1.0})
    run.log_event("milestone")
"""
REFUSED_FIRST = """
import stepspan, time
from stepspan.deliver.ledgers import cursors
run = stepspan.start_run(job_id="j")
run.log_metrics({"loss": 1.0})
deadline = time.monotonic() + 30
while not any(
    state.failing for signals in cursors(run._session.path).values() for state in signals.values()
):
    assert time.monotonic() < deadline
    time.sleep(0.02)
"""
"""Ends where a receiver has refused the run something."""


def said(text: str) -> list[str]:
    """The lines about what was not delivered."""
    return [line for line in text.splitlines() if re.search(r" waits? for | ended so", line)]


def send_it(line: str) -> None:
    """Call the command that the line names."""
    (words,) = re.findall(r"`stepspan (sync [^`]*)`", line)
    done = command(*shlex.split(words))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def deliverers(tmp_path: Path) -> Iterator[Ranks]:
    """Those that go on after their runs; they end with the test."""
    found = Ranks(tmp_path / "stepspan-runs")
    yield found
    end(found)


def end(found: Ranks) -> None:
    for deliverer in found.deliverers():
        with suppress(psutil.NoSuchProcess):
            deliverer.kill()
    until(lambda: not found.deliverers())


REASONS: dict[str, tuple[Any, str, str]] = {
    "503": (Answer(503, text="busy"), "busy", "goes on"),
    "401": (Answer(401, text="no token"), "no token", "nobody goes on"),
    "a dead port": (None, "no connection", "goes on"),
    "a black hole": (HANG, "no answer for", "goes on"),
}


@pytest.mark.parametrize(("what", "how"), [*((what, "process") for what in REASONS), ("503", "thread")])
def test_one_line_says_what_waits_why_who_goes_on_and_a_command_that_sends_it(
    tmp_path: Path, what: str, how: str, deliverers: Ranks
) -> None:
    answer, reason, goes_on = REASONS[what]
    with ScriptedReceiver() as receiver:
        receiver.script("all", lambda _: answer)
        if answer is None:
            receiver.stop()
        begun = time.monotonic()
        ran = program(SHORT, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, STEPSPAN_DELIVERY=how)
        assert time.monotonic() - begun < under_load(4.0), "and at once"
        assert ran.returncode == 0, ran.stderr
        (line,) = said(ran.stderr)
        if how == "process":
            assert len(ran.stderr.splitlines()) == 2, "where the journal is, and this"
        assert re.search(rf"\d+ lines wait for {re.escape(receiver.url)}: ", line)
        assert reason in line
        assert set(SIGNALS) <= set(re.findall(r"\w+", line))
        if how == "thread" or goes_on != "goes on":
            assert "nobody goes on" in line
        else:
            pid = int(re.findall(r"the deliverer, process (\d+), goes on", line)[0])
            assert pid in {deliverer.pid for deliverer in deliverers.deliverers()}
            end(deliverers)
        receiver.stop()
        receiver.script("all", [])
        receiver.start()
        send_it(line)
        assert losses(receiver) == {1.0}
        assert len(receiver.spans("training.step")) == 3
        assert len(receiver.logs("milestone")) == 1


@pytest.mark.parametrize("protocol", ["http/json", "grpc"])
def test_the_command_goes_on_with_the_same_cursors_over_each_protocol(
    tmp_path: Path, protocol: str, deliverers: Ranks
) -> None:
    with ScriptedReceiver() as receiver:
        url = receiver.grpc_target if protocol == "grpc" else receiver.url
        receiver.script("logs", lambda _: Answer(503, text="busy"))
        code = SHORT.replace('job_id="j"', f'job_id="j", endpoint={url!r}, protocol={protocol!r}')
        ran = program(code, tmp_path)
        (line,) = said(ran.stderr)
        assert "logs: " in line
        assert "metrics" not in line
        receiver.script("logs", [])
        before = len(receiver.seen)
        end(deliverers)
        send_it(line)
        assert {seen.signal for seen in receiver.seen[before:]} <= {"logs"}
        assert len(receiver.logs("milestone")) == 1


@pytest.mark.parametrize("way", ["sys.exit(3)", "raise ValueError('boom')", "pass"])
def test_it_is_said_however_the_program_ends(tmp_path: Path, way: str) -> None:
    code = f"import stepspan, sys\nrun = stepspan.start_run(job_id='j')\nrun.log_metrics({{'loss': 1.0}})\n{way}\n"
    ran = program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert len(said(ran.stderr)) == 1, ran.stderr


def test_what_is_delivered_or_offline_on_purpose_says_nothing(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        assert not said(program(SHORT, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url).stderr)
    offline = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "STEPSPAN_DELIVERY": "off"}
    assert not said(program(SHORT, tmp_path, **offline).stderr)
    assert not said(program(SHORT, tmp_path).stderr), "no endpoint"


def test_the_ranks_of_a_host_say_it_once(tmp_path: Path) -> None:
    code = """
    import multiprocessing, stepspan
    def rank(number):
        with stepspan.start_run(job_id="j", rank=number, local_rank=number, world_size=4, samplers="none") as run:
            run.log_metrics({"loss": number})
    if __name__ == "__main__":
        ranks = [multiprocessing.get_context("spawn").Process(target=rank, args=(n,)) for n in range(4)]
        [each.start() for each in ranks]
        [each.join() for each in ranks]
    """
    (tmp_path / "ranks.py").write_text(code.replace("\n    ", "\n"))
    runpy = "import runpy; runpy.run_path('ranks.py', run_name='__main__')"
    ran = program(runpy, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", MASTER_PORT="1")
    assert len(said(ran.stderr)) == 1, ran.stderr


def test_many_runs_of_a_process_say_it_twice(tmp_path: Path) -> None:
    code = """
    import stepspan
    for number in range(5):
        with stepspan.start_run(job_id=f"trial-{number}") as run:
            run.log_metrics({"loss": number})
    """
    ran = program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    first, others = said(ran.stderr)
    assert "/trial-0 " in first
    assert "4 more runs of this process ended so, last: " in others
    assert "/trial-4 " in others


@pytest.mark.parametrize(
    ("refusal", "how"), [(Answer(503), "process"), (Answer(401), "process"), (Answer(503), "thread")]
)
def test_a_receiver_that_is_back_as_the_run_ends_gets_all_of_it(tmp_path: Path, refusal: Answer, how: str) -> None:
    """Its next try would come later than that."""
    code = REFUSED_FIRST + "time.sleep(1.2)\nopen('back', 'w').close()\nrun.close()\n"
    with ScriptedReceiver() as receiver:
        receiver.script("all", lambda _: Answer() if (tmp_path / "back").exists() else refusal)
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "STEPSPAN_DELIVERY": how}
        contained = program("", tmp_path, *CONTAINER).returncode == 0
        ran = program(code, tmp_path, *(CONTAINER if contained else ()), **env)
        assert ran.returncode == 0, ran.stderr
        assert losses(receiver) == {1.0}
        assert len(receiver.spans("training.run")) == 1
        assert not said(ran.stderr)


@pytest.mark.parametrize(("asked", "arrives"), [(2.0, True), (30.0, False)])
def test_nothing_is_tried_before_the_receiver_wants_it(tmp_path: Path, asked: float, arrives: bool) -> None:
    """A Retry-After that close_timeout allows is waited for, once."""
    code = REFUSED_FIRST + "begun = time.monotonic()\nrun.close()\nprint(time.monotonic() - begun)\n"
    refused_at: dict[str, float] = {}
    early: list[str] = []

    with ScriptedReceiver() as receiver:
        for name in SIGNALS:

            def answer(_: object, name: str = name) -> Answer:
                if name not in refused_at:
                    refused_at[name] = time.monotonic()
                    return Answer(429, retry_after=asked)
                if time.monotonic() < refused_at[name] + asked - 0.1:
                    early.append(name)
                return Answer()

            receiver.script(name, answer)
        ran = program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        assert ran.returncode == 0, ran.stderr
        assert early == []
        assert (losses(receiver) == {1.0}) == arrives
        assert bool(said(ran.stderr)) != arrives
        if not arrives:
            assert float(ran.stdout) < under_load(1.0)


@pytest.mark.parametrize(("seconds", "least", "most"), [("0", 0.0, 0.3), ("1", 0.9, 1.5)])
def test_how_long_it_waits_at_most_is_a_setting(tmp_path: Path, seconds: str, least: float, most: float) -> None:
    code = """
    import stepspan, time
    run = stepspan.start_run(job_id="j")
    run.log_metrics({"loss": 1.0})
    assert run.flush(30)
    for number in range(5_000):
        run.log_metrics({"loss": 1.0})
    begun = time.monotonic()
    run.close()
    print(time.monotonic() - begun)
    """
    with ScriptedReceiver() as receiver:
        receiver.script("all", lambda _: Answer(delay=0.4))
        settings = {"STEPSPAN_CLOSE_TIMEOUT": seconds, "STEPSPAN_DELIVERY": "thread"}
        ran = program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, **settings)
    assert ran.returncode == 0, ran.stderr
    took = float(ran.stdout)
    assert least <= took < under_load(most) + ThreadDelivery.STOP_TIMEOUT_S
    (line,) = said(ran.stderr)
    assert "nobody goes on" in line


@pytest.mark.parametrize(("state", "timeout", "waits"), [("ok", 5, False), ("ok", 30, True), ("retry", 30, False)])
def test_one_that_answers_slowly_is_waited_for_where_the_setting_allows_it(
    state: str, timeout: float, waits: bool
) -> None:
    last = CursorState(state=state, answered=time.time() - 8)
    assert delivery._any_answers([last], timeout) == waits


def test_what_holds_credentials_is_in_no_command(tmp_path: Path) -> None:
    endpoint = "http://user:sesame-1@127.0.0.1:9/otlp?key=sesame-2"
    headers = "authorization=Bearer sesame-3"
    ran = program(SHORT, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_EXPORTER_OTLP_HEADERS=headers)
    (line,) = said(ran.stderr)
    assert "sesame" not in ran.stderr
    assert "with this run's variables" in line
    assert " --destination " in line


def test_a_variable_that_is_wrong_is_in_no_command(tmp_path: Path) -> None:
    (line,) = said(program(SHORT, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://:4318").stderr)
    assert line.endswith(f"nobody goes on: `stepspan sync {tmp_path}/stepspan-runs/j`, once that is right, sends it")


def test_a_claim_is_one_process_s_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (DeliveryLock(tmp_path, "node", "there") for _ in range(2))
    assert first.claim("run", 60.0)
    assert not second.claim("run", 60.0)
    assert second.claim("another run", 60.0)
    now = time.time()
    monkeypatch.setattr("stepspan.deliver.lock.time.time", lambda: now + 61.0)
    assert first.claim("another run", 60.0)


def test_a_deliverer_goes_on_for_a_while_however_long_the_receiver_was_away(tmp_path: Path) -> None:
    clock = Time()
    living = Training(tmp_path)
    living.steps(3)
    exporter = Scripted(lambda _: Outcome(Verdict.RETRY))
    one = Scheduler("metrics", exporter, lambda: find_sessions(tmp_path), options(clock))
    for _ in range(120):
        one.run_once()
        clock.skip(1.0)
    living.end()
    one.wake(1.0)
    for _ in range(2):
        one.run_once()
        clock.skip(1.0)
    assert not one.receiver_unreachable(SILENCE_LIMIT_S)
    clock.skip(SILENCE_LIMIT_S)
    one.run_once()
    assert one.receiver_unreachable(SILENCE_LIMIT_S)
    assert delivery.GIVEN_UP_AFTER_S == SILENCE_LIMIT_S, "what the run says"


def test_flush_tries_at_once_what_was_put_off(tmp_path: Path) -> None:
    code = REFUSED_FIRST + "time.sleep(2)\nopen('back', 'w').close()\nbegun = time.monotonic()\n"
    code += "print(run.flush(10), time.monotonic() - begun)\n"
    with ScriptedReceiver() as receiver:
        receiver.script("all", lambda _: Answer() if (tmp_path / "back").exists() else Answer(401))
        ran = program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    arrived, seconds = ran.stdout.split()
    assert arrived == "True"
    assert float(seconds) < under_load(2.0), "a hold is tried every 15 s"
