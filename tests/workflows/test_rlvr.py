"""RLVR: one prompt, n samples, one reward each."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from contextlib import closing
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards import RewardCounts, RewardPool
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.chat_template import encode_prompt
from sdp_lightning.workflows.workflow import gather_or_cancel
from support import misbehaving_rewards
from support.rollouts import DEADLINE_S, CodePoints, rolling, wait_until

ROWS = [{"id": f"r{i}", "prompt": f"{i}+{i}="} for i in range(10)]


def make(reward: Any, **settings: Any) -> sdp.RLVRWorkflow:
    sampling = SamplingParams(max_new_tokens=4)
    return sdp.RLVRWorkflow(reward, **({"sampling": sampling, "group_size": 3} | settings))


def test_a_group_has_n_samples_of_one_prompt_each_with_the_reward_of_its_own_text() -> None:
    """Fault: only row 0 of a group looked at."""
    seen: list[tuple[str, Any]] = []

    def reward(completion: str, row: Any) -> float:
        seen.append((completion, row["id"]))
        return float(len(completion))

    def reply(request: Any) -> int:
        return 1 + request.seed % 4

    with rolling(FakeEngine(reply), make(reward), rows=ROWS) as executor:
        batch = executor.take()
    assert batch is not None
    for group in batch:
        assert len(group.trajectories) == 3
        prompt = CodePoints().encode(f"{group.row_id[1:]}+{group.row_id[1:]}=")
        for trajectory in group.trajectories:
            assert trajectory.parts[0].token_ids.tolist() == prompt
            assert trajectory.reward == trajectory.num_sampled
            text = CodePoints().decode(trajectory.token_ids[len(prompt) :].tolist())
            assert (text, group.row_id) in seen


def test_samples_of_a_group_are_sampled_side_by_side_with_different_seeds() -> None:
    seeds: list[int] = []

    def reply(request: Any) -> int:
        seeds.append(request.seed)
        return 2

    engine = FakeEngine(reply, manual=True)
    with rolling(engine, make(lambda c, r: 0.0), rows=ROWS, max_concurrent=1) as executor:
        engine.wait_for_requests(3)
        assert len(set(seeds)) == 3
        engine.advance(2, awaiting=3)
        wait_until(executor, lambda: executor.stat.pending == 1)


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.fault("exception", "reward")
def test_a_reward_that_fails_names_row_and_cause(is_async: bool) -> None:
    def plain(completion: str, row: Any) -> float:
        raise ZeroDivisionError("no digits")

    async def awaited(completion: str, row: Any) -> float:
        return plain(completion, row)

    workflow = make(awaited if is_async else plain)
    with rolling(FakeEngine(), workflow, rows=ROWS) as executor:
        with pytest.raises(RolloutError, match=r"row 'r\d'.*version 0.*no digits") as caught:
            executor.take()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.fault("hang", "reward")
def test_a_reward_that_hangs_fails_its_group_and_others_go_on() -> None:
    """Fault: a hung reward eats pool workers for good."""
    release = threading.Event()

    def reward(completion: str, row: Any) -> float:
        if row["id"] == "r0":
            release.wait(DEADLINE_S)
        return 1.0

    workflow = make(reward, reward_timeout_s=1.0)
    settings = {"rows": ROWS, "num_epochs": 1, "max_failures": 1, "batch_size": 4}
    try:
        with rolling(FakeEngine(), workflow, **settings) as executor:
            batch = executor.take()
            assert batch is not None and "r0" not in {group.row_id for group in batch}
            wait_until(executor, lambda: executor.stat.failed == 1)
    finally:
        release.set()


# Rewards in worker processes ----------------------------------------------------------------------

BY_ROW = f"{misbehaving_rewards.__file__}:by_row"
WAYS = ["good", "sleep_with_the_gil", "read_null", "good", "leave", "good", "good", "good"]
MISBEHAVING = [row | {"way": way} for row, way in zip(ROWS, WAYS, strict=False)]


@pytest.mark.fault("hang", "reward")
@pytest.mark.fault("process killed", "reward")
def test_a_reward_that_hangs_or_crashes_costs_its_samples_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = RewardPool(BY_ROW, on_kill="zero", num_workers=2, timeout_s=1.0)
    workflow = make(pool, group_size=2)
    settings = {"rows": MISBEHAVING, "num_epochs": 1, "batch_size": 8}
    with closing(workflow), rolling(FakeEngine(), workflow, **settings) as executor:
        batch = executor.take()
        assert batch is not None and executor.stat.failed == executor.stat.rejected == 0
        rewards = [[trajectory.reward for trajectory in group.trajectories] for group in batch]
        assert rewards == [[float(way == "good")] * 2 for way in WAYS]
        assert workflow.reward_pool is not None
        assert workflow.reward_pool.counts == RewardCounts(value=10, timed_out=2, crashed=4)
    for row, what in (("r1", "took longer than 1.0 s"), ("r2", "died of SIGSEGV")):
        assert caplog.text.count(f"'by_row' {what} on row '{row}'") == 2


@pytest.mark.fault("hang", "reward")
def test_rollouts_go_on_while_one_reward_hangs() -> None:
    rows = [{"id": "hangs", "prompt": "?", "way": "loop"}]
    rows += [{"id": f"r{i}", "prompt": "?", "way": "good"} for i in range(40)]
    workflow = make(BY_ROW, reward_workers=2, reward_timeout_s=10 * DEADLINE_S, group_size=1)
    settings = {"rows": rows, "num_epochs": 1, "max_concurrent": 4, "max_head_lag": 20}
    with closing(workflow), rolling(FakeEngine(), workflow, **settings) as executor:
        seen = [group.row_id for _ in range(20) for group in executor.take() or ()]
        assert sorted(seen) == sorted(f"r{i}" for i in range(40))
        assert executor.stat.running == 1
        executor.close()


@pytest.mark.parametrize(
    ("settings", "failed", "rejected"),
    [
        ({"on_kill": "reject"}, 0, 1),
        ({"on_kill": "raise"}, 1, 0),
        ({"on_kill": "zero"}, 0, 0),
        ({}, 0, 1),
    ],
    ids=["reject", "raise", "zero", "leave out"],
)
def test_a_pool_of_its_own_settings_decides_what_a_lost_sample_is_worth(
    settings: dict[str, Any], failed: int, rejected: int
) -> None:
    pool = RewardPool(BY_ROW, num_workers=1, **settings)
    rows = [row for row in MISBEHAVING if row["way"] != "sleep_with_the_gil"][:2]
    workflow = make(pool, group_size=1)
    rolled = {"rows": rows, "num_epochs": 1, "batch_size": 1, "max_failures": 1, "lost_retries": 0}
    with closing(workflow), rolling(FakeEngine(), workflow, **rolled) as executor:
        wait_until(executor, lambda: executor.stat.running == 0 and executor.stat.submitted == 2)
        assert (executor.stat.failed, executor.stat.rejected) == (failed, rejected)
        assert pool is workflow.reward_pool and pool.counts == RewardCounts(value=1, crashed=1)


@pytest.mark.fault("exception", "reward")
def test_an_exception_in_a_worker_fails_its_group_as_it_does_here() -> None:
    row = {"id": "r0", "prompt": "?", "way": "divide"}
    workflow = make(BY_ROW, reward_workers=1)
    with (
        closing(workflow),
        rolling(FakeEngine(), workflow, rows=[row]) as executor,
        pytest.raises(RolloutError, match=r"row 'r0'.*raised ZeroDivisionError: division"),
    ):
        executor.take()


def test_training_and_evaluation_share_a_pool() -> None:
    workflow = make(BY_ROW, reward_workers=1, group_size=1)
    with closing(workflow), rolling(FakeEngine(), workflow, rows=MISBEHAVING[:1]) as executor:
        row = MISBEHAVING[0] | {"way": "parent_id"}
        first, second = (executor.evaluate([row], workflow, timeout_s=DEADLINE_S) for _ in "12")
        assert first[0].trajectories[0].reward == second[0].trajectories[0].reward
        assert executor.take() is not None


def test_a_copied_workflow_and_its_original_both_score() -> None:
    """Command lines and checkpoints copy settings."""
    workflow = make(BY_ROW, reward_workers=1, group_size=1)
    copies = [workflow, copy.deepcopy(workflow), pickle.loads(pickle.dumps(workflow))]
    for each in copies:
        with closing(each), rolling(FakeEngine(), each, rows=MISBEHAVING[:1]) as executor:
            batch = executor.take() or []
            assert [group.trajectories[0].reward for group in batch] == [1.0, 1.0]


def test_a_command_line_sets_a_pool() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=sdp.RolloutWorkflow)
    init: dict[str, Any] = {"reward": BY_ROW, "reward_workers": 2}
    config = {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": init}
    short = parser.instantiate(parser.parse_object({"workflow": config})).workflow
    assert short.reward_pool.num_workers == 2
    pool = {"reward": BY_ROW, "num_workers": 3, "on_kill": "reject"}
    init |= {"reward_workers": 0}
    init |= {"reward": {"class_path": "sdp_lightning.rewards.RewardPool", "init_args": pool}}
    long = parser.instantiate(parser.parse_object({"workflow": config})).workflow
    assert (long.reward_pool.num_workers, long.reward_pool.on_kill) == (3, "reject")


# The parts ----------------------------------------------------------------------------------------


def test_when_one_sample_fails_its_siblings_are_cancelled_first() -> None:
    async def main() -> list[str]:
        ended: list[str] = []

        async def long() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("cancelled")

        async def fail() -> None:
            await asyncio.sleep(0)
            raise KeyError("x")

        with pytest.raises(KeyError):
            await gather_or_cancel([long(), fail(), long()])
        return ended

    assert asyncio.run(main()) == ["cancelled", "cancelled"]


@pytest.mark.parametrize(
    ("row", "chat", "text"),
    [
        pytest.param({"prompt": "1+1="}, False, "1+1=", id="plain text"),
        pytest.param({"prompt": "hi"}, True, "<user>hi<assistant>", id="text as one message"),
        pytest.param(
            {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]},
            *(False, "<system>be<user>hi<assistant>"),
            id="a list of messages always",
        ),
    ],
)
def test_prompts_are_encoded(row: dict[str, Any], chat: bool, text: str) -> None:
    tokens = encode_prompt(row, CodePoints(), key="prompt", use_chat_template=chat)
    assert CodePoints().decode(tokens) == text


@pytest.mark.fault("corrupted data", "fetch")
def test_a_prompt_that_is_missing_or_empty_is_named() -> None:
    with pytest.raises(RolloutError, match=r"no 'question'; its keys are \['prompt'\]"):
        encode_prompt({"prompt": ""}, CodePoints(), key="question", use_chat_template=False)
    with pytest.raises(RolloutError, match="the prompt '' has no tokens"):
        encode_prompt({"prompt": ""}, CodePoints(), key="prompt", use_chat_template=False)


@pytest.mark.parametrize("prompt", [None, 3, [3, 4]], ids=["None", "a number", "token ids"])
@pytest.mark.fault("corrupted data", "fetch")
def test_a_prompt_that_is_neither_text_nor_messages_is_named(prompt: Any) -> None:
    with pytest.raises(RolloutError, match="is neither text nor a list of"):
        encode_prompt({"prompt": prompt}, CodePoints(), key="prompt", use_chat_template=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"reward_timeout_s": 0}, "reward_timeout_s must be positive, got 0"),
        ({"reward": 7}, "reward must be a function, got 7"),
        ({"reward_workers": -1}, "reward_workers must be an integer of at least 0, got -1"),
        ({"reward": lambda c, r: 0.0, "reward_workers": 1}, "worker processes cannot import"),
        ({"reward": RewardPool(BY_ROW), "reward_workers": 1}, "is a RewardPool of 2 workers"),
    ],
    ids=lambda value: None if isinstance(value, str) else " and ".join(value),
)
def test_settings_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sdp.RLVRWorkflow(**({"reward": len} | settings))


def test_a_reward_may_be_named_by_a_string() -> None:
    workflow = sdp.RLVRWorkflow("sdp_lightning.rewards.text:exact_match")
    assert workflow.sampling == SamplingParams() and workflow.group_size == 8
