"""Windows, chunks, sinks and caps in every layout: rows that go past them equal separate ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdp_lightning.errors import ConfigError
from sdp_lightning.training.batch import Layout
from sdp_lightning.training.policy.forward import own_logprobs, sequence_logprobs
from sdp_lightning.training.policy.loading import recompute_activations
from sdp_lightning.training.policy.packing import Pack
from support.plain_forwards import LAYOUTS, plain, random_batch, uneven_sum
from support.score_runners import runner_of
from support.windowed_models import WINDOWED, windowed_model

FAST = [
    ("gpt_oss", "eager"),  # a window and sinks, experts
    ("gemma2", "eager"),  # a window and a cap
    ("qwen3_moe", "sdpa"),
    ("llama4_text", "sdpa"),  # chunks
    ("deepseek_v32", "sdpa"),  # computes with its mask
]


def gradients(model: Any, logprobs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    uneven_sum(logprobs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "attention"), FAST)
def test_rows_past_a_window_equal_separate_ones_with_gradients(kind: str, attention: str) -> None:
    model, batch = windowed_model(kind), random_batch(7)
    assert batch.lengths.max() > 2 * 6
    expected, _ = plain(model, batch)
    wanted = gradients(model, expected)
    model.set_attn_implementation(attention)
    model.train()
    recompute_activations(model)
    for layout in LAYOUTS:
        found = sequence_logprobs(model, batch, layout=layout).logprobs
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        grads = gradients(model, found)
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            size = wanted[name].abs().max()
            torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=5e-5 * float(size))


def test_a_window_is_applied_to_columns_of_rows_and_costs_nothing_where_all_is_seen() -> None:
    """A row sees the last tokens of its prefix, however far apart the two are in the pack."""
    pack = Pack.of(random_batch(3), shared=True)

    def near(row: Tensor, head: Tensor, column: Tensor, other: Tensor) -> Tensor:
        return other > column - 3

    distance = pack.column[:, None] - pack.column
    expected = pack.dense_mask() & (distance < 3)
    assert torch.equal(pack.dense_mask(near), expected)
    assert torch.equal(pack.span_mask(near).dense()[0, 0], expected)
    alone = Pack.of(random_batch(3), shared=False)
    wide = alone.span_mask(lambda row, head, column, other: other > column - 100)
    assert all(span.visible is None for span in wide.spans)  # plain causal attention


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_queries_that_grow_with_their_index_in_the_pack_are_found(layout: Layout) -> None:
    """Llama 4's: beyond ``floor_scale`` tokens, counted without regard to rows."""
    model, batch = windowed_model("llama4_text", floor_scale=24), random_batch(0)
    with pytest.raises(ConfigError, match=f"'llama4_text' does not keep rows apart.*'{layout}'"):
        runner_of(model, layout).layout(batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_windowed_model_scores_in_every_layout(kind: str, layout: Layout) -> None:
    model, batch = windowed_model(kind), random_batch(7)
    if (kind, layout) == ("gpt_neo", "shared_prefix"):  # its window is of places in the pack
        with pytest.raises(ConfigError, match="does not keep rows apart"):
            runner_of(model, layout).logprobs(batch)
        return
    expected = own_logprobs(model, batch)[0].detach()
    found = runner_of(model, layout).logprobs(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
