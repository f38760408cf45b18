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

Store = TypeVar("Store", bound=type)
_stores: dict[str, type] = {}
_loaded = False
_lock = threading.RLock()


class StoreConfig(BaseModel):
    """A base for a store's own `Config`: unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid")


class StoreSpec(StoreConfig):
    """A store in YAML, such as `{kind: jsonl, params: {log_dir: ./logs}}`."""

    kind: str
    params: dict[str, Any] = {}


def register_log_store(kind: str | None = None) -> Callable[[Store], Store]:
    """A class decorator that makes a class the log store of a kind, as evsys's does.

    Args:
        kind: What YAML calls the store; the class's own attribute `name` where None. The class gets it as its `name`.
            A pydantic model in the class's attribute `Config` checks the store's parameters.

    Returns:
        The decorator, which returns the class.

    Raises:
        ValueError: Another class has the kind, or there is no kind.

    """

    def register(store: Store) -> Store:
        name = kind or getattr(store, "name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{store.__qualname__}: give @register_log_store a kind, or the class a name")
        with _lock:
            known = _stores.setdefault(name, store)
        if known is not store:
            raise ValueError(f"log store {name!r} is {_path_of(known)} already; {_path_of(store)} is not registered")
        store.name = name  # type: ignore[attr-defined]
        return store

    return register


def get_log_store(kind: str) -> type:
    """The class of a kind of log store.

    Args:
        kind: As a spec names it: "stepspan", "jsonl", …

    Raises:
        KeyError: The kind is not known; the message lists those that are.

    """
    load_entry_points()
    try:
        return _stores[kind]
    except KeyError:
        raise KeyError(f"no log store {kind!r}; known are {', '.join(sorted(_stores))}") from None


def list_log_stores() -> list[str]:
    """The known kinds of log stores, sorted."""
    load_entry_points()
    return sorted(_stores)


def make_log_store(spec: Mapping[str, Any]) -> LogStore:
    """Make a log store from its description, an evsys configuration's `log_store`.

    Args:
        spec: `{"kind": …, "params": {…}}`; `params` may be left out.

    Returns:
        The store.

    Raises:
        KeyError: The kind is not known.
        ConfigError: `spec` has another form, or the store's `Config` refuses a parameter.
        Exception: What the store's constructor raises.

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
    """Load what installed packages publish, the first time."""
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
            raise TypeError(f"{point.value} is not a class, and did not register one: write it as module:Class")
    except (Exception, SystemExit) as error:  # an installed package may do anything
        log.warning("stepspan: log store %s of %s cannot be used: %r", point.name, point.group, error)


def _path_of(store: type) -> str:
    return f"{store.__module__}.{store.__qualname__}"


def _checked(model: type[BaseModel], values: Any, where: str) -> Any:
    """The model of the values. Raises ConfigError that names the first wrong one below `where`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join((where, *map(str, found["loc"])))
        known = f"; known are {', '.join(model.model_fields)}" if found["type"] == "extra_forbidden" else ""
        raise ConfigError(field, found["input"], f"{found['msg'].removeprefix('Value error, ')}{known}") from None
