"""The forward under FSDP2, whose head no rank holds whole: two gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import Layout
from sdp_lightning.training.policy.forward import LogprobForward
from sdp_lightning.training.policy.sharding import is_sharded, shard
from support.plain_forwards import LAYOUTS, gradients, plain, random_batch, uneven_sum

TIED = (True, False)
AFTER = "padded, after a layout that the model refused"
Found = tuple[Tensor, dict[str, Tensor]]


def refuse_packs(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if args[0].shape[0] == 1:
        raise ConfigError("in the midst of it")


def learn(forward: LogprobForward, shards: dict[str, Any], layout: Layout) -> Found:
    for parameter in shards.values():  # as an optimizer does; modules may hold the whole weights
        parameter.grad = None
    logprobs, _ = forward(random_batch(7), layout)
    uneven_sum(logprobs).backward()
    grads = {name: parameter.grad.full_tensor() for name, parameter in shards.items()}
    return logprobs.detach(), grads


def score(rank: int, folder: str) -> None:
    """Log-probs and gradients of every layout, tied and not, into ``folder/rank.pt``."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    found: dict[Any, Found] = {}
    for tied in TIED:
        with torch.device("meta"):
            forward = LogprobForward(tiny_model(tie_word_embeddings=tied))
        source = tiny_model(tie_word_embeddings=tied) if rank == 0 else None
        shard(forward, mesh, source, torch.device("cpu"))
        assert is_sharded(forward)
        head: Any = forward.policy.get_output_embeddings()
        assert isinstance(head.weight, DTensor) and head.weight.to_local().shape[0] == 25
        shards: dict[str, Any] = dict(forward.policy.named_parameters())
        for layout in LAYOUTS:
            found[tied, layout] = learn(forward, shards, layout)
        forward.policy.model.layers[1].register_forward_pre_hook(refuse_packs)
        with pytest.raises(ConfigError, match="in the midst"):
            forward(random_batch(7), "packed")
        found[tied, AFTER] = learn(forward, shards, "padded")
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_head_scores_as_a_whole_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=score, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
        process.kill()  # nothing to do, unless it hangs
    assert [process.exitcode for process in ranks] == [0, 0]
    for tied in TIED:
        model, batch = tiny_model(tie_word_embeddings=tied), random_batch(7)
        expected, _ = plain(model, batch)
        wanted = gradients(model, expected)
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")
            for layout in (*LAYOUTS, AFTER):
                logprobs, grads = found[tied, layout]
                torch.testing.assert_close(logprobs, expected.detach(), rtol=1e-5, atol=1e-5)
                assert grads.keys() == wanted.keys()
                for name, grad in grads.items():
                    gap = (grad - wanted[name]).norm() / wanted[name].norm()
                    assert gap < 1e-4, (tied, layout, name)
