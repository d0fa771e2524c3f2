"""What a reward is given: the text, special tokens, parameters by name, a whole group at once."""

from __future__ import annotations

import functools
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, InfrastructureError, RolloutError
from sdp_lightning.rewards import RewardPool
from sdp_lightning.rewards.asked import Asked, asked_by
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.completion import completion_text
from support import asking_rewards
from support.rollouts import make_executor
from support.saying_engine import TOKENIZER, Says

SAID = "<think>2+2</think>4"


def rewards_of(workflow: sdp.RolloutWorkflow, engine: FakeEngine, **row: Any) -> list[float]:
    rows = [{"prompt": "2+2=", **row}]
    executor = make_executor(engine, workflow, rows=rows, batch_size=1, num_epochs=1)
    executor._source._tokenizer = TOKENIZER  # type: ignore[assignment]
    try:
        executor.publish([], 0, reset=True)
        executor.resume()
        [group] = executor.take() or []
        return [trajectory.reward for trajectory in group.trajectories]
    finally:
        executor.close()
        engine.close()
        workflow.close()


def format_reward(text: str, row: Any) -> float:
    return float(text.startswith("<think>") and text.endswith("</think>4"))


@pytest.mark.parametrize("is_cut", [False, True], ids=["ended", "cut off"])
@pytest.mark.parametrize("keep", [False, True], ids=["skipped", "kept"])
def test_markers_that_are_special_tokens_are_read_where_asked(keep: bool, is_cut: bool) -> None:
    """Without them a reward of format is 0 for ever; the end of text is never part of it."""
    workflow = sdp.RLVRWorkflow(format_reward, group_size=1, keep_special_tokens=keep)
    assert rewards_of(workflow, Says(SAID, is_cut=is_cut)) == [float(keep)]


def test_a_stop_text_stays_and_a_special_stop_token_goes() -> None:
    plus, end = (TOKENIZER.convert_tokens_to_ids(token) for token in ("+", "</think>"))
    ids = TOKENIZER.encode("<think>2+", add_special_tokens=False)
    read = functools.partial(completion_text, tokenizer=TOKENIZER, stop_token_ids=[plus, end])
    assert read(ids, keep_special_tokens=True) == "<think>2+"
    assert read([*ids, end], keep_special_tokens=True) == "<think>2+"
    assert read([*ids, end]) == "2+"
    assert read([], keep_special_tokens=True) == ""


def test_an_environment_reads_them_where_asked() -> None:
    read: list[str] = []

    class Reads(sdp.Environment):
        def reset(self, row: Any) -> str:
            return "2+2="

        def step(self, completion: str) -> sdp.StepResult:
            read.append(completion)
            return sdp.StepResult("", 1.0, True)

    settings: dict[str, Any] = {"group_size": 1, "turn_format": "{observation}"}
    for keep in (False, True):
        workflow = sdp.MultiTurnWorkflow(Reads, keep_special_tokens=keep, **settings)
        assert rewards_of(workflow, Says(SAID)) == [1.0]
    assert read == ["2+24", SAID]


# Parameters by name -------------------------------------------------------------------------------

GIVEN: dict[str, Any] = {}


def everything(
    completion: str,
    row: Any,
    prompt: str,
    token_ids: list[int],
    *,
    messages: list[dict[str, str]],
    finish_reason: str,
    group_index: int,
    scale: float = 2.0,
) -> float:
    GIVEN.update(locals())
    return scale * (1 + group_index)


async def everything_later(completion: str, row: Any, group_index: int) -> float:
    return 2.0 * (1 + group_index)


@pytest.mark.parametrize("is_cut", [False, True], ids=["ended", "cut off"])
def test_a_reward_is_given_what_it_asks_for_by_name(is_cut: bool) -> None:
    workflow = sdp.RLVRWorkflow(everything, group_size=2)
    assert rewards_of(workflow, Says("4", is_cut=is_cut), gold="4") == [2.0, 4.0]
    user, said = {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}
    assert GIVEN["messages"] == [user, said]
    assert GIVEN["prompt"] == "2+2=" and GIVEN["row"]["gold"] == "4"
    assert GIVEN["finish_reason"] == ("length" if is_cut else "stop")
    ids = TOKENIZER.encode("4", add_special_tokens=False)
    assert GIVEN["token_ids"] == (ids if is_cut else [*ids, TOKENIZER.eos_token_id])
    assert type(GIVEN["token_ids"]) is list


