"""Rewards that compare a completion with the answer in its row.

A reward is ``reward(completion, row) -> float``. These are 1.0 or 0.0; ``functools.partial`` fixes
their options. No model, no state.

Every parser here is linear in the length of its text: tags are found by one pass of ``str.find``,
and nothing that must match follows a repetition without bound, so no match is tried again.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from sdp_lightning.errors import ConfigError, RolloutError

_NUMBER = re.compile(
    r"""
    (?<!\w) (?<!\d\.)                    # x2 is a name, 1.2.3 is a version
    (?P<sign> (?<![\w)\].]) [-+\u2212] )?  # in 3-1 the minus stands between two numbers
    (?P<number>
        (?: \d{1,3} (?:,\d{3}(?!\d))+ | \d+ ) (?:\.\d+)?  # 1,234.5 is one number, 1,2 are two
      | (?<!\.) \.\d+
    )
    (?P<exponent> [eE][-+]?\d+ )?
    """,
    re.VERBOSE,
)


def exact_match(
    completion: str,
    row: Mapping[str, Any],
    *,
    answer_key: str = "answer",
    strip: bool = True,
    ignore_case: bool = False,
) -> float:
    r"""1.0 if the completion is the row's answer, character by character.

    >>> exact_match("Paris\n", {"answer": "Paris"}), exact_match("paris", {"answer": "Paris"})
    (1.0, 0.0)

    Args:
        completion: sampled text, stop text included.
        row: row of the dataset.
        answer_key: key of the answer in ``row``; the answer is compared as text.
        strip: ignore white space at both ends.
        ignore_case: compare without regard to case.

    Raises:
        RolloutError: if the row has no answer.
    """
    text, expected = completion, str(_answer(row, answer_key))
    if strip:
        text, expected = text.strip(), expected.strip()
    if ignore_case:
        text, expected = text.casefold(), expected.casefold()
    return float(text == expected)


def numeric_match(
    completion: str,
    row: Mapping[str, Any],
    *,
    answer_key: str = "answer",
    which: Literal["first", "last"] = "last",
    tolerance: float = 0.0,
) -> float:
    """1.0 if the first or last number in the completion is the row's answer.

    >>> numeric_match("So 4 of them make $1,200.00.", {"answer": 1200})
    1.0

    Args:
        completion: sampled text.
        row: row of the dataset.
        answer_key: key of the answer in ``row``: a number, or a text with exactly one number in it.
        which: number of the completion to compare.
        tolerance: the largest difference that counts as equal, absolute; 0 compares exactly.

    Raises:
        RolloutError: if the row's answer is not one number.
        ConfigError: if an option is out of range.
    """
    if which not in ("first", "last"):
        raise ConfigError(f"which must be 'first' or 'last', got {which!r}.")
    if not tolerance >= 0:
        raise ConfigError(f"tolerance must be 0 or more, got {tolerance}.")
    expected = _expected_number(row, answer_key)
    numbers = _iter_numbers(completion)
    number = next(numbers, None)
    if which == "last":
        number = next(iter(deque(numbers, maxlen=1)), number)
    if number is None:
        return 0.0
    is_near = tolerance > 0 and abs(float(number) - float(expected)) <= tolerance
    return float(number == expected or is_near)


def find_numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order: signs, decimals, thousands commas, powers of ten.

    >>> [str(number) for number in find_numbers("-2 of 1,234.5 or 3-1, in v1.2 of x7")]
    ['-2', '1234.5', '3', '1']

    A fraction such as 1/2 is two numbers, and 50% is 50. A power of ten beyond all bounds
    (1e99999999999999999999) is left out.
    """
    return list(_iter_numbers(text))


def between_tags(text: str, opening: str, closing: str) -> list[str]:
    """The texts between each ``opening`` and the next ``closing``, in order.

    >>> between_tags("<a>1</a> or <a>2</a> or <a>3", "<a>", "</a>")
    ['1', '2']
    """
    found: list[str] = []
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            break  # nor is there one behind any later opening
        found.append(text[start:end])
        start = text.find(opening, end + len(closing))
    return found


def _check_exact(row: Mapping[str, Any], *, answer_key: str = "answer", **options: Any) -> None:
    _answer(row, answer_key)


def _check_numeric(row: Mapping[str, Any], *, answer_key: str = "answer", **options: Any) -> None:
    _expected_number(row, answer_key)


exact_match.check_row = _check_exact  # type: ignore[attr-defined] # see row_checks
numeric_match.check_row = _check_numeric  # type: ignore[attr-defined]


def _iter_numbers(text: str) -> Iterator[Decimal]:
    for match in _NUMBER.finditer(text):
        number = _decimal(match)
        if number is not None:
            yield number


def _decimal(match: re.Match[str]) -> Decimal | None:
    sign = "-" if match["sign"] in ("-", "\u2212") else ""
    try:
        return Decimal(sign + match["number"].replace(",", "") + (match["exponent"] or ""))
    except InvalidOperation:
        return None


def _expected_number(row: Mapping[str, Any], key: str) -> Decimal:
    answer = _answer(row, key)
    numbers = [] if isinstance(answer, bool) else find_numbers(str(answer))
    if len(numbers) != 1:
        raise RolloutError(
            f"the row's {key!r} is {answer!r}, with {len(numbers)} numbers in it; it must be one "
            "number. Take it out of its text when the rows are made."
        )
    return numbers[0]


def _answer(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise RolloutError(f"row has no {key!r}; its keys are {sorted(row)}. Set answer_key.")
    return row[key]
