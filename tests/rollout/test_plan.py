"""Plans for a number of GPUs: which are tried, which is the best, and none is missed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdp_lightning.config import RolloutConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.rollout.simulation.models import EngineModel, Lengths, TrainerModel
from sdp_lightning.rollout.simulation.plan import NEAR, Plans, Pool, make_plans, spread
from sdp_lightning.rollout.simulation.simulate import simulate
from sdp_lightning.rollout.simulation.summary import summarize

CONFIG = RolloutConfig(batch_size=4, max_head_lag=1)
LENGTHS = Lengths.lognormal(median=50, p95=200, maximum=500, group_size=2)
TRAINER = TrainerModel(0.01, stage_s=0.1, load_s=0.2)
REPLICA = EngineModel(1, 0.05, 0.002)


def pool(**settings: Any) -> Pool:
    values: dict[str, Any] = {"num_gpus": 6, "replica": REPLICA}
    return Pool(**(values | {"trainer": TRAINER} | settings))


@pytest.fixture(scope="module")
def plans() -> Plans:
    return make_plans(pool(), CONFIG, LENGTHS, num_steps=8, warmup=3)


def test_every_plan_that_could_be_the_best_is_simulated_as_it_says(plans: Plans) -> None:
    """The sweep without any bound, split by split, finds nothing better than the one with it."""
    every: dict[tuple[int, int], float] = {}
    for replicas in range(1, 6):
        engines = replace(REPLICA, num_replicas=replicas)
        trainer = replace(TRAINER, token_s=0.01 / (6 - replicas))
        for groups in (2, 4, 6, 8):
            config = replace(CONFIG, max_concurrent=groups)
            steps = simulate(config, engines, trainer, LENGTHS, num_steps=8)
            summary = summarize(steps, config, engines, warmup=3)
            every[replicas, groups] = summary.tokens_per_s
    tried = {
        (plan.sample_gpus, plan.max_concurrent): plan.summary.tokens_per_s for plan in plans.plans
    }
    assert tried.items() <= every.items() and len(tried) + plans.num_skipped == len(every) == 20
    assert 0 < plans.num_skipped < 20
    fastest = max(every.values())
    assert max(tried.values()) == fastest
    assert {at for at, speed in every.items() if speed >= (1 - NEAR) * fastest} <= set(tried)
    assert list(tried.values()) == sorted(tried.values(), reverse=True)
    assert all(plan.sample_gpus + plan.train_gpus == 6 for plan in plans.plans)


def test_the_best_plan_is_the_least_stale_of_those_that_are_about_as_fast(
    plans: Plans,
) -> None:
    least = (1 - NEAR) * plans.plans[0].summary.tokens_per_s
    near = [plan.summary for plan in plans.plans if plan.summary.tokens_per_s >= least]
    assert plans.best.summary.tokens_per_s >= least and len(near) > 1
    assert plans.best.summary.mean_lag == min(summary.mean_lag for summary in near)
    assert plans.best is not plans.plans[0]


def test_a_concurrency_that_was_given_is_the_only_one() -> None:
    config = replace(CONFIG, max_concurrent=3)
    told: list[tuple[int, int]] = []
    plans = make_plans(
        pool(num_gpus=3),
        config,
        LENGTHS,
        num_steps=5,
        warmup=2,
        on_plan=lambda *at: told.append(at),
    )
    assert {plan.max_concurrent for plan in plans.plans} == {3} and told == [(0, 2), (1, 2)]


def test_gpus_are_split_into_whole_replicas_and_a_trainer_that_gets_the_rest() -> None:
    split = pool(num_gpus=21, replica_gpus=4, least_train_gpus=8, trainer_gpus=2)
    assert split.most_replicas == 3
    engines, trainer = split.split(2)
    assert engines == replace(REPLICA, num_replicas=2)
    assert trainer == replace(TRAINER, token_s=0.01 * 2 / 13)
    assert spread(3) == [1, 2, 3]
    assert len(spread(1250)) == 16 and spread(1250)[0] == 1 and spread(1250)[-1] == 1250
    with pytest.raises(ConfigError, match="8 GPUs hold no replica of 8 beside 1"):
        pool(num_gpus=8, replica_gpus=8)
    with pytest.raises(ConfigError, match="num_gpus"):
        pool(num_gpus=0)
