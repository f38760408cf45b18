"""Nothing that a user hands over can stop their training, nor the run: every parameter of every public method is tried.

Methods and parameters are found by introspection, so that a new one is tried as well. What is handed over raises at
whatever is done with it; it may say that it is a mapping, a text or a number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.runs import events, path_of, status_of

import stepspan
from stepspan import Telemetry
from stepspan.callbacks import MemoryLogger, RunCallback, TelemetryLogger
from stepspan.run import Run
from stepspan.stores import RunLogStore

start = runs.start
Start = Callable[..., Run]


class Hostility(Exception):
    """What a hostile object raises."""

    def __str__(self) -> str:
        raise Hostility

    __repr__ = __str__


def fail(*_: object, **__: object) -> Any:
    raise Hostility


OPERATIONS = [
    *(
        "__str__",
        "__repr__",
        "__bytes__",
        "__format__",
        "__fspath__",
        "__hash__",
        "__eq__",
        "__ne__",
        "__lt__",
        "__le__",
    ),
    *(
        "__gt__",
        "__ge__",
        "__iter__",
        "__next__",
        "__len__",
        "__length_hint__",
        "__contains__",
        "__getitem__",
        "__bool__",
    ),
    *("__float__", "__int__", "__index__", "__complex__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__"),
    *("__rmul__", "__neg__", "__abs__", "__round__", "__array__", "__call__", "__enter__", "__exit__"),
    *("keys", "items", "values", "get", "item", "tolist", "detach", "as_integer_ratio"),
]


def hostile(*bases: type, **able: Any) -> type:
    """A class that fails at every operation but those given."""
    return type("Hostile", bases, {**dict.fromkeys(OPERATIONS, fail), **able})


class Attributes:
    """Has no attribute that can be looked at, not even its class."""

    __getattribute__ = fail


class Uncanny(Attributes):
    """The same, and can be called."""

    __call__ = fail


KINDS: dict[str, Callable[[], Any]] = {
    "an object": hostile(),
    "an object whose attributes raise": Attributes,
    "a callable whose attributes raise": Uncanny,
    "a mapping": hostile(Mapping),
    "a mapping of hostile values": lambda: {"a": hostile()(), "b": Attributes()},
    "a mapping with a hostile key": lambda: {hostile(__hash__=object.__hash__)(): 1.0},
    "a dict": lambda: hostile(dict)(a=1.0),
    "a list": lambda: hostile(list)([1]),
    "a list of hostile values": lambda: [hostile()()],
    "a text": lambda: hostile(str)("x"),
    "a number": lambda: hostile(int)(1),
    "a float": lambda: hostile(float)(0.5),
    "an exception": lambda: hostile(RuntimeError)("x"),
    "a class": hostile,
    "a function": lambda: fail,
}
VALID = {"str": "x", "int": 1, "float": 1.0, "Mapping": {"a": 1.0}, "Iterable": [1], "BaseException": ValueError("x")}
"""For a parameter that has no default while another one's turn it is, by the beginning of its annotation."""
CONTEXT = ("__enter__", "__exit__")
FORKING = {"after_fork"}
"""Called by the interpreter in a child, with a number of its own."""


def parameters(kind: type) -> list[Any]:
    """(method, parameter), for each that a user may call."""
    methods = inspect.getmembers(kind, inspect.isfunction)
    return [
        pytest.param(name, parameter.name, id=f"{kind.__name__}.{name}({parameter.name})")
        for name, method in methods
        if (name in CONTEXT or not name.startswith("_")) and name not in FORKING
        for parameter in list(inspect.signature(method).parameters.values())[1:]
    ]


def call(method: Callable[..., Any], hostile: str, value: Any) -> Any:
    """Call it with a hostile value for one parameter, and where there is no default with a valid one for the others."""
    given: list[Any] = []
    named: dict[str, Any] = {}
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            if name == hostile:
                named["anything"] = value
        elif name == hostile or parameter.default is parameter.empty:
            annotation = str(parameter.annotation)
            found = value if name == hostile else next((v for k, v in VALID.items() if annotation.startswith(k)), None)
            if parameter.kind is parameter.KEYWORD_ONLY or (named and parameter.kind is not parameter.POSITIONAL_ONLY):
                named[name] = found
            elif parameter.default is parameter.empty or parameter.kind is parameter.POSITIONAL_ONLY:
                given.append(found)
            else:
                named[name] = found
    return method(*given, **named)


