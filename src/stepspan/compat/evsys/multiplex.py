"""The `multiplex` store: one call, several stores, none of which takes the others down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from stepspan.compat.evsys.contract import LogStore
from stepspan.compat.evsys.registry import StoreConfig, StoreSpec, make_log_store, register_log_store
from stepspan.errors import short_repr
from stepspan.recording.warnings import WarningSink


@register_log_store("multiplex")
class MultiplexLogStore:
    """Passes every call on to several stores, its children, in order.

    Unlike evsys's, what a child raises does not reach the training loop and does not keep the call from the other
    children: it is counted in `failures` (`kind[position]` -> failed calls) and logged once for each child.

    Args:
        children: The stores, as `make_log_store` takes them.

    Raises:
        Exception: What a child's constructor raises; the children before it are closed again.

    """

    name: ClassVar[str] = "multiplex"

    class Config(StoreConfig):
        """The parameters of the `multiplex` store in YAML: the stores, each as `{kind, params}`."""

        children: list[StoreSpec] = Field(default_factory=list)

    def __init__(self, *, children: Sequence[Mapping[str, Any]] = ()) -> None:
        self._warnings = WarningSink(audible=True, counted_in="`failures`")
        self.failures: Counter[str] = self._warnings.counts
        self._children: dict[str, LogStore] = {}
        try:
            for position, spec in enumerate(children):
                self._children[f"{spec['kind']}[{position}]"] = make_log_store(spec)
        except BaseException:
            self.close()
            raise

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """Call `log_scalar` of each child."""
        self._call_each("log_scalar", key, value, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """Call `log_metrics` of each child."""
        self._call_each("log_metrics", metrics, step, split=split)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Call `log_hyperparams` of each child."""
        self._call_each("log_hyperparams", params)

    def log_artifact(self, name: str, path: str, *, kind: str = "file") -> None:
        """Call `log_artifact` of each child."""
        self._call_each("log_artifact", name, path, kind=kind)

    def close(self) -> None:
        """Close each child, whatever the others do."""
        self._call_each("close")

    def _call_each(self, method: str, *arguments: Any, **named: Any) -> None:
        for child, store in self._children.items():
            try:
                getattr(store, method)(*arguments, **named)
            except Exception as error:  # a user's store may raise anything
                message = f"log store {child}: {method} failed: {short_repr(error)}"
                self._warnings.warn_once(child, message, key=type(error).__name__)
