"""Size of a model that is not on this machine: by its config on the hub, else of a table.

Neither loads weights or runs a model's own code.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from sdp_lightning.cli.doctor.model_size import ModelSize
from sdp_lightning.config.model_source import ModelSource, quiet_transformers
from sdp_lightning.errors import ConfigError

_HUB_S = 3.0  # longest wait for the hub
_MOST_BYTES = 1 << 20  # of a config
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tied", "num_experts"),
)
# Their fields by the name after the owner's, without what variants add to it (-Instruct, -it, ...).
_TABLE = """
qwen2.5-0.5b 896 4864 24 14 2 64 151936 1 1
qwen2.5-1.5b 1536 8960 28 12 2 128 151936 1 1
qwen2.5-3b 2048 11008 36 16 2 128 151936 1 1
qwen2.5-7b 3584 18944 28 28 4 128 152064 0 1
qwen2.5-14b 5120 13824 48 40 8 128 152064 0 1
qwen2.5-32b 5120 27648 64 40 8 128 152064 0 1
qwen2.5-72b 8192 29568 80 64 8 128 152064 0 1
qwen3-0.6b 1024 3072 28 16 8 128 151936 1 1
qwen3-1.7b 2048 6144 28 16 8 128 151936 1 1
qwen3-4b 2560 9728 36 32 8 128 151936 1 1
qwen3-8b 4096 12288 36 32 8 128 151936 0 1
qwen3-14b 5120 17408 40 40 8 128 151936 0 1
qwen3-32b 5120 25600 64 64 8 128 151936 0 1
qwen3-30b-a3b 2048 768 48 32 4 128 151936 0 128
qwen3-235b-a22b 4096 1536 94 64 4 128 151936 0 128
llama-3.2-1b 2048 8192 16 32 8 64 128256 1 1
llama-3.2-3b 3072 8192 28 24 8 128 128256 1 1
llama-3-8b 4096 14336 32 32 8 128 128256 0 1
llama-3.1-8b 4096 14336 32 32 8 128 128256 0 1
llama-3.1-70b 8192 28672 80 64 8 128 128256 0 1
llama-3.3-70b 8192 28672 80 64 8 128 128256 0 1
llama-2-7b 4096 11008 32 32 32 128 32000 0 1
llama-2-13b 5120 13824 40 40 40 128 32000 0 1
tinyllama-1.1b 2048 5632 22 32 4 64 32000 0 1
mistral-7b 4096 14336 32 32 8 128 32768 0 1
ministral-8b 4096 12288 36 32 8 128 131072 0 1
mistral-nemo 5120 14336 40 32 8 128 131072 0 1
mistral-small-24b 5120 32768 40 32 8 128 131072 0 1
mixtral-8x7b 4096 14336 32 32 8 128 32000 0 8
gemma-2-2b 2304 9216 26 8 4 256 256000 1 1
gemma-2-9b 3584 14336 42 16 8 256 256000 1 1
gemma-2-27b 4608 36864 46 32 16 128 256000 1 1
gemma-3-1b 1152 6912 26 4 1 256 262144 1 1
gemma-3-4b 2560 10240 34 8 4 256 262208 1 1
gemma-3-12b 3840 15360 48 16 8 256 262208 1 1
gemma-3-27b 5376 21504 62 32 16 128 262208 1 1
phi-3-mini 3072 8192 32 32 32 96 32064 0 1
phi-4 5120 17920 40 40 10 128 100352 0 1
phi-4-mini 3072 8192 32 24 8 128 200064 1 1
smollm2-135m 576 1536 30 9 3 64 49152 1 1
smollm2-360m 960 2560 32 15 5 64 49152 1 1
smollm2-1.7b 2048 8192 24 32 32 64 49152 1 1
smollm3-3b 2048 11008 36 16 4 128 128256 1 1
olmo-2-0425-1b 2048 8192 16 16 16 128 100352 0 1
olmo-2-1124-7b 4096 11008 32 32 32 128 100352 0 1
olmo-2-1124-13b 5120 13824 40 40 40 128 100352 0 1
deepseek-r1-distill-qwen-1.5b 1536 8960 28 12 2 128 151936 0 1
deepseek-r1-distill-qwen-7b 3584 18944 28 28 4 128 152064 0 1
deepseek-r1-distill-qwen-14b 5120 13824 48 40 8 128 152064 0 1
deepseek-r1-distill-qwen-32b 5120 27648 64 40 8 128 152064 0 1
deepseek-r1-distill-llama-8b 4096 14336 32 32 8 128 128256 0 1
deepseek-r1-distill-llama-70b 8192 28672 80 64 8 128 128256 0 1
gpt-oss-20b 2880 2880 24 64 8 64 201088 0 32
gpt-oss-120b 2880 2880 36 64 8 64 201088 0 128
"""
_VARIANT = re.compile(r"-(?:instruct|it|base|chat|pt|hf|math|coder|bf16|v\d[\d.]*|\d{4})(?=-|$)")


def size_of_absent(source: ModelSource) -> ModelSize | None:
    """Size of a model that is an id of the hub; None if it is neither reachable nor known."""
    name = str(source.name)
    if ":" in name or name.count("/") > 1 or name[:1] in "/.~":
        return None
    return size_on_hub(name, source.revision) or known_size(name)


def known_size(name: str) -> ModelSize | None:
    """Size of a well-known model by its id, without norms and biases: some 0.1 % are missing."""
    own = name.lower().rpartition("/")[2].removeprefix("meta-")
    while own not in _known() and (match := _VARIANT.search(own)):
        own = own[: match.start()] + own[match.end() :]
    fields = _known().get(own)
    if fields is None:
        return None
    size = ModelSize.from_config(fields, _dense_weights(fields))
    return replace(size, origin=f"as {own} is known to be: the model is not on this machine")


def size_on_hub(name: str, revision: str | None) -> ModelSize | None:
    """Size by ``config.json`` on the hub; None if it cannot be read in 3 s, or not be built."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return None
    url = f"{constants.ENDPOINT}/{name}/resolve/{revision or 'main'}/config.json"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        asked = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(asked, timeout=_HUB_S) as answer:
            text = _read_in_time(answer)
        return replace(size_of_config(json.loads(text)), origin="by its config on the hub")
    except (OSError, ValueError, ConfigError, urllib.error.URLError):
        return None


