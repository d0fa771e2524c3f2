"""Which way a model is decoded: in batches if it can be, else row by row if that is exact."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sdp_lightning.engines.embedded.model_checks import (
    check_config,
    check_decoding,
    count_layers,
    decode_some,
    largest_error,
    text_logprobs,
    tolerance,
    vocab_size,
)
from sdp_lightning.engines.embedded.row_decoder import ROW_MODES, RowDecoder
from sdp_lightning.engines.embedded.row_scheduler import RowScheduler
from sdp_lightning.engines.embedded.scheduler import Scheduler
from sdp_lightning.engines.embedded.sequences import SequenceScheduler
from sdp_lightning.errors import EngineError

logger = logging.getLogger(__name__)

_NUM_TEXTS = 3
_FIRST = range(8, 40)  # lengths at which every token is compared
_AROUND = range(-1, 3)  # and around each number of the configuration, which may be a window
_EXACT, _ALLOWED = 5e-6, 5e-4  # nats in float32
_HOPELESS = 10.0  # times the tolerance: another text does not help
_LONGEST_STRIDE = max(mode.stride for mode in ROW_MODES)


def choose_scheduler(
    model: PreTrainedModel, *, max_length: int, max_slots: int
) -> SequenceScheduler:
    """A scheduler that decodes ``model`` exactly, batched if that is possible.

    Raises:
        EngineError: if neither is.
    """
    try:
        check_config(model, max_length)
        alone = check_decoding(model, max_length)
        layers = count_layers(model)
        return Scheduler(model, num_layers=layers, max_slots=max_slots, rows_alone=alone)
    except EngineError as error:
        refusal = error
    decoder = _exact_decoder(model, max_length, refusal)
    logger.warning(
        "model type %s decodes row by row, with a forward pass for each token of each sequence, "
        "because %s Exact, but slow; engine='vllm://...' is faster where vLLM has this model.",
        model.config.model_type,
        refusal,
    )
    return RowScheduler(decoder, max_slots=max_slots)


def _exact_decoder(model: PreTrainedModel, max_length: int, refusal: EngineError) -> RowDecoder:
    """The decoder whose log-probs are those of full forwards: the first within 5e-6, or the best.

    The tolerance is 5e-4 nats in float32, because the chunks of linear attention round; 0.5 for the
    mean of a stretch of tokens where products are rounded.
    """
    allowed = max(tolerance(model), _ALLOWED)
    exact = _EXACT if allowed == _ALLOWED else allowed
    best, decoder, cause = math.inf, None, ""
    for mode in ROW_MODES:
        try:
            candidate = RowDecoder(model, mode)
            error = min(_errors(candidate, max_length, allowed))
        except Exception as failure:  # a foreign model may raise anything
            cause = cause or f"{type(failure).__name__}: {failure}"
            continue
        if error < best / 2:  # less is noise
            best, decoder = error, candidate
        if best <= exact or (best <= allowed and mode.stride == _LONGEST_STRIDE):
            break
    if decoder is not None and best <= allowed:
        return decoder
    if decoder is not None:
        cause = f"log-probs differ from a full forward by {best:.2g} nats"
    raise EngineError(
        f"model type {model.config.model_type} decodes exactly neither in batches ({refusal}) nor "
        f"row by row ({cause}). Use engine='vllm://...' with a server that has this model."
    ) from refusal


def _errors(decoder: RowDecoder, max_length: int, allowed: float) -> Iterator[float]:
    """The largest error in nats of each of up to three texts, until one is within ``allowed``."""
    for seed in range(_NUM_TEXTS):
        scheduler = RowScheduler(decoder, max_slots=4)
        sequences = decode_some(scheduler, vocab_size(decoder.model), seed)
        error = largest_error(decoder.model, sequences)
        if error <= allowed:
            error = max(error, *_stretch_errors(decoder, max_length, seed))
        yield error
        if error <= allowed or error > _HOPELESS * allowed:
            return


def _stretch_errors(decoder: RowDecoder, max_length: int, seed: int) -> Iterator[float]:
    """The error in nats of each stretch of tokens of one long random text."""
    model = decoder.model
    text = np.random.default_rng(seed).integers(vocab_size(model), size=max_length)
    # foreign: model configurations differ
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    if pad is not None and 0 <= pad < vocab_size(model) and max_length > 2:
        text[2] = pad  # sampled like any other token
    expected = text_logprobs(model, text)
    for stretch in _stretches(model, max_length):
        state, logits = decoder.start(text[: stretch[0]])
        errors: list[float] = []
        for length in stretch:
            found = logits[0].float().log_softmax(-1)[text[length]]
            errors.append(float((found - expected[length - 1]).abs()))
            logits = decoder.extend(state, text[: length + 1])
        exact = model.dtype in (torch.float32, torch.float64)
        error = float(np.max(errors) if exact else np.mean(errors))
        yield error if math.isfinite(error) else math.inf


def _stretches(model: PreTrainedModel, max_length: int) -> list[list[int]]:
    """Lengths of a row, in runs: early ones, the last, and those at which a window may begin."""
    numbers = set(_numbers(model.config.get_text_config(decoder=True).to_dict())) | {max_length}
    around = {number + offset for number in numbers for offset in _AROUND}
    lengths = sorted(n for n in around | set(_FIRST) if 0 < n < max_length)
    runs: list[list[int]] = []
    for length in lengths:
        if runs and runs[-1][-1] == length - 1:
            runs[-1].append(length)
        else:
            runs.append([length])
    return runs


def _numbers(value: Any) -> Iterator[int]:
    """Every integer in settings, however nested."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
