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

SCHEMA_MAJOR = 1
SCHEMA = "1.0"
"""Of the journals that this version writes. A minor version adds tags and fields, which older readers pass over."""

Event: TypeAlias = dict[str, Any]
"""Any of the events below, as it travels: what a processor may change is not known to be one of them any more."""

Number: TypeAlias = int | float | Literal["NaN", "Infinity", "-Infinity"]
Json: TypeAlias = dict[str, Any]


class Line(TypedDict):
    """What every event has."""

    ts: Annotated[int, "Unix ns; grows from line to line of a session"]
    seq: Annotated[int, "the line's number in its session, from 1 on without a gap"]
    crc: NotRequired[Annotated[int, "CRC-32 of the line before it; only in a line"]]


class Header(Line):
    """The first line of every segment: whose session it is."""

    tag: Literal["header"]
    schema: Annotated[str, "version of this schema, major.minor"]
    session: Annotated[str, "64 random bits in hex"]
    run_key: Annotated[str, "what all ranks of one run have in common, and no other run has; in every trace id"]
    job_id: str
    rank: int
    local_rank: NotRequired[int]
    world_size: Annotated[int, "how many ranks the run has"]
    role: Annotated[str, '"" or, for a forked worker or a duplicate of a living rank, what it is']
    attempt: NotRequired[Annotated[list[int], "how often the scheduler, and the launcher, restarted the job"]]
    launcher: NotRequired[Annotated[str, "the launcher that the identity came from"]]
    started: Annotated[int, "Unix ns"]
    boot_id: Annotated[str, "of the host's kernel: a lock of another boot says nothing"]
    pid: int
    host: str
    resource: Annotated[Json, "the attributes of the OpenTelemetry Resource"]


class RunBegin(Line):
    """The run begins in this process."""

    tag: Literal["run_begin"]
    parent: int
    name: str
    group: NotRequired[str | None]
    tags: NotRequired[list[Any]]
    attempt: NotRequired[list[int]]


class RunEnd(Line):
    """The run ended."""

    tag: Literal["run_end"]
    begin: int
    status: Annotated[str, "completed, failed or interrupted"]


class EpochBegin(Line):
    """An epoch begins."""

    tag: Literal["epoch_begin"]
    parent: int
    epoch: int


class EpochEnd(Line):
    """An epoch ended."""

    tag: Literal["epoch_end"]
    begin: int
    status: NotRequired[Annotated[str, '"error" where an exception left it']]
    ended: NotRequired[Annotated[int, "Unix ns, where the line was written later"]]


class StepBegin(Line):
    """A step begins."""

    tag: Literal["step_begin"]
    parent: int
    step: int
    split: Annotated[str, '"train", or what the step is of']
    epoch: NotRequired[int]
    lap: NotRequired[Annotated[int, "how often the steps of this split have begun again"]]


class StepEnd(Line):
    """A step ended."""

    tag: Literal["step_end"]
    begin: int
    status: NotRequired[Annotated[str, '"error" where an exception left it']]
    data_wait: NotRequired[Annotated[float, "seconds that the step waited for its data"]]
    samples: NotRequired[Annotated[float, "how many samples it processed"]]
    tokens: NotRequired[Annotated[float, "how many tokens it processed"]]
    ended: NotRequired[Annotated[int, "Unix ns, where the line was written later"]]


class SpanBegin(Line):
    """A phase begins."""

    tag: Literal["span_begin"]
    parent: int
    name: str
    collective: NotRequired[Annotated[bool, "its time is a wait for other ranks"]]
    cuda: NotRequired[Annotated[bool, "its time on the device follows in a device_time event"]]
    attributes: NotRequired[Json]


class SpanEnd(Line):
    """A phase ended."""

    tag: Literal["span_end"]
    begin: int
    status: NotRequired[Annotated[str, '"error" where an exception left it']]
    ended: NotRequired[Annotated[int, "Unix ns, where the line was written later"]]


class DeviceTime(Line):
    """How long a phase took on the device; written when the device has got there."""

    tag: Literal["device_time"]
    begin: int
    seconds: Annotated[float | None, "null: it could not be measured"]


class Metrics(Line):
    """The values of one `log_metrics` call."""

    tag: Literal["metrics"]
    step: NotRequired[int]
    split: str
    attributes: NotRequired[Json]
    metrics: Annotated[dict[str, Number | None], "key to number; null: a later line has it"]
    at: NotRequired[Annotated[int, "`ts` of the line whose values follow here"]]


class Hyperparams(Line):
    """Hyperparameters, merged with those logged before."""

    tag: Literal["hyperparams"]
    params: Json


class Artifact(Line):
    """Where an artifact lies."""

    tag: Literal["artifact"]
    name: str
    path: str
    kind: str
    step: NotRequired[int]


class Milestone(Line):
    """A named event of the user's, or of a watch."""

    tag: Literal["event"]
    parent: NotRequired[int]
    name: str
    status: NotRequired[str]
    severity: NotRequired[str]
    attributes: NotRequired[Json]


class Error(Line):
    """An exception."""

    tag: Literal["error"]
    parent: NotRequired[int]
    type: str
    message: Any
    stack: str
    attributes: NotRequired[Json]


class LogRecord(Line):
    """A record of Python's `logging`."""

    tag: Literal["log"]
    parent: NotRequired[int]
    severity: Annotated[int, "OpenTelemetry's SeverityNumber, 1 to 24"]
    logger: str
    message: str
    attributes: Json
    exception: NotRequired[Annotated[Json, "type, message, stack"]]


class Progress(Line):
    """How many training steps there will be."""

    tag: Literal["progress"]
    total_steps: int


class Sample(Line):
    """What a sampler measured at one instant."""

    tag: Literal["sample"]
    source: str
    values: Annotated[list[list[Any]], "[[name, value, {attribute: value}?], ...]"]


class Memory(Line):
    """The counters of a memory allocator."""

    tag: Literal["memory"]
    device_id: int
    counters: Annotated[dict[str, Number | None], "name to bytes"]


class Otel(Line):
    """What an OpenTelemetry SDK handed over."""

    tag: Literal["otel"]
    parent: NotRequired[int]
    signal: Literal["metrics", "traces", "logs"]
    scope: Annotated[Json, "its InstrumentationScope"]
    schema_url: NotRequired[str]
    record: Annotated[Json, "a metric, a span or a log record, as OTLP JSON"]


class Gap(Line):
    """So many events before this one could not be written."""

    tag: Literal["gap"]
    dropped: int
    why: str


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
}
"""Each tag and its class."""
TAGS = BY_TAG.keys()
"""A set, in the order of the table."""
