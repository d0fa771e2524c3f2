"""A model with Python code of its own and no tokenizer, another tokenizer, and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from sdp_lightning.testing import TINY_CHARACTERS, tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}ai:"
_MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

from .scale_own import FACTOR


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *inputs, **options):
        output = super().forward(*inputs, **options)
        output.logits = output.logits * FACTOR
        return output
"""
_TOKENIZATION = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""


def own_code(folder: Path) -> str:
    """A Llama whose own class halves its logits, in two Python files; without a tokenizer."""
    tiny_model().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(_MODELING)
    (folder / "scale_own.py").write_text("FACTOR = 0.5\n")
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnLM"}
    config |= {"model_type": "own", "auto_map": places, "architectures": ["OwnLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def other_tokenizer(folder: Path) -> str:
    """The tiny tokenizer with the ids of its characters in reverse, and a class of its own."""
    tiny_tokenizer().save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    for number, character in enumerate(reversed(TINY_CHARACTERS), 3):
        vocabulary[character] = number
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    (folder / "tokenization_own.py").write_text(_TOKENIZATION)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    places = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}
    config |= {"tokenizer_class": "OwnTokenizerFast", "auto_map": places}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
