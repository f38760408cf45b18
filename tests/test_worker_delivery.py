"""What a forked worker logs goes out under thread delivery, too: by its parent's threads, or by its own after these."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from harness.delivery import assert_true
from harness.journals import closed_of
from harness.processes import until
from harness.receiver import Answer, ScriptedReceiver
from test_short_runs import losses, program

from stepspan.deliver.ledgers import cursors
from stepspan.journal.layout import find_sessions

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

PARENT_WAITS = """
import os, stepspan
with stepspan.start_run(job_id="j") as run:
    run.log_metrics({"loss": 0})
    child = os.fork()
    if child == 0:
        run.log_metrics({"loss": 1})
        print("flushed:", run.flush(20), flush=True)
        run.log_metrics({"loss": 2})
        run.close()
        os._exit(0)
    os.waitpid(child, 0)
"""
RUN_ENDS_FIRST = """
import os, stepspan
ended, told = os.pipe()
with stepspan.start_run(job_id="j") as run:
    run.log_metrics({"loss": 0})
    child = os.fork()
    if child == 0:
        run.log_metrics({"loss": 1})
        os.read(ended, 1)
        print("flushed:", run.flush(20), flush=True)
        run.log_metrics({"loss": 2})
        run.close()
        os._exit(0)
    assert run.flush(20)
os.write(told, b"x")
os.waitpid(child, 0)
"""
CHILD_OUTLIVES_PARENT = """
import os, stepspan
ended, told = os.pipe()
run = stepspan.start_run(job_id="j")
run.log_metrics({"loss": 0})
child = os.fork()
if child == 0:
    os.close(told)
    run.log_metrics({"loss": 1})
    os.read(ended, 1)  # the end of the file: the parent is gone
    print("flushed:", run.flush(20), flush=True)
    run.log_metrics({"loss": 2})
    run.close()
    os._exit(0)
run.close()
"""
CASES = {
    "the parent waits": PARENT_WAITS,
    "the run ends first": RUN_ENDS_FIRST,
    "the child outlives its parent": CHILD_OUTLIVES_PARENT,
}


@pytest.mark.parametrize("how", ["thread", "process"])
@pytest.mark.parametrize("case", CASES)
def test_all_of_it_goes_out_whoever_ends_first(tmp_path: Path, case: str, how: str) -> None:
    with ScriptedReceiver() as receiver:
        ran = program(CASES[case], tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, STEPSPAN_DELIVERY=how)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == ["flushed:", "True"], ran.stderr
        until(lambda: losses(receiver) == {0.0, 1.0, 2.0})
        directory = tmp_path / "stepspan-runs"
        found = [state for s in find_sessions(directory) for of in cursors(s.path).values() for state in of.values()]
        assert len(found) == 6
        for session in find_sessions(directory):
            until(lambda path=session.path: all_finished(path))  # type: ignore[misc]
            for signals in cursors(session.path).values():
                for state in signals.values():
                    assert_true(state.ledger, closed_of(session.path).seq)


def all_finished(session: Path) -> bool:
    return all(state.position.finished for signals in cursors(session).values() for state in signals.values())


def test_an_exporter_in_memory_gets_a_worker_s_values_in_the_parent(tmp_path: Path) -> None:
    code = """
    import multiprocessing, stepspan
    from stepspan.exporters.memory import MemoryExporter
    exporter = MemoryExporter()
    def work(number):
        stepspan.current_run().log_metrics({"loss": number})
    with stepspan.start_run(job_id="j", exporters=[exporter]) as run:
        run.log_metrics({"loss": 0})
        workers = [multiprocessing.get_context("fork").Process(target=work, args=(n,)) for n in (1, 2)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
    points = [record for _, record in exporter.records["metrics"] if record[0].name == "training.loss"]
    print(sorted({point[2] for point in points if point[2]}))
    """
    ran = program(code, tmp_path)
    assert ran.stdout.strip() == "[1.0, 2.0]", ran.stderr


@pytest.mark.parametrize("how", ["thread", "process"])
def test_a_worker_that_outlives_its_run_says_what_waits(tmp_path: Path, how: str) -> None:
    code = CHILD_OUTLIVES_PARENT.replace("run.flush(20)", "True").replace("os._exit(0)", "raise SystemExit")
    with ScriptedReceiver() as receiver:
        receiver.script(
            "all", lambda request: Answer(503, text="busy") if b"worker" in request.SerializeToString() else Answer()
        )
        ran = program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, STEPSPAN_DELIVERY=how)
    (line,) = [line for line in ran.stderr.splitlines() if re.search(" waits? for ", line)]
    assert "busy" in line


@pytest.mark.parametrize("how", ["thread", "process"])
def test_a_run_says_what_waits_of_a_worker_that_has_ended(tmp_path: Path, how: str) -> None:
    code = """
    import os, stepspan
    with stepspan.start_run(job_id="j") as run:
        run.log_metrics({"loss": 0})
        child = os.fork()
        if child == 0:
            run.log_metrics({"loss": 1})
            raise SystemExit
        os.waitpid(child, 0)
        run.flush(10)
    """
    busy = Answer(503, text="busy")
    with ScriptedReceiver() as receiver:
        receiver.script("all", lambda request: busy if b"worker" in request.SerializeToString() else Answer())
        settings = {"STEPSPAN_DELIVERY": how, "STEPSPAN_SEND_INTERVAL": "0", "STEPSPAN_CLOSE_TIMEOUT": "1"}
        ran = program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, **settings)
    assert ran.returncode == 0, ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if re.search(" waits? for ", line)]
    assert "busy" in line
