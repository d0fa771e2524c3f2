"""One real vLLM server: requests in flight keep exact versions and log-probs across updates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fitting import Judge, Recorder, make_data, make_module, make_rows, make_trainer, make_workflow
from real_vllm import (
    LongSamples,
    assert_exact,
    make_config,
    make_model,
    num_running,
    num_sampled,
    save_model,
    wait_for,
)
from rolling import assert_conserved, make_executor, versions, wait_until

import sdp_lightning as sdp
from sdp_lightning.engines.server import ManagedServers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NUM_REQUESTS, BUDGET = 40, 480


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


def engine_url(server_url: str) -> str:
    return server_url.replace("http://", "vllm://")


@pytest.mark.parametrize(
    ("on_update", "temperature"), [("interrupt", 1.0), ("keep", 1.0), ("keep", 0.7)]
)
def test_requests_in_flight_across_three_publishes_lose_nothing_and_are_exact(
    server_url: str, vllm_folder: str, on_update: str, temperature: float
) -> None:
    sampling = sdp.SamplingParams(max_new_tokens=BUDGET, temperature=temperature)
    rows = [{"id": f"row{i}", "tokens": [5, 6 + i]} for i in range(NUM_REQUESTS)]
    weights = {v: make_model(seed=10 + v).state_dict() for v in range(4)}
    engine = sdp.connect_engine(
        engine_url(server_url), on_update=on_update, kv_on_update="recompute"
    )
    engine.start()
    executor = make_executor(
        engine,
        LongSamples(sampling),
        rows=rows,
        num_epochs=1,
        batch_size=NUM_REQUESTS,
        max_head_lag=3,
        max_concurrent=NUM_REQUESTS,
    )
    try:
        executor.publish(weights[0].items(), 0, reset=True)
        executor.resume()
        for version in (1, 2, 3):
            before = num_sampled(server_url)
            enough = before + 2 * NUM_REQUESTS
            wait_for(lambda: num_running(server_url) >= NUM_REQUESTS // 2)
            wait_for(lambda enough=enough: num_sampled(server_url) >= enough)
            executor.publish(weights[version].items(), version)
        wait_until(executor, lambda: executor.stat.running == 0)
        live = executor.registry.snapshot()
        assert_conserved(executor)
        stat = executor.stat
    finally:
        executor.close()
        engine.close()
    assert (stat.submitted, stat.pending, stat.dropped) == (NUM_REQUESTS, NUM_REQUESTS, 0)
    assert sorted(x.row.row_id for x in live) == sorted(row["id"] for row in rows)
    trajectories = [t for x in live if x.group is not None for t in x.group.trajectories]
    assert [sum(map(len, t.segments)) for t in trajectories] == [BUDGET] * NUM_REQUESTS
    assert len({tuple(t.token_ids[2:]) for t in trajectories}) == NUM_REQUESTS
    assert_exact(Judge(vllm_folder), weights, trajectories)
    for version in (1, 2, 3):
        across = [t for t in trajectories if versions(t)[0] < version <= versions(t)[-1]]
        assert len(across) >= 8, (version, [versions(t) for t in trajectories])


@pytest.mark.parametrize(("max_head_lag", "on_update"), [(0, "interrupt"), (2, "keep")])
def test_fit_through_a_server_trains_on_exactly_what_was_sampled(
    server_url: str, vllm_folder: str, max_head_lag: int, on_update: str
) -> None:
    data = sdp.RolloutDataModule(
        make_rows(64),
        make_workflow(max_new_tokens=24),
        engine=engine_url(server_url),
        engine_options={"on_update": on_update},
        rollout=sdp.RolloutConfig(batch_size=4, max_head_lag=max_head_lag, timeout_s=60.0),
    )
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=6)
    trainer.fit(make_module(vllm_folder), data)
    assert [step.batch.version for step in recorder.steps] == list(range(6))
    assert recorder.engine_versions == list(range(7))
    embedding = "model.embed_tokens.weight"
    assert not recorder.weights[0][embedding].equal(recorder.weights[6][embedding])
    lags = {lag for step in recorder.lags for lag in step}
    assert lags == {0} if max_head_lag == 0 else 0 < max(lags) <= max_head_lag
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
