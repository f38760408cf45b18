"""Beside other OpenTelemetry: a user's spans lie under the step they were made in, and the user's sampler decides."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.runs import all_spans, events, python, sessions, spans
from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stepspan.mapping.records import Span
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


class Tracing:
    """A user's tracer with a provider of its own, not the global one."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self._provider.get_tracer("user")

    def span(self, name: str) -> None:
        self.tracer.start_span(name).end()

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}


@pytest.fixture
def user() -> Tracing:
    return Tracing()


def is_child(child: ReadableSpan, parent: Span) -> bool:
    """By the ids that the mapping gives the parent."""
    return child.parent is not None and (child.parent.trace_id, child.parent.span_id) == (
        int.from_bytes(parent.trace_id, "big"),
        int.from_bytes(parent.span_id, "big"),
    )


def test_a_span_lies_under_the_scope_it_was_made_in(start: Start, user: Tracing) -> None:
    with start(job_id="job", rank=1, world_size=2) as run:
        user.span("in training.run")
        with run.span("setup"):
            user.span("in setup")
            with run.span("inner"):
                user.span("in inner")
        with run.epoch(2):
            user.span("in training.epoch 2")
            with run.span("checkpoint"):
                user.span("in checkpoint")
            for _ in run.steps("a", start=7):
                user.span("in training.step 7")
                with run.span("forward"), run.span("attention"):
                    user.span("in attention")
            user.span("in training.epoch 2 again")
        with run.step(8, split="val"), run.span("forward val"):
            user.span("in forward val")
        with run.step(3), run.span("lap"):
            user.span("in lap")
        with run.step(3):
            user.span("in training.step 3")  # the second of this number
    ours = spans(run)
    assert len(user.spans) == 11
    for name, child in user.spans.items():
        assert is_child(child, ours[name.removeprefix("in ").removesuffix(" again")]), name
        assert child.parent is not None
        assert child.parent.is_remote
        assert child.parent.trace_flags.sampled
    laps = [event.get("lap", 0) for event in events(run, "step_begin") if event["step"] == 3]
    assert laps == [1, 2]  # a step outside every epoch after one inside is a new lap as well


def test_seeds_change_no_ids(start: Start, user: Tracing) -> None:
    found = []
    for rank in (0, 1):
        random.seed(42)
        with start(job_id="job", rank=rank, world_size=2, local_rank=0) as run, run.step(0):
            user.span(f"rank {rank}")
        found.append(spans(run)["training.step 0"])
        assert is_child(user.spans[f"rank {rank}"], found[-1])
    assert found[0].span_id != found[1].span_id


def test_all_ranks_meet_in_one_trace_a_step(start: Start, tmp_path: Path) -> None:
    for rank in (1, 0):
        found = python(
            """
            import random, stepspan
            random.seed(42)
            with stepspan.start_run() as run:
                for _ in range(2):  # a loop that repeats its numbers is another lap
                    for step in range(2):
                        with run.step(step), run.span("forward"):
                            pass
                    with run.step(0, split="val"):
                        pass
            """,
            tmp_path,
            STEPSPAN_JOB_ID="job",
            STEPSPAN_WORLD_SIZE="2",
            STEPSPAN_RANK=str(rank),
        )
        assert found.returncode == 0, found.stderr
    root, other = ([s for s in all_spans(path) if s.name == "training.step"] for path in two_ranks(tmp_path))
    assert len(root) == len(other) == 6
    assert len({span.trace_id for span in root}) == 6
    assert [span.trace_id for span in other] == [span.trace_id for span in root]
    assert [span.parent_id for span in root] == [None] * 6
    assert [span.parent_id for span in other] == [span.span_id for span in root]
    everything = [span.span_id for path in two_ranks(tmp_path) for span in all_spans(path)]
    assert len(set(everything)) == len(everything) == 2 * (6 + 4 + 1)


def two_ranks(directory: Path) -> list[Path]:
    found = sessions(directory / "stepspan-runs")
    return [found["0"], found["1"]]


