"""Starting and ending a run in a process: once, twice, at exit, in a notebook, and without a trace on anything else."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import runs
from harness.processes import under_load
from harness.receiver import ScriptedReceiver
from harness.runs import events, outline, path_of, python, sessions, status_of

import stepspan
from stepspan.deliver import delivery
from stepspan.journal.layout import find_sessions
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


def only_session(directory: Path) -> Path:
    (session,) = find_sessions(directory)
    return session.path


def test_a_run_after_a_closed_one_needs_no_warning(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start(job_id="job") as first:
        pass
    with start(job_id="job") as second:
        pass
    assert caplog.records == []
    keys = [events(run)[0]["run_key"] for run in (first, second)]
    assert keys[0] != keys[1]


def test_a_run_that_is_refused_leaves_the_open_one_open(start: Start) -> None:
    run = start()
    with pytest.raises(stepspan.ConfigError):
        start(name=5)
    assert not run.closed
    assert stepspan.current_run() is run


def test_two_live_processes_of_one_rank_do_not_share_a_series(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start(job_id="job") as first:
        found = python(
            """
            import stepspan
            with stepspan.start_run(job_id="job", directory="stepspan-runs"):
                pass
            """,
            tmp_path,
        )
        assert found.returncode == 0, found.stderr
    assert "another live process is rank 0 of job" in found.stderr
    names = set(sessions(tmp_path / "stepspan-runs"))
    assert len(names) == 2
    assert path_of(first) == sessions(tmp_path / "stepspan-runs")["0"]
    assert (names - {"0"}).pop().startswith("0-twin")


# the end of a process

LOG = "import stepspan\nrun = stepspan.start_run()\nrun.log_metrics({'x': 1.0})\n"


@pytest.mark.parametrize(
    ("rest", "code", "ending"),
    [
        pytest.param("", 0, ["end run completed"], id="end"),
        pytest.param("import sys; sys.exit(0)", 0, ["end run completed"], id="exit 0"),
        pytest.param("raise ValueError('x')", 1, ["  error ValueError", "end run failed"], id="exception"),
        pytest.param("raise KeyboardInterrupt", -2, ["end run interrupted"], id="Ctrl-C"),
        pytest.param(
            "try: 1 / 0\nexcept ZeroDivisionError: pass", 0, ["end run completed"], id="exception that was caught"
        ),
        pytest.param("with run: raise SystemExit(3)", 3, ["  error SystemExit", "end run failed"], id="exit 3 in with"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("-O",)], ids=["", "-O"])
def test_a_run_ends_with_its_process(
    start: Start, tmp_path: Path, rest: str, code: int, ending: list[str], flags: tuple[str, ...]
) -> None:
    found = python(LOG + rest, tmp_path, *flags)
    assert found.returncode == code, found.stderr
    session = only_session(tmp_path / "stepspan-runs")
    assert outline(session) == ["run", "train -: x=1.0", *ending]
    assert status_of(session) == ending[-1].rpartition(" ")[2]


def test_an_exception_ends_the_open_step(start: Start, tmp_path: Path) -> None:
    found = python(LOG + "for batch in run.steps('ab'):\n    1 / 0\n", tmp_path)
    assert "ZeroDivisionError" in found.stderr
    assert outline(only_session(tmp_path / "stepspan-runs")) == [
        "run",
        "train -: x=1.0",
        "  step 0",
        "    error ZeroDivisionError",
        "  end step error",
        "end run failed",
    ]


def test_a_killed_run_has_no_end_and_keeps_what_was_logged(start: Start, tmp_path: Path) -> None:
    python(LOG + "run.step(3).__enter__(); import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    session = only_session(tmp_path / "stepspan-runs")
    assert outline(session) == ["run", "train -: x=1.0", "  step 3"]
    assert status_of(session) is None


def test_rank_0_says_where_its_journal_lies_once(start: Start, tmp_path: Path) -> None:
    twice = "import stepspan\nfor _ in range(2):\n    with stepspan.start_run(): pass\n"
    assert python(twice, tmp_path).stderr == f"stepspan: the journal is in {tmp_path / 'stepspan-runs'}\n"
    assert python(twice, tmp_path, STEPSPAN_RANK="1", STEPSPAN_WORLD_SIZE="2", STEPSPAN_JOB_ID="j").stderr == ""


def test_the_default_directory_stays_out_of_git(start: Start, tmp_path: Path) -> None:
    start()
    assert (tmp_path / "stepspan-runs" / ".gitignore").read_text() == "*\n"


# notebooks


def test_a_notebook(start: Start) -> None:
    """Cells run one by one at the top level, one of them fails, and the run goes on."""
    namespace: dict[str, object] = {"start": start}
    cells = [
        "run = start()",
        "epoch = run.epoch(0); epoch.__enter__()",
        "for batch in run.steps('abc'):\n    run.log_metrics({'code': ord(batch)})\n    if batch == 'b': 1 / 0",
        "run.log_metrics({'after': 1.0})",
        "epoch.__exit__(None, None, None)",
        "run.close()",
    ]
    for cell in cells:
        try:
            exec(compile(cell, "<cell>", "exec"), namespace)
        except ZeroDivisionError as error:
            sys.last_value = error
            error.__traceback__ = None
    run = namespace["run"]
    assert isinstance(run, Run)
    assert outline(run) == [
        "run",
        "  epoch 0",
        *("    step 0", "train 0: code=97.0", "    end step"),
        *("    step 1", "train 1: code=98.0", "    end step"),
        "train 1: after=1.0",
        "  end epoch",
        "end run completed",
    ]


def test_an_error_in_an_earlier_line_of_an_interactive_session_fails_nothing(start: Start, tmp_path: Path) -> None:
    typed = "import stepspan\nrun = stepspan.start_run()\n1 / 0\nrun.log_metrics({'x': 1.0})\n"
    found = subprocess.run(
        [sys.executable, "-i", "-q"], input=typed, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "ZeroDivisionError" in found.stderr
    assert outline(only_session(tmp_path / "stepspan-runs"))[-1] == "end run completed"


@pytest.mark.parametrize(("raised", "status"), [("KeyboardInterrupt", "interrupted"), ("ValueError", "failed")])
def test_a_loop_that_an_interactive_session_leaves_by_an_exception_is_the_runs_end(
    start: Start, tmp_path: Path, raised: str, status: str
) -> None:
    typed = f"""
