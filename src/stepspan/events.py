"""The events of a run: the schema of the journal, one TypedDict for each tag.

An event is a plain dict, because it is made in the training thread: no class is built and nothing is copied on its way
to the disk. Whoever makes one leaves `ts` and `seq` at 0; the journal fills them in under its lock. Every begin event
carries `parent`, the `seq` of the begin line that it lies in (0: none); every end event carries `begin`, the `seq` of
its own begin line. `stepspan.journal.format` says how an event becomes a line.

The table in docs/events.md is made from these classes: the text of each `Annotated` is the field's meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from typing_extensions import NotRequired, TypedDict

SECOND_NS = 1_000_000_000
MILLISECOND_NS = 1_000_000
"""Event time is in Unix nanoseconds."""

SCHEMA_MAJOR = 1
SCHEMA = "1.1"
"""Of the journals that this version writes. A minor version adds tags and fields, which older readers pass over."""

Event: TypeAlias = dict[str, Any]
"""Any of the events below, as it travels: what a processor may change is not known to be one of them any more."""

Number: TypeAlias = int | float | Literal["NaN", "Infinity", "-Infinity"]
Json: TypeAlias = dict[str, Any]
Parent: TypeAlias = Annotated[int, "`seq` of the begin line that it lies in; 0: none"]
BeginSeq: TypeAlias = Annotated[int, "`seq` of its own begin line"]


class Line(TypedDict):
    """What every event has."""

    ts: Annotated[int, "Unix ns; grows from line to line of a session"]
    seq: Annotated[int, "the line's number in its session, from 1 on without a gap"]
    cut: NotRequired[Annotated[int, "how many entries were left out, because there were more than an event holds"]]
    crc: NotRequired[Annotated[int, "CRC-32 of all bytes of the line before this field"]]


class Header(Line):
    """The first line of every segment: whose session it is."""

    tag: Literal["header"]
    schema: Annotated[str, "version of this schema, major.minor"]
    session: Annotated[str, "64 random bits in hex"]
    run_key: Annotated[str, "what all ranks of one run have in common, and no other run has; in every trace id"]
    job_id: Annotated[str, "what all ranks of a job have in common"]
    rank: Annotated[int, "of this process among all, from 0"]
    local_rank: NotRequired[Annotated[int, "of this process among those of its host, from 0"]]
    world_size: Annotated[int, "how many ranks the run has"]
    role: Annotated[str, '"" or, for a forked worker or a duplicate of a living rank, what it is']
    attempt: NotRequired[Annotated[list[int], "how often the scheduler, and the launcher, restarted the job"]]
    launcher: NotRequired[Annotated[str, "the launcher that the identity came from"]]
    started: Annotated[int, "Unix ns"]
    not_before: NotRequired[
        Annotated[int, "Unix ns: where points of this session begin, behind those of the instance's session before"]
    ]
    boot_id: Annotated[str, "of the host's kernel: a lock of another boot says nothing"]
    pid: Annotated[int, "of the process that writes"]
    host: Annotated[str, "name of the machine"]
    destinations: NotRequired[Annotated[list[str], "names of those that it is delivered to while the job runs"]]
    left_out: NotRequired[
        Annotated[list[str], "signals that are not sent for this rank: the settings metrics_ranks, traces_ranks …"]
    ]
    step_roots: NotRequired[
        Annotated[bool, "true: of traces that are left out the spans of steps are sent: the roots of other ranks'"]
    ]
    routes: NotRequired[
        Annotated[
            list[Any],
            "of each of those its name, that of its address, and salted digests of how it is reached and of the tenant",
        ]
    ]
    resource: Annotated[Json, "the attributes of the OpenTelemetry Resource"]


class Begin(Line):
    """The beginning of the run, an epoch, a step or a phase."""

    parent: Parent


class End(Line):
    """The end of an epoch, a step or a phase."""

    begin: BeginSeq
    status: NotRequired[Annotated[str, '"error" where an exception that is a failure left it']]
    ended: NotRequired[Annotated[int, "Unix ns, where the line was written later"]]


class RunBegin(Begin):
    """The run begins in this process."""

    tag: Literal["run_begin"]
    name: Annotated[str, "for people; the job id unless one was given"]
    group: NotRequired[Annotated[str | None, "what the job belongs to"]]
    tags: NotRequired[Annotated[list[Any], "words to find it by"]]
    attempt: NotRequired[Annotated[list[int], "as in the header"]]
    traceparent: NotRequired[
        Annotated[
            str, "the span that has started the run, by the context or by TRACEPARENT, as W3C Trace Context writes it"
        ]
    ]
    tracestate: NotRequired[Annotated[str, "what belongs to it"]]
    joins: NotRequired[Annotated[bool, "the run's span is a child of that one, not only linked to it"]]


class RunEnd(Line):
    """The run ended in this process."""

    tag: Literal["run_end"]
    begin: BeginSeq
    status: Annotated[str, "completed, failed or interrupted"]
    rests: NotRequired[Annotated[bool, "the session stays open for what is evaluated after the training"]]


class EpochBegin(Begin):
    """An epoch begins in a rank."""

    tag: Literal["epoch_begin"]
    epoch: Annotated[int, "its number, from 0"]


class EpochEnd(End):
    """An epoch ended in a rank."""

    tag: Literal["epoch_end"]


class StepBegin(Begin):
    """A step begins in a rank."""

    tag: Literal["step_begin"]
    step: Annotated[int, "its number, from 0"]
    split: Annotated[str, '"train", or what the step is of']
    epoch: NotRequired[Annotated[int, "that it lies in"]]
    lap: NotRequired[Annotated[int, "how often the steps of this split have begun again"]]


class StepEnd(End):
    """A step ended in a rank."""

    tag: Literal["step_end"]
    data_wait: NotRequired[Annotated[float, "seconds that the step waited for its data"]]
    samples: NotRequired[Annotated[float, "how many samples it processed"]]
    tokens: NotRequired[Annotated[float, "how many tokens it processed"]]


class SpanBegin(Begin):
    """A phase begins: `run.span`."""

    tag: Literal["span_begin"]
    name: Annotated[str, "of the span; the metric's attribute `phase`"]
    collective: NotRequired[Annotated[bool, "its time is a wait for other ranks"]]
    cuda: NotRequired[Annotated[bool, "its time on the device follows in a device_time event"]]
    attributes: NotRequired[Annotated[Json, "of the span"]]


class SpanEnd(End):
    """A phase ended: `run.span`."""

    tag: Literal["span_end"]


class DeviceTime(Line):
    """How long a phase took on the device; written when the device has got there."""

    tag: Literal["device_time"]
    begin: BeginSeq
    seconds: Annotated[float | None, "null: it could not be measured"]


class Metrics(Line):
    """The values of one `log_metrics` call."""

    tag: Literal["metrics"]
    step: NotRequired[Annotated[int, "the step in force in the split; without `own_step` the values belong to it"]]
    own_step: NotRequired[Annotated[int, "that the values belong to, where it is not the step in force"]]
    split: Annotated[str, "of the keys that name none"]
    over: NotRequired[Annotated[bool, "whether the step was over when they were logged"]]
    steps: NotRequired[
        Annotated[dict[str, list[int]], "split to [`step`, `own_step`] of its keys, where they are not the call's"]
    ]
    attributes: NotRequired[Annotated[Json, "of every point"]]
    metrics: Annotated[dict[str, Number | None], "key to number; null: a later line has it"]
    time: NotRequired[Annotated[int, "Unix ns of the values, where the user gave it: they are of the past"]]
    call: NotRequired[Annotated[int, "`seq` of the line whose values follow here"]]
    at: NotRequired[Annotated[int, "`ts` of that line"]]


class Hyperparams(Line):
    """Hyperparameters, merged with those logged before."""

    tag: Literal["hyperparams"]
    params: Annotated[Json, "name to value"]


class Artifact(Line):
    """Where an artifact lies."""

    tag: Literal["artifact"]
    name: Annotated[str, "what it is"]
    path: Annotated[str, "where it lies"]
    kind: Annotated[str, '"file", "checkpoint", or any word']
    step: NotRequired[Annotated[int, "in which it was written"]]


class Milestone(Line):
    """A named event of the user's, or of a watch."""

    tag: Literal["event"]
    parent: NotRequired[Parent]
    name: Annotated[str, "what happened"]
    status: NotRequired[Annotated[str, "how it went, in a word"]]
    severity: NotRequired[Annotated[str, "info, warn or error; info by default"]]
    attributes: NotRequired[Annotated[Json, "what belongs to it"]]


