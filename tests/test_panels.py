"""Every panel returns data: a training of two ranks, shown by the configurations that docker-compose.yml runs.

The real Collector (single.yaml), Prometheus (prometheus.yml with its rules) and Loki (loki.yaml) take what the training
sends, and every query of every panel is asked as Grafana asks it. The training has had an earlier attempt, ten minutes
ago by its clock, that is synced first, then runs for half a minute: rank 1 is slow, the ranks meet in an all-reduce in
each step so that both step times are equal, rank 0's loss becomes NaN and rank 1 records an error. The GPUs and PyTorch
are scripted; hosts and processes are this machine's.

The panels that ask Tempo are held to the step spans which the Collector handed on, by a check of the same conditions
on the spans in its file exporter: that TraceQL itself is right is shown only where a Tempo binary is to be had
(test_tempo_answers_the_panels).
"""

from __future__ import annotations

import importlib.machinery
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grafana
import orjson
import pytest
import requests
from processes import Ranks, until
from runs import is_ours
from scripted_nvml import GPU, ScriptedNvml
from stack import Loki, StackCollector, StackPrometheus, Tempo, binary

import stepspan
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.samplers import Sampling
from stepspan.samplers.gpu import gpu
from stepspan.samplers.host import host, process
from stepspan.samplers.torch import torch
from stepspan.testing import FixedClock

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

JOB = "panels"
SLOW = 1
SPAN = 900
PATIENCE = 90.0


# ------------------------------------------------------------------------------------------------------ the training


def gpus() -> ScriptedNvml:
    return ScriptedNvml(*(GPU(uuid=f"GPU-{rank}", reasons=0x04, temperature=60 + 30 * rank) for rank in range(2)))


def scripted_torch() -> ModuleType:
    module = ModuleType("torch")
    module.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    counters = ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes")
    stats = {f"{name}.all.{what}": 1 << 30 for name in counters for what in ("current", "peak")}
    stats |= {"num_alloc_retries": 0, "num_ooms": 0}
    module.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True, device_count=lambda: 1, memory_stats=lambda device: stats
    )
    return module


def train(run: Any, rank: int, pause: Any, goes_on: Callable[[int], bool], meet: Any, *, diverges: float) -> None:
    """A training: `pause(s)` passes time, `meet()` is the all-reduce."""
    run.log_hyperparams({"lr": 0.1, "batch_size": 32, "model": "tiny"})
    run.set_total_steps(10_000)
    step = 0
    with run.epoch(0):
        while goes_on(step):
            for _ in run.steps([step], start=step, samples=32, tokens=512):
                with run.span("forward_backward"):
                    pause(0.5 if rank == SLOW else 0.05)
                with run.span("all_reduce", collective=True):
                    meet()
                loss = math.nan if rank != SLOW and step >= diverges else 2.0 / (step + 1)
                run.log_metrics({"loss": loss, "lr": 0.1, "grad_norm": 1.0})
            if step % 10 == 9:
                for _ in run.steps([0], split="val"):
                    run.log_metrics({"loss": 1.0, "accuracy": 0.5})
                run.log_artifact("model", f"/checkpoints/{step}", kind="checkpoint")
            if step % 20 == 10 and rank == SLOW:
                run.log_error(RuntimeError("a bad batch"))
                run.log_event("milestone", status="reached")
            step += 1


def earlier_attempt(directory: Path, rank: int, started: float) -> float:
    """One rank's attempt of two minutes, by a clock of its own. When it ended."""
    clock = FixedClock(round(started * 1e9), step_ns=1000)
    journal = JsonlExporter(directory, clock=clock)
    who = {"job_id": JOB, "rank": rank, "local_rank": rank, "world_size": 2, "attempt": 0}
    with stepspan.start_run(exporters=[journal], name=JOB, group="tests", **who) as run:
        openers = {
            "host": lambda emit: host(rank, emit),
            "process": lambda emit: process(rank, emit),
            "gpu": lambda emit: gpu(rank, emit, nvml=gpus(), env={}),
            "torch": lambda emit: torch(rank, emit),
        }
        sampling = Sampling(run, openers, 10.0, clock=lambda: clock.now / 1e9)

        def goes_on(step: int) -> bool:
            if step % 10 == 0:
                sampling.sample()
            return step < 180

        train(
            run, rank, clock.advance, goes_on, lambda: clock.advance(0.05 if rank == SLOW else 0.5), diverges=math.inf
        )
        sampling.close()
    return clock.now / 1e9


