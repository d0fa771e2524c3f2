"""What engines get of a LoRA adapter: merged weights, or the adapter by its path."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

import sdp_lightning as sdp
from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.embedded.model_checks import text_logprobs
from sdp_lightning.lightning.weight_check import WeightCheck
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.policy.lora import is_adapter, merge
from sdp_lightning.training.policy.weight_export import named_weights
from sdp_lightning.weights.protocol import WeightStream
from support.adapters import LORA, Compare, adapted, shake
from support.fake_servers import QUICK, servers
from support.plain_forwards import TOKENS, logits
from support.trainers import Recorder, make_data, make_module, make_trainer, make_workflow


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_weights_have_the_names_of_the_base_and_the_logits_of_the_policy(tied: bool) -> None:
    policy = adapted(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    plain = tiny_model(tie_word_embeddings=tied, seed=9)
    sent = dict(named_weights(policy, changed_only=False, merged_alpha=LORA.alpha))
    assert list(sent) == list(plain.state_dict())
    plain.load_state_dict(sent)
    torch.testing.assert_close(logits(plain), logits(policy), atol=1e-5, rtol=0)
    base = logits(tiny_model(tie_word_embeddings=tied))
    assert float((logits(policy) - base).abs().max()) > 0.1
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_only_layers_with_an_adapter_are_sent_again_but_whole() -> None:
    policy = adapted(sdp.LoRAConfig(4, 8.0, ("v_proj",)))
    sent = [name for name, _ in named_weights(policy, changed_only=True, merged_alpha=8.0)]
    assert sent == [name for name in tiny_model().state_dict() if ".layers." in name]
    as_it_is = [name for name, _ in named_weights(policy, changed_only=True)]
    assert as_it_is == [name for name in policy.state_dict() if is_adapter(name)]


def watched(stream: WeightStream, policy: Any) -> tuple[WeightStream, Callable[[], int]]:
    """``stream``, and the most tensors of its own making that were alive at the same time."""
    own = {tensor.data_ptr() for tensor in policy.state_dict().values()}
    made: list[weakref.ref[torch.Tensor]] = []
    most = [0]

    def make(name: str) -> torch.Tensor:
        _, tensor = next(stream)
        if tensor.data_ptr() not in own:
            made.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in made))
        return tensor

    return WeightStream(stream.layout, make), lambda: max(most)


def test_an_engine_in_this_process_takes_merged_weights_one_at_a_time() -> None:
    policy = adapted()
    engine = EmbeddedEngine(tiny_model(), device="cpu", max_slots=2)
    engine.start()
    try:
        merged = named_weights(policy, changed_only=False, merged_alpha=LORA.alpha)
        stream, most = watched(merged, policy)
        engine.update_weights(stream, 0, reset=True)
        assert most() == 1
        tokens = TOKENS[0].numpy()
        expected = text_logprobs(policy, tokens)
        torch.testing.assert_close(
            torch.from_numpy(engine.prompt_logprobs(tokens)["embedded"]),
            expected,
            atol=1e-5,
            rtol=0,
        )
    finally:
        engine.close()


def test_a_stream_that_does_not_fit_leaves_the_engine_as_it_was() -> None:
    policy, other = adapted(), adapted(hidden_size=16)
    engine = EmbeddedEngine(tiny_model(), device="cpu", max_slots=2)
    engine.start()
    tokens = TOKENS[0].numpy()
    try:
        stream = named_weights(policy, changed_only=False, merged_alpha=LORA.alpha)
        engine.update_weights(stream, 0, reset=True)
        before = engine.prompt_logprobs(tokens)["embedded"]
        made: list[str] = []
        wrong = named_weights(other, changed_only=True, merged_alpha=LORA.alpha)
        unread = WeightStream(wrong.layout, lambda name: made.append(name) or wrong.layout[name])
        with pytest.raises(sdp.EngineError, match=r"q_proj.weight has shape \(16, 16\)"):
            engine.update_weights(unread, 1)
        assert made == [] and engine.version == 0
        assert (engine.prompt_logprobs(tokens)["embedded"] == before).all()
    finally:
        engine.close()


def test_tied_weights_that_come_with_different_values_are_found_when_they_come() -> None:
    """Those on the meta device could not be compared before."""
    weights = tiny_model(tie_word_embeddings=False).state_dict()
    layout = {name: tensor.to("meta") for name, tensor in weights.items()}
    engine = EmbeddedEngine(tiny_model(), device="cpu", max_slots=2)
    engine.start()
    try:
        with pytest.raises(sdp.EngineError, match="are one tied tensor in the engine's model"):
            engine.update_weights(WeightStream(layout, weights.__getitem__), 0, reset=True)
    finally:
        engine.close()


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_at_lag_0_the_engine_samples_with_the_trained_adapter(model_folder: str, kl: float) -> None:
    compare, recorder = Compare(), Recorder()
    module = make_module(
        model_folder, lora=LORA, lr=3e-2, loss=LossConfig(kl_coefficient=kl), update=TWO
    )
    sync = sdp.WeightSyncCallback(weight_check_every=1, weight_check_tolerance=1e-4)
    trainer = make_trainer(compare, sync, recorder, max_steps=8)
    trainer.fit(module, make_data(max_head_lag=0))
    assert len(compare.errors) == 4 and max(compare.errors) < 1e-5
    changed = "model.layers.1.mlp.up_proj.weight"
    moved = recorder.weights[3][changed] - recorder.weights[0][changed]
    assert float(moved.abs().max()) > 1e-2
    tensors = [n for n in recorder.weights[0] if ".layers." in n]
    assert recorder.metrics[-1]["publish/bytes"] == sum(
        recorder.weights[0][name].nbytes for name in tensors
    )


TWO = UpdateConfig(num_minibatches=2)


def test_an_engine_that_keeps_an_old_layer_is_found_and_the_layer_named() -> None:
    echo, policy, engine = WeightCheck(tolerance=1e-3), adapted(), tiny_model()

    def give(*, without: str = "") -> None:
        sent = dict(named_weights(policy, changed_only=False, merged_alpha=LORA.alpha))
        engine.load_state_dict({n: t for n, t in sent.items() if n != without}, strict=False)

    def check() -> float:
        return echo.check(
            policy,
            num_embeddings=40,
            score=lambda trajectory: text_logprobs(policy, trajectory.token_ids).numpy(),
            ask=lambda tokens: {"engine": text_logprobs(engine, tokens).numpy()},
        )

    give()
    assert check() < 1e-5
    shake(policy, seed=5)
    stale = "model.layers.1.mlp.up_proj.weight"
    give(without=stale)
    with pytest.raises(sdp.EngineError, match=rf"Most at fault: {stale}\. "):
        check()


def test_a_server_that_takes_adapters_gets_the_trained_one_by_its_path(
    model_folder: str, tmp_path: Path
) -> None:
    rewards = itertools.count()  # the fake server's samples are alike
    with servers(1) as [server]:
        data = sdp.RolloutDataModule(
            [{"prompt": f"{i}+{i}="} for i in range(16)],
            make_workflow(lambda completion, row: next(rewards) % 2),
            engine=f"vllm://{server.host}",
            engine_options=QUICK | {"transport": "lora", "weight_folder": str(tmp_path)},
            rollout=sdp.RolloutConfig(batch_size=2, timeout_s=60.0, max_head_lag=0),
        )
        sent: list[dict[str, torch.Tensor]] = []
        alphas: list[float] = []

        class Look(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                newest = max(
                    tmp_path.glob("*/adapter-*"), key=lambda p: int(p.name.partition("-")[2])
                )
                sent.append(load_file(newest / "adapter_model.safetensors"))
                config = json.loads((newest / "adapter_config.json").read_text())
                alphas.append(config["lora_alpha"])

        module = make_module(model_folder, lora=LORA)
        sync = sdp.WeightSyncCallback(weight_check_every=0)  # the fake server has no model
        make_trainer(sync, Look(), max_steps=2).fit(module, data)
        assert len(server.do()["adapters"]) == 1
    state = module.require_policy().state_dict()
    assert alphas == [8.0, 8.0] and len(sent[1]) == 28
    for name, tensor in sent[1].items():
        own = name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight"
        assert torch.equal(tensor, state[own])
    up = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert not torch.equal(sent[0][up], sent[1][up])


@pytest.mark.parametrize("lora", [None, sdp.LoRAConfig(4, 4.0)])
def test_an_engine_that_awaits_another_adapter_is_refused(
    model_folder: str, lora: sdp.LoRAConfig | None
) -> None:
    module = make_module(model_folder, lora=lora)
    module.configure_model()
    with pytest.raises(sdp.ConfigError, match=r"lora_alpha=8, and the module has lora=.*alpha=8\)"):
        module.named_weights(lora_alpha=8.0)


def test_merging_is_exact_for_wide_types() -> None:
    w, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((3, 5), (2, 5), (3, 2)))
    assert torch.allclose(merge([w, a, b], 6.0), w + 3 * b @ a, atol=1e-14, rtol=0)
    assert merge([w], 6.0) is w
