"""Names and shapes of weights as in the checkpoint that a model is loaded from, which servers read.

transformers 5 renames weights and fuses those of experts when it loads a checkpoint:
``experts.gate_up_proj`` [E, 2I, D] was ``experts.0.gate_proj.weight`` [I, D] and so on. Servers
know the names of the hub, and only some of their models know those of transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sdp_lightning.training.policy.lora import is_adapter, merged_name
from sdp_lightning.training.policy.weight_export import layer_of
from sdp_lightning.weights.protocol import WeightStream


def as_in_checkpoint(policy: PreTrainedModel, weights: WeightStream) -> WeightStream:
    """``weights`` of ``policy`` under the names, and in the shapes, of its checkpoint.

    Fused weights of a layer are split together; the others pass as they are. Weights of an adapter
    keep their names. So do all if some are not named as in the model's ``state_dict``: then whoever
    made them has named them.
    """
    own = {merged_name(name) for name in policy.state_dict()}
    plain = {name: merged_name(name) for name in weights.layout if not is_adapter(name)}
    if not own.issuperset(plain.values()):
        return weights
    empty = {new: _empty_like(weights.layout[old]) for old, new in plain.items()}
    names = {id(tensor): name for name, tensor in revert_weight_conversion(policy, empty).items()}
    whole = {old: names[id(empty[new])] for old, new in plain.items() if id(empty[new]) in names}
    if all(whole.get(old) == new for old, new in plain.items()):
        return weights
    split = {old: new for old, new in plain.items() if old not in whole}
    sizes = Counter(map(layer_of, split.values()))  # number of fused weights of each layer

    def convert(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in pairs:
            if name not in split:
                yield whole.get(name, name), tensor
                continue
            layer = layer_of(split[name])
            fused = waiting.setdefault(layer, {})
            fused[split[name]] = tensor.detach()
            if len(fused) == sizes[layer]:
                yield from revert_weight_conversion(policy, waiting.pop(layer)).items()

    likes = ((n, _empty_like(t) if n in split else t) for n, t in weights.layout.items())
    layout, pieces = dict(convert(likes)), convert(weights)
    return WeightStream(layout, lambda name: _take(pieces, name))


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _take(weights: Iterator[tuple[str, Tensor]], name: str) -> Tensor:
    found, tensor = next(weights)
    assert found == name  # the order is the layout's
    return tensor
