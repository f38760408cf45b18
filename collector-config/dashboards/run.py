"""Dashboard "Run": is it learning, how far is it, what broke."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as board

from dashboards.panels import (
    COARSE,
    JOB,
    RANK,
    SPLIT,
    TRAIN,
    TRAINING,
    Mark,
    Panel,
    against,
    events,
    faint,
    graph,
    lines,
    listing,
    log_lines,
    mark,
    messages,
    most,
    number,
    rows,
)
from dashboards.panels import dashboard as _dashboard
from dashboards.rules import LOSS_KEYS, LOSSES, OTHERS, keyed, raw, recorded, recorded_alone

RANK_0 = f'{JOB},rank="0"'
START = f"training_run_start_time_seconds{{{RANK_0}}}"
"""When this attempt began. Rank 0 speaks for all: its value changes once for each restart, at any number of ranks."""
BEGUN = f"max by (job_id) ({START})"
"""The same as one series, also where an attempt runs on another host than the one before, and so is another series."""
EARLIER = f"(max by (job_id) ({START}) < on (job_id) max by (job_id) (max_over_time({START}[$__range] @ end())))"
"""Something at the times of attempts that were restarted later in the range, nothing at those of the last one."""

STEP = f"max by (job_id) ({recorded('job:training_step_number:max', TRAINING)})"
LOSS = recorded("job:training_loss:avg", SPLIT)
LOGGED_AT = " or ".join(
    f'label_replace(timestamp(training_{name}{{{RANK_0},{SPLIT},key=""}}), "key", "{name}", "", "") '
    f'or timestamp(training_{name}{{{RANK_0},{SPLIT},key!=""}})'
    for name in ("loss", "loss_step", "loss_epoch")
)
"""When rank 0's last value of each loss was logged."""
OWN_STEP = f"training_step_logged{{{RANK_0},{SPLIT},{LOSS_KEYS}}}"
"""The step that a value of rank 0 was logged with, where that isn't the step at that time."""
STEP_OF_LOSS = (
    f"(max by (job_id, split, key) ({OWN_STEP} and timestamp({OWN_STEP}) >= ({LOGGED_AT}))"
    f" or 0 * {LOSS} + on (job_id) group_left () ({STEP} and on (job_id) {BEGUN}))"
)
"""The step of each loss: its own if it has one, else the training's; as long as rank 0 is there to tell."""
CHECKPOINT = (
    f"((max_over_time({recorded_alone('job:training_run_checkpoint_time_seconds:max')}[1d]) "
    f"or max by (job_id) (max_over_time({raw('training_run_checkpoint_time_seconds{}')}[1d]))) "
    f"and on (job_id) {BEGUN})"
)
"""The last one, also of an attempt before a restart: its series ends with it."""
HOUR = 3600
EXCEPTION = 'event_name="exception"'
ARTIFACT = 'event_name="training.artifact" | kind="checkpoint"'
HYPERPARAMETERS = 'event_name="training.hyperparams"'
EARLIER_NAMES = "/earlier attempt/"


def latest(expr: str) -> str:
    """What of an expression is the last attempt's."""
    return f"{expr} unless on (job_id) {EARLIER}"


def earlier(expr: str) -> str:
    """What of an expression is an earlier attempt's."""
    return f"{expr} and on (job_id) {EARLIER}"


def now() -> list[Panel]:
    """How far it is."""
    progress = f"(({STEP}) + 1) / on (job_id) {recorded('job:training_run_total_steps:max')}"
    return [
        number(
            "Step",
            "The highest training step of any rank. Where it stands still, look at Ranks: who stopped first.",
            "none",
            lines(STEP, "step"),
        ),
        number(
            "Done",
            "The share of all steps that is done. Needs run.set_total_steps(n); a framework's callback calls it.",
            "percentunit",
            lines(f"clamp_max({progress}, 1)", "done"),
            none="run.set_total_steps?",
            decimals=1,
        ),
        number(
            "Time left",
            "What the last step's pace gives for the remaining steps, validation and checkpoints included.",
            "s",
            lines(recorded("job:training_run_eta_seconds:max"), "left"),
            none="run.set_total_steps?",
        ),
        number(
            "Epoch",
            "The epoch, counted as the training counts it; without it, run.epoch(n) is not called.",
            "none",
            lines(recorded("job:training_run_epoch:max"), "epoch"),
        ),
        number(
            "Attempts",
            "How often the job has begun in this time range, by rank 0. More than one: see Restarts below.",
            "none",
            lines(f"changes(({BEGUN})[$__range:15s]) + 1", "attempts"),
            limits=[(2, "yellow"), (5, "red")],
        ),
        number(
            "Ranks",
            "Ranks that report. Fewer than the job was started with: a rank has ended, or its telemetry doesn't "
            "arrive.",
            "none",
            lines(recorded("job:training_ranks:count"), "ranks"),
        ),
        number(
            "Ranks with NaN loss",
            "Ranks whose loss has been infinite or no number, since they began. One is enough to spoil all weights at "
            "the next all-reduce: stop, go back to the last checkpoint before it, and look at the gradient norm of the "
            "steps before.",
            "none",
            lines(recorded("job:training_nan_ranks:count"), "ranks"),
            limits=[(1, "red")],
        ),
        number(
            "Loss",
            "The last training loss, mean over ranks. How it got there stands below.",
            "none",
            lines(recorded("job:training_loss:avg", TRAINING), "{{key}} {{split}}"),
            named=True,
            decimals=4,
        ),
        number(
            "Throughput",
            "Samples or tokens a second, over all ranks; the wait for data counts. Needs samples= or tokens= on a "
            "step.",
            "suffix: /s",
            lines(recorded("job:training_throughput_per_second:sum", TRAIN), "{{item}}"),
            named=True,
            none="run.step(n, samples=…)?",
        ),
        number(
            "Errors",
            "Exceptions that the training has recorded, over all ranks, in this attempt. Their text stands below.",
            "none",
            lines(f"sum by (job_id) ({recorded('job:training_run_errors:sum')})", "errors"),
            limits=[(1, "red")],
            none="0",
        ),
        number(
            "Checkpoint age",
            "How long ago the last checkpoint was recorded: what a crash would cost now. Needs "
            'run.log_artifact(name, path, kind="checkpoint").',
            "s",
            lines(f"time() - {CHECKPOINT}", "age"),
            limits=[(HOUR, "yellow"), (2 * HOUR, "red")],
            none="none yet",
        ),
        number(
            "Step time",
            "The median rank's training step, a minute's mean. Where the time goes stands in Ranks.",
            "s",
            lines(recorded("job:training_step_time_seconds:p50", TRAIN), "step time"),
        ),
    ]


