"""The second-moment bound of M2PO."""

from __future__ import annotations

import math

import torch
from hypothesis import given, strategies as st

from sdp_lightning.objective import second_moment_bound, second_moment_set, within_second_moment
from support.loss_cases import SEEDS, Case, untimed

torch.set_num_threads(1)


@untimed
@given(
    drifts=st.lists(st.sampled_from([0.0, 0.1, -0.1, 0.2, -0.5, 1.0, 3.0]), max_size=12),
    cap=st.sampled_from([0.001, 0.01, 0.04, 0.3, 20.0]),
)
def test_the_second_moment_bound_keeps_the_most_tokens_that_fit(
    drifts: list[float], cap: float
) -> None:
    values = torch.tensor(drifts, dtype=torch.float64)
    bound = float(second_moment_bound(values, cap))

    def moment(limit: float) -> float:
        kept = [d * d for d in drifts if abs(d) <= limit]
        return sum(kept) / len(kept) if kept else 0.0

    if not drifts:
        assert bound == math.inf
        return
    fitting = [abs(d) for d in drifts if moment(abs(d)) <= cap]
    assert bound == max(fitting, default=0.0)


@untimed
@given(seed=SEEDS, junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_m2po_does_not_look_at_masked_positions(seed: int, junk: float) -> None:
    case = Case.random(seed)
    dirty = case.with_junk(junk)
    sets = [second_moment_set(c.proximal - c.behavior, c.advantages, c.mask) for c in (case, dirty)]
    assert torch.equal(*sets)
    bound = second_moment_bound((case.proximal - case.behavior)[sets[0]], 0.1)
    left = [
        within_second_moment(c.proximal - c.behavior, c.advantages, c.mask, bound)
        for c in (case, dirty)
    ]
    assert torch.equal(*left)
    assert not (left[0] & ~case.mask).any()
