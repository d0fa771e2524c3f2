"""How every type of causal LM scores that transformers can build small: docs/reference/models.md.

``PYTHONPATH=tests:. python tests/support/model_table.py`` prints its table.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sdp_lightning.config.model_source import quiet_transformers
from support.model_cells import COLUMNS, FAULT, OK, Kind
from support.more_models import LEFT_OUT, MORE
from support.odd_models import SETTINGS, odd_model, saved
from support.plain_forwards import TOKENS

__all__ = ["COLUMNS", "FAULT", "KINDS", "OK", "row_of", "small_model", "table"]
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 10_000_000  # weights of a model that is small enough
_SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_window_layers": 2,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "rotary_dim": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 128,
    "n_positions": 128,
}
_SPECIAL_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def small_model(kind: str) -> Any:
    """A model of type ``kind``, or None: transformers does not build a small one from these."""
    if kind in SETTINGS:
        return odd_model(kind)
    try:
        usual = AutoConfig.for_model(kind).to_dict()
        settings = {name: n for name, n in _SMALL.items() if type(usual.get(name)) is int}
        if "kv_lora_rank" in settings:  # as many keys as queries, of a size of their own
            settings["num_key_value_heads"] = settings["num_attention_heads"]
            settings.pop("head_dim", None)
        settings |= _SPECIAL_TOKENS
        if kind in MORE:
            settings = {name: value for name, value in MORE[kind].items() if value != LEFT_OUT}
        config = AutoConfig.for_model(kind, **settings)
        with torch.device("meta"):
            size = sum(w.numel() for w in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST or config.get_text_config(decoder=True).vocab_size != 50:
            return None
        model = odd_model(kind, config=config)
        with torch.no_grad():
            model(input_ids=TOKENS)
    except Exception as error:  # foreign models, with settings that they were not made for
        print(f"{kind}: {type(error).__name__}", file=sys.stderr)
        return None
    return model


def row_of(kind: str, model: Any) -> str:
    """The line of one type."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cells = Kind(kind, saved(model, place / "model"), place).cells()
    return f"| `{kind}` | " + " | ".join(cells) + " |"


def table(kinds: Iterable[str] = KINDS) -> Iterator[str]:
    """A line of each type that can be built."""
    for kind in kinds:
        with quiet_transformers():
            model = small_model(kind)
            if model is not None:
                yield row_of(kind, model)


def main() -> None:
    """Print the table; the exit status is 1 if a cell is a fault."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print("| model type | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    faults = 0
    for row in table(sys.argv[1:] or KINDS):
        print(row, flush=True)
        faults += row.count(FAULT)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