def learning() -> list[Panel]:
    """Whether it is learning."""
    against_step = against(
        "Loss by step",
        "The same losses over the training step, or over the step that they were logged with (an evaluation that comes "
        "late): attempts that repeat steps lie over each other, the earlier ones faint, and must agree there; where "
        "they part, the restart did not restore everything (optimizer, data order, seed). Joined by time, one point "
        "for each of the time range's intervals: zoom in for more.",
        "none",
        lines(STEP_OF_LOSS, "step of {{key}} {{split}}"),
        lines(latest(LOSS), "{{key}} {{split}}"),
        lines(earlier(LOSS), "{{key}} {{split}}, earlier attempt"),
        axis="step",
        by=("key", "split"),
    )
    return [
        faint(
            graph(
                "Loss",
                "Each loss by its key, mean over ranks. A gap while steps go on: a rank's loss is NaN. Faint: attempts "
                "before the last restart.",
                "none",
                lines(latest(LOSS), "{{key}} {{split}}"),
                lines(earlier(LOSS), "{{key}} {{split}}, earlier attempt"),
            ),
            EARLIER_NAMES,
        ),
        faint(against_step, EARLIER_NAMES),
        graph(
            "Validation",
            "Every metric of split val, eval or test (or with a key such as val/accuracy), mean over ranks. Rising "
            "validation loss under falling training loss: it overfits.",
            "none",
            lines(recorded("job:training_validation:avg"), "{{key}} {{split}}"),
            width=12,
        ),
        graph(
            "Other metrics of rank 0",
            "Everything else that rank 0 logs, by its key, all on one axis: click one to see it alone. A metric that "
            "matters deserves a panel of its own.",
            "none",
            lines(keyed("avg", f'{{{OTHERS},{JOB},rank="0",{SPLIT}}}', "split"), "{{key}} {{split}}"),
            width=12,
        ),
        graph(
            "Learning rate",
            "What is logged as lr or learning_rate, or as a framework calls it: lr-Adam, lr-SGD/pg1. A schedule that "
            "jumps at a restart was not restored.",
            "none",
            lines(recorded("job:training_learning_rate:max"), "{{key}} {{split}}"),
            width=12,
        ),
        graph(
            "Gradient norm",
            "What is logged as grad_norm: the median rank and the largest. A spike comes before a diverging loss: "
            "clip, or lower the learning rate.",
            "none",
            lines(recorded("job:training_grad_norm:p50"), "{{key}} {{split}}, median rank"),
            lines(recorded("job:training_grad_norm:max"), "{{key}} {{split}}, largest"),
            width=12,
            log=True,
        ),
    ]


def speed() -> list[Panel]:
    """Whether it is fast."""
    throughput = recorded("job:training_throughput_per_second:sum", SPLIT)
    return [
        graph(
            "Throughput",
            "Samples or tokens a second over all ranks, the wait for data included. A fall without a change of the "
            "step time is the loader's; with one, see Ranks.",
            "suffix: /s",
            lines(throughput, "{{item}} {{split}}"),
            width=8,
            low=0,
        ),
        graph(
            "Step time",
            "Over ranks, a minute's mean each. Median and slowest apart: one rank holds the others up, see Ranks.",
            "s",
            *(
                lines(recorded(f"job:training_step_time_seconds:{operation}", TRAIN), name)
                for operation, name in (("p50", "median rank"), ("p99", "99th percentile"), ("max", "slowest rank"))
            ),
            width=8,
            low=0,
        ),
        graph(
            "Step",
            "The highest training step, and the last one where it is known. A fall is a restart: as many steps are "
            "done again.",
            "none",
            lines(STEP, "step"),
            lines(recorded("job:training_run_total_steps:max"), "total"),
            width=8,
            low=0,
        ),
    ]


