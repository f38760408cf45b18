"""Dashboard "Ranks": who holds the others up, and who stopped first."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as board

from dashboards import panels
from dashboards.panels import (
    JOB,
    RANK,
    SPLIT,
    TRAIN,
    Panel,
    at_end,
    buckets,
    by_rank,
    graph,
    histogram,
    lines,
    listing,
    most,
    number,
    rows,
    trace_metrics,
    traces,
)
from dashboards.rules import COMPUTE, DATA_WAIT, LAST_STEP, WAIT, raw, recorded, recorded_alone

MOST_ROWS = 40
SLOW = [(1.1, "yellow"), (1.5, "red")]
"""Compute time ÷ the median's: noticeable, and half as long again."""


def mean(record: str, metric: str, matchers: str = f"{TRAIN},{RANK}") -> str:
    """A rank's mean over the range: of what rules have recorded, else of the raw series."""
    return (
        f"(max by (rank) (avg_over_time({recorded_alone(record, matchers)}[$__range]))"
        f" or max by (rank) (avg_over_time({raw(metric, matchers)}[$__range])))"
    )


def least_wait(count: int) -> str:
    """The ranks that wait least in collectives: those the others wait for."""
    return f"bottomk({count}, {mean(WAIT, 'training_step_wait_seconds{}')})"


def mean_compute(at: str = "") -> str:
    """A rank's mean time of a step without its wait."""
    ours = f"{TRAIN},{RANK}"
    time, wait = (
        f"max by (rank) (avg_over_time({raw(metric, ours)}[$__range]{at}))"
        for metric in ("training_step_time_seconds{}", "training_step_wait_seconds{}")
    )
    return (
        f"(max by (rank) (avg_over_time({recorded_alone(COMPUTE, ours)}[$__range]{at})) or {time} - {wait} or {time})"
    )


HOSTS = (
    "topk by (rank) (1, max by (rank, host_name) "
    f"(last_over_time(training_run_start_time_seconds{{{JOB},{RANK}}}[$__range])))"
)
"""A rank's host, the last one where it has moved."""
MEAN_DATA_WAIT = mean(DATA_WAIT, 'training_phase_time_seconds{phase="data_wait"}', RANK)
SLOWEST = mean_compute(" @ end()")
"""What chooses the ranks that are drawn."""

LAST_STEPS = (
    f"(max by (rank) (last_over_time({recorded_alone(LAST_STEP, RANK)}[$__range]))"
    f" or max by (rank) (max_over_time(timestamp({raw('training_step_time_seconds{}', RANK)})[$__range:15s])))"
)


