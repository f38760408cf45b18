"""evsys log stores: the contract, each built-in store's files, the registry and its plug-ins, and the whole way."""

from __future__ import annotations

import inspect
import json
import math
import multiprocessing
import struct
import sys
import textwrap
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harness import runs
from harness.journals import fill, small_file_system
from harness.stack import Collector, Prometheus
from pydantic import BaseModel, ConfigDict
from tensorboardX.proto.event_pb2 import Event as BoardEvent

import stepspan
from stepspan import stores
from stepspan.compat.evsys import plugin, registry
from stepspan.errors import ConfigError
from stepspan.run import Run
from stepspan.testing import recorded_run

start = runs.start

KINDS = ["jsonl", "multiplex", "stepspan", "tensorboard"]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The registry, as it is put back afterwards."""
    stores.list_log_stores()
    monkeypatch.setattr(registry, "_stores", dict(registry._stores))
    return registry._stores


class Recorder:
    """A store in the style of evsys: it has its own Config, and remembers what it was told."""

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")
        endpoint: str
        retries: int = 3

    def __init__(self, *, endpoint: Any, retries: int = 3) -> None:
        self.endpoint, self.retries = endpoint, retries
        self.calls: list[Any] = []

    def log_scalar(self, key: str, value: Any, step: int) -> None:
        self.calls.append((key, value, step))

    def log_metrics(self, metrics: Any, step: int, *, split: str = "train") -> None:
        self.calls.append((metrics, step, split))

    def log_hyperparams(self, params: Any) -> None:
        self.calls.append(params)

    def log_artifact(self, name: str, path: Path, *, kind: str = "file") -> None:
        self.calls.append((name, path, kind))

    def close(self) -> None:
        self.calls.append("close")


class Failing(Recorder):
    Config = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(endpoint="")

    def _fail(self, *_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    log_scalar = log_metrics = log_hyperparams = log_artifact = close = _fail


def log_everything(store: Any) -> None:
    store.log_hyperparams({"lr": 0.5})
    store.log_scalar("loss", 2.0, 0)
    store.log_metrics({"loss": 1.0, "lr": 0.5}, 1)
    store.log_metrics({"val/loss": 1.5}, 1, split="val")
    store.log_artifact("model", "out/model.pt", kind="checkpoint")


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------- contract


def test_the_public_names_are_sorted_and_there() -> None:
    assert stores.__all__ == sorted(stores.__all__)
    assert all(hasattr(stores, name) for name in stores.__all__)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "jsonl", "params": {"log_dir": "logs"}},
        {"kind": "tensorboard", "params": {"log_dir": "board", "flush_secs": 5}},
        {"kind": "multiplex", "params": {"children": [{"kind": "jsonl", "params": {"log_dir": "logs"}}]}},
        {"kind": "multiplex"},
        {"kind": "stepspan", "params": {"job_id": "j", "enabled": False}},
    ],
    ids=lambda spec: spec["kind"],
)
def test_each_built_in_store_keeps_the_contract(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store: Any = stores.make_log_store(spec)
    assert isinstance(store, stores.LogStore)
    assert store.name == spec["kind"]
    log_everything(store)
    store.close()
    store.close()


def test_importing_stepspan_imports_neither_pydantic_nor_the_stores(tmp_path: Path) -> None:
    code = "import sys, stepspan; assert not {'pydantic', 'stepspan.stores', 'opentelemetry'} & set(sys.modules)"
    assert runs.python(code, tmp_path).returncode == 0


# -------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl_writes_the_rows_of_evsys(tmp_path: Path) -> None:
    times = iter([10.5, 11.0, 12.25, 13.0])
    store = stores.JSONLLogStore(log_dir=tmp_path / "logs", clock=lambda: next(times))
    log_everything(store)
    assert (tmp_path / "logs" / "metrics.jsonl").read_text() == (
        '{"ts": 10.5, "step": 0, "split": "train", "metrics": {"loss": 2.0}}\n'
        '{"ts": 11.0, "step": 1, "split": "train", "metrics": {"loss": 1.0, "lr": 0.5}}\n'
        '{"ts": 12.25, "step": 1, "split": "val", "metrics": {"val/loss": 1.5}}\n'
    )
    assert (tmp_path / "logs" / "hyperparams.json").read_text() == '{\n  "lr": 0.5\n}'
    assert json.loads((tmp_path / "logs" / "artifacts.json").read_text()) == [
        {"name": "model", "path": "out/model.pt", "kind": "checkpoint", "ts": 13.0}
    ]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "artifacts.json", "hyperparams.json", "metrics.jsonl",
    ]  # fmt: skip


def test_jsonl_goes_on_in_the_files_of_an_earlier_store(tmp_path: Path) -> None:
    for number in range(2):
        store = stores.JSONLLogStore(log_dir=tmp_path)
        store.log_scalar("loss", 1.0, number)
        store.log_hyperparams({"lr": number, f"only{number}": {"deep": number}})
        store.log_artifact(f"a{number}", "p")
        store.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1]
    assert json.loads((tmp_path / "hyperparams.json").read_text()) == {
        "lr": 1, "only0": {"deep": 0}, "only1": {"deep": 1},
    }  # fmt: skip
    assert [entry["name"] for entry in json.loads((tmp_path / "artifacts.json").read_text())] == ["a0", "a1"]


def test_jsonl_writes_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "logs").symlink_to(tmp_path / "scratch")
    log_everything(stores.JSONLLogStore(log_dir=tmp_path / "logs"))
    names = ["artifacts.json", "hyperparams.json", "metrics.jsonl"]
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == names


@pytest.mark.parametrize("content", ['{"lr": 0.', "[1, 2]", "", "\x00\x00"], ids=["torn", "a list", "empty", "zeros"])
def test_jsonl_counts_corrupt_hyperparameters_as_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "hyperparams.json").write_text(content)
    (tmp_path / "artifacts.json").write_text(content.replace("[1, 2]", "{}"))
    store = stores.JSONLLogStore(log_dir=tmp_path)
    store.log_hyperparams({"seed": 7})
    store.log_artifact("a", "p")
    assert json.loads((tmp_path / "hyperparams.json").read_text()) == {"seed": 7}
    assert [entry["name"] for entry in json.loads((tmp_path / "artifacts.json").read_text())] == ["a"]


def test_jsonl_files_can_have_other_names(tmp_path: Path) -> None:
    names = {"metrics_file": "m.jsonl", "hyperparams_file": "h.json", "artifacts_file": "a.json"}
    store: Any = stores.make_log_store({"kind": "jsonl", "params": {"log_dir": str(tmp_path), **names}})
    log_everything(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "h.json", "m.jsonl"]


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.log_scalar("loss", 1.0, 0),
        lambda store: store.log_metrics({"loss": 1.0}, 0),
        lambda store: store.log_hyperparams({}),
        lambda store: store.log_artifact("a", "p"),
    ],
    ids=["log_scalar", "log_metrics", "log_hyperparams", "log_artifact"],
)
def test_jsonl_refuses_every_write_after_close(tmp_path: Path, write: Any) -> None:
    store = stores.JSONLLogStore(log_dir=tmp_path)
    store.close()
    with pytest.raises(RuntimeError, match="is closed"):
        write(store)
    assert list(tmp_path.iterdir()) == []


class Hostile:
    def __float__(self) -> None:
        raise RuntimeError("no")

    def __str__(self) -> None:  # type: ignore[override]
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.array(0.25), 0.25),
        (math.inf, math.inf),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        ("text", "text"),
        (Hostile(), "<Hostile: RuntimeError in __str__>"),
    ],
    ids=["float32", "int64", "0-d array", "infinity", "array", "text", "hostile"],
)
def test_jsonl_writes_numbers_and_lists_as_they_are_and_all_else_as_text(
    tmp_path: Path, value: Any, written: Any
) -> None:
    store = stores.JSONLLogStore(log_dir=tmp_path)
    store.log_metrics({"loss": value, ("a", 1): 2.0} if isinstance(value, Hostile) else {"loss": value}, np.int64(4))  # type: ignore[dict-item]
    store.log_hyperparams({"value": value})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["metrics"]["loss"]) == (4, written)
    assert json.loads((tmp_path / "hyperparams.json").read_text()) == {"value": written}


def test_a_full_disk_costs_no_row_and_does_not_raise_into_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_file_system(tmp_path / "disk", "64k") as disk:
        store = stores.JSONLLogStore(log_dir=disk)
        store.log_metrics({"loss": 0.0}, 0)
        ballast = fill(disk)
        for number in range(1, 200):  # fills the page that is left, and is cut in the middle of a row
            store.log_metrics({"loss": 0.0}, number)
        store.log_hyperparams({"lr": 1})
        ballast.unlink()
        store.close()
        assert [row["step"] for row in rows(disk / "metrics.jsonl")] == list(range(200))
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        f" {disk}/metrics.jsonl cannot be written", f" {disk}/hyperparams.json cannot be written",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- tensorboard


def board(directory: Path) -> Any:
    """(tag, step, scalar or text) of an event file, each record's length as it stands there."""
    (file,) = directory.iterdir()
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for value in BoardEvent.FromString(data[12 : 12 + length]).summary.value:
            text = value.tensor.string_val
            step = BoardEvent.FromString(data[12 : 12 + length]).step
            found.append((value.tag, step, text[0].decode() if text else value.simple_value))
        data = data[12 + length + 4 :]
    return found


