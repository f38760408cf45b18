"""Runs for tests, and what they left in their journals. The fixture is asked for by `start = runs.start`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

import stepspan
from harness.journals import assert_ordered, lines, session_of
from stepspan.events import Event
from stepspan.identity import LAUNCHERS
from stepspan.journal.layout import find_sessions
from stepspan.journal.liveness import read_closed
from stepspan.mapping.records import Span
from stepspan.reading.sessions import read_session
from stepspan.run import Run

_LAUNCHERS = ("STEPSPAN_", "OTEL_", "SLURM_", "OMPI_", "PMI", "TORCHELASTIC_", "RAY_", *(row.mark for row in LAUNCHERS))


_OF_THE_TESTS = {"STEPSPAN_STACK", "STEPSPAN_REQUIRE_STACK", "STEPSPAN_SAMPLERS"}


def is_ours(name: str) -> bool:
    if name in _OF_THE_TESTS:
        return False
    return name.startswith(_LAUNCHERS) or name in {"WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """`start_run` as on a bare machine, below `tmp_path`; what it left open is closed afterwards."""
    for name in filter(is_ours, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield stepspan.start_run
    while (run := stepspan.current_run())._recorder.active:
        run.close()


def python(code: str, cwd: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script in `cwd`, where its journal then lies in `stepspan-runs`."""
    file = cwd / "train.py"
    file.write_text(textwrap.dedent(code))
    inherited = {name: value for name, value in os.environ.items() if not is_ours(name)}
    return subprocess.run(
        [sys.executable, "-W", "error", *flags, str(file)],
        cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`stepspan`, as in a shell with no other variables of ours."""
    inherited = {name: value for name, value in os.environ.items() if not is_ours(name)}
    return subprocess.run(
        [sys.executable, "-m", "stepspan", *map(str, arguments)],
        env={**inherited, **variables}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def sessions(directory: Path) -> dict[str, Path]:
    """`service.instance.id` without the job -> the session's path: {"0": …, "0-worker1": …}."""
    found = {}
    for session in find_sessions(directory):
        header = events(session.path)[0]
        instance = header["resource"]["service.instance.id"].removeprefix(header["job_id"] + "-")
        assert instance not in found, f"two sessions share the series of {instance}"
        found[instance] = session.path
    return found


def path_of(run: Run) -> Path:
    return Path(run.stats()["journal"])


def events(where: Run | Path, *tags: str) -> list[Event]:
    """The lines of a session, the header first; with `tags` only those. `seq` has no hole."""
    found = lines(where if isinstance(where, Path) else path_of(where))
    assert_ordered(found)
    return [event for event in found if not tags or event["tag"] in tags]


def outline(where: Run | Path) -> list[str]:
    """A journal as an indented text: what lies in what, numbers, statuses and metrics."""
    text, depth = [], {0: -1}
    begun: dict[int, Event] = {}
    for event in events(where):
        tag, _, edge = event["tag"].partition("_")
        title = " ".join(str(event[name]) for name in ("name", "epoch", "step") if name in event and tag != "run")
        if tag == "step" and edge == "begin":
            title = str(event["step"]) + ("" if event["split"] == "train" else f" {event['split']}")
        if edge == "begin":
            depth[event["seq"]] = depth[event["parent"]] + 1
            begun[event["seq"]] = event
            text.append("  " * depth[event["seq"]] + f"{tag} {title}".rstrip())
        elif edge == "end":
            status = f" {event['status']}" if "status" in event else ""
            text.append("  " * depth[event["begin"]] + f"end {tag}{status}")
        elif tag == "metrics":
            values = " ".join(f"{key}={value}" for key, value in event["metrics"].items())
            text.append(f"{event['split']} {event.get('step', '-')}: {values}")
        elif tag in {"event", "error"}:
            text.append("  " * (depth[event["parent"]] + 1) + f"{tag} {event.get('name') or event['type']}")
        elif tag != "header":
            text.append(tag)
    return text


def status_of(path: Path) -> str | None:
    """How a session was closed; None: it was not."""
    closed = read_closed(path)
    return closed.status if closed else None


def all_spans(path: Path) -> list[Span]:
    """What the mapping makes of a closed session's scopes, in the order of their ends."""
    session = read_session(session_of(path))
    assert session.closed is not None
    assert session.events == events(path)
    return cast("list[Span]", session.records("traces"))


def spans(where: Run | Path) -> dict[str, Span]:
    """The same by name and number of step or epoch; of several, the last."""
    found = all_spans(where if isinstance(where, Path) else path_of(where))
    numbers = [span.attributes.get("step", span.attributes.get("epoch", "")) for span in found]
    return {f"{span.name} {number}".rstrip(): span for span, number in zip(found, numbers, strict=True)}