def broken() -> list[Panel]:
    """What broke."""
    return [
        graph(
            "Errors",
            "Exceptions recorded so far in this attempt, over all ranks, by type. Many ranks at once: the same cause, "
            "or the collective that one of them left.",
            "short",
            lines(recorded("job:training_run_errors:sum"), "{{error_type}}"),
            width=8,
            low=0,
        ),
        messages(
            "Exceptions",
            "With rank, step and stack trace. The earliest is the cause; trace_id leads to the step it happened in.",
            events(EXCEPTION),
            width=16,
        ),
        messages(
            "Events and stalls",
            "Milestones, artifacts and stalls (training.stall: with the stacks of all threads of the rank that "
            "stopped).",
            events('event_name=~".+" | event_name!="exception" | event_name!="training.hyperparams"'),
        ),
        graph(
            "Restarts",
            "Time since the attempt began, by rank 0: a fall is a restart. Often at the same age: a time limit or a "
            "leak.",
            "s",
            lines(f"time() - {BEGUN}", "age of the attempt"),
            width=6,
            low=0,
        ),
        graph(
            "Checkpoint age",
            "A sawtooth; its height is what a crash costs. Without the teeth, saving has stopped.",
            "s",
            lines(f"time() - {CHECKPOINT}", "age"),
            width=6,
            low=0,
            limits=[(HOUR, "yellow"), (2 * HOUR, "red")],
        ),
        graph(
            "Values not recorded",
            "How many values that were logged are no numbers, or raised, over all ranks: by metric key, or where they "
            "belong (hyperparams.lr). stepspan.dropped_value in Events says why.",
            "short",
            lines(f"sum by (key) (training_run_dropped_values_total{{{JOB}}})", "{{key}}"),
            low=0,
        ),
    ]


def what() -> list[Panel]:
    """What was run."""
    hidden = ("Value", "Value #A", "__name__", "instance", "job", "job_id", "rank", "local_rank")
    return [
        listing(
            "Run",
            "Name, group and the chosen hyperparameters of rank 0, as it told them last."
            " What an earlier attempt was given stands in Hyperparameters.",
            "none",
            rows(f'topk(1, max_over_time(timestamp(training_run_info{{{JOB},rank="0"}})[$__range:15s]))', "{{name}}"),
            columns={"name": "Name", "group": "Group", "world_size": "World size"},
            hidden=hidden,
        ),
        messages(
            "Hyperparameters",
            "All that run.log_hyperparams was given, by each rank and attempt. Look here for what differs between two.",
            events(HYPERPARAMETERS),
        ),
    ]


def by_rank() -> list[Panel]:
    """Drill down."""
    loss = keyed("avg", f"{{{LOSSES},{JOB},{RANK},{SPLIT}}}", "rank, split")
    chosen = f"max by (rank) (last_over_time({{{LOSSES},{JOB},{RANK},{SPLIT}}}[$__range] @ end()))"
    return [
        graph(
            "Loss over ranks",
            "How far the ranks' losses lie apart. In data-parallel training a band that widens means that replicas "
            "differ: seeds, data shards, or a rank that computes wrongly.",
            "none",
            *(
                lines(recorded(f"job:training_loss:{operation}", SPLIT), name + ", {{key}} {{split}}")
                for operation, name in (("min", "lowest"), ("p50", "median"), ("p99", "99th"), ("max", "highest"))
            ),
        ),
        graph(
            "Loss by rank",
            "The chosen ranks; of more than 20, those whose loss is highest at the end.",
            "none",
            lines(most(loss, chosen), "rank {{rank}} {{key}} {{split}}"),
            most=COARSE,
        ),
    ]


def dashboard() -> board.Dashboard:
    """The dashboard."""
    built = _dashboard(
        "run",
        "stepspan / Run",
        "Is it learning, how far is it, what broke.",
        [
            ("Now", now()),
            ("Is it learning?", learning()),
            ("Is it fast?", speed()),
            ("What broke?", broken()),
            ("What was run?", what()),
            ("Ranks $rank", by_rank()),
        ],
    )
    return built.annotations(marks())


def marks() -> list[Mark]:
    """What is marked on every graph over time."""
    restarted = f"changes(({BEGUN})[1m:15s]) > 0"
    return [
        mark("Checkpoints", "green", log_lines(events(ARTIFACT)), "checkpoint {{name}}", "{{path}}"),
        mark("Exceptions", "red", log_lines(events(EXCEPTION)), "{{exception_type}}", "rank {{rank}}"),
        mark("Restarts", "orange", lines(restarted, "restarts"), "restarted", "by rank 0"),
    ]
