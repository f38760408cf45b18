"""Forked children: a session of their own on first use, and nothing of the parent's is ended, held or written to."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from harness import runs
from harness.processes import until
from harness.runs import all_spans, events, is_ours, outline, python, sessions, spans, status_of

from stepspan.journal.layout import find_sessions
from stepspan.journal.liveness import is_alive_here
from stepspan.reading.sessions import read_session
from stepspan.run import Run

start = runs.start
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def run_script(tmp_path: Path, code: str) -> dict[str, Path]:
    found = python(code, tmp_path)
    assert found.returncode == 0, found.stderr
    return sessions(tmp_path / "stepspan-runs")


def test_a_child_has_a_session_of_its_own_and_the_parent_goes_on(start: Callable[..., Run], tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        """
        import os, stepspan
        with stepspan.start_run(job_id="job", rank=1, world_size=2) as run:
            for batch in run.steps("ab"):
                run.log_metrics({"parent": 1.0})
                if batch == "a":
                    child = os.fork()
                    if child == 0:
                        run.log_metrics({"child": 2.0})
                        with run.span("augment"):
                            run.log_event("rotated")
                        run.close()
                        os._exit(0)
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                run.log_metrics({"parent": 3.0})
        """,
    )
    assert set(found) == {"1", "1-worker1"}
    assert outline(found["1"]) == [
        "run",
        *("  step 0", "train 0: parent=1.0", "train 0: parent=3.0", "  end step"),
        *("  step 1", "train 1: parent=1.0", "train 1: parent=3.0", "  end step"),
        "end run completed",
    ]
    assert outline(found["1-worker1"]) == ["train 0: child=2.0", "span augment", "  event rotated", "end span"]
    parent, child = (events(found[name])[0] for name in ("1", "1-worker1"))
    assert child["resource"]["service.instance.id"] == "job-1-worker1"
    assert {name: child[name] for name in ("run_key", "job_id", "rank", "world_size", "attempt")} == {
        name: parent[name] for name in ("run_key", "job_id", "rank", "world_size", "attempt")
    }
    assert (parent["role"], child["role"]) == ("", "worker1")
    assert parent["pid"] != child["pid"]
    assert parent["session"] != child["session"]


def test_a_child_that_logs_nothing_leaves_nothing(start: Callable[..., Run], tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        """
        import os, sys, stepspan
        with stepspan.start_run(job_id="job") as run, run.epoch(0), run.step(0):
            child = os.fork()
            if child == 0:
                sys.exit(0)  # through every `with`, and past atexit
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
    )
    assert set(found) == {"0"}
    assert outline(found["0"]) == ["run", "  epoch 0", "    step 0", "    end step", "  end epoch", "end run completed"]


def test_a_child_that_fails_says_so_in_its_own_session(start: Callable[..., Run], tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        """
        import os, stepspan
        with stepspan.start_run(job_id="job") as run, run.step(0):
            child = os.fork()
            if child == 0:
                os.close(2)
                raise ValueError("in the child")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        """,
    )
    assert outline(found["0"]) == ["run", "  step 0", "  end step", "end run completed"]
    assert outline(found["0-worker1"]) == ["error ValueError"]
    assert status_of(found["0-worker1"]) == "failed"


