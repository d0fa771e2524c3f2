"""Memory and time of log-probs over a large vocabulary: ``python recipes/benchmarks/logprobs.py``.

Hidden 576, vocabulary 49,152, 4,096 tokens, float32, forward and backward with a trained head; each
way in processes of its own, three in turn. Printed are the highest resident memory over what the
inputs took, and the least time, also as ratios to the dense way (log_softmax and gather).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdp_lightning.objective import token_logprobs

HIDDEN, VOCABULARY, TOKENS, MIB = 576, 49_152, 4_096, 2**20
GOAL_MIB, GOAL_RATIO = 350, 1.6


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.t()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets, 1.0)[0]


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none")


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dense": dense,
    "ours": ours,
    "linear_cross_entropy": of_torch,
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measure(way: str) -> dict[str, float]:
    """One forward and backward in this process, after a small one to load what it needs."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN).mul_(0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    function = WAYS[way]
    small = weight.detach()[:64].clone().requires_grad_()
    function(hidden[:8], small, targets[:8] % 64).sum().backward()
    hidden.grad = None
    base, start = peak_mib(), time.perf_counter()
    function(hidden, weight, targets).sum().backward()
    return {"mib": peak_mib() - base, "s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, runs in found.items():
            command = [sys.executable, __file__, "--way", way]
            runs.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    best = {
        way: {key: min(run[key] for run in runs) for key in ("mib", "s")}
        for way, runs in found.items()
    }
    for way, values in best.items():
        ratio = values["s"] / best["dense"]["s"]
        print(f"{way}: {values['mib']:.0f} MiB over its base, {values['s']:.2f} s ({ratio:.2f}x)")
    print(f"(the goals for ours: {GOAL_MIB} MiB, {GOAL_RATIO}x of dense)")


if __name__ == "__main__":
    main()
