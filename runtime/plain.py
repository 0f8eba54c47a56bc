"""Dataclasses from and to the plain values that JSON has, every type checked.

    settings = decode(Settings, json.loads(text), "settings.json")

The type hints say what a value must be: dataclasses, tuples, mappings, Literal, optional values, str, int, bool, and
float, which takes integers too. Ranges are the dataclasses' own business.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")


class PlainError(Exception):
    """A value is not of the type that is needed, or is missing."""


class UnknownKeysError(PlainError):
    """An object has keys that its dataclass has no fields for."""


def encode(value: Any) -> Any:
    """Dataclasses to dictionaries and tuples to lists, all the way down."""
    if dataclasses.is_dataclass(value):
        return {item.name: encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(cls: type[_T], data: Any, where: str) -> _T:
    """A dataclass from a dictionary with exactly its fields; fields with defaults may be absent.

    where: begins the messages. Raises PlainError, and what the dataclass raises for values out of range.
    """
    if not isinstance(data, Mapping):
        raise PlainError(f"{where}: {data!r:.100} where an object is needed")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise UnknownKeysError(
            f"{where}: unknown keys {', '.join(map(repr, unknown)):.100}; known are {', '.join(sorted(fields))}"
        )
    no_default = dataclasses.MISSING
    required = {k for k, f in fields.items() if f.default is no_default and f.default_factory is no_default}
    if missing := sorted(required - set(data)):
        raise PlainError(f"{where}: keys {', '.join(map(repr, missing))} are missing")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _value(hints[name], item, f"{where}: {name}") for name, item in data.items()})


def fits(hint: Any, value: Any) -> bool:
    """Whether `decode` would take `value` for a field of this type."""
    try:
        _value(hint, value, "")
    except PlainError:
        return False
    return True


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against, and turned into, the type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, where)
    if origin in (types.UnionType, typing.Union):
        rest = [option for option in args if option is not types.NoneType]
        return None if value is None and len(rest) < len(args) else _value(rest[0], value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(hints) == len(value):
            return tuple(
                _value(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(zip(hints, value, strict=True))
            )
    elif (
        origin is not None
        and isinstance(origin, type)
        and issubclass(origin, Mapping)
        and isinstance(value, dict)
    ):
        return {str(key): _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max or isinstance(value, float):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise PlainError(f"{where} is {value!r:.100}, which is no {getattr(hint, '__name__', hint)}")