def overview() -> list[Panel]:
    """Over all ranks."""
    slowest, median = (recorded(f"job:training_step_compute_seconds:{which}", TRAIN) for which in ("max", "p50"))
    behind = f"{recorded('job:training_step_number:max', TRAIN)} - {recorded('job:training_step_number:min', TRAIN)}"
    step_times = (("p50", "median rank"), ("p99", "99th percentile"), ("max", "slowest rank"))
    return [
        number(
            "Straggler: least wait",
            "The rank that waits least in collectives, and how long, mean over the range. In synchronous training all "
            "steps take equally long, because the others wait for it. It matters where the others' wait, in the next "
            "panels, is a large part of the step; then look at that rank's host, GPU clocks and data wait.",
            "s",
            at_end(least_wait(1), "rank {{rank}}"),
            width=6,
            named=True,
            none='mark collectives: run.span("all_reduce", collective=True)',
        ),
        number(
            "Slowest ÷ median",
            "Compute time of the slowest rank over the median rank's. 1.5: every step takes half as long again as it "
            "need.",
            "none",
            lines(f"{slowest} / {median}", "ratio"),
            width=6,
            decimals=2,
            limits=SLOW,
        ),
        number(
            "Steps apart",
            "Between the first and the last rank. In synchronous training 0 or 1; more: a rank has stopped or runs "
            "alone.",
            "none",
            lines(behind, "steps"),
            width=6,
            limits=[(2, "yellow"), (10, "red")],
        ),
        number(
            "Last step of any rank",
            "How long ago. Growing while the run has not ended: all hang, usually in a collective that one rank never "
            "reached: the table of last steps names it.",
            "s",
            at_end(f"time() - max({LAST_STEPS})", "age"),
            width=6,
            limits=[(300, "yellow"), (600, "red")],
        ),
        graph(
            "Step time over ranks",
            "A minute's mean of each rank. With collectives the lines lie together even if one rank is slow: see "
            "compute.",
            "s",
            *(lines(recorded(f"job:training_step_time_seconds:{op}", TRAIN), name) for op, name in step_times),
            width=8,
            low=0,
        ),
        graph(
            "Compute time over ranks",
            "Step time without the wait in collectives: what each rank itself needs. A slowest rank far above the "
            "median is what everyone waits for.",
            "s",
            *(lines(recorded(f"job:training_step_compute_seconds:{op}", TRAIN), name) for op, name in step_times),
            width=8,
            low=0,
        ),
        graph(
            "Slowest ÷ median",
            "Of the compute time. Steady: slow hardware or an uneven split; jumping between ranks: data or noise.",
            "none",
            lines(f"{slowest} / {median}", "slowest ÷ median"),
            width=8,
            limits=SLOW,
            most=panels.COARSE,
        ),
        graph(
            "Where a step's time goes",
            "Mean over ranks: waiting for data, computing, waiting for other ranks. Data: more loader workers or a "
            "faster store. Wait: find the straggler, or overlap communication.",
            "s",
            lines(recorded("job:training_data_wait_seconds:avg"), "data wait"),
            lines(recorded("job:training_step_compute_seconds:avg", TRAIN), "compute"),
            lines(recorded("job:training_step_wait_seconds:avg", TRAIN), "wait for ranks"),
            stacked=True,
            low=0,
        ),
        listing(
            "Slowest ranks",
            "The ten that wait least for the others, mean over the range: the first is the straggler where its compute "
            "stands out. Long data wait: its loader; otherwise its host or GPU (see Hardware for this rank).",
            "s",
            rows(least_wait(10), "{{rank}}"),
            rows(f"{mean_compute()} and on (rank) {least_wait(10)}", "{{rank}}"),
            rows(f"{MEAN_DATA_WAIT} and on (rank) {least_wait(10)}", "{{rank}}"),
            rows(f"{HOSTS} and on (rank) {least_wait(10)}", "{{rank}}"),
            columns={
                "rank": "Rank",
                "host_name": "Host",
                "Value #A": "Wait for ranks",
                "Value #B": "Compute",
                "Value #C": "Data wait",
            },
            hidden=("Time 1", "Time 2", "Time 3", "Time 4", "Value #D"),
            join="rank",
            sort=("Wait for ranks", False),
        ),
    ]


def heat() -> list[Panel]:
    """Rank by time."""
    to_median = f"/ on (job_id, split) group_left () {recorded('job:training_step_compute_seconds:p50', TRAIN)}"
    compute = recorded(COMPUTE, f"{TRAIN},{RANK}")
    named = f'label_replace({recorded(COMPUTE, TRAIN)}, "block", "0xx", "", "")'
    blocks = f'max by (job_id, split, block) (label_replace({named}, "block", "${{1}}xx", "rank", "(.+).."))'
    return [
        by_rank(
            "Compute time of ranks ÷ the median's",
            f"The {MOST_ROWS} slowest of the chosen ranks. A red row: one slow rank. A red column: all of them once, "
            "as at a checkpoint. Red that wanders: data.",
            "none",
            lines(most(f"{compute} {to_median}", SLOWEST, MOST_ROWS), "rank {{rank}}"),
            limits=SLOW,
        ),
        by_rank(
            "Compute time of blocks of 100 ranks ÷ the median's",
            "The slowest rank in each hundred, all ranks of the job: where in a large cluster it is slow. Choose "
            "ranks of a red block, such as 12.., to see them one by one.",
            "none",
            lines(f"{blocks} {to_median}", "{{block}}"),
            limits=SLOW,
        ),
    ]


