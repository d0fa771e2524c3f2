"""Verifiers of reasoning-gym and math-verify as rewards."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from contextlib import closing
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.prompts.reasoning_gym import ReasoningGymRows
from sdp_lightning.prompts.sources import load_rows
from sdp_lightning.rewards import RewardCounts, RewardPool
from sdp_lightning.testing import FakeEngine
from support.rollouts import rolling

pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")

from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS

from sdp_lightning.rewards import mathematics, reasoning_gym

# Called without worker processes: here the completions are ours.
math_reward = inspect.unwrap(mathematics.math_reward)
line_reward = inspect.unwrap(reasoning_gym.line_reward)
reward = inspect.unwrap(reasoning_gym.reward)
MATH = "sdp_lightning.rewards.mathematics:math_reward"
BOMB = "$9^{9^{9^{9}}}$"


# reasoning-gym ------------------------------------------------------------------------------------


def sums(**settings: Any) -> Any:
    query = "&".join(f"{key}={value}" for key, value in settings.items())
    return load_rows(f"reasoning_gym:chain_sum?size=20&seed=1&max_terms=2&max_digits=1&{query}")


def test_the_answer_is_taken_out_before_it_is_scored() -> None:
    row = sums(shots=0)[0]
    right = row["answer"]
    assert reward(f"I think <answer>77</answer>, no: <answer> {right}\n</answer>.", row) == 1.0
    assert reward(f"<answer>{right}</answer> or <answer>77</answer>", row) < 1.0
    assert reward(f"It is {right}.", row) == 0.0, "a verifier alone would give a part of 1"
    assert reward("", row) == 0.0


def test_of_few_shot_rows_the_first_line_is_scored() -> None:
    row = sums(shots=2)[0]
    right = row["answer"]
    assert line_reward(f" {right}\nQuestion: {right}", row) == 1.0
    assert line_reward(f"\n{right}", row) == 1.0
    assert line_reward("", row) == 0.0
    assert 0.0 < line_reward(f"the answer is {right}", row) < 1.0, "partial credit of the task"


@pytest.mark.parametrize("name", ["mini_sudoku", "tower_of_hanoi", "graph_color"])
def test_an_answer_of_several_lines_is_right_in_few_shot_rows(name: str) -> None:
    """As a model goes on: with the next question, or with a word too many."""
    row = load_rows(f"reasoning_gym:{name}?size=1&shots=1")[0]
    examples = ReasoningGymRows(name, size=1, shots=1)
    right = examples._answer_of(row)
    assert f"Answer: {examples._answer_of(examples._tasks[1])}\n\nQuestion:" in row["prompt"]
    assert "Answer: None" not in row["prompt"]
    assert line_reward(f" {right}\n\nQuestion: and so on", row) == 1.0
    assert line_reward("", row) < 0.1
    if row["answer"] is not None:
        assert line_reward(f"{right}\nDone.", row) == 1.0


def test_a_task_without_an_answer_to_show_is_refused_with_shots() -> None:
    with pytest.raises(ConfigError, match=r"no answer to rush_hour that .* leave out shots"):
        load_rows("reasoning_gym:rush_hour?size=1&shots=1")
    assert load_rows("reasoning_gym:rush_hour?size=1")[0]["answer"] is None


WITHOUT_ANSWERS = ("boxnet", "rush_hour")  # nor any example of one
COMPOSITE = {"datasets": [DatasetSpec(name="chain_sum", weight=1.0, config={})]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the tasks' own
@pytest.mark.parametrize("name", sorted(DATASETS))
def test_the_answer_of_each_task_is_worth_1_and_no_other_text_raises(name: str) -> None:
    settings: dict[str, Any] = COMPOSITE if name == "composite" else {}
    rows = ReasoningGymRows(name, size=2, **settings)
    for row in rows:
        if name not in WITHOUT_ANSWERS:
            assert reward(f"So <answer>{rows._answer_of(row)}</answer>.", row) == 1.0
        for text in ("", "I do not know", "5", '{"a": 1}', "9" * 400, "[[1]]", "\0"):
            assert 0.0 <= reward(f"<answer>{text}</answer>", row) <= 1.0


@pytest.mark.parametrize("name", ["letter_counting", "simple_equations", "word_sorting", "maze"])
def test_the_right_answer_of_every_task_is_worth_1(name: str) -> None:
    for row in load_rows(f"reasoning_gym:{name}?size=3"):
        assert reward(f"<answer>{row['answer']}</answer>", row) == 1.0


def test_a_row_of_elsewhere_is_named() -> None:
    with pytest.raises(RolloutError, match=r"no 'metadata' .*keys are \['answer'\]"):
        reward("<answer>3</answer>", {"answer": "3"})


def test_rows_and_rewards_are_one_line_of_a_config_each() -> None:
    """Scored in a worker process, which has the library and nothing of the trainer's."""
    place = "sdp_lightning.rewards.reasoning_gym:line_reward"
    workflow = sdp.RLVRWorkflow(place, group_size=2, reward_workers=1)
    with closing(workflow), rolling(FakeEngine(), workflow, rows=sums(shots=1)) as executor:
        [first, _] = executor.take() or []
        assert first.row_id.startswith("chain_sum-")
        assert [t.reward for t in first.trajectories] == [0.0, 0.0]


# math-verify --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "is_right"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"So $x = 3$.", "3", True),
        ("The answer is 1,234.", "1234", True),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
        (r"$(x+1)^2$", "x^2+2x+1", True),
        (r"\boxed{4}", r"$\sqrt{16}$", True),
        (r"\boxed{4}", "3", False),
        ("no idea", "3", False),
        ("", "3", False),
        (r"\boxed{", "3", False),
    ],
)
def test_mathematics_is_compared_as_mathematics(
    completion: str, answer: str, is_right: bool
) -> None:
    assert math_reward(completion, {"answer": answer}) == float(is_right)


def test_a_row_without_a_mathematical_answer_is_named() -> None:
    with pytest.raises(RolloutError, match=r"no 'answer'; its keys are \['gold'\]"):
        math_reward("3", {"gold": 3})
    with pytest.raises(RolloutError, match=r"no mathematics in the row's answer ''"):
        math_reward("3", {"answer": ""})


def test_a_power_tower_is_killed_at_the_deadline_and_the_next_answer_is_judged() -> None:
    async def main(pool: RewardPool) -> list[float]:
        answers = (r"\boxed{3}", BOMB, r"\boxed{3}")
        return [await pool(answer, {"id": "r7", "answer": "3"}) for answer in answers]

    with closing(RewardPool(MATH, num_workers=1, timeout_s=5.0)) as pool:
        assert asyncio.run(main(pool)) == [1.0, 0.0, 1.0]
        assert pool.counts == RewardCounts(value=2, timed_out=1)


@pytest.mark.parametrize(
    ("module", "room", "package"),
    [
        ("reasoning_gym", "reasoning_gym", "reasoning-gym"),
        ("math_verify", "mathematics", "math-verify"),
    ],
)
def test_a_verifier_that_is_not_installed_is_named_before_the_run_begins(
    module: str, room: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"sdp_lightning.rewards.{room}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"{name} needs .*: pip install {package}$"):
        sdp.RLVRWorkflow(f"{name}:reward", reward_workers=1)
    monkeypatch.undo()
    importlib.import_module(name)
