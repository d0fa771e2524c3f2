"""Several rewards of a sample: where they come from, their names, their weighted sum."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, InfrastructureError, RolloutError
from sdp_lightning.rewards import RewardPool
from sdp_lightning.types import Context, Trajectory
from support import named_rewards
from support.named_rewards import both, both_of_group, correct, form, rank
from support.rollouts import make_executor
from support.saying_engine import TOKENIZER, Says

SAID = ("+4", "4", "+", "1")
SUMS = [1.2, 1.0, 0.2, 0.0]
NAMED = [
    {"correct": 1.0, "form": 1.0},
    {"correct": 1.0, "form": 0.0},
    {"correct": 0.0, "form": 1.0},
    {"correct": 0.0, "form": 0.0},
]
WEIGHTS = {"correct": 1.0, "form": 0.2}
FILE = str(named_rewards.__file__)


def trajectories_of(
    workflow: sdp.RolloutWorkflow, *said: str, num_rows: int = 1, **config: Any
) -> list[Trajectory]:
    engine = Says(*(said or SAID))
    rows = [{"id": f"r{i}", "prompt": "2+2="} for i in range(num_rows)]
    settings = {"batch_size": num_rows, "num_epochs": 1, "max_concurrent": 1} | config
    executor = make_executor(engine, workflow, rows=rows, **settings)
    executor._source._tokenizer = TOKENIZER  # type: ignore[assignment]
    try:
        executor.publish([], 0, reset=True)
        executor.resume()
        return [t for group in executor.take() or [] for t in group.trajectories]
    finally:
        executor.close()
        engine.close()
        workflow.close()


async def awaited(completion: str, row: Any) -> float:
    await asyncio.sleep(0)
    return form(completion, row)


def form_of_group(completions: list[str], row: Any) -> list[float]:
    return [form(each, row) for each in completions]


FORMS: dict[str, dict[str, Any]] = {
    "functions": {"rewards": {"correct": correct, "form": form}},
    "import paths": {"rewards": {"correct": f"{FILE}:correct", "form": f"{FILE}:form"}},
    "one is async": {"rewards": {"correct": correct, "form": awaited}},
    "one is given the group": {"rewards": {"correct": correct, "form": form_of_group}},
    "one returns a mapping": {"rewards": both},
    "it is the reward": {"reward": both},
    "it is given the group": {"reward": both_of_group},
    "a list of mappings": {"reward": lambda completions, row: [both(c, row) for c in completions]},
}


@pytest.mark.parametrize("given", FORMS.values(), ids=FORMS)
def test_named_rewards_add_up_by_their_weights(given: dict[str, Any]) -> None:
    workflow = sdp.RLVRWorkflow(group_size=4, reward_weights=WEIGHTS, **given)
    samples = trajectories_of(workflow)
    assert [t.rewards for t in samples] == NAMED
    assert [t.reward for t in samples] == pytest.approx(SUMS)
    assert all(t.reward_weights == WEIGHTS for t in samples)
    assert workflow.reward_weights == WEIGHTS


def test_without_weights_each_counts_once_and_one_reward_has_no_name() -> None:
    [sample] = trajectories_of(sdp.RLVRWorkflow(both, group_size=1), "+4")
    assert (sample.reward, sample.reward_weights) == (2.0, {"correct": 1.0, "form": 1.0})
    [sample] = trajectories_of(sdp.RLVRWorkflow(correct, group_size=1), "+4")
    assert (sample.reward, sample.rewards, sample.reward_weights) == (1.0, {}, {})


def test_workers_score_several_rewards_and_a_lost_call_is_0_under_every_name() -> None:
    pool = RewardPool(f"{FILE}:both_or_die", num_workers=1, on_kill="zero")
    workflow = sdp.RLVRWorkflow(pool, group_size=2, reward_weights=WEIGHTS)
    samples = trajectories_of(workflow, "9", "+4")
    assert sorted((t.rewards for t in samples), key=str) == [NAMED[3], NAMED[0]]
    assert pool.counts.crashed == 1

    pooled = sdp.RLVRWorkflow(
        rewards={"correct": f"{FILE}:correct", "rank": rank}, group_size=2, reward_workers=1
    )
    assert set(pooled.reward_pools) == {"correct", "rank"} and pooled.reward_pool is None
    samples = trajectories_of(pooled, "4", "1")
    assert [t.rewards for t in samples] == [
        {"correct": 1.0, "rank": 0.0},
        {"correct": 0.0, "rank": 1.0},
    ]
    assert {name: pool.counts.value for name, pool in pooled.reward_pools.items()} == {
        "correct": 2,
        "rank": 1,
    }


def test_rewards_of_a_sample_run_side_by_side() -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def first(completion: str, row: Any) -> float:
        came.set()
        await left.wait()
        return 1.0

    async def second(completion: str, row: Any) -> float:
        await came.wait()
        left.set()
        return 2.0

    workflow = sdp.RLVRWorkflow(rewards={"a": first, "b": second}, group_size=1)
    assert [t.reward for t in trajectories_of(workflow, "4")] == [3.0]


def test_an_infrastructure_error_of_one_leaves_the_sample_out() -> None:
    def judge(completion: str, row: Any) -> float:
        if completion == "1":
            raise InfrastructureError("judge timed out")
        return 1.0

    workflow = sdp.RLVRWorkflow(rewards={"correct": correct, "judge": judge}, group_size=4)
    assert len(trajectories_of(workflow)) == 3


def keys_by_row(completion: str, row: Any) -> dict[str, float]:
    return {"a": 1.0, ("b" if row["id"] == "r0" else "c"): 1.0}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other names in another row": (
        {"reward": keys_by_row},
        r"row 'r1'.*returned \{'a': 1.0, 'c': 1.0\}.*rewards named \['a', 'b'\]",
    ),
    "names without weights": (
        {"reward": both, "reward_weights": {"correct": 1.0}},
        r"row 'r0'.*returned .*rewards named \['correct'\]",
    ),
    "a number for a mapping": ({"rewards": correct}, r"row 'r0'.*1.0, where .* a mapping\."),
    "a number for names": (
        {"reward": correct, "reward_weights": WEIGHTS},
        r"row 'r0'.* a mapping of \['correct', 'form'\]",
    ),
    "a mapping as one of several": (
        {"rewards": {"quality": both, "form": form}},
        r"row 'r0'.*reward 'quality' is one of several, and returned .*alone: rewards=function",
    ),
    "no number under a name": (
        {"reward": lambda c, row: {"a": "high"}},
        r"row 'r0'.*reward '<lambda>/a' returned 'high'; it must be a number",
    ),
    "not finite under a name": (
        {"rewards": lambda c, row: {"a": float("nan")}},
        r"row 'r0'.*reward '<lambda>/a' returned nan; it must be finite",
    ),
    "a name that is none": ({"rewards": lambda c, row: {3: 1.0}}, r"a reward named 3; it must be"),
    "no names": ({"rewards": lambda c, row: {}}, r"row 'r0'.*returned no rewards"),
    "too few for the group": (
        {"rewards": lambda completions, row: {"a": [1.0]}},
        r"reward '<lambda>/a' returned 1 numbers for 2 completions",
    ),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_what_a_reward_returns_is_checked_and_the_row_named(
    given: dict[str, Any], message: str
) -> None:
    workflow = sdp.RLVRWorkflow(group_size=2, **given)
    with pytest.raises(RolloutError, match=message):
        trajectories_of(workflow, "4", num_rows=2)


BOTH = {"correct": correct, "form": form}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, r"either reward= .* or rewards= .* got neither"),
    "both": ({"reward": correct, "rewards": BOTH}, r"either reward= .* got both"),
    "no rewards": ({"rewards": {}}, r"rewards must be a mapping of one name or more, got \{\}"),
    "no name": ({"rewards": {"": correct}}, r"rewards has the name ''; it must have 1 to 80"),
    "a class": ({"rewards": {"class_path": "task.Judge"}}, r"class_path: task\.Judge.*init_args"),
    "a number": ({"rewards": {"correct": 1.0}}, r"reward must be a function, got 1\.0"),
    "unknown": (
        {"rewards": BOTH, "reward_weights": WEIGHTS | {"speed": 1.0}},
        r"reward_weights has \['speed'\], but the rewards are \['correct', 'form'\]",
    ),
    "missing": (
        {"rewards": BOTH, "reward_weights": {"form": 1.0}},
        r"reward_weights has no weight for \['correct'\]",
    ),
    "infinite": (
        {"rewards": BOTH, "reward_weights": WEIGHTS | {"form": float("inf")}},
        r"reward_weights\['form'\] must be a finite number, got inf",
    ),
    "no number": (
        {"reward": both, "reward_weights": WEIGHTS | {"form": "0.2"}},
        r"reward_weights\['form'\] must be a finite number, got '0\.2'",
    ),
    "workers of pools": (
        {"rewards": {"a": RewardPool(f"{FILE}:correct")}, "reward_workers": 2},
        r"reward is a RewardPool of 2 workers already; leave out reward_workers=2",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_do_not_fit_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sdp.RLVRWorkflow(**given)


def test_a_config_sets_rewards_and_weights() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=sdp.RolloutWorkflow)
    pool = {"class_path": "sdp_lightning.RewardPool", "init_args": {"reward": f"{FILE}:form"}}
    init: dict[str, Any] = {
        "rewards": {"correct": f"{FILE}:correct", "form": pool},
        "reward_weights": {"correct": 1, "form": 0.2},
    }
    config = {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": init}
    parsed = parser.parse_object({"workflow": config})
    assert parser.parse_string(parser.dump(parsed)) == parsed and "Unable" not in parser.dump(
        parsed
    )
    made = parser.instantiate(parsed).workflow
    with closing(made):
        assert made.reward_weights == WEIGHTS and set(made.reward_pools) == {"form"}


def test_the_reward_of_a_trajectory_is_the_sum_of_its_named_ones() -> None:
    named: dict[str, Any] = {"rewards": {"a": 1.0, "b": 2.0}, "reward_weights": {"a": 1, "b": -1}}
    made = Trajectory((Context([1]),), reward=-1.0, **named)
    assert made.with_rewards({"a": 3.0}, {"a": 2.0}).reward == 6.0
    with pytest.raises(RolloutError, match=r"reward 0.0 .* not the weighted sum -1.0"):
        Trajectory((Context([1]),), **named)
    with pytest.raises(RolloutError, match=r"rewards are \['a', 'b'\], but weights \['a'\]"):
        Trajectory((Context([1]),), reward=-1.0, **named | {"reward_weights": {"a": 1}})
    with pytest.raises(RolloutError, match=r"reward 'a' is nan"):
        Trajectory((Context([1]),), rewards={"a": float("nan")})