def test_tensorboard_writes_scalars_and_texts(tmp_path: Path) -> None:
    store: Any = stores.make_log_store(
        {"kind": "tensorboard", "params": {"log_dir": str(tmp_path / "tb"), "flush_secs": 1}}
    )
    log_everything(store)
    store.close()
    assert board(tmp_path / "tb") == [
        ("hparams/text_summary", 0, "{'lr': 0.5}"),
        ("loss", 0, 2.0),
        ("loss", 1, 1.0),
        ("lr", 1, 0.5),
        ("val/loss", 1, 1.5),
        ("artifact/model/text_summary", 0, "[checkpoint] out/model.pt"),
    ]
    with pytest.raises(RuntimeError, match="is closed"):
        store.log_scalar("loss", 1.0, 2)


def test_tensorboard_loses_nothing_at_exit(tmp_path: Path) -> None:
    code = """
    from stepspan.stores import TensorBoardLogStore
    store = TensorBoardLogStore(log_dir="tb", flush_secs=1000)
    for step in range(50):
        store.log_scalar("loss", 1.0, step)
    """
    done = runs.python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [step for _, step, _ in board(tmp_path / "tb")] == list(range(50))


def test_tensorboard_without_its_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'stepspan\[tensorboard\]'"):
        stores.make_log_store({"kind": "tensorboard", "params": {"log_dir": str(tmp_path)}})


