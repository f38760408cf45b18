"""The recording rules, and what a panel asks for in their place.

A panel at 10,000 ranks can't read 10,000 series at every refresh, so rules fold them, every 10 s, into what the
dashboards draw: `job:…` over all ranks, `rank:…` smoothed per rank. The name is level:metric:operation.

Prometheus records from the moment it evaluates; a journal that arrives later leaves no recorded points. `recorded`
therefore asks for the rule *or* the rule's own expression over the raw series. Variable `$raw` decides whether the
second half reads anything: it is `.*` unless the rules have recorded the job with 100 ranks or more (`FALLBACK`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INTERVAL = "10s"

FALLBACK = (
    'query_result(label_replace(vector(1), "raw", ".*", "", "") unless on () ({many})'
    ' or label_replace({many}, "raw", "none", "", ""))'
).format(many='max(last_over_time(job:training_ranks:count{job_id="$job"}[$__range])) >= 100')
"""Query of `$raw`: `.*` (read raw series too) or `none`. The value stands in label `raw` of its result."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One recording rule.

    In `expr` every selector has its braces, `training_loss{}`: that is where matchers go in. `instead` is what a panel
    reads where the rule has recorded nothing, if not `expr`.
    """

    record: str
    expr: str
    instead: str = ""


OPERATIONS = {
    "min": "min by ({by}) ({of})",
    "avg": "avg by ({by}) ({of})",
    "p50": "quantile by ({by}) (0.5, {of})",
    "p99": "quantile by ({by}) (0.99, {of})",
    "max": "max by ({by}) ({of})",
    "sum": "sum by ({by}) ({of})",
}


def smooth(record: str, of: str, by: str) -> Rule:
    """A minute's mean; of steps longer than a minute, the last."""
    return Rule(record, f"avg by ({by}) (avg_over_time({of}[1m]) or {of})", instead=f"avg by ({by}) ({of})")


LOSS = "loss(_step|_epoch)?"
"""As a call names it, or frameworks a step's and an epoch's."""
LEARNING_RATE = "(.+_)?(?i:lr|learning_rate)(_.+)?"
"""`lr`, `learning_rate`, `charts/learning_rate`, Lightning's `lr-Adam` and `lr-SGD/pg1`."""
GRADIENT_NORM = "grad_(norm|2_0_norm_total)"
"""`grad_norm`, and `grad_2.0_norm_total` of Lightning's `grad_norm()`."""
LOGGED = (
    '__name__=~"training_.+",'
    '__name__!~"training_(step_(number|logged|time_seconds|wait_seconds|duration_seconds)|throughput_per_second|'
    'nonfinite_total)",split!=""'
)
"""What users log: stepspan's other metrics have no split."""
LOSSES = f'__name__=~"training_{LOSS}"'
LOSS_KEYS = 'key=~"((train|val|valid|validation|eval|test)[/._])?[^a-zA-Z0-9]*loss([^a-zA-Z0-9]+(step|epoch))?"'
"""The same by attribute `key`, as `training_nonfinite_total` has it."""
OTHERS = f'{LOGGED},__name__!~"training_({LOSS}|{LEARNING_RATE}|{GRADIENT_NORM})"'
"""What is logged and has no panel of its own."""


def keyed(operation: str, of: str, by: str) -> str:
    """Users' metrics, by the labels of `by` and by what they were logged as, in label `key`.

    Their own label `key` is there only where the metric's name does not say it (`stepspan/mapping/names.py`): here the
    name fills it in. It does so after the aggregation, for there are fewer series then.
    """
    found = OPERATIONS[operation].format(by=f"{by}, key, __name__", of=of)
    named = f'label_join({found}, "logged", " ", "__name__", "key")'
    return f'max by ({by}, key) (label_replace({named}, "key", "$1", "logged", "training_(.+) "))'


TIME, WAIT, COMPUTE, DATA_WAIT, LAST_STEP = (
    "rank:training_step_time_seconds:avg1m",
    "rank:training_step_wait_seconds:avg1m",
    "rank:training_step_compute_seconds:avg1m",
    "rank:training_data_wait_seconds:avg1m",
    "rank:training_last_step_time_seconds:max",
)

