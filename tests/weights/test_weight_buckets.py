"""Buckets of weights: bounded, in order, each tied tensor once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore

from sdp_lightning.training.policy.weight_export import named_weights
from sdp_lightning.weights.files import FileTransport, WeightFolder, buckets
from support.fake_servers import weights
from support.weight_transports import load, names_in

# Buckets ------------------------------------------------------------------------------------------


def test_buckets_keep_the_order_and_hold_no_more_than_they_may():
    sizes = {"a": 2, "b": 2, "c": 1, "huge": 9, "d": 4, "e": 1}  # floats; four fill a bucket
    made = [(name, torch.full((size,), float(size))) for name, size in sizes.items()]
    found = list(buckets(made, 16))
    assert [list(bucket) for bucket in found] == [["a", "b"], ["c"], ["huge"], ["d"], ["e"]]
    for bucket in found:
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket.values()) <= 16
    assert list(buckets([], 16)) == []


def test_a_bucket_holds_a_tied_tensor_once_and_one_of_another_shape_too():
    tied = torch.arange(4.0)
    named = [("embedding", tied), ("head", tied), ("view", tied[:2]), ("square", tied.view(2, 2))]
    assert [list(bucket) for bucket in buckets(named, 2**20)] == [["embedding", "view", "square"]]


def test_a_tied_tensor_in_two_buckets_is_in_both_so_that_none_misses_it():
    tied = torch.arange(4.0)
    found = list(buckets([("embedding", tied), ("between", torch.ones(4)), ("head", tied)], 16))
    assert [list(bucket) for bucket in found] == [["embedding"], ["between"], ["head"]]


def test_several_files_hold_all_tensors_in_order(tmp_path: Path):
    files = WeightFolder(tmp_path, bucket_bytes=16)
    named = [(f"w{n}", torch.full((2,), float(n))) for n in range(5)]
    folder, num_bytes = files.write(named, full=True)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"model-{n:05d}.safetensors" for n in range(3)] and num_bytes == 40
    found = {k: v[0].item() for name in names for k, v in load_file(folder / name).items()}
    assert list(found.items()) == [(f"w{n}", float(n)) for n in range(5)]


def test_no_more_than_a_bucket_is_copied_at_a_time(tmp_path: Path):
    alive: set[int] = set()
    most: list[int] = []

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(12):
            copied = np.zeros(4, dtype=np.float32)  # 16 bytes; alive while a tensor lies on it
            alive.add(number)
            weakref.finalize(copied, alive.discard, number)
            most.append(len(alive))
            yield f"w{number}", torch.from_numpy(copied)

    WeightFolder(tmp_path, bucket_bytes=48).write(made(), full=True)
    assert max(most) <= 3 + 1  # a bucket, and the tensor that does not fit it
    assert len(most) == 12 and not alive


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process is rank 0 of two; the other one is made up, and so is what it says."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("bucket_bytes", [1024, 8192])
def test_no_more_of_a_sharded_model_is_whole_at_a_time_than_a_bucket_and_a_tensor(
    two_ranks: None, tmp_path: Path, bucket_bytes: int
):
    sizes = [4, 16, 4, 32, 8, 8, 24, 4, 16, 16, 8, 4]  # rows of 64 floats, 256 bytes each
    model = torch.nn.ModuleDict({f"w{n}": torch.nn.Linear(64, s) for n, s in enumerate(sizes)})
    head = torch.nn.Linear(64, 32)
    model["embedding"] = torch.nn.Linear(64, 32).requires_grad_(False)
    head.weight = model["embedding"].weight  # tied
    model["head"] = head
    for part in model.values():
        fully_shard(part)
    made: list[tuple[StorageWeakRef, int]] = []
    most: list[int] = []

    def watch(named: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        made.append((StorageWeakRef(named[1].untyped_storage()), named[1].nbytes))
        most.append(sum(size for whole, size in made if not whole.expired()))
        return named

    transport = FileTransport(tmp_path, bucket_bytes=bucket_bytes)
    transport.stage(map(watch, named_weights(model, changed_only=False)), full=True)
    transport.close()
    largest = max(size for _, size in made)
    assert len(made) == 2 * len(sizes) + 4 and largest == 32 * 256
    assert largest < max(most) <= max(bucket_bytes, largest) + largest < sum(s for _, s in made)
    assert all(whole.expired() for whole, _ in made)


@pytest.mark.fault("exception", "publish")
def test_weights_that_end_half_way_leave_the_old_ones(tmp_path: Path):
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights(2.0, "a", "b")
        raise RuntimeError("out of memory")

    files = WeightFolder(tmp_path, bucket_bytes=8)
    files.write(weights(1.0, "a"), full=True)
    files.write(weights(1.5, "a"), full=False)
    for full in (True, False):
        with pytest.raises(RuntimeError, match="out of memory"):
            files.write(broken(), full=full)
    assert [load(folder) for folder in files.folders] == [{"a": [1.0, 1.0]}, {"a": [1.5, 1.5]}]
    assert names_in(files.path) == ["base", "update-1"]
