"""A Hugging Face folder from a checkpoint: config, safetensors, tokenizer, generation config.

Reads what Lightning writes of :class:`~sdp_lightning.SegmentWisePPOModule`: one file (one device,
DDP), or a folder of shards (``ModelParallelStrategy``). One process, no GPU, no Lightning. Weights
are mapped from files and written file by file, never all in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdp_lightning.cli.export.checkpoints import Checkpoint, MergedCheckpoint, open_checkpoint
from sdp_lightning.config.atomic_files import atomic_folder
from sdp_lightning.config.model_source import quiet_transformers, resolve_model
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.lora import is_adapter
from sdp_lightning.weights.lora import adapter_config, plain_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    model_id: str
    num_weights: int
    num_bytes: int
    is_adapter: bool = False

    def __str__(self) -> str:
        what = "an adapter for" if self.is_adapter else "config and tokenizer of"
        return (
            f"wrote {self.folder}: {self.num_weights} weights, {self.num_bytes / 1e6:,.1f} MB, "
            f"{what} {self.model_id}"
        )


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    overwrite: bool = False,
) -> Export:
    """Write the policy of ``checkpoint`` as a folder that transformers and vLLM load.

    A LoRA adapter that was trained is merged into the weights, or alone what is written.

    The folder appears complete or not at all: until then it is a hidden sibling,
    ``.NAME.PID.part``, which may take twice the size of the weights.

    Args:
        checkpoint: a Lightning ``.ckpt`` file, or a folder of shards.
        out: the folder to write.
        model: id, folder or ``file.py:name`` of the model that was trained, for its config and
            tokenizer; None is the one that the checkpoint names.
        dtype: ``"float32"`` or ``"bfloat16"``; None keeps the checkpoint's.
        adapter: write the LoRA adapter only, as ``peft`` does.
        overwrite: replace ``out`` if it is a model folder.

    Raises:
        ConfigError: if there is no such checkpoint or model, its weights are not those of the
            model, or ``out`` may not be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    wanted = None if dtype is None else DTYPES[dtype]
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser().absolute()
    trained = open_checkpoint(source)
    found = MergedCheckpoint(trained, source)
    base = _base_model(found, model, source)
    _check_target(target, source, Path(base), overwrite=overwrite)
    with quiet_transformers():
        empty = _empty_model(base, wanted or next(iter(found.layout.values())).dtype)
        _check_weights(found.layout, empty, source, base)
        if adapter:
            return _export_adapter(trained, source, base, target, wanted)
        with atomic_folder(target) as folder:
            weights = _untie(found.read(found.layout, wanted, folder), empty, source)
            export = Export(target, base, len(weights), sum(t.nbytes for t in weights.values()))
            _write(empty, weights, base, folder)
    return export


# Checks -------------------------------------------------------------------------------------------


def _check_weights(layout: Mapping[str, Tensor], model: Any, path: Path, base: str) -> None:
    """Names and shapes are the model's; of two tied weights one is enough."""
    expected: dict[str, Tensor] = model.state_dict()
    absent = set(expected) - set(layout)
    for target, source in model.all_tied_weights_keys.items():
        if not {target, source} <= absent:
            absent -= {target, source}
    wrong = [f"{name} is missing" for name in expected if name in absent]
    for name, tensor in layout.items():
        if name not in expected:
            wrong.append(f"{name} is not in the model")
        elif tensor.shape != expected[name].shape:
            theirs, ours = tuple(tensor.shape), tuple(expected[name].shape)
            wrong.append(f"{name} has shape {theirs}, in the model {ours}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ConfigError(
            f"the weights of {path} are not those of {base}: {'; '.join(wrong[:4])}{more}. "
            "Pass the model that was trained as --model."
        )


def _check_target(out: Path, *sources: Path, overwrite: bool) -> None:
    """``out`` is not there, or is empty, or is a model folder to overwrite that is not read."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is there and is not a folder. Name another.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out} is not empty. Name another folder, or pass --overwrite.")
    if not any((out / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(f"{out} is not a model folder (no config.json): not overwritten.")
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{out} holds {source}, which is read. Name another folder.")


def _base_model(found: Checkpoint, model: str | None, path: Path) -> str:
    if model is not None:
        return resolve_model(model)
    if found.model_id is None:
        raise ConfigError(f"{path} does not say which model was trained. Pass it as --model.")
    if found.model_id[:1] in "/.~" and not Path(found.model_id).expanduser().is_dir():
        raise ConfigError(f"{path} is of {found.model_id!r}, which is not there. Pass --model.")
    return found.model_id


def _untie(weights: dict[str, Tensor], model: Any, path: Path) -> dict[str, Tensor]:
    """``weights`` with each tied one once, under the name that transformers keeps."""
    for target, source in model.all_tied_weights_keys.items():
        tied = weights.pop(target, None)
        if tied is None:
            continue
        if not torch.equal(weights.setdefault(source, tied), tied):
            raise ConfigError(
                f"{target} and {source} differ in {path}, and the model's config ties them. Pass "
                "a --model with tie_word_embeddings=false."
            )
    return weights


# Writing ------------------------------------------------------------------------------------------


def _empty_model(base: str, dtype: torch.dtype) -> Any:
    """The model without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base)
        vars(config).pop("quantization_config", None)  # what was trained are plain weights
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no causal LM's config in {base!r}: {error}") from error


def _write(model: Any, weights: dict[str, Tensor], base: str, folder: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")  # empties weights
    _let_others_read(folder, like="config.json")
    name = "generation_config.json"
    generation = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
    if generation is not None:  # as it is: transformers refuses to write some that it reads
        shutil.copyfile(generation, folder / name)
    try:
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in {base!r}: {error}") from error


def _export_adapter(
    found: Checkpoint, source: Path, base: str, target: Path, dtype: torch.dtype | None
) -> Export:
    names = [name for name in found.layout if is_adapter(name)]
    if not names or found.lora_alpha is None:
        raise ConfigError(f"{source} holds no LoRA adapter: leave out --adapter.")
    with atomic_folder(target) as folder:
        weights = found.read(names, dtype, folder)
        config = adapter_config(weights, found.lora_alpha) | {"base_model_name_or_path": base}
        save_file(
            {plain_name(name): tensor for name, tensor in weights.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        _let_others_read(folder, like="adapter_config.json")
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        return Export(target, base, len(weights), num_bytes, is_adapter=True)


def _let_others_read(folder: Path, *, like: str) -> None:
    for file in folder.glob("*.safetensors"):  # safetensors lets nobody else read them
        file.chmod((folder / like).stat().st_mode)