def live_rank(rank: int, directory: Path, endpoint: str, barrier: Any, enough: Any, said: Any) -> None:
    """One rank's process. Rank 0 says in each step whether it is the last, so that both leave in the same one."""
    for name in filter(is_ours, list(os.environ)):
        del os.environ[name]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(STEPSPAN_SAMPLERS="host,process,gpu,torch", STEPSPAN_SAMPLE_INTERVAL="1")
    sys.modules.update(pynvml=gpus(), torch=scripted_torch())  # type: ignore[arg-type]

    def meet() -> None:
        if rank == 0:
            said.value = enough.is_set()
        barrier.wait(60)
        barrier.wait(60)

    with stepspan.start_run(directory=directory, endpoint=endpoint, job_id=JOB, name=JOB, attempt=1) as run:
        train(
            run,
            rank,
            lambda seconds: time.sleep(seconds / 5),
            lambda step: not (step and said.value),
            meet,
            diverges=60,
        )


# ------------------------------------------------------------------------------------------------ what it is shown in


@dataclass
class Shown:
    """The servers, and the times (Unix s) at which the earlier attempt ended and at which panels are asked for."""

    prometheus: StackPrometheus
    loki: Loki
    collector: StackCollector
    tempo: Tempo | None
    earlier: float
    now: float = 0.0

    def values(self, **more: str) -> dict[str, str]:
        return {"job": JOB, "rank": ".*", "split": ".*", "slower": "0s", "range": str(SPAN), **more}

    def ask(self, promql: str, *, instant: bool, at: float) -> list[dict[str, Any]]:
        if instant:
            found: list[dict[str, Any]] = self.prometheus.query(promql, at)
            return found
        asked = {"query": promql, "start": f"{at - SPAN:.0f}", "end": f"{at:.0f}", "step": "1"}
        with requests.Session() as http:
            http.trust_env = False
            answer = http.post(f"{self.prometheus.url}/api/v1/query_range", data=asked)
        assert answer.ok, f"{promql}: {answer.text}"
        series: list[dict[str, Any]] = orjson.loads(answer.content)["data"]["result"]
        return series


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    place = tmp_path_factory.mktemp("panels")
    rules = [place / name for name in ("recording.yml", "alerts.yml")]
    for file in rules:  # every second, so that half a minute is enough
        file.write_text((grafana.PROMETHEUS_STACK / file.name).read_text().replace("interval: 10s", "interval: 1s"))
    prometheus, loki = StackPrometheus(place / "prometheus", rule_files=rules), Loki(place / "loki")
    tempo = Tempo(place / "tempo") if binary("prometheus").with_name("tempo").exists() else None
    stores = {"PROMETHEUS_OTLP": prometheus.otlp_endpoint, "LOKI_OTLP": loki.otlp_endpoint}
    if tempo:
        stores["TEMPO_OTLP"] = tempo.otlp_target
    collector = StackCollector(place / "collector", "single.yaml", **stores)
    prometheus.scrapes.append(collector.metrics_address)
    with prometheus, loki, tempo or nullcontext(), collector:
        earlier = history(place / "runs", collector.http_endpoint)
        shown = Shown(prometheus, loki, collector, tempo, earlier)
        with training(place / "runs", collector.http_endpoint):
            await_all(shown)
            shown.now = time.time()
            yield shown


def history(directory: Path, endpoint: str) -> float:
    """The earlier attempt, synced. When it ended."""
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(is_ours, list(os.environ)):
            patch.delenv(name)
        patch.setenv("STEPSPAN_SAMPLERS", "none")
        patch.setitem(sys.modules, "torch", scripted_torch())
        ended = max(earlier_attempt(directory, rank, time.time() - 600) for rank in range(2))
        command = [sys.executable, "-m", "stepspan", "sync", str(directory), "--endpoint", endpoint]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return ended


