"""Log lines of Python's `logging` on the run's journal, each in the step it was written in.

```python
import logging
from stepspan.integrations.logging import StepspanHandler

logging.getLogger().addHandler(StepspanHandler(logging.INFO))
```
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from stepspan.copying import SharedByCopies
from stepspan.integrations.reentrancy import MAX_RECORDING_DEPTH, recording_depth
from stepspan.run import DISABLED, Run, current_run
from stepspan.values import error_fields, to_text

OWN = "stepspan"
"""The first name of stepspan's own loggers and threads: what they log about delivery must not be delivered."""
SEVERITIES = ((50, "critical"), (40, "error"), (30, "warning"), (20, "info"), (10, "debug"))
"""From this level on -> severity; below all of them: "trace"."""
STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""A record's own fields; what else it has came by `extra=`."""


class StepspanHandler(SharedByCopies, logging.Handler):
    """Records log lines as `log` events: they arrive as log records with the trace and span id of their step.

    Recorded are the message (not formatted further), severity, logger, place in the code, exception and `extra=`
    fields. Never raises. Lines of stepspan's own loggers and threads are passed over, and so is a line that is logged
    while a line is recorded that was itself logged while one was recorded.

    Args:
        level: Lines below it are not recorded.
        run: The run to record in; None: whichever is open when a line comes, if any.

    """

    def __init__(self, level: int | str = logging.NOTSET, run: Run | None = None) -> None:
        super().__init__(level)
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        """Record one line, in the thread that logs it: when this returns, it survives the process.

        Args:
            record: As `logging` made it; its `exc_info` and `stack_info` are recorded too.

        """
        if to_text(record.name).partition(".")[0] == OWN or threading.current_thread().name.startswith(OWN):
            return
        run = self._run or current_run()
        if run is DISABLED or run.closed:
            return
        with recording_depth as depth:
            if depth < MAX_RECORDING_DEPTH:
                scopes = run._recorder.scopes
                run._recorder.record("log", lambda: {"parent": scopes.parent_without_closing(), **_fields(record, run)})


def _fields(record: logging.LogRecord, run: Run) -> dict[str, Any]:
    """A line as the fields of a `log` event. Names of attributes: OpenTelemetry semantic conventions, `code.*`."""
    extra = {name: value for name, value in vars(record).items() if name not in STANDARD_FIELDS}
    converted = run._recorder.json_fields("log", "attributes", extra) if extra else {"attributes": {}}
    attributes: dict[str, Any] = {
        **converted["attributes"],
        "code.file.path": to_text(record.pathname),
        "code.function.name": to_text(record.funcName),
        "code.line.number": record.lineno,
    }
    if record.threadName and record.threadName != "MainThread":
        attributes["thread.name"] = to_text(record.threadName)
    if record.stack_info:
        attributes["code.stacktrace"] = to_text(record.stack_info)
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    return {
        "severity": next((name for level, name in SEVERITIES if record.levelno >= level), "trace"),
        "logger": to_text(record.name),
        "message": _message(record),
        **converted,
        "attributes": attributes,
        **({} if error is None else {"exception": error_fields(error)}),
    }


def _message(record: logging.LogRecord) -> str:
    try:
        return to_text(record.getMessage())
    except Exception as error:  # arguments that don't fit the format, or a user's __str__
        return f"{to_text(record.msg)} <{type(error).__name__}: {to_text(error)}>"
