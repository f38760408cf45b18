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

import math
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
import requests
from harness import grafana
from harness import shown as training
from harness.processes import until
from harness.shown import JOB, SLOW, SPAN, Shown

pytestmark = pytest.mark.timeout(180)
shown = training.shown


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
def test_every_panel_returns_data(shown: Shown, name: str) -> None:
    raw = grafana.value_of_raw(shown.prometheus.query, **shown.values())
    assert raw == ".*", "of two ranks the series themselves are read too"
    assert silent(shown, asked_of("prometheus", name), shown.now, raw=raw) == []


@every_dashboard
def test_panels_live_on_recording_rules_alone_where_a_job_is_large(shown: Shown, name: str) -> None:
    overview = [query for query in asked_of("prometheus", name) if "$raw" in query.text]
    later = [query for query in overview if "earlier attempt" not in query.legend]  # nothing was recorded of it
    assert silent(shown, later, shown.now, raw="none") == []


@pytest.mark.parametrize("name", ["run", "ranks", "hardware"])
def test_a_journal_that_was_synced_later_is_shown_too(shown: Shown, name: str) -> None:
    begun_before = [query for query in asked_of("prometheus", name) if "earlier attempt" not in query.legend]
    assert silent(shown, begun_before, shown.earlier, raw=".*") == []


@every_dashboard
def test_every_label_of_a_legend_is_one_of_the_series(shown: Shown, name: str) -> None:
    for query in asked_of("prometheus", name):
        for series in shown.ask(query.filled(**shown.values(raw=".*")), instant=query.instant, at=shown.now):
            assert query.named(series["metric"]), query.of


@every_dashboard
def test_a_legend_names_one_line(shown: Shown, name: str) -> None:
    for query in asked_of("prometheus", name):
        if not query.instant:  # of a table, the columns tell
            drawn = shown.ask(query.filled(**shown.values(raw=".*")), instant=False, at=shown.now)
            names = [query.named(series["metric"]) for series in drawn]
            assert len(names) == len(set(names)), query.of


def test_raw_series_are_left_alone_once_rules_record_a_hundred_ranks() -> None:
    def prometheus(promql: str) -> list[dict[str, Any]]:
        many = [{"metric": {"raw": "none"}, "value": [0, "128"]}]
        return many if "raw" in promql else []

    assert grafana.value_of_raw(prometheus, job=JOB) == "none"


def one(shown: Shown, name: str, title: str) -> grafana.Query:
    (query,) = (query for query in grafana.queries(name) if query.of == f"{name}: {title} (A)")
    return query


