"""The mapping is a pure function of the journal: whatever the batches and the restarts, the same records.

Sessions are generated, damage and all; they are mapped in one go, and in pieces that end between two milliseconds, with
a new mapper for each piece that knows nothing but the state of the one before, read back from JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
from harness.events_of import MS, SECOND, START, SessionEvents, key_of, mapper, restored
from hypothesis import given, settings
from hypothesis import strategies as st

from stepspan.mapping import point_buffer
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import SIGNALS, PastPoint, SdkRecord, Signal

GAPS = st.sampled_from([1e-9, 3e-7, 3e-4, 0.001, 0.005, 0.05, 1.0, 11.0, 3700.0])
VALUES = st.sampled_from([0.0, 1.5, -2.0, "NaN", "Infinity", 3])
KEYS = st.sampled_from(["loss", "train/loss", "val/loss", "a.b", "a_b", "step.time", "🔥"])
SPLITS = st.sampled_from(["train", "val"])
DELTAS = [
    MappingOptions(temporality="delta"),
    MappingOptions(temporality="lowmemory", histogram_aggregation="explicit_bucket_histogram"),
]
SIGNALS_AND_OPTIONS = [(signal, DEFAULT_OPTIONS) for signal in SIGNALS] + [("metrics", given) for given in DELTAS]


def counter(value: int) -> dict[str, Any]:
    """A metric of another instrumentation in OTLP JSON."""
    point = {"startTimeUnixNano": str(START), "timeUnixNano": str(START + SECOND + value), "asInt": str(value)}
    return {"name": "app.tokens", "sum": {"aggregationTemporality": 2, "isMonotonic": True, "dataPoints": [point]}}


MOVES = st.one_of(
    st.tuples(
        st.just("metrics"),
        st.fixed_dictionaries(
            {"metrics": st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), "split": SPLITS},
            optional={
                "step": st.integers(0, 5),
                "own_step": st.integers(0, 5),
                "steps": st.just({"val": [7, 2]}),
                "time": st.sampled_from([START - SECOND, START + MS, START + SECOND]),
                "attributes": st.just({"tier": "a"}),
            },
        ),
    ),
    st.tuples(st.just("step_begin"), st.fixed_dictionaries({"step": st.integers(0, 9), "split": SPLITS})),
    st.tuples(
        st.just("span_begin"),
        st.fixed_dictionaries(
            {"name": st.sampled_from(["forward", "sync"])},
            optional={"collective": st.just(True), "cuda": st.just(True)},
        ),
    ),
    st.tuples(st.just("epoch_begin"), st.fixed_dictionaries({"epoch": st.integers(0, 2)})),
    st.tuples(
        st.just("end"),
        st.fixed_dictionaries(
            {"which": st.integers(0, 3)}, optional={"status": st.just("error"), "data_wait": st.just(0.25)}
        ),
    ),
    st.tuples(
        st.just("device_time"),
        st.fixed_dictionaries({"begin": st.integers(0, 3), "seconds": st.sampled_from([0.25, 0.001, None])}),
    ),
    st.tuples(
        st.just("hyperparams"), st.fixed_dictionaries({"params": st.fixed_dictionaries({"lr": st.integers(0, 2)})})
    ),
    st.tuples(st.just("artifact"), st.just({"name": "a", "path": "p", "kind": "file"})),
    st.tuples(st.just("event"), st.just({"name": "milestone", "attributes": {"n": 1}})),
    st.tuples(st.just("error"), st.just({"type": "ValueError", "message": "m", "stack": "s", "attributes": {}})),
    st.tuples(st.just("gap"), st.just({"dropped": 3, "why": "full"})),
    st.tuples(
        st.just("dropped"),
        st.fixed_dictionaries(
            {"key": st.sampled_from(["loss", "f1"]), "count": st.integers(1, 4), "why": st.just("text")}
        ),
    ),
    st.tuples(
        st.just("sample"),
        st.fixed_dictionaries(
            {"values": st.lists(st.tuples(st.just("system.disk.io"), st.integers(0, 9)), max_size=2)}
        ),
    ),
    st.tuples(
        st.just("otel"),
        st.fixed_dictionaries(
            {"signal": st.just("metrics"), "scope": st.just({"name": "app"}), "record": st.integers(0, 9).map(counter)}
        ),
    ),
    st.tuples(st.just("clock"), st.sampled_from([{"forward": 3600 * SECOND}, {"forward": 1}, {"ahead": 2 * SECOND}])),
)


@st.composite
def sessions(draw: st.DrawFn) -> SessionEvents:
    s = SessionEvents(rank=draw(st.integers(0, 1)), world_size=2)
    s.header["not_before"] = START + draw(st.sampled_from([0, MS + 1, SECOND, 20 * SECOND]))
    opened, timed = [("run", s.run())], list[int]()
    for after, (tag, fields) in draw(st.lists(st.tuples(GAPS, MOVES), max_size=40)):
        if tag == "end":
            if opened:
                kind, begin = opened.pop(-1 - min(fields["which"], len(opened) - 1))
                rest = {name: value for name, value in fields.items() if name != "which"}
                s.emit(f"{kind}_end", after, begin=begin, **{"status": "completed"} if kind == "run" else rest)
        elif tag.endswith("_begin"):
            seq = s.emit(tag, after, parent=opened[-1][1] if opened else 0, **fields)
            opened.append((tag.removesuffix("_begin"), seq))
            timed += [seq] * ("cuda" in fields)
        elif tag == "device_time":  # of a span that has ended, or has not, or has been timed before
            s.emit(tag, after, **{**fields, "begin": timed[-1 - min(fields["begin"], len(timed) - 1)] if timed else 1})
        elif tag in {"event", "error"}:
            s.emit(tag, after, parent=opened[-1][1] if opened else 0, **fields)
        else:
            s.emit(tag, after, **fields)
    damaged = draw(st.sets(st.integers(2, 60), max_size=3))
    s.events = [event for event in s.events if event["seq"] not in damaged]
    return s


def plain(signal: str, records: list[Any]) -> list[Any]:
    """Records so that they can be compared: NaN by its text, a series by what it is."""
    if signal == "metrics":
        return [
            repr(point)
            if type(point) is SdkRecord
            else (type(point) is PastPoint, *key_of(point[0]), point[0].unit, point[0].kind, point[1], repr(point[2]))
            for point in records
        ]
    return [repr(record) for record in records]


def same(signal: str, found: list[Any], expected: list[Any]) -> bool:
    """Whether they are the same, in the same order; of points, in the same order within each series.

    Points of the past, of which a receiver may know nothing, come in any order.
    """
    if signal == "metrics":
        of_series = lambda point: repr(point if type(point) is str or point[0] else point[:-2])  # noqa: E731
        found, expected = (sorted(points, key=of_series) for points in (found, expected))
    return found == expected


def between_milliseconds(s: SessionEvents) -> list[int]:
    times = [event["ts"] // MS for event in s.events]
    return [place for place in range(1, len(times)) if times[place] != times[place - 1]]


@pytest.fixture(scope="module", autouse=True)
def crowded() -> Iterator[None]:
    """Rows run no more than a few milliseconds ahead, so that some of every kind wait, and some are thinned."""
    with patch.object(point_buffer, "MAX_LEAD_MS", 3):
        yield


@pytest.mark.parametrize(("signal", "wants"), SIGNALS_AND_OPTIONS)
@settings(deadline=None, max_examples=150)
@given(data=st.data(), s=sessions())
def test_any_batches_with_restarts_between_them_give_the_same_records(
    signal: Signal, wants: MappingOptions, data: Any, s: Any
) -> None:
    cuts = data.draw(st.sets(st.sampled_from(between_milliseconds(s) or [len(s.events)])))
    at_once = mapper(signal, s.header, wants)
    expected = [*at_once.map(s.events), *at_once.finish(s.closed("interrupted"))]
    fold, found, begin = mapper(signal, s.header, wants), [], 0
    for end in [*sorted(cuts), len(s.events)]:
        fold = restored(signal, s.header, fold.state(), wants)
        found += plain(signal, fold.map(s.events[begin:end]))
        begin = end
    again = restored(signal, s.header, fold.state(), wants)
    found += plain(signal, again.finish(s.closed("interrupted")))
    assert same(signal, found, plain(signal, expected))
    assert (again.filtered, again.thinned) == (at_once.filtered, at_once.thinned)


@pytest.mark.parametrize(("signal", "wants"), SIGNALS_AND_OPTIONS)
@settings(deadline=None, max_examples=40)
@given(s=sessions())
def test_a_restart_at_every_millisecond_gives_the_same_records(signal: Signal, wants: MappingOptions, s: Any) -> None:
    at_once = mapper(signal, s.header, wants)
    expected = [*at_once.map(s.events), *at_once.release()]
    fold, found, begin = mapper(signal, s.header, wants), [], 0
    for end in [*between_milliseconds(s), len(s.events)]:
        fold = restored(signal, s.header, fold.state(), wants)
        found += plain(signal, fold.map(s.events[begin:end]))
        begin = end
    found += plain(signal, restored(signal, s.header, fold.state(), wants).release())
    assert same(signal, found, plain(signal, expected))


@settings(deadline=None, max_examples=150)
@given(s=sessions())
def test_each_series_is_in_time_order_with_one_point_a_millisecond(s: Any) -> None:
    seen: dict[Any, int] = {}
    for point in s.records("metrics", status="interrupted"):
        if type(point) not in (PastPoint, SdkRecord):
            series, millisecond = key_of(point[0]), point[1] // MS
            assert millisecond > seen.get(series, s.header["not_before"] // MS - 1), series
            seen[series] = millisecond


@settings(deadline=None, max_examples=100)
@given(s=sessions())
def test_spans_have_ids_of_their_own_and_parents_of_their_trace(s: Any) -> None:
    spans = s.records("traces", status="interrupted")
    known = {span.span_id: span for span in spans}
    laps = [(span.trace_id, span.span_id) for span in spans if span.name != "training.step"]
    assert len(set(laps)) == len(laps)
    for span in spans:
        assert span.start <= span.end
        if span.parent_id in known:
            assert known[span.parent_id].trace_id == span.trace_id


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_long_fast_run_with_a_restart_at_each_batch_is_the_same(signal: Signal) -> None:
    s = SessionEvents()
    run = s.run()
    for number in range(4000):
        step = s.emit("step_begin", 0.0005, parent=run, step=number, split="train")
        if number % 7 == 0:
            span = s.emit("span_begin", 0.0001, parent=step, name="sync", collective=True)
            s.emit("span_end", 0.002, begin=span)
        s.metrics({"loss": 1.0 / (number + 1), "lr": 0.5}, 0.0001, step=number)
        s.emit("step_end", 0.0013 + (number % 11) * 0.0005, begin=step, data_wait=0.0001)
    assert s.ts > s.events[0]["ts"] + 15 * SECOND
    at_once = mapper(signal, s.header)
    expected = plain(signal, [*at_once.map(s.events), *at_once.finish(s.closed())])
    cuts = between_milliseconds(s)[::997]
    fold, found, begin = mapper(signal, s.header), [], 0
    for end in [*cuts, len(s.events)]:
        fold = restored(signal, s.header, fold.state())
        found += plain(signal, fold.map(s.events[begin:end]))
        begin = end
    assert same(signal, found + plain(signal, fold.finish(s.closed())), expected)
    assert (fold.filtered, fold.thinned) == (at_once.filtered, at_once.thinned)
