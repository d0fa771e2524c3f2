"""Statistics of a step, against NumPy on all tokens; sums over micro-batches and ranks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sdp_lightning.training.metrics import FAMILIES, LagMetrics, all_names
from support.metrics_oracle import Step, assert_agree, computed, oracle, with_outlier

torch.set_num_threads(1)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), drift=st.sampled_from([0.0, 0.02, 0.8, 8.0]))
def test_agrees_with_numpy_on_all_tokens(seed: int, drift: float) -> None:
    step = Step.random(seed, drift=drift)
    assert_agree(computed(step), oracle(step))


@pytest.mark.parametrize("size", [60.0, -60.0, 500.0])
def test_one_far_token_is_clamped_and_counted(size: float) -> None:
    step = with_outlier(Step.random(3), size)
    actual = computed(step)
    assert_agree(actual, oracle(step))
    assert all(map(math.isfinite, actual.values()))
    assert actual["drift/clamped_share"] == pytest.approx(1 / step.batch.num_tokens)
    assert actual["ess/clamped_sequences"] > 0
    assert actual["drift/k1"] * size < 0


def test_equal_policies_have_the_whole_sample_and_no_divergence() -> None:
    step = Step.random(4)
    step.proximal = step.batch.behavior_logprobs
    actual = computed(step)
    for name in ("ess/token", "ess/sequence", "ess/token_4plus", "ess/sequence_2"):
        assert actual[name] == 1
    for name in ("drift/k1", "drift/k3", "drift/chi2", "drift/abs_log_p99", "mismatch/k1"):
        assert actual[name] == 0


def test_names_are_documented_and_unique() -> None:
    names = all_names()
    assert list(computed(Step.random(0))) == names
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        stem, _, end = family.name.rpartition("_")
        assert f"``{family.name}``" in LagMetrics.__doc__ or (
            f"``{stem}_mean``" in LagMetrics.__doc__ and f"``_{end}``" in LagMetrics.__doc__
        ), f"{family.name} is not in the docstring"


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_microbatches_add_up_to_the_whole(seed: int) -> None:
    step = Step.random(seed)
    parts = [step.select([2]), step.select([0, 3]), step.select([1])]
    assert computed(*parts) == pytest.approx(computed(step), rel=1e-5, abs=1e-7)
    assert_agree(computed(*parts), oracle(*parts))


def test_sums_and_the_maximum_reduce_over_ranks_to_the_whole() -> None:
    step = Step.random(1)
    ranks = [LagMetrics(), LagMetrics()]
    step.select([0, 1]).add_to(ranks[0])
    step.select([2, 3]).add_to(ranks[1])
    merged = LagMetrics()
    step.select([0]).add_to(merged)
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