def use(result: Any, hostile: str) -> None:
    """As a training would: enter what can be entered, go through what can be iterated over."""
    if type(result).__module__.startswith("stepspan") and not isinstance(result, Run):
        if hasattr(result, "__enter__"):
            with result:
                pass
        elif hostile == "iterable":
            with suppress(Exception):  # what the user's own iterable raises is theirs
                list(result)
        elif hasattr(result, "__next__"):
            assert list(result) == [1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "parameter"), parameters(Run))
def test_no_argument_of_a_run_can_stop_it(start: Start, method: str, parameter: str, kind: str) -> None:
    run = start(job_id="job")
    with run.epoch(0):
        use(call(getattr(run, method), parameter, KINDS[kind]()), parameter)
        with run.step(0):
            run.log_metrics({"loss": 0.5})
    run.close()
    assert_well_closed(run)


def assert_well_closed(run: Run) -> None:
    path = path_of(run)
    assert len(events(path, "run_end")) == 1
    assert status_of(path)
    assert list(run.stats()["delivery"]) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "parameter"), parameters(RunLogStore))
def test_no_argument_of_a_store_can_stop_its_run(start: Start, method: str, parameter: str, kind: str) -> None:
    run = start(job_id="job")
    call(getattr(run.as_log_store(), method), parameter, KINDS[kind]())
    run.close()
    assert_well_closed(run)


@pytest.mark.parametrize("kind", KINDS)
def test_no_attribute_of_a_step_can_stop_it(start: Start, kind: str) -> None:
    run = start(job_id="job")
    with run.step(0) as step:
        step.samples = step.tokens = KINDS[kind]()
    for _ in run.steps([1], samples=lambda batch: KINDS[kind](), tokens=lambda batch: fail()):
        pass
    assert len(events(run, "step_end")) == 2
    run.close()
    assert_well_closed(run)


@pytest.mark.parametrize("scope", ["epoch", "step", "span"])
def test_a_hostile_exception_leaves_a_scope_as_it_is(start: Start, scope: str) -> None:
    run, error = start(job_id="job"), hostile(RuntimeError)("x")
    with pytest.raises(RuntimeError) as raised, getattr(run, scope)(0):
        raise error
    assert raised.value is error
    with pytest.raises(RuntimeError) as raised, run:
        raise error
    assert raised.value is error
    assert_well_closed(run)
    assert status_of(path_of(run)) == "failed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "parameter"), parameters(Run))
def test_a_run_that_is_switched_off_takes_anything(start: Start, method: str, parameter: str, kind: str) -> None:
    run = start(job_id="job", enabled=False)
    use(call(getattr(run, method), parameter, KINDS[kind]()), parameter)
    assert stepspan.current_run().stats()["journal"] is None


def test_a_run_that_is_switched_off_has_all_that_a_run_has(start: Start, tmp_path: Path) -> None:
    with start(job_id="job") as run:
        public = [name for name in dir(run) if not name.startswith("_")]
    off = start(job_id="job", enabled=False)
    assert [name for name in public if not hasattr(off, name)] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "parameter"), parameters(RunCallback))
def test_no_argument_of_a_callback_can_stop_its_run(
    start: Start, tmp_path: Path, method: str, parameter: str, kind: str
) -> None:
    run = start(job_id="job")
    for callback in (RunCallback(run), TelemetryLogger(tmp_path / "t.jsonl"), MemoryLogger()):
        call(getattr(callback, method), parameter, KINDS[kind]())
    run.close()
    assert_well_closed(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "parameter"), parameters(Telemetry))
def test_no_argument_of_telemetry_can_stop_it(
    start: Start, tmp_path: Path, method: str, parameter: str, kind: str
) -> None:
    run = start(job_id="job")
    files: dict[str, Any] = {"telemetry_file": tmp_path / "t.jsonl", "path": tmp_path / "t.db"}
    telemetry = Telemetry("c", backend="sqlite", backends=["otel"], **files)
    use(call(getattr(telemetry, method), parameter, KINDS[kind]()), parameter)
    telemetry.close()
    run.close()
    assert_well_closed(run)
