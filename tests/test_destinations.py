"""A name for a receiver: delivery goes on where it was, at whatever address; and what is new to an address waits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.delivery import Scripted, deliver, options, trained
from harness.processes import until
from harness.receiver import ScriptedReceiver
from harness.runs import command, path_of

from stepspan.deliver.ledgers import cursors
from stepspan.deliver.lock import DeliveryLock
from stepspan.deliver.routes import Route, route_of
from stepspan.deliver.sessions import LiveSessions
from stepspan.deliver.task import DeliveryTask
from stepspan.errors import ConfigError
from stepspan.exporters.memory import MemoryExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import Cursor, CursorInUse, CursorState, cursor_name
from stepspan.journal.format import decode, encode
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


def sent(receiver: ScriptedReceiver) -> dict[str, int]:
    """How often each event of a run arrived, repeats included."""
    found: dict[str, int] = {}
    for request in list(receiver.requests["logs"]):
        for part in request.resource_logs:
            for scope in part.scope_logs:
                for record in scope.log_records:
                    found[record.event_name] = found.get(record.event_name, 0) + 1
    return found


def attempt(start: Start, name: str, where: str, **arguments: Any) -> Path:
    with start(job_id="job", endpoint=where, **arguments) as run:
        run.log_event(name)
        assert run.flush(20)
        path = path_of(run)
    until(lambda: all(state.position.finished for signals in cursors(path).values() for state in signals.values()))
    return path


def at_localhost(receiver: ScriptedReceiver) -> str:
    return receiver.url.replace("127.0.0.1", "localhost")


# ---------------------------------------------------------------- live


def test_a_named_receiver_that_has_moved_is_sent_nothing_again(start: Start) -> None:
    with ScriptedReceiver() as receiver:
        attempt(start, "first", receiver.url, destination="ours")
        attempt(start, "second", at_localhost(receiver), destination="ours")
        attempt(start, "third", f"{at_localhost(receiver)}/", destination="ours")
        assert sent(receiver) == {"first": 1, "second": 1, "third": 1}


def test_a_new_address_gets_what_is_begun_for_it_and_the_run_says_what_waits(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "stepspan")
    with ScriptedReceiver() as old, ScriptedReceiver() as new:
        attempt(start, "first", old.url)
        attempt(start, "second", old.url)
        assert "new to" not in caplog.text
        attempt(start, "third", new.url)
        assert sent(old) == {"first": 1, "second": 1}
        assert sent(new) == {"third": 1}
        said = [record.getMessage() for record in caplog.records if "new to" in record.getMessage()]
        assert len(said) == 1
        assert f"2 finished sessions are new to {new.url} " in said[0]
        assert f"`stepspan sync {tmp_path / 'stepspan-runs'} --endpoint {new.url}` sends them" in said[0]
        assert "STEPSPAN_DESTINATION" in said[0]
        assert command("sync", tmp_path / "stepspan-runs", "--endpoint", new.url).returncode == 0
        assert sent(new) == {"first": 1, "second": 1, "third": 1}
        caplog.clear()
        attempt(start, "fourth", new.url)
        assert "new to" not in caplog.text
        assert sent(old) == {"first": 1, "second": 1}
        assert sent(new) == {"first": 1, "second": 1, "third": 1, "fourth": 1}


def test_a_name_takes_over_what_was_sent_to_its_address_and_a_sync_goes_by_it(start: Start, tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        first = attempt(start, "first", receiver.url)
        attempt(start, "second", receiver.url, destination="ours")
        until(lambda: [*cursors(first)] == ["ours"])
        synced = command("sync", tmp_path / "stepspan-runs", "--endpoint", receiver.url)
        assert "runs call this receiver ours" in synced.stderr
        assert synced.returncode == 0
        moved = "--endpoint", at_localhost(receiver)
        assert command("sync", tmp_path / "stepspan-runs", *moved, "--destination", "ours").returncode == 0
        assert command("sync", tmp_path / "stepspan-runs", *moved, STEPSPAN_DESTINATION="ours").returncode == 0
        attempt(start, "third", receiver.url)
        assert sent(receiver) == {"first": 1, "second": 1, "third": 1}, "not even where the name is forgotten"
        again = "--endpoint", receiver.url, "--destination", "again"
        assert command("sync", tmp_path / "stepspan-runs", *again).returncode == 0
        assert sent(receiver) == {"first": 2, "second": 2, "third": 2}, "a person asks for it"


def test_threads_send_no_history_to_an_exporter_that_is_new(start: Start) -> None:
    before, after = MemoryExporter(), MemoryExporter()
    after.destination = "new"
    for exporter, loss in ((before, 1.0), (after, 2.0)):
        with start(job_id="job", exporters=[exporter]) as run:
            run.log_metrics({"loss": loss})
            assert run.flush(20)
    names = [record[0].name for _, record in after.records["metrics"]]  # type: ignore[index, union-attr]
    assert names.count("training.loss") == len({"2.0", "its end"})


@pytest.mark.parametrize("name", ["", "two words", "a/b", "..", "x" * 65, "dot.ted"])
def test_a_name_that_no_file_can_have_is_refused(start: Start, name: str) -> None:
    if not name:
        assert OtlpExporter("http://c:4318", env={}, destination=name).is_named is False
        return
    with pytest.raises(ConfigError, match="destination"):
        start(endpoint="http://127.0.0.1:9", destination=name)


# ---------------------------------------------------------------- cursors


class Named(Scripted):
    address = "where"


def test_a_cursor_and_its_checkpoint_get_the_name_unless_somebody_sends_to_the_address(tmp_path: Path) -> None:
    session, how = trained(tmp_path, 3), options()
    first, named = Scripted(destination="where"), Named(destination="ours")
    deliver(session, first, how)
    taken = list(first.taken)
    with (
        closing(Cursor(session.path / "cursors" / cursor_name("where", "metrics"))),
        pytest.raises(CursorInUse),
    ):
        DeliveryTask(session, "metrics", named, how)
    deliver(session, named, how)
    assert named.taken == []
    assert [*cursors(session.path)] == ["ours"]
    with closing(Cursor(session.path / "cursors" / cursor_name("where", "metrics"))) as again:
        again.write(CursorState())
    deliver(session, named, how)
    assert {*cursors(session.path)} == {"ours", "where"}, "one that has begun keeps its own"
    assert (session.path / "cursors" / "where-named").exists()
    assert taken


# ---------------------------------------------------------------- whose sessions


class Host:
    """Sessions on one host, and which of them a route's deliverer sends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0
        self.locks: list[DeliveryLock] = []

    def session(
        self,
        job: str,
        *routes: tuple[str, str],
        alive: bool = False,
        denied: str = "",
        cursor: str = "",
        rank: int = 0,
        run_key: str = "",
        tenant: str = "",
    ) -> str:
        self.count += 1
        name = f"{0xA0 + self.count:016x}"
        written = trained(
            self.directory / "written" / name,
            1,
            session=name,
            rank=rank,
            started=self.count,
            run_key=run_key or name,
            boot_id="another",
            destinations=[destination for destination, _ in routes],
            routes=[{"destination": d, "digest": k, "address": d, "tenant": tenant} for d, k in routes],
        )
        place = self.directory / "runs" / job / "here"
        place.mkdir(parents=True, exist_ok=True)
        path = written.path.rename(place / written.path.name)
        if alive:
            (path / "closed.json").unlink()
        for destination in filter(None, (denied, cursor)):
            (path / "cursors").mkdir(exist_ok=True)
            with closing(Cursor(path / "cursors" / cursor_name(destination, "metrics"))) as state:
                state.write(CursorState(session=name, state="hold" if denied else "ok", denied=bool(denied)))
        return name

    def at_work(self, *locks: str) -> None:
        for name in locks:
            self.locks.append(DeliveryLock(self.directory / "runs", "here", name))
            assert self.locks[-1].acquire()

    def stop(self) -> None:
        while self.locks:
            self.locks.pop().release()

    def sent(self, destination: str, digest: str = "", address: str = "") -> list[str]:
        route = Route(destination, digest, address or destination, digest, "http://c")
        sessions = LiveSessions(self.directory / "runs", "here", options(), {destination: route})
        return sorted(session.session for session in sessions(destination))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_another_jobs_sessions_are_their_routes_own(host: Host) -> None:
    one = host.session("one", ("there", "k1"))
    other = host.session("other", ("there", "k2"))
    assert host.sent("there", "k1") == [one]
    assert host.sent("there", "k2") == [other]
    assert host.sent("there", "k3") == []


