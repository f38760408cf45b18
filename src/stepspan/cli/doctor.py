"""`stepspan doctor`: whether a run would work here, and with what.

Each part is checked as `start_run` would set it up: identity, journal, endpoints, samplers, versions. Nothing is left
behind.
"""

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
from stepspan.config import Settings, load, sends
from stepspan.environment import unknown_variables
from stepspan.errors import ConfigError
from stepspan.events import SCHEMA
from stepspan.identity import host_facts, resolve, resource_attributes
from stepspan.journal.disk import Limits
from stepspan.journal.journal import Journal
from stepspan.journal.layout import sessions_of_rank
from stepspan.mapping.records import SIGNALS, Signal
from stepspan.mapping.trace_context import variable_fields
from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Verdict
from stepspan.otlp.transport import open_transport
from stepspan.otlp.variable_table import without_effect
from stepspan.processors import build
from stepspan.samplers import sampled_by
from stepspan.samplers.gpu import gpu
from stepspan.start import _exporters_of
from stepspan.values import format_seconds

PROBE_LINES = 2000
"""Lines that are written to a journal to measure what one costs."""
PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp", "grpcio", "orjson", "pydantic", "torch")


class Findings:
    """Prints what is found; `failures` counts what would keep a run from working."""

    failures = 0

    def fact(self, label: str, value: object) -> None:
        """Print something that is as it should be."""
        print(f"  {label:<16} {value}")

    def failure(self, label: str, reason: object) -> None:
        """Print something that is wrong."""
        self.failures += 1
        self.fact(label, f"FAIL: {reason}")


def examine(directory: Path | None, endpoint: str | None) -> int:
    """Print what is found. The exit code: 1 if a run would not work.

    Args:
        directory: Where the journal would go; by default what the settings say.
        endpoint: Where to send; by default what the settings and the OTEL_EXPORTER_OTLP_* variables say.

    """
    findings = Findings()
    try:
        settings = load({"directory": directory, "endpoint": endpoint}, os.environ)
        build(settings.processors)
    except ConfigError as error:
        print("settings")
        findings.failure("settings", error)
        return 1
    if not settings.enabled:
        print("settings\n  enabled          no: start_run() does nothing (STEPSPAN_DISABLED)")
    local_rank = _identity(findings, settings)
    _journal(findings, settings.directory, settings.limits())
    _endpoints(findings, settings)
    _variables(findings)
    _samplers(findings, settings.samplers, settings.sample_interval, local_rank)
    _versions(findings)
    print(f"\n{'a run would work' if not findings.failures else f'{findings.failures} problem(s): see FAIL above'}")
    return 1 if findings.failures else 0


def _identity(findings: Findings, settings: Settings) -> int:
    """Who this process would be. The local rank."""
    print("identity")
    try:
        earlier = lambda job, rank: len(sessions_of_rank(settings.directory, job, rank))  # noqa: E731
        identity = resolve({}, os.environ, host_facts(), earlier_sessions=earlier)
        attributes, warnings = resource_attributes(identity, os.environ, service_name=settings.service_name)
    except ConfigError as error:
        findings.failure("identity", error)
        return 0
    for field in ("job_id", "rank", "local_rank", "world_size", "attempt"):
        findings.fact(field, f"{getattr(identity, field)}  ({identity.sources[field]})")
    findings.fact("launcher", identity.launcher)
    findings.fact("service.name", attributes["service.name"])
    for warning in (*identity.warnings, *warnings, *unknown_variables(os.environ, Settings.model_fields).values()):
        findings.fact("warning", warning)
    if identity.may_merge:
        findings.failure(
            "job_id", "nothing distinguishes this launch from the next one: give STEPSPAN_JOB_ID, new for each launch"
        )
    for signal, ranks in settings.ranks().items():
        if not sends(ranks, identity.rank):
            roots = " but for the steps' spans" if signal == "traces" and identity.rank == 0 else ""
            findings.fact(signal, f"not sent of rank {identity.rank}{roots}: {signal}_ranks is {ranks}")
    return identity.local_rank


