"""Readers of the policy's weights in Lightning's checkpoints: one file, or a folder of shards."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from sdp_lightning.cli.export.shard_reader import ShardReader
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.errors import CheckpointError, ConfigError, error_text
from sdp_lightning.lightning.checkpoint_digest import require_whole
from sdp_lightning.training.policy.lora import (
    AdaptedWeight,
    group_by_base_weight,
    merge,
)
from sdp_lightning.training.policy.lora_checkpoint import SavedAdapter, saved_adapter

# Keys of a checkpoint: the id of the trained model, and its ModelSource as plain values.
MODEL_KEY, SOURCE_KEY = "sdp_model_id", "sdp_model_source"
_PREFIX = "policy."
_SHARDED_PREFIX = f"state_dict.{_PREFIX}"


class Checkpoint(Protocol):
    """The policy's weights in a checkpoint, by their names in the policy."""

    @property
    def source(self) -> ModelSource | None:
        """What the trained model was read from; None if the checkpoint does not say."""
        ...

    @property
    def adapter(self) -> SavedAdapter | None:
        """The trained LoRA adapter; None without one."""
        ...

    @property
    def layout(self) -> Mapping[str, Tensor]:
        """Shape and dtype of every weight, as tensors that may have no values."""
        ...

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None, scratch: Path
    ) -> dict[str, Tensor]:
        """Weights by name, mapped from the checkpoint or from an unlinked file in ``scratch``.

        Args:
            names: names of weights.
            dtype: dtype that floats are cast to; None keeps them.
            scratch: folder with room for the weights.
        """
        ...


class PlainCheckpoint:
    """One file of ``torch.save``; other things than tensors and plain types are refused.

    All of it is read first, to be compared with its digest.
    """

    def __init__(self, path: Path) -> None:
        saved = _load_plain(path)
        if not isinstance(saved.get("state_dict"), Mapping):
            some = ", ".join(map(repr, list(saved)[:5]))
            raise ConfigError(f"{path} is no Lightning checkpoint: no 'state_dict' among {some}.")
        self.layout = _policy_of(saved["state_dict"], _PREFIX, path)
        self.source = _source_of(saved)
        self.adapter = saved_adapter(saved)

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None, scratch: Path
    ) -> dict[str, Tensor]:
        return {name: _cast(self.layout[name], dtype, scratch) for name in names}


class ShardedCheckpoint:
    """A folder of torch.distributed.checkpoint, with Lightning's ``meta.pt``.

    Nothing in it is run (:class:`ShardReader`). torch writes shards without a digest: a flipped
    bit in a weight is not seen.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.layout = _policy_of(ShardReader(path).layout(), _SHARDED_PREFIX, path)
        meta = path / "meta.pt"
        saved = _load_plain(meta) if meta.is_file() else {}
        self.source = _source_of(saved)
        self.adapter = saved_adapter(saved)

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None, scratch: Path
    ) -> dict[str, Tensor]:
        tensors = {name: _room_for(self.layout[name], dtype, scratch) for name in names}
        flat: dict[str, Any] = {f"{_SHARDED_PREFIX}{name}": t for name, t in tensors.items()}
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                # warns of no_dist itself
                load(flat, storage_reader=ShardReader(self._path), no_dist=True)
        except CheckpointException as error:
            first = next(iter(error.failures.values()), (error,))[0]
            raise ConfigError(f"cannot read all shards of {self._path}: {first}.") from error
        except Exception as error:  # what torch raises for damaged files
            what = error_text(error)
            raise CheckpointError(f"cannot read all shards of {self._path}: {what}.") from error
        return tensors


class MergedCheckpoint:
    """A checkpoint whose LoRA adapter is merged into the weights, its own or its base model's.

    Args:
        inner: the checkpoint.
        adapted: weights with an adapter, by name.
        base: weights of the base model; empty if the checkpoint holds them.
    """

    def __init__(
        self, inner: Checkpoint, adapted: Mapping[str, AdaptedWeight], base: Mapping[str, Tensor]
    ) -> None:
        self._inner, self.source, self.adapter = inner, inner.source, inner.adapter
        self._adapted, self._base = adapted, base
        everything = {**base, **inner.layout}
        self._parts = group_by_base_weight({name: name for name in everything}, adapted)
        self.layout = {name: everything[parts[0]] for name, parts in self._parts.items()}

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None, scratch: Path
    ) -> dict[str, Tensor]:
        """Read weights as :class:`Checkpoint` describes; they are merged one at a time."""
        wanted = {name: self._parts[name] for name in names}
        whole = {parts[0]: name for name, parts in wanted.items() if len(parts) == 1}
        own = [name for name in whole if name not in self._base]
        unmerged = self._inner.read(own, dtype, scratch)
        unmerged |= {name: _cast(self._base[name], dtype, scratch) for name in whole.keys() - own}
        result = {whole[name]: tensor for name, tensor in unmerged.items()}
        for name, parts in wanted.items():
            if adapter := self._adapted.get(name):
                read = self._inner.read([n for n in parts if n not in self._base], None, scratch)
                tensors = [{**self._base, **read}[part] for part in parts]
                assert self.adapter is not None
                alpha = self.adapter.config.alpha
                room = _room_for(tensors[0], dtype, scratch)
                merged = merge(tensors, alpha, transposed=adapter.transposed)
                result[name] = room.copy_(merged)
        return result


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at ``path``; no weights stay in memory.

    Raises:
        ConfigError: if there is none, or it has no weights of a policy.
        CheckpointError: if it is torn or damaged.
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


def _policy_of(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not weights:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise ConfigError(
            f"{path} holds no {_PREFIX}* weights but {some}: it is not of SegmentWisePPOModule."
        )
    return weights


def _load_plain(path: Path) -> Mapping[Any, Any]:
    require_whole(path)
    try:
        saved: object = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} holds more than tensors and plain types, which is not unpickled: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # what torch raises for a damaged file
        raise CheckpointError(f"cannot load the checkpoint {path}: {error_text(error)}.") from error
    if not isinstance(saved, Mapping):
        raise ConfigError(f"{path} is no Lightning checkpoint but {type(saved).__name__}.")
    return cast("Mapping[Any, Any]", saved)


def _source_of(saved: Mapping[Any, Any]) -> ModelSource | None:
    if SOURCE_KEY in saved:
        return ModelSource.restored(saved[SOURCE_KEY])
    name: str | None = saved.get(MODEL_KEY)
    return None if name is None else ModelSource(name)


def _cast(tensor: Tensor, dtype: torch.dtype | None, folder: Path) -> Tensor:
    if _target_dtype(tensor, dtype) == tensor.dtype:
        return tensor
    return _room_for(tensor, dtype, folder).copy_(tensor)


def _target_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _room_for(tensor: Tensor, dtype: torch.dtype | None, folder: Path) -> Tensor:
    """An uninitialized tensor of the same shape in an unlinked file in ``folder``."""
    target, path = _target_dtype(tensor, dtype), folder / "scratch"
    with path.open("wb") as file:  # a full disk raises here; later it would be a SIGBUS
        os.posix_fallocate(file.fileno(), 0, max(1, tensor.numel() * target.itemsize))
    flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=target)
    path.unlink()
    return flat.view(tensor.shape)
