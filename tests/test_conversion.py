"""Any object as JSON: what has a form in it keeps it, what raises costs itself, and nothing can hold up training."""

from __future__ import annotations

import argparse
import array
import collections
import dataclasses
import datetime as dt
import enum
import functools
import itertools
import math
import sys
import threading
import time
import types
import uuid
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pydantic
import pydantic.v1
import pytest
from harness import runs
from harness.runs import events

from stepspan.conversion import MAX_ENTRIES, MAX_NESTING, Conversion, json_value, preview
from stepspan.errors import ConfigError
from stepspan.testing import recorded_run

start = runs.start


class Precision(enum.Enum):
    BF16 = "bf16"


class Mode(enum.Flag):
    FAST = enum.auto()


class Odd(enum.Enum):
    NESTED = ("a", 1)


@dataclasses.dataclass
class Optim:
    lr: float = 3e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    unset: int = dataclasses.field(init=False)


class Pair(NamedTuple):
    low: float
    high: Any


class Slots:
    __slots__ = ("_secret", "lr", "unset")

    def __init__(self) -> None:
        self.lr = 0.1


class Plain:
    depth = 3
    """Of the class."""

    def __init__(self) -> None:
        self.width = 8
        self._hidden = 1

    @property
    def area(self) -> int:
        raise RuntimeError("no attribute of data")


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    lr: float = 0.1
    inner: Any = None
    api_key: pydantic.SecretStr = pydantic.SecretStr("hidden")


class OldModel(pydantic.v1.BaseModel):
    lr: float = 0.1

    class Config:
        extra = "allow"


class Attrs:
    """As `attr.s` makes a class: with a description of its fields."""

    __attrs_attrs__ = (types.SimpleNamespace(name="lr"), types.SimpleNamespace(name="name"))

    def __init__(self) -> None:
        self.lr, self.name = 0.1, "adam"

    def __repr__(self) -> str:
        return "Attrs(...)"


class ConfigDict:
    """As ml_collections': keys and items, and no Mapping."""

    def keys(self) -> list[str]:
        return ["lr"]

    def __getitem__(self, key: str) -> float:
        return 0.1

    def __repr__(self) -> str:
        return "lr: 0.1"


class HasToDict:
    def to_dict(self) -> dict[str, Any]:
        return {"layers": [1, 2]}

    def __repr__(self) -> str:
        return "a page of text"


class Missing(Mapping[str, Any]):
    """As OmegaConf's: some values raise as they are asked for."""

    def __getitem__(self, key: str) -> Any:
        if key != "lr":
            raise LookupError(f"Missing mandatory value: {key}")
        return 0.1

    def __iter__(self) -> Iterator[str]:
        yield from ("entity", "lr", "dir")

    def __len__(self) -> int:
        return 3


class Items(Sequence[Any]):
    """As OmegaConf's ListConfig."""

    def __getitem__(self, position: Any) -> Any:
        if position == 1:
            raise LookupError("Missing mandatory value")
        return position

    def __len__(self) -> int:
        return 3


class Shaped:
    """A table, say."""

    shape = (3, 2)

    def __repr__(self) -> str:
        raise AssertionError("its rows are not asked for")


class OnGpu:
    shape, dtype, device = (2,), "float32", types.SimpleNamespace(type="cuda")

    def tolist(self) -> Any:
        raise AssertionError("the training thread would wait for the GPU")

    __repr__ = tolist


