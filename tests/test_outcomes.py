"""How a run ended: completed, failed or interrupted; and that an interruption counts no error and fails no step."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from harness import runs
from harness.runs import all_spans, events, outline, path_of, python, sessions, status_of

from stepspan.config import Settings
from stepspan.recording.outcomes import Outcomes, to_status
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


class StopTraining(Exception):
    """As frameworks have one, to leave the loop."""


class Terminated(SystemExit):
    """As Lightning's on SIGTERM: without a code."""


class Stopped(KeyboardInterrupt):
    pass


def made(name: str, base: type[BaseException] = Exception) -> BaseException:
    """An exception of another package, which is not installed."""
    module, _, qualified = name.rpartition(".")
    error: BaseException = type(qualified, (base,), {"__module__": module})()
    return error


def after(first: BaseException, then: BaseException) -> BaseException:
    """What is raised as another exception is handled."""
    then.__context__ = first
    return then


def group(*errors: BaseException) -> BaseException:
    error = made("builtins.BaseExceptionGroup", BaseException)
    error.exceptions = errors  # type: ignore[attr-defined]
    return error


def click_exit(code: int) -> BaseException:
    error = made("click.exceptions.Exit", RuntimeError)
    error.exit_code = code  # type: ignore[attr-defined]
    return error


INTERRUPTIONS = [
    KeyboardInterrupt(),
    Stopped(),
    GeneratorExit(),
    SystemExit(143),
    SystemExit(130),
    SystemExit(-15),
    Terminated(),
    asyncio.CancelledError(),
    concurrent.futures.CancelledError(),
    made("optuna.exceptions.TrialPruned"),
    type("Mine", (type(made("optuna.exceptions.TrialPruned")),), {})(),
    made("lightning.pytorch.utilities.exceptions.SIGTERMException", SystemExit),
    made("torch.distributed.elastic.multiprocessing.api.SignalException"),
    after(KeyboardInterrupt(), SystemExit(1)),
    group(KeyboardInterrupt(), group(asyncio.CancelledError())),
]
FAILURES = [
    ValueError("nan"),
    SystemExit(1),
    SystemExit(3),
    SystemExit(-1),
    SystemExit(139),
    SystemExit("no GPU"),
    after(ValueError("nan"), SystemExit(1)),
    after(KeyboardInterrupt(), ValueError("while cleaning up")),
    asyncio.TimeoutError(),
    StopTraining(),
    made("elsewhere.TrialPruned"),
    group(KeyboardInterrupt(), ValueError("nan")),
    click_exit(2),
]


def title(error: BaseException) -> str:
    return f"{type(error).__name__}{error.args}"


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=title)
def test_what_ends_a_run_early_on_purpose_is_an_interruption(error: BaseException) -> None:
    assert Outcomes().of(error) == "interrupted"


@pytest.mark.parametrize("error", FAILURES, ids=title)
def test_everything_else_is_a_failure(error: BaseException) -> None:
    assert Outcomes().of(error) == "failed"


@pytest.mark.parametrize("error", [None, SystemExit(), SystemExit(0), click_exit(0)], ids=str)
def test_nothing_and_an_exit_with_code_0_are_a_good_end(error: BaseException | None) -> None:
    assert Outcomes().of(error) == "completed"


@pytest.fixture
def reexported(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("frames")
    module.Halt = StopTraining  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "frames", module)


@pytest.mark.usefixtures("reexported")
@pytest.mark.parametrize("name", ["StopTraining", f"{__name__}.StopTraining", "frames.Halt"])
def test_a_setting_names_more(name: str) -> None:
    assert Outcomes([name]).of(StopTraining()) == "interrupted"
    assert Outcomes([name]).of(type("Sooner", (StopTraining,), {})()) == "interrupted"
    assert Outcomes([name]).of(ValueError()) == "failed"


def test_an_interruption_counts_no_error_and_fails_nothing(start: Start) -> None:
    def train() -> None:
        with run.epoch(0):
            for _ in run.steps("ab"):
                with run.span("forward"):
                    raise KeyboardInterrupt

    run = start()
    with pytest.raises(KeyboardInterrupt), run:
        train()
    assert outline(run) == [
        "run",
        *("  epoch 0", "    step 0", "      span forward", "      end span", "    end step", "  end epoch"),
        "end run interrupted",
    ]
    assert status_of(path_of(run)) == "interrupted"
    found = all_spans(path_of(run))
    assert {span.error for span in found} == {None}
    assert next(span for span in found if span.name == "training.run").attributes["status"] == "interrupted"


