"""Any object as JSON: what users log as hyperparameters and attributes.

What has a form in JSON keeps it: mappings, sequences and sets, objects with fields (dataclasses, named tuples, models
of pydantic, attrs and msgspec, namespaces, objects with slots), numbers and small arrays of them, enum members by their
values. Everything else is text: paths and times as they are written, classes and functions by their names. No library
is imported for that.

Objects are anybody's: what raises as it is asked for costs itself alone, iterators are never run, values on a device
never waited for, and what is too much, too deep or contains itself is cut.
"""

from __future__ import annotations

import math
import os
from collections import UserString
from collections.abc import Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import date, time
from decimal import Decimal
from enum import Enum
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any

from stepspan import objects
from stepspan.values import error_text, json_number, str_of, utf8

MAX_NESTING = 32
"""Levels of nesting that are kept."""
MAX_ENTRIES = 10_000
"""Of mappings and lists within one event, all in all: what users log at once, and what redaction looks at."""
MAX_ENTRIES_OF_ANY = 1_000_000
"""Where nothing else bounds what is converted: only what never ends is cut."""
MAX_OBJECT_ENTRIES = 100
"""Of an object that lies in what was logged and says nothing about itself; one that holds more is named only."""
MAX_ARRAY_VALUES = 1000
"""An array of more becomes its shape."""
MAX_BYTES = 64 << 10
MAX_LOST = 100
"""Values of one conversion whose loss is told by their names."""
MAX_PREVIEW_ENTRIES = 20
MAX_PREVIEW_CHARS = 80
MAX_TRIES = 3

SIMPLE = frozenset({str, int, float, bool, type(None)})
SEQUENCES = (Sequence, AbstractSet, ValuesView)
TEXTS = (str, bytes, bytearray, memoryview)


