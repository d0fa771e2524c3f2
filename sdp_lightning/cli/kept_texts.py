"""Texts of a config file that stay texts: ``answer: "3"`` is no number.

For a setting of any type (a row's field, an argument of a model) jsonargparse reads a text as YAML
once more, each time that it parses or makes an object; a subclass of ``str`` it leaves alone. So a
config's quoted number, list or the like is a :class:`KeptText` until an object is made of it. What
is typed on a command line is a text only by form, and still read as YAML.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

import yaml
from jsonargparse import get_loader, set_loader
from jsonargparse.typing import register_type

PARSER_MODE = "sdp_yaml"


class KeptText(str):
    """A text that YAML would read as something else. Copies are itself, pickles plain texts."""

    __slots__ = ()

    def __copy__(self) -> KeptText:
        return self

    def __deepcopy__(self, memo: object) -> KeptText:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def keep_texts(value: object) -> Any:
    """A copy of lists and dicts in which each text that YAML reads as something else is kept."""
    if isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        return {key: keep_texts(part) for key, part in items}
    if isinstance(value, list):
        return [keep_texts(part) for part in cast("list[object]", value)]
    return KeptText(value) if type(value) is str and not _is_plain(value) else value


def _is_plain(text: str) -> bool:
    with suppress(ValueError):
        float(text)  # jsonargparse takes forms that YAML has not: "1e3"
        return False
    try:
        return isinstance(get_loader("yaml")(text.strip()), str)
    except yaml.YAMLError:
        return True


def _load(text: str) -> Any:
    return keep_texts(get_loader("yaml")(text))


def _represent(dumper: Any, text: KeptText) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="'")


def keeping_mode() -> str:
    """The ``parser_mode`` of parsers that keep a config's texts; YAML in all else."""
    register_type(KeptText, serializer=KeptText, fail_already_registered=False)
    set_loader(PARSER_MODE, _load, exceptions=(yaml.YAMLError,))
    for dumper in (yaml.SafeDumper, yaml.Dumper):
        dumper.add_representer(KeptText, _represent)
    return PARSER_MODE
