"""No weight of a loaded model is random, and none of its checkpoint is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

import sdp_lightning as sdp
from sdp_lightning.config.pretrained import load_causal_lm
from sdp_lightning.testing import tiny_model
from support.odd_models import odd_model, saved
from support.trainers import make_module

Change = Callable[[dict[str, torch.Tensor]], None]


def load(folder: str, **options: Any) -> Any:
    return load_causal_lm(folder, dtype=torch.float32, options=options)


def rewrite(folder: Path, change: Change) -> str:
    """An untied model, with other weights in its file."""
    saved(tiny_model(tie_word_embeddings=False), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def lose_a_layer(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "layers.1." in name]:
        del weights[name]


def add_a_value_head(weights: dict[str, torch.Tensor]) -> None:
    weights["v_head.weight"] = torch.ones(1, 32)


def widen_the_head(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = torch.ones(60, 32)


def save_as(kind: Any) -> Callable[[Path], str]:
    def save(folder: Path) -> str:
        return saved(kind.from_config(tiny_model(tie_word_embeddings=False).config), folder)

    return save


CASES = [
    (save_as(AutoModel), r"lacks weights of LlamaForCausalLM.*: lm_head\.weight\. Base models"),
    (save_as(AutoModelForSequenceClassification), r"lacks weights.*: lm_head\.weight\. Base"),
    (lambda folder: rewrite(folder, lose_a_layer), r"lacks.*layers\.1\.\S+, .* and 5 more\."),
    (lambda folder: rewrite(folder, add_a_value_head), r"would be lost: v_head\.weight\."),
]
IDS = ["base model", "reward model", "half copied", "surplus"]


@pytest.mark.parametrize(("save", "message"), CASES, ids=IDS)
def test_trainer_and_engine_refuse_a_checkpoint_that_is_not_the_model_s(
    tmp_path: Path, save: Callable[[Path], str], message: str
) -> None:
    folder = save(tmp_path)
    with pytest.raises(sdp.ConfigError, match=message):
        make_module(folder).configure_model()
    engine = sdp.EmbeddedEngine(folder, device="cpu")
    with pytest.raises(sdp.ConfigError, match=message):
        engine.start()


def test_a_weight_of_another_shape_is_not_replaced_by_a_random_one(tmp_path: Path) -> None:
    folder = rewrite(tmp_path, widen_the_head)
    with pytest.raises(sdp.ConfigError, match=r"lacks weights.*: lm_head\.weight"):
        load(folder, ignore_mismatched_sizes=True)


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / sorted(set(index["weight_map"].values()))[-1]).unlink()
    with pytest.raises(OSError, match="model-0000"):
        load(str(tmp_path))


def test_a_tied_head_lacks_nothing(tmp_path: Path) -> None:
    """Also in the checkpoint of a model without a head, whose names have no prefix."""
    model = tiny_model(tie_word_embeddings=True)
    folder = saved(model.model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_capped_attention_scores_are_computed_unless_the_user_asks_otherwise(
    tmp_path: Path,
) -> None:
    folder = saved(odd_model("gemma2", attn_logit_softcapping=0.1), tmp_path)
    assert load(folder).config._attn_implementation == "eager"
    asked = load(folder, attn_implementation="sdpa")
    assert asked.config._attn_implementation == "sdpa"
    uncapped = saved(odd_model("gemma2", attn_logit_softcapping=None), tmp_path)
    assert load(uncapped).config._attn_implementation == "sdpa"