# ---------------------------------------------------------------------------------------------------------- multiplex


def test_multiplex_tells_each_child_everything(tmp_path: Path, kinds: Any) -> None:
    stores.register_log_store("recorder")(Recorder)
    log_dir = {"log_dir": str(tmp_path)}
    children = [{"kind": "recorder", "params": {"endpoint": "here"}}, {"kind": "jsonl", "params": log_dir}]
    store: Any = stores.make_log_store({"kind": "multiplex", "params": {"children": children}})
    log_everything(store)
    store.close()
    recorder = store._children["recorder[0]"]
    assert recorder.calls == [
        {"lr": 0.5},
        ("loss", 2.0, 0),
        ({"loss": 1.0, "lr": 0.5}, 1, "train"),
        ({"val/loss": 1.5}, 1, "val"),
        ("model", "out/model.pt", "checkpoint"),
        "close",
    ]
    assert len(rows(tmp_path / "metrics.jsonl")) == 3
    assert not store.failures


def test_a_child_that_fails_does_not_take_its_siblings_down(
    tmp_path: Path, kinds: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stores.register_log_store("failing")(Failing)
    log_dir = {"log_dir": str(tmp_path)}
    children = [{"kind": "failing"}, {"kind": "jsonl", "params": log_dir}, {"kind": "failing"}]
    store: Any = stores.make_log_store({"kind": "multiplex", "params": {"children": children}})
    log_everything(store)
    store.close()
    assert len(rows(tmp_path / "metrics.jsonl")) == 3
    assert store.failures == {"failing[0]": 6, "failing[2]": 6}
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        " log store failing[0]", " log store failing[2]",
    ]  # fmt: skip


