"""What begins and ends: how epochs, steps and spans nest, and how each way of leaving them is recorded."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.runs import events, outline

from stepspan import JsonlExporter
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


def test_scopes_lie_in_the_innermost_open_one(start: Start) -> None:
    with start() as run, run.epoch(0):
        with run.step(7):
            with run.span("forward"), run.span("attention"):
                run.log_event("overflow")
            run.log_metrics({"loss": 1.5})
        with run.span("checkpoint"):
            pass
    assert outline(run) == [
        "run",
        "  epoch 0",
        "    step 7",
        "      span forward",
        "        span attention",
        "          event overflow",
        "        end span",
        "      end span",
        "train 7: loss=1.5",
        "    end step",
        "    span checkpoint",
        "    end span",
        "  end epoch",
        "end run completed",
    ]


def test_a_loop_makes_one_step_a_batch(start: Start) -> None:
    with start() as run:
        for batch in run.steps("ab"):
            run.log_metrics({"code": ord(batch)})
    assert outline(run) == [
        "run",
        "  step 0",
        "train 0: code=97.0",
        "  end step",
        "  step 1",
        "train 1: code=98.0",
        "  end step",
        "end run completed",
    ]


def _break(run: Run) -> None:
    for batch in run.steps("abc"):
        if batch == "b":
            break


def _return(run: Run) -> None:
    def epoch() -> None:
        for batch in run.steps("abc"):
            if batch == "b":
                return

    epoch()


def _break_held(run: Run) -> None:
    held = run.steps("abc")
    for batch in held:
        if batch == "b":
            break


def _exhaust(run: Run) -> None:
    for _ in run.steps("ab"):
        pass


@pytest.mark.parametrize("leave", [_break, _return, _break_held, _exhaust])
def test_a_loop_left_in_peace_ends_its_step(start: Start, leave: Callable[[Run], None]) -> None:
    with start() as run, run.epoch(0):
        leave(run)
    assert outline(run) == [
        "run",
        "  epoch 0",
        "    step 0",
        "    end step",
        "    step 1",
        "    end step",
        "  end epoch",
        "end run completed",
    ]


def test_after_a_break_nothing_is_in_the_step(start: Start) -> None:
    with start() as run:
        for _ in run.steps("abc"):
            break
        run.log_metrics({"accuracy": 0.5})
        with run.span("validation"):
            pass
    assert outline(run) == [
        "run",
        "  step 0",
        "  end step",
        "train 0: accuracy=0.5",
        "  span validation",
        "  end span",
        "end run completed",
    ]


def test_a_step_ends_when_its_loop_was_left_and_not_when_that_was_noticed(start: Start, tmp_path: Path) -> None:
    now = [1_000_000_000]
    with start(exporters=[JsonlExporter(tmp_path / "runs", clock=lambda: now[0])]) as run:
        for _ in run.steps("abc"):
            now[0] += 5_000_000_000
            break
        now[0] += 60_000_000_000
        run.log_metrics({"accuracy": 0.5})
    (begin,), (end,) = events(run, "step_begin"), events(run, "step_end")
    assert end["ended"] == 6_000_000_000
    assert end["ts"] >= 66_000_000_000
    assert 1_000_000_000 <= begin["ts"] < 1_000_001_000


@pytest.mark.parametrize("hold", [False, True], ids=["loop", "held iterator"])
@pytest.mark.parametrize("failure", [ValueError("nan"), SystemExit(3), SystemExit("no GPU"), MemoryError()], ids=repr)
def test_an_exception_fails_all_it_passes_and_is_recorded_once(
    start: Start, failure: BaseException, hold: bool
) -> None:
    def train(run: Run) -> None:
        with run.epoch(0):
            batches = run.steps("ab") if hold else None
            for _ in batches or run.steps("ab"):
                with run.span("forward"):
                    raise failure

    run = start()
    with pytest.raises(type(failure)) as caught, run:
        train(run)
    assert caught.value is failure
    assert outline(run) == [
        "run",
        "  epoch 0",
        "    step 0",
        "      span forward",
        f"        error {type(failure).__name__}",
        "      end span error",
        "    end step error",
        "  end epoch error",
        "end run failed",
    ]
    assert run.closed


def test_an_exception_in_the_body_of_a_loop_belongs_to_the_step(start: Start) -> None:
    def train() -> None:
        for _ in run.steps("ab"):
            raise ValueError("diverged")

    run = start()
    with pytest.raises(ValueError, match="diverged"), run:
        train()
    assert outline(run) == [
        "run",
        "  step 0",
        "    error ValueError",
        "  end step error",
        "end run failed",
    ]


def test_an_exception_that_was_caught_fails_only_what_it_passed(start: Start) -> None:
    with start() as run:
        for batch in run.steps("ab"):
            try:
                with run.span("load"):
                    raise OSError(batch)
            except OSError:
                continue
    assert outline(run) == [
        "run",
        *("  step 0", "    span load", "      error OSError", "    end span error", "  end step"),
        *("  step 1", "    span load", "      error OSError", "    end span error", "  end step"),
        "end run completed",
    ]


def test_an_exception_that_the_user_has_logged_is_not_recorded_again(start: Start) -> None:
    def train() -> None:
        try:
            raise ValueError("x")
        except ValueError as error:
            run.log_error(error, batch=12)
            raise

    run = start()
    with pytest.raises(ValueError, match="x"), run, run.step(0):
        train()
    assert [event["attributes"] for event in events(run, "error")] == [{"batch": 12}]


def test_an_exception_that_comes_back_in_the_next_run_is_recorded_there_too(start: Start) -> None:
    failure = ValueError("the same object")
    for _ in range(2):
        run = start(job_id="job")
        with pytest.raises(ValueError, match="same"), run:
            raise failure
        assert len(events(run, "error")) == 1


class _Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError(name)


def test_an_exception_that_fails_when_it_is_looked_at_is_recorded(start: Start) -> None:
    run = start()
    with pytest.raises(_Hostile), run, run.step(0):
        raise _Hostile
    assert [event["status"] for event in events(run, "step_end", "run_end")] == ["error", "failed"]
    error = events(run, "error")[0]
    assert error["type"].endswith("_Hostile")
    assert "RuntimeError" in error["message"]
    assert "raise _Hostile" in error["stack"]


def test_a_deep_stack_trace_keeps_its_end(start: Start) -> None:
    def fall(depth: int) -> None:
        return fall(depth - 1) if depth else 1 / 0  # type: ignore[return-value]

    failure: Exception = ValueError("start")
    for _ in range(60):
        try:
            try:
                raise failure
            except Exception:
                fall(30)
        except Exception as error:
            failure = error
    with start() as run:
        run.log_error(failure)
    stack = events(run, "error")[0]["stack"]
    assert stack.endswith("ZeroDivisionError: division by zero\n")
    assert len(stack) <= (64 << 10) + 1


# steps()


def test_a_loader_that_raises_fails_what_is_around_its_loop(start: Start) -> None:
    def loader() -> Iterator[int]:
        yield 0
        raise OSError("corrupt shard")

    run = start()
    with pytest.raises(OSError, match="corrupt"), run, run.epoch(0):
        for _ in run.steps(loader()):
            pass
    assert outline(run) == [
        "run",
        "  epoch 0",
        "    step 0",
        "    end step",
        "    error OSError",
        "  end epoch error",
        "end run failed",
    ]


def test_a_loader_that_raises_within_a_step_fails_the_step(start: Start) -> None:
    def loader() -> Iterator[int]:
        yield 0
        raise OSError("corrupt shard")

    run = start()
    with pytest.raises(OSError, match="corrupt"), run:
        for _ in run.steps(loader(), accumulate=2):
            pass
    assert outline(run) == ["run", "  step 0", "    error OSError", "  end step error", "end run failed"]


def test_what_is_no_iterable_raises_as_in_any_loop(start: Start) -> None:
    with start() as run, pytest.raises(TypeError, match="not iterable"):
        for _ in run.steps(5):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize(
    ("batches", "accumulate", "expected"),
    [(4, 2, [[0, 1], [2, 3]]), (5, 2, [[0, 1], [2, 3], [4]]), (3, 1, [[0], [1], [2]]), (2, 8, [[0, 1]]), (0, 2, [])],
)
def test_accumulate_batches_make_a_step(start: Start, batches: int, accumulate: int, expected: list[list[int]]) -> None:
    with start() as run:
        for batch in run.steps(range(batches), accumulate=accumulate):
            run.log_metrics({"batch": batch})
    found: dict[int, list[int]] = {}
    for event in events(run, "metrics"):
        found.setdefault(event["step"], []).append(int(event["metrics"]["batch"]))
    assert list(found.values()) == expected
    assert len(events(run, "step_begin")) == len(events(run, "step_end")) == len(expected)


def test_the_number_goes_on_across_epochs_and_each_split_has_its_own(start: Start) -> None:
    with start() as run:
        for epoch in range(2):
            with run.epoch(epoch):
                for _ in run.steps("abc"):
                    pass
                for _ in run.steps("ab", split="val"):
                    pass
    begun = events(run, "step_begin")
    assert [(e["epoch"], e["split"], e["step"]) for e in begun] == [
        *((0, "train", 0), (0, "train", 1), (0, "train", 2), (0, "val", 0), (0, "val", 1)),
        *((1, "train", 3), (1, "train", 4), (1, "train", 5), (1, "val", 2), (1, "val", 3)),
    ]
    assert not any("lap" in event for event in begun)


def test_start_sets_the_number_to_go_on_from(start: Start) -> None:
    with start() as run:
        for _ in run.steps("ab", start=1000):
            pass
        for _ in run.steps("a"):
            pass
        with run.step(5000):
            pass
        for _ in run.steps("a"):
            pass
    assert [event["step"] for event in events(run, "step_begin")] == [1000, 1001, 1002, 5000, 5001]


def test_steps_that_begin_again_are_another_lap(start: Start) -> None:
    with start() as run:
        for number in (0, 1, 0, 1, 2, 2):
            with run.step(number):
                pass
    begun = events(run, "step_begin")
    assert [(event["step"], event.get("lap", 0)) for event in begun] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (2, 2)]


def test_steps_in_an_epoch_that_comes_again_are_another_lap(start: Start) -> None:
    with start() as run:
        for epoch in (0, 1, 0):
            with run.epoch(epoch), run.step(0):
                pass
    assert [event.get("lap", 0) for event in events(run, "step_begin")] == [0, 0, 1]


def test_a_validation_loop_inside_a_training_step(start: Start) -> None:
    with start() as run:
        for _ in run.steps("a"):
            for _ in run.steps("b", split="val"):
                run.log_metrics({"loss": 1.0})
            run.log_metrics({"loss": 2.0})
    assert outline(run) == [
        "run",
        "  step 0",
        "    step 0 val",
        "val 0: loss=1.0",
        "    end step",
        "train 0: loss=2.0",
        "  end step",
        "end run completed",
    ]


def test_steps_has_the_length_of_what_it_goes_over(start: Start) -> None:
    with start() as run:
        assert len(run.steps([1, 2, 3])) == 3
        with pytest.raises(TypeError):
            len(run.steps(iter("ab")))
        assert list(run.steps(iter("ab"))) == ["a", "b"]


def test_a_loop_over_an_exhausted_one_begins_again(start: Start) -> None:
    with start() as run:
        steps = run.steps("ab")
        assert [list(steps), list(steps)] == [["a", "b"], ["a", "b"]]
        assert next(steps, None) is None  # but an iterator that has ended stays at its end
    assert [event["step"] for event in events(run, "step_begin")] == [0, 1, 2, 3]


def test_an_iterator_taken_in_pieces_goes_on(start: Start) -> None:
    with start() as run:
        steps = iter(run.steps("abcd"))
        assert next(steps) == "a"
        assert list(steps) == ["b", "c", "d"]
    assert len(events(run, "step_end")) == 4


def test_a_step_knows_how_long_it_waited_for_its_data(start: Start, tmp_path: Path) -> None:
    now = [0]

    def loader() -> Iterator[int]:
        for batch in range(5):
            now[0] += (batch + 1) * 1_000_000_000
            yield batch

    with start(exporters=[JsonlExporter(tmp_path / "runs", clock=lambda: now[0])]) as run:
        held = run.steps(loader(), accumulate=2)
        for _ in held:
            now[0] += 60_000_000_000
    assert [event["data_wait"] for event in events(run, "step_end")] == [3.0, 7.0, 5.0]
    durations = [
        end["ts"] - begin["ts"]
        for begin, end in zip(*(events(run, f"step_{e}") for e in ("begin", "end")), strict=True)
    ]
    assert [round(duration / 1e9) for duration in durations] == [122, 124, 60]


@pytest.mark.parametrize("held", [False, True], ids=["loop", "held iterator"])
def test_a_step_that_was_left_knows_what_it_waited(start: Start, held: bool) -> None:
    with start() as run:
        batches = run.steps("ab") if held else None
        for _ in batches or run.steps("ab"):
            break
    assert events(run, "step_end")[0]["data_wait"] >= 0.0


def test_an_iterator_collected_by_another_thread(start: Start) -> None:
    run = start()
    box = [run.steps("ab")]
    next(box[0])
    thread = threading.Thread(target=lambda: (box.clear(), gc.collect()))  # type: ignore[func-returns-value]
    thread.start()
    thread.join()
    run.log_metrics({"after": 1})
    run.close()
    assert outline(run) == ["run", "  step 0", "  end step", "train 0: after=1.0", "end run completed"]


# threads, tasks, generators


def test_a_thread_without_a_scope_of_its_own_is_in_the_main_one(start: Start) -> None:
    def log() -> None:
        run.log_metrics({"queue": 3})
        with run.span("prefetch"):
            pass

    with start() as run, run.step(4):
        thread = threading.Thread(target=log)
        thread.start()
        thread.join()
    assert outline(run) == [
        "run",
        "  step 4",
        "train 4: queue=3.0",
        "    span prefetch",
        "    end span",
        "  end step",
        "end run completed",
    ]


def test_each_thread_has_its_own_current_step(start: Start) -> None:
    threads = 4
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        for step in range(20):
            barrier.wait()
            with run.step(step, split=f"worker{number}"):
                barrier.wait()
                run.log_metrics({"me": number})

    with start() as run:
        pool = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
    logged = events(run, "metrics")
    assert len(logged) == threads * 20
    assert {(e["split"], int(e["metrics"]["me"])) for e in logged} == {(f"worker{n}", n) for n in range(threads)}
    assert {event["step"] for event in logged} == set(range(20))
    ends = events(run, "step_end")
    assert sorted(e["begin"] for e in ends) == sorted(e["seq"] for e in events(run, "step_begin"))
    assert run.stats()["warnings"] == {}


def test_each_task_has_its_own_current_step(start: Start) -> None:
    async def work(number: int) -> None:
        for step in range(3):
            with run.step(step, split=f"task{number}"):
                await asyncio.sleep(0)
                run.log_metrics({"me": number})
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(3)))

    with start() as run:
        asyncio.run(main())
        run.log_metrics({"after": 1})
    found = [(e["split"], e.get("step"), *e["metrics"].values()) for e in events(run, "metrics")]
    assert sorted(found[:-1]) == [(f"task{n}", step, float(n)) for n in range(3) for step in range(3)]
    assert found[-1] == ("train", 2, 1.0)  # the step of the split that stepped last
    (whole,) = events(run, "run_begin")
    assert {event["parent"] for event in events(run, "step_begin")} == {whole["seq"]}


def test_a_step_that_another_task_ends(start: Start) -> None:
    async def main() -> None:
        step = run.step(0)
        step.__enter__()
        await asyncio.create_task(leave(step))
        run.log_metrics({"after": 1})

    async def leave(step: Any) -> None:
        step.__exit__(None, None, None)

    with start() as run:
        asyncio.run(main())
    assert outline(run) == ["run", "  step 0", "  end step", "train 0: after=1.0", "end run completed"]


def test_a_span_around_a_generator_ends_with_it(start: Start) -> None:
    def shards() -> Iterator[int]:
        with run.span("shard"):
            yield 1
            yield 2

    with start() as run, run.step(0):
        for _ in shards():
            break
    assert outline(run) == ["run", "  step 0", "    span shard", "    end span", "  end step", "end run completed"]
    assert run.stats()["warnings"] == {}


def test_a_scope_that_is_never_left_ends_with_what_is_around_it(start: Start) -> None:
    with start() as run:
        with run.epoch(0):
            run.step(0).__enter__()
            run.span("forgotten").__enter__()
        run.log_metrics({"after": 1})
    assert outline(run) == [
        "run",
        "  epoch 0",
        "    step 0",
        "      span forgotten",
        "      end span",
        "    end step",
        "  end epoch",
        "train 0: after=1.0",
        "end run completed",
    ]


def test_leaving_twice_ends_once(start: Start) -> None:
    with start() as run:
        step = run.step(0)
        step.__exit__(None, None, None)
        with step:
            pass
        step.__exit__(None, None, None)
    assert outline(run) == ["run", "  step 0", "  end step", "end run completed"]


def test_a_collective_span_says_so(start: Start) -> None:
    with start() as run, run.step(0), run.span("all_reduce", collective=True, bytes=1024):
        pass
    (span,) = events(run, "span_begin")
    assert span["collective"] is True
    assert span["attributes"] == {"bytes": 1024}
