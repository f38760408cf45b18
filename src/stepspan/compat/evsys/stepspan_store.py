"""The `stepspan` store: a run behind the LogStore contract, so that one YAML line sends an evsys run to OpenTelemetry.

log_store: {kind: stepspan, params: {endpoint: "http://localhost:4318"}}
"""

from __future__ import annotations

from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from stepspan import config
from stepspan.compat.evsys.registry import register_log_store
from stepspan.recording.log_store import RunLogStore
from stepspan.start import start_run

OBJECTS = {"processors", "exporters"}
"""Arguments whose types include a typing.Protocol, which pydantic cannot check."""
_ARGUMENTS: dict[str, Any] = {
    name: (list[Any] | None if name in OBJECTS else kind, None)
    for name, kind in get_type_hints(start_run, localns=vars(config)).items()
    if name != "return"
}


@register_log_store("stepspan")
class StepspanLogStore(RunLogStore):
    """A log store that is a run: the constructor starts it, and `close` ends it. evsys has no such store.

    Args:
        arguments: The arguments of `stepspan.start_run`.

    Raises:
        ConfigError: An argument or variable is wrong.

    """

    Config: type[BaseModel] = create_model(
        "Config",
        __config__=ConfigDict(extra="forbid", coerce_numbers_to_str=True),  # `job_id: 4711` is an int in YAML
        **_ARGUMENTS,
    )
    """The parameters of the `stepspan` store in YAML: the arguments of `stepspan.start_run`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(start_run(**arguments)._hold())

    def close(self) -> None:
        """End the run as completed. What is logged later is counted by the run, which warns once."""
        self.run.close()
