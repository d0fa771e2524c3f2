"""A model whose weights are spread over ranks by FSDP2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.forward import LogprobForward
from sdp_lightning.training.policy.layers import layers_to_shard

Source = PreTrainedModel | None


def shard(
    forward: LogprobForward,
    mesh: DeviceMesh,
    source: Source,
    device: torch.device,
    *,
    precision: str = "32-true",
) -> None:
    """Shard with FSDP2 over the data-parallel ranks: each decoder layer a unit, the rest one more.

    Args:
        forward: wraps the model that :func:`load` has returned with ``sharded``.
        mesh: device mesh of all ranks.
        source: returned beside it.
        device: device of this rank.
        precision: the Trainer's; under ``"bf16-mixed"`` weights are gathered and used in bfloat16,
            each rank keeps its part of them as it was loaded, and gradients are added in float32.

    Raises:
        ConfigError: if the mesh asks for tensor parallelism, or decoder layers share a weight.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()} is not supported: use "
            "ModelParallelStrategy(data_parallel_size=<devices>, tensor_parallel_size=1)."
        )
    data_parallel, mixed = mesh["data_parallel"], MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        mixed = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers_to_shard(forward.policy):
        fully_shard(layer, mesh=data_parallel, mp_policy=mixed)
    mixed = replace(mixed, cast_forward_inputs=False)  # a batch: temperatures stay as they are
    fully_shard(forward, mesh=data_parallel, mp_policy=mixed)
    _fill(forward.policy, source, device)


def _fill(policy: PreTrainedModel, source: Source, device: torch.device) -> None:
    """Give a sharded model on the meta device the weights and buffers of rank 0's ``source``."""
    tied: dict[Tensor, list[str]] = {}
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    policy.to_empty(device=device)
    for first, *others in tied.values():
        for name in others:  # to_empty() made each its own
            module, _, leaf = name.rpartition(".")
            setattr(policy.get_submodule(module), leaf, policy.get_parameter(first))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    full = {} if source is None else source.state_dict()
    set_model_state_dict(policy, full, options=options)
    for name, buffer in policy.named_buffers():  # the rotary frequencies are in no state dict
        if source is not None:
            buffer.copy_(source.get_buffer(name))
        distributed.broadcast(buffer, src=0)


def is_sharded(policy: nn.Module) -> bool:
    """Whether each rank holds a part of every weight."""
    return any(isinstance(parameter, DTensor) for parameter in policy.parameters())


def gradient_sync(model: Any, *, on: bool) -> AbstractContextManager[Any]:
    """Context of a backward pass: under DDP gradients are reduced over ranks only if ``on``."""
    if not on and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
