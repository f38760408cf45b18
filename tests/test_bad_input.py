"""What a user gets wrong: refused by `start_run` with field, value and fix, or counted, told once and survived."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import runs
from harness.runs import events, outline, path_of

from stepspan import ConfigError, JsonlExporter, MemoryExporter
from stepspan.journal.disk import Disk
from stepspan.journal.layout import find_sessions
from stepspan.processors import Redact
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


class Hostile:
    """Raises whatever one does with it."""

    def __float__(self) -> float:
        raise RuntimeError("no float")

    def __index__(self) -> int:
        raise RuntimeError("no index")

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class HostileMapping(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError(key)

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("no keys")

    def __len__(self) -> int:
        return 1


@pytest.fixture
def run(start: Start) -> Run:
    return start(job_id="job")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged so far, but for the line that sums it up at the end of a run."""

    def logged() -> list[str]:
        messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert all(message.startswith("stepspan: ") for message in messages)
        return [message for message in messages if not message.startswith("stepspan: warnings of this run: ")]

    return logged


# start_run


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        pytest.param({"job_id": 5.5}, "job_id", id="job_id is a fraction"),
        pytest.param({"job_id": " "}, "job_id", id="job_id is blank"),
        pytest.param({"rank": 4, "world_size": 4}, "rank", id="rank is world_size"),
        pytest.param({"rank": -1, "world_size": 4}, "rank", id="rank is negative"),
        pytest.param({"rank": "0", "world_size": 4}, "rank", id="rank is a text"),
        pytest.param({"rank": 1}, "rank", id="rank without world_size"),
        pytest.param({"local_rank": 2, "rank": 0, "world_size": 2}, "local_rank", id="local_rank is world_size"),
        pytest.param({"world_size": 0}, "world_size", id="world_size is 0"),
        pytest.param({"attempt": 1.5}, "attempt", id="attempt is a fraction"),
        pytest.param({"name": 5}, "name", id="name is a number"),
        pytest.param({"tags": 5}, "tags", id="tags is a number"),
        pytest.param({"tags": [5]}, "tags.0", id="a tag is a number"),
        pytest.param({"service_name": 5}, "service_name", id="service_name is a number"),
        pytest.param({"directory": 5}, "directory", id="directory is a number"),
        pytest.param({"directory": "a\0b"}, "directory", id="directory is no path"),
        pytest.param({"endpoint": 4318}, "endpoint", id="endpoint is a number"),
        pytest.param({"endpoint": "ftp://127.0.0.1"}, "endpoint", id="endpoint is no URL of OTLP"),
        pytest.param({"resource": ["a"]}, "resource", id="resource is a list"),
        pytest.param({"resource": {"a": object}}, "resource['a']", id="a resource attribute is an object"),
        pytest.param({"enabled": "maybe"}, "enabled", id="enabled is a word"),
        pytest.param({"config": 5}, "config", id="config is a number"),
        pytest.param({"config": "no-such-file.yaml"}, "config", id="config is no file"),
        pytest.param({"processors": 5}, "processors", id="processors is a number"),
        pytest.param({"processors": "redact"}, "processors", id="processors is a text"),
        pytest.param({"processors": [print]}, "processors", id="a processor without tags"),
        pytest.param({"processors": [Redact]}, "processors", id="a processor's class"),
        pytest.param({"exporters": MemoryExporter()}, "exporters", id="exporters is an exporter"),
        pytest.param({"exporters": ["otlp"]}, "exporters", id="an exporter's name"),
    ],
)
def test_a_wrong_argument_is_refused(start: Start, tmp_path: Path, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        start(**arguments)
    assert refused.value.field == field
    assert refused.value.fix
    assert str(refused.value).startswith(f"{field}=")
    assert list(find_sessions(tmp_path)) == []


def test_a_processor_for_a_tag_that_is_none_is_refused(start: Start) -> None:
    class Typo:
        tags = frozenset({"metric"})

        def __call__(self, event: Any) -> Any:
            return event

    with pytest.raises(ConfigError, match="metrics") as refused:
        start(processors=[Typo()])
    assert refused.value.field == "processors"


def test_a_second_journal_is_refused(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exactly one JsonlExporter keeps the journal"):
        start(exporters=[JsonlExporter(tmp_path / "a"), JsonlExporter(tmp_path / "b")])


def test_tags_in_one_text_are_words(start: Start) -> None:
    with start(tags="vision, large") as run:
        pass
    assert events(run, "run_begin")[0]["tags"] == ["vision", "large"]


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_where_a_directory_should_be(start: Start, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file: name a directory") as refused:
        start(directory=tmp_path / "file" / below)
    assert refused.value.field == "directory"


def _not_ours(directory: Path) -> None:
    if os.geteuid() == 0:
        os.chown(directory, 65534, 65534)  # root may write anywhere, and does not where it is not the owner
    else:
        directory.chmod(0o500)


def test_a_directory_that_cannot_be_written(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    memory, refused = tmp_path / "memory", tmp_path / "refused"
    memory.mkdir()
    refused.mkdir()
    _not_ours(refused)
    monkeypatch.setattr("stepspan.journal.location.SHARED_MEMORY", str(memory))
    with start(directory=refused) as run:
        run.log_metrics({"x": 1.0})
    assert outline(run) == ["run", "train -: x=1.0", "end run completed"]
    assert run.stats()["durable"] is False
    assert path_of(run).is_relative_to(memory)
    (told,) = warnings()
    assert str(refused) in told
    assert str(memory) in told


@pytest.mark.parametrize("given", ["argument", "variable", "file"])
def test_a_home_directory_is_meant_by_its_short_name(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "config.yaml").write_text('directory: "~/runs"')
    monkeypatch.setenv("STEPSPAN_DIRECTORY", "~/runs" if given == "variable" else "")
    arguments = {"argument": {"directory": "~/runs"}, "variable": {}, "file": {"config": "config.yaml"}}[given]
    with start(**arguments) as run:
        assert path_of(run).is_relative_to(tmp_path / "home" / "runs")
    assert not (tmp_path / "~").exists()


def test_a_disk_that_takes_nothing_stops_no_training(
    start: Start, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    class Full(Disk):
        def __init__(self) -> None:
            super().__init__()
            self.write_keeping_gil = lambda fd, data, length: -1  # type: ignore[assignment]

        def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
            raise OSError(28, "No space left on device")

    run = start(exporters=[JsonlExporter(tmp_path / "runs", disk=Full())])
    run.log_metrics({"x": 1.0})
    run.close()
    assert run.stats()["journaled"] == 0
    (told,) = warnings()
    assert "No space left on device" in told


@pytest.mark.parametrize(
    "job_id", ["team/vision/7", "..", "../../etc", ".", "a:b", "sweep 3", "x" * 300, "täglich-🚀", "-rf", "a\nb"]
)
def test_a_job_id_of_any_form_works_and_stays_in_the_directory(start: Start, tmp_path: Path, job_id: str) -> None:
    with start(job_id=job_id) as run:
        run.log_metrics({"x": 1.0})
    assert events(run)[0]["job_id"] == job_id
    assert events(run)[0]["resource"]["job_id"] == job_id
    assert path_of(run).resolve().parents[2] == tmp_path / "stepspan-runs"


def test_job_ids_that_look_alike_lie_apart(start: Start) -> None:
    homes = set()
    for job_id in ("a/b", "a:b", "a-b", "x" * 300, "x" * 301):
        with start(job_id=job_id) as run:
            homes.add(path_of(run).parents[1])
    assert len(homes) == 5


# metrics


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("0.5", id="text"),
        pytest.param(b"0.5", id="bytes"),
        pytest.param(None, id="None"),
        pytest.param(10**400, id="beyond float"),
        pytest.param(1 + 2j, id="complex"),
        pytest.param([1.0, 2.0], id="list of 2"),
        pytest.param(["1.0"], id="list of a text"),
        pytest.param([], id="empty list"),
        pytest.param(bytearray(b"0.5"), id="bytearray"),
        pytest.param(np.array("0.5"), id="array of a text"),
        pytest.param(np.zeros(2), id="array of 2"),
        pytest.param(Hostile(), id="hostile"),
        pytest.param(object, id="class"),
    ],
)
def test_a_value_that_is_no_number_costs_only_itself(run: Run, value: Any, warnings: Callable[[], list[str]]) -> None:
    for _ in range(3):
        run.log_metrics({"before": 1.0, "bad": value, "after": 2.0})
    assert [event["metrics"] for event in events(run, "metrics")] == [{"before": 1.0, "after": 2.0}] * 3
    assert run.stats()["warnings"] == {"value": 3}
    (told,) = warnings()
    assert "metric bad=" in told
    assert len(told) < 300


def test_a_number_written_as_an_array_of_one_is_a_number(run: Run) -> None:
    run.log_metrics({"x": np.ones(1)})
    assert [event["metrics"]["x"] for event in events(run, "metrics")] == [1.0]
    assert run.stats()["warnings"] == {}


@pytest.mark.parametrize(
    ("key", "written"),
    [
        (5, "5"),
        (None, "None"),
        (("a", 1), "('a', 1)"),
        (np.str_("x"), "x"),
        ("", ""),
        ("🚀", "🚀"),
        ("k" * 300, "k" * 300),
    ],
    ids=["int", "None", "tuple", "numpy text", "empty", "emoji", "300 characters"],
)
def test_a_key_of_any_kind_is_written_as_text(run: Run, key: Any, written: str) -> None:
    run.log_metrics({key: 1.0, "loss": 2.0})
    assert events(run, "metrics")[0]["metrics"] == {written: 1.0, "loss": 2.0}


def test_a_key_that_has_no_text_costs_nothing_but_its_name(run: Run) -> None:
    run.log_metrics({Hostile(): 1.0, "loss": 2.0})  # type: ignore[dict-item]
    assert events(run, "metrics")[0]["metrics"] == {"<Hostile: RuntimeError in __str__>": 1.0, "loss": 2.0}


def test_a_key_with_half_a_character_is_written(run: Run) -> None:
    run.log_metrics({"a\ud800": 1.0})
    assert list(events(run, "metrics")[0]["metrics"].values()) == [1.0]


@pytest.mark.parametrize(
    "metrics", [None, 5, "loss", [("loss", 1.0)], {1, 2}, HostileMapping()], ids=lambda m: type(m).__name__
)
def test_metrics_that_are_no_mapping_are_counted(run: Run, metrics: Any, warnings: Callable[[], list[str]]) -> None:
    run.log_metrics(metrics)
    run.log_metrics({"loss": 1.0})
    assert [event["metrics"] for event in events(run, "metrics")] == [{"loss": 1.0}]
    assert run.stats()["warnings"] == {"metrics": 1}
    assert len(warnings()) == 1


def test_no_metrics_are_no_event(run: Run) -> None:
    run.log_metrics({})
    assert events(run, "metrics") == []
    assert run.stats()["warnings"] == {}


# steps and epochs

NO_NUMBER = [
    pytest.param(True, id="truth value"),
    pytest.param(1.5, id="fraction"),
    pytest.param(float("nan"), id="nan"),
    pytest.param(-1, id="negative"),
    pytest.param(2**70, id="2**70"),
    pytest.param("7", id="text"),
    pytest.param(None, id="None"),
    pytest.param([7], id="list"),
    pytest.param(Hostile(), id="hostile"),
]
NUMBERS = [
    pytest.param(7, id="int"),
    pytest.param(7.0, id="whole float"),
    pytest.param(np.int32(7), id="numpy int"),
    pytest.param(np.float64(7), id="numpy float"),
    pytest.param(np.float32(7), id="numpy float of 32 bits"),
    pytest.param(np.array(7), id="0-d array"),
]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_whole_number_of_any_kind_is_one(run: Run, number: Any) -> None:
    with run.epoch(number), run.step(number):
        run.log_metrics({"x": 1.0}, step=number)
    assert events(run, "epoch_begin")[0]["epoch"] == 7
    assert events(run, "step_begin")[0]["step"] == 7
    assert events(run, "metrics")[0]["step"] == 7
    assert run.stats()["warnings"] == {}


@pytest.mark.parametrize("number", NO_NUMBER)
def test_a_step_without_a_number_takes_the_next(run: Run, number: Any, warnings: Callable[[], list[str]]) -> None:
    with run.step(4):
        pass
    with run.step(number):
        run.log_metrics({"x": 1.0})
    run.close()
    assert outline(run) == [
        *("run", "  step 4", "  end step"),
        *("  step 5", "train 5: x=1.0", "  end step", "end run completed"),
    ]
    assert run.stats()["warnings"] == {"step": 1}
    (told,) = warnings()
    assert told.startswith("stepspan: step=")


@pytest.mark.parametrize("number", NO_NUMBER)
def test_an_epoch_without_a_number_takes_the_next(run: Run, number: Any) -> None:
    for epoch in (4, number, 9):
        with run.epoch(epoch):
            pass
    assert [event["epoch"] for event in events(run, "epoch_begin")] == [4, 5, 9]
    assert run.stats()["warnings"] == {"step": 1}


@pytest.mark.parametrize("number", [n for n in NO_NUMBER if n.id != "None"])
def test_metrics_of_no_step_take_the_one_in_force(run: Run, number: Any) -> None:
    with run.step(3):
        run.log_metrics({"x": 1.0}, step=number)
    assert events(run, "metrics")[0].get("step") == 3
    assert "own_step" not in events(run, "metrics")[0]
    assert run.stats()["warnings"] == {"step": 1}


@pytest.mark.parametrize("number", [n for n in NO_NUMBER if n.id != "None"])
def test_a_loop_from_no_number_counts_from_the_next(run: Run, number: Any) -> None:
    assert list(run.steps("ab", start=number)) == ["a", "b"]
    assert [event["step"] for event in events(run, "step_begin")] == [0, 1]
    assert run.stats()["warnings"] == {"step": 1}


@pytest.mark.parametrize("accumulate", [1.5, "2", None, Hostile(), -3], ids=lambda a: type(a).__name__)
def test_accumulating_no_number_of_batches_takes_each(run: Run, accumulate: Any) -> None:
    assert list(run.steps("ab", accumulate=accumulate)) == ["a", "b"]
    assert len(events(run, "step_begin")) == 2
    assert run.stats()["warnings"] == {"step": 1}


def test_accumulating_none_is_accumulating_one(run: Run) -> None:
    assert list(run.steps("ab", accumulate=0)) == ["a", "b"]
    assert len(events(run, "step_begin")) == 2


@pytest.mark.parametrize(
    ("split", "written"),
    [(5, "5"), (Hostile(), "<Hostile: RuntimeError in __str__>"), (np.str_("val"), "val")],
    ids=["int", "hostile", "numpy text"],
)
def test_a_split_of_any_kind_is_text(run: Run, split: Any, written: str) -> None:
    with run.step(0, split=split):
        run.log_metrics({"x": 1.0})
    run.log_metrics({"x": 1.0}, split=split)
    assert list(run.steps("a", split=split)) == ["a"]
    found = [event["split"] for event in events(run, "step_begin", "metrics")]
    assert found == [written] * 4
    assert run.stats()["warnings"] == {}


# everything else that is told


@dataclasses.dataclass
class Config:
    lr: float
    layers: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class Slotted:
    lr: float


@pytest.mark.parametrize(
    ("params", "written"),
    [
        pytest.param(argparse.Namespace(lr=0.1, tags={"a"}), {"lr": 0.1, "tags": ["a"]}, id="Namespace"),
        pytest.param(Config(0.1, (2, 3)), {"lr": 0.1, "layers": [2, 3]}, id="dataclass"),
        pytest.param(Slotted(0.1), {"lr": 0.1}, id="dataclass with slots"),
        pytest.param({"lr": float("nan"), "top": float("-inf")}, {"lr": "NaN", "top": "-Infinity"}, id="not finite"),
        pytest.param({"path": Path("a/b"), "n": np.int64(3)}, {"path": "a/b", "n": 3}, id="objects"),
        pytest.param({1: 2, None: {3: 4}}, {"1": 2, "None": {"3": 4}}, id="keys that are no text"),
        pytest.param({"big": 2**70, "min": -(2**63)}, {"big": str(2**70), "min": -(2**63)}, id="huge numbers"),
    ],
)
def test_hyperparams_of_any_kind_are_recorded(run: Run, params: Any, written: dict[str, Any]) -> None:
    run.log_hyperparams(params)
    assert events(run, "hyperparams")[0]["params"] == written
    assert run.stats()["warnings"] == {}


@pytest.mark.parametrize("params", [None, 5, "lr=1", [1, 2], HostileMapping()], ids=lambda p: type(p).__name__)
def test_hyperparams_without_names_are_counted(run: Run, params: Any, warnings: Callable[[], list[str]]) -> None:
    run.log_hyperparams(params)
    assert events(run, "hyperparams") == []
    assert run.stats()["warnings"] == {"hyperparams": 1}
    assert len(warnings()) == 1


@pytest.mark.parametrize("unit", ["lorem ipsum ", "token-"])
def test_a_hyperparameter_of_10_mb_is_recorded_whole(run: Run, unit: str) -> None:
    prompt = unit * (10_000_000 // len(unit))
    run.log_hyperparams({"prompt": prompt, "lr": 0.1})
    (written,) = events(run, "hyperparams")
    assert written["params"] == {"prompt": prompt, "lr": 0.1}
    run.log_metrics({"after": 1.0})
    assert events(run, "metrics")[0]["metrics"] == {"after": 1.0}


def test_a_structure_that_contains_itself_is_recorded(run: Run) -> None:
    loop: dict[str, Any] = {"lr": 0.1}
    loop["self"] = loop
    run.log_hyperparams(loop)
    assert events(run, "hyperparams")[0]["params"]["lr"] == 0.1


@pytest.mark.parametrize(
    "value",
    [
        None,
        2**70,
        1j,
        float("nan"),
        object(),
        Hostile(),
        {"a": [1, {2}]},
        b"x",
        np.zeros(3),
        lambda: None,
        HostileMapping(),
    ],
    ids=lambda v: type(v).__name__,
)
def test_attributes_of_any_kind_raise_nothing_and_are_recorded_or_counted(run: Run, value: Any) -> None:
    with run.step(0), run.span("phase", value=value):
        run.log_event("milestone", value=value)
        run.log_error(ValueError("x"), value=value)
    run.log_metrics({"after": 1.0})
    run.close()
    spans, rare = events(run, "span_begin", "span_end"), events(run, "event", "error")
    assert len(spans) == 2
    assert len(rare) + sum(run.stats()["warnings"].values()) >= 2
    assert set(run.stats()["warnings"]) <= {"span", "event", "error"}
    assert len(events(run, "metrics")) == 1


@pytest.mark.parametrize("name", [5, None, Hostile(), "", "n" * 5000], ids=["int", "None", "hostile", "empty", "long"])
def test_names_of_any_kind_are_text(run: Run, name: Any) -> None:
    with run.span(name):
        run.log_event(name, status=name)
        run.log_artifact(name, __file__, kind=name)
    run.log_scalar(name, 1.0)
    found = [event["name"] for event in events(run, "span_begin", "event", "artifact")]
    assert len(found) == 3
    assert all(isinstance(each, str) for each in found)
    assert run.stats()["warnings"] == {}


@pytest.mark.parametrize("path", [5.5, None, Hostile()], ids=lambda p: type(p).__name__)
def test_an_artifact_without_a_path_is_counted(run: Run, path: Any, warnings: Callable[[], list[str]]) -> None:
    run.log_artifact("weights", path)
    run.log_artifact("weights", b"raw/\xff")  # type: ignore[arg-type]
    assert [event["name"] for event in events(run, "artifact")] == ["weights"]
    assert run.stats()["warnings"] == {"artifact": 2}
    lost, nowhere = warnings()
    assert "artifact was lost" in lost
    assert "artifact weights: there is no raw/" in nowhere


@pytest.mark.parametrize(
    "error", ["out of memory", None, ValueError, Hostile()], ids=["text", "None", "class", "hostile"]
)
def test_an_error_that_is_no_exception_is_recorded(run: Run, error: Any) -> None:
    run.log_error(error)
    assert len(events(run, "error")) == 1
    assert run.stats()["warnings"] == {}


def test_a_status_of_any_kind_closes(start: Start) -> None:
    run = start()
    run.close(Hostile())  # type: ignore[arg-type]
    assert outline(run)[-1] == "end run interrupted"
    assert run.stats()["warnings"] == {"status": 1}


def test_attributes_may_have_the_names_of_parameters(start: Start) -> None:
    run = start()
    run.log_event("event", name="mine")
    run.log_error(ValueError("no"), error="mine")
    with run.span("span", name="mine"):
        pass
    assert run.stats()["warnings"] == {}
