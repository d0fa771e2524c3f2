r"""Mathematical equality by math-verify, as a reward: ``$\frac{1}{2}$`` is right where 0.5 is.

Runs only in a worker process that can be killed: ``RLVRWorkflow(reward, reward_workers=2)``.
math-verify's own timeouts are signals, which work in no thread, and without them a power tower such
as ``$9^{9^{9^{9}}}$`` never returns. Here they are off, and the pool's timeout applies.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.foreign_code import score_or_zero, workers_only

require("math_verify", "math-verify", __name__)
from math_verify import parse, verify  # noqa: E402 # here: start_s bounds it, not timeout_s

# One pass finds the boxes: an escaped character is none of their braces.
_BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{|\\.|[{}]", re.DOTALL)
_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|,?\\!|\\,)(?=\d{3}(?!\d))")  # 32{,}348, 1\,000, 1,\!000
_MIXED = re.compile(r"([-+\u2212]?\d{1,40})(?:\s|\\[ ,;:!]){1,9}(\d{1,40}) ?/ ?(\d{1,40})")  # 2 1/2
_POWER = re.compile(r"([-+\u2212]?\d{1,40}(?:\.\d{1,40})?)[eE]([-+]?\d{1,3})")  # 1.5e3
_NUMBER = re.compile(r"-?\d{1,40}(?:\.\d{1,40})?")
_DOLLAR = re.compile(r"(?<!\\)\$")


@workers_only
def math_reward(completion: str, row: Mapping[str, Any], *, answer_key: str = "answer") -> float:
    r"""1.0 if the completion's answer equals the row's, as numbers, expressions, sets or equations.

    The last box counts, if there is one that is closed; else a later formula before an earlier
    one. Currency, units and a final period do not count, 36\% is 0.36 and 36, and
    ``\boxed{x = 3}`` is right where the answer is 3. A completion on which math-verify raises is
    wrong: 0.0.

    Args:
        completion: sampled text.
        row: row of the dataset.
        answer_key: key of the answer in ``row``: LaTeX, with or without ``$``, or a number.

    Raises:
        ConfigError: outside of a worker process, where nothing could stop it.
        RolloutError: if the row has no answer, or one that cannot be read.
    """
    expected = _expected(_answer(row, answer_key))
    return score_or_zero(
        lambda: verify(expected, _read(completion), timeout_seconds=None),
        lambda: verify(expected, expected, timeout_seconds=None),
        name="math-verify",
    )


def check_row(row: Mapping[str, Any], *, answer_key: str = "answer") -> str | None:
    """The row's answer, to be read by :func:`can_read`; None if it is a plain number.

    Raises:
        RolloutError: if the row has no answer.
    """
    answer = _answer(row, answer_key)
    return None if _NUMBER.fullmatch(answer.strip()) else answer


@workers_only
def can_read(answer: str, row: Mapping[str, Any]) -> float:
    """1.0 if math-verify reads the ``answer`` of a row, and finds it equal to itself."""
    try:
        expected = _expected(answer)
        return float(verify(expected, expected, timeout_seconds=None))
    except RolloutError:
        return 0.0


math_reward.check_row = check_row  # type: ignore[attr-defined]
math_reward.can_read = f"{__name__}:can_read"  # type: ignore[attr-defined]


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` or ``\fbox{...}`` that is closed; None without one.

    >>> last_box(r"\boxed{6} times \boxed{7} is \boxed{42}, or \boxed{4")
    '42'
    """
    last, opened = None, list[int]()  # where the content of each open brace begins; of a box, + 1
    for match in _BRACE.finditer(text):
        token = match[0]
        if token == "{" or (token.endswith("{") and len(token) > 2):
            opened.append(2 * match.end() + (len(token) > 2))
        elif token == "}" and opened:
            start, is_box = divmod(opened.pop(), 2)
            last = text[start : match.start()] if is_box else last
    return last


def _answer(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise RolloutError(f"row has no {key!r}; its keys are {sorted(row)}.")
    return str(row[key])


@functools.lru_cache(maxsize=1024)
def _expected(answer: str) -> list[Any]:
    text, dollars = answer.strip(), len(_DOLLAR.findall(answer))
    is_formula = dollars < 2 or (dollars == 2 and text[0] == "$" == text[-1])
    if last_box(answer) is None and is_formula:
        text = f"\\boxed{{{text}}}"
    parsed = _read(text)
    if not parsed:
        raise RolloutError(f"math-verify finds no mathematics in the row's answer {answer!r}.")
    return parsed


def _read(text: str) -> list[Any]:
    # math-verify warns that it has no timeout, and of each answer that it cannot read.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    box = last_box(text)
    if box is not None:
        text = f"\\boxed{{{_plain(box)}}}"
    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _plain(formula: str) -> str:
    """The formula without currency and final period, with its numbers as math-verify reads them."""
    text = formula.replace("\\$", "").replace("$", "").strip()
    text = text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text
    text = _GROUPS.sub("", text)
    if mixed := _MIXED.fullmatch(text):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    power = _POWER.fullmatch(text)
    return rf"{power[1]}\times 10^{{{power[2]}}}" if power else text


# The first time takes 0.2 s: done here, once a worker, and not in the process of each call.
verify(_read(r"$x = \frac{1}{2}$"), _read(r"\boxed{0.5}"), timeout_seconds=None)
