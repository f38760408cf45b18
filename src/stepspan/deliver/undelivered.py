"""What a run says as it ends of what was not delivered: what waits, why, who goes on, and the command that sends it.

One line for each run and host. The ranks of a run share what they wait for, so one says it for all of them: local rank
0 or, once that has ended, whoever comes first to know. `DeliveryLock.claim` keeps the others silent.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, NamedTuple

from stepspan.deliver import ledgers
from stepspan.errors import JournalError
from stepspan.events import Event
from stepspan.journal.cursor import CursorState
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.journal.liveness import quiet_for, read_closed
from stepspan.journal.reader import JournalReader, last_event
from stepspan.mapping.records import SIGNALS
from stepspan.values import format_seconds

if TYPE_CHECKING:
    from stepspan.exporters.otlp import OtlpExporter


MAX_SESSIONS = 256
"""Of a host's folder, that are looked at for those of one run."""
RUNS_VARIABLES = ", with this run's variables,"


class Undelivered(NamedTuple):
    """What of a run waits for one destination.

    Attributes:
        destination: Its name.
        lines: Journal lines that no signal, or not every one, has delivered.
        sessions: How many sessions they lie in: of all the run's ranks on this host.
        reasons: Why -> the signals that wait for that.
        needs_a_person: Whether all of them are held.
        denied: Whether the receiver has refused the credentials.

    """

    destination: str
    lines: int
    sessions: int
    reasons: Mapping[str, list[str]]
    needs_a_person: bool
    denied: bool = False


class Launch(NamedTuple):
    """A run on this host.

    Attributes:
        run_key: What its ranks have in common, and no other run has.
        sessions: Of all ranks and workers, the one that was asked for first.
        leader: The session of local rank 0; None where there is none.

    """

    run_key: str
    sessions: list[SessionPath]
    leader: SessionPath | None


def launch_of(own: SessionPath) -> Launch:
    """The run that a session belongs to. Of many sessions only those that were changed last are looked at."""
    header = _header(own)
    if header is None:
        return Launch(own.session, [own], None)
    found = sorted((quiet_for(s.path), s.path, s) for s in find_sessions(own.path.parent) if s.path != own.path)
    launch = Launch(str(header.get("run_key")), [own], None)
    for session in (own, *(session for _, _, session in found[:MAX_SESSIONS])):
        about = header if session is own else _header(session)
        if about is None or str(about.get("run_key")) != launch.run_key:
            continue
        if session is not own:
            launch.sessions.append(session)
        if about.get("local_rank") == 0 and not about.get("role"):
            launch = launch._replace(leader=session)
    return launch


def _header(session: SessionPath) -> Event | None:
    with suppress(OSError, JournalError), closing(JournalReader(session)) as reader:
        return reader.header
    return None


def find_undelivered(
    sessions: Collection[SessionPath],
    targets: Collection[tuple[str, str]],
    urls: Mapping[tuple[str, str], str],
    otherwise: Callable[[str], str],
) -> list[Undelivered]:
    """What waits for which destination.

    Args:
        sessions: Of a run. What waits of the first one says for which destinations and signals the others count, too.
        targets: The (destination, signal) pairs that the run is delivered to.
        urls: Where each of them leads; what a message has of it is no difference between reasons.
        otherwise: Why a destination may not have what it has not refused; "" where nobody knows.

    """
    states = {session: ledgers.cursors(session.path) for session in sessions}
    own = next(iter(states.values()))
    found = []
    for destination in sorted({destination for destination, _ in targets}):
        signals = [
            signal
            for signal in SIGNALS
            if (destination, signal) in targets and not _is_finished(own.get(destination, {}).get(signal))
        ]
        if signals:
            of_all = {session: each.get(destination, {}) for session, each in states.items()}
            lines = [_pending(session, known, signals) for session, known in of_all.items()]
            count = max(1, sum(number > 0 for number in lines))
            reasons, needs_a_person = _reasons(destination, signals, of_all.values(), urls, otherwise)
            denied = any(state.denied for each in of_all.values() for state in each.values())
            found.append(Undelivered(destination, sum(lines), count, reasons, needs_a_person, denied))
    return found


