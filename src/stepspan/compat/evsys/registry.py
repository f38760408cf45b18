"""Kinds of log stores by name: built-in, registered by a decorator, or published by an installed package.

A package publishes a store as an entry point, `http = "my_package.stores:HttpLogStore"`, in the group
`stepspan.log_stores`; those published for evsys load as well. Entry points are loaded at the first look into the
registry. One that is broken is logged, and costs nothing but itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stepspan.compat.evsys.contract import LogStore
from stepspan.errors import ConfigError

log = logging.getLogger("stepspan")

GROUPS = ("stepspan.log_stores", "evsys_sdk.log_stores")

C = TypeVar("C", bound=type)
_stores: dict[str, type] = {}
_loaded = False
_lock = threading.RLock()


class StoreConfig(BaseModel):
    """What a store's own `Config` may derive from: unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid")


class StoreSpec(StoreConfig):
    """A store in YAML: `{kind: jsonl, params: {log_dir: ./logs}}`."""

    kind: str
    params: dict[str, Any] = {}


def register_log_store(kind: str | None = None) -> Callable[[C], C]:
    """A class decorator: the class is the store of that kind, its own `name` where none is given.

    The class may carry a pydantic model `Config` of its parameters. Raises ValueError where another class has the kind.
    """

    def register(store: C) -> C:
        name = kind or getattr(store, "name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{store.__qualname__}: give @register_log_store a kind, or the class a name")
        with _lock:
            known = _stores.setdefault(name, store)
        if known is not store:
            place = f"{known.__module__}.{known.__qualname__}"
            raise ValueError(f"log store {name!r} is {place} already; {store.__module__}.{store.__qualname__} is not")
        store.name = name  # type: ignore[attr-defined]
        return store

    return register


def get_log_store(kind: str) -> type:
    """The class of a kind. Raises KeyError listing the known ones."""
    load_entry_points()
    try:
        return _stores[kind]
    except KeyError:
        raise KeyError(f"no log store {kind!r}; known are {', '.join(sorted(_stores))}") from None


def list_log_stores() -> list[str]:
    """The known kinds, sorted."""
    load_entry_points()
    return sorted(_stores)


def make_log_store(spec: Mapping[str, Any]) -> LogStore:
    """The store that `{"kind": …, "params": {…}}` describes.

    Raises KeyError for an unknown kind, `ConfigError` for a parameter that the store's `Config` refuses, and what the
    store's constructor raises.
    """
    checked: StoreSpec = _checked(StoreSpec, spec, "log_store")
    store = get_log_store(checked.kind)
    params = checked.params
    config = getattr(store, "Config", None)
    if isinstance(config, type) and issubclass(config, BaseModel):
        params = _checked(config, params, f"log_store.{checked.kind}.params").model_dump(exclude_unset=True)
    made: LogStore = store(**params)
    return made


def load_entry_points() -> None:
    """Load what installed packages publish, once."""
    global _loaded
    with _lock:
        if _loaded:
            return
        _loaded = True
        for group in GROUPS:
            for point in entry_points(group=group):
                _load(point)


def _load(point: EntryPoint) -> None:
    before = len(_stores)
    try:
        found = point.load()
        if isinstance(found, type):
            register_log_store(getattr(found, "name", None) or point.name)(found)
        elif len(_stores) == before:
            raise TypeError(f"{point.value} is no class, and registered none: write it as module:Class")
    except (Exception, SystemExit) as error:  # somebody else's package may do anything
        log.warning("log store %s of %s cannot be used: %r", point.name, point.group, error)


def _checked(model: type[BaseModel], values: Any, where: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join((where, *map(str, found["loc"])))
        known = f"; known are {', '.join(model.model_fields)}" if found["type"] == "extra_forbidden" else ""
        raise ConfigError(place, found["input"], f"{found['msg'].removeprefix('Value error, ')}{known}") from None
