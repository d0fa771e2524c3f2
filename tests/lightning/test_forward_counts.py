"""How many forward passes a batch takes: what is known already is not computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.policy.forward import LogprobForward
from sdp_lightning.training.policy.score_check import ScoreCheck
from sdp_lightning.types import Trajectory
from support.steps import Batches, make_batch
from support.trainers import Recorder, make_data, make_module, make_trainer


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Forward passes, with a gradient ("trained") and without ("scored"), but those of a check."""
    count: Counter[str] = Counter()
    forward, refusals = LogprobForward.forward, ScoreCheck.refusals

    def counted(self: LogprobForward, batch: Batch, layout: Any) -> Any:
        count["trained" if torch.is_grad_enabled() else "scored"] += 1
        return forward(self, batch, layout)

    def uncounted(self: ScoreCheck, **size: int) -> Any:
        before = count.copy()
        found = refusals(self, **size)
        count.clear()
        count.update(before)
        return found

    monkeypatch.setattr(LogprobForward, "forward", counted)
    monkeypatch.setattr(ScoreCheck, "refusals", uncounted)
    return count


PADDED: dict[str, Any] = {"layout": "padded"}
UPDATES: dict[str, tuple[dict[str, Any], int, int]] = {
    # settings, passes with a gradient, and without, for a batch that fits into one micro-batch
    "one minibatch and one epoch": ({}, 1, 0),
    "two minibatches": ({"num_minibatches": 2}, 2, 1),
    "two epochs": ({"num_epochs": 2}, 2, 1),
}


@pytest.mark.parametrize("region", ["segment", "proximal", "behavior"])
@pytest.mark.parametrize(("update", "trained", "scored"), UPDATES.values(), ids=UPDATES)
def test_the_proximal_policy_takes_a_forward_only_where_several_steps_follow(
    model_folder: str,
    passes: Counter[str],
    region: Any,
    update: dict[str, Any],
    trained: int,
    scored: int,
) -> None:
    module = make_module(
        model_folder,
        loss=LossConfig(trust_region=region),
        update=UpdateConfig(max_tokens_per_microbatch=10_000, **PADDED, **update),
    )
    trainer = make_trainer(max_steps=module.update.steps_per_batch, limit_val_batches=0)
    trainer.fit(module, Batches(make_batch(model_folder)))
    assert passes == Counter({"trained": trained, "scored": scored})


class Scoring(sdp.SegmentWisePPOModule):
    """Counts the trajectories that it is asked to score."""

    num_scored = 0

    def score(self, trajectories: Sequence[Trajectory]) -> Any:
        self.num_scored += len(trajectories)
        return super().score(trajectories)


@pytest.mark.parametrize(("max_head_lag", "expected"), [(0, False), (1, False), (3, True)])
def test_segments_are_scored_only_if_a_lag_of_two_is_allowed(
    model_folder: str, passes: Counter[str], max_head_lag: int, expected: bool
) -> None:
    """With one optimizer step a batch and lags of at most 1, each token is computed once."""
    module, recorder = Scoring(model_folder, update=UpdateConfig(**PADDED)), Recorder()
    sync = sdp.WeightSyncCallback(weight_check_every=0)  # which scores a text, too
    make_trainer(sync, recorder, max_steps=6).fit(module, make_data(max_head_lag=max_head_lag))
    assert (module.num_scored > 0) is expected
    assert (passes["scored"] > 0) is expected
    assert passes["trained"] == 6
    assert {lag for lags in recorder.lags for lag in lags} <= set(range(max_head_lag + 1))