class Conversion:
    """Turns values into JSON, and keeps account of what was lost.

    Args:
        max_entries: Entries of mappings and lists that are kept, all in all.

    """

    def __init__(self, max_entries: int) -> None:
        self.lost: dict[str, str] = {}
        """Where each value was that is lost, and why."""
        self.cut = 0
        """How many entries were left out because there were too many."""
        self._left = max_entries

    def fields(self, params: Any) -> dict[str, Any]:
        """The named values of a mapping, or of any object, class or module that has some.

        Raises:
            Exception: It has none; whatever a user's mapping raises.

        """
        kind = type(params)
        if issubclass(kind, Mapping):
            return self._mapping(params, kind, "", (id(params),))
        converted = None if issubclass(kind, (*TEXTS, int, float, os.PathLike)) else self.value(params)
        if type(converted) is not dict:
            names = [] if isinstance(converted, list) or converted is None else list(objects.attribute_names(params))
            if not names:
                raise TypeError(f"{preview(params)} has no named values: give a mapping, a dataclass or a namespace")
            self.lost.clear()
            converted = self._attributes(params, names, "", (id(params),))
        return converted

    def value(self, value: Any, path: str = "", parents: tuple[int, ...] = ()) -> Any:
        """Any object as JSON.

        Args:
            value: May be anything.
            path: Where it lies, for `lost`.
            parents: The ids of the containers that it lies in.

        Returns:
            What `orjson` can write.

        """
        kind = type(value)
        if kind is str:
            return value if value.isascii() else utf8(value).decode()
        if value is None or kind is bool:
            return value
        if kind is float:
            return json_number(value)
        if kind is int and -(1 << 63) <= value < 1 << 63:
            return value
        try:
            return self._object(value, kind, path, parents)
        except Exception as error:  # whatever an object raises as it is looked at
            return self._text(value, path, error)

    def _object(self, value: Any, kind: type[Any], path: str, parents: tuple[int, ...]) -> Any:
        if kind is int or issubclass(kind, complex):
            return self._text(value, path)
        if issubclass(kind, Enum):
            inner = value.value
            return self.value(inner, path, parents) if isinstance(inner, (str, int, float)) else str(value.name)
        for scalar, simpler in SCALARS:
            if issubclass(kind, scalar):
                return self.value(simpler(value), path, parents)
        if isinstance(value, (type, ModuleType, *objects.FUNCTIONS)):
            return self.value(objects.qualified_name(value))
        if len(parents) >= MAX_NESTING:
            return self._lose(path, f"nested more than {MAX_NESTING} deep")
        if id(value) in parents:
            return self._lose(path, "contains itself")
        parents = (*parents, id(value))
        if issubclass(kind, Mapping):
            return self._mapping(value, kind, path, parents)
        names = objects.declared_fields(kind)  # type: ignore[arg-type] # a class is hashable
        if names is not None:
            return self._attributes(value, [*names, *objects.extra_names(value)], path, parents)
        if issubclass(kind, SEQUENCES) and kind is not range:
            return self._sequence(value, kind, path, parents)
        shape = attribute_of(value, "shape")
        if isinstance(shape, tuple):
            return self._array(value, kind, shape, path, parents)
        return self._other_object(value, kind, path, parents)

    def _other_object(self, value: Any, kind: type[Any], path: str, parents: tuple[int, ...]) -> Any:
        """An object that is known by none of the forms that classes declare."""
        if issubclass(kind, partial):
            call = {"function": value.func, "args": value.args, "keywords": value.keywords}
            return self._mapping({name: part for name, part in call.items() if part}, dict, path, parents)
        if objects.is_namespace(kind):
            return self._attributes(value, list(objects.attribute_names(value)), path, parents)
        if callable(attribute_of(kind, "keys")) and callable(attribute_of(kind, "__getitem__")):
            return self._mapping(value, kind, path, parents)
        if not objects.has_own_text(kind):
            return self._plain_object(value, kind, path, parents)
        if callable(attribute_of(kind, "to_dict")):
            fields = value.to_dict()
            if isinstance(fields, dict):
                return self._mapping(fields, type(fields), path, parents)
        return self._text(value, path)

    def _mapping(self, value: Any, kind: type[Any], path: str, parents: tuple[int, ...]) -> dict[str, Any]:
        limit = self._left + 1
        if kind is dict:  # its items are taken at once, whatever other threads do with it
            items = list(islice(value.items(), limit))
        else:
            items = [(key, value) for key in _first_items(value.keys(), limit)]
        converted: dict[str, Any] = {}
        for key, item in items:
            if not self._admit(value, len(converted)):
                break
            name = key if type(key) is str and key.isascii() else self._name(key)
            if type(item) in SIMPLE and name not in converted:
                converted[name] = self.value(item, name)
                continue
            where = f"{path}.{name}" if path else name
            if kind is not dict:
                try:
                    item = value[key]
                except Exception as error:  # OmegaConf's of a value that is missing, or stands for another one
                    self._lose(where, error_text(error))
                    continue
            if name in converted:
                self._lose(where, "two keys are the same as text: the later one's value stays")
            converted[name] = self.value(item, where, parents)
        return converted

    def _name(self, key: Any) -> str:
        """A key as text: of an enum's member its value, as of others."""
        return str(self.value(key)) if issubclass(type(key), (str, Enum)) else str_of(key)

    def _attributes(self, value: Any, names: Sequence[str], path: str, parents: tuple[int, ...]) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for name in names:
            if not self._admit(names, len(converted)):
                break
            where = f"{path}.{name}" if path else name
            try:
                item = getattr(value, name)
            except AttributeError:  # declared, and never set
                continue
            except Exception as error:  # a property's
                self._lose(where, error_text(error))
                continue
            converted[str_of(name)] = self.value(item, where, parents)
        return converted

    def _sequence(self, value: Any, kind: type[Any], path: str, parents: tuple[int, ...]) -> list[Any]:
        converted: list[Any] = []
        if issubclass(kind, (list, tuple)) or not issubclass(kind, Sequence):
            for item in _first_items(value, self._left + 1):
                if not self._admit(value, len(converted)):
                    break
                where = "" if type(item) in SIMPLE else f"{path}[{len(converted)}]"
                converted.append(self.value(item, where, parents))
            if issubclass(kind, (set, frozenset)):
                with suppress(TypeError):  # all numbers or all texts have an order, which is the same in all ranks
                    converted.sort()
            return converted
        for position in range(len(value)):
            if not self._admit(value, position):
                break
            where = f"{path}[{position}]"
            try:
                item = value[position]
            except Exception as error:  # OmegaConf's, as of a mapping
                self._lose(where, error_text(error))
            else:
                converted.append(self.value(item, where, parents))
        return converted

    def _array(self, value: Any, kind: type[Any], shape: tuple[int, ...], path: str, parents: tuple[int, ...]) -> Any:
        dtype = attribute_of(value, "dtype")
        to_list = attribute_of(value, "tolist")
        if not shape and not callable(to_list):  # numpy's dtype
            return self._text(value, path)
        few = math.prod(shape) <= MAX_ARRAY_VALUES and not objects.is_on_another_device(value)
        if callable(to_list) and few:
            letter = attribute_of(dtype, "kind")
            if letter in TIMES:
                return self._text(value, path)
            if letter == "f" and not shape:  # a float32 of 0.1 is 0.1, not 0.10000000149011612
                return json_number(float(str(value)))
            items = to_list()
            return self.value(items, path, parents) if type(items) is not kind else self._text(value, path)
        values = "" if dtype is None else f" of {dtype}"
        return self.value(f"{kind.__name__}{values}, shape {tuple(shape)}")

    def _plain_object(self, value: Any, kind: type[Any], path: str, parents: tuple[int, ...]) -> Any:
        """An object whose text would be its address: its attributes if they are few, else the name of its class."""
        before = self._left, self.cut, dict(self.lost)
        self._left = few = min(self._left, MAX_OBJECT_ENTRIES)
        fields = self._attributes(value, list(objects.attribute_names(value)), path, parents)
        if fields and self.cut == before[1]:
            self._left += before[0] - few
            return fields
        self._left, self.cut, self.lost = before
        return self.value(objects.qualified_name(kind))

    def _admit(self, container: Any, taken: int) -> bool:
        """Whether one more entry may be kept; if not, the rest of the container is cut."""
        if self._left > 0:
            self._left -= 1
            return True
        try:
            self.cut += max(1, len(container) - taken)
        except Exception:  # without a length
            self.cut += 1
        return False

    def _text(self, value: Any, path: str, error: Exception | None = None) -> str:
        try:
            text = str(value)
        except Exception as failure:  # a user's __str__ may do anything
            self._lose(path, f"{type(value).__name__}: {error_text(error or failure)}")
            return str_of(value)
        return utf8(text).decode()

    def _lose(self, path: str, why: str) -> str:
        if len(self.lost) < MAX_LOST or path in self.lost:
            self.lost[path] = why
        return f"[cut: {why}]"