def test_a_task_that_is_cancelled_fails_nothing(start: Start) -> None:
    async def main(run: Run) -> None:
        async def train() -> None:
            with run.step(0):
                await asyncio.sleep(60)

        task = asyncio.create_task(train())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with start() as run:
        asyncio.run(main(run))
    assert outline(run) == ["run", "  step 0", "  end step", "end run completed"]


@pytest.mark.parametrize("given", [[], ["StopTraining"], [StopTraining]], ids=str)
def test_the_setting_holds_for_a_run(start: Start, monkeypatch: pytest.MonkeyPatch, given: list[Any]) -> None:
    if given:
        monkeypatch.setenv("STEPSPAN_INTERRUPTIONS", ",".join(map(str, Settings(interruptions=given).interruptions)))
    run = start()
    with pytest.raises(StopTraining), run, run.step(0):
        raise StopTraining
    assert status_of(path_of(run)) == ("interrupted" if given else "failed")
    assert len(events(run, "error")) == (not given)


def generator(run: Run) -> Iterator[int]:
    with run:
        yield from run.steps(range(9))


def test_a_generator_that_is_closed_early_was_interrupted(start: Start) -> None:
    run = start()
    batches = generator(run)
    assert next(batches) == 0
    batches.close()  # type: ignore[attr-defined]
    assert outline(run) == ["run", "  step 0", "  end step", "end run interrupted"]


# exits with code 0


def leave_by(run: Run, error: BaseException, body: Callable[[Run], None]) -> str | None:
    def train() -> None:
        body(run)
        raise error

    with pytest.raises(type(error)), run:
        train()
    return status_of(path_of(run))


def ten_steps(run: Run) -> None:
    with run.epoch(0):
        for _ in run.steps(range(10)):
            pass


def ten_of_ten(run: Run) -> None:
    run.set_total_steps(10)
    ten_steps(run)


def logged(run: Run) -> None:
    run.set_total_steps(10)
    for step in range(10):
        run.log_metrics({"loss": 1.0}, step=step)


def ten_of_eleven(run: Run) -> None:
    run.set_total_steps(11)
    ten_steps(run)


def validated_more(run: Run) -> None:
    ten_of_eleven(run)
    for _ in run.steps(range(20), split="val"):
        pass


def exit_in_step(run: Run) -> None:
    with run.step(0):
        sys.exit(0)


def exit_in_loop(run: Run) -> None:
    for _ in run.steps("ab"):
        sys.exit(0)


def exit_in_epoch(run: Run) -> None:
    with run.epoch(0):
        sys.exit()


