"""Estimates of the KL to a reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sdp_lightning.objective.kl import kl_estimate, kl_penalised_rewards

untimed = settings(deadline=None)
ESTIMATORS = ("k1", "k2", "k3")  # of tokens that are not weighted
MASK = torch.tensor([[False, True, True], [False, True, False]])


def test_worked_out_by_hand() -> None:
    # n - ref: 0.5, -1, 0.25; k2 is its half square, k3 is exp(ref - n) - 1 - (ref - n).
    target = torch.tensor([[9.0, -1.0, -3.0], [9.0, -0.5, 9.0]], dtype=torch.float64)
    reference = torch.tensor([[0.0, -1.5, -2.0], [0.0, -0.75, 0.0]], dtype=torch.float64)
    k1, k2, k3 = (kl_estimate(target, reference, MASK, name) for name in ESTIMATORS)  # type: ignore
    assert k1.tolist() == [[0, 0.5, -1], [0, 0.25, 0]]
    assert k2.tolist() == [[0, 0.125, 0.5], [0, 0.03125, 0]]
    assert k3[0, 1] == pytest.approx(2.718281828**-0.5 - 1 + 0.5)
    assert k3[0, 2] == pytest.approx(2.718281828 - 2)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "weighted_k3"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), -1e4])
def test_junk_outside_the_mask_reaches_neither_value_nor_gradient(
    estimator: Any, junk: float
) -> None:
    target = torch.where(MASK, torch.full((2, 3), -1.0), junk).requires_grad_()
    reference = torch.where(MASK, torch.full((2, 3), -1.5), -junk)
    behavior = torch.where(MASK, torch.full((2, 3), -0.9), -junk)
    kl = kl_estimate(target, reference, MASK, estimator, behavior=behavior)
    kl.sum().backward()
    assert kl.isfinite().all() and target.grad is not None and target.grad.isfinite().all()
    assert not kl[~MASK].any() and not target.grad[~MASK].any() and kl[MASK].all()


@untimed
@given(logits=st.lists(st.tuples(*[st.floats(-2, 2)] * 3), min_size=2, max_size=6))
def test_means_over_the_sampled_tokens_are_the_kl_and_gradients_those_of_the_docstring(
    logits: list[tuple[float, float, float]],
) -> None:
    free, other, third = torch.tensor(logits, dtype=torch.float64).unbind(1)
    n = free.requires_grad_().log_softmax(0)
    ref, b = other.log_softmax(0), third.log_softmax(0)
    p = n.detach().exp()
    exact = float((p * (n.detach() - ref)).sum())
    whole = torch.ones(1, len(logits), dtype=torch.bool)

    def mean(estimator: Any) -> torch.Tensor:
        return (p * kl_estimate(n[None], ref[None], whole, estimator)[0]).sum()

    assert float(mean("k1").detach()) == pytest.approx(exact, abs=1e-9)
    assert float(mean("k3").detach()) == pytest.approx(exact, abs=1e-9)
    assert min(float(mean(k).detach()) for k in ("k2", "k3")) >= -1e-12
    slope = {k: torch.autograd.grad(mean(k), free, retain_graph=True)[0] for k in ESTIMATORS}
    (forward,) = torch.autograd.grad((n.exp() * (n - ref)).sum(), free, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - n)).sum(), free, retain_graph=True)
    assert torch.allclose(slope["k2"], forward, atol=1e-9)
    assert torch.allclose(slope["k3"], reverse, atol=1e-9)
    assert slope["k1"].abs().max() < 1e-9
    weighted = kl_estimate(n[None], ref[None], whole, "weighted_k3", behavior=b[None])[0]
    mean_of_b = (b.exp() * weighted).sum()  # tokens are the behavior policy's
    assert float(mean_of_b.detach()) == pytest.approx(exact, abs=1e-9)
    assert torch.allclose(torch.autograd.grad(mean_of_b, free)[0], forward, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards_are_less_by_the_sum_over_a_trajectory(estimator: Any) -> None:
    behavior, reference = torch.full((2, 3), -1.0), torch.full((2, 3), -1.5)
    kl = kl_estimate(behavior, reference, MASK, estimator)
    rewards = torch.tensor([1.0, 0.0])
    found = kl_penalised_rewards(
        rewards, behavior, reference, MASK, coefficient=0.3, estimator=estimator
    )
    assert found.tolist() == pytest.approx((rewards - 0.3 * kl.sum(1)).tolist())
    assert found[0] < 1.0 and found.dtype == torch.float32