RANKS = (
    smooth(TIME, "training_step_time_seconds{}", "job_id, rank, split"),
    smooth(WAIT, "training_step_wait_seconds{}", "job_id, rank, split"),
    smooth(DATA_WAIT, 'training_phase_time_seconds{phase="data_wait"}', "job_id, rank"),
    # The time of a step that is not spent waiting for other ranks; all of it where no span is marked as a collective.
    Rule(
        COMPUTE,
        f"{TIME}{{}} - {WAIT}{{}} or {TIME}{{}}",
        instead="avg by (job_id, rank, split) "
        "(training_step_time_seconds{} - training_step_wait_seconds{} or training_step_time_seconds{})",
    ),
    Rule(LAST_STEP, "max by (job_id, rank) (timestamp(training_step_time_seconds{}))"),
)

SPREADS: tuple[tuple[str, str, str, str], ...] = (
    # metric, of what, by, operations
    ("training_step_time_seconds", TIME + "{}", "job_id, split", "min avg p50 p99 max"),
    ("training_step_wait_seconds", WAIT + "{}", "job_id, split", "min avg p50 p99 max"),
    ("training_step_compute_seconds", COMPUTE + "{}", "job_id, split", "avg p50 p99 max"),
    ("training_data_wait_seconds", DATA_WAIT + "{}", "job_id", "avg p50 p99 max"),
    ("training_last_step_time_seconds", LAST_STEP + "{}", "job_id", "max"),
    ("training_step_number", "training_step_number{}", "job_id, split", "min max"),
    ("training_throughput_per_second", "training_throughput_per_second{}", "job_id, item, split", "sum"),
    ("training_run_epoch", "training_run_epoch{}", "job_id", "max"),
    ("training_run_total_steps", "training_run_total_steps{}", "job_id", "max"),
    ("training_run_eta_seconds", "training_run_eta_seconds{}", "job_id", "max"),
    ("training_run_checkpoint_time_seconds", "training_run_checkpoint_time_seconds{}", "job_id", "max"),
    # An exception often ends the run, and with it the series: a minute's maximum shows it all the same.
    ("training_run_errors", "max_over_time(training_run_errors_total{}[1m])", "job_id, error_type", "sum"),
    ("training_step_duration_seconds", "rate(training_step_duration_seconds{}[1m])", "job_id, split", "sum"),
    ("hw_gpu_utilization_ratio", "hw_gpu_utilization_ratio{}", "job_id", "min p50 p99 max"),
    ("hw_gpu_memory_utilization_ratio", "hw_gpu_memory_utilization_ratio{}", "job_id", "p50 max"),
    ("hw_power_watts", "hw_power_watts{}", "job_id", "sum"),
    ("hw_temperature_celsius", "hw_temperature_celsius{}", "job_id", "p50 max"),
    ("hw_gpu_clock_hertz", "hw_gpu_clock_hertz{}", "job_id, hw_gpu_clock_domain", "min p50"),
    ("hw_gpu_throttled", "hw_gpu_throttled_ratio{}", "job_id, reason", "sum"),
    ("hw_errors", "hw_errors_total{}", "job_id, error_type", "sum"),
    ("hw_gpu_io_bytes", "rate(hw_gpu_io_bytes_total{}[1m])", "job_id, hw_gpu_link, network_io_direction", "sum"),
    ("system_cpu_utilization_ratio", "system_cpu_utilization_ratio{}", "job_id", "p50 max"),
    ("system_memory_utilization_ratio", "system_memory_utilization_ratio{}", "job_id", "p50 max"),
    ("system_disk_io_bytes", "rate(system_disk_io_bytes_total{}[1m])", "job_id, disk_io_direction", "sum"),
    ("system_network_io_bytes", "rate(system_network_io_bytes_total{}[1m])", "job_id, network_io_direction", "sum"),
    ("process_cpu_utilization_ratio", "process_cpu_utilization_ratio{}", "job_id", "p50 max"),
    ("process_memory_usage_bytes", "process_memory_usage_bytes{}", "job_id", "p50 max"),
    ("training_memory_allocated_bytes", "training_memory_allocated_bytes{}", "job_id", "p50 max"),
    ("training_memory_reserved_bytes", "training_memory_reserved_bytes{}", "job_id", "p50 max"),
    ("stepspan_delivery_records", "rate(stepspan_delivery_records_total{}[1m])", "job_id, signal, outcome", "sum"),
    ("stepspan_delivery_pending_bytes", "stepspan_delivery_pending_bytes{}", "job_id, signal", "sum"),
    ("stepspan_delivery_lag_seconds", "stepspan_delivery_lag_seconds{}", "job_id, signal", "max"),
    ("stepspan_delivery_held", "stepspan_delivery_held{}", "job_id, signal", "sum"),
    ("stepspan_journal_lines", "stepspan_journal_lines_total{}", "job_id, state", "sum"),
)  # fmt: skip

