"""`stepspan doctor`: whether a run would work here, and with what."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stepspan._version import __version__
from stepspan.config import Settings, load
from stepspan.errors import ConfigError
from stepspan.events import SCHEMA
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.identity import host_facts, resolve, resource_attributes
from stepspan.journal.layout import sessions_of_rank
from stepspan.journal.writer import JournalWriter, Limits
from stepspan.mapping.records import SIGNALS, Signal
from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Verdict
from stepspan.otlp.transport import open_transport
from stepspan.processors import build
from stepspan.samplers import sampled_by
from stepspan.samplers.gpu import gpu
from stepspan.start import _exporters_of

LINES = 2000
PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp", "grpcio", "orjson", "pydantic", "requests", "torch")


class Report:
    """Lines of findings; `failed` counts those that would keep a run from working."""

    failed = 0

    def say(self, what: str, value: object) -> None:
        """A fact."""
        print(f"  {what:<16} {value}")

    def fail(self, what: str, why: object) -> None:
        """Something that is wrong."""
        self.failed += 1
        print(f"  {what:<16} FAIL: {why}")


def examine(directory: Path | None, endpoint: str | None) -> int:
    """Print what was found. The exit code."""
    report = Report()
    try:
        settings = load({"directory": directory, "endpoint": endpoint}, os.environ)
        build(settings.processors)
    except ConfigError as error:
        print("settings")
        report.fail("settings", error)
        return 1
    if not settings.enabled:
        print("settings\n  enabled          no: start_run() does nothing (STEPSPAN_DISABLED)")
    local_rank = _identity(report, settings.directory, settings.service_name)
    _journal(report, settings.directory, settings.limits())
    _endpoints(report, settings)
    _samplers(report, settings.samplers, settings.sample_interval, local_rank)
    _versions(report)
    print(f"\n{'a run would work' if not report.failed else f'{report.failed} problem(s): see FAIL above'}")
    return 1 if report.failed else 0


def _identity(report: Report, directory: Path, service_name: str | None) -> int:
    """The local rank."""
    print("identity")
    try:
        earlier = lambda job, rank: len(sessions_of_rank(directory, job, rank))  # noqa: E731
        me = resolve({}, os.environ, host_facts(), earlier_sessions=earlier)
        attributes, warnings = resource_attributes(me, os.environ, service_name=service_name)
    except ConfigError as error:
        report.fail("identity", error)
        return 0
    for field in ("job_id", "rank", "local_rank", "world_size", "attempt"):
        report.say(field, f"{getattr(me, field)}  ({me.sources[field]})")
    report.say("launcher", me.launcher)
    report.say("service.name", attributes["service.name"])
    for warning in (*me.warnings, *warnings):
        report.say("warning", warning)
    if me.may_merge:
        report.fail(
            "job_id", "nothing distinguishes this launch from the next one: give STEPSPAN_JOB_ID, new for each launch"
        )
    return me.local_rank


def _journal(report: Report, directory: Path, limits: Limits) -> None:
    print("journal")
    try:
        place = Path(directory).absolute()
        made = [path for path in (place, *place.parents) if not path.exists()]
        journal = JsonlExporter(directory, limits=limits)
    except (ConfigError, OSError) as error:
        report.fail("directory", error)
        return
    if not journal.durable:
        report.fail("directory", f"{directory} cannot be written: a run would keep its journal in memory")
        return
    report.say("directory", journal.directory)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=journal.directory) as session:
        header = {"ts": 0, "seq": 0, "tag": "header", "session": "0" * 16, "rank": 0, "role": "", "schema": SCHEMA}
        writer = JournalWriter(Path(session), header, limits=limits)
        before = time.perf_counter()
        for number in range(LINES):
            metrics = {"loss": 0.5, "accuracy": 0.9, "lr": 1e-3, "grad_norm": 2.0, "throughput": 900.0}
            writer.append({"ts": 0, "seq": 0, "tag": "metrics", "step": number, "split": "train", "metrics": metrics})
        cost = (time.perf_counter() - before) / LINES
        trouble = writer.trouble
        writer.close("completed")
    if made:
        (journal.directory / ".gitignore").unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's run has begun there
            for path in made:
                path.rmdir()
    if trouble is not None:
        report.fail("write", trouble)
    else:
        report.say("write", f"{cost * 1e6:.1f} us for an event of five metrics")


def _endpoints(report: Report, settings: Settings) -> None:
    print("endpoints")
    try:
        exporters = _exporters_of(settings)
    except ConfigError as error:
        report.fail("endpoint", error)
        return
    if not exporters:
        report.say("none", "nothing is sent: the journal stays until `stepspan sync` (OTEL_EXPORTER_OTLP_ENDPOINT)")
    for exporter in exporters:
        for signal in SIGNALS:
            if signal in exporter.endpoints:
                _probe(report, signal, exporter.endpoints[signal])
            else:
                report.say(signal, "off")


def _probe(report: Report, signal: Signal, endpoint: Endpoint) -> None:
    """An empty request: every receiver takes one, and a wrong path, protocol or credential shows."""
    transport = open_transport(endpoint)
    body = b"{}" if endpoint.protocol == "http/json" else b""
    outcome = transport.send(body)
    transport.close()
    told = f"{endpoint.display_url}  {endpoint.protocol}"
    if outcome.verdict is Verdict.DELIVERED:
        report.say(signal, f"{told}  answers")
    elif outcome.verdict is Verdict.RETRY:
        report.say(signal, f"{told}  does not answer now ({outcome.message}): a run works, and sends later")
    else:
        report.fail(signal, f"{told}: {outcome.message}")


def _samplers(report: Report, names: Sequence[str], interval: float, local_rank: int) -> None:
    print("samplers")
    chosen = sampled_by(names, local_rank)
    report.say("every", f"{interval:g} s: {', '.join(chosen)}" if chosen else "nothing is sampled")
    if "gpu" not in chosen:
        return
    try:
        source = gpu(local_rank, lambda event: None)
    except Exception as error:  # no driver, no GPU, a driver that fails: all of them mean "no GPU metrics"
        report.say("gpu", f"no GPU metrics: {error}")
        return
    told = []
    for quantity, read in source.quantities.items():
        with suppress(Exception):  # as in a run: left out
            list(read(0.0))
            told.append(quantity)
    source.close()
    report.say("gpu", f"{source.description}: {', '.join(told)}")


def _versions(report: Report) -> None:
    print("versions")
    report.say("stepspan", __version__)
    report.say("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            report.say(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            report.say(package, "not installed")