@contextmanager
def training(directory: Path, endpoint: str) -> Iterator[None]:
    """Both ranks at work."""
    context = multiprocessing.get_context("spawn")
    barrier, enough, said = context.Barrier(2), context.Event(), context.Value("b", 0)
    ranks = [
        context.Process(target=live_rank, args=(rank, directory, endpoint, barrier, enough, said)) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        yield
        enough.set()
        for rank in ranks:
            rank.join(30)
            assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
        until(lambda: not Ranks(directory).deliverers(), PATIENCE)


def await_all(shown: Shown) -> None:
    """Until what comes last has come: two reports of the deliverer, two points of the histograms, and the alert."""
    of_job = f'{{job_id="{JOB}"}}[1m]) > 3'
    last = (
        f"count_over_time(job:stepspan_delivery_records:sum{of_job}",
        f"count_over_time(job:training_step_duration_seconds:sum{of_job}",
        f"count_over_time(job:training_validation:avg{of_job}",
        f'ALERTS{{alertname="LossIsNaN",alertstate="firing",job_id="{JOB}"}}',
    )
    for promql in last:
        until(lambda promql=promql: shown.prometheus.query(promql), PATIENCE)


# ------------------------------------------------------------------------------------------------------- the panels


def finite(series: dict[str, Any]) -> bool:
    """Whether there is something to be drawn."""
    if "histogram" in series or "histograms" in series:
        return True
    values = series["values"] if "values" in series else [series["value"]]
    return any(math.isfinite(float(value)) for _, value in values)


def silent(shown: Shown, queries: Iterable[grafana.Query], at: float, **values: str) -> list[str]:
    """The queries that give nothing to draw."""
    found = []
    for query in queries:
        answer = shown.ask(query.filled(**shown.values(**values)), instant=query.instant, at=at)
        if not any(map(finite, answer)):
            found.append(query.of)
    return found


def asked_of(source: str, name: str) -> list[grafana.Query]:
    return [query for query in grafana.queries(name) if query.source == source]


every_dashboard = pytest.mark.parametrize("name", grafana.NAMES)


@every_dashboard
def test_every_panel_returns_data(shown: Shown, name: str):
    raw = grafana.value_of_raw(shown.prometheus.query, **shown.values())
    assert raw == ".*", "of two ranks the series themselves are read too"
    assert silent(shown, asked_of("prometheus", name), shown.now, raw=raw) == []


@every_dashboard
def test_panels_live_on_recording_rules_alone_where_a_job_is_large(shown: Shown, name: str):
    overview = [query for query in asked_of("prometheus", name) if "$raw" in query.text]
    later = [query for query in overview if "earlier attempt" not in query.legend]  # nothing was recorded of it
    assert silent(shown, later, shown.now, raw="none") == []


@pytest.mark.parametrize("name", ["run", "ranks", "hardware"])
def test_a_journal_that_was_synced_later_is_shown_too(shown: Shown, name: str):
    begun_before = [query for query in asked_of("prometheus", name) if "earlier attempt" not in query.legend]
    assert silent(shown, begun_before, shown.earlier, raw=".*") == []


@every_dashboard
def test_every_label_of_a_legend_is_one_of_the_series(shown: Shown, name: str):
    for query in asked_of("prometheus", name):
        for series in shown.ask(query.filled(**shown.values(raw=".*")), instant=query.instant, at=shown.now):
            assert query.named(series["metric"]), query.of


@every_dashboard
def test_a_legend_names_one_line(shown: Shown, name: str):
    for query in asked_of("prometheus", name):
        if not query.instant:  # of a table, the columns tell
            drawn = shown.ask(query.filled(**shown.values(raw=".*")), instant=False, at=shown.now)
            names = [query.named(series["metric"]) for series in drawn]
            assert len(names) == len(set(names)), query.of


def test_raw_series_are_left_alone_once_rules_record_a_hundred_ranks():
    def prometheus(promql: str) -> list[dict[str, Any]]:
        many = [{"metric": {"raw": "none"}, "value": [0, "128"]}]
        return many if "raw" in promql else []

    assert grafana.value_of_raw(prometheus, job=JOB) == "none"


def one(shown: Shown, name: str, title: str) -> grafana.Query:
    (query,) = (query for query in grafana.queries(name) if query.of == f"{name}: {title} (A)")
    return query


def test_the_straggler_panel_names_the_slow_rank_although_step_times_are_equal(shown: Shown):
    times = shown.prometheus.query(
        f'avg by (rank) (avg_over_time(training_step_time_seconds{{job_id="{JOB}",split="train"}}[1m]))', shown.now
    )
    fast, slow = sorted(float(series["value"][1]) for series in times)
    assert slow / fast < 1.1
    for title in ("Straggler: least wait", "Slowest ranks"):
        query = one(shown, "ranks", title)
        found = shown.ask(query.filled(**shown.values(raw=".*")), instant=True, at=shown.now)
        waits = {series["metric"]["rank"]: float(series["value"][1]) for series in found}
        assert min(waits, key=waits.__getitem__) == str(SLOW)


def test_the_heat_map_reddens_the_slow_rank(shown: Shown):
    query = one(shown, "ranks", "Compute time of ranks ÷ the median's")
    last = {
        series["metric"]["rank"]: float(series["values"][-1][1])
        for series in shown.ask(query.filled(**shown.values(raw=".*")), instant=False, at=shown.now)
    }
    assert last[str(SLOW)] > 1.5 > 1.0 > last["0"]


def test_a_dot_on_the_step_duration_leads_to_the_trace_of_a_step(shown: Shown):
    query = one(shown, "ranks", "Step duration")
    assert query.exemplars
    for raw in ("none", ".*"):
        found = shown.prometheus.exemplars(query.filled(**shown.values(raw=raw)), shown.now - SPAN, shown.now)
        traces = {exemplar["labels"]["trace_id"] for exemplar in found}
        spans = {span["traceId"]: span for span in shown.collector.spans() if span["name"] == "training.step"}
        assert traces & spans.keys()


# ------------------------------------------------------------------------------------------------------- the alerts


def test_the_nan_alert_fires_and_the_straggler_alert_names_the_slow_rank(shown: Shown):
    (nan,) = shown.prometheus.query(f'ALERTS{{alertname="LossIsNaN",job_id="{JOB}"}}', shown.now)
    assert nan["metric"]["alertstate"] == "firing"
    exprs = {rule["alert"]: rule["expr"] for rule in grafana.rules("alerts.yml")}
    for name in ("Straggler", "SlowRank"):
        found = shown.prometheus.query(exprs[name], shown.now)
        assert [series["metric"]["rank"] for series in found] == [str(SLOW)], name


def test_every_alert_asks_for_series_that_are_there(shown: Shown):
    for rule in grafana.rules("alerts.yml"):
        shown.prometheus.query(rule["expr"], shown.now)
        with requests.Session() as http:
            http.trust_env = False
            parsed = http.get(f"{shown.prometheus.url}/api/v1/parse_query", params={"query": rule["expr"]}).json()
        for name, labels in grafana.selectors(parsed["data"]):
            assert shown.prometheus.query(f"last_over_time({name.pattern}[10m])", shown.now), (rule["alert"], labels)


# --------------------------------------------------------------------------------------------- events and traces


@pytest.mark.parametrize(
    "query",
    [q for name in grafana.NAMES for q in (*grafana.queries(name), *grafana.annotations(name)) if q.source == "loki"],
    ids=lambda query: query.of,
)
def test_loki_answers_the_panels_and_marks(shown: Shown, query: grafana.Query):
    logql = query.filled(**shown.values())
    lines = until(lambda: shown.loki.query(logql, shown.now - SPAN, time.time() + 5))
    assert {labels["job_id"] for labels, _ in lines} == {JOB}
    assert {labels["event_name"] for labels, _ in lines} <= {
        *("exception", "training.artifact", "training.hyperparams", "milestone"),
    }


def test_the_spans_that_the_trace_panels_ask_for_are_there(shown: Shown):
    steps = [
        span
        for span in shown.collector.spans()
        if span["resource"]["job_id"] == JOB and span["name"] == "training.step"
    ]
    assert {span["resource"]["rank"] for span in steps} == {0, 1}
    assert {span["attributes"]["split"] for span in steps} == {"train", "val"}
    assert all(isinstance(span["attributes"]["step"], int) for span in steps)
    asked = [query.text for name in grafana.NAMES for query in asked_of("tempo", name)]
    assert len(asked) == 2
    for text in asked:
        assert 'resource.job_id="$job" && span:name="training.step"' in text
        assert set(re.findall(r"(?:resource|span)\.(\w+)", text)) <= {"job_id", "rank", "split", "step"}


def test_tempo_answers_the_panels(shown: Shown):
    if shown.tempo is None:
        pytest.skip("no Tempo: see the module's docstring")
    (found,) = (query for query in asked_of("tempo", "ranks") if "select" in query.text)
    assert until(lambda: shown.tempo.search(found.filled(**shown.values()), shown.now - SPAN, time.time()))
