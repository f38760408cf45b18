"""Settings: arguments over `STEPSPAN_*` variables over a YAML file; STEPSPAN_DISABLED over all. Each default is here.

Quotes and space around a variable's value are none of it: `docker --env-file` keeps them.

Which process this is (job, rank, attempt) is for `stepspan.identity`, and where OTLP goes by the standard variables for
`stepspan.otlp.endpoint`. A file is named by `config=` or STEPSPAN_CONFIG; an unknown key is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stepspan.conversion import json_value
from stepspan.environment import PREFIX, switched_off, unquoted
from stepspan.errors import ConfigError
from stepspan.journal.disk import Limits
from stepspan.otlp.endpoint import Compression, HistogramAggregation, Protocol, Temporality, protocol_named
from stepspan.values import NONFINITE


def _split_words(value: Any) -> Any:
    """`a, b` in a variable is a list."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _split_names(value: Any) -> Any:
    """`none` in a variable is an empty list."""
    words = _split_words(value)
    return [] if words == ["none"] else words


def _split_pairs(value: Any) -> Any:
    """`{"team": "vision"}` or `team=vision,tier=a` in a variable is a mapping."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _parse_json(value)
    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
    if not all(key.strip() and equals for key, equals, _ in pairs):
        raise ValueError("give key=value,key=value or a JSON object")
    return {key.strip(): item.strip() for key, _, item in pairs}


def _with_home(path: Path) -> Path:
    """A path without its `~`, where this user has a home: a container's may have none."""
    return Path(os.path.expanduser(path))


def _parse_json(value: Any) -> Any:
    """JSON in a variable is a list."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"give JSON: {error}") from None


def _name_classes(value: Any) -> Any:
    """A class stands for its name."""
    words = _split_words([value] if isinstance(value, type) else value)
    if not isinstance(words, (list, tuple, set, frozenset)):
        return words
    return [f"{word.__module__}.{word.__qualname__}" if isinstance(word, type) else word for word in words]


def _destination_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
        raise ValueError("give up to 64 letters, digits, '-' and '_'")
    return value


def _protocol_name(value: Any) -> Any:
    """`HTTP/JSON` and `http` are spellings of protocols."""
    return protocol_named(value) or value if isinstance(value, str) else value


RANK_RANGE = re.compile(r"(?:rank[ _-]?)?(\d{1,9})(?:-(\d{1,9}))?", re.IGNORECASE)


def _rank_ranges(value: Any) -> str:
    """`rank0`, `0,8,16-23`, or a list of numbers: "all", or ranges as `sends` reads them."""
    items = value.split(",") if isinstance(value, str) else value
    if isinstance(items, (bool, int)) or not hasattr(items, "__iter__"):
        items = [items]
    words = [word for item in items if (word := "" if isinstance(item, bool) else str(item).strip())]
    if [word.lower() for word in words] == ["all"]:
        return ALL_RANKS
    ranges = []
    for word in words:
        match = RANK_RANGE.fullmatch(word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"give all, rank0, or ranks as in 0,8,16-23; {word:.40} is none")
        ranges.append((first, last))
    if not ranges:
        raise ValueError(
            "give all, rank0, or ranks as in 0,8,16-23; to send none at all set OTEL_<SIGNAL>_EXPORTER=none"
        )
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in sorted(set(ranges)))


def sends(ranks: str, rank: int) -> bool:
    """Whether a rank is among those that a setting `<signal>_ranks` names."""
    return ranks == ALL_RANKS or any(int(first) <= rank <= int(last or first) for first, last in _ranges(ranks))


def smallest(ranks: str) -> int:
    """The smallest rank that such a setting names."""
    return 0 if ranks == ALL_RANKS else min(int(first) for first, _ in _ranges(ranks))


def _ranges(ranks: str) -> list[tuple[str, str]]:
    return [(first, last) for first, _, last in (part.partition("-") for part in ranks.split(","))]


ALL_RANKS = "all"
Ranks = Annotated[str, BeforeValidator(_rank_ranges)]
Words = Annotated[list[str], BeforeValidator(_split_words)]
ClassNames = Annotated[list[str], BeforeValidator(_name_classes)]
Table = Annotated[dict[str, Any], BeforeValidator(_split_pairs)]
AnyProtocol = Annotated[Protocol, BeforeValidator(_protocol_name)]
DeliveryMode: TypeAlias = Literal["process", "thread", "off"]
Durability: TypeAlias = Literal["process", "disk"]
SamplerName: TypeAlias = Literal["host", "process", "gpu", "torch"]
Samplers = Annotated[list[SamplerName], BeforeValidator(_split_names)]
DestinationName = Annotated[str, AfterValidator(_destination_name)]
Entries = Annotated[list[dict[str, Any]], BeforeValidator(_parse_json)]


def _plain_values(table: dict[str, Any]) -> dict[str, Any]:
    """Values of numpy, paths and enum members are what they stand for; others are left as they are."""
    return {key: _plain_value(value) for key, value in table.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    if not (isinstance(value, (Enum, Decimal, PurePath)) or hasattr(type(value), "tolist")):
        return value
    converted = json_value(value)
    return value if isinstance(converted, str) and converted in NONFINITE else converted


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class OtlpSettings(_Strict):
    """Where one OTLP exporter sends, beyond what the OTEL_EXPORTER_OTLP_* variables say."""

    endpoint: str | None = None
    """Base URL; None: what the variables say."""
    protocol: AnyProtocol | None = None
    """None: what the variables say."""
    headers: Table | None = None
    """Sent with each request; credentials, mostly."""
    headers_file: Path | None = None
    """A file with further headers, read again when it changes; None: STEPSPAN_HEADERS_FILE."""
    destination: DestinationName | None = None
    """A name for the receiver; None: its address stands for it."""
    compression: Compression | None = None
    """None: what the variables say."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for a request; None: what the variables say."""
    temporality: Temporality | None = None
    """What sums and histograms are to be: cumulative, delta or lowmemory; None: what the variables say."""
    histogram_aggregation: HistogramAggregation | None = None
    """What stepspan's own histograms are to be; None: what the variables say."""
    processors: Entries = []
    """Of this destination alone, after the journal."""


