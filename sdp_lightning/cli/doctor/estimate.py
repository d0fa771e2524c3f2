"""What a config would need and how old its tokens would be, before GPUs are paid for.

Works on the settings of the files alone: nothing is built, and nothing is asked of a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.model_size import BYTES, ModelSize, cache_bytes, trainer_memory
from sdp_lightning.config import LossConfig, RolloutConfig, UpdateConfig
from sdp_lightning.errors import ConfigError

GIB = 2**30
Tree = Mapping[str, Any]
T = TypeVar("T")
_DEFAULT_UTILIZATION = 0.92  # of vLLM, of a GPU that it has to itself


def check_division(config: Tree, world_size: int) -> Iterator[Finding]:
    """That counts can be divided over processes and minibatches, and steps over batches."""
    try:
        rollout = _settings(RolloutConfig, config, "data", "rollout")
        update = _settings(UpdateConfig, config, "model", "update")
        _settings(LossConfig, config, "model", "loss")
        mine = rollout.share(world_size)
    except ConfigError as error:
        yield Finding("problem", "settings", str(error))
        return
    if mine.batch_size < update.num_minibatches:
        text = (
            f"{mine.batch_size} groups a process cannot fill num_minibatches="
            f"{update.num_minibatches}: groups stay whole."
        )
        yield Finding("problem", "batch", text)
    else:
        text = f"{rollout.batch_size} groups a step on {world_size} process(es)"
        each = f", {mine.batch_size} each, in {update.num_minibatches} minibatch(es)"
        yield Finding("ok", "batch", text + each)
    steps = _part(config, "trainer").get("max_steps", -1)
    if isinstance(steps, int) and steps > 0 and steps % update.steps_per_batch:
        text = (
            f"max_steps={steps} is no multiple of {update.steps_per_batch} optimizer steps a batch."
        )
        yield Finding("problem", "max_steps", text)
    yield _expected_lag(rollout)


def _expected_lag(rollout: RolloutConfig) -> Finding:
    """By Little's law: with C groups under way and B leaving a step, one is there for C/B steps."""
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
    """What a process that trains holds, against its GPU.

    Args:
        config: the merged files.
        size: of the model.
        num_shards: processes that share the weights.
        gpu_gib: memory of its GPU; None if there is none, or it is not known.
        server_share: of that memory which a server on the same GPU takes.
    """
    model, trainer = _part(config, "model"), _part(config, "trainer")
    update = _settings(UpdateConfig, config, "model", "update")
    loss = _settings(LossConfig, config, "model", "loss")
    options = _part(model, "model_kwargs")
    dtype = str(options.get("dtype", "float32")).removeprefix("torch.")
    dtype = dtype if dtype in BYTES else "float32"
    half = "bf16" in str(trainer.get("precision", "")) or dtype == "bfloat16"
    found = trainer_memory(
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
        f"about {found.total / GIB:.1f} GiB a process: weights {found.weights / GIB:.1f}, "
        f"gradients and moments {found.training / GIB:.1f}, activations of "
        f"{update.max_tokens_per_microbatch} tokens {found.activations / GIB:.1f}"
    )
    room = None if gpu_gib is None else gpu_gib * (1 - server_share)
    if room is None or found.total <= 0.9 * room * GIB:
        return Finding("ok", "trainer memory", text + ("." if room is None else f" of {room:.0f}."))
    remedy = "FSDP2, fewer trained layers, gradient_checkpointing, or fewer tokens a micro-batch"
    return Finding("problem", "trainer memory", f"{text}, and there are {room:.0f}. Use {remedy}.")


def check_engine_memory(
    config: Tree, size: ModelSize, query: Mapping[str, str], *, gpu_gib: float | None
) -> Finding:
    """What a launched server holds, and how many samples it can decode at once.

    Args:
        config: the merged files.
        size: of the model.
        query: what follows ``vllm://launch?``.
        gpu_gib: memory of its GPU.
    """
    rollout = _settings(RolloutConfig, config, "data", "rollout")
    workflow = _part(_part(_part(config, "data"), "workflow"), "init_args")
    group = int(workflow.get("group_size", 8))
    length = int(query.get("max_model_len", 2048))
    weights = 2 * size.num_parameters
    one = cache_bytes(size, length)
    text = (
        f"{weights / GIB:.1f} GiB of weights, {one / GIB:.2f} of KV cache for a sample of "
        f"{length} tokens"
    )
    if gpu_gib is None:
        return Finding("ok", "engine memory", text + ".")
    room = (
        gpu_gib * GIB * float(query.get("gpu_memory_utilization", _DEFAULT_UTILIZATION)) - weights
    )
    wanted = -(-rollout.concurrency * group // int(query.get("replicas", 1)))
    fits = int(room // one)
    if fits < 1:
        return Finding("problem", "engine memory", f"{text}: not one fits into {gpu_gib:.0f} GiB.")
    text += f": {fits} fit, {wanted} are asked for at once"
    if fits < wanted / 4:
        return Finding("note", "engine memory", f"{text}: most will wait; add replicas.")
    return Finding("ok", "engine memory", text + ".")


def size_of_model(model: object) -> ModelSize | None:
    """Of a folder, or of an id in the hub's cache; None where neither is at hand."""
    if not isinstance(model, str) or model.rpartition(":")[1]:
        return None
    folder = Path(model).expanduser()
    if not folder.is_dir() and model[:1] in "/.~":
        return None
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    try:
        return ModelSize.read(folder)
    except ConfigError:
        return None


def num_shards(trainer: Tree, world_size: int) -> int:
    """Over how many processes the strategy spreads the weights."""
    strategy: Any = trainer.get("strategy", "auto")
    named: object = _part(trainer, "strategy").get("class_path", strategy)
    return world_size if "ModelParallel" in str(named) else 1


def _settings(kind: type[T], config: Tree, room: str, name: str) -> T:
    """The dataclass that a part of the files describes; keys that are not its own are left out."""
    given = _part(_part(config, room), name)
    fields = {field.name for field in dataclasses.fields(cast(Any, kind))}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in fields}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{room}.{name}: {error}") from error


def _part(config: Tree, name: str) -> Tree:
    found = config.get(name)
    return cast(Tree, found) if isinstance(found, Mapping) else {}