import stepspan
run = stepspan.start_run()
for batch in run.steps('abc'):
    run.log_metrics({{'x': 1.0}})
    if batch == 'b': raise {raised}

"""
    subprocess.run(
        [sys.executable, "-i", "-q"], input=typed, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    session = only_session(tmp_path / "stepspan-runs")
    assert status_of(session) == status
    assert [event["type"] for event in events(session, "error")] == ["ValueError"] * (status == "failed")


def test_ipython(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    for cell in ("import stepspan; run = stepspan.start_run()", "step = run.step(0); step.__enter__()"):
        assert shell.run_cell(cell).success
    assert shell.run_cell("run.log_metrics({'x': 1.0}); run.close()").success
    assert outline(only_session(tmp_path / "stepspan-runs"))[1:3] == ["  step 0", "train 0: x=1.0"]


# what a run does not do

STATE = """
import logging, os, random, signal, sys, threading, warnings
import numpy
import opentelemetry.trace, opentelemetry.metrics, opentelemetry._logs, opentelemetry.propagate
import stepspan
from stepspan.deliver import delivery

def state():
    root, ours = logging.getLogger(), logging.getLogger("stepspan")
    return {
        "signals": [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "wakeup": signal.set_wakeup_fd(-1),
        "tracer": repr(opentelemetry.trace._TRACER_PROVIDER),
        "meter": repr(opentelemetry.metrics._internal._METER_PROVIDER),
        "logger": repr(opentelemetry._logs._internal._LOGGER_PROVIDER),
        "propagator": repr(opentelemetry.propagate.get_global_textmap()),
        "root": [root.level, repr(root.handlers), repr(root.filters), root.disabled, logging.root.manager.disable],
        "ours": [ours.level, repr(ours.handlers), ours.propagate],
        "factory": repr(logging.getLogRecordFactory()),
        "warnings": repr(warnings.filters),
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook)],
        "traces": [repr(sys.gettrace()), repr(sys.getprofile())],
        "switch": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "random": hash(random.getstate()),
        "numpy": hash(numpy.random.get_state()[1].tobytes()),
        "cwd": os.getcwd(),
        "umask": [os.umask(0o22), os.umask(0o22)],
        "environment": dict(os.environ),
        "threads": [thread.name for thread in threading.enumerate()],
        "start of threads": repr(threading.Thread.start),
        "path": sys.path,
        "span": repr(opentelemetry.trace.get_current_span()),
        "streams": [repr(sys.stdout), repr(sys.stderr)],
    }

