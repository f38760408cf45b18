"""What an object holds, known by its form alone: no library is imported in order to recognise its objects.

Objects may be anybody's, so every function here may raise whatever an object raises when it is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
NOT_DATA = (*FUNCTIONS, ModuleType, classmethod, staticmethod, property)
"""Types of attributes that are code and not data: methods, properties, modules."""


@lru_cache(maxsize=512)
def declared_fields(kind: type[Any]) -> tuple[str, ...] | None:
    """The fields that a class says its objects have; None where it says nothing.

    Known are dataclasses, named tuples, and the classes of pydantic (1 and 2), attrs and msgspec.
    """
    if hasattr(kind, "__dataclass_fields__"):
        return tuple(field.name for field in fields(kind))
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(attribute.name for attribute in kind.__attrs_attrs__)
    if hasattr(kind, "__struct_fields__"):
        return tuple(kind.__struct_fields__)
    if issubclass(kind, tuple):
        names = getattr(kind, "_fields", None)
        return names if type(names) is tuple else None
    for name in ("model_fields", "__fields__"):  # pydantic 2 warns of the second, which is pydantic 1's
        declared = getattr(kind, name, None)
        if type(declared) is dict:
            return tuple(declared)
    return None


def attribute_names(value: Any) -> Iterator[str]:
    """The names of what an object, a class or a module holds: its own attributes, its slots, and its class's values."""
    own = getattr(value, "__dict__", {})
    holds_code = isinstance(value, (type, ModuleType))
    for name, item in list(own.items()):
        if type(name) is str and not name.startswith("_") and not (holds_code and _is_descriptor(item)):
            yield name
    if isinstance(value, ModuleType):
        return
    for base in reversed((value if isinstance(value, type) else type(value)).__mro__[:-1]):
        slots = vars(base).get("__slots__", ())
        inherited = [name for name, item in vars(base).items() if not _is_descriptor(item)]
        for name in (*((slots,) if isinstance(slots, str) else slots), *inherited):
            if not name.startswith("_") and name not in own:
                yield name


def extra_names(value: Any) -> Iterator[str]:
    """The names that a pydantic model was given beyond its fields."""
    kind = type(value)
    if hasattr(kind, "model_fields"):
        yield from getattr(value, "__pydantic_extra__", None) or ()
    elif hasattr(kind, "__fields_set__"):  # pydantic 1
        yield from (name for name in vars(value) if name not in kind.__fields__)


def is_namespace(kind: type) -> bool:
    """Whether a class is a namespace: of `types`, or of `argparse` where that was imported."""
    parsed = getattr(sys.modules.get("argparse"), "Namespace", SimpleNamespace)
    return issubclass(kind, (SimpleNamespace, parsed))


def has_own_text(kind: type) -> bool:
    """Whether a class says what its objects are as text; otherwise that is a name and an address."""
    plain: type[Any] = object
    return kind.__str__ is not plain.__str__ or kind.__repr__ is not plain.__repr__


def qualified_name(value: Any) -> str:
    """The name of a class, function or module, with its module's: `torch.optim.adamw.AdamW`, `print`."""
    if isinstance(value, ModuleType):
        return value.__name__
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None) or value.__name__
    return f"{module}.{name}" if module and module != "builtins" else str(name)


def is_on_another_device(value: Any) -> bool:
    """Whether an array's values have to come from a device, or are not there at all, as on torch's "meta"."""
    device = getattr(getattr(value, "device", None), "type", "cpu")
    if type(device) is str and device != "cpu":
        return True
    is_ready = getattr(value, "is_ready", None)  # JAX's
    return callable(is_ready) and not is_ready()


def _is_descriptor(item: Any) -> bool:
    return isinstance(item, NOT_DATA) or hasattr(type(item), "__get__")
