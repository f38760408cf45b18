"""Loops that somebody holds, and loops side by side: when their steps end, and what lies in them."""

from __future__ import annotations

import contextvars
import gc
import itertools
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
from harness import runs

from stepspan.run import Run
from stepspan.testing import FixedClock, Recording, recorded_run

T = TypeVar("T")
VALIDATION_S = 10.0
"""How long an evaluation takes; of a step each thing takes a millisecond."""


class Bar(Generic[T]):
    """A progress bar: as tqdm's it holds what it goes over, and its iterator is a generator."""

    def __init__(self, batches: Iterable[T]) -> None:
        self.batches = batches
        self.total = operator.length_hint(batches)

    def __iter__(self) -> Iterator[T]:
        yield from self.batches


def _bar(steps: Iterable[int]) -> Iterable[int]:
    return Bar(steps)


def _enumerated(steps: Iterable[int]) -> Iterable[int]:
    pairs = enumerate(steps)
    held.append(pairs)
    return (batch for _, batch in pairs)


def _iterator(steps: Iterable[int]) -> Iterable[int]:
    return iter(steps)


def _sliced(steps: Iterable[int]) -> Iterable[int]:
    return itertools.islice(steps, 1000)


def _generator(steps: Iterable[int]) -> Iterable[int]:
    return (batch for batch in steps)


held: list[Any] = []
HOLDERS = [_bar, _enumerated, _iterator, _sliced, _generator]


@pytest.fixture(params=HOLDERS, ids=lambda holder: holder.__name__.strip("_"))
def hold(request: pytest.FixtureRequest) -> Iterator[Callable[[Iterable[int]], Iterable[int]]]:
    def hold(steps: Iterable[int]) -> Iterable[int]:
        held.append(request.param(steps))
        return held[-1]  # type: ignore[no-any-return]

    yield hold
    held.clear()


def durations(recording: Recording, split: str = "train") -> list[float]:
    """Of the steps of a split in ms, as their spans have them; the metric says the same."""
    spans = [span for span in recording.spans("training.step") if span.attributes["split"] == split]
    found = [round((span.end - span.start) / 1e6, 3) for span in spans]
    times = recording.values("training.step.time", split=split)
    assert sorted(round(1000 * time, 3) for time in times) == sorted(found)
    return found


def inside(recording: Recording, name: str) -> list[Any]:
    """The step in whose trace each span of that name lies; None where it lies in none."""
    of_trace = {span.trace_id: span.attributes["step"] for span in recording.spans("training.step")}
    return [of_trace.get(span.trace_id) for span in recording.spans(name)]


def train(run: Run, batches: Iterable[int], last: int = 2) -> None:
    for batch in batches:
        run.log_metrics({"loss": 1.0})
        if batch == last:
            break


def test_a_step_ends_where_its_loop_was_left_whoever_holds_it(hold: Callable[..., Iterable[int]]) -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        for epoch in range(2):
            with run.epoch(epoch):
                train(run, hold(run.steps(range(9))))
                clock.advance(VALIDATION_S)
                run.log_metrics({"val/accuracy": 0.5})
    assert len(durations(recording)) == 6
    assert max(durations(recording)) < 10
    assert recording.values("training.step.number", split="val") == [2, 5]
    assert not any("status" in event for event in recording.events("step_end"))


def test_and_without_epochs_where_the_next_loop_shows_it(hold: Callable[..., Iterable[int]]) -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        for _ in range(3):
            train(run, hold(run.steps(range(9))))
            clock.advance(VALIDATION_S)
            run.log_metrics({"val/accuracy": 0.5})
    begun = recording.events("step_begin")
    (run_begin,) = recording.events("run_begin")
    assert {event["parent"] for event in begun} == {run_begin["seq"]}
    assert [event["step"] for event in begun] == list(range(9))
    assert max(durations(recording)) < 10


