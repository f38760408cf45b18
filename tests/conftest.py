"""Fixtures that every test may ask for.

`prometheus` and `collector` start in about half a second each and belong to one test: what Prometheus accepts depends
on the newest sample it holds, so tests that shared one would decide each other's results. A test that wants other
settings starts its own, `with Prometheus(tmp_path / "p", out_of_order_time_window="0s")`, and marks itself `stack`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stack import Collector, Prometheus


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"prometheus", "collector"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("stack")


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
