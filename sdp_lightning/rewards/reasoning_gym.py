"""reasoning-gym's verifiers as rewards, for rows of ``reasoning_gym:...``.

The verifiers give partial credit, so the answer is taken out of the completion first: a whole
completion that contains the answer somewhere would get partial credit for its length.

Runs only in worker processes: ``RLVRWorkflow(reward, reward_workers=2)``. The verifiers are another
project's code, and several of them evaluate the answer as Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.foreign_code import score_or_zero, workers_only
from sdp_lightning.rewards.text import between_tags

require("reasoning_gym", "reasoning-gym", __name__)
import reasoning_gym  # noqa: E402 # here: start_s bounds it, not timeout_s


@workers_only
def reward(completion: str, row: Mapping[str, Any]) -> float:
    """Score of the text between the last ``<answer>`` and ``</answer>``; 0.0 without them.

    Args:
        completion: sampled text.
        row: row of :class:`~sdp_lightning.prompts.reasoning_gym.ReasoningGymRows`.

    Raises:
        RolloutError: if the row does not name its task.
    """
    tagged = between_tags(completion, "<answer>", "</answer>")
    return _score(tagged[-1], row) if tagged else 0.0


@workers_only
def line_reward(completion: str, row: Mapping[str, Any]) -> float:
    """Score of the first lines of the completion: for ``shots`` rows, which end in ``Answer:``.

    They are as many as the row's own answer has; all those before the next ``Question:`` where the
    row has none.
    """
    lines = completion.partition("\nQuestion:")[0].strip().splitlines()
    answer = row.get("answer")
    number = len(lines) if answer is None else max(1, len(str(answer).strip().splitlines()))
    return _score("\n".join(lines[:number]), row)


@workers_only
def score(answer: str, row: Mapping[str, Any]) -> float:
    """Score of ``answer`` by the verifier of the row's task, from 0 to 1.

    An answer on which the verifier raises is wrong: 0.0.

    Raises:
        RolloutError: if the row does not name its task, or its own answer cannot be verified.
    """
    return _score(answer, row)


def _score(answer: str, row: Mapping[str, Any]) -> float:
    try:
        name = row["metadata"]["source_dataset"]
    except (KeyError, TypeError) as error:
        raise RolloutError(
            f"row has no 'metadata' with a 'source_dataset'; its keys are {sorted(row)}. This "
            "reward is for prompts such as 'reasoning_gym:chain_sum'."
        ) from error
    verifier = _verifier(name)

    def verify_row() -> None:
        if row.get("answer") is None:
            return  # of a task with many right answers: there is nothing to try
        try:
            verifier(row.get("answer"), dict(row))
        except Exception as error:
            raise RolloutError(
                f"the verifier of {name!r} fails on the row's own answer {row.get('answer')!r}: "
                f"{error!r}."
            ) from error

    name_shown = f"the verifier of {name!r}"
    return score_or_zero(lambda: verifier(answer.strip(), dict(row)), verify_row, name=name_shown)


@functools.cache
def _verifier(name: str) -> Callable[..., Any]:
    return reasoning_gym.get_score_answer_fn(name)
