r"""Mathematical equality by math-verify, as a reward.

>>> math_reward(r"So it is $\frac{1}{2}$.", {"answer": "0.5"})
1.0

Runs only in a process that can be killed: ``RLVRWorkflow(reward, reward_workers=2)``. math-verify's
own timeouts are signals, which work in no thread, and without them a power tower such as
``$9^{9^{9^{9}}}$`` never returns. Here they are off, and the pool's timeout applies.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping
from typing import Any

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import RolloutError

require("math_verify", "math-verify", __name__)
from math_verify import parse, verify  # noqa: E402 # here: start_s bounds it, not timeout_s


def math_reward(completion: str, row: Mapping[str, Any], *, answer_key: str = "answer") -> float:
    r"""1.0 if the completion's answer equals the row's, as numbers, expressions, sets or equations.

    A boxed answer counts before others, a later one before an earlier one.

    >>> math_reward(r"\boxed{x = 3}", {"answer": "3"}), math_reward("It is 4.", {"answer": "3"})
    (1.0, 0.0)

    Args:
        completion: sampled text.
        row: row of the dataset.
        answer_key: key of the answer in ``row``: LaTeX, with or without ``$``, or a number.

    Raises:
        RolloutError: in a thread, where nothing could stop it; if the row has no answer, or one
            that cannot be read.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RolloutError(
            "math_reward may never return, so it runs in worker processes only: set "
            "reward_workers=2 of the workflow, or pass a RewardPool."
        )
    if answer_key not in row:
        raise RolloutError(f"row has no {answer_key!r}; its keys are {sorted(row)}.")
    expected = _expected(str(row[answer_key]))
    return float(verify(expected, _read(completion), timeout_seconds=None))


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
