"""A real vLLM server that differs from the managed default: adapters, no spans, an old head.

It is started with ``--enable-lora`` and without ``--enable-scale-out``, and with a worker extension
that leaves a tied head as it was packed while a certain file is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.engines.servers.managed import ManagedServers
from support.real_vllm import (
    At,
    assert_exact,
    engine_url,
    generate_across,
    make_config,
    make_model,
    save_model,
)
from support.trainers import (
    Judge,
    Recorder,
    make_data,
    make_module,
    make_trainer,
    make_workflow,
    weights_of,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANK, ALPHA = 4, 8.0
FORGETFUL = """
from pathlib import Path
from sdp_lightning.engines.servers.vllm_worker import WorkerExtension

class Forgetful(WorkerExtension):
    def _sdp_pack_heads(self):
        if not Path({forget!r}).exists():
            super()._sdp_pack_heads()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm-other")


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return save_model(folder / "model")


@pytest.fixture(scope="module")
def server_url(folder: Path, model: str) -> Iterator[str]:
    (folder / "path").mkdir()
    (folder / "path" / "forgetful_worker.py").write_text(
        FORGETFUL.format(forget=str(folder / "forget"))
    )
    arguments = (
        "--no-enable-scale-out",
        "--worker-extension-cls",
        "forgetful_worker.Forgetful",
    )
    config = make_config(
        model, folder / "logs", transport="lora", max_lora_rank=8, extra_args=arguments
    )
    servers = ManagedServers(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "path"))
        try:
            yield servers.start()[0]
        finally:
            servers.close()


def make_adapter(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """An adapter on some of ``base``, under the names of a PEFT model's ``state_dict``."""
    generator = torch.Generator().manual_seed(seed)
    adapter: dict[str, Tensor] = {}
    for name, weight in base.items():
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            rows, columns = weight.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            down = torch.randn(RANK, columns, generator=generator) / 16
            up = torch.randn(rows, RANK, generator=generator) / 4
            adapter[f"{module}.lora_A.default.weight"] = down
            adapter[f"{module}.lora_B.default.weight"] = up
    return adapter


def merge(base: dict[str, Tensor], adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = dict(base)
    for name, down in adapter.items():
        if ".lora_A." in name:
            up = adapter[name.replace(".lora_A.", ".lora_B.")]
            plain = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            merged[plain] = base[plain] + ALPHA / RANK * (up @ down)
    return merged


def names_of_peft(base: dict[str, Tensor], adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """``base`` as a PEFT model names it: what an adapter lies on is called ``base_layer``."""
    adapted = {name.partition(".lora_")[0] for name in adapter}
    named: dict[str, Tensor] = {}
    for name, tensor in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        named[f"{module}.base_layer.weight" if module in adapted else f"{module}.weight"] = tensor
    return named


def test_adapters_that_change_under_requests_in_flight_are_exact(
    server_url: str, model: str
) -> None:
    base = make_model(seed=20).state_dict()  # not the server's own: it must be sent, too
    adapters = [make_adapter(base, seed) for seed in range(4)]
    first = names_of_peft(base, adapters[0]) | adapters[0]
    updates = [first.items(), *(adapter.items() for adapter in adapters[1:])]
    trajectories = generate_across(server_url, updates, transport="lora", lora_alpha=ALPHA)
    weights = {version: merge(base, adapter) for version, adapter in enumerate(adapters)}
    assert_exact(Judge(model), weights, trajectories)


def test_a_fit_of_an_adapter_trains_on_exactly_what_the_server_samples_with_it(
    server_url: str, model: str
) -> None:
    data = make_data(
        make_workflow(max_new_tokens=12),
        engine=engine_url(server_url),
        engine_options={"transport": "lora"},  # alpha is the module's
        max_head_lag=0,
    )
    recorder = Recorder()
    sync = sdp.WeightSyncCallback(weight_check_every=1, weight_check_tolerance=1e-3)
    module = make_module(model, lora=sdp.LoRAConfig(RANK, ALPHA), lr=1e-2)
    make_trainer(sync, recorder, max_steps=4).fit(module, data)
    assert recorder.engine_versions == list(range(5))
    for name in ("model.layers.5.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        assert not recorder.weights[0][name].equal(recorder.weights[3][name])
    groups = [group for step in recorder.steps for group in step.groups]
    assert_exact(Judge(model), recorder.weights, [t for g in groups for t in g.trajectories])
    # An adapter takes a fraction of what its merged weights would.
    assert recorder.metrics[1]["publish/bytes"] < sum(w.nbytes for w in weights_of(module).values())
    assert all(0 < metrics["publish/echo"] < 1e-4 for metrics in recorder.metrics)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_without_spans_is_exact_when_interrupted(
    server_url: str, model: str, stream: bool
) -> None:
    weights = {v: make_model(seed=10 + v).state_dict() for v in range(4)}
    updates = [weights[v].items() for v in range(4)]
    trajectories = generate_across(server_url, updates, temperature=0.7, stream=stream)
    assert_exact(Judge(model), weights, trajectories)


def test_a_server_without_spans_is_refused_where_requests_would_outlive_an_update(
    server_url: str,
) -> None:
    engine = sdp.connect_engine(engine_url(server_url), on_update="keep")
    with pytest.raises(sdp.ConfigError, match=f"{server_url}.*--enable-scale-out"):
        engine.start()


def test_a_head_that_stays_as_it_was_packed_is_named_by_the_echo_check(
    server_url: str, model: str, folder: Path
) -> None:
    data = make_data(make_workflow(max_new_tokens=6), engine=engine_url(server_url), max_head_lag=0)
    forget, recorder = folder / "forget", Recorder()
    sync = sdp.WeightSyncCallback(weight_check_every=1, weight_check_tolerance=1e-3)
    trainer = make_trainer(At({1: forget.touch}), sync, recorder, max_steps=3)
    try:
        with pytest.raises(sdp.EngineError, match=r"Most at fault: lm_head\.weight\."):
            trainer.fit(make_module(model), data)
    finally:
        forget.unlink()
    assert [step.batch.version for step in recorder.steps] == [0, 1]
    assert 0 < recorder.metrics[0]["publish/echo"] < 1e-4  # of the publish before


def test_a_server_that_computed_with_an_old_head_is_exact_after_the_next_start(
    server_url: str, model: str
) -> None:
    data = make_data(make_workflow(max_new_tokens=6), engine=engine_url(server_url), max_head_lag=0)
    recorder = Recorder()
    make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=2).fit(make_module(model), data)
    groups = [group for step in recorder.steps for group in step.groups]
    assert_exact(Judge(model), recorder.weights, [t for g in groups for t in g.trajectories])
