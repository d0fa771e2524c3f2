"""Checks that the embedded engine can decode a model; a model that it cannot is refused.

A configuration is refused if it would decode well at first and go wrong later; every other model
decodes a few tokens, whose log-probs are compared with a full forward.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdp_lightning.config.model_source import load_causal_lm
from sdp_lightning.engines.embedded.kv_cache import ATTENTION_NAME
from sdp_lightning.engines.embedded.scheduler import Scheduler
from sdp_lightning.engines.embedded.sequences import SequenceScheduler, SequenceState
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.errors import EngineError
from sdp_lightning.types import IntArray, SamplingParams

_DEFAULT_LENGTH = 1024
_NUM_CHECKED = 8
_NUM_TEXTS = 3
_ROTARY = "Rows are batched for rotary decoders with full attention (Llama, Qwen, SmolLM, ...)"


def load_model(
    model: str | PreTrainedModel,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Make the engine's own copy, in eval mode and without gradients.

    Args:
        model: an id or a folder, or a module, which is copied and stays unchanged.
        device: device of the copy.
        dtype: see :class:`~sdp_lightning.engines.embedded.engine.EmbeddedEngine`.
        model_kwargs: passed to ``from_pretrained``.

    Raises:
        ConfigError: if the checkpoint lacks weights of the model, or has others.
    """
    if isinstance(model, str):
        wanted = dtype or (torch.float32 if device.type == "cpu" else "auto")
        loaded: Any = load_causal_lm(model, dtype=wanted, options=model_kwargs)
    else:
        loaded = copy.deepcopy(model)
        if dtype is not None:
            loaded = loaded.to(dtype)
    loaded = loaded.to(device).eval().requires_grad_(False)
    return loaded


def resolve_max_length(model: PreTrainedModel, max_length: int | None) -> int:
    """The longest sequence in tokens: ``max_length``, else 1024 or what the model allows.

    Raises:
        EngineError: if the model has fewer positions.
    """
    config: Any = model.config.get_text_config(decoder=True)
    # foreign: model configurations differ
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    limit = min((limit for limit in limits if limit), default=_DEFAULT_LENGTH)
    length = min(_DEFAULT_LENGTH, limit) if max_length is None else max_length
    if length > limit:
        raise EngineError(
            f"max_length={length} exceeds the {limit} positions of model type {config.model_type}. "
            f"Pass max_length={limit} or less."
        )
    return length


def check_config(model: PreTrainedModel, length: int) -> None:
    """Refuse what would be decoded well at first and go wrong within ``length`` tokens.

    Raises:
        EngineError: if rows of such a model cannot be batched.
    """
    config: Any = model.config.get_text_config(decoder=True)
    kind = config.model_type
    # foreign: model configurations differ
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise EngineError(f"model type {kind} has no rotary positions. {_ROTARY}.")
    for part in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if part.get("rope_type") not in ("dynamic", "longrope"):
            continue
        original = part.get("original_max_position_embeddings") or config.max_position_embeddings
        if length > original:
            raise EngineError(
                f"model type {kind} scales its rotary positions by the length of the batch "
                f"(rope_type={part['rope_type']!r}), so KV depends on the batch. {_ROTARY}; up to "
                f"max_length={original} they do not change: pass that."
            )
    # foreign: model configurations differ
    layers: set[str] = set(getattr(config, "layer_types", None) or ())
    if other := layers - {"full_attention", "sliding_attention"}:
        raise EngineError(f"model type {kind} has layers of {', '.join(sorted(other))}. {_ROTARY}.")
    # foreign: model configurations differ
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layers or not layers
    if slides and window is not None and length > window:
        raise EngineError(
            f"model type {kind} attends within a sliding window of {window} tokens. {_ROTARY}; "
            f"up to max_length={window} the window does not act: pass that."
        )