@pytest.mark.parametrize("workers", [0, 1], ids=["here", "in a worker"])
def test_so_is_an_async_one_and_one_in_a_worker(workers: int) -> None:
    reward: Any = f"{asking_rewards.__file__}:by_index" if workers else everything_later
    workflow = sdp.RLVRWorkflow(reward, group_size=2, reward_workers=workers)
    assert rewards_of(workflow, Says("4")) == [2.0, 4.0]


def needs_more(completion: str, row: Any, judge: Any) -> float:
    return 0.0


class Object:
    def __call__(self, completions: Any, row: Any, *, prompt: Any, other: int = 3) -> Any:
        return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("reward", "asked"),
    [
        (format_reward, Asked()),
        (functools.partial(needs_more, judge=3), Asked()),
        (
            functools.partial(everything, prompt="mine", messages=[]),
            Asked(("token_ids", "finish_reason", "group_index")),
        ),
        (Object(), Asked(("prompt",), is_group=True)),
        (lambda completions, row, **columns: [1.0], Asked(is_group=True)),
        (lambda text, prompt: 1.0, Asked()),
        (float, Asked()),
    ],
    ids=["plain", "partial", "partial of names", "object", "group", "a row called prompt", "C"],
)
def test_the_signature_says_what_a_reward_asks_for(reward: Any, asked: Asked) -> None:
    assert asked_by(reward) == asked


@pytest.mark.parametrize("workers", [0, 1])
def test_a_parameter_that_no_reward_is_given_is_refused(workers: int) -> None:
    reward: Any = f"{__file__}:needs_more"
    with pytest.raises(ConfigError, match=r"'needs_more' needs 'judge', which no reward is given"):
        sdp.RLVRWorkflow(reward, reward_workers=workers)


# A whole group ------------------------------------------------------------------------------------


def ranks(completions: list[str], row: Any, finish_reason: list[str], prompt: str) -> Any:
    """1 for the shortest completions, which only the group shows; an array, as numpy gives it."""
    assert finish_reason == ["stop"] * len(completions) and prompt == "2+2="
    lengths = np.array([len(completion) for completion in completions])
    return (lengths == lengths.min()).astype(np.float32)


@pytest.mark.parametrize("pooled", [False, True], ids=["here", "in a worker"])
def test_a_reward_of_completions_scores_the_group_at_once(pooled: bool) -> None:
    reward: Any = (
        RewardPool(f"{asking_rewards.__file__}:shortest", num_workers=1) if pooled else ranks
    )
    workflow = sdp.RLVRWorkflow(reward, group_size=3)
    assert rewards_of(workflow, Says("44", "4", "444")) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        (1.0, "of 2 completions it must be 2 numbers"),
        ([1.0, None], "it must be a number"),
        ({"a": 1.0, "b": 2.0}, "of 2 completions it must be 2 numbers"),
    ],
    ids=str,
)
def test_another_number_of_rewards_is_an_error(value: Any, message: str) -> None:
    workflow = sdp.RLVRWorkflow(lambda completions, row: value, group_size=2)
    with pytest.raises(RolloutError, match=message):
        rewards_of(workflow, Says("4"))


def test_an_infrastructure_error_of_a_group_is_tried_again() -> None:
    calls: list[int] = []

    def judge(completions: list[str], row: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 1:
            raise InfrastructureError("judge")
        return [1.0, 2.0]

    assert rewards_of(sdp.RLVRWorkflow(judge, group_size=2), Says("4")) == [1.0, 2.0]
    assert calls == [2, 2]


def test_a_config_sets_whether_special_tokens_are_kept() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=sdp.RolloutWorkflow)
    init = {"reward": f"{__file__}:format_reward", "keep_special_tokens": True}
    config = {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": init}
    made = parser.instantiate(parser.parse_object({"workflow": config})).workflow
    assert made.keep_special_tokens
    with closing(made), pytest.raises(TypeError, match=r"no setting \['keep_special_token'\]"):
        sdp.RLVRWorkflow(
            format_reward,
            sampling=SamplingParams(),
            keep_special_token=True,  # type: ignore[call-arg]
        )