def function(x: int) -> int:
    return x


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(Precision.BF16, "bf16", id="enum"),
        pytest.param(Mode.FAST, 1, id="flag"),
        pytest.param(Odd.NESTED, "NESTED", id="enum of a tuple"),
        pytest.param(Optim(), {"lr": 3e-4, "betas": [0.9, 0.95]}, id="dataclass"),
        pytest.param([Optim(1.0, ())], [{"lr": 1.0, "betas": []}], id="dataclass in a list"),
        pytest.param(Pair(0.1, Pair(1, 2)), {"low": 0.1, "high": {"low": 1, "high": 2}}, id="named tuple"),
        pytest.param(Slots(), {"lr": 0.1}, id="slots"),
        pytest.param(Plain(), {"width": 8, "depth": 3}, id="plain object"),
        pytest.param(Model.model_validate({"inner": Model(), "more": 1}), {
            "lr": 0.1, "inner": {"lr": 0.1, "inner": None, "api_key": "**********"}, "api_key": "**********", "more": 1,
        }, id="pydantic"),
        pytest.param(OldModel.parse_obj({"more": 1}), {"lr": 0.1, "more": 1}, id="pydantic 1"),
        pytest.param({Precision.BF16: 1}, {"bf16": 1}, id="enum as a key"),
        pytest.param(collections.UserString("abc"), "abc", id="UserString"),
        pytest.param(collections.UserDict(a=collections.UserList([1])), {"a": [1]}, id="UserDict, UserList"),
        pytest.param(Attrs(), {"lr": 0.1, "name": "adam"}, id="attrs"),
        pytest.param(argparse.Namespace(lr=0.1), {"lr": 0.1}, id="argparse"),
        pytest.param(types.SimpleNamespace(opt=types.SimpleNamespace(lr=0.1)), {"opt": {"lr": 0.1}}, id="namespaces"),
        pytest.param(ConfigDict(), {"lr": 0.1}, id="keys and items"),
        pytest.param(HasToDict(), {"layers": [1, 2]}, id="to_dict"),
        pytest.param(collections.OrderedDict(a=1), {"a": 1}, id="ordered dict"),
        pytest.param(collections.ChainMap({"a": 1}, {"b": 2}), {"b": 2, "a": 1}, id="chain map"),
        pytest.param(types.MappingProxyType({"a": 1}), {"a": 1}, id="mapping proxy"),
        pytest.param(collections.deque([1, 2]), [1, 2], id="deque"),
        pytest.param({"a": 1}.keys(), ["a"], id="keys"),
        pytest.param({"a": 1}.values(), [1], id="values"),
        pytest.param(frozenset({3, 20, 1}), [1, 3, 20], id="set"),
        pytest.param({"b", "a", "c"}, ["a", "b", "c"], id="set of texts"),
        pytest.param(array.array("d", [0.5]), [0.5], id="array"),
        pytest.param(np.float32(0.1), 0.1, id="numpy float"),
        pytest.param(np.array(0.1, np.float32), 0.1, id="numpy array without dimensions"),
        pytest.param(np.float64("nan"), "NaN", id="numpy NaN by itself"),
        pytest.param(np.int64(3), 3, id="numpy int"),
        pytest.param(np.bool_(True), True, id="numpy bool"),
        pytest.param(np.str_("x"), "x", id="numpy text"),
        pytest.param(np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]], id="numpy array"),
        pytest.param(np.array([np.nan]), ["NaN"], id="numpy NaN"),
        pytest.param(np.zeros((100, 100), np.float32), "ndarray of float32, shape (100, 100)", id="large array"),
        pytest.param(np.datetime64("2026-01-02"), "2026-01-02", id="numpy date"),
        pytest.param(np.array([Optim(1.0, ())], dtype=object), [{"lr": 1.0, "betas": []}], id="array of objects"),
        pytest.param(np.dtype("float32"), "float32", id="dtype"),
        pytest.param(Shaped(), "Shaped, shape (3, 2)", id="table"),
        pytest.param(OnGpu(), "OnGpu of float32, shape (2,)", id="on a GPU"),
        pytest.param(Path("a/b"), "a/b", id="path"),
        pytest.param(Decimal("0.1"), 0.1, id="decimal"),
        pytest.param(Decimal("0.12345678901234567890"), "0.12345678901234567890", id="precise decimal"),
        pytest.param(Decimal("NaN"), "NaN", id="decimal NaN"),
        pytest.param(Fraction(1, 3), "1/3", id="fraction"),
        pytest.param(1 + 2j, "(1+2j)", id="complex"),
        pytest.param(dt.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00", id="datetime"),
        pytest.param(dt.date(2026, 1, 2), "2026-01-02", id="date"),
        pytest.param(dt.timedelta(seconds=90), "0:01:30", id="timedelta"),
        pytest.param(uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001", id="uuid"),
        pytest.param(b"adam", "adam", id="bytes"),
        pytest.param(b"\xff", "b'\\xff'", id="bytes that are no text"),
        pytest.param(b"x" * 10**6, "bytes of length 1000000", id="a million bytes"),
        pytest.param(range(10**12), "range(0, 1000000000000)", id="range"),
        pytest.param(2**70, str(2**70), id="an integer beyond 64 bits"),
        pytest.param(function, f"{__name__}.function", id="function"),
        pytest.param(print, "print", id="builtin"),
        pytest.param(Optim, f"{__name__}.Optim", id="class"),
        pytest.param(int, "int", id="builtin class"),
        pytest.param(math, "math", id="module"),
        pytest.param(
            functools.partial(dict, [], sep=Precision.BF16),
            {"function": "dict", "args": [[]], "keywords": {"sep": "bf16"}},
            id="partial",
        ),
        pytest.param(itertools.count(), "count(0)", id="an iterator that never ends"),
        pytest.param(object(), "object", id="object"),
        pytest.param({(1, 2): 1, None: 2, 3: 3}, {"(1, 2)": 1, "None": 2, "3": 3}, id="keys that are no text"),
        pytest.param("\ud800x", "?x", id="half a character"),
        pytest.param({"\ud800": 1}, {"?": 1}, id="half a character in a key"),
    ],
)  # fmt: skip
def test_what_has_a_form_in_json_keeps_it(value: Any, expected: Any) -> None:
    for lies_in in (value, {"in": value}["in"], [value][0]):
        found = json_value(lies_in)
        assert found == expected
        assert type(found) is type(expected)
    assert orjson.loads(orjson.dumps(json_value({"x": [value]}))) == {"x": [expected]}


