"""Estimates of the memory and the lag of a config, before GPUs are paid for.

Only the files are read: no model is built, and no GPU is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from sdp_lightning.cli.doctor.absent_models import size_of_absent
from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.model_size import BYTES, ModelSize, cache_bytes, trainer_memory
from sdp_lightning.cli.doctor.source_checks import model_folder
from sdp_lightning.config import LossConfig, RolloutConfig, UpdateConfig
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.validation import config_from
from sdp_lightning.errors import ConfigError

GIB = 2**30
Tree = Mapping[str, Any]
T = TypeVar("T")
_DEFAULT_UTILIZATION = 0.92  # vLLM's share of the memory of a GPU


def check_division(config: Tree, world_size: int) -> Iterator[Finding]:
    """Checks that groups divide over processes and minibatches, and steps over batches."""
    try:
        rollout = _settings(RolloutConfig, config, "data", "rollout")
        update = _settings(UpdateConfig, config, "model", "update")
        _settings(LossConfig, config, "model", "loss")
        share = rollout.share(world_size)
    except ConfigError as error:
        yield Finding("problem", "settings", str(error))
        return
    if share.batch_size < update.num_minibatches:
        text = (
            f"{share.batch_size} groups a process cannot fill num_minibatches="
            f"{update.num_minibatches}: groups stay whole."
        )
        yield Finding("problem", "batch", text)
    else:
        text = f"{rollout.batch_size} groups a step on {world_size} process(es)"
        each = f", {share.batch_size} each, in {update.num_minibatches} minibatch(es)"
        yield Finding("ok", "batch", text + each)
    steps = part_of(config, "trainer").get("max_steps", -1)
    if isinstance(steps, int) and steps > 0 and steps % update.steps_per_batch:
        text = f"is no multiple of {update.steps_per_batch} optimizer steps a batch."
        yield Finding("problem", "max_steps", f"max_steps={steps} {text}")
    yield _expected_lag(rollout)


def _expected_lag(rollout: RolloutConfig) -> Finding:
    """Expected lag by Little's law: C running groups, B leaving a step, stay for C/B steps."""
    bound = rollout.max_head_lag
    if bound == 0:
        text = "0: trainer and engine take turns. max_head_lag=1 or more lets them overlap."
        return Finding("ok", "expected lag", text)
    slow = min(float(bound), rollout.concurrency / rollout.batch_size)
    text = (
        f"about {slow:.1f} versions if generation is the slower side "
        f"(max_concurrent={rollout.concurrency} / batch_size={rollout.batch_size}), {bound} if "
        "training is: a lower max_concurrent keeps tokens fresher."
    )
    return Finding("ok", "expected lag", text)


def check_trainer_memory(
    config: Tree, size: ModelSize, *, num_shards: int, gpu_gib: float | None, server_share: float
) -> Finding:
    """Compares the memory of one training process with that of its GPU.

    Args:
        config: the merged files.
        size: size of the model.
        num_shards: number of processes that share the weights.
        gpu_gib: memory of the GPU; None if there is none, or it is unknown.
        server_share: share of that memory that a server on the same GPU takes.
    """
    model, trainer = part_of(config, "model"), part_of(config, "trainer")
    update = _settings(UpdateConfig, config, "model", "update")
    loss = _settings(LossConfig, config, "model", "loss")
    options = part_of(model, "model_kwargs")
    dtype = str(options.get("dtype", "float32")).removeprefix("torch.")
    dtype = dtype if dtype in BYTES else "float32"
    half = "bf16" in str(trainer.get("precision", "")) or dtype == "bfloat16"
    memory = trainer_memory(
        size,
        num_trained=size.num_trained(cast("str | None", model.get("trainable"))),
        dtype=dtype,
        num_shards=num_shards,
        has_reference=loss.needs_reference,
        tokens=update.max_tokens_per_microbatch,
        checkpointing=bool(model.get("gradient_checkpointing")),
        computes_in="bfloat16" if half else "float32",
    )
    text = (
        f"about {memory.total / GIB:.1f} GiB a process: weights {memory.weights / GIB:.1f}, "
        f"gradients and moments {memory.training / GIB:.1f}, activations of "
        f"{update.max_tokens_per_microbatch} tokens {memory.activations / GIB:.1f}"
    )
    room = None if gpu_gib is None else gpu_gib * (1 - server_share)
    if room is None or memory.total <= 0.9 * room * GIB:
        return Finding("ok", "trainer memory", text + ("." if room is None else f" of {room:.0f}."))
    remedy = "FSDP2, fewer trained layers, gradient_checkpointing, or fewer tokens a micro-batch"
    return Finding("problem", "trainer memory", f"{text}, and there are {room:.0f}. Use {remedy}.")


def check_engine_memory(
    config: Tree, size: ModelSize, query: Mapping[str, str], *, gpu_gib: float | None
) -> Finding:
    """Memory of a launched server, and the number of samples that it can decode at once.

    Args:
        config: the merged files.
        size: size of the model.
        query: options after ``vllm://launch?``.
        gpu_gib: memory of its GPU; None if unknown.
    """
    rollout = _settings(RolloutConfig, config, "data", "rollout")
    workflow = part_of(part_of(part_of(config, "data"), "workflow"), "init_args")
    group = int(workflow.get("group_size", 8))
    length = int(query.get("max_model_len", 2048))
    weights = 2 * size.num_parameters
    sample = cache_bytes(size, length)
    text = (
        f"{weights / GIB:.1f} GiB of weights, {sample / GIB:.2f} of KV cache for a sample of "
        f"{length} tokens"
    )
    if gpu_gib is None:
        return Finding("ok", "engine memory", text + ".")
    utilization = float(query.get("gpu_memory_utilization", _DEFAULT_UTILIZATION))
    room = gpu_gib * GIB * utilization - weights
    wanted = -(-rollout.concurrency * group // int(query.get("replicas", 1)))
    fits = int(room // sample)
    if fits < 1:
        return Finding("problem", "engine memory", f"{text}: not one fits into {gpu_gib:.0f} GiB.")
    text += f": {fits} fit, {wanted} are asked for at once"
    if fits < wanted / 4:
        return Finding("note", "engine memory", f"{text}: most will wait; add replicas.")
    return Finding("ok", "engine memory", text + ".")


def size_of_model(source: ModelSource) -> ModelSize | None:
    """Size of a model folder, or of an id of the hub; None if it is not known."""
    folder = model_folder(source)
    try:
        return size_of_absent(source) if folder is None else ModelSize.read(folder)
    except ConfigError:  # a folder without its weights
        return size_of_absent(source)


def num_shards(trainer: Tree, world_size: int) -> int:
    """Number of processes over which the strategy shards the weights."""
    strategy: Any = trainer.get("strategy", "auto")
    named: object = part_of(trainer, "strategy").get("class_path", strategy)
    return world_size if "ModelParallel" in str(named) else 1


def part_of(config: Tree, name: str) -> Tree:
    """The settings under ``name``; empty if there are none."""
    part = config.get(name)
    return cast(Tree, part) if isinstance(part, Mapping) else {}


def _settings(kind: type[T], config: Tree, room: str, name: str) -> T:
    """The dataclass that a part of the files describes."""
    try:
        return config_from(kind, part_of(part_of(config, room), name))
    except TypeError as error:
        raise ConfigError(f"{room}.{name}: {error}") from error
