"""Rotary positions that depend on a row's length are those of each row alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sdp_lightning.errors import ConfigError
from sdp_lightning.training.batch import Batch, collate
from sdp_lightning.training.policy.forward import own_logprobs, sequence_logprobs
from sdp_lightning.training.policy.rotary import rotate_rows_alone
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup
from support.odd_models import odd_model

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0, 3.0, 2.0, 1.5],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
}


def rows_of(*lengths: int) -> Batch:
    rows = [
        Trajectory(
            (
                Context([3, 4 + k, 5]),
                Segment(0, [(7 * i + k) % 40 + 3 for i in range(n)], [-1.0] * n),
            )
        )
        for k, n in enumerate(lengths)
    ]
    return collate([TrajectoryGroup((row,)) for row in rows], version=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_its_own_positions_beside_longer_ones_and_after_them(kind: str) -> None:
    type_, settings = KINDS[kind]
    model = odd_model(type_, **settings)
    batch = rows_of(6, 50, 20, 13, 14)  # of 16 tokens the first, of 17 and more the others
    with torch.no_grad():
        expected = torch.zeros_like(batch.temperatures)
        for row in range(len(batch)):  # each by a model that has seen no other
            expected[row] = own_logprobs(copy.deepcopy(model), batch.select([row]))[0][0]
        mixed = sequence_logprobs(model, batch).logprobs
        assert (mixed - expected).abs().max() > 0.01, "rows do not matter here"
        rotate_rows_alone(model)
        for policy in (model, copy.deepcopy(model)):
            for _ in range(2):
                found = sequence_logprobs(policy, batch).logprobs
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_have_positions_in_common_are_refused(kind: str, layout: Any) -> None:
    type_, settings = KINDS[kind]
    model = odd_model(type_, **settings)
    with pytest.raises(ConfigError, match=f"'{type_}' takes its rotary.*'{layout}'.*'padded'"):
        sequence_logprobs(model, rows_of(6, 8), layout=layout)