def test_ids_that_nobody_asks_for_are_not_computed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as run:
        asked: list[Any] = []
        monkeypatch.setattr(type(run.step(0).owner), "ids", lambda *args: asked.append(args))
        for _ in run.steps("abc"):
            run.log_metrics({"x": 1.0})
    assert asked == []


def test_the_context_is_what_it_was_before(start: Start, user: Tracing) -> None:
    with user.tracer.start_as_current_span("outside") as outside:
        before = context.get_current()
        with start() as run:
            for _ in run.steps("ab"):
                with run.span("s"):
                    assert trace.get_current_span() is not outside
        assert context.get_current() is before
        assert trace.get_current_span() is outside


def test_the_context_is_restored_after_an_exception_and_a_break(start: Start) -> None:
    outside = trace.get_current_span()
    with start() as run:
        inside = trace.get_current_span()
        assert inside is not outside
        with pytest.raises(ValueError, match="x"), run.step(0), run.span("s"):
            raise ValueError("x")
        assert trace.get_current_span() is inside
        for _ in run.steps("ab"):
            break
        run.log_metrics({"after": 1.0})
        assert trace.get_current_span() is inside
    assert trace.get_current_span() is outside


def test_the_context_is_restored_in_whatever_order_runs_end(start: Start, user: Tracing) -> None:
    before = context.get_current()
    first, second, third = (start(job_id=name) for name in ("first", "second", "third"))
    second.close()
    first.close()
    user.span("in the third")
    third.close()
    assert context.get_current() == before
    run = spans(third)["training.run"]
    assert is_child(user.spans["in the third"], run)


def test_a_users_span_around_a_step_comes_back(start: Start, user: Tracing) -> None:
    with start() as run, user.tracer.start_as_current_span("loop") as loop:
        with run.step(0):
            user.span("in step")
        assert trace.get_current_span() is loop
        user.span("in loop")
    ours = spans(run)
    assert is_child(user.spans["in step"], ours["training.step 0"])
    assert is_child(user.spans["loop"], ours["training.run"])
    inner, outer = user.spans["in loop"].parent, user.spans["loop"].context
    assert inner is not None
    assert outer is not None
    assert inner.span_id == outer.span_id


