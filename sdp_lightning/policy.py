"""The trained model: loading, what of it is trained, sharding, and its weights for engines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdp_lightning.adapters import add_adapter, merge, merged_name, parts_of
from sdp_lightning.config import LoRAConfig
from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.errors import ConfigError, SDPError
from sdp_lightning.forward import LogprobForward
from sdp_lightning.weights.protocol import WeightStream

Source = PreTrainedModel | None


def load_policy(model_id: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """The causal LM ``model_id``, in float32 unless ``options`` say otherwise."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(model_id, **{"dtype": torch.float32, **options})


def load(
    model_id: str, options: Mapping[str, Any], *, sharded: bool, lora: LoRAConfig | None = None
) -> tuple[PreTrainedModel, Source]:
    """The model, with an adapter if there is to be one, and what :func:`shard` fills it from.

    With ``sharded`` it has no weights yet, on the meta device, and only rank 0 reads them.
    """
    if not sharded:
        return _with_adapter(load_policy(model_id, options), lora), None
    source: Source = None
    kind: list[Any] = [None]
    if distributed.get_rank() == 0:
        source = load_policy(model_id, options)
        kind = [(type(source), source.config, source.dtype)]
        source = _with_adapter(source, lora)  # at random, as in one process
    distributed.broadcast_object_list(kind, src=0)
    model_class, config, dtype = kind[0]
    with torch.device("meta"):
        model: Any = model_class(config).to(dtype)
    return _with_adapter(model, lora), source


def _with_adapter(model: PreTrainedModel, lora: LoRAConfig | None) -> PreTrainedModel:
    if lora is not None:
        add_adapter(model, lora)
    return model


def shard(
    forward: LogprobForward,
    mesh: DeviceMesh,
    source: Source,
    device: torch.device,
    *,
    precision: str = "32-true",
) -> None:
    """FSDP2: every decoder layer a unit, the rest one more, over the data-parallel ranks.

    Args:
        forward: around the model that :func:`load` has returned with ``sharded``.
        mesh: of all ranks.
        source: returned beside it.
        device: of this rank.
        precision: the Trainer's; under ``"bf16-mixed"`` weights are gathered and used in bfloat16,
            each rank keeps its part of them as it was loaded, and gradients are added in float32.

    Raises:
        ConfigError: if the mesh asks for tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()} is not supported: use "
            "ModelParallelStrategy(data_parallel_size=<devices>, tensor_parallel_size=1)."
        )
    data_parallel, mixed = mesh["data_parallel"], MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        mixed = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    decoder: Any = forward.policy.get_decoder()
    for layer in decoder.layers:
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
    """DDP adds gradients up over micro-batches, and reduces them over ranks in the last one."""
    if not on and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def clip_gradients(policy: nn.Module, limit: float | None) -> Tensor:
    """The norm of all gradients, over all ranks, before they are clipped to ``limit``."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@dataclass
class GradientStep:
    """Clips the gradient and steps, or skips the step if it is not finite.

    Args:
        limit: largest norm of the gradient; None is off.
        max_skipped: so many steps skipped in a row are an error.
        num_skipped: in a row, by now.
    """

    limit: float | None
    max_skipped: int
    num_skipped: int = 0

    def __call__(
        self, policy: nn.Module, optimizer: Any, schedule: Any, *, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """``grad_norm``, ``lr`` as it was applied, and ``skipped``: 0 or 1. All [].

        Args:
            policy: whose gradients are ready.
            optimizer: of its parameters.
            schedule: of the optimizer's learning rates; advanced unless the step is skipped.
            scale: what the learning rates are multiplied with, in this step only.

        Raises:
            SDPError: after ``max_skipped`` skipped steps in a row.
        """
        norm = clip_gradients(policy, self.limit)
        rates: list[float] = schedule.get_last_lr()
        self.num_skipped = 0 if torch.isfinite(norm) else self.num_skipped + 1
        if self.num_skipped == 0:
            for group in optimizer.param_groups if scale != 1.0 else ():
                group["lr"] *= scale
            optimizer.step()
            schedule.step()  # sets the rates anew, from those at the start
        elif self.num_skipped >= self.max_skipped:
            raise SDPError(
                f"the gradient was not finite (norm {norm}) in {self.num_skipped} optimizer steps "
                "in a row. Lower the learning rate, or look at the rewards and log-probs."
            )
        values = rates[0] * scale, float(self.num_skipped > 0)
        rate, skipped = torch.tensor(values, dtype=torch.float32)  # not the default type
        return {"grad_norm": norm.float(), "lr": rate, "skipped": skipped}


def named_weights(
    policy: nn.Module, *, changed_only: bool, merged_alpha: float | None = None
) -> WeightStream:
    """What an engine must be given, under the names of the model's ``state_dict``.

    Sharded weights are gathered, and adapters merged into copies, one at a time: all ranks must go
    through the whole stream.

    Args:
        policy: the model.
        changed_only: the trained weights, with all else of their layers: servers fuse weights of a
            layer, and a fused one that comes in part is wrong.
        merged_alpha: of the policy's LoRA adapter, which comes merged, under the names of the model
            without it; None leaves it as it is, or there is none.
    """
    state, trained = (
        policy.state_dict(),
        [n for n, p in policy.named_parameters() if p.requires_grad],
    )
    if merged_alpha is None:
        parts = {name: [tensor] for name, tensor in state.items()}
    else:
        parts, trained = parts_of(state), [merged_name(name) for name in trained]
    layers = {_layer_of(name) for name in trained}
    layout = {
        name: _like(some)
        for name, some in parts.items()
        if not changed_only or _layer_of(name) in layers
    }
    return WeightStream(
        layout, lambda name: merge([_whole(t) for t in parts[name]], merged_alpha or 0.0)
    )


def _like(parts: list[Tensor]) -> Tensor:
    """The weight, if it is there, or one of its shape and type on the meta device."""
    if len(parts) == 1 and not isinstance(parts[0], DTensor):
        return parts[0]
    return torch.empty(parts[0].shape, dtype=parts[0].dtype, device="meta")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _layer_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``; another name is its own."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return name if found is None or ".lora_" in name else found[0]


def select_trainable(policy: nn.Module, pattern: str | None) -> None:
    """Freeze every parameter whose name ``pattern`` does not find."""
    if pattern is None:
        return
    names = [name for name, _ in policy.named_parameters() if re.search(pattern, name)]
    if not names:
        some = ", ".join([name for name, _ in policy.named_parameters()][:3])
        raise ConfigError(f"trainable={pattern!r} finds no parameter; names look like {some}.")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in names)


def silence_dropout(policy: nn.Module) -> None:
    """Dropout off in train mode: it would make every log-prob a random number."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0
