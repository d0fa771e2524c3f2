"""What is learned: rows, their tokens, where an answer ends, and what it is worth.

The task of recipes/tiny_cpu, with its warm model, and tasks of SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdp_lightning.config.import_path import load_object
from sdp_lightning.testing import TINY_CHARACTERS

RECIPES = Path(__file__).parents[2]
EOS, FIRST_CHARACTER = 1, 3
NEWLINE = FIRST_CHARACTER + TINY_CHARACTERS.index("\n")
Row = dict[str, str]
Judge = Callable[[str, Row], float]


@dataclass(frozen=True, eq=False)
class Task:
    """A task whose prompts have one length and whose rows have one right answer each.

    Args:
        train_rows: with ``prompt`` and ``answer``.
        test_rows: held out.
        judge: reward of a completion.
        encode: [n, length] tokens of texts of one length.
        decode: the text of tokens.
        ends: [V] bool, the tokens after which nothing is sampled.
        prompt_length: tokens of a prompt.
        max_new_tokens: of an answer, its end included.
        num_frozen: layers of the model that are not trained; above 0 neither are embeddings.
    """

    train_rows: Sequence[Row]
    test_rows: Sequence[Row]
    judge: Judge
    encode: Callable[[Sequence[str]], Tensor]
    decode: Callable[[Sequence[int]], str]
    ends: Tensor
    prompt_length: int
    max_new_tokens: int
    num_frozen: int = 0


def encode(texts: Sequence[str]) -> Tensor:
    """[n, length] token ids of texts of one length, of the tiny tokenizer."""
    return torch.tensor([[FIRST_CHARACTER + TINY_CHARACTERS.index(c) for c in t] for t in texts])


def decode(token_ids: Sequence[int]) -> str:
    """The text without special tokens, of the tiny tokenizer."""
    return "".join(TINY_CHARACTERS[i - FIRST_CHARACTER] for i in token_ids if i >= FIRST_CHARACTER)


def _sorting() -> Task:
    folder = RECIPES / "tiny_cpu"
    make_rows: Any = load_object(f"{folder}/task.py:make_rows")
    judge: Any = load_object(f"{folder}/task.py:reward")
    ends = torch.zeros(FIRST_CHARACTER + len(TINY_CHARACTERS), dtype=torch.bool)
    ends[[EOS, NEWLINE]] = True
    return Task(make_rows(4096, seed=1), make_rows(128, seed=3), judge, encode, decode, ends, 7, 9)


SORTING = _sorting()


def warm_model() -> Any:
    """A LlamaForCausalLM that knows how to sort and not when to stop."""
    return load_model(f"{RECIPES}/tiny_cpu/model.py:model_path")


def load_model(path_function: str) -> Any:
    """The LlamaForCausalLM in the folder that a recipe's function names."""
    from transformers import LlamaForCausalLM

    from sdp_lightning.config.model_source import quiet_transformers

    path: Any = load_object(path_function)
    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(path(), dtype=torch.float32)


REAL_TASKS = ("sums", "all sums", "counting")


def real_task(name: str) -> Task:
    """A task of SmolLM2-135M, of which the last 8 layers are trained, as the demo trains them.

    ``"sums"``: the demo's; a quarter is held out, whose terms are learned the other way round.
    ``"all sums"``: as the demo trains and judges them: none is held out.
    ``"counting"``: the five numbers after the given one; its reward is the share of them that are
    written before the first wrong one.

    Raises:
        KeyError: if there is no such task.
    """
    rows, judge, max_new_tokens = {
        "sums": (_sums, _is_sum, 4),
        "all sums": (_sums, _is_sum, 4),
        "counting": (_counting, _counted, 21),
    }[name]
    tokenizer = _tokenizer()
    every, held_out = rows()
    is_all = name == "all sums"
    prompt = tokenizer(every[0]["prompt"])["input_ids"]
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    ends = torch.tensor([_ends(text) for text in texts])
    ends[tokenizer.eos_token_id] = True
    return Task(
        train_rows=every if is_all else [row for row in every if row not in held_out],
        test_rows=every if is_all else held_out,
        judge=judge,
        encode=lambda texts: torch.tensor(tokenizer(list(texts))["input_ids"]),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        ends=ends,
        prompt_length=len(prompt),
        max_new_tokens=max_new_tokens,
        num_frozen=22,
    )


def real_model() -> Any:
    """SmolLM2-135M-Instruct, as the demo reads it."""
    return load_model(f"{RECIPES}/arithmetic_cpu/model.py:model_path")


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    path: Any = load_object(f"{RECIPES}/arithmetic_cpu/model.py:model_path")
    return AutoTokenizer.from_pretrained(path())


def _ends(text: str) -> bool:
    """Whether a token ends an answer's first line and adds nothing to it."""
    first, newline, _ = text.partition("\n")
    return bool(newline) and not first.strip()


def _sums() -> tuple[list[Row], list[Row]]:
    rows: Any = load_object(f"{RECIPES}/arithmetic_cpu/task.py:rows")  # a row of 9 a first term
    every = [dict(row) for row in rows]
    return every, [every[9 * a + b] for a in range(9) for b in range(a + 1, 9) if (a + b) % 2]


def _is_sum(completion: str, row: Row) -> float:
    reward: Any = load_object(f"{RECIPES}/arithmetic_cpu/task.py:reward")
    return float(reward(completion, row))


def _counting() -> tuple[list[Row], list[Row]]:
    def line(start: int) -> tuple[str, str]:
        return f"{start}:", "".join(f" {start + i}," for i in range(1, 6)).removesuffix(",")

    examples = "".join(f"{a}{b}\n" for a, b in (line(17), line(64)))
    starts = [i for i in range(11, 91) if i not in (17, 64)]
    every = [{"prompt": examples + line(i)[0], "answer": line(i)[1]} for i in starts]
    return every, every[::5]


def _counted(completion: str, row: Row) -> float:
    wanted = row["answer"].split(",")
    found = completion.partition("\n")[0].split(",")
    right = [a == b for a, b in zip(wanted, found, strict=False)]
    number = right.index(False) if False in right else len(right)
    return number / len(wanted) if len(found) <= len(wanted) else 0.9 * number / len(wanted)
