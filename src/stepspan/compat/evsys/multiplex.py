"""The `multiplex` store: one call, several stores, none of which takes the others down."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from stepspan.compat.evsys.contract import LogStore
from stepspan.compat.evsys.registry import StoreConfig, StoreSpec, make_log_store, register_log_store

log = logging.getLogger("stepspan")


class MultiplexLogStoreConfig(StoreConfig):
    """The stores, each as `{kind, params}`."""

    children: list[StoreSpec] = Field(default_factory=list)


@register_log_store("multiplex")
class MultiplexLogStore:
    """Passes every call on to each child, in order.

    What a child raises is counted in `failures` (kind and place in the list -> calls) and logged once per child. The
    constructor raises what a child's constructor raises, with the children before it closed again.
    """

    name: ClassVar[str] = "multiplex"
    Config: ClassVar[type] = MultiplexLogStoreConfig

    def __init__(self, *, children: Sequence[Mapping[str, Any]] = ()) -> None:
        self.failures: Counter[str] = Counter()
        self._children: dict[str, LogStore] = {}
        try:
            for place, spec in enumerate(children):
                child = make_log_store(spec)
                self._children[f"{spec['kind']}[{place}]"] = child
        except BaseException:
            self.close()
            raise

    def log_scalar(self, key: str, value: float, step: int) -> None:
        """To each child."""
        self._each("log_scalar", key, value, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, split: str = "train") -> None:
        """To each child."""
        self._each("log_metrics", metrics, step, split=split)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """To each child."""
        self._each("log_hyperparams", params)

    def log_artifact(self, name: str, path: str, *, kind: str = "file") -> None:
        """To each child."""
        self._each("log_artifact", name, path, kind=kind)

    def close(self) -> None:
        """Close each child, whatever the others do."""
        self._each("close")

    def _each(self, method: str, *arguments: Any, **named: Any) -> None:
        for child, store in self._children.items():
            try:
                getattr(store, method)(*arguments, **named)
            except Exception as error:  # a user's store may raise anything
                self.failures[child] += 1
                if self.failures[child] == 1:
                    log.warning("log store %s: %s failed: %r (told once; `failures` counts)", child, method, error)