def test_a_child_that_cannot_be_made_closes_those_before_it(tmp_path: Path, kinds: Any) -> None:
    made = []

    class Watched(Recorder):
        def __init__(self, **params: Any) -> None:
            super().__init__(**params)
            made.append(self)

    stores.register_log_store("watched")(Watched)
    children = [{"kind": "watched", "params": {"endpoint": "here"}}, {"kind": "jsonl", "params": {"log_dri": "x"}}]
    with pytest.raises(ConfigError, match=r"log_store.jsonl.params.log_dir=.*Field required"):
        stores.make_log_store({"kind": "multiplex", "params": {"children": children}})
    assert made[0].calls == ["close"]


# ----------------------------------------------------------------------------------------------------------- registry


def test_an_unknown_kind_is_an_error_that_lists_the_known_ones() -> None:
    assert stores.list_log_stores() == KINDS
    with pytest.raises(KeyError, match="no log store 'wandb'; known are jsonl, multiplex, stepspan, tensorboard"):
        stores.make_log_store({"kind": "wandb"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "jsonl", "params": {"log_dir": "x", "logdir": "y"}}, "params.logdir='y': .*; known are log_dir"),
        ({"kind": "jsonl", "params": {"log_dir": ["x"]}}, r"log_store.jsonl.params.log_dir=\['x'\]: .*string"),
        ({"kind": "jsonl"}, "log_store.jsonl.params.log_dir=.*required"),
        ({"kind": "tensorboard", "params": {"log_dir": "x", "flush_secs": 0}}, "flush_secs=0: .*greater than 0"),
        ({"kind": "stepspan", "params": {"jobid": "x"}}, "params.jobid='x': .*known are job_id, name"),
        ({"params": {}}, "log_store.kind=.*required"),
        ({"kind": "jsonl", "args": {}}, "log_store.args=.*known are kind, params"),
        ("jsonl", "log_store='jsonl'"),
        (None, "log_store=None"),
    ],
    ids=["unknown", "type", "missing", "range", "start_run", "no kind", "no such field", "text", "nothing"],
)
def test_a_wrong_parameter_is_refused_by_its_name(
    spec: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        stores.make_log_store(spec)
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_the_users_own_is_made_from_yaml_and_checked_by_its_own_config(kinds: Any) -> None:
    stores.register_log_store("http")(Recorder)
    store: Any = stores.make_log_store(yaml.safe_load("{kind: http, params: {endpoint: here, retries: '5'}}"))
    assert (store.name, store.endpoint, store.retries) == ("http", "here", 5)
    with pytest.raises(ConfigError, match=r"log_store\.http\.params\.endpoin='x'|log_store\.http\.params\.endpoint"):
        stores.make_log_store({"kind": "http", "params": {"endpoin": "x"}})


def test_a_kind_belongs_to_one_class(kinds: Any) -> None:
    assert stores.register_log_store("jsonl")(stores.JSONLLogStore) is stores.JSONLLogStore
    with pytest.raises(ValueError, match=r"'jsonl' is stepspan\..*JSONLLogStore already; .*Recorder is not"):
        stores.register_log_store("jsonl")(Recorder)
    assert stores.get_log_store("jsonl") is stores.JSONLLogStore
    with pytest.raises(ValueError, match="a kind"):
        stores.register_log_store()(type("Nameless", (), {}))


# ----------------------------------------------------------------------------------------------------------- plug-ins


def test_the_stepspan_store_is_published_for_evsys() -> None:
    (point,) = [point for point in entry_points(group="evsys_sdk.log_stores") if point.name == "stepspan"]
    assert point.load() is stores.StepspanLogStore


def test_evsys_finds_the_stepspan_store_in_its_own_registry_whoever_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: dict[Any, Any] = {}
    evsys = types.ModuleType("evsys_sdk.registry")
    evsys.register_log_store = lambda kind: lambda store: registered.setdefault(kind, store)  # type: ignore[attr-defined]
    assert plugin.StepspanLogStore is stores.StepspanLogStore
    monkeypatch.setitem(sys.modules, "evsys_sdk.registry", evsys)
    (point,) = [point for point in entry_points(group="evsys_sdk.log_stores") if point.name == "stepspan"]
    assert point.load() is registered["stepspan"] is stores.StepspanLogStore


def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **points: Any) -> None:
    """Install `module:attribute` under names in both groups in turn, each module as source text."""
    found: dict[str, list[Any]] = {group: [] for group in registry.GROUPS}
    for number, (name, (group, code)) in enumerate(points.items()):
        module = f"plugin_of_test_{number}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        found[registry.GROUPS[group]].append(EntryPoint(name, f"{module}:Store", registry.GROUPS[group]))
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: found[group])
    monkeypatch.setattr(registry, "_loaded", False)


