"""What a reward pool refuses: rewards that cannot be imported, settings out of range."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards import RewardCounts, RewardPool
from support import misbehaving_rewards
from support.reward_pools import PLACE, call


def closure() -> Any:
    return lambda completion, row: 0.0


def script_function(completion: str, row: Any) -> float:
    return 0.0


script_function.__module__ = "__main__"


@pytest.mark.parametrize(
    "reward",
    [closure(), script_function, [].append, misbehaving_rewards.__name__.join],
    ids=["a lambda", "of the script", "a method", "of a string"],
)
def test_a_reward_without_a_place_is_refused_with_the_remedy(reward: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot import .*reward='path/to/file.py:name'"):
        RewardPool(reward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "num_workers must be an integer of at least 1, got 0"),
        ({"memory_bytes": 0.5}, "memory_bytes must be an integer of at least 1, got 0.5"),
        ({"max_killed_in_a_row": 0}, "max_killed_in_a_row must be"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"timeout_s": float("nan")}, "timeout_s must be positive"),
        ({"start_s": -1}, "start_s must be positive"),
        ({"on_kill": "ignore"}, "on_kill must be zero, reject or raise; got 'ignore'"),
        ({"on_error": None}, "on_error must be"),
    ],
    ids=str,
)
def test_settings_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardPool(PLACE, **settings)


@pytest.mark.parametrize(
    ("body", "start_s", "message"),
    [
        ("raise ImportError('no wheel')", 60.0, r"raised ImportError: no wheel while .* loaded it"),
        ("os._exit(5)", 60.0, "ended its process with exit status 5 while"),
        ("time.sleep(3600)", 5.0, "took longer than 5.0 s while"),
    ],
    ids=["raises", "exits", "hangs"],
)
def test_a_reward_that_only_the_workers_cannot_load_is_an_error_and_not_a_zero(
    tmp_path: Path, body: str, start_s: float, message: str
) -> None:
    file = tmp_path / "picky.py"
    text = f"import os, sys, time\nif 'pytest' not in sys.modules:\n    {body}\n"
    file.write_text(text + "def reward(completion, row):\n    return 1.0\n")
    with closing(RewardPool(f"{file}:reward", num_workers=1, start_s=start_s)) as pool:
        for _ in range(2):
            with pytest.raises(RolloutError, match=message):
                call(pool, "any")
        assert pool.counts == RewardCounts()
        file.write_text(file.read_text().replace(body, "pass"))
        assert call(pool, "any") == 1.0
