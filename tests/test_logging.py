"""Python's logging on the journal: a line stands in its step, and nothing it holds or raises reaches training."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.events_of import SessionEvents
from harness.journals import ROOMY, FaultyDisk, HandClock
from harness.runs import events, python

from stepspan import JsonlExporter
from stepspan.integrations.logging import StepspanHandler
from stepspan.mapping.records import Log
from stepspan.run import Run
from stepspan.testing import recorded_run

start = runs.start
Start = Callable[..., Run]
NAME = "trainer.data"


@pytest.fixture
def logger() -> logging.Logger:
    """A logger with our handler, and no other: not pytest's either."""
    found = logging.Logger(NAME)
    found.addHandler(StepspanHandler())
    return found


def test_a_line_arrives_in_the_span_it_was_written_in(logger: logging.Logger) -> None:
    with recorded_run() as recording:
        with recording.run.step(3), recording.run.span("load"):
            logger.warning("%d images of %s are broken", 2, "train")
        logger.info("done")
    (span,) = recording.spans("load")
    first, second = recording.logs("")
    (run,) = recording.spans("training.run")
    assert (first.body, first.severity, first.event_name) == ("2 images of train are broken", 13, "")
    assert (first.trace_id, first.span_id) == (span.trace_id, span.span_id)
    assert (second.body, second.severity, second.span_id) == ("done", 9, run.span_id)
    assert first.attributes == {
        "logger": NAME,
        "code.file.path": __file__,
        "code.function.name": "test_a_line_arrives_in_the_span_it_was_written_in",
        "code.line.number": first.attributes["code.line.number"],
    }
    assert (
        Path(__file__).read_text().splitlines()[first.attributes["code.line.number"] - 1].strip().startswith("logger.w")  # type: ignore[index, operator]
    )


def test_a_line_is_no_milestone_of_the_run(logger: logging.Logger) -> None:
    with recorded_run() as recording:
        recording.run.log_event("milestone")
        logger.error("a line")
    (run,) = recording.spans("training.run")
    assert [event.name for event in run.events] == ["milestone"]
    assert not [point for point in recording.points() if "a line" in str(point)]


@pytest.mark.parametrize(
    ("level", "name", "number"),
    [
        (5, "trace", 1),
        (logging.DEBUG, "debug", 5),
        (logging.INFO, "info", 9),
        (25, "info", 9),
        (logging.WARNING, "warning", 13),
        (logging.ERROR, "error", 17),
        (logging.CRITICAL, "critical", 21),
        (70, "critical", 21),
    ],
)
def test_severity_is_that_of_the_level(logger: logging.Logger, level: int, name: str, number: int) -> None:
    with recorded_run() as recording:
        logger.log(level, "a line")
    (event,), (log,) = recording.events("log"), recording.logs("")
    assert (event["severity"], log.severity) == (name, number)


def test_the_level_of_the_handler_counts(logger: logging.Logger) -> None:
    logger.handlers[0].setLevel("WARNING")
    with recorded_run() as recording:
        logger.info("below")
        logger.warning("above")
    assert [event["message"] for event in recording.events("log")] == ["above"]


def test_an_exception_comes_with_its_stack_and_fails_no_span(logger: logging.Logger) -> None:
    with recorded_run() as recording, recording.run.step(0):
        try:
            raise KeyError("image")
        except KeyError:
            logger.exception("skipped", stack_info=True)
    (log,) = recording.logs("")
    assert log.attributes["exception.type"] == "KeyError"
    assert log.attributes["exception.message"] == "'image'"
    assert "raise KeyError" in log.attributes["exception.stacktrace"]  # type: ignore[operator]
    assert "test_an_exception_comes_with_its_stack" in log.attributes["code.stacktrace"]  # type: ignore[operator]
    assert recording.spans("training.step")[0].error is None
    assert recording.values("training.run.errors") == []


def test_extra_fields_are_attributes(logger: logging.Logger) -> None:
    with recorded_run() as recording:
        logger.info("a line", extra={"shard": 7, "shape": (3, 4), "path": Path("x"), "nested": {"a": 1.5}})
    attributes = recording.logs("")[0].attributes
    assert {name: attributes[name] for name in ("shard", "shape", "path", "nested.a")} == {
        "shard": 7, "shape": [3, 4], "path": "x", "nested.a": 1.5,
    }  # fmt: skip


def test_secrets_in_lines_and_exceptions_are_redacted(logger: logging.Logger) -> None:
    with recorded_run() as recording:
        try:
            raise ValueError("password=hunter2")
        except ValueError:
            logger.exception("cannot reach https://me:hunter2@host", extra={"api_key": "hunter2"})
    assert "hunter2" not in str(recording.events())
    assert recording.logs("")[0].body == "cannot reach https://[redacted]@host"


@pytest.mark.parametrize("name", ["stepspan", "stepspan.mapping"])
def test_our_own_lines_are_passed_over(name: str) -> None:
    handler = StepspanHandler()
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        with recorded_run() as recording:
            recording.run.log_metrics({"loss": "no number"})
            logger.warning("ours")
    finally:
        logger.removeHandler(handler)
    assert recording.events("log") == []


