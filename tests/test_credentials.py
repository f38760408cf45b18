"""With whose credentials data goes out: the run's own; and how those are renewed while it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.processes import until
from harness.received import attributes
from harness.receiver import ScriptedReceiver, Seen, losses
from harness.runs import command, path_of

from stepspan.deliver.ledgers import cursors
from stepspan.deliver.routes import read_salt, route_of
from stepspan.exporters.otlp import OtlpExporter
from stepspan.mapping.records import SIGNALS
from stepspan.otlp.credentials import HeadersFile, parse_headers
from stepspan.otlp.endpoint import Endpoint, resolve_destination
from stepspan.otlp.outcome import Outcome
from stepspan.otlp.transport import open_transport
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]
PROTOCOLS = ("http/protobuf", "http/json", "grpc")


def exporter(receiver: ScriptedReceiver, key: str, protocol: str = "http/protobuf", **arguments: Any) -> OtlpExporter:
    where = receiver.grpc_target if protocol == "grpc" else receiver.url
    return OtlpExporter(where, protocol=protocol, headers={"authorization": key}, env={}, **arguments)


def keys(receiver: ScriptedReceiver) -> dict[str, set[str]]:
    """Job -> the keys with which its data came, of requests that were taken."""
    found: dict[str, set[str]] = {}
    for each in receiver.seen:
        if each.answer.accepted:
            for job in _jobs(each):
                found.setdefault(job, set()).add(each.headers.get("authorization", ""))
    return found


def _jobs(seen: Seen) -> set[str]:
    parts = {"metrics": "resource_metrics", "traces": "resource_spans", "logs": "resource_logs"}[seen.signal]
    resources = [part.resource for part in getattr(seen.request, parts)]
    return {a.value.string_value for r in resources for a in r.attributes if a.key == "job_id"}


def about_itself(report: Any) -> Any:
    return attributes(report.resource_metrics[0].resource)["service.instance.id"]


def states(session: Path) -> set[str]:
    return {state.state for signals in cursors(session).values() for state in signals.values()}


def sent(endpoint: Endpoint) -> Outcome:
    with closing(open_transport(endpoint)) as transport:
        return transport.send(b"")


def written(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


# ---------------------------------------------------------------- each run's own


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_runs_at_a_time_send_each_with_its_own_key(start: Start, tmp_path: Path, protocol: str) -> None:
    with ScriptedReceiver() as receiver:
        with start(job_id="a", exporters=[exporter(receiver, "key-of-a", protocol)]) as one:
            one.log_metrics({"loss": 1.0})
            assert one.flush(20)
            with start(job_id="b", exporters=[exporter(receiver, "key-of-b", protocol)]) as other:
                other.log_metrics({"loss": 2.0})
                assert other.flush(20)
            one.log_metrics({"loss": 3.0})
        until(lambda: losses(receiver) == {"a": {1.0, 3.0}, "b": {2.0}})
        assert keys(receiver) == {"a": {"key-of-a"}, "b": {"key-of-b"}}
        if protocol == "http/protobuf":
            until(lambda: len({about_itself(report) for report in receiver.health}) == 2, 20)
        assert {"key-of-a", "key-of-b"} >= {seen.headers.get("authorization") for seen in receiver.seen}
    assert b"key-of-" not in written(tmp_path / "stepspan-runs")


RANK = """
import os, sys, stepspan
with stepspan.start_run(job_id="job") as run:
    run.log_metrics({"loss": float(os.environ["RANK"])})
    assert run.flush(30)
    sys.stdin.readline()
