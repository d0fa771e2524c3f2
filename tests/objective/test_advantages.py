"""Advantages relative to a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sdp_lightning.objective import group_relative_advantages, leave_one_out_advantages

untimed = settings(deadline=None)
ROWS = st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(0, 4)), min_size=1, max_size=20)


@untimed
@given(rows=ROWS, scale=st.booleans(), std=st.sampled_from(["population", "sample"]))
def test_agrees_with_a_loop_over_groups(
    rows: list[tuple[float, int]], scale: bool, std: Any
) -> None:
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rows])
    advantages = group_relative_advantages(rewards, groups, scale_by_std=scale, std=std, eps=1e-6)
    for group in groups.unique():
        own = rewards[groups == group]
        expected = own - own.mean()
        if scale and len(own) > 1:
            expected = expected / (own.std(correction=int(std == "sample")) + 1e-6)
        if bool((own == own[0]).all()):
            expected = torch.zeros_like(own)
        assert torch.allclose(advantages[groups == group], expected, atol=1e-9)


@untimed
@given(rows=ROWS, shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_a_shift_of_all_rewards_or_another_order_of_rows_changes_nothing(
    rows: list[tuple[float, int]], shift: float, seed: int
) -> None:
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rows])
    advantages = group_relative_advantages(rewards, groups, scale_by_std=False)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    moved = group_relative_advantages(
        rewards[order] + shift, groups[order] * 7 + 3, scale_by_std=False
    )
    assert torch.allclose(moved, advantages[order], atol=1e-9)


def test_worked_out_by_hand() -> None:
    # Group 7: mean 1, deviations -1 and 1, population std 1. Group 2: one row. Group 5: equal.
    rewards = torch.tensor([0.0, 9.0, 2.0, 0.1, 0.1, 0.1])
    groups = torch.tensor([7, 2, 7, 5, 5, 5])
    advantages = group_relative_advantages(rewards, groups, eps=0.0)
    assert advantages.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert advantages.dtype == torch.float32


def test_the_deviation_of_a_sample_by_hand() -> None:
    # Group 7: deviations -2, 0, 2; squares 8, over 2: std 2. Group 2: one row.
    rewards, groups = torch.tensor([1.0, 9.0, 3.0, 5.0]), torch.tensor([7, 2, 7, 7])
    advantages = group_relative_advantages(rewards, groups, std="sample", eps=0.0)
    assert advantages.tolist() == [-1.0, 0.0, 0.0, 1.0]
    population = group_relative_advantages(rewards, groups, eps=0.0)
    assert population.tolist() == pytest.approx([-(1.5**0.5), 0.0, 0.0, 1.5**0.5])


def test_equal_rewards_give_exactly_zero_although_their_mean_is_rounded() -> None:
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert (rewards - rewards.sum() / 3).any()
    assert not group_relative_advantages(rewards, torch.zeros(3, dtype=torch.long), eps=0.0).any()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(2,\)"):
        group_relative_advantages(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))


# Leave one out ------------------------------------------------------------------------------------


@untimed
@given(rows=ROWS)
def test_each_is_compared_with_the_mean_of_the_others(rows: list[tuple[float, int]]) -> None:
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rows])
    advantages = leave_one_out_advantages(rewards, groups)
    for row, (reward, group) in enumerate(rows):
        others = [r for i, (r, g) in enumerate(rows) if g == group and i != row]
        expected = reward - sum(others) / len(others) if others else 0.0
        assert float(advantages[row]) == pytest.approx(expected, abs=1e-9)


def test_leave_one_out_by_hand() -> None:
    # 1 against (0 + 0) / 2, 0 against (1 + 0) / 2; a group of one, and one of equals.
    rewards = torch.tensor([1.0, 0.0, 0.0, 9.0, 0.1, 0.1])
    groups = torch.tensor([4, 4, 4, 1, 2, 2])
    found = leave_one_out_advantages(rewards, groups)
    assert found.tolist() == [1.0, -0.5, -0.5, 0.0, 0.0, 0.0] and found.dtype == torch.float32
    with pytest.raises(ValueError, match="must both be"):
        leave_one_out_advantages(rewards, groups[:2])