os.umask(0o22)
random.seed(42)
numpy.random.seed(42)
before = state()
"""


def test_a_run_changes_nothing_in_its_process(start: Start, tmp_path: Path) -> None:
    code = """
    run = stepspan.start_run()
    during = state()
    changed = {name for name in during if during[name] != before[name]}
    assert changed == {"span", "threads", "start of threads"}, changed
    for batch in run.steps(range(3)):
        run.log_metrics({"x": batch, "bad": "x"})
        with run.span("s"):
            run.log_event("e")
    assert run.flush(20) or not run._delivery.targets
    run.close()
    after = state()
    assert after == before, {name: (before[name], after[name]) for name in after if after[name] != before[name]}
    """
    code = STATE + textwrap.dedent(code)
    found = python(code, tmp_path)
    assert found.returncode == 0, found.stderr
    with ScriptedReceiver() as receiver:
        found = python(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        assert found.returncode == 0, found.stderr
        assert receiver.spans("training.step")


def _loaded(code: str, names: str, cwd: Path) -> str:
    ask = f"print(*sorted({{name.split('.')[0] for name in sys.modules}} & set({names.split()!r})))"
    found = python(f"import sys\n{textwrap.dedent(code)}\n{ask}", cwd)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_importing_stepspan_is_cheap(start: Start, tmp_path: Path) -> None:
    heavy = "pydantic grpc requests typer rich opentelemetry orjson psutil yaml numpy google pynvml multiprocessing"
    assert _loaded("import stepspan", heavy, tmp_path) == ""


def test_a_disabled_run_is_cheap(start: Start, tmp_path: Path) -> None:
    code = "import stepspan; stepspan.start_run(enabled=False).log_metrics({'x': 1.0})"
    assert _loaded(code, "pydantic grpc requests typer rich opentelemetry psutil yaml google pynvml", tmp_path) == ""


def test_a_run_without_an_endpoint_loads_nothing_to_send_with(start: Start, tmp_path: Path) -> None:
    code = "import stepspan\nwith stepspan.start_run() as run: run.log_metrics({'x': 1.0})"
    assert _loaded(code, "grpc requests typer rich yaml google numpy pynvml multiprocessing", tmp_path) == ""


def test_a_signal_handler_may_log(start: Start) -> None:
    """Whatever the interrupted thread was doing: nothing waits for itself, and nothing is lost."""
    run = start()
    handled = 0

    def handler(*_: object) -> None:
        nonlocal handled
        handled += 1
        run.log_metrics({"handled": handled})

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    logged, deadline = 0, time.monotonic() + under_load(20)
    try:
        while handled < 100 and time.monotonic() < deadline:
            with run.step(logged):
                run.log_metrics({"logged": logged})
            logged += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    run.close()
    assert handled >= 100
    found = [event["metrics"] for event in events(run, "metrics")]
    assert [int(m["logged"]) for m in found if "logged" in m] == list(range(logged))
    assert sorted(int(m["handled"]) for m in found if "handled" in m) == list(range(1, handled + 1))
    assert run.stats()["warnings"] == {}


def test_nobody_hears_of_a_run_that_goes_well(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with start() as run, run.step(0):
        run.log_metrics({"x": 1.0})
    assert caplog.records == []


# how a run starts


def test_the_deliverer_is_started_three_calls_below_start_run(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[list[str]] = []

    def spawn(*_: object, **__: object) -> None:
        stacks.append([frame.name for frame in traceback.extract_stack()])

    monkeypatch.setattr(delivery, "spawn", spawn)
    with start(endpoint="http://127.0.0.1:1"):
        assert stacks, "before the run is handed out"
    below = stacks[0][stacks[0].index("start_run") + 1 :]
    assert below == ["open_run", "start", "spawn"]
