"""Decoder layers are found by the structure of a model, and not by what it calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.policy.layers import decoder_layers, layers_to_shard
from sdp_lightning.training.policy.loading import recompute_activations
from support.odd_models import odd_model

NAMES = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
    "opt": "model.decoder.layers",
    "bert": "bert.encoder.layer",
    "falcon_h1": "model.layers",
    "granite_swa": "model.layers",  # it has a list of rotary modules, too
    "phimoe": "model.layers",  # and this a list of experts in each of them
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_decoder_layer_is_one_unit(kind: str) -> None:
    with torch.device("meta"):
        model = odd_model(kind)
    layers = decoder_layers(model)
    assert list(layers) == [f"{NAMES[kind]}.{number}" for number in range(2)]
    assert layers_to_shard(model) == list(layers.values())
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())


def test_two_stacks_of_layers_are_found_and_lists_of_single_weights_are_not() -> None:
    model: Any = tiny_model()
    model.more = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2))
    model.projections = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    found = ["model.layers.0", "model.layers.1", "more.0", "more.1"]
    assert list(decoder_layers(model)) == found


def test_layers_that_share_a_weight_are_not_sharded() -> None:
    """Zamba 2 has one attention block, in every hybrid layer."""
    model = odd_model("zamba2")
    with pytest.raises(ConfigError) as info:
        layers_to_shard(model)
    assert "'zamba2' has one weight in two places, model.layers.1.shared_" in str(info.value)
    assert "and model.layers.3.shared_" in str(info.value)
    assert str(info.value).endswith("Use strategy='ddp'.")


def test_a_layer_that_shares_a_weight_with_what_is_around_it_is_not_sharded() -> None:
    model: Any = tiny_model()
    model.model.norm.weight = model.model.layers[1].input_layernorm.weight
    with pytest.raises(ConfigError, match=r"layers\.1\.input_layernorm\.weight and model\.norm\."):
        layers_to_shard(model)


def test_a_model_that_cannot_recompute_says_so_in_one_line() -> None:
    with torch.device("meta"):
        model = odd_model("gpt_neox_japanese")
    with pytest.raises(ConfigError, match=r"'gpt_neox_japanese' cannot recompute.* Use"):
        recompute_activations(model)
