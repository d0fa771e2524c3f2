"""No policy draws random numbers while it is scored or trained, whatever it calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdp_lightning as sdp
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.policy.forward import sequence_logprobs
from sdp_lightning.training.policy.loading import disable_noise, recompute_activations
from support.odd_models import odd_model, saved
from support.plain_forwards import gradients, plain, random_batch
from support.trainers import make_data, make_module, make_trainer

NOISY = {
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
    "seed_oss": {"residual_dropout": 0.3, "attention_dropout": 0.3},
    "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "doge": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
    "xglm": {"dropout": 0.3, "layerdrop": 0.5, "activation_dropout": 0.3},
}


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", NOISY)
def test_scores_and_gradients_are_those_of_eval_mode(kind: str, recomputed: bool) -> None:
    model, batch = odd_model(kind, **NOISY[kind]), random_batch(0)
    expected, _ = plain(model, batch)
    wanted = gradients(model, expected)
    model.train()
    noisy, _ = plain(model, batch)
    assert (noisy - expected).abs().max() > 0.05, "its settings do nothing here"
    if recomputed:
        recompute_activations(model)
    disable_noise(model)
    found = sequence_logprobs(model, batch).logprobs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    for name, grad in gradients(model, found).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4)


def test_activations_are_recomputed_in_the_backward_pass_and_not_kept() -> None:
    model, batch = tiny_model(num_layers=3), random_batch(0)
    runs: list[bool] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: runs.append(module.training))

    def kept_bytes() -> tuple[int, Tensor]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.append(tensor.nbytes), tensor)[1], lambda tensor: tensor
        ):
            return_value = sequence_logprobs(model, batch).logprobs.sum()
        return sum(sizes), return_value

    disable_noise(model)
    plainly, _ = kept_bytes()
    runs.clear()
    recompute_activations(model)
    disable_noise(model)
    sparsely, loss = kept_bytes()
    assert runs == [False] * 3 and sparsely < plainly / 3
    loss.backward()
    assert runs == [False] * 6  # each layer once more


def test_a_module_in_train_mode_keeps_its_policy_still(tmp_path: Path) -> None:
    folder = saved(odd_model("opt", **NOISY["opt"]), tmp_path)
    module = make_module(folder, gradient_checkpointing=True)
    module.configure_model()
    policy: Any = module.policy
    for mode in (True, False, True):
        assert module.train(mode) is module and module.training is mode
        trained = {type(m).__name__ for m in policy.modules() if m.training}
        assert trained == {"OPTDecoderLayer"}


def test_a_model_that_checkpoints_in_its_decoder_still_can() -> None:
    """Remote code, written for older transformers, asks its decoder for its mode."""
    decoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    decoder.gradient_checkpointing = True
    disable_noise(decoder.train())
    assert [module.training for module in decoder.modules()] == [True, False, False]


def test_a_run_of_a_model_with_dropout_has_no_drift(tmp_path: Path) -> None:
    """Seed-OSS has dropout of 10 % unless its config says otherwise."""
    folder = saved(odd_model("seed_oss"), tmp_path)
    module, trainer = make_module(folder), make_trainer(sdp.WeightSyncCallback(), max_steps=2)
    trainer.fit(module, datamodule=make_data(max_head_lag=0))
    assert trainer.callback_metrics["drift/abs_log_mean"] < 1e-4