class Config:
    lr = 0.1

    class Optim:
        name = "adam"

    def method(self) -> None: ...


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (Slots(), {"lr": 0.1}),
        (Pair(1, 2), {"low": 1, "high": 2}),
        (Config(), {"lr": 0.1, "Optim": f"{__name__}.Config.Optim"}),
        (Config, {"lr": 0.1, "Optim": f"{__name__}.Config.Optim"}),
        (HasToDict(), {"layers": [1, 2]}),
        (ConfigDict(), {"lr": 0.1}),
        (types.SimpleNamespace(a=1), {"a": 1}),
        (Missing(), {"lr": 0.1}),
    ],
    ids=["slots", "named tuple", "object of a class", "class", "to_dict", "keys", "namespace", "missing values"],
)
def test_named_values_are_found_in(params: Any, expected: Any) -> None:
    assert Conversion(100).fields(params) == expected


def test_a_module_of_settings_has_named_values() -> None:
    module = types.ModuleType("config")
    module.__dict__.update(lr=0.1, _private=1, os=sys, helper=function)
    assert Conversion(100).fields(module) == {"lr": 0.1}


@pytest.mark.parametrize("params", [None, 5, "lr=1", b"x", [1], {1}, np.zeros(3), Path("a"), print, object(), 0.5])
def test_what_has_no_named_values_is_refused(params: Any) -> None:
    with pytest.raises(TypeError, match="has no named values: give a mapping"):
        Conversion(100).fields(params)


def test_what_raises_costs_itself_and_is_told_by_its_place() -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no")

    class Strange:
        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

        def __repr__(self) -> str:
            return "strange"

    conversion = Conversion(100)
    params = {"cfg": Missing(), "list": Items(), "broken": Broken(), "strange": Strange(), "good": 1}
    assert conversion.fields(params) == {
        "cfg": {"lr": 0.1},
        "list": [0, 2],
        "broken": "<Broken: RuntimeError in __str__>",
        "strange": "strange",
        "good": 1,
    }
    assert set(conversion.lost) == {"cfg.entity", "cfg.dir", "list[1]", "broken"}
    assert "Missing mandatory value: dir" in conversion.lost["cfg.dir"]


