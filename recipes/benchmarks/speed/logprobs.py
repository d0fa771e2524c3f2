"""Memory and time of log-probs over a large vocabulary.

    python recipes/benchmarks/speed/logprobs.py

Hidden 576, vocabulary 49,152, 4,096 tokens, float32, forward and backward with a trained head; each
way in processes of its own, three in turn. Printed are the highest resident memory over what the
inputs took, and the least time, also as ratios to the dense way (log_softmax and gather).

With ``--device cuda``: hidden 2,048, vocabulary 151,936, 8,192 tokens, bfloat16, memory of the GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdp_lightning.objective import token_logprobs

SIZES = {"cpu": (576, 49_152, 4_096), "cuda": (2_048, 151_936, 8_192)}  # hidden, vocabulary, tokens
MIB = 2**20
GOAL_MIB, GOAL_RATIO = 350, 1.6


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets, 1.0)[0]


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none")


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dense": dense,
    "ours": ours,
    "linear_cross_entropy": of_torch,
}
NEW = "linear_cross_entropy"  # since torch 2.12


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measure(way: str, device: str) -> dict[str, float]:
    """One forward and backward in this process, after a smaller one to load what it needs."""
    torch.manual_seed(0)
    units, vocabulary, tokens = SIZES[device]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    hidden = make(tokens, units).requires_grad_()
    weight = make(vocabulary, units).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    function = WAYS[way]
    small = weight.detach()[:64].clone().requires_grad_()
    few = slice(8 if device == "cpu" else 1024)
    function(hidden[few], small, targets[few] % 64).sum().backward()
    hidden.grad = None
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    base, start = peak_mib(device), time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated() / MIB
    function(hidden, weight, targets).sum().backward()
    wait()
    return {"mib": peak_mib(device) - base, "s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.device)))
        return
    ways = [way for way in WAYS if way != NEW or hasattr(nn.functional, NEW)]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, runs in found.items():
            command = [sys.executable, __file__, "--way", way, "--device", arguments.device]
            runs.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    best = {
        way: {key: min(run[key] for run in runs) for key in ("mib", "s")}
        for way, runs in found.items()
    }
    for way, values in best.items():
        ratio = values["s"] / best["dense"]["s"]
        print(f"{way}: {values['mib']:.0f} MiB over its base, {values['s']:.3f} s ({ratio:.2f}x)")
    if arguments.device == "cpu":
        print(f"(the goals for ours: {GOAL_MIB} MiB, {GOAL_RATIO}x of dense)")


if __name__ == "__main__":
    main()
