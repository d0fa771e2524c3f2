"""The ablation on a real model: frozen layers are computed once, and change nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdp_lightning.config.model_source import quiet_transformers
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "recipes/benchmarks"))

from staleness import asynchronous, real_model
from staleness.layers import Layout
from staleness.methods import ON_REAL_MODELS
from staleness.net import TinyLlama
from staleness.plan import Results
from staleness.policies import Shared, tempered_exponent
from staleness.task import SORTING, Task
from staleness.training import Cell, Run, Scale, prepare, run
from staleness.trunk import Trunk

SMALL = Scale(num_steps=4, num_groups=3, group_size=4, learning_rate=2e-2, evaluate_every=4,
              num_final=1, num_tests=4, num_trained=4)  # fmt: skip


def digits(completion: str, row: Any) -> float:
    return float(sum(c.isdigit() for c in completion) >= 2)


TASK = replace(
    SORTING,
    judge=digits,
    num_frozen=1,
    train_rows=SORTING.train_rows[:32],
    test_rows=SORTING.test_rows[:4],
)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random Llama with fewer heads for keys than for queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("num_frozen", [0, 1])
def test_log_probs_and_gradients_of_answers_that_begin_alike_are_those_of_transformers(
    model: Any, num_frozen: int
) -> None:
    layout = Layout(num_answers=4)
    trunk = Trunk(model, layout, num_layers=num_frozen) if num_frozen else None
    net = TinyLlama(model, layout, trunk)
    if num_frozen:
        assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"layers"}
    assert len(net.layers) == 3 - num_frozen
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 50, (2, 7), generator=generator)
    answers = torch.randint(3, 50, (2, 4, 9), generator=generator)
    answers[:, 1, :3], answers[:, 2, :6], answers[0, 3] = (
        answers[:, 0, :3], answers[:, 1, :6], answers[0, 2]
    )  # fmt: skip
    weight = torch.rand(answers.shape, generator=generator)
    whole = torch.cat([prompts[:, None].expand(-1, 4, -1), answers], -1).flatten(0, 1)
    for _ in range(2):  # the second time a trunk has all states
        found = net.logprobs(prompts, answers, torch.ones_like(answers, dtype=torch.bool))
    table = model(input_ids=whole, use_cache=False).logits.log_softmax(-1)[:, 6:-1]
    expected = table.gather(-1, whole[:, 7:, None])[..., 0].view(2, 4, 9)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    own, theirs = net.layers[-1].down, model.model.layers[-1].mlp.down_proj.weight  # pyright: ignore
    (gradient,) = torch.autograd.grad((found * weight).sum(), [own])
    (wanted,) = torch.autograd.grad((expected * weight).sum(), [theirs])
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("staleness", ["whole", "mixed"])
def test_samples_above_a_trunk_have_the_log_probs_of_their_versions(
    model: Any, staleness: Any
) -> None:
    this = Run(model, Cell("segment", staleness, 2), SMALL, TASK)
    for step in range(3):
        this.step(step)
    rollouts = this.rollouts(3)
    for start, end, version in rollouts.segments:
        place = torch.arange(len(rollouts.versions))
        wanted = rollouts.sampled & (place >= start) & (place < end)
        with torch.no_grad():
            own = this.history.at(version).logprobs(rollouts.prompts, rollouts.answers, wanted)
        assert float((own - rollouts.behavior)[wanted].abs().max()) < 1e-4


def test_what_is_shared_changes_nothing(model: Any) -> None:
    shared = Shared(model, TASK, SMALL.group_size)
    cells = [Cell(method, "mixed", 2) for method in ("segment", "origin", "segment")]
    first, other, again = (run(model, cell, SMALL, TASK, shared) for cell in cells)
    alone = run(model, cells[0], SMALL, TASK)
    assert first.success == again.success == alone.success != other.success
    assert first.trained == alone.trained and len(first.trained) == 2


def test_a_tempered_bridge_leaves_as_much_of_the_sample_as_it_says(model: Any) -> None:
    this = Run(model, Cell("tempered bridge", "mixed", 4), SMALL, TASK)
    for step in range(4):
        this.step(step)
    batch = prepare(
        this.learner.update, this.learner.forward, this.batch(this.rollouts(4)), this.method
    )
    exponents = [tempered_exponent(batch, share) for share in (0.0, 0.5, 0.9, 0.999999)]
    assert exponents == sorted(exponents, reverse=True)
    assert exponents[0] == 1.0 > exponents[-1]


def test_the_driver_goes_on_where_it_stopped(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    computed: list[Cell] = []

    def compute(cell: Cell, scale: Scale) -> dict[str, Any]:
        computed.append(cell)
        line = {**vars(cell), "final": 0.5, "steps": [0, 4], "success": [0.5, 0.5], "max_lag": 0}
        return line | {"abs_drift": 0.08, "mean_lag": 7.5}

    class Here:
        """A pool that computes at once, in this process."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, function: Any, *arguments: Any) -> Any:
            from concurrent.futures import Future

            future: Future[Any] = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(real_model, "compute", compute)
    monkeypatch.setattr(real_model, "ProcessPoolExecutor", Here)
    arguments = ["--file", str(tmp_path / "results.jsonl.gz"), "--seeds", "1"]
    arguments += ["--tables", str(tmp_path / "tables.md"), "--figure", str(tmp_path / "drift.png")]
    real_model.main([*arguments, "--methods", "segment", "TIS", "--lags", "0", "8"])
    # Without staleness the two are one run, at each of two rates.
    assert len(computed) == 6
    real_model.main([*arguments, "--methods", "segment", "TIS", "origin", "--lags", "8"])
    assert [cell.method for cell in computed[6:]] == ["origin"] * 2
    assert len(Results(tmp_path / "results.jsonl.gz").runs) == 8
    assert "sums, Place(staleness='whole', lag=8" in capsys.readouterr().out
    (told,) = [
        x
        for x in (tmp_path / "tables.md").read_text().splitlines()
        if "sums | whole 8, 2 minibatches, x 1 |" in x
    ]
    assert told.startswith("| 0.0107 | 0.080 | sums") and "| +0.000 ± inf (1) |" in told
    assert (tmp_path / "drift.png").stat().st_size > 10_000
    assert set(real_model.MANY) <= set(ON_REAL_MODELS)


