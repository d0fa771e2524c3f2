"""Where adapters lie in models that are not like a Llama, and what is published of them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import sdp_lightning as sdp
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.policy.lora import adapted_weights, add_adapter
from sdp_lightning.training.policy.weight_export import named_weights
from support.adapters import LORA, shake
from support.lora_models import LORA_MODELS, copy_of, lora_model
from support.odd_models import odd_model, saved
from support.plain_forwards import TOKENS
from support.steps import make_batch, train

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
SHARED = {f"shared_experts.{name}" for name in MLP}
DENSE = {f"mlp.{name}" for name in MLP}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def places(model: Any) -> set[str]:
    """Of an attention layer the last part of each adapted weight's name, of an MLP the last two."""
    found = [re.sub(r"\.\d+|\.weight$", "", name).split(".") for name in adapted_weights(model)]
    return {".".join(parts[-2:] if parts[-1] in MLP else parts[-1:]) for parts in found}


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)


def train_once(model: Any) -> None:
    """One step of an optimizer, on whatever is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logits = model(input_ids=TOKENS, use_cache=False).logits
    logits.log_softmax(-1)[..., :-1, :].gather(-1, TOKENS[:, 1:, None]).mean().backward()
    torch.optim.AdamW(trained, lr=1e-2).step()


def gap_of(model: Any) -> float:
    """How far a plain model with the published weights is from the policy."""
    engine = copy_of(model)
    assert not engine.load_state_dict(
        dict(named_weights(model, changed_only=False, merged_alpha=LORA.alpha))
    ).missing_keys
    return float((logprobs(engine) - logprobs(model)).abs().max())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("glm4_moe", ATTENTION | SHARED | DENSE),
        ("deepseek_v3", LATENT | SHARED | DENSE),
        ("qwen3_moe", ATTENTION),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("mamba2", {"in_proj"}),
    ],
)
def test_by_default_an_adapter_lies_on_attention_dense_and_shared_mlps(
    kind: str, expected: set[str]
) -> None:
    model = lora_model(kind)
    add_adapter(model, LORA)
    assert places(model) == expected
    before = logprobs(model)
    train_once(model)
    assert gap_of(model) < 2e-5
    assert float((logprobs(model) - before).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("glm4_moe", ("down_proj",), {"mlp.down_proj", "shared_experts.down_proj"}),
        ("glm4_moe", ("experts.down_proj", "q_proj"), {"experts.down_proj", "q_proj"}),
        ("qwen3_moe", ("gate_up_proj",), {"gate_up_proj"}),
        ("gpt_oss", ("experts",), {"gate_up_proj", "experts.down_proj"}),
        ("afmoe", ("router.gate", "shared_experts.up_proj"), {"gate", "shared_experts.up_proj"}),
    ],
    ids=["a leaf", "a stack and a leaf", "a stack", "experts", "a router"],
)
def test_experts_and_routers_get_an_adapter_where_asked(
    kind: str, asked: tuple[str, ...], expected: set[str]
) -> None:
    """gpt_oss stores its experts as [in, out], the others as [out, in]."""
    model = lora_model(kind)
    before = logprobs(model)
    add_adapter(model, sdp.LoRAConfig(4, LORA.alpha, asked))
    assert places(model) == expected
    shake(model)
    assert gap_of(model) < 2e-5
    assert float((logprobs(model) - before).abs().max()) > 1e-2


def test_square_experts_are_merged_the_right_way_round() -> None:
    """Their shape does not tell [in, out] from [out, in]."""
    for kind in ("gpt_oss", "mixtral"):
        settings = LORA_MODELS["gpt_oss"] | {"intermediate_size": 32}
        model = odd_model(kind, config=AutoConfig.for_model(kind, **settings))
        add_adapter(model, sdp.LoRAConfig(4, LORA.alpha, ("experts.down_proj",)))
        shake(model)
        assert gap_of(model) < 2e-5, kind


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("mamba2", "out_proj", r"out_proj of model type 'mamba2', where no .* peft takes no out_p"),
        ("jamba", "dt_proj", r"layers\.0\.mamba\.dt_proj .* reads its weight and does not call it"),
        ("qwen3_moe", "up_proj", r"names up_proj, but .*and its experts experts.down_proj, exp"),
        ("gpt2", "lm_head", r"names lm_head, but .* beside its head are c_attn, c_fc, c_proj\."),
    ],
)
def test_what_takes_no_adapter_is_refused_by_name(kind: str, asked: str, message: str) -> None:
    with pytest.raises(sdp.ConfigError, match=message):
        add_adapter(lora_model(kind), sdp.LoRAConfig(target_modules=(asked,)))


def test_what_is_left_out_by_default_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sdp_lightning")
    models = [lora_model("jamba"), lora_model("afmoe")]
    for model in models:
        add_adapter(model, LORA)
        assert not places(model) & {"dt_proj", "gate", "gate_up_proj"}
    said = "\n".join(caplog.messages)
    assert re.search(r"no adapter on dt_proj of model type 'jamba': its block reads", said)
    assert "routers and experts: experts.down_proj, experts.gate_up_proj, router.gate;" in said


class OneExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 8), nn.Linear(8, 32)


class Mixture(nn.Module):
    """Experts that are modules, as code of the hub has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList([OneExpert() for _ in range(4)])
        self.shared = OneExpert()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = self.gate(hidden).softmax(-1)
        parts = [expert.down_proj(expert.up_proj(hidden)) for expert in self.experts]
        routed = sum(weights[..., i, None] * part for i, part in enumerate(parts))
        return routed + self.shared.down_proj(self.shared.up_proj(hidden))


