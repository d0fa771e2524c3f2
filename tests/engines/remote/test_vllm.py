"""One real vLLM server: requests in flight keep exact versions and log-probs across updates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.servers.managed import ManagedServers
from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.workflows.stop_texts import StopTexts
from support.real_vllm import (
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
    make_rows,
    make_trainer,
    make_workflow,
    weights_of,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def vllm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("vllm-model"))


@pytest.fixture(scope="module")
def server_url(vllm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    servers = ManagedServers(make_config(vllm_folder, tmp_path_factory.mktemp("vllm-logs")))
    try:
        yield servers.start()[0]
    finally:
        servers.close()


@pytest.mark.parametrize(
    "options",
    [
        {"on_update": "interrupt", "num_requests": 40},
        {"on_update": "keep", "num_requests": 40},
        {"on_update": "keep", "temperature": 0.7},
        {"on_update": "interrupt", "stream": True, "temperature": 0.7},
        {"on_update": "keep", "stream": True},
        {"on_update": "interrupt", "transport": "tcp"},
        {"on_update": "keep", "transport": "tcp"},
        {"on_update": "interrupt", "transport": "delta", "anchor_every": 2},
    ],
    ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()),
)
def test_requests_in_flight_across_three_publishes_lose_nothing_and_are_exact(
    server_url: str, vllm_folder: str, options: dict[str, Any]
) -> None:
    weights = {v: make_model(seed=10 + v).state_dict() for v in range(4)}
    updates = [weights[v].items() for v in range(4)]
    trajectories = generate_across(server_url, updates, **options)
    assert_exact(Judge(vllm_folder), weights, trajectories)


@pytest.mark.parametrize("over", ["files", "tcp"])
def test_deltas_give_a_server_the_bits_of_full_transfers(server_url: str, over: str) -> None:
    model, text = make_model(seed=50), np.arange(5, 40)
    generator = torch.Generator().manual_seed(1)
    states: list[dict[str, torch.Tensor]] = []
    for _ in range(5):
        states.append({name: weight.clone() for name, weight in model.state_dict().items()})
        with torch.no_grad():
            for weight in model.parameters():
                is_changed = torch.rand(weight.shape, generator=generator) < 0.05
                weight.add_(1e-3 * torch.randn(weight.shape, generator=generator) * is_changed)

    def echo(**options: Any) -> tuple[list[Any], list[int]]:
        engine, found, sizes = sdp.connect_engine(engine_url(server_url), **options), [], []
        engine.start()
        try:
            for version, state in enumerate(states):
                engine.pause()
                report = engine.update_weights(state.items(), version, reset=version == 0)
                engine.resume()
                sizes.append(report.num_bytes)
                [logprobs] = engine.prompt_logprobs(text).values()
                found.append(logprobs.tolist())
        finally:
            engine.close()
        return found, sizes

    by_delta, sizes = echo(transport="delta", delta_over=over, anchor_every=3)
    in_full, _ = echo()
    assert by_delta == in_full and len({tuple(one) for one in in_full}) == 5
    anchor, later = sizes[1], [sizes[n] for n in (2, 3)]
    assert sizes[4] == anchor and max(later) < 0.07 * anchor  # 4 + 1 bytes of 5 % of the values


@pytest.mark.parametrize(
    ("max_head_lag", "on_update", "overlap"),
    [(0, "interrupt", False), (2, "keep", False), (2, "interrupt", True)],
)
def test_fit_through_a_server_trains_on_exactly_what_was_sampled(
    server_url: str, vllm_folder: str, max_head_lag: int, on_update: str, overlap: bool
) -> None:
    data = sdp.RolloutDataModule(
        make_rows(64),
        make_workflow(max_new_tokens=24),
        engine=engine_url(server_url),
        engine_options={"on_update": on_update},
        rollout=sdp.RolloutConfig(
            batch_size=4, max_head_lag=max_head_lag, timeout_s=240.0, overlap_publish=overlap
        ),
    )
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=6)
    trainer.fit(make_module(vllm_folder), data)
    assert [step.batch.version for step in recorder.steps] == list(range(6))
    ahead = [t - (s or 0) for t, s in enumerate(recorder.engine_versions)]
    assert set(ahead) <= ({0, 1} if overlap else {0}) and ahead[0] == 0
    embedding = "model.embed_tokens.weight"
    assert not recorder.weights[0][embedding].equal(recorder.weights[6][embedding])
    lags = {lag for step in recorder.lags for lag in step}
    assert lags == {0} if max_head_lag == 0 else 0 < max(lags) <= max_head_lag
    for metrics in recorder.metrics:
        assert metrics["time/paused_s"] > 0
        assert overlap or metrics["time/paused_s"] <= metrics["time/publish_s"]
        assert metrics["publish/bytes"] == sum(w.nbytes for w in make_model().parameters())
        parts = [metrics[f"publish/{part}_s"] for part in ("drain", "load", "resume")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(metrics["time/paused_s"])
        staged_s = metrics["publish/stage_s"]  # before the pause
        assert staged_s > 0
        assert overlap or staged_s < metrics["time/publish_s"] - metrics["time/paused_s"]
    drift = [metrics["drift/abs_log_mean"] for metrics in recorder.metrics]
    assert max(drift) < 1e-4 or max_head_lag > 0, drift
    groups = [group for step in recorder.steps for group in step.groups]
    assert_exact(Judge(vllm_folder), recorder.weights, [t for g in groups for t in g.trajectories])
    rows = [row for step in recorder.steps for row in step.row_ids]
    assert len(rows) == len(set(rows)) == 24


def test_a_server_left_paused_is_resumed_when_connected_and_its_next_start_is_clean(
    server_url: str, vllm_folder: str
) -> None:
    weights = {7: make_model(seed=3).state_dict()}
    first = sdp.connect_engine(engine_url(server_url))
    first.start()
    first.update_weights(weights[7].items(), 6, reset=True)
    first.pause()
    first.close()
    data = make_data(make_workflow(max_new_tokens=6), engine=engine_url(server_url), max_head_lag=0)
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=1)
    trainer.fit(make_module(vllm_folder), data)
    groups = recorder.steps[0].groups
    assert_exact(Judge(vllm_folder), recorder.weights, [t for g in groups for t in g.trajectories])


def test_a_layer_of_which_one_weight_is_trained_is_exact_though_the_server_fuses_it(
    server_url: str, vllm_folder: str
) -> None:
    module = make_module(vllm_folder, trainable=r"layers\.2\.self_attn\.q_proj")
    module.configure_model()
    sent = [name for name, _ in module.named_weights(changed_only=True)]
    (trained,) = [p for p in module.require_policy().parameters() if p.requires_grad]
    weights = {0: weights_of(module)}
    for version in (1, 2, 3):
        torch.manual_seed(version)
        with torch.no_grad():
            trained.copy_(torch.randn_like(trained) / 4)
        weights[version] = weights_of(module)
    changes = [[(name, weights[v][name]) for name in sent] for v in (1, 2, 3)]
    trajectories = generate_across(server_url, [weights[0].items(), *changes])
    assert 1 < len(sent) < len(weights[0])
    assert_exact(Judge(vllm_folder), weights, trajectories)


def test_the_echo_check_agrees_at_every_publish_of_a_trained_embedding(
    server_url: str, vllm_folder: str
) -> None:
    data = make_data(make_workflow(max_new_tokens=6), engine=engine_url(server_url), max_head_lag=0)
    sync = sdp.WeightSyncCallback(weight_check_every=1, weight_check_tolerance=1e-3)
    recorder = Recorder()
    make_trainer(sync, recorder, max_steps=3).fit(make_module(vllm_folder), data)
    echoes = [metrics["publish/echo"] for metrics in recorder.metrics]
    assert len(echoes) == 3 and all(0 < echo < 1e-4 for echo in echoes)
    embedding = "model.embed_tokens.weight"
    assert not recorder.weights[0][embedding].equal(recorder.weights[3][embedding])


@pytest.mark.fault("exception", "publish")
def test_a_load_that_fails_is_a_named_error_and_the_server_is_exact_after_the_next_start(
    server_url: str, vllm_folder: str
) -> None:
    """It samples nothing in between: vLLM would not survive that."""
    whole = make_model(seed=5).state_dict()
    stranger = whole | {"model.layers.1.mlp.up_proj.weight": torch.zeros(7, 5)}
    for broken, reset in ((stranger, False), (stranger, True)):
        engine = sdp.connect_engine(engine_url(server_url))
        with pytest.raises(sdp.EngineError, match=f"0 servers are left.*{server_url}/collective_r"):
            try:
                engine.start()
                engine.pause()
                if not reset:
                    engine.update_weights(whole.items(), 0, reset=True)
                engine.update_weights(broken.items(), 1, reset=reset)
            finally:
                engine.close()
    weights = {v: make_model(seed=10 + v).state_dict() for v in range(4)}
    trajectories = generate_across(server_url, [weights[v].items() for v in range(4)])
    assert_exact(Judge(vllm_folder), weights, trajectories)


@pytest.mark.parametrize(
    "truncation", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 8, "top_p": 0.7}], ids=str
)
def test_truncated_sampling_has_the_logprobs_of_what_is_left(
    server_url: str, truncation: dict[str, Any]
) -> None:
    params = sdp.SamplingParams(
        max_new_tokens=40, temperature=0.8, allow_truncated_sampling=True, **truncation
    )
    model = make_model(seed=4)
    segments: list[sdp.Segment] = []
    engine = sdp.connect_engine(engine_url(server_url))
    try:
        engine.start()
        engine.pause()
        engine.update_weights(model.state_dict().items(), 0, reset=True)
        engine.resume()
        prompt = np.array([5, 6, 7])
        asyncio.run(engine.generate(GenerationRequest(prompt, params), segments.append))
    finally:
        engine.close()
    (segment,) = segments
    tokens = torch.from_numpy(np.concatenate([prompt, segment.token_ids]))
    with torch.no_grad():
        rows = model(input_ids=tokens[None]).logits[0, 2:-1] / 0.8
    k, p = truncation.get("top_k"), truncation.get("top_p", 1.0)
    if k is not None:
        rows = rows.masked_fill(rows < rows.topk(k).values[:, -1:], -torch.inf)
    shares, order = rows.softmax(-1).sort(descending=True)
    kept = shares.cumsum(-1) - shares < p  # the smallest set that holds at least p
    left = torch.zeros_like(kept).scatter(1, order, kept)
    expected = rows.masked_fill(~left, -torch.inf).log_softmax(-1)
    expected = expected.gather(1, tokens[3:, None])[:, 0].numpy()
    assert np.abs(expected - segment.logprobs).max() < 1e-4


def test_stop_texts_and_tokens_without_a_text_are_those_of_the_embedded_engine(
    server_url: str,
) -> None:
    """Stop texts span tokens; of 50 tokens 10 are taken for such without a text."""
    model, tokenizer, prompt = make_model(seed=4), tiny_tokenizer(), np.array([5, 6, 7])

    def first_end(tokens: Sequence[int], text: str) -> int:
        return next(n for n in range(31) if text in tokenizer.decode(tokens[:n]))

    def ask(
        text: str | None = None, sampled: Sequence[int] = (), temperature: float = 1.0
    ) -> tuple[str, sdp.Segment]:
        budget = 30 - len(sampled)
        request = GenerationRequest(
            np.array([*prompt, *sampled]),
            sdp.SamplingParams(max_new_tokens=budget, temperature=temperature),
            num_sampled=len(sampled),
            stops=StopTexts((text,), tokenizer.decode) if text else None,
            num_tokens=40,
        )
        segments: list[sdp.Segment] = []
        reason = asyncio.run(engine.generate(request, segments.append))
        return reason, segments[0]

    engine = sdp.connect_engine(engine_url(server_url))
    try:
        engine.start()
        engine.use_vocabulary(50)
        engine.pause()
        engine.update_weights(model.state_dict().items(), 0, reset=True)
        engine.resume()
        _, free = ask()
        tokens: list[int] = free.token_ids.tolist()
        text = tokenizer.decode(tokens[9:12])
        reason, stopped = ask(text)
        _, greedy = ask(temperature=0.0)
        written: list[int] = greedy.token_ids.tolist()
        begun_text = tokenizer.decode(written[9:12])
        begun_end = first_end(written, begun_text)
        begun_reason, begun = ask(begun_text, written[: begun_end - 1], temperature=0.0)
    finally:
        engine.close()
    end = first_end(tokens, text)
    assert reason == begun_reason == "stop"
    assert stopped.token_ids.tolist() == tokens[:end]
    assert begun.token_ids.tolist() == written[begun_end - 1 : begun_end]
    assert max(tokens) < 40
    with torch.no_grad():
        whole = torch.tensor([*prompt, *tokens])
        rows = model(input_ids=whole[None]).logits[0, 2:-1, :40].log_softmax(-1)
    expected = rows.gather(1, whole[3:, None])[:, 0].numpy()
    assert np.abs(expected - free.logprobs).max() < 1e-4
    assert np.abs(expected[:end] - stopped.logprobs).max() < 1e-4