def test_what_contains_itself_or_lies_too_deep_is_cut_and_told() -> None:
    loop: dict[str, Any] = {"lr": 0.1}
    loop["self"] = loop
    node = types.SimpleNamespace(name="a")
    node.parent = [node]
    deep: Any = "core"
    for _ in range(100):
        deep = {"in": deep}
    conversion = Conversion(1000)
    found = conversion.fields({"loop": loop, "node": node, "deep": deep})
    assert found["loop"] == {"lr": 0.1, "self": "[cut: contains itself]"}
    assert found["node"] == {"name": "a", "parent": ["[cut: contains itself]"]}
    assert {"loop.self", "node.parent[0]", "deep" + ".in" * (MAX_NESTING - 1)} == set(conversion.lost)
    assert "core" not in str(found)


@pytest.mark.parametrize(
    "value",
    [
        {f"k{n}": n for n in range(10**6)},
        list(range(10**6)),
        [[1] * 1000] * 1000,
        {"a": {"b": dict.fromkeys(range(10**6))}},
        collections.deque(range(10**6)),
        collections.ChainMap({n: n for n in range(10**5)}),
    ],
    ids=["dict", "list", "lists", "nested", "deque", "chain map"],
)
def test_entries_beyond_the_limit_are_cut_and_counted(value: Any) -> None:
    conversion = Conversion(1000)
    found = conversion.value(value)
    assert len(orjson.dumps(found)) < 20_000
    assert conversion.cut > 10_000 or isinstance(value, list)
    assert conversion.cut > 0


def test_an_object_of_many_attributes_is_its_name_where_it_lies_in_others() -> None:
    class Dataset:
        def __init__(self) -> None:
            self.images = list(range(10**5))

    conversion = Conversion(10_000)
    assert conversion.fields({"data": Dataset(), "lr": 0.1}) == {
        "data": f"{__name__}.{Dataset.__qualname__}",
        "lr": 0.1,
    }
    assert conversion.cut == 0
    assert len(Conversion(10_000).fields(Dataset())["images"]) == 10_000 - 1


def test_a_mapping_that_changes_meanwhile_is_converted() -> None:
    params: dict[str, Any] = {f"k{n}": n for n in range(500)}
    changing, ended = collections.UserDict(params), threading.Event()

    def change() -> None:
        for number in itertools.count():
            params[f"new{number % 50}"] = changing[f"new{number % 50}"] = number
            params.pop(f"new{(number + 25) % 50}", None)
            changing.pop(f"new{(number + 25) % 50}", None)
            if ended.is_set():
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            assert Conversion(10_000).fields(params)["k499"] == 499
            Conversion(10_000).value({"changing": changing})
    finally:
        ended.set()
        thread.join()


def test_two_keys_that_are_the_same_text_are_told() -> None:
    conversion = Conversion(100)
    assert conversion.fields({1: "a", "1": "b"}) == {"1": "b"}
    assert list(conversion.lost) == ["1"]


def test_a_preview_is_short_whatever_the_value() -> None:
    for value in ("x" * 10**6, list(range(10**6)), {n: n for n in range(10**6)}, np.zeros(10**6)):
        assert len(preview(value)) <= 82


# in a run


