"""The shortest runs: what ends within its deliverer's start-up is delivered all the same, and training waits for nobody
else. In a container everything dies with the training process, deliverer included: what has arrived then is all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.delivery import OK
from harness.processes import under_load, until
from harness.receiver import HANG, Answer, ScriptedReceiver
from harness.runs import is_ours

from stepspan.deliver import delivery
from stepspan.deliver.delivery import ProcessDelivery
from stepspan.deliver.lock import UNKNOWN, DeliveryLock, Outlook
from stepspan.deliver.routes import route_of
from stepspan.exporters.memory import MemoryExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import Cursor, CursorState, cursor_name
from stepspan.mapping.records import SIGNALS
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.run import Run

start = runs.start

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
BEGIN = 'import atexit, os, stepspan, sys, time\nrun = stepspan.start_run(job_id="pod")\n'
FIRST_BATCH = BEGIN + 'with run:\n    for batch in run.steps("ab"):\n        run.log_metrics({"loss": 1.0})\n'
CODE = {
    "an exception in the first batch": FIRST_BATCH + '        raise MemoryError("too large")',
    "an exit in the first batch": FIRST_BATCH + "        sys.exit(3)",
    "an exception that nothing is around": BEGIN + 'run.log_metrics({"loss": 1.0})\nraise MemoryError("too large")',
    "its program's end": BEGIN + 'run.log_metrics({"loss": 1.0})',
    "atexit": BEGIN + 'atexit.register(lambda: run.log_metrics({"loss": 1.0}))',
}


def program(code: str, place: Path, *how: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not is_ours(name)}
    return subprocess.run(
        [*how, sys.executable, "-c", textwrap.dedent(code)],
        cwd=place, env={**inherited, "STEPSPAN_SAMPLERS": "none", "NO_PROXY": "*", **env},
        capture_output=True, text=True, timeout=under_load(60), check=False,
    )  # fmt: skip


@pytest.fixture
def contained(tmp_path: Path) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """Runs a program as the first process of a PID namespace: the kernel kills all others when it ends."""
    if not shutil.which("unshare") or program("", tmp_path, *CONTAINER).returncode:
        pytest.skip("a PID namespace needs unshare, and root")
    return lambda code, endpoint: program(code, tmp_path, *CONTAINER, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)


def losses(receiver: ScriptedReceiver) -> set[float]:
    return {point.number for point in receiver.points("training.loss") if point.value is not None}


@pytest.mark.parametrize("how", CODE)
def test_what_ends_at_once_in_a_container_has_arrived(contained: Any, how: str) -> None:
    with ScriptedReceiver() as receiver:
        found = contained(CODE[how], receiver.url)
        assert found.returncode == (1 if "exception" in how else 3 if "an exit" in how else 0), found.stderr
        assert losses(receiver) == {1.0}
        (span,) = receiver.spans("training.run")
        assert len(receiver.logs("exception")) == (found.returncode != 0)
        assert span["attributes"]["status"] == ("failed" if found.returncode else "completed")


@pytest.mark.parametrize("delivery", ["process", "thread"])
def test_what_ends_at_once_has_arrived_over_grpc_whose_import_takes_longer_than_a_request(
    tmp_path: Path, contained: Any, delivery: str
) -> None:
    with ScriptedReceiver() as receiver:
        settings = f"delivery={delivery!r}, endpoint={receiver.grpc_target!r}, protocol='grpc'"
        code = f"import stepspan\nwith stepspan.start_run({settings}) as run:\n    run.log_metrics({{'loss': 1}})"
        found = contained(code, "")
        assert found.returncode == 0, found.stderr
        assert losses(receiver) == {1.0}
        assert len(receiver.spans("training.run")) == 1


def test_short_runs_one_after_the_other_in_a_container_have_all_arrived(contained: Any) -> None:
    code = """
    import stepspan
    for number in range(5):
        with stepspan.start_run(job_id=f"trial-{number}") as run:
            run.log_metrics({"loss": number})
    """
    with ScriptedReceiver() as receiver:
        assert contained(code, receiver.url).returncode == 0
        assert losses(receiver) == {0.0, 1.0, 2.0, 3.0, 4.0}
        assert len(receiver.spans("training.run")) == 5


def test_a_forked_worker_of_a_short_run_in_a_container_has_arrived(contained: Any) -> None:
    code = """
    import multiprocessing, stepspan
    def work(number):
        stepspan.current_run().log_metrics({"loss": number})
    with stepspan.start_run(job_id="pod") as run:
        run.log_metrics({"loss": 0})
        workers = [multiprocessing.get_context("fork").Process(target=work, args=(n,)) for n in (1, 2)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
    """
    with ScriptedReceiver() as receiver:
        assert contained(code, receiver.url).returncode == 0
        assert losses(receiver) == {0.0, 1.0, 2.0}


def test_ranks_that_end_at_once_have_all_arrived(contained: Any, tmp_path: Path) -> None:
    """Rank 1 ends while rank 0's deliverer is still starting: it starts none of its own, and waits for that."""
    code = """
    import multiprocessing, os, stepspan
    def rank(number):
        with stepspan.start_run(job_id="pod", rank=number, local_rank=number, world_size=4) as run:
            run.log_metrics({"loss": number})
    ranks = [multiprocessing.get_context("spawn").Process(target=rank, args=(n,)) for n in range(4)]
    if __name__ == "__main__":
        [each.start() for each in ranks]
        [each.join() for each in ranks]
    """
    with ScriptedReceiver() as receiver:
        (tmp_path / "ranks.py").write_text(textwrap.dedent(code))
        found = contained("import runpy; runpy.run_path('ranks.py', run_name='__main__')", receiver.url)
        assert found.returncode == 0, found.stderr
        assert losses(receiver) == {0.0, 1.0, 2.0, 3.0}


def test_a_process_of_multiprocessing_waits_for_a_deliverer_at_work_as_it_ends(contained: Any, tmp_path: Path) -> None:
    code = """
    import multiprocessing, os, stepspan
    def rank(number):
        with stepspan.start_run(job_id="pod", rank=number, local_rank=number, world_size=2) as run:
            run.log_metrics({"loss": number})
    if __name__ == "__main__":
        with stepspan.start_run(job_id="pod", rank=0, local_rank=0, world_size=2) as run:
            run.log_metrics({"loss": 0})
            assert run.flush(20)
            process = multiprocessing.get_context("spawn").Process(target=rank, args=(1,))
            process.start()
            process.join()
            os._exit(0)  # and the deliverer with it
    """
    with ScriptedReceiver() as receiver:
        (tmp_path / "ranks.py").write_text(textwrap.dedent(code))
        found = contained("import runpy; runpy.run_path('ranks.py', run_name='__main__')", receiver.url)
        assert found.returncode == 0, found.stderr
        assert losses(receiver) == {0.0, 1.0}


TIMED = """
import stepspan, time
run = stepspan.start_run(job_id="pod")
run.log_metrics({"loss": 1.0})
begun = time.monotonic()
run.close()
print(time.monotonic() - begun)
begun = time.monotonic()
with stepspan.start_run(job_id="again") as run:
    run.log_metrics({"loss": 1.0})
print(time.monotonic() - begun)
"""


@pytest.mark.parametrize("where", ["dead port", "black hole", "refused"])
def test_where_nothing_answers_it_ends_within_a_second(tmp_path: Path, where: str) -> None:
    with ScriptedReceiver() as receiver:
        if where == "dead port":
            receiver.stop()
        else:
            receiver.script("all", lambda _: HANG if where == "black hole" else Answer(401))
        found = program(TIMED, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        assert found.returncode == 0, found.stderr
        first, second = map(float, found.stdout.split())
        assert first < under_load(1.5), "the deliverer's start, and half a second"
        assert second < under_load(0.5), "by then it is known"


def test_a_silent_receiver_beside_one_that_answers_is_not_waited_for(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver, ScriptedReceiver() as silent:
        silent.script("all", lambda _: HANG)
        code = f"""
        import stepspan, time
        run = stepspan.start_run(endpoint={receiver.url!r}, exporters=[{{"endpoint": {silent.url!r}}}])
        run.log_metrics({{"loss": 1.0}})
        begun = time.monotonic()
        run.close()
        print(time.monotonic() - begun)
        """
        found = program(code, tmp_path)
        assert found.returncode == 0, found.stderr
        assert float(found.stdout) < under_load(1.7), "the deliverer's start, and half a second"
        assert losses(receiver) == {1.0}


def test_a_slow_first_answer_is_waited_for_half_a_second(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        receiver.script("all", lambda _: Answer(delay=0.3))
        assert program(CODE["its program's end"], tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url).returncode == 0
        assert losses(receiver) == {1.0}, "the deliverer may go on, but has no more to do"


# ---------------------------------------------------------------- how long it waits


class Closing:
    """The end of a run, whose deliverer is the test's: what it says, and what the cursors say."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session = directory / "rank-00000-00000000000000a0"
        self.session.mkdir()
        monkeypatch.setattr(delivery, "spawn", lambda *_, **__: pytest.fail("a deliverer is at work"))
        exporter = OtlpExporter("http://127.0.0.1:9", env={}, destination="there")
        self.lock = DeliveryLock(directory, "node", route_of(exporter, directory).lock_name)
        assert self.lock.acquire()
        self.delivery = ProcessDelivery(
            directory, "node", [exporter], first=True, health=False, warn=lambda *_, **__: None
        )

    def seconds(self) -> float:
        begun = time.monotonic()
        self.delivery.close(self.session, 1.0)
        return time.monotonic() - begun


@pytest.fixture
def closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Closing:
    monkeypatch.setattr(delivery, "_unfound", deque())
    return Closing(tmp_path, monkeypatch)


@pytest.mark.parametrize(("state", "since"), [("", 0.0), ("away", 0.0), ("answering", 0.0), ("asking", 0.6)])
def test_it_waits_for_no_receiver_that_has_had_its_time(closing: Closing, state: Any, since: float) -> None:
    closing.lock.report(Outlook(state, time.time() - since))
    assert closing.seconds() < 0.5


@pytest.mark.parametrize(("state", "least"), [("starting", 1.0), ("asking", 0.4)])
def test_it_waits_for_a_deliverer_that_was_just_started(closing: Closing, state: Any, least: float) -> None:
    closing.lock.report(Outlook(state, time.time()))
    assert closing.seconds() >= least


@pytest.mark.parametrize(("state", "least", "most"), [("ok", 0.5, 0.9), ("retry", 0.0, 0.4), ("hold", 0.0, 0.4)])
def test_it_waits_a_moment_for_a_receiver_that_has_had_nothing_to_take_for_a_while(
    closing: Closing, state: str, least: float, most: float
) -> None:
    (closing.session / "cursors").mkdir()
    for signal in SIGNALS:
        cursor = Cursor(closing.session / "cursors" / cursor_name("there", signal))
        cursor.write(CursorState(state=state, answered=time.time() - 60))
        cursor.close()
    closing.lock.report(Outlook("answering"))
    assert least <= closing.seconds() < under_load(most)


def test_what_a_deliverer_at_work_has_not_found_is_waited_for_as_the_process_ends(
    closing: Closing,
) -> None:
    closing.lock.report(Outlook("answering"))
    closing.seconds()
    begun = time.monotonic()
    delivery._await_unfound()
    assert time.monotonic() - begun >= 0.9, "as long as its end could be"
    closing.lock.report(Outlook("away"))
    closing.seconds()
    begun = time.monotonic()
    delivery._await_unfound()
    assert time.monotonic() - begun < 0.5


def test_a_deliverer_that_is_starting_is_not_started_again_unless_it_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting: list[int] = []
    inherit = lambda *given, **_: starting.append(os.dup(given[3]["there"].fileno()))  # noqa: E731
    monkeypatch.setattr(delivery, "spawn", inherit)
    exporter = OtlpExporter("http://127.0.0.1:9", env={}, destination="there")
    lock = DeliveryLock(tmp_path, "node", route_of(exporter, tmp_path).lock_name)
    first, second, third = (
        ProcessDelivery(tmp_path, "node", [exporter], first=True, health=False, warn=lambda *_, **__: None)
        for _ in range(3)
    )
    first.start()
    second.start()
    assert len(starting) == 1
    assert lock.outlook().state == "starting"
    os.close(starting[0])  # it dies as it starts
    assert lock.outlook() == UNKNOWN
    third.start()
    assert len(starting) == 2
    os.close(starting[1])


def test_a_forked_child_does_not_keep_a_lock_that_is_being_handed_over(tmp_path: Path) -> None:
    lock = DeliveryLock(tmp_path, "node", "there")
    assert lock.acquire()
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    lock.release()
    until(lambda: DeliveryLock(tmp_path, "node", "there").outlook() == UNKNOWN)
    again = DeliveryLock(tmp_path, "node", "there")
    until(again.acquire)
    os.close(write_end)
    os.waitpid(child, 0)
    again.release()


@pytest.mark.parametrize("answer", [OK, Outcome(Verdict.RETRY, "away")])
def test_threads_are_waited_for_until_their_first_answer(start: Callable[..., Run], answer: Outcome) -> None:
    class Slow(MemoryExporter):
        def export(self, *arguments: Any) -> Outcome:
            time.sleep(0.3)
            super().export(*arguments)
            return answer

    exporter = Slow()
    with start(job_id="job", exporters=[exporter]) as run:
        run.log_metrics({"loss": 1.0})
        begun = time.monotonic()
    seconds = time.monotonic() - begun
    exported = {record[0].name for _, record in exporter.records["metrics"]}  # type: ignore[index, union-attr]
    finished = [state["finished"] for state in run.stats()["delivery"].get("memory", {}).values()]
    if answer is OK:
        assert "training.loss" in exported
        assert finished == [True] * 3
    else:
        assert exported, "whatever stood there when the thread first looked"
        assert seconds < under_load(1.5)
