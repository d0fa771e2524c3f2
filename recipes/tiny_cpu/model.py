"""A Llama of 0.4 M parameters that has been shown how to sort, badly.

The warm start is 120 supervised steps (about 5 s on one core) on demonstrations of which most carry
a letter or two after the right answer. So the model knows the digits and not when to stop: its
greedy answers are nearly all right, its sampled ones mostly wrong, which leaves RL something to do.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdp_lightning.config.build_cache import build_once
from sdp_lightning.config.model_source import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_DIGITS = 6


@dataclass(frozen=True)
class WarmStart:
    """Everything that the warm model depends on: the cache is keyed by it."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_heads: int = 4
    num_steps: int = 120
    batch_size: int = 64
    learning_rate: float = 2e-3
    junk_share: float = 0.8
    seed: int = 0


def model_path(settings: WarmStart | None = None) -> str:
    """The folder of the warm model, trained on first use."""
    settings = settings or WarmStart()
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:10]

    def build(folder: Path) -> None:
        print("Warming up the tiny model: once, 5 s on an idle core.", flush=True)
        warm_start(settings, folder)

    return str(build_once(f"tiny-sorter-{key}", build))


def warm_start(settings: WarmStart, folder: Path) -> None:
    """Train on demonstrations, on one thread, and save model and tokenizer."""
    import torch

    from sdp_lightning.testing import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    generator = random.Random(settings.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads differ from machine to machine
    try:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            model = _new_model(settings, vocab_size=len(tokenizer))
            optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
            for step in range(settings.num_steps):
                warmed, left = (step + 1) / 10, 1 - step / settings.num_steps
                optimizer.param_groups[0]["lr"] = settings.learning_rate * min(warmed, 1) * left
                texts = [_demonstration(generator, settings) for _ in range(settings.batch_size)]
                loss = _answer_loss(model, [tokenizer(text)["input_ids"] for text in texts])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    finally:
        torch.set_num_threads(threads)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _demonstration(generator: random.Random, settings: WarmStart) -> str:
    digits = generator.choices("0123456789", k=NUM_DIGITS)
    junk = ""
    if generator.random() < settings.junk_share:
        junk = "".join(generator.choices(LETTERS, k=generator.randint(1, 2)))
    return f"{''.join(digits)}={''.join(sorted(digits))}{junk}\n"


def _answer_loss(model: LlamaForCausalLM, sequences: list[list[int]]) -> Tensor:
    import torch

    longest, prompt = max(map(len, sequences)), NUM_DIGITS + 1
    inputs = torch.zeros(len(sequences), longest, dtype=torch.long)
    labels = torch.full_like(inputs, -100)
    for row, tokens in enumerate(sequences):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def _new_model(settings: WarmStart, *, vocab_size: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    return model.train()


if __name__ == "__main__":
    print(model_path())