def _journal(findings: Findings, directory: Path, limits: Limits) -> None:
    print("journal")
    try:
        absolute = directory.absolute()
        created = [path for path in (absolute, *absolute.parents) if not path.exists()]
        journal = Journal(directory, limits=limits)
    except (ConfigError, OSError) as error:
        findings.failure("directory", error)
        return
    if not journal.durable:
        findings.failure("directory", f"{directory} is not writable: a run would keep its journal in memory")
        return
    findings.fact("directory", journal.directory)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=journal.directory) as session:
        header = {"ts": 0, "seq": 0, "tag": "header", "session": "0" * 16, "rank": 0, "role": "", "schema": SCHEMA}
        probe = Journal(session, limits=limits)
        probe.open(lambda: header, job_id="doctor", host="doctor")
        before = time.perf_counter()
        for number in range(PROBE_LINES):
            metrics = {"loss": 0.5, "accuracy": 0.9, "lr": 1e-3, "grad_norm": 2.0, "throughput": 900.0}
            probe.append({"ts": 0, "seq": 0, "tag": "metrics", "step": number, "split": "train", "metrics": metrics})
        seconds = (time.perf_counter() - before) / PROBE_LINES
        problem = probe.session.error if probe.session else None
        probe.close("completed")
    if created:
        (journal.directory / ".gitignore").unlink(missing_ok=True)
        with suppress(OSError):  # a run has begun there meanwhile
            for path in created:
                path.rmdir()
    if problem is not None:
        findings.failure("write", problem)
    else:
        findings.fact("write", f"{format_seconds(seconds)} for an event of five metrics")


def _endpoints(findings: Findings, settings: Settings) -> None:
    print("endpoints")
    try:
        exporters = _exporters_of(settings)
    except ConfigError as error:
        findings.failure("endpoint", error)
        return
    if not exporters:
        findings.fact(
            "none", "nothing is sent: the journal waits for `stepspan sync` (OTEL_EXPORTER_OTLP_ENDPOINT is not set)"
        )
    for ignored in dict.fromkeys(text for exporter in exporters for text in exporter.ignored):
        findings.failure("variable", ignored)
    for warning in dict.fromkeys(text for exporter in exporters for text in exporter.warnings):
        findings.fact("warning", warning)
    for exporter in exporters:
        by = "its name" if exporter.is_named else "its address: STEPSPAN_DESTINATION names it"
        findings.fact("destination", f"{exporter.destination}  ({by})")
        for signal in SIGNALS:
            if signal in exporter.endpoints:
                _probe(findings, signal, exporter.endpoints[signal])
            else:
                findings.fact(signal, "off")


def _probe(findings: Findings, signal: Signal, endpoint: Endpoint) -> None:
    """Send an empty request: every receiver accepts one, and refuses a wrong path, protocol or credential."""
    transport = open_transport(endpoint)
    body = b"{}" if endpoint.protocol == "http/json" else b""
    outcome = transport.send(body)
    transport.close()
    through = f"  through proxy {transport.proxy}" if transport.proxy else ""
    target = f"{endpoint.display_url}  {endpoint.protocol}{through}"
    if outcome.verdict is Verdict.DELIVERED:
        findings.fact(signal, f"{target}  answers")
    elif outcome.verdict is Verdict.RETRY:
        findings.fact(signal, f"{target}  does not answer now ({outcome.message}): a run works, and sends later")
    else:
        findings.failure(signal, f"{target}: {outcome.message}")


def _variables(findings: Findings) -> None:
    """The variables of OpenTelemetry that are set: the span that would have started the run, and what has no effect."""
    fields, wrong = variable_fields(os.environ, joins=False)
    found = without_effect(os.environ)
    if fields or wrong or found:
        print("variables")
    if wrong:
        findings.failure("TRACEPARENT", wrong)
    elif fields:
        findings.fact("TRACEPARENT", f"{fields['traceparent']}: the run's span leads there")
    for name, why in found.items():
        findings.fact("no effect", f"{name}: {why}")


def _samplers(findings: Findings, names: Sequence[str], interval: float, local_rank: int) -> None:
    print("samplers")
    chosen = sampled_by(names, local_rank)
    findings.fact("every", f"{interval:g} s: {', '.join(chosen)}" if chosen else "nothing is sampled")
    if "gpu" not in chosen:
        return
    try:
        source = gpu(local_rank, lambda event: None)
    except Exception as error:  # no GPU, no driver, or a driver that fails
        findings.fact("gpu", f"no GPU metrics: {error}")
        return
    readable = []
    for quantity, read in source.quantities.items():
        with suppress(Exception):  # a run leaves it out, too
            list(read(0.0))
            readable.append(quantity)
    source.close()
    findings.fact("gpu", f"{source.description}: {', '.join(readable)}")


def _versions(findings: Findings) -> None:
    print("versions")
    findings.fact("stepspan", __version__)
    findings.fact("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            findings.fact(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            findings.fact(package, "not installed")
