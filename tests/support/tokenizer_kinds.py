"""Small tokenizers of the kinds that models have, with the decoders that these kinds have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the answer is <answer>42</answer> and so on.\n\n", "é ü あいう 🙂 don't stop, now > then"]
SPECIAL = ["<unk>", "<eos>", "<end>"]


def _wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return tokenizer


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, Qwen's and Llama 3's: every token is some bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    return _wrap(core)


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces with spaces, and single bytes of what has no piece."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted({*"▁\nabcdefghijklmnoprstuvwxyz<>/.42é"})
    merges = [("▁", "t"), ("a", "n"), ("an", "s"), ("<", "/"), ("r", ">"), (">", "\n"), ("▁", "a")]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrap(core)


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: words, and pieces that go on with a word."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(TEXTS * 3, trainer)
    return _wrap(core)


KINDS: Mapping[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "SentencePiece": sentencepiece,
    "WordPiece": wordpiece,
}
