"""Segment log-probs completed by lag and score."""

from __future__ import annotations

import math

import pytest
import torch

from sdp_lightning.objective import complete_segment_logprobs

torch.set_num_threads(1)

NAN = math.nan
COMPLETION = [
    ("behavior", [-1.0, -1.0, -3.0, -2.0, -2.0]),
    ("decoupled", [-1.0, -1.0, -3.0, -1.0, -1.0]),
    ("loglinear", [-1.0, -1.0, -3.0, -1.5, -1.75]),
]


@pytest.mark.parametrize(("missing", "expected"), COMPLETION)
def test_segment_logprobs_are_completed_by_lag_and_score(
    missing: str, expected: list[float]
) -> None:
    # Lags 0 and 1 take x even if something was scored; lag 3 has a score; lags 2 and 4 have none.
    completed = complete_segment_logprobs(
        torch.tensor([NAN, -9.0, -3.0, NAN, NAN]),
        torch.tensor([False, True, True, False, False]),
        torch.full((5,), -1.0),
        torch.full((5,), -2.0),
        torch.tensor([0, 1, 3, 2, 4]),
        missing,
    )
    assert completed.tolist() == expected


def test_completion_refuses_unscored_old_tokens_under_drop_and_only_those() -> None:
    two = torch.tensor([-1.0, -1.0])
    args = (two, torch.tensor([True, False]), two, two)
    with pytest.raises(ValueError, match="1 tokens of lag 2 or more"):
        complete_segment_logprobs(*args, torch.tensor([2, 2]), "drop")
    assert torch.equal(complete_segment_logprobs(*args, torch.tensor([2, 1]), "drop"), two)
