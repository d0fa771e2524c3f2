"""Would it be noticed? Advantages and the KL to a reference, each changed in one place.

``test_loss_mutations.py`` does the same for the loss. The checks are loops over plain numbers.
"""

from __future__ import annotations

import math
import statistics
from types import ModuleType

import pytest
import torch

from support.mutated_modules import Mutation, load

GROUP, OTHERS = "advantages.group_relative_advantages", "advantages.leave_one_out_advantages"
DEVIATIONS, SHARE = "advantages._deviations", "advantages.uniform_share"
KL, PENALTY = "kl.kl_of_log_ratio", "kl.kl_penalised_rewards"
ESTIMATE, BOUNDED = "kl.kl_estimate", "kl._bounded"
MUTATIONS = [
    # swap min and max
    Mutation(DEVIATIONS, 'A.scatter_reduce(B, C, D, "amax", include_self=E)',
             'A.scatter_reduce(B, C, D, "amin", include_self=E)'),
    Mutation(GROUP, "torch.where(A == 0, 0.0, B)", "torch.where(A == 0, B, 0.0)"),
    # swap a ratio
    Mutation(DEVIATIONS, "return A, B, C", "return A, B, -C"),
    Mutation(DEVIATIONS, "A - B", "-A + B"),
    Mutation(OTHERS, "A / (A - 1).clamp(min=1)", "(A - 1).clamp(min=1) / A"),
    # change the denominator
    Mutation(GROUP, "A / B", "A / (B - 1).clamp(min=1)", 1),
    Mutation(GROUP, "A / B", "A", 1),
    Mutation(GROUP, "(A - 1).clamp(min=1)", "A"),
    Mutation(GROUP, "(A - 1).clamp(min=1)", "(A + 1)"),
    Mutation(GROUP, "A if B else C", "C if B else A"),
    Mutation(GROUP, "A.sqrt() + eps", "A.sqrt()"),
    Mutation(GROUP, "A.sqrt() + eps", "A + eps"),
    Mutation(OTHERS, "A.clamp(min=1)", "A"),
    Mutation(DEVIATIONS, "A.index_add(B, C, D) / E", "A.index_add(B, C, D) / len(D)"),
    # equals are exactly 0
    Mutation(DEVIATIONS, "torch.where(A, 0.0, B)", "torch.where(A, B, B)"),
    # groups
    Mutation(GROUP, "(A + eps)[B]", "(A + eps).mean()"),
    Mutation(GROUP, "scale_by_std", "not scale_by_std"),
    Mutation(DEVIATIONS, "rewards.detach()", "rewards"),
    Mutation(SHARE, "A == 0", "A != 0"),
    # the KL
    Mutation(ESTIMATE, "A.clamp(min=LEAST_LOGPROB) - target", "target - A"),
    Mutation(KL, "return -A", "return A"),
    Mutation(KL, "A.square() / 2", "A.square()"),
    Mutation(KL, "A.square() / 2", "A.abs() / 2"),
    Mutation(KL, "A.expm1() - A", "(-A).expm1() - A"),
    Mutation(KL, "A.expm1() - A", "A.expm1() + A"),
    Mutation(KL, "A.expm1() - A", "A.exp() - A"),
    Mutation(ESTIMATE, "reference.detach()", "reference"),
    # its bounds, and its weight
    Mutation(ESTIMATE, "A.clamp(max=LARGEST_LOG_RATIO)", "A"),
    Mutation(ESTIMATE, "math.expm1(LARGEST_LOG_RATIO)", "math.exp(LARGEST_LOG_RATIO)"),
    Mutation(ESTIMATE, "-LARGEST_LOG_RATIO", "-math.inf"),
    Mutation(BOUNDED, "A.clamp(least, B)", "A"),
    Mutation(BOUNDED, "A + slope * B", "A"),
    Mutation(BOUNDED, "A.abs()", "A"),
    Mutation(ESTIMATE, "A.detach() - behavior.detach()", "behavior.detach() - A.detach()"),
    Mutation(ESTIMATE, "target.detach()", "target"),
    Mutation(ESTIMATE, "behavior.detach()", "behavior"),
    Mutation(ESTIMATE, "A.detach() + (B - B.detach())", "A + (B - B.detach())"),
    Mutation(ESTIMATE, "A.detach() + (B - B.detach())", "A.detach() + B"),
    Mutation(ESTIMATE, "weight * A", "A"),
    # mask after exp
    Mutation(ESTIMATE, "torch.where(loss_mask, A, 0.0)", "A * loss_mask", 0),
    Mutation(ESTIMATE, "torch.where(loss_mask, A, 0.0)", "A", 0),
    Mutation(ESTIMATE, "torch.where(loss_mask, A, 0.0)", "A", 1),
    # of a trajectory: the sum, not the mean, and less, not more
    Mutation(PENALTY, "A - coefficient * B", "A + coefficient * B"),
    Mutation(PENALTY, "A - coefficient * B", "A - B"),
    Mutation(PENALTY, "A.sum(-1)", "A.mean(-1)"),
    Mutation(PENALTY, "kl_estimate(behavior.detach(), reference, A, B)",
             "kl_estimate(reference.detach(), behavior, A, B)"),
    Mutation(PENALTY, "behavior.detach()", "behavior"),
]  # fmt: skip
REWARDS = [0.0, 9.0, 2.0, 0.1, 0.1, 0.1, 5.0, -1.0]
GROUPS = [7, 2, 7, 5, 5, 5, 7, 7]


