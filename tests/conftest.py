"""Fixtures that every test may ask for.

`prometheus` and `collector` start in about half a second each and belong to one test: what Prometheus accepts depends
on the newest sample it holds, so tests that shared one would decide each other's results. A test that wants other
settings starts its own, `with Prometheus(tmp_path / "p", out_of_order_time_window="0s")`, and marks itself `stack`.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import pytest_timeout
from harness import stack
from harness.events_schema import violations
from harness.processes import under_load
from harness.stack import Collector, Loki, Prometheus, Tempo

from stepspan.events import Event
from stepspan.journal import writer
from stepspan.journal.format import encode

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; children would ignore it as well
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"prometheus", "collector", "loki", "tempo", "shown"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("stack")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `stack` is skipped before anything of it runs where the servers were not built."""
    stack.ASKED_BY_UNMARKED = item.get_closest_marker("stack") is None
    if not stack.ASKED_BY_UNMARKED:
        stack.binary("prometheus")
        stack.binary("otelcol")


def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """A test may take `timeout` seconds (pyproject.toml, or its mark), and more where the machine is busy."""
    found: bool = pytest_timeout.pytest_timeout_set_timer(item, settings._replace(timeout=under_load(settings.timeout)))
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test has printed reaches the process that reports it, also where it is no UTF-8."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def valid_events(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test's journals are given is as `stepspan.events` says; tests of other lines are marked `any_events`."""
    wrong: list[str] = []

    def checked(event: Event) -> bytes:
        wrong.extend(violations(event))
        return encode(event)

    if not request.node.get_closest_marker("any_events"):
        monkeypatch.setattr(writer, "encode", checked)
    yield
    assert not wrong, "\n".join(dict.fromkeys(wrong))


@pytest.fixture(autouse=True)
def unsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No samplers beside the runs of tests, so that their journals hold what the test logs and nothing else."""
    monkeypatch.setenv("STEPSPAN_SAMPLERS", "none")


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """A real Prometheus with an empty database and an out-of-order window of 48 h."""
    with Prometheus(tmp_path / "prometheus") as server:
        yield server


@pytest.fixture
def collector(tmp_path: Path, prometheus: Prometheus) -> Iterator[Collector]:
    """A real Collector in front of `prometheus`."""
    with Collector(tmp_path / "collector", prometheus) as server:
        yield server


@pytest.fixture
def loki(tmp_path: Path) -> Iterator[Loki]:
    """A real Loki with the configuration that ships, and nothing in it."""
    with Loki(tmp_path / "loki") as server:
        yield server


@pytest.fixture
def tempo(tmp_path: Path) -> Iterator[Tempo]:
    """A real Tempo with the configuration that ships; the test is skipped where there is none."""
    with Tempo(tmp_path / "tempo") as server:
        yield server
