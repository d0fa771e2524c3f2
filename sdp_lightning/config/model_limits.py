"""What a model's configuration says of how far its layers see, and of what they keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

_POSITIONS = ("max_position_embeddings", "max_seq_len")
# In names of settings that may be a number of tokens beyond which a layer computes otherwise.
_SPAN = re.compile("(window|local|chunk|sliding|span|floor|index|compress)(?!.*layers)")


def max_positions(config: Any) -> int | None:
    """The number of positions that the model has, or None if its settings name none."""
    # foreign: model configurations differ
    named = (getattr(config, name, None) for name in _POSITIONS)
    return min((number for number in named if type(number) is int and number > 1), default=None)


def attention_spans(config: Any) -> list[int]:
    """Every number in a model's settings that may be of a window or a chunk, in rising order."""
    settings = config.to_dict().items()
    numbers = [number for name, value in settings if _SPAN.search(name) for number in _ints(value)]
    return sorted({number for number in numbers if number > 1})


def stateful_layers(config: Any) -> list[str]:
    """Kinds of the model's layers that mix tokens by a state or a convolution, not by a mask."""
    from transformers.masking_utils import (
        LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as MASKS,
        create_causal_mask,
        create_chunked_causal_mask,
        create_sliding_window_causal_mask,
    )

    masked = {create_causal_mask, create_chunked_causal_mask, create_sliding_window_causal_mask}

    def is_masked(kind: str) -> bool:
        create: Any = MASKS.get(kind)
        create = create.func if isinstance(create, partial) else create
        return not isinstance(create, dict) and create in masked

    # foreign: model configurations differ
    kinds: set[str] = set(getattr(config, "layer_types", None) or ())
    return sorted(kind for kind in kinds if not is_masked(kind))


def _ints(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        value = [*value.values()]
    for number in value if isinstance(value, list | tuple) else [value]:
        if type(number) is int:
            yield number
