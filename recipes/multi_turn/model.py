"""A Llama of 0.4 M parameters that has seen the game played by players who waste their turns.

The warm start trains on games in which every digit follows from the answers before it, and half of
the turns are a letter, which the game refuses. So the model knows the rules roughly, and wins about
as often as the players that it has seen.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from task import play

from sdp_lightning.config.build_cache import build_once
from sdp_lightning.config.model_source import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class WarmStart:
    """Everything that the warm model depends on: the cache is keyed by it."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_heads: int = 4
    num_steps: int = 250
    batch_size: int = 48
    learning_rate: float = 3e-3
    junk: float = 0.5
    seed: int = 0


def model_path(settings: WarmStart | None = None) -> str:
    """The folder of the warm model, trained on first use."""
    settings = settings or WarmStart()
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:10]

    def build(folder: Path) -> None:
        print("Warming up the tiny model: once, 20 s on an idle core.", flush=True)
        warm_start(settings, folder)

    return str(build_once(f"tiny-guesser-{key}", build))


def warm_start(settings: WarmStart, folder: Path) -> None:
    """Train on games, on one thread, and save model and tokenizer."""
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
                games = [play(generator, settings.junk) for _ in range(settings.batch_size)]
                loss = _guess_loss(model, tokenizer, games)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    finally:
        torch.set_num_threads(threads)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _guess_loss(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    games: list[list[tuple[str, bool]]],
) -> Tensor:
    """Cross-entropy of the guesses alone; the game's answers are not learned."""
    import torch

    encoded = [tokenizer("".join(text for text, _ in game))["input_ids"] for game in games]
    inputs = torch.zeros(len(games), max(map(len, encoded)), dtype=torch.long)
    labels = torch.full_like(inputs, -100)
    for row, (game, tokens) in enumerate(zip(games, encoded, strict=True)):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        start = 0
        for text, is_mine in game:  # one token a character
            end = start + len(text)
            if is_mine:
                labels[row, start:end] = inputs[row, start:end]
            start = end
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
