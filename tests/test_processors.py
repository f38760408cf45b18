"""Processors: what each does to an event, what it leaves alone, and what it refuses to be made of."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from harness.events_of import SessionEvents, mapper
from hypothesis import given, settings
from hypothesis import strategies as st

from stepspan.errors import ConfigError
from stepspan.events import Event
from stepspan.processors import Attributes, Drop, Redact, Rename, SampleSteps, build, specs
from stepspan.processors.redact import REDACTED

SECRET_NAMES = [
    "api_key", "apiKey", "APIKey", "api-key", "x-api-key", "X-Api-Key", "OPENAI_API_KEY", "wandb.api_key", "password",
    "db_password", "DB_PASSWORD", "passwd", "passphrase", "secret", "client_secret", "aws_secret_access_key",
    "secretKey", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "private_key", "credentials", "Authorization",
    "Proxy-Authorization", "hub_token", "push_to_hub_token", "HF_TOKEN", "hfToken", "use_auth_token", "access_token",
    "accessToken", "github_token", "csrf_token", "token", "Token",
]  # fmt: skip
HARMLESS_NAMES = [
    "pad_token", "eos_token", "bos_token", "unk_token", "mask_token", "pad_token_id", "max_new_tokens", "tokens",
    "num_key_value_heads", "tokenizer_name", "tokenizer", "author", "authors", "tokens_per_sec", "token_count", "key",
    "keys", "monkey", "keyboard", "secretary", "password_length", "api_key_file", "hidden_size", "loss", "image_token",
]  # fmt: skip


def hyperparams(params: Any, **arguments: Any) -> Any:
    event = Redact(**arguments)({"ts": 1, "seq": 2, "tag": "hyperparams", "params": params})
    assert (event["ts"], event["seq"], event["tag"]) == (1, 2, "hyperparams")
    return event["params"]


def redacted(text: str) -> Any:
    return Redact()({"tag": "error", "message": text})["message"]


# --- redact: by name


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_text_under_a_secrets_name_is_replaced(name: Any) -> None:
    assert hyperparams({name: "hunter2"}) == {name: REDACTED}


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_a_text_under_a_harmless_name_stays(name: Any) -> None:
    assert hyperparams({name: "<pad>"}) == {name: "<pad>"}


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_numbers_booleans_and_nothing_are_no_secrets(name: Any) -> None:
    params = {name: 512, "a": {name: True}, "b": {name: None}, "c": {name: ""}, "d": {name: 0.5}}
    assert hyperparams(params) == params


def test_secrets_are_found_however_deep_and_all_that_lies_under_a_secrets_name_is_one() -> None:
    params = {
        "trainer": {"loggers": [{"name": "wandb", "api_key": "k"}], "lr": 0.5},
        "credentials": {"user": "me", "nested": [{"pass": "p"}, "q", 3]},
        "passwords": ["a", "b"],
    }
    assert hyperparams(params) == {
        "trainer": {"loggers": [{"name": "wandb", "api_key": REDACTED}], "lr": 0.5},
        "credentials": {"user": REDACTED, "nested": [{"pass": REDACTED}, REDACTED, 3]},
        "passwords": [REDACTED, REDACTED],
    }


def test_further_names_are_whole_and_without_case() -> None:
    params = {"Account": "1", "account_name": "2", "api_key": "3"}
    assert hyperparams(params, names=["account"]) == {"Account": REDACTED, "account_name": "2", "api_key": REDACTED}


# --- redact: within text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:hunter2@host:8443/x?y=1", "https://[redacted]@host:8443/x?y=1"),
        ("redis://:hunter2@host/0", "redis://[redacted]@host/0"),
        ("https://user:p@ss:word@host/x", "https://[redacted]@host/x"),
        ("postgresql+psycopg://u:p@h/db and s3://k:v@b", "postgresql+psycopg://[redacted]@h/db and s3://[redacted]@b"),
        ("connect(url='https://u:p@h')", "connect(url='https://[redacted]@h')"),
        ("Invalid api_key=abc123, retry", "Invalid api_key=[redacted], retry"),
        ("OPENAI_API_KEY='sk live 1' python", "OPENAI_API_KEY='[redacted]' python"),
        ('{"api_key": "abc", "lr": 1}', '{"api_key": "[redacted]", "lr": 1}'),
        ('{\\"password\\": \\"abc\\", \\"lr\\": 1}', '{\\"password\\": \\"[redacted]", \\"lr\\": 1}'),
        ("login(password='a', user='b')", "login(password='[redacted]', user='b')"),
        ("password: hunter2\nTraceback", "password: [redacted]\nTraceback"),
        ("Authorization: Bearer abc.def-1", "Authorization: [redacted]"),
        ("{'Authorization': 'Basic dXNlcg=='}", "{'Authorization': '[redacted]'}"),
        ("got Bearer eyJhbGciOi1.x-y", "got Bearer [redacted]"),
        ("train.py --hub-token abc --lr 1", "train.py --hub-token [redacted] --lr 1"),
        ("train.py --wandb_api_key=abc --lr 1", "train.py --wandb_api_key=[redacted] --lr 1"),
        ("https://b.s3/x?X-Amz-Signature=ab12&X-Amz-Date=1", "https://b.s3/x?X-Amz-Signature=[redacted]&X-Amz-Date=1"),
        ("https://h/x?token=abc&page=2", "https://h/x?token=[redacted]&page=2"),
        ("cannot load hf_abcdefghijklmnopqrst", "cannot load [redacted]"),
        ("key sk-proj-abcdefghijklmnop123 is wrong", "key [redacted] is wrong"),
        ("AKIAIOSFODNN7EXAMPLE", "[redacted]"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "[redacted]"),
    ],
)  # fmt: skip
def test_credentials_within_a_text_are_replaced(text: str, clean: str) -> None:
    assert redacted(text) == clean
    assert redacted(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "pad_token=<pad> max_new_tokens=512 num_key_value_heads: 8 tokenizer_name=bert",
        "pad_token=\"<pad>\", eos_token='</s>'",
        "basic functionality and bearer authentication of tokens",
        "unexpected token: '<'",
        "KeyError: 'key'",
        "https://host:4318/v1/traces",
        "http://localhost:4318?mail=a@b",
        "git@github.com:owner/repo.git",
        "/home/secret_project/password_reset/model.pt",
        "Enter your password:\nTraceback (most recent call last)",
        "the secret is out",
        "hf_short and sk-short",
    ],
)
def test_a_text_without_credentials_stays(text: str) -> None:
    assert redacted(text) == text


def test_every_string_of_an_error_and_of_the_header_is_looked_at() -> None:
    error = {
        "tag": "error",
        "type": "ValueError",
        "message": "api_key=abc1",
        "stack": 'File "x.py"\n    connect("https://u:p@h")\nValueError: api_key=abc1',
        "attributes": {"url": "https://u:p@h", "hub_token": "t"},
    }
    header = {"tag": "header", "resource": {"service.name": "training", "db.password": "p", "url": "https://u:p@h"}}
    assert b"abc1" not in orjson.dumps(Redact()(error))
    assert b"u:p" not in orjson.dumps(Redact()(error))
    assert Redact()(error)["attributes"]["hub_token"] == REDACTED
    assert Redact()(header)["resource"] == {
        "service.name": "training",
        "db.password": REDACTED,
        "url": "https://[redacted]@h",
    }


@pytest.mark.parametrize(
    "tag", ["header", "run_begin", "hyperparams", "artifact", "event", "error", "log", "span_begin"]
)
def test_events_with_texts_of_users_are_redacted(tag: str) -> None:
    assert tag in Redact.tags


def test_the_hot_path_is_not() -> None:
    assert not {"metrics", "step_begin", "step_end"} & Redact.tags


PIECES = [
    "_", "-", "a-", "--", "--a-", "password", "password ", "password=", "password='", "api_", "api-key", "x://", "x://a:",
    "bearer ", "basic\t", "Bearer a1", "&", "?token=", "&signature", "hf_", "sk-", "\n", " ", "\\", '"', "'", "A", "1",
    ":", "@", "[redacted]", "é",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("head", ["", "password", "--a"])
def test_a_long_text_takes_time_in_proportion_to_its_length(head: str, piece: Any) -> None:
    """A pattern that tries every pair of places would need 10,000 times as long for 100 times as much: minutes."""
    redact = Redact()
    text = head + piece * (100_000 // len(piece))
    begin = time.process_time()
    redact({"tag": "hyperparams", "params": {text: text}})
    assert time.process_time() - begin < 5.0


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_redaction_takes_anything_and_is_done_after_once(value: Any) -> None:
    once = hyperparams({"x": value})
    assert hyperparams(once) == once


def test_what_follows_an_option_of_a_command_line_is_its_value() -> None:
    argv = [
        "train.py",
        "--lr",
        "0.1",
        "--hub-token",
        "hunter2!",
        "-v",
        "--password",
        "p",
        "--account",
        "a",
        "--epochs",
        3,
    ]
    assert Redact(["account"])({"tag": "hyperparams", "params": {"argv": argv}})["params"]["argv"] == [
        *("train.py", "--lr", "0.1", "--hub-token", REDACTED, "-v", "--password", REDACTED),
        *("--account", REDACTED, "--epochs", 3),
    ]


@pytest.mark.parametrize("key", [("db", "password"), ("password",), '"api_key"'])
def test_a_key_that_was_no_text_is_known_by_its_words(key: Any) -> None:
    assert hyperparams({str(key): "hunter2!", "('pad_token',)": "<pad>"}) == {
        str(key): REDACTED,
        "('pad_token',)": "<pad>",
    }


def test_what_is_not_looked_at_is_cut_and_counted() -> None:
    secret, many = "hunter2!", 250_000
    params = {f"key{n}": f"value{n}" for n in range(many)} | {"password": secret, "note": f"password={secret}"}
    begin = time.thread_time()
    event = Redact()({"tag": "hyperparams", "params": params})
    event_of_list = Redact()({"tag": "event", "attributes": {"words": ["password=x"] * many}})
    assert time.thread_time() - begin < 1.5
    assert secret.encode() not in orjson.dumps(event)
    assert 0 < len(event["params"]) < 20_000
    assert event["cut"] == many + 2 - len(event["params"])
    assert event_of_list["cut"] == many - len(event_of_list["attributes"]["words"])
    assert Redact()(event) == event


@pytest.mark.parametrize(
    "filler",
    ["key and value: " * 100_000, "x" * 20_000_000, "token: " + "x" * 2_000_000],
    ids=["hints", "plain", "word"],
)
def test_a_text_is_cut_where_it_is_not_looked_at_any_more(filler: str) -> None:
    secret = "hf_" + "abc1" * 8
    text = f"{filler} {secret} password=hunter2!"
    begin = time.thread_time()
    event = Redact()({"tag": "hyperparams", "params": {"text": text, "more": text}})
    assert time.thread_time() - begin < 1.5
    found = event["params"]["text"]
    kept, _, told = found.rpartition("[cut: ")
    assert filler.startswith(kept)
    assert told == f"{len(text) - len(kept)} characters]"
    assert "hunter2" not in str(event)
    assert secret not in str(event)
    assert event["cut"] == 2


@pytest.mark.parametrize("size", range(-40, 40, 7))
def test_a_credential_at_the_cut_is_not_written_in_part(size: int) -> None:
    credential = "sk-" + "abcdef0123456789" * 2
    text = "key " * ((256 * 1024 + size) // 4 - 8) + credential + " and " * 10_000
    found = redacted(text)
    assert "sk-" not in found
    assert "abcdef" not in found


def test_otlp_keeps_its_form_where_attributes_are_cut() -> None:
    attributes = [{"key": f"k{n}", "value": {"stringValue": "password=hunter2!"}} for n in range(30_000)]
    record = {"name": "s", "traceId": "00" * 16, "attributes": attributes}
    event = Redact()({"tag": "otel", "signal": "traces", "scope": {}, "record": record})
    kept = event["record"]["attributes"]
    assert kept[0] == {"key": "k0", "value": {"stringValue": "password=[redacted]"}}
    assert event["cut"] == 30_000 - len(kept) > 0
    assert event["record"]["traceId"] == "00" * 16


def test_a_list_within_otlp_is_cut_and_a_key_of_megabytes_is_looked_at_from_its_end() -> None:
    items = [{"stringValue": "password=hunter2!"}] * 250_000
    attribute = {"key": "words", "value": {"arrayValue": {"values": items}}}
    begin = time.thread_time()
    event = Redact()({"tag": "otel", "signal": "logs", "scope": {}, "record": {"attributes": [attribute]}})
    kept = event["record"]["attributes"][0]["value"]["arrayValue"]["values"]
    assert kept[0] == {"stringValue": "password=[redacted]"}
    assert event["cut"] == 250_000 - len(kept) > 0
    long_key = "key_" * 10**6 + "_password"
    assert list(Redact()({"tag": "event", "attributes": {long_key: "hunter2!"}})["attributes"].values()) == [REDACTED]
    assert time.thread_time() - begin < 1.5


def test_objects_that_another_processor_added_are_looked_into() -> None:
    event = Redact()({"tag": "event", "attributes": {"login": SimpleNamespace(user="ann", password="hunter2!")}})
    assert event["attributes"] == {"login": {"user": "ann", "password": REDACTED}}


# --- the others


def test_attributes_are_added_and_what_an_event_says_stays() -> None:
    stage = Attributes({"team": "vision", "n": 1})
    assert stage({"tag": "span_begin", "name": "a"})["attributes"] == {"team": "vision", "n": 1}
    assert stage({"tag": "event", "attributes": {"n": 2}})["attributes"] == {"team": "vision", "n": 2}
    assert stage.tags == {"span_begin", "event", "error"}
    assert Attributes({}, metrics=True).tags == {"span_begin", "event", "error", "metrics"}


def test_attributes_are_written_as_the_journal_can_hold_them() -> None:
    assert Attributes({"path": ValueError("x"), "nan": float("nan")}).values == {"path": "x", "nan": "NaN"}


def test_rename_changes_keys_and_of_two_that_become_one_the_later_wins() -> None:
    event = {"tag": "metrics", "metrics": {"train_loss": 1.0, "lr": 2.0, "train/loss": 3.0}}
    assert Rename({"train_loss": "train/loss"})(event)["metrics"] == {"train/loss": 3.0, "lr": 2.0}


def test_drop_takes_metrics_by_pattern_and_the_event_with_its_last_one() -> None:
    drop = Drop(["grad/*", "lr"])
    event = {"tag": "metrics", "metrics": {"grad/a": 1.0, "loss": 2.0, "lr": 3.0}}
    assert drop(event) == {"tag": "metrics", "metrics": {"loss": 2.0}}
    assert len(event["metrics"]) == 3
    assert drop({"tag": "metrics", "metrics": {"grad/a": 1.0}}) is None
    assert drop.tags == {"metrics"}


def test_drop_takes_events_by_tag_and_by_name() -> None:
    drop = Drop(tags=["hyperparams"], events=["debug.*"])
    assert drop.tags == {"hyperparams", "event"}
    assert drop({"tag": "hyperparams", "params": {}}) is None
    assert drop({"tag": "event", "name": "debug.x"}) is None
    assert drop({"tag": "event", "name": "checkpoint"}) == {"tag": "event", "name": "checkpoint"}


def test_sample_steps_thins_metrics_and_traces_but_every_step_still_counts() -> None:
    s = SessionEvents()
    for number in range(10):
        step = s.emit("step_begin", parent=0, step=number, split="train")
        s.metrics({"loss": 1.0}, step=number)
        s.emit("step_end", 0.2, begin=step)
    s.metrics({"total": 1.0}, step=9, over=True)
    s.metrics({"loss": 2.0, "val/loss": 1.0}, step=9)
    s.metrics({"gsm8k": 1.0}, step=9, own_step=8)
    s.metrics({"mmlu": 1.0}, step=8, own_step=7)
    stage = SampleSteps(4)
    events = [found for e in s.events if (found := stage(e) if e["tag"] in stage.tags else e)]
    points = mapper("metrics", s.header)
    found: list[Any] = [*points.map(events), *points.finish(s.closed())]  # type: ignore[no-redef]
    times = [value for series, _, value in found if series.name == "training.step.time"]  # type: ignore[str-unpack, union-attr]
    (durations,) = [value for series, _, value in found if series.kind == "histogram" and value]  # type: ignore[str-unpack, union-attr]
    assert [e["step"] for e in events if e["tag"] == "metrics"] == [0, 4, 8, 9, 9, 9]
    assert [[*e["metrics"]] for e in events if e["tag"] == "metrics"][3:] == [["total"], ["val/loss"], ["gsm8k"]]
    assert (len(times), durations.count) == (11, 10)
    assert [span.attributes["step"] for span in mapper("traces", s.header).map(events)] == [0, 4, 8]
    assert any(series.name == "training.total" for series, _, _ in found)  # type: ignore[str-unpack, union-attr]
    assert "thin" not in s.events[3]


# --- settings

ENTRIES = [
    {"redact": {"names": ["account"]}},
    {"attributes": {"values": {"team": "vision"}, "metrics": True}},
    {"rename": {"metrics": {"a": "b"}}},
    {"drop": {"metrics": ["grad/*"], "tags": ["gap"], "events": ["debug.*"]}},
    {"sample_steps": {"every": 10}},
]


def test_settings_make_processors_and_processors_say_what_they_were_made_of() -> None:
    made = build(ENTRIES)  # type: ignore[arg-type]
    assert [type(stage) for stage in made] == [Redact, Attributes, Rename, Drop, SampleSteps]
    assert orjson.loads(orjson.dumps(specs(made))) == ENTRIES
    assert specs(build(specs(made))) == ENTRIES


@pytest.mark.parametrize("arguments", [None, {}])
def test_a_processor_may_need_no_arguments(arguments: Any) -> None:
    assert specs(build([{"redact": arguments}])) == [{"redact": {"names": []}}]


def test_of_somebody_elses_processor_only_its_type_is_known() -> None:
    class Mine:
        tags = frozenset({"metrics"})

        def __call__(self, event: Event) -> Any:
            return event

    (spec,) = specs([Mine()])
    assert list(spec.values()) == [{}]
    assert next(iter(spec)).endswith("Mine")


@pytest.mark.parametrize(
    ("entry", "field", "says"),
    [
        ({"redcat": {}}, "processors", "known are attributes, drop, redact, rename, sample_steps"),
        ({"redact": {}, "drop": {}}, "processors", "each entry is one"),
        ({}, "processors", "each entry is one"),
        ("redact", "processors", "each entry is one"),
        ({"redact": {"name": []}}, "processors.redact", "unexpected keyword argument 'name'"),
        ({"redact": 3}, "processors.redact", "must be a mapping"),
        ({"redact": {"names": "account"}}, "redact.names", "give a list: ['account']"),
        ({"attributes": {}}, "processors.attributes", "missing 1 required positional argument: 'values'"),
        ({"attributes": {"values": ["a"]}}, "attributes.values", "give a mapping"),
        ({"rename": {"metrics": "a=b"}}, "rename.metrics", "give a mapping"),
        ({"rename": {"metrics": {"a": 3}}}, "rename.metrics", "give a mapping"),
        ({"drop": {"metrics": "grad/*"}}, "drop.metrics", "give a list: ['grad/*']"),
        ({"drop": {"tags": ["metric"]}}, "drop.tags", "unknown; known are header"),
        ({"sample_steps": {"every": 0}}, "sample_steps.every", "whole number of at least 1"),
        ({"sample_steps": {"every": "3"}}, "sample_steps.every", "whole number of at least 1"),
        ({"sample_steps": {"every": 2.5}}, "sample_steps.every", "whole number of at least 1"),
        ({"sample_steps": {"every": True}}, "sample_steps.every", "whole number of at least 1"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_with_the_field_and_the_fix(entry: Any, field: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build([entry])
    assert refused.value.field == field
    assert says in str(refused.value)
