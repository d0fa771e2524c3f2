"""A dry run: everything of a config, cut down, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from sdp_lightning.cli.dry_run import shrink
from sdp_lightning.cli.main import main
from sdp_lightning.config.eos_tokens import read_eos_tokens
from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_tokenizer
from support.paths import ROOT

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
LARGE: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28),
    "qwen3_moe": Qwen3MoeConfig(num_hidden_layers=48, num_experts=128),
    "gemma3_text": Gemma3TextConfig(hidden_size=2304, num_hidden_layers=26),
}


@pytest.fixture
def large(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The folder of a large model, as far as a dry run reads it."""
    folder = tmp_path / "large"
    LARGE[request.param].save_pretrained(folder)
    GenerationConfig(eos_token_id=[1, 7]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("large", LARGE, indirect=True)
def test_a_model_is_cut_down_and_stays_what_it_is(large: str, tmp_path: Path) -> None:
    folder = shrink(large, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(folder)
    assert small.config.model_type == AutoConfig.from_pretrained(large).model_type
    assert small.num_parameters() < 40_000_000 and small.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(folder).decode([5, 6]) == "23"
    assert read_eos_tokens(folder).ids == (1, 7)
    logits = small(input_ids=small.dummy_inputs["input_ids"] % 40).logits
    assert logits.isfinite().all()


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        shrink("/no/such/model", tmp_path)


def test_a_recipe_runs_dry_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    load_object("recipes/tiny_cpu/model.py:model_path")()  # which is said, once
    capsys.readouterr()
    assert main(["fit", "--config=recipes/tiny_cpu/config.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out.strip()
    assert "\n" not in out
    assert out.startswith("dry run: 2 batches of 2 groups trained")
    assert "versions 0 to 2 published; validation rewarded with 0.000" in out
    assert "a checkpoint of 4 optimizer steps written" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipes"]


def test_only_fit_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--dry-run"]) == 2
    assert "--dry-run belongs to fit" in capsys.readouterr().err


def test_a_part_that_fails_fails_the_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def reward(completion, row):\n    return row['gold']\n")
    flag: Any = "--data.workflow.init_args.reward=mine.py:reward"
    assert main(["fit", "--config=recipes/tiny_cpu/config.yaml", flag, "--dry-run"]) == 1
    assert "KeyError: 'gold' It came from" in capsys.readouterr().err


def test_all_rows_are_checked_with_the_budgets_of_the_run(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}=" if i < 20 else "7" * 20} for i in range(21)]
    (tmp_path / "task.py").write_text(f"rows = {rows}\ndef reward(text, row): return len(text)")
    flags = [
        *("fit", "--dry-run", f"--model.model={model_folder}", "--data.prompts=task.py:rows"),
        "--data.workflow=sdp_lightning.RLVRWorkflow",
        "--data.workflow.init_args.reward=task.py:reward",
        '--data.workflow.init_args.sampling={"max_new_tokens": 500}',
    ]
    assert main(flags) == 2
    assert "1 prompt too long): row 20: its prompt has 20 tokens" in capsys.readouterr().err
    assert main([*flags, "--data.rollout.prompts_check=drop"]) == 0
    assert "dry run: 2 batches" in capsys.readouterr().out
