"""Answers that run code, freeze, or break a verifier of reasoning-gym or math-verify."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.prompts.sources import load_rows
from sdp_lightning.rewards import RewardPool
from sdp_lightning.testing import FakeEngine
from support import rollouts
from support.hostile_completions import completion
from support.rollouts import CodePoints, rolling

pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")

from sdp_lightning.rewards import reasoning_gym

MODULE = "sdp_lightning.rewards.reasoning_gym"
SCORE, REWARD = f"{MODULE}:score", f"{MODULE}:reward"
MATH = "sdp_lightning.rewards.mathematics:math_reward"
EVALUATING = (
    *("countdown", "puzzle24", "polynomial_multiplication", "simple_integration"),
    *("intermediate_integration", "n_queens", "binary_matrix", "spiral_matrix", "string_insertion"),
)
WAIT_S = 60.0


@functools.cache
def row_of(task: str) -> dict[str, Any]:
    return dict(load_rows(f"reasoning_gym:{task}?size=1&seed=1")[0])


def judge(pool: RewardPool, *answers: str, row: Any) -> list[float]:
    async def main() -> list[float]:
        return [await pool(answer, row) for answer in answers]

    return asyncio.run(main())


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with closing(RewardPool(SCORE, num_workers=1, timeout_s=WAIT_S)) as pool:
        yield pool


@pytest.mark.parametrize("task", EVALUATING)
def test_what_a_verifier_evaluates_never_runs_in_the_trainer(
    task: str, tmp_path: Path, pool: RewardPool
) -> None:
    mark = tmp_path / "who"
    call = f"__import__('pathlib').Path({str(mark)!r}).write_text(str(__import__('os').getpid()))"
    for answer in (call, f"{call} + 1", f"[{call}]"):
        with pytest.raises(ConfigError, match="worker processes only"):
            reasoning_gym.score(answer, row_of(task))
        assert not mark.exists()
    judge(pool, call, f"{call} + 1", f"[{call}]", row=row_of(task))
    assert not mark.exists() or mark.read_text() != str(os.getpid())


@pytest.mark.parametrize("task", ["chain_sum", "letter_counting", "maze"])
@pytest.mark.parametrize("name", ["reward", "line_reward", "score"])
def test_no_task_is_judged_without_workers(task: str, name: str) -> None:
    """Also those that only compare today: their verifiers are another project's code."""
    with pytest.raises(ConfigError, match=f"{name!r} runs foreign code"):
        getattr(reasoning_gym, name)("<answer>1</answer>", row_of(task))
    with pytest.raises(ConfigError, match=f"{name!r} runs foreign code"):
        sdp.RLVRWorkflow(f"{MODULE}:{name}")


@pytest.fixture(scope="module")
def freezing() -> Iterator[RewardPool]:
    """One worker, whose calls are killed after 5 s."""
    with closing(RewardPool(REWARD, num_workers=1, timeout_s=5.0)) as pool:
        yield pool


@pytest.mark.fault("hang", "completion")
@pytest.mark.fault("process killed", "completion")
@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        ("9**9**9**9", "timed_out"),
        ("__import__('time').sleep(1000)", "timed_out"),
        ("__import__('os')._exit(0)", "crashed"),
        ("__import__('os').kill(0, 9)", "crashed"),
        ("exit()", ""),
        ("(" * 5000, ""),
        ("1" * 5000, ""),
    ],
)
def test_an_answer_that_freezes_or_ends_its_process_is_wrong_and_the_next_is_judged(
    freezing: RewardPool, answer: str, lost: str
) -> None:
    """Of binary_matrix, which evaluates the answer as it is."""
    row, before = row_of("binary_matrix"), asdict(freezing.counts)
    right = f"<answer>{row['answer']}</answer>"
    answers = (right, f"<answer>{answer}</answer>", right)
    assert judge(freezing, *answers, row=row) == [1.0, 0.0, 1.0]
    after = asdict(freezing.counts)
    added = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    added.pop("verifier_raised", None)
    assert added == ({"value": 2, lost: 1} if lost else {"value": 3})


def test_a_policy_that_writes_only_power_towers_ends_no_run(
    freezing: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs its sample a reward of 0, as a timeout does; the trainer goes on."""

    class Towers(CodePoints):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
            return "<answer>9**9**9**9</answer>"

    monkeypatch.setattr(rollouts, "CodePoints", Towers)
    workflow = sdp.RLVRWorkflow(freezing, group_size=1)
    before = freezing.counts.timed_out
    row = {**row_of("binary_matrix"), "prompt": "1+1="}
    with rolling(FakeEngine(), workflow, rows=[row], num_epochs=1, batch_size=1) as executor:
        [group] = executor.take() or []
        assert [t.reward for t in group.trajectories] == [0.0]
    assert freezing.counts.timed_out == before + 1


# Answers that a verifier cannot read --------------------------------------------------------------


@pytest.mark.fault("corrupted data", "completion")
@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("prime_factorization", "two times two"),
        ("prime_factorization", "\ud800"),
        ("coin_flip", "1e999999"),
        ("game_of_life", "{}"),
        ("boxnet", "-1"),
        ("chain_sum", "9" * 5000),
        ("chain_sum", "\0"),
        ("chain_sum", "nan"),
    ],
)
def test_an_answer_that_a_verifier_cannot_read_is_wrong(task: str, answer: str) -> None:
    assert inspect.unwrap(reasoning_gym.score)(answer, row_of(task)) <= 0.01


def test_a_row_whose_own_answer_cannot_be_verified_is_named() -> None:
    row = {**row_of("prime_factorization"), "answer": "no number"}
    with pytest.raises(RolloutError, match=r"'prime_factorization' fails on the row's own answer"):
        inspect.unwrap(reasoning_gym.score)("neither", row)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 3000,
        r"$\frac{" * 500,
        "$" + "(" * 1000 + "$",
        "$" + "9" * 5000 + "$",
        "$1e999999$",
        "\ud800$3$\0",
        "<answer>" * 30_000,
    ],
    ids=lambda text: f"{text[:8]!r}-{len(text)}",
)
def test_mathematics_that_cannot_be_read_is_wrong(text: str, math: RewardPool) -> None:
    assert judge(math, text, r"\boxed{4}", row={"answer": "4"}) == [0.0, 1.0]


@pytest.fixture(scope="module")
def math() -> Iterator[RewardPool]:
    with closing(RewardPool(MATH, num_workers=1, timeout_s=60.0)) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_hostile_completions_end_no_reward_worker_pool() -> None:
    settings: dict[str, Any] = {"num_workers": 2, "timeout_s": 5.0, "max_killed_in_a_row": 2001}
    with closing(RewardPool(REWARD, **settings)) as gym, closing(RewardPool(MATH, **settings)) as m:
        for seed in range(2000):
            text, task = completion(seed), EVALUATING[seed % len(EVALUATING)]
            [value] = judge(gym, f"<answer>{text}</answer>", row=row_of(task))
            assert 0.0 <= value <= 1.0
            [value] = judge(m, text, row={"answer": "72"})
            assert value in (0.0, 1.0)
        assert gym.counts.raised == m.counts.raised == 0
