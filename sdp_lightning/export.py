"""A Hugging Face folder from a checkpoint: config, safetensors, tokenizer, generation config.

Reads what Lightning writes of :class:`~sdp_lightning.SegmentWisePPOModule`: one file (one device,
DDP), or a folder of shards (``ModelParallelStrategy``). One process, no GPU, no Lightning. Weights
are mapped from files and written file by file, never all in memory.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from sdp_lightning.errors import ConfigError
from sdp_lightning.loading import quiet_transformers, resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODEL_KEY = "sdp_model_id"  # where a checkpoint says which model it trained
_PREFIX = "policy."
_SHARDED_PREFIX = f"state_dict.{_PREFIX}"


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    model_id: str
    num_weights: int
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"wrote {self.folder}: {self.num_weights} weights, {self.num_bytes / 1e6:,.1f} MB, "
            f"config and tokenizer of {self.model_id}"
        )


class Checkpoint(Protocol):
    """The policy's weights in a checkpoint, by their transformers names."""

    @property
    def model_id(self) -> str | None:
        """The model that was trained, if the checkpoint says so."""
        ...

    @property
    def layout(self) -> Mapping[str, Tensor]:
        """Every weight's shape and dtype, as a tensor whose values may not be there."""
        ...

    def read(self, dtype: torch.dtype | None, scratch: Path) -> dict[str, Tensor]:
        """Every weight, mapped from a file: of the checkpoint, or a nameless one in ``scratch``.

        Args:
            dtype: what floats are cast to; None keeps them.
            scratch: a folder with room for all weights.
        """
        ...


class PlainCheckpoint:
    """One file of ``torch.save``; anything but tensors and plain types in it is refused."""

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            raise ConfigError(
                f"{path} is no checkpoint, or was cut short: {path.stat().st_size:,} bytes, and no "
                "archive of torch.save."
            )
        found = _load_plain(path)
        if not isinstance(found.get("state_dict"), Mapping):
            some = ", ".join(map(repr, list(found)[:5]))
            raise ConfigError(f"{path} is no Lightning checkpoint: no 'state_dict' among {some}.")
        self.layout = _policy_of(found["state_dict"], _PREFIX, path)
        self.model_id = cast("str | None", found.get(MODEL_KEY))

    def read(self, dtype: torch.dtype | None, scratch: Path) -> dict[str, Tensor]:
        return {
            name: tensor
            if _target_dtype(tensor, dtype) == tensor.dtype
            else _room_for(tensor, dtype, scratch).copy_(tensor)
            for name, tensor in self.layout.items()
        }


class ShardedCheckpoint:
    """A folder of torch.distributed.checkpoint, with Lightning's ``meta.pt``.

    torch reads its ``.metadata`` with pickle, which can run code: open only those you trust.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = FileSystemReader(path).read_metadata().state_dict_metadata
        shapes = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.layout = _policy_of(shapes, _SHARDED_PREFIX, path)
        rest = path / "meta.pt"
        found = _load_plain(rest) if rest.is_file() else {}
        self.model_id = cast("str | None", found.get(MODEL_KEY))

    def read(self, dtype: torch.dtype | None, scratch: Path) -> dict[str, Tensor]:
        tensors = {name: _room_for(t, dtype, scratch) for name, t in self.layout.items()}
        flat: dict[str, Any] = {f"{_SHARDED_PREFIX}{name}": t for name, t in tensors.items()}
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                load(flat, checkpoint_id=self._path, no_dist=True)  # warns of no_dist itself
        except CheckpointException as error:
            first = next(iter(error.failures.values()), (error,))[0]
            raise ConfigError(f"cannot read all shards of {self._path}: {first}.") from error
        return tensors


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the policy of ``checkpoint`` as a folder that transformers and vLLM load.

    The folder appears complete or not at all: until then it is a hidden sibling,
    ``.NAME.PID.part``, which may take twice the size of the weights.

    Args:
        checkpoint: a Lightning ``.ckpt`` file, or a folder of shards.
        out: the folder to write.
        model: id, folder or ``file.py:name`` of the model that was trained, for its config and
            tokenizer; None is the one that the checkpoint names.
        dtype: ``"float32"`` or ``"bfloat16"``; None keeps the checkpoint's.
        overwrite: replace ``out`` if it is a model folder.

    Raises:
        ConfigError: if there is no such checkpoint or model, its weights are not those of the
            model, or ``out`` may not be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    wanted = None if dtype is None else DTYPES[dtype]
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser().absolute()
    found = open_checkpoint(source)
    base = _base_model(found, model, source)
    _check_target(target, source, Path(base), overwrite=overwrite)
    with quiet_transformers():
        empty = _empty_model(base, wanted or next(iter(found.layout.values())).dtype)
        _check_weights(found.layout, empty, source, base)
        with _whole_folder(target) as folder:
            weights = _untie(found.read(wanted, folder), empty, source)
            export = Export(target, base, len(weights), sum(t.nbytes for t in weights.values()))
            _write(empty, weights, base, folder)
    return export


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, of which nothing large is read yet.

    Raises:
        ConfigError: if it is none, or does not hold a policy's weights.
    """
    if (path / ".metadata").is_file():
        return ShardedCheckpoint(path)
    if path.is_file():
        return PlainCheckpoint(path)
    what = "a folder without .metadata" if path.is_dir() else "not there"
    raise ConfigError(
        f"no checkpoint {str(path)!r}: it is {what}. Name a .ckpt file of Lightning, or the folder "
        "that ModelParallelStrategy wrote."
    )


# Checks -------------------------------------------------------------------------------------------


def _policy_of(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not found:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise ConfigError(
            f"{path} holds no {_PREFIX}* weights but {some}: it is not of SegmentWisePPOModule."
        )
    adapters = [name for name in found if ".lora_" in name]
    if adapters:
        raise ConfigError(
            f"{path} holds {len(adapters)} LoRA weights, such as {adapters[0]}; export does not "
            "write adapters yet."
        )
    return found


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
    if not (out / "config.json").is_file():
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


# Reading ------------------------------------------------------------------------------------------


def _load_plain(path: Path) -> Mapping[Any, Any]:
    try:
        found: object = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} holds more than tensors and plain types, which is not unpickled: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} is no Lightning checkpoint but {type(found).__name__}.")
    return cast("Mapping[Any, Any]", found)


def _target_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _room_for(tensor: Tensor, dtype: torch.dtype | None, folder: Path) -> Tensor:
    """Of its shape, in a file in ``folder`` that is gone once the result is; not initialised."""
    target, path = _target_dtype(tensor, dtype), folder / "scratch"
    with path.open("wb") as file:  # a full disk raises here; later it would be a SIGBUS
        os.posix_fallocate(file.fileno(), 0, max(1, tensor.numel() * target.itemsize))
    flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=target)
    path.unlink()
    return flat.view(tensor.shape)


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
    for file in folder.glob("*.safetensors"):  # safetensors lets nobody else read them
        file.chmod((folder / "config.json").stat().st_mode)
    name = "generation_config.json"
    generation = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
    if generation is not None:  # as it is: transformers refuses to write some that it reads
        shutil.copyfile(generation, folder / name)
    try:
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in {base!r}: {error}") from error


@contextmanager
def _whole_folder(out: Path) -> Generator[Path]:
    """A sibling to fill, which takes the place of ``out`` if nothing is raised."""
    part, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if out.is_dir() and any(out.iterdir()):
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
