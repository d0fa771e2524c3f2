"""Would it be noticed? What comes before the loss, advantages and the KL to a reference, mutated.

As test_mutations.py has it for the loss: the checks are loops over numbers, without the library.
"""

from __future__ import annotations

import math
import statistics
from types import ModuleType

import pytest
import torch

from support.mutated_modules import load

ADVANTAGES = [
    # swap min and max
    ('values, "amax"', 'values, "amin"'),
    ("deviation == 0, 0.0, scaled", "deviation == 0, scaled, 0.0"),
    # swap a ratio
    ("return group, size, torch.where(", "return group, size, -torch.where("),
    ("values - (zeros", "-values + (zeros"),
    ("size / (size - 1)", "(size - 1) / size"),
    # change the denominator
    ("(square / size)", "(square / (size - 1).clamp(min=1))"),
    ("(square / size)", "square"),
    (".sqrt() + eps", ".sqrt()"),
    (".sqrt() + eps", " + eps"),
    (".clamp(min=1))[group]", ")[group]"),
    ("0, group, values) / size", "0, group, values) / len(values)"),
    # equals are exactly 0
    ("(highest == lowest)[group], 0.0", "(highest == lowest)[group], deviation"),
    # groups
    ("+ eps)[group]", "+ eps).mean()"),
    ("if scale_by_std:", "if not scale_by_std:"),
    ("rewards.detach()", "rewards"),
]
KL = [
    ("reference - target", "target - reference"),
    ("return -distance", "return distance"),
    ("distance.square() / 2", "distance.square()"),
    ("distance.square() / 2", "distance.abs() / 2"),
    ("distance.expm1() - distance", "(-distance).expm1() - distance"),
    ("distance.expm1() - distance", "distance.expm1() + distance"),
    ("distance.expm1() - distance", "distance.exp() - distance"),
    ("at_least_float32(reference.detach())", "at_least_float32(reference)"),
    # mask after exp
    ("torch.where(loss_mask, reference - target, 0.0)", "(reference - target) * loss_mask"),
    ("torch.where(loss_mask, reference - target, 0.0)", "reference - target"),
    # of a trajectory: the sum, not the mean, and less, not more
    ("rewards - coefficient * kl", "rewards + coefficient * kl"),
    ("rewards - coefficient * kl", "rewards - kl"),
    ("kl.sum(-1)", "kl.mean(-1)"),
    ("behavior.detach(), reference", "reference.detach(), behavior"),
    ("kl_estimate(behavior.detach()", "kl_estimate(behavior"),
]
REWARDS = [0.0, 9.0, 2.0, 0.1, 0.1, 0.1, 5.0, -1.0]
GROUPS = [7, 2, 7, 5, 5, 5, 7, 7]


def check_advantages(module: ModuleType) -> None:
    """Raise AssertionError unless the advantages are those of a loop over groups."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor(GROUPS)
    scaled = module.group_relative_advantages(rewards, ids, eps=0.5)
    plain = module.group_relative_advantages(rewards, ids, scale_by_std=False)
    others = module.leave_one_out_advantages(rewards, ids)
    assert not any(found.requires_grad for found in (scaled, plain, others))
    for row, (reward, group) in enumerate(zip(REWARDS, GROUPS, strict=True)):
        own = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]
        if len(set(own)) == 1:
            assert scaled[row] == plain[row] == others[row] == 0
            continue
        distance = reward - statistics.mean(own)
        rest = (sum(own) - reward) / (len(own) - 1)
        assert float(plain[row]) == pytest.approx(distance)
        assert float(scaled[row]) == pytest.approx(distance / (statistics.pstdev(own) + 0.5))
        assert float(others[row]) == pytest.approx(reward - rest)


def check_kl(module: ModuleType) -> None:
    """Raise AssertionError unless values and gradients are those of numbers, one by one."""
    target = torch.tensor([[-1.0, -3.0, math.nan], [-0.5, math.inf, -2.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -2.0, 0.0], [-0.75, 0.0, -0.5]], dtype=torch.float64)
    mask = target.isfinite()
    values = {
        "k1": (lambda d: -d, lambda d: 1.0),
        "k2": (lambda d: d * d / 2, lambda d: -d),
        "k3": (lambda d: math.exp(d) - 1 - d, lambda d: 1 - math.exp(d)),
    }
    for name, (value, slope) in values.items():
        policy, other = target.clone().requires_grad_(), reference.clone().requires_grad_()
        found = module.kl_estimate(policy, other, mask, name)
        found.sum().backward()
        assert policy.grad is not None and other.grad is None
        total = [0.0, 0.0]
        for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            d = float(reference[row, column] - target[row, column])
            inside = bool(mask[row, column])
            expected = value(d) if inside else 0.0
            total[row] += expected
            assert float(found[row, column].detach()) == pytest.approx(expected)
            assert float(policy.grad[row, column]) == pytest.approx(slope(d) if inside else 0.0)
        penalised = module.kl_penalised_rewards(
            torch.tensor([1.0, 0.0]), policy, reference, mask, coefficient=0.3, estimator=name
        )
        assert penalised.tolist() == pytest.approx([1 - 0.3 * total[0], -0.3 * total[1]])
        assert not penalised.requires_grad


CHECKS = {"advantages": check_advantages, "kl": check_kl}
MUTATIONS = [("advantages", *mutation) for mutation in ADVANTAGES] + [
    ("kl", *mutation) for mutation in KL
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_code_as_it_is_passes_the_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS[name](load(monkeypatch, name))


@pytest.mark.parametrize(
    ("name", "old", "new"), MUTATIONS, ids=[f"{m}: {old} -> {new}" for m, old, new in MUTATIONS]
)
def test_a_mutant_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    mutant = load(monkeypatch, name, old, new)
    with pytest.raises(AssertionError):
        CHECKS[name](mutant)
