"""Every way that weights travel, to fake vLLM processes: they arrive, or an error says why not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.gloo import GlooTransport, address_towards
from sdp_lightning.weights.lora import ADAPTER, LoRATransport, adapter_config, plain_name
from sdp_lightning.weights.protocol import Instruction, LoadAdapter, LoadFolder, Target
from sdp_lightning.weights.vllm_native import NativeTransport
from support.fake_servers import (
    Server,
    assert_nothing_left,
    connected,
    make_engine,
    servers,
    weights,
)
from support.remote_engines import Sending, generate, publish, request

RPC = "/collective_rpc"


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Server]]:
    with servers(2) as running:
        yield running


@pytest.fixture
def two(pair: list[Server]) -> list[Server]:
    for server in pair:
        server.do(reset={}, faults=[])
    return pair


@pytest.fixture
def one(two: list[Server]) -> Server:
    return two[0]


def update(
    engine: RemoteInfEngine,
    named: list[tuple[str, torch.Tensor]],
    version: int,
    *,
    reset: bool = False,
) -> Any:
    engine.pause()
    report = engine.update_weights(named, version, reset=reset)
    engine.resume()
    return report


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transport": "pigeon"}, "one of files, gloo, nccl, ipc, lora; got 'pigeon'"),
        ({"transport": "lora"}, "lora_alpha=None and transport='lora'"),
        ({"lora_alpha": 16.0}, r"lora_alpha=16.0 and transport='files'"),
        ({"lora_alpha": 16.0, "transport": "gloo"}, r"lora_alpha=16.0 and transport='gloo'"),
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
    for options in ({"weight_folder": "/nfs"}, {"transport": "gloo"}):
        settings = RemoteOptions(api_key="k", **options)  # type: ignore[arg-type]
        RemoteInfEngine(far, VLLMBackend(), options=settings)


def test_weights_go_where_the_option_says_and_are_removed_there(one: Server, tmp_path: Path):
    with connected(one, weight_folder=str(tmp_path)) as engine:
        publish(engine, 0, reset=True)
        [folder] = tmp_path.iterdir()
        assert (folder / "base" / "model-00000.safetensors").exists()
        assert one.do()["weights"] == {"a": 0.0, "b": 0.0}
    assert list(tmp_path.iterdir()) == []


# gloo ---------------------------------------------------------------------------------------------


def await_no_senders() -> None:
    """Wait until no thread sends; one that sends must end soon after its transfer did."""
    for thread in threading.enumerate():
        if thread.name == "sdp-gloo":
            thread.join(10.0)
            assert not thread.is_alive(), "it still sends"


def test_weights_arrive_by_gloo_whole_and_then_in_part(one: Server):
    with connected(one, transport="gloo") as engine:
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


def test_a_step_without_weights_sends_nothing_by_gloo(one: Server):
    with connected(one, transport="gloo") as engine:
        publish(engine, 0, reset=True)
        assert update(engine, [], 1).num_bytes == 0
        assert one.do()["version"] == "1" and one.do()["received"][RPC] == 2


def test_every_worker_of_two_servers_joins_its_own_transfer(two: list[Server]):
    for server in two:
        server.do(reset={"num_workers": 2})
    with connected(*two, transport="gloo") as engine:
        update(engine, weights(1.0, "a", "b"), 0, reset=True)
        update(engine, weights(2.0, "b"), 1)
        await_no_senders()
    for server in two:
        assert server.do()["weights"] == {"a": 1.0, "b": 2.0}
        assert server.do()["received"][RPC] == 3


def test_the_trainer_goes_by_the_name_that_it_is_given(one: Server):
    with connected(one, transport="gloo", trainer_host="localhost") as engine:
        publish(engine, 3, reset=True)
        assert one.do()["weights"] == {"a": 3.0, "b": 3.0}


def test_a_restarted_server_is_sent_all_weights_by_gloo(one: Server):
    with connected(one, transport="gloo", health_interval_s=1000.0) as engine:
        update(engine, weights(1.0, "a", "b"), 0, reset=True)
        update(engine, weights(2.0, "b"), 1)
        one.do(reset={})
        update(engine, weights(3.0, "b"), 2)
        assert one.do()["weights"] == {"a": 1.0, "b": 3.0}
        assert [s.version for s in generate(engine, request())] == [2]


def test_a_server_that_returns_is_sent_all_weights_by_gloo(two: list[Server]):
    well, ill = two
    with connected(*two, transport="gloo") as engine:
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
    with connected(one, transport="gloo", control_timeout_s=1000.0) as engine:
        publish(engine, 0, reset=True)
        one.fault(RPC, "500")
        with pytest.raises(EngineError, match=f"{one.url}{RPC} answered 500"):
            publish(engine, 1)
        await_no_senders()


@pytest.mark.fault("hang", "publish")
def test_a_server_that_never_joins_is_named_at_the_deadline(one: Server):
    with connected(one, transport="gloo", control_timeout_s=1.0) as engine:
        one.fault(RPC, "hang")
        with pytest.raises(EngineError, match=rf"{one.url}{RPC} did not answer within 1.0 s"):
            publish(engine, 0, reset=True)
        await_no_senders()


@pytest.mark.fault("process killed", "publish")
def test_a_server_killed_while_it_receives_is_lost_at_once_and_the_other_goes_on():
    with servers(2) as [well, ill]:
        limits = {"control_timeout_s": 1000.0, "health_interval_s": 1000.0}
        with connected(well, ill, transport="gloo", **limits) as engine:
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
    engine = make_engine(one, transport="gloo", control_timeout_s=1000.0)
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
    one.wait(**{RPC: 1})
    engine.close()
    thread.join(30.0)
    assert "closed" in str(failed[0])
    await_no_senders()
    assert_nothing_left()


@pytest.mark.fault("corrupted data", "publish")
def test_a_server_that_says_it_has_what_it_never_fetched_is_not_believed(tmp_path: Path):
    async def tell(instruction: Instruction) -> None:
        pass

    transport = GlooTransport("127.0.0.1", timeout_s=0.2, root=tmp_path)
    transport.stage(weights(1.0), full=True)
    with pytest.raises(EngineError, match=r"http://liar said .* not all sent within 0.2 s"):
        asyncio.run(transport.deliver(Target("http://liar", 1, tell), whole=True))
    await_no_senders()
    transport.close()
    transport.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_transport_no_longer_listens(tmp_path: Path):
    transport = GlooTransport("127.0.0.1", root=tmp_path)
    assert transport._store is not None
    port = transport._store.port
    socket.create_connection(("127.0.0.1", port), timeout=30.0).close()
    transport.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30.0)


def test_a_host_that_is_not_this_one_is_no_place_to_listen(tmp_path: Path):
    with pytest.raises(EngineError, match=r"cannot listen on 192.0.2.1, .* Set trainer_host"):
        GlooTransport("192.0.2.1", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_this_host_goes_by_the_address_that_servers_see():
    assert address_towards("127.0.0.1", 80) == "127.0.0.1"
    with pytest.raises(EngineError, match=r"no route from this host to 256.1.1.1"):
        address_towards("256.1.1.1", 80)


# LoRA ---------------------------------------------------------------------------------------------

LAYER = "base_model.model.model.layers.0.self_attn"


def adapter(value: float, rank: int = 4) -> list[tuple[str, torch.Tensor]]:
    """Of one layer, named as in a PEFT model's ``state_dict``."""
    return [
        (f"{LAYER}.q_proj.lora_A.default.weight", torch.full((rank, 6), value)),
        (f"{LAYER}.q_proj.lora_B.default.weight", torch.full((6, rank), value)),
        (f"{LAYER}.v_proj.lora_A.default.weight", torch.full((rank, 6), value)),
        (f"{LAYER}.v_proj.lora_B.default.weight", torch.full((6, rank), value)),
    ]


