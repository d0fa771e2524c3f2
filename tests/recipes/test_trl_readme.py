"""The GRPO run of TRL's README, as docs/coming-from.md has it, with a tiny chat model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from support import trl_rewards
from support.paths import ROOT

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
CHAT = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
QUESTIONS = {"what is 2+2?": "4 2 a b c d e f g h i j k l m n", "what is 9-3?": "o p q 1 3 6 8"}


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, in a working directory with a chat model and rows like DeepMath's."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "coming-from.md").read_text()
    for title, text in re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', page, re.M | re.S):
        text = text.replace("from trl.rewards import", "from support.trl_rewards import")
        Path(title).write_text(text)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained("model")
    tiny_model().save_pretrained("model")
    with Path("rows.jsonl").open("w") as file:
        for question, solution in QUESTIONS.items():
            prompt = [{"role": "user", "content": question}]
            file.write(json.dumps({"prompt": prompt, "solution": solution}) + "\n")
    return tmp_path


def fit(**overrides: Any) -> dict[str, float]:
    """Metrics of the last of two steps of the page's config."""
    trainer, model, data = sdp.from_config(
        "trl_readme.yaml",
        {
            "model.model": "model",
            "data.prompts": "rows.jsonl",
            "data.workflow.init_args.sampling": {"max_new_tokens": 6},
            "data.rollout.batch_size": 2,
            "data.rollout.timeout_s": 60,
            "trainer.max_steps": 2,
            "trainer.accelerator": "cpu",
            "trainer.logger": False,
            "trainer.enable_checkpointing": False,
            "trainer.enable_progress_bar": False,
            **overrides,
        },
    )
    trainer.fit(model, data)
    assert trainer.global_step == 2
    assert (model.update.group_std, data.workflow.group_size) == ("sample", 8)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_readme_of_trl_runs_with_its_reward_adapted_by_one_line(readme: Path) -> None:
    trl_rewards.CALLS.clear()
    metrics = fit()
    assert math.isfinite(metrics["train/loss"]) and metrics["train/grad_norm"] > 0
    assert 0 < metrics["train/reward"] < 1
    assert len(trl_rewards.CALLS) >= 4, "two steps of two groups"
    for completions, solutions in trl_rewards.CALLS:
        assert len(completions) == len(solutions) == 8
        assert set(solutions) < set(QUESTIONS.values()) and len(set(solutions)) == 1
        assert all(len(chat) == 1 and chat[0]["role"] == "assistant" for chat in completions)


def test_a_reward_of_texts_is_adapted_by_its_first_line(readme: Path) -> None:
    Path("texts.py").write_text(
        "def reward_len(completions, row):\n"
        "    return [float(len(completion)) for completion in completions]\n"
    )
    metrics = fit(**{"data.workflow.init_args.reward": "texts.py:reward_len"})
    assert 0 < metrics["train/reward"] <= 6


@pytest.mark.parametrize(
    "reward",
    [trl_rewards.reward_len, trl_rewards.accuracy_reward, trl_rewards.ground_truth_reward],
    ids=lambda reward: reward.__name__,
)
def test_a_reward_in_trls_own_form_is_refused_with_the_line_to_write(reward: Any) -> None:
    found = rf"{reward.__name__}\(completions.*\*\*kwargs.*Write def {reward.__name__}\("
    with pytest.raises(sdp.ConfigError, match=found):
        sdp.RLVRWorkflow(reward)