def json_value(value: Any) -> Any:
    """Any object as JSON, by `Conversion`. Never raises: what does is left out."""
    return Conversion(MAX_ENTRIES_OF_ANY).value(value)


def preview(value: Any) -> str:
    """The beginning of a value, for a message; text is quoted. Never raises."""
    kind = type(value)
    if kind is str:
        return repr(utf8(value[:MAX_PREVIEW_CHARS]).decode())
    if kind in (dict, list, tuple, set, frozenset):
        value = Conversion(MAX_PREVIEW_ENTRIES).value(value)
    return " ".join(str_of(value)[:MAX_PREVIEW_CHARS].split())


def attribute_of(value: Any, name: str) -> Any:
    """An attribute; None where there is none, also where a user's `__getattr__` raises anything else."""
    try:
        return getattr(value, name, None)
    except Exception:
        return None


def _first_items(iterable: Any, limit: int) -> list[Any]:
    """The first items; once more where another thread has changed the container meanwhile."""
    for _ in range(MAX_TRIES):
        with suppress(RuntimeError):
            return list(islice(iterable, limit))
    return list(islice(iterable, limit))


def _decoded(value: bytes | bytearray | memoryview) -> str:
    """Bytes as the text that they are in UTF-8, else as Python writes them."""
    size = len(value)
    if size > MAX_BYTES:
        return f"{type(value).__name__} of length {size}"
    data = bytes(value)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return repr(data)
    return text if text.isprintable() else repr(data)


def _decimal(value: Decimal) -> float | str:
    number = float(value)
    return number if math.isfinite(number) and Decimal(repr(number)) == value else str(value)


TIMES = ("M", "m")
"""numpy's letters for dates and times."""
SCALARS: tuple[tuple[Any, Any], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (UserString, str),  # each of whose characters is one, too
    ((date, time), lambda value: value.isoformat()),
    (Decimal, _decimal),
    (TEXTS, _decoded),
    (os.PathLike, os.fsdecode),
)
"""Classes whose objects are one value, and that value."""
