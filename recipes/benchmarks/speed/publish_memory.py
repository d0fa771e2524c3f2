"""What memory a publish of sharded weights takes on rank 0.

    python recipes/benchmarks/speed/publish_memory.py [layers]

Two processes share a model by FSDP2 (on the CPU, gloo; 24 layers have 400 MiB) and publish all of
it through files, of some bucket sizes, to a receiver that reads nothing. Printed is by how much the
memory of rank 0 (resident set, without the files) rose above what it was before. Every bucket size
has processes of its own: what one has freed would hide in the base of the next.

Measured: the bucket and 55 to 90 MiB, with 24 layers as with 72 (1.2 GiB). The largest tensor is 16
MiB, and there are several of it while gloo gathers it.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sdp_lightning.training.policy.weight_export import named_weights
from sdp_lightning.weights.files import FileTransport
from sdp_lightning.weights.protocol import Instruction, Target

NUM_RANKS, MIB = 2, 2**20
WIDTH, VOCABULARY = 1024, 4096  # 4 tensors of 4 MiB a layer; the ends have 16


class Tied(nn.Module):
    """Layers of large tensors between an embedding and a head that is the same tensor."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
            for _ in range(num_layers)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight


def memory(field: str) -> float:
    """MiB of ``VmRSS`` (now) or ``VmHWM`` (the peak since it was reset)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def publish(rank: int, folder: str, num_layers: int, bucket_mib: int) -> None:
    """One rank's process. Rank 0 prints a line of the table."""
    torch.set_num_threads(1)
    place = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=NUM_RANKS)
    with torch.device("meta"):
        model = Tied(num_layers)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        parameter.detach().to_local().normal_()
    told: list[Instruction] = []

    async def tell(instruction: Instruction) -> None:
        told.append(instruction)

    weights = named_weights(model, changed_only=False)
    if rank > 0:
        for _ in weights:
            pass
    else:
        transport = FileTransport(bucket_bytes=bucket_mib * MIB)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        base, start = memory("VmRSS"), time.perf_counter()
        num_bytes = transport.stage(weights, full=True)
        transport.activate()
        asyncio.run(transport.deliver(Target("nowhere", 1, tell), whole=True))
        seconds, extra = time.perf_counter() - start, memory("VmHWM") - base
        print(
            f"{bucket_mib:6} MiB {num_bytes / MIB:8.0f} MiB {extra:8.0f} MiB {seconds:8.2f} s",
            flush=True,
        )
        transport.close()
    distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends in order


def main() -> None:
    num_layers = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    os.environ["OMP_NUM_THREADS"] = "1"
    print("    bucket    published   above base     time")
    for bucket_mib in (32, 64, 128):
        with tempfile.TemporaryDirectory() as folder:
            arguments: Any = (folder, num_layers, bucket_mib)
            multiprocessing.spawn(publish, arguments, nprocs=NUM_RANKS)  # type: ignore


if __name__ == "__main__":
    main()