STORE = """
class Store:
    def log_scalar(self, key, value, step): ...
    def log_metrics(self, metrics, step, *, split="train"): ...
    def log_hyperparams(self, params): ...
    def log_artifact(self, name, path, *, kind="file"): ...
    def close(self): ...
"""


def test_stores_of_installed_packages_load_from_both_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kinds: Any
) -> None:
    decorated = "from stepspan.stores import register_log_store\n" + STORE.replace(
        "class", "@register_log_store('mine')\nclass"
    )
    named_by_evsys = STORE + "Store.name = 'influx'  # what evsys's decorator does\n"
    plugins(monkeypatch, tmp_path, mine=(0, decorated), influxdb=(1, named_by_evsys), plain=(1, STORE))
    assert stores.list_log_stores() == sorted([*KINDS, "mine", "influx", "plain"])
    assert isinstance(stores.make_log_store({"kind": "influx"}), stores.LogStore)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise SystemExit('licence expired')", "SystemExit"),
        ("Store = 3", "TypeError"),
        ("Thing = 3", "AttributeError"),
        (STORE + "Store.name = 'jsonl'", "ValueError"),
    ],
    ids=["no dependency", "exits", "no class", "no attribute", "takes a kind"],
)
def test_a_broken_plug_in_is_logged_and_costs_nothing_but_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kinds: Any, caplog: pytest.LogCaptureFixture, code: str, why: str
) -> None:
    plugins(monkeypatch, tmp_path, broken=(1, code), plain=(1, STORE))
    assert stores.list_log_stores() == sorted([*KINDS, "plain"])
    (record,) = caplog.records
    assert record.getMessage().startswith("stepspan: log store broken of evsys_sdk.log_stores cannot be used: " + why)
    assert stores.list_log_stores() == sorted([*KINDS, "plain"])
    assert len(caplog.records) == 1, "told once"


# ------------------------------------------------------------------------------------------------------------ a run


def test_a_run_is_a_log_store() -> None:
    with recorded_run() as recording:
        store = recording.run.as_log_store()
        assert isinstance(store, stores.LogStore)
        log_everything(store)
        store.close()
        store.log_scalar("after", 1.0, 2)
    assert recording.values("training.loss") == [2.0, 1.0, 1.5]
    assert recording.values("training.loss", split="val") == [1.5]
    assert recording.values("training.lr") == [0.5]
    assert recording.values("training.after") == [1.0], "closing the store leaves the run open"
    assert [event["step"] for event in recording.events("metrics")] == [0, 1, 1, 2]
    (run,) = recording.spans("training.run")
    assert run.attributes["hyperparams.lr"] == 0.5
    assert [(log.event_name, log.body) for log in recording.logs()] == [
        ("training.hyperparams", '{"lr":0.5}'),
        ("training.artifact", "checkpoint model: out/model.pt"),
    ]


def test_a_run_that_records_nothing_is_a_log_store_too() -> None:
    store = stepspan.current_run().as_log_store()
    log_everything(store)
    store.close()


