r"""Mathematical equality by math-verify, as a reward: ``$\frac{1}{2}$`` is right where 0.5 is.

Runs only in a worker process that can be killed: ``RLVRWorkflow(reward, reward_workers=2)``.
math-verify's own timeouts are signals, which work in no thread, and without them a power tower such
as ``$9^{9^{9^{9}}}$`` never returns. Here they are off, and the pool's timeout applies.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.foreign_code import score_or_zero, workers_only

require("math_verify", "math-verify", __name__)
from math_verify import parse, verify  # noqa: E402 # here: start_s bounds it, not timeout_s


@workers_only
def math_reward(completion: str, row: Mapping[str, Any], *, answer_key: str = "answer") -> float:
    r"""1.0 if the completion's answer equals the row's, as numbers, expressions, sets or equations.

    A boxed answer counts before others, a later one before an earlier one: ``\boxed{x = 3}`` is
    right where the answer is 3. A completion on which math-verify raises is wrong: 0.0.

    Args:
        completion: sampled text.
        row: row of the dataset.
        answer_key: key of the answer in ``row``: LaTeX, with or without ``$``, or a number.

    Raises:
        ConfigError: outside of a worker process, where nothing could stop it.
        RolloutError: if the row has no answer, or one that cannot be read.
    """
    if answer_key not in row:
        raise RolloutError(f"row has no {answer_key!r}; its keys are {sorted(row)}.")
    expected = _expected(str(row[answer_key]))
    return score_or_zero(
        lambda: verify(expected, _read(completion), timeout_seconds=None),
        lambda: verify(expected, expected, timeout_seconds=None),
    )


@functools.lru_cache(maxsize=1024)
def _expected(answer: str) -> list[Any]:
    text = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    parsed = _read(text)
    if not parsed:
        raise RolloutError(f"math-verify finds no mathematics in the row's answer {answer!r}.")
    return parsed


def _read(text: str) -> list[Any]:
    # math-verify warns that it has no timeout, and of each answer that it cannot read.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


# The first time takes 0.2 s: done here, once a worker, and not in the process of each call.
verify(_read(r"$x = \frac{1}{2}$"), _read(r"\boxed{0.5}"), timeout_seconds=None)