def test_hyperparameters_that_raise_cost_themselves_and_are_told(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    with start() as run:
        run.log_hyperparams(Missing())
        run.log_hyperparams({"model": Missing()})
    assert [event["params"] for event in events(run, "hyperparams")] == [{"lr": 0.1}, {"model": {"lr": 0.1}}]
    assert run.stats()["warning_keys"] == {"hyperparams": {"entity": 1, "dir": 1, "model.entity": 1, "model.dir": 1}}
    assert [event["key"] for event in events(run, "dropped")] == [
        "hyperparams.entity", "hyperparams.dir", "hyperparams.model.entity", "hyperparams.model.dir",
    ]  # fmt: skip
    assert "stepspan: hyperparams dir: LookupError('Missing mandatory value: dir')" in caplog.text


def test_attributes_are_converted_as_hyperparameters_are(start: Any) -> None:
    given = {"opt": Optim(1.0, ()), "mode": Precision.BF16, "lr": np.float32(0.5), "cfg": Missing()}
    with start() as run:
        run.log_event("e", **given)
        run.log_error(ValueError("no"), **given)
        with run.span("s", **given):
            pass
    written = [event["attributes"] for event in events(run, "event", "error", "span_begin")]
    assert written == [{"opt": {"lr": 1.0, "betas": []}, "mode": "bf16", "lr": 0.5, "cfg": {"lr": 0.1}}] * 3
    keys = {"cfg.entity": 1, "cfg.dir": 1}
    assert run.stats()["warning_keys"] == {"event": keys, "error": keys, "span": keys}


def test_secrets_within_objects_are_redacted(start: Any) -> None:
    @dataclasses.dataclass
    class Login:
        user: str
        password: str

    class Service(pydantic.BaseModel):
        api_key: str
        login: Any

    secret = "hunter2!"
    with start() as run:
        run.log_hyperparams({"service": Service(api_key=secret, login=Login("ann", secret))})
        run.log_hyperparams(Login("ann", secret))
        run.log_hyperparams(
            {"connect": functools.partial(print, password=secret), "ns": types.SimpleNamespace(token=secret)}
        )
        run.log_event("e", login=Login("ann", secret), headers=Pair(1, {"Authorization": secret}))
    found = b"".join(path.read_bytes() for path in runs.path_of(run).glob("*.jsonl"))
    assert b"ann" in found
    assert secret.encode() not in found


def test_a_quarter_of_a_million_hyperparameters_hold_training_up_for_a_moment() -> None:
    with recorded_run() as recording:
        before = time.thread_time()
        recording.run.log_hyperparams({f"layer{n}.rate": f"v{n}" for n in range(250_000)} | {"password": "hunter2!"})
        recording.run.log_event("e", big=list(range(10**6)), text="key=value; " * 10**6)
        assert time.thread_time() - before < 2.0, "it took 2.2 s for the first alone, and now a tenth of that"
    (params,), (event,) = recording.events("hyperparams"), recording.events("event")
    assert len(params["params"]) == MAX_ENTRIES
    assert params["cut"] == 250_001 - MAX_ENTRIES
    assert event["cut"] > 0
    assert len(orjson.dumps(event)) < 1 << 20
    assert recording.run.stats()["warning_keys"]["hyperparams"] == {"too many entries": 1}
    (log,) = recording.logs("training.hyperparams")
    assert log.dropped_attributes == 250_001 - 128


def test_resource_attributes_of_numpy_paths_and_enums_are_their_values(start: Any) -> None:
    given = {
        "nodes": np.int64(4), "lr": np.float32(0.1), "flag": np.bool_(True), "dims": np.array([1, 2]),
        "out": Path("a/b"), "mode": Precision.BF16, "sizes": (np.int64(1), 2), "price": Decimal("0.5"),
    }  # fmt: skip
    with start(resource=given) as run:
        pass
    resource = events(run)[0]["resource"]
    assert {name: resource[name] for name in given} == {
        "nodes": 4, "lr": 0.1, "flag": True, "dims": [1, 2], "out": "a/b", "mode": "bf16", "sizes": [1, 2],
        "price": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", [object(), object, Optim(), {"a": 1}, None, float("nan"), np.float32("nan"), [1, "a"]]
)
def test_a_resource_attribute_that_is_no_value_is_refused(start: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"give a string, boolean, 64-bit integer or finite number"):
        start(resource={"a": value})
