"""Checks that the embedded engine can decode a model; a model that it cannot is refused.

A configuration is refused if it would decode well at first and go wrong later; every other model
decodes a few tokens, whose log-probs are compared with a full forward.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdp_lightning.config.model_limits import attention_spans, max_positions, stateful_layers
from sdp_lightning.config.model_source import ModelSource, quiet_transformers
from sdp_lightning.config.pretrained import load_causal_lm
from sdp_lightning.engines.embedded.attention import ATTENTION_NAME
from sdp_lightning.engines.embedded.scheduler import Scheduler
from sdp_lightning.engines.embedded.sequences import SequenceScheduler, SequenceState
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.errors import EngineError
from sdp_lightning.types import IntArray, SamplingParams

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 1024
_NUM_CHECKED = 8
_NUM_TEXTS = 3
_PASSED = 64  # tokens by which a checked sequence passes the window, at most


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


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set a model's attention; one that keeps its own, as transformers warns, still does."""
    with quiet_transformers():
        model.set_attn_implementation(name)


def resolve_max_length(model: PreTrainedModel, max_length: int | None) -> int:
    """The longest sequence in tokens: ``max_length``, else 1024 or what the model allows.

    Raises:
        EngineError: if the model has fewer positions.
    """
    config: Any = model.config.get_text_config(decoder=True)
    limit = max_positions(config) or DEFAULT_LENGTH
    length = min(DEFAULT_LENGTH, limit) if max_length is None else max_length
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
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for rule in [rope, *(rule for rule in rope.values() if isinstance(rule, dict))]:
        if rule.get("rope_type") not in ("dynamic", "longrope"):
            continue
        original = rule.get("original_max_position_embeddings") or config.max_position_embeddings
        if length > original:
            raise EngineError(
                f"model type {kind} scales its rotary positions by the length of the batch "
                f"(rope_type={rule['rope_type']!r}), so KV depends on the batch; up to "
                f"max_length={original} they do not change: pass that."
            )
    if other := stateful_layers(config):
        raise EngineError(f"model type {kind} has layers of {', '.join(other)}.")


def check_decoding(model: PreTrainedModel, max_length: int) -> bool:
    """Decode 8 tokens of each of a few sequences and compare with full forwards.

    Four sequences are short. If a setting of the model may be of a window, or of another length
    beyond which it computes otherwise, two more decode beside each other, one of them past it.

    The tolerance is 1e-4 nats in float32, 0.5 where products are rounded to bfloat16, float16 or
    TF32. Occasionally a single token of a real model exceeds it under any kernel, so up to three
    texts are tried: a wrong KV cache fails on all of them. The model keeps the KV cache's attention
    function afterwards, if it passes, and else its own.

    Args:
        model: the engine's.
        max_length: tokens of the longest sequence that the engine allows.

    Returns:
        Whether rows have to be decoded one by one: the model is wrong otherwise.

    Raises:
        EngineError: naming the model type, if they differ or the model cannot run this way.
    """
    config: Any = model.config.get_text_config(decoder=True)
    kind = config.model_type
    own = config._attn_implementation or "eager"
    spans = [0, *(span for span in attention_spans(config) if span < max_length)]
    past = spans[-1] + min(spans[-1], _PASSED)
    if past:
        past = min(past + _NUM_CHECKED, max_length)
    fault = ""
    for rows_alone in (False, True):
        length = 0
        fault = _fault(model, length, rows_alone)
        if not fault and past:
            length = past
            fault = _fault(model, length, rows_alone)
        if not fault:
            if rows_alone:
                logger.warning("model type %s decodes one sequence at a time: it is slow.", kind)
            set_attention(model, ATTENTION_NAME)
            return rows_alone
    exact = [span for span in reversed(spans[1:]) if length and not _fault(model, span, True)]
    advice = f" Up to max_length={exact[0]} it decodes right." if exact else ""
    set_attention(model, own)
    raise EngineError(f"model type {kind} {fault}.{advice}")


def _fault(model: PreTrainedModel, length: int, rows_alone: bool) -> str:
    """What is wrong with decoding to ``length``, or nothing; see :func:`_decode_some`."""
    allowed = tolerance(model)
    errors: list[float] = []
    for attempt in range(_NUM_TEXTS):
        try:
            errors.append(_largest_error(model, attempt, length, rows_alone))
        except Exception as error:  # a foreign model may raise anything
            return f"cannot be decoded in batches ({type(error).__name__}: {error})"
        if errors[-1] <= allowed:
            return ""
    where = f" up to {length} tokens" if length else ""
    return (
        f"cannot be decoded in batches: log-probs{where} differ from a full forward by "
        f"{min(errors):.2g} nats or more on each of {_NUM_TEXTS} texts (allowed is {allowed:g})"
    )


def _largest_error(model: PreTrainedModel, seed: int, length: int, rows_alone: bool) -> float:
    set_attention(model, ATTENTION_NAME)
    layers = count_layers(model)
    scheduler = Scheduler(model, num_layers=layers, max_slots=4, rows_alone=rows_alone)
    sequences = decode_some(scheduler, vocab_size(model), seed, length)
    set_attention(model, "eager")  # leaves nothing out
    return largest_error(model, sequences)


def largest_error(model: PreTrainedModel, sequences: list[SequenceState]) -> float:
    """Largest difference in nats from full forwards; infinite if any is not a number."""
    errors = [float(_errors(model, sequence).max()) for sequence in sequences]
    return max(errors) if np.isfinite(errors).all() else float("inf")


def decode_some(
    scheduler: SequenceScheduler, num_tokens: int, seed: int, length: int = 0
) -> list[SequenceState]:
    """Decode a sequence of ``length`` tokens beside a short one.

    If ``length`` is 0, four short ones, of which three start with prefixes of one that the model
    wrote. So rows are padded, copied and moved.
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

    start = np.random.default_rng(seed).integers(num_tokens, size=max(3, length - _NUM_CHECKED))
    other = start[:3][::-1].copy()
    if length:
        return decode(start, other)
    (written,) = decode(start)
    scheduler.restart()
    return decode(written.tokens[:9], other, written.tokens[:7], written.tokens[:7])


def _errors(model: Any, sequence: SequenceState) -> Tensor:
    count = len(sequence.logprobs)
    tokens = torch.from_numpy(sequence.tokens).to(model.device)[None]
    with torch.inference_mode():
        output = model(input_ids=tokens[:, :-1], use_cache=False, logits_to_keep=count)
        logits: Tensor = output.logits[0, -count:]  # some models give all of them
    table = logits.float().log_softmax(-1)
    expected = table.gather(1, tokens[0, -count:, None])[:, 0]
    return (expected - torch.tensor(sequence.logprobs, device=expected.device)).abs()


@contextmanager
def plain_attention(model: PreTrainedModel) -> Generator[None]:
    """Context in which a forward pass needs no KV cache, which the batched attention does."""
    if model.config._attn_implementation != ATTENTION_NAME:  # pyright: ignore[reportPrivateUsage]
        yield
        return
    set_attention(model, "eager")
    try:
        yield
    finally:
        set_attention(model, ATTENTION_NAME)


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
