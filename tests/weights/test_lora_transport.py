"""LoRA adapters by path, to fake vLLM processes: they arrive, or an error says why not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.lora import ADAPTER, LoRATransport, adapter_config, plain_name
from sdp_lightning.weights.protocol import Instruction, LoadAdapter, LoadFolder, Target
from support.fake_servers import (
    Server,
    assert_nothing_left,
    connected,
    make_engine,
)
from support.remote_engines import Sending, generate, request
from support.weight_transports import stage, update

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
    num_bytes = stage(transport, base(1.0) + adapter(2.0), full=True)
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
    stage(transport, base(1.0) + adapter(1.0), full=True)
    before = told(transport, whole=True)
    with pytest.raises(EngineError, match=r"model.norm.weight changed, but .* adapter only"):
        stage(transport, adapter(2.0) + base(2.0), full=False)
    assert told(transport, whole=True) == before


def test_an_adapter_stays_until_the_one_after_the_next(tmp_path: Path):
    """Requests that servers carry across an update may read the one before again."""
    transport = LoRATransport(16.0, root=tmp_path)
    folders: list[Path] = []
    for number in range(4):
        stage(transport, base(1.0) + adapter(1.0) if number == 0 else adapter(2.0), full=not number)
        use = told(transport, whole=False)[-1]
        assert isinstance(use, LoadAdapter) and use.name == ADAPTER
        folders.append(Path(use.folder))
        assert [folder.exists() for folder in folders] == [
            n > number - 2 for n in range(number + 1)
        ]
    assert len(set(folders)) == 4


def test_a_step_without_an_adapter_tells_the_same_one_again(tmp_path: Path):
    transport = LoRATransport(16.0, root=tmp_path)
    stage(transport, base(1.0) + adapter(1.0), full=True)
    before = told(transport, whole=True)
    assert stage(transport, [], full=False) == 0
    assert told(transport, whole=True) == before and told(transport, whole=False) == before[1:]


@pytest.mark.parametrize("taken", ["adapter-2", "part"])
def test_an_adapter_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, taken: str):
    transport = LoRATransport(16.0, root=tmp_path)
    stage(transport, base(1.0) + adapter(1.0), full=True)
    before = told(transport, whole=True)
    [folder] = tmp_path.iterdir()
    (folder / taken).write_text("in the way")
    with pytest.raises(EngineError, match="cannot be written to"):
        stage(transport, base(2.0) + adapter(2.0), full=True)
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