def check_decoding(model: PreTrainedModel) -> None:
    """Decode 8 tokens of each of four sequences and compare with full forwards.

    The tolerance is 1e-4 nats in float32, 0.5 where products are rounded to bfloat16, float16 or
    TF32. Occasionally a single token of a real model exceeds it under any kernel, so up to three
    texts are tried: a wrong KV cache fails on all of them. The model keeps the KV cache's attention
    function afterwards, if it passes.

    Raises:
        EngineError: naming the model type, if they differ or the model cannot run this way.
    """
    kind = model.config.model_type
    own = model.config._attn_implementation or "eager"  # pyright: ignore[reportPrivateUsage]
    allowed = tolerance(model)
    errors: list[float] = []
    for attempt in range(_NUM_TEXTS):
        try:
            errors.append(_largest_error(model, own, attempt))
        except Exception as error:  # a foreign model may raise anything
            model.set_attn_implementation(own)
            raise EngineError(
                f"model type {kind} cannot be decoded in batches "
                f"({type(error).__name__}: {error}). {_ROTARY}."
            ) from error
        if errors[-1] <= allowed:
            return
    model.set_attn_implementation(own)
    raise EngineError(
        f"model type {kind}: decoded log-probs differ from a full forward by "
        f"{min(errors):.2g} nats or more on each of {_NUM_TEXTS} texts (allowed is {allowed:g}). "
        f"{_ROTARY}."
    )


def _largest_error(model: PreTrainedModel, own: str, seed: int) -> float:
    model.set_attn_implementation(ATTENTION_NAME)
    scheduler = Scheduler(model, num_layers=count_layers(model), max_slots=4)
    sequences = decode_some(scheduler, vocab_size(model), seed)
    model.set_attn_implementation(own)
    error = largest_error(model, sequences)
    model.set_attn_implementation(ATTENTION_NAME)
    return error


def largest_error(model: PreTrainedModel, sequences: list[SequenceState]) -> float:
    """Largest difference in nats from full forwards; infinite if any is not a number."""
    errors = [float(_errors(model, sequence).max()) for sequence in sequences]
    return max(errors) if np.isfinite(errors).all() else float("inf")


def decode_some(scheduler: SequenceScheduler, num_tokens: int, seed: int) -> list[SequenceState]:
    """Decode four sequences; three start with prefixes of one that the model wrote.

    So rows are padded, copied and moved.
    """

    def decode(*prompts: IntArray) -> list[SequenceState]:
        params = SamplingParams(max_new_tokens=_NUM_CHECKED)
        sequences = [
            SequenceState.of(GenerationRequest(prompt, params, seed))
            for seed, prompt in enumerate(prompts)
        ]
        for sequence in sequences:
            scheduler.add(sequence)
        while scheduler.has_work:
            scheduler.step(0)
        return sequences

    start = np.random.default_rng(seed).integers(num_tokens, size=3)
    (written,) = decode(start)
    scheduler.restart()
    other = start[::-1].copy()
    return decode(written.tokens[:9], other, written.tokens[:7], written.tokens[:7])


def _errors(model: PreTrainedModel, sequence: SequenceState) -> Tensor:
    expected = text_logprobs(model, sequence.tokens)
    sampled = torch.tensor(sequence.logprobs, device=expected.device)
    return (expected[sequence.segment_start - 1 :] - sampled).abs()


@contextmanager
def plain_attention(model: PreTrainedModel) -> Generator[None]:
    """Context in which a forward pass needs no KV cache, which the batched attention does."""
    if model.config._attn_implementation != ATTENTION_NAME:  # pyright: ignore[reportPrivateUsage]
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


@torch.inference_mode()
def text_logprobs(model: Any, token_ids: IntArray) -> Tensor:
    """``[n - 1]`` nats at temperature 1 of every token but the first, by a full forward."""
    tokens = torch.from_numpy(token_ids).to(model.device)[None]
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def tolerance(model: PreTrainedModel) -> float:
    """Largest error in nats of a decoded log-prob."""
    on_gpu = model.device.type == "cuda"
    rounds = model.dtype != torch.float32 and model.dtype != torch.float64
    tf32 = on_gpu and torch.get_float32_matmul_precision() != "highest"
    return 0.5 if rounds or tf32 else 1e-4


def vocab_size(model: Any) -> int:
    """Rows of the input embedding: the number of token ids that the model accepts."""
    return int(model.get_input_embeddings().weight.shape[0])


def count_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers, each of which has its own keys and values."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)