class Error(Line):
    """An exception was recorded."""

    tag: Literal["error"]
    parent: NotRequired[Parent]
    type: Annotated[str, "qualified name of the exception's class"]
    message: Annotated[Any, "its text"]
    stack: Annotated[str, "its traceback; of a long one the end"]
    attributes: NotRequired[Annotated[Json, "what belongs to it"]]


class LogRecord(Line):
    """A record of Python's `logging`."""

    tag: Literal["log"]
    parent: NotRequired[Parent]
    severity: Annotated[str, "trace, debug, info, warning, error or critical"]
    logger: Annotated[str, "name of the logger"]
    message: Annotated[str, "with its arguments filled in"]
    attributes: Annotated[Json, "by semantic conventions (`code.*`, `thread.*`), and the record's extra fields"]
    exception: NotRequired[Annotated[Json, "type, message, stack"]]


class Progress(Line):
    """How many training steps there will be."""

    tag: Literal["progress"]
    total_steps: Annotated[int, "counted from step 0"]


class Sample(Line):
    """What a sampler measured at one instant."""

    tag: Literal["sample"]
    source: Annotated[str, "name of the sampler"]
    values: Annotated[list[list[Any]], "[[name, value, {attribute: value}?], ...]"]


class Memory(Line):
    """The counters of a memory allocator."""

    tag: Literal["memory"]
    device_id: Annotated[int, "of the allocator's device"]
    counters: Annotated[dict[str, Number | None], "name to bytes"]


