"""A model that the slot loop can decode, or a plain refusal.

What is refused by its configuration would decode well at first and go wrong later; everything else
has to prove itself by decoding a few tokens that a full forward then scores.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdp_lightning.config.model_source import quiet_transformers
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
    model: str | PreTrainedModel,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    """The engine's own copy, in eval mode and without gradients.

    Args:
        model: an id or a folder, or a module, which is copied and stays as it is.
        device: where the copy lives.
        dtype: None keeps a module's; from an id, float32 on CPU and the checkpoint's elsewhere.
        model_kwargs: for ``from_pretrained``.
    """
    if isinstance(model, str):
        wanted = dtype or (torch.float32 if device.type == "cpu" else "auto")
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=wanted, **model_kwargs)
    else:
        loaded = copy.deepcopy(model)
        if dtype is not None:
            loaded = loaded.to(dtype)
    loaded = loaded.to(device).eval().requires_grad_(False)
    return loaded


def resolve_max_length(model: PreTrainedModel, max_length: int | None) -> int:
    """``max_length``, by default 1024 or what the model allows.

    Raises:
        EngineError: if the model is known not to decode sequences of that length by slots.
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

    Allowed is 1e-4 nats in float32, 0.5 where products are rounded to bfloat16, float16 or TF32.
    Now and then a single token of a real model lies further than that from float64 under any
    kernel, so up to three texts are tried: a wrong cache fails on all of them. Leaves the model
    with the attention function of the slots.

    Raises:
        EngineError: naming the model type, if they differ or the model cannot run this way.
    """
    kind = model.config.model_type
    own = model.config._attn_implementation or "eager"  # pyright: ignore[reportPrivateUsage]
    allowed = _tolerance(model)
    worst: list[float] = []
    for attempt in range(_NUM_TEXTS):
        try:
            worst.append(_largest_error(model, own, attempt))
        except Exception as error:  # whatever a foreign model raises, the answer is the same
            raise EngineError(
                f"model type {kind} cannot be decoded by slots ({type(error).__name__}: {error}). "
                f"{_ROTARY}."
            ) from error
        if worst[-1] <= allowed:
            return
    raise EngineError(
        f"model type {kind}: log-probs decoded by slots differ from a full forward by "
        f"{min(worst):.2g} nats or more on each of {_NUM_TEXTS} texts (allowed is {allowed:g}). "
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
    """Four sequences, three over prefixes of one that the model wrote: padded, copied, moved."""
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
    """[n - 1] nats at temperature 1 of every token but the first, by a full forward."""
    tokens = torch.from_numpy(token_ids).to(model.device)[None]
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def _tolerance(model: PreTrainedModel) -> float:
    on_gpu = model.device.type == "cuda"
    rounds = model.dtype != torch.float32 and model.dtype != torch.float64
    tf32 = on_gpu and torch.get_float32_matmul_precision() != "highest"
    return 0.5 if rounds or tf32 else 1e-4


def vocab_size(model: Any) -> int:
    """Size of the vocabulary that the embedding holds."""
    return int(model.get_input_embeddings().weight.shape[0])


def count_layers(model: PreTrainedModel) -> int:
    """Decoder layers, each with its own keys and values."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)
