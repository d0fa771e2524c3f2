"""The staleness ablation compares what it says: the module's own step, at the lag it names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.testing import tiny_tokenizer
from support.paths import ROOT
from support.steps import train

FOLDER = ROOT / "recipes/benchmarks"
sys.path.insert(0, str(FOLDER))

from staleness import ablation  # noqa: E402
from staleness.layers import Layout  # noqa: E402
from staleness.methods import DEFAULT, METHODS  # noqa: E402
from staleness.net import TinyLlama  # noqa: E402
from staleness.plan import Results, cell_of, representative  # noqa: E402
from staleness.probe import GradientSums, probe, summed_up  # noqa: E402
from staleness.rollouts import Rollouts, rounded, segment_scores  # noqa: E402
from staleness.task import SORTING  # noqa: E402
from staleness.training import Cell, Run, Scale, run  # noqa: E402

SMALL = Scale(num_steps=4, num_groups=3, group_size=4, learning_rate=2e-2, evaluate_every=4,
              num_final=1, num_tests=8)  # fmt: skip


def count_digits(completion: str, row: Mapping[str, Any]) -> float:
    """A reward that a model which knows nothing gets now and then."""
    return float(sum(c.isdigit() for c in completion) >= 2)


COUNTING = replace(SORTING, judge=count_digits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of the recipe's kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path, tokenizer = tmp_path_factory.mktemp("llama"), tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    from transformers import LlamaForCausalLM

    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(folder)


def course(model: Any, method: str, lag: int, staleness: Any = "whole", seed: int = 0) -> Any:
    cell = Cell(method, staleness, lag, seed=seed)
    return run(model, cell, SMALL, COUNTING)


def make_run(model: Any, method: str, lag: int, staleness: Any, steps: int) -> Run:
    this = Run(model, Cell(method, staleness, lag), SMALL, COUNTING)
    for step in range(steps):
        this.step(step)
    return this


def test_log_probs_are_those_of_transformers(model: Any) -> None:
    net = TinyLlama(model, Layout(num_answers=3))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 50, (2, 7), generator=generator)
    answers = torch.randint(3, 50, (2, 3, 9), generator=generator)
    lengths = torch.randint(1, 10, (2, 3), generator=generator)
    scored = torch.arange(9) < lengths[..., None]
    found = net.logprobs(prompts, answers, scored)
    whole = torch.cat([prompts[:, None].expand(-1, 3, -1), answers], -1).flatten(0, 1)
    table = model(input_ids=whole, use_cache=False).logits.log_softmax(-1)[:, 6:-1]
    expected = table.gather(-1, whole[:, 7:, None])[..., 0].view(2, 3, 9)
    torch.testing.assert_close(found, expected * scored, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["segment", "proximal, log-linear x", "M2PO", "segment, ESS rate"]
)
def test_a_step_is_the_modules_step(model: Any, folder: str, method: str) -> None:
    this = make_run(model, method, 4, "mixed", steps=5)
    batch, chosen = this.batch(this.rollouts(5)), METHODS[method]
    assert int(batch.lags.max()) == 4 and batch.rewards.unique().numel() > 1
    if chosen.loss.needs_segment_scores:
        assert batch.segment_scored.any()
    module, _ = train(
        folder,
        batch,
        loss=chosen.loss,
        update=sdp.UpdateConfig(num_minibatches=2),
        optimizer=sdp.OptimizerConfig(
            lr=SMALL.learning_rate, scale_lr_by_ess=chosen.scale_lr_by_ess
        ),
    )
    fresh = Run(model, this.cell, SMALL, COUNTING)  # the module's start and optimizer
    before = Run(model, this.cell, SMALL, COUNTING).learner.net
    fresh.learner.learn(batch)
    error, moved = 0.0, 0.0
    for name, weight in module.require_policy().named_parameters():
        expected = weight.detach()
        error += float((weight_of(fresh.learner.net, name) - expected).square().sum())
        moved += float((weight_of(before, name) - expected).square().sum())
    # Adam makes much of rounding where a gradient is nearly 0. No other method is within a fifth.
    assert moved > 0 and error < (1e-3) ** 2 * moved


def weight_of(net: TinyLlama, name: str) -> torch.Tensor:
    """The weight that transformers calls ``name``, out of those that are one here."""
    if not name.startswith("model.layers"):
        return {"model.embed_tokens.weight": net.embedding, "model.norm.weight": net.norm}[
            name
        ].data
    layer: Any = net.layers[int(name.split(".")[2])]
    kind = name.split(".")[-2]
    if kind in ("q_proj", "k_proj", "v_proj"):
        return layer.qkv.data.chunk(3)["qkv".index(kind[0])]
    if kind in ("gate_proj", "up_proj"):
        return layer.gate_up.data.chunk(2)[kind == "up_proj"]
    return {"o_proj": layer.out, "down_proj": layer.down, "input_layernorm": layer.norm,
            "post_attention_layernorm": layer.mlp_norm}[kind].data  # fmt: skip


@pytest.mark.parametrize("staleness", ["whole", "mixed"])
def test_tokens_come_from_the_versions_that_the_lag_says(model: Any, staleness: str) -> None:
    this = make_run(model, "segment", 4, staleness, steps=6)
    rollouts = this.rollouts(6)
    lags = [6 - version for version in rollouts.versions]
    assert lags[0] == 4 and len(lags) == 9
    assert sorted(set(lags)) == ([4] if staleness == "whole" else [2, 3, 4])
    assert lags == sorted(lags, reverse=True)
    batch = this.batch(rollouts)
    assert int(batch.lags.max()) == 4
    for start, end, version in rollouts.segments:
        assert_scored_by(this, rollouts, rollouts.behavior, (start, end), version)
    scores = segment_scores(this.history, rollouts)
    for (start, end, version), score in zip(rollouts.segments, scores, strict=True):
        assert score is not None
        assert_scored_by(this, rollouts, score, (start, end), version + 1)


def assert_scored_by(
    this: Run, rollouts: Rollouts, found: torch.Tensor, places: tuple[int, int], version: int
) -> None:
    """``found`` are log-probs of ``version`` and of no other near it, in those places."""
    index = torch.arange(9)
    wanted = rollouts.sampled & (index >= places[0]) & (index < places[1])
    distances = []
    for other in (version - 1, version, version + 1):
        with torch.no_grad():
            net = this.history.at(other)
            logprobs = net.logprobs(rollouts.prompts, rollouts.answers, rollouts.sampled)
        distances.append(float((logprobs - found)[wanted].abs().max()))
    assert distances[1] < 1e-4 < 1e-2 < min(distances[0], distances[2])


def test_no_batch_is_older_than_the_run_and_lag_0_is_fresh(model: Any) -> None:
    assert course(model, "segment", 2).max_lags == [0, 1, 2, 2]
    assert course(model, "segment", 0).max_lags == [0, 0, 0, 0]


def test_an_engine_that_rounds_differs_from_the_trainer_the_more_the_fewer_bits(model: Any) -> None:
    values = torch.tensor([1.0, 1.0625, -1.09, 3.3, 0.0, 1e-3])
    assert rounded(values, 4).tolist() == [1.0, 1.0, -1.125, 3.25, 0.0, 2**-10]
    assert torch.equal(rounded(values, 8), values.bfloat16().float())
    found = {}
    for bits in (None, 8, 4, 2):
        cell = Cell("segment", "mixed", 2, engine_bits=bits)
        this = Run(model, cell, SMALL, COUNTING)
        for step in range(3):
            this.step(step)
        found[bits] = this.mismatch(3)
    assert found[None] < 1e-5 < found[8] < found[4] < found[2]


def test_what_an_engine_differs_in_is_in_the_drift_of_fresh_tokens_too(model: Any) -> None:
    cells = [Cell("segment", "whole", 0, engine_bits=bits) for bits in (None, 3)]
    exact, rounding = (run(model, cell, SMALL, COUNTING).measures for cell in cells)
    assert exact["abs_drift"] == 0 and "mismatch" not in exact
    assert rounding["abs_drift"] > 1e-3
    assert rounding["abs_drift"] == pytest.approx(rounding["mismatch"], rel=0.5)


def test_an_engine_that_rounds_has_its_own_table_and_no_part_in_the_others(
    tmp_path: Path, model: Any
) -> None:
    arguments = ["--stage", "engines", "--steps", "4", "--groups", "2", "--seeds", "2"]
    arguments += ["--folder", str(tmp_path), "--figure", str(tmp_path / "staleness.png")]
    arguments += ["--lags", "1", "--methods", "segment", "past"]
    ablation.main(arguments, model=model)
    lines = Results(tmp_path / "results.jsonl.gz").runs
    assert {(line["method"], line["engine_bits"]) for line in lines} == {
        (method, bits) for method in ("segment", "past") for bits in (8, 4, 3)
    }
    text = (tmp_path / "tables.md").read_text()
    assert text.startswith("## An engine that rounds its weights")
    assert text.count("| past |") == text.count("| segment |") == 3
    segment, past, behavior = (Cell(m, "whole", 1, engine_bits=3) for m in
                               ("segment", "past", "behavior"))  # fmt: skip
    assert representative(replace(segment, method="proximal")) == segment, "q is x, whatever b is"
    assert representative(past) == past != representative(behavior), "x at lag 0, not b"
    assert representative(replace(past, engine_bits=None)).method == "behavior"


def test_without_staleness_methods_of_one_kind_are_one_run_bit_for_bit(model: Any) -> None:
    ways = successes_by_kind(model, lag=0)
    assert len({METHODS[name].kind(0) for name in ("segment", "proximal", "behavior")}) == 1
    for found in ways.values():
        assert all(success == found[0] for success in found)
    assert len(ways) == len({tuple(found[0]) for found in ways.values()}) == 5


def test_at_lag_1_the_centres_q_and_x_are_one_run_bit_for_bit(model: Any) -> None:
    ways = [found for found in successes_by_kind(model, lag=1).values() if len(found) > 1]
    assert max(map(len, ways)) == 6
    for found in ways:
        assert all(success == found[0] for success in found)


def successes_by_kind(model: Any, lag: int) -> dict[Any, list[list[float]]]:
    ways: dict[Any, list[list[float]]] = {}
    for name, method in METHODS.items():
        alone = method.kind(lag) is method
        if not alone and name != "proximal, log-linear x":  # whose own pass differs by rounding
            ways.setdefault(method.kind(lag), []).append(course(model, name, lag).success)
    return ways


def test_with_staleness_every_method_goes_its_own_way(model: Any) -> None:
    ways = {name: tuple(course(model, name, 3).success) for name in METHODS}
    assert all(len(set(way)) > 1 for way in ways.values())
    same = [names for way in set(ways.values()) if len(names := names_of(ways, way)) > 1]
    assert not same


def names_of(ways: dict[str, tuple[float, ...]], way: tuple[float, ...]) -> list[str]:
    return [name for name, other in ways.items() if other == way]


def test_methods_are_the_settings_that_their_names_say() -> None:
    assert DEFAULT == "segment" and METHODS[DEFAULT].loss == sdp.LossConfig()
    assert METHODS["behavior"].loss == sdp.LossConfig(trust_region="behavior")
    assert METHODS["proximal"].loss == sdp.LossConfig(trust_region="proximal")
    assert METHODS["origin"].loss.bridge_exponent == 0 != METHODS["bridge^0.5"].loss.bridge_exponent
    assert [n for n, m in METHODS.items() if not m.corrected] == ["uncorrected"]


def test_pairs_share_prompts_and_random_numbers_and_seeds_do_not(model: Any) -> None:
    first, second = (make_run(model, m, 2, "mixed", 0).rollouts(0) for m in ("segment", "TIS"))
    assert torch.equal(first.answers, second.answers)
    other = Run(model, Cell("segment", "mixed", 2, seed=1), SMALL, COUNTING).rollouts(0)
    assert not torch.equal(first.prompts, other.prompts)


def test_success_is_the_share_of_right_samples(model: Any) -> None:
    this = Run(model, Cell("segment", "whole", 0), SMALL)
    chance = this.evaluate()
    by_hand = []
    for row in SORTING.test_rows[: SMALL.num_tests]:
        ids = tiny_tokenizer()(row["prompt"] + row["answer"])["input_ids"]
        with torch.no_grad():
            table = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        digits = [table[6 + i, ids[7 + i]] for i in range(6)]
        by_hand.append(float(torch.stack(digits).prod() * (table[12, 1] + table[12, 49])))
    assert chance == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-3)


def test_bias_and_noise_of_gradients_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(400, generator=generator)

    def noisy(mean: torch.Tensor, count: int, noise: float) -> torch.Tensor:
        return mean + noise * torch.randn(count, 400, generator=generator)

    fresh = GradientSums()
    for row in noisy(truth, 30, 1.0):
        fresh.add(row)
    found = summed_up(((row, 0.5) for row in noisy(0.5 * truth, 30, 2.0)), fresh)
    assert found.cosine_of_mean == pytest.approx(1, abs=0.1)
    assert found.length == pytest.approx(0.5, abs=0.1)
    assert found.noise == pytest.approx(2.0, abs=0.2)
    assert found.cosine == pytest.approx(0.5 / (0.25 + 4.0) ** 0.5, abs=0.05)
    assert found.acting == 0.5


def test_the_probe_takes_every_method_on_the_same_samples(model: Any) -> None:
    this = Run(model, Cell("segment", "whole", 3), SMALL, COUNTING)
    found = {line["method"]: line for line in probe(this, (3,), num_batches=2, num_fresh=2)}
    assert {"origin", "sequence weights, present baseline"} < set(found)
    assert found["uncorrected"]["acting"] == 1 > found["proximal"]["acting"]  # the cap on the drift
    assert found["proximal"]["acting"] > found["behavior"]["acting"]  # the clip
    assert found["proximal"]["cosine"] != found["origin"]["cosine"]
    assert this.history.version == 4


@pytest.fixture
def finished(tmp_path: Path, model: Any) -> Iterator[Path]:
    arguments = ["--steps", "4", "--groups", "2", "--seeds", "2", "--folder", str(tmp_path)]
    arguments += ["--figure", str(tmp_path / "staleness.png")]
    ablation.main([*arguments, "--methods", "segment", "origin"], model=model)
    yield tmp_path


def test_the_script_computes_a_table_a_figure_and_raw_results(finished: Path) -> None:
    lines = Results(finished / "results.jsonl.gz").runs
    cells = {cell_of(line) for line in lines}
    assert {(c.lag, c.staleness) for c in cells if c.method == "origin"} == {
        (4, "whole"), (4, "mixed"), (8, "whole"), (8, "mixed")
    }  # fmt: skip
    assert {line["max_lag"] for line in lines if line["lag"] == 0} == {0}
    text = (finished / "tables.md").read_text()
    assert "| origin |" in text and "### Paired differences to segment" in text
    assert (finished / "staleness.png").read_bytes().startswith(b"\x89PNG")