def test_a_fit_is_held_against_the_harness_by_the_batches_of_the_last_quarter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def line(kind: str, seed: int, end: float) -> dict[str, Any]:
        rewards = [0.0] * 6 + [end - 0.1, end + 0.1]
        return {"kind": kind, "lag": 8, "seed": seed, "rewards": rewards, "lags": [0.0] * 7 + [8.0]}

    fits = [line("fit", seed, end) for seed, end in enumerate((0.4, 0.5))]
    near = [line("harness", seed, end) for seed, end in enumerate((0.45, 0.55))]
    asynchronous.show([*fits, *near])
    assert "lag 8: fit less harness -0.050" in (told := capsys.readouterr().out)
    assert "agree; mean lag of the fits 4.00" in told
    far = [line("harness", seed, end) for seed, end in enumerate((0.951, 0.95))]
    asynchronous.show([*[line("fit", seed, 0.4 + seed / 1000) for seed in range(2)], *far])
    assert "DISAGREE" in capsys.readouterr().out


def test_tasks_are_of_one_length_and_hold_rows_out() -> None:
    assert isinstance(TASK, Task)
    from staleness.task import _counted, _counting, _sums  # pyright: ignore[reportPrivateUsage]

    for rows in (_sums, _counting):
        every, held_out = rows()
        assert len({len(row["prompt"]) for row in every}) == 1
        assert 0 < len(held_out) < len(every) / 3 and all(row in every for row in held_out)
    row = _counting()[0][0]
    assert row["answer"] == " 12, 13, 14, 15, 16"
    assert _counted(row["answer"] + "\n", row) == 1.0
    assert _counted(" 12, 13, 15, 16, 17\n", row) == 0.4
    assert 0 < _counted(row["answer"] + ", 17\n", row) < 1
