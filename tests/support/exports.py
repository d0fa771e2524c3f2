"""Checkpoints to export, and what a folder of an export holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

import sdp_lightning as sdp
from sdp_lightning.testing import tiny_tokenizer
from support.plain_forwards import logits
from support.trainers import make_data, make_module, make_trainer

TIED = "lm_head.weight"


def save(folder: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_checkpoint(path: Path, model: PreTrainedModel | dict[str, Any], **rest: Any) -> Path:
    """What Lightning would write of a module that holds ``model``."""
    weights = model if isinstance(model, dict) else model.state_dict()
    state = {f"policy.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": state, "epoch": 0} | rest, path)
    return path


def fit(folder: str, place: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    """The checkpoint of one step of training, and the trained policy's logits."""
    module = make_module(folder, lr=1e-2, **settings)
    keep = ModelCheckpoint(place, filename="step", every_n_train_steps=1)
    trainer = make_trainer(sdp.WeightSyncCallback(), keep, max_steps=1, enable_checkpointing=True)
    trainer.fit(module, datamodule=make_data())
    return place / "step.ckpt", logits(module.require_policy())


def load(folder: Path) -> Any:
    """As transformers loads it, with nothing to remark."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in sorted(folder.iterdir())}