def base(value: float) -> list[tuple[str, torch.Tensor]]:
    return [
        ("base_model.model.model.norm.weight", torch.full((6,), value)),
        (f"{LAYER}.q_proj.base_layer.weight", torch.full((6, 6), value)),
    ]


BASE_NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]


def told(transport: LoRATransport, *, whole: bool) -> list[Instruction]:
    found: list[Instruction] = []

    async def tell(instruction: Instruction) -> None:
        found.append(instruction)

    asyncio.run(transport.deliver(Target("http://one", 1, tell), whole=whole))
    return found


def test_an_adapter_is_written_as_peft_writes_it(tmp_path: Path):
    transport = LoRATransport(16.0, root=tmp_path)
    num_bytes = transport.stage(base(1.0) + adapter(2.0), full=True)
    assert num_bytes == 4 * (6 + 36) + 4 * 4 * 24
    load, use = told(transport, whole=True)
    assert isinstance(load, LoadFolder) and isinstance(use, LoadAdapter)
    assert sorted(load_file(Path(load.folder) / "model-00000.safetensors")) == BASE_NAMES
    found = load_file(Path(use.folder) / "adapter_model.safetensors")
    assert sorted(found) == [
        f"{LAYER}.{module}.lora_{kind}.weight"
        for module in ("q_proj", "v_proj")
        for kind in ("A", "B")
    ]
    assert found[f"{LAYER}.q_proj.lora_A.weight"].tolist() == [[2.0] * 6] * 4
    config = json.loads((Path(use.folder) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 16.0, "LORA")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    transport.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.m.q.lora_A.default.weight", "base_model.model.m.q.lora_A.weight"),
        ("base_model.model.m.q.lora_B.weight", "base_model.model.m.q.lora_B.weight"),
        ("m.q.lora_B.mine.weight", "base_model.model.m.q.lora_B.weight"),
    ],
)
def test_names_lose_the_adapters_own(name: str, plain: str):
    assert plain_name(name) == plain


