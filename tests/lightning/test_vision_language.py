"""Checkpoints of vision-language models: their text part is trained, the rest stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sdp_lightning as sdp
from sdp_lightning.cli.dry_run import shrink
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.config.pretrained import beside_text, load_causal_lm
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Context, Segment, Trajectory
from support.odd_models import saved
from support.trainers import make_data, make_module, make_trainer
from support.vision_models import SETTINGS, vision_model

FAST = ("qwen3_vl", "llava", "qwen3_5")
KINDS = [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in SETTINGS]
NOT_EMBEDDED = {"gemma4", "llama4", "mllama", "qwen3_5"}  # so far


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_trained_and_the_rest_is_exported_as_it_was(kind: str, tmp_path: Path) -> None:
    whole = vision_model(kind)
    folder = saved(whole, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    module = make_module(folder, lr=1e-2)
    keep = ModelCheckpoint(tmp_path / "run", filename="step", every_n_train_steps=1)
    trainer = make_trainer(
        sdp.WeightSyncCallback(weight_check_every=1, weight_check_tolerance=1e-4)
        if kind not in NOT_EMBEDDED
        else sdp.WeightSyncCallback(),
        keep,
        max_steps=1,
        enable_checkpointing=True,
    )
    data = make_data(engine=FakeEngine() if kind in NOT_EMBEDDED else "embedded")
    trainer.fit(module, datamodule=data)
    policy = module.require_policy()
    assert type(policy) is type(whole)
    beside = beside_text(whole)
    text = {name for name, _ in whole.named_parameters()} - beside
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == text
    optimized = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(policy.get_parameter(name)) for name in text}

    export_checkpoint(tmp_path / "run" / "step.ckpt", tmp_path / "out")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "out"))
    assert before.keys() == after.keys()
    loaded, report = type(whole).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    for name, weight in loaded.state_dict().items():
        expected = (whole if name in beside else policy).state_dict()[name]
        assert torch.equal(weight, expected), name
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_model_and_text_weights_are_those_with_a_gradient(
    kind: str, tmp_path: Path
) -> None:
    whole = vision_model(kind)
    module = make_module(saved(whole, tmp_path))
    module.configure_model()
    row = Trajectory((Context(range(3, 13)), Segment(0, range(13, 43), [-1.0] * 30)))
    logprobs = whole(input_ids=torch.arange(3, 43)[None]).logits[0].log_softmax(-1)
    scored = logprobs[torch.arange(9, 39), torch.arange(13, 43)]
    np.testing.assert_allclose(module.score([row])[0][0], scored.detach(), atol=1e-4)
    logprobs[:, ::7].sum().backward()
    without = {name for name, weight in whole.named_parameters() if weight.grad is None}
    assert without == beside_text(whole)


def test_the_text_part_alone_loads_as_the_causal_lm_that_it_is(tmp_path: Path) -> None:
    """A checkpoint with the whole configuration, and no weight of the vision tower."""
    whole = vision_model("qwen3_5")
    text: Any = AutoModelForCausalLM.from_config(whole.config)
    text.save_pretrained(tmp_path)
    whole.config.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path), dtype=torch.float32, options={})
    assert type(loaded) is type(text)


def test_a_checkpoint_with_half_a_vision_tower_is_refused(tmp_path: Path) -> None:
    whole = vision_model("qwen3_5")
    weights = whole.state_dict()
    lost = next(name for name in weights if name in beside_text(whole))
    whole.save_pretrained(tmp_path, state_dict={n: w for n, w in weights.items() if n != lost})
    with pytest.raises(sdp.ConfigError, match=f"lacks weights of {type(whole).__name__}.*{lost}"):
        load_causal_lm(str(tmp_path), dtype=torch.float32, options={})


def test_what_is_asked_to_be_trained_beside_text_is_refused(tmp_path: Path) -> None:
    folder = saved(vision_model("llava"), tmp_path)
    with pytest.raises(sdp.ConfigError, match=r"trainable='vision_tower' finds no parameter"):
        make_module(folder, trainable="vision_tower").configure_model()
    module = make_module(folder, lora=sdp.LoRAConfig(rank=2))
    module.configure_model()
    adapters = {n for n, p in module.require_policy().named_parameters() if p.requires_grad}
    assert adapters and all("language_model" in name for name in adapters)


def test_a_model_for_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(sdp.ConfigError, match="model type 'clip' is no language model") as caught:
        make_module(str(tmp_path)).configure_model()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_cuts_down_the_vision_tower_too(kind: str, tmp_path: Path) -> None:
    whole = vision_model(kind)
    small = shrink(saved(whole, tmp_path / "model"), tmp_path / "small")
    assert type(load_causal_lm(str(small), dtype=torch.float32, options={})) is type(whole)