def _read_in_time(answer: Any) -> bytes:
    """All of a config. ``TimeoutError`` if it comes drop by drop, ``ValueError`` if it is large."""
    deadline, text = time.monotonic() + _HUB_S, b""
    while part := answer.read1(_MOST_BYTES):
        text += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(text) > _MOST_BYTES:
            raise ValueError("this is no config")
    return text


def size_of_config(config: Mapping[str, Any]) -> ModelSize:
    """Size of the model that a ``config.json`` describes, built without memory.

    Raises:
        ConfigError: if transformers has no such model, or its settings are not those of a decoder.
    """
    import torch
    from transformers import AutoConfig

    from sdp_lightning.config.pretrained import auto_classes

    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        Path(folder, "config.json").write_text(json.dumps(config))
        try:
            read = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                model = auto_classes(read)[0].from_config(read)
        except Exception as error:  # whatever the model's own code raises
            raise ConfigError(f"the model cannot be built: {error}") from error
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    return ModelSize.from_config(config, weights)


@cache
def _known() -> dict[str, dict[str, int]]:
    rows = [line.split() for line in _TABLE.strip().splitlines()]
    return {name: dict(zip(_FIELDS, map(int, values), strict=True)) for name, *values in rows}


def _dense_weights(fields: Mapping[str, int]) -> dict[str, int]:
    """Number of elements of the matrices of a decoder, by their usual names."""
    hidden, head = fields["hidden_size"], fields["head_dim"]
    heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    opened = hidden * fields["intermediate_size"] * fields["num_experts"]
    embedding = fields["vocab_size"] * hidden
    part = {
        "self_attn.q_proj": hidden * head * heads,
        "self_attn.k_proj": hidden * head * groups,
        "self_attn.v_proj": hidden * head * groups,
        "self_attn.o_proj": hidden * head * heads,
        **{f"mlp.{kind}_proj": opened for kind in ("gate", "up", "down")},
    }
    layers = {
        f"model.layers.{layer}.{name}.weight": number
        for layer in range(fields["num_hidden_layers"])
        for name, number in part.items()
    }
    ends = {"model.embed_tokens.weight": embedding}
    return layers | ends | ({} if fields["tied"] else {"lm_head.weight": embedding})