def test_what_is_no_adapter_is_refused(tmp_path: Path):
    with pytest.raises(EngineError, match=r"model.norm.weight is no weight of a LoRA adapter"):
        plain_name("model.norm.weight")
    with pytest.raises(EngineError, match=r"found 0 weights of the ranks \[\]"):
        LoRATransport(1.0, root=tmp_path).stage(base(1.0), full=True)
    ranks = dict(adapter(1.0, 4)[:2] + adapter(1.0, 2)[2:])
    with pytest.raises(EngineError, match=r"found 4 weights of the ranks \[2, 4\]"):
        adapter_config(ranks, 1.0)


def test_weights_beside_the_adapter_may_not_change(tmp_path: Path):
    transport = LoRATransport(16.0, root=tmp_path)
    transport.stage(base(1.0) + adapter(1.0), full=True)
    before = told(transport, whole=True)
    with pytest.raises(EngineError, match=r"model.norm.weight changed, but .* adapter only"):
        transport.stage(adapter(2.0) + base(2.0), full=False)
    assert told(transport, whole=True) == before


def test_an_adapter_stays_until_the_one_after_the_next(tmp_path: Path):
    """Requests that servers carry across an update may read the one before again."""
    transport = LoRATransport(16.0, root=tmp_path)
    folders: list[Path] = []
    for number in range(4):
        transport.stage(base(1.0) + adapter(1.0) if number == 0 else adapter(2.0), full=not number)
        use = told(transport, whole=False)[-1]
        assert isinstance(use, LoadAdapter) and use.name == ADAPTER
        folders.append(Path(use.folder))
        assert [folder.exists() for folder in folders] == [
            n > number - 2 for n in range(number + 1)
        ]
    assert len(set(folders)) == 4


def test_a_step_without_an_adapter_tells_the_same_one_again(tmp_path: Path):
    transport = LoRATransport(16.0, root=tmp_path)
    transport.stage(base(1.0) + adapter(1.0), full=True)
    before = told(transport, whole=True)
    assert transport.stage([], full=False) == 0
    assert told(transport, whole=True) == before and told(transport, whole=False) == before[1:]


@pytest.mark.parametrize("taken", ["adapter-2", "part"])
def test_an_adapter_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, taken: str):
    transport = LoRATransport(16.0, root=tmp_path)
    transport.stage(base(1.0) + adapter(1.0), full=True)
    before = told(transport, whole=True)
    [folder] = tmp_path.iterdir()
    (folder / taken).write_text("in the way")
    with pytest.raises(EngineError, match="cannot be written to"):
        transport.stage(base(2.0) + adapter(2.0), full=True)
    assert told(transport, whole=True) == before
    values = load_file(folder / "base" / "model-00000.safetensors")[BASE_NAMES[1]]
    assert values.tolist() == [1.0] * 6
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["adapter-1", "base", "lock", taken]
    )


