"""LoRA adapters: what trains, what is published of them, what the reference and checkpoints are."""

from __future__ import annotations

import itertools
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sdp_lightning as sdp
import sdp_lightning.training.policy.loading
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.embedded.model_checks import text_logprobs
from sdp_lightning.lightning.weight_check import WeightCheck
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.policy.lora import add_adapter, is_adapter, merge
from sdp_lightning.training.policy.weight_export import named_weights
from sdp_lightning.training.update import PolicyUpdate
from sdp_lightning.weights.protocol import WeightStream
from support.fake_servers import QUICK, servers
from support.steps import assert_same, loss_by_hand, make_batch, plain_logprobs, train
from support.trainers import (
    Judge,
    Recorder,
    make_data,
    make_module,
    make_trainer,
    make_workflow,
)

LORA = sdp.LoRAConfig(rank=4, alpha=8.0)
TOKENS = torch.tensor([[5, 9, 12, 7, 20, 3]])
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(lora: sdp.LoRAConfig = LORA, *, seed: int = 3, **settings: Any) -> Any:
    """A tiny model with an adapter that does something."""
    model = tiny_model(**settings)
    add_adapter(model, lora)
    shake(model, seed)
    return model


@torch.no_grad()
def shake(model: Any, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


# What trains --------------------------------------------------------------------------------------


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

    def kept(*arguments: Any) -> Batch:
        seen.append(prepare(*arguments))
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


# What is published --------------------------------------------------------------------------------


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


class Compare(Callback):
    """How far the engine's log-probs are from transformers' own forward of the trained policy."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        expected = plain_logprobs(pl_module.require_policy(), batch).detach()
        assert (batch.lags[batch.loss_mask] == 0).all()
        self.errors.append(float((expected - batch.behavior_logprobs).abs().max()))


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
        make_trainer(sdp.WeightSyncCallback(), Look(), max_steps=2).fit(module, data)
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


# Checkpoints --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After two steps of three."""
    folder = tmp_path_factory.mktemp("lora")
    keep = ModelCheckpoint(folder, filename="two", every_n_train_steps=2)
    trainer = make_trainer(sdp.WeightSyncCallback(), keep, max_steps=2, enable_checkpointing=True)
    trainer.fit(make_module(model_folder, lora=LORA, lr=3e-2), make_data(max_head_lag=0))
    return folder / "two.ckpt"


no_model_checkpoint = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def resume(folder: str, path: Path, *callbacks: Callback, lora: sdp.LoRAConfig | None) -> None:
    module = make_module(folder, lr=3e-2, lora=lora)
    trainer = make_trainer(*callbacks, sdp.WeightSyncCallback(), max_steps=3)
    trainer.fit(module, make_data(max_head_lag=0), ckpt_path=str(path), weights_only=True)


@no_model_checkpoint
def test_a_resumed_run_goes_on_from_its_adapter(model_folder: str, checkpoint: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    compare = Compare()
    resume(model_folder, checkpoint, compare, lora=LORA)
    assert len(compare.errors) == 1 and compare.errors[0] < 1e-5
    assert saved["sdp_lora"] == {"rank": 4, "alpha": 8.0, "target_modules": None}
    assert len(saved["optimizer_states"][0]["state"]) == 28


@no_model_checkpoint
@pytest.mark.parametrize(
    "lora", [None, sdp.LoRAConfig(4, 4.0), sdp.LoRAConfig(4, 8.0, ("q_proj",))], ids=str
)
def test_a_checkpoint_of_another_adapter_is_refused_by_name(
    model_folder: str, checkpoint: Path, lora: sdp.LoRAConfig | None
) -> None:
    with pytest.raises(sdp.ConfigError, match=r"written with lora=\{'rank': 4, 'alpha': 8.0,"):
        resume(model_folder, checkpoint, lora=lora)


def test_an_exported_checkpoint_has_the_adapter_merged(
    model_folder: str, checkpoint: Path, tmp_path: Path
) -> None:
    expected = trained_logits(checkpoint)
    done = export_checkpoint(checkpoint, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    assert done.num_weights == 20
    assert float((expected - logits(tiny_model())).abs().max()) > 1e-2
    export_checkpoint(checkpoint, tmp_path / "half", dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(half[name], tensor.bfloat16()), name


def trained_logits(checkpoint: Path) -> torch.Tensor:
    """By PEFT's own forward."""
    model: Any = tiny_model()
    add_adapter(model, LORA)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("policy."): t for name, t in state.items()})
    return logits(model.eval())


def test_an_exported_adapter_is_what_peft_loads(
    model_folder: str, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    done = export_checkpoint(checkpoint, out, adapter=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert done.num_weights == 28
    model = PeftModel.from_pretrained(tiny_model(), str(out)).eval()
    torch.testing.assert_close(logits(model), trained_logits(checkpoint), atol=1e-6, rtol=0)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model_folder


def test_export_refuses_an_adapter_that_is_not_there_or_has_no_alpha(
    model_folder: str, checkpoint: Path, tmp_path: Path
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    plain = {n: t for n, t in state["state_dict"].items() if not is_adapter(n)}
    torch.save({"state_dict": plain, "sdp_model_id": model_folder}, tmp_path / "plain.ckpt")
    with pytest.raises(sdp.ConfigError, match=r"plain.ckpt holds no LoRA adapter"):
        export_checkpoint(tmp_path / "plain.ckpt", tmp_path / "out", adapter=True)
    del state["sdp_lora"]
    torch.save(state, tmp_path / "no_alpha.ckpt")
    with pytest.raises(sdp.ConfigError, match=r"28 LoRA weights .* but not with which alpha"):
        export_checkpoint(tmp_path / "no_alpha.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_is_exact_for_wide_types() -> None:
    w, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((3, 5), (2, 5), (3, 2)))
    assert torch.allclose(merge([w, a, b], 6.0), w + 3 * b @ a, atol=1e-14, rtol=0)
    assert merge([w], 6.0) is w
