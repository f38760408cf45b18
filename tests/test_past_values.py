"""`log_metrics(..., time=...)`: values of the past have their own time, move nothing, and hold nothing up."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from harness import runs
from harness.runs import events

from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]
NOW = datetime.now(timezone.utc).replace(microsecond=250_000) - timedelta(minutes=5)
NOW_NS = int(NOW.timestamp()) * 10**9 + 250_000_000


@pytest.mark.parametrize(
    "time",
    [
        pytest.param(NOW_NS, id="Unix ns"),
        pytest.param(np.int64(NOW_NS), id="numpy's Unix ns"),
        pytest.param(NOW, id="UTC"),
        pytest.param(NOW.astimezone(timezone(timedelta(hours=-7))), id="another time zone"),
        pytest.param(NOW.astimezone().replace(tzinfo=None), id="local"),
    ],
)
def test_values_have_the_time_that_they_are_given(start: Start, time: Any) -> None:
    with start() as run:
        run.log_metrics({"loss": 0.5}, time=time)
        assert [event["time"] for event in events(run, "metrics")] == [NOW_NS]
        assert not run.stats()["warnings"]


@pytest.mark.parametrize(
    ("time", "fix"),
    [
        pytest.param(1.7e9, "a float of seconds is not exact", id="float seconds"),
        pytest.param(np.float64(1.7e18), "Unix nanoseconds as an int", id="a float of ns"),
        pytest.param(1_700_000_000, "not Unix nanoseconds, which have 19 digits", id="seconds"),
        pytest.param(1_700_000_000_000_000, "not Unix nanoseconds, which have 19 digits", id="microseconds"),
        pytest.param("2026-01-01", "give a datetime", id="text"),
        pytest.param(True, "give a datetime", id="a bool"),
        pytest.param(datetime(1969, 1, 1, tzinfo=timezone.utc), "before 1970", id="before Unix time"),
        pytest.param(datetime.max, "not a time of this world|in the future", id="the end of time"),
        pytest.param(NOW + timedelta(days=1), "in the future", id="the future"),
    ],
)
def test_a_time_that_is_none_is_told_and_the_values_are_of_the_present(
    start: Start, caplog: pytest.LogCaptureFixture, time: Any, fix: str
) -> None:
    with start() as run:
        run.log_metrics({"loss": 0.5}, time=time)
        (event,) = events(run, "metrics")
        assert (event["metrics"], "time" in event) == ({"loss": 0.5}, False)
        assert run.stats()["warnings"] == {"time": 1}
    (message,) = [record.getMessage() for record in caplog.records if "time=" in record.getMessage()]
    assert re.search(fix, message)
    assert "recorded at the present" in message


def test_a_step_of_the_past_is_the_values_own_and_not_in_force(start: Start) -> None:
    with start() as run:
        run.log_metrics({"loss": 0.5}, step=3, time=NOW)
        run.log_metrics({"loss": 0.25})
        with run.step(7):
            run.log_metrics({"loss": 0.5}, time=NOW)
            run.log_metrics({"loss": 0.5}, step=4, time=NOW, split="val")
        fields = ("split", "step", "own_step", "time")
        assert [[event.get(name) for name in fields] for event in events(run, "metrics")] == [
            ["train", None, 3, NOW_NS],
            ["train", None, None, None],
            ["train", None, None, NOW_NS],
            ["val", None, 4, NOW_NS],
        ]
