"""A folder of shards is read without running what is in it."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save

import sdp_lightning as sdp
from sdp_lightning.cli.export import open_checkpoint
from sdp_lightning.cli.export.shard_reader import ShardReader

WEIGHTS = {"policy.a": torch.randn(3, 4), "policy.b": torch.randn(2).bfloat16()}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    state: dict[str, Any] = {"state_dict": WEIGHTS, "optimizer_0": {"lr": 0.1, "list": [1, "x"]}}
    save(state, checkpoint_id=tmp_path / "shards", no_dist=True)
    return tmp_path / "shards"


def test_all_weights_are_read(shards: Path, tmp_path: Path) -> None:
    found = open_checkpoint(shards)
    assert {name: w.dtype for name, w in found.layout.items()} == {
        "a": torch.float32,
        "b": torch.bfloat16,
    }
    weights = found.read(("a", "b"), None, tmp_path)
    assert all(torch.equal(weights[name], WEIGHTS[f"policy.{name}"]) for name in ("a", "b"))


class Harmful:
    """What its pickle does when it is loaded: make a folder."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("place", ["whole", "planner_data", "a weight"])
def test_code_in_the_metadata_is_refused_by_name_and_not_run(place: str, shards: Path) -> None:
    mark = shards / "ran"
    metadata, harmful = ShardReader(shards).read_metadata(), Harmful(os.mkdir, str(mark))
    if place == "planner_data":
        metadata.planner_data = harmful
    elif place == "a weight":
        metadata.state_dict_metadata["state_dict.policy.a"] = harmful  # type: ignore[assignment]
    content = harmful if place == "whole" else metadata
    (shards / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(sdp.CheckpointError, match=r"shards/\.metadata.*posix\.mkdir.*not called"):
        open_checkpoint(shards)
    assert not mark.exists()


@pytest.mark.parametrize(
    "function", [eval, getattr, torch.load, torch.hub.load], ids=lambda f: f.__qualname__
)
def test_nothing_but_what_torch_writes_is_looked_up(function: Any, shards: Path) -> None:
    (shards / ".metadata").write_bytes(pickle.dumps(Harmful(function, "1")))
    with pytest.raises(sdp.CheckpointError, match="is not called"):
        open_checkpoint(shards)


def test_a_dotted_name_does_not_lead_out_of_what_is_allowed(shards: Path) -> None:
    code = b"\x80\x04\x8c\x05torch\x8c\x0eSize.__class__\x93."
    (shards / ".metadata").write_bytes(code)
    with pytest.raises(sdp.CheckpointError, match=r"names torch\.Size\.__class__"):
        open_checkpoint(shards)


@pytest.mark.parametrize(
    "code",
    [b"\x80\x04Nr\xff\xff\xff\x7f.", b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"."],
    ids=["a place of 2^31 among what was seen", "an array of 2^40 bytes"],
)
def test_a_few_bytes_do_not_take_all_memory(code: bytes, shards: Path) -> None:
    (shards / ".metadata").write_bytes(code)
    with pytest.raises(sdp.CheckpointError, match=r"too much memory|expected"):
        open_checkpoint(shards)


def test_damaged_metadata_is_one_named_error_or_metadata(shards: Path) -> None:
    path, dice, refused = shards / ".metadata", random.Random(1), 0
    data = path.read_bytes()
    for _ in range(500):
        place = dice.randrange(len(data))
        flipped = bytes([data[place] ^ 1 << dice.randrange(8)])
        path.write_bytes(data[:place] + flipped + data[place + 1 :])
        try:
            open_checkpoint(shards)
        except (sdp.CheckpointError, sdp.ConfigError) as error:
            assert str(shards) in str(error)
            refused += 1
    assert refused > 50
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(sdp.CheckpointError, match="it holds a list"):
        ShardReader(shards).read_metadata()