"""


def test_ranks_of_one_job_and_host_may_have_tokens_of_their_own(tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not runs.is_ours(name)}
    with ScriptedReceiver() as receiver:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK],
                env={
                    **inherited,
                    **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                    "WORLD_SIZE": "2",
                    "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
                    "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=of-{rank}",
                },
                cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        until(lambda: losses(receiver) == {"job": {0.0, 1.0}}, 30)
        for rank in reversed(ranks):
            rank.communicate("\n", timeout=60)
        instances = {
            (seen.headers["authorization"], attribute.value.string_value)
            for seen in receiver.seen
            if seen.signal == "metrics"
            for part in seen.request.resource_metrics
            for attribute in part.resource.attributes
            if attribute.key == "service.instance.id"
        }
        assert instances == {("of-0", "job-0"), ("of-1", "job-1")}


def test_what_sets_of_credentials_are_the_same(tmp_path: Path) -> None:
    def digest(env: dict[str, str] | None = None, **arguments: Any) -> str:
        found = OtlpExporter(env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", **(env or {})}, **arguments)
        return route_of(found, tmp_path).digest

    assert digest() == ""
    variable = "OTEL_EXPORTER_OTLP_HEADERS"
    one = digest({variable: "X-Key=secret,x-other=b"})
    assert one == digest({variable: "x-other=b, x-key=secret"}) == digest(headers={"X-KEY": "secret", "X-Other": "b"})
    others = [
        digest({variable: "x-key=secret"}),
        digest({variable: "x-key=Secret,x-other=b"}),
        digest({variable: "x-key=,x-other=b"}),
        digest({variable: "x-key="}),
        digest({"OTEL_EXPORTER_OTLP_METRICS_HEADERS": "x-key=secret,x-other=b"}),
        digest({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:secret@c:4318"}),
        digest({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:other@c:4318"}),
        digest({"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "/a.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY": "/a.key"}),
        digest({"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "/b.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY": "/b.key"}),
        digest({"STEPSPAN_HEADERS_FILE": "/a"}),
        digest(headers_file="/b"),
        digest({"OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER": "gcp"}),
        digest(destination="named"),
        digest({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:4318"}, destination="named"),
    ]
    assert len({"", one, *others}) == len(others) + 2
    assert all(len(each) == 12 for each in others)
    assert (tmp_path / ".deliverers" / "salt").stat().st_mode & 0o777 == 0o600
    elsewhere = OtlpExporter("http://c:4318", headers={"x-key": "secret", "x-other": "b"}, env={})
    assert route_of(elsewhere, tmp_path / "another").digest != one, "each directory has its own salt"


def test_a_salt_that_is_being_written_is_waited_for_and_one_that_cannot_be_kept_is_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut" / ".deliverers").mkdir(parents=True)
    (tmp_path / "cut" / ".deliverers" / "salt").write_bytes(b"short")
    assert len(read_salt(tmp_path / "cut")) == 32
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    assert read_salt(tmp_path / "no-links") == read_salt(tmp_path / "no-links")
    (tmp_path / "file").write_text("")
    assert read_salt(tmp_path / "file") == read_salt(tmp_path / "file" / "below")


# ---------------------------------------------------------------- later credentials


def test_a_later_job_serves_only_itself_where_the_destination_has_no_name(start: Start, tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        receiver.keys = {"old"}
        with start(job_id="first", exporters=[exporter(receiver, "old")]) as first:
            first.log_metrics({"loss": 1.0})
            assert first.flush(20)
            receiver.keys = {"fresh"}
            first.log_metrics({"loss": 2.0})
            until(lambda: "hold" in states(path_of(first)))
            with start(job_id="second", exporters=[exporter(receiver, "fresh")]) as second:
                second.log_metrics({"loss": 3.0})
                assert second.flush(20), "nothing of it waits behind the first one's"
            assert losses(receiver) == {"first": {1.0}, "second": {3.0}}
        assert keys(receiver) == {"first": {"old"}, "second": {"fresh"}}
        runs_ = tmp_path / "stepspan-runs"
        synced = command("sync", runs_, "--endpoint", receiver.url, OTEL_EXPORTER_OTLP_HEADERS="authorization=fresh")
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert "begun with other credentials or at another address, and sent as given here: 1 sessions" in synced.stdout
        assert losses(receiver) == {"first": {1.0, 2.0}, "second": {3.0}}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_refused_session_of_a_named_destination_goes_on_with_a_later_jobs_credentials(
    start: Start, protocol: str
) -> None:
    with ScriptedReceiver() as receiver:
        receiver.keys = {"old"}
        with start(job_id="first", exporters=[exporter(receiver, "old", protocol, destination="ours")]) as first:
            first.log_metrics({"loss": 1.0})
            assert first.flush(20)
            receiver.keys = {"fresh"}
            first.log_metrics({"loss": 2.0})
            until(lambda: "hold" in states(path_of(first)))
            with start(
                job_id="second", exporters=[exporter(receiver, "fresh", protocol, destination="ours")]
            ) as second:
                second.log_metrics({"loss": 3.0})
                assert second.flush(20)
                until(lambda: losses(receiver) == {"first": {1.0, 2.0}, "second": {3.0}})
                first.log_metrics({"loss": 4.0})
                assert first.flush(20), "its session is live, and stays with who can send it"
        until(lambda: losses(receiver) == {"first": {1.0, 2.0, 4.0}, "second": {3.0}})


def test_a_job_that_is_queued_again_with_a_fresh_token_loses_nothing(start: Start) -> None:
    with ScriptedReceiver() as receiver:
        receiver.keys = {"fresh"}
        with start(job_id="job", exporters=[exporter(receiver, "old")]) as first:
            first.log_metrics({"loss": 1.0})
        assert losses(receiver) == {}
        with start(job_id="job", exporters=[exporter(receiver, "fresh")]) as second:
            second.log_metrics({"loss": 2.0})
            until(lambda: losses(receiver) == {"job": {1.0, 2.0}})


def test_a_sync_with_good_credentials_takes_over_from_a_deliverer_that_was_refused_and_from_no_other(
    start: Start, tmp_path: Path
) -> None:
    with ScriptedReceiver() as receiver:
        receiver.keys = {"fresh", "good"}
        with (
            start(job_id="live", exporters=[exporter(receiver, "old")]),
            start(job_id="other", exporters=[exporter(receiver, "good")]) as other,
        ):
            with start(job_id="refused", exporters=[exporter(receiver, "old")]) as refused:
                refused.log_metrics({"loss": 1.0})
                until(lambda: "hold" in states(path_of(refused)))
            other.log_metrics({"loss": 2.0})
            assert other.flush(20)
            variables = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=fresh"}
            synced = command("sync", tmp_path / "stepspan-runs", "--endpoint", receiver.url, **variables)
            assert losses(receiver) == {"refused": {1.0}, "other": {2.0}}, synced.stdout + synced.stderr
            assert keys(receiver)["other"] == {"good"}


# ---------------------------------------------------------------- a file


def test_what_a_headers_file_may_look_like() -> None:
    assert parse_headers(b"authorization=Bearer%20abc,x-scope-orgid=team\n") == {
        "authorization": "Bearer abc",
        "x-scope-orgid": "team",
    }
    text = "\ufeff# the token\r\n\r\nAuthorization: Bearer a,b=c==\r\nX-Key = 'quoted'\r\n"
    assert parse_headers(text.encode()) == {"authorization": "Bearer a,b=c==", "x-key": "quoted"}
    assert parse_headers(b"x-empty=") == {"x-empty": ""}
    for content, why in ((b"", "no header"), (b"\n#\n", "no header"), (b"a=b\nsecret", "line 2"), (b"k=\xff", "codec")):
        with pytest.raises(ValueError, match=why) as error:
            parse_headers(content)
        assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="the value of header key must be") as error:
        parse_headers("key=s\u00e9cret".encode())
    assert "cret" not in str(error.value)


def test_a_headers_file_is_read_again_when_it_changes_or_leads_elsewhere(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "otlp").write_text(f"authorization={name}")
    (tmp_path / "data").symlink_to("one")
    file = HeadersFile(str(tmp_path / "data" / "otlp"))
    first = file.headers()
    assert first == {"authorization": "one"}
    assert file.headers() is first
    (tmp_path / "new").symlink_to("two")
    (tmp_path / "new").rename(tmp_path / "data")  # as Kubernetes does it
    assert file.headers() == {"authorization": "two"}
    (tmp_path / "two" / "otlp").write_text("")  # being written, in place
    assert file.headers() == {"authorization": "two"}
    (tmp_path / "two" / "otlp").unlink()
    assert file.headers() == {"authorization": "two"}
    (tmp_path / "two" / "otlp").write_text("authorization=three")
    assert file.headers() == {"authorization": "three"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_token_that_is_renewed_in_its_file_never_holds_delivery(
    start: Start, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("authorization=token-one")
    monkeypatch.setenv("STEPSPAN_HEADERS_FILE", "token")  # where the deliverer does not stand
    with ScriptedReceiver() as receiver:
        receiver.keys = {"token-one"}
        where = receiver.grpc_target if protocol == "grpc" else receiver.url
        with start(job_id="job", endpoint=where, protocol=protocol) as run:
            run.log_metrics({"loss": 1.0})
            assert run.flush(20)
            token.write_text("authorization=token-two")
            receiver.keys = {"token-two"}
            run.log_metrics({"loss": 2.0})
            assert run.flush(20)
            receiver.keys = {"token-three"}
            run.log_metrics({"loss": 3.0})
            until(lambda: "hold" in states(path_of(run)))
            token.write_text("authorization=token-three")
            until(lambda: losses(receiver) == {"job": {1.0, 2.0, 3.0}}, 10)  # a hold alone waits for 7 s and more
    assert b"token-" not in written(tmp_path / "stepspan-runs")


@pytest.mark.parametrize("delivery", ["process", "thread"])
def test_a_headers_file_that_is_not_there_holds_and_says_so_until_it_is(
    start: Start, tmp_path: Path, delivery: str
) -> None:
    with ScriptedReceiver() as receiver:
        with start(job_id="job", endpoint=receiver.url, headers_file=tmp_path / "token", delivery=delivery) as run:
            run.log_metrics({"loss": 1.0})
            until(lambda: "hold" in states(path_of(run)))
            shown = command("status", tmp_path / "stepspan-runs").stdout
            assert f"the headers file {tmp_path / 'token'} cannot be used: No such file or directory" in shown
            (tmp_path / "token").write_text("authorization: Bearer x")
            until(lambda: losses(receiver) == {"job": {1.0}}, 10)
        assert keys(receiver) == {"job": {"Bearer x"}}


def test_two_threads_that_are_refused_at_once_both_see_the_new_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("authorization=one")
    with ScriptedReceiver() as receiver:
        receiver.keys = {"two"}
        exporter_ = OtlpExporter(receiver.url, headers_file=token, env={})
        with ExitStack() as opened:
            transports = [opened.enter_context(closing(open_transport(exporter_.endpoints[s]))) for s in SIGNALS]
            refused = [each.send(b"") for each in transports]
            assert all(outcome.denied for outcome in refused)
            assert all(outcome.message.endswith(f"sent with file {token}") for outcome in refused)
            token.write_text("authorization=two")
            assert not any(each.send(b"").denied for each in transports)


# ---------------------------------------------------------------- a function, a provider


def test_headers_of_a_function_are_asked_for_with_each_request_on_threads(start: Start) -> None:
    with ScriptedReceiver() as receiver:
        receiver.keys = {"one"}
        valid = iter(["one"])

        def headers() -> dict[str, str]:
            return {"authorization": next(valid, max(receiver.keys or {""}))}

        with start(job_id="job", exporters=[OtlpExporter(receiver.url, headers=headers, env={})]) as run:
            assert type(run._delivery).__name__ == "ThreadDelivery"
            run.log_metrics({"loss": 1.0})
            assert run.flush(20)
            receiver.keys = {"two"}
            run.log_metrics({"loss": 2.0})
            assert run.flush(20)
        assert losses(receiver) == {"job": {1.0, 2.0}}


def test_a_function_that_fails_holds_without_its_words() -> None:
    def headers() -> dict[str, str]:
        raise RuntimeError("secret")

    endpoint = resolve_destination({}, endpoint="http://127.0.0.1:9", headers=headers).endpoints["logs"]
    outcome = sent(endpoint)
    assert outcome.denied
    assert "RuntimeError" in outcome.message
    assert "secret" not in outcome.message


PROVIDERS = """
import grpc, pathlib, requests
class Auth(requests.auth.AuthBase):
    def __call__(self, request):
        request.headers["authorization"] = "of " + request.url.rpartition("/")[2]
        return request
