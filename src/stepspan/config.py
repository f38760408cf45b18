"""Settings: arguments over `STEPSPAN_*` variables over a YAML file; STEPSPAN_DISABLED over all. Each default is here.

Who a process is (job, rank, attempt) is `stepspan.identity`'s; where OTLP goes by the standard variables is
`stepspan.otlp.endpoint`'s. A file is named by `config=` or STEPSPAN_CONFIG; a key that nobody knows is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stepspan.environment import PREFIX, switched_off
from stepspan.errors import ConfigError
from stepspan.journal.disk import Limits


def _words(value: Any) -> Any:
    """`a, b` in a variable is a list."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _names(value: Any) -> Any:
    """`none` in a variable is an empty list."""
    words = _words(value)
    return [] if words == ["none"] else words


def _mapping(value: Any) -> Any:
    """`{"team": "vision"}` or `team=vision,tier=a` in a variable is a mapping."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _json(value)
    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
    if not all(key.strip() and equals for key, equals, _ in pairs):
        raise ValueError("give key=value,key=value or a JSON object")
    return {key.strip(): item.strip() for key, _, item in pairs}


def _json(value: Any) -> Any:
    """JSON in a variable is a list."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"give JSON: {error}") from None


Words = Annotated[list[str], BeforeValidator(_words)]
Table = Annotated[dict[str, Any], BeforeValidator(_mapping)]
Samplers = Annotated[list[Literal["host", "process", "gpu", "torch"]], BeforeValidator(_names)]
Listing = Annotated[list[dict[str, Any]], BeforeValidator(_json)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class OtlpSettings(_Strict):
    """Where one OTLP exporter sends, beyond what the OTEL_EXPORTER_OTLP_* variables say."""

    endpoint: str | None = None
    protocol: Literal["http/protobuf", "grpc", "http/json"] | None = None
    headers: Table | None = None
    compression: Literal["none", "gzip"] | None = None
    timeout: float | None = Field(default=None, gt=0)
    processors: Listing = []


class Settings(_Strict):
    """Everything that can be set, with its default."""

    enabled: bool = True
    name: str | None = None
    group: str | None = None
    tags: Words = []
    service_name: str | None = None
    resource: Table = {}
    directory: Annotated[Path, AfterValidator(Path.expanduser)] = Path("stepspan-runs")
    endpoint: str | None = None
    protocol: Literal["http/protobuf", "grpc", "http/json"] | None = None
    delivery: Literal["process", "thread", "off"] = "process"
    durability: Literal["process", "disk"] = "process"
    sync_every: float = Field(default=1.0, ge=0)
    """Seconds between fdatasync calls with durability `disk`; 0: after each event."""
    segment_bytes: int = Field(default=64 << 20, ge=4096)
    session_bytes: int = Field(default=10 << 30, ge=65536)
    free_bytes: int = Field(default=1 << 30, ge=0)
    free_ratio: float = Field(default=0.02, ge=0, lt=1)
    group_readable: bool = False
    redact: bool = True
    redact_names: Words = []
    health: bool = True
    """Deliverers tell their OTLP destinations how the delivery goes: `stepspan.deliver.health`."""
    propagate: bool | None = None
    """Make steps the parents of the user's own spans; None: unless a global TracerProvider is installed."""
    stall_after: float = Field(default=600.0, ge=0)
    """Seconds without an event of training after which it counts as stalled; 0: no watch."""
    samplers: Samplers = ["host", "process", "gpu", "torch"]
    """What is sampled beside training; "none" in a variable, or an empty list: nothing."""
    sample_interval: float = Field(default=10.0, ge=0.1)
    """Seconds between two samples."""
    processors: Listing = []
    """Shared processors in order, each `{name: {argument: value}}`: attributes, rename, redact."""
    exporters: Annotated[list[OtlpSettings], BeforeValidator(_json)] = []
    """Further OTLP destinations, each with processors of its own: drop, sample_steps, attributes, rename."""

    def limits(self) -> Limits:
        """What the journal may take."""
        return Limits(
            segment_bytes=self.segment_bytes,
            session_bytes=self.session_bytes,
            free_bytes=self.free_bytes,
            free_ratio=self.free_ratio,
            sync_every=self.sync_every if self.durability == "disk" else None,
            group_readable=self.group_readable,
        )


def load(arguments: Mapping[str, Any], env: Mapping[str, str], *, config: str | Path | None = None) -> Settings:
    """The settings in force. None among the arguments, and a blank variable, mean not given. Raises `ConfigError`."""
    path = config or env.get(f"{PREFIX}CONFIG", "").strip()
    values = _values_of_file(path) if path else {}
    origin = {field: f"{field} in {path}" for field in values}
    for field in Settings.model_fields:
        variable = f"{PREFIX}{field.upper()}"
        text = env.get(variable, "").strip()
        if text:
            values[field], origin[field] = text, variable
    for field, value in arguments.items():
        if value is not None:
            values[field], origin[field] = value, field
    if switched_off(env):
        values["enabled"] = False
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, origin) from None


def _refusal(error: ValidationError, origin: Mapping[str, str]) -> ConfigError:
    """What is wrong first, by the name that it was given by: an argument, a variable, or an entry of the file."""
    found = error.errors()[0]
    first, *inside = map(str, found["loc"])
    where = ".".join((origin[first], *inside))
    value = found["input"]
    if first == "exporters" and not {"endpoint", "protocol", "compression", "timeout"}.intersection(inside):
        value = f"<{type(value).__name__}>"  # headers are credentials
    fix = found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        known = OtlpSettings.model_fields if inside else Settings.model_fields
        fix = f"unknown; known are {', '.join(known)}"
    return ConfigError(where, value, fix)


def _values_of_file(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, TypeError, ValueError) as error:  # no file, no path, no UTF-8
        raise ConfigError("config", path, f"the file cannot be read: {error}") from None
    try:
        import yaml
    except ImportError:
        raise ConfigError("config", str(path), "reading YAML needs `pip install 'stepspan[yaml]'`") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("config", str(path), f"not YAML: {error}") from None
    if content is None:
        return {}
    if not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise ConfigError("config", str(path), "the file must hold `key: value` lines")
    return content