def exit_after_a_caught_one(run: Run) -> None:
    with pytest.raises(SystemExit):
        exit_in_step(run)
    ten_steps(run)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (lambda run: None, "completed"),
        (ten_steps, "completed"),
        (ten_of_ten, "completed"),
        (logged, "completed"),
        (exit_after_a_caught_one, "completed"),
        (ten_of_eleven, "interrupted"),
        (validated_more, "interrupted"),
        (exit_in_step, "interrupted"),
        (exit_in_loop, "interrupted"),
        (exit_in_epoch, "interrupted"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_exit_with_code_0_is_a_good_end_where_nothing_is_left_to_do(
    start: Start, body: Callable[[Run], None], status: str
) -> None:
    run = start()
    assert leave_by(run, SystemExit(0), body) == status
    assert not events(run, "error")


def test_early_stopping_is_a_good_end(start: Start) -> None:
    with start() as run:
        run.set_total_steps(100)
        for batch in run.steps(range(100)):
            if batch == 3:
                break
    assert status_of(path_of(run)) == "completed"


# closed by hand, without a status


def close_in_finally(run: Run, error: BaseException) -> None:
    try:
        for _ in run.steps("ab"):
            raise error
    finally:
        run.close()


def close_after_a_step(run: Run, error: BaseException) -> None:
    try:
        with run.step(0):
            raise error
    except BaseException:
        run.close()
        raise


def close_where_it_was_caught(run: Run, error: BaseException) -> None:
    try:
        ten_steps(run)
        raise error
    except BaseException:
        run.close()
        raise


def close_after_another_try(run: Run, error: BaseException) -> None:
    try:
        with run.step(0):
            raise error
    except BaseException:
        ten_steps(run)
        run.close()
        raise


@pytest.mark.parametrize(
    ("body", "error", "status"),
    [
        (close_in_finally, KeyboardInterrupt(), "interrupted"),
        (close_in_finally, ValueError("nan"), "failed"),
        (close_in_finally, SystemExit(143), "interrupted"),
        (close_in_finally, SystemExit(0), "interrupted"),
        (close_after_a_step, ValueError("nan"), "failed"),
        (close_where_it_was_caught, StopIteration(), "completed"),
        (close_where_it_was_caught, KeyboardInterrupt(), "interrupted"),
        (close_after_another_try, MemoryError(), "completed"),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_a_run_that_is_closed_while_an_exception_is_on_its_way_ends_by_it(
    start: Start, body: Callable[[Run, BaseException], None], error: BaseException, status: str
) -> None:
    run = start()
    with pytest.raises(type(error)):
        body(run, error)
    assert status_of(path_of(run)) == status
    assert len(events(run, "error")) == (status == "failed" or body is close_after_another_try)


def test_what_was_handled_before_a_run_says_nothing_of_it(start: Start) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        run = start()
        ten_steps(run)
        run.close()
    assert status_of(path_of(run)) == "completed"


# the end of a process, without `with`

OPENED = """
import atexit, os, signal, sys
import stepspan
run = stepspan.start_run(directory="stepspan-runs")
def stop(*_):
    {handler}
signal.signal(signal.SIGTERM, stop)
def train(steps, killed=None):
    run.set_total_steps(steps)
    for i in run.steps(range(steps)):
        run.log_metrics({{"loss": 1.0}})
        if i == killed:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("handler", "rest", "code", "status", "errors"),
    [
        ("pass", "train(10)", 0, "completed", []),
        ("pass", "train(10)\nsys.exit(0)", 0, "completed", []),
        ("sys.exit(0)", "train(1000, killed=6)", 0, "interrupted", []),
        ("sys.exit(143)", "train(1000, killed=6)", 143, "interrupted", []),
        ("exit(143)", "train(1000, killed=6)", 143, "interrupted", []),
        ("exit()", "train(10)\nexit()", 0, "completed", []),
        ("pass", "try: raise KeyboardInterrupt\nexcept KeyboardInterrupt: sys.exit(1)", 1, "interrupted", []),
        ("raise KeyboardInterrupt", "train(1000, killed=6)", -2, "interrupted", []),
        ("pass", "train(10)\nsys.exit(3)", 3, "failed", ["SystemExit"]),
        ("pass", "train(10)\nquit(code='no GPU')", 1, "failed", ["SystemExit"]),
        ("pass", "with run.step(0): raise SystemExit(3)", 3, "failed", ["SystemExit"]),
        ("pass", "try: sys.exit(3)\nexcept SystemExit: pass\ntrain(10)", 0, "completed", []),
        ("pass", "run.step(3).__enter__()", 0, "interrupted", []),
    ],
)
def test_a_run_that_its_process_closes_ends_as_the_process_did(
    start: Start, tmp_path: Path, handler: str, rest: str, code: int, status: str, errors: list[str]
) -> None:
    found = python(OPENED.format(handler=handler) + rest, tmp_path)
    assert found.returncode == code, found.stderr
    (session,) = sessions(tmp_path / "stepspan-runs").values()
    assert status_of(session) == status
    assert [event["type"] for event in events(session, "error")] == errors


WORKERS = """
import multiprocessing, sys
import stepspan

def work(method):
    run = stepspan.start_run(job_id=method, directory="stepspan-runs")
    run.log_metrics({"x": 1.0})
    {"fails": lambda: 1 / 0, "exits": lambda: sys.exit(143), "ends": lambda: None}[method]()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    for method in ("fails", "exits", "ends"):
        process = context.Process(target=work, args=(method,))
        process.start()
        process.join()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_run_of_a_worker_process_ends_as_the_worker_did(start: Start, tmp_path: Path, method: str) -> None:
    code = WORKERS.replace("sys.argv[1]", repr(method))
    assert python(code, tmp_path).returncode == 0
    found = {
        events(path)[0]["job_id"]: (status_of(path), [event["type"] for event in events(path, "error")])
        for path in (tmp_path / "stepspan-runs").glob("*/*/rank-*")
    }
    assert found == {
        "fails": ("failed", ["ZeroDivisionError"]),
        "exits": ("interrupted", []),
        "ends": ("completed", []),
    }


# words


@pytest.mark.parametrize(
    ("word", "status"),
    [
        (None, "completed"),
        ("completed", "completed"),
        ("FAILED", "failed"),
        ("success", "completed"),
        ("crashed", "failed"),
        ("killed", "interrupted"),
        ("best", "interrupted"),
        (3, "interrupted"),
    ],
)
def test_words_for_a_status(word: Any, status: str) -> None:
    assert to_status(word)[0] == status


def test_a_status_of_another_name_is_told(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    run = start()
    run.close("finished")
    assert status_of(path_of(run)) == outline(run)[-1].rpartition(" ")[2] == "completed"
    message, _ = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "close(status='finished'): not one of completed, failed, interrupted; taken as completed" in message
