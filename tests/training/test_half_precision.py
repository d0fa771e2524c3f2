"""Trained weights are in float32: steps of an optimizer would not reach halves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from sdp_lightning.training.policy.forward import own_logprobs
from sdp_lightning.training.policy.lora import is_adapter
from support.adapters import LORA
from support.steps import make_batch, train
from support.trainers import make_module


@pytest.mark.parametrize("asked", ["bfloat16", "float16", "auto"])
def test_trained_weights_in_half_precision_are_refused(tmp_path: Path, asked: str) -> None:
    """``"auto"`` is what the checkpoint has."""
    tiny_model().bfloat16().save_pretrained(tmp_path)
    module = make_module(str(tmp_path), model_kwargs={"dtype": asked})
    kind = "bfloat16" if asked == "auto" else asked
    with pytest.raises(
        sdp.ConfigError, match=rf"are in {kind} \(model\.\S+\).*'bf16-mixed'.*lora="
    ):
        module.configure_model()
    whole = make_module(str(tmp_path))  # the default is float32, whatever the checkpoint has
    whole.configure_model()
    assert {weight.dtype for weight in whole.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_adapter_over_a_base_in_bfloat16_learns_as_one_over_float32(
    tmp_path: Path, precision: str
) -> None:
    """At the default learning rate, by which no weight in bfloat16 would move."""
    base = tiny_model(num_layers=1).bfloat16()
    base.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    batch = make_batch(str(tmp_path))
    settings: dict[str, Any] = {"optimizer": sdp.OptimizerConfig(), "lora": LORA}
    torch.manual_seed(0)  # of A
    half, recorder = train(
        str(tmp_path),
        *[batch] * 3,
        model_kwargs={"dtype": "bfloat16"},
        trainer={"precision": precision},
        **settings,
    )
    torch.manual_seed(0)
    _, wanted = train(str(tmp_path), batch, **settings)
    policy = half.require_policy()
    for name, weight in policy.named_parameters():
        if not is_adapter(name):
            original = base.get_parameter(name.replace(".base_layer.", "."))
            assert torch.equal(weight, original) and weight.dtype == torch.bfloat16
        elif ".lora_B." in name:  # 0 at the start
            assert weight.dtype == torch.float32 and bool((weight != 0).all())
    flat = [
        torch.cat([gradient.float().flatten() for _, gradient in sorted(gradients.items())])
        for gradients in (recorder.gradients[0], wanted.gradients[0])
    ]
    assert torch.cosine_similarity(*flat, dim=0) > 0.98
    with torch.no_grad():
        gap = (half._runner.logprobs(batch) - own_logprobs(policy, batch)[0]).abs()
    assert gap.sum() / batch.num_tokens < 0.02
