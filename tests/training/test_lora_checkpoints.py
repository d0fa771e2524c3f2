"""LoRA adapters in checkpoints: resuming with them and exporting them."""

from __future__ import annotations

import json
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
from support.adapters import LORA, Compare
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