def test_a_step_that_another_task_ends(start: Start, user: Tracing, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        step = run.step(0)
        step.__enter__()
        await asyncio.create_task(leave(step))
        with run.step(1):
            user.span("in step 1")

    async def leave(step: Any) -> None:
        with user.tracer.start_as_current_span("mine") as mine:
            step.__exit__(None, None, None)
            assert trace.get_current_span() is mine

    with start() as run:
        asyncio.run(main())
        user.span("after")
    assert caplog.records == []
    assert run.stats()["warnings"] == {}
    assert is_child(user.spans["in step 1"], spans(run)["training.step 1"])
    assert is_child(user.spans["after"], spans(run)["training.run"])


def test_tasks_and_threads_that_carry_the_context_over(start: Start, user: Tracing) -> None:
    async def task(number: int) -> None:
        with run.step(number, split=f"task{number}"):
            await asyncio.sleep(0)
            user.span(f"in training.step {number}")

    async def main() -> None:
        await asyncio.gather(*(task(number) for number in range(3)))

    with start() as run:
        asyncio.run(main())
        with run.step(10):
            carried = context.get_current()
            thread = threading.Thread(target=lambda: (context.attach(carried), user.span("in training.step 10")))  # type: ignore[func-returns-value]
            thread.start()
            thread.join()
    ours = spans(run)
    for name, child in user.spans.items():
        assert is_child(child, ours[name.removeprefix("in ")]), name


def test_a_context_that_outlives_its_step_still_leads_to_it(start: Start, user: Tracing) -> None:
    with start() as run:
        with run.step(0), run.span("save"):
            carried = context.get_current()
        user.tracer.start_span("late", context=carried).end()
    assert is_child(user.spans["late"], spans(run)["save"])


def test_a_forked_worker_works_under_the_parents_step(start: Start, tmp_path: Path) -> None:
    found = python(
        """
        import os, stepspan
        from opentelemetry import trace
        with stepspan.start_run(job_id="job") as run, run.step(0), run.span("load"):
            reading, writing = os.pipe()
            child = os.fork()
            mine = trace.get_current_span().get_span_context()
            if child == 0:
                os.write(writing, b"%d %d" % (mine.trace_id, mine.span_id))
                with run.step(5) as step:
                    own = trace.get_current_span().get_span_context()
                    run.log_event("ids", trace_id=f"{own.trace_id:032x}", span_id=f"{own.span_id:016x}")
                run.close()
                os._exit(0)
            os.waitpid(child, 0)
            assert os.read(reading, 100) == b"%d %d" % (mine.trace_id, mine.span_id)
        """,
        tmp_path,
    )
    assert found.returncode == 0, found.stderr
    worker = sessions(tmp_path / "stepspan-runs")["0-worker1"]
    step, (told,) = spans(worker)["training.step 5"], events(worker, "event")
    assert told["attributes"] == {"trace_id": step.trace_id.hex(), "span_id": step.span_id.hex()}


# the user's own sampler

SAMPLED = """
import stepspan
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, DEFAULT_ON, ParentBased, ParentBasedTraceIdRatio

exporter = InMemorySpanExporter()
provider = TracerProvider(sampler={sampler})
provider.add_span_processor(SimpleSpanProcessor(exporter))
if {installed}:
    trace.set_tracer_provider(provider)
tracer = provider.get_tracer("user")
with stepspan.start_run() as run:
    for step in run.steps(range(2000)):
        tracer.start_span("user").end()
print(len(exporter.get_finished_spans()), sum(span.parent is None for span in exporter.get_finished_spans()))
"""
RATIO = "ParentBasedTraceIdRatio(0.1)"


@pytest.mark.parametrize(
    ("installed", "sampler", "propagate", "kept"),
    [
        pytest.param(True, RATIO, "", range(120, 290), id="global provider: its sampler decides"),
        pytest.param(True, RATIO, "1", range(2000, 2001), id="global provider and propagate: all follow the step"),
        pytest.param(False, RATIO, "", range(2000, 2001), id="own provider: all follow the step"),
        pytest.param(False, RATIO, "0", range(120, 290), id="own provider and no propagation"),
        pytest.param(
            True, "ALWAYS_ON", "", range(2000, 2001), id="global provider that keeps all: all follow the step"
        ),
        pytest.param(True, "DEFAULT_ON", "", range(2000, 2001), id="global provider by default: all follow the step"),
    ],
)
def test_who_decides_on_sampling(
    start: Start, tmp_path: Path, installed: bool, sampler: str, propagate: str, kept: range
) -> None:
    found = python(SAMPLED.format(installed=installed, sampler=sampler), tmp_path, STEPSPAN_PROPAGATE=propagate)
    assert found.returncode == 0, found.stderr
    count, roots = map(int, found.stdout.split())
    assert count in kept
    assert roots == (0 if count == 2000 else count)


def test_opentelemetry_that_is_imported_later_is_seen(start: Start, tmp_path: Path) -> None:
    found = python(
        """
        import stepspan
        with stepspan.start_run() as run:
            with run.step(0):
                from opentelemetry import trace
                assert not trace.get_current_span().get_span_context().is_valid
            with run.step(1):
                assert trace.get_current_span().get_span_context().is_valid
            assert not trace.get_current_span().get_span_context().is_valid
        """,
        tmp_path,
    )
    assert found.returncode == 0, found.stderr


def test_a_scope_answers_as_a_span(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start() as run, run.step(0):
        span = trace.get_current_span()
        span.set_attribute("a", 1)
        span.add_event("e")
        span.record_exception(ValueError())
        span.end()
        assert not span.is_recording()
        assert f"{span.get_span_context().span_id:016x}" in repr(span)
        assert span.get_span_context().is_valid
    assert caplog.records == []
