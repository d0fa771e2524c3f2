"""Checks that the embedded engine can decode a model; a model that it cannot is refused.

A configuration is refused if it would decode well at first and go wrong later; every other model
decodes a few tokens, whose log-probs are compared with a full forward.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import load_causal_lm
from sdp_lightning.engines.embedded.kv_cache import ATTENTION_NAME
from sdp_lightning.engines.embedded.scheduler import Scheduler, SequenceState
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.errors import EngineError
from sdp_lightning.types import IntArray, SamplingParams

_DEFAULT_LENGTH = 1024
_NUM_CHECKED = 8
_NUM_TEXTS = 3
_ROTARY = "This engine decodes rotary decoders with full attention (Llama, Qwen, SmolLM, ...)"


def load_model(
    model: ModelSource | PreTrainedModel,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Make the engine's own copy, in eval mode and without gradients.

    Args:
        model: a source, or a module, which is copied and stays unchanged.
        device: device of the copy.
        dtype: see :class:`~sdp_lightning.engines.embedded.engine.EmbeddedEngine`.
        model_kwargs: passed to ``from_pretrained``.

    Raises:
        ConfigError: if the checkpoint lacks weights of the model, or has others.
    """
    if isinstance(model, ModelSource):
        wanted = dtype or (torch.float32 if device.type == "cpu" else "auto")
        loaded: Any = load_causal_lm(model.resolved(), dtype=wanted, options=model_kwargs)
    else:
        loaded = copy.deepcopy(model)
        if dtype is not None:
            loaded = loaded.to(dtype)
    loaded = loaded.to(device).eval().requires_grad_(False)
    return loaded


def resolve_max_length(model: PreTrainedModel, max_length: int | None) -> int:
    """The longest sequence in tokens: ``max_length``, else 1024 or what the model allows.

    Raises:
        EngineError: if this engine is known not to decode that model at that length.
    """
    config: Any = model.config.get_text_config(decoder=True)
    kind = config.model_type
    # foreign: model configurations differ
    limit = getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH
    length = min(_DEFAULT_LENGTH, limit) if max_length is None else max_length
    if length > limit:
        raise EngineError(
            f"max_length={length} exceeds the {limit} positions of model type {kind}."
        )
    # foreign: model configurations differ
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise EngineError(f"model type {kind} has no rotary positions. {_ROTARY}.")
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise EngineError(
            f"model type {kind} scales its rotary positions by the length of the batch "
            f"(rope_type={rope['rope_type']!r}), so KV depends on the batch. {_ROTARY}."
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
    return length


def check_decoding(model: PreTrainedModel) -> None:
    """Decode 8 tokens of each of four sequences and compare with full forwards.

    The tolerance is 1e-4 nats in float32, 0.5 where products are rounded to bfloat16, float16 or
    TF32. Occasionally a single token of a real model exceeds it under any kernel, so up to three
    texts are tried: a wrong KV cache fails on all of them. The model keeps the KV cache's attention
    function afterwards.

    Raises:
        EngineError: naming the model type, if they differ or the model cannot run this way.
    """
    kind = model.config.model_type
    own = model.config._attn_implementation or "eager"  # pyright: ignore[reportPrivateUsage]
    allowed = _tolerance(model)
    errors: list[float] = []
    for attempt in range(_NUM_TEXTS):
        try:
            errors.append(_largest_error(model, own, attempt))
        except Exception as error:  # a foreign model may raise anything
            raise EngineError(
                f"model type {kind} cannot be decoded by this engine "
                f"({type(error).__name__}: {error}). {_ROTARY}."
            ) from error
        if errors[-1] <= allowed:
            return
    raise EngineError(
        f"model type {kind}: decoded log-probs differ from a full forward by "
        f"{min(errors):.2g} nats or more on each of {_NUM_TEXTS} texts (allowed is {allowed:g}). "
        f"{_ROTARY}."
    )


def _largest_error(model: PreTrainedModel, own: str, seed: int) -> float:
    model.set_attn_implementation(ATTENTION_NAME)
    sequences = _decode_some(model, seed)
    model.set_attn_implementation(own)
    errors = [float(_errors(model, sequence).max()) for sequence in sequences]
    model.set_attn_implementation(ATTENTION_NAME)
    return max(errors) if np.isfinite(errors).all() else float("inf")


def _decode_some(model: PreTrainedModel, seed: int) -> list[SequenceState]:
    """Decode four sequences; three start with prefixes of one that the model wrote.

    So rows are padded, copied and moved.
    """
    scheduler = Scheduler(model, num_layers=count_layers(model), max_slots=4)

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

    start = np.random.default_rng(seed).integers(vocab_size(model), size=3)
    (written,) = decode(start)
    scheduler.restart()
    other = start[::-1].copy()
    return decode(written.tokens[:9], other, written.tokens[:7], written.tokens[:7])


def _errors(model: PreTrainedModel, sequence: SequenceState) -> Tensor:
    expected = text_logprobs(model, sequence.tokens)
    sampled = torch.tensor(sequence.logprobs, device=expected.device)
    return (expected[sequence.segment_start - 1 :] - sampled).abs()


@torch.inference_mode()
def text_logprobs(model: Any, token_ids: IntArray) -> Tensor:
    """``[n - 1]`` nats at temperature 1 of every token but the first, by a full forward."""
    tokens = torch.from_numpy(token_ids).to(model.device)[None]
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def _tolerance(model: PreTrainedModel) -> float:
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
