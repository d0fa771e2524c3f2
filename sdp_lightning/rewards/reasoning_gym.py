"""reasoning-gym's verifiers as rewards, for rows of ``reasoning_gym:...``.

The verifiers give partial credit, so the answer is taken out of the completion first: a whole
completion that contains the answer somewhere would get partial credit for its length.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import RolloutError

require("reasoning_gym", "reasoning-gym", __name__)
import reasoning_gym  # noqa: E402 # here: start_s bounds it, not timeout_s

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """Score of the text between the last ``<answer>`` and ``</answer>``; 0.0 without them.

    Args:
        completion: sampled text.
        row: row of :class:`~sdp_lightning.prompts.reasoning_gym.ReasoningGymRows`.

    Raises:
        RolloutError: if the row does not name its task.
    """
    tagged: list[str] = _TAGGED.findall(completion)
    return score(tagged[-1], row) if tagged else 0.0


def line_reward(completion: str, row: Mapping[str, Any]) -> float:
    """Score of the first line of the completion: for ``shots`` rows, which end in ``Answer:``."""
    return score(completion.strip().partition("\n")[0], row)


def score(answer: str, row: Mapping[str, Any]) -> float:
    """Score of ``answer`` by the verifier of the row's task, from 0 to 1."""
    try:
        name = row["metadata"]["source_dataset"]
    except (KeyError, TypeError) as error:
        raise RolloutError(
            f"row has no 'metadata' with a 'source_dataset'; its keys are {sorted(row)}. This "
            "reward is for prompts such as 'reasoning_gym:chain_sum'."
        ) from error
    return float(_verifier(name)(answer.strip(), dict(row)))


@functools.cache
def _verifier(name: str) -> Callable[..., Any]:
    return reasoning_gym.get_score_answer_fn(name)
