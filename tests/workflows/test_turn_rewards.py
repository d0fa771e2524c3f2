"""Environments that return several rewards: added up by name over the turns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.testing import FakeEngine
from support.rollouts import rolling

WEIGHTS = {"tool": 0.5, "correct": 1.0}


def play(*steps: Any, weights: dict[str, float] | None = None, max_turns: int = 8) -> list[Any]:
    """The two trajectories of an environment that returns these rewards, done after the last."""

    class Pays(sdp.Environment):
        def __init__(self) -> None:
            self.left = list(steps)

        def reset(self, row: Any) -> str:
            return "?"

        def step(self, completion: str) -> tuple[str, Any, bool]:
            reward = self.left.pop(0)
            return "", reward, not self.left

    more: Any = {} if weights is None else {"reward_weights": weights}
    workflow = sdp.MultiTurnWorkflow(
        Pays, group_size=2, turn_format="{observation}", max_turns=max_turns, **more
    )
    assert workflow.reward_weights == (weights or {})
    with rolling(FakeEngine(), workflow, batch_size=1, rows=1, num_epochs=1) as executor:
        return [t for group in executor.take() or [] for t in group.trajectories]


def test_rewards_add_up_by_name_and_what_no_turn_gave_is_0() -> None:
    for sample in play({"tool": 1}, 0.0, {"tool": np.float32(0.5)}, weights=WEIGHTS):
        assert sample.rewards == {"tool": 1.5, "correct": 0.0}
        assert (sample.reward, sample.reward_weights) == (0.75, WEIGHTS)


def test_a_conversation_that_is_cut_off_has_every_name() -> None:
    for sample in play(0, {"correct": 1.0}, weights=WEIGHTS, max_turns=1):
        assert sample.finish_reason == "length"
        assert sample.rewards == {"tool": 0.0, "correct": 0.0}


@pytest.mark.parametrize(
    ("step", "weights", "message"),
    [
        ({"tool": 1.0}, None, r"rewards \{'tool': 1.0\}; name all .* by reward_weights="),
        ({"speed": 1.0}, WEIGHTS, r"has no 'speed': it has \['correct', 'tool'\]"),
        (1.0, WEIGHTS, r"the reward 1.0; .* a mapping of names, of \['correct', 'tool'\], or 0"),
        ({"tool": "high"}, WEIGHTS, r"Pays.step/tool' returned 'high'; it must be a number"),
    ],
    ids=["without weights", "another name", "a number", "no number"],
)
def test_a_wrong_reward_names_the_row(
    step: Any, weights: dict[str, float] | None, message: str
) -> None:
    with pytest.raises(RolloutError, match=f"row 'row0'.*{message}"):
        play(step, weights=weights)


def test_weights_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"reward_weights\['tool'\] must be a finite number"):
        play(0, weights={"tool": float("nan")})
