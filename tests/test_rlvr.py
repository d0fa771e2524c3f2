"""RLVR: one prompt, n samples, one reward each."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from rolling import DEADLINE_S, CodePoints, rolling, wait_until

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.rlvr import encode_prompt, gather_or_cancel, with_stops

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
        engine.advance(2)
        wait_until(executor, lambda: executor.stat.pending == 1)


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
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


def test_a_reward_that_hangs_fails_its_group_and_others_go_on() -> None:
    """Fault: a hung reward eats pool workers for good."""
    release = threading.Event()

    def reward(completion: str, row: Any) -> float:
        if row["id"] == "r0":
            release.wait(DEADLINE_S)
        return 1.0

    workflow = make(reward, reward_timeout_s=0.2)
    settings = {"rows": ROWS, "num_epochs": 1, "max_failures": 1, "batch_size": 4}
    try:
        with rolling(FakeEngine(), workflow, **settings) as executor:
            batch = executor.take()
            assert batch is not None and "r0" not in {group.row_id for group in batch}
            wait_until(executor, lambda: executor.stat.failed == 1)
    finally:
        release.set()


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


def test_a_prompt_that_is_missing_or_empty_is_named() -> None:
    with pytest.raises(RolloutError, match=r"no 'question'; its keys are \['prompt'\]"):
        encode_prompt({"prompt": ""}, CodePoints(), key="question", use_chat_template=False)
    with pytest.raises(RolloutError, match="the prompt '' has no tokens"):
        encode_prompt({"prompt": ""}, CodePoints(), key="prompt", use_chat_template=False)


@pytest.mark.parametrize("prompt", [None, 3, [3, 4]], ids=["None", "a number", "token ids"])
def test_a_prompt_that_is_neither_text_nor_messages_is_named(prompt: Any) -> None:
    with pytest.raises(RolloutError, match="is neither text nor a list of"):
        encode_prompt({"prompt": prompt}, CodePoints(), key="prompt", use_chat_template=True)


def test_the_end_of_text_and_stop_texts_of_one_token_stop_a_completion() -> None:
    params = with_stops(SamplingParams(stop_token_ids=(5,)), CodePoints(), ["\n"])
    assert params.stop_token_ids == (5, 0, 10)
    with pytest.raises(ConfigError, match="stop text 'ab' is 2 tokens"):
        with_stops(SamplingParams(), CodePoints(), ["ab"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"reward_timeout_s": 0}, "reward_timeout_s must be positive, got 0"),
        ({"reward": 7}, "reward must be a function, got 7"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_settings_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sdp.RLVRWorkflow(**({"reward": len} | settings))


def test_a_reward_may_be_named_by_a_string() -> None:
    workflow = sdp.RLVRWorkflow("sdp_lightning.rewards.text:exact_match")
    assert workflow.sampling == SamplingParams() and workflow.group_size == 8
