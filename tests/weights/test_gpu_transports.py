"""Weights from GPU to GPU: through a real vLLM server, and between vLLM's own transfer engines.

The first needs vLLM beside the trainer, the second its files alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn

from sdp_lightning.engines.embedded.model_checks import text_logprobs
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.engines.servers.managed import ManagedServers, ServerConfig
from sdp_lightning.errors import EngineError
from sdp_lightning.weights.protocol import EngineTransfer, Instruction, Target, TransportName
from sdp_lightning.weights.vllm_native import NativeTransport
from support import vllm_slice
from support.real_vllm import make_model, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("transport", ["files", "nccl", "ipc"])
def test_three_versions_from_a_gpu_are_what_the_server_computes_with(
    transport: TransportName, tmp_path: Path
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed beside the trainer")
    device = "0" if transport == "ipc" or torch.cuda.device_count() == 1 else "1"
    config = ServerConfig(
        save_model(tmp_path / "model"),
        devices=(device,),
        gpu_memory_utilization=0.3,
        max_model_len=512,
        dtype="float32",
        transport=transport,
        log_folder=str(tmp_path / "logs"),
    )
    options = RemoteOptions(transport=transport)
    engine = RemoteInfEngine(ManagedServers(config), VLLMBackend(), options=options)
    tokens = np.random.default_rng(0).integers(40, size=64)
    try:
        engine.start()
        for version in range(3):
            model = make_model(seed=version).cuda()
            engine.pause()
            report = engine.update_weights(model.state_dict().items(), version, reset=version == 0)
            engine.resume()
            (found,) = engine.prompt_logprobs(tokens).values()
            expected = text_logprobs(model, tokens).cpu().numpy()
            assert np.abs(found - expected).mean() < 1e-2, (version, report)
            assert report.num_bytes > 0 and report.bytes_per_s > 0
    finally:
        engine.close()


class Holder(nn.Module):
    """What vLLM's engine takes for a model: it keeps what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.held |= {name: tensor.clone() for name, tensor in weights}


def serve(pipe: Connection) -> None:
    """A worker of a server: carries out each step, and shows what it holds when it is asked."""
    vllm_slice.install()
    from vllm.distributed.weight_transfer.ipc_engine import (  # type: ignore
        IPCWeightTransferEngine,
    )

    model, config = Holder(), SimpleNamespace(parallel_config=None, model_config=None)
    engine: Any = IPCWeightTransferEngine(None, config, torch.device("cuda", 0), model)
    while (order := pipe.recv()) is not None:
        step, info = order
        try:
            if step == "show":
                pipe.send({name: tensor.cpu() for name, tensor in model.held.items()})
                continue
            if step == "init":
                engine.init_transfer_engine(engine.init_info_cls(**info))
            elif step == "update":
                engine.receive_weights(engine.update_info_cls(**info))
                torch.cuda.synchronize()
            else:
                getattr(engine, f"{step}_weight_update")()
            pipe.send(None)
        except Exception as error:  # the trainer's process raises it
            pipe.send(error)
    engine.shutdown()


@pytest.mark.skipif(vllm_slice.find() is None, reason="vLLM's files are not here")
def test_another_process_gets_by_cuda_ipc_what_was_staged() -> None:
    vllm_slice.install()
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    worker.start()

    def ask(step: str, info: Any) -> Any:
        ours.send((step, dict(info)))
        assert ours.poll(120), f"no answer to {step} within 120 s"
        return ours.recv()

    async def tell(instruction: Instruction) -> None:
        assert isinstance(instruction, EngineTransfer)
        error = await asyncio.to_thread(ask, instruction.step, instruction.info)
        if error is not None:
            raise EngineError(f"the worker: {error!r}")

    async def publish() -> None:
        target, expected = Target("http://worker", 1, tell), dict[str, Tensor]()
        for version, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)):
            state = make_model(seed=version).to("cuda", dtype).state_dict()
            sent = {k: v for k, v in state.items() if version < 2 or "layers.2." in k}
            num_bytes = transport.stage(sent.items(), full=version < 2)
            transport.activate()
            assert num_bytes == sum({v.data_ptr(): v.nbytes for v in sent.values()}.values())
            await transport.deliver(target, whole=version == 0)
            expected |= {name: tensor.cpu() for name, tensor in sent.items()}
            held = await asyncio.to_thread(ask, "show", {})
            assert held.keys() == expected.keys()
            assert all(held[name].equal(tensor) for name, tensor in expected.items()), version

    transport = NativeTransport("ipc", "127.0.0.1", timeout_s=240)
    try:
        asyncio.run(publish())
    finally:
        transport.close()
        ours.send(None)
        worker.join(60)
        worker.kill()
    assert worker.exitcode == 0
