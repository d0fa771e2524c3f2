"""Servers get weights under the names of the checkpoint, which transformers renames and fuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import sdp_lightning as sdp
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.policy.checkpoint_names import as_in_checkpoint
from sdp_lightning.training.policy.lora import add_adapter
from sdp_lightning.training.policy.weight_export import named_weights
from sdp_lightning.weights.protocol import WeightStream
from support.fake_servers import QUICK, servers
from support.odd_models import odd_model, saved
from support.trainers import make_module, make_trainer, make_workflow

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model(tie_word_embeddings=False),
    "mixtral": lambda: odd_model("mixtral", num_local_experts=4, **EXPERTS),
    "qwen3_moe": lambda: odd_model("qwen3_moe", num_experts=4, moe_intermediate_size=16, **EXPERTS),
    "jamba": lambda: odd_model(
        "jamba",
        num_hidden_layers=4,
        num_experts=4,
        attn_layer_offset=1,
        attn_layer_period=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        **EXPERTS,
    ),
}
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
SPLIT = "model.layers.0.block_sparse_moe.experts.3.w3.weight"


@pytest.mark.parametrize("kind", MODELS)
def test_all_weights_and_those_of_one_layer_are_named_and_shaped_as_the_model_is_saved(
    kind: str, tmp_path: Path
) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    stream = as_in_checkpoint(model, named_weights(model, changed_only=False))
    shapes = [(name, tensor.shape) for name, tensor in stream.layout.items()]
    sent = dict(stream)
    assert [(name, tensor.shape) for name, tensor in sent.items()] == shapes
    assert sent.keys() == expected.keys()
    assert all(sent[name].equal(tensor) for name, tensor in expected.items())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1." in name and "proj" in name)
    part = dict(as_in_checkpoint(model, named_weights(model, changed_only=True)))
    assert part.keys() == {name for name in expected if "layers.1." in name}
    assert all(part[name].equal(expected[name]) for name in part)


def test_names_that_a_module_gives_itself_are_kept() -> None:
    model = MODELS["mixtral"]()
    own = dict(as_in_checkpoint(model, named_weights(model, changed_only=False)))
    again = as_in_checkpoint(model, WeightStream.of(own.items()))
    assert all(tensor is own[name] for name, tensor in again)


def test_an_adapter_keeps_its_names_and_its_base_gets_those_of_the_checkpoint() -> None:
    model = MODELS["mixtral"]()
    plain = set(as_in_checkpoint(model, named_weights(model, changed_only=False)).layout)
    add_adapter(model, sdp.LoRAConfig(4, 8.0, ("q_proj",)))
    sent = dict(as_in_checkpoint(model, named_weights(model, changed_only=False)))
    adapter = {name for name in model.state_dict() if ".lora_" in name}
    assert len(adapter) == 4 and sent.keys() == plain | adapter
    state = model.state_dict()
    assert sent[SPLIT].equal(state[FUSED][3, 48:])
    assert all(sent[name] is not None and sent[name].equal(state[name]) for name in adapter)


def test_a_fit_sends_servers_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    model = MODELS["mixtral"]()
    with servers(1) as [server]:
        data = sdp.RolloutDataModule(
            [{"prompt": f"{i}+{i}="} for i in range(4)],
            make_workflow(lambda completion, row: 1.0),
            engine=f"vllm://{server.host}",
            engine_options=QUICK,
            rollout=sdp.RolloutConfig(batch_size=2, timeout_s=60.0, max_head_lag=0),
        )
        module = make_module(saved(model, tmp_path), trainable="layers.0")
        sync = sdp.WeightSyncCallback(weight_check_every=0)  # the fake server has no model
        make_trainer(sync, max_steps=1).fit(module, data)
        told = server.do()
    first, second = told["loads"]
    assert SPLIT in second and FUSED not in first and len(first) == 41
    assert second == [name for name in first if "layers.0." in name]
    trained = module.require_policy().state_dict()[FUSED][3, 48:]
    assert told["weights"][SPLIT] == trained.flatten()[0].item()
