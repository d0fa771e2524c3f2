"""How every type of causal LM scores that transformers can build small: docs/reference/models.md.

``PYTHONPATH=tests:. python tests/support/model_table.py`` prints its table.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.batch import Batch, Layout
from sdp_lightning.training.policy.forward import own_logprobs
from support.odd_models import SETTINGS, odd_model, saved
from support.plain_forwards import LAYOUTS, TOKENS, random_batch
from support.score_runners import runner_of
from support.trainers import make_module

LARGEST = 10_000_000  # weights of a model that is small enough
ERROR = 1e-3  # nats that a score may be off, where it is not refused
OK = "yes"
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
        config = AutoConfig.for_model(kind, **settings, **_SPECIAL_TOKENS)
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


def cells(kind: str, model: Any, batch: Batch) -> Iterator[tuple[Layout, str, float]]:
    """For each layout, ``OK`` or the refusal, and the largest error in nats."""
    with tempfile.TemporaryDirectory() as folder:
        module = make_module(saved(model, Path(folder)))
        module.configure_model()
    policy = module.require_policy()
    for layout in LAYOUTS:
        try:
            found = runner_of(policy, layout).logprobs(batch)
        except ConfigError as error:
            yield layout, _reason(kind, str(error)), 0.0
            continue
        with torch.no_grad():
            yield layout, OK, float((found - own_logprobs(policy, batch)[0]).abs().max())


def _reason(kind: str, message: str) -> str:
    """The refusal's first half, without numbers."""
    message = message.removeprefix(f"model type {kind!r} ").replace(f"model type {kind!r}", "this")
    return re.split(r"[:(]| in the layout|\. Use|, so ", message)[0].strip()


def row_of(kind: str, model: Any) -> str:
    """The line of one type. AssertionError if a score is wrong and not refused."""
    found = list(cells(kind, model, random_batch(0, sizes=(2, 2))))
    assert all(error < ERROR for *_, error in found), (kind, found)
    return f"| `{kind}` | " + " | ".join(cell for _, cell, _ in found) + " |"


def table() -> Iterator[str]:
    """A line of each type that can be built."""
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with quiet_transformers():
            model = small_model(kind)
            if model is not None:
                try:
                    yield row_of(kind, model)
                except ValueError as error:  # its configuration cannot be read back
                    print(f"{kind}: {error}", file=sys.stderr)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| model type | " + " | ".join(f"`{layout}`" for layout in LAYOUTS) + " |")
    print("|---|" + "---|" * len(LAYOUTS))
    for row in table():
        print(row, flush=True)


if __name__ == "__main__":
    main()
