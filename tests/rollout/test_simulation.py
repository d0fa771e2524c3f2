"""A run on a virtual clock: exact where a closed form exists, and the real executor throughout."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sdp_lightning.config import RolloutConfig
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rollout.simulation.models import EngineModel, Lengths, TrainerModel
from sdp_lightning.rollout.simulation.simulate import SimulatedStep, simulate
from sdp_lightning.rollout.simulation.summary import most_tokens_per_s, summarize
from sdp_lightning.rollout.simulation.virtual_loop import VirtualLoop
from sdp_lightning.rollout.task_runner import AsyncTaskRunner


def rollout(**settings: Any) -> RolloutConfig:
    return RolloutConfig(**({"batch_size": 2, "shuffle": False} | settings))


def equal(tokens: int, group_size: int, *, prompt_tokens: int = 0) -> Lengths:
    return Lengths.recorded([[tokens] * group_size], prompt_tokens=prompt_tokens)


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=1e-9)


# Closed forms -------------------------------------------------------------------------------------


def test_an_on_policy_step_is_the_sum_of_its_parts() -> None:
    """Two groups of two rows, each on a replica of its own.

    Prefill 50 * 1e-4 = 0.005 s, 100 passes of 0.01 + 2 * 0.001 s = 1.2 s, the reward 0.05 s, the
    step 0.1 + 400 * 0.001 = 0.5 s, the publish 0.2 + 0.3 s.
    """
    steps = simulate(
        rollout(max_head_lag=0),
        EngineModel(2, 0.01, 0.001, prefill_token_s=1e-4, recompute_kv=True),
        TrainerModel(0.001, step_s=0.1, stage_s=0.2, load_s=0.3),
        equal(100, 2, prompt_tokens=50),
        num_steps=5,
        reward_s=0.05,
    )
    assert [step.step_s for step in steps] == [exactly(1.205 + 0.05 + 0.5 + 0.5)] * 5
    assert all(step.tokens == {0: 400} and step.publish_s == exactly(0.5) for step in steps)
    idle = summarize(steps, rollout(), EngineModel(2, 0.01), warmup=0).engine_idle_share
    assert idle == exactly(1 - 1.205 / 2.255)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bound", [1, 2, 5])
def test_a_full_queue_has_the_lag_of_its_bound_and_the_step_of_its_trainer(
    bound: int, overlap: bool
) -> None:
    """Fault: more groups are born than ``max_head_lag`` allows, or fewer."""
    config = rollout(max_head_lag=bound, overlap_publish=overlap)
    trainer = TrainerModel(0.0, step_s=10.0, stage_s=1.0, load_s=2.0)
    steps = simulate(config, EngineModel(4, 1e-4), trainer, equal(10, 2), num_steps=bound + 6)
    full = steps[bound:]  # until then batches are of the first version
    assert all(step.tokens == {bound: 40} and step.wait_s == 0 for step in full)
    assert [step.step_s for step in full] == [exactly(11.0 if overlap else 13.0)] * 6
    assert steps[-1].pending == (bound + 1) * 2
    summary = summarize(steps, config, EngineModel(4, 1e-4), warmup=bound)
    assert summary.mean_lag == bound and summary.lag_shares == {bound: 1.0}


def test_a_load_that_outlasts_the_step_beside_it_holds_up_the_next_publish() -> None:
    """The trainer is one version ahead at most: it trains 10 s, waits 10 s, stages 1 s."""
    config = rollout(max_head_lag=3, overlap_publish=True)
    trainer = TrainerModel(0.0, step_s=10.0, stage_s=1.0, load_s=20.0)
    steps = simulate(config, EngineModel(4, 1e-4), trainer, equal(10, 2), num_steps=9)
    assert [step.step_s for step in steps[3:]] == [exactly(21.0)] * 6
    assert steps[-1].publish_s == exactly(11.0)


@pytest.mark.parametrize(("load_s", "overlap"), [(0.0, False), (3.0, False), (3.0, True)])
def test_a_step_that_waits_for_tokens_lasts_as_long_as_they_are_sampled(
    load_s: float, overlap: bool
) -> None:
    """100 passes of 0.01 + 4 * 0.01 s sample a batch: 5 s, and 3 s more if a load is between."""
    config = rollout(max_head_lag=1, max_concurrent=2, overlap_publish=overlap)
    engines = EngineModel(1, 0.01, 0.01)
    trainer = TrainerModel(0.001, stage_s=0.5, load_s=load_s)
    steps = simulate(config, engines, trainer, equal(100, 2), num_steps=8)
    assert [step.step_s for step in steps[2:]] == [exactly(5.0 + load_s)] * 6
    assert steps[-1].publish_s == exactly(0.5 + (0.0 if overlap else load_s))
    if not load_s:  # sampling never pauses: nothing trains more tokens a second
        speed = summarize(steps, config, engines, warmup=2).tokens_per_s
        assert speed == exactly(most_tokens_per_s(config, engines, trainer, equal(100, 2)))


@pytest.mark.parametrize(
    ("lengths", "max_rows", "seconds"),
    [
        ([4, 4], 2, 4 * 3),  # both at once, a pass takes 1 + 2 * 1 s
        ([4, 4], 1, 2 * 4 * 2),  # one after the other
        ([2, 4], 2, 2 * 3 + 2 * 2),  # the second one alone after the first has ended
        ([2, 4, 3], 2, 2 * 3 + 2 * 3 + 1 * 2),  # the third takes the place of the first
    ],
)
def test_rows_share_a_pass(lengths: list[int], max_rows: int, seconds: float) -> None:
    steps = simulate(
        rollout(batch_size=1, max_head_lag=0),
        EngineModel(1, 1.0, 1.0, max_rows=max_rows),
        TrainerModel(0.0, step_s=7.0),
        Lengths.recorded([lengths]),
        num_steps=3,
    )
    assert [step.step_s for step in steps] == [exactly(seconds + 7.0)] * 3
    assert steps[-1].generated == 3 * sum(lengths)


@pytest.mark.parametrize(
    ("recompute", "load_s", "step_s"), [(False, 0.0, 10.4), (False, 1.0, 11.4), (True, 1.0, 12.3)]
)
def test_a_group_that_a_publish_meets_has_tokens_of_both_versions(
    recompute: bool, load_s: float, step_s: float
) -> None:
    """One row at a time: 4 * 0.1 s of prefill, 10 passes of 1 s; the publish comes 5.4 s after its
    start, after 5 tokens. To compute those and the prompt again takes 9 * 0.1 s.
    """
    steps = simulate(
        rollout(batch_size=1, max_head_lag=2, max_concurrent=1),
        EngineModel(1, 1.0, prefill_token_s=0.1, recompute_kv=recompute),
        TrainerModel(0.0, step_s=5.4, load_s=load_s),
        equal(10, 1, prompt_tokens=4),
        num_steps=6,
    )
    assert [step.tokens for step in steps] == [{0: 10}] + [{0: 5, 1: 5}] * 5
    assert [step.step_s for step in steps[1:]] == [exactly(step_s)] * 5


# The real executor --------------------------------------------------------------------------------

HEAVY = Lengths.lognormal(median=50, p95=400, maximum=2000, group_size=4, seed=3)
FEW, SLOW = EngineModel(2, 0.02, 0.001, max_rows=16), TrainerModel(0.001, load_s=0.5)


def heavy(lengths: Lengths = HEAVY, **settings: Any) -> list[SimulatedStep]:
    config = rollout(**({"batch_size": 4, "max_head_lag": 1} | settings))
    return simulate(config, FEW, SLOW, lengths, num_steps=25)


def lags(steps: list[SimulatedStep]) -> set[int]:
    return {lag for step in steps for lag in step.tokens}


def test_what_becomes_of_long_rollouts_is_what_the_executor_does_with_them() -> None:
    drop, wait, mask = (heavy(on_overdue=way) for way in ("drop", "wait", "mask"))
    free = heavy(enable_segment_wise_ppo=False)
    assert lags(drop) == lags(wait) == {0, 1}
    assert max(lags(mask)) > 1 and max(lags(free)) > 1
    assert drop[-1].dropped_groups > 0 and drop[-1].dropped > 0
    assert wait[-1].dropped == free[-1].dropped == 0
    masked = summarize(mask, rollout(on_overdue="mask", max_head_lag=1), FEW, warmup=2)
    assert masked.masked_share > 0 and set(masked.lag_shares) == {0, 1}
    assert drop[-1].end_s < wait[-1].end_s  # waiting for stragglers costs time
    long = [sum(step.num_tokens for step in steps) for steps in (drop, wait)]
    assert long[0] < long[1]  # and dropping them makes batches shorter
    config = rollout(batch_size=4, max_head_lag=1)
    ratios = [summarize(steps, config, FEW, warmup=2).length_ratio for steps in (drop, wait)]
    assert ratios[0] < 1 and ratios[1] == 1
    for steps in (drop, wait, mask, free):
        trained = sum(step.num_tokens for step in steps)
        alive = steps[-1].generated - trained - steps[-1].dropped
        largest = sorted(sum(HEAVY.of(number)) for number in range(200))[-8:]
        assert 0 <= alive <= sum(largest)  # (max_head_lag + 1) * batch_size groups at most
    assert heavy(requeue_dropped=True) != drop


def test_no_run_beats_the_bound() -> None:
    for settings in ({"max_concurrent": 3}, {}, {"max_head_lag": 3}, {"overlap_publish": True}):
        config = rollout(batch_size=4, **({"max_head_lag": 1} | settings))
        steps = heavy(**settings)
        rows = config.concurrency * HEAVY.group_size
        assert steps[-1].generated <= FEW.tokens_per_s(rows) * steps[-1].end_s
        assert all(step.step_s >= SLOW.train_s(step.num_tokens) for step in steps)


def test_a_run_is_repeated_exactly_and_another_seed_is_another_run() -> None:
    assert heavy() == heavy()
    other = Lengths.lognormal(median=50, p95=400, maximum=2000, group_size=4, seed=4)
    assert heavy(other) != heavy()


def test_the_concurrency_that_tunes_itself_is_measured_in_virtual_time() -> None:
    """With 1 s a pass and nothing for a row, every group more at once costs nothing."""
    config = rollout(batch_size=2, max_head_lag=3, max_concurrent="auto")
    engines, trainer = EngineModel(1, 1.0), TrainerModel(0.0, step_s=1.0)
    steps = simulate(config, engines, trainer, equal(10, 2), num_steps=40)
    assert steps[0].concurrency == 2 and steps[-1].concurrency > 4
    assert steps[-1].end_s - steps[-9].end_s < steps[8].end_s - steps[0].end_s


# Models and seams ---------------------------------------------------------------------------------


def test_lognormal_lengths_have_the_percentiles_that_were_asked_for() -> None:
    lengths = Lengths.lognormal(median=100, p95=800, maximum=10**9, group_size=4)
    drawn = sorted(n for number in range(5000) for n in lengths.of(number))
    assert drawn[len(drawn) // 2] == pytest.approx(100, rel=0.05)
    assert drawn[len(drawn) * 95 // 100] == pytest.approx(800, rel=0.05)
    # exp(mu + sigma^2 / 2) with mu = ln 100 and sigma = ln 8 / 1.645
    assert lengths.mean_tokens == pytest.approx(4 * 222.3, rel=0.03)
    cut = Lengths.lognormal(median=100, p95=800, maximum=150, group_size=4)
    assert max(n for number in range(100) for n in cut.of(number)) == 150


def test_recorded_lengths_are_whole_groups() -> None:
    groups = [(1, 2), (30, 40), (500,)]
    lengths = Lengths.recorded(groups, seed=1)
    assert {tuple(lengths.of(number)) for number in range(50)} == set(groups)
    assert lengths.mean_tokens == exactly(573 / 3) and lengths.group_size == exactly(5 / 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EngineModel(0, 1.0), "num_replicas"),
        (lambda: EngineModel(1, 0.0), "pass_s and row_s are both 0"),
        (lambda: EngineModel(1, float("nan")), "pass_s must be a number of 0 or more, got nan"),
        (lambda: EngineModel(1, 1.0, recompute_kv=True), "recompute_kv has no effect"),
        (lambda: TrainerModel(0.0), "must take some time"),
        (lambda: TrainerModel(1.0, load_s=-1.0), "load_s must be a number of 0 or more"),
        (lambda: Lengths.recorded([]), "at least one group"),
        (lambda: Lengths.recorded([[3, 0]]), "at least one token"),
        (lambda: Lengths.lognormal(median=9, p95=3, maximum=9, group_size=1), "median 9, p95 3"),
        (lambda: heavy(num_epochs=1), "leave num_epochs out"),
        (lambda: heavy(missing_proximal="drop"), "missing_proximal='drop'"),
        (lambda: summarize(heavy(), rollout(), FEW, warmup=25), "none of 25 steps"),
    ],
)
def test_what_makes_no_run_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_virtual_run_that_stands_still_says_so() -> None:
    async def sleep_then_wait() -> None:
        await asyncio.sleep(1e6)
        assert asyncio.get_running_loop().time() == 1e6
        await asyncio.Event().wait()

    with (
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
        pytest.raises(RolloutError, match="stands still"),
    ):
        runner.run(sleep_then_wait())


def test_a_runner_in_a_loop_of_its_owner_has_no_thread_and_ends_its_tasks_with_it() -> None:
    ends: list[object] = []

    async def task(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            ends.append(f"cancelled at {asyncio.get_running_loop().time():g}")
            raise
        return f"slept {seconds:g}"

    async def main() -> None:
        runner = AsyncTaskRunner(on_result=lambda result: ends.append(result.value))
        runner.run_in(asyncio.get_running_loop())
        for seconds in (5.0, 3.0, 9.0):
            runner.submit(task, seconds)
        with pytest.raises(RolloutError, match=r"run_in\(\) must come first"):
            runner.run_in(asyncio.get_running_loop())
        await asyncio.sleep(7.0)
        runner.close()
        await asyncio.sleep(1.0)
        assert runner.num_outstanding == 0

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    assert ends == ["slept 3", "slept 5", "cancelled at 7"]