class Session(requests.Session):
    def request(self, *args, headers=None, **kwargs):  # as google.auth's does it
        return super().request(*args, headers={**(headers or {}), "x-extra": "1"}, **kwargs)
def session():
    found = Session()
    found.auth = Auth()
    return found
def channel():
    return grpc.ssl_channel_credentials(pathlib.Path(CERTIFICATE).read_bytes())
def fails():
    raise RuntimeError("secret")
"""


@pytest.fixture
def providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of the import path, in which a package with credential providers is installed."""
    directory = tmp_path / "site"
    (directory / "creds-1.dist-info").mkdir(parents=True)
    (directory / "creds-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: creds\nVersion: 1\n")
    (directory / "creds-1.dist-info" / "entry_points.txt").write_text(
        "[opentelemetry_otlp_credential_provider]\nhttp_creds = creds:session\ngrpc_creds = creds:channel\n"
        "failing = creds:fails\nabsent = creds:nothing\n"
    )
    (directory / "creds.py").write_text(PROVIDERS)
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]))
    yield directory
    sys.modules.pop("creds", None)


def test_a_providers_session_signs_what_the_deliverer_sends(
    start: Start, providers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "http_creds")
    with ScriptedReceiver() as receiver:
        with start(job_id="job", endpoint=receiver.url) as run:
            run.log_metrics({"loss": 1.0})
            run.log_event("milestone")
            assert run.flush(20)
        signed = {(seen.signal, seen.headers["authorization"], seen.headers["x-extra"]) for seen in receiver.seen}
        assert signed == {(signal, f"of {signal}", "1") for signal in SIGNALS}
        assert all(seen.headers["user-agent"].startswith("stepspan/") for seen in receiver.seen)


