"""Weights from GPU to GPU, through a real vLLM server. Needs a GPU, and vLLM beside the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from real_vllm import make_model, save_model

from sdp_lightning.engines.embedded.loading import text_logprobs
from sdp_lightning.engines.options import RemoteOptions
from sdp_lightning.engines.remote import RemoteInfEngine
from sdp_lightning.engines.server import ManagedServers, ServerConfig
from sdp_lightning.engines.vllm import VLLMBackend
from sdp_lightning.weights.base import TransportName

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
            (found,) = engine.echo(tokens).values()
            expected = text_logprobs(model, tokens).cpu().numpy()
            assert np.abs(found - expected).mean() < 1e-2, (version, report)
            assert report.num_bytes > 0 and report.bytes_per_s > 0
    finally:
        engine.close()