class Settings(_Strict):
    """Everything that can be set, with its default.

    Each is an argument of `start_run`, an entry of the YAML file, and a variable `STEPSPAN_` with its name in capitals.
    """

    enabled: bool = True
    """False: a run that records nothing."""
    name: str | None = None
    """A name for people; None: the job id."""
    group: str | None = None
    """What the job belongs to: a sweep, an experiment. None: the scheduler's array job, if there is one."""
    tags: Words = []
    """Words to find the run by."""
    service_name: str | None = None
    """`service.name` of the Resource; None: OTEL_SERVICE_NAME, else "training"."""
    resource: Annotated[Table, AfterValidator(_plain_values)] = {}
    """Further attributes of the OpenTelemetry Resource."""
    directory: Annotated[Path, AfterValidator(_with_home)] = Path("stepspan-runs")
    """The directory below which each run keeps its journal; made where it is missing."""
    endpoint: str | None = None
    """OTLP base URL; None: the OTEL_EXPORTER_OTLP_* variables, and without those nothing is sent."""
    protocol: AnyProtocol | None = None
    """Of the endpoint; None: what the variables say, else http/protobuf."""
    destination: DestinationName | None = None
    """A name for the receiver that the endpoint leads to: delivery goes on where it was, whatever the address and the
    credentials are. None: the address stands for it."""
    headers_file: Path | None = None
    """A file with further headers of each request, such as a token: `key=value` lines. Read again when it changes."""
    delivery: DeliveryMode = "process"
    """What sends the journal: a process for each host, threads of the training process, or nothing."""
    send_interval: float = Field(default=1.0, ge=0, le=60)
    """Seconds between two requests of a deliverer process for what its host's ranks have written; 0: one for each rank,
    as soon as something is written. The first line after a pause, errors, `flush()` and the end never wait for it."""
    close_timeout: float = Field(default=5.0, ge=0, le=3600)
    """Seconds that the end of a run waits for its delivery at most, and only while the receiver answers; 0: not at all.
    Then it says what waits, and what sends it."""
    metrics_ranks: Ranks = ALL_RANKS
    """Whose metrics are sent: `all`, `rank0`, or ranks as in `0,8,16-23`. Journals hold all; what is left out counts as
    filtered, and `stepspan sync --all-ranks` sends it."""
    traces_ranks: Ranks = ALL_RANKS
    """Whose traces are sent, likewise. Rank 0's spans of steps go with any of them: they are the traces' roots."""
    logs_ranks: Ranks = ALL_RANKS
    """Whose logs are sent, likewise."""
    durability: Durability = "process"
    """What an event survives once its call has returned: the process, or with fdatasync the machine."""
    sync_every: float = Field(default=1.0, ge=0)
    """Seconds between fdatasync calls with durability `disk`; 0: after each event."""
    segment_bytes: int = Field(default=64 << 20, ge=4096)
    """Size at which a journal's segment is complete and the next one begins."""
    session_bytes: int = Field(default=10 << 30, ge=65536)
    """Size of a session beyond which its oldest segments are removed."""
    free_bytes: int | None = Field(default=None, ge=0)
    """A journal stops growing while less than this is free on its disk; its first 16 MiB are always written. None:
    1 GiB, or a tenth of a smaller disk."""
    free_ratio: float | None = Field(default=None, ge=0, lt=1)
    """The same, as a share of the disk, however large that is. None: 2%, and no more than 10 GiB."""
    group_readable: bool = False
    """Whether the user's group may read journals."""
    redact: bool = True
    """Whether secrets are removed from events before the journal."""
    redact_names: Words = []
    """Further names whose values are secrets."""
    health: bool = True
    """Whether deliverers send metrics about the delivery to their destinations (`stepspan.deliver.health`)."""
    propagate: bool | None = None
    """Make steps the parents of the user's own spans; None: unless a global TracerProvider is installed."""
    interruptions: ClassNames = []
    """Names of further exceptions that end a run as "interrupted" and are no failure: "Class" or "module.Class"."""
    stall_after: float = Field(default=600.0, ge=0)
    """Seconds without an event of training after which it counts as stalled; 0: no watch."""
    samplers: Samplers = ["host", "process", "gpu", "torch"]
    """What is sampled beside training; "none" in a variable, or an empty list: nothing."""
    sample_interval: float = Field(default=10.0, ge=0.1)
    """Seconds between two samples."""
    processors: Entries = []
    """Shared processors in order, each `{name: {argument: value}}`: attributes, rename, redact."""
    exporters: Annotated[list[OtlpSettings], BeforeValidator(_parse_json)] = []
    """Further OTLP destinations, each with processors of its own: drop, sample_steps, attributes, rename."""

    def ranks(self) -> dict[str, str]:
        """Signal -> whose it is that is sent: what `sends` reads."""
        return {"metrics": self.metrics_ranks, "traces": self.traces_ranks, "logs": self.logs_ranks}

    def limits(self) -> Limits:
        """How much of the disk a session of the journal may take."""
        return Limits(
            segment_bytes=self.segment_bytes,
            session_bytes=self.session_bytes,
            free_bytes=self.free_bytes,
            free_ratio=self.free_ratio,
            sync_every=self.sync_every if self.durability == "disk" else None,
            group_readable=self.group_readable,
        )