def test_a_providers_channel_credentials_are_the_channels(providers: Path) -> None:
    with ScriptedReceiver(tls=True) as receiver:
        (providers / "creds.py").write_text(f"CERTIFICATE = {receiver.certificate_file!r}\n{PROVIDERS}")
        name = "OTEL_PYTHON_EXPORTER_OTLP_GRPC_METRICS_CREDENTIAL_PROVIDER"
        env = {name: "grpc_creds", "OTEL_EXPORTER_OTLP_INSECURE": "false"}
        found = OtlpExporter(receiver.grpc_target, protocol="grpc", env=env)
        assert not sent(found.endpoints["metrics"]).message
        assert sent(found.endpoints["traces"]).message, "the variable is of metrics alone"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nobody", "no installed package has an entry point of opentelemetry_otlp_credential_provider named so"),
        ("failing", "failed: RuntimeError"),
        ("absent", "cannot be imported: AttributeError"),
        ("grpc_creds", "failed: NameError"),
    ],
)
def test_a_provider_that_gives_nothing_holds_and_says_why(providers: Path, name: str, why: str) -> None:
    variable = "OTEL_PYTHON_EXPORTER_OTLP_HTTP_LOGS_CREDENTIAL_PROVIDER"
    outcome = sent(OtlpExporter("http://127.0.0.1:9", env={variable: name}).endpoints["logs"])
    assert outcome.denied
    assert outcome.message.startswith(f"{variable}={name}")
    assert why in outcome.message


def test_a_signals_provider_goes_before_the_general_one() -> None:
    general = "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER"
    env = {general: "all", "OTEL_PYTHON_EXPORTER_OTLP_HTTP_LOGS_CREDENTIAL_PROVIDER": "logs"}
    endpoints = OtlpExporter("http://c:4318", env=env).endpoints
    named = {s: endpoint.credentials.identity for s, endpoint in endpoints.items() if endpoint.credentials}
    assert named == {"metrics": ["provider all"], "traces": ["provider all"], "logs": ["provider logs"]}
