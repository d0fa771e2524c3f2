"""LoRA adapters: what trains, and what the reference is."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import sdp_lightning as sdp
import sdp_lightning.training.policy.loading
from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.policy.lora import add_adapter, is_adapter
from sdp_lightning.training.policy.weight_export import named_weights
from sdp_lightning.training.update import PolicyUpdate
from support.adapters import LORA, adapted, shake
from support.steps import assert_same, loss_by_hand, make_batch, plain_logprobs, train
from support.trainers import Judge, make_module, make_trainer

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_only_the_adapter_trains_and_the_base_stays_bit_for_bit(model_folder: str) -> None:
    batch = make_batch(model_folder)
    module, recorder = train(model_folder, batch, batch, lora=LORA)
    policy = module.require_policy()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 4)[1] for name in trained} == LINEAR
    assert all(map(is_adapter, trained)) and len(trained) == 2 * 2 * 7
    assert recorder.gradients[1].keys() == trained
    base = Judge(model_folder).weights()
    state = policy.state_dict()
    for name, value in base.items():
        kept = state.get(name, state.get(name.replace(".weight", ".base_layer.weight")))
        assert kept is not None and torch.equal(kept, value), name
    moved = [name for name in trained if float(policy.get_parameter(name).detach().abs().max()) > 0]
    assert len(moved) == len(trained)  # B is 0 at the start


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_the_gradient_is_that_of_the_loss_by_hand(
    model_folder: str, layout: Any, checkpointing: bool
) -> None:
    batch, config = make_batch(model_folder), LossConfig(trust_region="behavior")
    module = make_module(
        model_folder,
        lora=LORA,
        loss=config,
        optimizer=sdp.OptimizerConfig(gradient_clip_val=None),
        update=UpdateConfig(layout=layout, max_tokens_per_microbatch=60),
        gradient_checkpointing=checkpointing,
    )
    module.configure_model()
    policy = module.require_policy()
    shake(policy)
    expected = loss_by_hand(policy, batch, config)[1]
    policy.zero_grad()
    found = gradients_of_a_step(module, batch)
    assert_same(found, expected)


def gradients_of_a_step(module: sdp.SegmentWisePPOModule, batch: Batch) -> dict[str, torch.Tensor]:
    from support.steps import Batches, StepRecorder

    recorder = StepRecorder()
    trainer = make_trainer(recorder, max_steps=1, limit_val_batches=0)
    trainer.fit(module, Batches(batch))
    return recorder.gradients[0]


def test_the_reference_is_the_base_with_the_adapter_off_and_there_is_no_copy(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = sdp_lightning.training.policy.loading.load_policy
    monkeypatch.setattr(
        sdp_lightning.training.policy.loading,
        "load_policy",
        lambda *args: loads.append("") or load(*args),
    )
    batch, seen = make_batch(model_folder), list[Batch]()
    prepare = PolicyUpdate.prepare

    def kept(*arguments: Any, **more: Any) -> Batch:
        seen.append(prepare(*arguments, **more))
        return seen[-1]

    monkeypatch.setattr(PolicyUpdate, "prepare", kept)
    module = sdp.SegmentWisePPOModule(
        model_folder,
        lora=LORA,
        loss=LossConfig(kl_coefficient=0.3),
        optimizer=sdp.OptimizerConfig(lr=1e-1),
    )
    module.configure_model()
    shake(module.require_policy())
    found = gradients_of_a_step(module, batch)
    assert len(found) == 28  # the adapter is on again, and trained
    assert loads == [""]
    expected = plain_logprobs(Judge(model_folder).model, batch)
    reference = seen[0].reference_logprobs
    assert reference is not None
    torch.testing.assert_close(reference, expected.detach(), atol=1e-5, rtol=0)
    own = plain_logprobs(module.require_policy(), batch)
    assert float((own - expected).detach().abs().max()) > 0.01


def test_only_the_named_layers_get_an_adapter() -> None:
    model = adapted(sdp.LoRAConfig(2, 4.0, ("q_proj", "down_proj")))
    kinds = {
        name.split(".lora_")[0].rpartition(".")[2] for name in filter(is_adapter, names(model))
    }
    assert kinds == {"q_proj", "down_proj"}


def names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_of_a_model_in_half_precision_the_adapter_is_in_full() -> None:
    model = tiny_model().bfloat16()
    add_adapter(model, LORA)
    kinds = {is_adapter(name): p.dtype for name, p in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    shake(model)
    merged = dict(named_weights(model, changed_only=False, merged_alpha=8.0))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"alpha": 0.0}, r"alpha must be positive, got 0\.0"),
        ({"alpha": float("nan")}, "alpha must be positive, got nan"),
        ({"target_modules": "q_proj"}, "target_modules='q_proj' must be a sequence of names"),
        ({"target_modules": ()}, r"target_modules=\(\) must be a sequence of names"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sdp.ConfigError, match=message):
        sdp.LoRAConfig(**settings)


@pytest.mark.parametrize(("target", "tied"), [("lm_head", True), ("lm_head", False), ("wq", True)])
def test_a_target_that_is_no_linear_layer_beside_the_head_is_refused(
    target: str, tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    with pytest.raises(
        sdp.ConfigError,
        match=f"names {target}, but the linear layers of model type 'llama'.*q_proj",
    ):
        add_adapter(model, sdp.LoRAConfig(target_modules=(target, "q_proj")))


def test_what_is_trained_is_said_once(model_folder: str) -> None:
    with pytest.raises(sdp.ConfigError, match=r"trainable='norm' and lora= both say"):
        make_module(model_folder, trainable="norm", lora=LORA)


def test_without_peft_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(sdp.ConfigError, match=r"pip install 'sdp-lightning\[lora\]'"):
        add_adapter(tiny_model(), LORA)
