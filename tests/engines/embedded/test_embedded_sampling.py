from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sdp_lightning.engines.embedded.sampling import sample, uniforms
from sdp_lightning.testing import tiny_model
from sdp_lightning.types import SamplingParams
from support.embedded_engines import (
    VOCABULARY,
    MakeEngine,
    engine_maker,
    full_logits,
    generate,
    prompts,
    request,
)


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    with engine_maker() as make:
        yield make


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.6, None), (1.0, 5), (0.8, 7), (1e-6, None), (1.0, 1000)]
)
def test_truncated_sampling_stays_inside_and_renormalises(make_engine, top_p: float, top_k):
    model = tiny_model()
    prompt = np.arange(5, 12)
    probs = (full_logits(model, prompt)[-1] / 0.9).softmax(-1)
    order = probs.argsort(descending=True)[: top_k or VOCABULARY]
    kept = probs[order] / probs[order].sum()
    order = order[(kept.cumsum(0) - kept) < top_p]
    mass = float(probs[order].sum())
    requests = [
        request(prompt, 1, seed=seed, temperature=0.9, top_p=top_p, top_k=top_k)
        for seed in range(60)
    ]
    _, segments = generate(make_engine(model), requests)
    seen = {int(segment.token_ids[0]) for (segment,) in segments}
    assert seen <= set(order.tolist())
    assert len(seen) > 1 or len(order) == 1
    for (segment,) in segments:
        expected = np.log(float(probs[segment.token_ids[0]]) / mass)
        assert segment.logprobs[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 7, 49, 1000])
def test_tokens_are_sampled_as_often_as_the_softmax_says(vocabulary: int):
    num = 20_000
    logits = torch.linspace(-2, 2, vocabulary)[torch.randperm(vocabulary)].expand(num, -1)
    tokens, _ = sample(logits, [SamplingParams()] * num, uniforms(range(num), [3] * num))
    expected = num * logits[0].double().softmax(-1)
    counts = torch.bincount(tokens, minlength=vocabulary)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    degrees = vocabulary - 1
    assert chi_square <= degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


def test_a_token_of_tiny_probability_is_reachable_and_an_impossible_one_is_not():
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 10], logits[:, 990] = 0.0, -18.0  # e**-18 is lost in a float32 running sum near 1
    last = np.array([1 - 2.0**-52, 0.0])
    tokens, logprobs = sample(logits, [SamplingParams()] * 2, last)
    assert tokens.tolist() == [990, 10]
    assert logprobs.tolist() == pytest.approx([-18.0, 0.0], abs=1e-6)


def test_random_numbers_depend_on_seed_and_position_alone_and_are_spread():
    together = uniforms([5, -1, 2**70], [0, 1, 2])
    alone = [uniforms([s], [p])[0] for s, p in ((5, 0), (-1, 1), (2**70, 2))]
    assert together.tolist() == alone
    grid = uniforms(np.repeat(range(100), 100).tolist(), list(range(100)) * 100)
    assert np.unique(grid).size == 10_000 and 0 <= grid.min() < grid.max() < 1
    counts = np.histogram(grid, 20, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 50  # chi-square, 19 degrees of freedom
    by_seed = grid.reshape(100, 100)
    assert abs(np.corrcoef(by_seed[:, 0], by_seed[:, 1])[0, 1]) < 0.3


def test_greedy_is_transformers_generate(make_engine):
    model = tiny_model()
    chosen = prompts(6)
    requests = [request(p, 16, temperature=0.0, stop_token_ids=(1, 7)) for p in chosen]
    _, segments = generate(make_engine(model), requests)
    for prompt, (segment,) in zip(chosen, segments, strict=True):
        reference = model.generate(
            torch.as_tensor(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=[1, 7],
        )
        assert segment.token_ids.tolist() == reference[0, len(prompt) :].tolist()
        assert (segment.logprobs == 0).all()


def test_a_stop_token_ends_the_completion_and_is_kept(make_engine):
    engine = make_engine()
    _, ((unstopped,),) = generate(engine, [request([5, 6], 12)])
    stop = int(unstopped.token_ids[4])
    (reason,), ((segment,),) = generate(engine, [request([5, 6], 12, stop_token_ids=(stop,))])
    first = unstopped.token_ids.tolist().index(stop)
    assert reason == "stop"
    assert segment.token_ids.tolist() == unstopped.token_ids[: first + 1].tolist()