def test_children_of_children_and_later_children_have_names_of_their_own(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    found = run_script(
        tmp_path,
        """
        import os, stepspan
        run = stepspan.start_run(job_id="job")
        def child(work):
            pid = os.fork()
            if pid == 0:
                run.log_metrics({"x": 1.0})
                work()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        child(lambda: child(lambda: None))
        child(lambda: None)
        run.log_metrics({"x": 1.0})
        """,
    )
    assert set(found) == {"0", "0-worker1", "0-worker2", "0-worker3"}
    assert all(len(events(path, "metrics")) == 1 for path in found.values())


EPOCHS = """
import os, signal, stepspan
from stepspan.journal import numbers
numbers.REUSE_AFTER_S = after
run = stepspan.start_run(job_id="job")
def epoch():
    ready, go = os.pipe(), os.pipe()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            os.close(go[1])
            with run.step(0):
                run.log_metrics({"decoded": 1.0})
            os.write(ready[1], b".")
            os.read(go[0], 1)  # all four live at once
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "closed":
                run.close()
            os._exit(0)
    for _ in children:
        assert os.read(ready[0], 1)
    os.close(go[1])
    for child in children:
        os.waitpid(child, 0)
"""


@pytest.mark.parametrize("how", ["closed", "left", "killed"])
def test_the_workers_of_each_epoch_go_by_the_same_numbers(start: Callable[..., Run], tmp_path: Path, how: str) -> None:
    script = f"after, how = 0.0, {how!r}\n{EPOCHS}\nfor _ in range(3):\n    epoch()\nrun.close()"
    assert python(script, tmp_path).returncode == 0
    headers = [read_session(found).header for found in find_sessions(tmp_path / "stepspan-runs")]
    roles = Counter(header["role"] for header in headers)
    assert roles == {"": 1, **dict.fromkeys(["worker1", "worker2", "worker3", "worker4"], 3)}
    assert {header["resource"]["service.instance.id"] for header in headers if header["role"]} == {
        f"job-0-worker{number}" for number in range(1, 5)
    }


@pytest.mark.parametrize("how", ["closed", "left", "killed"])
def test_a_number_rests_after_its_last_owner_has_written(start: Callable[..., Run], tmp_path: Path, how: str) -> None:
    script = f"""
after, how = 10.0, {how!r}
{EPOCHS}
import time
from pathlib import Path
epoch()
epoch()
for path in [*Path("stepspan-runs").rglob("*worker[1-4]-*/*"), *Path("stepspan-runs").rglob(".rank-*")]:
    os.utime(path, (time.time() - 11,) * 2)
epoch()
run.close()
"""
    assert python(script, tmp_path).returncode == 0
    roles = Counter(read_session(found).header["role"] for found in find_sessions(tmp_path / "stepspan-runs"))
    again, once = [f"worker{number}" for number in range(1, 5)], [f"worker{number}" for number in range(5, 9)]
    assert roles == {"": 1, **dict.fromkeys(again, 2), **dict.fromkeys(once, 1)}


def test_at_most_some_numbers_rest_however_fast_workers_come_and_go(start: Callable[..., Run], tmp_path: Path) -> None:
    script = (
        f"after, how = 10.0, 'left'\n{EPOCHS}\nnumbers.MAX_RESTING = 6\nfor _ in range(10):\n    epoch()\nrun.close()"
    )
    assert python(script, tmp_path).returncode == 0
    found = [read_session(found) for found in find_sessions(tmp_path / "stepspan-runs")]
    assert len(found) == 41
    roles = Counter(session.header["role"] for session in found)
    assert len(roles) <= 1 + 6 + 4
    for role in roles:
        mine = sorted((s for s in found if s.header["role"] == role), key=lambda s: s.header["started"])
        points = [[ts for _, ts, _ in session.records("metrics")] for session in mine]  # type: ignore[misc]
        assert all(max(before) < min(after) for before, after in pairwise(points)), "each behind the one before it"


def test_spans_of_those_who_share_a_number_share_no_id(start: Callable[..., Run], tmp_path: Path) -> None:
    assert python(f"after, how = 0.0, 'closed'\n{EPOCHS}\nepoch()\nepoch()\nrun.close()", tmp_path).returncode == 0
    found = [span for session in find_sessions(tmp_path / "stepspan-runs") for span in all_spans(session.path)]
    steps = [span for span in found if span.name == "training.step"]
    assert len(steps) == 8
    assert len({span.trace_id for span in steps}) == 1, "step 0 of the run"
    assert len({span.span_id for span in found}) == len(found)


def test_a_number_is_not_kept_by_the_children_of_its_owner(start: Callable[..., Run], tmp_path: Path) -> None:
    found = python(
        """
        import os, stepspan
        from stepspan.journal import numbers
        numbers.REUSE_AFTER_S = 0.0
        run = stepspan.start_run(job_id="job")
        r, w = os.pipe()
        lives, alive = os.pipe()
        if os.fork() == 0:
            run.log_metrics({"x": 1.0})
            if os.fork() == 0:  # lives on, and logs only once its parent has ended
                os.write(alive, b".")
                os.close(w)
                os.read(r, 1)
                run.log_metrics({"x": 3.0})
            os._exit(0)
        os.wait()
        os.read(lives, 1)
        if (child := os.fork()) == 0:
            run.log_metrics({"x": 2.0})
            os._exit(0)
        os.waitpid(child, 0)
        os.close(w)
        """,
        tmp_path,
    )
    assert found.returncode == 0, found.stderr
    where = tmp_path / "stepspan-runs"
    until(lambda: len([*find_sessions(where)]) == 4)
    sessions = [read_session(session) for session in find_sessions(where)]
    values = [(s.header["role"], e["metrics"]["x"]) for s in sessions for e in s.events if e["tag"] == "metrics"]
    assert sorted(values) == [("worker1", 1.0), ("worker1", 2.0), ("worker1", 3.0)]


def test_where_files_cannot_be_locked_a_worker_goes_by_its_process(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with start(job_id="job") as run:
        if (child := os.fork()) == 0:
            run.log_metrics({"x": 1.0})
            os._exit(0)
        os.waitpid(child, 0)
    assert set(sessions(tmp_path / "stepspan-runs")) == {"0", f"0-worker{child}"}


def test_a_pool_of_data_workers(start: Callable[..., Run], tmp_path: Path) -> None:
    """As torch's DataLoader: forked workers that take indices from a queue, while the parent trains."""
    found = run_script(
        tmp_path,
        """
        import multiprocessing, stepspan
        context = multiprocessing.get_context("fork")

        def worker(indices, batches):
            for index in iter(indices.get, None):
                run = stepspan.current_run()
                with run.span("load", index=index):
                    run.log_metrics({"index": index})
                batches.put(index)

        class Loader:
            def __len__(self):
                return 6

            def __iter__(self):
                indices, batches = context.SimpleQueue(), context.SimpleQueue()
                pool = [context.Process(target=worker, args=(indices, batches)) for _ in range(2)]
                for process in pool:
                    process.start()
                for index in range(6):
                    indices.put(index)
                for _ in range(6):
                    yield batches.get()
                for process in pool:
                    indices.put(None)
                for process in pool:
                    process.join()
                    assert process.exitcode == 0

        with stepspan.start_run(job_id="job") as run:
            for epoch in range(2):
                with run.epoch(epoch):
                    for batch in run.steps(Loader()):
                        run.log_metrics({"batch": batch})
        assert run.stats()["warnings"] == {}
        """,
    )
    workers = {name: path for name, path in found.items() if name != "0"}
    assert set(workers) <= {f"0-worker{n}" for n in range(1, 5)}  # one that was given no index has no session
    loaded = [event["metrics"]["index"] for path in workers.values() for event in events(path, "metrics")]
    assert sorted(loaded) == sorted(2 * [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert {status_of(path) for path in workers.values()} == {"completed"}
    assert {event["tag"] for path in workers.values() for event in events(path)} == {
        *("header", "span_begin", "span_end", "metrics")
    }
    trained = events(found["0"])
    assert [event["step"] for event in trained if event["tag"] == "metrics"] == list(range(12))
    assert len([event for event in trained if event["tag"] == "step_end"]) == 12
    assert status_of(found["0"]) == "completed"


def test_a_child_holds_no_descriptor_of_the_parents_session(start: Callable[..., Run], tmp_path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    run_script(
        tmp_path,
        """
        import os, stepspan
        run = stepspan.start_run()
        session = run.stats()["journal"]
        def held():
            found = set()
            for fd in os.listdir("/proc/self/fd"):
                try:
                    found.add(os.readlink(f"/proc/self/fd/{fd}"))
                except OSError:  # the one that the listing itself had
                    pass
            return {name for name in found if name.startswith(session)}
        assert f"{session}/lock" in held()
        child = os.fork()
        if child == 0:
            os._exit(len(held()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert f"{session}/lock" in held()
        """,
    )


def test_a_parent_that_was_killed_is_dead_although_its_child_lives(start: Callable[..., Run], tmp_path: Path) -> None:
    code = """
    import os, signal, stepspan, sys
    run = stepspan.start_run(job_id="job")
    run.step(0).__enter__()
    if os.fork() == 0:
        run.log_metrics({"child": 1.0})
        print(os.getpid(), flush=True)
        sys.stdin.read()  # until the test lets go
        os._exit(0)
    signal.pause()
    """
    env = {name: value for name, value in os.environ.items() if not is_ours(name)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) != parent.pid
        found = sessions(tmp_path / "stepspan-runs")
        assert {name: is_alive_here(path) for name, path in found.items()} == {"0": True, "0-worker1": True}
        parent.kill()
        parent.wait(10)
        assert {name: is_alive_here(path) for name, path in found.items()} == {"0": False, "0-worker1": True}
        assert outline(found["0"]) == ["run", "  step 0"]


def test_forking_while_other_threads_log_hangs_nobody(start: Callable[..., Run], tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        """
        import os, threading, warnings, stepspan
        from stepspan.journal import numbers
        warnings.simplefilter("ignore", DeprecationWarning)  # that forking beside threads is unwise
        numbers.MAX_RESTING = 32  # each child has a number of its own
        run = stepspan.start_run(job_id="job")
        stop = threading.Event()
        def log():
            while not stop.is_set():
                run.log_metrics({"x": 1.0})
        threads = [threading.Thread(target=log) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                run.log_metrics({"child": 1.0})
                run.close()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop.set()
        for thread in threads:
            thread.join()
        assert run.stats()["warnings"] == {}
        """,
    )
    assert set(found) == {"0", *(f"0-worker{n}" for n in range(1, 21))}
    assert all(len(events(path, "metrics")) == 1 for name, path in found.items() if name != "0")


def test_spans_of_a_child_share_no_id_with_the_parents(start: Callable[..., Run], tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        """
        import os, stepspan
        run = stepspan.start_run(job_id="job")
        def work():
            with run.step(0), run.span("phase"):
                run.log_metrics({"x": 1.0})
            run.close()
        child = os.fork()
        work()
        if child == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
    )
    parent, child = spans(found["0"]), spans(found["0-worker1"])
    assert {span.span_id for span in parent.values()}.isdisjoint(span.span_id for span in child.values())
    assert parent["training.step 0"].trace_id == child["training.step 0"].trace_id
    assert child["training.step 0"].parent_id == parent["training.step 0"].span_id
    assert parent["training.step 0"].parent_id is None
    assert child["phase"].parent_id == child["training.step 0"].span_id


def test_a_spawned_child_records_nothing_by_itself(start: Callable[..., Run], tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        """
        import multiprocessing, stepspan

        def work():
            stepspan.current_run().log_metrics({"x": 1.0})

        if __name__ == "__main__":
            with stepspan.start_run(job_id="job") as run:
                process = multiprocessing.get_context("spawn").Process(target=work)
                process.start()
                process.join()
                assert process.exitcode == 0
        """,
    )
    assert set(found) == {"0"}