def test_a_dead_session_of_the_job_goes_with_the_latest_credentials_that_are_at_work(host: Host) -> None:
    first, second = host.session("job", ("there", "k1")), host.session("job", ("there", "k2"))
    third = host.session("job", ("there", "k3"), alive=True)
    assert host.sent("there", "k1") == [first], "nobody else is at work"
    assert host.sent("there", "k2") == [first, second]
    assert host.sent("there", "k3") == [first, second, third]
    host.at_work("there-k3")
    assert host.sent("there", "k1") == []
    assert host.sent("there", "k2") == []
    host.stop()


def test_a_live_session_stays_with_its_own_credentials_unless_they_are_refused(host: Host) -> None:
    live, refused = (
        host.session("job", ("there", "k1"), alive=True),
        host.session("job", ("there", "k1"), alive=True, denied="there", rank=1),
    )
    later = host.session("job", ("there", "k2"), alive=True, rank=2)
    host.at_work("there-k2")
    assert host.sent("there", "k1") == [live]
    host.stop()
    assert host.sent("there", "k1") == [live, refused]
    assert host.sent("there", "k2") == [refused, later]


def test_ranks_of_one_attempt_serve_one_another_only_where_nobody_else_does(host: Host) -> None:
    dead = host.session("job", ("there", "k1"), run_key="a")
    refused = host.session("job", ("there", "k1"), run_key="a", denied="there", rank=1)
    other = host.session("job", ("there", "k2"), run_key="a", alive=True, rank=2)
    host.at_work("there-k1")
    assert host.sent("there", "k2") == [refused, other]
    host.stop()
    assert host.sent("there", "k2") == [dead, refused, other]
    host.at_work("there-k2")
    assert host.sent("there", "k1") == [dead]
    host.stop()


