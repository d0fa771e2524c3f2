"""Writer of a Hugging Face folder: config, safetensors, tokenizer, generation config.

The checkpoint is one file (one device, DDP), or a folder of shards (``ModelParallelStrategy``). One
process writes it, without GPU or Lightning. Weights are mapped from files and written file by file,
never all in memory, but for a base model that an adapter is merged into.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdp_lightning.cli.export.adapters import (
    adapted_model,
    empty_model,
    merge_checkpoint,
    peft_settings,
)
from sdp_lightning.cli.export.checkpoints import Checkpoint, open_checkpoint
from sdp_lightning.config.atomic_files import atomic_folder
from sdp_lightning.config.model_source import ModelSource, quiet_transformers
from sdp_lightning.config.pretrained import load_tokenizer
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.lora import is_adapter
from sdp_lightning.weights.lora import plain_name

# Copied as they are: transformers refuses to write some generation configs that it reads, and needs
# more packages to read those of a model's images.
_COPIED = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Export:
    """Facts about the written folder."""

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
    model: str | ModelSource | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Export:
    """Write the policy of ``checkpoint`` as a folder that transformers and vLLM load.

    A trained LoRA adapter is merged into the weights, or written alone.

    The folder appears complete or not at all: until then it is a hidden sibling,
    ``.NAME.PID.part``, which may take twice the size of the weights.

    Args:
        checkpoint: a Lightning ``.ckpt`` file, or a folder of shards.
        out: the folder to write.
        model: id, folder, ``file.py:name`` or ``ModelSource`` of the model that was trained, for
            its config and tokenizer; None is the one that the checkpoint names. Revision, tokenizer
            and chat template of the run are in the checkpoint, and whether code is trusted.
        dtype: ``"float32"`` or ``"bfloat16"``; None keeps the checkpoint's.
        adapter: write the LoRA adapter only, as ``peft`` does.
        overwrite: replace ``out`` if it is a model folder.
        trust_remote_code: run the model's own Python files, also if the checkpoint does not say so.

    Raises:
        ConfigError: if there is no such checkpoint or model, its weights are not those of the
            model, or ``out`` may not be written.
        CheckpointError: if the checkpoint is torn or damaged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    wanted = None if dtype is None else DTYPES[dtype]
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser().absolute()
    trained = open_checkpoint(source)
    base = _base_model(trained, model, source, trusted=trust_remote_code)
    _check_target(target, source, Path(base.name), overwrite=overwrite)
    with quiet_transformers():
        adapted = adapted_model(trained, source, base)
        if adapter:
            return _export_adapter(trained, adapted, source, base, target, wanted)
        merged = merge_checkpoint(trained, adapted, base)
        own = next(iter(merged.layout.values())).dtype
        empty = empty_model(base, wanted or own, names=merged.layout)
        _check_weights(merged.layout, empty, source, str(base.name))
        with atomic_folder(target) as folder:
            weights = _untie(merged.read(merged.layout, wanted, folder), empty, source)
            export = Export(
                target, str(base.name), len(weights), sum(t.nbytes for t in weights.values())
            )
            _write(empty, weights, base, folder)
    return export


# Checks -------------------------------------------------------------------------------------------


def _check_weights(layout: Mapping[str, Tensor], model: Any, path: Path, base: str) -> None:
    """Refuse weights with other names or shapes than the model's; one of two tied is enough."""
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
            shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            wrong.append(f"{name} has shape {shape}, in the model {wanted}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ConfigError(
            f"the weights of {path} are not those of {base}: {'; '.join(wrong[:4])}{more}. "
            "Pass the model that was trained as --model."
        )


def _check_target(out: Path, *sources: Path, overwrite: bool) -> None:
    """Refuse a target that would be lost: neither empty nor a model folder to overwrite."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} exists and is not a folder. Name another.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out} is not empty. Name another folder, or pass --overwrite.")
    if not any((out / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(f"{out} is not a model folder (no config.json): not overwritten.")
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{out} holds {source}, which is read. Name another folder.")


def _base_model(
    checkpoint: Checkpoint, model: str | ModelSource | None, path: Path, *, trusted: bool
) -> ModelSource:
    saved, adapter = checkpoint.source, checkpoint.adapter
    if saved is None and adapter is not None and adapter.base is not None:
        saved = ModelSource(adapter.base.model)  # of weights alone: no callback was asked
    if isinstance(model, ModelSource):
        found = model
    elif model is not None:
        others = {} if saved is None else {**saved.saved(), "digests": None, "revision": None}
        found = ModelSource.restored({**others, "name": model})
    elif saved is None or not saved.name:
        raise ConfigError(f"{path} does not say which model was trained. Pass it as --model.")
    elif (name := str(saved.name))[:1] in "/.~" and not Path(name).expanduser().is_dir():
        raise ConfigError(f"{path} is of {name!r}, which is missing. Pass --model.")
    else:
        found = saved
    return replace(found, trust_remote_code=found.trust_remote_code or trusted).resolved()


def _untie(weights: dict[str, Tensor], model: Any, path: Path) -> dict[str, Tensor]:
    """Weights with each tied one once, under the name that transformers keeps."""
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


def _write(model: Any, weights: dict[str, Tensor], base: ModelSource, folder: Path) -> None:
    from transformers.utils.hub import cached_file

    model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")  # empties weights
    _let_others_read(folder, like="config.json")
    for name in _COPIED:
        found = cached_file(
            base.name, name, revision=base.revision, _raise_exceptions_for_missing_entries=False
        )
        if found is not None:
            shutil.copyfile(found, folder / name)
    try:
        load_tokenizer(base).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer in {str(base.tokenizer or base.name)!r}: {error}"
        ) from error


def _export_adapter(
    checkpoint: Checkpoint,
    adapted: Any,
    source: Path,
    base: ModelSource,
    target: Path,
    dtype: torch.dtype | None,
) -> Export:
    names = [name for name in checkpoint.layout if is_adapter(name)]
    if not names or checkpoint.adapter is None:
        raise ConfigError(f"{source} holds no LoRA adapter: leave out --adapter.")
    with atomic_folder(target) as folder:
        weights = checkpoint.read(names, dtype, folder)
        config = peft_settings(checkpoint.adapter, adapted, weights, base)
        config |= {"base_model_name_or_path": str(base.name), "revision": base.revision}
        save_file(  # cloned: shared layers' weights are one tensor
            {plain_name(name): tensor.clone() for name, tensor in weights.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        _let_others_read(folder, like="adapter_config.json")
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        return Export(target, str(base.name), len(weights), num_bytes, is_adapter=True)


def _let_others_read(folder: Path, *, like: str) -> None:
    for file in folder.glob("*.safetensors"):  # safetensors makes them private
        file.chmod((folder / like).stat().st_mode)