@pytest.mark.parametrize(
    "follows",
    [
        lambda run: run.log_metrics({"accuracy": 0.5}, split="test"),
        lambda run: run.log_artifact("model", "model.pt", kind="checkpoint"),
        lambda run: run.log_hyperparams({"best": 1}),
        lambda run: run.log_event("best"),
        lambda run: run.span("validation").__enter__().__exit__(None, None, None),
        lambda run: run.step(0, split="val").__enter__().__exit__(None, None, None),
        lambda run: list(run.steps([1, 2], split="eval")),
        lambda run: run.epoch(5).__enter__().__exit__(None, None, None),
        lambda run: list(run.steps([1, 2])),
        lambda run: run.step(70).__enter__().__exit__(None, None, None),
    ],
    ids=["value", "artifact", "hyperparams", "event", "span", "step", "loop", "epoch", "next loop", "next step"],
)
def test_whatever_follows_that_is_not_a_steps(follows: Callable[[Run], Any]) -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        loop = enumerate(run.steps(range(9)))
        for number, _ in loop:
            run.log_metrics({"loss": 1.0})
            if number == 2:
                break
        clock.advance(VALIDATION_S)
        follows(run)
        clock.advance(VALIDATION_S)
    (left,) = (span for span in recording.spans("training.step") if span.attributes["step"] == 2)
    assert (left.end - left.start) // 1_000_000 < 10
    del loop  # held until here


def test_a_held_step_in_which_nothing_was_recorded_says_nothing_of_the_throughput() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        loop = enumerate(run.steps(range(9), samples=8))
        for number, _ in loop:
            clock.advance(1)
            if number == 2:
                break
        clock.advance(VALIDATION_S)
        run.log_metrics({"val/accuracy": 0.5})
    assert [round(duration, -2) for duration in durations(recording)] == [1000, 1000, 0]
    assert [round(value) for value in recording.values("training.throughput")] == [8, 8]


