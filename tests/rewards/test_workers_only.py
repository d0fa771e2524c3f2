"""What runs foreign code on a completion runs in worker processes, and nowhere else."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards import RewardPool, exact_match, workers_only
from sdp_lightning.rewards.foreign_code import needs_workers, score_or_zero
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from support.rollouts import rolling

PLACE = f"{__file__}:evaluate"
REFUSED = r"'evaluate' runs foreign code.*worker processes only: set reward_workers=2"
HERE: list[str] = []  # what was evaluated in this process


@workers_only
def evaluate(completion: str, row: Any) -> float:
    """Not to be had outside of a worker."""
    HERE.append(completion)
    return float(os.getpid() != row["trainer"])


@workers_only
async def evaluate_later(completion: str, row: Any) -> float:
    return float(os.getpid() != row["trainer"])


@functools.wraps(evaluate)
def evaluate_loudly(*args: Any, **kwargs: Any) -> float:
    return evaluate(*args, **kwargs)


class Judge:
    workers_only = True

    def __call__(self, completion: str, row: Any) -> float:
        raise AssertionError("called in the trainer's process")


class CarefulJudge:
    @workers_only
    def __call__(self, completion: str, row: Any) -> float:
        raise AssertionError("called in the trainer's process")

    @workers_only
    def method(self, completion: str, row: Any) -> float:
        raise AssertionError("called in the trainer's process")


def scaled(completion: str, row: Any, *, reward: Any, by: float) -> float:
    return by * reward(completion, row)


def wrapped(completion: str, row: Any) -> float:
    """A wrapper that says nothing of what it calls."""
    return evaluate("9**9**9**9", row)


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


DECLARED: dict[str, Any] = {
    "a function": evaluate,
    "an async function": evaluate_later,
    "its place": PLACE,
    "a partial": functools.partial(evaluate, row={}),
    "a partial of a partial": functools.partial(functools.partial(evaluate), row={}),
    "an argument of a partial": functools.partial(scaled, reward=evaluate, by=2.0),
    "a wrapper": evaluate_loudly,
    "an instance of a class": Judge(),
    "an instance with a call": CarefulJudge(),
    "a method": CarefulJudge().method,
}


@pytest.mark.parametrize("reward", DECLARED.values(), ids=DECLARED)
def test_a_workflow_without_workers_is_refused_before_the_run(reward: Any) -> None:
    with pytest.raises(ConfigError, match="worker processes only: set reward_workers=2"):
        sdp.RLVRWorkflow(reward)
    with pytest.raises(ConfigError, match="worker processes only"):
        sdp.ShapedWorkflow(sdp.RLVRWorkflow(reward))
    given = evaluate if isinstance(reward, str) else reward
    with pytest.raises(ConfigError, match="worker processes only: pass a RewardPool"):
        sdp.ToolEnvironment([add], given)
    with pytest.raises(ConfigError, match="worker processes only: a tool is called in the train"):
        sdp.ToolEnvironment([add, given], exact_match)
    environment = functools.partial(sdp.ToolEnvironment, [add], given)
    with pytest.raises(ConfigError, match="worker processes only: give the environment"):
        sdp.MultiTurnWorkflow(environment)
    assert not HERE


class Evaluating(sdp.ToolEnvironment):
    def __init__(self) -> None:
        super().__init__([add], evaluate)


def make_evaluating(reward: Any = evaluate) -> sdp.ToolEnvironment:
    return sdp.ToolEnvironment([add], reward)


ROWS: list[Any] = [[0] for _ in range(10**5)]
ROWS.append(ROWS)
HERE_MODULE = sys.modules[__name__]
LOCAL = Judge()
FACTORIES: dict[str, Any] = {
    "a lambda": lambda: sdp.ToolEnvironment([add], evaluate),
    "a lambda with a default": lambda reward=evaluate_loudly: sdp.ToolEnvironment([add], reward),
    "a keyword default": lambda *, reward=LOCAL: sdp.ToolEnvironment([add], reward),
    "a part of a module": lambda: sdp.ToolEnvironment([add], HERE_MODULE.evaluate),
    "a closure": (lambda reward: lambda: sdp.ToolEnvironment([add], reward))(evaluate_later),
    "a function": make_evaluating,
    "a partial of a lambda": functools.partial(lambda n: sdp.ToolEnvironment([add], evaluate), 3),
    "a class": Evaluating,
    "a list of tools": (lambda tools: lambda: sdp.ToolEnvironment(tools, exact_match))(
        [add, evaluate]
    ),
}
POOL = RewardPool(exact_match)
ALLOWED: dict[str, Any] = {
    "a pool": lambda: sdp.ToolEnvironment([add], POOL),
    "a pool made of it": lambda: sdp.ToolEnvironment([add], RewardPool(evaluate)),
    "another reward": lambda: sdp.ToolEnvironment([add], exact_match),
    "a built-in": dict,
    "many rows": lambda: sdp.ToolEnvironment([add], exact_match, prompt_key=str(len(ROWS))),
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_a_factory_whose_code_names_it_is_refused_when_the_workflow_is_made(factory: Any) -> None:
    """Nothing is made: an environment may start programs."""
    with pytest.raises(ConfigError, match=r"worker processes only: give the environment a Rew"):
        sdp.MultiTurnWorkflow(factory)


@pytest.mark.parametrize("factory", ALLOWED.values(), ids=ALLOWED)
def test_other_factories_are_not(factory: Any) -> None:
    sdp.MultiTurnWorkflow(factory)


def test_a_config_that_names_it_without_workers_is_refused() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=sdp.RolloutWorkflow)
    inner = {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": {"reward": PLACE}}
    config = {"class_path": "sdp_lightning.ShapedWorkflow", "init_args": {"workflow": inner}}
    parsed = parser.parse_object({"workflow": config})
    with pytest.raises(ConfigError, match=REFUSED):
        parser.instantiate(parsed)


def test_other_rewards_need_no_workers() -> None:
    others = [exact_match, functools.partial(exact_match, strip=False), RewardPool(PLACE), 3, [add]]
    assert not any(map(needs_workers, others))


@pytest.mark.fault("exception", "completion")
def test_a_wrapper_is_refused_at_its_first_call_and_nothing_is_evaluated() -> None:
    """Both in a thread and on an event loop of the trainer."""

    async def later(completion: str, row: Any) -> float:
        return evaluate(completion, row)

    for reward in (wrapped, later):
        rows = [{"id": "r0", "prompt": "1+1="}]
        with (
            rolling(FakeEngine(), sdp.RLVRWorkflow(reward), rows=rows) as executor,
            pytest.raises(RolloutError, match=rf"row 'r0'.*{REFUSED}"),
        ):
            executor.take()
    assert not HERE


def test_a_call_by_hand_is_refused_also_on_the_main_thread() -> None:
    with pytest.raises(ConfigError, match=REFUSED + r".*By hand: asyncio\.run\(RewardPool"):
        evaluate("1", {})
    assert not HERE


@pytest.mark.parametrize("name", ["evaluate", "evaluate_later", "wrapped"])
def test_in_a_worker_it_is_called(name: str) -> None:
    with closing(RewardPool(f"{__file__}:{name}", num_workers=1)) as pool:
        assert asyncio.run(pool("1", {"trainer": os.getpid()})) == 1.0  # type: ignore[arg-type]
    assert not HERE


def test_environments_share_a_pool_for_the_reward_of_answers() -> None:
    row = {"id": "r0", "prompt": "1+1=", "trainer": os.getpid()}
    with closing(RewardPool(PLACE, num_workers=1)) as pool:
        workflow = sdp.MultiTurnWorkflow(
            lambda: sdp.ToolEnvironment([add], pool),
            group_size=2,
            sampling=SamplingParams(max_new_tokens=4),
            turn_format="{observation}\n",
        )
        with rolling(FakeEngine(), workflow, rows=[row]) as executor:
            [group, *_] = executor.take() or []
            assert [t.reward for t in group.trajectories] == [1.0, 1.0]
        assert pool.counts.value >= 2
    assert not HERE


# Scores of foreign verifiers ----------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], object]:
    def verify() -> object:
        raise error

    return verify


@pytest.mark.fault("thread died", "completion")
@pytest.mark.parametrize(
    "error",
    [
        ValueError("no number"),
        RecursionError(),
        SystemExit(3),
        KeyboardInterrupt(),
        OverflowError(),
    ],
    ids=repr,
)
def test_a_completion_on_which_a_verifier_raises_is_wrong(error: BaseException) -> None:
    assert score_or_zero(raising(error), lambda: 1.0) == 0.0
    with pytest.raises(ZeroDivisionError) as raised:  # the row is at fault
        score_or_zero(raising(error), lambda: 1 / 0)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "one", None, 10**400, [1]], ids=repr)
def test_a_score_that_is_no_finite_number_is_wrong(value: object) -> None:
    assert score_or_zero(lambda: value, lambda: 1.0) == 0.0


def test_what_a_verifier_gives_is_the_score_and_memory_that_runs_out_ends_the_process() -> None:
    assert score_or_zero(lambda: 0.25, lambda: 1.0) == 0.25
    with pytest.raises(MemoryError):
        score_or_zero(raising(MemoryError()), lambda: 1.0)
