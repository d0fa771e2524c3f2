"""The trainer and the embedded engine on a CUDA device: the same numbers as on a CPU, and a fit."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.cli.doctor.model_size import ModelSize, trainer_memory
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.objective import token_logprobs
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import Layout, collate
from sdp_lightning.training.policy.forward import sequence_logprobs
from support.plain_forwards import LAYOUTS, build, gradients, plain, random_batch
from support.steps import Batches, make_batch
from support.trainers import (
    Judge,
    Recorder,
    make_data,
    make_module,
    make_rows,
    make_trainer,
    weights_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

ON_GPU = {"device": "cuda", "max_slots": 16}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


# Log-probs of tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("head_trained", [True, False])
@pytest.mark.parametrize(
    ("dtype", "exact", "slope"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-4, 1e-2)]
)
def test_log_probs_and_gradients_are_those_of_float64(
    dtype: torch.dtype, exact: float, slope: float, head_trained: bool
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(700, 64).to(dtype).cuda().requires_grad_()
    weight = (torch.randn(5000, 64) / 4).to(dtype).cuda().requires_grad_(head_trained)
    targets = torch.randint(5000, (700,), device="cuda")
    hidden64, weight64 = (x.detach().double().cpu().requires_grad_() for x in (hidden, weight))
    table = (hidden64 @ weight64.t() / 0.7).log_softmax(-1)
    expected = table.gather(1, targets.cpu()[:, None])[:, 0]
    factor = torch.linspace(-1, 1, 700)
    (expected * factor).sum().backward()

    found, entropy = token_logprobs(hidden, weight, targets, 0.7)
    (found * factor.cuda()).sum().backward()
    assert found.dtype == torch.float32 and found.is_cuda
    assert relative(found.detach(), expected.detach()) < exact
    assert relative(entropy, -(table.exp() * table).sum(-1).detach()) < exact
    assert hidden.grad is not None and hidden64.grad is not None
    assert relative(hidden.grad, hidden64.grad) < slope
    if head_trained:
        assert weight.grad is not None and weight64.grad is not None
        assert relative(weight.grad, weight64.grad) < slope


def test_the_table_of_logits_is_never_there() -> None:
    count, vocabulary = 8192, 50_000
    hidden = torch.randn(count, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (count,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(hidden, weight, targets, 1.0)[0].sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < count * vocabulary * 4 / 3, f"{taken / 2**20:.0f} MiB"


# Layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_every_layout_equal_separate_ones_on_a_cpu(
    kind: str, attention: str, layout: Layout
) -> None:
    model, batch = build(kind, initializer_range=0.2).train(), random_batch(7)
    expected, _ = plain(model, batch)
    wanted = gradients(model, expected)
    model.to("cuda").config._attn_implementation_internal = attention
    result = sequence_logprobs(model, batch.to("cuda"), layout=layout)
    torch.testing.assert_close(result.logprobs.cpu(), expected, rtol=1e-4, atol=1e-4)
    for name, grad in gradients(model, result.logprobs).items():
        limit = 1e-4 * float(wanted[name].abs().max())
        torch.testing.assert_close(grad.cpu(), wanted[name], rtol=1e-4, atol=limit, msg=name)


# The embedded engine ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_the_embedded_engine_samples_with_the_log_probs_of_a_full_forward(
    dtype: torch.dtype, near: float
) -> None:
    model: Any = tiny_model(hidden_size=128)
    engine = EmbeddedEngine(model, device="cuda", dtype=dtype, max_slots=8)
    engine.start()
    found: list[list[sdp.Segment]] = [[] for _ in range(12)]

    async def sample() -> None:
        params = sdp.SamplingParams(max_new_tokens=30)
        prompts = [np.arange(3, 9 + index) for index in range(12)]
        requests = [GenerationRequest(p, params, seed) for seed, p in enumerate(prompts)]
        sinks = [segments.append for segments in found]
        await asyncio.gather(*map(engine.generate, requests, sinks))

    try:
        engine.update_weights(copy.deepcopy(model).to("cuda").state_dict().items(), 0, reset=True)
        asyncio.run(sample())
    finally:
        engine.close()
    for index, segments in enumerate(found):
        tokens = np.concatenate([np.arange(3, 9 + index), *(s.token_ids for s in segments)])
        with torch.no_grad():
            table = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)
        start = 6 + index
        expected = table[start - 1 : -1].gather(1, torch.from_numpy(tokens)[start:, None])[:, 0]
        error = np.abs(np.concatenate([s.logprobs for s in segments]) - expected.numpy())
        assert error.mean() < near, (index, error.max())


# Fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["auto", "packed"])
@pytest.mark.parametrize(("precision", "drift"), [("32-true", 1e-4), ("bf16-mixed", 0.1)])
@pytest.mark.parametrize("max_head_lag", [0, 2])
def test_a_fit_trains_on_what_was_sampled_by_the_versions_it_says(
    model_folder: str, max_head_lag: int, precision: Any, drift: float, layout: Layout
) -> None:
    data = make_data(engine_options=ON_GPU, max_head_lag=max_head_lag)
    update = sdp.UpdateConfig(num_minibatches=2, layout=layout)
    module = make_module(model_folder, update=update)
    recorder = Recorder()
    trainer = make_trainer(
        sdp.WeightSyncCallback(),
        recorder,
        max_steps=10,
        accelerator="gpu",
        precision=precision,
    )
    trainer.fit(module, data)
    assert [step.batch.version for step in recorder.steps] == list(range(5))
    assert recorder.engine_versions == list(range(6))
    assert all(step.batch.input_ids.is_cuda for step in recorder.steps)
    lags = {lag for step in recorder.lags for lag in step}
    assert lags == {0} if max_head_lag == 0 else max(lags) <= max_head_lag
    assert all(metrics["drift/abs_log_mean"] < drift or max(lags) for metrics in recorder.metrics)
    first, last = recorder.weights[0], recorder.weights[5]
    assert any(not first[name].equal(last[name]) for name in first)
    if precision == "32-true":
        judge = Judge(model_folder)
        for group in (group for step in recorder.steps for group in step.groups):
            for trajectory in group.trajectories:
                for version in {segment.version for segment in trajectory.segments}:
                    judged = judge.segment_logprobs(recorder.weights[version], trajectory)
                    for segment, values in zip(trajectory.segments, judged, strict=True):
                        if segment.version == version:
                            error = np.abs(values.numpy() - segment.logprobs)
                            assert error.max() < 1e-3, version


@pytest.mark.parametrize(("dtype", "drift"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_fit_of_an_adapter_moves_what_the_engine_samples_with(
    model_folder: str, dtype: str, drift: float
) -> None:
    pytest.importorskip("peft")
    lora, options = sdp.LoRAConfig(rank=4), {"dtype": dtype}
    module = make_module(model_folder, lora=lora, lr=0.05, model_kwargs=options)
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=3, accelerator="gpu")
    trainer.fit(module, make_data(engine_options=ON_GPU, max_head_lag=0))
    assert all(metrics["drift/abs_log_mean"] < drift for metrics in recorder.metrics)
    moved = [n for n, w in recorder.weights[0].items() if not w.equal(recorder.weights[3][n])]
    assert moved and not any("lora" in name for name in moved)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_goes_on_from_its_checkpoint(model_folder: str, tmp_path: Path) -> None:
    def fit(steps: int, saved: Path | None = None) -> tuple[Recorder, dict[str, Tensor]]:
        recorder, module = Recorder(), make_module(model_folder)
        trainer = make_trainer(
            sdp.WeightSyncCallback(),
            recorder,
            ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1),
            max_steps=steps,
            accelerator="gpu",
            enable_checkpointing=True,
        )
        data = make_data(rows=make_rows(40), engine_options=ON_GPU, max_head_lag=2, num_epochs=1)
        trainer.fit(module, data, ckpt_path=saved, weights_only=True)
        return recorder, weights_of(module)

    first, saved = fit(3)
    second, _ = fit(6, tmp_path / "step=3.ckpt")
    assert all(second.weights[3][name].cpu().equal(value.cpu()) for name, value in saved.items())
    assert [step.batch.version for step in second.steps] == [3, 4, 5]
    rows = [row for run in (first, second) for step in run.steps for row in step.row_ids]
    assert len(rows) == len(set(rows)) == 12


# Strategies, one process of each, through NCCL ---------------------------------------------------


def learn(folder: str, **settings: Any) -> dict[str, Tensor]:
    """The weights after a few steps on recorded groups."""
    module = make_module(folder, lr=1e-2)
    batches = [make_batch(folder, seed=seed) for seed in range(3)]
    trainer = make_trainer(max_steps=3, limit_val_batches=0, accelerator="gpu", **settings)
    trainer.fit(module, Batches(*batches))
    return {name: value.cpu() for name, value in weights_of(module).items()}


@pytest.mark.parametrize(
    ("name", "precision"), [("ddp", "32-true"), ("fsdp2", "32-true"), ("fsdp2", "bf16-mixed")]
)
def test_a_strategy_on_nccl_learns_what_one_process_learns(
    model_folder: str, name: str, precision: Any
) -> None:
    strategy: Any = "ddp"
    if name == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    start = Judge(model_folder).weights()
    try:
        found = learn(model_folder, strategy=strategy, precision=precision)
        expected = learn(model_folder)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        gap, way = (found[key] - value).norm(), (value - start[key]).norm()
        assert gap <= (1e-3 if precision == "32-true" else 0.5) * way + 1e-6, key


# Memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_doctors_estimate_of_memory_is_near_what_training_takes(
    tmp_path: Path, precision: Any, checkpointing: bool
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    size = ModelSize.read(tmp_path)
    tokens = 4096
    rng = np.random.default_rng(0)
    trajectories = [
        sdp.Trajectory(
            (
                sdp.Context(rng.integers(3, 40, 8)),
                sdp.Segment(0, rng.integers(3, 40, 504), -np.ones(504)),
            ),
            reward=float(index % 2),
        )
        for index in range(16)
    ]
    groups = [sdp.TrajectoryGroup(tuple(trajectories[i : i + 4])) for i in range(0, 16, 4)]
    batch = collate(groups, version=0)
    module = make_module(
        str(tmp_path),
        update=sdp.UpdateConfig(max_tokens_per_microbatch=tokens, layout="packed"),
        gradient_checkpointing=checkpointing,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer = make_trainer(max_steps=2, limit_val_batches=0, accelerator="gpu", precision=precision)
    trainer.fit(module, Batches(batch, batch))
    taken = torch.cuda.max_memory_allocated() - before
    found = trainer_memory(
        size,
        num_trained=size.num_parameters,
        dtype="float32",
        tokens=tokens,
        checkpointing=checkpointing,
        computes_in="float32" if precision == "32-true" else "bfloat16",
    )
    ratio = found.total / taken
    print(f"{precision} {checkpointing=}: {found.total / 2**30:.2f} GiB foretold, {ratio:.2f}x")
    assert 0.7 < ratio < 1.5, f"{found} foretold, {taken / 2**30:.2f} GiB taken"