LEARNING_RATES = f'{{__name__=~"training_{LEARNING_RATE}",__name__!~".+_(momentum|weight_decay)"}}'
"""Without what Lightning's monitor logs beside them: `lr-SGD-momentum`."""
KEYED = (
    ("training_loss", f"{{{LOSSES}}}", "min avg p50 p99 max"),
    ("training_grad_norm", f'{{__name__=~"training_{GRADIENT_NORM}"}}', "p50 max"),
    ("training_learning_rate", LEARNING_RATES, "max"),
    ("training_validation", f'{{{LOGGED},split=~"val|valid|validation|eval|test"}}', "avg"),
)
"""Metrics of users, by split and key: metric, of what, operations."""
NAN_LOSS = f"training_nonfinite_total{{{LOSS_KEYS}}}"

JOBS = (
    Rule("job:training_ranks:count", "count by (job_id) (max by (job_id, rank) (training_run_start_time_seconds{}))"),
    *(
        Rule(f"job:{metric}:{operation}", OPERATIONS[operation].format(by=by, of=of))
        for metric, of, by, operations in SPREADS
        for operation in operations.split()
    ),
    *(
        Rule(f"job:{metric}:{operation}", keyed(operation, of, "job_id, split"))
        for metric, of, operations in KEYED
        for operation in operations.split()
    ),
    # The count ends with its session: two minutes of it show the NaN that ended a rank.
    Rule(
        "job:training_nan_ranks:count",
        f"count by (job_id) (max by (job_id, rank) (max_over_time({NAN_LOSS}[2m]) or {NAN_LOSS}) > 0)"
        " or 0 * count by (job_id) (training_run_start_time_seconds{})",
    ),
)

RULES = {rule.record: rule for rule in (*RANKS, *JOBS)}

NESTED = re.compile(r"((?:rank|job):\w+:\w+)\{\}")


def expanded(record: str) -> str:
    """A rule's expression over raw series alone."""
    rule = RULES[record]
    return NESTED.sub(lambda found: expanded(found[1]), rule.instead or rule.expr)


def recorded(record: str, matchers: str = "") -> str:
    """PromQL of a rule's series of `$job`, and of those which its raw series give where it has recorded none.

    `matchers` narrow both; every raw series of the rule has their labels. `1 *` takes the rule's name off: with it, the
    two halves of what is one line would be two.
    """
    return f"(1 * {recorded_alone(record, matchers)} or {raw(expanded(record), matchers)})"


def recorded_alone(record: str, matchers: str = "") -> str:
    """PromQL of a rule's own series of `$job`."""
    return f'{RULES[record].record}{{job_id="$job"{"," + matchers if matchers else ""}}}'


def raw(expr: str, matchers: str = "") -> str:
    """An expression over raw series, each selector of `$job` and empty where `$raw` says so."""
    given = f'job_id="$job",job_id=~"$raw"{"," + matchers if matchers else ""}'
    return re.sub(r"\{(?=[^}])", f"{{{given},", expr).replace("{}", f"{{{given}}}")


HEADER = """\
# Recording rules: what the dashboards draw at any number of ranks. Made by `make dashboards` from
# collector-config/dashboards/rules.py; change it there. A job that is synced later than it ran has no recorded points:
# the dashboards then read its raw series, and `promtool tsdb create-blocks-from rules` records them for the past.
# Label `key` is what a value was logged as; recording_test.yml says what that keeps apart.
"""


def recording_rules() -> str:
    """The rule file."""
    # One group: its rules are evaluated in order, so that those over ranks see what those of a rank have just recorded.
    entries = (
        f"      - record: {rule.record}\n        expr: >-\n          {rule.expr.replace('{}', '')}\n"
        for rule in RULES.values()
    )
    return f"{HEADER}groups:\n  - name: stepspan\n    interval: {INTERVAL}\n    rules:\n{''.join(entries)}"