@pytest.mark.parametrize(
    ("title", "drawn"),
    [
        (
            "Loss",
            {"loss train": None, "train/loss train": 100.0, "train_loss_step train": 200.0, "loss_epoch train": 300.0,
             "loss val": 1.0, "val/loss val": 400.0, "test/loss test": 500.0},
        ),
        ("Validation", {"loss val": 1.0, "val/loss val": 400.0, "accuracy val": 0.5, "test/loss test": 500.0}),
        ("Learning rate", {"lr train": 0.1, "lr-SGD/pg1 train": 0.2}),
        ("Other metrics of rank 0", {"reward train": 0.5, "train/reward train": 2.5, "accuracy val": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_each_key_is_a_line_of_its_own(shown: Shown, title: str, drawn: dict[str, float | None]) -> None:
    *_, query = (q for q in grafana.queries("run") if q.of == f"run: {title} (A)")  # the graph stands behind the number
    for at, raw in ((shown.now, "none"), (shown.now, ".*"), (shown.earlier, ".*")):
        if raw == "none" and "$raw" not in query.text:
            continue
        found = {
            query.named(series["metric"]): float(series["values"][-1][1])
            for series in shown.ask(query.filled(**shown.values(raw=raw)), instant=False, at=at)
        }
        assert found.keys() == drawn.keys()
        assert {name: value for name, value in found.items() if drawn[name] is not None} == {
            name: value for name, value in drawn.items() if value is not None
        }


def test_a_loss_is_drawn_over_the_step_that_it_was_logged_with(shown: Shown) -> None:
    query = one(shown, "run", "Loss by step")
    for at in (shown.now, shown.earlier):
        steps = {
            (series["metric"]["key"], series["metric"]["split"]): dict(series["values"])
            for series in shown.ask(query.filled(**shown.values(raw=".*")), instant=False, at=at)
        }
        assert len(steps) == 7
        late, last = (max(map(float, steps[of].values())) for of in (("test/loss", "test"), ("train/loss", "train")))
        assert late % 10 == 2, "logged after each tenth step, for the one seven steps before"
        assert steps["val/loss", "val"].items() <= steps["train/loss", "train"].items()
        assert late < last


def test_the_straggler_panel_names_the_slow_rank_although_step_times_are_equal(shown: Shown) -> None:
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


def test_the_heat_map_reddens_the_slow_rank(shown: Shown) -> None:
    query = one(shown, "ranks", "Compute time of ranks ÷ the median's")
    last = {
        series["metric"]["rank"]: float(series["values"][-1][1])
        for series in shown.ask(query.filled(**shown.values(raw=".*")), instant=False, at=shown.now)
    }
    assert last[str(SLOW)] > 1.5 > 1.0 > last["0"]


def test_a_dot_on_the_step_duration_leads_to_the_trace_of_a_step(shown: Shown) -> None:
    query = one(shown, "ranks", "Step duration")
    assert query.exemplars
    for raw in ("none", ".*"):
        found = shown.prometheus.exemplars(query.filled(**shown.values(raw=raw)), shown.now - SPAN, shown.now)
        traces = {exemplar["labels"]["trace_id"] for exemplar in found}
        spans = {span["traceId"]: span for span in shown.collector.spans() if span["name"] == "training.step"}
        assert traces & spans.keys()


# ------------------------------------------------------------------------------------------------------- the alerts


def test_the_nan_alert_fires_and_the_straggler_alert_names_the_slow_rank(shown: Shown) -> None:
    (nan,) = shown.prometheus.query(f'ALERTS{{alertname="LossIsNaN",job_id="{JOB}"}}', shown.now)
    assert nan["metric"]["alertstate"] == "firing"
    exprs = {rule["alert"]: rule["expr"] for rule in grafana.rules("alerts.yml")}
    for name in ("Straggler", "SlowRank"):
        found = shown.prometheus.query(exprs[name], shown.now)
        assert [series["metric"]["rank"] for series in found] == [str(SLOW)], name


def test_every_alert_asks_for_series_that_are_there(shown: Shown) -> None:
    for rule in grafana.rules("alerts.yml"):
        shown.prometheus.query(rule["expr"], shown.now)
        with requests.Session() as http:
            http.trust_env = False
            parsed = http.get(f"{shown.prometheus.url}/api/v1/parse_query", params={"query": rule["expr"]}).json()
        for name, labels in grafana.selectors(parsed["data"]):
            if "_send_failed_" in name.pattern:
                continue  # it is there from the first failure on
            assert shown.prometheus.query(f"last_over_time({name.pattern}[10m])", shown.now), (rule["alert"], labels)


# --------------------------------------------------------------------------------------------- events and traces


@pytest.mark.parametrize(
    "query",
    [q for name in grafana.NAMES for q in (*grafana.queries(name), *grafana.marks(name)) if q.source == "loki"],
    ids=lambda query: query.of,
)
def test_loki_answers_the_panels_and_marks(shown: Shown, query: grafana.Query) -> None:
    if shown.loki is None:
        pytest.skip("no Loki: `make stack`")
    loki, logql = shown.loki, query.filled(**shown.values())
    lines = until(lambda: loki.query(logql, shown.now - SPAN, time.time() + 5))
    assert {labels["job_id"] for labels, _ in lines} == {JOB}
    assert {labels["event_name"] for labels, _ in lines} <= {
        *("exception", "training.artifact", "training.hyperparams", "milestone", "stepspan.dropped_value"),
    }


def test_the_spans_that_the_trace_panels_ask_for_are_there(shown: Shown) -> None:
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


def test_tempo_answers_the_panels(shown: Shown) -> None:
    if shown.tempo is None:
        pytest.skip("no Tempo: see the module's docstring")
    (found,) = (query for query in asked_of("tempo", "ranks") if "select" in query.text)
    assert until(lambda: shown.tempo.search(found.filled(**shown.values()), shown.now - SPAN, time.time()))  # type: ignore[union-attr]
