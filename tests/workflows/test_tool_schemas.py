"""What a tool may be given: schemas of its arguments, and what is wrong with those of a call."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.workflows.tool_schema import read_arguments, tool_schema

# Arguments ----------------------------------------------------------------------------------------


class Unit(enum.Enum):
    METER = 1


class Point(TypedDict):
    x: int


@dataclasses.dataclass
class Box:
    width: int


def every(
    count: int,
    name: str,
    ratio: float = 1.0,
    flag: bool = False,
    kind: Literal["x", "y"] = "x",
    note: str | None = None,
    either: int | str = 1,
    items: list[int] = [],  # noqa: B006
    pair: tuple[int, str] = (1, "x"),
    row: Sequence[int] = (),
    table: Mapping[str, list[int]] = {},
    anything: object = None,
    untyped=None,  # type: ignore[no-untyped-def]
    unit: Unit = Unit.METER,
    point: Point = {"x": 1},  # noqa: B006
    box: Box = Box(1),  # noqa: B008
) -> None:
    """Takes one of each."""


GIVEN = {"count": 1, "name": "n"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ratio": 2, "flag": True, "kind": "y", "note": None, "either": "x", "items": [1]},
        {"pair": [2, "y"], "row": [1, 2], "table": {"a": [1]}, "anything": [{}], "untyped": "x"},
        {"unit": "METER", "point": {"x": 2}, "box": {"width": 2}, "either": 3},
    ],
)
def test_arguments_of_the_declared_types_are_given(more: dict[str, Any]) -> None:
    assert read_arguments(tool_schema(every), GIVEN | more) == GIVEN | more


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"count": "1"}, "every() cannot take that: 'count' must be of type integer, and is '1'"),
        ({"count": True}, "'count' must be of type integer, and is True"),
        ({"count": 1.5}, "'count' must be of type integer, and is 1.5"),
        ({"count": None}, "'count' must be of type integer, and is None"),
        ({"name": 3}, "'name' must be of type string, and is 3"),
        ({"ratio": "half"}, "'ratio' must be of type number, and is 'half'"),
        ({"flag": 1}, "'flag' must be of type boolean, and is 1"),
        ({"kind": "z"}, "'kind' must be one of ['x', 'y'], and is 'z'"),
        ({"note": 3}, "'note' must be of type string, and is 3"),
        ({"either": []}, "'either' must be of type integer or string, and is []"),
        ({"items": [1, "2"]}, "'items' must be of type integer, and is '2'"),
        ({"pair": [1]}, "'pair' must have 2 items, and has 1"),
        ({"pair": [1, 2]}, "'pair' must be of type string, and is 2"),
        ({"row": {"a": 1}}, "'row' must be of type array, and is {'a': 1}"),
        ({"table": {"a": [1, "b"]}}, "'table' must be of type integer, and is 'b'"),
        ({"box": 3}, "'box' must be of type object, and is 3"),
        ({"colour": "red"}, "every() has no parameter 'colour'; it has ['count', 'name', "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_argument_of_a_wrong_type_or_name_is_told_by_its_name(
    more: dict[str, Any], told: str
) -> None:
    with pytest.raises(TypeError) as caught:
        read_arguments(tool_schema(every), GIVEN | more)
    assert told in str(caught.value)


def test_texts_stand_for_values_of_the_declared_types() -> None:
    said = {
        "count": "7",
        "name": "7",
        "ratio": "0.5",
        "flag": "True",
        "items": "[1]",
        "untyped": "x",
    }
    said |= {"note": "None", "either": '"x"'}
    read = {"count": 7, "name": "7", "ratio": 0.5, "flag": True, "items": [1], "untyped": "x"}
    read |= {"note": None, "either": '"x"'}
    assert read_arguments(tool_schema(every), said, are_texts=True) == read
    with pytest.raises(TypeError, match=r"'count' must be of type integer, and is '7\.5'"):
        read_arguments(tool_schema(every), said | {"count": "7.5"}, are_texts=True)


# Schemas ------------------------------------------------------------------------------------------


def documented(city: str, days: int = 1) -> str:
    """The weather.

    Args:
        city: where
            it is
        days: how many

    Returns:
        a text
    """
    return city


def half_documented(city: str, days: int = 1) -> str:
    """The weather.

    Args:
        city: where it is
    """
    return city


def test_a_schema_is_that_of_transformers_with_what_the_docstring_lacks() -> None:
    from transformers.utils import get_json_schema

    theirs = get_json_schema(documented)
    del theirs["function"]["return"]
    assert tool_schema(documented) == theirs
    function = tool_schema(half_documented)["function"]
    assert "Args:\n    city: where it is" in function["description"], "nothing said is lost"
    properties = function["parameters"]["properties"]
    assert properties["city"] == {"type": "string", "description": "where it is"}
    assert properties["days"] == {"type": "integer"}
    assert tool_schema(lambda: 1)["function"]["description"] == ""


def of_sets(values: set[int]) -> None:
    """Takes a set."""


def positional(value: int, /) -> None:
    """Takes what has no name."""


def unknown(value: Nowhere) -> None:  # type: ignore[name-defined] # noqa: F821
    """Takes what is not known."""


def yields() -> Iterator[int]:
    """Yields."""
    yield 1


async def yields_later() -> AsyncIterator[int]:
    """Yields."""
    yield 1


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (of_sets, r"the tool 'of_sets' cannot be described .*set\[int\]"),
        (positional, "'positional' cannot be described .*'value' cannot be given by name"),
        (unknown, "'unknown' cannot be described .*'Nowhere' is not defined"),
        (yields, "yields.* yields: let it return what the policy shall read"),
        (yields_later, "yields_later.* yields: let it return"),
        (dict, "'dict' cannot be described .*no signature found"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_a_tool_is_refused_by_name(tool: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sdp.ToolEnvironment([tool], lambda answer, row: 0.0)