def check_advantages(module: ModuleType) -> None:
    """Raise AssertionError unless the advantages are those of a loop over groups."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor(GROUPS)
    scaled = module.group_relative_advantages(rewards, ids, eps=0.5)
    sample = module.group_relative_advantages(rewards, ids, std="sample", eps=0.5)
    plain = module.group_relative_advantages(rewards, ids, scale_by_std=False)
    others = module.leave_one_out_advantages(rewards, ids)
    assert float(module.uniform_share(rewards, ids)) == pytest.approx(2 / 3)  # groups 5 and 2
    assert not any(found.requires_grad for found in (scaled, sample, plain, others))
    for row, (reward, group) in enumerate(zip(REWARDS, GROUPS, strict=True)):
        own = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]
        if len(set(own)) == 1:
            assert scaled[row] == sample[row] == plain[row] == others[row] == 0
            continue
        distance = reward - statistics.mean(own)
        rest = (sum(own) - reward) / (len(own) - 1)
        assert float(plain[row]) == pytest.approx(distance)
        assert float(scaled[row]) == pytest.approx(distance / (statistics.pstdev(own) + 0.5))
        assert float(sample[row]) == pytest.approx(distance / (statistics.stdev(own) + 0.5))
        assert float(others[row]) == pytest.approx(reward - rest)


def check_kl(module: ModuleType) -> None:
    """Raise AssertionError unless values and gradients are those of numbers, one by one."""
    target = torch.tensor(
        [[-1.0, -3.0, math.nan, -9.0], [-0.5, math.inf, -2.0, -7.0]], dtype=torch.float64
    )
    reference = torch.tensor(
        [[-9.5, -2.0, 0.0, -1.0], [-0.75, 0.0, -0.5, -1.0]], dtype=torch.float64
    )
    sampler = torch.tensor(
        [[-1.2, -2.0, 0.0, -9.5], [-8.0, math.nan, -1.5, -7.0]], dtype=torch.float64
    )
    mask = target.isfinite()

    def k3(d: float) -> float:
        near = min(d, 6.0)
        return math.exp(near) - 1 - near + math.expm1(6) * (d - near)

    def k2(d: float) -> float:
        near = max(-6.0, min(d, 6.0))
        return near * near / 2 + 6 * abs(d - near)

    values = {
        "k1": (lambda d: -d, lambda d: 1.0),
        "k2": (k2, lambda d: -max(-6.0, min(d, 6.0))),
        "k3": (k3, lambda d: 1 - math.exp(min(d, 6.0))),
        "weighted_k3": (k3, lambda d: -d),
    }
    for name, (value, slope) in values.items():
        policy, other, own = (
            tensor.clone().requires_grad_() for tensor in (target, reference, sampler)
        )
        found = module.kl_estimate(policy, other, mask, name, behavior=own)
        found.sum().backward()
        assert policy.grad is not None and other.grad is own.grad is None
        total = [0.0, 0.0]
        for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
            d = float(reference[row, column] - target[row, column])
            move = float(target[row, column] - sampler[row, column])
            weight = min(math.exp(move), math.exp(6)) if name == "weighted_k3" else 1.0
            inside = bool(mask[row, column])
            expected = weight * value(d) if inside else 0.0
            total[row] += expected
            assert float(found[row, column].detach()) == pytest.approx(expected)
            assert float(policy.grad[row, column]) == pytest.approx(
                weight * slope(d) if inside else 0.0
            )
        if name == "weighted_k3":
            continue
        penalised = module.kl_penalised_rewards(
            torch.tensor([1.0, 0.0]), policy, reference, mask, coefficient=0.3, estimator=name
        )
        assert penalised.tolist() == pytest.approx([1 - 0.3 * total[0], -0.3 * total[1]])
        assert not penalised.requires_grad


CHECKS = {"advantages": check_advantages, "kl": check_kl}


@pytest.mark.parametrize("name", CHECKS)
def test_the_code_as_it_is_passes_the_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS[name](load(monkeypatch, name))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutant_is_caught(monkeypatch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    mutant = load(monkeypatch, mutation.module, mutation)
    with pytest.raises(AssertionError):
        CHECKS[mutation.module](mutant)
