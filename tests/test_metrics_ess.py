"""The effective sample size of a step, and the learning rate that fits it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdp_lightning.objective.ess import effective_share, ess_scale, weight_sums


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    level=st.sampled_from(["token", "sequence"]),
)
def test_sums_of_pieces_give_the_effective_share_of_all(seed: int, scale: float, level) -> None:
    generator = torch.Generator().manual_seed(seed)
    logs = scale * torch.randn(4, 7, generator=generator)
    mask = torch.rand(4, 7, generator=generator) < 0.6
    junk = torch.where(mask, logs, math.nan)
    parts = [weight_sums(junk[rows], mask[rows], level=level) for rows in ([0, 3], [1], [2])]
    chosen = (
        logs.double().numpy()[mask.numpy()]
        if level == "token"
        else np.asarray([logs[i][mask[i]].double().sum() for i in range(4) if mask[i].any()])
    )
    weights = np.exp(np.clip(chosen, -20, 20))
    expected = weights.sum() ** 2 / (weights**2).sum() / len(weights) if len(weights) else 1.0
    actual = effective_share(parts[0] + parts[1] + parts[2])
    assert actual == pytest.approx(expected, rel=1e-4)
    assert 0 < actual <= 1


def test_one_of_n_weights_that_outweighs_the_rest_is_worth_one_sample() -> None:
    logs = torch.zeros(1, 10)
    logs[0, 3] = 1e6
    sums = weight_sums(logs, torch.ones(1, 10, dtype=torch.bool))
    assert effective_share(sums) == pytest.approx(0.1, rel=1e-4)


def test_no_weights_leave_the_learning_rate_as_it_is() -> None:
    assert ess_scale(effective_share(torch.zeros(3, dtype=torch.float64))) == 1.0


def test_the_scale_is_the_root_of_the_share_and_never_above_one() -> None:
    assert ess_scale(1.0) == 1.0
    assert ess_scale(0.25) == pytest.approx(0.5)
    assert ess_scale(0.2, reference=0.8) == pytest.approx(0.5)
    assert ess_scale(0.9, reference=0.8) == 1.0


@pytest.mark.parametrize(("ess", "reference"), [(0.0, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, 2.0)])
def test_shares_out_of_range_are_refused(ess: float, reference: float) -> None:
    with pytest.raises(ValueError, match=rf"got {ess} and {reference}"):
        ess_scale(ess, reference=reference)