def lora(*running: Server, **options: Any) -> Any:
    return connected(*running, transport="lora", lora_alpha=16.0, **options)


def test_an_adapter_is_loaded_in_place_and_sampled_with(two: list[Server]):
    with lora(*two) as engine:
        report = update(engine, base(1.0) + adapter(1.0), 0, reset=True)
        assert report.num_bytes == 4 * (6 + 36) + 4 * 4 * 24 and report.bytes_per_s > 0
        first = two[0].do()["adapters"][ADAPTER]["folder"]
        assert update(engine, adapter(2.0), 1).num_bytes == 4 * 4 * 24
        sending = Sending(engine, [request() for _ in range(4)])
        assert sending.join() == ["length"] * 4
        assert {s.version for got in sending.segments for s in got} == {1}
        assert engine.prompt_logprobs(request(tokens=9).token_ids).keys() == {
            server.url for server in two
        }
    for server in two:
        state = server.do()
        assert state["loads"] == [BASE_NAMES]  # once
        assert state["received"]["/v1/load_lora_adapter"] == 2
        assert set(state["adapters"]) == {ADAPTER}
        assert set(state["adapters"][ADAPTER]["weights"].values()) == {2.0}
        assert state["adapters"][ADAPTER]["folder"] != first
        assert {body["model"] for body in state["seen"]} == {ADAPTER}


def test_a_restarted_server_gets_the_base_and_then_the_adapter(one: Server):
    with lora(one, health_interval_s=1000.0) as engine:
        update(engine, base(1.0) + adapter(1.0), 0, reset=True)
        one.do(reset={})
        update(engine, adapter(2.0), 1)
        assert [s.version for s in generate(engine, request())] == [1]
    state = one.do()
    assert state["loads"] == [BASE_NAMES] and set(state["weights"].values()) == {1.0}
    assert set(state["adapters"][ADAPTER]["weights"].values()) == {2.0}
    assert [body["model"] for body in state["seen"]] == [ADAPTER]


def test_a_server_that_returns_gets_the_base_and_then_the_adapter(two: list[Server]):
    well, ill = two
    with lora(*two) as engine:
        update(engine, base(1.0) + adapter(1.0), 0, reset=True)
        ill.do(reset={}, faults=[{"path": "/health", "kind": "500"}])
        while engine.num_serving == 2:
            well.do()
        ill.do(faults=[])
        while engine.num_serving == 1:
            well.do()
        sending = Sending(engine, [request(key=f"k{n}") for n in range(4)])
        assert sending.join() == ["length"] * 4
    state = ill.do()
    assert state["loads"] == [BASE_NAMES] and set(state["adapters"]) == {ADAPTER}
    assert {body["model"] for body in state["seen"]} == {ADAPTER}


def test_requests_do_not_outlive_their_adapter(one: Server):
    """A real vLLM that was made to keep them died of it, two updates later."""
    engine = make_engine(one, transport="lora", lora_alpha=16.0, on_update="keep")
    with pytest.raises(ConfigError, match=r"old adapters under new .* on_update='interrupt'"):
        engine.start()
    assert_nothing_left()


@pytest.mark.parametrize(
    ("rank", "kind", "said"),
    [
        (16, "none", r"answered 500: .*LoRA rank 16 is greater than max_lora_rank 8"),
        (4, "404", "answered 404"),
        (4, "odd", "without Success"),
    ],
)
def test_a_server_that_takes_no_such_adapter_is_named(one: Server, rank: int, kind: str, said: str):
    with lora(one) as engine:
        one.fault("/v1/load_lora_adapter", kind)
        with pytest.raises(EngineError, match=f"{one.url}.*{said}"):
            publish_adapter(engine, rank)


def publish_adapter(engine: RemoteInfEngine, rank: int) -> None:
    update(engine, base(1.0) + adapter(1.0, rank), 0, reset=True)


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
    with pytest.raises(EngineError, match=f"^b is on the CPU, and transport='{kind}' .* 'gloo'"):
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
    assert transport.stage([("a", torch.ones(2).as_subclass(OnGPU))], full=True) == 8
    with pytest.raises(ConfigError, match=rf"transport='{kind}' uses vLLM's .* install vllm"):
        asyncio.run(transport.deliver(Target("http://one", 1, tell), whole=True))