def _reasons(
    destination: str,
    signals: Collection[str],
    cursors: Collection[Mapping[str, CursorState]],
    urls: Mapping[tuple[str, str], str],
    otherwise: Callable[[str], str],
) -> tuple[dict[str, list[str]], bool]:
    """Why signals wait -> which; and whether all of them are held. Reasons that differ in a URL are one."""
    reasons: dict[str, list[str]] = {}
    alike: dict[str, str] = {}
    now, asked_until, held = time.time(), 0.0, True
    for signal in signals:
        known = [each[signal] for each in cursors if signal in each]
        failing = next((state for state in known if state.failing), None)
        why = otherwise(destination) or "not sent yet" if failing is None else failing.message
        held &= failing is not None and failing.state == "hold"
        asked_until = max(asked_until, failing.asked_until if failing is not None else 0.0)
        words = why
        for url in urls.values():
            words = words.replace(url, "")
        reasons.setdefault(alike.setdefault(words, why), []).append(signal)
    if asked_until > now and (last := next(reversed(reasons))):
        reasons[f"{last}; it asks to wait {format_seconds(asked_until - now)} more"] = reasons.pop(last)
    return reasons, held


def _is_finished(state: CursorState | None) -> bool:
    return state is not None and state.position.finished


def _pending(session: SessionPath, states: Mapping[str, CursorState], signals: Collection[str]) -> int:
    """The lines of a session that wait, of the signal that is farthest behind."""
    try:
        closed = read_closed(session.path)
        seq, ts = (closed.seq, closed.ts) if closed else last_event(session)
    except (OSError, JournalError):
        return 0
    waiting = [states.get(signal, CursorState()) for signal in signals]
    return max(
        (ledgers.signal_ledger(each, seq, ts)["pending"] for each in waiting if not each.position.finished), default=0
    )


def undelivered_text(found: Undelivered, where: str, goes_on: str, command: str) -> str:
    """The words for what waits.

    Args:
        found: What waits.
        where: The receiver, as people know it.
        goes_on: Who goes on with it; "" for nobody.
        command: What sends it.

    """
    lines = f"{found.lines:,} line{'s' if found.lines != 1 else ''}" if found.lines else "the last records"
    of = f" of {found.sessions} sessions" if found.sessions > 1 else ""
    wait = "waits" if found.lines == 1 else "wait"
    why = "; ".join(f"{', '.join(signals)}: {reason}" for reason, signals in found.reasons.items())
    if found.denied:
        command = f"{command.removesuffix(RUNS_VARIABLES)}, with credentials that are taken,"
    after = f"{goes_on}; what it leaves, {command} sends" if goes_on else f"nobody goes on: {command} sends it"
    return f"{lines}{of} {wait} for {where}: {why}; {after}"


def receiver_text(exporter: OtlpExporter) -> str:
    """Where an exporter sends to, without paths that all receivers have."""
    urls = {each.display_url.removesuffix(f"/v1/{signal}") for signal, each in exporter.endpoints.items()}
    return ", ".join(sorted(urls)) or exporter.destination


def sync_command(session: SessionPath, exporter: OtlpExporter, env: Mapping[str, str]) -> str:
    """The command that sends what an exporter has not: with the same cursors, wherever it is called.

    Args:
        session: Of the run: the job's folder is sent.
        exporter: Of the run.
        env: The variables that it was made with.

    """
    from stepspan.exporters.otlp import OtlpExporter

    words = ["stepspan", "sync", str(session.path.parents[1])]
    endpoint = exporter.settings["endpoint"] or env.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip("\"' ")
    if exporter.faults:  # a variable is wrong, and the address with it
        return f"`{shlex.join(words)}`, once that is right,"
    shows_all = bool(endpoint) and not any(mark in endpoint for mark in "@?")  # these may hold credentials
    protocol = exporter.settings["protocol"] or env.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").strip("\"' ")
    name = ""
    if shows_all:
        words += ["--endpoint", endpoint, *(["--protocol", protocol] if protocol else [])]
        with suppress(Exception):  # what cannot be told is given
            name = OtlpExporter(endpoint, protocol=protocol or None, env={}).destination
    if name != exporter.destination:
        words += ["--destination", exporter.destination]
    has_more = any(each.headers or each.certificate or each.credentials for each in exporter.endpoints.values())
    return f"`{shlex.join(words)}`" + ("" if shows_all and not has_more else RUNS_VARIABLES)


def is_in_container() -> bool:
    """Whether this process seems to live in a container, which may end with the training."""
    marks = ("/.dockerenv", "/run/.containerenv")
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(map(os.path.exists, marks))
