"""Real vLLM servers of models whose weights do not arrive by vLLM's own reload on a CPU.

A mixture of experts, which the kernel has packed and padded, and one with windows, sinks and
biases, whose weights vLLM copies past its loaders. transformers fuses the experts of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sdp_lightning as sdp
from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.engines.servers.managed import ManagedServers
from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.training.policy.checkpoint_names import as_in_checkpoint
from sdp_lightning.training.policy.weight_export import named_weights
from support.real_vllm import assert_exact, core, engine_url, generate_across, make_config
from support.trainers import Judge, Recorder, make_data, make_module, make_trainer, make_workflow

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
]

COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": COMMON | {"intermediate_size": 48},  # the kernel pads it to 64
    "gpt_oss": COMMON | WINDOWS | {"intermediate_size": 64},
}


def make_model(kind: str, *, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    config = AutoConfig.for_model(kind, **SETTINGS[kind])
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.5 if "embed" in name else 0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    parent = tmp_path_factory.mktemp("vllm-models")
    with quiet_transformers():
        for kind in SETTINGS:
            make_model(kind).save_pretrained(parent / kind)
            tiny_tokenizer().save_pretrained(parent / kind)
    return {kind: str(parent / kind) for kind in SETTINGS}


@pytest.fixture(scope="module")
def urls(
    folders: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """A server of each model. They start beside each other."""

    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        started: dict[str, Any] = {}
        for index, (kind, folder) in enumerate(folders.items()):
            logs: Path = tmp_path_factory.mktemp("vllm-logs")
            servers = ManagedServers(make_config(folder, logs, cores=(core(index),)))
            stack.callback(servers.close)
            started[kind] = pool.submit(servers.start)
        yield {kind: future.result()[0] for kind, future in started.items()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {"transport": "tcp", "on_update": "keep"}),
        ("gpt_oss", {"transport": "files", "on_update": "interrupt"}),
    ],
    ids=SETTINGS,
)
def test_every_span_is_exact_before_and_after_three_publishes(
    urls: dict[str, str], folders: Mapping[str, str], kind: str, options: dict[str, Any]
) -> None:
    models = [make_model(kind, seed=10 + version) for version in range(4)]
    sent = [as_in_checkpoint(model, named_weights(model, changed_only=False)) for model in models]
    trajectories = generate_across(urls[kind], sent, budget=480, **options)
    weights = {version: model.state_dict() for version, model in enumerate(models)}
    assert assert_exact(Judge(folders[kind]), weights, trajectories) >= 8


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_fit_trains_on_exactly_what_the_server_samples(
    urls: dict[str, str], folders: Mapping[str, str], kind: str
) -> None:
    workflow = make_workflow(max_new_tokens=40)
    data = make_data(workflow, engine=engine_url(urls[kind]), max_head_lag=0)
    recorder = Recorder()
    sync = sdp.WeightSyncCallback(weight_check_every=1, weight_check_tolerance=1e-3)
    make_trainer(sync, recorder, max_steps=3).fit(make_module(folders[kind], lr=1e-2), data)
    groups = [group for step in recorder.steps for group in step.groups]
    trajectories = [t for group in groups for t in group.trajectories]
    assert_exact(Judge(folders[kind]), recorder.weights, trajectories)
    assert len(recorder.metrics) == 3
    assert all(0 < metrics["publish/echo"] < 1e-4 for metrics in recorder.metrics)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert not recorder.weights[0][experts].equal(recorder.weights[3][experts])
