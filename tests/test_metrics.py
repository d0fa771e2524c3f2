"""Statistics of a step, against plain loops; sums over micro-batches and ranks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdp_lightning.batch import Batch
from sdp_lightning.config import LossConfig
from sdp_lightning.metrics import LagMetrics
from sdp_lightning.objective import PolicyLoss, segment_wise_ppo_loss

torch.set_num_threads(1)
VERSION = 7
NAMES = {
    *("lag/mean", "lag/max", "lag/share_0", "lag/share_1", "lag/share_2", "lag/share_3"),
    *("lag/share_4plus", "loss/behavior_weight", "loss/clip_fraction", "loss/rejected_fraction"),
    *("loss/entropy", "bridge/abs_log_mean", "bridge/abs_log_p95", "bridge/approximated_share"),
    *("drift/abs_log_mean", "drift/k1"),
    *(f"bridge/abs_log_{kind}_{lag}" for kind in ("mean", "p95") for lag in ("2", "3", "4plus")),
}


@dataclasses.dataclass
class Step:
    """What ``update`` takes."""

    batch: Batch
    proximal: Tensor
    segment: Tensor
    entropy: Tensor
    advantages: Tensor
    target: Tensor

    @classmethod
    def random(cls, seed: int, rows: int = 4, columns: int = 9) -> Step:
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, columns)

        def normal(scale: float) -> Tensor:
            return scale * torch.randn(shape, generator=generator)

        mask = torch.rand(shape, generator=generator) < 0.7
        mask[0, 1] = True
        behavior = -2 + normal(0.5)
        zeros = torch.zeros(rows, dtype=torch.long)
        batch = Batch(
            version=VERSION,
            input_ids=torch.zeros(shape, dtype=torch.long),
            position_ids=torch.zeros(shape, dtype=torch.long),
            lengths=zeros + columns,
            loss_mask=mask,
            versions=torch.randint(0, VERSION + 1, shape, generator=generator),
            behavior_logprobs=behavior,
            segment_logprobs=behavior,
            segment_scored=torch.rand(shape, generator=generator) < 0.5,
            temperatures=torch.ones(shape),
            rewards=torch.zeros(rows),
            group_ids=zeros,
            truncated=zeros.bool(),
        )
        proximal = behavior + normal(0.8)
        return cls(
            batch=batch,
            proximal=proximal,
            segment=proximal + normal(0.3),
            entropy=normal(1.0).abs(),
            advantages=normal(1.0),
            target=proximal + normal(0.2),
        )

    def select(self, rows: list[int]) -> Step:
        tensors = (self.proximal, self.segment, self.entropy, self.advantages, self.target)
        return Step(self.batch.select(rows), *(tensor[rows] for tensor in tensors))

    def loss(self) -> PolicyLoss:
        return segment_wise_ppo_loss(
            self.target,
            self.proximal,
            self.segment,
            self.batch.behavior_logprobs,
            self.advantages,
            self.batch.loss_mask,
            config=LossConfig(behavior_weight_cap=2.0),
        )

    def add_to(self, metrics: LagMetrics) -> None:
        metrics.update(self.batch, self.loss(), self.proximal, self.segment, self.entropy)


def computed(*steps: Step) -> dict[str, float]:
    metrics = LagMetrics()
    for step in steps:
        step.add_to(metrics)
    return {name: float(value) for name, value in metrics.compute().items()}


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def percentile(values: list[float]) -> float:
    return values[math.ceil(0.95 * len(values)) - 1] if values else 0.0


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_agrees_with_a_loop_over_tokens(seed: int) -> None:
    step = Step.random(seed)
    loss = step.loss()
    tokens = [tuple(place) for place in step.batch.loss_mask.nonzero().tolist()]
    kept = [at for at in tokens if loss.kept[at]]
    lags = {at: VERSION - int(step.batch.versions[at]) for at in tokens}
    known = [at for at in tokens if lags[at] <= 1 or step.batch.segment_scored[at]]
    drift = {at: float(step.proximal[at] - step.batch.behavior_logprobs[at]) for at in tokens}
    bridge = sorted(abs(float(step.proximal[at] - step.segment[at])) for at in known)
    expected = {
        "lag/mean": mean([float(lag) for lag in lags.values()]),
        "lag/max": max(lags.values()),
        **{f"lag/share_{k}": mean([float(lag == k) for lag in lags.values()]) for k in range(4)},
        "lag/share_4plus": mean([float(lag >= 4) for lag in lags.values()]),
        "loss/behavior_weight": mean([math.exp(loss.log_weight[at]) for at in kept]),
        "loss/clip_fraction": mean([float(loss.clipped[at]) for at in kept]),
        "loss/rejected_fraction": 1 - len(kept) / len(tokens),
        "loss/entropy": mean([float(step.entropy[at]) for at in tokens]),
        "bridge/abs_log_mean": mean(bridge),
        "bridge/approximated_share": 1 - len(known) / len(tokens),
        "drift/abs_log_mean": mean([abs(value) for value in drift.values()]),
        "drift/k1": -mean(list(drift.values())),
    }
    actual = computed(step)
    assert set(actual) == NAMES
    exact = {"bridge/abs_log_p95": percentile(bridge)}
    for lag, name in ((2, "2"), (3, "3"), (4, "4plus")):
        at_lag = [at for at in known if min(lags[at], 4) == lag]
        of_lag = sorted(abs(float(step.proximal[at] - step.segment[at])) for at in at_lag)
        expected[f"bridge/abs_log_mean_{name}"] = mean(of_lag)
        exact[f"bridge/abs_log_p95_{name}"] = percentile(of_lag)
    binned = {name: actual.pop(name) for name in exact}
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert binned == pytest.approx(exact, rel=0.04, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_microbatches_add_up_to_the_whole(seed: int) -> None:
    step = Step.random(seed)
    parts = [step.select([2]), step.select([0, 3]), step.select([1])]
    assert computed(*parts) == pytest.approx(computed(step), rel=1e-5, abs=1e-7)


def test_sums_and_the_maximum_reduce_over_ranks_to_the_whole() -> None:
    step = Step.random(1)
    ranks = [LagMetrics(), LagMetrics()]
    step.select([0, 1]).add_to(ranks[0])
    step.select([2, 3]).add_to(ranks[1])
    merged = LagMetrics()
    merged.update(step.batch.idle(), step.select([0]).loss(), *[step.proximal[:1]] * 3)
    merged.reset()
    for name, reduce in merged._reductions.items():
        states = torch.stack([getattr(rank, name) for rank in ranks])
        setattr(merged, name, reduce(states))
    whole = LagMetrics()
    step.add_to(whole)
    for name in whole._reductions:
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), junk=st.sampled_from([math.nan, math.inf, -200.0]))
def test_padding_does_not_leak_into_statistics(seed: int, junk: float) -> None:
    step = Step.random(seed)
    mask = step.batch.loss_mask
    dirty = dataclasses.replace(
        step,
        batch=dataclasses.replace(
            step.batch,
            behavior_logprobs=torch.where(mask, step.batch.behavior_logprobs, junk),
            versions=torch.where(mask, step.batch.versions, -1),
            segment_scored=torch.ones_like(mask) & (step.batch.segment_scored | ~mask),
        ),
        proximal=torch.where(mask, step.proximal, junk),
        segment=torch.where(mask, step.segment, junk),
        entropy=torch.where(mask, step.entropy, junk),
    )
    assert computed(dirty) == pytest.approx(computed(step))


def test_nothing_to_learn_gives_zeros() -> None:
    step = Step.random(0).select([0])
    step.batch = step.batch.idle()
    assert set(computed(step).values()) == {0.0}


def test_reset_forgets() -> None:
    metrics = LagMetrics()
    Step.random(0).add_to(metrics)
    metrics.reset()
    Step.random(1).add_to(metrics)
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == computed(Step.random(1))


def test_the_percentile_is_of_the_histogram_over_eight_decades() -> None:
    step = Step.random(0)
    step.batch = dataclasses.replace(
        step.batch,
        loss_mask=torch.ones_like(step.batch.loss_mask),
        segment_scored=torch.ones_like(step.batch.loss_mask),
    )
    for size in (1e-7, 3e-6, 1e-3, 0.7, 40.0, 1e4):
        step.segment = step.proximal + size
        step.proximal, step.segment = torch.zeros_like(step.proximal), step.segment * 0 + size
        expected = 0.0 if size < 1e-6 else min(size, 103.7)
        assert computed(step)["bridge/abs_log_p95"] == pytest.approx(expected, rel=0.04)


def test_states_stay_exact_when_the_module_around_them_is_cast_to_half() -> None:
    metrics = LagMetrics()
    metrics.bfloat16()
    Step.random(0).add_to(metrics)
    assert metrics.sums.dtype == torch.float64
    assert {value.dtype for value in metrics.compute().values()} == {torch.float32}