def load(
    arguments: Mapping[str, Any],
    env: Mapping[str, str],
    *,
    config: str | Path | None = None,
    warn: Callable[[str], object] | None = None,
) -> Settings:
    """The settings in force.

    Args:
        arguments: What the program gave; None means not given.
        env: The environment; a blank variable means not given.
        config: A YAML file; None: the one that STEPSPAN_CONFIG names, if any.
        warn: Takes why the file that STEPSPAN_CONFIG names cannot be read on this machine, which then counts for
            nothing. None: that is an error.

    Raises:
        ConfigError: A setting is wrong or unknown; it names the argument, the variable, or the entry of the file.

    """
    named = unquoted(env.get(f"{PREFIX}CONFIG", ""))
    values: dict[str, Any] = {}
    path = config or named
    if path:
        try:
            values = _parse_file(path, *_read_file(path, "config" if config else f"{PREFIX}CONFIG"))
        except _Unreadable as error:
            if config or warn is None:
                raise
            warn(f"{error}; ignored")
    origin = {field: f"{field} in {path}" for field in values}
    for field in Settings.model_fields:
        variable = f"{PREFIX}{field.upper()}"
        value = unquoted(env.get(variable, ""))
        if value:
            values[field], origin[field] = value, variable
    for field, argument in arguments.items():
        if argument is not None:
            values[field], origin[field] = _scalar(argument), field
    if switched_off(env):
        values["enabled"] = False
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, origin) from None


def _scalar(argument: Any) -> Any:
    """What a program computed with numpy is a plain number."""
    return argument.item() if getattr(argument, "shape", None) == () else argument


def _config_error(error: ValidationError, origin: Mapping[str, str]) -> ConfigError:
    """The first fault, by the name that the value was given by: an argument, a variable, or an entry of the file."""
    fault = error.errors()[0]
    first, *inside = map(str, fault["loc"])
    field = ".".join((origin[first], *inside))
    value = fault["input"]
    if first == "exporters" and not {"endpoint", "protocol", "compression", "timeout"}.intersection(inside):
        value = f"<{type(value).__name__}>"  # headers are credentials
    fix = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = OtlpSettings.model_fields if inside else Settings.model_fields
        fix = f"unknown; known are {', '.join(known)}"
    return ConfigError(field, value, fix)


class _Unreadable(ConfigError):
    """A file cannot be read on this machine; on another one it might be."""


def _read_file(path: str | Path, field: str) -> tuple[str, Any]:
    """What a file holds, and the module that reads it."""
    try:
        text = _with_home(Path(path)).read_text(encoding="utf-8")
    except (OSError, TypeError, ValueError) as error:  # no file, not a path, not UTF-8
        raise _Unreadable(field, path, f"the file cannot be read: {error}") from None
    try:
        import yaml
    except ImportError:
        raise _Unreadable(field, str(path), "reading YAML needs `pip install 'stepspan[yaml]'`") from None
    return text, yaml


def _parse_file(path: str | Path, text: str, yaml: Any) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("config", str(path), f"not YAML: {error}") from None
    if content is None:
        return {}
    if not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise ConfigError("config", str(path), "the file must hold `key: value` lines")
    return content
