"""LoRA adapters in checkpoints: resuming with them and exporting them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM

import sdp_lightning as sdp
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.policy.lora import add_adapter, is_adapter
from support.adapters import LORA, Compare, shake
from support.exports import save, save_checkpoint
from support.lora_models import lora_model
from support.odd_models import saved
from support.plain_forwards import logits
from support.trainers import make_data, make_module, make_trainer


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
    state = torch.load(checkpoint, weights_only=True)
    compare = Compare()
    resume(model_folder, checkpoint, compare, lora=LORA)
    assert len(compare.errors) == 1 and compare.errors[0] < 1e-5
    assert state["sdp_lora"] == {"rank": 4, "alpha": 8.0, "target_modules": None}
    assert len(state["optimizer_states"][0]["state"]) == 28


@no_model_checkpoint
@pytest.mark.parametrize(
    "lora", [None, sdp.LoRAConfig(4, 4.0), sdp.LoRAConfig(4, 8.0, ("q_proj",))], ids=str
)
def test_a_checkpoint_of_another_adapter_is_refused_by_name(
    model_folder: str, checkpoint: Path, lora: sdp.LoRAConfig | None
) -> None:
    with pytest.raises(sdp.ConfigError, match=r"written with lora=\{'rank': 4, 'alpha': 8.0,"):
        resume(model_folder, checkpoint, lora=lora)


def test_a_checkpoint_holds_the_adapter_and_no_base(model_folder: str, checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    assert len(state["state_dict"]) == 28 and all(map(is_adapter, state["state_dict"]))
    base = state["sdp_lora_base"]
    assert base.pop("digest") and base == {
        "model": model_folder,
        "revision": None,
        "dtype": "float32",
    }


def earlier(checkpoint: Path, target: Path, base: Any) -> Path:
    """The checkpoint as earlier versions wrote it: with the weights of ``base``."""
    state = torch.load(checkpoint, weights_only=True)
    add_adapter(base, LORA)
    whole = {f"policy.{name}": tensor for name, tensor in base.state_dict().items()}
    state["state_dict"] = whole | state["state_dict"]
    del state["sdp_lora_base"], state["sdp_lora_places"]
    torch.save(state, target)
    return target


@no_model_checkpoint
def test_a_checkpoint_that_holds_its_base_goes_on_and_is_exported(
    model_folder: str, checkpoint: Path, tmp_path: Path
) -> None:
    path, compare = earlier(checkpoint, tmp_path / "old.ckpt", tiny_model()), Compare()
    resume(model_folder, path, compare, lora=LORA)
    assert len(compare.errors) == 1 and compare.errors[0] < 1e-5
    for one, out in ((path, "old"), (checkpoint, "new")):
        export_checkpoint(one, tmp_path / out)
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("old", "new")]
    assert files[0] == files[1]
    other = earlier(checkpoint, tmp_path / "other.ckpt", tiny_model(seed=1))
    with pytest.raises(sdp.ConfigError, match=r"over the base model that the checkpoint holds"):
        resume(model_folder, other, lora=LORA)


@no_model_checkpoint
def test_another_base_is_refused_by_name_and_a_copy_is_not(
    model_folder: str, checkpoint: Path, tmp_path: Path
) -> None:
    almost = tiny_model()
    with torch.no_grad():
        almost.model.layers[1].mlp.up_proj.weight.mul_(1 + 1e-6)
    other = save(tmp_path / "other", almost)
    message = rf"over the base model {model_folder} in float32, and this is {other}, and its weigh"
    with pytest.raises(sdp.ConfigError, match=message):
        resume(other, checkpoint, lora=LORA)
    with pytest.raises(sdp.ConfigError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out", model=other)
    with pytest.raises(sdp.ConfigError, match=r"in float32, and this is .*, in bfloat16"):
        load(model_folder, checkpoint, model_kwargs={"dtype": "bfloat16"})
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    policy = load(str(copy), checkpoint).require_policy()
    torch.testing.assert_close(logits(policy), trained_logits(checkpoint), atol=1e-6, rtol=0)


def load(folder: str, path: Path, **settings: Any) -> sdp.SegmentWisePPOModule:
    return sdp.SegmentWisePPOModule.load_from_checkpoint(
        path, model=folder, lora=LORA, weights_only=True, **settings
    )


def test_an_adapter_that_lies_elsewhere_is_refused_by_name(
    model_folder: str, checkpoint: Path, tmp_path: Path
) -> None:
    """As when a version of this package chose other places by default."""
    state = torch.load(checkpoint, weights_only=True)
    name = "policy.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    state["state_dict"][name.replace("q_proj", "gone")] = state["state_dict"].pop(name)
    torch.save(state, tmp_path / "moved.ckpt")
    with pytest.raises(sdp.ConfigError, match=r"does not lie where this run's.*0\.self_attn\.gone"):
        load(model_folder, tmp_path / "moved.ckpt")
    places = state["sdp_lora_places"]["layers"]
    places[0] = "model.layers.0.self_attn.gone"
    torch.save(state, tmp_path / "moved.ckpt")
    with pytest.raises(sdp.ConfigError, match=r"does not lie where this run's.*0\.self_attn\.gone"):
        load(model_folder, tmp_path / "moved.ckpt")
    with pytest.raises(sdp.ConfigError, match=r"not one of .*self_attn\.gone \(1 in all\)"):
        export_checkpoint(tmp_path / "moved.ckpt", tmp_path / "out")


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
    adapter = {name.removeprefix("policy."): t for name, t in state.items()}
    assert not model.load_state_dict(adapter, strict=False).unexpected_keys
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
    save_checkpoint(tmp_path / "plain.ckpt", tiny_model(), sdp_model_id=model_folder)
    with pytest.raises(sdp.ConfigError, match=r"plain.ckpt holds no LoRA adapter"):
        export_checkpoint(tmp_path / "plain.ckpt", tmp_path / "out", adapter=True)
    state = torch.load(checkpoint, weights_only=True)
    del state["sdp_lora"]
    torch.save(state, tmp_path / "no_alpha.ckpt")
    with pytest.raises(sdp.ConfigError, match=r"28 LoRA weights .* but not with which alpha"):
        export_checkpoint(tmp_path / "no_alpha.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("glm4_moe", None), ("glm4_moe", ("experts", "up_proj")), ("gpt2", None), ("zamba2", None)],
    ids=str,
)
def test_adapters_of_odd_models_are_exported_merged_and_alone(
    tmp_path: Path, kind: str, asked: tuple[str, ...] | None
) -> None:
    """peft takes gate_proj of a mixture for its experts, unless it is told otherwise."""
    folder = saved(lora_model(kind), tmp_path / "base")
    lora = sdp.LoRAConfig(4, 8.0, asked)
    module = make_module(folder, lora=lora)
    module.configure_model()
    policy = module.require_policy()
    shake(policy)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if ".lora_B." in name:  # else rounding makes a difference
                weight.mul_(0.2)
    state: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(state)
    torch.save(state, tmp_path / "it.ckpt")
    expected = logits(policy)
    export_checkpoint(tmp_path / "it.ckpt", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    export_checkpoint(tmp_path / "it.ckpt", tmp_path / "alone", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert float((logits(base.eval()) - expected).abs().max()) > 1e-2
    alone = PeftModel.from_pretrained(base, str(tmp_path / "alone")).eval()
    torch.testing.assert_close(logits(alone), expected, atol=1e-4, rtol=0)