def test_experts_that_are_modules_are_left_out_and_added_by_name() -> None:
    def model() -> Any:
        torch.manual_seed(0)
        config: Any = LlamaConfig(num_local_experts=4, **_LLAMA)
        made: Any = LlamaForCausalLM(config).eval()
        for layer in made.model.layers:
            layer.mlp = Mixture()
        return made

    default, asked = model(), model()
    add_adapter(default, LORA)
    assert places(default) == ATTENTION | {"shared.up_proj", "shared.down_proj"}
    add_adapter(asked, sdp.LoRAConfig(4, 8.0, ("experts.up_proj", "gate")))
    assert places(asked) == {"experts.up_proj", "gate"}
    assert len(adapted_weights(asked)) == 2 * (4 + 1)
    asked = model()
    add_adapter(asked, sdp.LoRAConfig(4, 8.0, ("experts",)))
    assert len(adapted_weights(asked)) == 2 * 4 * 2


_LLAMA: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def test_layers_that_share_a_weight_are_published_with_one_value() -> None:
    """Zamba's blocks have one transformer, under several names."""
    model = lora_model("zamba2")
    add_adapter(model, LORA)
    train_once(model)
    sent = dict(named_weights(model, changed_only=True, merged_alpha=LORA.alpha))
    tied = {a: b for a, b in model.all_tied_weights_keys.items() if a in sent and b in sent}
    assert len(tied) > 5
    for one, other in tied.items():
        assert torch.equal(sent[one], sent[other]), one
    assert gap_of(model) < 2e-5


def test_one_module_in_two_places_keeps_one_adapter() -> None:
    model: Any = tiny_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj = first.q_proj
    add_adapter(model, sdp.LoRAConfig(4, 8.0, ("q_proj", "up_proj")))
    assert second.q_proj is first.q_proj
    shake(model)
    sent = dict(named_weights(model, changed_only=False, merged_alpha=8.0))
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert torch.equal(sent[names[0]], sent[names[1]])
    plain = tiny_model()
    plain.load_state_dict(sent)
    torch.testing.assert_close(logprobs(plain), logprobs(model), atol=2e-5, rtol=0)


def test_a_layer_whose_weight_is_an_embedding_too_is_refused() -> None:
    model: Any = tiny_model(hidden_size=32)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(32, 32))
    model.model.extra = nn.Embedding(32, 32)
    model.model.extra.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(sdp.ConfigError, match=r"0\.self_attn\.q_proj .* also that of model\.extra"):
        add_adapter(model, sdp.LoRAConfig(target_modules=("q_proj",)))


def test_an_adapter_that_peft_puts_elsewhere_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inject: Any = peft.inject_adapter_in_model

    def elsewhere(config: Any, model: Any) -> Any:
        """As peft does with targets of models whose types it knows."""
        if model.get_submodule("").__class__ is nn.Module and config.r == LORA.rank:
            config.target_modules = {"up_proj"}
        return inject(config, model)

    monkeypatch.setattr(peft, "inject_adapter_in_model", elsewhere)
    with pytest.raises(
        sdp.ConfigError, match=r"peft put none on model\.layers\.0\.mlp\.down_proj\.weight.*\(2 in"
    ):
        add_adapter(tiny_model(), sdp.LoRAConfig(LORA.rank, 8.0, ("up_proj", "down_proj")))


@pytest.mark.parametrize("asked", [None, ("experts", "o_proj")], ids=["default", "experts"])
def test_a_mixture_trains_and_publishes_through_the_module(
    tmp_path: Path, asked: tuple[str, ...] | None
) -> None:
    folder = saved(lora_model("glm4_moe"), tmp_path)
    lora = sdp.LoRAConfig(4, LORA.alpha, asked)
    module, _ = train(folder, make_batch(folder, (2,)), lora=lora)
    assert gap_of(module.require_policy()) < 2e-5
    if asked is not None:
        with pytest.raises(sdp.ConfigError, match=r"on experts \(model\.\S+\).*transport='lora'"):
            module.named_weights(lora_alpha=LORA.alpha)
