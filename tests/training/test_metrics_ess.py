"""The effective sample size of a step, and the learning rate that fits it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sdp_lightning.objective.effective_sample_size import effective_share, ess_scale
from sdp_lightning.training.metrics.sums import drift_moments
from support.metrics_oracle import Step, oracle


@settings(deadline=None, max_examples=60)
@given(logs=st.lists(st.floats(-15, 15), min_size=1, max_size=30))
def test_the_share_is_that_of_numpy_and_in_its_range(logs: list[float]) -> None:
    weights = np.exp(logs)
    sums = [float(len(logs)), weights.sum(), (weights**2).sum()]
    actual = float(effective_share(*torch.tensor(sums, dtype=torch.float64)))
    assert actual == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / len(logs))
    assert 1 / len(logs) <= actual + 1e-9 and actual <= 1 + 1e-9


def test_the_moments_of_the_drift_add_up_over_micro_batches() -> None:
    step = Step.random(1)
    rows = [step.select([row]) for row in range(len(step.batch))]
    moments = torch.stack([drift_moments(row.batch, row.proximal) for row in rows]).sum(0)
    assert torch.allclose(moments, drift_moments(step.batch, step.proximal))
    assert float(effective_share(*moments)) == pytest.approx(oracle(step)["ess/token"], rel=1e-5)


def test_the_scale_is_the_root_of_the_share_and_never_above_one() -> None:
    assert ess_scale(1.0) == ess_scale(1 + 1e-12) == 1.0
    assert ess_scale(0.25) == pytest.approx(0.5)
    assert ess_scale(0.2, reference=0.8) == pytest.approx(0.5)
    assert ess_scale(0.9, reference=0.8) == 1.0


def test_a_step_without_tokens_keeps_its_learning_rate() -> None:
    assert ess_scale(float(effective_share(*torch.zeros(3)))) == 1.0


@pytest.mark.parametrize(("ess", "reference"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, 2.0)])
def test_shares_out_of_range_are_refused(ess: float, reference: float) -> None:
    with pytest.raises(ValueError, match=rf"got {ess} and {reference}"):
        ess_scale(ess, reference=reference)
