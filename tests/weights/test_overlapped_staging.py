"""Weights are gathered, cast and written while servers sample; nobody gets them too early."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdp_lightning.errors import EngineError
from sdp_lightning.weights.files import FileTransport, buckets
from sdp_lightning.weights.lora import LoRATransport
from sdp_lightning.weights.protocol import LoadAdapter, LoadFolder, Target, WeightTransport
from support.fake_servers import Server, connected, is_back, make_engine, weights
from support.remote_engines import publish
from support.rollouts import rolling
from support.weight_transports import update


def adapter(value: float) -> list[tuple[str, Tensor]]:
    return [(f"m.lora_{kind}.default.weight", torch.full((2, 2), value)) for kind in "AB"]


def delivered(transport: WeightTransport, *, whole: bool) -> float:
    """The first value of what a server is told to load last."""
    loaded: list[float] = []

    async def tell(instruction: Any) -> None:
        assert isinstance(instruction, LoadFolder | LoadAdapter)
        [file] = Path(instruction.folder).glob("*.safetensors")
        loaded.extend(float(tensor.flatten()[0]) for tensor in load_file(file).values())

    asyncio.run(transport.deliver(Target("http://one", 1, tell), whole=whole))
    return loaded[-1]


@pytest.mark.parametrize("kind", ["files", "lora"])
def test_a_server_that_returns_while_weights_are_staged_gets_those_in_force(
    tmp_path: Path, kind: str
) -> None:
    """Fault: a server is labelled with a version whose weights it does not hold."""
    transport: WeightTransport = FileTransport(tmp_path)
    make = weights
    if kind == "lora":
        transport, make = LoRATransport(1.0, root=tmp_path), adapter  # type: ignore[assignment]
    transport.stage(make(0.0), full=True)
    transport.activate()
    for value in (1.0, 2.0):
        transport.stage(make(-1.0), full=False)  # of a publish that never came to load it
        transport.stage(make(value), full=False)
        assert {delivered(transport, whole=whole) for whole in (True, False)} == {value - 1}
        transport.activate()
        transport.activate()  # nothing was staged since
        assert {delivered(transport, whole=whole) for whole in (True, False)} == {value}
    transport.close()


def test_servers_sample_until_the_weights_of_the_next_version_are_written(one: Server) -> None:
    seen: list[tuple[bool, int]] = []

    def made() -> Iterator[tuple[str, Tensor]]:
        for named in weights(1.0):
            state = one.do(step=1, wait={"stalled": True})
            seen.append((state["paused"], state["running"]))
            yield named

    one.do(held=True)
    engine = make_engine(one)
    engine.start()
    with rolling(engine, batch_size=1, max_head_lag=1, max_concurrent=2) as executor:
        one.do(wait={"running": 2})
        report = executor.publish(made(), 1)
        assert seen == [(False, 2)] * 2
        parts = report.drain_s + report.load_s + report.resume_s
        assert report.paused_s == pytest.approx(parts) and report.stage_s > 0
        assert report.exposed_s >= report.stage_s + report.paused_s
        one.do(held=False)
        [group] = executor.take() or []
        assert [(s.version, len(s)) for s in group.segments] == [(0, 2), (1, 2)]
        executor.pause()


@pytest.mark.fault("exception", "publish")
def test_if_the_weights_cannot_be_made_the_version_before_is_still_sampled(one: Server) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from weights(1.0, "a")
        raise EngineError("out of memory")

    one.do(held=True)
    engine = make_engine(one)
    engine.start()
    with rolling(engine, batch_size=1, max_head_lag=1, max_concurrent=2) as executor:
        one.do(wait={"running": 2})
        with pytest.raises(EngineError, match="out of memory"):
            executor.publish(broken(), 1)
        assert executor.version == engine.version == 0 and not one.do()["paused"]
        one.do(held=False)
        [group] = executor.take() or []
        assert [(s.version, len(s)) for s in group.segments] == [(0, 4)]
        executor.publish(weights(1.0), 1)
        assert one.do()["weights"] == {"a": 1.0, "b": 1.0}
        executor.pause()


# The types in which they are sent -----------------------------------------------------------------

THIRD = 1 / 3
ROUNDED = float(torch.tensor(THIRD).bfloat16())


@pytest.mark.parametrize("transport", ["files", "tcp"])
@pytest.mark.parametrize(
    ("types", "value", "num_bytes"),
    [
        (["bfloat16"], ROUNDED, 8),
        (["float32"], THIRD, 16),
        (["bfloat16", "float32"], THIRD, 16),  # which weight has which type is not known
        (["bfloat16", "float8_e4m3fn"], THIRD, 16),  # quantized from what it is sent
        (True, THIRD, 16),
    ],
    ids=["bfloat16", "float32", "two types", "quantized", "not said"],
)
def test_weights_are_sent_in_the_one_type_that_servers_hold(
    one: Server, transport: str, types: Any, value: float, num_bytes: int
) -> None:
    one.do(reset={"types": types})
    with connected(one, transport=transport) as engine:
        for version in range(2):
            report = update(engine, weights(THIRD), version, reset=not version)
            assert report.num_bytes == num_bytes
        assert one.do()["weights"] == pytest.approx({"a": value, "b": value}, abs=1e-7)


def test_only_floats_that_become_smaller_are_cast_and_a_tied_one_is_written_once() -> None:
    tied, whole, half = torch.full((2,), THIRD), torch.tensor([7]), torch.ones(2).half()
    named = [("a", tied), ("head", tied), ("count", whole), ("half", half)]
    [bucket] = buckets(named, 2**20, "bfloat16")
    assert list(bucket) == ["a", "count", "half"]
    assert bucket["a"].equal(tied.bfloat16()) and bucket["count"].equal(whole)
    assert bucket["half"].equal(half) and bucket["half"].dtype is torch.float16


@pytest.mark.fault("corrupted data", "publish")
def test_a_server_that_returns_with_another_type_is_not_let_in(two: list[Server]) -> None:
    well, ill = two
    for server in two:
        server.do(reset={"types": ["bfloat16"]})
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        ill.do(reset={"types": ["float32"]})  # restarted, before anybody noticed
        publish(engine, 1)
        assert engine.server_urls == [well.url]
        why = engine._running().replicas[1].why_out
        assert "holds weights in float32" in why and "--dtype bfloat16" in why
        ill.do(reset={"types": ["bfloat16"]})
        is_back(engine, well, 2)
        assert ill.do()["weights"] == {"a": 1.0, "b": 1.0}
