"""Deltas: the same bits as a full transfer, few bytes, and a named error for every other result."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from runpy import run_path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sdp_lightning.errors import EngineError
from sdp_lightning.testing import tiny_model
from sdp_lightning.weights.delta import apply, encode
from sdp_lightning.weights.delta_transport import DeltaTransport
from sdp_lightning.weights.protocol import ApplyDelta, Instruction, LoadFolder, Target
from support.delta_worker import DeltaWorker
from support.fake_servers import Server, connected, is_back
from support.paths import ROOT
from support.remote_engines import generate, request
from support.weight_transports import update

TYPES = [torch.bfloat16, torch.float16, torch.float32]


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.view(torch.uint8).equal(second.view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    places=st.sets(st.integers(0, 2999), max_size=40),
    more=st.sampled_from([0, 1, 7, 254, 255, 256, 510, 511]),
    size=st.sampled_from([3000, 3001]),
    dtype=st.sampled_from(TYPES),
)
def test_a_delta_gives_the_bits_of_a_full_transfer(
    places: set[int], more: int, size: int, dtype: torch.dtype
) -> None:
    before = torch.linspace(-2, 2, size).to(dtype)
    after = before.clone()
    changed = sorted({*places, *(p + more for p in places if p + more < size)})
    after[changed] = torch.tensor([-0.0, float("nan"), float("inf"), 3.0] * 20).to(dtype)[
        : len(changed)
    ]
    weights = {"w": before.clone().view(-1, 1), "other": before}
    delta = encode("w", before.view(-1, 1), after.view(-1, 1))
    apply(weights, delta)
    assert same_bits(weights["w"].flatten(), after)
    num_changed = int((before.view(torch.uint8) != after.view(torch.uint8)).any())
    assert bool(delta) == bool(num_changed)


def test_a_changed_value_costs_its_size_and_a_byte_and_a_full_tensor_is_the_most() -> None:
    before = torch.zeros(1000).bfloat16()
    after = before.clone()
    after[::10] = 1.0
    assert sum(t.nbytes for t in encode("w", before, after).values()) == 100 * 3 + 8
    after[:900] = 1.0
    delta = encode("w", before, after)
    assert list(delta) == ["w", "w.delta_sum"] and delta["w"].equal(after)


@pytest.mark.fault("corrupted data", "publish")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda w, d: w["w"].neg_(), "w is not what the trainer has after the delta"),
        (lambda w, d: d["w.delta_values"].neg_(), "w is not what the trainer has"),
        (lambda w, d: d["w.delta_gaps"].add_(1), "w is not what the trainer has"),
        (lambda w, d: d["w.delta_gaps"].fill_(254), "does not fit it"),
        (lambda w, d: d.pop("w.delta_values"), "does not fit it"),
        (lambda w, d: w.pop("w"), "changes w, which the last anchor did not bring"),
        (lambda w, d: w.update(w=torch.ones(3)), "w"),
    ],
    ids=["a delta left out", "value", "place", "beyond", "no values", "unknown", "shape"],
)
def test_any_other_result_is_an_error_that_names_the_tensor(spoil: Any, said: str) -> None:
    before = torch.arange(100.0).bfloat16()
    after = before.clone()
    after[[3, 50, 51]] = 7.0
    weights, delta = {"w": before.clone()}, encode("w", before, after)
    spoil(weights, delta)
    with pytest.raises(EngineError, match=said):
        apply(weights, delta)


def test_a_tensor_of_another_shape_or_type_is_refused() -> None:
    for after in (torch.zeros(3), torch.zeros(2).half()):
        with pytest.raises(EngineError, match=r"w was torch.float32 of shape .2,. at the last"):
            encode("w", torch.zeros(2), after)


def test_the_benchmark_of_bytes_finds_few_where_few_values_change() -> None:
    measure = run_path(str(ROOT / "recipes/benchmarks/speed/delta_bytes.py"))["measure"]
    few, changed = measure(tiny_model(), 1e-7, "bfloat16", 1)
    assert 0 < changed < few < 0.05
    many, changed = measure(tiny_model(), 1e-2, "bfloat16", 1)
    assert changed > 0.5 and many > 0.9


# The transport, and the worker extension ---------------------------------------------------------


def policy(step: int) -> list[tuple[str, Tensor]]:
    """Two layers, of which a few values change with each step; ``tied`` is one tensor twice."""
    made = {f"l{n}": torch.linspace(n, n + 1, 999).view(27, 37) for n in range(2)}
    for number in range(step):
        made["l0"].view(-1)[number * 31 % 999] = -float(number)
    return [*made.items(), ("tied", made["l0"])]


def base() -> list[tuple[str, Tensor]]:
    return [("frozen", torch.ones(5)), *policy(0)]


def deliver(transport: DeltaTransport, worker: DeltaWorker, *, whole: bool) -> list[str]:
    told: list[str] = []

    async def tell(instruction: Instruction) -> None:
        match instruction:
            case LoadFolder(folder, keep):
                told.append("anchor" if keep else "load")
                if keep:
                    worker.sdp_load_anchor(folder)
                else:
                    worker.sdp_load_folder_in_part(folder)
            case ApplyDelta(folder):
                told.append("delta")
                worker.sdp_apply_delta(folder)
            case _:
                raise AssertionError(instruction)

    asyncio.run(transport.deliver(Target("http://one", 1, tell), whole=whole))
    return told


class Worker(DeltaWorker):
    def sdp_load_folder_in_part(self, folder: str) -> None:
        from sdp_lightning.engines.servers.vllm_worker import _read

        self._sdp_use(_read(folder), "load")


def test_after_any_update_servers_old_and_new_hold_what_a_full_transfer_gives(
    tmp_path: Path,
) -> None:
    transport, old = DeltaTransport(anchor_every=3, root=tmp_path, bucket_bytes=2000), Worker()
    transport.stage(base(), full=True, dtype="bfloat16")
    transport.activate()
    assert deliver(transport, old, whole=True) == ["load"]
    full = sum(t.bfloat16().nbytes for _, t in policy(0)[:2])
    uses = ["anchor", "delta", "delta", "anchor", "delta", "delta", "anchor"]
    for step, use in enumerate(uses, 1):
        transport.stage(policy(99), full=False, dtype="bfloat16")  # of a publish that failed
        num_bytes = transport.stage(policy(step), full=False, dtype="bfloat16")
        assert num_bytes >= full if use == "anchor" else num_bytes < full // 20
        transport.activate()
        assert deliver(transport, old, whole=False) == [use]
        new = Worker()
        since = uses[:step][::-1].index("anchor")
        assert deliver(transport, new, whole=True) == ["load", "anchor", *["delta"] * since]
        for name, tensor in [("frozen", torch.ones(5)), *policy(step)]:
            for worker in (old, new):
                if name in worker.held:  # a tied one is sent once in a file
                    assert same_bits(worker.held[name], tensor.bfloat16()), (step, name)
    assert transport.stage(policy(len(uses)), full=False, dtype="bfloat16") == 0
    transport.activate()
    assert deliver(transport, old, whole=False) == []
    transport.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("exception", "publish")
def test_a_worker_whose_load_failed_takes_no_delta_until_it_got_an_anchor(tmp_path: Path) -> None:
    transport, worker = DeltaTransport(anchor_every=9, root=tmp_path), Worker()
    for step in range(4):
        transport.stage(policy(step), full=not step, dtype="bfloat16")
        transport.activate()
        worker.fails = step == 2
        if step < 2:
            deliver(transport, worker, whole=False)
            continue
        with pytest.raises((ValueError, RuntimeError), match=r"no room|kept no weights to change"):
            deliver(transport, worker, whole=False)
    assert deliver(transport, worker, whole=True) == ["load", "anchor", "delta", "delta"]
    assert same_bits(worker.held["l0"], policy(3)[0][1].bfloat16())
    transport.close()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_where_a_delta_saves_nothing_it_is_said(
    tmp_path: Path, dtype: Any, caplog: pytest.LogCaptureFixture
) -> None:
    transport = DeltaTransport(anchor_every=2, root=tmp_path)
    with caplog.at_level(logging.WARNING, logger="sdp_lightning"):
        transport.stage(base(), full=True, dtype=dtype)
    assert "a delta saves nothing there" in caplog.text
    transport.close()


@pytest.mark.parametrize("over", ["files", "tcp"])
def test_servers_get_deltas_and_one_that_was_restarted_all_of_it(one: Server, over: str) -> None:
    one.do(reset={"types": ["bfloat16"]})
    options = {"transport": "delta", "delta_over": over, "anchor_every": 3}
    with connected(one, health_interval_s=1000.0, **options) as engine:
        sizes = [update(engine, base(), 0, reset=True).num_bytes]
        sizes += [update(engine, policy(step), step).num_bytes for step in (1, 2)]
        assert sizes[2] < sizes[1] // 50
        assert [load[0] for load in one.do()["loads"][1:]] == ["anchor", "delta"]
        one.do(reset={"types": ["bfloat16"]})  # before anybody noticed
        update(engine, policy(3), 3)
        assert [load[0] for load in one.do()["loads"][1:]] == ["anchor", "delta", "delta"]
        assert one.do()["weights"]["l0"] == float(policy(3)[0][1][0, 0])
        assert [s.version for s in generate(engine, request())] == [3]
        is_back(engine, one)
