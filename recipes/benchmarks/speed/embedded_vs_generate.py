"""Tokens per second of the embedded engine and of transformers' generate, on the same requests.

Both sample the same prompts with the same budgets at temperature 1, in one process, with the same
number of threads, in turns. ``generate`` gets all requests as one left-padded batch and runs until
the longest is done; only the tokens asked for count. The engine also returns log-probs.

    python recipes/benchmarks/speed/embedded_vs_generate.py [--model PATH] [--threads 1]

With ``--device cuda`` the model is in bfloat16, and of the size of SmolLM2-135M unless given.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sdp_lightning import testing
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.types import SamplingParams

SMOLLM2: dict[str, Any] = {  # 135M
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
Shape = list[tuple[np.ndarray, int]]  # prompt and budget of each request


def arithmetic(vocabulary: int) -> Shape:
    """8 prompts of 15 tokens, of which they share 11, 8 samples of each, 4 new tokens."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, vocabulary, size=11)
    prompts = [np.append(shared, rng.integers(3, vocabulary, size=4)) for _ in range(8)]
    return [(prompt, 4) for prompt in prompts for _ in range(8)]


def mixed(vocabulary: int) -> Shape:
    """32 prompts of 4 to 40 tokens with nothing in common, budgets of 4 to 64."""
    rng = np.random.default_rng(1)
    lengths, budgets = rng.integers(4, 41, size=32), rng.integers(4, 65, size=32)
    return [
        (rng.integers(3, vocabulary, size=length), int(budget))
        for length, budget in zip(lengths, budgets, strict=True)
    ]


def equal(vocabulary: int) -> Shape:
    """32 prompts of 16 tokens with nothing in common, 32 new tokens: generate's best case."""
    rng = np.random.default_rng(2)
    return [(rng.integers(3, vocabulary, size=16), 32) for _ in range(32)]


def time_engine(engine: EmbeddedEngine, shape: Shape, seed: int) -> float:
    async def run() -> None:
        await asyncio.gather(
            *(
                engine.generate(
                    GenerationRequest(
                        prompt, SamplingParams(max_new_tokens=budget), seed=1000 * seed + index
                    ),
                    lambda segment: None,
                )
                for index, (prompt, budget) in enumerate(shape)
            )
        )

    begin = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - begin


def time_generate(model: PreTrainedModel, shape: Shape) -> float:
    begin = time.perf_counter()
    width = max(prompt.size for prompt, _ in shape)
    ids = np.zeros((len(shape), width), dtype=np.int64)
    mask = np.zeros((len(shape), width), dtype=np.int64)
    for row, (prompt, _) in enumerate(shape):
        ids[row, width - prompt.size :] = prompt
        mask[row, width - prompt.size :] = 1
    with torch.inference_mode():
        model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            max_new_tokens=max(budget for _, budget in shape),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=2**40,  # none: every request runs to its budget
            pad_token_id=0,
        )
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="an id or a folder; the shipped tiny model by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on_cpu = arguments.device == "cpu"
    if arguments.model is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    elif on_cpu:
        model = testing.tiny_model(hidden_size=128)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    model = model.to(arguments.device, torch.float32 if on_cpu else torch.bfloat16)
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    engine = EmbeddedEngine(model, device=arguments.device, num_threads=arguments.threads)
    engine.start()
    version = 0
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}, {model.device}"
    )
    for shape_of in (arithmetic, mixed, equal):
        shape = shape_of(vocabulary)
        num_tokens = sum(budget for _, budget in shape)
        times: dict[str, list[float]] = {"engine": [], "generate": []}
        for repeat in range(arguments.repeats + 1):
            engine.update_weights(model.state_dict().items(), version, reset=True)
            version += 1  # an update forgets prefixes: every repeat computes its prompts
            engine_s, generate_s = time_engine(engine, shape, repeat), time_generate(model, shape)
            if repeat > 0:  # the first one warms up
                times["engine"].append(engine_s)
                times["generate"].append(generate_s)
        ours, theirs = (num_tokens / statistics.median(t) for t in times.values())
        print(
            f"{shape_of.__name__:>10}: {len(shape)} requests, {num_tokens} tokens: engine "
            f"{ours:,.0f} tok/s, generate {theirs:,.0f} tok/s, ratio {ours / theirs:.2f}"
        )
    engine.close()


if __name__ == "__main__":
    main()