def test_the_stepspan_store_starts_a_run_with_its_parameters_and_ends_it(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    text = """
    kind: stepspan
    params: {job_id: 4711, rank: 1, world_size: 2, name: tuned, tags: [a], directory: here, resource: {team: vision}}
    """
    store: Any = stores.make_log_store(yaml.safe_load(text))
    log_everything(store)
    assert not store.run.closed
    store.close()
    assert store.run.closed
    (session,) = runs.sessions(tmp_path / "here").values()
    head, begin, *_ = runs.events(session)
    assert (head["job_id"], head["rank"], head["world_size"]) == ("4711", 1, 2)
    assert head["resource"]["team"] == "vision"
    assert (begin["name"], begin["tags"]) == ("tuned", ["a"])
    assert runs.status_of(session) == "completed"
    store.log_scalar("late", 1.0, 3)
    assert store.run.stats()["warnings"]["closed"] == 1


def test_the_stepspan_store_takes_every_argument_of_start_run() -> None:
    assert list(stores.StepspanLogStore.Config.model_fields) == list(inspect.signature(stepspan.start_run).parameters)


def test_the_stepspan_store_passes_on_what_start_run_refuses(start: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="rank"):
        stores.make_log_store({"kind": "stepspan", "params": {"rank": 2, "world_size": 2}})


def test_an_evsys_run_goes_to_jsonl_and_opentelemetry_by_one_more_line(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    text = """
    kind: multiplex
    params:
      children:
        - {kind: jsonl, params: {log_dir: logs}}
        - {kind: stepspan, params: {job_id: j}}
    """
    store: Any = stores.make_log_store(yaml.safe_load(text))
    log_everything(store)
    store.close()
    (session,) = runs.sessions(tmp_path / "stepspan-runs").values()
    journaled = [event["metrics"] for event in runs.events(session, "metrics")]
    assert journaled == [row["metrics"] for row in rows(tmp_path / "logs" / "metrics.jsonl")]


# ------------------------------------------------------------------------------------------------------- the whole way


def _rank(rank: int, directory: Path, endpoint: Any) -> None:
    params = {"job_id": "evsys", "rank": rank, "local_rank": rank, "world_size": 2}
    params |= {"directory": directory, "endpoint": endpoint}
    store: Any = stores.make_log_store({"kind": "stepspan", "params": params})
    store.log_hyperparams({"lr": 0.5, "rank": rank})
    for step in range(3):
        store.log_metrics({"loss": 1.0 / (step + 1), "grad/norm": 2.0}, step)
    store.log_metrics({"val/loss": 0.5}, 2, split="val")
    store.log_artifact("model", "out/model.pt", kind="checkpoint")
    assert store.run.flush(20)
    store.close()


def test_what_an_evsys_run_logs_arrives(collector: Collector, prometheus: Prometheus, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, str(tmp_path / "runs"), collector.http_endpoint)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
        process.close()

    arrived = {
        (labels["rank"], labels["split"]): samples
        for labels, samples in prometheus.series('training_loss{job_id="evsys"}[1h]')
    }
    for instance, session in runs.sessions(tmp_path / "runs").items():
        for split, key in (("train", "loss"), ("val", "val/loss")):
            logged = [event for event in runs.events(session, "metrics") if key in event["metrics"]]
            samples = arrived.pop((instance, split))
            assert [value for _, value in samples] == [event["metrics"][key] for event in logged]
            behind = [at - event["ts"] // 10**6 for (at, _), event in zip(samples, logged, strict=True)]
            assert 0 <= min(behind) <= max(behind) < len(logged)  # those of one millisecond follow each other
    assert not arrived, "one series for each rank and split"
    assert {(span["name"], span["resource"]["job_id"], span["resource"]["rank"]) for span in collector.spans()} == {
        ("training.run", "evsys", 0), ("training.run", "evsys", 1),
    }  # fmt: skip
    logs = {(log["eventName"], log["resource"]["job_id"], log["resource"]["rank"]) for log in collector.logs()}
    assert logs == {(name, "evsys", rank) for name in ("training.hyperparams", "training.artifact") for rank in (0, 1)}


def test_the_example_runs(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "evsys_store.py"
    (tmp_path / "train.yaml").write_text(example.with_suffix(".yaml").read_text())
    done = runs.python(example.read_text(), tmp_path)
    assert done.returncode == 0, done.stderr
    (session,) = runs.sessions(tmp_path / "stepspan-runs").values()
    assert {event["tag"] for event in runs.events(session)} >= {"metrics", "hyperparams", "artifact", "run_end"}
    assert len(rows(tmp_path / "logs" / "metrics.jsonl")) == len(runs.events(session, "metrics")) == 24
