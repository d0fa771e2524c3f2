"""Size of a model, read from its folder without loading weights.

Counts come from the headers of its safetensors files. Memory in bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from sdp_lightning.errors import ConfigError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class ModelSize:
    """Quantities that memory depends on.

    Args:
        weights: number of elements of every weight, by its name.
        hidden: units D of a layer's input.
        intermediate: units of a layer's feed-forward part.
        num_layers: L.
        kv_units: units of keys and values that a layer keeps of a token.
        vocabulary: V.
        origin: where the size is known from, if the weights are not here.
    """

    weights: Mapping[str, int]
    hidden: int
    intermediate: int
    num_layers: int
    kv_units: int
    vocabulary: int
    origin: str = ""

    @classmethod
    def read(cls, folder: Path) -> ModelSize:
        """Read a Hugging Face folder.

        Raises:
            ConfigError: if it has no ``config.json`` or no safetensors files that can be read.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
            return cls.from_config(config, _weights(folder))
        except (OSError, ValueError, struct.error) as error:
            raise ConfigError(f"the size of {folder} cannot be read: {error!r}") from error

    @classmethod
    def from_config(cls, read: Mapping[str, Any], weights: Mapping[str, int]) -> ModelSize:
        """The size of a model by its ``config.json`` and the number of elements of its weights.

        Raises:
            ConfigError: if the config is not that of a decoder.
        """
        try:
            config = cast("dict[str, Any]", read.get("text_config", read))
            heads = int(config["num_attention_heads"])
            head = int(config.get("head_dim") or config["hidden_size"] // heads)
            return cls(
                weights=weights,
                hidden=int(config["hidden_size"]),
                intermediate=int(config.get("intermediate_size") or 4 * config["hidden_size"]),
                num_layers=int(config["num_hidden_layers"]),
                kv_units=2 * head * int(config.get("num_key_value_heads") or heads),
                vocabulary=int(config["vocab_size"]),
            )
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"the model's config cannot be read: {error!r}") from error

    @property
    def num_parameters(self) -> int:
        """Number of elements of all weights; tied ones are stored once."""
        return sum(self.weights.values())

    def num_trained(self, pattern: str | None) -> int:
        """Number of elements of the weights whose name matches ``pattern``; None is all."""
        return sum(size for name, size in self.weights.items() if re.search(pattern or "", name))


@dataclass(frozen=True)
class TrainerMemory:
    """Memory of one training process, in bytes.

    Args:
        weights: weights, and those of a frozen reference if there is one.
        training: gradients and the moments of AdamW.
        activations: activations of one micro-batch with its logits; an estimate.
    """

    weights: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.training + self.activations


def trainer_memory(
    size: ModelSize,
    *,
    num_trained: int,
    dtype: str,
    num_shards: int = 1,
    has_reference: bool = False,
    tokens: int,
    checkpointing: bool,
    computes_in: str,
) -> TrainerMemory:
    """Estimated memory of one training process.

    Args:
        size: size of the model.
        num_trained: number of trained parameters.
        dtype: dtype of the weights.
        num_shards: number of processes that share the weights (FSDP2).
        has_reference: whether a frozen copy is kept.
        tokens: number of tokens of one micro-batch.
        checkpointing: whether activations are recomputed.
        computes_in: dtype of the activations.
    """
    per_weight, per_activation = BYTES[dtype], BYTES[computes_in]
    layer = tokens * (8 * size.hidden + size.kv_units + 4 * size.intermediate) * per_activation
    if per_activation < 4:
        layer += tokens * 6 * size.hidden * 4  # norms and sums stay in float32
    boundary = tokens * size.hidden * 4
    kept = boundary * size.num_layers + layer if checkpointing else layer * size.num_layers
    return TrainerMemory(
        weights=size.num_parameters * per_weight * (1 + has_reference) // num_shards,
        training=num_trained * 3 * per_weight // num_shards,
        activations=kept + 2 * 512 * size.vocabulary * 4,
    )


def cache_bytes(size: ModelSize, tokens: int, *, dtype: str = "bfloat16") -> int:
    """Bytes of keys and values of ``tokens`` tokens on an engine."""
    return tokens * size.num_layers * size.kv_units * BYTES[dtype]


def _weights(folder: Path) -> dict[str, int]:
    """Number of elements by name over all files; tied weights are stored once."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there is no *.safetensors in {folder}")
    weights: dict[str, int] = {}
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = cast("dict[str, Any]", json.loads(file.read(length)))
        weights |= {n: prod(entry["shape"]) for n, entry in header.items() if n != "__metadata__"}
    return weights
