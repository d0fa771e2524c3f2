"""Time of the three layouts of a batch: ``python recipes/benchmarks/speed/packing.py``.

Log-probs forward and backward, over the micro-batches of each layout in turn, on one thread. Times
are CPU seconds, the least of some rounds, as ratios to the padded layout; beside them the estimate
by which ``layout="auto"`` chooses, and how much slower its choice is than the fastest.

With ``--device cuda``: bfloat16, a wider model, longer rows, and seconds of the GPU.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdp_lightning.training.batch import Batch, Layout, collate
from sdp_lightning.training.policy.forward import attention_costs, sequence_logprobs
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared_prefix")
MAX_TOKENS = {"cpu": 4096, "cuda": 16_384}


@dataclass(frozen=True)
class Shape:
    """Groups of 8 answers to a prompt; lengths of answers are uniform between two bounds."""

    groups: int
    prompt: int
    shortest: int
    longest: int

    def batch(self) -> Batch:
        rng = np.random.default_rng(0)
        groups: list[TrajectoryGroup] = []
        for _ in range(self.groups):
            prompt = Context(rng.integers(3, 40, self.prompt))
            lengths = rng.integers(self.shortest, self.longest + 1, 8)
            answers = (Segment(0, rng.integers(3, 40, n), -np.ones(n)) for n in lengths)
            groups.append(TrajectoryGroup(tuple(Trajectory((prompt, a)) for a in answers)))
        return collate(groups, version=0)


# Hidden units (those of 135M and 1.5B models in the last two), layers, attention heads, key heads.
MODELS = {"tiny": (128, 2, 4, 2), "wide": (576, 2, 9, 3), "large": (1536, 8, 12, 2)}
ON = {"cpu": ("tiny", "wide"), "cuda": ("large",)}
SHAPES = {
    "large": (
        Shape(16, 200, 20, 60),
        Shape(8, 500, 100, 1000),
        Shape(8, 100, 900, 1000),
        Shape(2, 2000, 100, 2000),
    ),
    "tiny": (Shape(16, 14, 4, 8), Shape(16, 2, 8, 8), Shape(8, 8, 4, 90), Shape(2, 100, 4, 100)),
    "wide": (Shape(8, 20, 4, 4), Shape(4, 60, 20, 60), Shape(2, 8, 10, 250), Shape(1, 8, 10, 700)),
}


def build(name: str, device: str) -> LlamaForCausalLM:
    hidden, layers, heads, keys = MODELS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,  # the head costs the same in every layout
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
    )
    model: Any = LlamaForCausalLM(config).train()
    return model if device == "cpu" else model.to(device, torch.bfloat16)


def seconds(model: LlamaForCausalLM, batch: Batch, layout: Layout, max_tokens: int) -> float:
    """Seconds of the CPU or the GPU for one pass over all micro-batches."""
    pieces = batch.microbatches(max_tokens, layout, attention_costs(model))
    parts = [batch.select(rows).to(model.device) for rows in pieces]
    on_cpu = model.device.type == "cpu"
    clock, wait = (
        (time.thread_time, lambda: None) if on_cpu else (time.perf_counter, torch.cuda.synchronize)
    )
    wait()
    start = clock()
    for part in parts:
        sequence_logprobs(model, part, layout=layout).logprobs.sum().backward()
    wait()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=ON, default="cpu")
    arguments = parser.parse_args()
    rounds, device, most = arguments.rounds, arguments.device, MAX_TOKENS[arguments.device]
    torch.set_num_threads(1)
    print("model, groups x 8, prompt, answers: time and (estimate) over padded; slower than best")
    for name in ON[device]:
        model = build(name, device)
        seconds(model, SHAPES[name][0].batch(), "padded", most)  # loads what it needs
        for shape in SHAPES[name]:
            batch, costs = shape.batch(), attention_costs(model)
            runs = [
                {lay: seconds(model, batch, lay, most) for lay in LAYOUTS} for _ in range(rounds)
            ]
            took = {layout: min(run[layout] for run in runs) for layout in LAYOUTS}
            estimate = {layout: batch.cost(most, layout, costs) for layout in LAYOUTS}
            chosen = min(LAYOUTS, key=estimate.__getitem__)
            ratios = ", ".join(
                f"{layout} {took[layout] / took['padded']:.2f} "
                f"({estimate[layout] / estimate['padded']:.2f})"
                for layout in LAYOUTS[1:]
            )
            slower = took[chosen] / min(took.values())
            print(
                f"{name}, {shape.groups}, {shape.prompt}, {shape.shortest}-{shape.longest}: "
                f"{ratios}; auto: {chosen}, {slower:.2f}x (padded {took['padded']:.3f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