def test_a_validation_within_a_step_is_a_part_of_it(hold: Callable[..., Iterable[int]]) -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        for batch in hold(run.steps(range(3))):
            run.log_metrics({"loss": 1.0})
            with run.span("validation"):
                for _ in run.steps(range(2), split="val"):
                    run.log_metrics({"loss": 2.0})
            run.log_metrics({"val/accuracy": 0.5})
            clock.advance(VALIDATION_S)
            run.log_artifact("model", f"{batch}.pt", kind="checkpoint")
            with run.span("optimizer"):
                pass
    assert [duration // 1000 for duration in durations(recording)] == [10, 10, 10]
    assert inside(recording, "validation") == inside(recording, "optimizer") == [0, 1, 2]
    assert recording.values("training.step.number", split="val") == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(durations(recording, "val")) == 6


def test_a_held_validation_that_was_left_within_a_step(hold: Callable[..., Iterable[int]]) -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        for _ in hold(run.steps(range(3))):
            run.log_metrics({"loss": 1.0})
            for batch in hold(run.steps(range(9), split="val")):
                run.log_metrics({"loss": 2.0})
                if batch == 1:
                    break
            clock.advance(VALIDATION_S)
    assert max(durations(recording, "val")) < 10
    assert [duration // 1000 for duration in durations(recording)] == [10, 10, 10]
    assert recording.values("training.step.number", split="val") == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("wrap", [iter, Bar, enumerate], ids=["iterator", "bar", "enumerate"])
def test_a_checkpoint_in_the_last_step_is_a_part_of_it(wrap: Callable[[Any], Any]) -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        for number, _ in enumerate(wrap(run.steps(range(9)))):
            run.log_metrics({"loss": 1.0})
            if number == 2:
                clock.advance(VALIDATION_S)
                run.log_artifact("model", "model.pt", kind="checkpoint")
                run.log_event("saved")
                break
        clock.advance(VALIDATION_S)
        run.log_metrics({"val/accuracy": 0.5})
    assert [duration // 1000 for duration in durations(recording)] == [0, 0, 10]


def test_a_loop_that_was_left_is_not_longer_for_being_let_go_of_late() -> None:
    clock = FixedClock()

    def epoch(run: Run) -> None:
        loop = enumerate(run.steps(range(9)))
        for number, _ in loop:
            run.log_metrics({"loss": 1.0})
            if number == 2:
                break
        clock.advance(VALIDATION_S)
        run.log_metrics({"val/accuracy": 0.5})
        clock.advance(VALIDATION_S)

    with recorded_run(clock=clock) as recording:
        for _ in range(2):
            epoch(recording.run)  # lets go of its loop as it returns
        for _ in range(2):
            loop = enumerate(recording.run.steps(range(9)))  # and this of the one before
            for number, _ in loop:
                recording.run.log_metrics({"loss": 1.0})
                if number == 2:
                    break
            clock.advance(VALIDATION_S)
            recording.run.log_metrics({"val/accuracy": 0.5})
    assert len(durations(recording)) == 12
    assert max(durations(recording)) < 10


def test_nested_loops_are_nested_whatever_their_splits() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        for inner in ("train", "critic"):
            for _ in run.steps(range(2)):
                for _ in run.steps(range(2), split=inner):
                    run.log_metrics({"inner": 1.0})
                    clock.advance(1)
                run.log_metrics({"outer": 1.0})
    steps = [
        (span.attributes["split"], round((span.end - span.start) / 1e9)) for span in recording.spans("training.step")
    ]
    assert steps == [*(("train", 1), ("train", 1), ("train", 2)) * 2, *(("critic", 1), ("critic", 1), ("train", 2)) * 2]
    assert {series.attributes["split"] for series, _, _ in recording.points("training.inner")} == {"train", "critic"}


def test_a_step_that_is_entered_ends_where_it_is_left() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording, recording.run.step(0):
        recording.run.log_metrics({"loss": 1.0})
        recording.run.log_metrics({"val/accuracy": 0.5})
        clock.advance(VALIDATION_S)
    assert durations(recording)[0] > 1000 * VALIDATION_S


def test_accumulated_batches_are_one_step_also_when_taken_in_pieces() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        steps = run.steps(range(6), accumulate=3)
        for _ in range(3):
            for _ in itertools.islice(steps, 2):
                run.log_metrics({"loss": 1.0})
        loop = enumerate(run.steps(range(5), accumulate=2))
        for number, _ in loop:
            if number == 1:
                break
        clock.advance(VALIDATION_S)
        run.log_metrics({"val/accuracy": 0.5})
    assert [event["step"] for event in recording.events("metrics")[:6]] == [0, 0, 0, 1, 1, 1]
    assert len(recording.events("step_begin")) == 3
    assert max(durations(recording)) < 20


def test_a_loop_in_pieces_ends_its_steps_with_each_piece() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run, seen = recording.run, []
        steps = run.steps(range(6))
        for _ in range(3):
            for batch in itertools.islice(steps, 2):
                seen.append(batch)
                run.log_metrics({"loss": 1.0})
            clock.advance(VALIDATION_S)
            run.log_metrics({"accuracy": 0.5})
    assert seen == list(range(6))
    assert max(durations(recording)) < 10


def test_an_iterator_made_for_each_batch_ends_no_step() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        steps = run.steps(range(6))
        for _ in range(3):
            next(iter(steps))
            clock.advance(1)
            run.log_metrics({"loss": 1.0})
    assert [round(duration, -3) for duration in durations(recording)] == [1000, 1000, 1000]
    assert recording.values("training.step.number") == [0, 1, 2]


def test_a_loop_that_its_own_body_exhausts() -> None:
    with recorded_run() as recording:
        steps = recording.run.steps(range(4))
        seen = [(batch, list(steps)) for batch in steps]
        recording.run.log_metrics({"after": 1.0})
    assert seen == [(0, [1, 2, 3])]
    assert [span.attributes["step"] for span in recording.spans("training.step")] == [0, 1, 2, 3]


def test_a_held_loop_that_an_exception_left_has_failed() -> None:
    def epoch(run: Run, loop: Iterable[tuple[int, int]]) -> None:
        with run.epoch(0):
            for number, _ in loop:
                run.log_metrics({"loss": 1.0})
                if number == 1:
                    raise ValueError("diverged")

    with recorded_run() as recording:
        loop = enumerate(recording.run.steps(range(9)))
        with pytest.raises(ValueError, match="diverged"):
            epoch(recording.run, loop)
        recording.run.log_metrics({"val/accuracy": 0.5})
    assert [event.get("status") for event in recording.events("step_end")] == [None, "error"]
    assert len(recording.logs("exception")) == 1


def test_what_fails_after_a_held_loop_has_not_failed_in_its_step() -> None:
    def epoch(run: Run, loop: Iterable[tuple[int, int]]) -> None:
        with run.epoch(0):
            for number, _ in loop:
                run.log_metrics({"loss": 1.0})
                if number == 1:
                    break
            run.log_metrics({"val/accuracy": 0.5})
            raise ValueError("plot")

    with recorded_run() as recording:
        loop = enumerate(recording.run.steps(range(9)))
        with pytest.raises(ValueError, match="plot"):
            epoch(recording.run, loop)
    assert [event.get("status") for event in recording.events("step_end")] == [None, None]


def test_a_run_that_ends_in_a_loop_ends_its_step_there() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        for _ in recording.run.steps(range(3)):
            recording.run.log_metrics({"loss": 1.0})
            clock.advance(1)
            recording.run.close()
            break
    assert [round(duration, -3) for duration in durations(recording)] == [1000]


def test_a_loop_that_was_left_in_another_context_of_the_thread() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run, context = recording.run, contextvars.Context()
        context.run(train, run, run.steps(range(9)))
        clock.advance(VALIDATION_S)
        contextvars.Context().run(run.span("validation").__enter__)
        assert len(recording.events("step_end")) == 3
    assert max(durations(recording)) < 10


def test_a_loop_whose_holder_is_collected_late() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        cycle: list[Any] = [enumerate(run.steps(range(9)))]
        cycle.append(cycle)
        next(cycle[0])
        run.log_metrics({"loss": 1.0})
        clock.advance(VALIDATION_S)
        run.log_metrics({"val/accuracy": 0.5})
        del cycle
        gc.collect()
        run.log_metrics({"val/f1": 0.5})
    assert durations(recording)[0] < 10


def test_a_loop_that_was_abandoned_in_another_thread() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run = recording.run
        thread = threading.Thread(target=train, args=(run, iter(run.steps(range(9), split="worker"))))
        thread.start()
        thread.join()
        clock.advance(VALIDATION_S)
        run.log_metrics({"loss": 1.0})
        for _ in run.steps(range(2)):
            pass
    assert max(durations(recording, "worker")) < 10
    assert {series.attributes["split"] for series, _, _ in recording.points("training.loss")} == {"train", "worker"}


# side by side


def side_by_side(recording: Recording) -> list[tuple[str, int, str]]:
    """(split, step, what the step lies in) of each step."""
    begun = {event["seq"]: event for event in recording.events() if event["tag"].endswith("_begin")}
    return [
        (event["split"], event["step"], begun[event["parent"]]["tag"].removesuffix("_begin"))
        for event in recording.events("step_begin")
    ]


@pytest.mark.parametrize("wrap", [iter, Bar, enumerate], ids=["zip", "bar", "enumerate"])
def test_two_loops_in_a_zip_are_side_by_side(wrap: Callable[[Any], Any]) -> None:
    with recorded_run() as recording:
        run = recording.run
        with run.epoch(0):
            pairs = zip(run.steps(range(3), split="labeled"), run.steps(range(3), split="unlabeled"), strict=True)
            for _ in wrap(pairs):
                run.log_metrics({"loss": 1.0, "val/probe": 1.0})
                run.log_metrics({"loss": 2.0}, split="unlabeled")
                with run.span("forward"):
                    run.log_metrics({"inner": 1.0})
            run.log_metrics({"val/accuracy": 0.5})
    expected = [(split, number, "epoch") for number in range(3) for split in ("labeled", "unlabeled")]
    assert side_by_side(recording) == expected
    assert recording.values("training.loss", split="labeled") == [1.0] * 3
    assert recording.values("training.loss", split="unlabeled") == [2.0] * 3
    assert {series.attributes["split"] for series, _, _ in recording.points("training.inner")} == {"labeled"}
    assert recording.values("training.step.number", split="unlabeled") == [0, 1, 2]
    spans = [(span.attributes["split"], span.attributes["step"]) for span in recording.spans("training.step")]
    assert sorted(spans) == [(split, number) for split in ("labeled", "unlabeled") for number in range(3)]


@pytest.mark.parametrize("split", ["unlabeled", "val"])
def test_loops_in_a_zip_may_each_have_a_bar_and_any_split(split: str) -> None:
    with recorded_run() as recording:
        run = recording.run
        bars = [Bar(run.steps(range(3), split="labeled")), Bar(Bar(run.steps(range(3), split=split)))]
        for left, _ in zip(*bars, strict=True):
            run.log_metrics({"loss": left})
    assert side_by_side(recording) == [(each, number, "run") for number in range(3) for each in ("labeled", split)]
    assert recording.values("training.loss", split="labeled") == [0, 1, 2]


@pytest.mark.parametrize("split", ["critic", "val"])
def test_a_loop_that_was_made_before_is_nested_all_the_same(split: str) -> None:
    with recorded_run() as recording:
        run = recording.run
        bar = Bar(run.steps(range(2), split=split))

        def inner() -> None:
            for batch in bar:
                run.log_metrics({"loss": batch})

        for number in run.steps(range(2)):
            if number:
                inner()
            else:
                for batch in bar:
                    run.log_metrics({"loss": batch})
    assert [event["split"] for event in recording.events("metrics")] == [split] * 4
    assert side_by_side(recording) == [
        *(("train", 0, "run"), (split, 0, "step"), (split, 1, "step")),
        *(("train", 1, "run"), (split, 2, "step"), (split, 3, "step")),
    ]


def test_three_loops_and_one_that_ends_first() -> None:
    with recorded_run() as recording:
        run = recording.run
        loops = [run.steps(range(length), split=split) for length, split in ((4, "a"), (2, "b"), (4, "c"))]
        for _ in zip(*loops, strict=False):
            run.log_metrics({"x": 1.0})
        for _ in run.steps(range(1)):
            run.log_metrics({"x": 1.0})
    assert side_by_side(recording) == [
        *((split, number, "run") for number in range(2) for split in "abc"),
        ("a", 2, "run"),
        ("train", 0, "run"),
    ]
    assert len(recording.events("step_end")) == 8
    assert {series.attributes["split"] for series, _, _ in recording.points("training.x")} == {"a", "train"}


def test_a_loop_that_is_pulled_by_hand_beside_another() -> None:
    with recorded_run() as recording:
        run = recording.run
        unlabeled = iter(run.steps(range(9), split="unlabeled"))
        for _ in run.steps(range(2), split="labeled"):
            run.log_metrics({"loss": 1.0})
            next(unlabeled)
            run.log_metrics({"loss": 1.0})
        for _ in unlabeled:
            run.log_metrics({"rest": 1.0})
            break
    assert side_by_side(recording)[:4] == [
        *((split, number, "run") for number in range(2) for split in ("labeled", "unlabeled"))
    ]
    assert recording.values("training.loss", split="labeled") == [1.0] * 4
    assert recording.values("training.rest", split="unlabeled") == [1.0]


def test_an_evaluation_that_is_pulled_by_hand_lies_in_the_step() -> None:
    with recorded_run() as recording:
        run = recording.run
        validation = iter(run.steps(range(9), split="val"))
        for _ in run.steps(range(2)):
            run.log_metrics({"loss": 1.0})
            next(validation)
            run.log_metrics({"loss": 2.0})
    assert side_by_side(recording) == [("train", 0, "run"), ("val", 0, "step"), ("train", 1, "run"), ("val", 1, "step")]
    assert recording.values("training.loss", split="val") == [2.0, 2.0]


def test_a_loader_that_makes_steps_itself_lies_around_those_of_its_batches() -> None:
    with recorded_run() as recording:
        run = recording.run

        def loader() -> Iterator[int]:
            for shard in run.steps(range(2), split="shard"):
                yield from range(shard * 2, shard * 2 + 2)

        for batch in run.steps(loader()):
            run.log_metrics({"batch": batch})
    assert side_by_side(recording) == [
        ("shard", 0, "run"),
        *(("train", number, "step") for number in (0, 1)),
        ("shard", 1, "run"),
        *(("train", number, "step") for number in (2, 3)),
    ]
    assert recording.values("training.batch", split="train") == [0, 1, 2, 3]


def test_an_exception_fails_the_steps_on_both_sides_once() -> None:
    def epoch(run: Run) -> None:
        with run.epoch(0):
            for _ in zip(run.steps("ab", split="labeled"), run.steps("ab", split="unlabeled"), strict=True):
                raise ValueError("diverged")

    with recorded_run() as recording:
        with pytest.raises(ValueError, match="diverged"):
            epoch(recording.run)
        recording.run.log_metrics({"after": 1.0})
    assert [event["status"] for event in recording.events("step_end")] == ["error", "error"]
    assert len(recording.logs("exception")) == 1


def test_a_held_zip_ends_on_both_sides_where_it_was_left() -> None:
    clock = FixedClock()
    with recorded_run(clock=clock) as recording:
        run, pairs = recording.run, []
        for _ in range(2):
            pairs.append(zip(run.steps(range(9), split="a"), run.steps(range(9), split="b"), strict=True))
            for left, _ in pairs[-1]:
                run.log_metrics({"loss": 1.0})
                if left == 1:
                    break
            clock.advance(VALIDATION_S)
            run.log_metrics({"val/accuracy": 0.5})
    assert len(durations(recording, "a")) == len(durations(recording, "b")) == 4
    assert max(durations(recording, "a") + durations(recording, "b")) < 20


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('run.log_metrics({"val/loss": 1.0}); sys.exit(0)', "interrupted"),  # within the step, as a SIGTERM handler may
        ("break", "completed"),
    ],
    ids=["exit", "break"],
)
def test_the_end_of_a_program_that_holds_its_loop(tmp_path: Path, body: str, status: str) -> None:
    code = f"""
        import sys, stepspan
        run = stepspan.start_run(job_id="job")
        held = enumerate(run.steps(range(9)))
        for _ in held:
            run.log_metrics({{"loss": 1.0}})
            {body}
    """
    done = runs.python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    (session,) = runs.sessions(tmp_path / "stepspan-runs").values()
    assert runs.status_of(session) == status


def test_threads_that_go_side_by_side_end_each_step_once() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with recorded_run() as recording:
            run = recording.run

            def work(number: int) -> None:
                for epoch in range(12):
                    loops = (run.steps(range(9), split=f"{side}{number}") for side in "ab")
                    for left, _ in zip(*loops, strict=True):
                        run.log_metrics({"loss": 1.0})
                        with run.span("forward"):
                            run.log_metrics({"val/loss": 1.0})
                        if left == epoch % 8:
                            break
                    run.log_hyperparams({"epoch": epoch})

            threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    begun, ended = recording.events("step_begin"), recording.events("step_end")
    assert len(begun) == 5 * sum(2 * (epoch % 8 + 1) for epoch in range(12))
    assert sorted(event["seq"] for event in begun) == sorted(event["begin"] for event in ended)
