"""Settings as plain values: for hyperparameters, for loggers, and to tell two runs apart."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from sdp_lightning.config.server_keys import without_keys
from sdp_lightning.errors import ConfigError

T = TypeVar("T")


class GivenSettings:
    """A class whose objects know the arguments that they were made with.

    Attributes:
        given_settings: the arguments by name, without those left at their defaults.
    """

    given_settings: Mapping[str, Any] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        try:
            made.given_settings = _by_name(cls.__init__, args, kwargs)
        except TypeError:  # __init__ says it better
            made.given_settings = {}
        return made


def plain(value: Any) -> Any:
    """``value`` of texts, numbers, lists and dictionaries, the same in every process.

    A function or class is its import path; an object that is no setting is the path of its class. A
    server's key is the name of a variable.
    """
    return without_keys(_plain(value))


def config_of(kind: type[T], value: Any) -> T:
    """``value`` if it is a ``kind``, or the ``kind`` of which it is what :func:`plain` makes.

    Raises:
        ConfigError: naming a field that ``kind`` does not have.
    """
    if not isinstance(value, Mapping):
        return cast(T, value)
    given = dict(cast(Mapping[str, Any], value))
    known = {field.name for field in fields(cast(Any, kind))}
    if unknown := given.keys() - known:
        raise ConfigError(
            f"{kind.__name__} has no {sorted(unknown)[0]!r}; it has {', '.join(sorted(known))}."
        )
    lists = {name: tuple(each) for name, each in given.items() if isinstance(each, list)}
    return kind(**given | lists)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name.

    >>> flat({"loss": {"clip_epsilon": 0.2}, "update": {}})
    {'loss.clip_epsilon': 0.2, 'update': {}}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            inner = flat(cast(Mapping[str, Any], value))
            found |= {f"{name}.{rest}": each for rest, each in inner.items()}
        else:
            found[name] = value
    return found


def _plain(value: Any) -> Any:
    for kind in (bool, int, float, str):  # of a subclass, such as an enum, the value alone
        if isinstance(value, kind):
            bare = kind(value)
            return str(bare) if isinstance(bare, float) and not math.isfinite(bare) else bare
    if value is None:
        return None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, GivenSettings):
        return {"class_path": _path(type(value)), "init_args": _plain(value.given_settings)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {str(name): _plain(each) for name, each in items}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast(list[Any], value)]
    if isinstance(value, set | frozenset):
        return sorted((_plain(each) for each in cast(set[Any], value)), key=str)
    if isinstance(value, functools.partial):
        made = cast(Any, value)
        return {"function": _path(made.func), "args": _plain(made.args)} | _plain(made.keywords)
    if inspect.isroutine(value) or isinstance(value, type):
        return _path(value)
    name = type(value).__name__
    return str(value).removeprefix("torch.") if name == "dtype" else _path(type(value))


def _path(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a method by name; those of ``**more`` among the others."""
    signature = inspect.signature(function)
    given = dict(signature.bind(None, *args, **kwargs).arguments)
    given.pop(next(iter(signature.parameters)), None)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    for name in [n for n in given if kinds[n] is inspect.Parameter.VAR_KEYWORD]:
        given |= given.pop(name)
    return given
