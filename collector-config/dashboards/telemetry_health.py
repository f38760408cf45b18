"""Dashboard "Telemetry health": whether everything has arrived, and where it waits if not."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as board

from dashboards import panels
from dashboards.panels import JOB, Panel, graph, lines, listing, number, rows
from dashboards.rules import recorded

LATE = [(60.0, "yellow"), (300.0, "red")]
SIGNALS = {"metric_points": "metric points", "spans": "spans", "log_records": "log records"}


def now() -> list[Panel]:
    """The ledger at a glance."""
    lost = f'sum by (job_id) (stepspan_journal_lines_total{{{JOB},state=~"damaged|dropped|pruned"}})'
    refused = f'sum by (job_id) (stepspan_delivery_records_total{{{JOB},outcome="rejected"}})'
    return [
        number(
            "Lag",
            "Age of the oldest event that is not delivered, of any host and signal. 0: all has arrived.",
            "s",
            lines(f"max by (job_id) ({recorded('job:stepspan_delivery_lag_seconds:max')})", "lag"),
            limits=LATE,
            width=6,
        ),
        number(
            "Waiting",
            "Bytes of journals that are not delivered, all hosts. They are safe on the hosts' disks.",
            "bytes",
            lines(f"sum by (job_id) ({recorded('job:stepspan_delivery_pending_bytes:sum')})", "waiting"),
            width=6,
        ),
        number(
            "Held",
            "Sessions whose receiver needs somebody: a wrong address, credentials, a window too small. `stepspan "
            "status` on the host has the receiver's own words.",
            "none",
            lines(f"sum by (job_id) ({recorded('job:stepspan_delivery_held:sum')})", "held"),
            limits=[(1, "red")],
            width=6,
        ),
        number(
            "Refused or lost",
            "Records a receiver refused for good (they lie in rejected.jsonl; `stepspan sync --rejected` sends them "
            "again), and journal lines that were damaged, dropped for want of room, or pruned before delivery.",
            "none",
            lines(refused, "refused"),
            lines(lost, "lost"),
            limits=[(1, "red")],
            width=6,
            named=True,
        ),
    ]  # fmt: skip


def delivery() -> list[Panel]:
    """What the deliverers say of themselves."""
    return [
        graph(
            "Delivered",
            "Records a second, by signal and outcome. Rejected: see the reason in `stepspan status`; filtered: left "
            "out on purpose (thinned traces, a state that was told twice in one millisecond); thinned: values logged "
            "faster than one a millisecond for over 10 s.",
            "suffix: /s",
            lines(recorded("job:stepspan_delivery_records:sum"), "{{signal}} {{outcome}}"),
            width=8,
            low=0,
        ),
        graph(
            "Lag",
            "Age of the oldest event not delivered, the latest host. A slope of one: nothing gets through; less: the "
            "receiver is slower than the training.",
            "s",
            lines(recorded("job:stepspan_delivery_lag_seconds:max"), "{{signal}}"),
            width=8,
            low=0,
            limits=LATE,
        ),
        graph(
            "Waiting",
            "Bytes not delivered, all hosts. It should fall within minutes after an outage; the journal's limit (10 "
            "GiB a session) is where lines are pruned.",
            "bytes",
            lines(recorded("job:stepspan_delivery_pending_bytes:sum"), "{{signal}}"),
            width=8,
            low=0,
        ),
        graph(
            "Held sessions",
            "Sessions in hold, by signal. They are tried again slowly, and go on by themselves once the cause is gone.",
            "short",
            lines(recorded("job:stepspan_delivery_held:sum"), "{{signal}}"),
            width=8,
            low=0,
            limits=[(1, "red")],
        ),
        graph(
            "Journal lines",
            "Lines read since the deliverers started; damaged, dropped and pruned ones are losses and should not "
            "appear.",
            "short",
            lines(recorded("job:stepspan_journal_lines:sum"), "{{state}}"),
            width=8,
            low=0,
            log=True,
        ),
        listing(
            "Latest hosts",
            "The deliverers with the largest lag: log in there and run `stepspan status`.",
            "s",
            rows(
                f"sort_desc(topk(20, max by (instance, destination, signal) (last_over_time("
                f"stepspan_delivery_lag_seconds{{{JOB}}}[$__range]))))",
                "{{instance}}",
            ),
            columns={"instance": "Deliverer", "destination": "Destination", "signal": "Signal", "Value": "Lag"},
            width=8,
            limits=LATE,
        ),
    ]


def collectors() -> list[Panel]:
    """What the Collector says of itself; all jobs."""
    sent = [(f"otelcol_exporter_{{}}_{name}_total[1m]", title) for name, title in SIGNALS.items()]
    return [
        graph(
            "Collector queue",
            "Requests that wait in each exporter's queue, as a share of its capacity. Full: the client waits, or the "
            "collector drops, as block_on_overflow says; the store behind that exporter is too slow or down.",
            "percentunit",
            lines(
                "max by (exporter, data_type) (otelcol_exporter_queue_size) / "
                "max by (exporter, data_type) (otelcol_exporter_queue_capacity)",
                "{{exporter}} {{data_type}}",
            ),
            width=8,
            low=0,
            limits=[(0.5, "yellow"), (0.9, "red")],
        ),
        graph(
            "Collector: refused by the receiver",
            "Records a second that the memory limiter or a full queue turned away. stepspan sends them again: a lag, "
            "no loss. Steady: give the collector memory, or add one.",
            "suffix: /s",
            *(
                lines(
                    f"sum by (receiver) (rate(otelcol_receiver_refused_{name}_total[1m]))",
                    f"{title}, {{{{receiver}}}}",
                )
                for name, title in SIGNALS.items()
            ),
            width=8,
            low=0,
        ),
        graph(
            "Collector: sent and failed",
            "Records a second that left each exporter, and those it gave up. A failure is a loss unless the queue is "
            "persistent: the collector's log says what the store answered.",
            "suffix: /s",
            *(
                lines(f"sum by (exporter) (rate({exported.format('sent')}))", f"{title} sent, {{{{exporter}}}}")
                for exported, title in sent
            ),
            # What never failed has no series: then 0.
            *(
                lines(
                    f"sum by (exporter) (rate({exported.format('send_failed')})"
                    f" or 0 * rate({exported.format('sent')}))",
                    f"{title} failed, {{{{exporter}}}}",
                )
                for exported, title in sent
            ),
            width=8,
            low=0,
        ),
    ]  # fmt: skip


def prometheus() -> list[Panel]:
    """What Prometheus says of itself; all jobs."""
    return [
        graph(
            "Prometheus: samples",
            "Samples a second into the head, and those of them that came out of order, as a journal sent late does.",
            "suffix: /s",
            lines("rate(prometheus_tsdb_head_samples_appended_total[1m])", "{{type}}"),
            lines(
                "rate(prometheus_tsdb_out_of_order_samples_appended_total[1m])"
                " or 0 * rate(prometheus_tsdb_head_samples_appended_total[1m])",
                "late, {{type}}",
            ),
            width=8,
            low=0,
        ),
        graph(
            "Prometheus: refused samples",
            "Too old for out_of_order_time_window, out of bounds, or another value at a time that has one. stepspan "
            "holds them: widen the window in prometheus.yml, then they arrive.",
            "suffix: /s",
            lines("rate(prometheus_tsdb_too_old_samples_total[1m])", "too old, {{type}}"),
            lines("rate(prometheus_tsdb_out_of_bound_samples_total[1m])", "out of bounds, {{type}}"),
            lines("rate(prometheus_tsdb_out_of_order_samples_total[1m])", "out of order, {{type}}"),
            width=8,
            low=0,
        ),
        graph(
            "Prometheus: series",
            "In memory, all jobs: about 4 KiB each. Each restart with new labels adds some; docs/scaling.md counts "
            "them.",
            "short",
            lines("prometheus_tsdb_head_series", "series"),
            lines("prometheus_tsdb_exemplar_exemplars_in_storage", "exemplars"),
            width=8,
            low=0,
        ),
        graph(
            "Prometheus: recording rules",
            "How long one evaluation takes, of the interval it has. Near 1, the overview panels lag and then gap: "
            "fewer series, or a store that shards rules.",
            "percentunit",
            lines(
                "max by (rule_group) (prometheus_rule_group_last_duration_seconds / "
                "prometheus_rule_group_interval_seconds)",
                "{{rule_group}}",
            ),
            width=8,
            low=0,
            limits=[(0.5, "yellow"), (0.9, "red")],
        ),
    ]  # fmt: skip


def dashboard() -> board.Dashboard:
    """The dashboard."""
    return panels.dashboard(
        "telemetry-health",
        "stepspan / Telemetry health",
        "Has everything arrived, and if not, where does it wait?",
        [
            ("Now", now()),
            ("Delivery from the journals", delivery()),
            ("Collector", collectors()),
            ("Prometheus", prometheus()),
        ],
        variables=(),
    )