class Otel(Line):
    """What an OpenTelemetry SDK handed over."""

    tag: Literal["otel"]
    parent: NotRequired[Parent]
    signal: Annotated[Literal["metrics", "traces", "logs"], "what the record is of"]
    scope: Annotated[Json, "its InstrumentationScope"]
    schema_url: NotRequired[Annotated[str, "of the scope"]]
    record: Annotated[Json, "a metric, a span or a log record, as OTLP JSON"]


class Gap(Line):
    """So many events before this one could not be written."""

    tag: Literal["gap"]
    dropped: Annotated[int, "how many"]
    why: Annotated[str, "what the disk said"]


class ClockSet(Line):
    """The wall clock turned out to be another one than the journal's, which was set right in one of three ways."""

    tag: Literal["clock"]
    before: NotRequired[
        Annotated[int, "ns that it was ahead (negative: behind) as the session began; nothing shows it"]
    ]
    forward: NotRequired[Annotated[int, "ns that event time skipped just before this line: the clock was behind"]]
    ahead: NotRequired[
        Annotated[int, "ns that the clock is ahead: event time takes twice as long for the next so many"]
    ]


class Dropped(Line):
    """Values that were logged and could not be recorded."""

    tag: Literal["dropped"]
    key: Annotated[str, "of a metric; of another value where it belongs, as in `hyperparams.lr`"]
    count: Annotated[int, "how many, since the last such line of this key"]
    why: Annotated[str, "what is wrong with the last of them"]


BY_TAG: Mapping[str, type] = {
    "header": Header,
    "run_begin": RunBegin,
    "run_end": RunEnd,
    "epoch_begin": EpochBegin,
    "epoch_end": EpochEnd,
    "step_begin": StepBegin,
    "step_end": StepEnd,
    "span_begin": SpanBegin,
    "span_end": SpanEnd,
    "device_time": DeviceTime,
    "metrics": Metrics,
    "hyperparams": Hyperparams,
    "artifact": Artifact,
    "event": Milestone,
    "error": Error,
    "log": LogRecord,
    "progress": Progress,
    "sample": Sample,
    "memory": Memory,
    "otel": Otel,
    "gap": Gap,
    "clock": ClockSet,
    "dropped": Dropped,
}
"""Each tag and its class."""
TAGS = BY_TAG.keys()
"""A set, in the order of the table."""
