"""Transports by TCP and between GPUs, to fake vLLM processes: weights arrive, or a named error."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.protocol import Instruction, Target, WeightStream
from sdp_lightning.weights.tcp import TcpTransport, address_towards
from sdp_lightning.weights.vllm_native import NativeTransport
from support.fake_servers import (
    Server,
    assert_nothing_left,
    connected,
    make_engine,
    servers,
    weights,
)
from support.remote_engines import generate, publish, request
from support.weight_transports import stage, update

RPC = "/collective_rpc"


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transport": "pigeon"}, "one of files, tcp, nccl, ipc, lora, delta; got 'pigeon'"),
        ({"transport": "lora"}, "lora_alpha=None and transport='lora'"),
        ({"lora_alpha": 16.0}, r"lora_alpha=16.0 and transport='files'"),
        ({"lora_alpha": 16.0, "transport": "tcp"}, r"lora_alpha=16.0 and transport='tcp'"),
        ({"anchor_every": 7}, r"anchor_every=7 are for transport='delta', and it is 'files'"),
        (
            {"anchor_every": 0, "transport": "delta"},
            "anchor_every must be an integer of at least 1",
        ),
    ],
)
def test_a_transport_and_its_options_go_together(options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        RemoteOptions(**options)
    RemoteOptions(transport="lora", lora_alpha=16.0)


def test_shared_memory_does_not_reach_another_host():
    far = ["http://10.1.2.3:8000"]
    with pytest.raises(ConfigError, match="cannot see weights in this one's shared memory"):
        RemoteInfEngine(far, VLLMBackend(), options=RemoteOptions(api_key="k"))
    for options in ({"weight_folder": "/nfs"}, {"transport": "tcp"}):
        settings = RemoteOptions(api_key="k", **options)  # type: ignore[arg-type]
        RemoteInfEngine(far, VLLMBackend(), options=settings)


def test_weights_go_where_the_option_says_and_are_removed_there(one: Server, tmp_path: Path):
    with connected(one, weight_folder=str(tmp_path)) as engine:
        publish(engine, 0, reset=True)
        [folder] = tmp_path.iterdir()
        assert (folder / "base" / "model-00000.safetensors").exists()
        assert one.do()["weights"] == {"a": 0.0, "b": 0.0}
    assert list(tmp_path.iterdir()) == []


# TCP ----------------------------------------------------------------------------------------------


def await_no_senders() -> None:
    """Wait until no thread sends; one that sends must end soon after its transfer did."""
    for thread in threading.enumerate():
        if thread.name == "sdp-tcp":
            thread.join(10.0)
            assert not thread.is_alive(), "it still sends"


def test_weights_arrive_by_tcp_whole_and_then_in_part(one: Server):
    with connected(one, transport="tcp", control_timeout_s=120.0) as engine:
        report = update(engine, weights(1.0, "a", "b", "c"), 0, reset=True)
        assert report.num_bytes == 3 * 2 * 4 and report.version == 0
        assert report.bytes_per_s == pytest.approx(24 / report.transfer_s)
        assert update(engine, weights(2.0, "b"), 1).num_bytes == 8
        assert [s.version for s in generate(engine, request())] == [1]
        await_no_senders()
    state = one.do()
    assert state["loads"] == [["a", "b", "c"], ["b"]]
    assert state["weights"] == {"a": 1.0, "b": 2.0, "c": 1.0}
    assert state["received"][RPC] == 3  # it said hello, too


def test_a_step_without_weights_sends_nothing_by_tcp(one: Server):
    with connected(one, transport="tcp") as engine:
        publish(engine, 0, reset=True)
        assert update(engine, [], 1).num_bytes == 0
        assert one.do()["version"] == "1" and one.do()["received"][RPC] == 2


def test_every_worker_of_two_servers_joins_its_own_transfer(two: list[Server]):
    for server in two:
        server.do(reset={"num_workers": 2})
    with connected(*two, transport="tcp") as engine:
        update(engine, weights(1.0, "a", "b"), 0, reset=True)
        update(engine, weights(2.0, "b"), 1)
        await_no_senders()
    for server in two:
        assert server.do()["weights"] == {"a": 1.0, "b": 2.0}
        assert server.do()["received"][RPC] == 3


def test_the_trainer_goes_by_the_name_that_it_is_given(one: Server):
    with connected(one, transport="tcp", trainer_host="localhost") as engine:
        publish(engine, 3, reset=True)
        assert one.do()["weights"] == {"a": 3.0, "b": 3.0}


def test_a_restarted_server_is_sent_all_weights_by_tcp(one: Server):
    with connected(one, transport="tcp", health_interval_s=1000.0) as engine:
        update(engine, weights(1.0, "a", "b"), 0, reset=True)
        update(engine, weights(2.0, "b"), 1)
        one.do(reset={})
        update(engine, weights(3.0, "b"), 2)
        assert one.do()["weights"] == {"a": 1.0, "b": 3.0}
        assert [s.version for s in generate(engine, request())] == [2]


def test_a_server_that_returns_is_sent_all_weights_by_tcp(two: list[Server]):
    well, ill = two
    with connected(*two, transport="tcp") as engine:
        update(engine, weights(1.0, "a", "b"), 0, reset=True)
        ill.do(reset={}, faults=[{"path": "/health", "kind": "500"}])
        while engine.num_serving == 2:
            well.do()
        update(engine, weights(2.0, "b"), 1)
        ill.do(faults=[])
        while engine.num_serving == 1:
            well.do()
        assert ill.do()["weights"] == {"a": 1.0, "b": 2.0} and ill.do()["version"] == "1"


@pytest.mark.fault("exception", "publish")
def test_a_sender_gives_up_as_soon_as_the_server_refuses(one: Server):
    with connected(one, transport="tcp", control_timeout_s=1000.0) as engine:
        publish(engine, 0, reset=True)
        one.fault(RPC, "500")
        with pytest.raises(EngineError, match=f"{one.url}{RPC} answered 500"):
            publish(engine, 1)
        await_no_senders()


@pytest.mark.fault("hang", "publish")
def test_a_server_that_never_joins_is_named_at_the_deadline(one: Server):
    with connected(one, transport="tcp", control_timeout_s=1.0) as engine:
        one.fault(RPC, "hang")
        with pytest.raises(EngineError, match=rf"{one.url}{RPC} did not answer within 1.0 s"):
            publish(engine, 0, reset=True)
        await_no_senders()


@pytest.mark.fault("process killed", "publish")
def test_a_server_killed_while_it_receives_is_lost_at_once_and_the_other_goes_on():
    with servers(2) as [well, ill]:
        limits = {"control_timeout_s": 1000.0, "health_interval_s": 1000.0}
        with connected(well, ill, transport="tcp", **limits) as engine:
            update(engine, weights(1.0, "a", "b"), 0, reset=True)
            ill.fault(RPC, "stall")
            killer = threading.Thread(target=lambda: (ill.wait(receiving=1), ill.kill()))
            killer.start()
            update(engine, weights(2.0, "b"), 1)
            killer.join(30.0)
            assert engine.num_serving == 1 and well.do()["weights"] == {"a": 1.0, "b": 2.0}
            assert [s.version for s in generate(engine, request())] == [1]
            await_no_senders()


@pytest.mark.fault("hang", "teardown")
def test_closing_under_a_transfer_leaves_no_sender(one: Server):
    engine = make_engine(one, transport="tcp", control_timeout_s=1000.0)
    engine.start()
    one.fault(RPC, "hang")
    failed: list[BaseException] = []

    def work() -> None:
        try:
            publish(engine, 0, reset=True)
        except EngineError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    one.wait(**{RPC: 2})  # it said hello, too
    engine.close()
    thread.join(30.0)
    assert "closed" in str(failed[0])
    await_no_senders()
    assert_nothing_left()


@pytest.mark.fault("hang", "teardown")
@pytest.mark.parametrize("transport", ["files", "tcp", "delta", "lora"])
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_closing_beside_staging_is_what_the_publish_says(one: Server, transport: str, moment: str):
    alpha = 16.0 if transport == "lora" else None
    engine = make_engine(one, transport=transport, lora_alpha=alpha)
    engine.start()

    layout = {f"m.q.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"}

    def make(name: str) -> torch.Tensor:
        if moment == "half":
            engine.close()
        return layout[name]

    if moment == "before":
        engine.close()
    with pytest.raises(EngineError, match=r"^the engine was closed meanwhile\.$"):
        engine.stage_weights(WeightStream(layout, make), 0, reset=True)
        engine.close()
        engine.load_weights(0, reset=True)
    assert_nothing_left()


@pytest.mark.fault("corrupted data", "publish")
def test_a_server_that_says_it_has_what_it_never_fetched_is_not_believed(tmp_path: Path):
    async def tell(instruction: Instruction) -> None:
        pass

    transport = TcpTransport("127.0.0.1", timeout_s=0.2, root=tmp_path)
    stage(transport, weights(1.0), full=True)
    with pytest.raises(EngineError, match=r"http://liar confirmed .* not all sent within 0.2 s"):
        asyncio.run(transport.deliver(Target("http://liar", 1, tell), whole=True))
    await_no_senders()
    transport.close()
    transport.close()
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_is_not_this_one_is_no_place_to_listen(tmp_path: Path):
    with pytest.raises(EngineError, match=r"cannot listen on 192.0.2.1, .* Set trainer_host"):
        TcpTransport("192.0.2.1", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_this_host_goes_by_the_address_that_servers_see():
    assert address_towards("127.0.0.1", 80) == "127.0.0.1"
    with pytest.raises(EngineError, match=r"no route from this host to 256.1.1.1"):
        address_towards("256.1.1.1", 80)


# vLLM's own ---------------------------------------------------------------------------------------


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_weights_on_the_cpu_do_not_travel_between_gpus(kind: Any):
    transport = NativeTransport(kind, "127.0.0.1")
    on_gpu = torch.ones(2).as_subclass(OnGPU)
    with pytest.raises(EngineError, match=f"^b is on the CPU, and transport='{kind}' .* 'tcp'"):
        transport.stage([("a", on_gpu), ("b", torch.ones(2))], full=True)
    transport.close()
    transport.close()


def test_an_engine_refuses_weights_that_its_transport_cannot_carry(one: Server):
    with connected(one, transport="nccl") as engine:
        engine.pause()
        with pytest.raises(EngineError, match="a is on the CPU, and transport='nccl'"):
            engine.update_weights(weights(1.0), 0, reset=True)
        assert one.do()["received"][RPC] == 1  # it said hello


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_without_vllm_the_error_says_what_to_install(kind: Any):
    async def tell(instruction: Instruction) -> None:
        raise AssertionError("nothing is sent")

    transport = NativeTransport(kind, "127.0.0.1")
    assert stage(transport, [("a", torch.ones(2).as_subclass(OnGPU))], full=True) == 8
    with pytest.raises(ConfigError, match=rf"transport='{kind}' uses vLLM's .* install vllm"):
        asyncio.run(transport.deliver(Target("http://one", 1, tell), whole=True))