def test_what_a_library_says_while_it_delivers_is_passed_over(logger: logging.Logger) -> None:
    with recorded_run() as recording:
        thread = threading.Thread(target=logger.info, args=("POST /v1/logs 200",), name="stepspan-there-logs")
        thread.start()
        thread.join()
    assert recording.events("log") == []


class Chatty:
    """Says something each time it is printed."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def __str__(self) -> str:
        self.logger.info("printing %s", self)
        return "chatty"


def test_a_line_that_logs_while_it_is_made_ends(logger: logging.Logger) -> None:
    with recorded_run() as recording:
        logger.info("%s", Chatty(logger))
        logger.info("later")
    assert [event["message"] for event in recording.events("log")] == ["printing chatty", "chatty", "later"]


class Bad:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("message", "arguments", "says"),
    [
        ("%d images", ("three",), "%d images <TypeError:"),
        ("%s", (Bad(),), "%s <RuntimeError: no text>"),
        ("%s %s", (1,), "%s %s <TypeError:"),
        (Bad(), (), "<Bad: RuntimeError in __str__> <RuntimeError: no text>"),
        (None, (), "None"),
        ("\ud800", (), "?"),
    ],
    ids=["wrong format", "argument raises", "too few", "message raises", "no text", "lone surrogate"],
)
def test_a_line_that_cannot_be_made_is_kept_as_far_as_it_goes(
    logger: logging.Logger, message: Any, arguments: tuple[Any, ...], says: str
) -> None:
    with recorded_run() as recording:
        logger.info(message, *arguments)
    assert recording.events("log")[0]["message"].startswith(says)


def test_a_record_bent_out_of_shape_is_told_once_and_raises_nothing(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    handler = StepspanHandler()
    record = logging.makeLogRecord({"name": "x", "levelno": "high", "msg": "m"})
    with start() as run:
        handler.emit(record)
        handler.emit(record)
    assert run.stats()["warnings"] == {"log": 2}
    assert len([message for message in caplog.messages if "log was lost" in message]) == 1


def test_without_a_run_and_after_it_nothing_happens(logger: logging.Logger, start: Start) -> None:
    logger.info("before")
    with start() as run:
        pass
    logger.info("after")
    StepspanHandler(run=run).emit(logging.makeLogRecord({"name": "x", "msg": "after"}))
    assert events(run, "log") == []
    assert run.stats()["warnings"] == {}


def test_lines_of_other_threads_and_signal_handlers_are_kept(logger: logging.Logger) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: logger.warning("signal"))
    try:
        with recorded_run() as recording, recording.run.step(0):
            thread = threading.Thread(target=logger.info, args=("thread",), name="loader")
            thread.start()
            thread.join()

            class Interrupted:
                def __str__(self) -> str:
                    signal.raise_signal(signal.SIGUSR1)
                    return "line"

            logger.info("%s", Interrupted())
    finally:
        signal.signal(signal.SIGUSR1, before)
    found = recording.events("log")
    assert [event["message"] for event in found] == ["thread", "signal", "line"]
    assert found[0]["attributes"]["thread.name"] == "loader"
    (step,) = recording.events("step_begin")
    assert {event["parent"] for event in found} == {step["seq"]}


def test_importing_it_touches_no_logger(tmp_path: Path) -> None:
    code = """
    import logging, sys
    root = logging.getLogger()
    before = (root.level, list(root.handlers), sorted(logging.root.manager.loggerDict))
    import stepspan
    assert "stepspan.integrations" not in sys.modules
    from stepspan.integrations.logging import StepspanHandler
    with stepspan.start_run() as run:
        logging.getLogger("x").warning("not ours")
        assert (root.level, root.handlers) == (before[0], before[1])
    """
    found = python(code, tmp_path)
    assert found.returncode == 0, found.stderr


def test_a_log_event_is_exactly_this_record() -> None:
    s = SessionEvents()
    error = {"type": "ValueError", "message": "m" * 20_000, "stack": "Traceback …"}
    s.emit(
        "log", parent=0, severity="error", logger="trainer", message="boom",
        attributes={"logger": "the user's", "code.line.number": 3}, exception=error,
    )  # fmt: skip
    (log,) = s.records("logs")
    message = log.attributes.pop("exception.message")
    assert len(message) < 17_000
    assert log == Log(
        s.ts, 17, "boom", "",
        {
            "logger": "trainer", "code.line.number": 3,
            "exception.type": "ValueError", "exception.stacktrace": "Traceback …",
        },
    )  # fmt: skip


def test_what_a_run_tells_may_wait_for_a_thread_that_logs(start: Start, tmp_path: Path, logger: logging.Logger) -> None:
    """Handlers have locks, which other threads hold as they come to the journal."""
    clock, disk, passed = HandClock(), FaultyDisk(), []

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            beside = threading.Thread(target=logger.info, args=("beside",), daemon=True)
            beside.start()
            beside.join(10)
            passed.append(not beside.is_alive())

    waiting = Waiting(logging.WARNING)
    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=ROOMY, clock=clock, disk=disk)])
    logging.getLogger("stepspan").addHandler(waiting)
    try:
        disk.space = 0
        clock.skip(2)
        run.log_metrics({"x": 1.0})
        disk.space = None
        run.close()
    finally:
        logging.getLogger("stepspan").removeHandler(waiting)
    assert passed == [True, True], "the warning, and the line that sums up"
    assert [event["message"] for event in events(run, "log")] == ["beside"]
