"""A run inside other objects, which are copied and pickled; and a scope around a function, as its decorator."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.runs import events, outline, path_of

import stepspan
from stepspan.integrations.logging import StepspanHandler
from stepspan.integrations.torch import StepWaits
from stepspan.run import DISABLED, Run
from stepspan.stores import JSONLLogStore, StepspanLogStore
from stepspan.testing import recorded_run

start = runs.start
Start = Callable[..., Run]


class Model:
    def __init__(self, run: Any) -> None:
        self.run, self.weights = run, [1.0]


def pickled(it: Any) -> Any:
    return pickle.loads(pickle.dumps(it))


COPIES = [copy.copy, copy.deepcopy, pickled]


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_what_holds_a_run_can_be_copied(start: Start, copied: Callable[[Any], Any]) -> None:
    with start() as run:
        model = copied(Model(run))
        assert model.run is run
        assert model.weights == [1.0]
        assert copied(Model(run.as_log_store())).run.run is run
        assert copied(Model(run.log_metrics)).run.__self__ is run


def test_what_was_pickled_has_the_run_of_whoever_unpickles_it(start: Start) -> None:
    with start(job_id="first") as run:
        found = pickle.dumps(Model(run))
    assert pickle.loads(found).run is DISABLED
    with start(job_id="second") as run:
        assert pickle.loads(found).run is run
    assert pickled(Model(DISABLED)).run is DISABLED


def log_from_worker(model: Model) -> bool:
    model.run.log_metrics({"loss": 1.0})
    return model.run is stepspan.current_run() is DISABLED


def test_a_spawned_worker_takes_a_model_with_a_run(start: Start) -> None:
    with start() as run, multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(log_from_worker, (Model(run),))


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_copies_of_scopes_and_steps_record_nothing(start: Start, copied: Callable[[Any], Any]) -> None:
    with start() as run:
        with copied(run.epoch(0)), copied(run.step(3, samples=2)) as step, copied(run.span("forward", kind="x")):
            assert (step.step, step.split, step.samples) == (3, "train", 2)
        with copied(run.span("backward", cuda=True)):
            pass
        open_step = run.step(4)
        with open_step:
            copied(open_step).__exit__(None, None, None)
        batches = copied(run.steps([1, 2], accumulate=2, samples=lambda batch: 1))
        assert (len(batches), list(batches), list(batches)) == (2, [1, 2], [1, 2])
    assert outline(run) == ["run", "  step 4", "  end step", "end run completed"]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_what_is_made_to_be_held_can_be_copied(start: Start, tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    with start() as run:
        made: list[Any] = [
            StepspanHandler(20, run),
            StepWaits(run),
            stepspan.JsonlExporter(tmp_path / "journals"),
            stepspan.OtlpExporter("http://127.0.0.1:1"),
            stepspan.MemoryExporter(),
            stepspan.Telemetry("train", tmp_path / "telemetry.jsonl"),
            stepspan.Telemetry("train", backend="otel"),
            JSONLLogStore(log_dir=tmp_path / "store"),
        ]
        for each in made:
            assert type(copied(each)) is type(each)
        handler = copied(made[0])
        assert (handler.level, handler._run) == (20, run)
        assert made[2].journal.directory == copied(made[2]).journal.directory


def test_a_store_that_is_a_run_is_copied_with_it(start: Start) -> None:
    store = StepspanLogStore(job_id="job")
    assert copy.deepcopy(store).run is store.run
    store.close()


# decorators


def test_each_call_of_a_decorated_function_is_a_span_of_its_own() -> None:
    with recorded_run() as recording:
        run = recording.run

        @run.span("forward", kind="x")
        def forward(n: int) -> int:
            """Counts down."""
            return forward(n - 1) + 1 if n else 0

        class Net:
            @run.span("method")
            def method(self, x: int) -> tuple[Any, int]:
                return self, x

            @run.span("static")
            @staticmethod
            def static(x: int) -> int:
                return x

            @run.span("class")
            @classmethod
            def kind(cls) -> type:
                return cls

        assert (forward(2), forward.__doc__, forward.__name__) == (2, "Counts down.", "forward")
        net = Net()
        assert (net.method(3), net.static(4), net.kind()) == ((net, 3), 4, Net)
        with run.step(0):
            forward(0)
    found = [span for span in recording.spans() if span.name == "forward"]
    assert [span.attributes["kind"] for span in found] == ["x"] * 4
    inner, middle, outer, in_step = found
    assert (inner.parent_id, middle.parent_id) == (middle.span_id, outer.span_id)
    assert in_step.trace_id == recording.spans("training.step")[0].trace_id
    assert {span.name for span in recording.spans()} >= {"method", "static", "class"}
    assert len({span.span_id for span in recording.spans()}) == len(recording.spans())


def test_a_decorated_function_that_raises_fails_its_span(start: Start) -> None:
    with start() as run:

        @run.span("forward")
        def forward() -> None:
            raise ValueError("nan")

        for _ in range(2):
            with pytest.raises(ValueError, match="nan"):
                forward()
    assert outline(run)[1:4] == ["  span forward", "    error ValueError", "  end span error"]
    assert len(events(run, "error")) == 2


def test_threads_call_a_decorated_function_at_once() -> None:
    with recorded_run() as recording:
        barrier = threading.Barrier(4, timeout=20)
        called = recording.run.span("forward")(barrier.wait)
        threads = [threading.Thread(target=called) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({span.span_id for span in recording.spans("forward")}) == 4


def test_coroutines_and_generators_are_timed_to_their_end() -> None:
    with recorded_run() as recording:
        run = recording.run

        @run.span("load")
        async def load() -> int:
            with run.span("inside"):
                await asyncio.sleep(0)
            return 5

        @run.span("batches")
        def batches() -> Iterator[Any]:
            yield (yield 1)

        @run.span("stream")
        async def stream() -> AsyncIterator[int]:
            yield 1
            yield 2

        async def main() -> list[int]:
            return [await load(), *[item async for item in stream()]]

        assert asyncio.run(main()) == [5, 1, 2]
        each = batches()
        with run.span("before"):
            assert next(each) == 1
        with run.step(0):
            assert each.send("sent") == "sent"  # type: ignore[attr-defined]
        assert list(each) == []
        next(batches())
    found = {span.name: span for span in recording.spans()}
    assert found["inside"].parent_id == found["load"].span_id
    assert found["batches"].end > found["training.step"].end
    assert found["training.step"].trace_id != found["batches"].trace_id, "what takes the items does not lie in it"
    assert [span.error for span in recording.spans("batches")] == [None, None], "also the one that was left"


def test_other_scopes_are_decorators_too(start: Start) -> None:
    with start() as run:

        @run.epoch(3)
        @run.step(5, split="val")
        def validate() -> None:
            run.log_metrics({"loss": 1.0})

        validate()
        validate()
        assert run.span("none")(5) == 5  # type: ignore[type-var]
    lap = ["  epoch 3", "    step 5 val", "val 5: loss=1.0", "    end step", "  end epoch"]
    assert outline(run) == ["run", *lap, *lap, "end run completed"]
    assert [event.get("lap", 0) for event in events(run, "step_begin")] == [0, 1]


def test_without_a_name_a_span_has_the_functions() -> None:
    with recorded_run() as recording:

        @recording.run.span
        def forward(n: int) -> int:
            return n

        assert forward(3) == 3
    (span,) = [span for span in recording.spans() if span.name.endswith("forward")]
    assert span.attributes == {}


def test_a_scope_is_short_in_print_and_in_hyperparameters(start: Start) -> None:
    with start() as run:
        step, span = run.step(3), run.span("forward")
        run.log_hyperparams({"step": step})
        assert (repr(step), repr(span), repr(run.epoch(0))) == (
            "<step 3, not open>", "<span 'forward', not open>", "<epoch 0, not open>"
        )  # fmt: skip
        assert [name for name in dir(step) if not name.startswith("_")] == [
            "epoch", "samples", "split", "step", "tokens"
        ]  # fmt: skip
    assert events(run, "hyperparams")[0]["params"] == {"step": "<step 3, not open>"}


def test_what_cannot_be_decorated_is_left_as_it_is(start: Start) -> None:
    class Uncanny:
        __call__ = None

        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

    function: Any = Uncanny()
    with start() as run:
        assert run.span("forward")(function) is function


def test_a_decorator_of_a_run_that_records_nothing_calls_the_function() -> None:
    assert DISABLED.span("forward")(len)("ab") == 2


# what a person asks the run


def test_a_run_says_what_it_is(start: Start, tmp_path: Path) -> None:
    with start(job_id="job", rank=1, world_size=4, directory=tmp_path / "runs") as run:
        assert (run.job_id, run.directory) == ("job", tmp_path / "runs")
        assert repr(run) == f"<Run 'job': rank 1 of 4, open, {path_of(run)}>"
    assert "closed" in repr(run)
    assert run.trace_id == runs.spans(run)["training.run"].trace_id.hex()


def test_a_run_that_records_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPSPAN_DIRECTORY", "elsewhere")
    assert repr(DISABLED) == "<Run: records nothing>"
    assert (DISABLED.trace_id, DISABLED.directory) == ("", Path("elsewhere"))
    assert DISABLED.job_id == DISABLED.identity.job_id


def test_completion_shows_what_is_for_users(start: Start) -> None:
    with start() as run:
        shown = [name for name in dir(run) if not name.startswith("_")]
    assert shown == [
        "as_log_store", "close", "closed", "directory", "epoch", "flush", "identity", "job_id", "log_artifact",
        "log_error", "log_event", "log_hyperparams", "log_metrics", "log_scalar", "set_total_steps", "span", "stats",
        "step", "steps", "trace_id",
    ]  # fmt: skip
