"""Proximal and segment policies interpolated on a line of log-probs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from sdp_lightning.objective import loglinear_proximal, loglinear_segment
from support.loss_cases import SEEDS, Case, untimed

torch.set_num_threads(1)


@untimed
@given(seed=SEEDS, share=st.floats(0, 0.99))
def test_loglinear_is_exact_where_log_probs_move_on_a_line(seed: int, share: float) -> None:
    case = Case.random(seed)
    generator = torch.Generator().manual_seed(seed)
    lags = torch.randint(0, 9, case.mask.shape, generator=generator)
    step = 0.1 * torch.randn(case.mask.shape, generator=generator, dtype=torch.float64)
    version = [case.behavior + k * step for k in range(11)]  # policies 0 .. 10 versions later

    def after(k: Tensor) -> Tensor:
        return torch.stack(version).gather(0, k[None])[0]

    proximal = after(lags)
    target = proximal + share * step
    expected = torch.where((lags == 0) & (torch.tensor(share) == 0), target, proximal)
    found = loglinear_proximal(target, case.behavior, lags, share)
    assert torch.allclose(found, expected, atol=1e-12)
    first_after = torch.where(lags == 0, proximal, after(lags.clamp(max=1)))
    assert torch.allclose(loglinear_segment(proximal, case.behavior, lags), first_after)
    assert torch.allclose(loglinear_segment(found, case.behavior, lags), first_after)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_outside_the_step_is_refused(share: float) -> None:
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=r"share_done must be in \[0, 1\), got"):
        loglinear_proximal(zero, zero, zero.long(), share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loglinear_policies_are_at_least_float32(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, dtype=dtype)
    lags = torch.ones(1, dtype=torch.long)
    expected = torch.promote_types(dtype, torch.float32)
    assert loglinear_proximal(zero, zero, lags, 0.5).dtype == expected
    assert loglinear_segment(zero, zero, lags).dtype == expected
