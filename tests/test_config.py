"""Settings: arguments over variables over a file, and what is said of a wrong one."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import runs
from harness.runs import events, path_of

import stepspan
from stepspan import ConfigError
from stepspan.config import Settings, load
from stepspan.integrations.opentelemetry import configure
from stepspan.journal.disk import Limits
from stepspan.run import Run

start = runs.start

# field -> its variable's text, and what that means
VARIABLES: dict[str, tuple[str, Any]] = {
    "enabled": ("false", False),
    "name": ("baseline", "baseline"),
    "group": ("sweep", "sweep"),
    "tags": ("vision, large,", ["vision", "large"]),
    "service_name": ("trainer", "trainer"),
    "resource": ("team=vision, tier=a=b", {"team": "vision", "tier": "a=b"}),
    "directory": ("/data/runs", Path("/data/runs")),
    "endpoint": ("http://127.0.0.1:4318", "http://127.0.0.1:4318"),
    "protocol": ("grpc", "grpc"),
    "destination": ("our-collector", "our-collector"),
    "headers_file": ("/run/secrets/otlp", Path("/run/secrets/otlp")),
    "delivery": ("thread", "thread"),
    "send_interval": ("0", 0.0),
    "close_timeout": ("30", 30.0),
    "metrics_ranks": ("0, 8,16-23", "0,8,16-23"),
    "traces_ranks": ("Rank0", "0"),
    "logs_ranks": ("1", "1"),
    "durability": ("disk", "disk"),
    "sync_every": ("0.5", 0.5),
    "segment_bytes": ("65536", 65536),
    "session_bytes": ("1048576", 1048576),
    "free_bytes": ("0", 0),
    "free_ratio": ("0.1", 0.1),
    "group_readable": ("1", True),
    "redact": ("no", False),
    "redact_names": ("codeword", ["codeword"]),
    "health": ("0", False),
    "propagate": ("0", False),
    "interruptions": ("StopTraining, keras.Stop", ["StopTraining", "keras.Stop"]),
    "stall_after": ("30", 30.0),
    "samplers": ("host, gpu", ["host", "gpu"]),
    "sample_interval": ("0.5", 0.5),
    "processors": ('[{"rename": {"metrics": {"a": "b"}}}]', [{"rename": {"metrics": {"a": "b"}}}]),
    "exporters": ('[{"endpoint": "http://127.0.0.1:1", "timeout": 2}]', None),
}


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "stepspan.yaml"
    path.write_text(text)
    return path


def test_every_field_has_its_variable_here() -> None:
    assert list(VARIABLES) == list(Settings.model_fields)


@pytest.mark.parametrize("field", VARIABLES)
def test_every_field_can_be_set_by_its_variable(field: str) -> None:
    text, meaning = VARIABLES[field]
    settings = load({}, {f"STEPSPAN_{field.upper()}": text})
    if field == "exporters":
        assert [(each.endpoint, each.timeout) for each in settings.exporters] == [("http://127.0.0.1:1", 2.0)]
    else:
        assert getattr(settings, field) == meaning
    assert settings != Settings()
    assert settings.model_fields_set == {field}


@pytest.mark.parametrize("field", [field for field, (text, _) in VARIABLES.items() if '"' not in text])
def test_quotes_and_space_around_a_variable_are_none_of_it(field: str) -> None:
    text, meaning = VARIABLES[field]
    assert getattr(load({}, {f"STEPSPAN_{field.upper()}": f' "{text}" '}), field) == meaning
    assert getattr(load({}, {f"STEPSPAN_{field.upper()}": f"'{text}'"}), field) == meaning


@pytest.mark.parametrize("word", ["HTTP/JSON", "http-json", "http_json"])
def test_a_protocol_has_spellings(word: str) -> None:
    assert load({"protocol": word}, {}).protocol == "http/json"
    assert load({}, {"STEPSPAN_PROTOCOL": word}).protocol == "http/json"


def test_json_in_a_variable_is_a_mapping() -> None:
    assert load({}, {"STEPSPAN_RESOURCE": ' {"team": "a,b", "n": 3}'}).resource == {"team": "a,b", "n": 3}


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_variable_is_not_set(blank: str) -> None:
    assert load({}, {"STEPSPAN_NAME": blank, "STEPSPAN_CONFIG": blank, "STEPSPAN_SYNC_EVERY": blank}) == Settings()


def test_an_argument_beats_a_variable_and_a_variable_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, "name: file\ngroup: file\ntags: [file]\nredact: false\n")
    env = {"STEPSPAN_CONFIG": str(path), "STEPSPAN_NAME": "variable", "STEPSPAN_GROUP": "variable"}
    settings = load({"name": "argument", "group": None}, env)
    assert (settings.name, settings.group, settings.tags, settings.redact) == ("argument", "variable", ["file"], False)


def test_the_file_that_is_an_argument_beats_the_one_that_is_a_variable(tmp_path: Path) -> None:
    path = file(tmp_path, "name: argument\n")
    assert load({}, {"STEPSPAN_CONFIG": "no-such-file"}, config=path).name == "argument"


def test_a_user_without_a_home_has_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's bare user id: neither HOME nor an entry in the password database."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it then answers
    monkeypatch.setattr(Path, "expanduser", None)
    assert load({}, {"STEPSPAN_DIRECTORY": "~/runs"}).directory == Path("~/runs")


def test_the_switch_beats_all(tmp_path: Path) -> None:
    assert load({"enabled": True}, {"STEPSPAN_DISABLED": "1", "STEPSPAN_ENABLED": "1"}).enabled is False


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_sets_nothing(tmp_path: Path, text: str) -> None:
    assert load({}, {}, config=file(tmp_path, text)) == Settings()


def test_a_file_holds_every_field(tmp_path: Path) -> None:
    settings = load(
        {},
        {},
        config=file(
            tmp_path,
            """
            directory: /data/runs
            resource: {team: vision}
            processors:
              - attributes: {values: {team: vision}}
            exporters:
              - endpoint: http://127.0.0.1:1
                headers: {x-scope-orgid: vision}
                processors: [{sample_steps: {every: 10}}]
            """,
        ),
    )
    assert settings.directory == Path("/data/runs")
    assert settings.resource == {"team": "vision"}
    assert settings.processors == [{"attributes": {"values": {"team": "vision"}}}]
    assert settings.exporters[0].headers == {"x-scope-orgid": "vision"}
    assert settings.exporters[0].processors == [{"sample_steps": {"every": 10}}]


def test_the_limits_of_the_journal() -> None:
    assert load({}, {}).limits() == Limits()
    assert Settings(durability="disk").limits().sync_every == 1.0
    assert Settings(durability="process", sync_every=5).limits().sync_every is None


# what is wrong

NOT_A_NUMBER = "valid number"


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("STEPSPAN_ENABLED", "maybe", "boolean"),
        ("STEPSPAN_PROTOCOL", "udp", "'http/protobuf', 'grpc' or 'http/json'"),
        ("STEPSPAN_DELIVERY", "later", "'process', 'thread' or 'off'"),
        ("STEPSPAN_DURABILITY", "paper", "'process' or 'disk'"),
        ("STEPSPAN_SYNC_EVERY", "often", NOT_A_NUMBER),
        ("STEPSPAN_SYNC_EVERY", "-1", "greater than or equal to 0"),
        ("STEPSPAN_SYNC_EVERY", "inf", "finite"),
        ("STEPSPAN_STALL_AFTER", "-1", "greater than or equal to 0"),
        ("STEPSPAN_SEGMENT_BYTES", "64MiB", "valid integer"),
        ("STEPSPAN_SEGMENT_BYTES", "10", "greater than or equal to 4096"),
        ("STEPSPAN_FREE_RATIO", "1", "less than 1"),
        ("STEPSPAN_RESOURCE", "team", "key=value"),
        ("STEPSPAN_RESOURCE", "=vision", "key=value"),
        ("STEPSPAN_RESOURCE", '{"team": ', "give JSON"),
        ("STEPSPAN_PROCESSORS", "redact", "give JSON"),
        ("STEPSPAN_PROCESSORS", '{"redact": {}}', "list"),
        ("STEPSPAN_EXPORTERS", "otlp", "give JSON"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(variable: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load({}, {variable: text})
    assert refused.value.field == variable
    assert says in refused.value.fix
    shown = "<str>" if variable == "STEPSPAN_EXPORTERS" else refused.value.value
    assert str(shown) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("directry: runs", "directry in {path}", "unknown; known are enabled, name,"),
        ("rank: 3", "rank in {path}", "unknown"),
        ("protocol: udp", "protocol in {path}", "'http/protobuf', 'grpc' or 'http/json'"),
        ("tags: 5", "tags in {path}", "list"),
        ("directory: null", "directory in {path}", "path"),
        ("exporters: [{endpont: x}]", "exporters in {path}.0.endpont", "unknown; known are endpoint, protocol"),
        ("exporters: [{timeout: 0}]", "exporters in {path}.0.timeout", "greater than 0"),
        ("- directory", "config", "key: value"),
        ("directory", "config", "key: value"),
        ("1: 2", "config", "key: value"),
        ("[]", "config", "key: value"),
        ("a: b: c", "config", "not YAML"),
        ("!!python/object:os.system {}", "config", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_its_entry(tmp_path: Path, text: str, field: str, says: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load({}, {}, config=path)
    assert refused.value.field == field.format(path=path)
    assert says in refused.value.fix
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["no-such-file.yaml", "."], ids=["missing", "a directory"])
@pytest.mark.parametrize("source", ["argument", "variable"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, source: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read") as refused:
        load(
            {}, {"STEPSPAN_CONFIG": path} if source == "variable" else {}, config=path if source == "argument" else None
        )
    assert refused.value.field == ("config" if source == "argument" else "STEPSPAN_CONFIG")
    assert refused.value.value == path


@pytest.mark.parametrize("path", ["no-such-file.yaml", ".", "needs-yaml.yaml"])
def test_a_file_that_a_variable_names_and_this_machine_lacks_costs_its_settings_only(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    monkeypatch.setenv("STEPSPAN_CONFIG", path)
    if path == "needs-yaml.yaml":
        monkeypatch.setitem(sys.modules, "yaml", None)
        Path(path).write_text("name: other")
    with start(name="mine") as run:
        run.log_metrics({"loss": 1.0})
    assert events(run, "run_begin")[0]["name"] == "mine"
    [told] = [record.getMessage() for record in caplog.records if "STEPSPAN_CONFIG" in record.getMessage()]
    assert told.endswith("ignored")
    with pytest.raises(ConfigError, match=r"^config="):
        start(config="no-such-file.yaml")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "stepspan.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load({}, {}, config=path)


def test_a_file_where_yaml_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError) as refused:
        load({}, {}, config=file(tmp_path, "name: x"))
    assert refused.value.fix == "reading YAML needs `pip install 'stepspan[yaml]'`"


@pytest.mark.parametrize(
    "text",
    [
        "exporters: {headers: {authorization: hunter2}}",
        "exporters: [{headers: [hunter2]}]",
        "exporters: [hunter2]",
        "exporters: [{endpont: x, headers: {authorization: hunter2}}]",
    ],
)
def test_a_refusal_shows_no_header(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load({}, {}, config=file(tmp_path, text))
    assert "hunter2" not in str(refused.value)


def test_a_refusal_is_a_value_error_and_short(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="protocol") as refused:
        load({"protocol": "x" * 10_000}, {})
    assert len(str(refused.value)) < 400


# in force


def test_every_field_is_a_documented_argument_of_start_run() -> None:
    """None is "not given", so that no default stands twice."""
    parameters = inspect.signature(stepspan.start_run).parameters
    identity = {"job_id", "rank", "local_rank", "world_size", "attempt"}
    assert parameters.keys() == Settings.model_fields.keys() | identity | {"config"}
    assert {(each.kind, each.default) for each in parameters.values()} == {(inspect.Parameter.KEYWORD_ONLY, None)}
    documented = re.findall(r"^    (\w+): \S", inspect.getdoc(stepspan.start_run) or "", re.M)
    assert set(documented) - {"ConfigError"} == parameters.keys()


def test_every_field_can_be_given_as_an_argument(start: Callable[..., Run], tmp_path: Path) -> None:
    """As a program that is checked by types gives them."""
    elsewhere = tmp_path / "elsewhere"
    with stepspan.start_run(
        job_id=np.int64(7),
        name="baseline",
        group="sweep",
        tags=("vision", "large"),
        service_name="trainer",
        resource={"team": "vision"},
        directory=elsewhere,
        endpoint="http://127.0.0.1:9",
        protocol="http/json",
        delivery="off",
        health=False,
        durability="disk",
        sync_every=0,
        segment_bytes=4096,
        session_bytes=1 << 20,
        free_bytes=0,
        free_ratio=0.0,
        group_readable=True,
        redact=True,
        redact_names=["codeword"],
        propagate=False,
        interruptions=[KeyError, "StopTraining"],
        stall_after=0,
        send_interval=2.0,
        close_timeout=1,
        metrics_ranks=[np.int64(0), 8],
        traces_ranks=range(2),
        logs_ranks=0,
        samplers=["process"],
        sample_interval=0.5,
        processors=[{"rename": {"metrics": {"acc": "accuracy"}}}],
        exporters=[{"endpoint": "http://127.0.0.1:10"}],
        enabled=True,
    ) as run:
        run.log_metrics({"acc": 1.0})
        run.log_event("x", codeword="sesame")
        for _ in range(100):
            run.log_metrics({"loss": 1.0})
    header, begin, *_ = events(run)
    assert (header["job_id"], header["resource"]["service.name"], header["resource"]["team"]) == (
        "7",
        "trainer",
        "vision",
    )
    assert (begin["name"], begin["group"], begin["tags"]) == ("baseline", "sweep", ["vision", "large"])
    journal = path_of(run)
    assert journal.is_relative_to(elsewhere)
    assert journal.stat().st_mode & 0o777 == 0o750
    assert len(list(journal.glob("0*.jsonl"))) > 1
    assert events(run, "metrics")[0]["metrics"] == {"accuracy": 1.0}
    assert "sesame" not in (journal / "000001.jsonl").read_text()
    assert {event["source"] for event in events(run, "sample")} == {"process"}
    assert run.stats()["delivery"] == {}
    assert not (elsewhere / ".deliverers").exists()


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        pytest.param(None, {"host", "process"}, id="not given"),
        pytest.param([], set(), id="empty list"),
        pytest.param("none", set(), id="none"),
        pytest.param("process", {"process"}, id="text"),
        pytest.param("host, process", {"host", "process"}, id="text with commas"),
        pytest.param(("host",), {"host"}, id="tuple"),
    ],
)
def test_samplers_are_a_list_or_a_text(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, given: Any, sampled: set[str]
) -> None:
    monkeypatch.delenv("STEPSPAN_SAMPLERS", raising=False)
    with start(samplers=given, stall_after=0) as run:
        pass
    assert {event["source"] for event in events(run, "sample")} - {"gpu", "torch"} == sampled


def test_an_argument_that_is_none_of_them_is_a_type_error(start: Callable[..., Run]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sampler'"):
        start(sampler=[])
    with pytest.raises(TypeError, match="unexpected keyword argument 'sampler'"):
        configure(sampler=[])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"delivery": "of"}, "delivery='of': Input should be 'process', 'thread' or 'off'"),
        ({"samplers": "cpu"}, "samplers.0='cpu': Input should be 'host', 'process', 'gpu' or 'torch'"),
        ({"stall_after": -1}, "stall_after=-1: Input should be greater than or equal to 0"),
        ({"segment_bytes": 1}, "segment_bytes=1: Input should be greater than or equal to 4096"),
        ({"durability": True}, "durability=True: Input should be 'process' or 'disk'"),
        ({"exporters": [{"endpoint": "http://h"}, object()]}, "exporters="),
        ({"processors": {"rename": {}}}, "processors="),
    ],
)
def test_a_wrong_argument_is_refused_with_field_value_and_fix(
    start: Callable[..., Run], arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        start(**arguments)
    assert str(refused.value).startswith(says)


def test_what_numpy_computed_is_a_number(start: Callable[..., Run]) -> None:
    with start(
        stall_after=np.float32(0), segment_bytes=np.int64(4096), health=np.bool_(False), rank=np.int8(0), delivery="off"
    ) as run:
        run.log_metrics({"x": 1.0})


def test_start_run_takes_them_from_all_three(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPSPAN_GROUP", "variable")
    path = file(
        tmp_path, "name: file\ngroup: file\nservice_name: file\nresource: {team: vision}\nsegment_bytes: 4096\n"
    )
    with start(config=path, service_name="argument") as run:
        for _ in range(100):
            run.log_metrics({"x": 1.0})
    first, begin = events(run)[:2]
    assert (begin["name"], begin["group"]) == ("file", "variable")
    assert first["resource"]["service.name"] == "argument"
    assert first["resource"]["team"] == "vision"
    assert len(events(run, "header")) > 1


def test_processors_of_a_file_work_before_the_journal(start: Callable[..., Run], tmp_path: Path) -> None:
    path = file(tmp_path, "redact_names: [codeword]\nprocessors: [{rename: {metrics: {loss: train_loss}}}]\n")
    with start(config=path) as run:
        run.log_metrics({"loss": 1.0})
        run.log_hyperparams({"codeword": "swordfish", "api_key": "abc", "lr": 0.1})
    assert events(run, "metrics")[0]["metrics"] == {"train_loss": 1.0}
    assert events(run, "hyperparams")[0]["params"] == {"codeword": "[redacted]", "api_key": "[redacted]", "lr": 0.1}


@pytest.mark.parametrize("entry", ["{blur: {}}", "{rename: {}, drop: {}}", "{rename: {metric: {}}}"])
def test_a_processor_that_is_none_is_refused(start: Callable[..., Run], tmp_path: Path, entry: str) -> None:
    with pytest.raises(ConfigError, match="processors"):
        start(config=file(tmp_path, f"processors: [{entry}]"))