def test_earlier_credentials_serve_no_later_session(host: Host) -> None:
    first = host.session("job", ("there", "k1"), alive=True)
    host.session("job", ("there", "k2"), denied="there")
    host.at_work("there-k1")
    assert host.sent("there", "k1") == [first]
    host.stop()


def test_under_a_name_credentials_of_a_later_job_serve_what_nobody_sends(host: Host) -> None:
    dead = host.session("one", ("ours", "k1"))
    refused = host.session("one", ("ours", "k1"), denied="ours")
    live = host.session("one", ("ours", "k1"), alive=True)
    other = host.session("other", ("ours", "k2"), alive=True)
    assert host.sent("ours", "k2", address="where") == [dead, refused, other]
    host.at_work("ours-k1")
    assert host.sent("ours", "k2", address="where") == [refused, other]
    host.stop()
    host.at_work("ours-k2")
    assert host.sent("ours", "k1", address="where") == [dead, live], "it is at work itself"
    host.stop()
    assert host.sent("ours", "k2") == [other], "without a name an address is all there is"


def test_no_tenants_data_goes_out_with_the_credentials_of_another_one(host: Host, tmp_path: Path) -> None:
    host.session("one", ("ours", "k1"), tenant="a")
    host.session("one", ("ours", "k1"), tenant="a", denied="ours")
    own = host.session("two", ("ours", "k2"), tenant="b", alive=True)
    assert host.sent("ours", "k2", address="where") == [own]

    def tenant(value: str) -> str:
        return route_of(OtlpExporter("http://c", headers={"X-Scope-OrgID": value}, env={}), tmp_path).tenant

    assert tenant("a") != tenant("b")
    assert route_of(OtlpExporter("http://c", headers={"authorization": "Bearer x"}, env={}), tmp_path).tenant == ""


def test_a_name_gets_what_was_begun_for_its_address_with_the_same_credentials(host: Host) -> None:
    same, other_key = host.session("one", ("where", "k1")), host.session("two", ("where", "k2"))
    later = host.session("three", ("ours", "k1"), alive=True)
    assert host.sent("ours", "k1", address="where") == [same, later]
    host.at_work("where-k1")
    assert host.sent("ours", "k1", address="where") == [later], "another deliverer is at it"
    host.stop()
    host.session("two", ("ours", "k1"), alive=True)
    assert other_key in host.sent("ours", "k1", address="where"), "of the same job"


def test_what_was_begun_for_another_address_stays_with_that(host: Host) -> None:
    offline = host.session("job")
    synced = host.session("job", cursor="elsewhere")
    begun, known = host.session("job", ("elsewhere", "")), host.session("job", ("elsewhere", ""), cursor="there")
    now = host.session("job", ("there", ""))
    assert host.sent("there") == [offline, known, now]
    assert host.sent("elsewhere") == [offline, synced, begun, known]


def test_what_went_on_under_a_name_is_not_sent_to_its_address_again(host: Host) -> None:
    moved = host.session("job", ("where", ""), cursor="ours")
    (path,) = (host.directory / "runs").glob(f"*/*/*{moved}")
    (path / "cursors" / "where-named").touch()
    now = host.session("job", ("where", ""))
    assert host.sent("where") == [now]


def test_what_earlier_versions_began_goes_as_it_did(host: Host) -> None:
    old = host.session("job", ("there", "k1"))
    path = next((host.directory / "runs").glob("*/*/*"))
    line = (path / "000001.jsonl").read_bytes()
    assert b'"routes"' in line
    first, rest = line.split(b"\n", 1)
    header = decode(first)
    del header["routes"]
    (path / "000001.jsonl").write_bytes(encode(header) + rest)
    assert host.sent("there", "k2") == [old]
    assert host.sent("there") == [old]