def stopped() -> list[Panel]:
    """Who stopped first, and what a slow step did."""
    duration = recorded("job:training_step_duration_seconds:sum", SPLIT)
    # The second half reads no sample, for nothing is as old as @ 0: it is there because Grafana asks for the exemplars
    # of the series an expression names, and recorded series have none. So all ranks' exemplars cost next to nothing.
    exemplars = f"training_step_duration_seconds{{{JOB},{SPLIT}}} @ 0"
    steps = 'resource.job_id="$job" && span:name="training.step"'
    return [
        listing(
            "Last step of ranks",
            "Age of each rank's last step at the end of the range, the oldest first: who stopped first. The others "
            "wait for it; its training.stall event, in Run, has the stacks.",
            "s",
            rows(f"sort_desc(topk({MOST_ROWS}, time() - {LAST_STEPS}))", "{{rank}}"),
            columns={"rank": "Rank", "Value": "Age of the last step", "Value #A": "Age of the last step"},
            sort=("Age of the last step", True),
            limits=[(300, "yellow"), (600, "red")],
            width=8,
        ),
        graph(
            "Step duration",
            "Percentiles over all steps of all ranks. The dots are the slowest steps of each rank and 10 s: click one "
            "to open its trace, with every rank of that step side by side.",
            "s",
            lines(f"histogram_quantile(0.99, {duration} or {exemplars})", "99th percentile {{split}}", exemplars=True),
            lines(f"histogram_quantile(0.5, {duration})", "median {{split}}"),
            width=8,
            low=0,
        ),
        histogram(
            "Distribution of step durations",
            "How many steps a second took how long, over all ranks. Two bands: two kinds of steps, such as long "
            "batches or ranks on slower hardware.",
            "s",
            buckets(f"sum by (job_id) ({duration})", "steps/s"),
            width=8,
        ),
        traces_panel(steps),
        graph(
            "Step duration by rank, from traces",
            "99th percentile of the ten slowest ranks, computed by Tempo from the step spans. Traces are thinned "
            "above 10 steps a second: slow steps are kept, so this leans to the slow side.",
            "s",
            trace_metrics(f"{{ {steps} }} | quantile_over_time(span:duration, .99) by (resource.rank) | topk(10)"),
        ),
    ]


def traces_panel(steps: str) -> Panel:
    """Spans found by Tempo."""
    return listing(
        "Slow steps",
        "Step spans of at least $slower, the slowest first; of many, the most recent fifty. The trace has every rank's "
        "step and its phases: the one whose collective is shortest came last.",
        "none",
        traces(
            f'{{ {steps} && span.split=~"$split" && span:duration >= $slower }} | select(span.step, resource.rank)'
            " with (most_recent=true)"
        ),
        columns={"traceIdHidden": "Trace", "duration": "Duration"},
        sort=("Duration", True),
    )


def chosen() -> list[Panel]:
    """Drill down."""
    select = f"{JOB},{RANK},{TRAIN}"
    phases = f"avg by (rank, phase) (training_phase_time_seconds{{{JOB},{RANK}}})"
    return [
        *(
            graph(
                f"{title} by rank",
                f"{about} The chosen ranks; of more than 20, the slowest.",
                "s",
                lines(most(expr, SLOWEST), "rank {{rank}}"),
                width=8,
                low=0,
                most=panels.COARSE,
            )
            for title, about, expr in (
                ("Step time", "The last step at each time.", f"training_step_time_seconds{{{select}}}"),
                (
                    "Wait",
                    "In collectives: the lowest line is who the others wait for.",
                    recorded(WAIT, f"{TRAIN},{RANK}"),
                ),
                ("Data wait", "For the loader, before the step.", recorded(DATA_WAIT, RANK)),
            )
        ),
        graph(
            "Phases by rank",
            "Every span of the training and data_wait: what does a slow rank spend its time on? The slowest five of "
            "the chosen ranks. On a GPU the host's clock times the launch of the work, not the work.",
            "s",
            lines(most(phases, SLOWEST, 5), "{{phase}}, rank {{rank}}"),
            width=24,
            low=0,
            most=panels.COARSE,
        ),
    ]


def dashboard() -> board.Dashboard:
    """The dashboard."""
    return panels.dashboard(
        "ranks",
        "stepspan / Ranks",
        "Who holds the others up, and who stopped first.",
        [
            ("All ranks", overview()),
            ("Rank by time", heat()),
            ("Who stopped first, and slow steps", stopped()),
            ("Ranks $rank", chosen()),
        ],
        variables=("rank", "split", "slower"),
    )
